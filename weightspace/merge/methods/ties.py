"""TIES: trim small changes, elect a sign, average those that agree."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from weightspace.errors import MergeError
from weightspace.merge.method import PerModel, Piece, Stream, Tensor, TwoPass, in_range, per_model, wide
from weightspace.merge.select import kth_largest

_SAMPLE = 1 << 16
_Cut = tuple[float, Tensor]


@dataclass(frozen=True)
class Ties(TwoPass):
    """Trim, elect sign and merge (Yadav et al. 2023, "TIES-Merging").

    Of each task vector τᵢ = θᵢ − θ₀ the ``density`` largest magnitudes are kept; γ = sign(Σ wᵢ τ̂ᵢ) per element; the
    result is θ₀ + λ Σ_{sign τ̂ᵢ = γ} wᵢ τ̂ᵢ / Σ_{sign τ̂ᵢ = γ} wᵢ. Elements of the same magnitude as the last one kept are
    kept as well, so that the order of elements does not matter.

    The original trims over the whole model: ``scope="model"``. Per tensor, the default, is what most implementations
    do, and reads the files once less.

    ``density``: share that is kept, 0.2 in the paper; one number or one per model. ``scale``: λ, 1 in the paper.
    ``normalize``: divide by the weights of those that agree (else the sum is taken). ``equal="sorted"`` keeps exactly
    the share, of the elements at the threshold those that ``torch.argsort`` happens to put first, as mergekit does;
    where there are such elements, it takes memory for a whole tensor.
    """

    density: PerModel = 0.2
    scale: float = 1.0
    normalize: bool = True
    equal: Literal["all", "sorted"] = "all"

    name: ClassVar[str] = "ties"
    paper: ClassVar[str] = "Yadav et al. (2023), TIES-Merging"
    needs_base: ClassVar[bool] = True
    narrow: ClassVar[bool] = True

    def check(self, count: int) -> None:
        super().check(count)
        per_model(self.density, count, "density")
        in_range(self.density, 0, 1, "density")
        if self.equal not in ("all", "sorted"):
            raise MergeError(f"ties: equal is {self.equal!r}; 'all' or 'sorted' was expected")
        if self.equal == "sorted" and self.scope == "model":
            raise MergeError("ties: equal='sorted' is within a tensor; say scope='tensor' or equal='all'")

    @property
    def held(self) -> int:
        return 28 if self.equal == "sorted" else 0  # magnitudes, their order, and what sorting takes

    def survey(self, stream: Stream, weights: Sequence[float]) -> tuple[_Cut, ...]:
        """The least magnitude that is kept of each model, and the places that fall although they have it."""
        densities = per_model(self.density, stream.count, "density")
        cuts = [threshold(stream, i, density) for i, density in enumerate(densities)]
        none = torch.empty(0, dtype=torch.int64)
        return tuple(
            (least, _surplus(stream, i, least, density) if self.equal == "sorted" else none)
            for i, (least, density) in enumerate(zip(cuts, densities, strict=True))
        )

    def merge(self, piece: Piece, weights: Sequence[float], state: tuple[_Cut, ...]) -> Tensor:
        base = piece.base
        trimmed = []
        for i, ((least, fallen), weight) in enumerate(zip(state, weights, strict=True)):
            delta = trim(piece.model(i) - base, least)
            if len(fallen):
                first, end = torch.searchsorted(fallen, torch.tensor([piece.start, piece.stop])).tolist()
                delta[fallen[first:end] - piece.start] = 0
            trimmed.append(delta.mul_(weight))
        return elect(trimmed, weights, self.normalize).mul_(self.scale).add_(base)


def threshold(stream: Stream, index: int, density: float) -> float:
    """The least magnitude that is kept of a model's task vector: its ``density``-quantile from above.

    ``max(1, ⌊density · n⌋)`` elements are kept; 0 keeps all, infinity none.
    """
    if density >= 1 or stream.numel == 0:
        return 0.0
    if density <= 0:
        return float("inf")
    return ranked(stream, index, max(1, int(density * stream.numel)))


def _surplus(stream: Stream, index: int, least: float, density: float) -> Tensor:
    """Places of the elements of magnitude ``least`` that are more than the share, in the order of ``torch.argsort``."""
    none = torch.empty(0, dtype=torch.int64)
    if density <= 0 or density >= 1 or not stream.numel:
        return none
    room = max(1, int(density * stream.numel))
    sizes = torch.cat([wide(piece.delta(index).abs_()) for piece in stream])
    surplus = int(torch.count_nonzero(sizes >= least)) - room
    if not surplus:
        return none
    # They stand together in the order, so that looking them up is not needed.
    return sizes.argsort(descending=True)[room : room + surplus].sort().values


def ranked(stream: Stream, index: int, k: int) -> float:
    """The ``k``-th largest magnitude (from 1) of a model's task vector."""
    return kth_largest(
        lambda: (wide(piece.delta(index).abs_()) for piece in stream),
        stream.numel,
        k,
        lambda: torch.cat([wide(piece.delta(index).abs_()) for piece in stream.sample(_SAMPLE)]),
    )


def trim(delta: Tensor, least: float) -> Tensor:
    """A task vector without its elements below ``least`` in magnitude."""
    if least == 0:
        return delta
    # Keeps what is greater than its threshold: the next smaller number makes that "at least".
    limit = torch.tensor(least, dtype=delta.dtype)
    return torch.hardshrink(delta, float(torch.nextafter(limit, torch.zeros_like(limit))))


def elect(trimmed: Sequence[Tensor], weights: Sequence[float], normalize: bool) -> Tensor:
    """The mean (or sum) over models, element by element, of what has the sign of the sum; 0 counts as positive."""
    kind = trimmed[0].dtype
    parts = [wide(delta) for delta in trimmed]  # narrow types are rounded after sums, not on the way
    total = parts[0] + parts[1] if len(parts) > 1 else parts[0].clone()
    for delta in parts[2:]:
        total.add_(delta)
    elected = torch.copysign(torch.ones((), dtype=total.dtype), total.to(kind).to(total.dtype).add_(0.0))
    mixed, share = torch.zeros_like(total), torch.zeros_like(total)
    for delta, weight in zip(parts, weights, strict=True):
        agrees = torch.sign(delta).mul_(elected).relu_()
        mixed.addcmul_(delta, agrees)
        if normalize:
            share.add_(agrees, alpha=weight)
    mixed = mixed.to(kind)
    if not normalize:
        return mixed
    # Nobody agrees: 0 / anything. A clamp is many times faster than filling where the share is zero.
    least = min(weights)
    return mixed.div_((share.clamp_min_(least / 2) if least > 0 else share.masked_fill_(share == 0, 1)).to(kind))
