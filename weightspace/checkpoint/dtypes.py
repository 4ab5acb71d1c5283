"""Element types as the formats call them, and raw bytes as tensors."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
import torch

from weightspace.errors import CheckpointError

SAFETENSORS: dict[str, torch.dtype] = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "U16": torch.uint16,
    "I16": torch.int16,
    "U32": torch.uint32,
    "I32": torch.int32,
    "U64": torch.uint64,
    "I64": torch.int64,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
    "C64": torch.complex64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "F8_E8M0": torch.float8_e8m0fnu,
}

STORAGES: dict[str, torch.dtype] = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
    "ComplexDoubleStorage": torch.complex128,
    "ComplexFloatStorage": torch.complex64,
    "QInt8Storage": torch.qint8,
    "QUInt8Storage": torch.quint8,
    "QInt32Storage": torch.qint32,
    "UntypedStorage": torch.uint8,
}

_NUMPY: dict[str, torch.dtype] = {
    "b1": torch.bool,
    "u1": torch.uint8,
    "i1": torch.int8,
    "u2": torch.uint16,
    "i2": torch.int16,
    "u4": torch.uint32,
    "i4": torch.int32,
    "u8": torch.uint64,
    "i8": torch.int64,
    "f2": torch.float16,
    "f4": torch.float32,
    "f8": torch.float64,
    "c8": torch.complex64,
    "c16": torch.complex128,
}

TORCH_NAMES: dict[str, torch.dtype] = {
    name: value for name, value in vars(torch).items() if isinstance(value, torch.dtype)
}


def from_numpy(dtype: np.dtype[Any]) -> torch.dtype | None:
    """The torch type of a numpy type, in either byte order; None for strings, records and objects."""
    if dtype.hasobject or dtype.fields is not None or dtype.subdtype is not None:
        return None
    return _NUMPY.get(f"{dtype.kind}{dtype.itemsize}")


def numpy_dtype(text: str) -> np.dtype[Any] | None:
    """A numpy type from its short name (``f4``, ``<i8``, ``|b1``, ``float32``); None if it is not numeric."""
    if len(text) > 16 or not text.isascii():
        return None
    try:
        dtype = np.dtype(text)
    except (TypeError, ValueError, SyntaxError):
        return None
    return dtype if from_numpy(dtype) is not None else None


def to_tensor(
    buffer: bytearray | memoryview,
    dtype: torch.dtype,
    shape: tuple[int, ...],
    *,
    big_endian: bool = False,
    fortran: bool = False,
) -> torch.Tensor:
    """Raw elements as a tensor that shares (or, where it must, copies) ``buffer``."""
    view = memoryview(buffer)
    if view.nbytes == 0:
        return torch.empty(shape, dtype=dtype)
    size = dtype.itemsize
    if view.nbytes % size:
        raise CheckpointError(f"{view.nbytes} bytes are no whole number of {dtype} elements of {size} bytes")
    unit = size // 2 if dtype.is_complex else size
    if unit > 1 and big_endian != (sys.byteorder == "big"):
        swapped = np.frombuffer(view, dtype=np.uint8).reshape(-1, unit)[:, ::-1]
        view = memoryview(bytearray(swapped.tobytes()))
    flat = torch.frombuffer(view, dtype=torch.uint8)
    if dtype == torch.bool:
        typed = flat != 0
    else:
        if flat.data_ptr() % size:
            flat = flat.clone()
        typed = flat.view(dtype)
    if fortran and len(shape) > 1:
        return typed.reshape(shape[::-1]).permute(*reversed(range(len(shape))))
    return typed.reshape(shape)
