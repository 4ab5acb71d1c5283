"""NumPy ``.npy`` and ``.npz``; also flat vectors of weights with a ``layout.csv`` beside them.

A layout is a table ``varname,start_idx,end_idx,size,shape`` that cuts the last axis of one array into
named tensors (the Small CNN Zoo, Unterthiner et al. 2020, stores its networks so). An array with a row
per network is a file of several models, ``member="0"``, ``member="1"``, ...
"""

from __future__ import annotations

import csv
import functools
import io
import math
import re
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from weightspace.checkpoint import dtypes, limits
from weightspace.checkpoint.archive import Archive
from weightspace.checkpoint.contents import Contents, Entry, Request, SeveralModelsError
from weightspace.checkpoint.source import Source
from weightspace.errors import CheckpointError, UnsafeCheckpointError

_COLUMNS = ("varname", "start_idx", "end_idx", "size", "shape")


@dataclass(frozen=True)
class _Array:
    source: Source
    start: int
    shape: tuple[int, ...]
    numpy_dtype: np.dtype[Any]
    fortran: bool

    @property
    def dtype(self) -> torch.dtype | None:
        return dtypes.from_numpy(self.numpy_dtype)

    def load(self, first: int, count: int, shape: tuple[int, ...]) -> torch.Tensor:
        dtype = self.dtype
        assert dtype is not None
        data = self.source.buffer(self.start + first * dtype.itemsize, count * dtype.itemsize, "the array")
        big = self.numpy_dtype.byteorder == ">"
        return dtypes.to_tensor(data, dtype, shape, big_endian=big, fortran=self.fortran)

    def entry(self, first: int = 0, shape: tuple[int, ...] | None = None) -> Entry:
        shape = self.shape if shape is None else shape
        dtype = self.dtype
        if dtype is None:
            raise CheckpointError(f"{self.source.name}: elements of type {self.numpy_dtype} are no tensor")
        return Entry(shape, dtype, functools.partial(self.load, first, math.prod(shape), shape))


def matches(source: Source) -> bool:
    """The magic word of ``.npy``."""
    return source.head(6) == b"\x93NUMPY"


def read(source: Source, request: Request) -> Contents:
    """One array, cut by a layout where there is one."""
    array = _header(source)
    layout = _layout(source, array)
    if layout is None:
        return Contents("npy", {"array": array.entry()})
    name, cuts = layout
    width = array.shape[-1]
    rows = array.numpy_dtype.itemsize and math.prod(array.shape[:-1])
    row = 0
    if array.shape[:-1] not in ((), (1,)):
        listed = members_of(array)
        if request.member is None:
            raise SeveralModelsError(source.name, listed)
        if request.member not in listed:
            raise CheckpointError(f"{source.name} has the models 0 to {rows - 1}, not {request.member!r}")
        row = int(request.member)
    if array.fortran and array.shape[:-1] not in ((), (1,)):
        raise CheckpointError(f"{source.name}: rows stored in Fortran order; save the array in C order")
    tensors = {key: array.entry(row * width + start, shape) for key, start, shape in cuts}
    return Contents("npy", tensors, {"layout": name}, findings=[f"flat vector cut into tensors by {name}"])


def members(source: Source) -> list[str]:
    """Names of the networks in a file of several; empty where the file is one model."""
    array = _header(source)
    if len(array.shape) < 2 or array.shape[0] == 1 or _layout(source, array) is None:
        return []
    return members_of(array)


def members_of(array: _Array) -> list[str]:
    """Row numbers of an array with a network per row."""
    return [str(i) for i in range(math.prod(array.shape[:-1]))]


def read_npz(archive: Archive, request: Request) -> Contents:
    """All arrays of an ``.npz``; texts go to the metadata."""
    tensors: dict[str, Entry] = {}
    metadata: dict[str, Any] = {}
    findings: list[str] = []
    for member in archive.names:
        name = member[: -len(".npy")]
        array = _header(archive.member(member))
        if array.dtype is not None:
            tensors[name] = array.entry()
        elif array.numpy_dtype.kind in "US" and archive.size(member) <= 1 << 20:
            data = array.source.read(array.start, math.prod(array.shape) * array.numpy_dtype.itemsize, name)
            texts = np.frombuffer(data, dtype=array.numpy_dtype) if data else np.empty(0, dtype="U1")
            values = [t.decode("utf-8", "replace") if isinstance(t, bytes) else str(t) for t in texts.tolist()]
            metadata[name] = values[0] if array.shape == () and values else values
        else:
            findings.append(f"array {name} of type {array.numpy_dtype} is no tensor and was left out")
    return Contents("npz", tensors, metadata, findings=findings)


def _header(source: Source) -> _Array:
    start = source.read(0, min(source.size, 12), "the header")
    if len(start) < 10 or start[:6] != b"\x93NUMPY" or start[6] not in (1, 2, 3):
        raise CheckpointError(f"{source.name}: no NumPy array of version 1 to 3")
    long = start[6] > 1
    length = int.from_bytes(start[8:12] if long else start[8:10], "little")
    if length > 1 << 16:
        raise UnsafeCheckpointError(f"{source.name}: the header claims {length:,} bytes; 65,536 are read")
    begin = 12 if long else 10
    text = source.read(begin, length, "the header")
    form = re.fullmatch(
        rb"\s*\{\s*'descr':\s*(?P<descr>'[^']{1,40}'|\[[^\]]*\].*?),\s*'fortran_order':\s*(?P<order>True|False),"
        rb"\s*'shape':\s*\((?P<shape>[0-9L, ]*)\),?\s*\}\s*",
        text,
        re.DOTALL,
    )
    if form is None:
        raise CheckpointError(f"{source.name}: the header {text[:80]!r} is not what NumPy writes")
    descr = form["descr"].decode("latin-1").strip("'")
    sizes = form["shape"].replace(b"L", b"").replace(b" ", b"").split(b",")
    if any(len(n) > 20 for n in sizes):
        raise UnsafeCheckpointError(f"{source.name}: the shape has numbers of more than 20 digits")
    shape = tuple(int(n) for n in sizes if n)
    if not re.fullmatch(r"[<>|=]?[a-zA-Z?][0-9]{0,6}", descr) or descr.lstrip("<>|=")[0] in "OVMm":
        raise UnsafeCheckpointError(
            f"{source.name}: elements of type {descr[:40]!r}; only numbers are read, never pickled objects"
        )
    try:
        numpy_dtype = np.dtype(descr)
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{source.name}: unknown element type {descr[:40]!r}") from error
    if numpy_dtype.hasobject:
        raise UnsafeCheckpointError(f"{source.name}: holds Python objects; only numbers are read")
    needed = limits.count(shape, source.name) * numpy_dtype.itemsize
    source.check(begin + length, needed, f"an array of shape {shape}")
    return _Array(source, begin + length, shape, numpy_dtype, form["order"] == b"True")


def _layout(source: Source, array: _Array) -> tuple[str, list[tuple[str, int, tuple[int, ...]]]] | None:
    if source.folder is None or not array.shape or array.dtype is None:
        return None
    fitting = []
    for name in source.folder.names():
        if name.endswith("layout.csv"):
            beside = source.folder.open(name)
            if beside.size <= 1 << 20:
                cuts = _cuts(beside.read(0, beside.size), array.shape[-1])
                if cuts is not None:
                    fitting.append((name, cuts))
    if len(fitting) > 1:
        raise CheckpointError(f"{source.name}: several layouts fit: {', '.join(name for name, _ in fitting)}; keep one")
    return fitting[0] if fitting else None


def _cuts(data: bytes, width: int) -> list[tuple[str, int, tuple[int, ...]]] | None:
    # A table that does not describe this array is somebody else's: no error, no layout.
    try:
        rows = list(csv.DictReader(io.StringIO(data.decode("utf-8"))))
    except (UnicodeDecodeError, csv.Error):
        return None
    if not rows or not set(_COLUMNS) <= set(rows[0]):
        return None
    cuts, at, names = [], 0, set()
    for row in rows:
        shape = tuple(int(n) for n in re.findall(r"\d{1,12}", row["shape"] or ""))
        numbers = [row["start_idx"] or "", row["end_idx"] or ""]
        if not all(re.fullmatch(r"\d{1,12}", n) for n in numbers) or row["varname"] in names:
            return None
        start, end = map(int, numbers)
        if start != at or end < start or math.prod(shape) != end - start:
            return None
        names.add(row["varname"])
        cuts.append((row["varname"], start, shape))
        at = end
    return cuts if at == width else None
