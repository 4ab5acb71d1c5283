"""The merge lab's work: scoring, merging, measuring, and the recipe of a merge. For workers, but for the recipes."""

from __future__ import annotations

import dataclasses
import json
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


# ------------------------------------------------------------------------------------ scoring


def score(models: Mapping[str, str], base: str | None, zoo: str | None, measured: str = "") -> dict[str, Any]:
    """``ws.score`` of files by name, as plain values, with the meaning of each term. ``zoo``: whose recorded merges
    count; ``measured`` only tells jobs apart that saw others."""
    import weightspace as ws
    from weightspace.mergeability.commands import meaning
    from weightspace.zoo import Zoo

    known = Zoo(zoo).merges() if zoo is not None else ()
    names = set(models)
    known = tuple(m for m in known if set(m.models) <= names)
    report = ws.score(dict(models), base, known=list(known) or None, progress=True)
    found = report.to_json()
    based = report.comparison is not None and report.comparison.base
    found["meanings"] = {} if report.top is None else {t: meaning(t, based) for t in report.top.terms}
    found["why"] = {" + ".join(m.models): {k: p.why for k, p in m.predictions.items()} for m in report.merges}
    found["why not"] = {
        " + ".join(m.models): {k: str(p.applicability) for k, p in m.predictions.items() if not p.known}
        for m in report.merges
    }
    return found


def predictions(merge: Mapping[str, Any], why: Mapping[str, str]) -> pd.DataFrame:
    """A row per method of one merge of a report, the best first; the barrier apart, at the end."""
    import pandas as pd

    rows = [
        {
            "method": name, "retained": p["value"], "low": p["low"], "high": p["high"],
            "why, in points": why.get(name, ""), "measured before": bool(p.get("measured")),
            **{f"of {model}": value for model, value in (p.get("retained") or {}).items()},
        }
        for name, p in merge["predictions"].items()
    ]  # fmt: skip
    frame = pd.DataFrame(rows)
    if frame.empty:
        return frame
    frame["retained"] = pd.to_numeric(frame["retained"])
    last = (frame["method"] == "barrier").astype(int)
    frame = frame.assign(last=last).sort_values(["last", "retained"], ascending=[True, False]).drop(columns="last")
    return frame.reset_index(drop=True)


def draw_predictions(frame: pd.DataFrame, measured: Mapping[str, float] | None = None) -> go.Figure:
    """What each method is expected to retain, with its interval; what was measured beside it."""
    import plotly.graph_objects as go

    shown = frame[(frame["method"] != "barrier") & frame["retained"].notna()]
    made = style.figure(height=int(150 + 44 * max(len(shown), 1)), yaxis={"autorange": "reversed", "automargin": True},
                        xaxis={"tickformat": ".0%", "title": {"text": "accuracy retained, mean over the models' "
                                                                      "tasks"}})  # fmt: skip
    made.add_trace(
        go.Scatter(
            x=shown["retained"], y=shown["method"], mode="markers", name="expected, 90 % interval",
            marker={"size": 12, "color": style.CATEGORIES[0]},
            error_x={"type": "data", "symmetric": False, "array": shown["high"] - shown["retained"],
                     "arrayminus": shown["retained"] - shown["low"], "thickness": 2, "width": 7,
                     "color": style.CATEGORIES[0]},
            hovertemplate="%{y}: %{x:.1%}<extra></extra>",
        )
    )  # fmt: skip
    if measured:
        made.add_trace(go.Scatter(x=list(measured.values()), y=list(measured), mode="markers", name="measured",
                                  marker={"size": 13, "symbol": "diamond", "color": style.ACCENT},
                                  hovertemplate="%{y} measured: %{x:.1%}<extra></extra>"))  # fmt: skip
    made.add_vline(x=1.0, line={"width": 1, "dash": "dot", "color": style.OTHER})
    return made


def common_parent(parents: Sequence[object], names: Sequence[str]) -> str | None:
    """The base that all records name, where it is among the models; None where they name none, or several."""
    said = {str(p) for p in parents if p}
    return said.pop() if len(said) == 1 and all(parents) and said <= set(names) else None


# ------------------------------------------------------------------------------------ merging


@dataclass(frozen=True)
class Setting:
    """A hyper-parameter that a page can ask for: a number or a truth value."""

    name: str
    default: float | bool
    whole: bool


def settings_of(method: str) -> list[Setting]:
    """The numbers and truth values among a method's hyper-parameters."""
    from weightspace.merge.methods import method_class

    return [
        Setting(one.name, one.default, isinstance(one.default, int)) for one in dataclasses.fields(method_class(method))
        if isinstance(one.default, bool | int | float) and one.name != "seed"
    ]  # fmt: skip


def usable(count: int, base: bool, data: bool) -> dict[str, str]:
    """Methods that can merge so many models -> what they are, a line each; those first that need least."""
    from weightspace.merge.method import WithData
    from weightspace.merge.methods import METHODS, method_class

    found = {}
    for name in METHODS:
        cls = method_class(name)
        fewest, most = cls.count
        fits = fewest <= count and (most is None or count <= most)
        if fits and (base or not cls.needs_base) and (data or not issubclass(cls, WithData)):
            found[name] = cls.paper
    return found


@dataclass(frozen=True)
class Made:
    """A merge that was made: its file, what became of the tensors, and how long it took."""

    path: str
    rows: tuple[tuple[str, str, str], ...]
    notes: tuple[str, ...]
    seconds: float


def make(
    models: Sequence[str], base: str | None, method: str, hyper: Mapping[str, Any], align: bool, out: str
) -> Made:
    """Merge files to a file. Raises ``MergeError`` for what cannot be merged; nothing is written then."""
    import weightspace as ws

    Path(out).parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    done = ws.merge(list(models), method, base=base, out=out, align="weight-matching" if align else None,
                    progress=True, **hyper)  # fmt: skip
    rows = tuple((row.name, str(row.outcome), row.reason) for row in done.report)
    return Made(str(done.path), rows, done.report.notes, done.report.seconds)


def recipe(
    models: Sequence[str], base: str | None, method: str, hyper: Mapping[str, Any], align: bool, out: str
) -> str:
    """The merge as a recipe in TOML, for ``weightspace merge recipe.toml``; names are relative to the recipe."""
    lines = ["# weightspace merge recipe.toml; paths are relative to this file", f"method = {json.dumps(method)}"]
    lines += [f"base = {json.dumps(base)}"] if base else []
    lines += [f"out = {json.dumps(out)}"]
    lines += ['align = "weight-matching"'] if align else []
    if hyper:
        lines += ["", "[hyper]", *(f"{name} = {json.dumps(value)}" for name, value in hyper.items())]
    for model in models:
        lines += ["", "[[models]]", f"path = {json.dumps(model)}"]
    return "\n".join(lines) + "\n"


def mergekit(text: str) -> str:
    """A recipe as mergekit's YAML. Raises ``MergeError`` for what mergekit has no word for."""
    import tomllib

    from weightspace.merge.recipe import from_table

    return from_table(tomllib.loads(text)).to_mergekit()


# ------------------------------------------------------------------------------------ measuring


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


__all__ = [
    "Examples", "Made", "Measured", "Setting", "accuracy", "common_parent", "draw_curves", "draw_predictions",
    "examples", "make", "measure", "mergekit", "predictions", "recipe", "score", "settings_of", "usable",
]  # fmt: skip
