"""Scale and sign symmetries of whole architectures, at other random elements than those that proved them."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import weightspace as ws
from tests.architectures import CASES
from tests.wiring.test_scaling import check_canonical, group
from weightspace.wiring.scaling import scaling

# Clamps that only large values reach, linear bottlenecks, shuffled groups, projected cells, partly rotated heads,
# experts, state spaces, norms with running statistics.
NAMES = (
    "mobilenet-v2", "shufflenet-v1-units", "lstm-projected", "moe-soft-modules", "vit", "llama-gqa", "mamba",
    "instancenorm-net", "siamese",
)  # fmt: skip
TRANSFORMERS = ("hf-phi", "hf-gpt2", "hf-mobilenet-v1")


@pytest.mark.parametrize("name", [*NAMES, *TRANSFORMERS])
def test_what_was_found_holds(name: str) -> None:
    if name in TRANSFORMERS:
        pytest.importorskip("transformers")
    module, args, kwargs = CASES[name].build()
    found = scaling(ws.wiring(module, *args, **kwargs))
    assert found.generators
    assert found.error <= 1e-10
    assert found.control is not None
    assert found.control > 1e-9
    assert max(found.verify(seed) for seed in (11, 12)) <= 1e-9
    check_canonical(found)


def test_a_clamp_that_trained_weights_never_reach_is_no_rectifier() -> None:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(4, 6), nn.ReLU6(), nn.Linear(6, 3))
    found = group(module, torch.randn(2, 4))
    assert found.generators == ()
    assert len(found.refused) == 1
    assert "more than rounding" in found.refused[0]
