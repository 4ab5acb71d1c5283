"""Model: one network, its card, its graph down to the neurons, its layers and channels, and what is like it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import streamlit as st

from weightspace.explorer import layers, network, style, ui
from weightspace.explorer.anatomy import Anatomy, Channels, Structure
from weightspace.explorer.models import Shelf
from weightspace.explorer.neurons import MOST, SIDES, draw_axis
from weightspace.graph import ParameterGraph

VIEWS = ["Card", "Graph", "Wiring", "Layers", "Channels", "Neighbours"]
WORDS = {
    "proved": ("green", "proved", "shuffling neurons along this wiring was run and changed nothing"),
    "unverified": ("orange", "unverified", "a guess from names and shapes that no run has proved"),
    "failed": ("red", "not wired", "no wiring was found, or its proof failed"),
}


def card(shelf: Shelf, name: str) -> None:
    """What the index knows: shown at once, nothing is read."""
    found = shelf.card(name)
    colour, word, meaning = WORDS[str(found["wiring"])]
    one, two, three, four = st.columns(4)
    one.metric("Parameters", style.count(found["parameters"]), help=f"{found['parameters']:,}")
    two.metric("Tensors", f"{found['tensors']:,}", help=", ".join(found["dtypes"]))
    three.metric("Size", style.size(found["bytes"]))
    movable = found["movable"]
    four.metric("Movable", "–" if movable is None else f"{movable:.1%}",
                help="Share of the parameters that lie on an axis which may be permuted")  # fmt: skip
    st.markdown(f"**{ui.plain(found['architecture'])}** · wiring :{colour}-badge[{word}] {meaning}")
    reading, record = found["reading"], found["record"]
    facts = {"format": found["format"], "recognised by": found["recognised"], "proof": found["proof"],
             "content hash": found["sha256"]}  # fmt: skip
    if reading.get("accuracy") is not None:
        facts["predicted test accuracy"] = (
            f"{reading['accuracy']:.1%} ({reading['accuracy_low']:.1%} to {reading['accuracy_high']:.1%}), from the "
            "weights alone"
        )
    elif reading.get("reason"):
        facts["pretrained metanets"] = str(reading["reason"])
    facts |= {key.replace("_", " "): value for key, value in record.items() if not isinstance(value, dict | list)}
    left, right = st.columns([3, 2], gap="large")
    with left:
        shown = pd.DataFrame({"fact": list(facts), "value": [_words(v) for v in facts.values()]})
        shown = shown[shown["value"] != ""]
        # Few facts are shown whole, however long they are.
        st.table(shown.replace({found["sha256"]: f"{found['sha256'][:16]}…"}).map(ui.plain).set_index("fact"))
        ui.download("CSV", lambda: shown.to_csv(index=False), f"{name}-card.csv", "text/csv", key="card")
    with right:
        oddities = [*found["findings"], *found["notes"]]
        st.subheader("Worth knowing", anchor=False)
        if not found["findings"]:
            st.success("Nothing odd was found in the values.", icon=":material/check:")
        for finding in oddities[:12]:
            st.markdown(f"- {ui.plain(finding)}")
        if len(oddities) > 12:
            st.caption(f"and {len(oddities) - 12} more, in the downloaded table")


def _words(value: Any) -> str:
    if value is None or value == "":
        return ""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


STRUCTURE, EXAMINE = (f"weightspace.explorer.anatomy:{name}" for name in ("structure", "examine"))


def picked() -> None:
    points = st.session_state["graph"]["selection"]["points"]
    keys = [p.get("customdata") for p in points]
    found = [str(k[0] if isinstance(k, list) else k) for k in keys if k]
    if found:
        st.session_state["axis"] = found[0]


def graph(shelf: Shelf, name: str, found: Structure) -> None:
    if found.graph is None:
        st.info(f"There is no graph of a network that is not wired: {ui.plain(found.why)}", icon=":material/info:")
        return
    structure = ParameterGraph.from_description(found.graph)
    order = [row[0] for row in found.rows]
    whole = network.arrange(structure, order)
    left, right = st.columns(2, vertical_alignment="bottom")
    parts = [*whole.parts, *(["all"] if len(whole.parts) > 1 else [])]
    opened = left.multiselect(
        "Open repeated parts", parts, key="open", bind="query-params", select_all=False,
        format_func=lambda part: part if part == "all" else f"{part}: {whole.parts[part]} times",
        disabled=not whole.parts, placeholder="none is repeated" if not whole.parts else "all collapsed",
        help="Parts of equal shape that hang on the same axes are drawn once, as squares.",
    )
    drawing = network.arrange(structure, order, opened)
    axes = list(drawing.nodes)
    axis = right.selectbox("Open an axis to its neurons", axes, index=None, key="axis", bind="query-params",
                           placeholder="click a disc, or type its name")  # fmt: skip
    told = f"{len(drawing.nodes)} axes and {sum(1 for e in drawing.edges if e.weights)} bundles of weights"
    told += f" for {style.count(structure.num_nodes)} neurons and {style.count(structure.num_parameters)} parameters"
    if drawing.hidden:
        told += f"; {drawing.hidden} axes that take no part in the function are left out"
    ui.chart(network.draw(drawing, axis, ui.dark()), f"{name}-graph",
             f"{told}. Discs are axes, lines the tensors between them; dotted lines tie heads or pixels to what they "
             "are part of.", key="graph", on_select=picked, selection_mode="points")  # fmt: skip
    if axis is not None:
        ends = [sum(b.dst == axis for b in structure.blocks), sum(b.src == axis for b in structure.blocks)]
        neurons(shelf, name, axis, structure.cells[axis].size, max(ends))


def neurons(shelf: Shelf, name: str, axis: str, size: int, bundles_at: int) -> None:
    st.subheader(f"Neurons of {ui.plain(axis)}", anchor=False)
    first = 0
    if size > MOST:
        first = int(st.slider("First element", 0, size - 1, key="first", step=MOST, bind="query-params"))
    bundles = ui.work(f"Reading the weights at {axis}", "weightspace.explorer.neurons:open_axis", shelf.address(name),
                      axis, first, of=[shelf.content(name), axis, first], label="axis")  # fmt: skip
    if bundles is None:
        return
    if not bundles:
        st.info("No tensor connects this axis to another one.")
        return
    ui.chart(draw_axis(axis, bundles, ui.dark()), f"{name}-{axis}",
             f"Elements {first} to {min(first + MOST, size) - 1} of {size:,}, and the strongest weights into and out "
             "of them: blue above zero, red below; kernels by their strongest entry."
             + (f" Of up to {bundles_at} bundles on a side the first {SIDES}." if bundles_at > SIDES
                else ""))  # fmt: skip


def wiring(shelf: Shelf, name: str, found: Structure) -> None:
    if found.why:
        st.info(ui.plain(found.why), icon=":material/info:")
    known = shelf.card(name)
    proof = known["proof"]
    if proof:
        st.success(f"Proof: {ui.plain(proof)}.", icon=":material/verified:")
    rows = pd.DataFrame(found.rows, columns=["tensor", "role", "shape", "axes"])
    st.caption("Tensors that share an axis are wired together.")
    ui.table(rows, f"{name}-wiring", f"The wiring of {name}: every tensor with its axes",
             config={"shape": st.column_config.TextColumn(width=140),
                     "axes": st.column_config.TextColumn(width="large")})  # fmt: skip
    axes = pd.DataFrame(known["axes"])
    if len(axes):
        st.subheader("Axes", anchor=False)
        axes = axes[(axes["size"] > 1) & (axes["detail"] != "kernel positions")]
        axes = axes.rename(columns={"detail": "made of / why pinned"})
        ui.table(axes, f"{name}-axes", f"The axes of {name}, with what pins them")


def layer_views(name: str, found: Anatomy) -> None:
    table = found.layer_table()
    small: dict[str, Any] = {c: st.column_config.NumberColumn(format="%.3g") for c in table.columns[4:11]}
    small["shape"] = st.column_config.TextColumn(width=140)
    small["zeros"] = st.column_config.NumberColumn(format="percent")
    small["elements"] = st.column_config.NumberColumn(format="localized")
    ui.table(table, f"{name}-layers", f"Statistics of every tensor of {name}", height=300, config=small)
    matrices = [x.name for x in found.layers if len(x.values)]
    begin = next((i for i, x in enumerate(found.layers) if len(x.values)), 0)
    chosen = st.selectbox("Layer", [x.name for x in found.layers], index=begin, key="layer", bind="query-params")
    layer = next(x for x in found.layers if x.name == chosen)
    left, right = st.columns(2, gap="medium")
    with left:
        ui.chart(layers.distribution(layer), f"{name}-{chosen}-values",
                 f"Values of {chosen}: mean {layer.mean:.3g}, deviation {layer.std:.3g}, {layer.low:.3g} to "
                 f"{layer.high:.3g}.", data=pd.DataFrame({"from": layer.edges[:-1], "to": layer.edges[1:],
                                                           "count": layer.counts}))  # fmt: skip
    with right:
        if chosen not in matrices:
            st.caption(f"{ui.plain(chosen)} is no matrix of weights, so it has no singular values.")
            return
        all_ = "" if layer.exact else " (the leading ones, estimated)"
        ui.chart(layers.spectrum([layer]), f"{name}-{chosen}-spectrum",
                 f"Singular values of {chosen}{all_}: largest {layer.values[0]:.3g}, stable rank {layer.rank:.1f} of "
                 f"{len(layer.values)}.", data=pd.DataFrame({"singular value": layer.values}))  # fmt: skip


def channel_views(name: str, found: Anatomy) -> None:
    if not found.channels:
        st.info("There is no axis whose channels could be compared.", icon=":material/info:")
        return
    odd = found.odd_table()
    if len(odd):
        st.warning(f"{len(odd)} channels are dead or odd.", icon=":material/warning:")
        ui.table(odd, f"{name}-odd", f"Dead or odd channels of {name}",
                 config={"why": st.column_config.TextColumn(width="large")})  # fmt: skip
    else:
        st.success("No channel is dead, and none is far from the others of its axis.", icon=":material/check:")
    chosen = st.selectbox("Axis", [c.axis for c in found.channels], key="of", bind="query-params")
    one = next(c for c in found.channels if c.axis == chosen)
    ui.chart(layers.norms(one), f"{name}-{chosen}-norms",
             f"The {len(one.into):,} elements of {chosen}: {_norms_of(one)}.",
             data=pd.DataFrame({"incoming": one.into, "outgoing": one.out}))  # fmt: skip


def _norms_of(channels: Channels) -> str:
    into, out = bool(np.isfinite(channels.into).any()), bool(np.isfinite(channels.out).any())
    if into and out:
        return "norm of the weights that lead to each, and of those that lead on"
    return f"norm of the weights that lead {'to each' if into else 'on from each'}"


def neighbours(shelf: Shelf, name: str) -> None:
    if shelf.zoo is None:
        st.info("Open a zoo to see which of its models are like this one.")
        return
    found = ui.work("Looking for neighbours", "weightspace.explorer.searching:similar", str(shelf.zoo.folder),
                    shelf.address(name), 12, "auto", of=[shelf.zoo.stamp, shelf.content(name), 12, "auto"])  # fmt: skip
    if found is None:
        return
    ui.table(found, f"{name}-neighbours", f"The models nearest to {name}, with distances",
             config={"distance": st.column_config.NumberColumn(format="%.4f"),
                     "parameters": st.column_config.NumberColumn(format="localized")})  # fmt: skip
    st.caption("Distance 0 is the same network up to the order of its neurons. Distances by different measures do not "
               "compare.")  # fmt: skip
    if len(found):
        nearest = str(found.iloc[0]["model"])
        ui.link("compare", f"Compare with {nearest}", a=name, b=nearest)


def page() -> None:
    shelf = ui.shelf()
    ui.title("model", shelf)
    if ui.first_steps(shelf):
        return
    name = ui.choose("Model", shelf, "model")
    view = st.segmented_control("View", VIEWS, default="Card", key="view", bind="query-params", required=True,
                                   label_visibility="collapsed")  # fmt: skip
    if name is None:
        return
    if view == "Card":
        card(shelf, name)
        with st.container(horizontal=True):
            ui.link("search", "What is like it?", query=name)
            ui.link("compare", "Compare it", a=name)
            ui.link("backdoor", "Scan it", model=name)
        return
    if view == "Neighbours":
        neighbours(shelf, name)
        return
    of = [shelf.content(name)]
    if view in ("Graph", "Wiring"):
        # Neither reads weights, so neither waits for them.
        found = ui.work(f"Wiring {name}", STRUCTURE, shelf.address(name), of=of)
        if found is not None:
            graph(shelf, name, found) if view == "Graph" else wiring(shelf, name, found)
        return
    read = ui.work(f"Reading {name}", EXAMINE, shelf.address(name), of=of)
    if read is not None:
        layer_views(name, read) if view == "Layers" else channel_views(name, read)


page()
