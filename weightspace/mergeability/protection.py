"""Models that were moved inside their orbit so that they cannot be merged: detected against a relative, and undone.

MergeLock (Wang et al. 2025) multiplies queries and keys, values and output projections by invertible matrices and their
inverses; PaRaMS (Wei et al. 2025) permutes the neurons of feed-forward layers and rescales heads; neurons of any
ReLU network can be permuted and rescaled. Each keeps the function and takes the model away from its base, so that
averages with it are worthless. All of these are symmetries that a proved wiring knows, so that a base (or any
fine-tuned sibling) suffices to undo them:

- *permutations* are found by weight matching on the least-norm representatives of both networks, heads by the cosine of
  what their two sides compute together, which no map inside the head changes;
- *scales* and *signs* by comparing the least-norm representatives element by element;
- *maps* inside heads by a Sylvester equation for each head (``weightspace.mergeability.linear``). Channels permuted
  inside heads are such maps, and are reported as such.

A kind is reported when undoing it takes away most of the distance to the reference, more than its number of free
parameters explains by chance. What is undone is proved by running the network before and after.

Nothing here knows an architecture: factors, sides and groups are the wiring's.
"""

from __future__ import annotations

import math
import time
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from weightspace.errors import WeightspaceError
from weightspace.mergeability.linear import inner_factors, random_maps
from weightspace.mergeability.undoing import EXPLAINED, FAR, KINDS, Evidence, Kind, Plan, Reference, doubles
from weightspace.wiring.scaling import Rescaling, scaling
from weightspace.wiring.wiring import Permutation, Wiring

NEAR = 0.6
"""Relative distance to the reference, after undoing, up to which a model counts as its relative. Independent networks,
aligned as well as can be, lie above; see ``weightspace.mergeability.ancestry``."""
GAINED = 0.9
"""Undoing what is reported has to bring the whole model to this share of its distance to the reference, or nearer."""
TOLERANCE = 1e-3
"""Largest relative change of the float32 outputs by the undoing; rounding of large maps reaches 1e-4."""


@dataclass(frozen=True, eq=False)
class Protection:
    """What ``examine`` found. ``kinds`` is empty for an ordinary model.

    ``before`` and ``after`` are relative distances of the whole model to the reference, ``|m - r| / sqrt(|m|^2 +
    |r|^2)`` averaged over tensors: 0 for equal, 1 for unrelated weights. ``error`` is the relative change of the
    outputs by the undoing. ``tensors`` is the model with everything undone: the same function, near the reference;
    the model itself where nothing was found. ``nearest`` is the distance with all undone that can be, whether anything
    speaks for it or not, and ``related`` whether it is below ``NEAR``.
    """

    kinds: tuple[Kind, ...]
    evidence: tuple[Evidence, ...]
    before: float
    after: float
    nearest: float
    related: bool
    error: float
    tensors: Mapping[str, Tensor] = field(repr=False)
    permutations: Permutation | None = field(default=None, repr=False)
    weighed: tuple[Evidence, ...] = field(default=(), repr=False)
    seconds: float = 0.0

    @property
    def protected(self) -> bool:
        """True where the model was moved inside its orbit, away from the reference."""
        return bool(self.kinds)

    def to_json(self) -> dict[str, Any]:
        """Everything but the tensors, as plain values."""
        return {
            "protected": self.protected,
            "kinds": list(self.kinds),
            "before": self.before,
            "after": self.after,
            "nearest": self.nearest,
            "related": self.related,
            "error": self.error,
            "evidence": [{**asdict(e), "explained": e.explained} for e in self.evidence],
            "seconds": self.seconds,
        }

    def __repr__(self) -> str:
        if not self.protected:
            what = "nothing found" if self.related else "not a relative of the reference"
            return f"Protection({what}; distance {self.before:.3f}, {self.seconds:.1f} s)"
        lines = [
            f"Protection({', '.join(self.kinds)}; distance to the reference {self.before:.3f} → {self.after:.3f}, "
            f"function unchanged to {self.error:.0e}, {self.seconds:.1f} s)"
        ]
        lines += [f"  {e}" for e in self.evidence[:8]]
        if len(self.evidence) > 8:
            lines.append(f"  … {len(self.evidence) - 8} more")
        return "\n".join(lines)


# ------------------------------------------------------------------------------------ hiding a model


def protect(
    tensors: Mapping[str, Tensor],
    wiring: Wiring,
    seed: int = 0,
    *,
    kinds: Collection[Kind] = KINDS,
    spread: float = 0.5,
) -> dict[str, Tensor]:
    """A copy of a network that computes the same and is far from it, as MergeLock and PaRaMS make one; for tests.

    ``maps``: a random invertible matrix, singular values ``exp(spread z)``, for every group of every factor that takes
    one (queries and keys, values and outputs). ``permutations``: a random element of the wiring's group. ``scales``:
    every other positive rescaling, by ``exp(spread z)``; ``signs``: sign flips by coin. Kinds that a wiring does not
    have change nothing. Computed in float64; dtypes are kept.

    Raises ``UnprovedWiringError`` for a wiring that is not proved, ``WeightspaceError`` for an unknown kind.
    """
    unknown = sorted(set(kinds) - set(KINDS))
    if unknown:
        raise WeightspaceError(f"there is no kind of protection {unknown[0]!r}; expected some of {', '.join(KINDS)}")
    group, inner = scaling(wiring), inner_factors(wiring)
    generator = torch.Generator().manual_seed(seed)
    now = doubles(tensors)
    if "maps" in kinds:
        for i in inner:
            now = i.apply(random_maps(i, generator, spread), now)
    taken = {i.factor for i in inner}
    drawn = group.random(int(torch.randint(1 << 30, (), generator=generator)), spread)
    scales = tuple(
        s if "scales" in kinds and g.factor not in taken else torch.ones_like(s)
        for g, s in zip(group.generators, drawn.scales, strict=True)
    )
    signs = tuple(
        s if "signs" in kinds and f.factor not in taken else torch.ones_like(s)
        for f, s in zip(group.flips, drawn.signs, strict=True)
    )
    now = group.apply(Rescaling(scales, signs), now)
    if "permutations" in kinds:
        now |= wiring.apply(wiring.random(generator), {n: t for n, t in now.items() if n in wiring.layouts})
    return {n: now[n].to(t.dtype) for n, t in tensors.items()}


# ------------------------------------------------------------------------------------ finding and undoing


def examine(
    model: Mapping[str, Tensor], reference: Mapping[str, Tensor] | Reference, wiring: Wiring, *, keep_all: bool = False
) -> Protection:
    """Is a model a permuted, rescaled or mapped copy of a relative of the reference? And what is it without that?

    ``model`` and ``reference`` have the wiring's tensors; both are held in memory, in float64. A fine-tuned model is
    brought near its base in the same way as an exact copy, as far as training left them alike. A ``Reference`` saves
    work where several models are held against one. ``keep_all`` keeps what was weighed and found too light as well.

    Raises ``UnprovedWiringError`` for a wiring that is not proved or has no network to run, because undoing a wrong
    symmetry would break the model.
    """
    started = time.perf_counter()
    search = reference if isinstance(reference, Reference) else Reference(reference, wiring)
    given = doubles(model)
    if not keep_all and search.ordinary(given):
        apart = search.distance(given)
        return Protection((), (), apart, apart, apart, apart <= NEAR, 0.0, dict(model), seconds=_since(started))
    whole, full, nearest = search.best(given)
    before = after = search.distance(given)
    weighed: tuple[Evidence, ...] = ()
    if nearest <= NEAR and (keep_all or search.gains(given, full)):
        weighed = tuple(search.evidence(given, whole, full))
    evidence = tuple(e for e in weighed if e.explained >= EXPLAINED and (e.kind != "scales" or e.before >= FAR))
    kept = whole.only(evidence)
    result, error = dict(model), 0.0
    if kept.kinds:
        undone = search.undone(given, kept)
        after = search.distance(undone)
        result = {n: undone[n].to(t.dtype) for n, t in model.items()}
        error = _error(wiring, model, result) if after <= GAINED * before else math.inf
        if not error <= TOLERANCE:
            # Nothing is gained; and never hand out a model that computes something else.
            kept, evidence, result, after, error = Plan.empty(wiring), (), dict(model), before, 0.0
    return Protection(
        kept.kinds, evidence, before, after, nearest, nearest <= NEAR, error, result,
        kept.permutation if kept.kinds else None, weighed if keep_all else evidence, _since(started),
    )  # fmt: skip


def _since(started: float) -> float:
    return time.perf_counter() - started


def nearest(model: Mapping[str, Tensor], reference: Mapping[str, Tensor], wiring: Wiring) -> float:
    """How near a model comes to a reference with all undone that can be: ``Protection.nearest`` alone."""
    return Reference(reference, wiring).best(doubles(model))[2]


def _error(wiring: Wiring, one: Mapping[str, Tensor], two: Mapping[str, Tensor]) -> float:
    from weightspace.wiring.proof import distance, run

    program = wiring.program
    assert program is not None
    outs = [
        run(program, {n: _plain(t[n]) if n in t else program.tensors[n] for n in program.tensors}, torch.float32)
        for t in (one, two)
    ]
    return distance(*outs)


def _plain(t: Tensor) -> Tensor:
    return t.to(torch.float32) if t.is_floating_point() else t


__all__ = [
    "EXPLAINED", "FAR", "GAINED", "KINDS", "NEAR", "TOLERANCE", "Evidence", "Kind", "Protection", "Reference",
    "examine", "nearest", "protect",
]  # fmt: skip
