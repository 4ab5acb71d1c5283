"""``trace``: the lineage of a set of models, from their weights."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from weightspace.errors import WeightspaceError
from weightspace.lineage.kin import Kin, Part
from weightspace.lineage.lineage import Edge, Lineage
from weightspace.lineage.records import Claim, claims, resolved
from weightspace.lineage.sample import Array, compared, signature
from weightspace.progress import bar

if TYPE_CHECKING:
    from weightspace.checkpoint import Checkpoint
    from weightspace.wiring.wiring import Wiring

def trace(
    models: Mapping[str, Checkpoint],
    *,
    records: Mapping[str, Mapping[str, Any]] | None = None,
    descriptors: Mapping[str, Array] | None = None,
    moved: int = 8,
    seed: int = 0,
    progress: bool = False,
) -> Lineage:
    """Which of some models descend from which, with direction and confidence, from their weights alone.

    Models whose floating tensors have equal names and shapes are compared weight by weight; models of different files
    formats that hold the same values are found across names. A model moved inside its orbit (permuted, say) is brought
    back first; as that takes seconds, at most ``moved`` pairs are tried in each group, those of the nearest
    ``descriptors`` (computed where they are not given). ``records``: training records of the models, where known, for
    the comparison with what files say; they change no edge.

    Raises ``WeightspaceError`` for fewer than two models.
    """
    started = time.perf_counter()
    if len(models) < 2:
        raise WeightspaceError(f"{len(models)} models were given; a lineage needs at least two")
    left: dict[str, str] = {}
    groups = _groups(models, left)
    said = [c for n, m in models.items() for c in claims(n, m, None if records is None else records.get(n, {}))]
    said = resolved(said, models)
    parts: list[Part] = []
    notes: list[str] = []
    with bar("lineage", len(models), progress) as advance:
        for members in groups.values():
            if len(members) > 1:
                chosen = {n: models[n] for n in members}
                kin = Kin(chosen, _wiring(chosen, notes), descriptors, moved, seed, advance)
                parts.extend(kin.parts())
                left |= kin.left
                notes.extend(kin.notes)
            else:
                advance(members[0])
    edges = [e for p in parts for e in p.edges]
    families = [p.members for p in parts]
    edges, families = _across(models, groups, edges, families)
    within = {m for f in families for m in f}
    families += [(m,) for m in models if m not in within and m not in left]
    edges, disagreements = _held_against(edges, said, families, left)
    order = {m: i for i, m in enumerate(models)}
    edges.sort(key=lambda e: (order[e.parent], order[e.child]))
    families.sort(key=lambda f: (-len(f), order[f[0]]))
    return Lineage(
        tuple(models), tuple(edges), tuple(families), tuple(said), tuple(disagreements), left,
        tuple(dict.fromkeys(notes)), time.perf_counter() - started,
    )  # fmt: skip


def _groups(models: Mapping[str, Checkpoint], left: dict[str, str]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for name, model in models.items():
        shapes = floating(model)
        if any(".lora_A" in n or ".lora_B" in n for n in shapes):
            left[name] = "an adapter: its weights are a change of its base's, and are no network by themselves"
        elif not compared(shapes, None):
            left[name] = "no floating tensors of more than one element"
        else:
            found.setdefault(signature(shapes), []).append(name)
    return found


def floating(model: Checkpoint) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the floating tensors of a model, by its header."""
    return {n: tuple(model.shape(n)) for n in model if model.dtype(n).is_floating_point}


def _wiring(models: Mapping[str, Checkpoint], notes: list[str]) -> Wiring | None:
    """The wiring of a group, of its first member that can be wired."""
    from weightspace.wiring import wiring

    why = ""
    for name, model in list(models.items())[:3]:
        try:
            found = wiring(model)
        except WeightspaceError as error:
            why = why or f"{name}: {' '.join(str(error).split())[:200]}"
            continue
        if found.status != "failed":
            return found
    first = next(iter(models))
    notes.append(
        f"{first} and {len(models) - 1} models like it have no wiring; unrelated networks are drawn by shuffling "
        f"entries, and permuted copies are not looked for ({why or 'the proof failed'})"
    )
    return None


def _across(
    models: Mapping[str, Checkpoint], groups: Mapping[str, Sequence[str]], edges: list[Edge],
    families: list[tuple[str, ...]],
) -> tuple[list[Edge], list[tuple[str, ...]]]:  # fmt: skip
    """Add copies in other formats, whose tensors have other names or shapes, and join the families they connect."""
    from weightspace.lineage.formats import same_values

    found = same_values(models, [list(g) for g in groups.values()])
    children = {e.child for e in edges}
    for parent, child, kind, detail in found:
        if child in children:
            if parent in children:
                continue
            parent, child = child, parent
        children.add(child)
        why = f"the same values under other names: {detail}"
        direction = 0.5 if kind == "copy" else 0.95
        edges.append(Edge(parent, child, kind, detail, 1.0, 0.99, direction, 0.0, 0.0, -300.0, why))
        one = next((f for f in families if parent in f), (parent,))
        two = next((f for f in families if child in f), (child,))
        if one != two:
            families = [f for f in families if f not in (one, two)] + [one + two]
    return edges, families


def _held_against(
    edges: Iterable[Edge], said: Sequence[Claim], families: Sequence[tuple[str, ...]], left: Mapping[str, str]
) -> tuple[list[Edge], list[str]]:
    """Mark every edge by what the child's file says, and put disagreements into sentences."""
    from dataclasses import replace

    claimed: dict[str, set[str]] = {}
    for claim in said:
        if claim.parent is not None:
            claimed.setdefault(claim.child, set()).add(claim.parent)
    found: dict[str, list[Edge]] = {}
    marked = []
    for edge in edges:
        told = claimed.get(edge.child)
        recorded = "" if told is None else "agrees" if edge.parent in told else "disagrees"
        marked.append(replace(edge, recorded=recorded))
        found.setdefault(edge.child, []).append(marked[-1])
    family = {m: i for i, f in enumerate(families) for m in f}
    sentences = []
    for child, told in claimed.items():
        if child in left:
            continue
        parents = {e.parent for e in found.get(child, ())}
        if parents & told:
            continue
        names = " and ".join(sorted(told))
        if parents:
            how = " and ".join(f"{e.parent} ({e.confidence:.2f})" for e in found[child])
            sentences.append(f"{child} says it comes from {names}; its weights speak for {how}")
        elif all(family.get(child, -1) == family.get(t, -2) for t in told):
            back = [t for t in told if any(e.parent == child for e in found.get(t, ()))]
            more = f"; the weights speak for {child} being the parent of {back[0]}" if back else ""
            sentences.append(f"{child} says it comes from {names}; its weights show a relative, not its parent{more}")
        else:
            sentences.append(f"{child} says it comes from {names}; its weights show no trace of that")
    return marked, sentences


__all__ = ["floating", "trace"]
