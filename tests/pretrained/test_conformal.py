"""Split-conformal intervals: they hold the truth as often as they say, also where misses differ from place to place."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from weightspace.pretrained import Applicability, Prediction
from weightspace.pretrained.conformal import Conformal


def _networks(n: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Places, truths and predictions; ten times less certain on one side than on the other."""
    at = torch.rand(n, 2, generator=generator, dtype=torch.float64)
    truth = 0.3 + 0.4 * at[:, 1]
    spread = torch.where(at[:, 0] < 0.5, 0.01, 0.1)
    return at, truth, truth + spread * torch.randn(n, generator=generator, dtype=torch.float64)


@settings(deadline=None, max_examples=5)
@given(seed=st.integers(0, 2**31))
def test_coverage_and_width(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    around, truth, guess = _networks(400, generator)
    at, other, missed = _networks(600, generator)
    found = Conformal.fit(around, (truth - guess).abs(), at, (other - missed).abs())
    places, true, predicted = _networks(2000, generator)
    low, high = found.intervals(predicted, places)
    hit = (true >= low) & (true <= high)
    assert float(hit.double().mean()) == pytest.approx(0.9, abs=0.06)
    certain = places[:, 0] < 0.45
    assert float((high - low)[certain].mean()) < 0.5 * float((high - low)[~certain].mean())
    assert float(low.min()) >= 0
    assert float(high.max()) <= 1


def test_every_population_is_covered_the_hard_one_too() -> None:
    generator = torch.Generator().manual_seed(0)

    def networks(n: int) -> tuple[torch.Tensor, torch.Tensor, list[str]]:
        """Places say nothing of which population it is; one is missed five times as far, and few are of it."""
        hard = torch.rand(n, generator=generator) < 0.15
        miss = torch.where(hard, 0.1, 0.02) * torch.randn(n, generator=generator).abs()
        return torch.rand(n, 2, generator=generator), miss, ["hard" if one else "easy" for one in hard.tolist()]

    (around, misses, _), (at, missed, names), (places, true, which) = networks(400), networks(600), networks(4000)
    hard = torch.tensor([name == "hard" for name in which])
    shares = {}
    for populations in ((), names):
        found = Conformal.fit(around, misses, at, missed, populations)
        low, high = found.intervals(torch.full((len(true),), 0.5), places)
        shares[bool(populations)] = float(((high - low) / 2 >= true)[hard].double().mean())
    assert shares[False] < 0.7
    assert shares[True] == pytest.approx(0.9, abs=0.06)
    # A population of a handful tells nothing of its quantile.
    few = ["few" if i < 5 else "easy" for i in range(len(missed))]
    assert len(Conformal.fit(around, misses, at, missed, few).scores) > 500


def test_too_few_networks_of_calibration_give_the_whole_range() -> None:
    places = torch.rand(5, 2, dtype=torch.float64)
    found = Conformal.fit(places, torch.rand(5), places, torch.rand(5))
    low, high = found.intervals(torch.tensor([0.5]), places[:1])
    assert (float(low), float(high)) == (0.0, 1.0)


def test_a_prediction_says_what_it_is() -> None:
    inside = Prediction(0.5, 0.4, 0.6, 0.9, Applicability(True, 0.7))
    assert str(inside) == "0.500 [0.400, 0.600] at 90%, inside (0.70)"
    nothing = Prediction(math.nan, math.nan, math.nan, 0.9, Applicability(False, 0.0, "it is too large"))
    assert str(nothing) == "no prediction (outside: it is too large)"
