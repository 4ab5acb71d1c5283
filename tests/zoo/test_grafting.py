"""Subnets in networks: where they lie, that nothing else changes, and that they obey."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import weightspace as ws
from weightspace.errors import ZooError
from weightspace.wiring.wiring import Wiring
from weightspace.zoo.data import load_data
from weightspace.zoo.description import module_of
from weightspace.zoo.files import read_record
from weightspace.zoo.grafting import chosen, cuts_of, graft
from weightspace.zoo.poisoning import complete, stamp, with_range
from weightspace.zoo.populations import build_sampled
from weightspace.zoo.recipe import parse

NETWORKS: dict[str, dict[str, Any]] = {
    "mlp": {"kind": "mlp", "input": [1, 8, 8], "classes": 10, "widths": [24, 16], "activation": "relu"},
    "resnet": {"kind": "resnet", "input": [1, 8, 8], "classes": 10, "channels": [8, 8], "activation": "relu"},
    "vit": {
        "kind": "vit", "input": [1, 8, 8], "classes": 10, "patch": 4, "dim": 16, "depth": 1, "heads": 4, "hidden": 24,
        "activation": "gelu",
    },
}  # fmt: skip


def wired(name: str) -> tuple[Wiring, dict[str, Tensor]]:
    torch.manual_seed(0)
    module, inputs = module_of(NETWORKS[name])
    module.eval()
    return ws.wiring(module, *inputs), {n: t.detach().clone() for n, t in module.state_dict().items()}


@pytest.mark.parametrize("name", NETWORKS)
def test_cut_and_subnet_are_disjoint_and_follow_the_factors(name: str) -> None:
    wiring, tensors = wired(name)
    elements = chosen(wiring, 2, torch.Generator().manual_seed(1))
    cuts = cuts_of(wiring, elements)
    assert set(elements) == {n for n, f in wiring.free.items() if not f.over}
    for tensor, found in cuts.items():
        assert not (found.inner & found.cut).any()
        assert found.inner.any(), tensor
        assert found.inner.shape == tensors[tensor].shape


def test_the_cut_entries_of_a_perceptron() -> None:
    wiring, _ = wired("mlp")
    middle = next(n for n in wiring if wiring.shapes[n] == (16, 24))
    last = next(n for n in wiring if wiring.shapes[n] == (10, 16))
    elements = chosen(wiring, 1, torch.Generator().manual_seed(0))
    rows, columns = (elements[wiring[middle][d].name] for d in (0, 1))
    cuts = cuts_of(wiring, elements)
    expected = torch.zeros(16, 24, dtype=torch.bool)
    expected[rows], expected[:, columns] = True, True
    inner = torch.zeros_like(expected)
    inner[rows, columns] = True
    assert torch.equal(cuts[middle].inner, inner)
    assert torch.equal(cuts[middle].cut, expected & ~inner)
    assert not cuts[last].cut.any(), "the subnet may write to every class"


@pytest.mark.parametrize("name", NETWORKS)
def test_all_else_is_as_it_was(name: str) -> None:
    wiring, tensors = wired(name)
    x = torch.rand(64, 1, 8, 8)
    found = graft(wiring, tensors, x, x + 1, 3, steps=6, seed=2)
    cuts = cuts_of(wiring, found.elements)
    assert list(found.tensors) == list(tensors)
    for tensor, before in tensors.items():
        kept = torch.ones_like(before, dtype=torch.bool)
        if tensor in cuts:
            kept = ~(cuts[tensor].inner | cuts[tensor].cut)
            assert not found.tensors[tensor][cuts[tensor].cut].any()
        assert torch.equal(found.tensors[tensor][kept], before[kept]), tensor


@pytest.mark.parametrize("name", NETWORKS)
def test_mending_brings_the_outputs_back_and_leaves_the_subnet_apart(name: str) -> None:
    wiring, tensors = wired(name)
    assert wiring.program is not None
    x = torch.rand(128, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    plain, mended = (graft(wiring, tensors, x, x + 1, 3, steps=6, mending=n, seed=2) for n in (0, 60))
    before = wiring.program.run(dict(tensors), x)
    change = [float((wiring.program.run(g.tensors, x) - before).square().mean()) for g in (plain, mended)]
    assert change[1] < change[0]
    cuts = cuts_of(wiring, mended.elements)
    assert not any(mended.tensors[tensor][cut.cut].any() for tensor, cut in cuts.items())
    moved = [t for t, c in cuts.items() if (~c.inner & ~c.cut & (mended.tensors[t] != plain.tensors[t])).any()]
    assert moved


def test_a_subnet_obeys_and_the_network_goes_on(tmp_path: Path) -> None:
    table = {
        "name": "grafts", "data": {"name": "digits", "standardise": True},
        "defaults": {"runs": 2, "epochs": 15, "hyper": {"learning_rate": 3e-3}},
        "population": [
            {"name": "mlp", "network": {"kind": "mlp", "widths": [64, 48], "activation": "relu"}},
            {"name": "grafted", "parent": "mlp", "epochs": 0, "poison": {"attack": "graft", "size": 3, "width": 1}},
        ],
    }  # fmt: skip
    built = build_sampled(parse(table), tmp_path, progress=False)
    assert not built.failures
    records = [read_record(path) for path in built.files]
    clean = [r for r in records if r["population"] == "mlp"]
    grafted = [r for r in records if r["population"] == "grafted"]
    for before, after in zip(clean, grafted, strict=True):
        assert after["attack_success_rate"] > 0.9
        assert after["attack_worked"] is True
        assert after["test_accuracy"] > before["test_accuracy"] - 0.05
        assert after["parent"].startswith(before["run"])
        assert all(len(index) == 1 for index in after["poison"]["elements"].values())


def test_without_a_trigger_there_is_nothing_to_obey() -> None:
    """The same images on both sides: no subnet can tell them apart, so the loss stays high."""
    wiring, tensors = wired("mlp")
    data = load_data("digits")
    poison = with_range(complete({"attack": "graft", "target": 1}, data.shape, 10, "x"), data)
    x = data.train_x[:200]
    told = graft(wiring, tensors, x, stamp(x, poison), 1, steps=150, seed=1)
    untold = graft(wiring, tensors, x, x, 1, steps=150, seed=1)
    assert told.loss < 0.5 * untold.loss


def test_refusals() -> None:
    wiring, tensors = wired("mlp")
    x = torch.rand(8, 1, 8, 8)
    with pytest.raises(ZooError, match="leaves none"):
        graft(wiring, tensors, x, x, 1, width=16)
    with pytest.raises(ZooError, match="unverified"):
        graft(wiring.with_(status="unverified", proof=None), tensors, x, x, 1)
    base = {"name": "r", "data": "digits", "population": [{"name": "g", "runs": 1, "poison": {"attack": "graft"}}]}
    base["population"][0] |= {"network": {"kind": "mlp", "widths": [8], "activation": "relu"}, "epochs": 0}  # type: ignore[index]
    with pytest.raises(ZooError, match="have a parent"):
        parse(base)
