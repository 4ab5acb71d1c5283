"""Interpolation on the sphere."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import acos, sin, sqrt
from typing import ClassVar

import torch

from weightspace.merge.method import Piece, Stream, Tensor, TwoPass

_LINEAR_FROM = 0.9995
"""Above this cosine, either way, the arc is taken as its chord (as in mergekit)."""


@dataclass(frozen=True)
class Slerp(TwoPass):
    """sin((1−t)Ω)/sin Ω · θ₁ + sin(tΩ)/sin Ω · θ₂, Ω the angle between them (Shoemake 1985, "Animating rotation").

    Per tensor: each is one vector. ``scope="model"`` takes the angle between whole models. The base takes no part.

    ``t``: how far from the first model to the second; None takes it from the weights, w₂ / (w₁ + w₂).
    """

    t: float | None = None

    name: ClassVar[str] = "slerp"
    paper: ClassVar[str] = "Shoemake (1985), Animating rotation with quaternion curves"
    count: ClassVar[tuple[int, int | None]] = (2, 2)

    def survey(self, stream: Stream, weights: Sequence[float]) -> tuple[float, float]:
        """The factors of the two models."""
        t = self.t if self.t is not None else weights[1] / (weights[0] + weights[1])
        a = b = ab = 0.0
        for piece in stream:
            x, y = piece.model(0), piece.model(1)
            a += float(torch.dot(x, x))
            b += float(torch.dot(y, y))
            ab += float(torch.dot(x, y))
        length = [sqrt(s) if sqrt(s) > 1e-8 else 1.0 for s in (a, b)]
        cosine = max(-1.0, min(1.0, ab / (length[0] * length[1])))
        if abs(cosine) > _LINEAR_FROM:
            return 1 - t, t
        angle = acos(cosine)
        return sin((1 - t) * angle) / sin(angle), sin(t * angle) / sin(angle)

    def merge(self, piece: Piece, weights: Sequence[float], state: tuple[float, float]) -> Tensor:
        return (piece.model(0) * state[0]).add_(piece.model(1), alpha=state[1])
