"""Running a wiring's program on real inputs, batch by batch, with a look at every operation."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from weightspace.errors import WiringError
from weightspace.wiring.program import Program
from weightspace.wiring.trace import plain_kernels
from weightspace.wiring.wiring import Wiring

Inputs = torch.Tensor | tuple[Any, ...] | Sequence[Any]
"""A tensor, a tuple of a program's arguments, or a list of either (one per batch)."""


# Whether a constant is detached on its way depends on who else holds it, so this is no step.
UNCOUNTED = "detach"


def name_of(func: Any) -> str:
    """The name of an aten operation, without its overload."""
    return str(func.overloadpacket.__name__) if hasattr(func, "overloadpacket") else str(func)


class Watcher(TorchDispatchMode):
    """Runs operations for real and shows each, with its results, to ``seen``; a subclass may put other results."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.step = -1

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = name_of(func)
        self.step += name != UNCOUNTED
        out = self.instead(name, func, args, kwargs)
        if out is None:
            out = func(*args, **kwargs)
        self.seen(name, func, args, kwargs, out)
        return out

    def instead(self, name: str, func: Any, args: Any, kwargs: Any) -> Any:
        """Results to put in place of the operation's own; None to let it run."""
        return None

    def seen(self, name: str, func: Any, args: Any, kwargs: Any, out: Any) -> None:
        """One operation and its results."""


def program_of(wiring: Wiring) -> Program:
    """The program of a wiring; raises ``WiringError`` where it has none."""
    if wiring.program is None:
        raise WiringError(
            f"the wiring ({wiring.origin}) has no network to run, so inputs cannot be sent through it; wire a module "
            "with example inputs, or a file whose family the catalogue knows"
        )
    return wiring.program


def prepared(wiring: Wiring, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The program's tensors in float32 and each in memory of its own (tied ones stay one tensor).

    Raises ``WiringError`` for one that is missing or of another shape.
    """
    program = program_of(wiring)
    missing = [n for n in program.tensors if n not in tensors]
    if missing:
        raise WiringError(
            f"tensor {missing[0]!r} is not among the {len(tensors)} given ({len(missing)} are missing); the network "
            f"({wiring.origin}) cannot run without it; pass all tensors of the network"
        )
    twins: dict[int, torch.Tensor] = {}
    out = {}
    for name, own in program.tensors.items():
        given = tensors[name]
        if given.shape != own.shape:
            raise WiringError(f"tensor {name!r} has shape {tuple(given.shape)}, the network expects {tuple(own.shape)}")
        if id(own) not in twins:
            dtype = torch.float32 if given.is_floating_point() else given.dtype
            twins[id(own)] = given.detach().to(dtype, copy=True).contiguous()
        out[name] = twins[id(own)]
    return out


def batches(inputs: Inputs, batch: int | None) -> Iterator[tuple[Any, ...]]:
    """Arguments for one run after the other: at most ``batch`` examples each (None: all that are given at once).

    The first dim of every input tensor is that of examples; a tensor whose first dim is of another size goes into
    every run whole.
    """
    if isinstance(inputs, torch.Tensor):
        inputs = (inputs,)
    if not isinstance(inputs, tuple):
        for item in inputs:
            yield from batches(item, batch)
        return
    count = next((x.shape[0] for x in inputs if isinstance(x, torch.Tensor) and x.dim()), None)
    if batch is None or count is None or count <= batch:
        yield inputs
        return
    for start in range(0, count, batch):
        yield tuple(
            x[start : start + batch] if isinstance(x, torch.Tensor) and x.dim() and x.shape[0] == count else x
            for x in inputs
        )


def as_float32(args: Sequence[Any]) -> tuple[Any, ...]:
    """Floating-point tensors in float32, everything else as it is."""
    return tuple(
        x.detach().to(torch.float32) if isinstance(x, torch.Tensor) and x.is_floating_point() else x for x in args
    )


def replay(program: Program, tensors: Mapping[str, torch.Tensor], args: Sequence[Any], watcher: Watcher) -> Any:
    """One run under a watcher, without gradients, with the random state put back; returns the outputs."""
    watcher.step = -1
    args = as_float32(args)
    state = torch.get_rng_state()
    try:
        with torch.no_grad(), plain_kernels(), watcher:
            torch.manual_seed(0)
            return program.run(dict(tensors), *args, **dict(program.kwargs))
    finally:
        torch.set_rng_state(state)


def tensors_in(*trees: Any) -> list[torch.Tensor]:
    """The tensors among arguments, in order."""
    return [x for x in tree_leaves(trees) if isinstance(x, torch.Tensor)]


__all__ = [
    "UNCOUNTED", "Inputs", "Watcher", "as_float32", "batches", "name_of", "prepared", "program_of", "replay",
    "tensors_in",
]  # fmt: skip
