"""What a reader hands over: named tensors that load on access, and everything else the file says."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch

from weightspace.checkpoint.limits import count
from weightspace.checkpoint.source import Source
from weightspace.errors import CheckpointError


@dataclass(frozen=True)
class Entry:
    """One tensor that is not loaded yet.

    ``part``: elements ``start`` to ``stop`` of the flattened tensor, where the file stores them plainly, so that a
    huge tensor can be read in pieces.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    load: Callable[[], torch.Tensor]
    part: Callable[[int, int], torch.Tensor] | None = None

    @property
    def numel(self) -> int:
        return count(self.shape, "a tensor")

    @property
    def nbytes(self) -> int:
        return self.numel * self.dtype.itemsize


@dataclass
class Contents:
    """Everything a reader found in one model file."""

    format: str
    tensors: dict[str, Entry]
    metadata: dict[str, Any] = field(default_factory=dict)
    config: dict[str, Any] | None = None
    findings: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Request:
    """How the caller wants a file to be read.

    ``member``: which model, where a file holds several. ``key``: which part of a pickle, a dotted path.
    ``depth``: how many archives were opened on the way here.
    """

    member: str | None = None
    key: str | None = None
    depth: int = 0

    def inside(self, member: str | None = None) -> Request:
        """The request for a file inside the current one."""
        return replace(self, member=member, depth=self.depth + 1)


class Reader(Protocol):
    """One format. A module with these two functions is a reader."""

    def matches(self, source: Source) -> bool:
        """Whether the first bytes (not the name) are this format's; cheap, raises nothing."""
        ...

    def read(self, source: Source, request: Request) -> Contents:
        """Read names, shapes and metadata; leave the tensors' bytes where they are."""
        ...


class SeveralModelsError(CheckpointError):
    """A file holds several models and none was chosen; ``members`` lists their names."""

    def __init__(self, where: str, members: list[str]) -> None:
        shown = members if len(members) <= 12 else [*members[:10], f"... and {len(members) - 10} more"]
        listing = "\n".join(f"  {name}" for name in shown)
        super().__init__(
            f"{where} holds {len(members)} models; choose one, e.g. "
            f"ws.open({where!r}, member={members[0]!r}) or ws.open({where + '!' + members[0]!r}):\n{listing}"
        )
        self.members = tuple(members)
