"""Which networks can be asked made-up pictures (``weightspace.pictures``), and those that a network is surest of."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from weightspace.backdoor.margins import patch_side
from weightspace.pictures import KINDS, pictures
from weightspace.wiring.wiring import Wiring

LARGEST = 1e8
"""Parameters times pixels from which on asking pictures would take too long."""
DRAWN, EACH = 3000, 200
"""Pictures of each kind that ``shown`` chooses from, and how many it chooses of each class."""
ENTRIES = 2**24
"""Numbers that the pictures of a kind may hold, 64 MiB, but for ``EACH`` of them."""
LOUDEST = 3.0
"""Largest tone of a picture that is shown, in deviations; those of images that are standardised end about there."""


def picture_shape(wiring: Wiring, tensors: Mapping[str, Tensor]) -> tuple[int, int, int] | None:
    """``(channels, height, width)`` of the images that a network reads; None where it reads none or is too large."""
    example = wiring.program.args[0] if wiring.program is not None and wiring.program.args else None
    if not isinstance(example, Tensor) or not example.is_floating_point() or not patch_side(tuple(example.shape[1:])):
        return None
    channels, height, width = (int(n) for n in example.shape[1:])
    numbers = sum(t.numel() for t in tensors.values() if t.is_floating_point())
    return None if numbers * height * width > LARGEST else (channels, height, width)


def shown(logits: Callable[[Tensor], Tensor], shape: tuple[int, int, int], classes: int, seed: int = 0) -> Tensor:
    """Pictures ``(n, *shape)`` of both kinds that a network, ``logits``, is surest of, alike many of every class.

    Of each class ``EACH``, fewer where there are many classes; of one that it sees in fewer, these over and over; none
    of a class that it sees in none. Out of ``2 * DRAWN``, fewer where they are large, with no tone beyond ``LOUDEST``.
    """
    count = max(EACH, min(DRAWN, ENTRIES // math.prod(shape)))
    x = torch.cat([pictures(kind, count, shape, seed) for kind in KINDS])
    x = x / (x.abs().amax((1, 2, 3), keepdim=True) / LOUDEST).clamp_min(1)
    with torch.no_grad():
        sure, said = torch.cat([logits(part).softmax(1) for part in x.split(500)]).max(1)
    each = max(1, min(EACH, 2 * count // classes))
    chosen = []
    for k in range(classes):
        of = torch.nonzero(said == k).flatten()
        of = of[sure[of].argsort(descending=True)[:each]]
        chosen += [of[torch.arange(each) % len(of)]] if len(of) else []
    return x[torch.cat(chosen)]


__all__ = ["picture_shape", "shown"]
