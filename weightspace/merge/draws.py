"""Random numbers that depend on seed, tensor and model alone: not on pieces, threads, order or other tensors.

A tensor is cut into blocks of 65,536 elements. Each has a generator of its own (SFC64, seeded by numpy's
``SeedSequence`` from seed, name, model and block), whose raw 64-bit words give two elements each, so that a stream is
fixed by numpy's stability guarantee for bit generators.

`TorchMasks` draws as mergekit does instead.
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


class TorchMasks:
    """Masks from one generator, as mergekit draws them: names in alphabetical order, models in theirs.

    mergekit seeds torch once (``--random-seed``) and calls ``torch.bernoulli`` on every task vector that is not kept
    whole, in ``dtype`` (its recipe's). The same draws come out here as long as tensors are asked for in that order: the
    engine sees to it for methods that are ``in_order``. For each tensor, first ``draw`` for one model after the other,
    each in consecutive pieces; then ``again`` gives the same masks piece by piece.
    """

    def __init__(self, seed: int, dtype: torch.dtype = torch.float32) -> None:
        self.seed, self.dtype = seed, dtype
        self._generator = torch.Generator().manual_seed(seed)
        self._replay: dict[int, torch.Generator] = {}

    def begin(self, model: int) -> None:
        """The next draws are a model's."""
        self._replay[model] = torch.Generator()
        self._replay[model].set_state(self._generator.get_state())

    def draw(self, chance: float | torch.Tensor, count: int) -> torch.Tensor:
        """The next ``count`` elements of the model's mask, shape (count,), bool."""
        return self._of(self._generator, chance, count)

    def again(self, model: int, chance: float | torch.Tensor, count: int) -> torch.Tensor:
        """The elements of a model's mask once more, from its beginning."""
        return self._of(self._replay[model], chance, count)

    def _of(self, generator: torch.Generator, chance: float | torch.Tensor, count: int) -> torch.Tensor:
        chances = torch.full((count,), chance, dtype=self.dtype) if isinstance(chance, float) else chance
        return torch.bernoulli(chances, generator=generator).bool()

    def __repr__(self) -> str:
        return f"TorchMasks(seed={self.seed})"
