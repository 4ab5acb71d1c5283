"""The same weights of many networks side by side: what lineage is read from.

Networks with tensors of equal names and shapes form a group; within it weight ``k`` of one network is weight ``k`` of
every other. An even sample of the weights of each tensor is taken (all of them where that is little), so that thousands
of networks are held at once: sums over weights, which is all that distances, angles and drifts are made of, keep their
value up to sampling error. Running statistics of normalisations, counters and optimiser states are left out: they say
how the file came about and not what was learnt.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from weightspace.wiring.wiring import Wiring

Array = NDArray[np.float64]
Floats = NDArray[np.float32]

MOST = 1 << 16
"""Weights that are looked at of one network."""
_MEMORY = 1 << 27
_LEAST = 64
_STATISTICS = ("mean", "variance", "other")
_OPTIMISER = re.compile(r"(^|[./_])(optimi[sz]er(_\w+)?|optim|exp_avg(_sq)?|momentum_buffer|training_weights)([./]|$)")


@dataclass(frozen=True)
class Segment:
    """The part of a sample that one tensor fills: ``start`` to ``stop``, read at ``positions`` of the flat tensor."""

    tensor: str
    start: int
    stop: int
    positions: Tensor
    movable: bool


@dataclass(frozen=True, eq=False)
class Sample:
    """Weights of a group: ``values (networks, weights)``, each tensor in units of its usual root mean square.

    ``known``: networks whose weights are all finite, those that were not sampled as well; the others' rows are zero.
    """

    names: tuple[str, ...]
    values: Floats
    segments: tuple[Segment, ...]
    known: NDArray[np.bool_]
    wiring: Wiring | None = field(default=None, repr=False)

    def standardised(self) -> Floats:
        """The movable tensors' values, each tensor of each network with mean 0 and variance 1, scaled to unit rows."""
        parts = []
        for s in self.segments:
            if s.movable:
                part = self.values[:, s.start : s.stop] - self.values[:, s.start : s.stop].mean(1, keepdims=True)
                deviation = np.sqrt(np.square(part, dtype=np.float64).mean(1, keepdims=True))
                parts.append(np.where(deviation > 1e-9, part / np.maximum(deviation, 1e-9), 0))
        if not parts:
            return np.zeros((len(self.names), 0), dtype=np.float32)
        joined = np.concatenate(parts, axis=1)
        return np.asarray(joined / math.sqrt(joined.shape[1]), dtype=np.float32)


def signature(shapes: Mapping[str, tuple[int, ...]]) -> str:
    """What two networks have to share to be compared weight by weight: names and shapes of their floating tensors."""
    text = "\n".join(f"{name} {list(shape)}" for name, shape in sorted(shapes.items()))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def compared(shapes: Mapping[str, tuple[int, ...]], wiring: Wiring | None) -> list[str]:
    """Names of the tensors that are looked at: those that were learnt, as far as the wiring or a name tells."""
    roles = {} if wiring is None else wiring.roles
    return [
        name
        for name, shape in shapes.items()
        if math.prod(shape) > 1 and roles.get(name, "weight") not in _STATISTICS and not _OPTIMISER.search(name)
    ]


def take(
    names: Sequence[str],
    networks: Iterable[Mapping[str, Tensor]],
    shapes: Mapping[str, tuple[int, ...]],
    wiring: Wiring | None,
    seed: int = 0,
) -> Sample:
    """Read every network once, tensor by tensor. ``shapes``: of the floating tensors that all of them have."""
    segments = _segments(shapes, wiring, min(MOST, max(1 << 12, _MEMORY // max(len(names), 1))), seed)
    width = segments[-1].stop if segments else 0
    values = np.zeros((len(names), width), dtype=np.float32)
    known = np.ones(len(names), dtype=bool)
    for row, tensors in enumerate(networks):
        for s in segments:
            x = tensors[s.tensor].detach().to(torch.float32)
            values[row, s.start : s.stop] = x.reshape(-1)[s.positions].numpy()
            known[row] &= bool(x.isfinite().all())
        if not known[row]:
            values[row] = 0
    for s in segments:
        block = values[known, s.start : s.stop].astype(np.float64)
        usual = math.sqrt(float(np.median((block * block).mean(1)))) if len(block) else 0.0
        if usual > 1e-12:
            values[:, s.start : s.stop] /= usual
    return Sample(tuple(names), values, tuple(segments), known, wiring)


def _segments(shapes: Mapping[str, tuple[int, ...]], wiring: Wiring | None, most: int, seed: int) -> list[Segment]:
    chosen = compared(shapes, wiring)
    total = sum(math.prod(shapes[n]) for n in chosen)
    share = min(1.0, most / max(total, 1))
    generator = torch.Generator().manual_seed(seed)
    found, start = [], 0
    for name in chosen:
        count = math.prod(shapes[name])
        wanted = min(count, max(_LEAST, round(share * count)))
        positions = torch.arange(count) if wanted == count else torch.randint(count, (wanted,), generator=generator)
        found.append(Segment(name, start, start + wanted, positions, _movable(name, shapes[name], wiring)))
        start += wanted
    return found


def _movable(name: str, shape: tuple[int, ...], wiring: Wiring | None) -> bool:
    if wiring is None:
        return len(shape) > 1
    free = {n for n, f in wiring.free.items() if f.size > 1}
    layout = wiring.layouts.get(name, ())
    return any(f in free for group in layout for block in group.blocks for s in block for f in s.factors)


__all__ = ["MOST", "Sample", "Segment", "compared", "signature", "take"]
