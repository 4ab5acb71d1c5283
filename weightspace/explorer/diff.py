"""What differs between two networks: wiring, tensors, blocks before and after alignment, neurons. For a worker."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import prod
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from weightspace.errors import WeightspaceError
from weightspace.explorer import style
from weightspace.explorer.anatomy import singular_values, squares_of
from weightspace.progress import bar

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go
    from torch import Tensor

    from weightspace.wiring.wiring import Wiring

Array = NDArray[np.float64]
_PICTURE = 256
"""Elements of an axis above which its picture shows means of neighbouring ones."""
_ENERGY = 0.9


@dataclass(frozen=True)
class Move:
    """How one axis of b was permuted: element ``j`` of the aligned b was ``index[j]`` before. ``similar`` (a, aligned
    b) is the similarity of elements at the end; None for an axis fibred over others."""

    axis: str
    size: int
    moved: float
    index: NDArray[np.int64]
    similar: NDArray[np.float32] | None = field(repr=False, default=None)


@dataclass(frozen=True)
class Diff:
    """Two networks side by side. ``structure``: rows (what, in a, in b) of what differs in shape and wiring, empty for
    one architecture. ``blocks``: a row per tensor that both have. ``neurons``: per axis the change of each element over
    its weights in a, before and after. ``declined``: why nothing was aligned."""

    structure: tuple[tuple[str, str, str], ...]
    blocks: pd.DataFrame = field(repr=False)
    before: float
    after: float | None
    moves: tuple[Move, ...]
    neurons: Mapping[str, tuple[Array, Array | None]] = field(repr=False)
    declined: str = ""
    seconds: float = 0.0

    @property
    def same(self) -> bool:
        """Whether the two hold the same numbers under the same names."""
        return not self.structure and bool((self.blocks["change"] == 0).all())


def compare(a: str, b: str, align: bool = True) -> Diff:
    """Compare two files; b is moved onto a by weight matching where their wiring is one and proved.

    ``blocks`` has, per tensor: ``change`` |b − a| / |a|, ``cosine``, ``rank`` (singular values that hold 90 % of the
    squared change, of at most ``of``), and the same after alignment.
    """
    import weightspace as ws
    from weightspace.align.entry import cosine
    from weightspace.wiring.entry import wiring as find_wiring

    one, two = ws.open(a), ws.open(b)
    wirings: list[Wiring | None] = []
    with bar("wiring", 2) as step:
        for model in (one, two):
            try:
                wirings.append(find_wiring(model))
            except WeightspaceError:
                wirings.append(None)
            step("")
    structure = _structure(one, two, wirings[0], wirings[1])
    common = [n for n in one if n in two and one.shape(n) == two.shape(n)]
    wiring = wirings[0]
    order = [n for n in (wiring.roles if wiring is not None else ()) if n in common]
    order += [n for n in common if n not in order]
    found, declined = None, ""
    if align:
        with bar("aligning", 1) as step:
            try:
                found = ws.align(one, two)
            except WeightspaceError as error:
                declined = str(error)
            step("")
    aligned: Mapping[str, Tensor] | None = None if found is None else found.aligned
    rows = []
    with bar("comparing", len(order)) as step:
        for name in order:
            x, y = one[name], two[name]
            if not (x.is_floating_point() and y.is_floating_point()):
                continue
            row: dict[str, Any] = {"tensor": name, "role": "" if wiring is None else str(wiring.roles.get(name, "")),
                                   "elements": prod(one.shape(name))}  # fmt: skip
            row |= _change(x, y)
            if aligned is not None:
                row |= {f"{key} after": value for key, value in _change(x, aligned[name]).items() if key != "of"}
            rows.append(row)
            step(name)
    import pandas as pd

    frame = pd.DataFrame(rows, columns=None if rows else ["tensor", "change", "cosine"])
    shared = {n: one[n] for n in common}
    before = cosine(shared, {n: two[n] for n in common}, wiring) if wiring is not None and common else _cosine(rows)
    neurons = {} if wiring is None or structure else _neurons(one, two, aligned, wiring)
    moves = () if found is None else _moves(found)
    seconds = 0.0 if found is None else float(found.diagnostics["seconds"])
    after = None if found is None else float(found.objective)
    return Diff(tuple(structure), frame, before, after, moves, neurons, declined, seconds)


def _cosine(rows: list[dict[str, Any]]) -> float:
    return float(np.mean([r["cosine"] for r in rows])) if rows else float("nan")


def _change(x: Tensor, y: Tensor) -> dict[str, float]:
    import torch

    p, q = x.double().reshape(-1), y.double().reshape(-1)
    d = q - p
    size = float(p.norm())
    both = size * float(q.norm())
    alike = bool(torch.equal(p, q))
    row = {"change": 0.0 if alike else float(d.norm()) / size if size else float("inf"),
           "cosine": float(p @ q) / both if both else 1.0 if alike else 0.0}  # fmt: skip
    rank, most = float("nan"), float("nan")
    if x.dim() >= 2 and min(x.shape[0], x.numel() // x.shape[0]) > 1:
        most = float(min(x.shape[0], x.numel() // max(x.shape[0], 1)))
        rank = 0.0
        if not alike:
            energy = singular_values(d.reshape(x.shape[0], -1))[0] ** 2
            rank = float(np.searchsorted(np.cumsum(energy) / max(energy.sum(), 1e-30), _ENERGY) + 1)
    return {**row, "rank": rank, "of": most}


def _structure(a: Any, b: Any, of_a: Wiring | None, of_b: Wiring | None) -> list[tuple[str, str, str]]:
    """What differs in names, shapes and wiring."""
    rows = []
    for name in dict.fromkeys([*a, *b]):
        shapes = [" × ".join(map(str, m.shape(name))) if name in m else "–" for m in (a, b)]
        if shapes[0] != shapes[1]:
            rows.append((name, shapes[0] or "1", shapes[1] or "1"))
    said = [("not wired" if w is None else f"{w.status}, {w.origin}") for w in (of_a, of_b)]
    if said[0] != said[1]:
        rows.append(("wiring", said[0], said[1]))
    if of_a is not None and of_b is not None and not rows:
        rows += [
            (f"axes of {name}", ", ".join(map(repr, of_a[name])), ", ".join(map(repr, of_b[name])))
            for name in of_a if name in of_b and of_a.layouts[name] != of_b.layouts[name]
        ]  # fmt: skip
    return rows


def _moves(found: Any) -> tuple[Move, ...]:
    moves = []
    for name, share in found.moved.items():
        factor = found.wiring.factors[name]
        index = found.permutations.index.get(name)
        held = np.arange(factor.size) if index is None else index.numpy()
        costs = found.costs.get(name)
        similar = None
        if not factor.over and costs is not None and costs.dim() == 2 and costs.shape[0] == costs.shape[1]:
            similar = costs.float().numpy()
        moves.append(Move(name, factor.size, share, held, similar))
    return tuple(moves)


def _neurons(
    a: Mapping[str, Tensor], b: Mapping[str, Tensor], aligned: Mapping[str, Tensor] | None, wiring: Wiring
) -> dict[str, tuple[Array, Array | None]]:
    """Per movable axis, the change of every element's weights over their size in a."""
    from weightspace.checkpoint import from_tensors
    from weightspace.graph import graph

    def squares(tensors: Mapping[str, Tensor]) -> dict[str, Array]:
        net = graph(from_tensors(tensors), wiring)
        out = {name: np.zeros(cell.size) for name, cell in net.cells.items() if cell.movable}
        for block in net.blocks:
            weights = net.real(block.tensor)
            if weights.is_floating_point():
                rows, columns = squares_of(block.matrix(weights))
                ends = ((block.dst, block.index(), rows), (block.src, block.source_index(), columns))
                for cell, places, sums in ends:
                    if cell in out:
                        np.add.at(out[cell], places.numpy(), sums)
        return out

    def less(other: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {n: (other[n] - a[n] if a[n].is_floating_point() else a[n]) for n in a}

    base = squares({n: a[n] for n in a})
    before = squares(less(b))
    after = None if aligned is None else squares(less(aligned))
    return {
        name: (
            np.sqrt(before[name] / np.maximum(size, 1e-30)),
            None if after is None else np.sqrt(after[name] / np.maximum(size, 1e-30)),
        )
        for name, size in base.items() if len(size) > 1 and size.any()
    }  # fmt: skip


# ------------------------------------------------------------------------------------ figures


def draw_blocks(frame: pd.DataFrame, column: str, most: int = 40) -> go.Figure:
    """A bar per tensor, before and after alignment; of many, those that changed most."""
    import plotly.graph_objects as go

    shown = frame
    if len(frame) > most:
        shown = frame.loc[frame["change"].nlargest(most).index.sort_values()]
    made = style.figure(
        height=int(130 + 26 * len(shown)), barmode="group", bargap=0.25,
        xaxis={"title": {"text": {"change": "size of the change over the weights", "cosine": "cosine",
                                  "rank": "directions that hold 90 % of the change"}[column]}},
        yaxis={"autorange": "reversed", "automargin": True},
    )  # fmt: skip
    names = [style.short(str(t), 40) for t in shown["tensor"]]
    both = f"{column} after" in shown
    made.add_trace(go.Bar(y=names, x=shown[column], orientation="h", name="as they are" if both else column,
                          marker={"color": style.CATEGORIES[0]}))  # fmt: skip
    if both:
        made.add_trace(go.Bar(y=names, x=shown[f"{column} after"], orientation="h", name="after alignment",
                              marker={"color": style.ACCENT}))  # fmt: skip
    return made


def draw_move(move: Move, dark: bool = False) -> go.Figure:
    """The permutation as a picture: similarity of a's elements (rows) to b's (columns), as they are and aligned; where
    only the permutation is known, its dots."""
    import plotly.graph_objects as go
    from plotly.subplots import make_subplots

    titles = ("as they are", "after alignment")
    made = make_subplots(rows=1, cols=2, subplot_titles=titles, horizontal_spacing=0.08)
    if move.similar is not None:
        before = np.empty_like(move.similar)
        before[:, move.index] = move.similar
        largest = float(np.abs(move.similar).max()) or 1.0
        for column, values in ((1, before), (2, move.similar)):
            z = _smaller(values)
            made.add_trace(
                go.Heatmap(z=z, colorscale=style.diverging(dark), zmin=-largest, zmax=largest, showscale=column == 2,
                           colorbar={"thickness": 10, "title": {"text": "similarity", "side": "right"}},
                           hovertemplate="a %{y}, b %{x}: %{z:.3g}<extra></extra>"), row=1, col=column,
            )  # fmt: skip
    else:
        flat = move.index.reshape(-1, move.index.shape[-1])[0]
        for column, y in ((1, flat), (2, np.arange(len(flat)))):
            made.add_trace(go.Scatter(x=np.arange(len(flat)), y=y, mode="markers", showlegend=False,
                                      marker={"size": 4, "color": style.ACCENT}), row=1, col=column)  # fmt: skip
    empty = style.figure(height=430)
    made.update_layout(empty.layout)
    made.update_layout(margin={"t": 50})
    made.update_yaxes(autorange="reversed", title_text="element of A", col=1)
    made.update_yaxes(autorange="reversed", col=2)
    made.update_xaxes(title_text="element of B")
    return made


def _smaller(values: NDArray[np.float32]) -> NDArray[np.float32]:
    """Large pictures as means of neighbouring elements."""
    step = -(-len(values) // _PICTURE)
    if step <= 1:
        return values
    n = len(values) // step * step
    found: NDArray[np.float32] = values[:n, :n].reshape(n // step, step, n // step, step).mean((1, 3))
    return found


def draw_neurons(before: Array, after: Array | None) -> go.Figure:
    """Change of every element of an axis, the most changed first."""
    import plotly.graph_objects as go

    shown = before if after is None else after
    order = np.argsort(-shown)
    made = style.figure(height=300, xaxis_title_text="elements, the most changed first",
                        yaxis_title_text="change over its weights in A")  # fmt: skip
    made.update_yaxes(rangemode="tozero")
    both = ((before, "as they are", style.CATEGORIES[0]), (after, "after alignment", style.ACCENT))
    for values, words, colour in both:
        if values is not None:
            made.add_trace(go.Scatter(x=np.arange(len(order)), y=values[order], mode="markers", name=words,
                                      text=[f"element {i}" for i in order], marker={"color": colour, "size": 6},
                                      hovertemplate="%{text}: %{y:.3g}<extra></extra>"))  # fmt: skip
    return made


__all__ = ["Diff", "Move", "compare", "draw_blocks", "draw_move", "draw_neurons"]
