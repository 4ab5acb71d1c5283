"""Find where a backdoor sits in a network: ``locate`` gives a ``Subspace``.

Two things are looked for. A *subnet that stands apart* (``weightspace.backdoor.subnets``) shows in the weights alone.
Where there is none, a *trigger* is found through the network (``weightspace.backdoor.triggers``), and elements are
ranked by how much it changes them: an estimate, without the real trigger, of trigger-activated change (Zheng et al.
2022). Both go through the wiring, so that neurons, channels, heads and residual streams are treated alike.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from weightspace.backdoor.directions import bases, excited, touching
from weightspace.backdoor.outputs import class_axis
from weightspace.backdoor.subnets import separation
from weightspace.backdoor.subspace import Basis, Subspace, rank
from weightspace.backdoor.triggers import NOISE, Trigger, inverted, made_up, vocabulary
from weightspace.errors import UnprovedWiringError, WeightspaceError
from weightspace.wiring.recording import select, values
from weightspace.wiring.replay import prepared, program_of
from weightspace.wiring.wiring import Wiring

SCREENED = 16
"""Inputs for which a trigger is looked for in each class, where the target is not known."""
CHANGED = 0.05
"""Share of the elements that a response is taken to be about, at least one."""


def locate(
    wiring: Wiring, tensors: Mapping[str, Tensor], *, target: int | None = None, inputs: Tensor | None = None,
    base: Mapping[str, Tensor] | None = None, trigger: tuple[Tensor, Tensor] | None = None, seed: int = 0,
) -> Subspace:  # fmt: skip
    """The elements, layers and directions that a backdoor uses; without data unless some are given.

    ``target``: the class that the backdoor serves, where known. ``inputs (n, …)``: a few clean inputs; noise without.
    ``base``: tensors of the network before it was poisoned, whose answers to the trigger are taken off. ``trigger``:
    the same inputs without and with the real trigger, where it is known.

    It answers for clean networks as well: whether there is a backdoor is for ``ws.scan`` to say. Raises
    ``UnprovedWiringError`` for a wiring that is not proved or cannot be run, ``NoClassesError`` for a network without
    classes, ``WeightspaceError`` for a target that is none of them.
    """
    if not wiring.proved or wiring.program is None:
        raise UnprovedWiringError(
            f"the wiring ({wiring.origin}) is {wiring.status}; a backdoor is located where a proved network can be run"
        )
    axis = class_axis(wiring, tensors)
    if target is not None and not 0 <= target < axis.classes:
        raise WeightspaceError(f"there is no class {target}; the network has {axis.classes}, counted from 0")
    given = prepared(wiring, tensors)
    program = program_of(wiring)

    def run(x: Tensor) -> Tensor:
        return axis.logits(program.run(given, x, *program.args[1:], **dict(program.kwargs)))

    apart = separation(wiring, given)
    facts = {"conductance": round(apart.conductance, 6), "made_up": inputs is None and trigger is None}
    if apart.apart and trigger is None:
        targets = (target,) if target is not None else _fed(run, wiring, given, apart.group, axis.classes, seed)
        layers = tuple((name, float(score.max())) for name, score in apart.scores.items() if score.numel())
        size = sum(len(index) for index in apart.group.values())
        return Subspace(
            targets, apart.scores, rank(apart.scores), _sorted(layers),
            touching(wiring, given, apart.group), size, "cut", facts,
        )  # fmt: skip
    found, order = _trigger(run, wiring, axis.classes, target, inputs, trigger, seed)
    facts |= {"loss": round(found.loss, 6), "success": round(found.success, 4)}
    scores = response(wiring, given, found.before, found.after)
    if base is not None:
        usual = response(wiring, prepared(wiring, base), found.before, found.after)
        scores = {name: (score - usual[name]).clamp(min=0) for name, score in scores.items()}
    most = max((float(s.max()) for s in scores.values() if s.numel()), default=0.0) or 1.0
    scores = {name: score / most for name, score in scores.items()}
    layers = tuple((name, float(score.square().mean().sqrt())) for name, score in scores.items())
    total = sum(s.numel() for s in scores.values())
    blocks = bases(given, excited(wiring, given, found.before, found.after))
    return Subspace(
        order, scores, rank(scores), _sorted(layers), blocks, max(1, round(CHANGED * total)), "response", facts
    )


def response(
    wiring: Wiring, tensors: Mapping[str, Tensor], before: Tensor, after: Tensor, *, seed: int = 0
) -> dict[str, Tensor]:
    """How much elements change from ``before`` to ``after (n, …)``: factor -> (*over, size).

    The root mean square of an element's change over inputs and places, in units of the deviation that the elements of
    its factor have among themselves and over the inputs without the trigger.
    """
    a, b = (values(wiring, tensors, x, seed=seed) for x in (before, after))
    found = {}
    for name in a:
        x, y = (torch.cat([v.samples for v in select(v[name], "post")]) for v in (a, b))
        unit = float(x.std(0).square().mean().sqrt()) if len(x) > 1 else 0.0
        found[name] = (y - x).square().mean(0).sqrt() / (unit or 1.0)
    return found


def _trigger(
    run: object, wiring: Wiring, classes: int, target: int | None, inputs: Tensor | None,
    trigger: tuple[Tensor, Tensor] | None, seed: int,
) -> tuple[Trigger, tuple[int, ...]]:  # fmt: skip
    """The trigger to look at and the classes in the order in which they are suspected."""
    assert callable(run)
    if trigger is not None:
        before, after = trigger
        with torch.no_grad():
            votes = torch.bincount(run(after).argmax(1), minlength=classes)
        order = votes.argsort(descending=True, stable=True).tolist()
        best = order[0] if target is None else target
        return Trigger(best, before, after, 0.0, float(votes[best]) / len(after)), (best,)
    x = made_up(wiring, NOISE, seed) if inputs is None else inputs
    words = 0 if x.is_floating_point() else max(vocabulary(wiring), int(x.max()) + 1)
    if target is None:
        tried = inverted(run, x[:SCREENED], list(range(classes)), words=words, seed=seed)
        order = [t.target for t in sorted(tried, key=lambda t: t.loss)]
    else:
        order = [target]
    with torch.no_grad():
        others = x[run(x).argmax(1) != order[0]]
    # Inputs that are of the class already say nothing about the way to it.
    (found,) = inverted(run, others if len(others) else x, [order[0]], words=words, seed=seed)
    return found, tuple(order)


def _fed(
    run: object, wiring: Wiring, tensors: Mapping[str, Tensor], group: Mapping[str, Tensor], classes: int, seed: int
) -> tuple[int, ...]:
    """Classes in the order of how much the subnet's last elements raise them: what classes read of the group."""
    axis = class_axis(wiring, tensors)
    total = torch.zeros(classes, dtype=torch.float64)
    masks = _inside(wiring, group)
    for rows in axis.weights:
        mask = masks.get(rows.tensor)
        if mask is None:
            continue
        chosen = rows.of({rows.tensor: tensors[rows.tensor] * mask})
        total += chosen.sum(1)
    order: list[int] = total.argsort(descending=True, stable=True).tolist()
    return tuple(order)


def _inside(wiring: Wiring, group: Mapping[str, Tensor]) -> dict[str, Tensor]:
    from weightspace.zoo.grafting import cuts_of

    return {name: cut.inner for name, cut in cuts_of(wiring, group).items()}


def _sorted(layers: tuple[tuple[str, float], ...]) -> tuple[tuple[str, float], ...]:
    return tuple(sorted(layers, key=lambda row: -row[1]))


__all__ = ["Basis", "Subspace", "locate", "response"]
