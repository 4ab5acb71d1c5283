"""ONNX: initialisers and constants, also those inside `If`, `Loop` and functions. The graph is not run.

The protocol buffer is walked in place, so that opening a file costs its structure, not its weights, and
needs no package. Tensors are named by initialiser, a `Constant` node's tensor by the node's output; a
name that subgraphs share is prefixed with the node and attribute that hold it. External data is read
from the model's own folder only. Schema: https://github.com/onnx/onnx/blob/main/onnx/onnx.proto
"""

from __future__ import annotations

import functools
import struct
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from weightspace.checkpoint import dtypes, limits
from weightspace.checkpoint.contents import Contents, Entry, Request
from weightspace.checkpoint.protobuf import Field, fields, signed, varint
from weightspace.checkpoint.source import Source
from weightspace.errors import CheckpointError, UnsafeCheckpointError

_TYPES: dict[int, torch.dtype] = {
    1: torch.float32,
    2: torch.uint8,
    3: torch.int8,
    4: torch.uint16,
    5: torch.int16,
    6: torch.int32,
    7: torch.int64,
    9: torch.bool,
    10: torch.float16,
    11: torch.float64,
    12: torch.uint32,
    13: torch.uint64,
    14: torch.complex64,
    15: torch.complex128,
    16: torch.bfloat16,
    17: torch.float8_e4m3fn,
    18: torch.float8_e4m3fnuz,
    19: torch.float8_e5m2,
    20: torch.float8_e5m2fnuz,
    21: torch.uint8,  # two unsigned 4-bit integers a byte, unpacked
    22: torch.int8,  # two signed 4-bit integers a byte, unpacked
    24: torch.float8_e8m0fnu,
}
_PACKED = (21, 22)
_STRING = 8
_MODEL_FIELDS = {1: 0, 2: 2, 3: 2, 4: 2, 5: 0, 6: 2, 7: 2, 8: 2, 14: 2, 20: 2, 25: 2, 26: 2}


def matches(source: Source) -> bool:
    """A protocol buffer whose fields, from the first to the last byte, are those of an ONNX model."""
    head = source.head(1)
    if head not in (b"\x08", b"\x12", b"\x1a", b"\x22", b"\x28", b"\x32", b"\x3a", b"\x42", b"\x72"):
        return False
    try:
        at, seen = 0, set[int]()
        for _ in range(10_000):
            if at >= source.size:
                break
            data = memoryview(source.read(at, min(32, source.size - at)))
            tag, used = varint(data, 0, len(data))
            number, wire = tag >> 3, tag & 7
            if _MODEL_FIELDS.get(number) != wire:
                return False
            value, used = varint(data, used, len(data))
            at += used + (value if wire == 2 else 0)
            seen.add(number)
            if number == 7:
                break  # a truncated graph is still ONNX, and says so when read
        return 7 in seen
    except CheckpointError:
        return False


@dataclass
class _Found:
    source: Source
    data: memoryview
    base: int = 0
    tensors: list[tuple[str, str, Entry]] = field(default_factory=list)  # name, place, entry
    findings: list[str] = field(default_factory=list)
    external: int = 0

    def text(self, part: Field) -> str:
        return bytes(self.data[part.start : part.end]).decode("utf-8", "replace")


def read(source: Source, request: Request) -> Contents:
    """Walk the model; tensors stay where they are."""
    data = memoryview(source.buffer(0, source.size))
    found = _Found(source, data)
    metadata: dict[str, Any] = {}
    opsets: dict[str, int] = {}
    texts = {2: "producer_name", 3: "producer_version", 4: "domain", 6: "doc_string"}
    try:
        for part in fields(data):
            if part.number in texts and part.wire == 2:
                metadata[texts[part.number]] = found.text(part)
            elif part.number == 1 and part.wire == 0:
                metadata["ir_version"] = part.value
            elif part.number == 5 and part.wire == 0:
                metadata["model_version"] = signed(part.value)
            elif part.number == 7 and part.wire == 2:
                metadata.update(_graph(found, part, "", 0))
            elif part.number == 8 and part.wire == 2:
                values = {p.number: p for p in fields(data, part.start, part.end)}
                opsets[found.text(values[1]) if 1 in values else ""] = values[2].value if 2 in values else 0
            elif part.number == 14 and part.wire == 2:
                values = {p.number: p for p in fields(data, part.start, part.end)}
                if 1 in values and 2 in values:
                    metadata.setdefault("properties", {})[found.text(values[1])] = found.text(values[2])
            elif part.number == 25 and part.wire == 2:
                _function(found, part)
            elif part.number == 20 and part.wire == 2:
                found.findings.append("training information was left out")
    except (IndexError, struct.error, ValueError, TypeError) as error:
        raise CheckpointError(f"{source.name}: the ONNX model is damaged ({error})"[:300]) from error
    except CheckpointError as error:
        message = str(error)
        if message.startswith(source.name):
            raise
        raise type(error)(f"{source.name}: the ONNX model is damaged or truncated ({message})") from error
    metadata["opsets"] = opsets
    if found.external:
        found.findings.append(f"{found.external} tensors lie in files beside the model")
    return Contents("onnx", _named(found), metadata, findings=found.findings)


def _named(found: _Found) -> dict[str, Entry]:
    tensors: dict[str, Entry] = {}
    plain: dict[str, int] = {}
    for name, _, _ in found.tensors:
        plain[name] = plain.get(name, 0) + 1
    for name, place, entry in found.tensors:
        full = name if plain[name] == 1 or not place else f"{place}/{name}"
        if full in tensors:
            raise CheckpointError(f"{found.source.name}: two tensors are called {full!r}; the model is invalid")
        tensors[full] = entry
    return tensors


def _graph(found: _Found, graph: Field, place: str, depth: int) -> dict[str, Any]:
    if depth > 32:
        raise UnsafeCheckpointError(f"{found.source.name}: graphs are nested deeper than 32 levels")
    about: dict[str, Any] = {"inputs": {}, "outputs": {}}
    initialisers: set[str] = set()
    nodes = 0
    for part in fields(found.data, graph.start, graph.end):
        if part.wire != 2:
            continue
        if part.number == 1:
            nodes += 1
            _node(found, part, place, depth)
        elif part.number == 2:
            about["graph"] = found.text(part)
        elif part.number == 5:
            initialisers.add(_tensor(found, part, place))
        elif part.number == 15:
            initialisers.add(_sparse(found, part, place))
        elif part.number in (11, 12):
            name, shape = _value_info(found, part)
            about["inputs" if part.number == 11 else "outputs"][name] = shape
    about["inputs"] = {k: v for k, v in about["inputs"].items() if k not in initialisers}
    about["nodes"] = nodes
    return about


def _function(found: _Found, function: Field) -> None:
    name = next((found.text(p) for p in fields(found.data, function.start, function.end) if p.number == 1), "")
    for part in fields(found.data, function.start, function.end):
        if part.number == 7 and part.wire == 2:
            _node(found, part, name, 1)


def _node(found: _Found, node: Field, place: str, depth: int) -> None:
    kind = name = output = ""
    attributes = []
    for part in fields(found.data, node.start, node.end):
        if part.wire != 2:
            continue
        if part.number == 2 and not output:
            output = found.text(part)
        elif part.number == 3:
            name = found.text(part)
        elif part.number == 4:
            kind = found.text(part)
        elif part.number == 5:
            attributes.append(part)
    for attribute in attributes:
        label = ""
        for part in fields(found.data, attribute.start, attribute.end):
            if part.number == 1 and part.wire == 2:
                label = found.text(part)
                break
        numbers: list[int | float] = []
        for part in fields(found.data, attribute.start, attribute.end):
            if part.wire == 2 and part.number in (6, 11):
                inner = f"{name or output or kind}/{label}"
                _graph(found, part, f"{place}/{inner}" if place else inner, depth + 1)
            elif kind == "Constant" and part.wire == 2 and part.number == 5 and label == "value":
                _tensor(found, part, place, output)
            elif kind == "Constant" and part.wire == 2 and part.number == 22:
                _sparse(found, part, place, output)
            elif kind == "Constant" and label in ("value_float", "value_int", "value_floats", "value_ints"):
                numbers += _numbers(found, part)
        if numbers or (kind == "Constant" and label in ("value_floats", "value_ints")):
            dtype = torch.float32 if "float" in label else torch.int64
            shape = (len(numbers),) if label.endswith("s") else ()
            if shape or len(numbers) == 1:
                entry = Entry(shape, dtype, functools.partial(_small, numbers, dtype, shape))
                found.tensors.append((output, place, entry))


def _small(numbers: list[int | float], dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
    return torch.tensor(numbers, dtype=dtype).reshape(shape)


def _numbers(found: _Found, part: Field) -> list[int | float]:
    raw = found.data[part.start : part.end]
    if part.number == 2 and part.wire == 5:
        return [struct.unpack("<f", raw)[0]]
    if part.number == 3 and part.wire == 0:
        return [signed(part.value)]
    if part.number == 7:
        return list(struct.unpack(f"<{len(raw) // 4}f", raw[: len(raw) // 4 * 4]))
    if part.number == 8:
        return [signed(v) for v in _varints(found, part)]
    return []


def _varints(found: _Found, part: Field) -> list[int]:
    if part.wire == 0:
        return [part.value]
    values, at = [], part.start
    while at < part.end:
        value, at = varint(found.data, at, part.end)
        values.append(value)
    return values


@dataclass
class _Proto:
    name: str = ""
    dims: tuple[int, ...] = ()
    kind: int = 0
    raw: tuple[int, int] | None = None
    typed: list[Field] = field(default_factory=list)
    location: dict[str, str] = field(default_factory=dict)
    is_external: bool = False


def _proto(found: _Found, tensor: Field) -> _Proto:
    proto = _Proto()
    dims: list[int] = []
    for part in fields(found.data, tensor.start, tensor.end):
        if part.number == 1:
            dims += [signed(v) for v in _varints(found, part)]
        elif part.number == 2 and part.wire == 0:
            proto.kind = part.value
        elif part.number in (4, 5, 7, 10, 11):
            proto.typed.append(part)
        elif part.number == 8 and part.wire == 2:
            proto.name = found.text(part)
        elif part.number == 9 and part.wire == 2:
            proto.raw = part.start, part.end - part.start
        elif part.number == 13 and part.wire == 2:
            pair = {p.number: found.text(p) for p in fields(found.data, part.start, part.end) if p.wire == 2}
            proto.location[pair.get(1, "")] = pair.get(2, "")
        elif part.number == 14 and part.wire == 0:
            proto.is_external = part.value == 1
    proto.dims = tuple(dims)
    return proto


def _tensor(found: _Found, tensor: Field, place: str, name: str | None = None) -> str:
    proto = _proto(found, tensor)
    name = proto.name if name is None else name
    if proto.kind == _STRING:
        found.findings.append(f"tensor {name} holds texts and was left out")
    else:
        found.tensors.append((name, place, _entry(found, proto, name)))
    return name


def _entry(found: _Found, proto: _Proto, name: str) -> Entry:
    what = f"{found.source.name}: tensor {name!r}"
    dtype = _TYPES.get(proto.kind)
    if dtype is None:
        raise CheckpointError(f"{what} has the element type {proto.kind}, which is not read")
    total = limits.count(proto.dims, what)
    needed = (total + 1) // 2 if proto.kind in _PACKED else total * dtype.itemsize
    if proto.is_external:
        found.external += 1
        source, start, length = _external(found, proto, what, needed)
    elif proto.raw is not None:
        source, (start, length) = found.source, proto.raw
    elif total == 0:
        source, start, length = found.source, 0, 0
    else:
        held = _typed_count(found, proto, what)
        if held != (total * 2 if dtype.is_complex else needed if proto.kind in _PACKED else total):
            raise UnsafeCheckpointError(f"{what} of shape {proto.dims} needs {total:,} numbers, {held:,} are there")
        return Entry(proto.dims, dtype, functools.partial(_load_typed, found, proto, dtype))
    if length != needed:
        raise UnsafeCheckpointError(
            f"{what} of shape {proto.dims} needs {needed:,} bytes, {length:,} are there: truncated or hostile"
        )
    return Entry(proto.dims, dtype, functools.partial(_load_raw, source, start, length, proto.kind, dtype, proto.dims))


def _external(found: _Found, proto: _Proto, what: str, needed: int) -> tuple[Source, int, int]:
    if found.source.folder is None:
        raise CheckpointError(f"{what} lies in {proto.location.get('location')!r}, which cannot be reached from here")
    numbers = [proto.location.get("offset", "0"), proto.location.get("length", str(needed))]
    if not all(n.isascii() and n.isdigit() and len(n) < 20 for n in numbers):
        raise CheckpointError(f"{what} lies at offset {numbers[0][:20]!r}, length {numbers[1][:20]!r}")
    source = found.source.folder.open(proto.location.get("location", ""))
    offset, length = map(int, numbers)
    source.check(offset, length, what)
    return source, offset, length


def _load_raw(
    source: Source, start: int, length: int, kind: int, dtype: torch.dtype, shape: tuple[int, ...]
) -> torch.Tensor:
    buffer = source.buffer(start, length)
    return _unpack(buffer, kind, shape) if kind in _PACKED else dtypes.to_tensor(buffer, dtype, shape)


def _unpack(buffer: bytearray | memoryview, kind: int, shape: tuple[int, ...]) -> torch.Tensor:
    raw = np.frombuffer(buffer, dtype=np.uint8)
    nibbles = np.stack([raw & 15, raw >> 4], axis=1).reshape(-1)[: int(np.prod(shape, dtype=np.int64))]
    if kind == 22:
        nibbles = ((nibbles.astype(np.int8) ^ 8) - 8).astype(np.int8)
    return torch.from_numpy(nibbles.copy()).reshape(shape)


def _typed_count(found: _Found, proto: _Proto, what: str) -> int:
    total = 0
    for part in proto.typed:
        if part.wire == 2 and part.number in (4, 10):
            total += (part.end - part.start) // (4 if part.number == 4 else 8)
        elif part.wire == 2:
            # Every number ends with a byte below 128.
            total += int(np.count_nonzero(np.frombuffer(found.data[part.start : part.end], dtype=np.uint8) < 128))
        else:
            total += 1
    return total


def _load_typed(found: _Found, proto: _Proto, dtype: torch.dtype) -> torch.Tensor:
    numbers: list[np.ndarray[Any, Any]] = []
    for part in proto.typed:
        raw = found.data[part.start : part.end]
        if part.number == 4:
            numbers.append(np.frombuffer(raw, dtype="<f4"))
        elif part.number == 10:
            numbers.append(np.frombuffer(raw, dtype="<f8"))
        else:
            numbers.append(np.array(_varints(found, part), dtype=np.uint64))
    flat = np.concatenate(numbers)
    if dtype.is_complex:
        return dtypes.to_tensor(bytearray(flat.tobytes()), dtype, proto.dims)
    if proto.kind in _PACKED:
        return _unpack(bytearray(flat.astype(np.uint8).tobytes()), proto.kind, proto.dims)
    if flat.dtype == np.uint64 and dtype.itemsize < 8:
        # Small types are kept in 32-bit numbers: integers by value, floats by their bits.
        width = {1: np.uint8, 2: np.uint16, 4: np.uint32}[dtype.itemsize]
        flat = (flat & np.uint64((1 << 8 * dtype.itemsize) - 1)).astype(width)
    return dtypes.to_tensor(bytearray(flat.tobytes()), dtype, proto.dims)


def _sparse(found: _Found, sparse: Field, place: str, name: str | None = None) -> str:
    values = indices = None
    dims: list[int] = []
    for part in fields(found.data, sparse.start, sparse.end):
        if part.number == 1 and part.wire == 2:
            values = _proto(found, part)
        elif part.number == 2 and part.wire == 2:
            indices = _proto(found, part)
        elif part.number == 3:
            dims += [signed(v) for v in _varints(found, part)]
    if values is None or indices is None:
        raise CheckpointError(f"{found.source.name}: a sparse tensor without values or indices")
    name = values.name if name is None else name
    value, index, shape = _entry(found, values, name), _entry(found, indices, f"{name} (indices)"), tuple(dims)
    what = f"{found.source.name}: tensor {name!r}"
    limits.check_expansion(limits.count(shape, what) * value.dtype.itemsize, value.nbytes + index.nbytes, what)
    found.tensors.append((name, place, Entry(shape, value.dtype, functools.partial(_dense, what, value, index, shape))))
    return name


def _dense(what: str, value: Entry, index: Entry, shape: tuple[int, ...]) -> torch.Tensor:
    values, indices = value.load().reshape(-1), index.load()
    dense = torch.zeros(shape, dtype=values.dtype)
    if indices.ndim == 2:
        steps = torch.tensor([int(np.prod(shape[i + 1 :], dtype=np.int64)) for i in range(len(shape))])
        if indices.shape[1] != len(shape):
            raise CheckpointError(f"{what}: sparse indices of {indices.shape[1]} axes for {len(shape)}")
        indices = (indices * steps).sum(1)
    if len(indices) != len(values) or (
        len(indices) and not 0 <= int(indices.min()) <= int(indices.max()) < dense.numel()
    ):
        raise CheckpointError(f"{what}: sparse indices lie outside the tensor")
    dense.view(-1)[indices] = values
    return dense


def _value_info(found: _Found, info: Field) -> tuple[str, list[int | str] | None]:
    name, shape = "", None
    for part in fields(found.data, info.start, info.end):
        if part.number == 1 and part.wire == 2:
            name = found.text(part)
        elif part.number == 2 and part.wire == 2:
            for tensor_type in fields(found.data, part.start, part.end):
                if tensor_type.number == 1 and tensor_type.wire == 2:
                    shape = _type_shape(found, tensor_type)
    return name, shape


def _type_shape(found: _Found, tensor_type: Field) -> list[int | str] | None:
    for part in fields(found.data, tensor_type.start, tensor_type.end):
        if part.number == 2 and part.wire == 2:
            sizes: list[int | str] = []
            for dim in fields(found.data, part.start, part.end):
                size: int | str = "?"
                for value in fields(found.data, dim.start, dim.end) if dim.wire == 2 else ():
                    size = signed(value.value) if value.number == 1 and value.wire == 0 else found.text(value)
                sizes.append(size)
            return sizes
    return None
