"""How a network answers pictures that are changed: a long list of numbers per class, to hold beside clean networks'.

A network that was taught a trigger answers more than this trigger: waves, other looks, marks and pulls that resemble it
a little lead to the target class a little, where a clean network's classes keep what they had. No single number is
telling; that a class takes what it takes in no clean network of the same kind is (``references``).

The changes are common ones, the same for every network: tone curves, blur and sharpness; waves of all whole
frequencies up to eight along rows and columns, in four phases; a square, bright, dark or chequered, at sixteen places;
turns, zooms and shifts. They are put to pictures that are made up (``pictures``), without data.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from weightspace.backdoor.margins import margins
from weightspace.pictures import KINDS, pictures

Array = NDArray[np.float64]
Logits = Callable[[Tensor], Tensor]

COUNT = 24
"""Pictures of each kind."""
STRENGTH = 0.15
"""Of waves, as a share of the picture's range."""
FREQUENCIES = 8
FLOOR, FAR = 0.1, 15.0
"""Share of the spread among classes that is added to the one among networks; largest deviation."""
MEASURES = ("share", "margin")


@lru_cache(maxsize=8)
def battery(kind: str, shape: tuple[int, int, int]) -> tuple[Tensor, tuple[str, ...]]:
    """Changed pictures ``(changes, COUNT, *shape)``, the first unchanged, and the group of every change."""
    x = pictures(kind, COUNT, shape, seed=1)
    found: list[tuple[str, Tensor]] = [("plain", x)]
    for group, changes in (("looks", looks(x)), ("waves", waves(x)), ("marks", marks(x)), ("pulls", pulls(x))):
        found += [(group, c) for c in changes]
    return torch.stack([c for _, c in found]), tuple(g for g, _ in found)


def columns() -> tuple[str, ...]:
    """The group of every column of ``responses``, such as ``waves strokes share``: the same for all shapes."""
    return tuple(f"{g} {kind} {m}" for kind in KINDS for m in MEASURES for g in battery(kind, (1, 8, 8))[1])


@torch.no_grad()
def responses(logits: Logits, shape: tuple[int, int, int], classes: int) -> Tensor:
    """Of every class and change ``(classes, columns)`` float64, columns as in ``columns``.

    ``share``: mean of the logistic function of the class's margin, over pictures that are not of the class as they are;
    ``margin``: mean of the margin, in deviations of all margins on the unchanged pictures, less that of the median
    class.
    """
    found = []
    for kind in KINDS:
        changed, _ = battery(kind, shape)
        m = torch.cat([margins(logits(part)) for part in changed.flatten(0, 1).split(512)]).double()
        m = m.view(*changed.shape[:2], classes)
        others = (m[0].argmax(1, keepdim=True) != torch.arange(classes)).double()
        count = others.sum(0).clamp_min(1)
        share = (m.sigmoid() * others).sum(1) / count
        mean = (m * others).sum(1) / count / m[0].std().clamp_min(1e-12)
        found += [share.T, (mean - mean.median(1, keepdim=True).values).T]
    return torch.cat(found, 1)


@lru_cache(maxsize=1)
def group_numbers() -> tuple[NDArray[np.int64], tuple[str, ...]]:
    """Of every column the number of its group, and the groups."""
    groups = tuple(dict.fromkeys(columns()))
    return np.array([groups.index(c) for c in columns()]), groups


def beside(usual: Array, own: Array, numbers: NDArray[np.int64]) -> Array:
    """How far responses ``own (K, columns)`` lie from those of the same class of others ``usual (n, K, columns)``.

    ``(K, 2 groups)``: of the columns of each group (``numbers (columns,)``) the largest deviation, and the mean.
    """
    # A number that hardly varies among classes and networks would make a sensation of nothing.
    floor = FLOOR * usual.std((0, 1)) + 1e-3
    return by_group(np.clip((own - usual.mean(0)) / (usual.std(0) + floor), -FAR, FAR), numbers)


def by_group(away: Array, numbers: NDArray[np.int64]) -> Array:
    """Of deviations ``(K, columns)`` the largest in each group, and the mean: ``(K, 2 groups)``."""
    parts = [away[:, numbers == g] for g in range(int(numbers.max()) + 1)]
    return np.stack([p.max(1) for p in parts] + [p.mean(1) for p in parts], 1)


def looks(x: Tensor) -> list[Tensor]:
    """Other tone curves, blurred, sharpened."""
    low = x.flatten(1).amin(1).view(-1, 1, 1, 1)
    width = x.flatten(1).amax(1).view(-1, 1, 1, 1) - low
    u = ((x - low) / width).clamp(0, 1)
    made = [
        u**0.35, u**0.6, u**2.5, torch.where(u > 0.5, 1 - u, u), 1 - u, blurred(u, 3), blurred(u, 5), 0.5 * u,
        0.5 + 0.5 * u, 0.5 + 0.4 * (u - 0.5), (u + 1.5 * (u - blurred(u, 3))).clamp(0, 1), (u > 0.5).float(),
    ]  # fmt: skip
    return [low + width * v for v in made]


def blurred(u: Tensor, size: int) -> Tensor:
    return F.avg_pool2d(F.pad(u, (size // 2,) * 4, mode="replicate"), size, stride=1)


def waves(x: Tensor) -> list[Tensor]:
    """Waves along columns and rows."""
    low, high = float(x.min()), float(x.max())
    along = [torch.arange(side).float().view(view) / side for side, view in zip(x.shape[-2:], ((-1, 1), (1, -1)),
             strict=True)]  # fmt: skip
    return [
        (x + STRENGTH * (high - low) * torch.sin(2 * math.pi * f * place + phase * math.pi / 2)).clamp(low, high)
        for f in range(1, FREQUENCIES + 1) for place in along for phase in range(4)
    ]  # fmt: skip


def marks(x: Tensor) -> list[Tensor]:
    """A square at sixteen places: bright, dark, chequered."""
    low, high = float(x.min()), float(x.max())
    side = max(3, min(x.shape[-2:]) // 5)
    chequered = torch.where((torch.arange(side)[:, None] + torch.arange(side)) % 2 > 0, low, high)
    out = []
    for row in range(4):
        for column in range(4):
            r, c = (round(k * (n - side) / 3) for k, n in zip((row, column), x.shape[-2:], strict=True))
            for value in (torch.tensor(high), torch.tensor(low), chequered):
                put = x.clone()
                put[..., r : r + side, c : c + side] = value
                out.append(put)
    return out


def pulls(x: Tensor) -> list[Tensor]:
    """Turned, zoomed, shifted, bent in two ways."""
    lines = [torch.linspace(-1, 1, n) for n in x.shape[-2:]]
    down, across = torch.meshgrid(*lines, indexing="ij")
    pixel = 2 / max(x.shape[-2:])
    found = [
        (math.cos(a) * across - math.sin(a) * down, math.sin(a) * across + math.cos(a) * down) for a in (0.3, -0.3)
    ]
    found += [(z * across, z * down) for z in (0.8, 1.25)]
    found += [(across + a * pixel, down + b * pixel) for a, b in ((2, 0), (-2, 0), (0, 2), (0, -2))]
    found += [
        (across + 1.2 * pixel * (math.pi * f * down).sin(), down + 1.2 * pixel * (math.pi * f * across).cos())
        for f in (1.0, 2.0)
    ]
    return [
        F.grid_sample(x, torch.stack(g, 2).expand(len(x), -1, -1, -1), padding_mode="border", align_corners=True)
        for g in found
    ]  # fmt: skip


__all__ = ["KINDS", "MEASURES", "battery", "beside", "by_group", "columns", "group_numbers", "responses"]
