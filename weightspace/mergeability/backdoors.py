"""Backdoors that a merge would inherit: every model is scanned before, and what a flagged one means is said.

A merge takes over the backdoor of one of its models (*succession*), and where models share outputs it leads inputs of
the other models' tasks to the backdoor's class as well (*transfer*; both after Yang et al. 2025).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cache
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from weightspace.errors import WeightspaceError

if TYPE_CHECKING:
    from weightspace.backdoor.verdict import Verdict
    from weightspace.wiring.wiring import Wiring

MOST = 8
"""Models that are scanned for one report; of more, none is."""
PARAMETERS = 5_000_000
"""Larger networks are not scanned for a report."""


def inherited(
    models: Mapping[str, Mapping[str, Tensor]], wiring: Wiring | None, parameters: int,
    step: Callable[[str], None] = lambda _: None, base: Mapping[str, Tensor] | None = None,
) -> tuple[dict[str, Verdict], str]:  # fmt: skip
    """A verdict per model, and why there is none (empty where there are).

    A model that is flagged by untrained tests alone, outside the detector's range, and was taught some of the classes
    of its ``base`` is judged by what it changed (``drift``). Without a base three models and more are each held against
    the median of all.

    Nothing is raised: networks without classes, without a proved wiring or of another kind than what can be run are
    simply not scanned.
    """
    if len(models) > MOST or parameters > PARAMETERS:
        many = f"{len(models)} models" if len(models) > MOST else f"{parameters:,} parameters"
        return {}, f"not scanned for backdoors ({many}): weightspace scan does so one by one"
    if wiring is None or not wiring.proved or wiring.program is None:
        return {}, "not scanned for backdoors: the wiring is not proved"
    from weightspace.backdoor.verdict import scan

    @cache
    def start() -> Mapping[str, Tensor] | None:
        return _middle(models) if base is None else base

    found: dict[str, Verdict] = {}
    why = ""
    for name, tensors in models.items():
        try:
            verdict = scan(tensors, wiring=wiring)
            before = start() if verdict.flagged and not verdict.applicable else None
            found[name] = verdict if before is None else _less_base(verdict, wiring, tensors, before)
        except (WeightspaceError, ArithmeticError, RuntimeError, ValueError, TypeError, KeyError) as error:
            why = f"{name} was not scanned for backdoors: {' '.join(str(error).split())[:200]}"
        step(name)
    return found, why


def _less_base(
    verdict: Verdict, wiring: Wiring, tensors: Mapping[str, Tensor], base: Mapping[str, Tensor]
) -> Verdict:
    """The verdict on what a child changed of its base, where it was taught some of its classes."""
    from weightspace.backdoor.scanning import completed
    from weightspace.mergeability.drift import drift

    if any(n not in base or base[n].shape != tensors[n].shape for n in tensors):
        return verdict
    found = drift(wiring, completed(tensors, wiring), completed(base, wiring))
    if found is None:
        return verdict
    flagged = found.p_value <= verdict.level
    said = "stands out" if flagged else "does not stand out"
    reason = (
        f"of {found.classes} classes {found.taught} were taught to the child; in what that changed of its base "
        f"class {found.target} {said} among them (p = {found.p_value:.2g}); what stands out otherwise does so in the "
        "base as well, or with its whole task. Grafted subnets show in these tests, triggers learned hardly"
    )
    targets = tuple(sorted(verdict.targets, key=lambda t: t[0] != found.target))
    return replace(verdict, flagged=flagged, p_value=found.p_value, targets=targets, reason=reason)


def _middle(models: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Tensor] | None:
    """The median of three models and more: what most of them left as it was is as in their base."""
    if len(models) < 3:
        return None
    first = next(iter(models.values()))
    alike = all(n in m and m[n].shape == first[n].shape for m in models.values() for n in first)
    if not alike:
        return None
    return {
        n: torch.stack([m[n].float() for m in models.values()]).median(0).values if t.is_floating_point() else t
        for n, t in first.items()
    }


def warnings(found: Mapping[str, Verdict]) -> list[str]:
    """What flagged models mean for a merge, a sentence each."""
    out = []
    for name, verdict in found.items():
        if not verdict.flagged:
            continue
        sure = "" if verdict.probability is None else f", probability {verdict.probability:.2f}"
        p = "" if verdict.p_value is None else f", p {verdict.p_value:.2g}"
        aim = "" if verdict.target is None else f" to class {verdict.target}"
        text = f"{name} may carry a backdoor{aim}{sure}{p}: a merge would inherit it (succession)"
        others = [n for n in found if n != name]
        if others:
            shown = ", ".join(others[:3]) + (" …" if len(others) > 3 else "")
            text += f", and it may lead inputs of {shown} astray (transfer)"
        if not verdict.applicable:
            text += "; it is unlike the detector's networks, and judged by tests that were not trained"
        out.append(f"{text}; take it out before (ws.excise), or merge by dam with inputs")
    return out


__all__ = ["MOST", "PARAMETERS", "inherited", "warnings"]
