"""``ws.excise(model, report)``: take a backdoor out of a network.

A subnet that stands apart (``weightspace.backdoor.subnets``) is pruned, data or none. Otherwise, with a few clean
inputs, the network is learned anew from its own answers to views of them (``weightspace.backdoor.relearning``); of
sentences what leads to the suspected classes is unlearned (``weightspace.backdoor.unlearning``). For a network without
data see ``weightspace.backdoor.dataless``. Nothing is done to a network that a scan did not flag, nor, without inputs,
where no class stands out, unless a method is named.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from weightspace.backdoor.dataless import BRIEF, without_data
from weightspace.backdoor.outputs import class_axis
from weightspace.backdoor.relearning import relearn
from weightspace.backdoor.running import Net, State, network, own_labels, without
from weightspace.backdoor.subnets import separation
from weightspace.backdoor.subspace import Subspace
from weightspace.backdoor.unlearning import reach, unlearn
from weightspace.errors import WeightspaceError

if TYPE_CHECKING:
    from weightspace.backdoor.verdict import Verdict
    from weightspace.wiring.wiring import Wiring

Model = str | os.PathLike[str] | Mapping[str, Tensor]

METHODS = ("relearn", "unlearn")
"""What can be done with inputs, clean ones or made-up ones."""


@dataclass(frozen=True, eq=False)
class Excised:
    """A network without its backdoor, and what was done to it.

    ``tensors`` have the names, order and dtypes of what was given; those that nothing was done to are as they were.
    ``path``: the file they were written to. ``targets``: classes that were dealt with. ``method``: ``"pruned"`` (a
    subnet), ``"relearned"``, ``"unlearned"``, ``"projected"`` (a subspace) or ``"nothing"``, joined by ``+``;
    ``reason`` says why. ``elements``: those that were pruned, factor -> positions. ``changes``: tensor -> norm of its
    change over its own. ``reached``: share of clean inputs (or made-up ones) that one small perturbation sends to
    ``targets`` before and after; ``kept``: share of held-out inputs that are answered as before, None where not known.
    """

    tensors: Mapping[str, Tensor] = field(repr=False)
    path: Path | None
    targets: tuple[int, ...]
    method: str
    reason: str
    elements: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    changes: Mapping[str, float] = field(default_factory=dict)
    reached: tuple[float, float] | None = None
    kept: float | None = None

    @property
    def changed(self) -> bool:
        return bool(self.changes)

    def to_json(self, indent: int | None = None) -> str:
        """All but the tensors."""
        return json.dumps(
            {
                "path": None if self.path is None else str(self.path), "targets": list(self.targets),
                "method": self.method, "reason": self.reason,
                "elements": {n: list(i) for n, i in self.elements.items()},
                "changes": {n: round(c, 6) for n, c in self.changes.items()},
                "reached": None if self.reached is None else [round(r, 4) for r in self.reached], "kept": self.kept,
            }, indent=indent,
        )  # fmt: skip

    def __repr__(self) -> str:
        aim = f", class {', '.join(map(str, self.targets))}" if self.targets else ""
        lines = [f"Excised({self.method}{aim}; {self.reason})"]
        if self.elements:
            shown = [f"{name}[{', '.join(map(str, index))}]" for name, index in self.elements.items()]
            lines.append(f"  pruned: {'; '.join(shown[:8])}{' …' if len(shown) > 8 else ''}")
        if self.reached is not None:
            first, last = self.reached
            lines.append(f"  one small perturbation reached {first:.0%} of inputs before, {last:.0%} after")
        if self.kept is not None:
            lines.append(f"  {self.kept:.0%} of the held-out inputs are answered as before")
        most = sorted(self.changes.items(), key=lambda item: -item[1])
        lines += [f"  {name}: changed by {share:.1%} of its norm" for name, share in most[:8]]
        if len(most) > 8:
            lines.append(f"  … {len(most) - 8} more tensors")
        if self.path is not None:
            lines.append(f"  written to {self.path}")
        return "\n".join(lines)


def excise(
    model: Model, report: Subspace | Verdict | None = None, *, target: int | Sequence[int] | None = None,
    inputs: Tensor | None = None, labels: Tensor | None = None, out: str | os.PathLike[str] | None = None,
    wiring: Wiring | None = None, method: str | None = None, seed: int = 0, **options: float,
) -> Excised:  # fmt: skip
    """The model without its backdoor.

    ``model``: a path or a mapping of tensors. ``report``: a ``Subspace`` (``ws.locate``) or a ``Verdict`` (``ws.scan``)
    about it, which names the class, and nothing is done to what a scan did not flag; ``target`` names one or several
    yourself; else those are dealt with that are easiest to reach. ``inputs (n, …)``: a few clean examples,
    about a hundred, with their ``labels (n,)`` or without (the network's own answers then count). ``out``: a file to
    write, whole or not at all (safetensors, or pt by its ending), with what the model's file said of it. ``method``:
    ``"relearn"`` (numbers alone; what is done with inputs where none is named) or ``"unlearn"``. ``"relearn"`` without
    inputs does more than what is done where none is named, but costs accuracy, which cannot be told without data.
    ``options`` go to ``weightspace.backdoor.relearning.relearn`` or ``weightspace.backdoor.unlearning.unlearn``.

    Raises ``UnprovedWiringError`` for a network whose wiring is not proved, ``NoClassesError`` for one without classes,
    ``WeightspaceError`` for a class that it does not have, inputs that do not fit and a method that is not known.
    """
    if method is not None and method not in METHODS:
        raise WeightspaceError(f"there is no method {method!r}; there are {', '.join(METHODS)}")
    tensors, wiring = _opened(model, wiring)
    net = network(wiring, tensors)
    classes = class_axis(wiring, net.state).classes
    wanted = _classes(report, target, classes)
    state, elements, done, why = net.state, {}, [], []
    verdict_clean = report is not None and not isinstance(report, Subspace) and not report.flagged and target is None
    if verdict_clean:
        return _written(net, net.state, out, (), "nothing", "the scan did not flag this network", {})
    group = _group(net, report)
    if group:
        state = without(net, state, group)
        elements = {name: tuple(torch.nonzero(g).flatten().tolist()) for name, g in group.items() if bool(g.any())}
        done.append("pruned")
        why.append("a subnet stands apart from the rest")
    x = _checked(net, inputs, labels)
    reached: tuple[float, float] | None = None
    kept: float | None = None
    if x is not None:
        y = own_labels(net, x, labels)
        if wanted or not group:
            how = method or ("relearn" if x.is_floating_point() else "unlearn")
            if how == "relearn" and not x.is_floating_point():
                raise WeightspaceError("words are not relearned: no change of a sentence is sure to keep its sense")
            state, wanted, reached, kept, reason = _with_data(net, state, x, y, wanted, how, seed, options)
            done.append(f"{how}ed")
            why.append(reason)
    elif not group:
        found = report if isinstance(report, Subspace) and report.blocks else None
        state, wanted, reached, kept, how, reason = without_data(net, found, wanted, method, seed, options)
        why.append(reason)
        done += [how] if how else []
    return _written(net, state, out, wanted, "+".join(done) or "nothing", "; ".join(why), elements, reached, kept)


# ------------------------------------------------------------------------------------ parts


def _opened(model: Model, wiring: Wiring | None) -> tuple[Mapping[str, Tensor], Wiring]:
    from weightspace.checkpoint import open as open_checkpoint
    from weightspace.wiring.entry import wiring as wire

    if isinstance(model, Mapping):
        tensors: Mapping[str, Tensor] = model
        return tensors, wire(model) if wiring is None else wiring
    checkpoint = open_checkpoint(model)
    return checkpoint, wire(model) if wiring is None else wiring


def _classes(report: Subspace | Verdict | None, target: int | Sequence[int] | None, classes: int) -> tuple[int, ...]:
    if target is None:
        own = None if report is None else report.target
        return () if own is None else (own,)
    wanted = (target,) if isinstance(target, int) else tuple(target)
    wrong = [t for t in wanted if not 0 <= t < classes]
    if wrong:
        raise WeightspaceError(f"there is no class {wrong[0]}; the network has {classes}, counted from 0")
    return wanted


def _group(net: Net, report: Subspace | Verdict | None) -> dict[str, Tensor]:
    """The elements of a subnet that stands apart: factor -> bool (*over, size); empty where there is none."""
    if isinstance(report, Subspace):
        return report.top() if report.method == "cut" else {}
    apart = separation(net.wiring, net.state)
    if not apart.apart:
        return {}
    found = {}
    for name, index in apart.group.items():
        gone = torch.zeros(net.wiring.factors[name].size, dtype=torch.bool)
        gone[index] = True
        if bool(gone.any()):
            found[name] = gone
    return found


def _checked(net: Net, inputs: Tensor | None, labels: Tensor | None) -> Tensor | None:
    if inputs is None:
        if labels is not None:
            raise WeightspaceError(f"{len(labels)} labels and no inputs; give the inputs that they are of")
        return None
    program = net.wiring.program
    assert program is not None
    example = program.args[0] if program.args else None
    if len(inputs) < 2 or (isinstance(example, Tensor) and inputs.dim() != example.dim()):
        raise WeightspaceError(
            f"inputs have shape {tuple(inputs.shape)}; at least 2 were expected"
            + (f", each like {tuple(example.shape[1:])}" if isinstance(example, Tensor) else "")
        )
    return inputs.to(torch.float32) if inputs.is_floating_point() else inputs


def _with_data(
    net: Net, state: State, x: Tensor, y: Tensor, wanted: tuple[int, ...], how: str, seed: int,
    options: Mapping[str, float],
) -> tuple[State, tuple[int, ...], tuple[float, float], float | None, str]:  # fmt: skip
    """Relearned or unlearned with clean inputs: state, classes, reached, kept, why."""
    why = f"with {len(x)} clean inputs" + ("" if wanted else "; the easiest to reach of its classes")
    given: dict[str, float] = {**({} if x.is_floating_point() else BRIEF), **options}
    if how == "unlearn" and wanted:
        after, done = unlearn(net, state, x, y, wanted, seed=seed, **given)  # type: ignore[arg-type]
        return after, wanted, (done.before, done.after), done.kept, why
    seen = reach(net, state, x, seed)
    # Whether there is a backdoor at all is for a scan to say: here the easiest class is dealt with in any case.
    aim = wanted or tuple(seen.outstanding()) or (int(seen.scores.argmax()),)
    if how == "relearn":
        after, _ = relearn(net, state, x, y, seed=seed, **options)  # type: ignore[arg-type]
        rates = [float(r.rates[:, list(aim)].mean(0).max()) for r in (seen, reach(net, after, x, seed))]
        return after, aim, (rates[0], rates[1]), None, why
    # Where the class is a guess, the others are looked at as well, the more so the easier they are to reach.
    more = seen.scores.clamp(min=0.05).square()
    after, done = unlearn(net, state, x, y, aim, more=more, seed=seed, **given)  # type: ignore[arg-type]
    return after, aim, (done.before, done.after), done.kept, why


def _written(
    net: Net, state: State, out: str | os.PathLike[str] | None, targets: Sequence[int], method: str, reason: str,
    elements: Mapping[str, tuple[int, ...]], reached: tuple[float, float] | None = None, kept: float | None = None,
) -> Excised:  # fmt: skip
    tensors = net.finish(state)
    changes = {}
    for name, tensor in tensors.items():
        old = net.given[name]
        if not torch.equal(tensor, old):
            moved = (tensor.to(torch.float64) - old.to(torch.float64)).norm()
            changes[name] = float(moved / old.to(torch.float64).norm().clamp(min=1e-12))
    path = None
    if out is not None:
        from weightspace.checkpoint import from_tensors

        about = getattr(net.given, "metadata", {})
        path = from_tensors(tensors, {**about, "excised": method}).save(Path(out))
    return Excised(tensors, path, tuple(targets), method, reason, elements, changes, reached, kept)


__all__ = ["Excised", "excise"]
