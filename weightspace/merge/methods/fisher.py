"""Means weighted by how much each parameter matters to each model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from weightspace.errors import MergeError
from weightspace.merge.data import MergeData, Network, entries
from weightspace.merge.method import Merger, Models, Tensor, WithData, in_range
from weightspace.wiring.trace import plain_kernels

_ROOM = 1 << 26  # elements of per-example gradients in memory at once


@dataclass(frozen=True)
class Fisher(WithData):
    """Σ wᵢ Fᵢ θᵢ / Σ wᵢ Fᵢ, element by element (Matena & Raffel 2022, "Merging models with Fisher-weighted averaging").

    Fᵢ is the diagonal Fisher information of model i, the mean over its examples x of E_{y ~ p(y|x)} (∂ log p(y|x)/∂θ)².
    The original works on the whole model, parameter by parameter. ``data``: inputs per model, unlabelled (`MergeData`);
    with ``outputs``, p is over these alone, so that rows of other tasks' outputs have no weight. The base takes no
    part.

    ``labels``: ``"sampled"`` draws one y per example from the model's own outputs, ``"expected"`` takes the mean over
    all classes, ``"given"`` takes those of the data (the empirical Fisher). ``likelihood``: ``"categorical"`` (softmax
    of the outputs) or ``"gaussian"`` (outputs are means with variance 1). ``samples``: most examples per model.
    ``normalize``: divide each model's F by its norm over the model, so that a model of small gradients (well trained,
    or on an easy task) is not drowned. ``floor``: least F, which makes it the mean where no model cares. Running
    statistics of norms are averaged.

    Memory: two float32 copies of a model, and the gradients of some examples.
    """

    labels: Literal["sampled", "expected", "given"] = "sampled"
    likelihood: Literal["categorical", "gaussian"] = "categorical"
    samples: int = 256
    normalize: bool = True
    floor: float = 1e-6

    name: ClassVar[str] = "fisher"
    paper: ClassVar[str] = "Matena & Raffel (2022), Merging models with Fisher-weighted averaging"

    def check(self, count: int) -> None:
        if self.labels not in ("sampled", "expected", "given"):
            raise MergeError(f"labels is {self.labels!r}; 'sampled', 'expected' or 'given' was expected")
        if self.likelihood not in ("categorical", "gaussian"):
            raise MergeError(f"likelihood is {self.likelihood!r}; 'categorical' or 'gaussian' was expected")
        in_range(self.floor, 0, float("inf"), "floor")
        in_range(self.samples, 1, float("inf"), "samples")

    def prepare(self, models: Models) -> Merger:
        network = Network(models)
        above: dict[str, Tensor] = {}
        below: dict[str, Tensor] = {}
        for i, (model, data, weight) in enumerate(zip(models.models, entries(models), models.weights, strict=True)):
            generator = torch.Generator().manual_seed(models.seed * 1009 + i)
            tensors = network.tensors(model)
            found = information(
                network, tensors, data.draw(self.samples, generator), network.learned, self.labels, self.likelihood,
                generator,
            )
            norm = sum(float(f.square().sum()) for f in found.values()) ** 0.5 if self.normalize else 1.0
            for name, f in found.items():
                f.div_(norm or 1.0).clamp_(min=self.floor).mul_(weight)
                if i == 0:
                    above[name], below[name] = f * tensors[name], f
                else:
                    above[name].addcmul_(f, tensors[name])
                    below[name].add_(f)

        def merge(name: str, base: Tensor | None, given: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
            mean = sum((m * w for m, w in zip(given, weights, strict=True)), torch.zeros(())) / sum(weights)
            if name not in below:
                return mean
            return torch.where(below[name] > 0, above[name] / below[name], mean)

        return merge


def information(
    network: Network, tensors: Mapping[str, Tensor], data: MergeData, names: Sequence[str],
    labels: Literal["sampled", "expected", "given"] = "sampled",
    likelihood: Literal["categorical", "gaussian"] = "categorical", generator: torch.Generator | None = None,
) -> dict[str, Tensor]:  # fmt: skip
    """The diagonal Fisher information of the named tensors, in their shapes: see `Fisher`.

    Of outputs at several places (the tokens of a text) the log-probabilities are summed per example.
    """
    wanted = {n: tensors[n] for n in names}
    rest = {n: t for n, t in tensors.items() if n not in wanted}
    size = max(1, min(64, _ROOM // max(1, sum(t.numel() for t in wanted.values()))))
    total = {n: torch.zeros_like(t) for n, t in wanted.items()}
    for batch in data.batches(size):
        with torch.no_grad():
            outputs = network.outputs(tensors, batch)
        own = batch.own(outputs)
        for weight, target in _targets(batch, own, outputs.shape[-1], labels, likelihood, generator):
            for name, squares in _squares(network, wanted, rest, batch, weight, target, likelihood).items():
                total[name] += squares
    return {n: t / len(data) for n, t in total.items()}


def _targets(
    batch: MergeData, own: Tensor, count: int, labels: str, likelihood: str, generator: torch.Generator | None
) -> list[tuple[Tensor, Tensor]]:
    """What the outputs are compared with, and how much each comparison counts: pairs of (n,) and (n, …)."""
    ones = torch.ones(len(own))
    classes = own.shape[-1]
    if likelihood == "gaussian":
        # The gradient of log p is Jᵀ(y − f): given y − f directly.
        if labels == "given":
            if batch.y is None:
                raise MergeError("labels='given' needs labels: give the data as (x, y)")
            return [(ones, batch.y.to(own.dtype).reshape(own.shape) - own)]
        if labels == "sampled":
            return [(ones, torch.randn(own.shape, generator=generator))]
        if own.dim() > 2:
            raise MergeError("labels='expected' is for one output vector per example; take labels='sampled'")
        return [(ones, unit.expand(own.shape)) for unit in torch.eye(classes)]
    if labels == "given":
        return [(ones, batch.labels(count))]
    p = own.softmax(-1)
    if labels == "sampled":
        drawn = torch.multinomial(p.reshape(-1, classes), 1, generator=generator)
        return [(ones, drawn.reshape(own.shape[:-1]))]
    if own.dim() > 2:
        raise MergeError("labels='expected' is for one output vector per example; take labels='sampled'")
    return [(p[:, c], torch.full((len(own),), c)) for c in range(classes)]


def _squares(
    network: Network, wanted: Mapping[str, Tensor], rest: Mapping[str, Tensor], batch: MergeData, weight: Tensor,
    target: Tensor, likelihood: str,
) -> dict[str, Tensor]:  # fmt: skip
    """Σ over examples of weight · gradient²."""
    parts: dict[str, Tensor] = {}
    fixed: dict[str, object] = {}
    arguments = dict(enumerate(batch.args)) if not batch.kwargs else batch.kwargs
    for key, value in arguments.items():
        cut = isinstance(value, Tensor) and value.dim() > 0 and value.shape[0] == len(batch)
        (parts if cut else fixed)[str(key)] = value

    def score(params: Mapping[str, Tensor], example: Mapping[str, Tensor], goal: Tensor) -> Tensor:
        given = {**fixed, **{k: v[None] for k, v in example.items()}}
        x = given if batch.kwargs else tuple(given[str(i)] for i in range(len(batch.args)))
        own = network.own({**rest, **params}, MergeData(x, outputs=batch.outputs))[0]
        if likelihood == "gaussian":
            return (own * goal).sum()
        return own.log_softmax(-1).gather(-1, goal.unsqueeze(-1)).sum()

    gradient = torch.func.grad(score)
    try:
        with plain_kernels():  # fused attention cannot be batched over
            each = torch.func.vmap(gradient, in_dims=(None, 0, 0))(dict(wanted), parts, target)
        return {n: torch.einsum("n,n...->...", weight, g.square()) for n, g in each.items()}
    except RuntimeError:
        # Networks with operations that cannot be batched over: one example after the other gives the same.
        out = {n: torch.zeros_like(t) for n, t in wanted.items()}
        for i in range(len(batch)):
            one = gradient(dict(wanted), {k: v[i] for k, v in parts.items()}, target[i])
            for n, g in one.items():
                out[n] += weight[i] * g.square()
        return out
