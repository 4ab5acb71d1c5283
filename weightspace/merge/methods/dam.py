"""Task vectors merged through two masks: one that the tasks share, one that leaves backdoors out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from torch.nn import functional as F

from weightspace.errors import MergeError
from weightspace.merge.data import MergeData, entries
from weightspace.merge.method import Merger, Models, Tensor, WithData, in_range
from weightspace.merge.methods.adamerging import TaskVectors, check_spread, entropy, spread
from weightspace.progress import bar

_OPEN = 3.0
"""Logit that the second mask starts from: nearly everything passes."""


@dataclass(frozen=True)
class Dam(WithData):
    """θ₀ + λ Σ m₁ ∘ m₂ ∘ τᵢ / mean(m₁), masks learned in turn ("defence-aware merging", Yang et al. 2025).

    The task-shared mask m₁ makes the entropy of the outputs on unlabelled clean inputs of all tasks small, as in
    `Concrete`; the backdoor-detection mask m₂ makes the merged network answer perturbed inputs as it does clean ones.
    In every step a perturbation δᵢ of each task's batch, one for all its examples, is moved along its gradient so that
    Lᵢ = CE(f(x + δᵢ), argmax f(x)) becomes large, |δᵢ| (root mean square) at most ``size`` deviations of the inputs;
    then m₁ descends on Σ wᵢ Hᵢ, and after that m₂ on Σ wᵢ (Hᵢ + ``safety`` · Lᵢ). Masks have a logit per parameter and
    are relaxed as in `Concrete`; the original learns over the whole model, and rescales m₁ per tensor as is done here.

    What the authors published as code differs from the two masks of their paper: one mask, learned on the entropy of
    clean inputs plus ``adv_weight`` = 0.1 times that of perturbed ones, with δ moved by Adam at a rate of 1e-4. Here
    the paper's two masks are kept, and Lᵢ as above, by which δ is found there and here.

    ``data``: inputs per model (`MergeData`), of floating point: words have no gradient, so for networks of text excise
    backdoors before. ``scale``: λ, 0.3 in the original. ``steps``, ``rate`` of m₁, ``batch``, ``temperature``,
    ``safety``: 2000, 1e-3, 16, 0.5 and 0.1 there, for networks a thousand times larger; defaults here are for small
    ones. ``guard``: rate of m₂, which the code has not. ``search``: steps of δ within a step. ``spread``: as for
    `AdaMerging`.

    Memory: the base, all task vectors, and ten times one model in float32.
    """

    scale: float = 0.3
    steps: int = 300
    rate: float = 1e-2
    guard: float = 5e-2
    safety: float = 1.0
    size: float = 0.4
    search: int = 2
    batch: int = 16
    temperature: float = 0.5
    spread: Literal["own", "free"] = "own"

    name: ClassVar[str] = "dam"
    paper: ClassVar[str] = "Yang et al. (2025), Mitigating the backdoor effect for multi-task model merging"
    needs_base: ClassVar[bool] = True

    def check(self, count: int) -> None:
        in_range(self.temperature, 0, float("inf"), "temperature", open_low=True)
        for value, what in ((self.rate, "rate"), (self.guard, "guard"), (self.safety, "safety"), (self.size, "size")):
            in_range(value, 0, float("inf"), what)
        check_spread(self.spread)

    def prepare(self, models: Models) -> Merger:
        data = entries(models)
        for part in data:
            _first(part)  # said before anything is run
        vectors = TaskVectors(models, data)
        names = vectors.learned
        shared = {n: torch.zeros_like(vectors.base[n]) for n in names}
        guard = {n: torch.full_like(vectors.base[n], _OPEN) for n in names}
        self._learn(models, vectors, data, shared, guard)
        masks = {n: (shared[n].sigmoid(), guard[n].sigmoid()) for n in names}

        def merge(name: str, base: Tensor | None, tensors: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
            assert base is not None
            if name in masks:
                return self.through(vectors, name, *masks[name], models.weights).to(base.dtype)
            return vectors.unlearned(name, base, tensors, self.scale)

        return merge

    def through(
        self, vectors: TaskVectors, name: str, shared: Tensor, guard: Tensor, weights: Sequence[float]
    ) -> Tensor:
        """θ₀ + λ Σ wᵢ m₁ ∘ m₂ ∘ τᵢ / mean(m₁) of one tensor."""
        scales = torch.full((len(weights),), self.scale) * torch.tensor(weights)
        return vectors.mixed(name, scales, vectors.tau[name] * (shared / shared.mean() * guard))

    def _learn(
        self, models: Models, vectors: TaskVectors, data: Sequence[MergeData], shared: dict[str, Tensor],
        guard: dict[str, Tensor],
    ) -> None:  # fmt: skip
        generator = torch.Generator().manual_seed(models.seed)
        both = [list(shared.values()), list(guard.values())]
        for value in (*both[0], *both[1]):
            value.requires_grad_(True)
        optimisers = [torch.optim.Adam(v, lr=r) for v, r in zip(both, (self.rate, self.guard), strict=True)]
        deltas = [torch.zeros_like(_first(d)[0]) for d in data]

        def relaxed(z: Tensor) -> Tensor:
            noise = torch.rand(z.shape, generator=generator).clamp_(1e-6, 1 - 1e-6).logit_()
            return ((z + noise) / self.temperature).sigmoid()

        def merged() -> dict[str, Tensor]:
            built = {
                n: self.through(vectors, n, relaxed(shared[n]), relaxed(guard[n]), models.weights) for n in shared
            }
            return {**vectors.base, **built}

        with bar(self.name, self.steps, models.progress) as step:
            for number in range(self.steps):
                drawn = [d.draw(self.batch, generator) for d in data]
                with torch.no_grad():
                    still = merged()
                deltas = [
                    self._moved(vectors, still, part, delta) for part, delta in zip(drawn, deltas, strict=True)
                ]
                for phase, optimiser in enumerate(optimisers):
                    with torch.enable_grad():
                        tensors, losses = merged(), []
                        for i, part in enumerate(drawn):
                            outputs = vectors.network.own(tensors, part)
                            wanted = outputs.argmax(-1)
                            if self.spread == "own":
                                outputs = outputs * (vectors.spreads[i] / spread(outputs).clamp(min=1e-12))
                            loss = entropy(outputs)
                            if phase:
                                bad = vectors.network.own(tensors, _added(part, deltas[i]))
                                loss = loss + self.safety * _cross(bad, wanted)
                            losses.append(models.weights[i] * loss)
                        total = torch.stack(losses).sum()
                        optimiser.zero_grad()
                        total.backward()
                    optimiser.step()
                step(f"{number + 1}")
        for value in (*both[0], *both[1]):
            value.requires_grad_(False)

    def _moved(self, vectors: TaskVectors, tensors: Mapping[str, Tensor], part: MergeData, delta: Tensor) -> Tensor:
        """The perturbation after ``search`` steps up the loss of the answers to clean inputs."""
        x = _first(part)
        most = self.size * float(x.std()) * delta.numel() ** 0.5
        if not most:
            return delta
        if not bool(delta.any()):
            delta = torch.randn(delta.shape, generator=torch.Generator().manual_seed(0)) * (0.1 * self.size * x.std())
        with torch.no_grad():
            wanted = vectors.network.own(tensors, part).argmax(-1)
        for _ in range(self.search):
            delta = delta.detach().requires_grad_(True)
            with torch.enable_grad():
                loss = _cross(vectors.network.own(tensors, _added(part, delta)), wanted)
            (slope,) = torch.autograd.grad(loss, delta)
            delta = delta.detach() + 0.3 * most * slope / slope.norm().clamp(min=1e-12)
            delta = delta * min(1.0, most / max(float(delta.norm()), 1e-12))
        return delta.detach()


def _cross(outputs: Tensor, wanted: Tensor) -> Tensor:
    return F.cross_entropy(outputs.flatten(0, -2), wanted.flatten())


def _first(data: MergeData) -> Tensor:
    """The inputs (n, …) that are perturbed: the first ones. Raises `MergeError` where they are no numbers."""
    parts = [*data.args, *data.kwargs.values()]
    found = next((x for x in parts if isinstance(x, Tensor) and x.dim()), None)
    if found is None or not found.is_floating_point():
        raise MergeError(
            "dam perturbs inputs, and these are no floating-point numbers; excise backdoors from the models instead "
            "(ws.excise) and merge what comes of it"
        )
    return found


def _added(data: MergeData, delta: Tensor) -> MergeData:
    """The examples with a perturbation added to the inputs that are perturbed."""
    first = _first(data)

    def put(x: object) -> object:
        return first + delta if x is first else x

    x = {k: put(v) for k, v in data.x.items()} if isinstance(data.x, Mapping) else tuple(map(put, data.args))
    return replace(data, x=x)
