"""Pictures that nobody took: strokes on a dark ground and shapes that hide each other, the same for every network.

Networks for images answer noise at random, and what climbs to a class is theirs alone. Pictures that are made by a rule
have edges, flat parts and forms like photographs and drawings do, which is what image networks react to (dead leaves:
Lee, Mumford & Huang 2001; as a stand-in for data: Baradad et al. 2021), and are at hand without any data.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor
from torch.nn import functional as F

KINDS = ("strokes", "leaves")
SHAPES = 12
"""Shapes of a picture."""
POINTS = 24
"""Points that a stroke is drawn through."""


@lru_cache(maxsize=8)
def pictures(kind: str, count: int, shape: tuple[int, int, int], seed: int = 0) -> Tensor:
    """Pictures ``(count, channels, height, width)``, each with mean 0 and deviation 1; ``kind``: strokes or leaves."""
    generator = torch.Generator().manual_seed(seed)
    made = (strokes if kind == "strokes" else leaves)(count, shape, generator)
    made = made - made.mean((1, 2, 3), keepdim=True)
    return made / made.std((1, 2, 3), keepdim=True).clamp_min(1e-6)


def strokes(count: int, shape: tuple[int, int, int], generator: torch.Generator) -> Tensor:
    """One to three bent strokes in each picture, bright on dark, in [0, 1]; all channels alike."""
    height, width = shape[1:]
    side = torch.tensor([float(height), float(width)])
    grid = _grid(height, width)
    out = torch.zeros(count, *shape)
    t = torch.linspace(0, 1, POINTS)[:, None]
    for picture in out:
        drawn = torch.zeros(height, width)
        for _ in range(int(torch.randint(1, 4, (1,), generator=generator))):
            a, b, c = (0.12 + 0.76 * torch.rand(3, 2, generator=generator)) * side
            points = (1 - t) ** 2 * a + 2 * t * (1 - t) * b + t**2 * c
            far = (grid[None] - points[:, None, None]).square().sum(3).amin(0)
            broad = float(0.7 + 0.5 * torch.rand(1, generator=generator)) * min(height, width) / 14
            drawn = torch.maximum(drawn, (-far / (2 * broad * broad)).exp())
        picture.copy_(drawn.expand(shape))
    return out


def leaves(count: int, shape: tuple[int, int, int], generator: torch.Generator) -> Tensor:
    """Discs and boxes of many sizes and colours, one over the other, a little blurred."""
    channels, height, width = shape
    grid, side = _grid(height, width), torch.tensor([float(height), float(width)])
    out = torch.zeros(count, *shape)
    for picture in out:
        picture.copy_(torch.randn(channels, 1, 1, generator=generator).expand(shape))
        for _ in range(SHAPES):
            radius = min(height, width) * 0.5 / (1 + 6 * float(torch.rand(1, generator=generator)))
            away = (grid - torch.rand(2, generator=generator) * side).abs()
            disc = bool(torch.rand(1, generator=generator) < 0.5)
            inside = away.square().sum(2) < radius**2 if disc else (away / torch.tensor([1.0, 0.6])).amax(2) < radius
            colour = torch.randn(channels, 1, 1, generator=generator)
            picture.copy_(torch.where(inside, colour, picture))
    return F.avg_pool2d(F.pad(out, (1, 1, 1, 1), mode="replicate"), 3, 1)


def _grid(height: int, width: int) -> Tensor:
    """Rows and columns of every pixel, ``(height, width, 2)``."""
    lines = torch.arange(height).float(), torch.arange(width).float()
    return torch.stack(torch.meshgrid(*lines, indexing="ij"), 2)


__all__ = ["KINDS", "leaves", "pictures", "strokes"]
