"""What the command ``weightspace align`` does, without the printing."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from weightspace.align.alignment import Alignment
from weightspace.align.entry import align
from weightspace.align.methods import method_of
from weightspace.checkpoint import Checkpoint
from weightspace.checkpoint import open as open_checkpoint
from weightspace.errors import AlignmentError

SUFFIXES = (".safetensors", ".pt", ".pth")


def align_files(
    a: str, b: str, out: Path | None, *, method: str = "weight-matching", seed: int = 0, unverified: bool = False,
    inputs: Path | None = None, options: Mapping[str, Any] | None = None,
) -> Alignment:  # fmt: skip
    """Aligns file ``b`` to file ``a`` and writes the moved b to ``out``; nothing is written where anything fails.

    ``inputs``: a file with the example inputs, as tensors in the order of the network's arguments.
    """
    method_of(method)
    if out is not None and out.suffix not in SUFFIXES:
        raise AlignmentError(f"{out}: cannot write {out.suffix or 'a file without suffix'}; use {', '.join(SUFFIXES)}")
    given: Tensor | tuple[Tensor, ...] | None = None
    if inputs is not None:
        held = open_checkpoint(inputs)
        given = tuple(held[name] for name in held)
    found = align(_open(a), _open(b), method, inputs=given, seed=seed, unverified=unverified, **(options or {}))
    if out is not None:
        found.aligned.save(out)
    return found


def rows(found: Alignment) -> list[tuple[str, str, str, str]]:
    """Per factor: name, size, what it is fibred over, share moved."""
    factors = found.wiring.factors
    return [
        (name, f"{factors[name].size:,}", ", ".join(factors[name].over), f"{share:.1%}")
        for name, share in found.moved.items()
    ]


def _open(file: str) -> Checkpoint:
    if Path(file).exists() or "!" not in file:
        return open_checkpoint(file)
    path, _, member = file.partition("!")
    return open_checkpoint(path, member=member)
