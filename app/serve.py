"""What ``weightspace app`` serves: the explorer behind ``weightspace.explorer.front``."""

from __future__ import annotations

from pathlib import Path

import streamlit as st
from starlette.middleware import Middleware

from weightspace.explorer import front, ui

app = st.App(
    Path(__file__).with_name("explorer.py"), middleware=[Middleware(front.Front, pages=tuple(ui.PAGES))],
    lifespan=front.lifespan,
)  # fmt: skip
