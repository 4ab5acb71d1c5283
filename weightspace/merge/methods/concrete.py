"""A subspace that task vectors share, learned on unlabelled data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from weightspace.merge.data import entries
from weightspace.merge.method import Merger, Models, Tensor, WithData, in_range
from weightspace.merge.methods.adamerging import TaskVectors, check_spread, descend


@dataclass(frozen=True)
class Concrete(WithData):
    """θ₀ + Σ λᵢ m ∘ τᵢ / mean(m) with one mask m for all task vectors (Tang et al. 2023, "Concrete subspace learning").

    The mask's logits z, one per parameter, are learned by Adam so that the entropy of the merged network's outputs on
    unlabelled inputs of all tasks is small, with m = σ((z + logit u) / ``temperature``), u uniform and drawn afresh in
    every step (Maddison et al. 2017); the result takes m = σ(z). Masks are rescaled by their mean in each tensor, as in
    the original, which learns over the whole model. ``data`` and output layers as for `AdaMerging`.

    ``scale``: λ (0.3); ``adapt`` learns a λ per model and tensor at the same time with ``adapt_rate``, from ``scale``
    (Concrete AdaMerging, where the original alternates the two). ``steps``: 2000 in the original; ``rate`` of the
    logits, ``batch``, ``temperature``: 1e-3, 16 and 0.5 there. ``spread``: as for `AdaMerging`.

    Memory: the base, all task vectors, and five times one model (logits, their gradient and Adam's state) in float32.
    """

    scale: float = 0.3
    steps: int = 2000
    rate: float = 1e-3
    batch: int = 16
    temperature: float = 0.5
    adapt: bool = False
    adapt_rate: float = 1e-3
    spread: Literal["own", "free"] = "own"

    name: ClassVar[str] = "concrete"
    paper: ClassVar[str] = "Tang et al. (2023), Concrete subspace learning based interference elimination"
    needs_base: ClassVar[bool] = True

    def check(self, count: int) -> None:
        in_range(self.temperature, 0, float("inf"), "temperature", open_low=True)
        in_range(self.rate, 0, float("inf"), "rate")
        check_spread(self.spread)

    def prepare(self, models: Models) -> Merger:
        data = entries(models)
        vectors = TaskVectors(models, data)
        names = vectors.learned
        logits = {n: torch.zeros_like(vectors.base[n]) for n in names}
        # In units of the logits' rate, so that one optimiser serves both.
        ratio = self.adapt_rate / self.rate if self.adapt and self.rate else 0.0
        moves = torch.zeros(len(models.models), len(names))
        generator = torch.Generator().manual_seed(models.seed + 1)

        def tensor(name: str, mask: Tensor, k: int) -> Tensor:
            return vectors.mixed(name, self.scale + ratio * moves[:, k], vectors.tau[name] * (mask / mask.mean()))

        def build(_: Sequence[Tensor]) -> dict[str, Tensor]:
            out = {}
            for k, name in enumerate(names):
                noise = torch.rand(logits[name].shape, generator=generator).clamp_(1e-6, 1 - 1e-6).logit_()
                out[name] = tensor(name, ((logits[name] + noise) / self.temperature).sigmoid(), k)
            return out

        values = [*logits.values(), *([moves] if self.adapt else [])]
        for _ in descend(vectors, data, build, values, models, self):
            pass

        def merge(name: str, base: Tensor | None, tensors: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
            assert base is not None
            if name in logits:
                return tensor(name, logits[name].sigmoid(), names.index(name)).to(base.dtype)
            return vectors.unlearned(name, base, tensors, self.scale)

        return merge
