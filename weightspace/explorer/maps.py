"""A zoo as a map: its vectors in the plane, and the figure."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
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
_MANY = 1500
"""Points above which a map is drawn by WebGL."""


def has_umap() -> bool:
    """Whether the package umap-learn is there."""
    return find_spec("umap") is not None


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
        inside = " inside the encoder's range" if kind == "encoder" else ""
        raise ZooError(f"{len(names)} models{inside} make no map; three or more were expected")
    x = scaled(found) if kind == "descriptor" else np.asarray(found, dtype=np.float64)
    what = "training-free descriptors" if kind == "descriptor" else "vectors of the pretrained encoder"
    if method == "UMAP":
        try:
            import umap
        except ImportError as error:
            raise MissingExtraError("umap-learn", "app", "a UMAP map") from error
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

    made = style.figure(height=470, dragmode="pan", xaxis={"visible": False}, yaxis={"visible": False})
    many = len(names) > _MANY
    scatter = go.Scattergl if many else go.Scatter
    # Radii that stay apart: few models are drawn large.
    size = 9 if len(names) < 200 else 7 if len(names) < _MANY else 5
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
    numbers = pd.to_numeric(values, errors="coerce") if colour is not None else values
    if colour is not None and pd.api.types.is_numeric_dtype(values) and values.nunique() > 8:
        column = numbers.to_numpy(dtype=float)
        known = held & np.isfinite(column)
        logarithmic = colour in ("parameters", "bytes") and bool((column[known] > 0).all())
        shade = np.log10(column[known]) if logarithmic else column[known]
        told: dict[str, Any] = {"text": colour.replace("_", " "), "side": "right"}
        bar: dict[str, Any] = {"title": told, "thickness": 10, "len": 0.8}
        if logarithmic and len(shade):
            ticks = np.arange(np.floor(shade.min()), np.ceil(shade.max()) + 1)
            bar |= {"tickvals": ticks, "ticktext": [style.count(10**t) for t in ticks]}
        if (held & ~known).any():
            add(held & ~known, "not known", {"color": style.OTHER, "opacity": 0.5})
        add(known, colour, {"color": shade, "colorscale": style.SEQUENTIAL, "colorbar": bar}, showlegend=False)
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


__all__ = ["Points", "draw", "has_umap", "pca", "place", "scaled"]
