"""Random damage to valid files, and what a reader may do with it."""

from __future__ import annotations

import random
import struct
from pathlib import Path

import weightspace as ws
from weightspace.errors import WeightspaceError

_NUMBERS = [0, 1, 127, 128, 255, 1 << 15, (1 << 16) - 1, (1 << 31) - 1, 1 << 31, (1 << 32) - 1, 1 << 60, (1 << 63) - 1]


def mutate(data: bytes, seed: int) -> bytes:
    """A damaged copy of ``data``: bits flipped, numbers replaced, parts cut, doubled, swapped or zeroed."""
    rng = random.Random(seed)
    out = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 3, 8))):
        if not out:
            break
        at = rng.randrange(len(out))
        if rng.random() < 0.5:  # headers are small, and where most can go wrong
            at = rng.randrange(min(len(out), 400))
        kind = rng.randrange(8)
        span = min(rng.choice((1, 2, 4, 8, 16, 64, 256)), len(out) - at)
        if kind == 0:
            out[at] ^= 1 << rng.randrange(8)
        elif kind == 1:
            out[at] = rng.randrange(256)
        elif kind == 2:
            form = rng.choice(("<I", "<Q", ">I", ">Q", "<H"))
            number = rng.choice(_NUMBERS) & ((1 << 8 * struct.calcsize(form)) - 1)
            out[at : at + struct.calcsize(form)] = struct.pack(form, number)
        elif kind == 3:
            del out[at : at + span]
        elif kind == 4:
            out[at:at] = out[at : at + span]
        elif kind == 5:
            other = rng.randrange(len(out))
            out[at : at + span] = out[other : other + span]
        elif kind == 6:
            del out[at:]
        else:
            out[at : at + span] = bytes([rng.choice((0, 255, 0x80, 0x2E, 0x30))]) * span
    return bytes(out)


def survive(path: Path) -> bool:
    """Open and load ``path``; whether it was accepted. Anything but a `WeightspaceError` escapes."""
    try:
        checkpoint = ws.open(path)
        repr(checkpoint)
        for name in checkpoint:
            tensor = checkpoint[name]
            assert tuple(tensor.shape) == checkpoint.shape(name)
            tensor.float().sum()
    except WeightspaceError:
        return False
    return True
