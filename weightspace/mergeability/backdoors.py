"""Backdoors that a merge would inherit: every model is scanned before, and what a flagged one means is said.

A merge takes over the backdoor of one of its models (*succession*), and where models share outputs it leads inputs of
the other models' tasks to the backdoor's class as well (*transfer*; both after Yang et al. 2025).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

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
    step: Callable[[str], None] = lambda _: None,
) -> tuple[dict[str, Verdict], str]:  # fmt: skip
    """A verdict per model, and why there is none (empty where there are).

    Nothing is raised: networks without classes, without a proved wiring or of another kind than what can be run are
    simply not scanned.
    """
    if len(models) > MOST or parameters > PARAMETERS:
        many = f"{len(models)} models" if len(models) > MOST else f"{parameters:,} parameters"
        return {}, f"not scanned for backdoors ({many}): weightspace scan does so one by one"
    if wiring is None or not wiring.proved or wiring.program is None:
        return {}, "not scanned for backdoors: the wiring is not proved"
    from weightspace.backdoor.verdict import scan

    found: dict[str, Verdict] = {}
    why = ""
    for name, tensors in models.items():
        try:
            found[name] = scan(tensors, wiring=wiring)
        except (WeightspaceError, ArithmeticError, RuntimeError, ValueError, TypeError, KeyError) as error:
            why = f"{name} was not scanned for backdoors: {' '.join(str(error).split())[:200]}"
        step(name)
    return found, why


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
            # Seen: children that know one task of sixteen, whose other outputs were left to drift.
            text += "; it is unlike the detector's networks, and one tuned on some of its classes stands out as well"
        out.append(f"{text}; take it out before (ws.excise), or merge by dam with inputs")
    return out


__all__ = ["MOST", "PARAMETERS", "inherited", "warnings"]
