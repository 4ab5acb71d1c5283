"""Neurons laid on neurons before weights are averaged."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

import torch

from weightspace.errors import MergeError, UnprovedWiringError
from weightspace.merge.data import by_position, joined
from weightspace.merge.method import Merger, Models, Prepared, Tensor, in_range

if TYPE_CHECKING:
    from weightspace.wiring.wiring import Wiring


@dataclass(frozen=True)
class OtFusion(Prepared):
    """The mean of models whose neurons were carried onto the first one's (Singh & Jaggi 2020, "OTFusion").

    Layer by layer, as in the original, a transport plan between the neurons of each model and of the first makes both
    one network's (`weightspace.align.optimal_transport`); then Σ wᵢ θᵢ / Σ wᵢ. Models may have other widths than the
    first, whose widths the result has. The base takes no part. Needs a proved wiring of the first model, and of each
    that differs in widths, and the extra ``ot``.

    ``ground``: neurons are compared by incoming ``"weights"`` or by ``"activations"`` on ``data`` (inputs, the same for
    all models; what per-model data there is is put together); None: activations where there is data.
    ``regularisation``: 0 for exact plans, above that soft ones (entropy, as a share of the mean cost). ``positions``:
    most samples of activations.

    Memory: all models in float32.
    """

    ground: Literal["weights", "activations"] | None = None
    regularisation: float = 0.0
    positions: int = 2048

    name: ClassVar[str] = "ot-fusion"
    paper: ClassVar[str] = "Singh & Jaggi (2020), Model fusion via optimal transport"
    needs_wiring: ClassVar[bool] = True
    any_shape: ClassVar[bool] = True

    def check(self, count: int) -> None:
        if self.ground not in (None, "weights", "activations"):
            raise MergeError(f"ground is {self.ground!r}; 'weights', 'activations' or None was expected")
        in_range(self.regularisation, 0, float("inf"), "regularisation")

    def prepare(self, models: Models) -> Merger:
        from weightspace.align.optimal_transport import optimal_transport

        data = None if models.data is None else joined(models)
        first, *others = models.models
        wiring, inputs = (models.proved, None) if data is None else by_position(models.proved, data)
        a = _tensors(first, wiring)
        carried: list[Mapping[str, Tensor]] = [a]
        for k, model in enumerate(others):
            own = wiring if _same(model, wiring) else _wiring_of(model, models, k + 1)
            own = own if data is None else by_position(own, data)[0]
            b = _tensors(model, own)
            found = optimal_transport(
                a, b, own, wiring_a=wiring, inputs=inputs, seed=models.seed, ground=self.ground,
                regularisation=self.regularisation, positions=self.positions,
            )  # fmt: skip
            carried.append(own.apply(found.permutations, b) if found.aligned is None else found.aligned)

        def merge(name: str, base: Tensor | None, tensors: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
            parts = [c[name] for c in carried] if name in wiring else list(tensors)
            if len({p.shape for p in parts}) > 1:
                raise MergeError(f"{name}: its shape differs among the models, and the wiring does not know it")
            total = sum(weights)
            return sum((p * (w / total) for p, w in zip(parts, weights, strict=True)), torch.zeros(()))

        return merge


def _tensors(model: Mapping[str, Tensor], wiring: Wiring) -> dict[str, Tensor]:
    missing = [n for n in wiring if n not in model]
    if missing:
        raise MergeError(f"{missing[0]}: the wiring has it and a model does not; are they of one architecture?")
    return {n: Models.float(model, n).detach() if model[n].is_floating_point() else model[n] for n in wiring}


def _same(model: Mapping[str, Tensor], wiring: Wiring) -> bool:
    return all(n in model and tuple(model[n].shape) == tuple(wiring.shapes[n]) for n in wiring)


def _wiring_of(model: Mapping[str, Tensor], models: Models, index: int) -> Wiring:
    from weightspace.wiring.entry import wiring

    found = wiring(model)
    if not found.proved and not models.unverified:
        raise UnprovedWiringError(
            f"model {index + 1} has other widths than the first, and its own wiring is not proved; give models whose "
            "files say what network they are, or say unverified=True"
        )
    return found
