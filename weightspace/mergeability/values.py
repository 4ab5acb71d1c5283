"""Preflight: are the values sound, and are models equal?"""

from __future__ import annotations

import math

from weightspace.mergeability import health as vitals
from weightspace.mergeability.flight import Flight, listed


def values(f: Flight) -> None:
    """Values that are not finite, constant tensors, empty rows, lost rank and odd norms, against what is usual."""
    found = _health(f)
    against = f.reference[0] if f.base is not None else "the other models"
    for name, broken in found.broken.items():
        who = (f.base_name or "base") if name == vitals.BASE and f.base is not None else name
        if broken:
            f.broken.add(who)
            f.say(
                "stop", "values", who, f"{sum(broken.values()):,} values are not finite, in {listed(list(broken))}",
                "finite weights", "take an earlier checkpoint: every method would spread them", list(broken),
            )  # fmt: skip
    for name in f.models:
        if found.constant.get(name):
            tensors = found.constant[name]
            f.say(
                "warning", "values", name, f"{len(tensors)} tensors hold one value only ({listed(tensors)})",
                f"trained values, as in {against}", "check that the file is whole; leave these tensors out", tensors,
            )  # fmt: skip
        if found.dead.get(name):
            dead = found.dead[name]
            worst = max(dead, key=lambda t: dead[t])
            f.say(
                "warning", "values", name,
                f"{sum(dead.values()):,} rows or columns are zero, {dead[worst]} of them in {worst}",
                f"none beyond those of {against}",
                "pruned or dead units: merging halves what the other model does there",
                list(dead),
            )  # fmt: skip
        if found.collapsed.get(name):
            low = found.collapsed[name]
            worst = min(low, key=lambda t: low[t][0] / low[t][1])
            f.say(
                "warning", "values", name,
                f"{len(low)} matrices have lost rank; {worst} has an effective rank of {low[worst][0]:.1f}",
                f"about {low[worst][1]:.1f} as in {against}", "the layer has collapsed: leave it out, or this model",
                list(low),
            )  # fmt: skip
        if found.scaled.get(name):
            scaled = found.scaled[name]
            worst = max(scaled, key=lambda t: abs(math.log(scaled[t][0] / scaled[t][1])))
            f.say(
                "warning", "values", name,
                f"{len(scaled)} tensors stand out by their norm; {worst} has {scaled[worst][0]:.2f} times the norm in "
                f"{against}",
                f"about {scaled[worst][1]:.2f} times, as the model's other tensors",
                "a scaled layer (or one trained at another rate): rescale it, or use a method that normalises task "
                "vectors", list(scaled),
            )  # fmt: skip


def _health(f: Flight) -> vitals.Health:
    if f.seen is None:
        f.seen = vitals.examine({n: c for n, c in f.models.items() if n not in f.unusable}, f.base)
    return f.seen


def equal(f: Flight) -> None:
    """Models that are equal to each other, or to the base in whole or in part."""
    found = _health(f)
    groups: dict[str, list[str]] = {}
    for name, digest in found.digests.items():
        if name not in f.unusable:
            groups.setdefault(digest, []).append(name)
    for same in groups.values():
        if len(same) > 1:
            f.say(
                "warning", "equal", same, f"{len(same)} models have the same weights", "different models",
                "give each once, and its weight in the merge instead",
            )  # fmt: skip
    for name, share in found.shared.items():
        if f.base is None or not share:
            continue
        if share == 1.0:
            f.say(
                "warning", "equal", name, f"the weights are those of {f.base_name}", "a fine-tuned model",
                "leave it out",
            )  # fmt: skip
        else:
            f.say(
                "note", "equal", name, f"{share:.0%} of the parameters are unchanged from {f.base_name}",
                "any share", "frozen layers: they stay as they are in the merge",
            )  # fmt: skip


__all__ = ["equal", "values"]
