"""Finding scale and sign symmetries of a wiring, and proving them by running (see ``weightspace.wiring.scaling``)."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import torch

from weightspace.wiring.conserved import exponents, independent, pairings, silent, surviving
from weightspace.wiring.program import Program
from weightspace.wiring.proof import _alive, distance, run
from weightspace.wiring.scaling import Flip, Generator, Rescaling, Scaling
from weightspace.wiring.slots import Slot, count_of, slots_of
from weightspace.wiring.wiring import Wiring

# Of a finite rescaling, in float64.
_TOLERANCE = 1e-10
_MOST_DRAWS = 48
_FEWEST_DRAWS = 3
# Backward passes and trials of signs end after as many seconds of processor time each.
_PATIENCE = 20.0
_MOST_BUNDLES = 6
_CONTROLS = 12
_KINDS = ("own", "fresh", "large")
_LARGE = 6.0
# Random elements of a proof have scales exp(_SPREAD z).
_SPREAD = 1.0
_NO_CHANGE = 1e-13
# Functions f with f(-x) = -f(x), and with f(-x) = f(x); products of two values are either.
_ODD = {
    "tanh", "sin", "tan", "asin", "atan", "sinh", "asinh", "atanh", "erf", "hardtanh", "softshrink", "hardshrink",
    "sign", "round", "trunc", "frac", "rms_norm", "reciprocal", "mul", "div",
}  # fmt: skip
_EVEN = {"cos", "abs", "cosh", "pow", "sinc"}
# Rescalings of what comes after a norm are linear.
_NORMS = {"layer_norm", "group_norm", "softmax", "batch_norm"}
# These are multiplied or measure a spread: a change of sign of what they act on leaves them alone.
_UNSIGNED = {"gain", "variance"}

Weights = Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class _Base:
    """Weights to run with, and the outputs that they give."""

    weights: Weights
    out: list[torch.Tensor]


class _Refused(list[str]):
    """What was not kept and why. ``open``: some of it for the weights at hand, not for what the network is."""

    open = False

    def left_open(self, text: str) -> None:
        self.append(text)
        self.open = True


def find(wiring: Wiring, seed: int) -> Scaling:
    """All of it: candidates, proofs, controls."""
    started = time.perf_counter()
    program = wiring.program
    assert program is not None
    tied = _tied(program)
    names = [n for n in (wiring.roles or wiring.layouts) if n in program.tensors and tied.get(n, n) == n]
    names = [n for n in names if program.tensors[n].is_floating_point()]
    slots = slots_of(wiring, names)
    refused = _Refused()
    candidates = _generators(wiring, program, slots, seed, refused)
    empty = Scaling(wiring, (), (), 0.0, None, 0.0, (), tied)
    bases = _bases(program, seed)
    if not bases:
        refused.left_open("everything: the network does not run in float64, or its outputs are not finite")
        return Scaling(wiring, (), (), 0.0, None, time.perf_counter() - started, tuple(refused), tied, refused.open)
    generators = surviving(candidates, lambda some: _error(_with(empty, some, ()), bases, seed) <= _TOLERANCE)
    refused += [
        f"{g.factor}: {_written(g)} changes the output by more than rounding" for g in candidates if g not in generators
    ]
    flips = _flips(wiring, slots, generators, empty, bases, seed, refused)
    flips = _legible(_with(empty, (), flips), refused)
    generators, flips, control = _controlled(_with(empty, generators, flips), bases[0], seed, refused)
    found = _with(empty, generators, flips)
    error = _error(found, bases, seed + 1)
    return Scaling(
        wiring, found.generators, found.flips, error, control, time.perf_counter() - started, tuple(refused), tied,
        refused.open,
    )  # fmt: skip


def error_of(scaling: Scaling, seed: int) -> float:
    """The change of the outputs under a random element, at weights of two kinds."""
    assert scaling.wiring.program is not None
    return _error(scaling, _bases(scaling.wiring.program, seed), seed)


# -------------------------------------------------------------------- positive


def _generators(
    wiring: Wiring, program: Program, slots: Mapping[str, tuple[Slot, ...]], seed: int, refused: _Refused
) -> list[Generator]:
    """Candidates from the null spaces of conserved quantities."""
    counts = {f: count_of(wiring.factors, f) for f in slots}
    wanted = max((2 * len(row) / counts[f] for f, row in slots.items() if row), default=0)
    draws = int(min(_MOST_DRAWS, max(_FEWEST_DRAWS, wanted + 1)))
    rows: dict[str, list[torch.Tensor]] = {f: [] for f in slots}
    generator = torch.Generator().manual_seed(seed)
    clock = time.thread_time()
    for k in range(draws):
        # Large weights come last: what they saturate has derivatives of rounding alone, so only proofs use them.
        weights = _drawn(program, seed + k, _KINDS[k % 2])
        try:
            found = pairings(program, weights, slots, counts, generator)
        except (RuntimeError, TypeError, ValueError, NotImplementedError) as error:
            refused.left_open(f"rescalings: no backward pass ({str(error).splitlines()[0][:80]})")
            return []
        for f, part in (found or {}).items():
            rows[f].append(part)
        if k >= _FEWEST_DRAWS and time.thread_time() - clock > _PATIENCE:
            break
    out: dict[str, list[dict[int, int]]] = {}
    for f, parts in rows.items():
        matrix = torch.cat(parts) if parts else torch.zeros(0, 0, dtype=torch.float64)
        quiet = silent(matrix)
        lost = [k for k in quiet if wiring.roles.get(slots[f][k].tensor) != "shift"]
        if lost and len(quiet) < matrix.shape[1]:
            # What no run reached may still matter to other inputs (an expert that none of the examples was sent to).
            refused.left_open(f"{f}: {slots[f][lost[0]].name} had no influence on the outputs in any run")
        vectors = [] if lost or not parts else exponents(matrix)
        out[f] = [_oriented(_completed(v, quiet, slots[f]), slots[f], wiring) for v in vectors]
    return [
        Generator(f, {slots[f][k].name: e for k, e in v.items()}, tuple((slots[f][k], e) for k, e in v.items()))
        for f, vectors in _without_implied(wiring, slots, out).items()
        for v in vectors
    ]


def _completed(vector: dict[int, int], quiet: Sequence[int], slots: Sequence[Slot]) -> dict[int, int]:
    """A bias without influence goes with its weight: that of keys, which softmax takes away."""
    full = dict(vector)
    for k in quiet:
        before = [j for j in range(k) if j not in quiet and slots[j].place[2] == slots[k].place[2]]
        full[k] = vector.get(before[-1], 0) if before else 0
    return {k: e for k, e in sorted(full.items()) if e}


def _oriented(vector: dict[int, int], slots: Sequence[Slot], wiring: Wiring) -> dict[int, int]:
    """What reads the factor gets negative exponents."""
    reading = sum(e for k, e in vector.items() if _reads(slots[k], wiring))
    first = next(iter(vector.values()))
    return {k: -e for k, e in vector.items()} if reading > 0 or (reading == 0 and first < 0) else vector


def _reads(slot: Slot, wiring: Wiring) -> bool:
    return wiring.reads.get(slot.tensor) in slot.dims


def _without_implied(
    wiring: Wiring, slots: Mapping[str, Sequence[Slot]], found: Mapping[str, list[dict[int, int]]], modulus: int = 0
) -> dict[str, list[dict[int, int]]]:
    """Heads need no scale of their own where every channel inside every head has one."""
    out = {}
    for f, vectors in found.items():
        inner = [g for g in found if f in wiring.factors[g].over and found[g]]
        implied = [{slots[g][k].place: e for k, e in v.items()} for g in inner for v in found[g]]
        own = [{slots[f][k].place: e for k, e in v.items()} for v in vectors]
        # A factor that a tensor carries twice in one place (diagonal blocks) is left alone.
        kept = independent(own, implied, modulus) if implied else range(len(vectors))
        out[f] = [vectors[i] for i in kept]
    return out


# -------------------------------------------------------------------- signs


def _flips(
    wiring: Wiring, slots: Mapping[str, tuple[Slot, ...]], generators: Sequence[Generator], empty: Scaling,
    bases: Sequence[_Base], seed: int, refused: _Refused,
) -> list[Flip]:  # fmt: skip
    """Sign flips: of whole factors where all functions are odd, along rescalings, and of parts of an axis."""
    index = {id(s): k for row in slots.values() for k, s in enumerate(row)}
    found: dict[str, list[dict[int, int]]] = {f: [] for f in slots}

    def passes(items: Sequence[Flip]) -> bool:
        return _error(_with(empty, (), items), bases, seed) <= _TOLERANCE

    def flip(f: str, chosen: Sequence[Slot]) -> Flip:
        return Flip(f, tuple(s.name for s in chosen), tuple(chosen))

    likely = []
    for f, row in slots.items():
        along = set(wiring.activations.get(f, ()))
        signed = [s for s in row if wiring.roles.get(s.tensor, "other") not in _UNSIGNED]
        written = [s for s in signed if not _reads(s, wiring)]
        if along <= _ODD and signed:
            likely.append(flip(f, signed))
        if along & _EVEN and along <= _ODD | _EVEN and written:
            likely.append(flip(f, written))
    doubtful = []
    for g in generators:
        along, turned = set(wiring.activations.get(g.factor, ())), [s for s, e in g.slots if e % 2]
        if not turned:
            continue
        if not along - _ODD - _NORMS or not any(_reads(s, wiring) for s in turned):
            likely.append(flip(g.factor, turned))
        elif "mul" in along:
            # Of a gate and what it multiplies, one may be linear.
            doubtful.append(flip(g.factor, turned))
    for kept in [*surviving(likely, passes), *(d for d in doubtful if passes([d]))]:
        found[kept.factor].append({index[id(s)]: 1 for s in kept.slots})
    clock = time.thread_time()
    for f, row in slots.items():
        bundles = _bundles(wiring, row)
        if found[f] or not 2 <= len(bundles) <= _MOST_BUNDLES or set(wiring.activations.get(f, ())) <= _ODD | _NORMS:
            continue
        for some in (c for n in range(1, len(bundles) + 1) for c in combinations(bundles, n)):
            if time.thread_time() - clock > _PATIENCE:
                refused.left_open(f"{f}: flips of parts of its axis were not all tried within {_PATIENCE:.0f} s")
                break
            chosen = [s for bundle in some for s in bundle]
            fresh = {index[id(s)]: 1 for s in chosen}
            new = independent([fresh], found[f], 2)
            if new and passes([flip(f, chosen)]):
                found[f].append(fresh)
    out = []
    for f, vectors in found.items():
        inner = [g for g in found if f in wiring.factors[g].over and found[g]]
        implied = [{slots[g][k].place: 1 for k in v} for g in inner for v in found[g]]
        own = [{slots[f][k].place: 1 for k in v} for v in vectors]
        out += [flip(f, [slots[f][k] for k in vectors[i]]) for i in independent(own, implied, 2)]
    return out


def _legible(scaling: Scaling, refused: _Refused) -> list[Flip]:
    """Flips whose sign some weights tell; two that meet in every tensor (groups times channels) cannot both be told."""
    mute = {k for k, readable in scaling.order() if not readable}
    refused += [f"{scaling.flips[k].factor}: no weight tells its sign apart from those of other axes" for k in mute]
    return [f for k, f in enumerate(scaling.flips) if k not in mute]


def _bundles(wiring: Wiring, row: Sequence[Slot]) -> list[list[Slot]]:
    """Slots in the same part of the same axis: the gates of a recurrent cell, one by one."""
    groups: dict[Any, list[Slot]] = {}
    for s in row:
        if wiring.roles.get(s.tensor, "other") not in _UNSIGNED:
            groups.setdefault((wiring[s.tensor][s.dims[0]].name, s.place[2]), []).append(s)
    return list(groups.values())


# -------------------------------------------------------------------- proofs


def _with(empty: Scaling, generators: Sequence[Generator], flips: Sequence[Flip]) -> Scaling:
    return Scaling(empty.wiring, tuple(generators), tuple(flips), 0.0, None, 0.0, (), empty.tied)


def _bases(program: Program, seed: int) -> list[_Base]:
    """Weights of all kinds, in float64; without those at which the network is dead."""
    found = []
    for k, kind in enumerate(_KINDS):
        weights = _drawn(program, seed + 17 * k, kind)
        try:
            out = run(program, weights, torch.float64)
        except (RuntimeError, TypeError, ValueError):
            return []
        if _alive(out):
            found.append(_Base(weights, out))
    return found


def _drawn(program: Program, seed: int, kind: str) -> dict[str, torch.Tensor]:
    """Weights without trivial values: the network's own, jittered; fresh ones, of the size of an initialisation.

    Trained weights may be dead or saturated where fresh ones are not. Large ones come to where a clamp acts.
    As ``proof.generic`` does, with uniform draws, which are many times faster where there are many weights. Tied
    tensors stay one object.
    """
    generator = torch.Generator().manual_seed(seed)
    found: dict[int, torch.Tensor] = {}
    for t in program.tensors.values():
        if id(t) in found:
            continue
        if not t.is_floating_point():
            found[id(t)] = t.clone()
            continue
        # Of variance 1.
        z = torch.rand(t.shape, generator=generator).to(torch.float64).sub_(0.5).mul_(12**0.5)
        if kind == "fresh" and t.dim() >= 2 and t.numel():
            found[id(t)] = z * (1.4 / max(1, t[0].numel()) ** 0.5)
            continue
        own = t.detach().to(torch.float64)
        top = float(own.abs().max()) if kind == "fresh" and t.numel() else 0.0
        own = own / top if top > 10 else own
        size = _LARGE if kind == "large" else 1.0
        found[id(t)] = (size * torch.where(own == 0, 0.05 * z, own * torch.exp(0.25 * z))).nan_to_num_()
    return {n: found[id(t)] for n, t in program.tensors.items()}


def _error(scaling: Scaling, bases: Sequence[_Base], seed: int) -> float:
    program = scaling.wiring.program
    assert program is not None
    if not scaling.generators and not scaling.flips:
        return 0.0
    worst = 0.0
    for k, base in enumerate(bases):
        moved = scaling.apply(_moving(scaling, seed + k), base.weights)
        worst = max(worst, distance(base.out, run(program, moved, torch.float64)))
        if worst > _TOLERANCE:
            break
    return worst


def _moving(scaling: Scaling, seed: int) -> Rescaling:
    """A random element in which no flip leaves all signs as they are."""
    drawn = scaling.random(seed, _SPREAD)
    signs = []
    for s in drawn.signs:
        s = s.clone()
        if bool((s > 0).all()):
            s.view(-1)[0] = -1.0
        signs.append(s)
    return Rescaling(drawn.scales, tuple(signs))


def _controlled(
    scaling: Scaling, base: _Base, seed: int, refused: _Refused
) -> tuple[list[Generator], list[Flip], float | None]:
    """Scaling one slot alone must change the output; where none does, there is no symmetry but no influence at all."""
    program = scaling.wiring.program
    assert program is not None
    items: list[Generator | Flip] = [*scaling.generators, *scaling.flips]
    chosen = items
    if len(items) > _CONTROLS:
        order = torch.randperm(len(items), generator=torch.Generator().manual_seed(seed)).tolist()
        chosen = [items[i] for i in order[:_CONTROLS]]
    least: float | None = None
    dropped: list[Generator | Flip] = []
    for item in chosen:
        best = 0.0
        for k in range(len(item.slots)):
            # Scaled rather than flipped: one tensor alone may well flip unseen (inside an absolute value).
            slot = item.slots[k][0] if isinstance(item, Generator) else item.slots[k]
            alone = _with(scaling, [Generator(item.factor, {slot.name: 1}, ((slot, 1),))], ())
            moved = alone.apply(_moving(alone, seed + 1), base.weights)
            best = max(best, distance(base.out, run(program, moved, torch.float64)))
            if best > 100 * _NO_CHANGE:
                break
        if best <= _NO_CHANGE:
            dropped.append(item)
            refused.left_open(f"{item.factor}: nothing that would move has any influence on the outputs")
        else:
            least = best if least is None else min(least, best)
    generators = [g for g in scaling.generators if not any(g is d for d in dropped)]
    return generators, [f for f in scaling.flips if not any(f is d for d in dropped)], least


def _tied(program: Program) -> dict[str, str]:
    """Every further name of a tensor that has several, and the first of them."""
    first: dict[int, str] = {}
    return {n: first[id(t)] for n, t in program.tensors.items() if first.setdefault(id(t), n) != n}


def _written(g: Generator) -> str:
    return ", ".join(f"{n}^{e:+d}" for n, e in list(g.exponents.items())[:4])
