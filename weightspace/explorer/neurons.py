"""One axis of the parameter graph opened to its neurons: the strongest weights into and out of some of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from weightspace.errors import GraphError
from weightspace.explorer import style
from weightspace.progress import bar

if TYPE_CHECKING:
    import plotly.graph_objects as go

MOST = 40
"""Neurons of an axis that are drawn at once."""
SIDES = 3
"""Bundles of weights that are opened on either side of an axis."""
_EDGES = 260
"""Weights that are drawn at once on either side."""


@dataclass(frozen=True)
class Bundle:
    """Weights between some elements of the axis and some of another: ``matrix`` (own, other), kernels at their
    strongest entry. ``incoming``: the other axis leads to this one."""

    tensor: str
    other: str
    incoming: bool
    own: NDArray[np.int64]
    others: NDArray[np.int64]
    matrix: NDArray[np.float32] = field(repr=False)
    whole: tuple[int, int] = (0, 0)


def open_axis(address: str, cell: str, first: int = 0) -> list[Bundle]:
    """The first three blocks into an axis and out of it, at most 40 of its elements from ``first`` on, each with the 40
    strongest others.

    For a worker: it reads the tensors of these blocks alone. Raises ``GraphError`` for an axis that is not there.
    """
    import torch

    from weightspace.checkpoint import open as open_checkpoint
    from weightspace.graph import graph as parameter_graph

    graph = parameter_graph(open_checkpoint(address))
    if cell not in graph.cells:
        raise GraphError(f"the network has no axis {cell!r}; it has {', '.join(list(graph.cells)[:6])} …")
    wanted = torch.arange(first, min(first + MOST, graph.cells[cell].size))
    found = []
    ends = [[b for b in graph.blocks if b.dst == cell], [b for b in graph.blocks if b.src == cell]]
    near = {b.label for some in ends for b in some[:SIDES]}
    touching = [b for b in graph.blocks if b.label in near]
    with bar("weights", len(touching)) as step:
        for block in touching:
            matrix = block.matrix(graph.real(block.tensor))
            rows, columns = block.index(), block.source_index()
            for incoming in (True, False):
                if (block.dst if incoming else block.src) != cell:
                    continue
                dense = _dense(matrix, rows, columns, wanted, incoming)
                other = block.src if incoming else block.dst
                strongest = dense.abs().amax(0).argsort(descending=True)[:MOST].sort().values
                found.append(
                    Bundle(block.label, other, incoming, wanted.numpy(), strongest.numpy(),
                           dense[:, strongest].float().numpy(), (graph.cells[cell].size, graph.cells[other].size))
                )  # fmt: skip
            step(block.label)
    return found


def _dense(matrix: Any, rows: Any, columns: Any, wanted: Any, incoming: bool) -> Any:
    """``(own, other)`` of the wanted elements; shared parts (heads, groups) side by side."""
    import torch

    m = matrix if incoming else matrix.transpose(1, 2)
    own, other = (rows, columns) if incoming else (columns, rows)
    out = torch.zeros(len(wanted), int(other.max()) + 1)
    for shared in range(m.shape[0]):
        inside = torch.isin(own[shared], wanted)
        if not bool(inside.any()):
            continue
        piece = m[shared][inside].float()
        strongest = piece.abs().argmax(-1, keepdim=True)
        values = piece.gather(-1, strongest).squeeze(-1)
        at = torch.searchsorted(wanted, own[shared][inside])
        out[at[:, None], other[shared][None, :]] = values
    return out


def draw_axis(cell: str, bundles: Sequence[Bundle], dark: bool = False) -> go.Figure:
    """The neurons of one axis in the middle, what leads to them on the left, where they lead on the right: the
    strongest weights as lines, red below zero."""
    import plotly.graph_objects as go

    made = style.figure(height=520, xaxis={"visible": False}, yaxis={"visible": False})
    left = [b for b in bundles if b.incoming and b.matrix.size][:SIDES]
    right = [b for b in bundles if not b.incoming and b.matrix.size][:SIDES]
    own = bundles[0].own if bundles else np.zeros(0, dtype=np.int64)
    heights = dict(zip(own.tolist(), np.linspace(1, -1, len(own)) if len(own) > 1 else [0.0], strict=True))
    dots: list[tuple[float, float, str]] = [(0.0, h, f"{cell} {i}") for i, h in heights.items()]
    titles = [(0.0, f"{style.short(cell, 30)}<br>elements {own.min()} to {own.max()}")] if len(own) else []
    for side, group in ((-1.0, left), (1.0, right)):
        total = sum(len(b.others) for b in group) + 2 * max(0, len(group) - 1)
        spots = np.linspace(1, -1, max(total, 1)) if total > 1 else np.zeros(1)
        start = 0
        for b in group:
            at = spots[start : start + len(b.others)]
            start += len(b.others) + 2
            dots += [(side, float(y), f"{b.other} {i}") for i, y in zip(b.others.tolist(), at, strict=True)]
            _weights(made, b, [heights[i] for i in b.own.tolist()], at, side, _EDGES // max(1, len(group)))
        if group:
            names = list(dict.fromkeys(style.short(b.other, 30) for b in group))
            titles.append((side, ("from " if side < 0 else "to ") + ", ".join(names) + "<br>the strongest"))
    made.add_trace(
        go.Scatter(x=[d[0] for d in dots], y=[d[1] for d in dots], mode="markers", text=[d[2] for d in dots],
                   marker={"size": 8, "color": [style.ACCENT if d[0] == 0 else style.OTHER for d in dots]},
                   hovertemplate="%{text}<extra></extra>", showlegend=False)
    )  # fmt: skip
    for x, words in titles:
        made.add_annotation(x=x, y=1.17, text=words, showarrow=False, font={"size": 12, "color": style.ink(dark)})
    made.update_yaxes(range=[-1.08, 1.3])
    return made


def _weights(
    made: go.Figure, b: Bundle, own: Sequence[float], others: NDArray[Any], side: float, most: int
) -> None:
    import plotly.graph_objects as go

    known = np.nan_to_num(b.matrix, posinf=0.0, neginf=0.0)
    strength = np.abs(known)
    if not strength.size or not strength.max():
        return
    order = np.argsort(strength, axis=None)[::-1][:most]
    rows, columns = np.unravel_index(order, strength.shape)
    levels = np.minimum((strength[rows, columns] / strength.max() * 4).astype(int), 3)
    for level in range(4):
        for sign, colour in ((-1, "200,92,92"), (1, "63,116,179")):
            chosen = (levels == level) & (np.sign(known[rows, columns]) == sign)
            x: list[float | None] = []
            y: list[float | None] = []
            for r, c in zip(rows[chosen], columns[chosen], strict=True):
                x += [side, 0.0, None]
                y += [float(others[c]), float(own[r]), None]
            if x:
                shade = f"rgba({colour},{0.15 + 0.27 * level:.2f})"
                made.add_trace(go.Scatter(x=x, y=y, mode="lines", line={"color": shade, "width": 0.6 + 0.6 * level},
                                          hoverinfo="skip", showlegend=False))  # fmt: skip


__all__ = ["MOST", "SIDES", "Bundle", "draw_axis", "open_axis"]
