"""What a file may claim before it is believed. Every limit turns an attack into an error message."""

from __future__ import annotations

import math

from weightspace.errors import UnsafeCheckpointError

MAX_HEADER_BYTES = 100 << 20
"""Longest safetensors header, JSON index or configuration file."""

MAX_OPCODES = 5_000_000
"""Most instructions of one pickle; 5 million describe some 80,000 tensors."""

MAX_NODES = 300_000
"""Most objects visited while looking for tensors in a pickle (shared objects count each time)."""

MAX_DEPTH = 200
"""Deepest nesting of containers, modules or subgraphs."""

MAX_NESTED_ARCHIVES = 3
"""A model in a zip in a zip is read; a zip that contains itself is not."""

MAX_NDIM = 64
"""Most axes of one tensor."""

MAX_EXPANSION = 100
"""A compressed or strided tensor may unfold to this many times its stored size ..."""

FREE_EXPANSION_BYTES = 1 << 20
"""... or to this many bytes, whichever is more."""


def check_expansion(declared: int, stored: int, what: str) -> None:
    """Refuse ``declared`` bytes that come from ``stored`` bytes when the ratio is absurd."""
    if declared > FREE_EXPANSION_BYTES and declared > MAX_EXPANSION * stored:
        raise UnsafeCheckpointError(
            f"{what} would unfold {stored:,} stored bytes to {declared:,} bytes; at most {MAX_EXPANSION} times "
            f"is read. A real model can be stored again without compression."
        )


def count(shape: tuple[int, ...], what: str) -> int:
    """Number of elements of ``shape``, refusing negative, absurdly many or absurdly large axes."""
    if len(shape) > MAX_NDIM:
        raise UnsafeCheckpointError(f"{what} claims {len(shape)} axes; at most {MAX_NDIM} are read")
    if any(n < 0 for n in shape):
        raise UnsafeCheckpointError(f"{what} claims a negative size in its shape {shape}")
    total = math.prod(shape)
    if total >= 1 << 58 or any(n >= 1 << 58 for n in shape):
        raise UnsafeCheckpointError(f"{what} claims {total} elements in shape {shape}; no file holds that many")
    return total
