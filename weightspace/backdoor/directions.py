"""The directions of each block of weights that a trigger excites, and the parts of blocks that touch some elements."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from weightspace.backdoor.subspace import Basis
from weightspace.wiring.contractions import _Contractions
from weightspace.wiring.replay import batches, prepared, program_of, replay
from weightspace.wiring.wiring import Wiring
from weightspace.zoo.grafting import cuts_of

RANK = 4
"""Directions of a block, at most."""
ENERGY = 0.9
"""Share of the change that they are to span, where so many do."""

_Key = tuple[str, tuple[int, ...], int, int, int]


@dataclass(frozen=True, eq=False)
class Excited:
    """Second moments of the inputs of one part of a tensor: of their change, and as they were, (n, n) float64."""

    change: Tensor = field(repr=False)
    clean: Tensor = field(repr=False)


def excited(
    wiring: Wiring, tensors: Mapping[str, Tensor], before: Tensor, after: Tensor, *, positions: int = 1024,
    batch: int = 64, largest: int = 2048,
) -> dict[_Key, Excited]:  # fmt: skip
    """What a trigger changes in the inputs of every block, (tensor, dims summed over, split, low, high) -> moments.

    ``before`` and ``after (n, …)`` are the same inputs without and with it. Blocks with more than ``largest`` inputs
    are left out. Memory: two float64 matrices of a block's inputs for each, and the inputs of one batch.
    """
    program, given = program_of(wiring), prepared(wiring, tensors)
    kept: list[_Rows] = [_Rows(given, None, positions, 0, largest) for _ in range(2)]
    found: dict[_Key, Excited] = {}
    for pair in zip(batches((before,), batch), batches((after,), batch), strict=True):
        for watcher, args in zip(kept, pair, strict=True):
            watcher.rows = {}
            watcher.start()
            replay(program, given, args, watcher)
        for key, clean in kept[0].rows.items():
            x, y = torch.cat(clean).double(), torch.cat(kept[1].rows[key]).double()
            zero = x.new_zeros(x.shape[1], x.shape[1])
            own = found.setdefault(key, Excited(zero, zero.clone()))
            own.change.addmm_((y - x).T, y - x)
            own.clean.addmm_(x.T, x)
    return {k: v for k, v in found.items() if k[0] not in kept[0].left_out}


class _Rows(_Contractions):
    """Keeps the inputs themselves, of one batch: which positions are drawn depends on the run and step alone."""

    rows: dict[_Key, list[Tensor]]

    def _add(self, name: str, dims: tuple[int, ...], part: tuple[int, int, int], rows: Tensor) -> None:
        self.rows.setdefault((name, dims, *part), []).append(rows.float())


def bases(
    tensors: Mapping[str, Tensor], moments: Mapping[_Key, Excited], base: Mapping[str, Tensor] | None = None, *,
    rank: int = RANK, energy: float = ENERGY,
) -> dict[str, Basis]:  # fmt: skip
    """Per block the part of its weights that reads what changes most: SVD of ``W V Vᵀ``, ``V`` the leading directions.

    With a ``base`` that of the difference to it: what training has put there since. The label is the tensor's name,
    with ``[low:high]`` behind it where a part has inputs of its own.
    """
    count: dict[str, int] = {}
    for name, *_ in moments:
        count[name] = count.get(name, 0) + 1
    found: dict[str, Basis] = {}
    for (name, dims, split, low, high), m in moments.items():
        values, vectors = torch.linalg.eigh(m.change)
        values, vectors = values.flip(0).clamp(min=0), vectors.flip(1)
        total = float(values.sum())
        if total <= 0:
            continue
        spans = values.cumsum(0) / total
        r = min(rank, int((spans < energy).sum()) + 1, len(values))
        v = vectors[:, :r].float()
        empty = torch.zeros(0)
        shape = Basis(name, dims, split, low, high, empty, empty, v)
        weight = tensors[name].float() - (0 if base is None else base[name].float())
        u, s, right = torch.linalg.svd(shape.matrix(weight) @ v, full_matrices=False)
        label = name if count[name] == 1 else f"{name}[{low}:{high}]"
        found[label] = Basis(name, dims, split, low, high, u, s, v @ right.T, float(spans[r - 1]))
    return found


def touching(wiring: Wiring, tensors: Mapping[str, Tensor], elements: Mapping[str, Tensor]) -> dict[str, Basis]:
    """Per block the part of its weights that reads or writes these elements (factor -> positions), as a basis.

    Their entries among themselves and those that join them to others; entries that are zero have no direction.
    """
    found = {}
    for name, cut in cuts_of(wiring, elements).items():
        reads = wiring.reads.get(name)
        if wiring.roles.get(name) not in ("weight", "lookup") or reads is None or name not in tensors:
            continue
        tensor = tensors[name].float()
        # Kernel positions are summed over as well as what is read.
        kernel = {f for f, x in wiring.factors.items() if x.reason == "kernel positions"}
        inputs = tuple(
            d for d in range(tensor.dim())
            if d == reads or any(d in g.dims and {f for b in g.blocks for f in b[g.dims.index(d)].factors} & kernel
                                 for g in wiring.layouts[name])
        )  # fmt: skip
        empty = torch.zeros(0)
        width = int(torch.tensor([tensor.shape[d] for d in inputs]).prod())
        out = next((d for d in range(tensor.dim()) if d not in inputs), 0)
        shape = Basis(name, inputs, out, 0, tensor.shape[out], empty, empty, torch.zeros(width, 0))
        u, s, v = torch.linalg.svd(shape.matrix(tensor * (cut.inner | cut.cut)), full_matrices=False)
        r = int((s > 1e-6 * s.max()).sum()) if s.numel() and float(s.max()) > 0 else 0
        if r:
            found[name] = Basis(name, inputs, out, 0, tensor.shape[out], u[:, :r], s[:r], v[:r].T.contiguous())
    return found


__all__ = ["Excited", "bases", "excited", "touching"]
