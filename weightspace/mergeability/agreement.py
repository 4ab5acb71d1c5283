"""How often merged networks answer as single ones do, on a few unlabelled inputs: uncertain measurements of a merge."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from weightspace.errors import WeightspaceError
from weightspace.mergeability.outcome import CEILING, Cells, Observed
from weightspace.wiring.wiring import Wiring

_WORK = 4_000_000_000
"""Weights that are merged and run: more than these, and only the first merge is."""


def agreements(
    method: str, models: Mapping[str, Mapping[str, torch.Tensor]], base: Mapping[str, torch.Tensor] | None,
    wiring: Wiring | None, inputs: Mapping[str, Any], sets: Sequence[tuple[int, ...]], cells: Cells,
) -> tuple[Observed | None, str]:  # fmt: skip
    """What is observed of the ``cells`` of the ``sets`` of models, and what to know about it (or nothing).

    ``inputs``: by model, of that model's task; merges of none of these models are not run.

    Raises ``WeightspaceError`` where the network cannot be run, for unknown models, and for inputs that do not fit.
    """
    from weightspace.merge import merge

    names = list(models)
    if wiring is None or wiring.program is None or not wiring.proved:
        raise WeightspaceError(
            "inputs are of use where the network can be run: its wiring must be found and proved (give wiring= of "
            "the module with example inputs)"
        )
    unknown = sorted(set(inputs) - set(names))
    if unknown:
        raise WeightspaceError(f"inputs are given for {unknown[0]!r}, which is none of the models: {', '.join(names)}")
    asked_of = [(s, members) for s, members in enumerate(sets) if any(names[i] in inputs for i in members)]
    work = len(asked_of) * sum(math.prod(t.shape) for t in wiring.program.tensors.values())
    note = ""
    if work > _WORK:
        asked_of = asked_of[:1]
        note = "inputs were used for the first merge alone: to merge and run all would take long"
    observed: Observed | None = None
    alone: dict[int, torch.Tensor] = {}
    for s, members in asked_of:
        merged = merge([models[names[i]] for i in members], method, base=base).tensors
        assert merged is not None
        for i in members:
            name = names[i]
            if name not in inputs:
                continue
            if i not in alone:
                alone[i] = _answers(wiring, models[name], inputs[name], name)
            same = (_answers(wiring, merged, inputs[name], name) == alone[i]).double()
            at = next(int(c) for c in cells.where(s) if cells.own[c] == i)
            row = _row(float(same.sum()), same.numel(), at, len(cells))
            observed = row if observed is None else observed.and_(row)
    return observed, note


def _row(same: float, count: int, cell: int, total: int) -> Observed:
    """That of ``count`` answers so many are the same."""
    share = (same + 1) / (count + 2)
    # A share of n answers, seen through the link; and agreement is not quite accuracy retained.
    slope = 1 / max(CEILING - share, 0.02)
    row = Observed.cells([cell], np.array([share]), total)
    return Observed(row.design, row.values, np.array([slope**2 * share * (1 - share) / count + 0.1]))


def _answers(wiring: Wiring, tensors: Mapping[str, torch.Tensor], given: Any, name: str) -> torch.Tensor:
    """The classes (or next tokens) that a network names for its inputs."""
    assert wiring.program is not None
    arguments = given if isinstance(given, tuple) else (given,)
    plain = {n: t.float() if t.is_floating_point() else t for n, t in ((n, tensors[n]) for n in tensors)}
    try:
        with torch.no_grad():
            out = wiring.program.run(plain, *arguments)
    except (RuntimeError, TypeError, ValueError, IndexError, WeightspaceError) as error:
        reason = " ".join(str(error).split())[:200]
        raise WeightspaceError(
            f"the inputs of {name} do not fit the network ({reason}); expected a tensor, or a tuple of tensors, as the "
            "module takes them"
        ) from error
    first = next(x for x in torch.utils._pytree.tree_leaves(out) if isinstance(x, torch.Tensor))
    found: torch.Tensor = first.argmax(-1)
    return found


__all__ = ["agreements"]
