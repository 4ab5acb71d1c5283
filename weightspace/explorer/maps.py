"""A zoo as a map: its vectors in the plane, and the figure."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from weightspace.errors import MissingExtraError, ZooError
from weightspace.explorer import style
from weightspace.zoo.listing import Vectors, vectors

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

Points = NDArray[np.float64]
_SIDES = ("top center", "bottom center", "top left", "bottom left")
HEIGHT = 470
"""Pixels of the map from top to bottom."""
_MANY = 1500
"""Points above which a map is drawn by WebGL."""
_LOGARITHMIC = ("parameters", "bytes")
"""Columns whose shades are of their logarithms."""


def pca(x: NDArray[np.floating[Any]], dimensions: int = 2) -> tuple[Points, float]:
    """The leading principal components of rows, (rows, dimensions), and the share of the variance they show.

    Columns come as they are; the sign of a component is such that its largest loading is positive.
    """
    centred = np.asarray(x, dtype=np.float64) - np.mean(x, axis=0, dtype=np.float64)
    if len(centred) < centred.shape[1]:
        _, values, directions = np.linalg.svd(centred, full_matrices=False)
        power, axes = values**2, directions.T
    else:
        power, axes = np.linalg.eigh(centred.T @ centred)
        power, axes = power[::-1], axes[:, ::-1]
    axes = axes[:, :dimensions]
    axes = axes * np.sign(axes[np.abs(axes).argmax(0), np.arange(axes.shape[1])])
    found = np.zeros((len(centred), dimensions))
    found[:, : axes.shape[1]] = centred @ axes
    return found, float(power[:dimensions].sum() / max(float(power.sum()), 1e-30))


def scaled(x: NDArray[np.floating[Any]]) -> NDArray[np.float64]:
    """Features at mean 0 and deviation 1, outliers at 4: none of the descriptor's 403 may outshout the others."""
    y = np.nan_to_num(np.asarray(x, dtype=np.float64), posinf=0, neginf=0)
    deviation = y.std(0)
    found: NDArray[np.float64] = np.clip((y - y.mean(0)) / np.where(deviation > 1e-12, deviation, 1), -4, 4)
    return found


def place(folder: Path, kind: Vectors, method: str) -> tuple[list[str], Points, str]:
    """Names, places (models, 2) and a sentence on what the map shows.

    ``method``: "PCA" or "UMAP". Raises ``ZooError`` for fewer than three models, ``MissingExtraError`` without UMAP.
    """
    names, found = vectors(folder, kind)
    if len(names) < 3:
        inside = {"encoder": " inside the encoder's range", "function": " that were asked the same"}.get(kind, "")
        raise ZooError(f"{len(names)} models{inside} make no map; three or more were expected")
    x = scaled(found) if kind == "descriptor" else np.asarray(found, dtype=np.float64)
    what = {
        "descriptor": "training-free descriptors", "encoder": "vectors of the pretrained encoder",
        "function": f"functions of {len(names):,} models that were asked the same inputs",
    }[kind]  # fmt: skip
    if method == "UMAP":
        try:
            import umap
        except ImportError as error:
            raise MissingExtraError("umap-learn", "umap", "a UMAP map") from error
        near = min(15, len(names) - 1)
        places = umap.UMAP(n_neighbors=near, random_state=0).fit_transform(x)
        return names, np.asarray(places, dtype=np.float64), f"UMAP of the {what}: neighbours stay together"
    places, share = pca(x)
    return names, places, f"PCA of the {what}: the two directions shown hold {share:.0%} of the variance"


def draw(
    names: Sequence[str], places: Points, frame: pd.DataFrame, colour: str | None, kept: Sequence[bool],
    selected: Sequence[str], dark: bool = False,
) -> go.Figure:  # fmt: skip
    """The map: a point per model, coloured by a column; filtered-out models are faint, selected ones ringed.

    Each point carries its model's name as ``customdata``.
    """
    import pandas as pd
    import plotly.graph_objects as go

    wide, high = _ranges(places)
    made = style.figure(
        height=HEIGHT, dragmode="pan", xaxis={"visible": False, "range": wide}, yaxis={"visible": False, "range": high}
    )
    scatter = go.Scattergl if len(names) > _MANY else go.Scatter
    size = _size(len(names))
    held = np.asarray(kept, dtype=bool)
    label = np.asarray(names, dtype=object)

    def add(which: NDArray[np.bool_], name: str, marker: dict[str, Any], hover: bool = True, **more: Any) -> None:
        told = [style.short(str(n), 48) for n in label[which]] if hover else None
        made.add_trace(
            scatter(
                x=places[which, 0], y=places[which, 1], mode="markers", name=style.short(name, 36), text=told,
                customdata=label[which], marker={"size": size, **marker},
                hovertemplate="%{text}<extra></extra>" if hover else None, hoverinfo=None if hover else "skip", **more,
            )
        )  # fmt: skip

    if (~held).any():
        add(~held, "filtered out", {"color": style.OTHER, "opacity": 0.15}, hover=False, showlegend=False)
    values = frame[colour] if colour is not None else pd.Series("models", index=frame.index)
    column = None if colour is None else _shades(values, colour)
    if colour is not None and column is not None:
        known = held & np.isfinite(column)
        level = column[known]
        told: dict[str, Any] = {"text": colour.replace("_", " "), "side": "right"}
        bar: dict[str, Any] = {"title": told, "thickness": 10, "len": 0.8}
        if colour in _LOGARITHMIC and len(level):
            ticks = np.arange(np.floor(level.min()), np.ceil(level.max()) + 1)
            bar |= {"tickvals": ticks, "ticktext": [style.count(10**t) for t in ticks]}
        if (held & ~known).any():
            add(held & ~known, "not known", {"color": style.OTHER, "opacity": 0.5})
        add(known, colour, {"color": level, "colorscale": style.SEQUENTIAL, "colorbar": bar}, showlegend=False)
    else:
        classes, colours = style.colours_of(values.tolist())
        of = np.asarray(classes, dtype=object)
        for word, shade in colours.items():
            which = held & (of == word)
            if which.any():
                add(which, word, {"color": shade, "opacity": 0.9}, showlegend=colour is not None)
    chosen = np.isin(label, np.asarray(list(selected), dtype=object))
    if chosen.any():
        ring = {"size": size + 6, "color": "rgba(0,0,0,0)", "line": {"color": style.ACCENT, "width": 2.5}}
        made.add_trace(
            go.Scatter(
                x=places[chosen, 0], y=places[chosen, 1], mode="markers+text" if chosen.sum() <= 8 else "markers",
                marker=ring, text=[style.short(str(n).rpartition(".")[0] or str(n), 26) for n in label[chosen]],
                textposition=[_SIDES[i % len(_SIDES)] for i in range(int(chosen.sum()))],
                customdata=label[chosen], name="selected", hoverinfo="skip", textfont={"color": style.ink(dark)},
            )
        )  # fmt: skip
    made.update_layout(uirevision="map")
    return made


def _size(count: int) -> int:
    """Diameter of a point in pixels, such that points stay apart: few models are drawn large."""
    return 9 if count < 200 else 7 if count < _MANY else 5


def _shades(values: pd.Series[Any], colour: str) -> Points | None:
    """A column of numbers as what its shades are of, NaN where it is not known; None for one of few values: classes."""
    import pandas as pd

    if not pd.api.types.is_numeric_dtype(values) or values.nunique() <= 8:
        return None
    column = values.to_numpy(dtype=float, na_value=np.nan)
    return np.log10(np.where(column > 0, column, np.nan)) if colour in _LOGARITHMIC else column


def _ranges(places: Points) -> tuple[list[float], list[float]]:
    """Of both axes, with room for the discs at the edge."""
    if not len(places):
        return [-1.0, 1.0], [-1.0, 1.0]
    low, high = places.min(0), places.max(0)
    room = np.maximum(np.array([0.08, 0.1]) * (high - low), 1e-6)
    wide, tall = np.stack([low - room, high + room], 1).tolist()
    return wide, tall


def sketch(places: Points, frame: pd.DataFrame, colour: str | None, kept: Sequence[bool]) -> str:
    """The same map as an SVG picture, which a browser shows at once: for the second in which it still loads plotly.

    Points of one colour are one path on a grid of a thousand steps, so that 10,000 models are some 100 kB.
    """
    (left, right), (low, high) = _ranges(places)
    x = np.rint((places[:, 0] - left) / (right - left) * 1000).astype(int)
    y = np.rint((high - places[:, 1]) / (high - low) * 1000).astype(int)
    held = np.asarray(kept, dtype=bool)
    layers: list[tuple[NDArray[np.bool_], str, float]] = [(~held, style.OTHER, 0.15)]
    values = None if colour is None else frame[colour]
    column = None if values is None or colour is None else _shades(values, colour)
    if column is not None:
        known = held & np.isfinite(column)
        layers.append((held & ~known, style.OTHER, 0.5))
        bottom, top = (column[known].min(), column[known].max()) if known.any() else (0.0, 1.0)
        step = np.clip((np.nan_to_num(column) - bottom) / max(top - bottom, 1e-12) * 10, 0, 9).astype(int)
        layers += [(known & (step == i), shade, 0.9) for i, shade in enumerate(style.viridis(10))]
    else:
        classes, colours = style.colours_of([""] * len(frame) if values is None else values.tolist())
        of = np.asarray(classes, dtype=object)
        layers += [(held & (of == word), shade, 0.9) for word, shade in colours.items()]
    size = _size(len(frame))
    paths = []
    for which, shade, opacity in layers:
        spots = np.unique(np.stack([x[which], y[which]], 1), axis=0).tolist()
        if spots:
            drawn = "".join(f"M{a} {b}h0" for a, b in spots)
            paths.append(f'<path d="{drawn}" stroke="{shade}" opacity="{opacity}"/>')
    return (
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 1000 1000" preserveAspectRatio="none">'
        f'<style>path{{fill:none;stroke-width:{size}px;stroke-linecap:round;vector-effect:non-scaling-stroke}}</style>'
        f'{"".join(paths)}</svg>'
    )  # fmt: skip


__all__ = ["HEIGHT", "Points", "draw", "pca", "place", "scaled", "sketch"]
