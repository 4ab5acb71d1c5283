"""What all pages draw with: the open zoo, choosing models, work with a progress bar, tables and charts.

The only module of the package that imports Streamlit; pages in ``app/`` are thin over it.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import streamlit as st

from weightspace.errors import WeightspaceError
from weightspace.explorer import models, uploads
from weightspace.explorer.jobs import Job, key_of
from weightspace.explorer.models import Shelf
from weightspace.explorer.server import Server, server
from weightspace.explorer.worker import sentence
from weightspace.paths import data_dir

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

_log = logging.getLogger(__name__)
_PATIENCE = 1.0
"""Seconds that a page waits for work before it shows a bar."""

PAGES = {
    "zoo": ("Zoo", ":material/grid_view:", "All models, as a table and as a map"),
    "model": ("Model", ":material/account_tree:", "One network: its card, its graph, its layers"),
    "compare": ("Compare", ":material/compare_arrows:", "What differs between two networks"),
    "merge": ("Merge lab", ":material/merge:", "Score a merge, make it, measure it"),
    "backdoor": ("Backdoor", ":material/policy:", "Is something planted in this network?"),
    "lineage": ("Lineage", ":material/family_history:", "Which models descend from which"),
    "search": ("Search", ":material/search:", "Find models by an example"),
}
"""File in ``app/`` (and word in the URL) -> title, icon, what it is for."""


# ------------------------------------------------------------------------------------ the open zoo


def here() -> Server:
    """The server that this page belongs to."""
    return server()


def folder() -> Path | None:
    """The folder that is open: that of the URL, else the one last opened, else the one the server was started on."""
    given = st.query_params.get("zoo") or st.session_state.get("zoo")
    found = Path(given).expanduser() if given else here().zoo
    if given and here().zoo is not None and found == here().zoo:
        st.session_state.pop("zoo", None)
    elif given and st.session_state.get("zoo") != given:
        st.session_state["zoo"] = given
    return found


def open_folder(path: Path) -> None:
    """Make a folder the open one."""
    if here().zoo == path:
        st.session_state.pop("zoo", None)
        st.query_params.pop("zoo", None)
    else:
        st.session_state["zoo"] = st.query_params["zoo"] = str(path)
    st.session_state.pop("selected", None)


def may_open(path: Path) -> str:
    """Why a folder may not be opened from a page; empty where it may."""
    if not here().local and path != here().zoo:
        return "this server can be reached from other machines, so it shows only the folder that it was started on"
    if not path.is_dir():
        return f"{path} is not a folder on this machine; type the whole path of a folder with model files"
    return ""


def upload_folder(make: bool = False) -> Path | None:
    """The folder of this session's uploads, which the URL names by a token that nobody can guess."""
    token = st.query_params.get("u") or st.session_state.get("u") or ""
    found = uploads.folder_of(here().private, token) if token else None
    if found is None and make:
        token = uploads.new_token()
        found = uploads.folder_of(here().private, token, make=True)
    if found is not None:
        st.session_state["u"] = token
    else:
        st.session_state.pop("u", None)
    return found


def keep_url() -> None:
    """Write the open zoo and the uploads into the URL, which changing pages empties."""
    for name, value in kept().items():
        if st.query_params.get(name) != value:
            st.query_params[name] = value


def kept() -> dict[str, str]:
    """What of the URL goes with the user from page to page."""
    return {name: st.session_state[name] for name in ("zoo", "u") if st.session_state.get(name)}


def shelf() -> Shelf:
    """All models that can be chosen. A folder without an index has none."""
    found = folder()
    zoo = None
    if found is not None and found.is_dir() and not may_open(found) and models.is_indexed(found):
        zoo = models.opened(found)[0]
    own = upload_folder()
    held = models.opened(own)[0] if own is not None and models.is_indexed(own) else None
    return Shelf(zoo, held)


def dark() -> bool:
    """Whether the browser shows the dark theme."""
    return getattr(st.context.theme, "type", "light") == "dark"


# ------------------------------------------------------------------------------------ words


def plain(text: object) -> str:
    """Words that may come from a file, as they are: Markdown in them would be drawn, and an image in it fetched."""
    return re.sub(r"([\\`*_\[\]<>$~|])", r"\\\1", " ".join(str(text).split()))


@contextmanager
def said() -> Iterator[None]:
    """What goes wrong inside is said in a sentence; never a traceback on a page."""
    try:
        yield
    except WeightspaceError as error:
        st.error(plain(error), icon=":material/error:")
    except Exception as error:
        _log.exception("a page failed")
        st.error(plain(sentence(error)), icon=":material/error:")


def title(page: str, shelf: Shelf | None = None) -> None:
    """The head of a page: its name, what it is for, and which zoo is open."""
    name, _, purpose = PAGES[page]
    st.title(name, anchor=False)
    opened = folder()
    told = [purpose]
    if opened is not None:
        told.append(f"zoo **{plain(opened.name)}**")
    if shelf is not None and shelf.names:
        told.append(f"{len(shelf.names):,} model{'' if len(shelf.names) == 1 else 's'}")
        told[-1] += f", {len(shelf.uploaded)} uploaded" if shelf.uploaded else ""
    st.caption(" · ".join(told))


def busy() -> None:
    """At the foot of every page: what is being worked on, wherever it was begun."""
    running = here().jobs.running()
    if running:
        st.caption(":material/hourglass_top: In work: " + plain(", ".join(job.title for job in running[:4])))


def link(page: str, label: str, icon: str | None = None, **query: str | list[str]) -> None:
    """A link to another page with its state; the open zoo and the uploads come along."""
    if not (data_dir("app") / f"{page}.py").is_file():
        return
    params: list[tuple[str, str]] = []
    for name, value in {**kept(), **query}.items():
        params += [(name, one) for one in ([value] if isinstance(value, str) else value)]
    st.page_link(f"{page}.py", label=plain(label), icon=icon or PAGES[page][1], query_params=params)


def first_steps(shelf: Shelf) -> bool:
    """Tell someone without any model what to do; whether that was needed."""
    if shelf.names:
        return False
    st.info(
        "No models are open yet. On the page **Zoo** you can open a folder, upload checkpoints, or train the starter "
        "zoo of 30 small networks in about a minute.", icon=":material/lightbulb:",
    )  # fmt: skip
    link("zoo", "Go to the zoo")
    return True


# ------------------------------------------------------------------------------------ choosing models


def choose(
    label: str, shelf: Shelf, key: str, help: str | None = None, optional: bool = False, position: int = 0
) -> str | None:
    """One model, bound to the URL parameter ``key``; the one at ``position`` where none was chosen, unless
    ``optional``. A name in the URL that is not there is said."""
    asked = st.query_params.get(key)
    if asked and asked not in shelf:
        st.warning(f"The link asks for {plain(asked)}, which is not among these models.", icon=":material/link_off:")
    names = shelf.names
    # Never a default of the widget's: the URL would not name it, and mean another model once the zoo has changed.
    if not optional and names and not asked and st.session_state.get(key) is None:
        st.session_state[key] = names[min(position, len(names) - 1)]
    found = st.selectbox(
        label, names, index=None, key=key, bind="query-params", help=help,
        placeholder="none" if optional else "Type a part of a name",
    )  # fmt: skip
    return None if found is None else str(found)


def choose_many(label: str, shelf: Shelf, key: str, most: int, help: str | None = None) -> list[str]:
    """Several models, bound to the URL parameter ``key``."""
    lost = [name for name in st.query_params.get_all(key) if name not in shelf]
    if lost:
        st.warning(f"The link asks for {plain(', '.join(lost))}, not among these models.", icon=":material/link_off:")
    found = st.multiselect(
        label, shelf.names, key=key, bind="query-params", help=help, max_selections=most, select_all=False,
        placeholder="Type a part of a name",
    )  # fmt: skip
    return [str(name) for name in found]


# ------------------------------------------------------------------------------------ work


def work(title: str, function: str, *arguments: Any, of: Sequence[object], label: str = "") -> Any | None:
    """The result of long work that is done in another process; None while it lasts, with its bar on the page.

    ``function`` is ``"module:name"``; ``of`` is what decides the result: hashes of contents, options.
    """
    key = key_of(function, *of)
    jobs = here().jobs
    known = jobs.known(key)
    if known is not None and known.state in ("failed", "cancelled"):
        if known.state == "failed":
            st.error(plain(f"{title}: {known.error}"), icon=":material/error:")
        else:
            st.info(plain(f"{title} was cancelled."), icon=":material/cancel:")
        if st.button("Try again", key=f"again-{key[:12]}{label}", icon=":material/refresh:"):
            jobs.forget(key)
            st.rerun()
        return None
    job = jobs.submit(key, title, function, *arguments)
    if known is None:
        job.wait(_PATIENCE)
    if job.state == "done":
        return job.result
    if job.over:
        st.rerun()
    _follow(job, label)
    return None


def begun(function: str, of: Sequence[object]) -> Job | None:
    """The job that ``work`` would show, if it was begun; for work that waits for a button."""
    return here().jobs.known(key_of(function, *of))


def again(function: str, of: Sequence[object]) -> None:
    """Let ``work`` begin anew."""
    here().jobs.forget(key_of(function, *of))


def _follow(job: Job, label: str) -> None:
    @st.fragment(run_every=0.4)
    def bar() -> None:
        if job.over:
            st.rerun()
        told = job.title if job.state == "running" else f"{job.title} (waiting for its turn)"
        if job.step:
            told += f": {job.step}" + (f", {job.done:,} of {job.total:,}" if job.total else "")
        left, right = st.columns([6, 1], vertical_alignment="bottom")
        left.progress(job.share, text=plain(f"{told} …" + (f" {job.word}" if job.word else "")))
        if right.button("Cancel", key=f"cancel-{job.key[:12]}{label}", icon=":material/cancel:"):
            here().jobs.cancel(job)
            st.rerun()

    bar()


# ------------------------------------------------------------------------------------ tables and charts


def table(
    frame: pd.DataFrame, name: str, alt: str, *, key: str | None = None, height: int | Literal["auto"] = "auto",
    hide_index: bool = True, config: Any = None, **more: Any,
) -> Any:  # fmt: skip
    """A table that can be downloaded; ``alt`` says in words what is in it."""
    shown = st.dataframe(
        frame, height=height, hide_index=hide_index, key=key, column_config=config, alt=alt, placeholder="–", **more
    )
    download("CSV", lambda: frame.to_csv(index=not hide_index), f"{name}.csv", "text/csv", key=f"csv-{key or name}")
    return shown


def chart(
    figure: go.Figure, name: str, caption: str, *, key: str | None = None, data: pd.DataFrame | None = None, **more: Any
) -> Any:
    """A figure with its caption, which is its alternative text as well; it can be downloaded, and what it shows."""
    config = {
        "displaylogo": False, "scrollZoom": False,
        "toImageButtonOptions": {"format": "png", "filename": name, "scale": 2},
    }  # fmt: skip
    shown = st.plotly_chart(figure, key=key or f"chart-{name}", config=config, alt=f"{caption}", **more)
    row = st.container(horizontal=True, vertical_alignment="top", gap="small")
    row.caption(plain(caption), width="stretch")
    with row.popover("Save", icon=":material/download:", type="tertiary", width="content"):
        download("Interactive page", lambda: figure.to_html(include_plotlyjs=True), f"{name}.html", "text/html",
                 key=f"html-{key or name}")  # fmt: skip
        download("Plotly JSON", lambda: figure.to_json() or "", f"{name}.json", "application/json",
                 key=f"json-{key or name}")  # fmt: skip
        if data is not None:
            download("Numbers (CSV)", lambda: data.to_csv(), f"{name}.csv", "text/csv", key=f"numbers-{key or name}")
        st.caption("The camera above the figure saves a PNG.")
    return shown


def sketch(key: str, svg: str, height: int) -> None:
    """A picture behind the container ``key`` until a figure is drawn in it: a browser needs a second to load plotly."""
    from base64 import b64encode

    place, top = f".st-key-{key}:not(:has(.main-svg))", 48
    data = b64encode(svg.encode()).decode()
    st.html(
        f"<style>{place} {{padding-top: {height}px; background: url(data:image/svg+xml;base64,{data}) no-repeat; "
        f"background-position: 8px {top}px; background-size: calc(100% - 16px) {height - top - 8}px;}} "
        f"{place} [data-testid=stSkeleton] {{display: none;}}</style>"
    )


def download(label: str, data: Callable[[], Any] | bytes | str, file: str, mime: str, key: str) -> None:
    """A button that saves a file, made when it is pressed; the page does not run again."""
    st.download_button(
        label, data, file, mime, key=f"download-{key}", on_click="ignore", type="tertiary", icon=":material/download:"
    )


def need(condition: object, words: str) -> None:
    """Say what is missing, and draw no more of the page."""
    if not condition:
        st.info(words, icon=":material/lightbulb:")
        st.stop()


__all__ = [
    "PAGES", "again", "begun", "busy", "chart", "choose", "choose_many", "dark", "download", "first_steps",
    "folder", "here", "keep_url", "kept", "link", "may_open", "need", "open_folder",
    "plain", "said", "shelf", "sketch", "table", "title",
    "upload_folder", "work",
]  # fmt: skip
