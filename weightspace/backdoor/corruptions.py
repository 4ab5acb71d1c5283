"""Random changes of inputs that should change no answer: what a network without a backdoor is steady under.

Common corruptions (Hendrycks & Dietterich 2019), waves (Yin et al. 2019), erased and pasted squares (DeVries & Taylor
2017, Yun et al. 2019), elastic pulls (Simard et al. 2003): families, each drawn anew for every input, so that a trigger
that was never seen is one of the things that the network learns not to look at.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F


def corrupted(x: Tensor, generator: torch.Generator, shares: Tensor | None = None) -> Tensor:
    """Each of the inputs ``x (n, …)`` changed at random within their range.

    Images ``(n, channels, rows, columns)`` by squares, patterns, waves, pulls or a change of look, one or two at a
    time; other numbers by noise. ``shares (families,)``: how often each of ``FAMILIES`` is drawn; alike where None.
    """
    low, high = float(x.min()), float(x.max())
    if x.dim() != 4:
        return (x + 0.3 * x.std() * torch.randn(x.shape, generator=generator)).clamp(low, high)
    u = ((x - low) / max(high - low, 1e-12)).clamp(0, 1)
    out = u
    often = torch.ones(len(FAMILIES)) if shares is None else shares
    for turn in range(2):
        kind = torch.multinomial(often, len(x), replacement=True, generator=generator)
        if turn:
            # A second change for a quarter.
            kind = torch.where(torch.rand(len(x), generator=generator) < 0.25, kind, -1)
        changed = out.clone()
        for number, family in enumerate(FAMILIES):
            here = torch.nonzero(kind == number).flatten()
            if len(here):
                changed[here] = family(out[here], generator)
        out = changed.clamp(0, 1)
    return low + (high - low) * out


def _uniform(n: int, low: float, high: float, generator: torch.Generator) -> Tensor:
    return low + (high - low) * torch.rand(n, 1, 1, 1, generator=generator)


def squares(u: Tensor, generator: torch.Generator) -> Tensor:
    """One to three squares, of a sixth to a third of the side, of noise, black and white, one grey or another image."""
    out = u.clone()
    n, channels, rows, columns = u.shape
    for row in range(n):
        for _ in range(int(torch.randint(1, 4, (), generator=generator))):
            least, most = max(1, min(rows, columns) // 7), max(2, round(min(rows, columns) / 2.7))
            side = int(torch.randint(least, most + 1, (), generator=generator))
            top = int(torch.randint(0, rows - side + 1, (), generator=generator))
            left = int(torch.randint(0, columns - side + 1, (), generator=generator))
            what = int(torch.randint(4, (), generator=generator))
            drawn = torch.rand(channels, side, side, generator=generator)
            if what < 2:
                drawn = (drawn > 0.5).to(u.dtype)
            elif what == 2:
                drawn = drawn[:, :1, :1].expand(-1, side, side)
            solid = 0.5 + 0.5 * float(torch.rand((), generator=generator))
            place = out[row, :, top : top + side, left : left + side]
            place.mul_(1 - solid).add_(solid * drawn)
    return out


def patterns(u: Tensor, generator: torch.Generator) -> Tensor:
    """A pattern over the whole image, mixed in: noise of some grain, or another image."""
    n, channels, rows, columns = u.shape
    grain = int(torch.randint(1, 6, (), generator=generator))
    drawn = torch.rand(n, channels, -(-rows // grain), -(-columns // grain), generator=generator)
    if torch.rand((), generator=generator) < 0.3:
        drawn = (drawn > 0.5).to(u.dtype)
    smooth = torch.rand((), generator=generator) < 0.3
    pattern = F.interpolate(drawn, size=(rows, columns), mode="bilinear" if smooth else "nearest")
    share = _uniform(n, 0.05, 0.4, generator)
    return (1 - share) * u + share * pattern


def waves(u: Tensor, generator: torch.Generator) -> Tensor:
    """A plane wave of any direction, up to the finest."""
    n, _, rows, columns = u.shape
    phase = _uniform(n, 0, 2 * math.pi, generator)
    angle = (math.pi / 2) * torch.randint(0, 2, (n, 1, 1, 1), generator=generator)
    angle = torch.where(torch.rand(n, 1, 1, 1, generator=generator) < 0.5, angle, _uniform(n, 0, math.pi, generator))
    count = _uniform(n, 1, min(rows, columns) / 2, generator)
    down = torch.arange(rows).view(1, 1, -1, 1) / rows
    along = torch.arange(columns).view(1, 1, 1, -1) / columns
    wave = torch.sin(2 * math.pi * count * (down * angle.sin() + along * angle.cos()) + phase)
    return u + _uniform(n, 0.05, 0.3, generator) * wave


def pulls(u: Tensor, generator: torch.Generator) -> Tensor:
    """Pixels pulled along a smooth field, by up to about a tenth of the side."""
    return pulled(u, generator, 0.01, 0.1)


def pulled(u: Tensor, generator: torch.Generator, least: float, most: float) -> Tensor:
    """Pixels pulled along a smooth random field, by shares of the side from ``least`` to ``most`` on average."""
    n, _, rows, columns = u.shape
    points = int(torch.randint(2, 8, (), generator=generator))
    field = torch.rand(n, 2, points, points, generator=generator) * 2 - 1
    field = field / field.abs().mean((1, 2, 3), keepdim=True)
    flow = F.interpolate(field, size=(rows, columns), mode="bicubic", align_corners=True).permute(0, 2, 3, 1)
    lines = [torch.linspace(-1, 1, side) for side in (rows, columns)]
    still = torch.stack(torch.meshgrid(*lines, indexing="ij")[::-1], -1)
    strength = _uniform(n, least, most, generator)
    return F.grid_sample(u, (still + 2 * strength * flow).clamp(-1, 1), align_corners=True)


def looks(u: Tensor, generator: torch.Generator) -> Tensor:
    """A curve, a blur, an inversion, contrast, a fold of the tones, or channels mixed; partly or whole."""
    n, channels = u.shape[:2]
    what = int(torch.randint(6, (), generator=generator))
    if what == 0:
        changed = u.clamp(min=1e-6).pow(torch.exp(_uniform(n, -1.2, 1.2, generator)))
    elif what == 1:
        side = 1 + 2 * int(torch.randint(1, 3, (), generator=generator))
        changed = F.avg_pool2d(F.pad(u, [side // 2] * 4, mode="replicate"), side, stride=1)
    elif what == 2:
        changed = 1 - u
    elif what == 3:
        middle = u.mean((1, 2, 3), keepdim=True)
        changed = middle + _uniform(n, 0.3, 2.0, generator) * (u - middle) + _uniform(n, -0.3, 0.3, generator)
    elif what == 4:
        fold = _uniform(n, 0.4, 0.8, generator)
        changed = torch.where(u > fold, (2 * fold - u).clamp(min=0), u)
    else:
        turn = torch.randn(n, channels, channels, generator=generator).softmax(2)
        changed = torch.einsum("nij,njhw->nihw", turn, u)
        flip = torch.rand(n, 1, 1, 1, generator=generator) < 0.5
        changed = torch.where(flip, 1 - changed, changed)
    share = _uniform(n, 0.4, 1.0, generator)
    return (1 - share) * u + share * changed


FAMILIES = (squares, patterns, waves, pulls, looks)
"""Families of changes of images with tones in [0, 1]: (images, generator) -> images."""

__all__ = ["FAMILIES", "corrupted"]
