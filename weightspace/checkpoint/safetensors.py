"""safetensors: a JSON header of names, types and offsets, then the bytes. Strictly validated.

Format: https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import functools
import json
from typing import Any

import torch

from weightspace.checkpoint import dtypes, limits
from weightspace.checkpoint.contents import Contents, Entry, Request
from weightspace.checkpoint.source import Source
from weightspace.errors import CheckpointError, UnsafeCheckpointError


def matches(source: Source) -> bool:
    """Eight bytes of header length, then an opening brace."""
    head = source.head(9)
    return len(head) == 9 and head[8:] == b"{" and int.from_bytes(head[:8], "little") >= 2


def read(source: Source, request: Request) -> Contents:
    """Read the header; each tensor is mapped on access."""
    header, start = read_header(source)
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise CheckpointError(f"{source.name}: the header's __metadata__ is no table of texts")
    spans: list[tuple[int, int, str]] = []
    found: list[tuple[int, str, Entry]] = []
    for name, record in header.items():
        entry, begin, end = _entry(source, name, record, start)
        spans.append((begin, end, name))
        found.append((begin, name, entry))
    _check_layout(source, spans, source.size - start)
    findings: list[str] = []
    tensors = {name: entry for _, name, entry in sorted(found, key=lambda f: f[0])}
    return Contents("safetensors", tensors, dict(metadata), findings=findings)


def read_header(source: Source) -> tuple[dict[str, Any], int]:
    """The header as a dictionary without double keys, and where the data begins."""
    length = int.from_bytes(source.read(0, 8, "the header"), "little")
    if length > limits.MAX_HEADER_BYTES or length > source.size:
        raise UnsafeCheckpointError(
            f"{source.name}: the header claims {length:,} bytes in a file of {source.size:,}; "
            f"at most {limits.MAX_HEADER_BYTES:,} are read"
        )
    return parse_json(source.read(8, length, "the header"), source.name), 8 + length


def parse_json(data: bytes, where: str) -> dict[str, Any]:
    """A JSON object; a repeated key is refused, because two programs may then see two different files."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) != len(pairs):
            names = [key for key, _ in pairs]
            double = next(name for name in names if names.count(name) > 1) if len(names) < 10_000 else "one"
            raise UnsafeCheckpointError(f"{where}: the name {double!r} is there twice")
        return result

    try:
        value = json.loads(data.decode("utf-8"), object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{where}: the header is no JSON ({error})"[:500]) from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{where}: a JSON object was expected, found a {type(value).__name__}")
    return value


def _entry(source: Source, name: str, record: Any, start: int) -> tuple[Entry, int, int]:
    what = f"{source.name}: tensor {name!r}"
    if not isinstance(record, dict) or not {"dtype", "shape", "data_offsets"} <= record.keys():
        raise CheckpointError(f"{what} has no dtype, shape and data_offsets")
    dtype = dtypes.SAFETENSORS.get(str(record["dtype"]))
    if dtype is None:
        raise CheckpointError(
            f"{what} has the type {str(record['dtype'])[:40]!r}; known: {', '.join(dtypes.SAFETENSORS)}"
        )
    shape = _naturals(record["shape"], what)
    offsets = _naturals(record["data_offsets"], what)
    if len(offsets) != 2 or offsets[0] > offsets[1]:
        raise CheckpointError(f"{what} has the offsets {offsets[:4]}; two in rising order were expected")
    begin, end = offsets
    needed = limits.count(shape, what) * dtype.itemsize
    if needed != end - begin:
        raise UnsafeCheckpointError(
            f"{what} of {record['dtype']} {shape} needs {needed:,} bytes, its offsets give {end - begin:,}"
        )
    source.check(start + begin, end - begin, f"tensor {name!r}")
    load = functools.partial(_load, source, start + begin, end - begin, dtype, shape)
    return Entry(shape, dtype, load, functools.partial(_part, source, start + begin, dtype)), begin, end


def _naturals(value: Any, what: str) -> tuple[int, ...]:
    if not isinstance(value, list) or not all(type(n) is int and n >= 0 for n in value):
        raise CheckpointError(f"{what}: a list of sizes was expected, found {str(value)[:60]}")
    return tuple(value)


def _check_layout(source: Source, spans: list[tuple[int, int, str]], size: int) -> None:
    at, last = 0, ""
    for begin, end, name in sorted(spans):
        if begin < at:
            raise UnsafeCheckpointError(f"{source.name}: tensors {last!r} and {name!r} overlap")
        if begin > at:
            raise UnsafeCheckpointError(f"{source.name}: {begin - at:,} bytes before {name!r} belong to no tensor")
        at, last = end, name
    if at != size:
        raise UnsafeCheckpointError(
            f"{source.name}: the tensors end at byte {at:,} of {size:,}; the file is truncated or carries other data"
        )


def _load(source: Source, offset: int, length: int, dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
    return dtypes.to_tensor(source.buffer(offset, length), dtype, shape)


def _part(source: Source, offset: int, dtype: torch.dtype, first: int, last: int) -> torch.Tensor:
    size = dtype.itemsize
    return dtypes.to_tensor(source.buffer(offset + first * size, (last - first) * size), dtype, (last - first,))
