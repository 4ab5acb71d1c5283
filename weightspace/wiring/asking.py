"""Putting many inputs to a network at once, by the program that its wiring was proved with."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from weightspace.errors import WiringError
from weightspace.wiring.program import Program
from weightspace.wiring.proof import run
from weightspace.wiring.replay import program_of
from weightspace.wiring.wiring import Wiring


def complete(wiring: Wiring, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors that a wiring's program runs on: these, tied ones under all names, and counters of the example's.

    Raises ``WiringError`` where there is no program, and where a weight is missing.
    """
    program = program_of(wiring)
    found: dict[str, Tensor] = {}
    twins = {id(own): name for name, own in program.tensors.items() if name in tensors}
    for name, own in program.tensors.items():
        held = name if name in tensors else twins.get(id(own))
        if held is not None:
            found[name] = tensors[held]
        elif not own.is_floating_point() or name in wiring.untouched:
            found[name] = own
        else:
            raise WiringError(
                f"the network ({program.origin}) runs with a tensor {name!r}, which is not among the {len(tensors)} "
                "given; pass all tensors of the network"
            )
    return found


def ask(
    program: Program, tensors: Mapping[str, Tensor], total: int, draw: Callable[[Tensor], Tensor], dtype: torch.dtype
) -> Tensor:
    """What a network gives for ``total`` inputs, its first output with ``total`` times so many rows.

    ``draw`` makes ``(total, …)`` inputs in the place of each example input ``(count, …)`` whose first axis is that of
    examples; masks are repeated, and anything else is handed over as it is. A program that is bound to the number of
    examples that it was traced with is run on so many at a time.

    Raises ``WiringError`` for a network that takes no tensor, that fails on the inputs, or that does not answer each.
    """
    given = (tuple(program.args), dict(program.kwargs))
    count = next((x.shape[0] for x in tree_leaves(given) if isinstance(x, Tensor) and x.dim()), 0)
    if not count:
        raise WiringError(f"the network ({program.origin}) takes no tensor that anything could be put into")

    def inputs(x: Any) -> Any:
        if not (isinstance(x, Tensor) and x.dim() and x.shape[0] == count):
            return x
        if x.dtype == torch.bool:
            return x.repeat(-(-total // count), *[1] * (x.dim() - 1))[:total]
        return draw(x)

    def once(which: Tensor) -> Tensor:
        def some(x: Any) -> Any:
            return x[which] if isinstance(x, Tensor) and x.dim() and x.shape[0] == total else x

        args, kwargs = tree_map(some, asked)
        return run(replace(program, args=args, kwargs=kwargs), tensors, dtype)[0]

    def piece(at: int) -> Tensor:
        """The answers to the questions from ``at`` on, of a run of ``count``."""
        start = min(at, total - count)
        out = once(torch.arange(start, start + count))
        if not out.dim() or len(out) % count:
            raise WiringError(f"{count} inputs got {len(out) if out.dim() else 'no'} answers from {program.origin}")
        return out[(at - start) * (len(out) // count) :]

    def each_by_itself() -> bool:
        """Whether the answers to the first inputs stay when the last of a run is another: so rows belong to inputs."""
        first, other = torch.arange(count), torch.arange(count)
        other[-1] = 0
        one, two = (once(which).to(torch.float64).nan_to_num() for which in (first, other))
        kept = len(one) // count * (count - 1)
        return torch.allclose(one[:kept], two[:kept], rtol=1e-3, atol=1e-3 * float(one.abs().amax()))

    asked = tree_map(inputs, given)
    try:
        example = run(program, tensors, dtype)[0]
        out = once(torch.arange(total))
        if out.dim() and example.dim() and len(out) % total == 0 and len(out) * count == len(example) * total:
            return out
    except (RuntimeError, WiringError):
        pass
    if count > total:
        raise WiringError(f"the network ({program.origin}) takes {count} inputs at a time and no others, not {total}")
    try:
        found = torch.cat([piece(at) for at in range(0, total, count)])
        if count > 1 and not each_by_itself():
            raise WiringError(f"the answers of the network ({program.origin}) to several inputs cannot be told apart")
        return found
    except RuntimeError as error:
        raise WiringError(
            f"the network ({program.origin}) does not run on other inputs than its example "
            f"({' '.join(str(error).split())[:200]})"
        ) from error


def told(out: Tensor, total: int, places: int, classes: int) -> Tensor:
    """Outputs as differences between classes, ``(total, places, classes)``, float64; of very many places or classes
    those at equal steps. Infinite values count as very large, those that are no numbers as 0."""
    table = out.to(torch.float64).reshape(total, -1, out.shape[-1] if out.dim() > 1 else 1)
    table = table[:, :: -(-table.shape[1] // places), :: -(-table.shape[2] // classes)]
    table = table.nan_to_num(nan=0.0, posinf=1e6, neginf=-1e6)
    return table - table.mean(2, keepdim=True) if table.shape[2] > 1 else table
