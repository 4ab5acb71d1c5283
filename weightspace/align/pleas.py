"""PLeaS (Nasery et al. 2024): match only what matches, keep the rest twice, refit by least squares.

Of every layer the best-matching share of neurons is merged, the others of both networks are kept side by side, so that
the merged network is wider: ``n (2 - ratio)``. Its weights are then refitted layer by layer, so that what a layer
computes from the merged inputs is as near as can be to what the two networks compute from their own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from weightspace.align.alignment import Found
from weightspace.align.maps import Map, _along, carry
from weightspace.align.optimal_transport import reads
from weightspace.align.repair import reset_statistics
from weightspace.errors import AlignmentError
from weightspace.wiring.contractions import Gram, _Contractions
from weightspace.wiring.places import places
from weightspace.wiring.replay import Inputs, batches, prepared, program_of, replay
from weightspace.wiring.wiring import Wiring, _joint

_NORMS = {"layer_norm", "rms_norm", "group_norm", "softmax"}


@dataclass(frozen=True, eq=False)
class Pleas:
    """A merged network.

    ``matched``: per factor how many elements were merged, the first ones of the new order; after them come the other
    elements of a, then those of b. ``wiring`` runs the merged tensors (its layouts are still those of the narrow
    networks where widths changed). ``kept`` names the weights that were averaged, not refitted, with the reason.
    """

    tensors: dict[str, Tensor]
    wiring: Wiring
    matched: dict[str, int]
    kept: dict[str, str]


def pleas(
    a: Mapping[str, Tensor], b: Mapping[str, Tensor], wiring: Wiring, *, inputs: Inputs, seed: int = 0,
    matching: Literal["weight-matching", "activation-matching"] = "activation-matching",
    ratio: float | Mapping[str, float] = 1.0, ridge: float = 1e-3, positions: int = 1024, batch: int | None = 64,
) -> Found:  # fmt: skip
    """b matched to a, and the two merged at the share ``ratio`` of matched elements (see ``merge_matched``).

    ``diagnostics["merged"]`` is the ``Pleas``.
    """
    from weightspace.align.methods import method_of

    how = method_of(matching)
    result = how.function(a, b, wiring, seed=seed, **({"inputs": inputs} if how.needs_inputs else {}))
    found = result if isinstance(result, Found) else Found(result)
    moved = wiring.apply(found.permutations, b)
    merged = merge_matched(
        a, moved, wiring, inputs, found.costs, ratio=ratio, ridge=ridge, positions=positions, batch=batch, seed=seed
    )
    return Found(found.permutations, found.costs, {**found.diagnostics, "merged": merged, "matched": merged.matched})


def merge_matched(
    a: Mapping[str, Tensor], b: Mapping[str, Tensor], wiring: Wiring, inputs: Inputs,
    costs: Mapping[str, Tensor] | None = None, *, ratio: float | Mapping[str, float] = 1.0, ridge: float = 1e-3,
    positions: int = 1024, batch: int | None = 64, seed: int = 0,
) -> Pleas:  # fmt: skip
    """Two aligned networks merged into one.

    ``ratio``: the share of each factor's elements that are merged, one number or per factor (1 where none is named);
    those whose ``costs`` (similarities, as an ``Alignment`` has them) are largest on the diagonal. Factors whose width
    cannot change (streams under a norm, heads, what no weight reads) are merged whole. ``ridge``: how much the refit
    holds on to the plain average, relative to the inputs' second moments.

    Raises ``AlignmentError`` for a ratio outside 0 to 1, or where the network does not run at the new widths.
    """
    chosen = _chosen(wiring, costs or {}, ratio, a, b)
    of_a, of_b = _halves(wiring, chosen)
    x, y = ({n: t.double() if t.is_floating_point() else t for n, t in m.items()} for m in (a, b))
    start = _sum(wiring, x, y, of_a, of_b, reading=True)
    program = program_of(wiring)
    sums = _paired(wiring, a, b, inputs, positions, batch, seed)
    target = [_carried(wiring, t, m, reading=False) for t, m in ((x, of_a), (y, of_b))]
    out, kept = dict(start), {}
    for name, (gram, moment) in sums.items():
        try:
            out[name] = _refit(wiring, name, gram, moment, start[name], target, (of_a, of_b), ridge)
        except AlignmentError as error:
            kept[name] = str(error)
    tensors = {n: t.to(a[n].dtype) for n, t in out.items()}
    grown = wiring.with_(program=replace(program, tensors={n: tensors[n] for n in program.tensors}))
    try:
        tensors = reset_statistics(grown, tensors, inputs)
        first = next(batches(inputs, 2))
        with torch.no_grad():
            program.run(tensors, *first, **dict(program.kwargs))
    except RuntimeError as error:
        raise AlignmentError(
            f"the network ({program.origin}) does not run at the merged widths ({str(error).splitlines()[0][:80]}); "
            "take ratio=1.0, which keeps them"
        ) from error
    return Pleas(tensors, grown, {n: len(c) for n, c in chosen.items()}, kept)


def _chosen(
    wiring: Wiring, costs: Mapping[str, Tensor], ratio: float | Mapping[str, float], a: Mapping[str, Tensor],
    b: Mapping[str, Tensor],
) -> dict[str, Tensor]:  # fmt: skip
    """Per factor the elements that are merged, in order."""
    out = {}
    for name, factor in wiring.free.items():
        share = ratio.get(name, 1.0) if isinstance(ratio, Mapping) else ratio
        if not 0 <= share <= 1:
            raise AlignmentError(f"the ratio of factor {name!r} is {share}; a share from 0 to 1 is merged")
        count = round(share * factor.size)
        if count == factor.size or not _can_grow(wiring, name):
            out[name] = torch.arange(factor.size)
            continue
        alike = costs[name].diagonal(dim1=-2, dim2=-1) if name in costs else _cosines(wiring, name, a, b)
        out[name] = alike.argsort(descending=True)[:count].sort().values
    return out


def _can_grow(wiring: Wiring, name: str) -> bool:
    factor = wiring.free[name]
    inside = any(name in f.over for f in wiring.free.values())
    normed = _NORMS & set(wiring.activations.get(name, ()))
    read = any(reads(wiring, p) for p in places(wiring)[name])
    return not (factor.over or inside or normed or not read)


def _cosines(wiring: Wiring, name: str, a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> Tensor:
    views = [
        torch.cat([p.view(t[p.tensor].double()) for p in places(wiring)[name] if t[p.tensor].is_floating_point()], -1)
        for t in (a, b)
    ]
    return torch.cosine_similarity(views[0], views[1], dim=-1)


def _halves(wiring: Wiring, chosen: Mapping[str, Tensor]) -> tuple[dict[str, Map], dict[str, Map]]:
    """What each of the networks gives to every element of the merged one (``write``), and is read as (``read``)."""
    halves: tuple[dict[str, Map], dict[str, Map]] = ({}, {})
    for name, merged in chosen.items():
        n = wiring.free[name].size
        eye = torch.eye(n, dtype=torch.float64)
        both = eye[merged]
        alone = eye[[i for i in range(n) if i not in set(merged.tolist())]]
        none = torch.zeros_like(alone)
        for half, order in zip(halves, ((alone, none), (none, alone)), strict=True):
            half[name] = Map(torch.cat((both / 2, *order)), torch.cat((both, *order)))
    return halves


def _carried(
    wiring: Wiring, tensors: Mapping[str, Tensor], maps: Mapping[str, Map], *, reading: bool
) -> dict[str, Tensor]:
    """One network's share of the merged one; tensors that write no free factor count half."""
    out = {}
    written = _written(wiring)
    for name, t in tensors.items():
        if not t.is_floating_point():
            out[name] = t
            continue
        own = written.get(name, set())
        here = {f: _plain(m, wiring, f) for f, m in maps.items()}
        if not reading:
            # The side that is read stays as it was.
            here = {f: Map(m.write, torch.eye(wiring.free[f].size, dtype=torch.float64)) for f, m in here.items()}
            here = {f: _plain(m, wiring, f) for f, m in here.items()}
        # Of several factors written together (heads and channels) one carries the half.
        half = next((f for f in maps if f in own and len(maps[f].write) != wiring.free[f].size), None) or next(
            (f for f in maps if f in own), None
        )
        for f in own:
            if f != half and f in here:
                here[f] = _plain(Map(maps[f].read, here[f].read), wiring, f)
        moved = carry({name: t}, wiring, {f: m for f, m in here.items() if not _is_identity(m)})[name]
        out[name] = moved if half is not None else moved / 2
    return out


def _is_identity(m: Map) -> bool:
    eye = torch.eye(m.write.shape[-1], dtype=m.write.dtype)
    return all(x.shape[-2:] == eye.shape and bool((x == eye).all()) for x in (m.write, m.read))


def _plain(m: Map, wiring: Wiring, name: str) -> Map:
    """The map of a fibred factor, the same at every position."""
    lead = [wiring.factors[o].size for o in wiring.free[name].over]
    if not lead or m.write.dim() > 2:
        return m
    return Map(m.write.expand(*lead, *m.write.shape), m.read.expand(*lead, *m.read.shape))


def _written(wiring: Wiring) -> dict[str, set[str]]:
    """Per tensor the free factors that it writes."""
    out: dict[str, set[str]] = {}
    for name, row in places(wiring).items():
        for p in row:
            if not reads(wiring, p):
                out.setdefault(p.tensor, set()).add(name)
    return out


def _sum(
    wiring: Wiring, a: Mapping[str, Tensor], b: Mapping[str, Tensor], of_a: Mapping[str, Map],
    of_b: Mapping[str, Map], *, reading: bool,
) -> dict[str, Tensor]:  # fmt: skip
    one = _carried(wiring, a, of_a, reading=reading)
    two = _carried(wiring, b, of_b, reading=reading)
    return {n: t + two[n] if t.is_floating_point() else t for n, t in one.items()}


class _Rows(_Contractions):
    """Keeps the inputs of every weight for one run."""

    def __init__(self, given: Mapping[str, Tensor], positions: int, seed: int, largest: int) -> None:
        super().__init__(given, None, positions, seed, largest)
        self.rows: dict[tuple[str, tuple[int, int, int]], tuple[tuple[int, ...], list[Tensor]]] = {}

    def _add(self, name: str, dims: tuple[int, ...], part: tuple[int, int, int], rows: Tensor) -> None:
        self.rows.setdefault((name, part), (dims, []))[1].append(rows.to(torch.float64, copy=True))


def _paired(
    wiring: Wiring, a: Mapping[str, Tensor], b: Mapping[str, Tensor], inputs: Inputs, positions: int,
    batch: int | None, seed: int,
) -> dict[str, tuple[Gram, Tensor]]:  # fmt: skip
    """Second moments (2n, 2n) of both networks' inputs of every weight, at the same positions; one part only."""
    program = program_of(wiring)
    pair = [prepared(wiring, t) for t in (a, b)]
    moments: dict[tuple[str, tuple[int, int, int]], tuple[tuple[int, ...], Tensor, int]] = {}
    watchers = [_Rows(given, positions, seed, 4096) for given in pair]
    for args in batches(inputs, batch):
        for watcher, given in zip(watchers, pair, strict=True):
            watcher.rows = {}
            watcher.start()
            replay(program, given, args, watcher)
        for key, (dims, mine) in watchers[0].rows.items():
            both = torch.cat((torch.cat(mine), torch.cat(watchers[1].rows[key][1])), 1)
            known = moments.get(key)
            total = both.t() @ both
            count = len(both)
            if known is not None:
                total, count = total + known[1], count + known[2]
            moments[key] = (dims, total, count)
    out = {}
    parts: dict[str, int] = {}
    for name, _ in moments:
        parts[name] = parts.get(name, 0) + 1
    for (name, (split, lo, hi)), (dims, total, count) in moments.items():
        if parts[name] == 1:
            gram = Gram(dims, split, ((lo, hi),), (total,), (total.diagonal(),), (count,))
            out[name] = (gram, total / count)
    return out


def _refit(
    wiring: Wiring, name: str, gram: Gram, moment: Tensor, start: Tensor, target: Sequence[Mapping[str, Tensor]],
    halves: tuple[Mapping[str, Map], Mapping[str, Map]], ridge: float,
) -> Tensor:  # fmt: skip
    """The weight whose results on merged inputs are nearest to the two networks' own."""
    first, second = (gram._front(t[name]) for t in target)
    n = len(first)
    into = torch.cat([_input_map(wiring, name, gram, n, half) for half in halves])
    wanted = torch.cat((first, second))
    inner = into.t() @ moment @ into
    hold = ridge * float(inner.diagonal().mean()) or ridge
    square = inner + hold * torch.eye(len(inner), dtype=inner.dtype)
    right = into.t() @ moment @ wanted + hold * gram._front(start)
    solved = torch.linalg.solve(square, right)
    whole = replace(gram, parts=((0, start.shape[gram.split]),))
    return whole.assemble([solved], start)


def _input_map(wiring: Wiring, name: str, gram: Gram, n: int, half: Mapping[str, Map]) -> Tensor:
    """How the inputs of a weight (n) make up the merged network's (m): (n, m)."""
    shape = wiring.shapes[name]
    out = [d for d in range(len(shape)) if d not in gram.inputs]
    spread = torch.eye(n, dtype=torch.float64).reshape(n, *(shape[d] for d in gram.inputs))
    # Dims of the tensor, with all outputs in the place of the first of them.
    for d in out:
        spread = spread.movedim(0, d) if d == out[0] else spread.unsqueeze(d)
    mapped = False
    for dims, blocks in _joint(wiring.layouts[name], wiring.factors):
        inside = [d for d in dims if d in gram.inputs]
        here = [f for f in half if any(f in s.factors for b in blocks for s in b)]
        if not inside or not here:
            continue
        if len(dims) > 1 and any(half[f].read.shape[0] != wiring.free[f].size for f in here):
            raise AlignmentError("its inputs are tied to another of its dims")
        if len(dims) > 1:
            continue
        # One factor of a product carries the half, as in what writes it.
        lead = next((f for f in here if len(half[f].write) != wiring.free[f].size), here[0])
        maps = {f: _plain(Map(m.write, m.write if f == lead else m.read), wiring, f) for f, m in half.items()}
        maps = {f: m for f, m in maps.items() if f in here}
        order = sorted(maps, key=lambda f: len(wiring.factors[f].over))
        spread = _along(name, spread, dims[0], [b[0] for b in blocks], maps, order, wiring, True)
        mapped = True
    spread = spread if mapped else spread / 2
    rest = [d for d in range(spread.dim()) if d not in gram.inputs]
    flat: Any = spread.permute(*rest, *gram.inputs).reshape(n, -1)
    return flat  # type: ignore[no-any-return]


__all__ = ["Pleas", "merge_matched", "pleas"]
