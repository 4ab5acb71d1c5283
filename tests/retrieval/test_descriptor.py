"""The descriptor changes with nothing that leaves the function as it is, and with what does not."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import weightspace as ws
from weightspace.errors import WeightspaceError
from weightspace.retrieval import DIMENSION, FEATURES, describe, distances
from weightspace.retrieval import descriptor as module
from weightspace.retrieval.descriptor import together


def _net(seed: int, hidden: int = 12, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(seed)
    shapes = {
        "conv.weight": (hidden, 3, 3, 3),
        "conv.bias": (hidden,),
        "norm.running_var": (hidden,),
        "fc.weight": (10, hidden * 4),
        "fc.bias": (10,),
    }
    return {name: torch.randn(shape, generator=g).to(dtype) for name, shape in shapes.items()}


def _permuted(net: dict[str, Tensor], seed: int) -> dict[str, Tensor]:
    hidden = net["conv.weight"].shape[0]
    p = torch.randperm(hidden, generator=torch.Generator().manual_seed(seed))
    fc = net["fc.weight"].reshape(10, hidden, 4)[:, p].reshape(10, hidden * 4)
    return {
        "conv.weight": net["conv.weight"][p],
        "conv.bias": net["conv.bias"][p],
        "norm.running_var": net["norm.running_var"][p],
        "fc.weight": fc,
        "fc.bias": net["fc.bias"],
    }


def _relative(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.linalg.norm(a - b) / np.linalg.norm(a))


@settings(deadline=None, max_examples=25)
@given(seed=st.integers(0, 2**31), permutation=st.integers(0, 2**31), hidden=st.integers(2, 24))
def test_a_permuted_copy_is_the_same(seed: int, permutation: int, hidden: int) -> None:
    net = _net(seed, hidden)
    one, two = describe(net).vector, describe(_permuted(net, permutation)).vector
    assert _relative(one, two) <= 1e-9


def test_sign_flips_of_odd_activations_are_the_same() -> None:
    net = _net(0)
    signs = torch.where(torch.rand(12, generator=torch.Generator().manual_seed(1)) < 0.5, -1.0, 1.0)
    flipped = dict(net)
    flipped["conv.weight"] = net["conv.weight"] * signs[:, None, None, None]
    flipped["conv.bias"] = net["conv.bias"] * signs
    flipped["fc.weight"] = (net["fc.weight"].reshape(10, 12, 4) * signs[None, :, None]).reshape(10, 48)
    assert _relative(describe(net).vector, describe(flipped).vector) <= 1e-9


def test_another_files_names_order_and_layout_are_the_same() -> None:
    net = _net(0)
    other = {
        "dense/bias:0": net["fc.bias"],
        "dense/kernel:0": net["fc.weight"].T,
        "conv2d/kernel:0": net["conv.weight"].permute(2, 3, 1, 0),
        "conv2d/bias:0": net["conv.bias"][None],
        "bn/moving_variance:0": net["norm.running_var"],
    }
    assert _relative(describe(net).vector, describe(other).vector) <= 1e-9


def test_what_is_not_a_weight_is_left_out_and_named() -> None:
    net = _net(0)
    beside = {
        **net,
        "norm.num_batches_tracked": torch.tensor(7504),
        "epoch": torch.tensor(12.0),
        "positions": torch.arange(64),
        "optimizer.exp_avg.0": torch.randn(12, 3),
    }
    description = describe(beside)
    assert np.array_equal(description.vector, describe(net).vector)
    assert description.used == tuple(net)
    assert set(description.left_out) == set(beside) - set(net)


def test_storing_the_same_values_wider_is_the_same() -> None:
    half = _net(0, dtype=torch.bfloat16)
    wide = {name: value.to(torch.float64) for name, value in half.items()}
    assert np.array_equal(describe(half).vector, describe(wide).vector)


def test_other_weights_and_other_architectures_are_further_than_a_nudge() -> None:
    net = _net(0)
    nudged = {name: value * (1 + 1e-3 * torch.randn_like(value)) for name, value in net.items()}
    rows = np.stack([describe(x).vector for x in (nudged, _net(1), _net(0, hidden=24))])
    near, other, wider = distances(describe(net).vector, rows)
    assert 0 < near < 0.1 * other
    assert other < wider


def test_unusual_tensors_give_finite_features() -> None:
    odd = {
        "zeros": torch.zeros(5, 4),
        "zero": torch.zeros(6),
        "nan": torch.tensor([[1.0, float("nan")], [float("inf"), 2.0]]),
        "tiny": torch.full((3, 3), 1e-30),
        "huge": torch.full((3, 3, 2), 1e30),
        "complex": torch.randn(3, 3, dtype=torch.complex64),
        "single": torch.ones(1, 7),
    }
    vector = describe(odd).vector
    assert vector.shape == (DIMENSION,) == (len(FEATURES),)
    assert np.isfinite(vector).all()


def test_nothing_to_describe_is_an_error() -> None:
    with pytest.raises(WeightspaceError, match="nothing to describe"):
        describe({"steps": torch.tensor(3)})


class _Heads(nn.Module):
    """Attention whose projections keep heads and channels as two axes, beside a tensor without a use."""

    def __init__(self) -> None:
        super().__init__()
        g = torch.Generator().manual_seed(3)
        for name in ("q", "k", "v"):
            setattr(self, name, nn.Parameter(torch.randn(4, 6, 5, generator=g)))
        self.o = nn.Parameter(torch.randn(4, 5, 6, generator=g))
        self.register_buffer("unused", torch.randn(7, 7, generator=g))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (torch.einsum("btd,hdk->bhtk", x, weight) for weight in (self.q, self.k, self.v))
        z = (q @ k.transpose(-1, -2) / 5**0.5).softmax(-1) @ v
        return torch.einsum("bhtk,hkd->btd", z, self.o)


def test_channels_permuted_inside_each_head_are_the_same_under_a_proved_wiring() -> None:
    module = _Heads()
    wiring = ws.wiring(module, torch.randn(2, 3, 6))
    assert wiring.status == "proved"
    state = dict(module.state_dict())
    assert together(wiring, "q") == [(0, 2), (1,)]
    description = describe(state, wiring)
    assert set(description.left_out) == {"unused"}
    moved = wiring.apply(wiring.random(1), state)
    assert not torch.equal(moved["q"].sum(0), state["q"].sum(0))
    assert _relative(description.vector, describe(moved, wiring).vector) <= 1e-9
    fused = {
        "q": state["q"].permute(0, 2, 1).reshape(20, 6), "k": state["k"].permute(0, 2, 1).reshape(20, 6),
        "v": state["v"].permute(0, 2, 1).reshape(20, 6), "o": state["o"].reshape(20, 6).T,
    }  # fmt: skip
    assert _relative(description.vector, describe(fused).vector) <= 1e-9


def test_a_wiring_that_is_not_proved_changes_nothing() -> None:
    module = _Heads()
    guess = ws.wiring(module, torch.randn(2, 3, 6), prove=False)
    assert guess.status == "unverified"
    state = dict(module.state_dict())
    assert np.array_equal(describe(state, guess).vector, describe(state).vector)


def test_large_tensors_take_the_histogram_and_agree_with_the_sort(monkeypatch: pytest.MonkeyPatch) -> None:
    net = {"w": torch.randn(300, 200), "b": torch.randn(300)}
    exact = describe(net).vector
    monkeypatch.setattr(module, "_LARGEST_SORT", 100)
    approximate = describe(net).vector
    assert _relative(exact, approximate) < 2e-3
    permuted = {"w": net["w"][torch.randperm(300)], "b": net["b"]}
    assert _relative(approximate, describe(permuted).vector) <= 1e-6


def test_long_axes_take_the_spectrum_of_the_same_moments(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_LARGEST_SPECTRUM", 16)
    matrix = torch.randn(40, 90, dtype=torch.float64)
    spectrum = module._spectrum(matrix)
    exact = torch.linalg.svdvals(matrix) ** 2
    assert spectrum.sum() == pytest.approx(float(exact.sum()))
    assert np.median(spectrum) == pytest.approx(float(exact.median()), rel=0.5)
    shuffled = matrix[torch.randperm(40)][:, torch.randperm(90)]
    assert np.allclose(module._spectrum(shuffled), spectrum, rtol=1e-9)
