"""One group of models with equal tensors: families, trees, merges, copies, and the edges that come of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from weightspace.errors import WeightspaceError
from weightspace.lineage.copies import Copy, Told, copies
from weightspace.lineage.geometry import Geometry, geometry
from weightspace.lineage.held import Held
from weightspace.lineage.lineage import Edge
from weightspace.lineage.merges import Mixture, chosen_sums, combinations_in
from weightspace.lineage.placing import Placed, place
from weightspace.lineage.related import Null, families, null
from weightspace.lineage.sample import Array, Floats, Sample, take
from weightspace.lineage.steps import low_rank, step
from weightspace.lineage.tree import OUTSIDE

if TYPE_CHECKING:
    from weightspace.checkpoint import Checkpoint
    from weightspace.wiring.wiring import Wiring

ROUNDED = 0.98
"""Confidence that a rounded network is the child of the finer one."""
MOST_RELATIVES = 6000
"""Networks of one family: the distances of all pairs, and what is made of them, are some 30 bytes a pair."""
ADAPTED = 0.99
"""Confidence in an adapter merged into its base."""
_CHOSEN_OTHERS = 24
_TRIED = 3


@dataclass(frozen=True)
class Part:
    """A family and its edges."""

    members: tuple[str, ...]
    edges: tuple[Edge, ...]


class Kin:
    """The models of a group on the way to their ``parts``; ``left``: models that could not be compared, and why."""

    def __init__(
        self,
        models: Mapping[str, Checkpoint],
        wiring: Wiring | None,
        descriptors: Mapping[str, Array] | None,
        moved: int,
        seed: int,
        advance: Callable[[str], None],
        told: Told,
    ) -> None:
        self.names, self.wiring = tuple(models), wiring
        self.left: dict[str, str] = {}
        self.notes: list[str] = []
        first = next(iter(models.values()))
        self._models = models
        self._shapes = {n: tuple(first.shape(n)) for n in first if first.dtype(n).is_floating_point}
        self._held = Held(models, list(self._shapes))
        self._descriptors = descriptors
        self._moved, self._seed, self._advance, self._told = moved, seed, advance, told
        self._undone: dict[str, tuple[str, Mapping[str, Tensor], str]] = {}

    def parts(self) -> list[Part]:
        """The families of the group."""
        sample = self._sample()
        for name, known in zip(self.names, sample.known, strict=True):
            if not known:
                self.left[name] = "weights that are not finite"
        unit = sample.standardised()
        drawn = null(sample, lambda i: self._network(self.names[i]), unit, self._seed)
        if drawn.kind == "none":
            self.notes.append(f"{self.names[0]} and those like it have no tensor whose elements may be permuted")
        found = families(unit, sample.known, drawn, self._confirm if self.wiring is not None else None)
        found = [[i for i in f if sample.known[i]] for f in found]
        found = [f for f in found if f]
        if self.wiring is not None and self.wiring.proved and len(found) > 1 and self._moved > 0:
            found, sample = self._bring_back(found, sample)
            unit = sample.standardised()
        return [self._family(f, sample, unit, drawn) for f in found if len(f) > 1]

    # -------------------------------------------------------------------------------- families

    def _sample(self) -> Sample:
        def networks() -> Iterator[Mapping[str, Tensor]]:
            for name in self.names:
                self._advance(name)
                yield self._held(name)

        return take(self.names, networks(), self._shapes, self.wiring, self._seed)

    def _network(self, name: str) -> Mapping[str, Tensor]:
        return self._undone[name][1] if name in self._undone else self._held(name)

    def _confirm(self, i: int, j: int) -> bool:
        from weightspace.mergeability.ancestry import ancestry

        assert self.wiring is not None
        a, b = self._held(self.names[i]), self._held(self.names[j])
        return ancestry(a, b, self.wiring, align=False, seed=self._seed).relation == "same ancestor"

    def _bring_back(self, found: list[list[int]], sample: Sample) -> tuple[list[list[int]], Sample]:
        """Families that are moved copies of others, joined to them, their weights brought back."""
        from weightspace.mergeability.ancestry import ancestry

        assert self.wiring is not None
        vectors = self._vectors()
        pairs = []
        for x in range(len(found)):
            for y in range(x):
                apart = vectors[found[x]][:, None] - vectors[found[y]][None]
                table = np.sqrt((apart * apart).mean(-1))
                at = int(table.argmin())
                p, q = divmod(at, table.shape[1])
                pairs.append((float(table[p, q]), x, y, found[x][p], found[y][q]))
        pairs.sort()
        top = list(range(len(found)))
        tried = 0
        for _, x, y, i, j in pairs:
            if tried >= self._moved:
                break
            if top[x] == top[y]:
                continue
            tried += 1
            # The larger family stays; with equals the one of the earlier name.
            stays, goes = (y, x) if len(found[y]) >= len(found[x]) else (x, y)
            here, there = (j, i) if stays == y else (i, j)
            told = ancestry(
                self._network(self.names[here]), self._network(self.names[there]), self.wiring, seed=self._seed
            )
            if told.relation != "moved copy":
                continue
            for member in [m for k in range(len(found)) if top[k] == top[goes] for m in found[k]]:
                self._undo(member, here)
            old, new = top[goes], top[stays]
            top = [new if t == old else t for t in top]
        left = len(pairs) - tried
        if left > 0 and tried:
            self.notes.append(
                f"{tried} pairs of families of models like {self.names[0]} were examined for moved copies, the "
                f"{left} less alike were not; moved={len(pairs)} examines all"
            )
        joined: dict[int, list[int]] = {}
        for k, members in enumerate(found):
            joined.setdefault(top[k], []).extend(members)
        if self._undone:
            networks = (self._network(n) for n in self.names)
            sample = take(self.names, networks, self._shapes, self.wiring, self._seed)
        return list(joined.values()), sample

    def _undo(self, member: int, reference: int) -> None:
        from weightspace.mergeability.protection import examine

        assert self.wiring is not None
        name = self.names[member]
        try:
            found = examine(self._held(name), self._network(self.names[reference]), self.wiring)
        except WeightspaceError as error:
            self.notes.append(f"{name} was not brought back: {error}")
            return
        if found.kinds:
            kinds = ", ".join(found.kinds)
            self._undone[name] = (self.names[reference], found.tensors, kinds)

    def _vectors(self) -> Array:
        from weightspace.retrieval import describe

        rows = []
        for name in self.names:
            known = None if self._descriptors is None else self._descriptors.get(name)
            rows.append(describe(self._models[name], self.wiring).vector if known is None else known)
        return np.asarray(np.stack(rows), dtype=np.float64)

    # -------------------------------------------------------------------------------- one family

    def _family(self, members: Sequence[int], sample: Sample, unit: Floats, drawn: Null) -> Part:
        if len(members) > MOST_RELATIVES:
            raise WeightspaceError(
                f"{len(members)} networks like {self.names[members[0]]} are one family; all pairs of a family are held "
                f"to put it in order, so that {MOST_RELATIVES} are the most: give a part of them (models=)"
            )
        values = sample.values[list(members)]
        shape = geometry(values, sample.segments)
        names = [self.names[i] for i in members]
        again = copies(names, shape, self._network, list(self._shapes), self._told)
        kept = [k for k in range(len(names)) if k not in again]
        placed = place(shape.subset(kept))
        parents = {kept[b]: (kept[p] if p != OUTSIDE else OUTSIDE) for b, p in enumerate(placed.forest.parents)}
        merges = {m.merged: m for m in combinations_in(shape, set(again), {k: _above(parents, k) for k in kept})}
        if merges:
            placed = place(shape.subset(kept), _blocked(merges, kept))
            parents = {kept[b]: (kept[p] if p != OUTSIDE else OUTSIDE) for b, p in enumerate(placed.forest.parents)}
        chosen = self._chosen(shape, values, parents, merges, kept)
        if chosen:
            merges |= chosen
            placed = place(shape.subset(kept), _blocked(merges, kept))
            parents = {kept[b]: (kept[p] if p != OUTSIDE else OUTSIDE) for b, p in enumerate(placed.forest.parents)}
        adapted = self._adapted(names, shape, kept, parents, merges)
        if placed.turned:
            self.notes.append(
                f"the family of {names[0]} is likelier if weights shrink from parents to children, and is told so"
            )
        own = unit[list(members)]
        edges: list[Edge] = []
        for b, parent in parents.items():
            if b in merges:
                edges.extend(self._merge_edges(names, merges[b], shape, own, drawn))
            elif parent != OUTSIDE:
                edges.append(self._edge(names, parent, b, b in adapted, placed, kept, shape, own, drawn))
        edges.extend(self._copy_edge(names, again[b], b, shape, own, drawn) for b in again)
        return Part(tuple(names), tuple(self._with_moves(e) for e in edges))

    def _adapted(
        self, names: Sequence[str], shape: Geometry, kept: Sequence[int], parents: dict[int, int],
        merges: Mapping[int, Mixture],
    ) -> set[int]:  # fmt: skip
        """Networks moved below a relative that they differ from by matrices of low rank: no accident makes that."""
        moved = set()
        for b in kept:
            for a in [int(i) for i in shape.near[b] if int(i) in parents][:_TRIED]:
                if b in merges or parents[b] == a or b in _above(parents, a) or shape.drift[a, b] <= 0:
                    continue
                one, other = self._network(names[a]), self._network(names[b])
                changed = [n for n in self._shapes if not torch.equal(one[n], other[n])]
                if changed and low_rank(one, other, changed) is not None:
                    parents[b] = a
                    moved.add(b)
                    break
        return moved

    def _chosen(
        self, shape: Geometry, values: Floats, parents: Mapping[int, int], merges: Mapping[int, Mixture],
        kept: Sequence[int],
    ) -> dict[int, Mixture]:  # fmt: skip
        found: dict[int, Mixture] = {}
        if len(kept) < 4:
            return found
        epsilon = 6e-8
        for m in kept:
            if m in merges:
                continue
            chain = [m, *_above(parents, m)]
            plain = [i for i in kept if i not in merges and i not in found and i != m]
            if len(plain) < 3:
                continue
            outermost = min(plain, key=lambda i: shape.norms[i])
            above = [i for i in chain[1:] if i in plain]
            for base in dict.fromkeys([*above[-1:], *above[:2], outermost]):
                others = [i for i in map(int, shape.near[m]) if i in plain and i != base][:_CHOSEN_OTHERS]
                mixture = None if base == m else chosen_sums(shape, values, m, base, others, epsilon)
                if mixture is not None:
                    found[m] = mixture
                    break
        return found

    # -------------------------------------------------------------------------------- edges

    def _edge(
        self, names: Sequence[str], a: int, b: int, adapted: bool, placed: Placed, kept: Sequence[int],
        shape: Geometry, own: Floats, drawn: Null,
    ) -> Edge:  # fmt: skip
        how = step(self._network(names[a]), self._network(names[b]), list(self._shapes))
        drift = float(shape.drift[a, b])
        at = kept.index(b)
        sure, direction = (ADAPTED, ADAPTED) if adapted else (placed.sure[at], placed.way[at])
        if how.kind in ("converted", "quantised"):
            direction = ROUNDED
        others = [
            (names[kept[i]] if i != OUTSIDE else "none of these", p) for i, p in placed.forest.alternatives[at]
        ]
        next_best = f"; next: {others[0][0]} ({others[0][1]:.2f})" if others and others[0][1] >= 0.02 else ""
        why = (
            f"{how.detail}; relative distance {_relative(shape, a, b):.3f}, "
            f"{'inward' if drift < 0 else 'outward'} drift {drift:+.2f}{next_best}"
        )
        return Edge(
            names[a], names[b], how.kind, how.detail, 1.0, sure, direction,
            _relative(shape, a, b), drift, drawn.log10_p(float(own[a] @ own[b])), why,
        )  # fmt: skip

    def _copy_edge(
        self, names: Sequence[str], copy: Copy, b: int, shape: Geometry, own: Floats, drawn: Null
    ) -> Edge:
        a, why = copy.of, copy.how.detail
        if copy.undecided:
            rule = "records say this one" if copy.recorded else "here the first in the list"
            why += f"; weights do not tell which was there first ({rule})"
        return Edge(
            names[a], names[b], copy.how.kind, copy.how.detail, 1.0, 0.99, 0.5 if copy.undecided else ROUNDED,
            _relative(shape, a, b), float(shape.drift[a, b]), drawn.log10_p(float(own[a] @ own[b])), why,
            undecided=copy.undecided,
        )  # fmt: skip

    def _merge_edges(
        self, names: Sequence[str], mixture: Mixture, shape: Geometry, own: Floats, drawn: Null
    ) -> list[Edge]:
        b = mixture.merged
        base = "" if mixture.base is None else f" on {names[mixture.base]}"
        weights = " + ".join(f"{w:.3g} {names[i]}" for i, w in mixture.weights.items())
        found = []
        for a, share in mixture.shares.items():
            if mixture.how == "chosen":
                told = f"{1 - mixture.residual:.1%} of the changed weights are"
                detail = f"a chosen sum{base}, as of TIES or DARE: {told} {weights}"
            else:
                detail = f"{mixture.how}{base}: {weights}"
            found.append(
                Edge(
                    names[a], names[b], "merge", detail, share, 0.99, 0.95, _relative(shape, a, b),
                    float(shape.drift[a, b]), drawn.log10_p(float(own[a] @ own[b])),
                    f"{detail}, squared rest {mixture.residual:.1e}",
                )
            )  # fmt: skip
        return found

    def _with_moves(self, edge: Edge) -> Edge:
        """An edge that a moved copy is part of, said so."""
        moves = [f"{n} was moved ({self._undone[n][2]})" for n in (edge.parent, edge.child) if n in self._undone]
        if not moves:
            return edge
        why = f"{edge.why}; after undoing: {' and '.join(moves)}"
        across = (edge.parent in self._undone) != (edge.child in self._undone)
        if edge.kind == "merge" or not across:
            return replace(edge, why=why)
        if edge.undecided:
            kinds = self._undone[edge.parent if edge.parent in self._undone else edge.child][2]
            return replace(edge, kind="moved copy", detail=f"the same up to {kinds}", why=why)
        return replace(edge, kind="moved copy", detail=f"{edge.kind}, and {' and '.join(moves)}", why=why)


def _above(parents: Mapping[int, int], of: int) -> list[int]:
    """The ancestors of a network, nearest first."""
    found = []
    while parents[of] != OUTSIDE:
        of = parents[of]
        found.append(of)
    return found


def _relative(shape: Geometry, a: int, b: int) -> float:
    return float(np.sqrt(shape.squared[a, b] / max(shape.norms[a] + shape.norms[b], shape.tiny)))


def _blocked(merges: Mapping[int, Mixture], kept: Sequence[int]) -> dict[int, set[int]]:
    """Which networks may not be parents of which: a merge not of what it is made of."""
    at = {k: i for i, k in enumerate(kept)}
    found: dict[int, set[int]] = {}
    for m in merges.values():
        for member in {*m.weights, *m.shares, *([] if m.base is None else [m.base])}:
            if member in at:
                found.setdefault(at[member], set()).add(at[m.merged])
    return found


__all__ = ["Kin", "Part"]
