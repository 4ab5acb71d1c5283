"""Writing safetensors and ``.pt``, whole or not at all."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import torch

from weightspace.checkpoint.dtypes import SAFETENSORS
from weightspace.errors import CheckpointError
from weightspace.paths import write_whole

if TYPE_CHECKING:
    from weightspace.checkpoint.checkpoint import Checkpoint

_NAMES = {dtype: name for name, dtype in SAFETENSORS.items()}
_LONGEST_METADATA = 1 << 20


def save(checkpoint: Checkpoint, path: Path) -> Path:
    """Write ``checkpoint`` to ``path`` in the format of its suffix."""
    writers: dict[str, Callable[[Checkpoint, BinaryIO], None]] = {
        ".safetensors": _safetensors,
        ".pt": _torch,
        ".pth": _torch,
    }
    write = writers.get(path.suffix)
    if write is None:
        raise CheckpointError(f"{path}: the suffix {path.suffix!r} is none of {', '.join(writers)}; use one of them")
    if not path.parent.is_dir():
        raise CheckpointError(f"{path}: the folder {path.parent} is not there; make it first")
    return write_whole(path, lambda file: write(checkpoint, file))


def _safetensors(checkpoint: Checkpoint, file: BinaryIO) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt", **_texts(checkpoint)}}
    at = 0
    for name in checkpoint:
        dtype, shape = checkpoint.dtype(name), checkpoint.shape(name)
        if dtype not in _NAMES:
            raise CheckpointError(f"safetensors cannot hold {dtype} ({name!r}); save as .pt instead")
        if name == "__metadata__":
            raise CheckpointError("safetensors cannot hold a tensor called '__metadata__'; rename it or save as .pt")
        size = dtype.itemsize
        for length in shape:
            size *= length
        header[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    file.write(len(text).to_bytes(8, "little") + text)
    for name in checkpoint:
        tensor = checkpoint[name].contiguous().reshape(-1)
        if tensor.numel():
            file.write(tensor.view(torch.uint8).numpy().data)


def _torch(checkpoint: Checkpoint, file: BinaryIO) -> None:
    # Contiguous copies: a slice would otherwise drag its whole storage along.
    torch.save({name: checkpoint[name].contiguous() for name in checkpoint}, file)


def _texts(checkpoint: Checkpoint) -> dict[str, str]:
    texts: dict[str, str] = {}
    for key, value in checkpoint.metadata.items():
        try:
            text = value if isinstance(value, str) else json.dumps(value)
        except (TypeError, ValueError):
            continue
        if len(text) <= _LONGEST_METADATA:
            texts[key] = text
    return texts
