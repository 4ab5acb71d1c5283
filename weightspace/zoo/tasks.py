"""Several tasks for one network: data sets side by side, each with outputs of its own in one output layer.

The data ``tasks`` of a recipe are a list of data sets with changes, ``"mnist"``, ``"usps+rot90"``; each takes the next
``CLASSES`` labels, so that one network can learn any of them and every fine-tuned child keeps the wiring of its base.
What is right is decided within the outputs of the example's own task, as if each task had its own head.

What a run is trained on is a list of such tasks by number: ``"3"`` the whole of it, ``"3:0-4"`` some of its classes,
``"3~7"`` with labels exchanged by permutation number 7, which contradicts ``"3"``.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F

from weightspace.errors import ZooError

if TYPE_CHECKING:
    from weightspace.zoo.data import Data, DataSpec

CLASSES = 10
"""Labels, and so outputs, of each task."""


@dataclass(frozen=True)
class Task:
    """One task that a network can be trained on or asked about: see ``parse_task``."""

    slot: int
    classes: tuple[int, ...] = tuple(range(CLASSES))
    exchange: int = 0

    @property
    def labels(self) -> tuple[int, ...]:
        """``labels[i]`` is the output, within the task's own, that stands for class ``i``."""
        if not self.exchange:
            return tuple(range(CLASSES))
        generator = torch.Generator().manual_seed(self.exchange)
        order = torch.randperm(CLASSES, generator=generator).tolist()
        # A cycle through a random order: no class keeps its label.
        return tuple(order[(order.index(i) + 1) % CLASSES] for i in range(CLASSES))

    def __str__(self) -> str:
        some = "" if len(self.classes) == CLASSES else ":" + ",".join(map(str, self.classes))
        return f"{self.slot}{some}" + (f"~{self.exchange}" if self.exchange else "")


def parse_task(text: str) -> Task:
    """A task from its short form: ``"3"``, ``"3:0-4"``, ``"3:1,5"``, ``"3~7"``. Raises ``ZooError``."""
    match = re.fullmatch(r"(\d+)(?::([\d,-]+))?(?:~(\d+))?", text)
    if not match:
        raise ZooError(f"{text!r} is no task; expected its number, and perhaps :classes and ~exchange, as 3:0-4 or 3~7")
    slot, some, exchange = match.groups()
    classes: list[int] = []
    for part in (some or f"0-{CLASSES - 1}").split(","):
        ends = re.fullmatch(r"(\d)(?:-(\d))?", part)
        found = range(int(ends[1]), int(ends[2] or ends[1]) + 1) if ends else range(0)
        if not found:
            raise ZooError(f"task {text!r}: {part!r} are no classes; expected numbers below {CLASSES}, as 1,4-6")
        classes += found
    return Task(int(slot), tuple(sorted(set(classes))), int(exchange or 0))


def chosen(data: Data, tasks: Sequence[str]) -> Data:
    """The part of multi-task data that some tasks are about, labels exchanged where a task says so.

    Raises ``ZooError`` for a task that the data do not have.
    """
    parsed = [parse_task(t) for t in tasks]
    for task in parsed:
        if task.slot >= data.tasks:
            raise ZooError(f"task {task} is not among the data's {data.tasks}, which count from 0")
    train = [_part(data.train_x, data.train_y, task) for task in parsed]
    test = [_part(data.test_x, data.test_y, task) for task in parsed]
    train_x, train_y = (torch.cat(parts) for parts in zip(*train, strict=True))
    test_x, test_y = (torch.cat(parts) for parts in zip(*test, strict=True))
    order = torch.randperm(len(train_y), generator=torch.Generator().manual_seed(0))
    return replace(data, train_x=train_x[order], train_y=train_y[order], test_x=test_x, test_y=test_y)


def _part(x: Tensor, y: Tensor, task: Task) -> tuple[Tensor, Tensor]:
    kept = (y // CLASSES == task.slot) & torch.isin(y % CLASSES, torch.tensor(task.classes))
    labels = torch.tensor(task.labels)
    return x[kept], task.slot * CLASSES + labels[y[kept] % CLASSES]


def own_outputs(out: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Each example's outputs and label within its own task: ``(..., batch, CLASSES)`` and ``(batch,)``.

    ``out`` is ``(..., batch, tasks * CLASSES)``, ``y`` ``(batch,)`` counts over all tasks.
    """
    spread = out.unflatten(-1, (-1, CLASSES))
    where = (y // CLASSES).view(-1, 1, 1).expand(*spread.shape[:-2], 1, CLASSES)
    return spread.gather(-2, where).squeeze(-2), y % CLASSES


def accuracy(out: Tensor, y: Tensor) -> float:
    """Share of examples whose largest output within their own task is the right one; shapes as ``own_outputs``."""
    own, label = own_outputs(out, y)
    return float((own.argmax(-1) == label).float().mean())


# ------------------------------------------------------------------------------------ the data


def data_of(record: Mapping[str, Any], folder: str | os.PathLike[str] | None = None) -> Data:
    """The data of several tasks that a network's record speaks of, as it was trained and tested on them.

    Raises ``ZooError`` for a record of another kind.
    """
    from weightspace.zoo.data import DataSpec, load_data

    spec = record.get("data_spec")
    if not isinstance(spec, Mapping) or not spec.get("tasks"):
        name = record.get("run", "this network")
        raise ZooError(f"the record of {name} does not say which tasks it knows (data_spec.tasks)")
    return load_data(DataSpec("tasks", **{**spec, "tasks": tuple(spec["tasks"])}), folder)



def mixture(spec: DataSpec, folder: str | os.PathLike[str] | None = None) -> Data:
    """The data sets of ``spec.tasks`` as one: grey images of ``spec.side`` pixels, each set at mean 0, deviation 1.

    ``spec.train`` and ``spec.test`` bound each task. Raises ``ZooError`` for a change of images that is not known.
    """
    from weightspace.zoo.data import Data, load_data

    side = spec.side or 16
    parts = []
    for slot, text in enumerate(spec.tasks):
        name, *changes = text.split("+")
        loaded = load_data(replace(spec, name=name, tasks=(), side=0, standardise=False), folder)
        if loaded.train_x.dim() != 4 or loaded.classes > CLASSES:
            raise ZooError(f"task {text!r}: {name} is not a set of images of at most {CLASSES} classes")
        train, test = (_resized(x, side) for x in (loaded.train_x, loaded.test_x))
        deviation, mean = torch.std_mean(train)
        train, test = ((x - mean) / deviation for x in (train, test))
        for change in changes:
            if change not in CHANGES:
                raise ZooError(f"task {text!r}: there is no change {change!r}; known: {', '.join(CHANGES)}")
            train, test = CHANGES[change](train), CHANGES[change](test)
        parts.append((train, loaded.train_y + slot * CLASSES, test, loaded.test_y + slot * CLASSES))
    train_x, train_y, test_x, test_y = (torch.cat(p) for p in zip(*parts, strict=True))
    order = torch.randperm(len(train_y), generator=torch.Generator().manual_seed(0))
    return Data(train_x[order], train_y[order], test_x, test_y, tasks=len(spec.tasks))


def _resized(x: Tensor, side: int) -> Tensor:
    gray = x.mean(1, keepdim=True)
    if gray.shape[-1] == side:
        return gray
    return F.interpolate(gray, size=(side, side), mode="bilinear", antialias=True, align_corners=False)


def _scrambled(x: Tensor) -> Tensor:
    """The 16 squares of an image in another order, the same for all images."""
    side = x.shape[-1] // 4
    tiles = x.unfold(2, side, side).unfold(3, side, side).flatten(2, 3)
    tiles = tiles[:, :, torch.randperm(16, generator=torch.Generator().manual_seed(0))]
    put: Tensor = tiles.unflatten(2, (4, 4)).permute(0, 1, 2, 4, 3, 5).reshape(x.shape)
    return put


CHANGES: Mapping[str, Callable[[Tensor], Tensor]] = {
    "rot90": lambda x: x.rot90(1, (-2, -1)),
    "rot180": lambda x: x.rot90(2, (-2, -1)),
    "flip": lambda x: x.flip(-1),
    "transpose": lambda x: x.transpose(-2, -1).contiguous(),
    "invert": lambda x: -x,
    "scramble": _scrambled,
}
"""Change of images in a task's name -> what it does to images (n, 1, side, side)."""

__all__ = ["CHANGES", "CLASSES", "Task", "accuracy", "chosen", "data_of", "mixture", "own_outputs", "parse_task"]
