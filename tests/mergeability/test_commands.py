"""``weightspace score`` and ``weightspace zoo record``, as a user types them."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from weightspace import cli
from weightspace.mergeability import protection

sys.path.insert(0, str(Path(__file__).parent))
import small
from networks import fresh, wiring

NEW = 3


@dataclass(frozen=True)
class Done:
    code: int
    out: str
    err: str

    @property
    def lines(self) -> list[str]:
        return self.out.splitlines()


Run = Callable[..., Done]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], folder: Path) -> Run:
    """The command in this process, with the small prior for ``score``."""

    def command(*arguments: str | Path) -> Done:
        given = list(map(str, arguments))
        if given[0] == "score" and "--help" not in given:
            given += ["--prior", str(folder.parent / "prior")]
        monkeypatch.setattr(sys, "argv", ["weightspace", *given])
        capsys.readouterr()
        try:
            cli.main()
            code = 0
        except SystemExit as stop:
            code = int(stop.code or 0)
        told = capsys.readouterr()
        return Done(code, told.out, told.err)

    return command


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from weightspace.zoo.files import save_network

    root = tmp_path_factory.mktemp("command") / "models"
    root.mkdir()
    small.prior().save(root.parent / "prior")
    base, models = small.family(NEW)
    network = {"kind": "mlp", "input": [12], "classes": 5, "widths": [24, 20], "activation": "relu"}
    for name, tensors in {"base": base, **models}.items():
        save_network(tensors, {"network": network}, root / f"{name}.safetensors")
    hidden = protection.protect(models["m2"], wiring("mlp"), seed=3)
    save_network(hidden, {"network": network}, root.parent / "hidden.safetensors")
    return root


def test_two_models_with_their_base(run: Run, folder: Path) -> None:
    done = run("score", folder / "m1.safetensors", folder / "m2.safetensors", "--base", folder / "base.safetensors")
    assert done.code == 0, done.err
    assert done.lines[0].startswith("Can be merged; ")
    assert "interval" in done.lines[0]
    order = ["preflight: 2 models", "nothing was found", "accuracy retained", "task-arithmetic", "what the weights say",
             "sign conflict", "to measure it: weightspace merge", "weightspace zoo record"]  # fmt: skip
    places = [done.out.index(text) for text in order]
    assert places == sorted(places)
    assert "block by block" not in done.out
    more = run(
        "score", folder / "m1.safetensors", folder / "m2.safetensors", "-b", folder / "base.safetensors", "--blocks",
        "-m", "ties",
    )  # fmt: skip
    assert "hidden.1.weight" in more.out
    assert "linear" not in more.out


def test_the_commands_it_proposes_can_be_typed(run: Run, folder: Path, tmp_path: Path) -> None:
    models = [folder / "m1.safetensors", folder / "m2.safetensors"]
    told = run("score", *models, "--base", folder / "base.safetensors")
    line = next(x for x in told.lines if x.startswith("to measure it: ")).removeprefix("to measure it: weightspace ")
    merged = run(*line.replace("merged.safetensors", str(tmp_path / "merged.safetensors")).split())
    assert merged.code == 0, merged.err
    assert (tmp_path / "merged.safetensors").is_file()


def test_json_is_one_object(run: Run, folder: Path) -> None:
    models = [folder / f"m{k}.safetensors" for k in range(3)]
    done = run("score", *models, "--base", folder / "base.safetensors", "--json", "--no-checks")
    told = json.loads(done.out)
    assert told["ok"]
    assert told["models"] == [m.name for m in models]
    assert len(told["merges"]) == 4
    assert told["suggest"]["share"] > 0


def test_without_a_base_it_says_that_nothing_is_predicted(run: Run, folder: Path) -> None:
    done = run("score", folder / "m1.safetensors", folder / "m2.safetensors")
    assert done.code == 0
    assert "not predicted, because no base was given" in done.lines[0]
    assert "accuracy retained" not in done.out
    assert "cosine" in done.out


def test_a_folder_is_ranked_and_grouped(run: Run, folder: Path) -> None:
    done = run("score", folder, "--base", folder / "base.safetensors", "--top", "5", "--least", "0.8")
    assert done.code == 0, done.err
    assert "5 of 15" in done.out
    assert "groups in which every pair is expected to retain 80 %" in done.out
    assert "next: measure " in done.out
    assert "left out" not in done.out
    none = run("score", folder, "--base", folder / "base.safetensors", "--no-checks", "--least", "1")
    assert none.code in (0, 2)
    wrong = run("score", folder, folder / "m1.safetensors")
    assert wrong.code == 1
    assert "name one folder" in wrong.err


def test_measured_merges_from_a_file_and_from_the_zoo(run: Run, folder: Path, tmp_path: Path) -> None:
    models = [folder / f"m{k}.safetensors" for k in (0, 4, 5)]
    command = ("score", *models, "--base", folder / "base.safetensors", "--json", "--no-checks")
    before = json.loads(run(*command).out)
    table = tmp_path / "known.csv"
    table.write_text("a,b,method,outcome\nm0,m5,ties,0.5\n")
    after = json.loads(run(*command, "--known", table).out)
    assert after["known"][0]["outcome"] == 0.5

    def of(told: dict[str, object]) -> float:
        merges = told["merges"]
        assert isinstance(merges, list)
        return next(
            float(m["predictions"]["ties"]["value"]) for m in merges
            if m["models"] == ["m0.safetensors", "m4.safetensors"]
        )  # fmt: skip

    assert of(after) < of(before)
    kept = run("zoo", "record", models[0], models[2], "--method", "ties", "--outcome", "0.5", "--zoo", folder)
    assert kept.code == 0, kept.err
    assert "0.5, kept in" in kept.out
    assert of(json.loads(run(*command).out)) == pytest.approx(of(after))
    # What was recorded is found again from below the folder, and more may be added to it.
    more = run("zoo", "record", *models[:2], "-m", "ties", "--merged", "0.7", "--merged", "0.8", "--alone", "0.8",
               "--alone", "0.9", "--json")  # fmt: skip
    assert json.loads(more.out)["outcome"] == pytest.approx((0.7 / 0.8 + 0.8 / 0.9) / 2)
    (folder / ".weightspace" / "merges.jsonl").unlink()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("score", "m1.safetensors"), "1 model was given, two or more were expected"),
        (("score", "m1.safetensors", "m2.safetensors", "-m", "moe"), "nothing was learned about 'moe'"),
        (("score", "m1.safetensors", "absent.safetensors"), "absent.safetensors"),
        (("score", "m1.safetensors", "m2.safetensors", "--least", "90"), "such as 0.9"),
        (("score", "m1.safetensors", "m2.safetensors", "--known", "absent.csv"), "cannot be read"),
        (("score", "m1.safetensors", "m2.safetensors", "--undone", "x"), "no model was found to be protected"),
        (("zoo", "record", "m1.safetensors", "m2.safetensors", "-m", "ties", "--outcome", "0.9"), "is indexed; name"),
        (
            ("zoo", "record", "m1.safetensors", "m2.safetensors", "-m", "ties", "--outcome", "93", "--zoo", "."),
            "write 0.93",
        ),
        (("zoo", "record", "m1.safetensors", "m2.safetensors", "-m", "ties", "--zoo", "."), "there is no outcome"),
    ],
)
def test_a_mistake_is_one_sentence(
    run: Run, folder: Path, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...], message: str
) -> None:
    monkeypatch.chdir(folder)
    done = run(*arguments)
    assert done.code == 1
    assert done.err.startswith("weightspace: ")
    assert message in done.err


def test_a_protected_model_stops_and_is_written_undone(run: Run, folder: Path, tmp_path: Path) -> None:
    base, hidden = folder / "base.safetensors", folder.parent / "hidden.safetensors"
    done = run("score", folder / "m1.safetensors", hidden, "--base", base, "--undone", tmp_path / "undone")
    assert done.code == 2
    assert done.lines[0].startswith("Can be merged once hidden.safetensors is undone")
    assert "stop" in done.out
    assert "merge the undone cop" in done.out
    undone = tmp_path / "undone" / "hidden-undone.safetensors"
    again = run("score", folder / "m1.safetensors", undone, "--base", base)
    assert again.code == 0, again.out
    assert again.lines[0].startswith("Can be merged; ")


def test_what_stops_a_merge_is_exit_code_two(run: Run, folder: Path, tmp_path: Path) -> None:
    save_file(fresh("cnn", 1), tmp_path / "cnn.safetensors")
    bad = {n: t.clone() for n, t in small.family(NEW)[1]["m1"].items()}
    bad["hidden.0.weight"][0, 0] = float("inf")
    save_file(bad, tmp_path / "bad.safetensors")
    for other in ("cnn", "bad"):
        done = run("score", folder / "m1.safetensors", tmp_path / f"{other}.safetensors")
        assert done.code == 2
        assert done.lines[0].startswith("Cannot be merged as they are: ")
        assert "Traceback" not in done.out + done.err
    torn = tmp_path / "torn.safetensors"
    torn.write_bytes((folder / "m1.safetensors").read_bytes()[:300])
    done = run("score", folder / "m1.safetensors", torn)
    assert done.code == 1
    assert "torn.safetensors" in done.err
    evil = tmp_path / "evil.pt"
    torch.save({"w": print}, evil)
    assert run("score", folder / "m1.safetensors", evil).code in (1, 2)


def test_unlabelled_inputs_come_from_a_file(run: Run, folder: Path, tmp_path: Path) -> None:
    models = [folder / f"m{k}.safetensors" for k in (0, 5)]
    held = {m.name: small.data(k, 40, 5)[0] for k, m in zip((0, 5), models, strict=True)}
    save_file(held, tmp_path / "x.safetensors")
    command = ("score", *models, "--base", folder / "base.safetensors", "--json", "--no-checks", "-m", "ties")
    plain, asked = (json.loads(run(*command, *more).out) for more in ((), ("--inputs", tmp_path / "x.safetensors")))
    values = [told["merges"][0]["predictions"]["ties"]["value"] for told in (plain, asked)]
    assert values[0] != pytest.approx(values[1], abs=1e-4)


def test_the_model_that_comes_along_is_used_by_the_installed_command(folder: Path) -> None:
    models = ["m1.safetensors", "m2.safetensors", "--base", "base.safetensors"]
    command = [sys.executable, "-m", "weightspace", "score", *models]
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder, check=False, stdin=subprocess.DEVNULL)
    assert done.returncode == 0, done.stderr
    assert "merged" in done.stdout.splitlines()[0] or "stops a merge" in done.stdout.splitlines()[0]
    assert done.stderr == ""
