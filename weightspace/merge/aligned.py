"""Models brought next to each other before they are merged, and what merging took away given back after."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from weightspace.errors import MergeError
from weightspace.merge.data import by_position, joined
from weightspace.merge.method import Models
from weightspace.merge.sources import Model

if TYPE_CHECKING:
    from weightspace.checkpoint import Checkpoint
    from weightspace.wiring.wiring import Permutation, Wiring

Tensor = torch.Tensor
UNIVERSE = "universe"
REPAIRS = ("data", "statistics", "weights")


def bring(
    models: Sequence[Model], base: Model | None, method: str, *, wiring: Wiring | None = None, data: Any = None,
    seed: int = 0, unverified: bool = False, options: Mapping[str, Any] | None = None,
) -> tuple[list[Model], list[str]]:  # fmt: skip
    """The models moved onto the base, or the first of them, by a method of ``ws.align``; and a sentence for each.

    More than two without a base meet in a common frame (``ws.align.align_many``) where ``method`` is
    ``"weight-matching"``, and always where it is ``"universe"``; the frame is numbered as the base or the first is.
    Moved models are lazy where the method gives permutations: a tensor is moved when it is read. Maps beyond that, and
    other widths brought to the first one's, are held in memory.

    Raises `AlignmentError` and `UnprovedWiringError` as ``ws.align`` does, `MergeError` where a method needs ``data``.
    """
    from weightspace.align.entry import align
    from weightspace.align.methods import METHODS, method_of
    from weightspace.align.universe import align_many

    given = dict(options or {})
    first, others = (base, list(models)) if base is not None else (models[0], list(models[1:]))
    if not others:
        return list(models), ["one model: nothing to align"]
    if method == UNIVERSE or (method == "weight-matching" and len(others) > 1 and base is None):
        everyone = [first, *others]
        found = align_many([m.tensors for m in everyone], wiring=wiring, seed=seed, unverified=unverified, **given)
        moved = [
            _moved(m, found.wiring, p) for m, p in zip(everyone, found.permutations, strict=True)
        ]
        said = (
            f"{len(everyone)} models in a common frame: mean weight cosine of pairs {found.before:.4f} → "
            f"{found.objective:.4f}"
        )
        return moved[1:] if base is not None else moved, [said]
    if method not in METHODS:
        raise MergeError(f"there is no alignment method {method!r}; there are {', '.join([*METHODS, UNIVERSE])}")
    how = method_of(method)
    if how.needs_inputs and data is None:
        raise MergeError(f"align={method!r} compares what the networks compute: give inputs as data=")
    out, said_of = ([first] if base is None else []), []
    for model in others:
        own = wiring if wiring is not None and _fits(wiring, model) else None
        extra: dict[str, Any] = {}
        if data is not None and (how.needs_inputs or how.takes_inputs):
            own, extra["inputs"] = _with_inputs(_found(own, model), data, len(models))
        alignment = align(
            first.tensors, model.tensors, method, wiring=own, seed=seed, unverified=unverified, **extra, **given
        )
        lazy = _moved(model, alignment.wiring, alignment.permutations)
        if not _same(lazy, alignment.aligned):
            lazy = Model(alignment.aligned, model.label)
        out.append(lazy)
        said_of.append(
            f"{model.label} moved onto {first.label} by {method}: weight cosine {alignment.before:.4f} → "
            f"{alignment.objective:.4f}"
        )
    return out, said_of


def repaired(
    merged: Mapping[str, Tensor], ends: Sequence[Model], how: str, *, wiring: Wiring, data: Any = None,
    weights: Sequence[float] | None = None,
) -> tuple[dict[str, Tensor], str]:  # fmt: skip
    """The merged tensors repaired (`weightspace.align.repair`), and a sentence about it.

    ``how``: ``"data"`` gives every layer the statistics of the ends on ``data``, ``"statistics"`` measures only the
    running ones of batch norms anew, ``"weights"`` judges the loss of variance without data. ``ends``: the models that
    were merged, aligned if they were. Raises `MergeError` for results of other shapes than the ends.
    """
    from weightspace.align import repair

    named = [n for n in wiring if n in merged]
    for name in named:
        if any(tuple(merged[name].shape) != m.shapes.get(name) for m in ends):
            raise MergeError(f"{name}: the result has another shape than the models, so it cannot be repaired by them")
    own = {n: merged[n] for n in named}
    shares = None if weights is None or min(weights) < 0 or sum(weights) <= 0 else list(weights)
    tensors = [{n: m.whole(n) for n in named} for m in ends] if how != "statistics" else []
    if how == "weights":
        found = repair.repair_without_data(wiring, own, tensors, weights=shares)
        said = "rows have the lengths, and running variances the size, that the models' have (no data)"
    else:
        placed, inputs = _with_inputs(wiring, data, len(ends))
        if how == "statistics":
            found = repair.reset_statistics(placed, own, inputs)
            said = f"running statistics were measured anew on {len(inputs[0]):,} inputs"
        else:
            found = repair.repair(placed, own, tensors, inputs, weights=shares)
            said = f"layers have the statistics that the models' have on {len(inputs[0]):,} inputs"
    changed = [n for n in named if found[n] is not own[n] and not torch.equal(found[n], own[n])]
    if not changed:
        return dict(merged), f"repair by {how}: there was nothing to repair"
    return {**merged, **found}, f"repaired: {said}; {len(changed):,} tensors changed"


def check(align: str | None, repair: str | None, data: Any) -> None:
    """Raise `MergeError` for words that are not known and data that lack, before anything is opened."""
    if align is not None and not isinstance(align, str):
        raise MergeError(f"align is {align!r}; the name of an alignment method was expected")
    if repair is not None and repair not in REPAIRS:
        raise MergeError(f"repair is {repair!r}; one of {', '.join(REPAIRS)} was expected")
    if repair in ("data", "statistics") and data is None:
        raise MergeError(f"repair={repair!r} measures on inputs: give them as data=, or say repair='weights'")


def _with_inputs(wiring: Wiring, data: Any, count: int) -> tuple[Wiring, tuple[Any, ...]]:
    return by_position(wiring, joined(Models(None, ({},) * count, (), (1.0,) * count, data)))


def _found(wiring: Wiring | None, model: Model) -> Wiring:
    if wiring is not None:
        return wiring
    from weightspace.wiring.entry import wiring as find

    return find(model.tensors)


def _fits(wiring: Wiring, model: Model) -> bool:
    return {n: tuple(s) for n, s in wiring.shapes.items()} == {n: tuple(s) for n, s in model.shapes.items()}


def _moved(model: Model, wiring: Wiring, permutation: Permutation) -> Model:
    """The model after a group element acted on it; each tensor when it is read."""
    from weightspace.checkpoint.checkpoint import from_entries
    from weightspace.checkpoint.contents import Entry

    def load(name: str) -> Tensor:
        return wiring.apply(permutation, {name: model.whole(name)})[name]

    entries = {n: Entry(model.shapes[n], model.dtypes[n], partial(load, n)) for n in model.shapes}
    return Model(from_entries(entries, "tensors", {}, model.config or None), model.label)


def _same(lazy: Model, aligned: Checkpoint) -> bool:
    return lazy.shapes == dict(aligned.shapes) and all(torch.equal(lazy.tensors[n], aligned[n]) for n in aligned)
