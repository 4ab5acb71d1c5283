"""The server in front of the pages: what a browser needs first is sent first, from memory.

Streamlit tells a browser which of its hundred pieces of JavaScript a table or a figure needs only when the page sends
one; then they are fetched. Here the page's frame names them at once (``modulepreload``), so that they are fetched while
the browser still reads the frame and the server already works on the page. Streamlit's files are as they are.
"""

from __future__ import annotations

import contextlib
import mimetypes
import re
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, MutableMapping
from pathlib import Path
from typing import Any

from weightspace.explorer.server import server

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]

FIRST = ("DataFrame", "TextInput", "Selectbox", "DownloadButton", "Button", "FileUploader")
"""Streamlit's names of what stands on the first page that is seen, in the order in which it is wanted."""
FIGURE = "PlotlyChart"
"""Named early on every page but the one whose table comes first: a browser reads it for half a second."""
_LIST = re.compile(r"__vite__mapDeps=\(.{0,80}?\.f=\[(.*?)\]", re.DOTALL)
_IMPORT = r"import\(`\./({name}\.[\w-]+\.js)`\).{{0,90}}?__vite__mapDeps\(\[([\d,]*)\]"
_HEAD = "</head>"
_TABLE_FIRST = ("/", "/zoo")


def wanted_first(static: Path, html: str, first: tuple[str, ...] = FIRST) -> list[str]:
    """Files of Streamlit's front end that these elements need and its own frame does not name, as paths in ``static``.

    Read from the list of dependencies in its entry file; empty where another version writes it otherwise, and pages
    come as they would without.
    """
    entry = re.search(r'src="\./(static/js/index\.[\w-]+\.js)"', html)
    if entry is None or not (static / entry[1]).is_file():
        return []
    text = (static / entry[1]).read_text(encoding="utf-8", errors="replace")
    listed = _LIST.search(text)
    if listed is None:
        return []
    names = [name.strip("\"'`").removeprefix("./") for name in listed[1].split(",")]
    found: list[str] = []
    for element in first:
        known = re.search(_IMPORT.format(name=element), text, re.DOTALL)
        if known is None:
            continue
        places = [int(i) for i in known[2].split(",") if i]
        found += [known[1], *(names[i] for i in places if i < len(names))]
    kept = [name for name in dict.fromkeys(found) if f"static/js/{name}" not in html and f"static/{name}" not in html]
    return [f"static/js/{name}" for name in kept if name.endswith(".js") and (static / "static/js" / name).is_file()]


class Front:
    """ASGI middleware: the frame of every page with what it will need, and Streamlit's own files from memory."""

    def __init__(self, app: Any, static: Path | None = None, pages: tuple[str, ...] = ()) -> None:
        import streamlit

        self._app = app
        self._static = static or Path(streamlit.__file__).parent / "static"
        self._frames = {"/", *(f"/{name}" for name in pages)}
        # Only files that are there now are ever looked up: a path from outside is never joined to anything.
        self._files = {
            f"/{path.relative_to(self._static).as_posix()}": path
            for path in (self._static / "static").rglob("*") if path.is_file()
        }  # fmt: skip
        self._made: dict[tuple[str, ...], bytes] = {}
        self._held: dict[str, tuple[bytes, bytes]] = {}

    def _frame(self, first: tuple[str, ...]) -> bytes:
        if first not in self._made:
            html = (self._static / "index.html").read_text(encoding="utf-8")
            links = "".join(
                f'<link rel="modulepreload" crossorigin href="./{name}">'
                for name in wanted_first(self._static, html, first)
            )  # fmt: skip
            self._made[first] = html.replace(_HEAD, links + _HEAD, 1).encode()
        return self._made[first]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["method"] == "GET" and not scope.get("root_path"):
            path = scope["path"]
            if path in self._frames:
                frame = self._frame(FIRST if path in _TABLE_FIRST else (*FIRST, FIGURE))
                await _answer(send, frame, b"text/html; charset=utf-8", b"no-cache")
                return
            if path in self._files and not any(name == b"range" for name, _ in scope["headers"]):
                body, kind = self._file(path)
                await _answer(send, body, kind, b"public, immutable, max-age=31536000")
                return
        await self._app(scope, receive, send)

    def _file(self, path: str) -> tuple[bytes, bytes]:
        if path not in self._held:
            kind = mimetypes.guess_type(path)[0] or "application/octet-stream"
            kind = "text/javascript; charset=utf-8" if path.endswith(".js") else kind
            self._held[path] = self._files[path].read_bytes(), kind.encode()
        return self._held[path]


async def _answer(send: Send, body: bytes, kind: bytes, keep: bytes) -> None:
    headers = [(b"content-type", kind), (b"content-length", str(len(body)).encode()), (b"cache-control", keep)]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": body})


def warm() -> None:
    """Import and work out what the first page will want, before anybody asks for it."""
    import numpy as np
    import pyarrow as pa

    from weightspace.explorer import maps, models, tables

    zoo = server().zoo
    # Whatever is wrong with the zoo is said by the page.
    with contextlib.suppress(Exception):
        if zoo is not None and models.is_indexed(zoo):
            found, _ = models.opened(zoo)
            colour = next(iter(tables.colourable(found.frame)), None)
            pa.Table.from_pandas(found.frame[tables.shown_columns(found.frame)])
            names, places, _ = models.placed(found, "descriptor")
            shown, kept = found.frame.loc[names], np.ones(len(names), dtype=bool).tolist()
            maps.sketch(places, shown, colour, kept)
            maps.draw(names, places, shown, colour, kept, []).to_json()


@contextlib.asynccontextmanager
async def lifespan(app: Any) -> AsyncIterator[None]:
    """Warm up beside the server, which answers meanwhile."""
    del app
    threading.Thread(target=warm, daemon=True, name="warming the first page").start()
    yield


__all__ = ["FIRST", "Front", "lifespan", "wanted_first"]
