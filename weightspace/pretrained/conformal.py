"""Intervals that hold the truth as often as they say: split conformal prediction with a local width.

The score of a network is |accuracy - prediction| over the ``spread`` that is usual where the network lies; the
interval at coverage 1 - a is the prediction ± the spread times the ⌈(m + 1)(1 - a)⌉-th smallest score of m networks of
runs that neither the training nor the test saw (Papadopoulos et al. 2002; Lei et al. 2018). Nobody's networks are a
mixture of all populations: where the networks of calibration are of several, the scores are those of the population
that needs the widest intervals, so that the coverage holds for each of them (a conservative form of the conditional
prediction of Vovk et al. 2003), whatever the metanet is worth.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from weightspace.pretrained.applicability import Applicability

COVERAGE = 0.9
_NEIGHBOURS = 20
_FLOOR = 0.005
_ENOUGH = 40
"""Networks of calibration that a population needs for its quantile to tell something."""


@dataclass(frozen=True)
class Prediction:
    """A predicted accuracy in [0, 1] with an interval that holds the truth in ``coverage`` of the cases.

    Outside the range of the predictor ``value``, ``low`` and ``high`` are not numbers, and ``applicability.reason``
    says why, unless the prediction was forced.
    """

    value: float
    low: float
    high: float
    coverage: float
    applicability: Applicability

    def __str__(self) -> str:
        if math.isnan(self.value):
            return f"no prediction ({self.applicability})"
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}] at {self.coverage:.0%}, {self.applicability}"


@dataclass(frozen=True, eq=False)
class Conformal:
    """What makes an interval of a prediction.

    ``places (v, d)`` and ``misses (v,)``: where networks of validation lie and by how much they were missed;
    ``scores (m,)``: those of networks of calibration, sorted.
    """

    places: Tensor
    misses: Tensor
    scores: Tensor

    @classmethod
    def fit(
        cls, places: Tensor, misses: Tensor, at: Tensor, missed: Tensor, populations: Sequence[str] = ()
    ) -> Conformal:
        """From places and misses of validation, and those of calibration, ``at (m, d)`` and ``missed (m,)``.

        ``populations``: those that the networks of calibration are of, one for each; none where they are of one.
        """
        scores = missed.to(torch.float64) / _spread(places, misses, at)
        parts = [scores.sort().values]
        for name in dict.fromkeys(populations):
            own = scores[torch.tensor([one == name for one in populations])]
            if len(own) >= _ENOUGH:
                parts.append(own.sort().values)
        return cls(places, misses, max(parts, key=lambda part: _reach(part, COVERAGE)))

    def spread(self, at: Tensor) -> Tensor:
        """The miss that is usual around ``at (n, d)``: ``(n,)``."""
        return _spread(self.places, self.misses, at)

    def intervals(self, predicted: Tensor, at: Tensor, coverage: float = COVERAGE) -> tuple[Tensor, Tensor]:
        """Ends of the intervals of ``predicted (n,)`` at the places ``at (n, d)``, within [0, 1]."""
        widest = _reach(self.scores, coverage)
        if math.isinf(widest):
            return torch.zeros_like(predicted), torch.ones_like(predicted)
        reach = widest * self.spread(at)
        centre = predicted.to(torch.float64)
        return (centre - reach).clamp(0, 1), (centre + reach).clamp(0, 1)


def _reach(scores: Tensor, coverage: float) -> float:
    """The score that the interval goes to; infinite where there are too few to say."""
    rank = math.ceil((len(scores) + 1) * coverage)
    return math.inf if rank > len(scores) else float(scores[rank - 1])


def _spread(places: Tensor, misses: Tensor, at: Tensor) -> Tensor:
    far = torch.cdist(at.to(torch.float64), places.to(torch.float64))
    near = far.topk(min(_NEIGHBOURS, len(places)), dim=1, largest=False).indices
    return misses.to(torch.float64)[near].mean(1) + _FLOOR
