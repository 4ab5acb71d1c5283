"""Zoo: all models as a table and as a map, one selection in both; opening folders, uploading checkpoints."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import streamlit as st

from weightspace.errors import WeightspaceError
from weightspace.explorer import maps, models, tables, ui, uploads
from weightspace.paths import cache_dir
from weightspace.zoo.listing import Listing, Vectors, commonest

STARTER = Path("models") / "starter"
KINDS: tuple[Vectors, ...] = ("descriptor", "encoder", "function")
MAPS = {f"{kind}, {method}": (kind, method) for method in ("PCA", "UMAP") for kind in KINDS}
PAUSE = 0.3
"""Seconds that the table has to itself on the first visit, before and after the rest of the page but the map."""


def bring_in(open_now: bool) -> None:
    """Three ways to get models in front of one's eyes."""
    with st.expander("Open a folder, upload checkpoints, or train the starter zoo", icon=":material/add:",
                     expanded=open_now):  # fmt: skip
        opening, uploading, training = st.tabs(["Open a folder", "Upload", "Starter zoo"])
        with opening, ui.said():
            open_folder()
        with uploading, ui.said():
            upload()
        with training, ui.said():
            starter()


def open_folder() -> None:
    with st.form("open", border=False):
        path = st.text_input("Folder with model files, in any format", placeholder="/path/to/models",
                             help="Files are recognised by content, and nothing in them is executed.")  # fmt: skip
        if st.form_submit_button("Open", icon=":material/folder_open:"):
            chosen = Path(path.strip()).expanduser()
            why = "type the path of a folder" if not path.strip() else ui.may_open(chosen.resolve())
            if why:
                st.error(ui.plain(why[:1].upper() + why[1:] + "."), icon=":material/error:")
            else:
                ui.open_folder(chosen.resolve())
                st.rerun()


def upload() -> None:
    files = st.file_uploader(
        "Checkpoints: safetensors, PyTorch, ONNX, Keras, GGUF, NumPy, Flax", accept_multiple_files=True, key="files",
        help=f"At most {uploads.LARGEST} MB each. They are kept in a private temporary folder until the explorer ends, "
        "and never executed.",
    )  # fmt: skip
    if not files:
        return
    folder = ui.upload_folder(make=True)
    assert folder is not None
    ui.keep_url()
    refused = []
    for file in files:
        try:
            uploads.keep(folder, file.name, file)
        except WeightspaceError as error:
            refused.append((file.name, str(error)))
    stamp = sorted((f.name, f.stat().st_size) for f in folder.iterdir() if f.is_file())
    report = ui.work("Reading the uploads", "weightspace.explorer.models:index", str(folder), 1, of=[folder, stamp])
    if report is not None:
        refused += [(file, why.replace(f"{folder}/", "")) for file, why in (*report.failures, *report.ignored)]
        if report.models:
            st.success(f"{report.models} of your uploads can be chosen on every page.", icon=":material/check:")
            first = ui.shelf().uploaded[0]
            ui.link("model", f"Look at {first.removeprefix(models.UPLOAD)}", model=first)
    if refused:
        st.error(f"{len(refused)} of these files cannot be opened:", icon=":material/block:")
        reasons(refused, "refused")


def reasons(rows: Sequence[tuple[str, str]], name: str) -> None:
    """Files that cannot be read, each with the reason."""
    frame = pd.DataFrame(list(rows), columns=["file", "reason"])
    if len(frame) > 30:
        ui.table(frame, name, "Files that cannot be read, each with the reason", row_height=68,
                 config={"file": st.column_config.TextColumn(width="medium")})  # fmt: skip
        return
    # Few reasons are shown whole, however long they are.
    st.table(frame.map(ui.plain).set_index("file"))
    ui.download("CSV", lambda: frame.to_csv(index=False), f"{name}.csv", "text/csv", key=f"reasons-{name}")


def starter() -> None:
    target = (STARTER if Path().resolve().is_dir() and _writable(Path()) else cache_dir() / "starter").resolve()
    st.write("30 small image classifiers: independent seeds, children fine-tuned on half of the classes, shuffled "
             "copies.")  # fmt: skip
    if target.is_dir() and models.is_indexed(target):
        st.caption(f"It is there already: {target}")
        if st.button("Open the starter zoo", icon=":material/folder_open:"):
            ui.open_folder(target)
            st.rerun()
        return
    st.caption(f"Trained on this machine in about a minute, into {target}")
    started = ui.begun("weightspace.explorer.models:build_starter", [target]) is not None
    if started or st.button("Train the starter zoo", icon=":material/model_training:", type="primary"):
        train = "weightspace.explorer.models:build_starter"
        if ui.work("Training the starter zoo", train, str(target), of=[target]) is not None:
            ui.open_folder(target)
            st.rerun()


def _writable(path: Path) -> bool:
    import os

    return os.access(path, os.W_OK)


def index_first(folder: Path) -> None:
    """A folder that has no index yet, or an old one: index it, with progress, and say what could not be read."""
    st.subheader(ui.plain(folder.name), anchor=False)
    st.write(f"{ui.plain(folder)} has no index yet. Indexing opens every file once, proves how its tensors are wired, "
             "and keeps the result; unchanged files are skipped the next time.")  # fmt: skip
    of = [folder, "first"]
    started = ui.begun("weightspace.explorer.models:index", of) is not None
    if not (started or st.button("Index this folder", type="primary", icon=":material/play_arrow:")):
        return
    if ui.work(f"Indexing {folder.name}", "weightspace.explorer.models:index", str(folder), of=of) is not None:
        st.rerun()


def refresh(zoo: Listing) -> None:
    """Bring the index up to date."""
    of = [zoo.folder, "again", zoo.stamp]
    started = ui.begun("weightspace.explorer.models:index", of)
    pressed = st.button("Update the index", icon=":material/refresh:", help="Look for new, changed and removed files")
    if pressed or (started is not None and not started.over):
        report = ui.work(f"Indexing {zoo.folder.name}", "weightspace.explorer.models:index", str(zoo.folder), of=of)
        if report is not None:
            st.toast(f"{report.described} files described, {report.unchanged} unchanged, {report.removed} removed")
            st.rerun()


def chosen_names(zoo: Listing) -> list[str]:
    """What is selected: kept for the session and in the URL."""
    if "selected" not in st.session_state:
        st.session_state["selected"] = st.query_params.get_all("sel")
    kept = [name for name in st.session_state["selected"] if name in zoo.frame.index]
    st.session_state["selected"] = kept
    if kept != st.query_params.get_all("sel"):
        if kept and len(kept) <= 40:
            st.query_params["sel"] = kept
        else:
            st.query_params.pop("sel", None)
    return kept


def from_table(names: list[str]) -> None:
    rows = st.session_state["table"]["selection"]["rows"]
    visible = set(names)
    hidden = [name for name in st.session_state.get("selected", []) if name not in visible]
    st.session_state["selected"] = [*hidden, *(names[row] for row in rows if row < len(names))]


def from_map() -> None:
    state: Any = st.session_state["map"]
    points = state["selection"]["points"]
    found = [p.get("customdata") for p in points]
    names = [str(c[0] if isinstance(c, list) else c) for c in found if c]
    if names:
        st.session_state["selected"] = list(dict.fromkeys(names))


def show(zoo: Listing, searched: list[str]) -> Callable[[], None]:
    """All of the page but the map, which is drawn by what this gives back: last, so that nothing waits for plotly."""
    frame = zoo.frame
    failures = len(zoo.failures)
    left, middle, right = st.columns([5, 2, 2], vertical_alignment="bottom")
    text = left.text_input("Filter", key="q", bind="query-params", placeholder="cnn wiring:proved test_accuracy>0.9",
                           help=tables.HELP)  # fmt: skip
    colours = tables.colourable(frame)
    colour = middle.selectbox("Colour", colours, key="colour", bind="query-params", disabled=not colours,
                              format_func=lambda c: str(c).replace("_", " "))  # fmt: skip
    there = {
        "descriptor": len(frame), "encoder": frame["inside"].sum(),
        "function": (frame["asked"] == commonest(frame["asked"])).sum() if frame["asked"].any() else 0,
    }  # fmt: skip
    offered = [label for label, (kind, _) in MAPS.items() if kind == "descriptor" or there[kind] > 2]
    of = right.selectbox("Map of", offered, key="map_of", bind="query-params",
                         help="The descriptor needs no training and describes any network; the pretrained encoder sees "
                         "through symmetries, for networks in its range; the function is what networks answer to the "
                         "same made-up inputs.")  # fmt: skip
    try:
        kept = tables.matching(frame, text or "", searched)
    except WeightspaceError as error:
        st.error(ui.plain(error), icon=":material/filter_alt_off:")
        kept = np.ones(len(frame), dtype=bool)
    selected = chosen_names(zoo)
    visible = frame[kept]
    names = [str(name) for name in visible.index]
    kind, method = MAPS[of]
    first = "seen" not in st.session_state and method == "PCA" and len(frame) > 2
    if first:
        st.session_state["seen"] = True
        points, places, _ = models.placed(zoo, kind)
        held = pd.Series(kept, index=frame.index).loc[points].tolist()
        ui.sketch("map-place", maps.sketch(places, frame.loc[points], colour, held), maps.HEIGHT)
    table, picture = st.columns([6, 5], gap="medium")
    with table:
        rows = np.flatnonzero(visible.index.isin(selected)).tolist() if selected else []
        # The table shows what is selected, wherever it was selected.
        st.session_state["table"] = {"selection": {"rows": rows, "columns": [], "cells": []}}
        columns = tables.shown_columns(visible if len(visible) else frame)
        st.dataframe(
            visible[columns], key="table", on_select=partial(from_table, names), selection_mode="multi-row", height=440,
            column_config=_columns(visible), placeholder="–", alt=f"{len(visible):,} models of {zoo.folder.name}",
        )  # fmt: skip
        st.caption(f"{len(visible):,} of {len(frame):,} models")
        ui.download("Table (CSV)", lambda: visible.to_csv(), f"{zoo.folder.name}.csv", "text/csv", key="zoo-csv")
    with picture.container(key="map-place"):
        here = st.container()
        st.caption("Each point is a model; click one to select it, or draw around several with the lasso above.")
    if first:
        time.sleep(PAUSE)
    selection(selected)
    if zoo.failures:
        with st.expander(f"{failures} files could not be read", icon=":material/report:"):
            reasons(zoo.failures, "failures")

    def drawn() -> None:
        if first:
            # A browser reads plotly for half a second and draws nothing meanwhile: the table comes first.
            time.sleep(PAUSE)
        with here, ui.said():
            show_map(zoo, kept.tolist(), colour, of, selected)

    return drawn


def show_map(zoo: Listing, kept: Sequence[bool], colour: str | None, of: str, selected: list[str]) -> None:
    frame, (kind, method) = zoo.frame, MAPS[of]
    if method == "PCA":
        placed = models.placed(zoo, kind)
    else:
        placed = ui.work(
            f"Drawing the map ({of})", "weightspace.explorer.maps:place", zoo.folder, kind, method,
            of=[zoo.index, zoo.stamp, kind, method],
        )  # fmt: skip
    if placed is None:
        return
    points, places, caption = placed
    held = pd.Series(kept, index=frame.index).loc[points].tolist()
    drawn = maps.draw(points, places, frame.loc[points], colour, held, selected, ui.dark())
    ui.chart(
        drawn, f"{zoo.folder.name}-map", key="map", on_select=from_map,
        data=pd.DataFrame(places, index=points, columns=["x", "y"]),
        caption=f"{caption}.",
    )  # fmt: skip


def _columns(frame: pd.DataFrame) -> dict[str, Any]:
    number, words = st.column_config.NumberColumn, st.column_config.TextColumn
    return {
        "_index": words("model", width="medium", pinned=True),
        "architecture": words(width=150),
        "parameters": number(format="localized"),
        "bytes": number(format="bytes"),
        "test_accuracy": number("test accuracy", format="percent"),
        "predicted_accuracy": number("predicted accuracy", format="percent",
                                     help="By the pretrained predictor, from the weights alone"),
        "wiring": words(help="Proved: shuffling neurons by it was run and changed nothing"),
        "findings": number(help="Odd things about the values or the file"),
    }  # fmt: skip


def selection(selected: list[str]) -> None:
    """What can be done with what is selected."""
    with st.container(border=True):
        if not selected:
            st.caption("Select models in the table (boxes on its left) or on the map to look at one, compare two, or "
                       "score a merge.")  # fmt: skip
            return
        st.markdown(f"**{len(selected)} selected**: " + ", ".join(ui.plain(name) for name in selected[:6])
                    + (f" and {len(selected) - 6} more" if len(selected) > 6 else ""))  # fmt: skip
        with st.container(horizontal=True, vertical_alignment="center"):
            ui.link("model", "Look at it" if len(selected) == 1 else "Look at the first", model=selected[0])
            if len(selected) >= 2:
                ui.link("compare", "Compare the first two", a=selected[0], b=selected[1])
            if 2 <= len(selected) <= 8:
                ui.link("merge", f"Score a merge of {len(selected)}", models=selected)
            ui.link("search", "What is like it?", query=selected[0])
            ui.link("backdoor", "Scan it", model=selected[0])
            st.button("Clear", on_click=lambda: st.session_state.update(selected=[]), type="tertiary",
                      icon=":material/close:")  # fmt: skip


def page() -> None:
    folder = ui.folder()
    if folder is None:
        st.title("Welcome to weightspace", anchor=False)
        st.write("The explorer shows what is in a folder of trained networks: which are alike, what descends from what,"
                 " what will merge, and what to distrust. Begin with models of your own, or with the starter zoo.")
        bring_in(True)
        return
    why = ui.may_open(folder)
    if why:
        ui.title("zoo")
        st.error(ui.plain(f"{why[:1].upper()}{why[1:]}."), icon=":material/folder_off:")
        bring_in(True)
        return
    if not models.is_indexed(folder):
        ui.title("zoo")
        index_first(folder)
        bring_in(False)
        return
    zoo, searched = models.opened(folder)
    head, button = st.columns([3, 1], vertical_alignment="bottom")
    with head:
        ui.title("zoo", ui.shelf())
    drawn = None
    if zoo.frame.empty:
        st.info("The index of this folder holds no model.")
        for file, reason in [*zoo.failures, *zoo.ignored][:20]:
            st.caption(ui.plain(f"{file}: {reason}"))
    else:
        drawn = show(zoo, searched)
    with button:
        refresh(zoo)
    bring_in(False)
    if drawn is not None:
        drawn()


page()
