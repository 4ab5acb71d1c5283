"""A metanet that also hears what the networks answer: any other metanet, and ``weightspace.metanets.answers``."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from weightspace.errors import MetanetError
from weightspace.metanets.answers import ANSWERS, answers
from weightspace.metanets.base import Metanet, build_metanet

if TYPE_CHECKING:
    from weightspace.graph import ParameterGraph

_FAR = 4.0
# Steps of the training on answers alone, networks in each, its learning rate and weight decay.
_STEPS, _BATCH, _RATE, _DECAY = 600, 32, 3e-3, 0.1


@dataclass(frozen=True, eq=False)
class Item:
    """A network as the inner metanet wants it, and its answers ``(ANSWERS,)``."""

    inner: Any
    answers: Tensor


@dataclass(frozen=True, eq=False)
class Batch:
    """Several of them: the inner metanet's batch, and ``answers (networks, ANSWERS)``."""

    inner: Any
    answers: Tensor

    @property
    def size(self) -> int:
        return len(self.answers)

    def to(self, device: torch.device | str) -> Batch:
        return Batch(self.inner.to(device), self.answers.to(device))


class Answering(Metanet):
    """A metanet that reads weights and hears answers: ``(networks, outputs)``.

    ``inner`` is the configuration of the metanet that reads the weights; its ``width`` outputs go into one read-out
    with as many features of the answers, which are standardised by what it was trained on. Networks have to have a
    program (see ``answers``). It keeps every symmetry that the inner metanet keeps.

    A training begins with the answers alone, which takes seconds; what reads the weights then learns what they leave.
    """

    def __init__(
        self, outputs: int = 1, *, inner: Mapping[str, Any] | None = None, width: int = 64, dropout: float = 0.2
    ) -> None:
        super().__init__()
        if min(outputs, width) < 1:
            raise MetanetError("outputs and width must be at least 1")
        self.inner = build_metanet({**(inner or {"kind": "operator"}), "outputs": width})
        self.config = {
            "kind": "answering", "outputs": outputs, "inner": self.inner.config, "width": width, "dropout": dropout,
        }  # fmt: skip
        self.scale = bool(getattr(self.inner, "scale", False))
        self.standard = _Standard(len(ANSWERS))
        self.heard = nn.Sequential(nn.Linear(len(ANSWERS), width), nn.GELU(), nn.Dropout(dropout))
        self.width = width
        self.joined = nn.Linear(2 * width, width)
        self.head = nn.Sequential(nn.GELU(), nn.Dropout(dropout), nn.Linear(width, outputs))

    def begin(self, prepared: Callable[[], Sequence[Any]], loss: Callable[[Tensor, Tensor], Tensor]) -> None:
        heard = torch.stack([item.answers for item in prepared()]).to(self.joined.weight)
        nothing = heard.new_zeros(_BATCH, self.width)
        self.train()
        self.standard(heard)
        own = [p for part in (self.heard, self.joined, self.head) for p in part.parameters()]
        optimiser = torch.optim.AdamW(own, lr=_RATE, weight_decay=_DECAY)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, _STEPS)
        for _ in range(_STEPS):
            rows = torch.randperm(len(heard))[:_BATCH]
            features = self.heard(self.standard(heard[rows], learn=False))
            optimiser.zero_grad()
            loss(self.head(self.joined(torch.cat((features, nothing[: len(rows)]), dim=1))), rows).backward()
            nn.utils.clip_grad_norm_(own, 1.0)
            optimiser.step()
            schedule.step()
        optimiser.zero_grad()
        with torch.no_grad():
            # What reads the weights has said nothing so far.
            self.joined.weight[:, self.width :] = 0

    def prepare(self, graph: ParameterGraph) -> Item:
        return Item(self.inner.prepare(graph), answers(graph))

    @property
    def preparation(self) -> Hashable:
        return "answering", self.inner.preparation

    def collate(self, items: Sequence[Item]) -> Batch:
        inner = self.inner.collate([item.inner for item in items])
        return Batch(inner, torch.stack([item.answers for item in items]))

    def forward(self, batch: Batch) -> Tensor:
        read = self.inner(batch.inner)
        heard = self.heard(self.standard(batch.answers.to(read.dtype)))
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
