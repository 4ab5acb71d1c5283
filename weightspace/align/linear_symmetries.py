"""Symmetries larger than permutations: linear maps inside heads, rotations of the residual stream.

A query and a key meet in a product that sums over a head's channels, as values and the output projection do: any
invertible matrix on one side and its inverse on the other cancel. Under rotary positions only maps that commute with
the rotations do, a rotation and scaling of each pair of channels. A stream that is only ever added to, and read behind
norms that divide by its length (RMSNorm, its gains folded into what reads it), may be rotated by an orthogonal matrix.

None of these cases is known by name. Which tensors hold the two sides comes from the scale symmetries of the wiring
(``weightspace.wiring.scaling``: what a channel is multiplied by on one side, it is divided by on the other); a map is
kept only if random ones leave the outputs unchanged.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from itertools import product
from typing import Literal

import torch
from torch import Tensor

from weightspace.wiring.places import Place, places, places_of
from weightspace.wiring.proof import TOLERANCE, distance, generic, is_rounding, run
from weightspace.wiring.scaling import Generator, Scaling, scaling
from weightspace.wiring.slots import multiply
from weightspace.wiring.wiring import Wiring, _joint

Kind = Literal["general", "rotary", "orthogonal"]
# More occurrences of a factor than this are not tried in all divisions into two sides.
_MOST_SLOTS = 6


@dataclass(frozen=True, eq=False)
class LinearSymmetry:
    """Maps ``M (*over, d, d)`` on the positions of a factor: ``M`` on one side, its inverse transposed on the other.

    ``kind``: *general* (any invertible M), *rotary* (2 × 2 rotations and scalings of the given pairs of positions),
    *orthogonal*. ``sides`` holds each place with +1 or -1. ``folded`` are the gains that have to be one first, each
    with the generator that folds it into what reads it. ``error``: of the outputs in float32 under random maps.
    """

    factor: str
    kind: Kind
    over: tuple[str, ...]
    shape: tuple[int, ...]
    error: float
    sides: tuple[tuple[Place, int], ...] = field(repr=False)
    pairs: tuple[tuple[int, ...], tuple[int, ...]] | None = field(default=None, repr=False)
    folded: tuple[tuple[str, Generator], ...] = field(default=(), repr=False)
    tied: Mapping[str, str] = field(default_factory=dict, repr=False)

    @property
    def name(self) -> str:
        """The factor's; with the heads that it lies in where one pinned factor serves several."""
        return f"{self.factor} in {', '.join(self.over)}" if self.kind == "rotary" and self.over else self.factor

    @property
    def size(self) -> int:
        return self.shape[-1]

    @property
    def tensors(self) -> set[str]:
        """Names of the tensors that a map changes."""
        own = {p.tensor for p, _ in self.sides}
        return own | {n for n, first in self.tied.items() if first in own}

    def act(self, maps: Tensor, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The tensors after maps acted, computed in float64, dtypes kept; others come back as they are."""
        forward = maps.double()
        back = forward if self.kind == "orthogonal" else torch.linalg.inv(forward).transpose(-1, -2)
        own = dict.fromkeys(p.tensor for p, _ in self.sides)
        moved = {n: tensors[n].double() for n in own}
        for place, side in self.sides:
            t = moved[place.tensor]
            moved[place.tensor] = place.put(t, (forward if side > 0 else back) @ place.view(t))
        out = {n: moved[n].to(t.dtype) if n in own else t for n, t in tensors.items()}
        for name, first in self.tied.items():
            if first in own and name in out:
                out[name] = out[first]
        return out

    def fold(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The tensors with every gain in question one, and what reads it multiplied by it: the same function."""
        return self._gained(tensors, {name: 1 / tensors[name].double().reshape(-1) for name, _ in self.folded})

    def unfold(self, tensors: Mapping[str, Tensor], like: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The inverse, to the gains that ``like`` has."""
        return self._gained(tensors, {name: like[name].double().reshape(-1) for name, _ in self.folded})

    def _gained(self, tensors: Mapping[str, Tensor], factors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        out = dict(tensors)
        for name, generator in self.folded:
            power = next(e for s, e in generator.slots if s.tensor == name)
            for slot, e in generator.slots:
                values = factors[name] ** (e * power)
                out[slot.tensor] = multiply(out[slot.tensor], [(slot, values)])
        for name, first in self.tied.items():
            if name in out and out[first] is not tensors[first]:
                out[name] = out[first]
        return out

    def random(self, seed: int = 0) -> Tensor:
        """Random maps well away from the identity, of condition number 4 at most, float64."""
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        lead, d = self.shape[:-1], self.size
        if self.kind == "rotary":
            assert self.pairs is not None
            half = d // 2
            angle, scale = 3 * normal(*lead, half), torch.exp(0.3 * normal(*lead, half).clamp(-2, 2))
            return rotations(scale * torch.cos(angle), scale * torch.sin(angle), self.pairs)
        turn: Tensor = torch.linalg.qr(normal(*lead, d, d)).Q
        if self.kind == "orthogonal":
            return turn
        stretch = torch.exp(torch.rand(*lead, d, generator=generator, dtype=torch.float64) * 1.4 - 0.7)
        other: Tensor = torch.linalg.qr(normal(*lead, d, d)).Q
        return turn @ (stretch.unsqueeze(-1) * other)


def rotations(cosine: Tensor, sine: Tensor, pairs: tuple[tuple[int, ...], tuple[int, ...]]) -> Tensor:
    """``(*over, d / 2)`` each to matrices ``(*over, d, d)`` that turn and scale the pairs of positions."""
    one, two = (torch.tensor(p) for p in pairs)
    out = cosine.new_zeros(*cosine.shape[:-1], 2 * cosine.shape[-1], 2 * cosine.shape[-1])
    out[..., one, one] = cosine
    out[..., two, two] = cosine
    out[..., one, two] = -sine
    out[..., two, one] = sine
    return out


def linear_symmetries(wiring: Wiring, *, streams: bool = True) -> tuple[LinearSymmetry, ...]:
    """The linear symmetries of a proved wiring, each proved by running; kept on the wiring.

    ``streams=False`` leaves out orthogonal maps of residual streams. Raises ``UnprovedWiringError`` where the wiring is
    not proved or has no network to run.
    """
    known = wiring.kept.get("linear symmetries")
    if not isinstance(known, tuple):
        known = _find(wiring)
        wiring.kept["linear symmetries"] = known
    return tuple(s for s in known if streams or s.kind != "orthogonal")


def _find(wiring: Wiring) -> tuple[LinearSymmetry, ...]:
    group = scaling(wiring)
    return (*_general(wiring, group), *_rotary(wiring), *_orthogonal(wiring, group))


def _general(wiring: Wiring, group: Scaling) -> list[LinearSymmetry]:
    """Factors whose every occurrence is scaled by one generator, once up and once down."""
    found = []
    own: dict[str, list[Generator]] = {}
    for g in group.generators:
        own.setdefault(g.factor, []).append(g)
    for factor, generators in own.items():
        rows = [p for p in places(wiring)[factor] if group.tied.get(p.tensor, p.tensor) == p.tensor]
        powers = {(s.tensor, s.place[1], s.place[2]): e for s, e in generators[0].slots}
        sides = [(p, powers.get((p.tensor, p.dims, p.block), 0)) for p in rows]
        if len(generators) > 1 or any(p.repeated or abs(e) != 1 for p, e in sides) or len({e for _, e in sides}) < 2:
            continue
        over = wiring.factors[factor].over
        shape = (*(wiring.factors[o].size for o in over), wiring.factors[factor].size)
        if shape[-1] > 1:
            kept = _kept(wiring, LinearSymmetry(factor, "general", over, shape, 0.0, tuple(sides), tied=group.tied))
            found += [kept] if kept else []
    return found


def _rotary(wiring: Wiring) -> list[LinearSymmetry]:
    """Pinned factors that lie inside heads, in all divisions of their occurrences into two sides.

    One table of angles may serve all layers: occurrences belong together where they lie in the same heads.
    """
    found = []
    free = wiring.free
    pinned = {f: own for f, own in wiring.factors.items() if own.pinned and own.size % 2 == 0 and own.reason != "input"}
    spots: dict[str, list[tuple[str, tuple[int, ...], int, set[str]]]] = {}
    for tensor, layout in wiring.layouts.items():
        for dims, blocks in _joint(layout, wiring.factors):
            for number, block in enumerate(blocks):
                for segment in block:
                    heads = {o for o in segment.factors if o in free and free[o].size > 1}
                    for f in segment.factors:
                        if f in pinned:
                            spots.setdefault(f, []).append((tensor, dims, number, heads))
    for factor, every in spots.items():
        for group in _together([heads for _, _, _, heads in every]):
            chosen = {every[k][:3] for k in group}
            over = tuple(o for o in free if all(o in every[k][3] for k in group))
            if not 2 <= len(group) <= _MOST_SLOTS:
                continue
            named = replace(pinned[factor], over=over)
            tensors = {t for t, _, _ in chosen}
            part = wiring.with_(
                layouts={t: wiring.layouts[t] for t in tensors}, shapes={t: wiring.shapes[t] for t in tensors}
            )
            rows = places_of(part, {**{o: free[o] for o in over}, factor: named})[factor]
            rows = tuple(p for p in rows if (p.tensor, p.dims, p.block) in chosen)
            size = named.size
            shape = (*(free[o].size for o in over), size)
            halves = (tuple(range(size // 2)), tuple(range(size // 2, size)))
            neighbours = (tuple(range(0, size, 2)), tuple(range(1, size, 2)))
            signs = sorted(product((1, -1), repeat=len(rows) - 1), key=lambda s: abs(1 + sum(s)))
            candidates = (
                LinearSymmetry(factor, "rotary", over, shape, 0.0, tuple(zip(rows, (1, *s), strict=True)), pairs)
                for s in signs if -1 in s for pairs in (halves, neighbours)
            )  # fmt: skip
            kept = next((k for k in (_kept(wiring, c) for c in candidates) if k is not None), None)
            found += [kept] if kept else []
    return found


def _together(sets: list[set[str]]) -> list[list[int]]:
    """Numbers of sets that hang together by what they share; those that are empty go with all."""
    groups: list[tuple[set[str], list[int]]] = []
    for k, own in enumerate(sets):
        merged, members = set(own), [k]
        rest = []
        for names, numbers in groups:
            if names & own:
                merged |= names
                members = numbers + members
            else:
                rest.append((names, numbers))
        groups = [*rest, (merged, members)]
    if any(not names for names, _ in groups):
        return [list(range(len(sets)))]
    return [numbers for _, numbers in groups]


def _orthogonal(wiring: Wiring, group: Scaling) -> list[LinearSymmetry]:
    """Plain factors whose gains, the vectors that multiply them, can all be folded into what reads them."""
    found = []
    for factor, own in wiring.free.items():
        rows = [p for p in places(wiring)[factor] if group.tied.get(p.tensor, p.tensor) == p.tensor]
        if own.over or own.size < 2 or len(rows) < 3:
            continue
        gains = {p.tensor for p in rows if wiring.roles.get(p.tensor) == "gain"}
        folded = []
        for gain in sorted(gains):
            able = [
                g for g in group.generators
                if g.factor == factor and {s.tensor for s, _ in g.slots} & gains == {gain}
                and all(abs(e) == 1 for _, e in g.slots)
            ]  # fmt: skip
            if able:
                folded.append((gain, able[0]))
        if len(folded) < len(gains):
            continue
        sides = tuple((p, 1) for p in rows if p.tensor not in gains)
        candidate = LinearSymmetry(
            factor, "orthogonal", (), (own.size,), 0.0, sides, folded=tuple(folded), tied=group.tied
        )
        kept = _kept(wiring, candidate)
        found += [kept] if kept else []
    return found


def _kept(wiring: Wiring, candidate: LinearSymmetry) -> LinearSymmetry | None:
    """The candidate with its measured error, or None where random maps change the outputs."""
    program = wiring.program
    assert program is not None
    worst = 0.0
    for seed in (0, 1):
        base = generic(program.tensors, seed, torch.float64)
        if candidate.folded:
            base = candidate.fold(base)
        moved = candidate.act(candidate.random(seed), base)
        error64: float | None
        try:
            error64 = distance(run(program, base, torch.float64), run(program, moved, torch.float64))
            if error64 > TOLERANCE:
                return None
        except (RuntimeError, TypeError, ValueError):
            error64 = None
        error = distance(run(program, base, torch.float32), run(program, moved, torch.float32))
        if error > TOLERANCE and not is_rounding(error, error64):
            return None
        worst = max(worst, error)
    return replace(candidate, error=worst)
