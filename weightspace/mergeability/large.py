"""Maps inside the heads of networks that are too large to be run: found with a small twin, undone layer by layer.

A transformer of more than ``weightspace.wiring.transformers.RUNNABLE`` parameters is proved on a twin of the same
classes with fewer and narrower layers. On the twin the factors that take any invertible map are found and proved by
running it (``weightspace.mergeability.linear``); the large network has the same factor in the tensors of the same names
up to layer numbers. What MergeLock (Wang et al. 2025) does to a layer is looked for there as ``protection`` does, one
layer in memory at a time. That undoing keeps the function is checked on the products of both sides, which is all that
the rest of the network sees of them.
"""

from __future__ import annotations

import re
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from weightspace.mergeability.linear import Inner, inner_factors, products_apart, side_of, solve
from weightspace.mergeability.protection import EXPLAINED, FAR, NEAR, Evidence, Protection
from weightspace.wiring.slots import count_of, slots_of

if TYPE_CHECKING:
    from weightspace.checkpoint import Checkpoint
    from weightspace.wiring.slots import Slot
    from weightspace.wiring.wiring import Wiring

_KEPT = 1e-6
"""Largest change of the products by undoing, relative to them, in float64."""

Sign = Mapping[tuple[str, int], int]
"""For the occurrences of a factor, by their tensor's pattern and their number in it: 1 left, -1 right."""


def kinds_of(reference: Checkpoint) -> list[Sign]:
    """The factors that take maps, as the small twin of a Hugging Face model shows them.

    Raises ``WeightspaceError`` where there is no such twin.
    """
    from weightspace.wiring.transformers import twin_of

    twin = twin_of(reference)
    found: list[Sign] = []
    for inner in inner_factors(twin):
        left = {(s.tensor, s.name) for s in inner.left}
        sign: dict[tuple[str, int], int] = {}
        for key, slot in _numbered(slots_of(twin, inner.tensors)[inner.factor]):
            sign[key] = 1 if (slot.tensor, slot.name) in left else -1
        if sign not in found:
            found.append(sign)
    return found


def examine_large(model: Mapping[str, Tensor], reference: Checkpoint, wiring: Wiring, kinds: list[Sign]) -> Protection:
    """``protection.examine`` for maps inside heads alone, of a network that cannot be run; distances are of these.

    Heads that changed places are not looked for.
    """
    started = time.perf_counter()
    evidence: list[Evidence] = []
    undone: dict[str, Tensor] = {}
    before = after = weight = 0.0
    tensors = [n for n in wiring.layouts if len(wiring.shapes[n]) <= 2 and n in reference and n in model]
    slots = slots_of(wiring, tensors)
    for factor, mine in slots.items():
        if wiring.factors[factor].size < 2 or not mine:
            continue
        keyed = dict(_numbered(mine))
        sign = next((k for k in kinds if k.keys() == keyed.keys()), None)
        if sign is None:
            continue
        sides = [tuple(side_of(wiring, slot) for key, slot in keyed.items() if sign[key] == s) for s in (1, -1)]
        width = wiring.factors[factor].size
        inner = Inner(factor, count_of(wiring.factors, factor) // width, width, sides[0], sides[1])
        theirs = inner.read({n: reference[n] for n in inner.tensors})
        held = {n: undone.get(n, model[n]) for n in inner.tensors}
        doubles = {n: t.to(torch.float64) for n, t in held.items()}
        ours = inner.read(doubles)
        apart = _apart(ours, theirs)
        size = sum(t.numel() for t in ours)
        weight += size
        before += size * min(apart / 2, 1.0)
        left = apart
        if apart >= FAR:
            moved = inner.apply(solve(ours, theirs), doubles)
            now = inner.read(moved)
            left = max(_apart(now, theirs), products_apart(ours, theirs))
            said = Evidence("maps", factor, 0, inner.groups * inner.size, inner.groups * inner.size, apart, left, 0.0)
            if said.explained >= EXPLAINED and products_apart(now, ours) <= _KEPT:
                evidence.append(said)
                undone |= {n: moved[n].to(model[n].dtype) for n in inner.tensors}
                left = _apart(now, theirs)
            else:
                left = apart
        after += size * min(left / 2, 1.0)
    total = max(weight, 1.0)
    distances = (before / total) ** 0.5, (after / total) ** 0.5
    result = {n: undone.get(n, model[n]) for n in model} if evidence else {}
    return Protection(
        ("maps",) if evidence else (), tuple(evidence), *distances, distances[1], distances[1] <= NEAR, 0.0, result,
        seconds=time.perf_counter() - started,
    )  # fmt: skip


def _apart(ours: tuple[Tensor, Tensor], theirs: tuple[Tensor, Tensor]) -> float:
    """Squared distance of both sides, relative to the reference's."""
    far = sum(float((a - b).square().sum()) for a, b in zip(ours, theirs, strict=True))
    return far / (sum(float(b.square().sum()) for b in theirs) or 1.0)


def _numbered(slots: tuple[Slot, ...]) -> list[tuple[tuple[str, int], Slot]]:
    """Occurrences with what they are called in every layer: the tensor's pattern, and their number in that tensor."""
    often: dict[str, int] = {}
    found = []
    for slot in slots:
        pattern = re.sub(r"\d+", "#", slot.tensor)
        found.append(((pattern, often.get(slot.tensor, 0)), slot))
        often[slot.tensor] = often.get(slot.tensor, 0) + 1
    return found


__all__ = ["examine_large", "kinds_of"]
