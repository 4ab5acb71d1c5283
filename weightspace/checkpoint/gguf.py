"""GGUF (llama.cpp): key-value metadata and tensors, the quantised ones dequantised on access to float32.

Listing needs no package; dequantising uses ``gguf`` (extra ``gguf``). ``metadata["tensor_types"]`` keeps
the stored types. Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import functools
import struct
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from weightspace.checkpoint import dtypes, limits
from weightspace.checkpoint.contents import Contents, Entry, Request
from weightspace.checkpoint.source import Source
from weightspace.errors import CheckpointError, MissingExtraError, UnsafeCheckpointError

_PLAIN: dict[int, tuple[str, torch.dtype]] = {
    0: ("F32", torch.float32),
    1: ("F16", torch.float16),
    24: ("I8", torch.int8),
    25: ("I16", torch.int16),
    26: ("I32", torch.int32),
    27: ("I64", torch.int64),
    28: ("F64", torch.float64),
    30: ("BF16", torch.bfloat16),
}
# type: (name, elements of a block, bytes of a block)
_QUANTISED: dict[int, tuple[str, int, int]] = {
    2: ("Q4_0", 32, 18),
    3: ("Q4_1", 32, 20),
    6: ("Q5_0", 32, 22),
    7: ("Q5_1", 32, 24),
    8: ("Q8_0", 32, 34),
    10: ("Q2_K", 256, 84),
    11: ("Q3_K", 256, 110),
    12: ("Q4_K", 256, 144),
    13: ("Q5_K", 256, 176),
    14: ("Q6_K", 256, 210),
    16: ("IQ2_XXS", 256, 66),
    17: ("IQ2_XS", 256, 74),
    18: ("IQ3_XXS", 256, 98),
    19: ("IQ1_S", 256, 50),
    20: ("IQ4_NL", 32, 18),
    21: ("IQ3_S", 256, 110),
    22: ("IQ2_S", 256, 82),
    23: ("IQ4_XS", 256, 136),
    29: ("IQ1_M", 256, 56),
    34: ("TQ1_0", 256, 54),
    35: ("TQ2_0", 256, 66),
    39: ("MXFP4", 32, 17),
}
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9


def matches(source: Source) -> bool:
    """The four letters ``GGUF``."""
    return source.head(4) == b"GGUF"


class _Header:
    """Reads numbers and texts one after the other, a block of bytes at a time."""

    def __init__(self, source: Source) -> None:
        self.source, self.at, self.order = source, 4, "<"
        self._block, self._start = b"", 0

    def take(self, length: int) -> bytes:
        begin = self.at - self._start
        if not 0 <= begin <= begin + length <= len(self._block):
            self.source.check(self.at, length, "the header")
            self._start, begin = self.at, 0
            self._block = self.source.read(self.at, min(max(length, 1 << 20), self.source.size - self.at))
        self.at += length
        return self._block[begin : begin + length]

    def number(self, form: str) -> Any:
        form = self.order + form
        return struct.unpack(form, self.take(struct.calcsize(form)))[0]

    def text(self) -> str:
        return self.take(self.number("Q")).decode("utf-8", "replace")

    def value(self, kind: int, depth: int = 0) -> Any:
        if kind in _SCALARS:
            return self.number(_SCALARS[kind])
        if kind == _STRING:
            return self.text()
        if kind != _ARRAY or depth > 4:
            raise CheckpointError(f"{self.source.name}: metadata of the unknown kind {kind} at byte {self.at:,}")
        inner, length = self.number("I"), self.number("Q")
        if inner in _SCALARS:
            form = f"{self.order}{length}{_SCALARS[inner]}"
            size = length * struct.calcsize(self.order + _SCALARS[inner])
            self.source.check(self.at, size, "a list in the metadata")
            return list(struct.unpack(form, self.take(size)))
        self.source.check(self.at, length * 8, "a list in the metadata")
        return [self.value(inner, depth + 1) for _ in range(length)]


def read(source: Source, request: Request) -> Contents:
    """Read the header; tensors are mapped, or dequantised, on access."""
    try:
        return _read(source)
    except (struct.error, OverflowError, MemoryError) as error:
        raise CheckpointError(f"{source.name}: the GGUF header is damaged ({error})") from error


def _read(source: Source) -> Contents:
    header = _Header(source)
    version = header.number("I")
    if version & 0xFFFF == 0 and version:
        header.order = ">"
        version = int.from_bytes(version.to_bytes(4, "little"), "big")
    if version not in (2, 3):
        raise CheckpointError(f"{source.name}: GGUF version {version}; 2 and 3 are read. Convert it with llama.cpp.")
    tensor_count, pair_count = header.number("Q"), header.number("Q")
    if tensor_count * 24 > source.size or pair_count * 13 > source.size:
        raise UnsafeCheckpointError(
            f"{source.name}: claims {tensor_count:,} tensors and {pair_count:,} entries in {source.size:,} bytes"
        )
    metadata: dict[str, Any] = {}
    for _ in range(pair_count):
        key = header.text()
        if key in metadata:
            raise UnsafeCheckpointError(f"{source.name}: the metadata has {key[:80]!r} twice")
        metadata[key] = header.value(header.number("I"))
    infos = []
    for _ in range(tensor_count):
        name, ndim = header.text(), header.number("I")
        if ndim > 8:
            raise UnsafeCheckpointError(f"{source.name}: tensor {name[:80]!r} claims {ndim} axes; GGUF has at most 4")
        shape = tuple(reversed([header.number("Q") for _ in range(ndim)]))
        infos.append((name, shape, header.number("I"), header.number("Q")))
    alignment = metadata.get("general.alignment", 32)
    if not isinstance(alignment, int) or not 0 < alignment <= 1 << 20:
        raise CheckpointError(f"{source.name}: the alignment {str(alignment)[:40]} is no sensible number of bytes")
    base = header.at + -header.at % alignment
    tensors: dict[str, Entry] = {}
    types: dict[str, str] = {}
    spans: list[tuple[int, int, str]] = []
    for name, shape, kind, offset in infos:
        if name in tensors:
            raise UnsafeCheckpointError(f"{source.name}: two tensors are called {name[:80]!r}")
        tensors[name], types[name], length = _entry(source, name, shape, kind, base + offset, header.order == ">")
        spans.append((offset, offset + length, name))
    end = 0
    for begin, stop, name in sorted(spans):
        if begin < end:
            raise UnsafeCheckpointError(f"{source.name}: tensor {name!r} overlaps another")
        end = max(end, stop)
    metadata["tensor_types"] = types
    return Contents("gguf", tensors, metadata)


def _entry(
    source: Source, name: str, shape: tuple[int, ...], kind: int, start: int, big: bool
) -> tuple[Entry, str, int]:
    what = f"{source.name}: tensor {name[:80]!r}"
    total = limits.count(shape, what)
    if kind in _PLAIN:
        label, dtype = _PLAIN[kind]
        length = total * dtype.itemsize
        source.check(start, length, f"tensor {name[:80]!r}")
        return Entry(shape, dtype, functools.partial(_load, source, start, length, dtype, shape, big)), label, length
    if kind not in _QUANTISED:
        raise CheckpointError(f"{what} is quantised as type {kind}, which is not known; update weightspace")
    label, elements, size = _QUANTISED[kind]
    if not shape or shape[-1] % elements:
        raise CheckpointError(f"{what} of shape {shape} does not divide into {label} blocks of {elements}")
    if big:
        raise CheckpointError(f"{what}: quantised tensors in big-endian files are not read")
    length = total // elements * size
    source.check(start, length, f"tensor {name[:80]!r}")
    load: Callable[[], torch.Tensor] = functools.partial(_dequantise, source, start, length, kind, label, shape)
    return Entry(shape, torch.float32, load), label, length


def _load(
    source: Source, start: int, length: int, dtype: torch.dtype, shape: tuple[int, ...], big: bool
) -> torch.Tensor:
    return dtypes.to_tensor(source.buffer(start, length), dtype, shape, big_endian=big)


def _dequantise(source: Source, start: int, length: int, kind: int, label: str, shape: tuple[int, ...]) -> torch.Tensor:
    try:
        from gguf import GGMLQuantizationType
        from gguf.quants import dequantize
    except ImportError as error:
        raise MissingExtraError("gguf", "gguf", f"dequantising a {label} tensor") from error
    raw = np.frombuffer(source.read(start, length), dtype=np.uint8)
    rows = raw.reshape(*shape[:-1], -1) if raw.size else raw
    try:
        with np.errstate(all="ignore"):
            plain = dequantize(rows, GGMLQuantizationType(kind)) if raw.size else np.zeros(shape, np.float32)
    except (NotImplementedError, ValueError) as error:
        raise CheckpointError(f"{source.name}: the package gguf cannot dequantise {label} ({error})") from error
    return torch.from_numpy(np.ascontiguousarray(plain, dtype=np.float32)).reshape(shape)
