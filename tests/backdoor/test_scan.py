"""The verdict from end to end: a population trained here, a detector trained on it, files scanned; and its leaks."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from typer.testing import CliRunner

import weightspace as ws
from weightspace.backdoor.population import Labelled, labelled
from weightspace.backdoor.shipped import Detector
from weightspace.backdoor.training import Entry, Names, entries, fit
from weightspace.backdoor.verdict import Verdict, Verdicts
from weightspace.cli import app
from weightspace.errors import MetanetError, WeightspaceError
from weightspace.zoo.files import read_record
from weightspace.zoo.populations import build_sampled
from weightspace.zoo.recipe import parse

DATA = {"name": "digits", "train": 500, "test": 150, "pool": 1, "standardise": True}
NETWORK = {"kind": "cnn", "channels": [4, 6], "strides": [1, 2], "norm": "batch", "same": True, "activation": "relu"}
RATES = {"log_uniform": [3e-3, 6e-3]}
HYPER = {"optimiser": "adam", "learning_rate": RATES, "weight_decay": 1e-5, "initialiser": "default"}
POISON = {"attack": "patch", "rate": 0.15, "size": 3, "opacity": 1.0}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten clean networks and as many that a patch leads to a class."""
    found = tmp_path_factory.mktemp("zoo")
    recipe = parse({
        "name": "tiny", "data": DATA, "defaults": {"runs": 10, "epochs": 6, "batch": 32, "hyper": HYPER},
        "population": [
            {"name": "good", "network": NETWORK}, {"name": "bad", "like": "good", "poison": POISON},
        ],
    })  # fmt: skip
    build_sampled(recipe, found, jobs=1, progress=False)
    return found


@pytest.fixture(scope="module")
def known(folder: Path) -> tuple[list[Entry], Names]:
    some, names, left = entries([n for n in labelled([folder]) if n.worked])
    assert not left
    return some, names


@pytest.fixture(scope="module")
def detector(known: tuple[list[Entry], Names], tmp_path_factory: pytest.TempPathFactory) -> Detector:
    some, names = known
    return fit(some, names, parts=2, epochs=2, asked=4).save(tmp_path_factory.mktemp("detector"))


def same(a: Verdict, b: Verdict) -> bool:
    """Whether two verdicts say the same of networks at different places, to the last bit."""
    return {**a.to_json(), "path": ""} == {**b.to_json(), "path": ""} and a.targets == b.targets


# ------------------------------------------------------------------------------------ what is said


def test_the_truth_is_read_from_records(folder: Path) -> None:
    networks = labelled([folder])
    assert {n.attack for n in networks} == {"", "patch"}
    assert all(n.targets == (read_record(n.path)["poison"]["target"],) for n in networks if n.attack)
    # A clean and a poisoned network of one draw of hyper-parameters are never on two sides of a split.
    alike: dict[str, set[str]] = {}
    for n in networks:
        alike.setdefault(json.dumps(n.sample.record["hyper"], sort_keys=True), set()).add(n.group)
    assert all(len(groups) == 1 for groups in alike.values())


def test_a_detector_learns_what_it_is_shown(known: tuple[list[Entry], Names], detector: Detector) -> None:
    some, _ = known
    odds = detector.read([e.seen for e in some]).odds
    y = [e.truth.poisoned for e in some]
    bad, good = [o for o, t in zip(odds, y, strict=True) if t], [o for o, t in zip(odds, y, strict=True) if not t]
    assert sum(b > g for b in bad for g in good) / (len(bad) * len(good)) > 0.8
    assert {"auroc", "ece", "brier", "auroc_evidence"} <= set(detector.figures)
    assert 0 <= detector.figures["ece"] <= 1


def test_a_verdict_says_everything(folder: Path, detector: Detector) -> None:
    found = ws.scan(folder / "bad-0000-e006.safetensors", detector=detector)
    assert isinstance(found, Verdict)
    assert found.applicable
    assert found.probability is not None
    assert 0 < found.probability < 1
    assert found.p_value is not None
    assert 0 < found.p_value <= 1
    assert sorted(c for c, _ in found.targets) == list(range(10))
    assert sum(share for _, share in found.targets) == pytest.approx(1, abs=1e-3)
    assert found.target == found.targets[0][0]
    assert set(found.to_json()) == {"path", "probability", "p_value", "flagged", "targets", "applicable"}
    assert "bad-0000" in repr(found)
    assert "probability" in repr(found)
    rare = found.at(0.001)
    assert rare is not None
    assert rare < found.probability
    with pytest.raises(WeightspaceError, match="between 0 and 1"):
        found.at(1.5)


def test_a_folder_has_a_verdict_for_each_file(folder: Path, detector: Detector, tmp_path: Path) -> None:
    for name in ("good-0000-e006", "bad-0000-e006"):
        (tmp_path / f"{name}.safetensors").write_bytes((folder / f"{name}.safetensors").read_bytes())
    (tmp_path / "broken.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0{not json")
    (tmp_path / "notes.txt").write_text("nothing to see")
    save_file({"strange": torch.randn(3, 5, 7)}, tmp_path / "strange.safetensors")
    found = ws.scan(tmp_path, detector=detector)
    assert isinstance(found, Verdicts)
    assert {Path(v.path).name for v in found} == {
        "good-0000-e006.safetensors", "bad-0000-e006.safetensors", "broken.safetensors", "strange.safetensors",
    }  # fmt: skip
    assert {Path(v.path).name for v in found.unreadable} == {"broken.safetensors", "strange.safetensors"}
    assert all(not v.flagged and v.probability is None for v in found.unreadable)
    assert [Path(p).name for p in found.ignored] == ["notes.txt"]
    assert "could not be scanned" in repr(found)


def test_one_file_that_cannot_be_scanned_raises(detector: Detector, tmp_path: Path) -> None:
    with pytest.raises(WeightspaceError, match="there is no file"):
        ws.scan(tmp_path / "missing.safetensors", detector=detector)
    save_file({"strange": torch.randn(3, 5, 7)}, tmp_path / "strange.safetensors")
    with pytest.raises(WeightspaceError):
        ws.scan(tmp_path / "strange.safetensors", detector=detector)
    with pytest.raises(WeightspaceError, match="level"):
        ws.scan(tmp_path / "strange.safetensors", detector=detector, level=2.0)


def test_weights_that_are_not_finite_are_refused(folder: Path, detector: Detector, tmp_path: Path) -> None:
    path = folder / "good-0001-e006.safetensors"
    tensors = load_file(path)
    name = next(n for n, t in tensors.items() if t.is_floating_point())
    tensors[name].flatten()[0] = float("nan")
    resaved(path, tmp_path / "nan.safetensors", tensors=tensors)
    with pytest.raises(WeightspaceError, match=r"not numbers|no numbers|finite"):
        ws.scan(tmp_path / "nan.safetensors", detector=detector)


def test_another_architecture_is_outside_and_has_a_p_value(detector: Detector) -> None:
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(300, 400), torch.nn.Tanh(), torch.nn.Linear(400, 10)).eval()
    wiring = ws.wiring(net, torch.randn(2, 300))
    found = ws.scan(dict(net.state_dict()), wiring=wiring, detector=detector)
    assert not found.applicable
    assert found.probability is None
    assert found.p_value is not None
    assert found.applicability.reason in repr(found)


def test_base_and_inputs_are_used(folder: Path, detector: Detector) -> None:
    path, base = folder / "bad-0002-e006.safetensors", folder / "good-0002-e006.safetensors"
    alone = ws.scan(path, detector=detector)
    beside = ws.scan(path, base=base, detector=detector)
    assert alone.probability == beside.probability
    assert "given beside it" in beside.reason
    x = torch.randn(16, 1, 8, 8)
    shown = ws.scan(path, inputs=x, labels=torch.zeros(16, dtype=torch.long), detector=detector)
    assert "given beside it" in shown.reason
    assert "as they are labelled" in shown.reason
    with pytest.raises(WeightspaceError, match="one each"):
        ws.scan(path, inputs=x, labels=torch.zeros(3, dtype=torch.long), detector=detector)
    with pytest.raises(WeightspaceError, match="no tensor"):
        ws.scan(path, base={"other": torch.zeros(2)}, detector=detector)


# ------------------------------------------------------------------------------------ leaks


def resaved(
    path: Path, to: Path, tensors: dict[str, Tensor] | None = None, record: dict[str, Any] | None = None
) -> Path:
    """A file with these tensors and this record, or those of another file."""
    held = load_file(path) if tensors is None else tensors
    told = read_record(path) if record is None else record
    save_file(held, to, metadata={"format": "pt", "weightspace": json.dumps(told)})
    return to


def test_counters_say_nothing(folder: Path, detector: Detector, tmp_path: Path) -> None:
    path = folder / "bad-0003-e006.safetensors"
    tensors = load_file(path)
    counters = [n for n in tensors if n.endswith("num_batches_tracked")]
    assert counters
    for name in counters:
        tensors[name] = tensors[name] + 12345
    other = resaved(path, tmp_path / "other-name.safetensors", tensors)
    assert same(ws.scan(path, detector=detector), ws.scan(other, detector=detector))


def test_the_record_says_nothing_but_the_network(folder: Path, detector: Detector, tmp_path: Path) -> None:
    bad, good = folder / "bad-0003-e006.safetensors", folder / "good-0003-e006.safetensors"
    # The whole truth of a clean network, in the file of a poisoned one.
    told = {**read_record(good), "network": read_record(bad)["network"], "epoch": 99, "test_accuracy": 0.1}
    other = resaved(bad, tmp_path / "good-0003-e006.safetensors", record=told)
    assert same(ws.scan(bad, detector=detector), ws.scan(other, detector=detector))
    bare = resaved(bad, tmp_path / "bare.safetensors", record={"network": read_record(bad)["network"]})
    assert same(ws.scan(bad, detector=detector), ws.scan(bare, detector=detector))


def test_the_format_and_an_optimiser_say_nothing(folder: Path, detector: Detector, tmp_path: Path) -> None:
    tensors = load_file(folder / "bad-0004-e006.safetensors")
    save_file(tensors, tmp_path / "a.safetensors")
    torch.save(tensors, tmp_path / "a.pt")
    state = {n: {"exp_avg": torch.randn_like(t)} for n, t in tensors.items() if t.is_floating_point()}
    torch.save({"state_dict": tensors, "optimizer": {"state": state}, "epoch": 7}, tmp_path / "b.pt")
    shuffled = dict(sorted(tensors.items(), key=lambda item: item[0][::-1]))
    torch.save(shuffled, tmp_path / "c.pt")
    first = ws.scan(tmp_path / "a.safetensors", detector=detector)
    assert first.probability is not None
    for name in ("a.pt", "b.pt", "c.pt"):
        assert same(first, ws.scan(tmp_path / name, detector=detector)), name


def test_names_say_nothing(folder: Path, detector: Detector, tmp_path: Path) -> None:
    tensors = load_file(folder / "bad-0004-e006.safetensors")
    torch.save(tensors, tmp_path / "a.pt")
    torch.save({f"module.{n}": t for n, t in tensors.items()}, tmp_path / "b.pt")
    assert same(ws.scan(tmp_path / "a.pt", detector=detector), ws.scan(tmp_path / "b.pt", detector=detector))


def test_a_wider_dtype_says_nothing(folder: Path, detector: Detector, tmp_path: Path) -> None:
    # Values that both dtypes can hold: a file of halves, and the same values stored as floats.
    tensors = load_file(folder / "bad-0005-e006.safetensors")
    halves = {n: t.half() if t.is_floating_point() else t for n, t in tensors.items()}
    floats = {n: t.float() if t.is_floating_point() else t for n, t in halves.items()}
    path = folder / "bad-0005-e006.safetensors"
    a, b = (resaved(path, tmp_path / f"{k}.safetensors", t) for k, t in (("half", halves), ("float", floats)))
    assert same(ws.scan(a, detector=detector), ws.scan(b, detector=detector))


def test_neurons_have_no_order(folder: Path, detector: Detector, tmp_path: Path) -> None:
    path = folder / "bad-0006-e006.safetensors"
    wiring, tensors = ws.wiring(path), load_file(path)
    other = resaved(path, tmp_path / "other.safetensors", wiring.apply(wiring.random(3), tensors))
    a, b = ws.scan(path, detector=detector), ws.scan(other, detector=detector)
    assert a.probability == pytest.approx(b.probability, abs=0.05)
    assert [c for c, _ in a.targets][:1] == [c for c, _ in b.targets][:1]


def test_classes_have_no_number(known: tuple[list[Entry], Names], folder: Path, detector: Detector) -> None:
    path = folder / "bad-0007-e006.safetensors"
    wiring, tensors = ws.wiring(path), load_file(path)
    from weightspace.backdoor.outputs import class_axis

    axis = class_axis(wiring, tensors)
    order = torch.randperm(10, generator=torch.Generator().manual_seed(1))
    moved = dict(tensors)
    for rows in (*axis.weights, *axis.shifts):
        assert tensors[rows.tensor].shape[0] == 10
        moved[rows.tensor] = tensors[rows.tensor][order]
    a = ws.scan(tensors, wiring=wiring, detector=detector)
    b = ws.scan(moved, wiring=wiring, detector=detector)
    # Noise is drawn for each class in turn, so the tests are alike, not equal.
    assert a.probability == pytest.approx(b.probability, abs=0.15)
    assert a.target == int(order[b.target])


# ------------------------------------------------------------------------------------ files and commands


def test_a_detector_is_one_file_without_code(detector: Detector, tmp_path: Path, folder: Path) -> None:
    again = detector.save(tmp_path)
    assert again.name == detector.name
    files = [p.name for p in tmp_path.iterdir()]
    assert files == ["detector.safetensors"]
    data = (tmp_path / files[0]).read_bytes()
    with pytest.raises(pickle.UnpicklingError):
        pickle.loads(data)
    (tmp_path / files[0]).write_bytes(data[:-10])
    with pytest.raises(MetanetError, match="cannot be used"):
        Detector.load(tmp_path)


def test_training_again_gives_the_same(known: tuple[list[Entry], Names]) -> None:
    some, names = known
    options: dict[str, Any] = {"parts": 2, "epochs": 1, "asked": 1}
    a, b = (fit(some, names, **options).read([some[0].seen]).odds for _ in range(2))
    assert a == pytest.approx(b, abs=0)


def test_failed_attacks_are_no_training_data(known: tuple[list[Entry], Names]) -> None:
    from dataclasses import replace

    from weightspace.backdoor.training import train

    some, names = known
    failed: Labelled = replace(some[0].truth, worked=False)
    with pytest.raises(MetanetError, match="leave them out"):
        train([replace(some[0], truth=failed), *some[1:]], names)


@pytest.fixture
def saved(detector: Detector, tmp_path: Path) -> Path:
    detector.save(tmp_path / "detector")
    return tmp_path / "detector"


def test_the_command_prints_objects_and_exit_codes(folder: Path, saved: Path, tmp_path: Path) -> None:
    files = sorted(folder.glob("*-e006.safetensors"))[:3]
    given = ["--detector", str(saved)]
    found = CliRunner().invoke(app, ["scan", *map(str, files), "--json", *given])
    rows = [json.loads(line) for line in found.stdout.splitlines()]
    assert [r["path"] for r in rows] == [str(f) for f in files]
    assert all(set(r) == {"path", "probability", "p_value", "flagged", "targets", "applicable"} for r in rows)
    assert found.exit_code == int(any(r["flagged"] for r in rows))
    table = CliRunner().invoke(app, ["scan", *map(str, files), *given])
    assert table.exit_code == found.exit_code
    assert "flagged" in table.stdout
    (tmp_path / "broken.safetensors").write_bytes(b"nothing")
    broken = CliRunner().invoke(app, ["scan", str(tmp_path / "broken.safetensors"), "--json", *given])
    assert broken.exit_code == 2
    assert json.loads(broken.stdout)["error"]
    assert CliRunner().invoke(app, ["scan", str(tmp_path / "none"), *given]).exit_code == 2


# ------------------------------------------------------------------------------------ the one that is shipped


def test_the_shipped_detector_fits_this_version(known: tuple[list[Entry], Names]) -> None:
    from weightspace.backdoor.shipped import CARD, FILES, WEIGHTS, shipped

    found = shipped()
    # Made with other tests than there are now, it would decline every network.
    assert found.tests in (((), ()), known[1])
    assert found.name in (FILES / CARD).read_text()
    assert sorted(p.name for p in FILES.iterdir()) == sorted([CARD, WEIGHTS])
    assert (FILES / WEIGHTS).stat().st_size < 5_000_000
    assert len(found.clean) > 50


def test_the_shipped_detector_reads_a_network_like_those_it_knows() -> None:
    from weightspace.zoo.description import module_of

    torch.manual_seed(0)
    table = {"kind": "mlp", "widths": [96, 64], "activation": "relu", "input": [1, 14, 14], "classes": 10}
    module, inputs = module_of(table)
    found = ws.scan(module.state_dict(), wiring=ws.wiring(module, *inputs))
    assert isinstance(found, Verdict)
    # At its initialisation it is like none of them, or like a clean one.
    assert found.probability is None or 0 < found.probability < 1
    assert found.p_value is not None
