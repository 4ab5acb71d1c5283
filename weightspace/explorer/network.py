"""The parameter graph as a picture of axes: repeated parts collapsed, each of them open to a click.

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

from weightspace.explorer import style

if TYPE_CHECKING:
    import plotly.graph_objects as go

    from weightspace.graph import ParameterGraph

_HUB = 5
"""Blocks that meet at an axis for it to be a stream that others hang on."""


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


__all__ = ["Drawing", "Edge", "Node", "arrange", "draw"]
