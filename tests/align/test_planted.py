"""Planted permutations come back exactly, whatever the architecture."""

from __future__ import annotations

import pytest
import torch

import weightspace as ws
from tests.architectures import CASES
from weightspace.wiring.proof import generic

FAST = [n for n, c in CASES.items() if c.group == "torch" and not c.full]
SLOW = [n for n in CASES if n not in FAST]


def recovered(name: str, method: str) -> None:
    if CASES[name].group == "transformers":
        pytest.importorskip("transformers")
    module, args, kwargs = CASES[name].build()
    wiring = ws.wiring(module, *args, **kwargs)
    assert wiring.program is not None
    # Constant tensors have no order to find; a little noise tells their elements apart, as the proof does.
    a = generic(wiring.program.tensors, 3)
    b = wiring.apply(wiring.random(5), a)
    found = ws.align(a, b, method, wiring=wiring)
    assert [n for n in a if not torch.equal(found.aligned[n], a[n])] == []
    assert found.objective == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("name", FAST)
def test_weight_matching_finds_a_planted_permutation(name: str) -> None:
    recovered(name, "weight-matching")


@pytest.mark.slow
@pytest.mark.parametrize("name", SLOW)
def test_weight_matching_finds_a_planted_permutation_of_large_networks(name: str) -> None:
    recovered(name, "weight-matching")


@pytest.mark.parametrize("name", ["mlp", "resnet20-option-a", "llama-gqa", "moe-top2"])
def test_frank_wolfe_finds_a_planted_permutation(name: str) -> None:
    recovered(name, "frank-wolfe")
