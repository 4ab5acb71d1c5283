"""Every case of the registry builds, runs, and depends on all of the parameters it says it uses."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from . import CASES, Case

SMALL = [case for case in CASES.values() if not case.full]
MODULES = {"transformers": "transformers", "pyg": "torch_geometric"}


def built(case: Case) -> tuple[torch.nn.Module, tuple[Any, ...], dict[str, Any]]:
    if case.group in MODULES:
        pytest.importorskip(MODULES[case.group])
    return case.build()


def outputs(value: Any) -> list[Tensor]:
    """The floating point tensors of an output, whatever holds them."""
    leaves = tree_leaves(dict(value) if hasattr(value, "keys") else value)
    return [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.is_floating_point()]


def by_name(case: Case) -> str:
    return case.name


@pytest.mark.parametrize("case", SMALL, ids=by_name)
def test_runs(case: Case) -> None:
    module, args, kwargs = built(case)
    assert not module.training
    with torch.no_grad():
        first, second = outputs(module(*args, **kwargs)), outputs(module(*args, **kwargs))
    assert first
    for a, b in zip(first, second, strict=True):
        assert a.isfinite().all()
        assert torch.equal(a, b), "the output changes from run to run"
        assert a.std() > 1e-4, "the output is constant, so that it would prove nothing"


@pytest.mark.parametrize("case", SMALL, ids=by_name)
def test_depends_on_every_parameter(case: Case) -> None:
    module, args, kwargs = built(case)
    module.requires_grad_(True)
    before = outputs(module(*args, **kwargs))
    sum((out * torch.randn_like(out)).sum() for out in before).backward()
    idle = set()
    for name, parameter in module.named_parameters():
        if parameter.grad is not None and parameter.grad.any():
            continue
        saved = parameter.detach().clone()  # no gradient may also mean that the module blocks gradients
        with torch.no_grad():
            parameter.add_(torch.rand_like(parameter) + 0.5)
            after = outputs(module(*args, **kwargs))
            parameter.copy_(saved)
        if all(torch.allclose(a, b, atol=1e-6) for a, b in zip(before, after, strict=True)):
            idle.add(name)
    assert idle == set(case.theory.unused)


@pytest.mark.parametrize("case", SMALL, ids=by_name)
def test_is_small(case: Case) -> None:
    module, _, _ = built(case)
    assert sum(parameter.numel() for parameter in module.parameters()) < 300_000


@pytest.mark.parametrize("case", CASES.values(), ids=by_name)
def test_theory_is_well_formed(case: Case) -> None:
    theory = case.theory
    assert 0 <= theory.movable_min <= 1
    if theory.free is None:
        assert theory.why, "a theory left open says why"
        return
    for (size, over), count in theory.free.items():
        assert size > 1
        assert count > 0
        assert all(n > 1 for n in over)
