"""A metanet that also hears what the networks answer: any other metanet, and ``weightspace.metanets.answers``."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from weightspace.errors import MetanetError
from weightspace.metanets.answers import ANSWERS, answers
from weightspace.metanets.base import Metanet, build_metanet
from weightspace.metanets.flat import TENSOR_STATISTICS, activation_features, tensor_statistics
from weightspace.metanets.questions import Asked, LearnedQuestions, asked
from weightspace.metanets.structure import ACTIVATIONS

if TYPE_CHECKING:
    from weightspace.graph import ParameterGraph

_FAR = 4.0
# Steps of the training on answers alone, its learning rate and weight decay.
_STEPS, _RATE, _DECAY = 600, 3e-3, 0.1
# Networks in each step; twice as many where there are more than so many.
_BATCH, _MANY = 32, 1000
# Learning rate of questions: they are images, and move less.
_ASKING = 1e-3


@dataclass(frozen=True, eq=False)
class Item:
    """A network as the inner metanet wants it, what is told of it (``Answering.told``), and what is asked."""

    inner: Any
    answers: Tensor
    asked: Asked | None


@dataclass(frozen=True, eq=False)
class Batch:
    """Several of them: the inner metanet's batch, ``answers (networks, told)``, and networks to be asked."""

    inner: Any
    answers: Tensor
    asked: Sequence[Asked | None]

    @property
    def size(self) -> int:
        return len(self.answers)

    def to(self, device: torch.device | str) -> Batch:
        asked = [a and a.to(device) for a in self.asked]
        return Batch(self.inner.to(device), self.answers.to(device), asked)


class Answering(Metanet):
    """A metanet that reads weights and hears answers: ``(networks, outputs)``.

    ``inner`` is the configuration of the metanet that reads the weights; its ``width`` outputs go into one read-out
    with as many features of the answers, which are standardised by what it was trained on. Networks have to have a
    program (see ``answers``). It keeps every symmetry that the inner metanet keeps.

    ``questions``: how many images are learned and put to networks that read images (``weightspace.metanets.questions``,
    after Kahana et al. 2025), beside the fixed ones; answers to them are told class by class, of at most ``classes``,
    so all networks should do one task.

    ``statistics``: the read-out is told the flat baselines' statistics of all tensors as well, and the activations
    (``weightspace.metanets.flat``). They tell populations apart that answers on noise do not. Rescaling changes them,
    whatever the inner metanet divides out: hand over networks at canonical points where that matters.

    A training begins with what is told alone, ``steps`` steps: seconds, with questions a few minutes; what reads the
    weights then learns what they leave. ``layers``: of what hears.
    """

    def __init__(
        self, outputs: int = 1, *, inner: Mapping[str, Any] | None = None, width: int = 64, dropout: float = 0.2,
        questions: int = 0, classes: int = 10, statistics: bool = False, layers: int = 1, steps: int = _STEPS,
    ) -> None:  # fmt: skip
        super().__init__()
        if min(outputs, width, classes, layers, steps) < 1 or questions < 0:
            raise MetanetError(
                "outputs, width, classes, layers and steps must be at least 1, and questions no fewer than 0"
            )
        self.inner = build_metanet({**(inner or {"kind": "operator"}), "outputs": width})
        self.config = {
            "kind": "answering", "outputs": outputs, "inner": self.inner.config, "width": width, "dropout": dropout,
            "questions": questions, "classes": classes, "statistics": statistics, "layers": layers, "steps": steps,
        }  # fmt: skip
        self.scale = bool(getattr(self.inner, "scale", False)) and not statistics
        self.statistics, self.steps = statistics, steps
        fixed = len(ANSWERS) + (len(TENSOR_STATISTICS) + len(ACTIVATIONS) if statistics else 0)
        self.standard = _Standard(fixed)
        self.questions = LearnedQuestions(questions, classes) if questions else None
        sizes = [fixed + (self.questions.features if self.questions is not None else 0), *[width] * layers]
        self.heard = nn.Sequential(
            *(part for a, b in pairwise(sizes) for part in (nn.Linear(a, b), nn.GELU(), nn.Dropout(dropout)))
        )
        self.width = width
        self.joined = nn.Linear(2 * width, width)
        self.head = nn.Sequential(nn.GELU(), nn.Dropout(dropout), nn.Linear(width, outputs))

    def begin(self, prepared: Callable[[], Sequence[Any]], loss: Callable[[Tensor, Tensor], Tensor]) -> None:
        items = prepared()
        heard = torch.stack([item.answers for item in items]).to(self.joined.weight)
        networks = [item.asked and item.asked.to(heard.device) for item in items]
        batch = _BATCH if len(heard) <= _MANY else 2 * _BATCH
        nothing = heard.new_zeros(batch, self.width)
        self.train()
        self.standard(heard)
        own = [p for part in (self.heard, self.joined, self.head) for p in part.parameters()]
        asking = [] if self.questions is None else list(self.questions.parameters())
        optimiser = torch.optim.AdamW([
            {"params": own, "lr": _RATE, "weight_decay": _DECAY}, {"params": asking, "lr": _ASKING, "weight_decay": 0.0}
        ])  # fmt: skip
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, self.steps)
        for _ in range(self.steps):
            rows = torch.randperm(len(heard))[:batch]
            features = self._heard(heard[rows], [networks[i] for i in rows.tolist()], learn=False)
            optimiser.zero_grad()
            loss(self.head(self.joined(torch.cat((features, nothing[: len(rows)]), dim=1))), rows).backward()
            nn.utils.clip_grad_norm_([*own, *asking], 1.0)
            optimiser.step()
            schedule.step()
        optimiser.zero_grad()
        with torch.no_grad():
            # What reads the weights has said nothing so far.
            self.joined.weight[:, self.width :] = 0

    def begun(self) -> list[nn.Parameter]:
        reading = {id(p) for p in self.inner.parameters()}
        return [p for p in self.parameters() if id(p) not in reading]

    def _heard(self, answers: Tensor, networks: Sequence[Asked | None], learn: bool = True) -> Tensor:
        """Features ``(networks, width)`` of the answers to fixed questions, and to learned ones."""
        told = self.standard(answers, learn=learn)
        if self.questions is not None:
            told = torch.cat((told, self.questions(networks).to(told)), dim=1)
        found: Tensor = self.heard(told)
        return found

    def around(self, inner: Any, graphs: Sequence[ParameterGraph]) -> Batch:
        """A batch of graphs that the inner metanet has one of already; without gradients, like ``batched``."""
        with torch.no_grad():
            told = torch.stack([self.told(graph) for graph in graphs])
            return Batch(inner, told, [asked(graph) if self.questions is not None else None for graph in graphs])

    def prepare(self, graph: ParameterGraph) -> Item:
        inner = self.inner.prepare(graph)
        return Item(inner, self.told(graph), asked(graph) if self.questions is not None else None)

    def told(self, graph: ParameterGraph) -> Tensor:
        """What is told of a network beside its weights: its answers, and statistics of its tensors where wanted."""
        found = answers(graph)
        if not self.statistics:
            return found
        flat = np.concatenate((tensor_statistics(graph), activation_features(graph)))
        return torch.cat((found, torch.from_numpy(flat).to(found)))

    @property
    def preparation(self) -> Hashable:
        return "answering", self.questions is not None, self.statistics, self.inner.preparation

    def collate(self, items: Sequence[Item]) -> Batch:
        inner = self.inner.collate([item.inner for item in items])
        return Batch(inner, torch.stack([item.answers for item in items]), [item.asked for item in items])

    def forward(self, batch: Batch) -> Tensor:
        read = self.inner(batch.inner)
        heard = self._heard(batch.answers.to(read.dtype), batch.asked)
        found: Tensor = self.head(self.joined(torch.cat((heard, read), dim=1)))
        return found

    @property
    def states(self) -> Any:
        """States of axis elements as the inner metanet has them; absent where it has none."""
        of_nodes = getattr(self.inner, "states", None)
        if of_nodes is None:
            raise AttributeError("states")
        return lambda batch: of_nodes(batch.inner)


class _Standard(nn.Module):
    """Features in units of their deviation from the mean over everything seen in training, kept within four."""

    count: Tensor
    mean: Tensor
    square: Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        self.register_buffer("count", torch.zeros(()))
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("square", torch.ones(width))

    def forward(self, x: Tensor, learn: bool = True) -> Tensor:
        if self.training and learn:
            with torch.no_grad():
                self.count += len(x)
                share = len(x) / self.count
                self.mean += share * (x.mean(0) - self.mean)
                self.square += share * (x.square().mean(0) - self.square)
        spread = (self.square - self.mean.square()).clamp_min(0).sqrt()
        return ((x - self.mean) / (spread + 1e-3)).clamp(-_FAR, _FAR)
