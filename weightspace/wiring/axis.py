"""The public vocabulary of a wiring: factors, segments and axes."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Literal

Kind = Literal["free", "pinned", "structured"]


@dataclass(frozen=True)
class Factor:
    """A smallest set of axis elements that move together: neurons, heads, channels inside a head.

    A free factor may be permuted by any element of S_size; ``over`` names the factors it is fibred over:
    for every position of those it has a permutation of its own (channels inside *each* head).
    A pinned factor may not move, and ``reason`` says why.
    """

    name: str
    size: int
    pinned: bool
    over: tuple[str, ...] = ()
    reason: str = ""

    def __repr__(self) -> str:
        over = f" over {', '.join(self.over)}" if self.over else ""
        return f"{self.name}:{self.size}{over}" + (f" (pinned: {self.reason})" if self.pinned else "")


@dataclass(frozen=True)
class Segment:
    """Positions ``start + sum(stride_i * x_i)`` of an axis, where ``x_i`` runs over factor i."""

    start: int
    factors: tuple[str, ...]
    strides: tuple[int, ...]
    sizes: tuple[int, ...]

    @property
    def size(self) -> int:
        return prod(self.sizes)


@dataclass(frozen=True)
class Axis:
    """One axis: a sum (concatenation) of segments, each a product of factors.

    ``kind`` is *free* (one factor that may be permuted), *pinned* (nothing may move) or *structured*
    (heads x channels, gates, groups, concatenated segments).
    """

    name: str
    size: int
    kind: Kind
    segments: tuple[tuple[str, ...], ...]

    def __repr__(self) -> str:
        mark = {"free": "", "pinned": "!", "structured": "*"}[self.kind]
        return f"{self.name}{mark}:{self.size}"
