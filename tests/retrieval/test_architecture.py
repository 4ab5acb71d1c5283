"""The kernel over wirings: invariant to widths and names, and nearer within a family than across."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import nn

import weightspace as ws
from weightspace.retrieval.architecture import alike, because, fingerprint, operations


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


def test_what_has_no_weights_counts_too() -> None:
    def network(between: nn.Module, width: int) -> dict[str, int]:
        module = nn.Sequential(nn.Conv2d(1, width, 3), nn.ReLU(), between, nn.Conv2d(width, width, 3, padding=1))
        return fingerprint(ws.wiring(module, torch.rand(2, 1, 8, 8), prove=False))

    pooled, wider = network(nn.MaxPool2d(2), 6), network(nn.MaxPool2d(2), 9)
    grown = network(nn.Upsample(scale_factor=2), 6)
    assert alike(pooled, wider) == pytest.approx(1)
    assert alike(pooled, grown) < 0.98
    assert "max_pool2d" in because(pooled, grown)
    # What cannot be run is compared by its graph alone.
    graphs = [{k: v for k, v in x.items() if not k.startswith("run|")} for x in (pooled, grown)]
    assert alike(*graphs) == alike(pooled, graphs[1]) == pytest.approx(1)


def test_a_large_network_is_run_without_values() -> None:
    wide = nn.Sequential(nn.Linear(3000, 4000), nn.GELU(), nn.Linear(4000, 3000))
    found = operations(ws.wiring(wide, torch.rand(2, 3000), prove=False))
    assert found == {"matmul": 2, "gelu": 1}
