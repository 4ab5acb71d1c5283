"""The k-th largest of very many numbers, exactly, in about one reading and without holding or sorting them.

A sample brackets the answer (Floyd & Rivest 1975, "Expected time bounds for selection"); one pass counts what lies
above the bracket and keeps what lies inside, a few per cent; the answer is then found among these. Where the sample
misled, which the counts show, the bracket moves and the pass is repeated: the result never depends on the sample.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch

Values = Callable[[], Iterable[torch.Tensor]]
_SMALL = 1 << 14
_HOLD = 1 << 22  # numbers that are kept rather than read again
Array = np.ndarray[tuple[int], np.dtype[Any]]


def kth_largest(values: Values, count: int, k: int, sample: Callable[[], torch.Tensor] | None = None) -> float:
    """The ``k``-th largest (from 1) of the ``count`` numbers that ``values()`` yields in pieces, afresh at each call.

    ``sample`` gives some of them, spread evenly, without reading all (a good one makes it a single reading); it is
    not called where the numbers are few enough to be held. Not-a-numbers are not expected.
    """
    if not 1 <= k <= count:
        raise ValueError(f"k is {k:,} of {count:,} numbers")
    if count <= _HOLD:
        held = list(values())
        values = lambda: held  # noqa: E731
        sample = None
    if count <= _SMALL:
        return float(np.partition(np.concatenate([piece.numpy().ravel() for piece in held]), count - k)[count - k])
    low, high = -np.inf, np.inf  # the answer lies in [low, high]
    drawn = np.sort((sample() if sample is not None else _sample(values, count)).numpy().ravel())
    spread = 6.0
    while True:
        share = 1 - k / count
        near = spread * np.sqrt(max(share * (1 - share), 1 / len(drawn)) / len(drawn))
        left, right = int((share - near) * len(drawn)) - 1, int((share + near) * len(drawn)) + 1
        a = max(low, float(drawn[left]) if left >= 0 else -np.inf)
        b = min(high, float(drawn[right]) if right < len(drawn) else np.inf)
        above, inside = 0, [np.empty(0, drawn.dtype)]
        edge = 0  # how often the upper end itself occurs: ties there need not be kept
        for piece in values():
            x = piece.numpy().ravel()
            greater = x > b
            above += int(np.count_nonzero(greater))
            if np.isfinite(b):
                edge += int(np.count_nonzero(x == b))
                greater |= x == b
            within = x >= a
            within ^= greater
            inside.append(x[within])
        rank = k - above
        kept = np.concatenate(inside)
        if rank <= 0:
            low, spread = b, spread * 4
        elif rank <= edge:
            return b
        elif rank - edge > len(kept):
            high, spread = a, spread * 4
        else:
            at = len(kept) - (rank - edge)
            return float(np.partition(kept, at)[at])


def _sample(values: Values, count: int) -> torch.Tensor:
    stride = max(1, count // min(1 << 16, max(1 << 12, count >> 4)))
    return torch.cat([piece.reshape(-1)[::stride].clone() for piece in values()])
