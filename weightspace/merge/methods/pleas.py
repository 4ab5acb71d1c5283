"""Two models merged where they match, refitted by least squares."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from weightspace.errors import MergeError
from weightspace.merge.data import by_position, joined
from weightspace.merge.method import Merger, Models, Reshaped, Tensor, WithData, in_range


@dataclass(frozen=True)
class Pleas(WithData):
    """Permute, merge the best-matching neurons, keep the others twice, refit (Nasery et al. 2024, "PLeaS").

    Layer by layer, as in the original, through `weightspace.align.pleas`: the second model is matched to the first, of
    each layer the share ``ratio`` of neurons is merged and the others of both are kept, so that the result is wider
    (``ratio=1``, the default, keeps the widths), and each weight is the least-squares fit to what the two networks'
    layers compute on ``data`` (inputs; what per-model data there is is put together). Two models of equal weight; the
    base takes no part.

    ``matching``: by ``"weights"`` or ``"activations"``. ``ridge``: how much the fit holds on to the plain mean.
    ``positions``: most places of an operation per batch of 64 examples.

    Memory: both models several times over in float64, and the second moments of each layer.
    """

    ratio: float = 1.0
    matching: Literal["activations", "weights"] = "activations"
    ridge: float = 1e-3
    positions: int = 1024

    name: ClassVar[str] = "pleas"
    paper: ClassVar[str] = "Nasery et al. (2024), PLeaS: merging models with permutations and least squares"
    count: ClassVar[tuple[int, int | None]] = (2, 2)

    def check(self, count: int) -> None:
        in_range(self.ratio, 0, 1, "ratio")
        in_range(self.ridge, 0, float("inf"), "ridge")
        if self.matching not in ("activations", "weights"):
            raise MergeError(f"matching is {self.matching!r}; 'activations' or 'weights' was expected")

    def prepare(self, models: Models) -> Merger:
        from weightspace.align import pleas as module

        if models.weights[0] != models.weights[1]:
            raise MergeError(f"pleas gives both models the same weight; {models.weights} was asked for")
        _ = models.program
        wiring, inputs = by_position(models.proved, joined(models))
        a, b = ({n: m[n].detach() for n in wiring} for m in models.models)
        how: Literal["activation-matching", "weight-matching"] = (
            "activation-matching" if self.matching == "activations" else "weight-matching"
        )
        found = module.pleas(
            a, b, wiring, inputs=inputs, seed=models.seed, matching=how, ratio=self.ratio, ridge=self.ridge,
            positions=self.positions,
        )  # fmt: skip
        merged = found.diagnostics["merged"]
        models.notes.update({n: f"the mean, not refitted: {why}" for n, why in merged.kept.items()})

        def merge(name: str, base: Tensor | None, tensors: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
            if name in merged.tensors:
                result: Tensor = merged.tensors[name]
                return result
            return (tensors[0] + tensors[1]) / 2

        return Reshaped(merge, {n: tuple(t.shape) for n, t in merged.tensors.items()})
