"""Intervals that hold the truth as often as they say: split conformal prediction with a local width.

The score of a network is |accuracy - prediction| over the ``spread`` that is usual where the network lies; the
interval at coverage 1 - a is the prediction ± the spread times the ⌈(m + 1)(1 - a)⌉-th smallest score of m networks of
runs that neither the training nor the test saw (Papadopoulos et al. 2002; Lei et al. 2018). The coverage holds on
average over networks like those of calibration, whatever the metanet is worth.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from weightspace.pretrained.applicability import Applicability

COVERAGE = 0.9
_NEIGHBOURS = 20
_FLOOR = 0.005


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
    def fit(cls, places: Tensor, misses: Tensor, at: Tensor, missed: Tensor) -> Conformal:
        """From places and misses of validation, and those of calibration, ``at (m, d)`` and ``missed (m,)``."""
        scores = missed.to(torch.float64) / _spread(places, misses, at)
        return cls(places, misses, scores.sort().values)

    def spread(self, at: Tensor) -> Tensor:
        """The miss that is usual around ``at (n, d)``: ``(n,)``."""
        return _spread(self.places, self.misses, at)

    def intervals(self, predicted: Tensor, at: Tensor, coverage: float = COVERAGE) -> tuple[Tensor, Tensor]:
        """Ends of the intervals of ``predicted (n,)`` at the places ``at (n, d)``, within [0, 1]."""
        m = len(self.scores)
        rank = math.ceil((m + 1) * coverage)
        if rank > m:
            return torch.zeros_like(predicted), torch.ones_like(predicted)
        reach = float(self.scores[rank - 1]) * self.spread(at)
        centre = predicted.to(torch.float64)
        return (centre - reach).clamp(0, 1), (centre + reach).clamp(0, 1)


def _spread(places: Tensor, misses: Tensor, at: Tensor) -> Tensor:
    far = torch.cdist(at.to(torch.float64), places.to(torch.float64))
    near = far.topk(min(_NEIGHBOURS, len(places)), dim=1, largest=False).indices
    return misses.to(torch.float64)[near].mean(1) + _FLOOR
