"""Lineage: the forest of a zoo from its weights, with confidence, and where files say otherwise."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import streamlit as st

from weightspace.errors import WeightspaceError
from weightspace.explorer import descent, tables, ui
from weightspace.explorer.models import opened
from weightspace.zoo.listing import Listing

TRACE = "weightspace.explorer.descent:trace"
MANY = 400


def picked() -> None:
    points = st.session_state["forest"]["selection"]["points"]
    keys = [p.get("customdata") for p in points]
    found = [str(k[0] if isinstance(k, list) else k) for k in keys if k]
    if found:
        st.session_state["model"] = found[0]


def facts(found: Mapping[str, Any], zoo: Listing) -> None:
    families = [f for f in found["families"] if len(f) > 1]
    merges = len({e["child"] for e in found["edges"] if e["kind"] == "merge"})
    one, two, three, four = st.columns(4)
    one.metric("Families", len(families))
    two.metric("Descents found", len(found["edges"]), help=f"{merges} of the children are merges of several parents")
    three.metric("Without relatives", len(found["strangers"]))
    four.metric("Records disagree", len(found["disagreements"]),
                help="What a file says of its parents is not what its weights say")  # fmt: skip
    if found["disagreements"]:
        with st.expander(f"{len(found['disagreements'])} disagreements", icon=":material/report:", expanded=True):
            for line in found["disagreements"][:30]:
                st.markdown(f"- {ui.plain(line)}")


def details(found: Mapping[str, Any], name: str) -> None:
    """One model: its parents, its children, where to go."""
    st.subheader(ui.plain(name), anchor=False)
    above = [e for e in found["edges"] if e["child"] == name]
    below = [e for e in found["edges"] if e["parent"] == name]
    for edge in above:
        share = "" if edge["share"] > 0.999 else f", {edge['share']:.0%} of it"
        st.markdown(f"From **{ui.plain(edge['parent'])}**{share}: {ui.plain(edge['detail'])}, sure "
                    f"{edge['confidence']:.0%}, direction "
                    f"{descent.direction(edge)}. {ui.plain(edge['why'])}")  # fmt: skip
    if not above:
        st.markdown("No parent of it is in this zoo.")
    if below:
        st.markdown(f"{len(below)} children: " + ", ".join(ui.plain(e["child"]) for e in below[:12])
                    + (f" and {len(below) - 12} more" if len(below) > 12 else ""))  # fmt: skip
    with st.container(horizontal=True):
        ui.link("model", "Look at it", model=name)
        if above:
            ui.link("compare", "Compare with its parent", a=str(above[0]["parent"]), b=name)
        if len(below) >= 2:
            ui.link("merge", "Score a merge of its first two children",
                    models=[str(below[0]["child"]), str(below[1]["child"])])  # fmt: skip


def show(found: Mapping[str, Any], zoo: Listing) -> None:
    facts(found, zoo)
    if not found["edges"]:
        st.info("None of these models descends from another one here, as far as their weights tell.")
    related = sorted(descent.places(found))
    if related:
        asked = st.query_params.get("model")
        if asked and asked not in related and asked in zoo.frame.index:
            st.caption(f"{ui.plain(asked)} has no relative here.")
        name = st.selectbox("Model", related, index=None, key="model", bind="query-params",
                            placeholder="click a dot, or type a part of a name")  # fmt: skip
        chosen = [] if name is None else [name]
        ui.chart(descent.draw(found, chosen, ui.dark()), f"{zoo.folder.name}-lineage",
                 f"{len(related)} related models, parents left of their children. Lines: kind of descent by colour, "
                 "fainter where less sure, dotted where the direction is not, red where the file's record says "
                 "otherwise.",
                 key="forest", on_select=picked, selection_mode="points", data=descent.edge_table(found))  # fmt: skip
        if name is not None:
            details(found, str(name))
    with st.expander("All descents as a table", icon=":material/table:"):
        percent = st.column_config.NumberColumn(format="percent")
        ui.table(descent.edge_table(found), "lineage", "A row per edge from a parent to a child",
                 config={**dict.fromkeys(("share", "confidence", "direction"), percent),
                         "distance": st.column_config.NumberColumn(format="%.3f")})  # fmt: skip
        ui.download("Tree (text)", str(found["tree"]), "lineage.txt", "text/plain", key="tree")
    for note in found["notes"]:
        st.caption(f":material/info: {ui.plain(note)}")
    if found["left_out"]:
        with st.expander(f"{len(found['left_out'])} models could not be compared", icon=":material/block:"):
            for model, why in list(found["left_out"].items())[:50]:
                st.caption(ui.plain(f"{model}: {why}"))


def page() -> None:
    shelf = ui.shelf()
    ui.title("lineage", shelf)
    if ui.first_steps(shelf):
        return
    ui.need(shelf.zoo is not None, "Open a folder on the page Zoo: lineage is told among the models of a zoo.")
    assert shelf.zoo is not None
    zoo, searched = opened(shelf.zoo.folder)
    text = st.text_input("Only these models", key="among", bind="query-params", placeholder="all of them",
                         help=tables.HELP)  # fmt: skip
    try:
        kept = tables.matching(zoo.frame, text or "", searched)
    except WeightspaceError as error:
        st.error(ui.plain(error), icon=":material/filter_alt_off:")
        return
    names = [str(n) for n in zoo.frame.index[kept]]
    ui.need(len(names) >= 2, f"{len(names)} models match; a lineage needs at least two.")
    some = None if len(names) == len(zoo.frame) else names
    of = [zoo.folder, zoo.stamp, some]
    if (len(names) > MANY and ui.begun(TRACE, of) is None
            and not st.button(f"Trace the lineage of {len(names):,} models", type="primary")):  # fmt: skip
        st.caption("Every model is read once and compared with those of its architecture; this takes a while.")
        return
    found = ui.work(f"Tracing the lineage of {len(names):,} models", TRACE, str(zoo.folder), some, of=of)
    if found is not None:
        show(found, zoo)


page()
