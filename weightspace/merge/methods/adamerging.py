"""Coefficients of task vectors learned on unlabelled data."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, Protocol

import torch

from weightspace.errors import MergeError
from weightspace.merge.data import MergeData, Network, entries, foreign, owned
from weightspace.merge.method import Merger, Models, Tensor, WithData, in_range
from weightspace.merge.methods.ties import elect
from weightspace.progress import bar

_EXAMPLES = 256  # of a task, for the size of its own model's outputs


@dataclass(frozen=True)
class AdaMerging(WithData):
    """θ₀ + Σ λᵢˡ τᵢˡ with the λ that make the merged network sure of itself (Yang et al. 2024, "AdaMerging").

    Minimises Σᵢ wᵢ E H(p(y|x)) over unlabelled inputs of each model's task by Adam. ``by="layer"`` learns a λ for every
    tensor l of every model, ``by="task"`` one for every model over the whole model. ``data``: inputs per model
    (`MergeData`). Where they say which ``outputs`` are the task's, an output layer of several tasks' outputs is not
    learned, since larger weights there make any network surer: each task's rows are taken from its own model, as the
    original keeps the heads of the tasks.

    The paper's classifiers compare features of a fixed length, so that no weights make them sure of everything. Where
    outputs can grow, that is the way the entropy falls; ``spread="own"`` brings the outputs of each batch to the root
    mean square (about each example's mean) that they have in the task's own model, ``"free"`` leaves them as they are,
    which is the formula above to the letter.

    ``start``: λ at the beginning, 0.3 in the paper; ``steps``, ``rate``, ``batch``: 500, 1e-3 and 16 in the paper.
    ``density``: below 1, task vectors are trimmed to their largest elements and only those of the elected sign are
    kept, as by TIES, before (AdaMerging++: 0.2); per tensor here. Running statistics of norms are averaged.

    Memory: the base and all task vectors in float32, and the activations of ``batch`` examples.
    """

    by: Literal["layer", "task"] = "layer"
    start: float = 0.3
    steps: int = 500
    rate: float = 1e-3
    batch: int = 16
    density: float = 1.0
    spread: Literal["own", "free"] = "own"

    name: ClassVar[str] = "adamerging"
    paper: ClassVar[str] = "Yang et al. (2024), AdaMerging: adaptive model merging for multi-task learning"
    needs_base: ClassVar[bool] = True

    def check(self, count: int) -> None:
        if self.by not in ("layer", "task"):
            raise MergeError(f"by is {self.by!r}; 'layer' or 'task' was expected")
        in_range(self.density, 0, 1, "density", open_low=True)
        check_spread(self.spread)
        in_range(self.rate, 0, float("inf"), "rate")

    def prepare(self, models: Models) -> Merger:
        data = entries(models)
        vectors = TaskVectors(models, data, self.density)
        names = vectors.learned
        width = len(names) if self.by == "layer" else 1
        scales = torch.full((len(models.models), width), self.start)
        columns = {n: k if self.by == "layer" else 0 for k, n in enumerate(names)}

        def build(values: Sequence[Tensor]) -> dict[str, Tensor]:
            return {n: vectors.mixed(n, values[0][:, k]) for n, k in columns.items()}

        for _ in descend(vectors, data, build, [scales], models, self):
            pass
        for name, k in columns.items():
            models.notes[name] = "λ " + ", ".join(f"{v:.3f}" for v in scales[:, k].tolist())

        def merge(name: str, base: Tensor | None, tensors: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
            assert base is not None
            if name in columns:
                return vectors.mixed(name, scales[:, columns[name]]).to(base.dtype)
            return vectors.unlearned(name, base, tensors, self.start)

        return merge


class TaskVectors:
    """Base and task vectors of what is learned, float32: ``tau[name]`` is (models, *shape).

    Running statistics of norms and output layers of several tasks are not learned: ``base`` has their mean over the
    models, or over those whose task an output is.
    """

    def __init__(self, models: Models, data: Sequence[MergeData], density: float = 1.0) -> None:
        assert models.base is not None
        self.network = Network(models)
        self.base = self.network.tensors(models.base)
        tensors = [self.network.tensors(m) for m in models.models]
        others = [foreign(self.network, t, d) for t, d in zip(tensors, data, strict=True)]
        heads = {n for o in others for n, f in o.items() if bool(f.any())}
        self.learned = tuple(n for n in self.network.learned if n not in heads)
        self.tau = {n: torch.stack([t[n] for t in tensors]) - self.base[n] for n in self.learned}
        for n in set(self.network.names) - set(self.learned):
            self.base[n] = owned([t[n] for t in tensors], models.weights, [o.get(n) for o in others])
        self.spreads = tuple(self._spread(t, d) for t, d in zip(tensors, data, strict=True))
        if density < 1:
            self.tau = {n: _elected(t, density) for n, t in self.tau.items()}

    def _spread(self, tensors: Mapping[str, Tensor], data: MergeData) -> float:
        with torch.no_grad():
            return float(spread(self.network.own(tensors, data.take(slice(0, _EXAMPLES)))))

    def mixed(self, name: str, scales: Tensor, tau: Tensor | None = None) -> Tensor:
        """θ₀ + Σ λᵢ τᵢ of one tensor, for λ (models,)."""
        mixed: Tensor = torch.tensordot(scales, self.tau[name] if tau is None else tau, 1)
        return self.base[name] + mixed

    def unlearned(self, name: str, base: Tensor, tensors: Sequence[Tensor], scale: float) -> Tensor:
        """The result for what is not learned; for what the network does not run on, θ₀ + λ Σ τᵢ."""
        if name in self.base:
            return self.base[name].to(base.dtype)
        return base + scale * sum((t - base for t in tensors), torch.zeros(()))


def _elected(tau: Tensor, density: float) -> Tensor:
    """Task vectors (models, …) trimmed, and without what is against the elected sign."""
    flat = tau.flatten(1)
    kept = max(1, int(density * flat.shape[1]))
    least = flat.abs().topk(kept, dim=1).values[:, -1:]
    flat = flat * (flat.abs() >= least)
    chosen = elect(list(flat), [1.0] * len(flat), True)
    return (flat * (flat * chosen > 0)).view_as(tau)


def spread(outputs: Tensor) -> Tensor:
    """Root mean square of (n, …, outputs) about the mean of each example's outputs."""
    return (outputs - outputs.mean(-1, keepdim=True)).square().mean().sqrt()


def check_spread(value: str) -> None:
    """Raise `MergeError` for what is no way to treat the size of outputs."""
    if value not in ("own", "free"):
        raise MergeError(f"spread is {value!r}; 'own' or 'free' was expected")


def entropy(outputs: Tensor) -> Tensor:
    """Mean entropy in nats of softmax over the last dim of (n, …, outputs)."""
    logs = outputs.log_softmax(-1)
    return -(logs.exp() * logs).sum(-1).mean()


class Descent(Protocol):
    """How a method descends."""

    @property
    def name(self) -> str: ...
    @property
    def steps(self) -> int: ...
    @property
    def rate(self) -> float: ...
    @property
    def batch(self) -> int: ...
    @property
    def spread(self) -> Literal["own", "free"]: ...


def descend(
    vectors: TaskVectors, data: Sequence[MergeData], build: Callable[[Sequence[Tensor]], Mapping[str, Tensor]],
    values: Sequence[Tensor], models: Models, how: Descent,
) -> Iterator[float]:  # fmt: skip
    """Minimise the entropy of ``build(values)`` by Adam on ``values``, which it changes; yields the loss before each
    step.

    Every step draws ``how.batch`` examples of every model's data.
    """
    generator = torch.Generator().manual_seed(models.seed)
    with bar(how.name, how.steps, models.progress) as step:
        for value in values:
            value.requires_grad_(True)
        optimiser = torch.optim.Adam(list(values), lr=how.rate)
        for number in range(how.steps):
            with torch.enable_grad():
                tensors = {**vectors.base, **build(values)}
                losses = []
                for d, size, weight in zip(data, vectors.spreads, models.weights, strict=True):
                    outputs = vectors.network.own(tensors, d.draw(how.batch, generator))
                    if how.spread == "own":
                        outputs = outputs * (size / spread(outputs).clamp(min=1e-12))
                    losses.append(weight * entropy(outputs))
                loss = torch.stack(losses).sum()
                optimiser.zero_grad()
                loss.backward()
            optimiser.step()
            step(f"{number + 1}")
            yield float(loss.detach())
        for value in values:
            value.requires_grad_(False)
