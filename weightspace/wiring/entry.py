"""``ws.wiring(x)``: the one way in, whatever ``x`` is."""

from __future__ import annotations

from typing import Any

from torch import nn

from weightspace.errors import WiringError
from weightspace.wiring.program import Program
from weightspace.wiring.wiring import Wiring


def wiring(x: Any, *args: Any, prove: bool = True, seed: int = 0, **kwargs: Any) -> Wiring:
    """Find the wiring of a network and prove it by running.

    ``x`` is an ``nn.Module`` (followed by example inputs, or none where shapes tell), a ``Program``, a
    ``Checkpoint``, a path or URL of a checkpoint, or a transformers config.
    A wiring that cannot be run is returned with ``status="unverified"``; see ``Wiring.status``.

    Raises ``WiringError`` where nothing can be wired.
    """
    if isinstance(x, Program):
        return from_program(x, prove=prove, seed=seed)
    if isinstance(x, nn.Module):
        from weightspace.wiring.module import program_from_module

        return from_program(program_from_module(x, args, kwargs), prove=prove, seed=seed)
    raise WiringError(f"cannot wire a {type(x).__name__}")


def from_program(program: Program, *, prove: bool = True, seed: int = 0) -> Wiring:
    """Trace a program, resolve its axes, and prove the result."""
    from weightspace.wiring.proof import prove as run_proof
    from weightspace.wiring.resolve import resolve
    from weightspace.wiring.trace import trace

    found = resolve(trace(program), program)
    return run_proof(found, seed) if prove else found
