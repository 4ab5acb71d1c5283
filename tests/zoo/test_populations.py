"""Building sampled recipes: records, resuming, children, failures, the index."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

import weightspace as ws
from weightspace.errors import ZooError
from weightspace.zoo import populations
from weightspace.zoo.files import read_record
from weightspace.zoo.populations import FAILURES, build_sampled
from weightspace.zoo.recipe import parse
from weightspace.zoo.train import build_zoo

TOML = """
name = "tiny"
data = { name = "digits", train = 200, test = 100 }

[[population]]
name = "base"
runs = 5
epochs = 2
batch = 32
checkpoints = [1, 2]
[population.network]
kind = "cnn"
channels = [4, 4]
activation = { choice = ["relu", "tanh"] }
[population.hyper]
learning_rate = { log_uniform = [1e-3, 1e-1] }
optimiser = { choice = ["adam", "sgd"] }

[[population]]
name = "child"
parent = "base"
runs = 6
epochs = 1
classes = 4
"""


def _recipe(text: str = TOML) -> Any:
    import tomllib

    return parse(tomllib.loads(text))


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("built")
    build_sampled(_recipe(), folder, progress=False)
    return folder


def test_each_file_carries_its_record(built: Path) -> None:
    files = sorted(path.name for path in built.iterdir())
    assert files == sorted(
        [f"base-{i:04d}-e{e:03d}.safetensors" for i in range(5) for e in (1, 2)]
        + [f"child-{i:04d}-e001.safetensors" for i in range(6)]
    )
    record = read_record(built / "base-0003-e002.safetensors")
    assert (record["recipe"], record["population"], record["run"]) == ("tiny", "base", "base-0003")
    assert (record["epoch"], record["final"], record["parent"], record["diverged"]) == (2, True, None, False)
    assert not read_record(built / "base-0003-e001.safetensors")["final"]
    assert record["network"]["kind"] == "cnn"
    assert record["hyper"]["activation"] == record["network"]["activation"]
    assert 1e-3 <= record["hyper"]["learning_rate"] <= 1e-1
    for key in ("train_accuracy", "train_loss", "test_accuracy", "test_loss", "seconds"):
        assert record[key] >= 0
    child = read_record(built / "child-0005-e001.safetensors")
    assert child["parent"] == "base-0000-e002.safetensors"
    assert child["relation"] == "fine-tuned"
    assert child["task"] == "digits " + ",".join(child["task"].partition(" ")[2].split(","))
    assert len(child["task"].split(",")) == 4


def test_the_index_has_every_network_proved(built: Path) -> None:
    zoo = ws.Zoo(built)
    report = zoo.index(jobs=1, progress=False)
    assert (report.models, report.failures) == (16, ())
    table = zoo.table()
    assert set(table["wiring"]) == {"proved"}
    assert set(table["architecture"]) == {"CNN of a weightspace recipe, as its record says"}
    assert table["test_accuracy"].between(0, 1).all()


def test_a_build_is_the_same_in_stacks_of_any_size_and_in_processes(built: Path, tmp_path: Path) -> None:
    result = build_sampled(_recipe(), tmp_path, stack=2, jobs=2, progress=False)
    assert (len(result.files), result.trained) == (16, 16)
    assert set(result.scores) == {"base", "child"}
    for path in result.files:
        one, two = load_file(path), load_file(built / path.name)
        assert all(torch.allclose(one[n], two[n], atol=1e-3, rtol=1e-2) for n in two), path.name


def test_what_is_there_is_kept_and_what_changed_is_made_again(tmp_path: Path) -> None:
    def times() -> dict[str, int]:
        return {path.name: path.stat().st_mtime_ns for path in tmp_path.glob("*.safetensors")}

    build_zoo(_recipe(), tmp_path, progress=False)
    before = times()
    assert build_sampled(_recipe(), tmp_path, progress=False).trained == 0
    (tmp_path / "base-0001-e001.safetensors").write_bytes(b"torn")
    (tmp_path / "child-0002-e001.safetensors").unlink()
    assert build_sampled(_recipe(), tmp_path, progress=False).trained == 3
    after = times()
    assert {name[:9] for name in before if before[name] != after[name]} == {"base-0001", "child-000"}
    # Another task for the children leaves the parents alone; another parent remakes its children.
    assert build_sampled(_recipe(TOML.replace("classes = 4", "classes = 3")), tmp_path, progress=False).trained == 6
    assert build_sampled(_recipe(TOML.replace("[4, 4]", "[4, 5]")), tmp_path, progress=False).trained == 16


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs SIGKILL")
def test_a_killed_build_goes_on(built: Path, tmp_path: Path) -> None:
    (tmp_path / "tiny.toml").write_text(TOML)
    code = f"""
        from weightspace.zoo.train import build_zoo
        build_zoo({str(tmp_path / "tiny.toml")!r}, {str(tmp_path / "out")!r}, progress=False)
    """
    process = subprocess.Popen([sys.executable, "-c", textwrap.dedent(code)])
    deadline = time.monotonic() + 120
    while len(list((tmp_path / "out").glob("*.safetensors"))) < 3 and time.monotonic() < deadline:
        time.sleep(0.005)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    there = list((tmp_path / "out").glob("*.safetensors"))
    assert there
    assert all(read_record(path) for path in there)  # nothing half-written
    result = build_sampled(_recipe(), tmp_path / "out", progress=False)
    assert len(result.files) == 16
    for path in result.files:
        one, two = load_file(path), load_file(built / path.name)
        assert all(torch.allclose(one[n], two[n], atol=1e-3, rtol=1e-2) for n in two)


def test_diverged_networks_are_files_that_say_so(tmp_path: Path) -> None:
    wild = TOML.replace("learning_rate = { log_uniform = [1e-3, 1e-1] }", "learning_rate = 1e30")
    result = build_sampled(_recipe(wild), tmp_path, progress=False)
    assert len(result.files) == 16
    assert result.diverged == 16
    record = read_record(result.files[0])
    assert record["diverged"] is True
    assert record["train_loss"] is None
    report = ws.Zoo(tmp_path).index(jobs=1, progress=False)
    assert (report.models, report.failures) == (16, ())


def test_a_run_that_fails_is_listed_and_the_others_are_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = populations.train_stack

    def failing(runs: Any, *args: Any) -> Any:
        if any(run.name == "base-0002" for run in runs):
            raise RuntimeError("out of memory")
        return original(runs, *args)

    monkeypatch.setattr(populations, "train_stack", failing)
    only = _recipe(TOML.partition("[[population]]\nname = \"child\"")[0])
    result = build_sampled(only, tmp_path, progress=False)
    assert result.failures == (("base-0002", "out of memory"),)
    assert len(result.files) == 8
    (line,) = (tmp_path / FAILURES).read_text().splitlines()
    assert json.loads(line)["network"]["kind"] == "cnn"
    # Its children cannot be made, and the reason is named.
    with pytest.raises(ZooError, match="base-0002-e002"):
        build_sampled(_recipe(), tmp_path, progress=False)
    monkeypatch.setattr(populations, "train_stack", original)
    assert build_sampled(only, tmp_path, progress=False).failures == ()
    assert not (tmp_path / FAILURES).exists()


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('kind = "cnn"', 'kind = "tree"', "unknown kind"),
        ("channels = [4, 4]", "channels = [4, 0]", "channels is"),
        ('["adam", "sgd"]', '["lion"]', "optimiser 'lion'"),
    ],
)
def test_a_recipe_that_cannot_be_trained_trains_nothing(tmp_path: Path, old: str, new: str, message: str) -> None:
    with pytest.raises(ZooError, match=message):
        build_sampled(_recipe(TOML.replace(old, new)), tmp_path, progress=False)
    assert list(tmp_path.iterdir()) == []


def test_a_device_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ZooError, match="device 'tpu'"):
        build_sampled(_recipe(), tmp_path, device="tpu")
    if not torch.cuda.is_available():
        with pytest.raises(ZooError, match="no CUDA device"):
            build_sampled(_recipe(), tmp_path, device="cuda")
    assert list(tmp_path.iterdir()) == []


def test_the_command(tmp_path: Path) -> None:
    from weightspace.cli import app

    (tmp_path / "tiny.toml").write_text(TOML + "\n[full.population.base]\nruns = 6\n")
    arguments = ["zoo", "build", str(tmp_path / "tiny.toml"), "--out", str(tmp_path / "out"), "--jobs", "1", "--full"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    assert "18 networks in" in result.output
    assert "18 trained" in result.output
    assert "0 diverged" in result.output
    assert "18 models in the index" in result.output
