"""Draws docs/parameter-graph.svg: the parameter graph of a network of the starter zoo.

    python docs/parameter_graph.py models/starter/cnn-8-0.safetensors

Needs ``pip install kaleido`` and a Chrome or Chromium; ``--html`` writes an interactive page without them.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import plotly.graph_objects as go

import weightspace as ws

LEVELS = 6
NEGATIVE, POSITIVE, LINK, INK = "196,78,82", "49,104,178", "150,150,150", "#24292f"


def figure(path: Path) -> go.Figure:
    """Columns are axes, nodes their elements, edges weights: colour is the sign, strength the size.

    Kernels are drawn as one edge of their largest entry; thin grey lines link a channel to its pixels.
    """
    checkpoint = ws.open(path)
    wiring = ws.wiring(checkpoint)
    blocks = [name for name in wiring if len(wiring[name]) >= 2]
    columns: list[str] = []
    for name in blocks:
        target, source = wiring[name][0].name, wiring[name][1].name
        columns.extend(axis for axis in (source, target) if axis not in columns)
    place = {axis: (column, _heights(wiring.axes[axis].size)) for column, axis in enumerate(columns)}
    drawing = go.Figure()
    for flat, channel in _flattenings(wiring, columns):
        count = wiring.axes[channel].size
        share = wiring.axes[flat].size // count
        ends = [(c, c * share + pixel) for c in range(count) for pixel in range(share)]
        _lines(drawing, place[channel], place[flat], ends, f"rgba({LINK},0.5)", 0.6)
    for name in blocks:
        weights = checkpoint[name].detach().double().flatten(2).numpy() if checkpoint[name].dim() > 2 else (
            checkpoint[name].detach().double().numpy()[..., None]
        )  # fmt: skip
        strongest = np.take_along_axis(weights, np.abs(weights).argmax(-1, keepdims=True), -1)[..., 0]
        level = np.minimum((np.abs(strongest) / np.abs(strongest).max() * LEVELS).astype(int), LEVELS - 1)
        for sign, colour in ((-1, NEGATIVE), (1, POSITIVE)):
            for strength in range(1, LEVELS):
                chosen = np.argwhere((level == strength) & (np.sign(strongest) == sign))
                shade = (strength / (LEVELS - 1)) ** 1.5
                ends = [(int(source), int(target)) for target, source in chosen]
                axes = wiring[name]
                colour_of = f"rgba({colour},{0.12 + 0.8 * shade:.2f})"
                _lines(drawing, place[axes[1].name], place[axes[0].name], ends, colour_of, 0.5 + 1.8 * shade)
    for axis, (column, heights) in place.items():
        kind = wiring.axes[axis].kind
        fill = {"free": "#f2b134", "structured": "#f6d78b", "pinned": "#d0d7de"}[kind]
        marker = {"size": 13 if len(heights) < 30 else 7, "color": fill, "line": {"color": INK, "width": 1}}
        drawing.add_scatter(x=[column] * len(heights), y=heights, mode="markers", marker=marker)
        label = f"<b>{axis}</b><br>{len(heights)} · {kind}"
        drawing.add_annotation(x=column, y=-1.13, text=label, showarrow=False, font={"size": 13})
    error = wiring.proof.error32 if wiring.proof is not None else float("nan")
    title = (
        f"{path.name}: {checkpoint.num_parameters:,} parameters, wiring {wiring.status} "
        f"(relative output error {error:.0e} under a random symmetry)"
    )
    drawing.update_layout(
        title={"text": title, "x": 0.5, "font": {"size": 15}},
        width=980, height=560, showlegend=False, plot_bgcolor="white", paper_bgcolor="white",
        font={"family": "Helvetica, Arial, sans-serif", "color": INK},
        margin={"l": 20, "r": 20, "t": 50, "b": 10},
        xaxis={"visible": False, "range": [-0.35, len(columns) - 0.65]},
        yaxis={"visible": False, "range": [-1.25, 1.05]},
    )  # fmt: skip
    return drawing


def _heights(size: int) -> np.ndarray:
    return np.linspace(0.97, -0.97, size) if size > 1 else np.zeros(1)


def _flattenings(wiring: ws.Wiring, columns: list[str]) -> list[tuple[str, str]]:
    """Axes that flatten the channels of another axis together with their pixels."""
    pairs = []
    for flat in columns:
        segments = wiring.axes[flat].segments
        if len(segments) == 1 and len(segments[0]) > 1:
            pairs.extend(
                (flat, axis) for axis in columns if wiring.axes[axis].segments == ((segments[0][0],),)
            )
    return pairs


def _lines(
    drawing: go.Figure,
    source: tuple[int, np.ndarray],
    target: tuple[int, np.ndarray],
    ends: list[tuple[int, int]],
    colour: str,
    width: float,
) -> None:
    if not ends:
        return
    x = [value for _ in ends for value in (source[0], target[0], None)]
    y = [value for i, j in ends for value in (float(source[1][i]), float(target[1][j]), None)]
    drawing.add_scatter(x=x, y=y, mode="lines", line={"color": colour, "width": width}, hoverinfo="skip")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path)
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("parameter-graph.svg"))
    parser.add_argument("--html", action="store_true", help="write a page instead of a picture")
    arguments = parser.parse_args()
    drawing = figure(arguments.model)
    if arguments.html:
        drawing.write_html(arguments.out.with_suffix(".html"), include_plotlyjs="cdn")
    else:
        drawing.write_image(arguments.out)


if __name__ == "__main__":
    main()
