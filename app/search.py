"""Search: which models are like this one, which know this task, which compute alike."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import streamlit as st

from weightspace.errors import WeightspaceError
from weightspace.explorer import searching, ui, uploads
from weightspace.explorer.models import UPLOAD, Shelf, index

KINDS = ["By a model", "By a task", "By architecture"]
SIMILAR, ARCHITECTURE, SET, FILE = (
    f"weightspace.explorer.searching:{name}" for name in ("similar", "architecture", "task_of_set", "task_of_file")
)
MEASURES = {
    "auto": "best available", "all": "all three", "function": "function", "encoder": "pretrained encoder",
    "descriptor": "training-free descriptor", "both": "encoder and descriptor",
}  # fmt: skip


def example(shelf: Shelf) -> str | None:
    """The model to ask about: of the zoo, or uploaded here."""
    left, right = st.columns([3, 2], gap="medium")
    with right:
        file = st.file_uploader("or upload one", key="example", help=f"At most {uploads.LARGEST} MB; never executed")
        if file is not None:
            folder = ui.upload_folder(make=True)
            assert folder is not None
            ui.keep_url()
            try:
                kept = uploads.keep(folder, file.name, file)
            except WeightspaceError as error:
                st.error(ui.plain(error), icon=":material/block:")
                return None
            of = [folder, kept.name, kept.stat().st_size]
            report = ui.work("Reading the upload", f"{index.__module__}:index", str(folder), 1, of=of)
            if report is None:
                return None
            refused = dict([*report.failures, *report.ignored])
            if kept.name in refused:
                why = refused[kept.name].replace(f"{folder}/", "")
                st.error(ui.plain(f"It cannot be opened: {why}"), icon=":material/block:")
                return None
            names = [n for n in ui.shelf().uploaded if n.removeprefix(UPLOAD).startswith(kept.name)]
            st.success(f"Asking about {ui.plain(kept.name)}", icon=":material/check:")
            return names[0] if names else None
    with left:
        return ui.choose("A model", shelf, "query")


def by_model(shelf: Shelf, folder: str) -> None:
    name = example(shelf)
    if name is None:
        return
    shelf = ui.shelf()
    assert shelf.zoo is not None
    by = st.segmented_control("Distance of", list(MEASURES), default="auto", key="by", bind="query-params",
                                format_func=MEASURES.get, required=True)  # fmt: skip
    k = int(st.slider("How many", 5, 50, 10, 5, key="k", bind="query-params"))
    found = ui.work("Looking for neighbours", SIMILAR, folder, shelf.address(name), k, by,
                    of=[shelf.zoo.stamp, shelf.content(name), k, by])  # fmt: skip
    if found is None:
        return
    if len(found) and found["distance"].iloc[0] < 1e-6:
        st.success(f"{ui.plain(found['model'].iloc[0])} is the same network, perhaps in another order or format.",
                   icon=":material/content_copy:")  # fmt: skip
    ui.table(found, "neighbours", f"The models nearest to {name}",
             config={"distance": st.column_config.NumberColumn(format="%.4f"),
                     "parameters": st.column_config.NumberColumn(format="localized")})  # fmt: skip
    st.caption("0 is the same network up to the order of its neurons; by function, any that computes the same. Between "
               "networks trained independently the encoder's distance is about 1; functions with nothing in common "
               "are 1.4 apart. Distances of different measures do not compare.")  # fmt: skip
    if len(found):
        nearest = str(found["model"].iloc[0])
        with st.container(horizontal=True):
            ui.link("compare", f"Compare with {nearest}", a=nearest, b=name)
            ui.link("zoo", "Show them in the zoo", sel=[str(m) for m in found["model"]])


def by_task(shelf: Shelf, folder: str) -> None:
    assert shelf.zoo is not None
    st.write("Which model knows a task? Every model that takes such rows is run on a few of them, and what its "
             "outputs tell of the labels decides.")  # fmt: skip
    source = st.segmented_control("Rows", ["Of a data set", "Of a file"], default="Of a data set", key="rows",
                                  bind="query-params", required=True)  # fmt: skip
    if source == "Of a data set":
        left, right = st.columns(2)
        name = left.selectbox("Data set", searching.SETS, key="set", bind="query-params",
                              help="digits comes along; the others are read from WEIGHTSPACE_DATA")  # fmt: skip
        classes = right.multiselect("Only these classes", list(range(10)), key="classes", bind="query-params",
                                    placeholder="all")  # fmt: skip
        of = [shelf.zoo.stamp, name, sorted(classes)]
        if ui.begun(SET, of) is None and not st.button("Search", type="primary", icon=":material/search:"):
            return
        answer(ui.work("Asking every model", SET, folder, name, sorted(classes), 200, 20, of=of),
               "score is the share of the labels' information that a model's outputs hold")  # fmt: skip
        return
    file = st.file_uploader("Rows and labels", key="task",
                            help="safetensors, npz or pt: a tensor of inputs, and one called labels")  # fmt: skip
    if file is None:
        return
    place = ui.here().private / "data"
    place.mkdir(exist_ok=True, mode=0o700)
    kept = uploads.keep(place, file.name, file)
    of = [shelf.zoo.stamp, str(kept), kept.stat().st_mtime_ns]
    answer(ui.work("Asking every model", FILE, folder, str(kept), 20, of=of),
           "score is what a model's outputs tell of the labels")  # fmt: skip


def by_architecture(shelf: Shelf, folder: str) -> None:
    name = example(shelf)
    if name is None:
        return
    shelf = ui.shelf()
    assert shelf.zoo is not None
    of = [shelf.zoo.stamp, shelf.content(name)]
    found = ui.work("Comparing architectures", ARCHITECTURE, folder, shelf.address(name), 20, of=of)
    if found is None:
        return
    answer({**found, "asked": found["asked"].replace(shelf.address(name), name)},
           "score 1 is the same graph of computation, whatever the widths")  # fmt: skip


def answer(found: Mapping[str, Any] | None, meaning: str) -> None:
    """What a search found, why, and what it could not ask."""
    if found is None:
        return
    table = found["table"]
    st.caption(f"{ui.plain(found['asked'])}: {len(table)} found in {found['seconds']:.1f} s; {meaning}.")
    if len(table):
        ui.table(table, "found", "The models that were found, best first, each with the reason",
                 row_height=68, config={"score": st.column_config.NumberColumn(format="%.3f"),
                     "parameters": st.column_config.NumberColumn(format="localized"),
                         "why": st.column_config.TextColumn(width="large")})  # fmt: skip
        best = str(table["model"].iloc[0])
        with st.container(horizontal=True):
            ui.link("model", f"Look at {best}", model=best)
            ui.link("zoo", "Show them in the zoo", sel=[str(m) for m in table["model"]])
    else:
        st.info("No model of this zoo could be asked; the reasons are below.")
    if found["left_out"]:
        with st.expander(f"{len(found['left_out'])} models could not be asked", icon=":material/block:",
                         expanded=not len(table)):  # fmt: skip
            reasons: dict[str, list[str]] = {}
            for model, why in found["left_out"].items():
                reasons.setdefault(why, []).append(model)
            for why, names in list(reasons.items())[:12]:
                st.caption(ui.plain(f"{names[0]}{f' and {len(names) - 1} more' if len(names) > 1 else ''}: {why}"))


def page() -> None:
    shelf = ui.shelf()
    ui.title("search", shelf)
    if ui.first_steps(shelf):
        return
    ui.need(shelf.zoo is not None, "Open a folder on the page Zoo: that is where models are looked for.")
    assert shelf.zoo is not None
    kind = st.segmented_control("Search", KINDS, default=KINDS[0], key="search", bind="query-params", required=True,
                                label_visibility="collapsed")  # fmt: skip
    ask = {"By a model": by_model, "By a task": by_task, "By architecture": by_architecture}[kind or KINDS[0]]
    with ui.said():
        ask(shelf, str(shelf.zoo.folder))


page()
