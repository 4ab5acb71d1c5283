"""A network's file: safetensors with its record as JSON in the metadata, whole or not there at all."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from weightspace.card import RECORD_KEY
from weightspace.paths import write_whole


def save_network(tensors: Mapping[str, Tensor], record: Mapping[str, Any], path: Path) -> None:
    """Write a network and its record, whole or not at all."""
    from safetensors.torch import save

    data = save(
        {name: value.contiguous() for name, value in tensors.items()},
        metadata={"format": "pt", RECORD_KEY: json.dumps(record)},
    )
    write_whole(path, data)


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
