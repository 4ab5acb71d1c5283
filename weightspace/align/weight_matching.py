"""Weight matching (Ainsworth et al. 2023, "Git Re-Basin"), with a better search than one coordinate ascent."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from weightspace.align.alignment import Found
from weightspace.align.frank_wolfe import Relaxed
from weightspace.errors import AlignmentError
from weightspace.wiring.matching import Matching, float32, tensor_weights
from weightspace.wiring.wiring import Permutation, Wiring

STARTS = ("identity", "anchored", "frank-wolfe", "random")
# Networks whose similarities take fewer operations than this are searched more thoroughly unless told otherwise.
_SMALL = 1e9
_LARGE = 2e10
# A cosine above this is the same network up to rounding.
_SAME = 1 - 1e-5


def weight_matching(
    a: Mapping[str, Tensor], b: Mapping[str, Tensor], wiring: Wiring, *, seed: int = 0,
    starts: Sequence[str] | None = None, restarts: int = 0, kicks: int | None = None, share: float = 0.1,
    sweeps: int = 100, tolerance: float | None = None, weighting: str = "plain",
) -> Found:  # fmt: skip
    """The group element of largest inner product of weights that the search finds.

    Coordinate ascent, one factor at a time by a linear assignment, from each of ``starts``: ``identity`` (b as it is),
    ``anchored`` (a first match outward from inputs and outputs), ``frank-wolfe`` (where the relaxed problem ends, from
    the centre), ``random``; ``restarts`` adds so many random ones. The best is then kicked ``kicks`` times: a ``share``
    of one factor's elements is mixed up and all settle anew, kept where that helped.

    By default networks get the better of ``identity`` and ``anchored``, small ones (such as MLPs on MNIST) besides it
    ``frank-wolfe`` and 25 kicks. ``restarts=50, starts=(), kicks=0`` is the paper's algorithm with restarts.
    ``sweeps`` bounds each ascent; so does ``tolerance``, the least gain of a sweep as a share of ``|a| |b|`` (default:
    0, and 2e-4 for networks of tens of millions of weights). ``weighting``: ``plain`` or ``rms``, see
    ``weightspace.wiring.matching.tensor_weights``.
    """
    fixed, moving = float32(a), float32(b)
    weights = tensor_weights(wiring, fixed, moving, weighting)
    generator = torch.Generator().manual_seed(seed)
    first = Matching(wiring, fixed, moving, weights)
    small = first.work <= _SMALL
    least = (2e-4 if first.work > _LARGE else 0.0) if tolerance is None else tolerance
    number = (25 if small else 0) if kicks is None else kicks
    wanted = list(starts) if starts is not None else ["anchored", "frank-wolfe"] if small else ["anchored"]
    unknown = [s for s in wanted if s not in STARTS]
    if unknown:
        raise AlignmentError(f"there is no start {unknown[0]!r}; there are {', '.join(STARTS)}")
    if not first.factors:
        return Found(wiring.identity(), {}, {"starts": []})
    tried: list[dict[str, Any]] = []
    best: Matching | None = None
    for start in [*wanted, *["random"] * restarts] or ["identity"]:
        if best is not None and best.objective >= _SAME * best.unit:
            break
        begin = _permutation(start, first, seed + len(tried))
        found = Matching(wiring, fixed, moving, weights, start=begin)
        if start == "anchored":
            found.anchored()
            if starts is None and found.objective < first.objective:
                # Near relatives lie better as they are.
                start, found = "identity", Matching(wiring, fixed, moving, weights)
        count = found.ascend(generator, sweeps, tolerance=least)
        tried.append({"start": start, "cosine": found.recount() / found.unit, "sweeps": count})
        if best is None or found.objective > best.objective:
            best = found
    assert best is not None
    helped = 0
    for _ in range(number):
        if best.objective >= _SAME * best.unit:
            break
        helped += best.kick(generator, share)
    best.recount()
    costs = {f: best.similarity(f) for f in best.factors}
    return Found(best.permutation, costs, {"starts": tried, "kicks": number, "kicks that helped": helped})


def _permutation(start: str, first: Matching, seed: int) -> Permutation | None:
    if start == "random":
        return first.wiring.random(seed)
    if start == "frank-wolfe":
        relaxed = Relaxed(first.wiring, first.fixed, first.moving, first.weights)
        relaxed.begin("centre")
        relaxed.climb(60, 1e-5)
        return relaxed.rounded()
    return None
