"""What a network computes, as a point: how alike it finds the same inputs, without data and without training.

A network is run, by the program that its wiring was proved with, on ``QUESTIONS`` made-up inputs of each kind: for
images (also where it reads as many numbers in a row) pictures of strokes and of dead leaves (``weightspace.pictures``),
drawn once and resized to what it reads, for anything else noise. For all pairs of inputs it is noted how alike their
answers are, as logits and as probabilities: the centred Gram matrices, each of length 1, by which linear CKA compares
networks (Kornblith et al. 2019, "Similarity of Neural Network Representations Revisited"; of outputs rather than of
inner states, and so a *functional* measure in the words of Klabunde et al. 2023, "Similarity of Neural Network
Models"). A fixed random projection keeps distances to a few per cent (Johnson & Lindenstrauss 1984) and exact copies
at 0.

Nothing that leaves the function as it is moves the point: permutations, rescalings, signs, folded batch norms, another
format; neither does another order of the classes. Networks that were asked different things do not compare.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from weightspace.errors import WiringError
from weightspace.pictures import KINDS, pictures
from weightspace.wiring.asking import ask, complete, told
from weightspace.wiring.program import Program
from weightspace.wiring.wiring import Wiring

VERSION = 1
LENGTH = 512
"""Length of the vectors."""
QUESTIONS = 64
"""Inputs of each kind."""
PARAMETERS, OPERATIONS = 30_000_000, 2e11
"""A network with more parameters, or with more multiplications and additions to answer everything, is not asked."""
IMAGES = "images"

_SIDE = 32
_PLACES, _CLASSES = 64, 256
_SMALL = 2e9
# Of answers that hardly differ between inputs, rounding is most of the difference.
_LEAST = 1e-5


@dataclass(frozen=True, eq=False)
class Function:
    """What a network computes: ``vector (LENGTH,)`` of about length 1, float32, and what was ``asked`` of it.

    Distances are for vectors of one ``asked`` alone: 0 is the same function, up to the order of its classes; answers
    that have nothing in common are about √2 apart. ``vector`` is None for a network that could not be
    asked, and ``reason`` says why.
    """

    vector: NDArray[np.float32] | None
    asked: str = ""
    reason: str = ""


def function(tensors: Mapping[str, Tensor], wiring: Wiring | None) -> Function:
    """The function of a network as a point. Never raises for what the network is; see ``Function.reason``."""
    if wiring is None or wiring.program is None:
        return Function(None, reason="no network is known for its weights that could be run")
    if not wiring.proved:
        return Function(None, reason=f"its wiring is {wiring.status}, not proved")
    program = wiring.program
    numbers = sum(t.numel() for t in program.tensors.values())
    if numbers > PARAMETERS:
        return Function(None, reason=f"it has {numbers:,} parameters, and more than {PARAMETERS:,} are not asked")
    try:
        held = complete(wiring, tensors)
        for name, value in held.items():
            if value.is_floating_point() and not bool(torch.isfinite(value).all()):
                return Function(None, reason=f"{name!r} holds infinite values or values that are no numbers")
        return _function(program, held)
    except WiringError as error:
        return Function(None, reason=" ".join(str(error).split()))


def _function(program: Program, tensors: Mapping[str, Tensor]) -> Function:
    operations = _operations(program, tensors)
    if operations > OPERATIONS:
        reason = f"to answer everything takes it {operations:.0e} operations, more than {OPERATIONS:.0e}"
        return Function(None, reason=reason)
    questions = _Questions()
    # Two copies differ by rounding, which is nothing in float64; large networks have to do with less.
    dtype = torch.float64 if operations <= _SMALL else torch.float32
    out = ask(program, tensors, 2 * QUESTIONS, questions, dtype)
    parts = []
    for rows in told(out, 2 * QUESTIONS, _PLACES, _CLASSES).split(QUESTIONS):
        # One output is no choice between classes.
        shares = rows.softmax(2) if rows.shape[2] > 1 else torch.zeros_like(rows)
        parts += [_alike(shares.flatten(1)), _alike(rows.flatten(1))]
    stacked = torch.cat(parts)
    length = float(stacked.norm())
    if not length:
        return Function(None, questions.asked, "it answers everything alike")
    return Function((_projection() @ (stacked / length)).to(torch.float32).numpy(), questions.asked)


class _Questions:
    """Draws the inputs, and tells afterwards by ``asked`` which they were."""

    def __init__(self) -> None:
        self._of: list[str] = []

    @property
    def asked(self) -> str:
        return ", ".join(self._of)

    def __call__(self, x: Tensor) -> Tensor:
        shape = tuple(x.shape[1:])
        image = _image(shape) if x.is_floating_point() else None
        if image is not None:
            self._of.append(IMAGES)
            shown = torch.cat([_resized(pictures(kind, QUESTIONS, (1, _SIDE, _SIDE)), image) for kind in KINDS])
            return shown.reshape(-1, *shape)
        generator = torch.Generator().manual_seed(0)
        total = 2 * QUESTIONS
        if x.is_floating_point():
            drawn = torch.randn(total, *shape, generator=generator)
            self._of.append(f"noise of {'×'.join(map(str, shape)) or 'one number'}")
            return drawn
        among = x.flatten()
        drawn = among[torch.randint(len(among), (total, *shape), generator=generator)]
        digest = hashlib.sha256(drawn.to(torch.int64).contiguous().numpy().tobytes()).hexdigest()[:12]
        self._of.append(f"tokens {'×'.join(map(str, shape))} {digest}")
        return drawn


def _image(shape: tuple[int, ...]) -> tuple[int, int, int] | None:
    """Channels, height and width where inputs may be images, also as one row; None where they are something else.

    64 or 784 numbers may be anything. Pictures are then as good a question as noise, and what did read images in a row
    compares with what reads them as they are.
    """
    if len(shape) == 3 and shape[0] <= 4 and min(shape[1:]) >= 4:
        return shape[0], shape[1], shape[2]
    if len(shape) == 1:
        for channels, least in ((1, 8), (3, 16)):
            side = math.isqrt(shape[0] // channels)
            if side >= least and channels * side * side == shape[0]:
                return channels, side, side
    return None


def _resized(x: Tensor, shape: tuple[int, int, int]) -> Tensor:
    """Pictures as a network reads them ``(n, *shape)``, each with mean 0 and deviation 1."""
    channels, height, width = shape
    if max(height, width) <= _SIDE:
        x = F.adaptive_avg_pool2d(x, (height, width))
    else:
        x = F.interpolate(x, (height, width), mode="bilinear", align_corners=False)
    x = x - x.mean((1, 2, 3), keepdim=True)
    x = x / x.std((1, 2, 3), keepdim=True).clamp_min(1e-6)
    return x.expand(-1, channels, -1, -1).contiguous()


def _alike(rows: Tensor) -> Tensor:
    """The centred Gram matrix of answers ``(QUESTIONS, features)`` as a row of length 1; zeros where all are alike."""
    scale = float(rows.abs().amax()) or 1.0
    own = rows / scale
    own = own - own.mean(0)
    if float(own.abs().amax()) <= _LEAST:
        return rows.new_zeros(len(_pairs()))
    gram = own @ own.T
    found: Tensor = gram.flatten()[_pairs()] * _weights() / gram.norm()
    return found


def _operations(program: Program, tensors: Mapping[str, Tensor]) -> float:
    """Multiplications and additions of answering everything, counted on the example."""
    from torch.utils.flop_counter import FlopCounterMode

    from weightspace.wiring.proof import run

    count = next((len(x) for x in program.args if isinstance(x, Tensor) and x.dim()), 1)
    with FlopCounterMode(display=False) as counted:
        run(program, tensors, torch.float32)
    return float(counted.get_total_flops()) / max(count, 1) * 2 * QUESTIONS


@lru_cache(maxsize=1)
def _pairs() -> Tensor:
    """Which entries of a flattened Gram matrix tell all of it: each pair of inputs once."""
    rows, columns = torch.triu_indices(QUESTIONS, QUESTIONS).unbind()
    return rows.mul(QUESTIONS).add(columns)


@lru_cache(maxsize=1)
def _weights() -> Tensor:
    """Entries off the diagonal stand for two."""
    rows, columns = torch.triu_indices(QUESTIONS, QUESTIONS).unbind()
    return torch.ne(rows, columns).to(torch.float64).add(1).sqrt()


@lru_cache(maxsize=1)
def _projection() -> Tensor:
    """The fixed random projection ``(LENGTH, 4 * pairs)``."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(LENGTH, 4 * len(_pairs()), generator=generator, dtype=torch.float64).div_(LENGTH**0.5)


__all__ = ["LENGTH", "VERSION", "Function", "function"]
