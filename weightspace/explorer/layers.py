"""Figures of layers: distributions, spectra, norms of channels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from weightspace.explorer import style
from weightspace.explorer.anatomy import Channels, Layer

if TYPE_CHECKING:
    import plotly.graph_objects as go


def distribution(layer: Layer) -> go.Figure:
    """How the values of a tensor are distributed, with the normal curve of its mean and deviation."""
    import plotly.graph_objects as go

    made = style.figure(height=300, xaxis_title_text="value", yaxis_title_text="share of the values")
    if not len(layer.counts):
        return made
    share = layer.counts / max(layer.counts.sum(), 1)
    middles = (layer.edges[1:] + layer.edges[:-1]) / 2
    width = np.diff(layer.edges)
    made.add_trace(go.Bar(x=middles, y=share, width=width, marker={"color": style.CATEGORIES[0], "opacity": 0.75},
                          name="values"))  # fmt: skip
    if layer.std > 0:
        normal = np.exp(-0.5 * ((middles - layer.mean) / layer.std) ** 2) / (layer.std * (2 * np.pi) ** 0.5) * width
        made.add_trace(go.Scatter(x=middles, y=normal, mode="lines", line={"color": style.ACCENT, "width": 2},
                                  name="normal of the same mean and deviation"))  # fmt: skip
    return made


def spectrum(layers: Sequence[Layer]) -> go.Figure:
    """Singular values over the largest one, by their place over their number; several layers in one figure."""
    import plotly.graph_objects as go

    many = max((len(layer.values) for layer in layers), default=0) > 100
    made = style.figure(
        height=300, xaxis={"title": {"text": "number of the singular value"}, "type": "log" if many else "linear"},
        yaxis={"title": {"text": "singular value / largest"}, "rangemode": "tozero"},
    )  # fmt: skip
    for i, layer in enumerate(layers):
        if len(layer.values) and layer.values[0] > 0:
            made.add_trace(
                go.Scatter(
                    x=np.arange(1, len(layer.values) + 1), y=layer.values / layer.values[0], mode="lines+markers",
                    marker={"size": 4}, line={"color": style.CATEGORIES[i % len(style.CATEGORIES)]},
                    name=style.short(layer.name, 40),
                )
            )  # fmt: skip
    return made


def norms(channels: Channels) -> go.Figure:
    """Norm of what comes into each element of an axis, and of what goes out; dead and odd ones marked."""
    import plotly.graph_objects as go

    made = style.figure(height=300, xaxis_title_text="incoming norm", yaxis_title_text="outgoing norm")
    x, y = channels.into, channels.out
    labels = {"x": "incoming norm", "y": "outgoing norm"}
    if not np.isfinite(x).any() or not np.isfinite(y).any():
        values = x if np.isfinite(x).any() else y
        made.update_layout(xaxis_title_text="element", yaxis_title_text=labels["x" if values is x else "y"])
        x, y = np.arange(len(values), dtype=float), values
    odd = {i for i, _ in channels.odd()}
    numbers = np.arange(len(x))
    for words, which, colour in (
        ("usual", np.array([i not in odd for i in numbers]), style.CATEGORIES[0]),
        ("dead or odd", np.array([i in odd for i in numbers]), style.BAD),
    ):
        if which.any():
            kind = go.Scattergl if len(x) > 3000 else go.Scatter
            named = [f"element {i}" for i in numbers[which]]
            made.add_trace(kind(x=x[which], y=y[which], mode="markers", name=words, text=named,
                                marker={"color": colour, "size": 7, "opacity": 0.75},
                                hovertemplate="%{text}: %{x:.3g}, %{y:.3g}<extra></extra>"))  # fmt: skip
    return made


__all__ = ["distribution", "norms", "spectrum"]
