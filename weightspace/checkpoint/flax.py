"""Flax checkpoints: msgpack maps with arrays as extension values, read in place without any package.

Names are joined by ``/``: ``Dense_0/kernel``. A train state's ``params`` are the model, its optimiser
state is counted beside it. Format: https://github.com/msgpack/msgpack/blob/master/spec.md and
``flax.serialization`` (extension 1: array, 2: complex number, 3: scalar array).
"""

from __future__ import annotations

import struct
from typing import Any

from weightspace.checkpoint import dtypes, limits
from weightspace.checkpoint.choose import MODEL_KEYS, choose
from weightspace.checkpoint.contents import Contents, Request
from weightspace.checkpoint.pickles import ArrayRef, StorageRef, TensorRef, _Dtype
from weightspace.checkpoint.pytorch import entries
from weightspace.checkpoint.source import Source
from weightspace.errors import CheckpointError, UnsafeCheckpointError

_FIXED = {0xCA: ">f", 0xCB: ">d", 0xCC: ">B", 0xCD: ">H", 0xCE: ">I", 0xCF: ">Q"}
_FIXED |= {0xD0: ">b", 0xD1: ">h", 0xD2: ">i", 0xD3: ">q"}
_SPECIAL = {"bfloat16": "bfloat16", "float8_e4m3fn": "float8_e4m3fn", "float8_e5m2": "float8_e5m2"}


def matches(source: Source) -> bool:
    """A msgpack map whose first key is a text."""
    head = source.head(64)
    if not head:
        return False
    if 0x81 <= head[0] <= 0x8F:
        at = 1
    elif head[0] == 0xDE:
        at = 3
    elif head[0] == 0xDF:
        at = 5
    else:
        return False
    key = head[at : at + 1]
    if not key or not (0xA1 <= key[0] <= 0xBF or key[0] == 0xD9):
        return False
    begin = at + (1 if key[0] != 0xD9 else 2)
    length = key[0] & 31 if key[0] != 0xD9 else head[at + 1] if len(head) > at + 1 else 0
    return length > 0 and head[begin : min(begin + length, 60)].isascii() and begin + length < source.size


class _Message:
    def __init__(self, source: Source) -> None:
        self.source, self.at, self.left = source, 0, limits.MAX_OPCODES
        self.arrays: dict[str, tuple[int, int]] = {}  # where the bytes of each array are
        self._block, self._start = b"", 0

    def take(self, length: int) -> bytes:
        begin = self.at - self._start
        if not 0 <= begin <= begin + length <= len(self._block):
            self.source.check(self.at, length, "a value")
            self._start, begin = self.at, 0
            self._block = self.source.read(self.at, min(max(length, 1 << 16), self.source.size - self.at))
        self.at += length
        return self._block[begin : begin + length]

    def number(self, form: str) -> Any:
        return struct.unpack(form, self.take(struct.calcsize(form)))[0]

    def skip(self, length: int) -> tuple[int, int]:
        self.source.check(self.at, length, "an array")
        span = self.at, length
        self.at += length
        return span

    def value(self, depth: int = 0) -> Any:
        self.left -= 1
        if self.left < 0 or depth > limits.MAX_DEPTH:
            raise UnsafeCheckpointError(f"{self.source.name}: more values or deeper maps than any checkpoint has")
        code = self.take(1)[0]
        if code < 0x80:
            return code
        if code >= 0xE0:
            return code - 256
        if code in _FIXED:
            return self.number(_FIXED[code])
        if code in (0xC0, 0xC2, 0xC3):
            return {0xC0: None, 0xC2: False, 0xC3: True}[code]
        if code < 0x90 or code in (0xDE, 0xDF):
            return self.table(code & 15 if code < 0x90 else self.number(">H" if code == 0xDE else ">I"), depth)
        if code < 0xA0 or code in (0xDC, 0xDD):
            length = code & 15 if code < 0xA0 else self.number(">H" if code == 0xDC else ">I")
            self.source.check(self.at, length, "a list")
            return [self.value(depth + 1) for _ in range(length)]
        if code < 0xC0 or code in (0xD9, 0xDA, 0xDB):
            length = code & 31 if code < 0xC0 else self.number({0xD9: ">B", 0xDA: ">H", 0xDB: ">I"}[code])
            return self.take(length).decode("utf-8", "replace")
        if code in (0xC4, 0xC5, 0xC6):
            return self.skip(self.number({0xC4: ">B", 0xC5: ">H", 0xC6: ">I"}[code]))
        if code in (0xC7, 0xC8, 0xC9):
            length = self.number({0xC7: ">B", 0xC8: ">H", 0xC9: ">I"}[code])
        elif 0xD4 <= code <= 0xD8:
            length = 1 << (code - 0xD4)
        else:
            raise CheckpointError(f"{self.source.name}: byte {self.at - 1:,} is no msgpack value")
        return self.extension(self.number(">b"), length, depth)

    def table(self, length: int, depth: int) -> dict[str, Any]:
        self.source.check(self.at, 2 * length, "a map")
        result: dict[str, Any] = {}
        for _ in range(length):
            key = self.value(depth + 1)
            if not isinstance(key, str | int):
                raise CheckpointError(f"{self.source.name}: a map has a key that is no text")
            if str(key) in result:
                raise UnsafeCheckpointError(f"{self.source.name}: a map has the key {str(key)[:80]!r} twice")
            result[str(key)] = self.value(depth + 1)
        if "__msgpack_chunked_array__" in result:
            raise CheckpointError(
                f"{self.source.name}: an array over 1 GB is kept in pieces, which is not read; save it as safetensors"
            )
        return result

    def extension(self, kind: int, length: int, depth: int) -> Any:
        end = self.at + length
        self.source.check(self.at, length, "an extension value")
        if kind not in (1, 3):
            self.at = end
            return f"<extension {kind}>"
        parts = self.value(depth + 1)
        if not isinstance(parts, list) or len(parts) != 3 or self.at != end or not isinstance(parts[0], list):
            raise CheckpointError(f"{self.source.name}: an array before byte {end:,} is damaged")
        shape, name, span = parts
        name = name if isinstance(name, str) else ""
        if not isinstance(span, tuple) or not all(type(n) is int for n in shape):
            raise CheckpointError(f"{self.source.name}: an array before byte {end:,} has no shape or no bytes")
        return self.array(tuple(shape), name, *span)

    def array(self, shape: tuple[int, ...], name: str, start: int, length: int) -> Any:
        what = f"{self.source.name}: an array at byte {start:,}"
        plain = dtypes.numpy_dtype(name)
        dtype = dtypes.TORCH_NAMES[_SPECIAL[name]] if name in _SPECIAL else plain and dtypes.from_numpy(plain)
        if dtype is None:
            if length > 1 << 20:
                raise CheckpointError(f"{what} has elements of type {name[:40]!r}, which is no tensor")
            return ArrayRef(_Dtype(name[:40]), shape, b"")
        if limits.count(shape, what) * dtype.itemsize != length:
            raise UnsafeCheckpointError(f"{what} of {name} {shape} does not fit its {length:,} bytes")
        stride, step = [], 1
        for size in reversed(shape):
            stride.append(step)
            step *= max(size, 1)
        key = f"{start}"
        self.arrays[key] = start, length
        storage = StorageRef(key, dtype, length // dtype.itemsize)
        return TensorRef(storage, 0, shape, tuple(reversed(stride)), dtype)


def read(source: Source, request: Request) -> Contents:
    """Read the map; arrays are mapped on access."""
    message = _Message(source)
    try:
        value = message.value()
    except (struct.error, ValueError, TypeError, OverflowError) as error:
        raise CheckpointError(f"{source.name}: the msgpack data is damaged ({error})"[:300]) from error
    if message.at != source.size:
        raise CheckpointError(f"{source.name}: {source.size - message.at:,} bytes follow the data; it is no checkpoint")
    if not message.arrays:
        raise CheckpointError(f"{source.name}: msgpack data without arrays; it is no Flax checkpoint")

    def fetch(storage: StorageRef, first: int, count: int) -> bytearray | memoryview:
        size = storage.dtype.itemsize
        return source.buffer(message.arrays[storage.key][0] + first * size, count * size)

    def check(storage: StorageRef) -> int:
        return message.arrays[storage.key][1] // storage.dtype.itemsize

    choice = choose(value, request.key, separator="/", through=(*MODEL_KEYS, "target"))
    tensors = entries(source, choice, fetch, check)
    return Contents("flax-msgpack", tensors, choice.metadata, choice.config, choice.findings)
