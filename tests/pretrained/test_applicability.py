"""Ranges: limits that are checked before anything is read, and distances with calibrated scores."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import weightspace as ws
from weightspace.pretrained.applicability import LEAST, Limits, Range, nearest, parameters

ANY = Limits((1, 10**6), 100, 4, frozenset({"weight", "shift"}), frozenset({"relu"}))


def _graph(activation: nn.Module, hidden: int = 8) -> ws.ParameterGraph:
    torch.manual_seed(0)
    return ws.graph(nn.Sequential(nn.Linear(4, hidden), activation, nn.Linear(hidden, 2)), torch.randn(2, 4))


@settings(deadline=None, max_examples=20)
@given(seed=st.integers(0, 2**31))
def test_scores_of_networks_like_those_of_calibration_are_uniform(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)

    def draw(n: int) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.randn(n, 3, generator=generator), torch.randn(n, 5, generator=generator)

    zone = Range.fit(ANY, draw(300), draw(400))
    scores = zone.scores(draw(400))
    assert abs(float(scores.mean()) - 0.5) < 0.1
    assert float((scores > LEAST).double().mean()) > 0.93
    assert float(scores.min()) > 0
    assert float(scores.max()) <= 1


def test_one_view_that_is_far_away_is_enough_to_be_outside() -> None:
    generator = torch.Generator().manual_seed(0)
    views = [torch.randn(300, 3, generator=generator), torch.randn(300, 5, generator=generator)]
    zone = Range.fit(ANY, views, [torch.randn(200, 3, generator=generator), torch.randn(200, 5, generator=generator)])
    near = [views[0][:1], views[1][:1]]
    assert zone.of(near).inside
    for number in range(2):
        far = [v + 30.0 * (k == number) for k, v in enumerate(near)]
        found = zone.of(far)
        assert not found.inside
        assert found.score == pytest.approx(1 / 201)
        assert "times as far" in found.reason


def test_distances_to_neighbours_are_those_of_a_sorted_row() -> None:
    queries, reference = torch.randn(4, 6), torch.randn(50, 6)
    expected = np.sort(np.linalg.norm(queries.numpy()[:, None] - reference.numpy()[None], axis=2), axis=1)[:, 4]
    far, which = nearest(queries, reference)
    assert far[:, -1].numpy() == pytest.approx(expected, abs=1e-5)
    assert (queries - reference[which[:, 4]]).norm(dim=1).numpy() == pytest.approx(expected, abs=1e-5)


def test_what_is_far_in_a_dense_part_is_near_in_a_sparse_one() -> None:
    generator = torch.Generator().manual_seed(0)
    dense, sparse = torch.zeros(1, 4), torch.full((1, 4), 100.0)

    def draw(n: int) -> torch.Tensor:
        parts = [at + s * torch.randn(n, 4, generator=generator) for at, s in ((dense, 0.1), (sparse, 5.0))]
        return torch.cat(parts)

    zone = Range.fit(ANY, [draw(200)] * 2, [draw(200)] * 2)
    step = torch.tensor([[2.0, 0, 0, 0]])
    assert not zone.of([dense + step] * 2).inside
    assert zone.of([sparse + step] * 2).inside


def test_limits_name_what_was_never_seen() -> None:
    assert ANY.excluded(_graph(nn.ReLU())) == ""
    assert "'tanh'" in ANY.excluded(_graph(nn.Tanh()))
    assert "parameters" in ANY.excluded(_graph(nn.ReLU(), hidden=200_000))
    norm = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 2)).eval()
    assert "role" in ANY.excluded(ws.graph(norm, torch.randn(2, 4)))
    assert Limits.from_dict(ANY.to_dict()) == ANY


def test_limits_of_networks_hold_them_with_slack() -> None:
    graphs = [_graph(nn.ReLU()), _graph(nn.Tanh(), hidden=16)]
    limits = Limits.of(graphs)
    assert all(limits.excluded(graph) == "" for graph in graphs)
    low, high = limits.parameters
    assert low < min(g.num_parameters for g in graphs)
    assert high > max(g.num_parameters for g in graphs)
    assert limits.activations == {"relu", "tanh"}


class Huge(Mapping[str, torch.Tensor]):
    """A billion parameters of which only the header may be looked at."""

    def shape(self, name: str) -> tuple[int, ...]:
        return (32_768, 32_768)

    def dtype(self, name: str) -> torch.dtype:
        return torch.float16

    def __getitem__(self, name: str) -> torch.Tensor:
        raise AssertionError("a tensor was read")

    def __iter__(self) -> Iterator[str]:
        return iter(["layer.weight"])

    def __len__(self) -> int:
        return 1


def test_a_billion_parameters_are_outside_without_being_read() -> None:
    assert parameters(Huge()) == 2**30
    found = ws.embed(Huge())
    assert found.vector is None
    assert not found.applicability.inside
    assert found.applicability.score == 0
    assert "1,073,741,824 parameters" in found.applicability.reason
    prediction = ws.predict_accuracy(Huge())
    assert math.isnan(prediction.value)
    assert "parameters" in prediction.applicability.reason
