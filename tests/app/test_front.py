"""The server in front of the pages: it names early what a browser will need, and gives away nothing else."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("streamlit", reason="the explorer needs the extra app")
import streamlit

from weightspace.explorer import front

STATIC = Path(streamlit.__file__).parent / "static"


def ask(app: Any, path: str, **headers: str) -> tuple[int, dict[str, str], bytes]:
    """One GET request, answered in this process."""
    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    async def receive() -> Any:
        return {"type": "http.request", "body": b"", "more_body": False}

    held = [(k.encode(), v.encode()) for k, v in headers.items()]
    scope = {"type": "http", "method": "GET", "path": path, "headers": held, "query_string": b""}
    asyncio.run(app(scope, receive, send))
    start = sent[0]
    body = b"".join(m.get("body", b"") for m in sent[1:])
    return start["status"], {k.decode(): v.decode() for k, v in start["headers"]}, body


async def elsewhere(scope: Any, receive: Any, send: Any) -> None:
    await send({"type": "http.response.start", "status": 418, "headers": []})
    await send({"type": "http.response.body", "body": b"passed on"})


@pytest.fixture(scope="module")
def app() -> front.Front:
    return front.Front(elsewhere, pages=("model",))


def test_what_a_table_needs_is_named_in_the_frame(app: front.Front) -> None:
    html = (STATIC / "index.html").read_text()
    wanted = front.wanted_first(STATIC, html)
    assert any("/DataFrame." in name for name in wanted)
    assert all((STATIC / name).is_file() for name in wanted)
    assert not any(name in html for name in wanted)
    for path in ("/", "/model"):
        status, headers, body = ask(app, path)
        assert status == 200
        assert headers["cache-control"] == "no-cache"
        assert all(f'href="./{name}"'.encode() in body for name in wanted)


def test_files_are_as_they_are(app: front.Front) -> None:
    entry = next((STATIC / "static" / "js").glob("index.*.js"))
    status, headers, body = ask(app, f"/static/js/{entry.name}")
    assert (status, headers["content-type"].partition(";")[0]) == (200, "text/javascript")
    assert body == entry.read_bytes()


@pytest.mark.parametrize(
    "path", ["/static/../index.html", "/static/js/../../../__init__.py", "/static/js/none.js", "/_stcore/health",
             "/static", "//", "/nothing"],
)  # fmt: skip
def test_everything_else_is_passed_on(app: front.Front, path: str) -> None:
    assert ask(app, path)[0] == 418


def test_a_front_end_that_is_written_otherwise_comes_without(tmp_path: Path) -> None:
    (tmp_path / "static" / "js").mkdir(parents=True)
    (tmp_path / "static" / "js" / "index.abc.js").write_text("console.log(1)")
    html = '<html><head><script src="./static/js/index.abc.js"></script></head></html>'
    (tmp_path / "index.html").write_text(html)
    assert front.wanted_first(tmp_path, html) == []
    assert ask(front.Front(elsewhere, tmp_path), "/")[2].decode() == html
