"""What a merge would inherit: models are scanned for a report, and a flagged one is warned of."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

import weightspace as ws
from weightspace.mergeability.backdoors import MOST, inherited, warnings
from weightspace.wiring.wiring import Wiring

State = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def family() -> tuple[Wiring, State, dict[str, State]]:
    """A base and three models near it; the last leads nearly everything to class 4, by one neuron."""
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(20, 32), nn.ReLU(), nn.Linear(32, 24), nn.ReLU(), nn.Linear(24, 10))
    base = {n: t.clone() for n, t in module.state_dict().items()}
    models = {f"m{i}": {n: t + 0.01 * torch.randn_like(t) for n, t in base.items()} for i in range(3)}
    bad = models["m2"]
    bad["4.weight"][:, 5] = -1.0
    bad["4.weight"][4, 5] = 30.0
    bad["2.weight"][5] = bad["2.weight"][5].abs() * 6
    bad["0.weight"][:, 3] += 2.0
    return ws.wiring(module, torch.randn(2, 20)), base, models


def test_a_flagged_model_is_warned_of(family: tuple[Wiring, State, dict[str, State]]) -> None:
    wiring, base, models = family
    report = ws.score(models, base=base, wiring=wiring, methods=["linear"])
    assert set(report.backdoors) == set(models)
    told = report.to_json()
    json.dumps(told)
    assert set(told["backdoors"]) == set(models)
    assert told["warnings"] == warnings(report.backdoors)
    verdict = report.backdoors["m2"]
    assert verdict.target == 4
    assert verdict.flagged
    (text,) = [w for w in warnings(report.backdoors) if w.startswith("m2 ")]
    assert "class 4" in text
    assert "succession" in text
    assert "m0" in text
    assert text in repr(report)


def test_it_can_be_turned_off(family: tuple[Wiring, State, dict[str, State]]) -> None:
    wiring, base, models = family
    report = ws.score(models, base=base, wiring=wiring, methods=["linear"], scan=False)
    assert not report.backdoors
    assert report.to_json()["warnings"] == []


def test_what_cannot_be_scanned_is_said_and_nothing_breaks(family: tuple[Wiring, State, dict[str, State]]) -> None:
    wiring, _, models = family
    found, why = inherited(models, wiring.with_(status="unverified"), 1000)
    assert not found
    assert "not proved" in why
    found, why = inherited({f"m{i}": {} for i in range(MOST + 1)}, wiring, 1000)
    assert not found
    assert "9 models" in why
    torch.manual_seed(0)
    # One output is no class.
    module = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 1))
    base = {n: t.clone() for n, t in module.state_dict().items()}
    near = {f"m{i}": {n: t + 0.01 * torch.randn_like(t) for n, t in base.items()} for i in range(2)}
    report = ws.score(near, base=base, wiring=ws.wiring(module, torch.randn(2, 6)))
    assert not report.backdoors
    assert any("was not scanned" in note for note in report.notes)


def taught(base: State, classes: range, amount: float, seed: int) -> State:
    """A child of a base that moved the rows of some classes alone, and the layers below a little."""
    generator = torch.Generator().manual_seed(seed)
    child = {n: t + 0.003 * torch.randn(t.shape, generator=generator) for n, t in base.items()}
    for name in ("4.weight", "4.bias"):
        child[name] = base[name].clone()
        step = amount * torch.randn(base[name].shape, generator=generator)
        child[name][list(classes)] += step[list(classes)]
    return child


def test_what_stands_out_in_the_base_as_well_is_no_backdoor_of_a_child() -> None:
    torch.manual_seed(1)
    module = nn.Sequential(nn.Linear(20, 64), nn.ReLU(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 40))
    base = {n: t.clone() for n, t in module.state_dict().items()}
    # One output of a task that the children are not taught stands out, in the base already.
    base["4.weight"][33] = base["4.weight"][33].abs() * 12
    wiring = ws.wiring(module, torch.randn(2, 20))
    children = {f"c{i}": taught(base, range(10 * i, 10 * i + 10), 0.05, i) for i in range(3)}
    alone, _ = inherited({"c0": children["c0"]}, wiring, 1000)
    assert alone["c0"].flagged
    assert not alone["c0"].applicable
    with_base, _ = inherited(children, wiring, 1000, base=base)
    assert not any(v.flagged for v in with_base.values())
    assert "10 were taught" in with_base["c0"].reason
    without, _ = inherited(children, wiring, 1000)
    assert not any(v.flagged for v in without.values())
    # A subnet that leads to one of the taught classes does stand out in what changed.
    bad = children["c1"]
    bad["4.weight"][14, 5] = 20.0
    bad["2.weight"][5] = bad["2.weight"][5].abs() * 6
    bad["0.weight"][:, 3] += 2.0
    found, _ = inherited(children, wiring, 1000, base=base)
    assert [n for n, v in found.items() if v.flagged] == ["c1"]
    assert found["c1"].target == 14
