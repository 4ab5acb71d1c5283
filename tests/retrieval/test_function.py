"""The function of a network as a point: what leaves the function leaves the point; what cannot be asked says why."""

from __future__ import annotations

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from torch import nn

import weightspace as ws
from weightspace.retrieval import function as module
from weightspace.retrieval.function import LENGTH, QUESTIONS, function
from weightspace.wiring.scaling import scaling


def _classifier(seed: int, hidden: int = 12, side: int = 8, channels: int = 1) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(channels, hidden, 3), nn.BatchNorm2d(hidden), nn.ReLU(), nn.Conv2d(hidden, 9, 3, stride=2),
        nn.ReLU(), nn.Flatten(), nn.Linear(9 * ((side - 4) // 2 + (side % 2)) ** 2, 7),
    ).eval()  # fmt: skip


def _point(network: nn.Module, *inputs: torch.Tensor, state: dict[str, torch.Tensor] | None = None) -> module.Function:
    wiring = ws.wiring(network, *inputs)
    return function(dict(network.state_dict()) if state is None else state, wiring)


def _distance(one: module.Function, other: module.Function) -> float:
    assert one.vector is not None
    assert other.vector is not None
    assert one.asked == other.asked
    return float(np.linalg.norm(one.vector - other.vector))


@settings(max_examples=15)
@given(st.integers(0, 10**6), st.integers(2, 20), st.sampled_from([8, 9, 16]), st.sampled_from([1, 3]))
def test_no_symmetry_moves_it(seed: int, hidden: int, side: int, channels: int) -> None:
    network = _classifier(seed, hidden, side, channels) if side == 8 else _perceptron(seed, hidden, side, channels)
    wiring = ws.wiring(network, torch.randn(2, channels, side, side))
    state = dict(network.state_dict())
    own = function(state, wiring)
    group = scaling(wiring)
    moved = group.apply(group.random(seed), wiring.apply(wiring.random(seed), state))
    assert own.asked == "images"
    assert _distance(own, function(moved, wiring)) < 1e-5


def _perceptron(seed: int, hidden: int, side: int, channels: int) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Flatten(), nn.Linear(channels * side**2, hidden), nn.ReLU(), nn.Linear(hidden, 5)
    )  # fmt: skip


def test_another_order_of_the_classes_and_a_folded_norm_do_not_move_it() -> None:
    network = _classifier(0)
    x = torch.randn(2, 1, 8, 8)
    own = _point(network, x)
    order = torch.randperm(7)
    state = dict(network.state_dict())
    state["6.weight"], state["6.bias"] = state["6.weight"][order], state["6.bias"][order]
    assert _distance(own, _point(network, x, state=state)) < 1e-6
    folded = nn.Sequential(
        torch.nn.utils.fusion.fuse_conv_bn_eval(network[0], network[1]), *list(network)[2:]  # type: ignore[arg-type]
    ).eval()  # fmt: skip
    assert _distance(own, _point(folded, x)) < 1e-4


def test_networks_of_other_sizes_compare_and_a_slight_change_is_a_small_one() -> None:
    x, larger = torch.randn(2, 1, 8, 8), torch.randn(2, 3, 20, 20)
    own, other = _point(_classifier(0), x), _point(_classifier(1, 20, 20, 3), larger)
    state = {k: v + 0.005 * torch.randn_like(v) if v.dim() > 1 else v for k, v in _classifier(0).state_dict().items()}
    near = _distance(own, _point(_classifier(0), x, state=state))
    assert 0 < near < 0.5 * _distance(own, other)


def test_the_projection_keeps_distances(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(2, 1, 8, 8)
    some = [_classifier(seed) for seed in range(4)]
    points = [_point(network, x) for network in some]
    pairs = QUESTIONS * (QUESTIONS + 1) // 2
    monkeypatch.setattr(module, "_projection", lambda: torch.eye(4 * pairs, dtype=torch.float64))
    whole = [_point(network, x) for network in some]
    for i in range(4):
        assert points[i].vector is not None
        assert points[i].vector.shape == (LENGTH,)
        assert np.linalg.norm(whole[i].vector) == pytest.approx(1, abs=1e-6)  # type: ignore[arg-type]
        for j in range(i):
            assert _distance(points[i], points[j]) == pytest.approx(_distance(whole[i], whole[j]), rel=0.2)


def test_similarity_of_answers_is_linear_cka() -> None:
    """By hand: the centred kernels of two tables of answers, and their cosine."""
    a, b = torch.randn(QUESTIONS, 5, dtype=torch.float64), torch.randn(QUESTIONS, 3, dtype=torch.float64)
    centre = torch.eye(QUESTIONS, dtype=torch.float64) - 1 / QUESTIONS
    k, m = centre @ a @ a.T @ centre, centre @ b @ b.T @ centre
    expected = (k * m).sum() / (k.norm() * m.norm())
    assert float(module._alike(a) @ module._alike(b)) == pytest.approx(float(expected), abs=1e-9)
    assert float(module._alike(a).norm()) == pytest.approx(1)


@pytest.mark.parametrize(("count", "image"), [
    (64, (1, 8, 8)), (784, (1, 28, 28)), (3072, (3, 32, 32)), (768, (3, 16, 16)), (48, None), (49, None),
    (100, (1, 10, 10)), (1000, None),
])  # fmt: skip
def test_images_in_a_row_are_images(count: int, image: tuple[int, int, int] | None) -> None:
    assert module._image((count,)) == image
    network = nn.Sequential(nn.Linear(count, 9), nn.ReLU(), nn.Linear(9, 4))
    own = _point(network, torch.randn(2, count))
    assert own.asked == ("images" if image else f"noise of {count}")
    if image:
        whole = nn.Sequential(nn.Flatten(), *network)
        assert _distance(own, _point(whole, torch.randn(2, *image))) < 1e-6


def test_what_reads_no_images_is_asked_noise_and_tokens() -> None:
    numbers = _point(nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 1)), torch.randn(2, 6))
    assert numbers.asked == "noise of 6"
    assert numbers.vector is not None

    class Words(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding, self.output = nn.Embedding(11, 6), nn.Linear(6, 4)

        def forward(self, tokens: torch.Tensor) -> torch.Tensor:
            found: torch.Tensor = self.output(torch.relu(self.embedding(tokens)).mean(1))
            return found

    tokens = torch.arange(22).view(2, 11) % 11
    words = _point(Words(), tokens)
    assert words.asked.startswith("tokens 11 ")
    assert words.asked == _point(Words(), tokens).asked
    assert words.asked != _point(Words(), tokens.flip(1) % 5).asked


def test_what_cannot_be_asked_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    network, x = _classifier(0), torch.randn(2, 1, 8, 8)
    wiring, state = ws.wiring(network, x), dict(network.state_dict())
    assert "could be run" in function(state, None).reason
    broken = {**state, "6.bias": torch.full((7,), torch.nan)}
    assert "'6.bias' holds infinite values" in function(broken, wiring).reason
    lacking = {k: v for k, v in state.items() if k != "3.weight"}
    assert "'3.weight'" in function(lacking, wiring).reason
    # A counter takes no part, a running mean does.
    assert function({k: v for k, v in state.items() if "batches" not in k}, wiring).vector is not None
    assert function({k: v for k, v in state.items() if "running_mean" not in k}, wiring).vector is None
    silent = {**state, "6.weight": torch.zeros_like(state["6.weight"])}
    assert "answers everything alike" in function(silent, wiring).reason
    monkeypatch.setattr(module, "OPERATIONS", 10)
    assert "operations" in function(state, wiring).reason
    monkeypatch.setattr(module, "PARAMETERS", 10)
    assert "parameters" in function(state, wiring).reason
