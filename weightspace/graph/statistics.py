"""Statistics of every block of a graph, streamed from the file in small chunks."""

from __future__ import annotations

import os
import struct
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from math import inf, isfinite, sqrt
from typing import TYPE_CHECKING

import numpy as np
import torch

if TYPE_CHECKING:
    from weightspace.graph.layout import Vector
    from weightspace.graph.parameter_graph import ParameterGraph

# Elements taken at once: in float32 they stay in a core's cache.
_CHUNK = 1 << 17
# Below this a second thread costs more than it saves.
_ALONE = 1 << 20
_MAX_WORKERS = 8
# Elements that tell whether the mean is large beside the spread.
_SAMPLE = 4096


@dataclass(frozen=True)
class Statistics:
    """Of the finite elements of a block; ``nan`` and ``infinite`` count the others.

    ``std`` is that of the population (divided by the count); ``norm`` is the Frobenius norm, ``rms`` is
    ``norm / sqrt(count)``. All are NaN where no element is finite.
    """

    count: int
    mean: float
    std: float
    rms: float
    norm: float
    abs_max: float
    min: float
    max: float
    nan: int = 0
    infinite: int = 0


def statistics(graph: ParameterGraph, workers: int | None = None) -> dict[str, Statistics]:
    """Statistics of every block, vector and value of a graph, by label, in the order of the tensors.

    Each tensor is read once, in chunks of half a megabyte per worker (``workers`` threads, by default one per
    core up to 8); of a file that can be mapped nothing else is held. Sums are float32 within a chunk (float64
    for float64 and integers) and float64 between chunks: about 1e-6 relative. A complex tensor is read as
    its real and imaginary parts.
    """
    parts: dict[str, list[Vector]] = {}
    for part in (*graph.blocks, *graph.vectors):
        parts.setdefault(part.tensor, []).append(part)
    out: dict[str, Statistics] = {}
    workers = workers or min(os.cpu_count() or 1, _MAX_WORKERS)
    with ThreadPoolExecutor(workers, thread_name_prefix="statistics") as pool:
        for name in graph.shapes:
            tensor = graph.real(name)
            for label, view in [(p.label, p.view(tensor)) for p in parts.get(name, ())] or [(name, tensor)]:
                out[label] = _of(view, pool, workers)
    return out


def of_tensor(tensor: torch.Tensor, workers: int | None = None) -> Statistics:
    """Statistics of one real tensor, in the same way."""
    workers = workers or min(os.cpu_count() or 1, _MAX_WORKERS)
    with ThreadPoolExecutor(workers, thread_name_prefix="statistics") as pool:
        return _of(tensor, pool, workers)


@dataclass
class _Sums:
    """Sums over elements shifted by ``pivot``, so that a large mean does not eat the variance."""

    pivot: float = 0.0
    count: int = 0
    nan: int = 0
    infinite: int = 0
    total: float = 0.0
    squares: float = 0.0
    low: float = inf
    high: float = -inf

    def add(self, chunk: torch.Tensor, low: float | None = None, high: float | None = None) -> None:
        """Take in a flat chunk of float32 or float64; ``low`` and ``high`` are its extremes where known."""
        low = chunk.amin().item() if low is None else low
        high = chunk.amax().item() if high is None else high
        values = chunk - self.pivot if self.pivot else chunk
        total = values.sum().item()
        squares = torch.dot(values, values).item()
        if not isfinite(total) or not isfinite(squares) or squares < len(values) * 1e-30:
            # Something is not finite, or float32 overflows (1e19 squared) or vanishes (1e-19 squared).
            finite = chunk[torch.isfinite(chunk)]
            nan = int(torch.isnan(chunk).sum())
            self.nan += nan
            self.infinite += len(chunk) - len(finite) - nan
            if not len(finite):
                return
            low, high = finite.amin().item(), finite.amax().item()
            chunk, values = finite, finite.double() - self.pivot
            total, squares = values.sum().item(), torch.dot(values, values).item()
        self.low, self.high = min(self.low, low), max(self.high, high)
        self.count += len(chunk)
        self.total += total
        self.squares += squares


def _of(view: torch.Tensor, pool: ThreadPoolExecutor, workers: int) -> Statistics:
    if not view.numel():
        nan = float("nan")
        return Statistics(0, nan, nan, nan, 0.0, nan, nan, nan)
    chunks = _chunks(view)
    pivot = _pivot(chunks[0].reshape(-1)[:_SAMPLE].to(_wide(view.dtype)))

    def run(some: Sequence[torch.Tensor]) -> _Sums:
        sums = _Sums(pivot)
        wide = torch.empty(max(c.numel() for c in some), dtype=_wide(view.dtype))
        for chunk in some:
            if chunk.dtype == wide.dtype and chunk.is_contiguous():
                sums.add(chunk.reshape(-1))
                continue
            values = wide[: chunk.numel()]
            values.view(chunk.shape).copy_(chunk)
            low, high = _extremes(chunk) if chunk.dtype == torch.bfloat16 else (None, None)
            sums.add(values, low, high)
        return sums

    if view.numel() < _ALONE or workers == 1:
        return _result([run(chunks)])
    # Neighbouring chunks in turn: the threads read the file side by side.
    return _result(list(pool.map(run, [chunks[i::workers] for i in range(workers)])))


def _chunks(view: torch.Tensor) -> list[torch.Tensor]:
    """Slices of at most ``_CHUNK`` elements, none of them copied."""
    if view.is_contiguous():
        return list(view.reshape(-1).split(_CHUNK))
    # The longest-strided dims first, so that the file is read in order.
    view = view.permute(sorted(range(view.dim()), key=view.stride().__getitem__, reverse=True))
    out, queue = [], [view]
    while queue:
        part = queue.pop()
        if part.numel() <= _CHUNK:
            out.append(part)
            continue
        d = next(d for d, n in enumerate(part.shape) if n > 1)
        rows = max(1, _CHUNK * part.shape[d] // part.numel())
        queue += reversed(part.split(rows, d))
    return out


def _wide(dtype: torch.dtype) -> torch.dtype:
    small = dtype in (torch.float32, torch.bfloat16, torch.float16) or dtype.itemsize == 1
    return torch.float32 if small else torch.float64


def _extremes(chunk: torch.Tensor) -> tuple[float | None, float | None]:
    """Smallest and largest of bfloat16 numbers, from their bits, which is faster; None where that cannot tell.

    Read as signed integers the largest is the largest positive number, as unsigned ones the lowest negative.
    """
    bits = chunk.view(torch.int16).numpy()
    low, high = int(bits.view(np.uint16).max()), int(bits.max())
    return _from_bits(low) if low > 0x8000 else None, _from_bits(high) if high > 0 else None


def _from_bits(bits: int) -> float:
    return float(struct.unpack("<f", (bits << 16).to_bytes(4, "little"))[0])


def _pivot(chunk: torch.Tensor) -> float:
    finite = chunk[torch.isfinite(chunk)].double()
    if not finite.numel():
        return 0.0
    mean = float(finite.mean())
    spread = float(finite.std(correction=0))
    return float(torch.tensor(mean, dtype=chunk.dtype)) if abs(mean) > 3 * spread else 0.0


def _result(found: Sequence[_Sums]) -> Statistics:
    count = sum(s.count for s in found)
    nan, infinite = sum(s.nan for s in found), sum(s.infinite for s in found)
    if not count:
        none = float("nan")
        return Statistics(0, none, none, none, none, none, none, none, nan, infinite)
    pivot = found[0].pivot
    shift = sum(s.total for s in found) / count
    square = sum(s.squares for s in found) / count
    mean = pivot + shift
    rms = sqrt(max(0.0, square + 2 * pivot * shift + pivot * pivot))
    low, high = min(s.low for s in found), max(s.high for s in found)
    return Statistics(
        count, mean, sqrt(max(0.0, square - shift * shift)), rms, rms * sqrt(count), max(-low, high, 0.0), low, high,
        nan, infinite,
    )  # fmt: skip
