"""Scanning, locating and excising for the page on backdoors. For workers."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from weightspace.explorer import style
from weightspace.progress import bar

if TYPE_CHECKING:
    import plotly.graph_objects as go
    from torch import Tensor

PRIORS = (0.5, 0.1, 0.01)
"""Shares of networks with a backdoor for which the probability is given."""


def scan(address: str, base: str | None, file: str | None) -> dict[str, Any]:
    """``ws.scan`` of a file as plain values, with the probability ``at`` several shares of bad networks.

    Raises ``WeightspaceError`` for a model that cannot be scanned.
    """
    from weightspace.backdoor.verdict import scan as scan_model

    x, y = _examples(file)
    with bar("scanning", 1) as step:
        found = scan_model(address, base=base, inputs=x, labels=y)
        step("")
    at = {prior: found.at(prior) for prior in PRIORS}
    return {**asdict(found), "target": found.target, "at": at}


def locate(address: str, target: int | None, base: str | None, file: str | None, out: str) -> dict[str, Any]:
    """Where the backdoor sits: figures, facts (``Subspace.to_dict``) and the file that it was written to."""
    import weightspace as ws
    from weightspace.backdoor.localise import locate as find

    model = ws.open(address)
    wiring = ws.wiring(model)
    tensors = {name: model[name] for name in model}
    origin = None if base is None else dict(ws.open(base))
    x, _ = _examples(file)
    with bar("locating", 1) as step:
        found = find(wiring, tensors, target=target, inputs=x, base=origin)
        step("")
    Path(out).parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    found.save(out)
    return {
        **found.to_dict(), "path": out, "figure": found.show(wiring, tensors), "spectra": found.spectra(tensors),
        "total": sum(score.numel() for score in found.elements.values()),
    }  # fmt: skip


def excise(
    address: str, subspace: str | None, target: int | None, file: str | None, method: str | None, out: str
) -> dict[str, Any]:  # fmt: skip
    """Take the backdoor out (``method`` as ``ws.excise`` takes it) and write the result; what was done, as values."""
    from weightspace.backdoor.excise import excise as take_out
    from weightspace.backdoor.subspace import Subspace

    x, y = _examples(file)
    report = None if subspace is None else Subspace.load(subspace)
    Path(out).parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    with bar("excising", 1) as step:
        done = take_out(address, report, target=target, inputs=x, labels=y, out=out, method=method)
        step("")
    found: dict[str, Any] = json.loads(done.to_json())
    return {**found, "changed": done.changed}


def beside(before: str, after: str) -> dict[str, float] | str:
    """Accuracy of the network before and after, on the test data that its record speaks of; or why there is none."""
    import weightspace as ws
    from weightspace.errors import WeightspaceError
    from weightspace.explorer.measuring import accuracy, examples

    both = {"before": before, "after": after}
    try:
        data, wiring = examples(before), ws.wiring(before)
        return {when: accuracy(wiring, dict(ws.open(file)), data) for when, file in both.items()}
    except WeightspaceError as error:
        return str(error)


def _examples(file: str | None) -> tuple[Tensor | None, Tensor | None]:
    if file is None:
        return None, None
    from weightspace.errors import WeightspaceError
    from weightspace.merge.inputs import load

    held = load(file)
    if len(held.args) != 1:
        raise WeightspaceError(f"{Path(file).name}: one tensor of inputs was expected, found {len(held.args)}")
    return held.args[0], held.y


def draw_targets(targets: list[tuple[int, float]], flagged: bool, most: int = 12) -> go.Figure:
    """Shares of the suspicion by class, the most suspect first."""
    import plotly.graph_objects as go

    shown = targets[:most]
    made = style.figure(height=int(110 + 24 * len(shown)), xaxis={"tickformat": ".0%", "rangemode": "tozero"},
                        yaxis={"autorange": "reversed"})  # fmt: skip
    colours = [style.BAD if flagged and i == 0 else style.OTHER for i in range(len(shown))]
    made.add_trace(go.Bar(y=[f"class {c}" for c, _ in shown], x=[s for _, s in shown], orientation="h",
                          marker={"color": colours}, hovertemplate="%{y}: %{x:.0%}<extra></extra>"))  # fmt: skip
    return made


_NIGHT = {"#b91c1c": "#F0716B", "#e5e7eb": "#59636F", "#d1d5db": "#59636F"}
"""Colours of ``weightspace.backdoor.show`` on white, and on the dark page."""
_NIGHT_SCALE = ((0.0, "#262C34"), (0.25, "#7A4B1E"), (0.6, "#F97316"), (1.0, "#FDE68A"))


def restyled(figure: go.Figure, dark: bool) -> go.Figure:
    """A figure of ``weightspace.backdoor.show`` as the page has its others: on the page's ground and in its ink. What
    its title says stands beside it."""
    import plotly.graph_objects as go

    ink, grid = style.ink(dark), "rgba(128,128,128,0.25)"
    found = go.Figure(figure)
    found.layout.title = None
    found.layout.width = None
    found.update_layout(
        paper_bgcolor="rgba(0,0,0,0)", plot_bgcolor="rgba(0,0,0,0)", font={"color": ink}, margin={"t": 40, "b": 50},
    )  # fmt: skip
    found.update_xaxes(tickfont={"color": ink}, gridcolor=grid)
    found.update_yaxes(tickfont={"color": ink}, gridcolor=grid)
    if not dark:
        return found
    found.update_annotations(bgcolor="rgba(20,23,27,0.75)")
    for note in found.layout.annotations:
        note.font.color = _NIGHT.get(str(note.font.color), ink)
    for trace in found.data:
        if trace.type == "heatmap":
            trace.colorscale = _NIGHT_SCALE
            continue
        if trace.type == "scatter" and trace.line.color is not None:
            trace.line.color = _NIGHT.get(trace.line.color, trace.line.color)
        held = trace.marker.color
        if isinstance(held, str):
            trace.marker.color = _NIGHT.get(held, held)
        elif held is not None:
            trace.marker.color = [_NIGHT.get(one, one) for one in held]
    return found


def calibration_words(calibration: Mapping[str, float]) -> str:
    """What is known of the probability, in a clause."""
    names = {"ece": "expected calibration error", "brier": "Brier score", "networks": "networks held out"}
    return ", ".join(f"{names.get(k, k.replace('_', ' '))} {v:.3g}" for k, v in calibration.items())


__all__ = ["PRIORS", "beside", "calibration_words", "draw_targets", "excise", "locate", "restyled", "scan"]
