"""What is the same network gives the same evidence: permutations of channels, rescalings of rectified ones."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import weightspace as ws
from weightspace.backdoor.evidence import INPUT_TESTS, THOROUGH_TESTS, Evidence, evidence
from weightspace.wiring import Wiring


class Attending(nn.Module):
    """One layer of attention over the rows of an image, then a rectified layer and a batch norm."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(8, 8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.hidden = nn.Linear(8, 12)
        self.norm = nn.BatchNorm1d(12)
        self.last = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        h = self.embed(x.squeeze(1))
        h = h + self.attention(h, h, h, need_weights=False)[0]
        return self.last(self.norm(torch.relu(self.hidden(h.mean(1)))))  # type: ignore[no-any-return]


class Residual(nn.Module):
    """Two convolutions with a skip connection."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 6, 3, padding=1)
        self.inner = nn.Conv2d(6, 8, 3, padding=1)
        self.outer = nn.Conv2d(8, 6, 3, padding=1)
        self.last = nn.Linear(6 * 4, 5)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(self.stem(x))
        h = h + self.outer(torch.relu(self.inner(h)))
        return self.last(nn.functional.adaptive_avg_pool2d(h, 2).flatten(1))  # type: ignore[no-any-return]


@cache
def made(kind: type[nn.Module]) -> tuple[Wiring, dict[str, Tensor], Evidence]:
    torch.manual_seed(0)
    net = kind().eval()
    wiring = ws.wiring(net, torch.randn(2, 1, 8, 8))
    tensors = {n: t.detach().clone() for n, t in net.state_dict().items()}
    return wiring, tensors, evidence(wiring, tensors, thorough=True)


def alike(a: Evidence, b: Evidence, names: tuple[str, ...] = ()) -> None:
    columns = [i for i, n in enumerate(a.names) if not names or n in names]
    size = np.abs(a.values[:, columns]).max(0) + 1e-6
    assert (np.abs(a.values - b.values)[:, columns] / size).max() < 1e-2


@pytest.mark.parametrize("kind", [Attending, Residual])
@settings(max_examples=2, deadline=None)
@given(seed=st.integers(0, 2**31))
def test_a_permutation_changes_nothing(kind: type[nn.Module], seed: int) -> None:
    wiring, tensors, before = made(kind)
    moved = wiring.random(seed)
    after = evidence(wiring, wiring.apply(moved, tensors), thorough=True)
    alike(before, after)
    for name, value in before.whole.items():
        assert after.whole[name] == pytest.approx(value, rel=1e-3, abs=1e-6)
    for score, by_factor in before.channels.items():
        for factor, values in by_factor.items():
            if wiring.factors[factor].over:
                continue
            assert torch.allclose(after.channels[score][factor], values[moved.index[factor]], rtol=1e-3, atol=1e-5)


@settings(max_examples=2, deadline=None)
@given(scales=st.lists(st.floats(0.1, 10), min_size=8, max_size=8))
def test_rescaled_channels_change_no_test_that_claims_it(scales: list[float]) -> None:
    wiring, tensors, before = made(Residual)
    by = torch.tensor(scales)
    changed = dict(tensors)
    changed["inner.weight"] = tensors["inner.weight"] * by.view(-1, 1, 1, 1)
    changed["inner.bias"] = tensors["inner.bias"] * by
    changed["outer.weight"] = tensors["outer.weight"] / by.view(1, -1, 1, 1)
    after = evidence(wiring, changed, thorough=True)
    alike(before, after, (*INPUT_TESTS, *THOROUGH_TESTS))
    for factor, values in before.channels["apart"].items():
        if factor.startswith("inner"):
            assert torch.allclose(after.channels["apart"][factor], values, rtol=0.05, atol=0.05)


def test_rescaled_features_change_neither_shares_nor_paths() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(10, 12), nn.ReLU(), nn.Linear(12, 9), nn.ReLU(), nn.Linear(9, 4))
    wiring = ws.wiring(net, torch.randn(2, 10))
    tensors = {n: t.detach().clone() for n, t in net.state_dict().items()}
    by = torch.rand(9) * 5 + 0.1
    changed = dict(tensors) | {
        "2.weight": tensors["2.weight"] * by[:, None], "2.bias": tensors["2.bias"] * by,
        "4.weight": tensors["4.weight"] / by,
    }  # fmt: skip
    kept = tuple(n for n in evidence(wiring, tensors).names if n.startswith(("share_", "path_", "noise_")))
    alike(evidence(wiring, tensors), evidence(wiring, changed), kept)
