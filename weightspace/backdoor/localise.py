"""Find where a backdoor sits in a network: ``locate`` gives a ``Subspace``.

Two things are looked for. A *subnet that stands apart* (``weightspace.backdoor.subnets``) shows in the weights alone.
Where there is none, a *trigger* is found through the network (``weightspace.backdoor.triggers``), and elements are
ranked by how much it changes them: an estimate, without the real trigger, of trigger-activated change (Zheng et al.
2022). Both go through the wiring, so that neurons, channels, heads and residual streams are treated alike.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from weightspace.backdoor.directions import bases, excited, touching
from weightspace.backdoor.outputs import ClassAxis, class_axis
from weightspace.backdoor.pictures import picture_shape, shown
from weightspace.backdoor.subnets import separation
from weightspace.backdoor.subspace import Basis, Subspace, rank
from weightspace.backdoor.triggers import NOISE, Run, Trigger, inverted, made_up, words_of
from weightspace.errors import UnprovedWiringError, WeightspaceError
from weightspace.wiring.recording import select, values
from weightspace.wiring.replay import prepared, program_of
from weightspace.wiring.wiring import Wiring
from weightspace.zoo.grafting import cuts_of

SCREENED = 16
"""Inputs for which a trigger is looked for in each class, where the target is not known."""
CHANGED = 0.05
"""Share of the elements that a response is taken to be about, at least one."""


def locate(
    wiring: Wiring, tensors: Mapping[str, Tensor], *, target: int | None = None, inputs: Tensor | None = None,
    base: Mapping[str, Tensor] | None = None, trigger: tuple[Tensor, Tensor] | None = None, seed: int = 0,
) -> Subspace:  # fmt: skip
    """The elements, layers and directions that a backdoor uses; without data unless some are given.

    ``target``: the class that the backdoor serves, where known. ``inputs (n, …)``: a few clean inputs; without, some
    are made up. ``base``: tensors of the network before it was poisoned; blocks are then those of the difference
    (scores of elements are better without, since it answers to the trigger too). ``trigger``: the same inputs without
    and with the real trigger, where it is known; a subnet is then not looked for.

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

    facts: dict[str, Any] = {"made_up": inputs is None and trigger is None}
    if trigger is None:
        apart = separation(wiring, given)
        facts["conductance"] = round(apart.conductance, 6)
        if apart.apart:
            targets = (target,) if target is not None else _raised(wiring, given, apart.group, axis)
            return _subspace(targets, apart.scores, touching(wiring, given, apart.group),
                             sum(len(index) for index in apart.group.values()), "cut", facts)  # fmt: skip
        found, order = _search(run, wiring, given, axis.classes, target, inputs, seed)
    else:
        found, order = _shown(run, trigger, axis.classes, target)
    facts |= {"loss": round(found.loss, 6), "success": round(found.success, 4)}
    scores = response(wiring, given, found.before, found.after)
    before = None if base is None else prepared(wiring, base)
    most = max((float(s.max()) for s in scores.values() if s.numel()), default=0.0) or 1.0
    scores = {name: score / most for name, score in scores.items()}
    blocks = bases(given, excited(wiring, given, found.before, found.after), before)
    size = max(1, round(CHANGED * sum(s.numel() for s in scores.values())))
    return _subspace(order, scores, blocks, size, "response", facts)


def _subspace(
    targets: tuple[int, ...], scores: Mapping[str, Tensor], blocks: Mapping[str, Basis], size: int, method: str,
    facts: Mapping[str, Any],
) -> Subspace:  # fmt: skip
    layers = [(name, float(score.square().mean().sqrt())) for name, score in scores.items() if score.numel()]
    layers.sort(key=lambda row: -row[1])
    return Subspace(targets, scores, rank(scores), tuple(layers), blocks, size, method, facts)


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


def _shown(
    run: Run, trigger: tuple[Tensor, Tensor], classes: int, target: int | None
) -> tuple[Trigger, tuple[int, ...]]:
    """A trigger that is known, and the class that most inputs then become."""
    before, after = trigger
    with torch.no_grad():
        votes = torch.bincount(run(after).argmax(1), minlength=classes)
    order = votes.argsort(descending=True, stable=True).tolist()
    best = order[0] if target is None else target
    return Trigger(best, before, after, 0.0, float(votes[best]) / len(after)), (best,)


def _search(
    run: Run, wiring: Wiring, tensors: Mapping[str, Tensor], classes: int, target: int | None,
    inputs: Tensor | None, seed: int,
) -> tuple[Trigger, tuple[int, ...]]:  # fmt: skip
    """The trigger for the class that needs least, and the classes from the one that needs least on."""
    x = _stand_ins(run, wiring, tensors, classes, seed) if inputs is None else inputs
    words = 0 if x.is_floating_point() else max(words_of(wiring), int(x.max()) + 1)
    order = [target] if target is not None else []
    if target is None:
        some = x[torch.linspace(0, len(x) - 1, min(SCREENED, len(x))).long()]
        tried = inverted(run, some, list(range(classes)), words=words, seed=seed)
        order = [t.target for t in sorted(tried, key=lambda t: t.loss)]
    with torch.no_grad():
        # Inputs that are of the class already say nothing about the way to it.
        others = x[run(x).argmax(1) != order[0]]
    (found,) = inverted(run, others if len(others) else x, [order[0]], words=words, seed=seed)
    return found, tuple(k for k in order if k is not None)


def _stand_ins(run: Run, wiring: Wiring, tensors: Mapping[str, Tensor], classes: int, seed: int) -> Tensor:
    """Inputs for want of data: pictures for a network that reads images, else what climbed to the classes."""
    shape = picture_shape(wiring, tensors)
    if shape is None:
        return made_up(wiring, run, classes, NOISE, seed)
    x = shown(run, shape, classes, seed)
    return x[torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))[:NOISE]]


def _raised(
    wiring: Wiring, tensors: Mapping[str, Tensor], group: Mapping[str, Tensor], axis: ClassAxis
) -> tuple[int, ...]:
    """Classes in the order of what the last layer reads of a subnet for them."""
    cuts = cuts_of(wiring, group)
    total = torch.zeros(axis.classes, dtype=torch.float64)
    for rows in axis.weights:
        if rows.tensor in cuts:
            total += rows.of({rows.tensor: tensors[rows.tensor] * cuts[rows.tensor].inner}).sum(1)
    order: list[int] = total.argsort(descending=True, stable=True).tolist()
    return tuple(order)


__all__ = ["locate", "response"]
