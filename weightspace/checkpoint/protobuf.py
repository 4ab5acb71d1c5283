"""Protocol buffers on the wire, walked without copying: https://protobuf.dev/programming-guides/encoding/."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from weightspace.errors import CheckpointError


@dataclass(frozen=True)
class Field:
    """One field: its number, its wire type, a number or the span of its bytes in the buffer."""

    number: int
    wire: int
    value: int
    start: int
    end: int


def fields(data: memoryview, start: int = 0, end: int | None = None) -> Iterator[Field]:
    """The fields of the message in ``data[start:end]``; raises where they do not fit."""
    end = len(data) if end is None else end
    at = start
    while at < end:
        tag, at = varint(data, at, end)
        number, wire = tag >> 3, tag & 7
        if number == 0:
            raise CheckpointError(f"byte {at:,}: a field without a number")
        if wire == 0:
            value, at = varint(data, at, end)
            yield Field(number, wire, value, at, at)
        elif wire == 2:
            length, at = varint(data, at, end)
            if at + length > end:
                raise CheckpointError(f"byte {at:,}: a field of {length:,} bytes reaches past its message's end")
            yield Field(number, wire, length, at, at + length)
            at += length
        elif wire in (1, 5):
            length = 8 if wire == 1 else 4
            if at + length > end:
                raise CheckpointError(f"byte {at:,}: a number reaches past its message's end")
            yield Field(number, wire, int.from_bytes(data[at : at + length], "little"), at, at + length)
            at += length
        else:
            raise CheckpointError(f"byte {at:,}: unknown wire type {wire}")


def varint(data: memoryview, at: int, end: int) -> tuple[int, int]:
    """A variable-length number and where it ends."""
    value = shift = 0
    while at < end:
        byte = data[at]
        at += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value & (1 << 64) - 1, at
        shift += 7
        if shift > 63:
            raise CheckpointError(f"byte {at:,}: a number of more than ten bytes")
    raise CheckpointError(f"byte {at:,}: a number is cut off")


def signed(value: int) -> int:
    """A 64-bit number as the signed one it stands for."""
    return value - (1 << 64) if value >= 1 << 63 else value
