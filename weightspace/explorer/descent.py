"""Lineage for its page: tracing it in a worker, and the forest as a picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from weightspace.explorer import style

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

_LABELLED = 90
"""Models up to which every one is named in the picture."""


def trace(folder: str, names: Sequence[str] | None) -> dict[str, Any]:
    """``Zoo.lineage`` as plain values (``Lineage.to_json``) with its ``tree`` in lines."""
    from weightspace.zoo import Zoo

    found = Zoo(folder).lineage(None if names is None else list(names), progress=True)
    return {**found.to_json(), "tree": found.tree()}


def edge_table(found: Mapping[str, Any]) -> pd.DataFrame:
    """A row per edge, what disagrees with a record first."""
    import pandas as pd

    columns = ["child", "parent", "kind", "share", "confidence", "direction", "undecided", "distance", "recorded"]
    columns.append("why")
    rows = [{c: e[c] for c in columns} for e in found["edges"]]
    frame = pd.DataFrame(rows, columns=columns)
    order = frame["recorded"].map({"disagrees": 0}).fillna(1)
    return frame.assign(order=order).sort_values(["order", "confidence"]).drop(columns="order").reset_index(drop=True)


def places(found: Mapping[str, Any]) -> dict[str, tuple[float, float]]:
    """Where each related model stands: generations from left to right, families one below the other."""
    children: dict[str, list[str]] = {}
    first: dict[str, str] = {}
    # A merge stands below its largest parent.
    for edge in sorted(found["edges"], key=lambda e: -float(e["share"])):
        if edge["child"] not in first:
            first[edge["child"]] = edge["parent"]
            children.setdefault(edge["parent"], []).append(edge["child"])
    spot: dict[str, tuple[float, float]] = {}
    row = 0.0

    def put(root: str) -> None:
        nonlocal row
        stack: list[tuple[str, int, bool]] = [(root, 0, False)]
        while stack:
            name, depth, done = stack.pop()
            below = [c for c in children.get(name, []) if c != root]
            if done:
                held = [spot[c][1] for c in below if c in spot]
                spot[name] = (float(depth), sum(held) / len(held) if held else row)
                continue
            if name in spot:
                continue
            if not below:
                spot[name] = (float(depth), row)
                row -= 1.0
                continue
            stack.append((name, depth, True))
            spot[name] = (float(depth), row)
            stack += [(c, depth + 1, False) for c in sorted(below, reverse=True) if c not in spot]

    for root in sorted(found["roots"]):
        put(root)
        row -= 0.4
    for family in found["families"]:
        alone = sorted(m for m in family if m not in spot)
        if len(family) > 1:
            for name in alone:
                spot[name] = (0.0, row)
                row -= 1.0
            row -= 0.4 if alone else 0.0
    return spot


def draw(found: Mapping[str, Any], chosen: Sequence[str] = (), dark: bool = False) -> go.Figure:
    """The forest: a dot per model, lines from parents to children, in a colour per kind of descent, fainter where less
    sure, dotted where the direction is not; red where the record says otherwise. ``customdata`` is the model's name."""
    import plotly.graph_objects as go

    spot = places(found)
    kinds = list(dict.fromkeys(e["kind"] for e in found["edges"]))
    shades = {kind: style.CATEGORIES[i % len(style.CATEGORIES)] for i, kind in enumerate(kinds)}
    lowest = min((y for _, y in spot.values()), default=0.0)
    deepest = max((x for x, _ in spot.values()), default=0.0)
    few = len(spot) <= _LABELLED
    made = style.figure(
        height=int(min(2400, max(320, 90 + (24 if few else 9) * -lowest))), hovermode="closest", dragmode="pan",
        xaxis={"visible": False, "range": [-0.45, deepest + 0.6]}, yaxis={"visible": False},
    )  # fmt: skip
    named: set[str] = set()
    for edge in found["edges"]:
        if edge["parent"] not in spot or edge["child"] not in spot:
            continue
        (x0, y0), (x1, y1) = spot[edge["parent"]], spot[edge["child"]]
        wrong = edge["recorded"] == "disagrees"
        line = {
            "color": style.BAD if wrong else shades[edge["kind"]], "width": 1.2 + 2.0 * float(edge["share"]),
            "dash": "solid" if edge["direction"] >= 0.75 else "dot", "shape": "spline",
        }  # fmt: skip
        label = "record says otherwise" if wrong else str(edge["kind"])
        made.add_trace(
            go.Scatter(
                x=[x0, x0 + 0.45 * (x1 - x0), x1 - 0.25 * (x1 - x0), x1], y=[y0, y0 + 0.15 * (y1 - y0), y1, y1],
                mode="lines", line=line, opacity=0.25 + 0.75 * float(edge["confidence"]), hoverinfo="skip",
                name=label, legendgroup=label, showlegend=label not in named,
            )
        )  # fmt: skip
        named.add(label)
    held = set(chosen)
    # Names stand where no line leaves.
    above = {edge["parent"] for edge in found["edges"]}
    names = list(spot)
    parents: dict[str, list[Mapping[str, Any]]] = {}
    for edge in found["edges"]:
        parents.setdefault(edge["child"], []).append(edge)
    hover = [f"<b>{n}</b>" + "".join(f"<br>{_told(e)}" for e in parents.get(n, [])) for n in names]
    made.add_trace(
        go.Scatter(
            x=[spot[n][0] for n in names], y=[spot[n][1] for n in names], mode="markers+text" if few else "markers",
            text=[style.short(n.removesuffix(".safetensors"), 34) for n in names],
            textposition=["middle left" if n in above else "middle right" for n in names],
            textfont={"size": 11, "color": style.ink(dark)}, customdata=names, hovertext=hover,
            hovertemplate="%{hovertext}<extra></extra>", showlegend=False, cliponaxis=False,
            marker={
                "size": [12 if n in held else 8 for n in names],
                "color": [style.ACCENT if n in held else style.OTHER for n in names],
                "line": {"color": style.ink(dark), "width": 0.5},
            },
        )
    )  # fmt: skip
    return made


def direction(edge: Mapping[str, Any]) -> str:
    """How sure an edge's direction is, in words."""
    return "undecided: equal weights have none" if edge.get("undecided") else f"{edge['direction']:.0%}"


def _told(edge: Mapping[str, Any]) -> str:
    share = "" if edge["share"] > 0.999 else f" ({edge['share']:.0%})"
    sure = f"sure {edge['confidence']:.0%}, direction {direction(edge)}"
    return f"{edge['kind']} of {edge['parent']}{share}: {sure}"


__all__ = ["direction", "draw", "edge_table", "places", "trace"]
