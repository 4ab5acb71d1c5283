"""DARE: drop at random, and rescale."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from weightspace.errors import MergeError
from weightspace.merge.draws import TorchMasks, bernoulli
from weightspace.merge.method import PerModel, Piece, Stream, Tensor, TwoPass, in_range, per_model, wide
from weightspace.merge.methods._sums import combine

Rescale = Literal["inverse", "norm", "none"]


@dataclass(frozen=True)
class Dare(TwoPass):
    """θ₀ + λ Σ wᵢ mᵢ ⊙ τᵢ / p with mᵢ ~ Bernoulli(p) (Yu et al. 2024, "Language models are Super Mario").

    Element by element, so per tensor and global are the same with ``rescale="inverse"``.

    ``density``: p, the share kept, 1 minus the drop rate (0.1 to 0.9 in the paper); a number, or one per model.
    ``rescale``: "inverse" divides by p as in the paper; "norm" restores the L1 norm of each tensor (or of the whole
    task vector with ``scope="model"``), as mergekit does; "none". ``electing``: sum only what has the elected sign
    (DARE-TIES). ``scale``: λ. ``normalize``: divide by the weights. ``seed``: of the masks, which depend on it and on
    tensor names and the models' places alone (see `weightspace.merge.draws`); ``masks``: `TorchMasks` draws those of
    mergekit instead.
    """

    density: PerModel = 0.2
    scale: float = 0.4
    rescale: Rescale = "inverse"
    electing: bool = False
    normalize: bool = False
    seed: int = 0
    masks: TorchMasks | None = None

    name: ClassVar[str] = "dare"
    paper: ClassVar[str] = "Yu et al. (2024), Language models are Super Mario"
    needs_base: ClassVar[bool] = True
    narrow: ClassVar[bool] = True

    def check(self, count: int) -> None:
        super().check(count)
        per_model(self.density, count, "density")
        in_range(self.density, 0, 1, "density", open_low=True)
        if self.rescale not in ("inverse", "norm", "none"):
            raise MergeError(f"dare: rescale is {self.rescale!r}; 'inverse', 'norm' or 'none' was expected")

    def survey(self, stream: Stream, weights: Sequence[float]) -> tuple[float, ...]:
        """What each model's kept elements are multiplied by."""
        densities = per_model(self.density, stream.count, "density")
        if self.rescale != "norm" and self.masks is None:
            return tuple(1 / p if self.rescale == "inverse" else 1.0 for p in densities)
        norms = tuple(self._norm(stream, i, p) for i, p in enumerate(densities))
        return norms if self.rescale == "norm" else tuple(
            1 / p if self.rescale == "inverse" else 1.0 for p in densities
        )

    @property
    def in_order(self) -> bool:
        return self.masks is not None

    def _norm(self, stream: Stream, model: int, p: float) -> float:
        before = after = 0.0
        if p >= 1:
            return 1.0
        kind = torch.float32
        if self.masks:
            self.masks.begin(model)
        for piece in stream:
            size = piece.delta(model).abs_()
            kind = size.dtype
            before += float(wide(size).sum())
            kept = self.masks.draw(p, len(size)) if self.masks else self._mask(piece, model, p)
            after += float(wide(size.mul_(kept)).sum())
        if before < 1e-7 or after < 1e-7:
            return 1.0
        if kind.itemsize >= 4:
            return before / after
        first, second = torch.tensor([before, after], dtype=kind)
        return float(first / second)

    def merge(self, piece: Piece, weights: Sequence[float], state: tuple[float, ...]) -> Tensor:
        densities = per_model(self.density, piece.count, "density")
        base = piece.base
        kept = [
            (piece.model(i) - base).mul_(self._mask(piece, i, p)).mul_(factor)
            for i, (p, factor) in enumerate(zip(densities, state, strict=True))
        ]
        return combine(base, kept, weights, electing=self.electing, normalize=self.normalize, scale=self.scale)

    def _mask(self, piece: Piece, model: int, p: float) -> Tensor:
        if self.masks and p < 1:
            return self.masks.again(model, p, piece.stop - piece.start)
        return bernoulli(p, self.seed, piece.name, model, piece.start, piece.stop)
