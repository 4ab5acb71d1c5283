"""Every small architecture: the wiring is proved, and its symmetries are those that theory knows."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch

import weightspace as ws
from tests.architectures import CASES, Case

SMALL = [case for case in CASES.values() if not case.full]
MODULES = {"transformers": "transformers", "pyg": "torch_geometric"}
# Found symmetries that are a proper subgroup of theory's, and why.
SMALLER = {
    # Fibred over two positions of one factor (the groups before and after the shuffle); one is expressible.
    "shufflenet-v1-units": Counter({(3, ()): 1, (12, (3,)): 1, (4, ()): 2}),
}


def wired(case: Case) -> ws.Wiring:
    if case.group in MODULES:
        pytest.importorskip(MODULES[case.group])
    module, args, kwargs = case.build()
    return ws.wiring(module, *args, **kwargs)


def symmetries(wiring: ws.Wiring) -> Counter[Any]:
    return Counter((f.size, tuple(wiring.factors[o].size for o in f.over)) for f in wiring.free.values())


@pytest.mark.parametrize("case", SMALL, ids=lambda c: c.name)
def test_is_proved_and_as_theory_says(case: Case) -> None:
    wiring = wired(case)
    proof = wiring.proof
    assert wiring.status == "proved", proof
    assert proof is not None
    assert not proof.demoted, "rules claimed a symmetry that the network does not have"
    assert proof.error32 <= 1e-5 or (proof.error64 is not None and proof.error64 <= 1e-10)
    if case.theory.free is not None:
        expected = SMALLER.get(case.name, Counter(dict(case.theory.free)))
        assert symmetries(wiring) == expected
    assert wiring.movable_share >= case.theory.movable_min
    module, _, _ = case.build()
    assert set(wiring) == set(module.state_dict())


@pytest.mark.parametrize("case", SMALL, ids=lambda c: c.name)
def test_the_group_acts_exactly(case: Case) -> None:
    wiring = wired(case)
    assert wiring.program is not None
    tensors = dict(wiring.program.tensors)
    p, q = wiring.random(1), wiring.random(2)
    moved = wiring.apply(p, tensors)
    assert list(moved) == list(tensors)
    both = wiring.apply(q, moved)
    composed = wiring.apply(p.compose(q), tensors)
    back = wiring.apply(p.invert(), moved)
    for name, t in tensors.items():
        assert moved[name].dtype == t.dtype
        assert torch.equal(both[name], composed[name])
        assert torch.equal(back[name], t)
        assert torch.equal(moved[name].flatten().sort().values, t.flatten().sort().values)
    assert p.compose(p.invert()).is_identity
    assert p.invert().compose(p).is_identity
