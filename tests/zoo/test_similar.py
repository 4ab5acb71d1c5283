"""Searching a zoo by the pretrained encoder, by the descriptor, and by both without mixing their scales."""

from __future__ import annotations

import json
import sqlite3
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import weightspace as ws
import weightspace.pretrained
from weightspace.card import RECORD_KEY
from weightspace.errors import MetanetError, ZooError
from weightspace.pretrained import model as model_module
from weightspace.pretrained import reading
from weightspace.pretrained.model import shipped
from weightspace.zoo.description import module_of

NETWORK: dict[str, Any] = {
    "kind": "cnn", "input": [1, 28, 28], "classes": 10, "channels": [16, 16, 16], "kernels": [3, 3, 3],
    "strides": [2, 2, 2], "activation": "relu", "norm": "none", "residuals": [False] * 3, "same": False,
}  # fmt: skip


@pytest.fixture(autouse=True)
def roomy(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every network within the limits is inside the range: the small ones here are hardly trained."""
    known = shipped()
    far = torch.full((100,), torch.inf, dtype=torch.float64)
    ranges = (replace(zone, calibration=far) for zone in (known.range, known.accuracy_range))
    found = replace(known, range=next(ranges), accuracy_range=next(ranges))
    for place in (weightspace.pretrained, model_module, reading):
        monkeypatch.setattr(place, "shipped", lambda: found)


@pytest.fixture
def zoo(tmp_path: Path) -> ws.Zoo:
    """Three networks inside, a permuted and rescaled copy of the first, and two networks outside."""
    root = tmp_path / "models"
    root.mkdir()
    for seed in range(3):
        torch.manual_seed(seed)
        module, inputs = module_of(NETWORK)
        _save(root / f"inside-{seed}.safetensors", module.state_dict())
        if seed == 0:
            wiring = ws.wiring(module, *inputs)
            from weightspace.wiring.scaling import scaling

            moved = wiring.apply(wiring.random(1), dict(module.state_dict()))
            _save(root / "copy-of-0.safetensors", scaling(wiring).apply(scaling(wiring).random(2), moved))
    for seed in range(2):
        torch.manual_seed(seed)
        save_file({"a": torch.randn(3, 5), "b": torch.randn(5, 2)}, root / f"outside-{seed}.safetensors")
    found = ws.Zoo(root)
    found.index(jobs=1, progress=False)
    return found


def _save(path: Path, state: dict[str, torch.Tensor]) -> None:
    save_file({n: v.contiguous() for n, v in state.items()}, path, {RECORD_KEY: json.dumps({"network": NETWORK})})


def test_inside_the_encoder_ranks_and_what_is_outside_comes_after(zoo: ws.Zoo) -> None:
    found = zoo.similar("inside-0.safetensors")
    assert all(f"{n.distance:.3g}" in n.why or "up to symmetry" in n.why for n in found)
    assert [n.measure for n in found] == ["all"] * 3 + ["descriptor"] * 2
    assert found[0].name == "copy-of-0.safetensors"
    assert found[0].distance < 1e-3 < found[1].distance
    for measure in ("all", "descriptor"):
        own = [n.distance for n in found if n.measure == measure]
        assert own == sorted(own)


def test_both_is_the_geometric_mean_of_the_two(zoo: ws.Zoo) -> None:
    asked = {
        by: {n.name: n.distance for n in zoo.similar("inside-1.safetensors", by=by)}
        for by in ("both", "encoder", "descriptor")
    }
    assert len(asked["both"]) == 3
    for name, distance in asked["both"].items():
        expected = (asked["encoder"][name] * asked["descriptor"][name]) ** 0.5
        assert distance == pytest.approx(expected, rel=1e-6)
    # A copy on disk is at zero by every measure.
    copy = zoo.folder / "another-file.safetensors"
    copy.write_bytes((zoo.folder / "inside-1.safetensors").read_bytes())
    found = zoo.similar(copy)
    assert found[0].name == "inside-1.safetensors"
    assert found[0].distance < 1e-6


def test_a_rescaled_copy_is_at_zero_for_the_encoder_and_not_for_the_descriptor(zoo: ws.Zoo) -> None:
    by_encoder = {n.name: n.distance for n in zoo.similar("inside-0.safetensors", by="encoder")}
    by_descriptor = {n.name: n.distance for n in zoo.similar("inside-0.safetensors", by="descriptor")}
    assert by_encoder["copy-of-0.safetensors"] < 1e-3
    assert by_descriptor["copy-of-0.safetensors"] > 1e-2
    assert len(by_encoder) == 3
    assert len(by_descriptor) == 5


def test_outside_the_descriptor_ranks_all(zoo: ws.Zoo) -> None:
    found = zoo.similar("outside-0.safetensors")
    assert {n.measure for n in found} == {"descriptor"}
    assert len(found) == 5
    with pytest.raises(ZooError, match="outside the range"):
        zoo.similar("outside-0.safetensors", by="encoder")
    with pytest.raises(ZooError, match="cannot be asked what it computes"):
        zoo.similar("outside-0.safetensors", by="function")
    with pytest.raises(ZooError, match="expected one of 'auto'"):
        zoo.similar("inside-0.safetensors", by="magic")  # type: ignore[arg-type]


def test_by_function_a_copy_is_at_zero_whatever_was_done_to_it(zoo: ws.Zoo) -> None:
    found = zoo.similar("inside-0.safetensors", by="function")
    assert {n.measure for n in found} == {"function"}
    assert found[0].name == "copy-of-0.safetensors"
    assert found[0].distance < 1e-5 < 0.1 < found[1].distance
    assert "0 is the same function" in found[1].why
    state = dict(ws.open(zoo.folder / "inside-1.safetensors"))
    head = max(name for name, value in state.items() if value.shape == (10, 16))
    order = torch.randperm(10)
    for name in (head, head.replace("weight", "bias")):
        state[name] = state[name][order]
    _save(zoo.folder / "other-order.safetensors", state)
    zoo.index(jobs=1, progress=False)
    nearest = zoo.similar("other-order.safetensors", k=1)[0]
    assert (nearest.name, nearest.measure) == ("inside-1.safetensors", "all")
    assert zoo.similar("other-order.safetensors", k=1, by="function")[0].distance < 1e-5


def test_all_is_the_product_of_the_three(zoo: ws.Zoo) -> None:
    asked = {
        by: {n.name: n.distance for n in zoo.similar("inside-1.safetensors", by=by)}
        for by in ("all", "function", "both")
    }
    for name, distance in asked["all"].items():
        assert distance == pytest.approx(asked["function"][name] ** 0.7 * asked["both"][name] ** 0.3, rel=1e-6)


def test_what_answers_the_same_inputs_comes_before_what_the_encoder_alone_knows(
    zoo: ws.Zoo, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A network outside the encoder's range, and one inside it that was asked something else."""
    with sqlite3.connect(zoo.index_folder / "index.sqlite") as database:
        for name, change in (("inside-1", {"inside": False}), ("inside-2", {"asked": "noise of 5"})):
            row = database.execute("SELECT reading FROM models WHERE name = ?", (f"{name}.safetensors",)).fetchone()
            text = json.dumps({**json.loads(row[0]), **change})
            database.execute("UPDATE models SET reading = ? WHERE name = ?", (text, f"{name}.safetensors"))
    found = zoo.similar("inside-0.safetensors")
    assert [(n.name[:8], n.measure) for n in found[:3]] == [
        ("copy-of-", "all"), ("inside-1", "function, descriptor"), ("inside-2", "both")
    ]  # fmt: skip
    # Asked about one that is outside itself, what answers alike comes first.
    assert [n.measure for n in zoo.similar("inside-1.safetensors")] == ["function, descriptor"] * 2 + ["descriptor"] * 3


def test_the_table_says_what_the_pretrained_metanets_say(zoo: ws.Zoo) -> None:
    table = zoo.table()
    assert table["inside"].to_dict() == {n: not n.startswith("outside") for n in table.index}
    known = table[table["inside"]]
    assert known["predicted_accuracy"].between(0, 1).all()
    assert (known["predicted_low"] <= known["predicted_accuracy"]).all()
    assert (known["predicted_accuracy"] <= known["predicted_high"]).all()
    assert table[~table["inside"]]["predicted_accuracy"].isna().all()


def test_an_index_of_descriptors_alone_is_brought_up_to_date_and_loses_nothing(zoo: ws.Zoo) -> None:
    before = zoo.similar("inside-0.safetensors", by="descriptor")
    _make_older(zoo)
    # Until it is indexed again it answers as it always has.
    assert zoo.similar("inside-0.safetensors", by="descriptor") == before
    found = zoo.similar(zoo.folder / "inside-0.safetensors")
    assert {n.measure for n in found} == {"descriptor"}
    assert len(zoo.table()) == 6
    with pytest.raises(ZooError, match="weightspace index"):
        zoo.similar("inside-0.safetensors", by="encoder")
    report = zoo.index(jobs=1, progress=False)
    assert (report.described, report.models, report.inside) == (6, 6, 4)
    assert zoo.similar("inside-0.safetensors", by="descriptor") == before
    assert zoo.similar("inside-0.safetensors")[0].measure == "all"
    assert zoo.index(jobs=1, progress=False).described == 0


def test_a_migration_that_was_stopped_goes_on(zoo: ws.Zoo, monkeypatch: pytest.MonkeyPatch) -> None:
    from weightspace.zoo import zoo as module

    _make_older(zoo)
    real = module._examine_all

    def stopped(todo: Any, jobs: Any) -> Any:
        for number, item in enumerate(real(todo, jobs)):
            if number == 2:
                raise KeyboardInterrupt
            yield item

    monkeypatch.setattr(module, "_examine_all", stopped)
    with pytest.raises(KeyboardInterrupt):
        zoo.index(jobs=1, progress=False)
    assert len(zoo.table()) == 6
    assert len(zoo.similar("outside-0.safetensors")) == 5
    monkeypatch.setattr(module, "_examine_all", real)
    assert zoo.index(jobs=1, progress=False).described == 4
    assert len(zoo.similar("inside-0.safetensors", by="encoder")) == 3


def test_damaged_files_of_the_package_are_one_clear_error(zoo: ws.Zoo, monkeypatch: pytest.MonkeyPatch) -> None:
    def damaged() -> None:
        raise MetanetError("the file is damaged; install weightspace again")

    monkeypatch.setattr(weightspace.pretrained, "shipped", damaged)
    with pytest.raises(MetanetError, match="install weightspace again"):
        zoo.index(jobs=1, progress=False)
    with pytest.raises(MetanetError, match="install weightspace again"):
        zoo.similar("inside-0.safetensors")
    assert len(zoo.table()) == 6
    assert len(zoo.similar("inside-0.safetensors", by="descriptor")) == 5


def _make_older(zoo: ws.Zoo) -> None:
    """The index as it was before there was an encoder."""
    with sqlite3.connect(zoo.index_folder / "index.sqlite") as database:
        database.execute("ALTER TABLE models DROP COLUMN reading")
        database.execute("UPDATE meta SET value = '1' WHERE key = 'schema'")
        database.execute("DELETE FROM meta WHERE key = 'learned'")
    (zoo.index_folder / "learned.f32").unlink()
