"""A network's file: safetensors with its record as JSON in the metadata, whole or not there at all."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from weightspace.card import RECORD_KEY


def save_network(tensors: Mapping[str, Tensor], record: Mapping[str, Any], path: Path) -> None:
    """Write a network and its record under a temporary name, then rename."""
    from safetensors.torch import save

    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    data = save(
        {name: value.contiguous() for name, value in tensors.items()},
        metadata={"format": "pt", RECORD_KEY: json.dumps(record)},
    )
    try:
        with temporary.open("wb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def read_record(path: Path) -> dict[str, Any]:
    """The record inside a network's file; empty when there is no such file, or no record in it."""
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        return {}
    try:
        with safe_open(path, framework="pt") as stored:
            record = json.loads((stored.metadata() or {}).get(RECORD_KEY, "{}"))
    except (SafetensorError, OSError, ValueError):
        return {}
    return record if isinstance(record, dict) else {}


__all__ = ["read_record", "save_network"]
