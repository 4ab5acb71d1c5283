"""The detector metanet: which class of a network is a backdoor's target, or that it has none.

The operator metanet gives every axis element a state, so the classes have one each. A read-out shared by all of them
turns these into one score per class, relative to the other classes of the same network; the state of the whole graph
adds how suspect the network is, and whether every class leads to the next one (all-to-all). Together they are one
distribution over

    clean, class 0 is the target, …, class K - 1 is the target, all-to-all.

A network of ten classes is no more suspect a priori than one of two: a class counts 1 / K.

What a metanet must not see is taken from it here: which class is the first, which pixel and which token is which. All
features that say the place of a pinned element are 0, so the answer follows every permutation of the classes, and no
permutation of pixels of a perceptron or tokens of a vocabulary moves it. Where a weight lies in a kernel stays known.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from weightspace.errors import MetanetError
from weightspace.graph import ParameterGraph
from weightspace.metanets.batch import Batch, Item
from weightspace.metanets.operator import OperatorMetanet
from weightspace.metanets.readout import cell_mean
from weightspace.metanets.structure import ACTIVATIONS

CONFIG: dict[str, Any] = {"width": 12, "rounds": 2, "hidden": 24, "probes": 0, "embedding": 24, "dropout": 0.1}
"""Of the detector that is shipped: small, since there are few networks to learn from."""

_OWN = 3 + len(ACTIVATIONS)  # features of a node that say no place
_BATCH = 24


@dataclass(frozen=True)
class Example:
    """A network as the detector reads it: prepared, with the name of the cell of its classes."""

    item: Item
    cell: str

    @property
    def classes(self) -> int:
        return next(c.size for c in self.item.structure.cells if c.name == self.cell)


class DetectorNet(nn.Module):
    """``(networks)`` to logits of clean, each class, all-to-all; see the module's head. Options as ``CONFIG``."""

    def __init__(self, **config: Any) -> None:
        super().__init__()
        self.config = {**CONFIG, **config}
        self.body = OperatorMetanet(1, **self.config)
        width, embedding = self.body.state_width, int(self.config["embedding"])
        self.inner = nn.Sequential(nn.Linear(4 * width, 2 * width), nn.GELU(), nn.Dropout(self.config["dropout"]))
        self.score = nn.Linear(2 * width, 1)
        self.whole = nn.Sequential(
            nn.GELU(), nn.Dropout(self.config["dropout"]), nn.Linear(embedding + 4 * width, 32), nn.GELU(),
            nn.Linear(32, 2),
        )  # fmt: skip

    def example(self, graph: ParameterGraph, cell: str) -> Example:
        """A network whose classes are the elements of ``cell``. Raises ``MetanetError`` where there is no such cell."""
        item = self.body.prepare(graph)
        if cell not in {c.name for c in item.structure.cells}:
            raise MetanetError(f"the graph has no cell {cell!r} of classes; it has {[*graph.cells][:6]}")
        return Example(item, cell)

    def forward(self, examples: Sequence[Example]) -> list[Tensor]:
        """Of each network the logits ``(1 + K + 1,)`` of clean (always 0), its classes, all-to-all."""
        batch = without_places(self.body.collate([e.item for e in examples]))
        states = self.body.states(batch)
        whole = self.body.readout(states, batch)
        rows, owner = [], []
        for number, (example, start) in enumerate(zip(examples, batch.starts, strict=False)):
            cell = next(c for c in example.item.structure.cells if c.name == example.cell)
            rows.append(torch.arange(cell.start, cell.start + cell.size) + start)
            owner.append(torch.full((cell.size,), number))
        of = torch.cat(owner).to(states.device)
        own = states[torch.cat(rows).to(states.device)]
        mean = cell_mean(own, of, len(examples))
        spread = (cell_mean(own.square(), of, len(examples)) - mean.square()).clamp_min(0) + 1e-6
        far = (own - mean[of]) / spread.sqrt()[of]
        top = _extreme(far, of, len(examples))
        each = self.score(self.inner(torch.cat((own, far, mean[of], spread.sqrt()[of]), dim=1))).flatten()
        both = self.whole(torch.cat((whole, mean, spread.sqrt(), top, _extreme(-far, of, len(examples))), dim=1))
        counts = torch.bincount(of, minlength=len(examples)).to(each.dtype)
        each = each + (both[:, 0] - counts.log())[of]
        found = []
        for number, part in enumerate(each.split([len(r) for r in rows])):
            found.append(torch.cat((part.new_zeros(1), part, both[number, 1:] - 2.0)))
        return found


def without_places(batch: Batch) -> Batch:
    """The batch without what says which of the pinned elements of a cell a node is."""
    nodes = batch.nodes.clone()
    nodes[:, _OWN:] = 0
    return replace(batch, nodes=nodes)


def loss(logits: Sequence[Tensor], answers: Sequence[Sequence[int]], weights: Tensor | None = None) -> Tensor:
    """Mean of -log P(any of the right answers); ``answers``: numbers in the logits, ``weights (networks,)``."""
    each = torch.stack([
        torch.logsumexp(row, 0) - torch.logsumexp(row[list(right)], 0)
        for row, right in zip(logits, answers, strict=True)
    ])  # fmt: skip
    return each.mean() if weights is None else (each * weights).sum() / weights.sum()


def answer(attack: str, targets: Sequence[int], classes: int) -> tuple[int, ...]:
    """The right answers of a network: numbers in its logits."""
    if not attack:
        return (0,)
    return (1 + classes,) if attack == "all-to-all" else tuple(1 + t for t in targets)


def read(nets: Sequence[DetectorNet], examples: Sequence[Example]) -> tuple[Tensor, list[Tensor]]:
    """Log odds of a backdoor ``(networks,)`` and of each class being the target ``(K,)``; means over ``nets``."""
    odds = torch.zeros(len(examples), dtype=torch.float64)
    classes: list[Tensor] = [torch.zeros(e.classes, dtype=torch.float64) for e in examples]
    for net in nets:
        net.eval()
        with torch.no_grad():
            for start in range(0, len(examples), _BATCH):
                for number, row in enumerate(net(examples[start : start + _BATCH]), start):
                    odds[number] += torch.logsumexp(row[1:], 0).double() / len(nets)
                    classes[number] += row[1:-1].double() / len(nets)
    return odds, classes


def train(
    examples: Sequence[Example], answers: Sequence[Sequence[int]], weights: Sequence[float] | None = None, *,
    epochs: int = 25, rate: float = 4e-3, seed: int = 0, config: dict[str, Any] | None = None,
) -> DetectorNet:  # fmt: skip
    """A detector of networks and their right answers (see ``answer``), by AdamW with warm-up and cosine decay.

    ``weights``: how much each network counts. The same arguments give the same detector.
    Raises ``MetanetError`` where the training diverges.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = DetectorNet(**(config or {}))
        share = torch.ones(len(examples)) if weights is None else torch.tensor(weights, dtype=torch.float32)
        optimiser = torch.optim.AdamW(net.parameters(), lr=rate, weight_decay=0.05)
        draw = torch.Generator().manual_seed(seed)
        batches = _batches(examples)
        steps, done = epochs * len(batches), 0
        net.train()
        for _ in range(epochs):
            batches = _batches(examples, draw)
            for number in torch.randperm(len(batches), generator=draw).tolist():
                chosen = batches[number]
                at = done / steps
                for group in optimiser.param_groups:
                    group["lr"] = rate * min(1.0, 10 * at + 0.02) * 0.5 * (1 + torch.cos(torch.tensor(torch.pi * at)))
                lost = loss(net([examples[i] for i in chosen]), [answers[i] for i in chosen], share[chosen])
                if not bool(torch.isfinite(lost)):
                    raise MetanetError("the training of the detector diverged; lower its rate")
                optimiser.zero_grad()
                lost.backward()
                torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
                optimiser.step()
                done += 1
    return net.eval()


def _batches(examples: Sequence[Example], draw: torch.Generator | None = None) -> list[list[int]]:
    """Networks of one structure together, whose blocks are stacked; dealt anew where ``draw`` is given."""
    alike: dict[int, list[int]] = {}
    order = range(len(examples)) if draw is None else torch.randperm(len(examples), generator=draw).tolist()
    for i in order:
        alike.setdefault(id(examples[i].item.structure), []).append(i)
    return [part[k : k + _BATCH] for part in alike.values() for k in range(0, len(part), _BATCH)]


def _extreme(x: Tensor, of: Tensor, networks: int) -> Tensor:
    start = x.new_full((networks, x.shape[1]), -torch.inf)
    return start.scatter_reduce(0, of.unsqueeze(1).expand_as(x), x, "amax")


__all__ = ["CONFIG", "DetectorNet", "Example", "answer", "loss", "read", "train", "without_places"]
