"""Random numbers that depend on seed, tensor and model alone: not on pieces, threads, order or other tensors.

A tensor is cut into blocks of 65,536 elements. Each has a generator of its own (SFC64, seeded by numpy's
``SeedSequence`` from seed, name, model and block), whose raw 64-bit words give two elements each, so that a stream is
fixed by numpy's stability guarantee for bit generators.
"""

from __future__ import annotations

import zlib

import numpy as np
import torch

_BLOCK = 1 << 16


Bits = np.ndarray[tuple[int], np.dtype[np.uint32]]


def uniform_bits(seed: int, name: str, model: int, start: int, stop: int) -> Bits:
    """Uniform 32-bit integers for elements ``start`` to ``stop`` of a flattened tensor, shape (stop - start,)."""
    key = zlib.crc32(name.encode())
    out = np.empty(stop - start, np.uint32)
    for block in range(start // _BLOCK, -(-stop // _BLOCK)):
        first, last = max(start, block * _BLOCK), min(stop, (block + 1) * _BLOCK)
        generator = np.random.SFC64(np.random.SeedSequence([seed & 0xFFFFFFFF, key, len(name), model, block]))
        words = generator.random_raw(-(-(last - block * _BLOCK) // 2)).view(np.uint32)
        out[first - start : last - start] = words[first - block * _BLOCK : last - block * _BLOCK]
    return out


def bernoulli(probability: float, seed: int, name: str, model: int, start: int, stop: int) -> torch.Tensor:
    """True with ``probability``, independently for each element: shape (stop - start,), bool."""
    if probability >= 1:
        return torch.ones(stop - start, dtype=torch.bool)
    bits = uniform_bits(seed, name, model, start, stop)
    return torch.from_numpy(bits < np.uint32(min(int(probability * 2.0**32), 2**32 - 1)))


def uniform(seed: int, name: str, model: int, start: int, stop: int) -> torch.Tensor:
    """Uniform in [0, 1): shape (stop - start,), float32 with 24 bits."""
    bits = uniform_bits(seed, name, model, start, stop)
    return torch.from_numpy((bits >> np.uint32(8)).astype(np.float32) * np.float32(2.0**-24))
