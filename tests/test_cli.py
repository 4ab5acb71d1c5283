"""The commands, as a user types them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import get_args

import pytest
import torch
from safetensors.torch import save_file
from torch import nn


def _run(*arguments: str | Path, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "weightspace", *map(str, arguments)]
    return subprocess.run(
        command, capture_output=True, text=True, cwd=cwd, check=False, stdin=subprocess.DEVNULL
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("models")
    for seed in range(2):
        torch.manual_seed(seed)
        state = nn.Sequential(nn.Linear(5, 7), nn.ReLU(), nn.Linear(7, 3)).state_dict()
        save_file(state, root / f"net-{seed}.safetensors")
    torch.save(state, root / "copy-of-1.pt")
    (root / "readme.md").write_text("nothing\n")
    done = _run("index", root, "--json")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert (report["models"], len(report["ignored"]), report["failures"]) == (3, 1, [])
    return root


def test_help_names_the_commands() -> None:
    done = _run("--help")
    assert done.returncode == 0
    assert {"index", "similar", "inspect", "graph", "lineage", "zoo", "demo"} <= set(done.stdout.split())


def test_similar_finds_the_zoo_above_the_file(folder: Path) -> None:
    done = _run("similar", folder / "net-1.safetensors", "--json")
    assert done.returncode == 0, done.stderr
    first, second = json.loads(done.stdout)
    assert first["name"] == "copy-of-1.pt"
    assert first["distance"] < 1e-6 < second["distance"]
    table = _run("similar", "net-1.safetensors", "--zoo", folder, "-k", "1")
    assert "copy-of-1.pt" in table.stdout
    assert "net-0" not in table.stdout


def test_inspect_prints_the_card_and_its_findings(folder: Path, tmp_path: Path) -> None:
    card = json.loads(_run("inspect", folder / "net-0.safetensors", "--json").stdout)
    assert (card["parameters"], card["format"], card["findings"]) == (66, "safetensors", [])
    odd = torch.load(folder / "copy-of-1.pt", weights_only=True)
    odd["0.weight"][2] = 0.0
    odd["2.bias"][1] = float("nan")
    torch.save(odd, tmp_path / "odd.pt")
    done = _run("inspect", tmp_path / "odd.pt")
    assert done.returncode == 0, done.stderr
    assert "1 of 7 slices" in done.stdout
    assert "1 NaN" in done.stdout


def test_an_unreadable_file_is_exit_code_two_and_named(folder: Path, tmp_path: Path) -> None:
    data = (folder / "net-0.safetensors").read_bytes()
    (tmp_path / "torn.safetensors").write_bytes(data[: len(data) // 2])
    (tmp_path / "whole.safetensors").write_bytes(data)
    done = _run("index", tmp_path)
    assert done.returncode == 2
    assert "torn.safetensors" in done.stdout
    assert "1 models in the index" in done.stdout


@pytest.mark.parametrize(
    "arguments",
    [
        ("inspect", "no-such-file.pt"),
        ("similar", "no-such-file.pt"),
        ("index", "no-such-folder"),
        ("lineage", "no-such-folder"),
        ("zoo", "build", "no-such-recipe"),
        ("graph", "no-such-file.pt", "--out", "x.json"),
    ],
)
def test_a_mistake_is_one_sentence_without_a_traceback(arguments: tuple[str, ...], tmp_path: Path) -> None:
    done = _run(*arguments, cwd=tmp_path)
    assert done.returncode == 1
    assert done.stderr.startswith("weightspace: ")
    assert len(done.stderr.strip().splitlines()) == 1


def test_zoo_build_trains_indexes_and_resumes(tmp_path: Path) -> None:
    recipe = """
        name = "tiny"
        data = "digits"
        [defaults]
        epochs = 1
        [[population]]
        name = "base"
        architecture = "cnn"
        width = 4
        seeds = 2
        [[population]]
        name = "copy"
        parent = "base"
        permuted = true
        seeds = 1
    """
    (tmp_path / "tiny.toml").write_text(recipe)
    done = _run("zoo", "build", "tiny.toml", "--out", "zoo", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "3 networks in zoo" in done.stdout
    before = {file: file.stat().st_mtime_ns for file in (tmp_path / "zoo").glob("*.safetensors")}
    assert len(before) == 3
    neighbours = json.loads(_run("similar", "zoo/copy-0.safetensors", "--json", cwd=tmp_path).stdout)
    assert neighbours[0]["name"] == "base-0.safetensors"
    assert neighbours[0]["distance"] < 1e-5 < neighbours[1]["distance"]
    assert _run("zoo", "build", "tiny.toml", "--out", "zoo", cwd=tmp_path).returncode == 0
    assert before == {file: file.stat().st_mtime_ns for file in (tmp_path / "zoo").glob("*.safetensors")}


@pytest.mark.parametrize("form", ["json", "graphml", "pyg"])
def test_graph_writes_a_file(folder: Path, tmp_path: Path, form: str) -> None:
    out = tmp_path / f"graph.{form}"
    done = _run("graph", folder / "net-0.safetensors", "--format", form, "--out", out)
    assert done.returncode == 0, done.stderr
    assert out.stat().st_size > 66


def test_lineage_takes_a_folder_or_models(folder: Path, tmp_path: Path) -> None:
    whole = json.loads(_run("lineage", folder, "--json").stdout)
    assert [(e["parent"], e["child"]) for e in whole["edges"]] == [("copy-of-1.pt", "net-1.safetensors")]
    some = _run("lineage", folder / "net-1.safetensors", folder / "copy-of-1.pt", "--out", tmp_path / "found.json")
    assert some.returncode == 0, some.stderr
    found = json.loads((tmp_path / "found.json").read_text())
    assert [(e["parent"], e["child"], e["kind"]) for e in found["edges"]] == [
        ("net-1.safetensors", "copy-of-1.pt", "copy")
    ]
    one = _run("lineage", folder / "net-1.safetensors")
    assert one.returncode == 1
    assert "1 model was given" in one.stderr


def test_names_in_a_file_do_not_drive_the_terminal(tmp_path: Path) -> None:
    evil = "\x1b]0;owned\x07\x1b[2J[red]w"
    save_file({f"{evil}.weight": torch.randn(3, 4), f"{evil}.bias": torch.randn(3)}, tmp_path / "model.safetensors")
    (tmp_path / f"bad{evil}.safetensors").write_bytes(b"no tensors here")
    for arguments in (["inspect", tmp_path / "model.safetensors"], ["index", tmp_path], ["inspect", tmp_path / evil]):
        done = _run(*arguments)
        assert "\x1b" not in done.stdout + done.stderr
        assert "\x07" not in done.stdout + done.stderr
    assert r"\x1b" in done.stderr
    assert "[red]w" in done.stderr


def test_measures_of_the_command_line_are_those_of_the_zoo() -> None:
    from weightspace.cli import looking
    from weightspace.zoo import zoo

    assert get_args(looking.By) == get_args(zoo.By)
