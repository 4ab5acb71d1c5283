"""``ws.graph(x)``: the parameter graph of whatever ``x`` is."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from weightspace.errors import GraphError, UnprovedWiringError, WiringError
from weightspace.graph.layout import Structure, structure
from weightspace.graph.parameter_graph import ParameterGraph
from weightspace.wiring.wiring import Wiring


def graph(x: Any, *args: Any, wiring: Wiring | None = None, **kwargs: Any) -> ParameterGraph:
    """The parameter graph of a network: a node per axis element, an edge per weight, no copy of the weights.

    ``x`` is a ``Checkpoint``, a path or URL, a mapping of tensors, or an ``nn.Module`` (followed by example
    inputs, as for ``weightspace.wiring``). The wiring is found unless it is given, as the second argument or
    by name. A wiring that only is a guess is allowed, and ``graph.status`` says ``"unverified"``.

    Raises ``UnprovedWiringError`` for a wiring that failed its proof, ``WiringError`` where no wiring can be
    found or the one given does not describe these tensors.
    """
    if args and isinstance(args[0], Wiring):
        if wiring is not None:
            raise GraphError("two wirings were given, one by position and one by name; pass one")
        wiring, args = args[0], args[1:]
    elif args and args[0] is None:
        args = args[1:]
    tensors = _tensors(x)
    if wiring is None:
        from weightspace.wiring.entry import wiring as find

        wiring = find(x if isinstance(x, nn.Module) else tensors, *args, **kwargs)
    elif args or kwargs:
        raise GraphError("example inputs serve to find a wiring; with a wiring given there is no use for them")
    if wiring.status == "failed":
        raise UnprovedWiringError(
            f"the wiring ({wiring.origin}) failed its proof: the outputs changed under a permutation that it allows. "
            "Its graph would connect the wrong neurons; see wiring.proof and wiring.notes"
        )
    return of_tensors(tensors, wiring)


def of_tensors(tensors: Mapping[str, torch.Tensor], wiring: Wiring) -> ParameterGraph:
    """The graph of tensors whose wiring is known; nothing is loaded."""
    names = list(tensors)
    unknown = [n for n in names if n not in wiring]
    if unknown:
        raise WiringError(
            f"{len(unknown)} of {len(names)} tensors are not in the wiring ({wiring.origin}), the first is "
            f"{unknown[0]!r}; pass the tensors that the wiring was made for"
        )
    dtypes = {}
    for name in names:
        shape, dtypes[name] = _form(tensors, name)
        if shape != wiring.shapes[name]:
            raise WiringError(f"tensor {name!r} has shape {shape}, the wiring expects {wiring.shapes[name]}")
    notes = list(wiring.notes)
    present = set(names)
    absent = [n for n in wiring if n not in present]
    if absent:
        more = f" and {len(absent) - 3} more" if len(absent) > 3 else ""
        notes.append(f"in the wiring but not among the tensors: {', '.join(absent[:3])}{more}")
    complex_names = frozenset(n for n, d in dtypes.items() if d.is_complex)
    key = f"graph {names} {sorted(complex_names)}"
    found = wiring.shared.get(key)
    if not isinstance(found, Structure):
        wiring.shared[key] = found = structure(wiring, names, complex_names)
    return ParameterGraph(
        found.cells, found.blocks, found.vectors, found.values, found.links, {n: wiring.shapes[n] for n in names},
        dtypes, wiring.status, wiring.origin, tuple(notes), tensors, wiring,
    )  # fmt: skip


def _tensors(x: Any) -> Mapping[str, torch.Tensor]:
    if isinstance(x, nn.Module):
        return {k: v for k, v in x.state_dict().items() if isinstance(v, torch.Tensor)}
    if isinstance(x, str | os.PathLike):
        from weightspace.checkpoint import open as open_checkpoint

        opened: Mapping[str, torch.Tensor] = open_checkpoint(x)
        return opened
    if isinstance(x, Mapping):
        if not hasattr(x, "shape"):
            wrong = next((k for k, v in x.items() if not isinstance(v, torch.Tensor)), None)
            if wrong is not None:
                raise GraphError(f"{wrong!r} is a {type(x[wrong]).__name__}; expected a mapping of names to tensors")
        return x
    raise GraphError(
        f"cannot make a graph of a {type(x).__name__}; expected a Checkpoint, a path, a mapping of tensors, "
        "or an nn.Module with example inputs"
    )


def _form(tensors: Mapping[str, torch.Tensor], name: str) -> tuple[tuple[int, ...], torch.dtype]:
    """Shape and dtype, from the header where the mapping is a lazy checkpoint."""
    shape, dtype = getattr(tensors, "shape", None), getattr(tensors, "dtype", None)
    if callable(shape) and callable(dtype):
        return tuple(shape(name)), dtype(name)
    tensor = tensors[name]
    return tuple(tensor.shape), tensor.dtype
