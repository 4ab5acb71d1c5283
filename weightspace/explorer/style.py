"""The explorer's colours and the look of its figures: one place, so that pages and notebooks agree."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import plotly.graph_objects as go

CATEGORIES = (
    "#4C78A8", "#E0883A", "#5B9F57", "#C85C5C", "#9277B5", "#3E9C9C", "#A67B5B", "#CF7FA8", "#B5A13A", "#6C8EBF",
    "#7F8A94",
)  # fmt: skip
"""Of middling lightness, so that they hold on a light and on a dark ground, and apart for the colour-blind in turn."""
OTHER = "#9AA3AD"
ACCENT = "#E0883A"
"""What is selected."""
KINDS: Mapping[str, str] = {"free": "#E0A030", "structured": "#B9A06A", "pinned": "#8A97A6"}
"""Kinds of axes, as in the README's figure: orange may be permuted, grey is pinned."""
GOOD, FAIR, BAD = "#5B9F57", "#D9A23B", "#C85C5C"
NEGATIVE, POSITIVE = "#C85C5C", "#3F74B3"
SEQUENTIAL = "Viridis"


def diverging(dark: bool) -> list[tuple[float, str]]:
    """Red to blue through the page's own ground, so that zero is nothing."""
    return [(0.0, NEGATIVE), (0.5, "#1B1F24" if dark else "#FFFFFF"), (1.0, POSITIVE)]


def fading(dark: bool) -> list[tuple[float, str]]:
    """From the page's own ground to blue."""
    return [(0.0, "#1B1F24" if dark else "#F4F6F8"), (1.0, "#7FB0E6" if dark else "#1F4E86")]


def viridis(steps: int) -> list[str]:
    """Colours of ``SEQUENTIAL``, from its lowest to its highest."""
    from plotly.colors import sample_colorscale

    found: list[str] = sample_colorscale(SEQUENTIAL, [(i + 0.5) / steps for i in range(steps)])
    return found


def ink(dark: bool) -> str:
    """Colour of words and outlines in a figure."""
    return "#E6E9ED" if dark else "#24292F"


def figure(height: int = 380, **layout: Any) -> go.Figure:
    """An empty figure in the house style: no ground of its own, small margins."""
    import plotly.graph_objects as go

    made = go.Figure()
    made.update_layout(
        height=height, margin={"l": 8, "r": 8, "t": 28, "b": 8}, paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)", hoverlabel={"font": {"size": 12}}, colorway=list(CATEGORIES),
        modebar={"bgcolor": "rgba(0,0,0,0)", "color": OTHER, "activecolor": CATEGORIES[0]},
        legend={"orientation": "h", "yanchor": "bottom", "y": 1.0, "x": 0, "title": {"text": ""}},
    )  # fmt: skip
    made.update_layout(**layout)
    return made


def colours_of(values: Sequence[object], most: int = 10) -> tuple[list[str], dict[str, str]]:
    """A class per value and a colour per class: the ``most`` frequent ones, the rest together."""
    from collections import Counter

    words = ["not known" if v is None or v != v else str(v) for v in values]
    often = [word for word, _ in Counter(words).most_common()]
    kept = often[:most] if len(often) > most + 1 else often
    colours = {word: CATEGORIES[i % len(CATEGORIES)] for i, word in enumerate(w for w in kept if w != "not known")}
    if "not known" in kept:
        colours["not known"] = OTHER
    if len(kept) < len(often):
        colours["others"] = OTHER
    return [word if word in colours else "others" for word in words], colours


def short(text: str, most: int = 28) -> str:
    """A long name with its middle left out."""
    return text if len(text) <= most else f"{text[: most // 2]}…{text[-(most - most // 2 - 1) :]}"


def count(number: float) -> str:
    """A number as people write it: 4,970 or 1.3 B."""
    for unit, size in (("T", 1e12), ("B", 1e9), ("M", 1e6)):
        if abs(number) >= size:
            return f"{number / size:.3g} {unit}"
    return f"{number:,.0f}"


def size(number: float) -> str:
    """Bytes as people write them."""
    for unit, scale in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if number >= scale:
            return f"{number / scale:.3g} {unit}"
    return f"{number:.0f} bytes"
