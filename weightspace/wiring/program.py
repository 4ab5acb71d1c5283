"""A network as a pure function of its named tensors: what is traced, and what a proof runs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch


@dataclass(frozen=True)
class Program:
    """A network as a pure function of its named tensors.

    ``run(tensors, *args, **kwargs)`` returns a pytree of tensors and leaves ``tensors`` as they were.
    ``tensors`` holds parameters and persistent buffers under the names of the checkpoint;
    ``args`` and ``kwargs`` are example inputs (small: a batch of 2).
    """

    tensors: Mapping[str, torch.Tensor]
    run: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    origin: str = "module"
    notes: tuple[str, ...] = ()

    def __repr__(self) -> str:
        count = sum(t.numel() for t in self.tensors.values())
        return f"Program({self.origin}, {len(self.tensors)} tensors, {count:,} parameters)"
