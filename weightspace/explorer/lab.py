"""The merge lab's work: scoring, merging, and the recipe of a merge. For workers, but for the recipes."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from weightspace.explorer import style

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go


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


__all__ = [
    "Made", "Setting", "common_parent", "draw_predictions", "make", "mergekit", "predictions", "recipe", "score",
    "settings_of", "usable",
]  # fmt: skip
