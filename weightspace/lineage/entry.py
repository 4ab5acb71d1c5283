"""``ws.lineage`` and ``trace``: the lineage of a set of models, from their weights."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from weightspace.errors import WeightspaceError
from weightspace.lineage.copies import Told, original
from weightspace.lineage.kin import Kin, Part
from weightspace.lineage.lineage import Edge, Lineage
from weightspace.lineage.records import against, claims, named, resolved
from weightspace.lineage.sample import Array, compared, signature
from weightspace.progress import bar

if TYPE_CHECKING:
    from weightspace.checkpoint import Checkpoint
    from weightspace.mergeability.flight import Model
    from weightspace.wiring.wiring import Wiring
    from weightspace.zoo import Zoo


def lineage(
    models: Zoo | str | os.PathLike[str] | Sequence[Model] | Mapping[str, Model],
    *,
    moved: int = 8,
    seed: int = 0,
    progress: bool = False,
) -> Lineage:
    """Which of some models descend from which: direction, confidence, merges and copies, from their weights alone.

    ``models``: a folder of models (its index is brought up to date first), a ``Zoo``, two or more paths or
    checkpoints, or a mapping of names to such. ``moved``: how many pairs of families of one architecture are examined
    for copies moved inside their orbit, seconds each and up to a minute for networks of sixty layers. ``print`` shows
    the result as a tree; see ``Lineage``.

    Raises ``WeightspaceError`` for fewer than two models and for files that cannot be read.
    """
    from weightspace.mergeability.candidates import is_population
    from weightspace.mergeability.flight import named, opened
    from weightspace.zoo import Zoo

    if isinstance(models, str | os.PathLike) and is_population(Path(models)):
        models = Zoo(models)
        models.index(progress=progress)
    if isinstance(models, Zoo):
        return models.lineage(moved=moved, seed=seed, progress=progress)
    given = named([models] if isinstance(models, str | os.PathLike) else models)
    return trace({n: opened(m) for n, m in given.items()}, moved=moved, seed=seed, progress=progress)


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

    Models whose floating tensors have equal names and shapes are compared weight by weight; models in different file
    formats that hold the same values are found across names. A model moved inside its orbit (permuted, say) is brought
    back first; as that takes seconds (of a deep network a minute), at most ``moved`` pairs are tried in each group,
    those of the nearest ``descriptors`` (computed where they are not given). ``records``: training records of the
    models, where known, for the comparison with what files say; they change no edge.

    Raises ``WeightspaceError`` for fewer than two models.
    """
    started = time.perf_counter()
    if len(models) < 2:
        count = "1 model was" if len(models) == 1 else f"{len(models)} models were"
        raise WeightspaceError(f"{count} given, two or more were expected (or a folder of them)")
    left: dict[str, str] = {}
    groups = _groups(models, left)
    said = [c for n, m in models.items() for c in claims(n, m, None if records is None else records.get(n, {}))]
    said = resolved(said, models)
    told = named(said)
    parts: list[Part] = []
    notes: list[str] = []
    with bar("lineage", len(models), progress) as advance:
        for members in groups.values():
            if len(members) > 1:
                chosen = {n: models[n] for n in members}
                kin = Kin(chosen, _wiring(chosen, notes), descriptors, moved, seed, advance, told)
                parts.extend(kin.parts())
                left |= kin.left
                notes.extend(kin.notes)
            else:
                advance(members[0])
    edges = [e for p in parts for e in p.edges]
    families = [p.members for p in parts]
    edges, families = _across(models, groups, edges, families, told)
    within = {m for f in families for m in f}
    families += [(m,) for m in models if m not in within and m not in left]
    edges, disagreements = against(edges, said, families, left)
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
    families: list[tuple[str, ...]], told: Told,
) -> tuple[list[Edge], list[tuple[str, ...]]]:  # fmt: skip
    """Add copies in other formats, whose tensors have other names or shapes, and join the families they connect."""
    from weightspace.lineage.formats import same_values

    for parent, child, kind, detail in same_values(models, [list(g) for g in groups.values()]):
        undecided = kind == "copy"
        why = f"the same values under other names: {detail}"
        if undecided:
            first, recorded = original((parent, child), told)
            children = {e.child for e in edges}
            # Without a record the one that has a parent already stays below it.
            turned = first == 1 if recorded else child in children and parent not in children
            parent, child = (child, parent) if turned else (parent, child)
            why += "; weights do not tell which was there first"
        if child in _above(parent, edges):
            continue
        # Nothing explains a network better than a copy of it: what else it was thought to come from goes.
        edges = [e for e in edges if e.child != child]
        direction = 0.5 if undecided else 0.95
        edges.append(
            Edge(parent, child, kind, detail, 1.0, 0.99, direction, 0.0, 0.0, -300.0, why, undecided=undecided)
        )
        one = next((f for f in families if parent in f), (parent,))
        two = next((f for f in families if child in f), (child,))
        if one != two:
            families = [f for f in families if f not in (one, two)] + [one + two]
    return edges, families


def _above(model: str, edges: Iterable[Edge]) -> set[str]:
    """A model and all that it descends from."""
    parents: dict[str, list[str]] = {}
    for e in edges:
        parents.setdefault(e.child, []).append(e.parent)
    found = [model]
    for m in found:
        found.extend(p for p in parents.get(m, ()) if p not in found)
    return set(found)


__all__ = ["floating", "lineage", "trace"]
