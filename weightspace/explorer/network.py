"""The parameter graph as a picture of axes: repeated parts collapsed, each of them and each axis open to a click.

Nothing here looks at names to find what repeats: axes that many blocks meet at (residual streams) are taken out, what
falls apart then is compared by its shapes and by where it hangs, and equal parts are one.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import log10
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from weightspace.explorer import style

if TYPE_CHECKING:
    import plotly.graph_objects as go

    from weightspace.graph import ParameterGraph

_HUB = 5
"""Blocks that meet at an axis for it to be a stream that others hang on."""
_MOST = 40
"""Neurons of an axis that are drawn at once."""
SIDES = 3
"""Bundles of weights that are opened on either side of an axis."""
_EDGES = 260
"""Weights that are drawn at once."""


@dataclass(frozen=True)
class Node:
    """An axis in the picture, or one place of a repeated part: ``cells`` are the axes it stands for."""

    key: str
    cells: tuple[str, ...]
    size: int
    shape: str
    kind: str
    mark: str
    part: str
    x: float
    y: float


@dataclass(frozen=True)
class Edge:
    """Blocks between two nodes: their tensors and how many weights they have; none for a link without parameters."""

    src: str
    dst: str
    tensors: tuple[str, ...]
    weights: int


@dataclass(frozen=True)
class Drawing:
    """Nodes and edges; ``parts`` are the repeated parts by key: how often each repeats. ``hidden``: axes left out that
    nothing connects to the network."""

    nodes: Mapping[str, Node]
    edges: tuple[Edge, ...]
    parts: Mapping[str, int] = field(default_factory=dict)
    hidden: int = 0


def arrange(graph: ParameterGraph, order: Sequence[str] = (), opened: Sequence[str] = ()) -> Drawing:
    """Place the axes of a graph. ``order``: tensors in order of use; ``opened``: repeated parts to draw one by one
    (``"all"`` for every one)."""
    place = {name: i for i, name in enumerate(order)}
    blocks = sorted(graph.blocks, key=lambda b: place.get(b.tensor, len(place)))
    touched: Counter[str] = Counter()
    for block in blocks:
        touched.update({block.src, block.dst})
    cells = {name: cell for name, cell in graph.cells.items() if touched[name]}
    hubs = {name for name in cells if touched[name] >= _HUB}
    member = _components(cells, hubs, blocks, graph)
    parts: dict[str, list[list[str]]] = defaultdict(list)
    for group in _grouped(member):
        parts[_signature(group, hubs, blocks, graph)].append(group)
    repeated: dict[str, int] = {}
    of: dict[str, tuple[str, str]] = {}  # cell -> node, part
    number = 0
    for groups in parts.values():
        if len(groups) < 2:
            continue
        number += 1
        key = f"part-{number}"
        repeated[key] = len(groups)
        if key in opened or "all" in opened:
            for i, group in enumerate(groups):
                of |= {cell: (cell, f"{key}.{i}") for cell in group}
            continue
        for group in groups:
            of |= {cell: (groups[0][i], key) for i, cell in enumerate(group)}
    for cell in cells:
        of.setdefault(cell, (cell, ""))
    return _drawn(graph, cells, blocks, of, repeated, hubs)


def _components(
    cells: Mapping[str, Any], hubs: set[str], blocks: Sequence[Any], graph: ParameterGraph
) -> dict[str, str]:
    """Each cell that is no hub -> the first cell of what it hangs together with."""
    parent = {name: name for name in cells if name not in hubs}

    def root(x: str) -> str:
        while parent[x] != x:
            parent[x] = parent[parent[x]]
            x = parent[x]
        return x

    pairs = [(b.src, b.dst) for b in blocks] + [(link.src, link.dst) for link in graph.links]
    # Heads tell their channels apart: what is part of one cell hangs together through it.
    outer: dict[str, str] = {}
    pairs += [(outer.setdefault(link.src, link.dst), link.dst) for link in graph.links if link.dst in parent]
    for a, b in pairs:
        if a in parent and b in parent:
            one, two = root(a), root(b)
            if one != two:
                parent[two] = one
    return {name: root(name) for name in parent}


def _grouped(member: Mapping[str, str]) -> list[list[str]]:
    groups: dict[str, list[str]] = defaultdict(list)
    for name, root in member.items():
        groups[root].append(name)
    return list(groups.values())


def _signature(group: Sequence[str], hubs: set[str], blocks: Sequence[Any], graph: ParameterGraph) -> str:
    """Equal for parts of equal shapes that hang on the same streams in the same way."""
    where = {name: i for i, name in enumerate(group)}
    facts: list[str] = [str([(graph.cells[n].sizes, graph.cells[n].movable, graph.cells[n].mark) for n in group])]
    for block in blocks:
        if block.src in where or block.dst in where:
            ends = [f"own{where[n]}" if n in where else n for n in (block.src, block.dst)]
            facts.append(f"{ends} {block.sizes}")
    return "\n".join([facts[0], *sorted(facts[1:])])


def _drawn(
    graph: ParameterGraph, cells: Mapping[str, Any], blocks: Sequence[Any], of: Mapping[str, tuple[str, str]],
    repeated: Mapping[str, int], hubs: set[str],
) -> Drawing:  # fmt: skip
    stands: dict[str, list[str]] = defaultdict(list)
    for cell in cells:
        stands[of[cell][0]].append(cell)
    joined: dict[tuple[str, str], list[Any]] = defaultdict(list)
    for block in blocks:
        joined[of[block.src][0], of[block.dst][0]].append(block)
    column = _columns(graph, joined, list(stands))
    kept = _connected(joined, list(stands), graph)
    rows: dict[int, list[str]] = defaultdict(list)
    for node in stands:
        if node in kept:
            rows[column[node]].append(node)
    nodes: dict[str, Node] = {}
    for x, names in rows.items():
        for i, name in enumerate(names):
            own = graph.cells[name]
            kind = "free" if own.movable and len(own.factors) == 1 else "structured" if own.movable else "pinned"
            shape = " × ".join(f"{n:,}" for n in own.sizes) or "1"
            nodes[name] = Node(
                name, tuple(stands[name]), own.size, shape, kind, own.mark, of[name][1], float(x),
                (len(names) - 1) / 2 - i,
            )  # fmt: skip
    edges = [
        Edge(a, b, tuple(x.label for x in found), sum(x.numel for x in found))
        for (a, b), found in joined.items() if a in nodes and b in nodes
    ]  # fmt: skip
    links = {(of[x.src][0], of[x.dst][0]) for x in graph.links if x.src in of and x.dst in of}
    edges += [Edge(a, b, (), 0) for a, b in links if a in nodes and b in nodes and a != b]
    return Drawing(nodes, tuple(edges), dict(repeated), len(stands) - len(nodes))


def _columns(graph: ParameterGraph, joined: Mapping[tuple[str, str], Any], names: Sequence[str]) -> dict[str, int]:
    """A column per node: one further than what leads to it, in order of use; outputs last."""
    column: dict[str, int] = {n: 0 for n in names if graph.cells[n].mark == "input"}
    pairs = list(joined)
    if pairs and not column:
        column[pairs[0][0]] = 0
    waiting = pairs
    while waiting:
        rest = []
        for a, b in waiting:
            if a in column:
                column.setdefault(b, column[a] + 1)
            elif b in column:
                column.setdefault(a, column[b] + 1)
            else:
                rest.append((a, b))
        if len(rest) == len(waiting):
            column[rest[0][0]] = 0
        waiting = rest
    for link in graph.links:
        for a, b in ((link.src, link.dst), (link.dst, link.src)):
            if a in column and b in names:
                column.setdefault(b, column[a] + 1)
    last = max(column.values(), default=0)
    for name in names:
        column.setdefault(name, 0)
        if graph.cells[name].mark == "output" and column[name] < last:
            column[name] = last if all(graph.cells[n].mark for n in names if column[n] == last) else last + 1
    return column


def _connected(joined: Mapping[tuple[str, str], Any], names: Sequence[str], graph: ParameterGraph) -> set[str]:
    """Nodes of the network proper: those that hang together with inputs or outputs, or the largest part."""
    import networkx as nx

    net = nx.Graph()
    net.add_nodes_from(names)
    net.add_edges_from(joined)
    net.add_edges_from((x.src, x.dst) for x in graph.links if x.src in net and x.dst in net)
    found = list(nx.connected_components(net))
    own = [c for c in found if any(graph.cells[n].movable or graph.cells[n].mark for n in c)]
    return set().union(*own) if own else set(names)


def draw(drawing: Drawing, chosen: str | None = None, dark: bool = False) -> go.Figure:
    """Axes as discs, larger for more elements; lines are blocks of weights, thicker for more. ``customdata`` of a disc
    is its node's key."""
    import plotly.graph_objects as go

    nodes = drawing.nodes
    deepest = max((abs(n.y) for n in nodes.values()), default=0)
    columns = len({n.x for n in nodes.values()})
    made = style.figure(
        height=int(min(1400, max(300, 110 * (2 * deepest + 1) + 80))), hovermode="closest", dragmode="pan",
        xaxis={"visible": False, "range": [-0.6, max(columns, 2) - 0.4]},
        yaxis={"visible": False, "range": [-deepest - 0.75, deepest + 0.75]},
    )  # fmt: skip
    grey = "rgba(140,150,160,0.55)"
    for edge in drawing.edges:
        a, b = nodes[edge.src], nodes[edge.dst]
        bend = 0.0 if a.x != b.x else 0.25
        x, y = _curve(a, b, bend)
        thick = 1.0 if not edge.weights else 0.8 + 0.75 * log10(max(edge.weights, 10))
        dash = "dot" if not edge.weights else "solid"
        made.add_trace(go.Scatter(x=x, y=y, mode="lines", line={"color": grey, "width": thick, "dash": dash},
                                  hoverinfo="skip", showlegend=False))  # fmt: skip
    ends = [(e, _curve(nodes[e.src], nodes[e.dst], 0.0 if nodes[e.src].x != nodes[e.dst].x else 0.25))
            for e in drawing.edges if e.weights]  # fmt: skip
    made.add_trace(
        go.Scatter(
            x=[c[0][len(c[0]) // 2] for _, c in ends], y=[c[1][len(c[1]) // 2] for _, c in ends], mode="markers",
            marker={"size": 12, "color": "rgba(140,150,160,0.01)"}, showlegend=False,
            hovertemplate="%{text}<extra></extra>", text=[_told(e) for e, _ in ends],
        )
    )  # fmt: skip
    for kind, words in (("free", "may be permuted"), ("structured", "permuted with its parts (heads, groups)"),
                        ("pinned", "pinned: inputs, outputs, positions")):  # fmt: skip
        held = [n for n in nodes.values() if n.kind == kind]
        if not held:
            continue
        made.add_trace(
            go.Scatter(
                x=[n.x for n in held], y=[n.y for n in held], mode="markers+text", name=words,
                marker={
                    "size": [14 + 9 * log10(max(n.size, 1)) for n in held], "color": style.KINDS[kind],
                    "line": {"color": [style.POSITIVE if n.key == chosen else "rgba(60,70,80,0.6)" for n in held],
                             "width": [3 if n.key == chosen else 1 for n in held]},
                    "symbol": ["square" if drawing.parts.get(n.part) else "circle" for n in held],
                },
                text=[_label(n, drawing) for n in held], textposition="bottom center", customdata=[n.key for n in held],
                textfont={"size": 11, "color": style.ink(dark)},
                hovertemplate="%{hovertext}<extra></extra>", hovertext=[_hover(n, drawing) for n in held],
            )
        )  # fmt: skip
    return made


def _curve(a: Node, b: Node, bend: float) -> tuple[list[float], list[float]]:
    t = np.linspace(0, 1, 13)
    smooth = t * t * (3 - 2 * t)
    x = a.x + (b.x - a.x) * t + bend * np.sin(np.pi * t)
    y = a.y + (b.y - a.y) * smooth
    return x.tolist(), y.tolist()


def _told(edge: Edge) -> str:
    shown = "<br>".join(edge.tensors[:4]) + (f"<br>… {len(edge.tensors) - 4} more" if len(edge.tensors) > 4 else "")
    return f"{shown}<br>{style.count(edge.weights)} weights"


def _label(node: Node, drawing: Drawing) -> str:
    times = drawing.parts.get(node.part, 0)
    first = f"{style.short(node.key, 22)}<br>{node.shape}"
    return f"{first} <b>× {times}</b>" if times else first


def _hover(node: Node, drawing: Drawing) -> str:
    words = {"free": "may be permuted", "structured": "permuted with its parts", "pinned": "pinned"}[node.kind]
    text = f"<b>{node.key}</b><br>{node.shape} elements, {words}" + (f", {node.mark}" if node.mark else "")
    times = drawing.parts.get(node.part, 0)
    return text + (f"<br>one of {times} like it; open the part to see each" if times else "")


# ------------------------------------------------------------------------------------ one axis, its neurons


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
    from weightspace.errors import GraphError
    from weightspace.graph import graph as parameter_graph
    from weightspace.progress import bar

    graph = parameter_graph(open_checkpoint(address))
    if cell not in graph.cells:
        raise GraphError(f"the network has no axis {cell!r}; it has {', '.join(list(graph.cells)[:6])} …")
    wanted = torch.arange(first, min(first + _MOST, graph.cells[cell].size))
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
                strongest = dense.abs().amax(0).argsort(descending=True)[:_MOST].sort().values
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

    strength = np.abs(b.matrix)
    if not strength.size or not strength.max():
        return
    order = np.argsort(strength, axis=None)[::-1][:most]
    rows, columns = np.unravel_index(order, strength.shape)
    levels = np.minimum((strength[rows, columns] / strength.max() * 4).astype(int), 3)
    for level in range(4):
        for sign, colour in ((-1, "200,92,92"), (1, "63,116,179")):
            chosen = (levels == level) & (np.sign(b.matrix[rows, columns]) == sign)
            x: list[float | None] = []
            y: list[float | None] = []
            for r, c in zip(rows[chosen], columns[chosen], strict=True):
                x += [side, 0.0, None]
                y += [float(others[c]), float(own[r]), None]
            if x:
                shade = f"rgba({colour},{0.15 + 0.27 * level:.2f})"
                made.add_trace(go.Scatter(x=x, y=y, mode="lines", line={"color": shade, "width": 0.6 + 0.6 * level},
                                          hoverinfo="skip", showlegend=False))  # fmt: skip


__all__ = ["SIDES", "Bundle", "Drawing", "Edge", "Node", "arrange", "draw", "draw_axis", "open_axis"]
