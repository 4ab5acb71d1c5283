"""Learned questions: inputs that a detector puts to a network, and what it reads in the answers.

Meta neural trojan analysis (Xu et al. 2021) tunes a handful of inputs so that the answers of a network to them tell
poisoned from clean ones. Here the inputs are ``weightspace.metanets.questions.LearnedImages``. The answers are read
class by class, each relative to the others of the same network and by one function for all, so no class is known by its
number. A network that takes no images is asked nothing.
"""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from weightspace.backdoor.detector import loss
from weightspace.backdoor.outputs import ClassAxis
from weightspace.errors import MetanetError
from weightspace.metanets.questions import SIDE, LearnedImages, image_shape, together

if TYPE_CHECKING:
    from weightspace.wiring.wiring import Wiring

CONFIG: dict[str, Any] = {"questions": 24, "latent": 32, "hidden": 32, "dropout": 0.2}
_TOGETHER = 8


@dataclass(frozen=True, eq=False)
class Asked:
    """A network that can be run: its wiring, all tensors that the program takes, and its classes."""

    wiring: Wiring
    tensors: Mapping[str, Tensor]
    axis: ClassAxis

    @property
    def shape(self) -> tuple[int, int, int] | None:
        """Channels, height and width of its images; None where it takes something else."""
        return image_shape(self.wiring.program)


class Questions(LearnedImages):
    """Answers of networks to learned images, to logits of clean, each class, all-to-all (see ``detector``)."""

    def __init__(self, **config: Any) -> None:
        own = {**CONFIG, **config}
        count, hidden = int(own["questions"]), int(own["hidden"])
        super().__init__(count, int(own["latent"]))
        self.config = own
        drop = float(self.config["dropout"])
        self.inner = nn.Sequential(nn.Dropout(drop), nn.Linear(2 * count, hidden), nn.GELU(), nn.Dropout(drop))
        self.score = nn.Sequential(nn.Linear(3 * hidden, hidden), nn.GELU(), nn.Linear(hidden, 1))
        self.whole = nn.Sequential(nn.Linear(2 * hidden, hidden), nn.GELU(), nn.Linear(hidden, 2))

    def forward(self, networks: Sequence[Asked]) -> Tensor:
        """Logits ``(networks, 1 + K + 1)`` of networks that share one wiring."""
        return self.read(answers(networks, self.images(networks[0].shape or (1, SIDE, SIDE))))

    def read(self, z: Tensor) -> Tensor:
        """The same from answers ``(networks, questions, K)``."""
        z = z.float()
        z = z - z.mean(2, keepdim=True)
        z = z / z.flatten(1).std(1).view(-1, 1, 1).clamp_min(1e-6)
        each = self.inner(torch.cat((z, 3 * z.softmax(2)), dim=1).transpose(1, 2))
        mean, top = each.mean(1), each.amax(1)
        beside = [x.unsqueeze(1).expand_as(each) for x in (mean, top)]
        both = self.whole(torch.cat((mean, top), dim=1))
        classes = self.score(torch.cat((each, *beside), dim=2))[..., 0] + both[:, :1] - math.log(z.shape[2])
        return torch.cat((torch.zeros_like(both[:, :1]), classes, both[:, 1:] - 2.0), dim=1)


def answers(networks: Sequence[Asked], images: Tensor) -> Tensor:
    """Logits of networks on one wiring for the same images, ``(networks, images, K)``."""
    first = networks[0]
    program = first.wiring.program
    assert program is not None, "networks that are asked can be run"
    return together(lambda t: first.axis.logits(program.run(t, images)), [x.tensors for x in networks])


def read(nets: Sequence[Questions], networks: Sequence[Asked]) -> tuple[Tensor, list[Tensor]]:
    """Log odds of a backdoor ``(networks,)`` and of each class being the target ``(K,)``; means over ``nets``.

    0 of networks that are asked nothing.
    """
    odds = torch.zeros(len(networks), dtype=torch.float64)
    classes = [torch.zeros(x.axis.classes, dtype=torch.float64) for x in networks]
    for net in nets:
        net.eval()
        with torch.no_grad():
            for part in _alike(networks):
                for i, row in zip(part, net([networks[i] for i in part]), strict=True):
                    odds[i] += torch.logsumexp(row[1:], 0).double() / len(nets)
                    classes[i] += row[1:-1].double() / len(nets)
    return odds, classes


def train(
    networks: Sequence[Asked], right: Sequence[Sequence[int]], weights: Sequence[float], *, epochs: int = 25,
    rate: float = 3e-3, seed: int = 0, config: dict[str, Any] | None = None,
) -> Questions:  # fmt: skip
    """Questions and how to read the answers, of networks with their right answers (see ``detector.answer``).

    The same arguments give the same. Raises ``MetanetError`` where the training diverges.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = Questions(**(config or {}))
        asking = {id(p) for part in (net.coarse, net.finer) for p in part.parameters()} | {id(net.codes)}
        groups = [
            {"params": [p for p in net.parameters() if id(p) in asking], "weight_decay": 0.0},
            {"params": [p for p in net.parameters() if id(p) not in asking], "weight_decay": 0.05},
        ]
        optimiser = torch.optim.AdamW(groups, lr=rate)
        draw = random.Random(seed)
        for epoch in range(epochs):
            for group in optimiser.param_groups:
                group["lr"] = rate * 0.5 * (1 + math.cos(math.pi * epoch / epochs))
            parts = _alike(networks, draw)
            # Several groups to a step: one alone is all of one architecture.
            for start in range(0, len(parts), 3):
                chosen = [i for part in parts[start : start + 3] for i in part]
                rows = [row for part in parts[start : start + 3] for row in net([networks[i] for i in part])]
                share = torch.tensor([weights[i] for i in chosen], dtype=torch.float32)
                lost = loss(rows, [right[i] for i in chosen], share)
                if not bool(torch.isfinite(lost)):
                    raise MetanetError("the training of the questions diverged; lower its rate")
                optimiser.zero_grad()
                lost.backward()
                torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
                optimiser.step()
    return net.eval()


def _alike(networks: Sequence[Asked], draw: random.Random | None = None) -> list[list[int]]:
    """Numbers of networks that can be run together; dealt anew where ``draw`` is given. Those asked nothing are out."""
    order = [i for i, x in enumerate(networks) if x.shape is not None]
    if draw is not None:
        draw.shuffle(order)
    parts: dict[int, list[int]] = {}
    for i in order:
        parts.setdefault(id(networks[i].wiring), []).append(i)
    found = [part[k : k + _TOGETHER] for part in parts.values() for k in range(0, len(part), _TOGETHER)]
    if draw is not None:
        draw.shuffle(found)
    return found


__all__ = ["CONFIG", "Asked", "Questions", "answers", "read", "train"]
