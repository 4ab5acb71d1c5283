"""Pictures of a backdoor's subspace on the parameter graph, as plotly figures.

``figure`` has a column for every axis of the network, in the order in which the network uses them: its elements'
scores as a heat strip, the names of the highest, and lines between them as strong as their links in the weights. Axes
are drawn and not weights, so that a network of millions of parameters is no harder to read than a small one.
``spectra`` shows for each block the directions that carry the backdoor among all that the block has.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from weightspace.backdoor.subnets import numbered, shares_of
from weightspace.backdoor.subspace import Element, Subspace
from weightspace.errors import MissingExtraError, WeightspaceError
from weightspace.wiring.wiring import Wiring
from weightspace.zoo.grafting import cuts_of

CELLS = 48
"""Cells of a strip, at most: of longer axes each cell shows the highest score of its elements."""
NAMED = 12
LINKED = 24
"""Elements that links are drawn between."""
HALF = 0.17
"""Half the width of a strip; columns are 1 apart."""
BLOCKS = 12
"""Blocks whose spectra are drawn."""
INK, PALE, HOT = "#1f2937", "#e5e7eb", "#b91c1c"
SCALE = [[0.0, "#f3f4f6"], [0.25, "#fde68a"], [0.6, "#f97316"], [1.0, "#7f1d1d"]]


@dataclass(frozen=True)
class _Column:
    """An axis as it is drawn: where, and which cell each of its elements is in."""

    factor: str
    x: int
    cells: int
    cell: NDArray[np.int64]
    shape: tuple[int, ...]

    def y(self, index: Sequence[int]) -> float:
        """Height of an element, 0 to 1."""
        flat = int(np.ravel_multi_index(tuple(index), self.shape))
        return (float(self.cell[flat]) + 0.5) / self.cells


def figure(subspace: Subspace, wiring: Wiring, tensors: Mapping[str, Tensor], *, top: int = NAMED) -> Any:
    """The axes of a network with the elements that carry the backdoor; a ``plotly.graph_objects.Figure``.

    ``top``: how many elements are named. Raises ``WeightspaceError`` where the subspace is another network's.
    """
    go = _plotly()
    columns = _columns(subspace, wiring)
    drawn = go.Figure()
    for c in columns.values():
        drawn.add_trace(_strip(go, c, subspace))
    # A subnet is drawn whole and nothing else; a response has no edge.
    most = 4 * LINKED if subspace.method == "cut" else LINKED
    chosen = subspace.ranked[: min(subspace.size, most) if subspace.method == "cut" else most]
    for element_a, element_b, share in _links(chosen, wiring, tensors, subspace):
        a, b = columns[element_a.factor], columns[element_b.factor]
        if a.x > b.x:
            a, b, element_a, element_b = b, a, element_b, element_a
        xs, ys = _curve(a.x + HALF, a.y(element_a.index), b.x - HALF, b.y(element_b.index), abs(b.x - a.x))
        drawn.add_trace(_line(go, xs, ys, share))
    _classes(drawn, go, subspace, len(columns))
    for element, k, share in _served(chosen, wiring, tensors, subspace):
        a = columns[element.factor]
        classes = max(subspace.targets) + 1
        xs, ys = _curve(a.x + HALF, a.y(element.index), len(columns) - 0.1, (k + 0.5) / classes, len(columns) - a.x)
        drawn.add_trace(_line(go, xs, ys, share))
    _name(drawn, chosen[:top], columns)
    names = [*columns, "classes"]
    sizes = [*(int(np.prod(c.shape)) for c in columns.values()), len(subspace.targets) or 0]
    every = max(1, len(names) // 30)
    shown = [i for i in range(len(names)) if i % every == 0 or i == len(names) - 1]
    served = "no class" if subspace.target is None else f"class {subspace.target}"
    how = "a subnet apart from the rest" if subspace.method == "cut" else "what a found trigger changes"
    total = sum(s.numel() for s in subspace.elements.values())
    drawn.update_layout(
        title={
            "text": f"Backdoor subspace: {how}, serving {served}<br><sup>{subspace.size} of {total:,} elements; "
            f"{sum(t.numel() for t in tensors.values()):,} parameters in {len(tensors)} tensors</sup>",
            "x": 0.01, "xanchor": "left", "y": 0.96, "yanchor": "top",
        },
        width=max(820, min(2200, 170 + 110 * len(names))), height=640, plot_bgcolor="white", paper_bgcolor="white",
        font={"color": INK, "family": "Inter, Helvetica, Arial, sans-serif", "size": 12},
        margin={"l": 30, "r": 40, "t": 84, "b": 130}, hovermode="closest",
        xaxis={
            "tickvals": shown, "ticktext": [f"{_short(names[i])}<br>{sizes[i]}" if sizes[i] else names[i]
                                            for i in shown],
            "tickangle": -45 if len(names) > 8 else 0, "showgrid": False, "zeroline": False,
            "range": [-0.4, len(names) - 0.5],
        },
        yaxis={"visible": False, "range": [-0.03, 1.06]},
    )  # fmt: skip
    return drawn


def spectra(subspace: Subspace, tensors: Mapping[str, Tensor], *, blocks: int = BLOCKS) -> Any:
    """Singular values of the blocks, and of what they carry of the backdoor; a ``plotly.graph_objects.Figure``.

    The ``blocks`` whose carried part is largest beside the block itself, in the network's order.
    """
    go = _plotly()
    from plotly.subplots import make_subplots

    rows = {}
    for label, basis in subspace.blocks.items():
        if basis.tensor not in tensors:
            raise WeightspaceError(f"the subspace has a block {label!r} and the network no tensor {basis.tensor!r}")
        whole = torch.linalg.svdvals(basis.matrix(tensors[basis.tensor].detach().float()))
        rows[label] = (whole.numpy(), basis.S.float().numpy(), basis)
    if not rows:
        raise WeightspaceError("this subspace has no blocks: nothing to draw")
    strength = {label: float(np.square(s).sum() / max(np.square(w).sum(), 1e-30)) for label, (w, s, _) in rows.items()}
    kept = sorted(rows, key=lambda label: -strength[label])[:blocks]
    shown = [label for label in rows if label in kept]
    across = min(4, len(shown))
    down = -(-len(shown) // across)
    drawn = make_subplots(
        rows=down, cols=across, vertical_spacing=0.34 / down, horizontal_spacing=0.06,
        subplot_titles=[f"{_short(label, 26)} · {strength[label]:.0%}" for label in shown],
    )  # fmt: skip
    for i, label in enumerate(shown):
        whole, own, basis = rows[label]
        at = {"row": i // across + 1, "col": i % across + 1}
        first = i == 0
        drawn.add_trace(go.Bar(
            x=np.arange(1, len(whole) + 1), y=whole, marker_color=PALE, name="block", showlegend=first,
            hovertemplate="σ%{x} = %{y:.3g}<extra>block</extra>",
        ), **at)  # fmt: skip
        drawn.add_trace(go.Bar(
            x=np.arange(1, len(own) + 1), y=own, marker_color=HOT, name="carried", showlegend=first,
            hovertemplate="σ%{x} = %{y:.3g}<extra>carried, spans "
            f"{basis.strength:.0%} of the change of its inputs</extra>",
        ), **at)  # fmt: skip
        drawn.update_xaxes(range=[0.4, min(len(whole), 24) + 0.6], **at)
    drawn.update_layout(
        barmode="overlay", bargap=0.15, width=290 * across + 60, height=170 * down + 120, plot_bgcolor="white",
        title={"text": "Singular values of blocks and of what they carry (share of energy)", "x": 0.01},
        font={"color": INK, "family": "Inter, Helvetica, Arial, sans-serif", "size": 11},
        margin={"l": 45, "r": 20, "t": 90, "b": 40},
        legend={"orientation": "h", "x": 1, "xanchor": "right", "yref": "container", "y": 0.97, "yanchor": "top"},
    )  # fmt: skip
    drawn.update_yaxes(rangemode="tozero", gridcolor="#f3f4f6")
    drawn.update_annotations(font_size=11)
    return drawn


def _plotly() -> Any:
    try:
        import plotly.graph_objects as go
    except ImportError as error:
        raise MissingExtraError("plotly", "all", "drawing a subspace") from error
    return go


def _columns(subspace: Subspace, wiring: Wiring) -> dict[str, _Column]:
    """Axes in the order in which the network first makes something with them; of fibred ones what they are over."""
    if set(subspace.elements) - set(wiring.free):
        other = min(set(subspace.elements) - set(wiring.free))
        raise WeightspaceError(f"the subspace has a factor {other!r} and the wiring none: it is another network's")
    order = {name: i for i, name in enumerate(wiring.roles)}

    def first(factor: str) -> tuple[int, bool]:
        carried = [n for n in wiring.tensors_of(factor) if n in order]
        wrote = [order[n] for n in carried if wiring.roles[n] in ("weight", "lookup")]
        return min(wrote or [order[n] for n in carried] or [len(order)]), bool(wiring.factors[factor].over)

    names = sorted(subspace.elements, key=lambda f: (*first(f), list(subspace.elements).index(f)))
    found = {}
    for x, name in enumerate(names):
        score = subspace.elements[name]
        count = score.numel()
        cells = min(CELLS, count)
        found[name] = _Column(name, x, cells, np.arange(count) * cells // max(count, 1), tuple(score.shape))
    return found


def _strip(go: Any, c: _Column, subspace: Subspace) -> Any:
    score = subspace.elements[c.factor].double().reshape(-1).numpy()
    heat, who = np.zeros(c.cells), [""] * c.cells
    for k in range(c.cells):
        members = np.flatnonzero(c.cell == k)
        best = members[score[members].argmax()]
        heat[k] = score[best]
        where = ", ".join(str(int(i)) for i in np.unravel_index(best, c.shape))
        beside = f" (highest of {len(members)})" if len(members) > 1 else ""
        who[k] = f"{c.factor}[{where}]{beside}"
    # Edges of cells are given, since a heat map of one column has no width of its own.
    return go.Heatmap(
        z=heat[:, None], x=[c.x - HALF, c.x + HALF], y=np.arange(c.cells + 1) / c.cells, text=[[t] for t in who],
        ygap=1 if c.cells <= 40 else 0, zmin=0, zmax=1, colorscale=SCALE,
        hovertemplate="%{text}<br>score %{z:.3f}<extra></extra>", showscale=c.x == 0,
        colorbar={"title": {"text": "score", "side": "right"}, "thickness": 10, "len": 0.5, "x": 1.0,
                  "outlinewidth": 0},
    )  # fmt: skip


def _links(
    chosen: Sequence[Element], wiring: Wiring, tensors: Mapping[str, Tensor], subspace: Subspace
) -> list[tuple[Element, Element, float]]:
    """Links between chosen elements, with their share among all links of the two: those above chance."""
    starts, total = numbered(wiring)
    by_number = {starts[e.factor] + e.index[0]: e for e in chosen if e.factor in starts and len(e.index) == 1}
    member = torch.zeros(total, dtype=torch.bool)
    member[torch.tensor(list(by_number), dtype=torch.long)] = True
    found: dict[tuple[int, int], float] = {}
    for s in shares_of(wiring, tensors, starts):
        rows, columns = torch.nonzero(member[s.rows]).flatten(), torch.nonzero(member[s.columns]).flatten()
        chance = float(s.values.mean())
        for i in rows.tolist():
            for j in columns.tolist():
                value = float(s.values[i, j])
                pair = (int(s.rows[i]), int(s.columns[j]))
                if value > 1.5 * chance and pair[0] != pair[1]:
                    found[pair] = max(found.get(pair, 0.0), value)
    strongest = sorted(found.items(), key=lambda item: -item[1])[: 6 * LINKED]
    most = max(found.values(), default=1.0)
    return [(by_number[a], by_number[b], value / most) for (a, b), value in strongest]


def _curve(x: float, y: float, to_x: float, to_y: float, far: int) -> tuple[list[float], list[float]]:
    """A smooth line; one that passes other columns leaves the straight way a little."""
    t = np.linspace(0, 1, 18)
    ease = t * t * (3 - 2 * t)
    bow = 0.05 * min(far - 1, 3) * np.sin(np.pi * t)
    return (x + (to_x - x) * t).tolist(), (y + (to_y - y) * ease + bow).tolist()


def _line(go: Any, xs: list[float], ys: list[float], share: float) -> Any:
    return go.Scatter(
        x=xs, y=ys, mode="lines", hoverinfo="skip", showlegend=False,
        line={"color": HOT, "width": 0.5 + 2.5 * share}, opacity=0.12 + 0.6 * share,
    )  # fmt: skip


def _served(
    chosen: Sequence[Element], wiring: Wiring, tensors: Mapping[str, Tensor], subspace: Subspace
) -> list[tuple[Element, int, float]]:
    """What chosen elements add to the target class, among all that they add: positive weights of the last layer."""
    from weightspace.backdoor.outputs import NoClassesError, class_axis

    if subspace.target is None:
        return []
    try:
        axis = class_axis(wiring, tensors)
    except NoClassesError:
        return []
    none = {n: torch.zeros(0, dtype=torch.long) for n, f in wiring.free.items() if not f.over}
    found = []
    for e in chosen:
        if e.factor not in none or len(e.index) != 1:
            continue
        inner = cuts_of(wiring, {**none, e.factor: torch.tensor(e.index)})
        total = sum(
            rows.of({rows.tensor: tensors[rows.tensor] * inner[rows.tensor].inner}).sum(1)
            for rows in axis.weights if rows.tensor in inner
        )  # fmt: skip
        if isinstance(total, Tensor) and float(total[subspace.target]) > 0:
            found.append((e, subspace.target, float(total[subspace.target])))
    most = max((v for *_, v in found), default=1.0)
    return [(e, k, v / most) for e, k, v in found]


def _name(drawn: Any, elements: Sequence[Element], columns: Mapping[str, _Column]) -> None:
    """Marks and names of the highest elements; those that would lie on one another are moved apart."""
    by_column: dict[str, list[Element]] = {}
    for e in elements:
        by_column.setdefault(e.factor, []).append(e)
    for factor, own in by_column.items():
        c = columns[factor]
        low = -1.0
        for e in sorted(own, key=lambda e: c.y(e.index)):
            at = c.y(e.index)
            low = max(at, low + 0.035)
            drawn.add_annotation(
                x=c.x + HALF + 0.02, y=min(low, 1.03), text=f"<b>{', '.join(map(str, e.index))}</b>", showarrow=False,
                xanchor="left", font={"size": 11, "color": HOT}, bgcolor="rgba(255,255,255,0.75)", borderpad=1,
            )  # fmt: skip


def _classes(drawn: Any, go: Any, subspace: Subspace, x: int) -> None:
    count = len(subspace.targets)
    if not count:
        return
    classes = max(subspace.targets) + 1
    colour = [HOT if k == subspace.target else "#d1d5db" for k in range(classes)]
    drawn.add_trace(go.Scatter(
        x=[x] * classes, y=[(k + 0.5) / classes for k in range(classes)], mode="markers+text",
        marker={"size": 13 if classes <= 30 else 6, "color": colour, "symbol": "square"},
        text=[str(k) if classes <= 30 or k == subspace.target else "" for k in range(classes)],
        textposition="middle right", showlegend=False, hovertemplate="class %{text}<extra></extra>",
    ))  # fmt: skip


def _short(name: str, most: int = 18) -> str:
    return name if len(name) <= most else f"{name[: most // 2 - 1]}…{name[-(most - most // 2) :]}"


__all__ = ["figure", "spectra"]
