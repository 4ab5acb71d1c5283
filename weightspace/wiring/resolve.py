"""From a finished trace to a ``Wiring``: atoms become named factors, labels become layouts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise

from weightspace.wiring.algebra import Atom, Dim, Family, Irreconcilable, Ledger, Sum, size_of
from weightspace.wiring.axis import Factor, Segment
from weightspace.wiring.program import Program
from weightspace.wiring.trace import Label, Trace
from weightspace.wiring.wiring import DimGroup, Layout, Wiring, _stem

# Positions of one dim while its atoms are being taken apart: start, and (atom, stride) pairs.
_Cursor = tuple[int, tuple[tuple[Atom, int], ...]]


def resolve(trace: Trace, program: Program) -> Wiring:
    """Name the primitive atoms that the tensors of a program are made of."""
    ledger = trace.ledger
    shapes = {n: tuple(t.shape) for n, t in program.tensors.items()}
    raw = {name: _groups(ledger, label) for name, label in trace.labels.items()}
    names, order = _names(raw)
    over = _fibres(ledger, raw, order)
    factors = {
        names[a]: Factor(names[a], a.size, a.pinned, tuple(names[o] for o in over[a]) if not a.pinned else (), a.reason)
        for a in order
    }
    layouts: dict[str, Layout] = {}
    for tensor, groups in raw.items():
        layouts[tensor] = tuple(
            DimGroup(dims, tuple(tuple(_segment(c, names) for c in block) for block in blocks))
            for dims, blocks in groups
        )
    notes = list(program.notes) + trace.notes
    return Wiring(
        layouts, shapes, factors, origin=program.origin, program=program, missing=trace.missing,
        untouched=trace.untouched, notes=tuple(notes), reads=trace.reads,
        roles=trace.roles, activations=_activations(trace, names),
        frequencies={names[a]: slope for slope, atoms in reversed(trace.frequencies) for a in atoms if a in names},
    )  # fmt: skip


def _activations(trace: Trace, names: Mapping[Atom, str]) -> dict[str, tuple[str, ...]]:
    """Per factor, the functions applied along it in order of first appearance."""
    found: dict[str, dict[str, None]] = {}
    for function, atoms in trace.activations:
        for a in atoms:
            if a in names:
                found.setdefault(names[a], {})[function] = None
    return {factor: tuple(functions) for factor, functions in found.items()}


_RawBlock = tuple[_Cursor, ...]
_RawGroup = tuple[tuple[int, ...], list[_RawBlock]]


def _groups(ledger: Ledger, label: Label) -> list[_RawGroup]:
    """Dims that must be read together, and their blocks of primitive atoms."""
    dims = [ledger.normal(d) for d in label.dims]
    parent = list(range(len(dims)))

    def root(i: int) -> int:
        while parent[i] != i:
            i = parent[i]
        return i

    # Families tie their dim to the dim of their index, at any depth; an index in the same dim goes first.
    for d, dim in enumerate(dims):
        own = _reachable(ledger, dim)
        for index in _indices(ledger, dim) - own:
            for e, other in enumerate(dims):
                if e != d and any(a is index for a in _reachable(ledger, other)):
                    parent[root(d)] = root(e)
                    break
    members: dict[int, list[int]] = {}
    for d in range(len(dims)):
        members.setdefault(root(d), []).append(d)
    out = []
    for ds in members.values():
        cursors: list[_Cursor] = [(0, _strided(dims[d], 1)) for d in ds]
        blocks = _expand(ledger, tuple(cursors))
        out.append((tuple(ds), blocks))
    return out


def _strided(dim: Sequence[Atom], stride: int) -> tuple[tuple[Atom, int], ...]:
    out = []
    for a in reversed(dim):
        out.append((a, stride))
        stride *= a.size
    return tuple(reversed(out))


def _indices(ledger: Ledger, dim: Dim) -> set[Atom]:
    found: set[Atom] = set()
    for a in ledger.normal(dim):
        if isinstance(a.form, Family):
            found.add(ledger.find(a.form.index))
            for m in a.form.members:
                found |= _indices(ledger, [m])
        elif isinstance(a.form, Sum):
            for part in a.form.parts:
                found |= _indices(ledger, list(part))
    return found


def _reachable(ledger: Ledger, dim: Dim) -> set[Atom]:
    found: set[Atom] = set()
    for a in ledger.normal(dim):
        found.add(a)
        if isinstance(a.form, Sum):
            for part in a.form.parts:
                found |= _reachable(ledger, list(part))
        elif isinstance(a.form, Family):
            for m in a.form.members:
                found |= _reachable(ledger, [m])
    return found


def _expand(ledger: Ledger, cursors: tuple[_Cursor, ...]) -> list[_RawBlock]:
    """Take families and sums apart until only primitive atoms are left."""
    rows = [[a for a, _ in items] for _, items in cursors]
    for d, row in enumerate(rows):
        for a in row:
            if isinstance(a.form, Family):
                index = ledger.find(a.form.index)
                where = next((e for e in (d, *range(len(rows))) if index in rows[e]), None)
                if where is not None:
                    ranges = pairwise(a.form.bounds)
                    return [
                        b for lo, hi in ranges for b in _expand(ledger, _narrow(ledger, cursors, where, index, lo, hi))
                    ]
    for d, row in enumerate(rows):
        for a in row:
            if isinstance(a.form, Sum):
                out: list[_RawBlock] = []
                offset = 0
                for part in a.form.parts:
                    width = size_of(part)
                    if width:
                        out += _expand(ledger, _narrow(ledger, cursors, d, a, offset, offset + width))
                    offset += width
                return out
    for row in rows:
        for a in row:
            if isinstance(a.form, Family):
                # Its index is not in this tensor: the members must be one.
                ledger.collapse(a)
                fresh = tuple(
                    (start, tuple(y for x, s in items for y in _strided(ledger.normal([x]), s)))
                    for start, items in cursors
                )
                return _expand(ledger, fresh)
    return [cursors]


def _narrow(
    ledger: Ledger, cursors: tuple[_Cursor, ...], where: int, atom: Atom, lo: int, hi: int
) -> tuple[_Cursor, ...]:
    """The part of a tensor where the position along ``atom`` in dim ``where`` lies in [lo, hi)."""
    piece, cuts = ledger.cut([atom], lo, hi)
    if not cuts and size_of(piece) != hi - lo:
        raise Irreconcilable
    out = []
    for d, (start, items) in enumerate(cursors):
        new: list[tuple[Atom, int]] = []
        follows = d == where or not any(a is atom for a, _ in items)
        for a, stride in items:
            if a is atom and d == where:
                start += lo * stride
                new += _strided(piece, stride)
            elif follows:
                new += _strided(ledger.restrict([a], cuts), stride)
            else:
                new.append((a, stride))
        out.append((start, tuple(new)))
    return tuple(out)


def _segment(cursor: _Cursor, names: Mapping[Atom, str]) -> Segment:
    start, items = cursor
    return Segment(
        start, tuple(names[a] for a, _ in items), tuple(s for _, s in items), tuple(a.size for a, _ in items)
    )


def _names(raw: Mapping[str, list[_RawGroup]]) -> tuple[dict[Atom, str], list[Atom]]:
    """A readable name per atom, from the first tensor and dim that carries it."""
    names: dict[Atom, str] = {}
    taken: set[str] = set()
    order: list[Atom] = []
    for tensor, groups in raw.items():
        for dims, blocks in groups:
            for k, d in enumerate(dims):
                fresh: list[Atom] = []
                for block in blocks:
                    for a, _ in block[k][1]:
                        if a not in names and a not in fresh:
                            fresh.append(a)
                stem = _stem(tensor)
                base = stem if d == 0 else f"{stem}.{d}"
                for i, a in enumerate(fresh):
                    name = base if len(fresh) == 1 else f"{base}[{i}]"
                    n, unique = 2, name
                    while unique in taken:
                        unique, n = f"{name}~{n}", n + 1
                    taken.add(unique)
                    names[a] = unique
                    order.append(a)
    return names, order


def _fibres(ledger: Ledger, raw: Mapping[str, list[_RawGroup]], order: Sequence[Atom]) -> dict[Atom, tuple[Atom, ...]]:
    """What each free atom is fibred over: acyclic, and present beside it in every tensor that has it."""
    known = {a: i for i, a in enumerate(order)}
    over: dict[Atom, set[Atom]] = {
        a: {o for o in (ledger.find(o) for o in a.over or ()) if o in known and o is not a} for a in order
    }
    for groups in raw.values():
        everywhere = [{a for _, items in block for a, _ in items} for _, blocks in groups for block in blocks]
        fixed = [_common([{a for _, items in b for a, _ in items} for b in blocks]) for _, blocks in groups]
        i = 0
        for g, (_, blocks) in enumerate(groups):
            outside = set().union(*(fixed[h] for h in range(len(groups)) if h != g)) if len(groups) > 1 else set()
            for block in blocks:
                here = everywhere[i] | outside
                seen: dict[Atom, int] = {}
                for _, items in block:
                    for a, _ in items:
                        seen[a] = seen.get(a, 0) + 1
                for a in seen:
                    over[a] = {o for o in over[a] if o in here and seen.get(o, 1) == 1}
                i += 1
    rank = {a: (len(over[a]), known[a]) for a in order}
    # The plainer of two atoms that accompany each other everywhere is the outer one.
    final: dict[Atom, tuple[Atom, ...]] = {}
    for a in sorted(order, key=lambda a: rank[a]):
        outer = sorted((o for o in over[a] if rank[o] < rank[a]), key=lambda o: rank[o])
        # Transitive: what an outer atom is fibred over comes along, or it goes.
        final[a] = tuple(o for o in outer if set(final[o]) <= set(outer))
    return final


def _common(sets: Sequence[set[Atom]]) -> set[Atom]:
    return set.intersection(*sets) if sets else set()
