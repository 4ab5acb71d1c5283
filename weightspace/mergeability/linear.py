"""Factors on which every invertible map acts, not only permutations and scales.

Queries and keys of a head meet in a dot product and nowhere else, and value channels go straight into the output
projection. Any invertible ``M`` may be put between the two sides: ``Q -> M Q``, ``K -> M^-T K`` changes no score,
``V -> M V``, ``O -> M^-T O`` (its columns) no output. This is the symmetry that MergeLock (Wang et al. 2025) hides a
model in, and the one that alignment may use inside heads. Here it is found from the wiring alone: a factor whose
positive rescaling multiplies one side by ``s`` and the other by ``1 / s``, that no nonlinear function touches, and for
which a random ``M`` leaves the outputs unchanged in float64. A linear bottleneck is found in the same way; rotary
channels are pinned in the wiring and so are not.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from weightspace.wiring.scaling import scaling
from weightspace.wiring.slots import Slot, count_of

if TYPE_CHECKING:
    from weightspace.wiring.wiring import Wiring

TOLERANCE = 1e-8
"""Largest relative change of the outputs under a random map, in float64."""


@dataclass(frozen=True, eq=False)
class Side:
    """One occurrence of a factor: ``index (groups, size, rest)`` says where its entries lie in the flat tensor."""

    tensor: str
    name: str
    index: Tensor = field(repr=False)

    def read(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """The entries, ``(groups, size, rest)`` in float64."""
        return tensors[self.tensor].reshape(-1)[self.index].to(torch.float64)


@dataclass(frozen=True, eq=False)
class Inner:
    """A factor of ``size`` that every invertible map acts on, once for each of ``groups`` (heads).

    ``left`` sides are multiplied by ``M``, ``right`` ones by its inverse transpose. ``error`` is the change of the
    outputs under random maps, ``max|y' - y| / max|y|`` in float64.
    """

    factor: str
    groups: int
    size: int
    left: tuple[Side, ...]
    right: tuple[Side, ...]
    error: float = 0.0

    @property
    def tensors(self) -> tuple[str, ...]:
        """Names of the tensors on both sides."""
        return tuple(dict.fromkeys(s.tensor for s in (*self.left, *self.right)))

    def read(self, tensors: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Both sides, ``(groups, size, all that each group's elements hold)``, in float64."""
        left = torch.cat([s.read(tensors) for s in self.left], -1)
        return left, torch.cat([s.read(tensors) for s in self.right], -1)

    def apply(self, maps: Tensor, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The tensors after ``maps (groups, size, size)`` acted; computed in float64, dtypes kept."""
        inverse = torch.linalg.inv(maps).transpose(-1, -2)
        out = dict(tensors)
        for sides, acting in ((self.left, maps), (self.right, inverse)):
            for s in sides:
                held = out[s.tensor]
                flat = held.reshape(-1).clone() if out[s.tensor] is tensors[s.tensor] else held.reshape(-1)
                flat[s.index] = (acting @ s.read(out)).to(held.dtype)
                out[s.tensor] = flat.reshape(held.shape)
        return out


def inner_factors(wiring: Wiring, seed: int = 0) -> tuple[Inner, ...]:
    """The factors of a wiring on which every invertible map acts, proved by running; kept on the wiring.

    Raises ``UnprovedWiringError`` for a wiring that is not proved or has no network to run.
    """
    known = wiring.kept.get("inner")
    if isinstance(known, tuple):
        return known
    from weightspace.wiring.proof import distance, generic, run

    group = scaling(wiring)
    often = Counter(g.factor for g in group.generators)
    program = wiring.program
    assert program is not None
    base: dict[str, Tensor] = {}
    before: list[Tensor] = []
    found = []
    for g in group.generators:
        factor = wiring.factors[g.factor]
        if often[g.factor] > 1 or factor.size < 2 or wiring.activations.get(g.factor):
            continue
        if {abs(e) for e in g.exponents.values()} != {1} or len(set(g.exponents.values())) < 2:
            continue
        sides = {e: [side_of(wiring, s) for s, power in g.slots if power == e] for e in (1, -1)}
        candidate = Inner(
            g.factor, count_of(wiring.factors, g.factor) // factor.size, factor.size, tuple(sides[1]), tuple(sides[-1])
        )
        if not base:
            base = {n: t.to(torch.float64) if t.is_floating_point() else t for n, t in
                    generic(program.tensors, seed).items()}  # fmt: skip
            before = run(program, base, torch.float64)
        maps = random_maps(candidate, seed, 0.5)
        error = distance(before, run(program, candidate.apply(maps, base), torch.float64))
        if error <= TOLERANCE:
            found.append(replace(candidate, error=error))
    wiring.kept["inner"] = result = tuple(found)
    return result


def random_maps(inner: Inner, seed: int | torch.Generator, spread: float) -> Tensor:
    """Random invertible maps ``(groups, size, size)``: rotations around stretches by ``exp(spread z)``."""
    generator = seed if isinstance(seed, torch.Generator) else torch.Generator().manual_seed(seed)
    shape = (inner.groups, inner.size, inner.size)
    u, v = (
        torch.linalg.qr(torch.randn(shape, generator=generator, dtype=torch.float64)).Q for _ in range(2)
    )
    stretch = torch.exp(spread * torch.randn(shape[:2], generator=generator, dtype=torch.float64))
    drawn: Tensor = (u * stretch.unsqueeze(1)) @ v
    return drawn


def solve(
    model: tuple[Tensor, Tensor], reference: tuple[Tensor, Tensor], rounds: int = 5
) -> Tensor:
    """The maps ``N (groups, size, size)`` that bring a model's two sides nearest to a reference's.

    With ``L = M L0`` and ``R = M^-T R0`` of the model, ``|L - M L0|^2 + |R0 - M^T R|^2`` is least where
    ``M (L0 L0^T) + (R R^T) M = L L0^T + R R0^T``, a Sylvester equation with symmetric coefficients, solved in their
    eigenbases; ``N = M^-1`` then acts on the model. Once near, the equation is solved again from there, because errors
    of the two sides are weighed rightly only at ``M = 1``. A head whose map would be singular keeps the identity.
    """
    left, right = model
    left0, right0 = reference
    eye = torch.eye(left.shape[1], dtype=torch.float64).expand(left.shape[0], -1, -1)

    def apart(n: Tensor) -> Tensor:
        moved = torch.linalg.inv(n).transpose(-1, -2) @ right
        gaps: Tensor = (n @ left - left0).square().sum((1, 2)) + (moved - right0).square().sum((1, 2))
        return gaps

    best, least = eye.clone(), apart(eye)
    now = best
    for _ in range(rounds):
        x, y = now @ left, torch.linalg.inv(now).transpose(-1, -2) @ right
        m = _sylvester(
            y @ y.transpose(-1, -2), left0 @ left0.transpose(-1, -2),
            x @ left0.transpose(-1, -2) + y @ right0.transpose(-1, -2),
        )  # fmt: skip
        sound = torch.linalg.cond(m) < 1e6
        if not bool(sound.any()):
            break
        step = torch.where(sound[:, None, None], m, eye)
        now = torch.linalg.inv(step) @ now
        value = apart(now)
        better = value < least
        best = torch.where(better[:, None, None], now, best)
        least = torch.minimum(value, least)
    return best


def _sylvester(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """``X`` with ``a X + X b = c`` for symmetric positive ``a`` and ``b``, batched."""
    (p, u), (q, v) = torch.linalg.eigh(a), torch.linalg.eigh(b)
    scale = (p.abs().amax(-1) + q.abs().amax(-1)).clamp_min(1e-300)
    below = (p.unsqueeze(-1) + q.unsqueeze(-2)).clamp_min(1e-12).maximum(1e-12 * scale[:, None, None])
    solved: Tensor = u @ ((u.transpose(-1, -2) @ c @ v) / below) @ v.transpose(-1, -2)
    return solved


def alike(model: Sequence[tuple[Tensor, Tensor]], reference: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """Cosines ``(groups, groups)`` between what the two sides compute together, whatever map lies between them.

    The product ``P = L^T R`` of a head is the same for all maps. ``<P, P'> = sum((L' L^T) * (R' R^T))`` needs no
    product of that size. Over several factors of the same heads (queries and keys, values and outputs) cosines are
    averaged. Rows are the reference's heads.
    """
    found = []
    for (left, right), (left0, right0) in zip(model, reference, strict=True):
        both = torch.einsum("hip,gjp->hgij", left0, left) * torch.einsum("hip,gjp->hgij", right0, right)
        own = [
            ((x @ x.transpose(-1, -2)) * (y @ y.transpose(-1, -2))).sum((1, 2)).clamp_min(1e-300).sqrt()
            for x, y in ((left0, right0), (left, right))
        ]
        found.append(both.sum((2, 3)) / (own[0][:, None] * own[1][None, :]))
    return torch.stack(found).mean(0)


def products_apart(model: tuple[Tensor, Tensor], reference: tuple[Tensor, Tensor]) -> float:
    """Squared distance between what the two sides compute together, relative to the reference's; no map changes it."""
    (left, right), (left0, right0) = model, reference

    def dot(a: Tensor, b: Tensor, c: Tensor, d: Tensor) -> float:
        return float(((a @ c.transpose(-1, -2)) * (b @ d.transpose(-1, -2))).sum())

    own = dot(left0, right0, left0, right0)
    gap = dot(left, right, left, right) - 2 * dot(left, right, left0, right0) + own
    return max(gap, 0.0) / own if own > 0 else 0.0


def side_of(wiring: Wiring, slot: Slot) -> Side:
    """Where a factor's entries lie in one of its occurrences."""
    shape = wiring.shapes[slot.tensor]
    numbers = torch.arange(int(torch.Size(shape).numel())).reshape(shape)
    rest = [d for d in range(len(shape)) if d not in slot.dims]
    rows = numbers.permute(*slot.dims, *rest).reshape(slot.label.numel(), -1)
    label = slot.label.reshape(-1)
    size = wiring.factors[slot.factor].size
    groups = count_of(wiring.factors, slot.factor) // size
    order = torch.argsort(label, stable=True)[int((label < 0).sum()) :]
    # Each element has as many positions in these dims, in the same order.
    return Side(slot.tensor, slot.name, rows[order].reshape(groups, size, -1))


__all__ = ["TOLERANCE", "Inner", "Side", "alike", "inner_factors", "products_apart", "random_maps", "side_of", "solve"]
