"""Preflight: do models share an ancestor, and were they moved inside their orbits so that they cannot be merged?"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from weightspace.checkpoint import Checkpoint
from weightspace.errors import WeightspaceError
from weightspace.mergeability.flight import Flight, listed, one_line

if TYPE_CHECKING:
    from weightspace.mergeability.protection import Protection
    from weightspace.wiring.wiring import Wiring


def _pairs(f: Flight, check: str) -> dict[str, Checkpoint]:
    """Models that can be held against the reference weight by weight; why not, where they cannot."""
    found = {}
    for name, model in f.others().items():
        if name in f.unlike or name in f.unusable:
            continue
        if name in f.broken or f.reference[0] in f.broken:
            f.skipped[f"{check} of {name}"] = "there are values that are not finite"
        elif f.seen is not None and f.base is not None and f.seen.shared.get(name) == 1.0:
            # The same weights: nothing to test.
            continue
        else:
            found[name] = model
    return found


def ancestors(f: Flight) -> None:
    """Each model against the reference, with its null distribution."""
    from weightspace.mergeability.ancestry import ancestry

    models = _pairs(f, "ancestry")
    wiring = f.find_wiring() if models else None
    against, reference = f.reference
    for name, model in models.items():
        f.step(f"ancestry of {name}")
        if wiring is None or wiring.status == "failed":
            f.skipped["ancestry"] = "it needs a wiring"
            return
        found = ancestry(
            reference, model, wiring, align=wiring.proved and _fits(f, reference), seed=f.seed, names=(against, name)
        )
        f.related[name] = found
        f.ancestry.append(found if found.aligned is None else replace(found, aligned=_light(found.aligned)))
        if found.relation == "unrelated":
            f.say(
                "warning", "ancestry", name, found.statement, f"an ancestor in common with {against}",
                "averages of unrelated networks fail: align them first, or choose models of one base",
            )  # fmt: skip
        elif found.relation == "unknown":
            f.skipped[f"ancestry of {name}"] = found.note
        elif found.relation == "same ancestor" and found.lost:
            f.say(
                "note", "ancestry", name,
                f"{len(found.lost)} tensors show no trace of {against} ({listed(found.lost)})",
                "correspondence in every layer", "layers made anew, such as a head, or moved ones: merge without them",
                found.lost,
            )  # fmt: skip


_MOST = 100_000_000
"""Models of up to as many values are brought near each other, which holds both in memory in float64."""


def _fits(f: Flight, reference: Checkpoint) -> bool:
    return reference.num_parameters <= _MOST


def _light(found: Any) -> Any:
    """Without the tensors of a model that was not protected, which the caller has."""
    return found if found.protected else replace(found, tensors={})


def protections(f: Flight) -> None:
    """Copies moved inside their orbit, found against the reference, and what is left once that is undone."""
    from weightspace.errors import UnprovedWiringError
    from weightspace.mergeability.protection import Reference, examine

    models = _pairs(f, "protection")
    wiring = f.find_wiring() if models else None
    reference = f.reference[1]
    held: Reference | None = None
    for name, model in models.items():
        f.step(f"protection of {name}")
        if wiring is None or not wiring.proved:
            f.skipped["protection"] = "it needs a proved wiring"
            return
        if wiring.program is None and wiring.origin.startswith("transformers:"):
            _large(f, models, wiring)
            return
        if not _fits(f, reference):
            f.skipped["protection"] = (
                f"{reference.num_parameters:,} values, more than {_MOST:,}: call "
                "weightspace.mergeability.protection.examine where memory allows"
            )
            return
        known = f.related.get(name)
        if known is not None and known.relation == "unrelated" and known.aligned is not None:
            found = known.aligned
        else:
            try:
                found = known.aligned if known is not None and known.aligned is not None else None
                if found is None:
                    held = held or Reference(reference, wiring)
                    found = examine(model, held, wiring)
            except UnprovedWiringError as error:
                f.skipped["protection"] = one_line(error)
                return
        _found(f, name, found)


def _large(f: Flight, models: Mapping[str, Checkpoint], wiring: Wiring) -> None:
    """Networks that were proved on a small twin: maps inside heads, layer by layer."""
    from weightspace.mergeability.large import examine_large, kinds_of

    try:
        kinds = kinds_of(f.reference[1])
    except WeightspaceError as error:
        f.skipped["protection"] = one_line(error)
        return
    for name, model in models.items():
        f.step(f"protection of {name}")
        _found(f, name, examine_large(model, f.reference[1], wiring, kinds))
    f.skipped["protection by permutations and scales"] = (
        f"the network is too large to be run ({f.reference[1].num_parameters:,} values); maps inside heads were sought"
    )


def _found(f: Flight, name: str, found: Protection) -> None:
    """Keep what was found of a model, and say it where it is protected."""
    against = f.reference[0]
    f.protection.append(_light(found))
    if not found.protected:
        return
    # Layers that lost their correspondence are accounted for.
    f.findings = [x for x in f.findings if x.check != "ancestry" or x.models != (name,)]
    f.undone[name] = found.tensors
    moved = list(dict.fromkeys(f"{e.kind} ({e.factor})" for e in found.evidence))
    f.say(
        "stop", "protection", name,
        f"moved inside its orbit, so that it computes the same and cannot be averaged: {listed(moved)}; "
        f"distance to {against} {found.before:.2f}, and {found.after:.2f} once that is undone",
        "neurons, heads and scales as in the base",
        "merge the undone copy, which computes the same (`.undone` of this report; on the command line "
        "`weightspace score … --undone FOLDER` writes it)",
    )  # fmt: skip


__all__ = ["ancestors", "protections"]
