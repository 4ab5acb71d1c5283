"""The kernel over wirings: invariant to widths and names, and nearer within a family than across."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import nn

import weightspace as ws
from weightspace.retrieval.architecture import alike, because, fingerprint


def mlp(*widths: int, activation: type[nn.Module] = nn.ReLU) -> dict[str, int]:
    layers: list[nn.Module] = []
    for a, b in pairwise(widths):
        layers += [nn.Linear(a, b), activation()]
    return fingerprint(ws.wiring(nn.Sequential(*layers[:-1]), torch.rand(2, widths[0]), prove=False))


def test_widths_have_no_part_and_depth_a_small_one() -> None:
    assert mlp(4, 8, 3) == mlp(5, 16, 2)
    one = mlp(4, 8, 8, 8, 3)
    assert alike(one, mlp(4, 8, 8, 8, 8, 8, 3)) > 0.7
    assert alike(one, one) == pytest.approx(1)
    assert "same graph" in because(one, dict(one))


def test_activations_and_kernels_count() -> None:
    one = mlp(4, 8, 8, 3)
    other = mlp(4, 8, 8, 3, activation=nn.Tanh)
    module = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16, 3))
    conv = fingerprint(ws.wiring(module, torch.rand(2, 1, 6, 6), prove=False))
    assert alike(one, mlp(4, 6, 9, 3)) > alike(one, other) > 0
    assert alike(one, other) < 0.9
    assert alike(one, conv) < 0.7
    assert "with a kernel" in because(one, conv)
