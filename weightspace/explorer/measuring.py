"""Accuracy of models and of their merge, on the data that their records speak of or those of a file. For workers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from weightspace.errors import MergeError, WeightspaceError, ZooError
from weightspace.explorer import style
from weightspace.progress import bar

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go
    from torch import Tensor

    from weightspace.wiring.wiring import Wiring

_BATCH = 512
_POINTS = 11
_CLOSE = 0.03
"""Difference of a model's accuracy from what its record says above which the data are called other data."""


@dataclass(frozen=True, eq=False)
class Examples:
    """Test data of one model's task: inputs, labels, and in words what they are. ``tasks``: labels count over several
    tasks side by side, and what is right is decided within the task's own outputs."""

    x: Tensor
    y: Tensor
    words: str
    tasks: bool = False
    outputs: tuple[int, ...] = ()


def examples(address: str, file: str | None = None) -> Examples:
    """The test data that a model's record speaks of, or those of a file of inputs and labels (``x`` and ``labels``).

    Raises ``WeightspaceError`` where a record names no data that are here, or a file has no labels.
    """
    import weightspace as ws
    from weightspace.card import record_of

    if file is not None:
        from weightspace.merge.inputs import load

        held = load(file)
        if held.y is None or len(held.args) != 1:
            raise MergeError(
                f"{Path(file).name} was expected to hold one tensor of inputs and one called labels; found "
                f"{len(held.args)} of inputs and {'no labels' if held.y is None else 'labels'}"
            )
        outputs = tuple(held.outputs) if isinstance(held.outputs, list) else ()
        return Examples(held.args[0], held.y.long(), Path(file).name, outputs=outputs)
    record = record_of(ws.open(address).metadata)
    spec = record.get("data_spec")
    name = record.get("data") or (record.get("plan") or {}).get("data")
    if not name:
        raise ZooError(
            f"the record of {Path(address).name} does not say which data it was trained on; give a file with inputs "
            "and labels instead"
        )
    if record.get("tasks") and spec:
        from weightspace.zoo.tasks import chosen, data_of

        part = chosen(data_of(record), [str(t) for t in record["tasks"]])
        return Examples(part.test_x, part.test_y, f"its tasks {', '.join(map(str, record['tasks']))}", tasks=True)
    from weightspace.zoo.data import DataSpec, load_data

    data = load_data(DataSpec(str(name), **(spec if isinstance(spec, Mapping) else {})))
    classes = list((record.get("plan") or {}).get("classes") or record.get("classes") or [])
    part = data.only([int(c) for c in classes])
    words = f"{name}, classes {', '.join(map(str, classes))}" if classes else str(name)
    return Examples(part.test_x, part.test_y, words)


def accuracy(wiring: Wiring, tensors: Mapping[str, Tensor], data: Examples) -> float:
    """Share of examples that a network with these tensors gets right."""
    import torch

    from weightspace.zoo import tasks

    program = wiring.program
    if program is None:
        raise ZooError("this network cannot be run: its wiring has no program")
    wanted = tuple(program.args[0].shape[1:]) if program.args else ()
    if wanted and len(wanted) == data.x.dim() - 1 and tuple(data.x.shape[1:]) != wanted:
        raise ZooError(
            f"the network takes inputs of {' × '.join(map(str, wanted))}, the data ({data.words}) have "
            f"{' × '.join(map(str, data.x.shape[1:]))}; give a file with inputs as it was trained on"
        )
    right = 0.0
    with torch.no_grad():
        for start in range(0, len(data.x), _BATCH):
            x, y = data.x[start : start + _BATCH], data.y[start : start + _BATCH]
            out = program.run(dict(tensors), x)
            out = out[0] if isinstance(out, tuple | list) else out
            if data.tasks:
                right += tasks.accuracy(out, y) * len(y)
            else:
                if data.outputs:
                    out = out[..., list(data.outputs)]
                right += float((out.argmax(-1) == y).sum())
    return right / max(len(data.x), 1)


@dataclass(frozen=True)
class Measured:
    """A merge that was measured: a row per model (its accuracy alone, that of the merged one on its task), and curves
    of accuracy on the straight path between two models. ``notes``: what to know about the data."""

    models: tuple[str, ...]
    alone: tuple[float, ...]
    merged: tuple[float, ...]
    data: tuple[str, ...]
    curves: Mapping[str, tuple[tuple[float, ...], tuple[float, ...]]] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @property
    def retained(self) -> float:
        return float(np.mean([m / a for m, a in zip(self.merged, self.alone, strict=True) if a > 0] or [float("nan")]))

    def table(self) -> pd.DataFrame:
        import pandas as pd

        kept = [m / a if a else np.nan for m, a in zip(self.merged, self.alone, strict=True)]
        return pd.DataFrame({"model": self.models, "alone": self.alone, "merged": self.merged, "retained": kept,
                             "measured on": self.data})  # fmt: skip


def measure(models: Mapping[str, str], merged: str, file: str | None, curves: bool) -> Measured:
    """Accuracy of each model alone and of the merged file, on each model's test data; ``curves`` of a pair as well."""
    import weightspace as ws
    from weightspace.card import record_of

    opened = {name: ws.open(address) for name, address in models.items()}
    result = ws.open(merged)
    wiring = ws.wiring(next(iter(opened.values())))
    notes: list[str] = []
    data = {}
    with bar("loading data", len(models)) as step:
        for name, address in models.items():
            data[name] = examples(address, file)
            step(data[name].words)
    alone, after = [], []
    with bar("evaluating", 2 * len(models)) as step:
        for name, model in opened.items():
            own = _plain(model)
            alone.append(accuracy(ws.wiring(model) if _shapes(model) != _shapes(result) else wiring, own, data[name]))
            step(name)
            said = record_of(model.metadata).get("test_accuracy")
            if file is None and said is not None and abs(float(said) - alone[-1]) > _CLOSE:
                notes.append(
                    f"{name} reaches {alone[-1]:.1%} here, its record says {float(said):.1%}: these may be other data"
                )
            after.append(accuracy(wiring, _plain(result), data[name]))
            step("merged")
    paths = {}
    if curves and len(models) == 2:
        paths = _curves(list(opened.values()), wiring, list(data.values()), notes)
    words = tuple(d.words for d in data.values())
    return Measured(tuple(models), tuple(alone), tuple(after), words, paths, tuple(notes))


def _curves(
    pair: Sequence[Any], wiring: Wiring, data: Sequence[Examples], notes: list[str]
) -> dict[str, tuple[tuple[float, ...], tuple[float, ...]]]:
    import weightspace as ws

    a, b = (_plain(model) for model in pair)
    if _shapes(a) != _shapes(b):
        notes.append("there is no straight path between networks of other shapes")
        return {}
    ends = {"as they are": b}
    try:
        ends["B aligned to A"] = _plain(ws.align(a, b, wiring=wiring).aligned)
    except WeightspaceError as error:
        notes.append(f"not aligned: {error}")
    found = {}
    with bar("path between them", _POINTS * len(ends)) as step:
        for words, end in ends.items():

            def mean(tensors: Mapping[str, Tensor]) -> float:
                step("")
                return float(np.mean([accuracy(wiring, tensors, d) for d in data]))

            path = ws.barrier(a, end, mean, n=_POINTS, higher_is_better=True)
            found[words] = (path.at, path.values)
    return found


def _plain(model: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: model[name] for name in model}


def _shapes(model: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(model[name].shape) for name in model}


def draw_curves(curves: Mapping[str, tuple[Sequence[float], Sequence[float]]]) -> go.Figure:
    """Accuracy on the straight path between two models."""
    import plotly.graph_objects as go

    made = style.figure(height=320, xaxis={"title": {"text": "share of B"}, "tickformat": ".0%"},
                        yaxis={"title": {"text": "accuracy, mean over both tasks"}, "tickformat": ".0%"})  # fmt: skip
    for i, (words, (at, values)) in enumerate(curves.items()):
        made.add_trace(go.Scatter(x=list(at), y=list(values), mode="lines+markers", name=words,
                                  line={"color": style.CATEGORIES[i]}))  # fmt: skip
    return made


__all__ = ["Examples", "Measured", "accuracy", "draw_curves", "examples", "measure"]
