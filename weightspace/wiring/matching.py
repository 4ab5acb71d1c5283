"""Bringing one network next to another of the same wiring: the engine behind every alignment by weights.

The objective is the inner product ``sum_t w_t <a_t, (P b)_t>`` over the tensors of two networks, where ``P`` runs over
the wiring's symmetry group. It is linear in the permutation of one factor while the others stay (a linear assignment
for every position that the factor is fibred over), which gives the coordinate ascent of Ainsworth et al. 2023 ("Git
Re-Basin"). Factors that others are fibred over (heads, groups, experts) are matched *nested*: the cost of laying one
head on another is taken after the best match of what is inside the two.

What makes it fast: float32 products; the similarity of a factor is kept per tensor and mended only by the columns that
moved since; tensors are permuted when someone looks at them; a factor is visited again only after a neighbour moved.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod

import numpy as np
import torch
from torch import Tensor

from weightspace.wiring.places import Place, places
from weightspace.wiring.wiring import Permutation, Wiring, _act

# Views of both networks are kept while they take up no more than this many bytes.
_KEEP = 3 << 30
# Steps that gain less than this share of |a| |b| are rounding.
_LEAST = 1e-7
_PIECE = 1 << 13
# Places with no more numbers than this for each element (vectors) are taken together.
_THIN = 8
# Columns that moved are mended while they are no more than this share of all.
_FEW = 0.45


def float32(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Floating-point tensors as float32, complex ones as real and imaginary parts behind; others are left out."""
    out = {}
    for name in tensors:
        t = tensors[name].detach()
        if t.is_complex():
            t = torch.view_as_real(t.resolve_conj())
        if t.is_floating_point() and t.numel():
            out[name] = t.to(torch.float32)
    return out


def acted(wiring: Wiring, perm: Permutation, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """``float32`` tensors after a group element, as ``wiring.apply`` moves those of the file."""
    return {n: _act(t, wiring.layouts[n], perm) for n, t in tensors.items()}


def tensor_weights(
    wiring: Wiring, fixed: Mapping[str, Tensor], moving: Mapping[str, Tensor], kind: str = "plain"
) -> dict[str, float]:
    """How much each tensor counts: ``plain`` (1, the weights' own scale) or ``rms`` (1 / product of root mean squares).

    ``plain`` leaves running means and variances out, whose scale is that of activations, unless a factor has no other
    tensor. Only tensors that carry a free factor count.
    """
    carried = places(wiring)
    involved = dict.fromkeys(p.tensor for row in carried.values() for p in row)
    both = [n for n in involved if n in fixed and n in moving]
    if kind == "rms":
        return {n: 1 / max(_rms(fixed[n]) * _rms(moving[n]), 1e-30) for n in both}
    statistics = {n for n in both if wiring.roles.get(n) in ("mean", "variance")}
    for row in carried.values():
        if row and all(p.tensor in statistics or p.tensor not in fixed for p in row):
            statistics -= {p.tensor for p in row}
    return {n: 1.0 for n in both if n not in statistics}


def inner(a: Mapping[str, Tensor], b: Mapping[str, Tensor], weights: Mapping[str, float]) -> float:
    """``sum_t w_t <a_t, b_t>``, summed in float64."""
    return sum(w * dot(a[n], b[n]) for n, w in weights.items())


def dot(a: Tensor, b: Tensor) -> float:
    """``<a, b>`` of float32 tensors; pieces of 8,192 products are summed in float32, the pieces in float64."""
    # Neither torch's batched products of vectors nor its threads pay for sums this short.
    x, y = (t.detach().reshape(-1).cpu().numpy() for t in (a, b))
    whole = len(x) // _PIECE * _PIECE
    pieces = np.einsum("ij,ij->i", x[:whole].reshape(-1, _PIECE), y[:whole].reshape(-1, _PIECE))
    return float(pieces.sum(dtype=np.float64)) + float(np.dot(x[whole:], y[whole:]))


def unit_of(a: Mapping[str, Tensor], b: Mapping[str, Tensor], weights: Mapping[str, float]) -> float:
    """``|a| |b|`` with the tensors' weights: the inner product over this is the total weight cosine."""
    return (inner(a, a, weights) * inner(b, b, weights)) ** 0.5 or 1.0


def assign(similarity: Tensor) -> Tensor:
    """The permutations of greatest total similarity: ``(*over, n, n)`` to index arrays ``(*over, n)``."""
    from scipy.optimize import linear_sum_assignment

    n = similarity.shape[-1]
    # What a row or a column has in common changes no choice between permutations, but delays the solver ten times.
    similarity = similarity - similarity.mean(-1, keepdim=True)
    similarity = similarity - similarity.mean(-2, keepdim=True)
    rows = similarity.reshape(-1, n, n)
    out = torch.empty(len(rows), n, dtype=torch.long)
    best = rows.argmax(-1).cpu()
    for k, row in enumerate(rows):
        # Where each takes its best and no two the same, there is nothing to solve.
        if len(torch.unique(best[k])) == n:
            out[k] = best[k]
        else:
            out[k] = torch.from_numpy(linear_sum_assignment(row.cpu().numpy(), maximize=True)[1])
    return out.reshape(similarity.shape[:-1])


@dataclass
class _Cost:
    """Similarity ``(*over, n, n)`` of one place, the view it was made with and the versions that went in."""

    value: Tensor
    view: Tensor | None
    version: int


class Matching:
    """Two networks being matched: the permutation so far, and what is known of the similarities.

    ``fixed`` and ``moving`` are float32 tensors (``float32``); ``weights`` says which tensors count and how much.
    ``only`` are the factors that may move (default: all free ones of size 2 or more).
    """

    def __init__(
        self, wiring: Wiring, fixed: Mapping[str, Tensor], moving: Mapping[str, Tensor],
        weights: Mapping[str, float] | None = None, *, start: Permutation | None = None,
        only: Iterable[str] | None = None,
    ) -> None:  # fmt: skip
        self.wiring = wiring
        self.weights = dict(tensor_weights(wiring, fixed, moving) if weights is None else weights)
        self.fixed, self.moving = fixed, moving
        self.permutation = start or wiring.identity()
        found = places(wiring)
        self.places: dict[str, tuple[Place, ...]] = {
            name: tuple(p for p in found[name] if self.weights.get(p.tensor))
            for name, factor in wiring.free.items()
            if factor.size > 1
        }
        chosen = list(self.places) if only is None else list(only)
        self.factors = [f for f in chosen if self.places.get(f)]
        self.children = {f: [e for e in self.factors if f in wiring.factors[e].over] for f in self.factors}
        self._versions = dict.fromkeys(self.weights, 0)
        self._now: dict[str, tuple[int, Tensor]] = {}
        self._views: dict[int, Tensor] = {}
        self._costs: dict[int, _Cost] = {}
        # Each vector alone would fill a matrix of all pairs of elements; together they are one thin product.
        self._thin = {
            id(p)
            for f in self.factors
            for p in self.places[f]
            if fixed[p.tensor].numel() <= _THIN * wiring.factors[f].size * prod(self._over(f))
        }
        size = sum(fixed[p.tensor].numel() * 4 for f in self.factors for p in self.places[f])
        self._keep = 2 * size <= _KEEP
        self._sizes = {n: w * _norm(fixed[n]) * _norm(moving[n]) for n, w in self.weights.items()}
        self.unit = unit_of(fixed, moving, self.weights)
        self.objective = self._part(self.weights)

    # ---------------------------------------------------------------- looking

    def now(self, tensor: str) -> Tensor:
        """A tensor of the moving network after the permutation so far."""
        version = self._versions[tensor]
        held = self._now.get(tensor)
        if held is None or held[0] != version:
            raw = self.moving[tensor]
            moved = raw if not self.permutation.index else _act(raw, self.wiring.layouts[tensor], self.permutation)
            self._now[tensor] = held = (version, moved)
        return held[1]

    def similarity(self, factor: str, tensors: Iterable[str] | None = None) -> Tensor:
        """``(*over, n, n)``: what laying element j of the moving network (as it is now) on element i adds.

        ``tensors`` restricts it to some of the tensors.
        """
        chosen = None if tensors is None else set(tensors)
        total: Tensor | None = None
        thin: list[tuple[Tensor, Tensor]] = []
        for place in self.places[factor]:
            if chosen is not None and place.tensor not in chosen:
                continue
            weight = self.weights[place.tensor]
            if id(place) in self._thin:
                thin.append((weight * self._fixed_view(place), place.view(self.now(place.tensor))))
                continue
            value = self._cost(place)
            total = value * weight if total is None else total.add_(value, alpha=weight)
        if thin:
            one, two = (torch.cat(parts, -1) for parts in zip(*thin, strict=True))
            value = one @ two.transpose(-1, -2)
            total = value if total is None else total.add_(value)
        assert total is not None
        return total

    def _over(self, factor: str) -> list[int]:
        return [self.wiring.factors[o].size for o in self.wiring.factors[factor].over]

    def _fixed_view(self, place: Place) -> Tensor:
        found = self._views.get(id(place))
        if found is None:
            found = place.view(self.fixed[place.tensor])
            if self._keep:
                self._views[id(place)] = found
        return found

    def _cost(self, place: Place) -> Tensor:
        known, version = self._costs.get(id(place)), self._versions[place.tensor]
        if known is not None and known.version == version:
            return known.value
        view = place.view(self.now(place.tensor))
        fixed = self._fixed_view(place)
        if known is not None and known.view is not None:
            gap = view - known.view
            columns = gap.reshape(-1, gap.shape[-1]).abs().amax(0).nonzero().flatten()
            if len(columns) <= _FEW * gap.shape[-1]:
                if len(columns):
                    part = fixed.index_select(-1, columns)
                    known.value = known.value + part @ gap.index_select(-1, columns).transpose(-1, -2)
                known.view, known.version = view, version
                return known.value
        value = fixed @ view.transpose(-1, -2)
        self._costs[id(place)] = _Cost(value, view if self._keep else None, version)
        return value

    # ---------------------------------------------------------------- moving

    def move(self, step: Permutation, gain: float | None = None) -> None:
        """Acts with a group element; ``gain`` is what the objective rises by, where it is known."""
        moved = [f for f, p in step.index.items() if not bool((p == torch.arange(p.shape[-1])).all())]
        if not moved:
            return
        touched = {p.tensor for f in moved for p in self.places.get(f, ())}
        before = None if gain is not None else self._part(touched)
        alone = moved[0] if len(moved) == 1 else None
        follow = [p for p in self.places[alone] if not p.repeated] if alone is not None else []
        # The similarity of a factor that moves alone keeps its entries, in another order.
        fresh = [p for p in follow if self._is_fresh(p)]
        self.permutation = self.permutation.compose(Permutation({f: step.index[f] for f in moved}, step.factors))
        for t in touched:
            self._versions[t] += 1
        for p in fresh:
            known = self._costs[id(p)]
            index = step.index[p.factor]
            known.value = _columns(known.value, index)
            known.view = None if known.view is None else _rows(known.view, index)
            known.version = self._versions[p.tensor]
        self.objective += gain if gain is not None else self._part(touched) - (before or 0.0)

    def _is_fresh(self, place: Place) -> bool:
        known = self._costs.get(id(place))
        return known is not None and known.version == self._versions[place.tensor]

    def _part(self, tensors: Iterable[str]) -> float:
        return sum(self.weights[t] * dot(self.fixed[t], self.now(t)) for t in tensors)

    def improve(self, factor: str, tensors: Iterable[str] | None = None, *, nested: bool = False) -> float:
        """Moves one factor to its best place while all others stay; gives the gain (0 where it stays).

        With ``tensors`` only those decide, and ``objective`` has to be counted afresh (``recount``) before it is read.
        ``nested`` moves what is fibred over it as well.
        """
        if nested and self.children[factor]:
            return self._improve_nested(factor, tensors)
        similarity = self.similarity(factor, tensors)
        index = assign(similarity)
        step = Permutation({factor: index}, self.wiring.factors)
        if step.is_identity:
            return 0.0
        expected = float(_traces(_columns(similarity, index)).sum() - _traces(similarity).sum())
        if expected <= _LEAST * self.unit:
            return 0.0
        if tensors is not None:
            # What this does to the other tensors is counted by whoever asked.
            self.move(step, expected)
            return expected
        if not any(p.repeated for p in self.places[factor]) and not self.children[factor]:
            self.move(step, expected)
            return expected
        return self._try(step)

    def _try(self, step: Permutation) -> float:
        """Moves where that raises the objective; gives the gain."""
        before, kept = self.objective, self.permutation
        self.move(step)
        gain = self.objective - before
        if gain > _LEAST * self.unit:
            return gain
        back = step.invert()
        self.move(back, before - self.objective)
        self.permutation = kept
        return 0.0

    def _improve_nested(self, factor: str, tensors: Iterable[str] | None) -> float:
        """Every element of a is laid on every element of b, each pair with its own best match inside."""
        wiring, inside = self.wiring, self.children[factor]
        own = wiring.factors[factor]
        if any(wiring.factors[e].over[: len(own.over)] != own.over for e in inside) or any(
            p.repeated for p in self.places[factor]
        ):
            return self.improve(factor, tensors)
        chosen = {p.tensor for p in self.places[factor]}
        if tensors is not None:
            chosen &= set(tensors)
        now = {t: self.now(t) for t in chosen}
        weights = {t: self.weights[t] for t in chosen}
        rows, found = [], []
        shape = [wiring.factors[o].size for o in own.over]
        for i in range(own.size):
            every = Permutation({factor: torch.full((*shape, own.size), i)}, wiring.factors)
            fixed = {t: _act(self.fixed[t], wiring.layouts[t], every) for t in chosen}
            sub = Matching(wiring, fixed, now, weights, only=inside)
            sub.anchored()
            sub.ascend(sweeps=4)
            rows.append(
                sum(
                    weights[p.tensor] * (p.view(fixed[p.tensor]) * p.view(sub.now(p.tensor))).sum(-1)
                    for p in self.places[factor]
                    if p.tensor in chosen
                )
            )
            found.append(sub.permutation)
        similarity = torch.stack([r for r in rows if isinstance(r, Tensor)], -2)
        index = assign(similarity)
        step = {factor: index}
        lead = len(own.over)
        for e in inside:
            over = wiring.factors[e].over
            at = over.index(factor)
            # (i, *over, n) with this factor's own position behind i, then the row that i was laid on.
            stacked = torch.stack([p._of(e) for p in found]).movedim(1 + at, 1 + lead)
            picked = _pick(stacked.movedim(0, lead), index, lead)
            step[e] = picked.movedim(lead, at).contiguous()
        if tensors is not None:
            self.move(Permutation(step, wiring.factors), 0.0)
            return 1.0
        return self._try(Permutation(step, wiring.factors))

    # ---------------------------------------------------------------- whole searches

    def anchored(self) -> None:
        """A first match that goes outward from what cannot move.

        The factor with the largest share of settled weight goes next, by those tensors alone of which all other
        factors are settled: what is still in disorder has no say.
        """
        left = [f for f in self.factors if not any(f in self.children[g] for g in self.factors)]
        inside = [f for f in self.factors if f not in left]
        open_ = set(self.factors)
        while left or inside:
            best, chosen, most = None, [], 0.0
            for f in left or inside:
                loose = open_ - {f, *self.children[f]}
                rows = {p.tensor for p in self.places[f]}
                usable = [p.tensor for p in self.places[f] if not p.repeated and not any(o in loose for o in p.others)]
                weight = sum(self._weight(t) for t in dict.fromkeys(usable))
                share = weight / (sum(self._weight(t) for t in rows) or 1.0)
                if share > most:
                    best, chosen, most = f, usable, share
            if best is None:
                best = (left or inside)[0]
                self.improve(best, nested=True)
            else:
                self.improve(best, chosen, nested=True)
            done = [best, *self.children[best]]
            open_ -= set(done)
            left = [f for f in left if f not in done]
            inside = [f for f in inside if f not in done]
        self.recount()

    def _weight(self, tensor: str) -> float:
        return self._sizes[tensor]

    def ascend(
        self, generator: torch.Generator | None = None, sweeps: int = 50, *, tolerance: float = 0.0,
        dirty: Iterable[str] | None = None,
    ) -> int:  # fmt: skip
        """Coordinate ascent until no factor moves; gives the number of sweeps over the factors.

        Ends before that after so many ``sweeps``, or a sweep that gained less than ``tolerance`` of ``|a| |b|``.
        Factors are visited in a random order where a generator is given; ``dirty`` are those to begin with.
        """
        neighbours = self.neighbours
        waiting = set(self.factors if dirty is None else dirty)
        done = 0
        while waiting and done < sweeps:
            order = self.factors
            if generator is not None:
                order = [order[i] for i in torch.randperm(len(order), generator=generator).tolist()]
            done += 1
            before = self.objective
            for f in order:
                if f not in waiting:
                    continue
                waiting.discard(f)
                if self.improve(f) or (self.children[f] and self.improve(f, nested=True)):
                    waiting |= neighbours[f]
            if self.objective - before <= tolerance * self.unit:
                break
        return done

    def kick(self, generator: torch.Generator, share: float = 0.1) -> bool:
        """Mixes up a share of one factor's elements, lets the others answer and all settle; undone unless it helped.

        A large-neighbourhood step out of a local optimum. Gives whether the objective rose.
        """
        chosen = self.factors[int(torch.randint(0, len(self.factors), (1,), generator=generator))]
        size = self.wiring.factors[chosen].size
        cycle = torch.randperm(size, generator=generator)[: max(2, round(share * size))]
        index = torch.arange(size)
        index[cycle] = cycle.roll(1)
        shape = [self.wiring.factors[o].size for o in self.wiring.factors[chosen].over]
        before, kept = self.objective, self.permutation
        self.move(Permutation({chosen: index.expand(*shape, size).contiguous()}, self.wiring.factors))
        self.ascend(generator, sweeps=10, dirty=self.neighbours[chosen])
        if self.objective > before + _LEAST * self.unit:
            return True
        self.jump(kept)
        self.objective = before
        return False

    def jump(self, permutation: Permutation) -> None:
        """Goes to another group element; the objective is not counted."""
        names = {**permutation.index, **self.permutation.index}
        other = [f for f in names if not torch.equal(permutation._of(f), self.permutation._of(f))]
        for t in {p.tensor for f in other for p in self.places.get(f, ())}:
            self._versions[t] += 1
        self.permutation = permutation

    @cached_property
    def neighbours(self) -> dict[str, set[str]]:
        """Of each factor, those whose similarity changes when it moves."""
        carriers: dict[str, set[str]] = {}
        for f in self.factors:
            for p in self.places[f]:
                carriers.setdefault(p.tensor, set()).add(f)
        out: dict[str, set[str]] = {}
        for f in self.factors:
            near = set().union(*(carriers[p.tensor] for p in self.places[f]))
            out[f] = near if any(p.repeated for p in self.places[f]) else near - {f}
        return out

    @property
    def work(self) -> float:
        """Floating-point operations of all similarities, computed once."""
        return sum(
            2.0 * self.fixed[p.tensor].numel() * self.wiring.factors[f].size
            for f in self.factors
            for p in self.places[f]
        )

    def recount(self) -> float:
        """The objective computed afresh."""
        self.objective = self._part(self.weights)
        return self.objective


class Matcher:
    """Weight matching on one wiring for many pairs of small networks (mixup after alignment)."""

    def __init__(self, wiring: Wiring) -> None:
        self.wiring = wiring

    def match(
        self, fixed: Mapping[str, Tensor], moving: Mapping[str, Tensor], rounds: int = 20
    ) -> tuple[Permutation, dict[str, Tensor]]:
        """The permutation that brings ``moving`` near ``fixed``, and ``moving`` after it.

        Each tensor counts relative to its root mean squares, so that batch-norm variances do not outweigh
        kernels. A factor moves only when that raises the inner product, so the ascent ends; it finds a local
        optimum. At most ``rounds`` passes over all factors.
        """
        a, b = float32(fixed), float32(moving)
        found = Matching(self.wiring, a, b, tensor_weights(self.wiring, a, b, "rms"))
        found.ascend(sweeps=rounds)
        return found.permutation, self.wiring.apply(found.permutation, moving)


def matcher_of(wiring: Wiring) -> Matcher:
    """The matcher of a wiring, kept on it."""
    known = wiring.kept.get("matcher")
    if not isinstance(known, Matcher):
        wiring.kept["matcher"] = known = Matcher(wiring)
    return known


def _rms(x: Tensor) -> float:
    return float(_norm(x) / max(x.numel(), 1) ** 0.5)


def _norm(x: Tensor) -> float:
    return float(torch.linalg.vector_norm(x.detach()))


def _traces(x: Tensor) -> Tensor:
    return x.diagonal(dim1=-2, dim2=-1).sum(-1).double()


def _columns(similarity: Tensor, index: Tensor) -> Tensor:
    """``C[…, i, index[…, j]]``."""
    if index.dim() == 1:
        return similarity.index_select(-1, index.to(similarity.device))
    return similarity.gather(-1, index.to(similarity.device).unsqueeze(-2).expand(similarity.shape))


def _rows(view: Tensor, index: Tensor) -> Tensor:
    """``V[…, index[…, j], rest]``."""
    if index.dim() == 1:
        return view.index_select(0, index.to(view.device))
    return view.gather(-2, index.to(view.device).unsqueeze(-1).expand(view.shape))


def _pick(stacked: Tensor, index: Tensor, lead: int) -> Tensor:
    """``stacked (*lead, i, j, …)`` at ``j = index[*lead, i]``: ``(*lead, i, …)``."""
    shape = stacked.shape
    wanted = index.reshape(*index.shape, 1, *([1] * (len(shape) - lead - 2)))
    wanted = wanted.expand(*shape[: lead + 1], 1, *shape[lead + 2 :])
    return stacked.gather(lead + 1, wanted).squeeze(lead + 1)


__all__: Sequence[str] = ("Matcher", "Matching", "assign", "dot", "float32", "inner", "matcher_of", "tensor_weights")
