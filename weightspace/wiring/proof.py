"""Proving a wiring by running the network before and after a random element of its symmetry group.

Weights and buffers are first drawn away from values that would hide a mistake: every float tensor is
jittered element by element (ones, zeros and repeated rows become generic; signs, and so the positivity of
variances, are kept). A proof also has a *control*: for each factor, one of the tensors that carry it is
permuted alone, which must change the output; a factor whose control changes nothing was not seen by the
run and is named in ``vacuous``.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.utils._pytree import tree_leaves, tree_map

from weightspace.errors import WiringError
from weightspace.wiring.program import Program
from weightspace.wiring.wiring import Permutation, Wiring

TOLERANCE = 1e-5
# In float64 a true symmetry leaves only rounding; float32 may then exceed TOLERANCE by conditioning alone.
_TOLERANCE64 = 1e-10
# Above this no float32 error is taken for rounding unless float64 is clean.
_ROUGH = 1e-3
# A control below this says that the output is nearly blind to the factor.
_FAINT = 1e-6
# Controls need not take longer than this many seconds.
_PATIENCE = 6.0


@dataclass(frozen=True)
class Proof:
    """What was measured. Errors are ``max|y' - y| / max|y|``, the worst over outputs.

    ``error64`` is None where the network does not run in float64. ``control`` is the least relative
    output change over the factors whose control was run, ``vacuous`` names those with none.
    ``moved`` counts the factors permuted, ``demoted`` those that had to be pinned to make it hold.
    """

    holds: bool
    error32: float
    error64: float | None
    control: float | None
    moved: int
    vacuous: tuple[str, ...]
    demoted: tuple[str, ...]
    seconds: float
    note: str = ""
    on: str = "this network"

    def __repr__(self) -> str:
        verdict = "holds" if self.holds else "FAILS"
        e64 = "" if self.error64 is None else f", {self.error64:.1e} in float64"
        control = "" if self.control is None else f", control {self.control:.1e}"
        return f"Proof({verdict} on {self.on}: error {self.error32:.1e} in float32{e64}, {self.moved} factors{control})"


def generic(
    tensors: Mapping[str, torch.Tensor], seed: int = 0, dtype: torch.dtype | None = None
) -> dict[str, torch.Tensor]:
    """Tensors of the same scale and signs without trivial values, ties or repetitions.

    Float tensors become ``t * exp(0.25 z)``, zeros ``0.05 z`` (z standard normal); others stay.
    """
    generator = torch.Generator().manual_seed(seed)
    out: dict[str, torch.Tensor] = {}
    seen: dict[tuple[Any, ...], torch.Tensor] = {}
    for name, t in tensors.items():
        if not t.is_floating_point():
            out[name] = t.clone()
            continue
        key = (t.data_ptr(), tuple(t.shape), t.stride()) if t.numel() else (name,)
        if key not in seen:
            t64 = t.detach().to(torch.float64)
            z = torch.randn(t.shape, generator=generator, dtype=torch.float64)
            drawn = torch.where(t64 == 0, 0.05 * z, t64 * torch.exp(0.25 * z))
            seen[key] = torch.nan_to_num(drawn).to(dtype or torch.float32)
        out[name] = seen[key]
    return out


def _redrawn(tensors: Mapping[str, torch.Tensor], seed: int) -> dict[str, torch.Tensor]:
    """Weights drawn afresh at the scale of an initialisation: revives saturated or dead networks."""
    generator = torch.Generator().manual_seed(seed)
    out = dict(tensors)
    for name, t in tensors.items():
        if t.is_floating_point() and t.dim() >= 2 and t.numel():
            fan = max(1, t[0].numel())
            out[name] = torch.randn(t.shape, generator=generator, dtype=torch.float64).to(t.dtype) * (1.4 / fan**0.5)
        elif t.is_floating_point() and t.dim() == 1 and t.numel() and float(t.abs().max()) > 10:
            out[name] = (t / t.abs().max()).to(t.dtype)
    return out


def run(program: Program, tensors: Mapping[str, torch.Tensor], dtype: torch.dtype) -> list[torch.Tensor]:
    """The program's output tensors with weights and inputs in one dtype."""

    def cast(x: Any) -> Any:
        return x.to(dtype) if isinstance(x, torch.Tensor) and x.is_floating_point() else x

    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        given = {n: cast(t) for n, t in tensors.items()}
        state = torch.get_rng_state()
        torch.manual_seed(0)
        try:
            out = program.run(given, *tree_map(cast, program.args), **tree_map(cast, dict(program.kwargs)))
        finally:
            torch.set_rng_state(state)
    found = [x for x in tree_leaves(out) if isinstance(x, torch.Tensor) and x.numel()]
    if not found:
        raise WiringError(f"the network ({program.origin}) returned no tensor, so there is nothing to compare")
    return [x.detach().clone() for x in found]


def distance(one: Sequence[torch.Tensor], two: Sequence[torch.Tensor]) -> float:
    """``max|b - a| / max|a|``, the worst over outputs; infinite where shapes or finiteness differ."""
    worst = 0.0
    for a, b in zip(one, two, strict=True):
        if a.shape != b.shape:
            return float("inf")
        if a.is_complex():
            a, b = torch.view_as_real(a), torch.view_as_real(b)
        a, b = a.to(torch.float64), b.to(torch.float64)
        same = (a == b) | (a.isnan() & b.isnan())
        finite = a.isfinite() & b.isfinite()
        if not bool((same | finite).all()):
            return float("inf")
        scale = float(a[finite].abs().max()) if bool(finite.any()) else 0.0
        gap = float((a - b)[finite & ~same].abs().max()) if bool((finite & ~same).any()) else 0.0
        if gap:
            worst = max(worst, gap / scale if scale else float("inf"))
    return worst


def _alive(out: Sequence[torch.Tensor]) -> bool:
    floats = [x for x in out if x.is_floating_point()]
    return (
        bool(floats)
        and all(bool(x.isfinite().any()) for x in floats)
        and any(float(x.nan_to_num(0, 0, 0).abs().max()) > 0 for x in floats)
    )


def verify(wiring: Wiring, seed: int = 0, *, controls: int = 24, redraw: bool = False) -> Proof:
    """Draw a random group element and compare outputs before and after, in float32 and float64.

    ``redraw`` takes weights at the scale of an initialisation instead of the network's own, jittered.
    Raises ``WiringError`` where the wiring has no program to run.
    """
    started = time.perf_counter()
    program = wiring.program
    if program is None:
        raise WiringError(
            f"the wiring ({wiring.origin}) was inferred from names and shapes; there is no network to run"
        )
    perm = _moving(wiring, seed)
    base = generic(program.tensors, seed)
    if redraw:
        base = _redrawn(base, seed)
    found = _measure(wiring, program, base, perm.index)
    if redraw and not found.alive:
        base = generic(program.tensors, seed)
        found = _measure(wiring, program, base, perm.index)
    if not found.alive or found.error32 > TOLERANCE:
        # Dead, saturated or hardly conditioned at these values: look at the same network freshly drawn.
        # A wrong symmetry shows at any generic weights, so either draw decides.
        fresh = _redrawn(base, seed)
        again = _measure(wiring, program, fresh, perm.index)
        if again.alive and (again.error32 <= TOLERANCE or not found.alive):
            base, found = fresh, again
    control, vacuous = _controls(wiring, program, base, found.out, seed, controls)
    if vacuous or (control is not None and control < _FAINT):
        # Saturated outputs hardly move, whatever is permuted: the freshly drawn network has to hold as well.
        fresh = _redrawn(base, seed + 1)
        again = _measure(wiring, program, fresh, perm.index)
        if again.alive and not again.ill:
            found = found.worse(again)
            if vacuous:
                _, vacuous = _controls(wiring, program, fresh, again.out, seed, controls, only=vacuous)
    note = found.note
    if not found.alive:
        note = "the output is not finite or all zero"
    elif found.ill:
        note = "ill-conditioned in float32: the change shrinks with the precision"
    return Proof(
        found.holds, found.error32, found.error64, control, len(perm.index), vacuous, (),
        time.perf_counter() - started, note,
    )  # fmt: skip


def _moving(wiring: Wiring, seed: int, only: Sequence[str] | None = None) -> Permutation:
    """A random group element in which no factor stays as it is (small ones often would)."""
    perm = wiring.random(seed, only)
    index = {
        name: p.roll(1, -1) if bool((p == torch.arange(p.shape[-1])).all()) else p for name, p in perm.index.items()
    }
    return Permutation(index, wiring.factors)


def is_rounding(error32: float, error64: float | None) -> bool:
    """A change of the output that shrinks with the precision is rounding; that of a wrong symmetry stays.

    Some networks compute parts in float32 whatever their weights are, so float64 need not reach its own rounding.
    """
    if error64 is None:
        return False
    return error64 <= _TOLERANCE64 or (error32 <= _ROUGH and error64 <= min(TOLERANCE, error32 / 4))


@dataclass(frozen=True)
class _Measured:
    out: list[torch.Tensor]
    alive: bool
    error32: float
    error64: float | None
    note: str

    @property
    def ill(self) -> bool:
        """True, and lost to rounding in float32."""
        return self.error32 > TOLERANCE and is_rounding(self.error32, self.error64)

    @property
    def holds(self) -> bool:
        return self.alive and (self.error32 <= TOLERANCE or is_rounding(self.error32, self.error64))

    def worse(self, other: _Measured) -> _Measured:
        both = [e for e in (self.error64, other.error64) if e is not None]
        return _Measured(
            self.out,
            self.alive,
            max(self.error32, other.error32),
            max(both) if both else None,
            self.note or other.note,
        )


def _measure(
    wiring: Wiring, program: Program, base: Mapping[str, torch.Tensor], index: Mapping[str, torch.Tensor]
) -> _Measured:
    out = run(program, base, torch.float32)
    if not _alive(out):
        return _Measured(out, False, float("inf"), None, "")
    error32 = _error(wiring, program, base, index, torch.float32, out)
    error64, note = _double(wiring, program, base, index)
    return _Measured(out, True, error32, error64, note)


def _error(
    wiring: Wiring, program: Program, base: Mapping[str, torch.Tensor], index: Mapping[str, torch.Tensor],
    dtype: torch.dtype, out: Sequence[torch.Tensor],
) -> float:  # fmt: skip
    moved = wiring.apply(Permutation(index, wiring.factors), base)
    return distance(out, run(program, moved, dtype))


def _double(
    wiring: Wiring, program: Program, base: Mapping[str, torch.Tensor], index: Mapping[str, torch.Tensor]
) -> tuple[float | None, str]:
    try:
        out = run(program, base, torch.float64)
        return _error(wiring, program, base, index, torch.float64, out), ""
    except (RuntimeError, TypeError, ValueError) as error:
        return None, f"does not run in float64 ({str(error).splitlines()[0][:80]})"


def _controls(
    wiring: Wiring, program: Program, base: Mapping[str, torch.Tensor], out: Sequence[torch.Tensor], seed: int,
    limit: int, only: Sequence[str] | None = None,
) -> tuple[float | None, tuple[str, ...]]:  # fmt: skip
    """Permute one tensor of a factor alone: the output has to change.

    In float64 where the network runs in it: deep networks can hide a change below float32's rounding.
    """
    dtype, floor = torch.float32, 1e-7
    try:
        out = run(program, base, torch.float64)
        dtype, floor = torch.float64, 1e-13
    except (RuntimeError, TypeError, ValueError):
        out = list(out)
    names = list(wiring.free) if only is None else list(only)
    if not limit:
        return None, ()
    generator = torch.Generator().manual_seed(seed)
    clock = time.perf_counter()
    run(program, base, dtype)
    limit = min(limit, max(4, int(_PATIENCE / max(1e-4, time.perf_counter() - clock))))
    if len(names) > limit:
        names = [names[i] for i in torch.randperm(len(names), generator=generator)[:limit].tolist()]
    least: float | None = None
    vacuous: list[str] = []
    for name in names:
        holders = wiring.tensors_of(name)
        if len(holders) < 2 and wiring.free[name].size == 1:
            continue
        best = 0.0
        # Any one of the tensors will do; the last ones are nearest to the output.
        for holder in holders[::-1][:3]:
            perm = _moving(wiring, seed + 1, only=[name])
            alone = dict(base)
            alone[holder] = wiring.apply(perm, {holder: base[holder]})[holder]
            for tied, t in base.items():
                if t is base[holder]:
                    alone[tied] = alone[holder]
            best = max(best, distance(out, run(program, alone, dtype)))
            if best > 100 * floor:
                break
        if best <= floor:
            vacuous.append(name)
        else:
            least = best if least is None else min(least, best)
    return least, tuple(vacuous)


def prove(wiring: Wiring, seed: int = 0) -> Wiring:
    """The wiring with its proof; factors that do not hold are pinned, and named in the proof.

    Two independent group elements must leave the output alone. When one does not, the factors are tried
    one by one: a wrong symmetry is never kept.
    """
    first = verify(wiring, seed)
    if first.holds:
        # A second draw with weights of another kind: data may take other ways through the network (experts, masks).
        second = verify(wiring, seed + 17, controls=0, redraw=True)
        if second.holds:
            return wiring.with_(status="proved", proof=first)
    demoted = _culprits(wiring, seed)
    if demoted:
        smaller = wiring.pinning(demoted, "does not keep the function")
        again = verify(smaller, seed)
        again = replace(again, demoted=tuple(demoted))
        notes = (
            *wiring.notes,
            f"{len(demoted)} axes did not keep the function and were pinned: {', '.join(demoted[:5])}",
        )
        if again.holds:
            return smaller.with_(status="proved", proof=again, notes=notes)
        return smaller.with_(status="failed", proof=again, notes=notes)
    return wiring.with_(status="failed", proof=first)


def _culprits(wiring: Wiring, seed: int) -> list[str]:
    program = wiring.program
    assert program is not None
    bad: list[str] = []
    jittered = generic(program.tensors, seed)
    for base in (jittered, _redrawn(generic(program.tensors, seed + 17), seed + 17)):
        out = run(program, base, torch.float32)
        if not _alive(out):
            continue
        for name in wiring.free:
            for k in (1, 2) if name not in bad else ():
                perm = _moving(wiring, seed + k, only=[name])
                error32 = _error(wiring, program, base, perm.index, torch.float32, out)
                if error32 <= TOLERANCE or is_rounding(error32, _double(wiring, program, base, perm.index)[0]):
                    continue
                bad.append(name)
                break
    return bad
