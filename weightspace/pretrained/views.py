"""What the pretrained metanets see of a network: its weights at the canonical point of their orbit, and nothing else.

Only floating-point tensors that take part in the function are kept, as float32 and in the order of their names:
counters, optimiser state, formats, dtypes and tensors that are not used say nothing here. Positive rescalings and
sign flips are divided out (``weightspace.wiring.scaling``), so that networks that differ by any known symmetry are
seen alike; permutations change nothing in a metanet or a descriptor anyway.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from weightspace.errors import MetanetError
from weightspace.graph import ParameterGraph
from weightspace.graph.build import of_tensors
from weightspace.wiring.wiring import Wiring

_STACK = 64


def clean(tensors: Mapping[str, Tensor], wiring: Wiring) -> ParameterGraph:
    """The graph of the weights that take part in the function, read and converted to float32.

    Raises ``MetanetError`` where there is none, or where one holds a number that is not finite.
    """
    unused = frozenset(wiring.untouched)
    dtype = getattr(tensors, "dtype", None)
    kept: dict[str, Tensor] = {}
    for name in sorted(tensors):
        if name in unused or name not in wiring:
            continue
        if callable(dtype) and not dtype(name).is_floating_point:
            continue
        value = tensors[name].detach()
        if value.is_floating_point() and value.numel():
            kept[name] = value.to(torch.float32)
    if not kept:
        raise MetanetError(f"none of the {len(tensors)} tensors is a weight that takes part in the function")
    broken = [name for name, value in kept.items() if not bool(torch.isfinite(value).all())]
    if broken:
        raise MetanetError(f"{broken[0]!r} holds infinite values or values that are no numbers (a diverged training?)")
    return of_tensors(kept, wiring)


def canonical(graphs: Sequence[ParameterGraph]) -> list[ParameterGraph]:
    """The networks at the canonical points of their orbits under rescaling and sign flips, in the same order.

    Those that share one wiring are settled together, ``_STACK`` at a time, which gives the same to the last bit.
    Raises ``UnprovedWiringError`` for a wiring that is not proved or has no network to run.
    """
    from weightspace.wiring.scaling import scaling

    of_wiring: dict[int, list[int]] = {}
    for number, graph in enumerate(graphs):
        of_wiring.setdefault(id(graph.wiring), []).append(number)
    found: list[ParameterGraph] = list(graphs)
    for numbers in of_wiring.values():
        wiring = graphs[numbers[0]].wiring
        if wiring is None:
            raise MetanetError("this graph has no wiring, so its symmetries are not known; make it with ws.graph")
        group = scaling(wiring)
        for start in range(0, len(numbers), _STACK):
            part = numbers[start : start + _STACK]
            stacked = {name: torch.stack([graphs[i].tensor(name) for i in part]) for name in graphs[part[0]].shapes}
            settled = group.canonical(stacked, batch_dims=1)
            for row, i in enumerate(part):
                found[i] = replace(graphs[i], tensors={name: value[row] for name, value in settled.items()})
    return found


def described(graphs: Sequence[ParameterGraph]) -> Tensor:
    """The training-free descriptors of graphs, ``(n, DIMENSION)``, float64."""
    from weightspace.retrieval import describe

    rows = [describe({name: graph.tensor(name) for name in graph.shapes}, graph.wiring).vector for graph in graphs]
    return torch.from_numpy(np.stack(rows))
