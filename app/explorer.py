"""The explorer's frame: the pages, and which zoo is open. Started by ``weightspace app``."""

from __future__ import annotations

from pathlib import Path

import streamlit as st

from weightspace.explorer import ui

here = Path(__file__).parent
st.set_page_config(page_title="weightspace", page_icon=str(here / "icon.svg"), layout="wide")
# Pages of tables and figures need their width; the server's own header stays above them.
st.html("<style>.stMainBlockContainer {padding: 3.5rem 2.5rem 2rem;} .stMainBlockContainer h1 {padding: 0;}</style>")
pages = [
    st.Page(here / f"{name}.py", title=title, icon=icon, url_path=name, default=name == "zoo")
    for name, (title, icon, _) in ui.PAGES.items()
    if (here / f"{name}.py").is_file()
]
chosen = st.navigation(pages, position="top")
ui.folder()
ui.upload_folder()
ui.keep_url()
with ui.said():
    chosen.run()
ui.busy()
