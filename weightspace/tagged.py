"""What the safetensors files that weightspace writes say of themselves: JSON under one key of their header."""

from __future__ import annotations

import json
from typing import Any

KEY = "weightspace"
"""Entry of the header's metadata."""


def facts_in(data: bytes, default: str | None = None) -> Any:
    """What a file of these bytes says of itself; ``default`` is the JSON taken where it says nothing.

    For bytes that safetensors itself has already loaded: it has checked the header's size. Raises ``KeyError`` where
    there are no facts and no default, ``ValueError`` where they are no JSON.
    """
    metadata = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")]).get("__metadata__", {})
    return json.loads(metadata[KEY] if default is None else metadata.get(KEY, default))


def facts_of(data: bytes, form: str, version: int) -> dict[str, Any]:
    """The same of a file whose facts name its ``format`` and ``version``. Raises ``ValueError`` for others."""
    facts: dict[str, Any] = facts_in(data)
    if (facts["format"], facts["version"]) != (form, version):
        raise ValueError(f"format {facts['format']!r}, version {facts['version']!r}")
    return facts


__all__ = ["KEY", "facts_in", "facts_of"]
