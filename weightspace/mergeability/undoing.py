"""Undoing, symmetry by symmetry, what sets a model apart from a relative: what the search for protection works with.

A ``Reference`` holds one network and what is worked out of it once; models are brought next to it by permutations,
scales, signs and the maps inside heads, and every kind has to show what it alone removes of the distance.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from weightspace.errors import UnprovedWiringError
from weightspace.mergeability.linear import Inner, alike, inner_factors, products_apart, solve
from weightspace.wiring.balance import balance
from weightspace.wiring.matching import Matching, assign, float32, tensor_weights
from weightspace.wiring.places import places
from weightspace.wiring.scaling import Rescaling, Scaling, scaling
from weightspace.wiring.slots import count_of, shape_of
from weightspace.wiring.wiring import Permutation, Wiring

if TYPE_CHECKING:
    from weightspace.wiring.places import Place
    from weightspace.wiring.slots import Slot

Kind = Literal["permutations", "scales", "signs", "maps"]
KINDS: tuple[Kind, ...] = ("permutations", "scales", "signs", "maps")

EXPLAINED = 0.5
"""A kind is reported for a factor where undoing it removes this share of the squared distance, corrected for chance."""
FAR = 0.1
"""Scales are reported where they take a tensor at least so far from the reference, as a squared relative distance:
training moves along them as well, above all where a norm that follows makes them free (weight decay in front of a batch
norm)."""
_STRANGE = 0.8
_ODD = 0.25


@dataclass(frozen=True)
class Evidence:
    """What undoing one kind did for one factor; ``number`` is that of the generator or flip.

    ``elements`` of ``of`` were moved by it; ``before`` and ``after`` are squared distances to the reference over the
    tensors concerned, relative to the reference's squared norm; ``explained`` the share that went, corrected for the
    share ``chance`` that as many free parameters would take away from a random difference.
    """

    kind: Kind
    factor: str
    number: int
    elements: int
    of: int
    before: float
    after: float
    chance: float

    @property
    def explained(self) -> float:
        """Between 0 (no more than chance) and 1 (all of the distance)."""
        if self.before <= 0:
            return 0.0
        return 1 - min(1.0, (self.after / self.before) / max(1 - self.chance, 1e-9))

    def __repr__(self) -> str:
        return (
            f"{self.kind} on {self.factor}: {self.elements} of {self.of} elements, squared distance "
            f"{self.before:.3g} → {self.after:.3g} ({self.explained:.0%} explained)"
        )


@dataclass(frozen=True, eq=False)
class Plan:
    """What is to be undone: a permutation, log scales of generators, flips, and the factors whose maps are solved."""

    permutation: Permutation
    logs: Mapping[int, Tensor]
    flips: Mapping[int, Tensor]
    maps: tuple[str, ...]

    @staticmethod
    def empty(wiring: Wiring) -> Plan:
        return Plan(wiring.identity(), {}, {}, ())

    @property
    def kinds(self) -> tuple[Kind, ...]:
        held: dict[Kind, bool] = {
            "permutations": bool(self.permutation.index), "scales": bool(self.logs), "signs": bool(self.flips),
            "maps": bool(self.maps),
        }  # fmt: skip
        return tuple(k for k in KINDS if held[k])

    def only(self, evidence: Sequence[Evidence]) -> Plan:
        """Without what nothing speaks for."""
        named = {kind: {e.factor for e in evidence if e.kind == kind} for kind in KINDS}
        numbers = {kind: {e.number for e in evidence if e.kind == kind} for kind in KINDS}
        return Plan(
            Permutation(
                {f: p for f, p in self.permutation.index.items() if f in named["permutations"]},
                self.permutation.factors,
            ),
            {k: u for k, u in self.logs.items() if k in numbers["scales"]},
            {k: s for k, s in self.flips.items() if k in numbers["signs"]},
            tuple(f for f in self.maps if f in named["maps"]),
        )


def _moving(permutation: Permutation) -> Permutation:
    """Without the factors that stay."""
    index = {f: p for f, p in permutation.index.items() if not bool((p == torch.arange(p.shape[-1])).all())}
    return Permutation(index, permutation.factors)


class Reference:
    """What models are held against, with what is worked out of it and the wiring once; for ``examine``.

    Raises ``UnprovedWiringError`` for a wiring that is not proved or has no network to run.
    """

    def __init__(self, reference: Mapping[str, Tensor], wiring: Wiring) -> None:
        if not wiring.proved or wiring.program is None:
            why = "has no network to run" if wiring.program is None else f"is {wiring.status}, not proved"
            raise UnprovedWiringError(
                f"the wiring ({wiring.origin}) {why}; expected a proved one to tell symmetries from other changes: "
                "wire the module with example inputs"
            )
        self.wiring, self.reference = wiring, doubles(reference)
        reference = self.reference
        self.group: Scaling = scaling(wiring)
        self.inner = inner_factors(wiring)
        self.inner_names = {i.factor for i in self.inner}
        self.inner_tensors = {t for i in self.inner for t in i.tensors}
        self.floats = [n for n in wiring.layouts if n in reference and reference[n].is_floating_point()]
        self.squares = {n: float(reference[n].square().sum()) for n in self.floats}
        self.kept: dict[bool, dict[str, Tensor]] = {}
        self.own: list[Tensor] | None = None
        self.shapes = [shape_of(wiring.factors, g.factor) for g in self.group.generators]
        self.flip_shapes = [shape_of(wiring.factors, f.factor) for f in self.group.flips]

    # ---------------------------------------------------------------- distances

    def distance(self, tensors: Mapping[str, Tensor]) -> float:
        """``|m - r| / sqrt(|m|^2 + |r|^2)``, its square averaged over tensors by their sizes."""
        total = weight = 0.0
        for n in self.floats:
            r, m = self.reference[n], tensors[n]
            below = self.squares[n] + float(m.square().sum())
            if below > 0:
                total += r.numel() * min(1.0, float((m - r).square().sum()) / below)
                weight += r.numel()
        return math.sqrt(total / weight) if weight else 0.0

    def squared(self, tensors: Mapping[str, Tensor], names: Iterable[str]) -> float:
        """Mean over some tensors of the squared distance to the reference, relative to its squared norm."""
        parts = [
            float((tensors[n] - self.reference[n]).square().sum()) / self.squares[n]
            for n in dict.fromkeys(names)
            if self.squares.get(n, 0) > 0
        ]
        return sum(parts) / len(parts) if parts else 0.0

    def ordinary(self, tensors: Mapping[str, Tensor]) -> bool:
        """Is every matrix near the reference, and every element of a factor but one at most: is nothing to be undone?

        Copies that are moved so little can be averaged as they are.
        """
        if any(self.squared(tensors, [n]) > FAR for n in self.floats if self.reference[n].dim() > 1):
            return False
        return not self.disordered(tensors, _ODD)

    # ---------------------------------------------------------------- undoing

    def best(self, given: Mapping[str, Tensor]) -> tuple[Plan, dict[str, Tensor], float]:
        """Everything that could be undone, whether anything speaks for it or not; the model then, and its distance.

        Tried without any permutation, with one found on least norms, and where signs may flip with one found after
        settling these as well; the nearest is mended by matching once more from there.
        """
        best = self.tried(given, self.wiring.identity())
        if not self.disordered(best[1]):
            return best
        for signs in (False, True) if self.group.flips else (False,):
            start = self.permutation(given, signs=signs)
            if start.index:
                tried = self.tried(given, start)
                best = tried if tried[2] < best[2] - 1e-9 else best
        movable = [f for f in self.wiring.free if f not in self.inner_names]
        for _ in range(3):
            move = self.matched(best[1], self.reference, self.floats, movable, restart=False)
            tried = self.tried(given, _moving(best[0].permutation.compose(move)))
            if tried[2] >= best[2] - 1e-6:
                break
            best = tried
        return best

    def disordered(self, tensors: Mapping[str, Tensor], limit: float = _STRANGE) -> bool:
        """Are there two elements of a factor or more as far from the reference as strangers, so that a search pays?"""
        for factor, ways in places(self.wiring).items():
            if factor in self.inner_names and limit == _STRANGE:
                continue
            apart, own = torch.zeros(()), torch.zeros(())
            for w in ways:
                if self.squares.get(w.tensor):
                    b = w.view(self.reference[w.tensor])
                    gap = (w.view(tensors[w.tensor]) - b).square().sum(-1) / self.squares[w.tensor]
                    apart, own = apart + gap, own + b.square().sum(-1) / self.squares[w.tensor]
            if int((apart > limit * own).sum()) >= 2:
                return True
        return False

    def tried(self, given: Mapping[str, Tensor], permutation: Permutation) -> tuple[Plan, dict[str, Tensor], float]:
        now = self.permuted(given, permutation)
        logs = self.logs(now)
        flips = self.flips(self.rescaled(now, logs, {}))
        plan = Plan(permutation, logs, flips, tuple(i.factor for i in self.inner))
        full = self.undone(given, plan)
        return plan, full, self.distance(full)

    def gains(self, given: Mapping[str, Tensor], full: Mapping[str, Tensor]) -> bool:
        """Does undoing bring any tensor much nearer? Without that there is nothing to weigh."""
        return any(self.squared(full, [n]) < (1 - EXPLAINED / 2) * self.squared(given, [n]) for n in self.floats)

    def undone(self, given: Mapping[str, Tensor], plan: Plan) -> dict[str, Tensor]:
        now = self.rescaled(self.permuted(given, plan.permutation), plan.logs, plan.flips)
        return self.unmapped(now, self.reference, plan.maps)

    def permuted(self, tensors: Mapping[str, Tensor], permutation: Permutation) -> dict[str, Tensor]:
        if not permutation.index:
            return dict(tensors)
        wired = {n: t for n, t in tensors.items() if n in self.wiring.layouts}
        return {**tensors, **self.wiring.apply(permutation, wired)}

    def rescaled(
        self, tensors: Mapping[str, Tensor], logs: Mapping[int, Tensor], flips: Mapping[int, Tensor]
    ) -> dict[str, Tensor]:
        if not logs and not flips:
            return dict(tensors)
        scales = tuple(
            torch.exp(logs[k]).reshape(s) if k in logs else torch.ones(s, dtype=torch.float64)
            for k, s in enumerate(self.shapes)
        )
        signs = tuple(
            flips[k].reshape(s) if k in flips else torch.ones(s, dtype=torch.float64)
            for k, s in enumerate(self.flip_shapes)
        )
        return self.group.apply(Rescaling(scales, signs), tensors)

    def unmapped(
        self, tensors: Mapping[str, Tensor], reference: Mapping[str, Tensor], factors: Collection[str]
    ) -> dict[str, Tensor]:
        now = dict(tensors)
        for i in self.inner:
            if i.factor in factors:
                now = i.apply(solve(i.read(now), i.read(reference)), now)
        return now

    # ---------------------------------------------------------------- permutations

    def canonical(self, tensors: Mapping[str, Tensor], signs: bool) -> dict[str, Tensor]:
        if not self.group.generators and not (self.group.flips and signs):
            return dict(tensors)
        return self.group.canonical(tensors, tolerance=1e-8, max_sweeps=30, signs=signs)

    def permutation(self, given: Mapping[str, Tensor], signs: bool, rounds: int = 4) -> Permutation:
        """Brings the model next to the reference: heads by what they compute, all else by weight matching."""
        found, now, fixed = self.wiring.identity(), self.canonical(given, signs), self.balanced(signs)
        outer = {o for i in self.inner for o in self.wiring.factors[i.factor].over}
        movable = [f for f in self.wiring.free if f not in self.inner_names]
        # What maps are inside heads says nothing of the other axes before the maps are known.
        names, factors = self.floats, movable
        if self.inner:
            names = [n for n in self.floats if n not in self.inner_tensors]
            factors = [f for f in movable if f not in outer]
        for step in range(rounds):
            move = self.matched(now, fixed, names, factors, restart=not step)
            now, found = self.permuted(now, move), found.compose(move)
            if not self.inner:
                break
            heads = self.heads(now, fixed)
            now, found = self.permuted(now, heads), found.compose(heads)
            if step and move.is_identity and heads.is_identity:
                break
            # With the maps undone for the time being, the tensors of attention have a say as well.
            now = self.unmapped(now, fixed, self.inner_names)
            names, factors = self.floats, movable
        return _moving(found)

    def balanced(self, signs: bool) -> dict[str, Tensor]:
        """The reference's representative, worked out once."""
        if signs not in self.kept:
            self.kept[signs] = self.canonical(self.reference, signs)
        return self.kept[signs]

    def matched(
        self, now: Mapping[str, Tensor], toward: Mapping[str, Tensor], names: Sequence[str], factors: Sequence[str],
        restart: bool,
    ) -> Permutation:  # fmt: skip
        fixed, moving = float32(toward), float32(now)
        held = tensor_weights(self.wiring, fixed, moving, "rms")
        weights = {n: w for n, w in held.items() if n in set(names)}
        best: Matching | None = None
        for anchored in (False, True) if restart else (False,):
            tried = Matching(self.wiring, fixed, moving, weights, only=factors)
            if anchored:
                tried.anchored()
            tried.ascend(sweeps=30)
            if best is None or tried.objective > best.objective:
                best = tried
        assert best is not None
        return best.permutation

    def heads(self, now: Mapping[str, Tensor], fixed: Mapping[str, Tensor]) -> Permutation:
        """The permutation of the factors over which maps are fibred, where that is one factor alone."""
        over: dict[str, list[Inner]] = {}
        for i in self.inner:
            outer = self.wiring.factors[i.factor].over
            if len(outer) == 1 and not self.wiring.factors[outer[0]].pinned and not self.wiring.factors[outer[0]].over:
                over.setdefault(outer[0], []).append(i)
        index = {}
        for name, inners in over.items():
            score = alike([i.read(now) for i in inners], [i.read(fixed) for i in inners])
            columns = assign(score)
            still = torch.arange(len(columns))
            gain = float(score[still, columns].sum() - score.diagonal().sum())
            if gain > 1e-6 * len(columns):
                index[name] = columns
        return Permutation(index, self.wiring.factors)

    # ---------------------------------------------------------------- scales, signs

    def logs(self, now: Mapping[str, Tensor]) -> dict[int, Tensor]:
        """Log scales of every generator that is not inside a head, from the least-norm representatives of both."""
        chosen = [k for k, g in enumerate(self.group.generators) if g.factor not in self.inner_names]
        if not chosen:
            return {}
        if self.own is None:
            self.own = self.norms(self.reference, chosen)
        return {k: ours - theirs for k, ours, theirs in zip(chosen, self.norms(now, chosen), self.own, strict=True)}

    def norms(self, tensors: Mapping[str, Tensor], chosen: Sequence[int]) -> list[Tensor]:
        """Log scales to the least norm over the tensors that no map inside a head changes."""
        counts = [count_of(self.wiring.factors, self.group.generators[k].factor) for k in chosen]
        actions: dict[str, list[tuple[int, int, Slot]]] = {}
        for j, k in enumerate(chosen):
            slots = self.group.generators[k].slots
            usable = [(s, e) for s, e in slots if s.tensor not in self.inner_tensors] or slots
            for slot, e in usable:
                actions.setdefault(slot.tensor, []).append((j, e, slot))
        return [u.reshape(-1) for u in balance({n: tensors[n] for n in actions}, actions, counts, 0, 1e-8, 30)]

    def flips(self, now: Mapping[str, Tensor]) -> dict[int, Tensor]:
        """Signs that turn every element toward the reference's, one flip after the other."""
        found: dict[int, Tensor] = {}
        for k, flip in enumerate(self.group.flips):
            if flip.factor in self.inner_names:
                continue
            turned = self.rescaled(now, {}, found)
            count = count_of(self.wiring.factors, flip.factor)
            toward = torch.zeros(count, dtype=torch.float64)
            for s in [s for s in flip.slots if s.tensor not in self.inner_tensors] or flip.slots:
                toward += s.sums(turned[s.tensor] * self.reference[s.tensor], count) / (self.squares[s.tensor] or 1.0)
            if bool((toward < 0).any()):
                found[k] = torch.where(toward < 0, -1.0, 1.0).to(torch.float64)
        return found

    # ---------------------------------------------------------------- what speaks for it

    def evidence(self, given: Mapping[str, Tensor], whole: Plan, full: Mapping[str, Tensor]) -> list[Evidence]:
        """Everything is undone but one thing: does that leave the model far from the reference?"""
        return [
            *self._permutations(given, whole, full),
            *self._scales(given, whole, full),
            *self._signs(given, whole, full),
            *self._maps(given, whole, full),
        ]

    def _permutations(self, given: Mapping[str, Tensor], whole: Plan, full: Mapping[str, Tensor]) -> Iterable[Evidence]:
        ways = places(self.wiring)
        for name, p in whole.permutation.index.items():
            moved = p != torch.arange(p.shape[-1])
            # A pair of like neurons that changed places in training says nothing.
            if name in self.inner_names or int(moved.sum()) < 2:
                continue
            others = {f: q for f, q in whole.permutation.index.items() if f != name}
            without = replace(whole, permutation=Permutation(others, self.wiring.factors))
            left = self.undone(given, without)
            held = [w for w in ways[name] if w.tensor in self.floats]
            before, after = (self._elements(t, held, moved) for t in (left, full))
            yield Evidence("permutations", name, 0, int(moved.sum()), moved.numel(), before, after, 0.0)

    def _elements(self, tensors: Mapping[str, Tensor], held: Sequence[Place], moved: Tensor) -> float:
        """Squared distance to the reference of some elements, over all places that carry them."""
        total, count = 0.0, 0
        for w in held:
            a, b = w.view(tensors[w.tensor]), w.view(self.reference[w.tensor])
            own = float(b.square().sum(-1)[moved].sum())
            if own > 0:
                total += float((a - b).square().sum(-1)[moved].sum()) / own
                count += 1
        return total / count if count else 0.0

    def _scales(self, given: Mapping[str, Tensor], whole: Plan, full: Mapping[str, Tensor]) -> Iterable[Evidence]:
        for k, u in whole.logs.items():
            generator = self.group.generators[k]
            names = [s.tensor for s, _ in generator.slots]
            left = self.undone(given, replace(whole, logs={j: v for j, v in whole.logs.items() if j != k}))
            entries = sum(self.reference[n].numel() for n in dict.fromkeys(names))
            yield Evidence(
                "scales", generator.factor, k, int((u.abs() > 0.05).sum()), u.numel(), self.squared(left, names),
                self.squared(full, names), min(0.5, u.numel() / max(entries, 1)),
            )  # fmt: skip

    def _signs(self, given: Mapping[str, Tensor], whole: Plan, full: Mapping[str, Tensor]) -> Iterable[Evidence]:
        for k, s in whole.flips.items():
            flip = self.group.flips[k]
            names = [x.tensor for x in flip.slots]
            left = self.undone(given, replace(whole, flips={j: v for j, v in whole.flips.items() if j != k}))
            yield Evidence(
                "signs", flip.factor, k, int((s < 0).sum()), s.numel(), self.squared(left, names),
                self.squared(full, names), 0.0,
            )  # fmt: skip

    def _maps(self, given: Mapping[str, Tensor], whole: Plan, full: Mapping[str, Tensor]) -> Iterable[Evidence]:
        for i in self.inner:
            left = self.undone(given, replace(whole, maps=tuple(f for f in whole.maps if f != i.factor)))
            before, after = (self._sides(i, t) for t in (left, full))
            # Training moves what the sides compute as much as the sides; a map moves the sides alone.
            after = max(after, products_apart(i.read(left), i.read(self.reference)))
            yield Evidence("maps", i.factor, 0, i.groups * i.size, i.groups * i.size, before, after, 0.0)

    def _sides(self, inner: Inner, tensors: Mapping[str, Tensor]) -> float:
        ours, theirs = inner.read(tensors), inner.read(self.reference)
        apart = sum(float((a - b).square().sum()) for a, b in zip(ours, theirs, strict=True))
        return apart / (sum(float(b.square().sum()) for b in theirs) or 1.0)


def doubles(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Floating-point tensors in float64, the others as they are."""
    return {n: t.to(torch.float64) if t.is_floating_point() else t for n, t in tensors.items()}


__all__ = ["EXPLAINED", "FAR", "KINDS", "Evidence", "Kind", "Plan", "Reference", "doubles"]
