"""A zoo of nine small networks of digits, and pages that run in this process with workers of their own."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("streamlit", reason="the explorer needs the extra app")

from streamlit.testing.v1 import AppTest

import weightspace as ws
from weightspace.explorer import server as servers
from weightspace.explorer.server import VARIABLE
from weightspace.paths import data_dir

sys.path.insert(0, str(Path(__file__).parent))
from explorer_pages import settle

RECIPE = """
name = "tiny"
data = "digits"
[defaults]
epochs = 3
learning_rate = 5e-3
[[population]]
name = "mlp"
architecture = "mlp"
width = 16
seeds = 2
[[population]]
name = "low"
parent = "mlp"
classes = [0, 1, 2, 3, 4]
epochs = 2
seeds = 2
[[population]]
name = "high"
parent = "mlp"
classes = [5, 6, 7, 8, 9]
epochs = 2
seeds = 2
[[population]]
name = "copy"
parent = "mlp"
permuted = true
seeds = 1
[[population]]
name = "cnn"
architecture = "cnn"
width = 4
seeds = 1
"""


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The zoo's folder, trained and indexed once; tests leave it as it is."""
    from weightspace.zoo.recipe import load
    from weightspace.zoo.train import build_zoo

    root = tmp_path_factory.mktemp("zoo")
    (root / "tiny.toml").write_text(RECIPE)
    folder = root / "models"
    build_zoo(load(str(root / "tiny.toml"), False), folder, progress=False)
    ws.Zoo(folder).index(jobs=1, progress=False)
    return folder


@pytest.fixture(scope="session")
def _jobs() -> Iterator[Any]:
    """One set of workers for all tests: a process takes seconds to import torch."""
    from weightspace.explorer.jobs import Jobs

    jobs = Jobs(1)
    yield jobs
    jobs.close()


@pytest.fixture
def serve(
    _jobs: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[..., servers.Server]]:
    """``serve(zoo)`` makes the pages believe that the server was started on a folder."""
    private = tmp_path / "private"
    private.mkdir(mode=0o700)

    def begin(zoo: Path | None, local: bool = True) -> servers.Server:
        told = {"zoo": None if zoo is None else str(zoo), "private": str(private), "local": local}
        monkeypatch.setenv(VARIABLE, json.dumps(told))
        found = servers.Server(_jobs, private, zoo, local)
        monkeypatch.setattr(servers, "server", lambda: found)
        monkeypatch.setattr("weightspace.explorer.ui.server", lambda: found)
        return found

    yield begin
    for job in _jobs.running():
        _jobs.cancel(job)


@pytest.fixture
def page(serve: Callable[..., servers.Server], tiny: Path) -> Callable[..., AppTest]:
    """``page("model", model="…")`` opens a page of the explorer on the small zoo, by its URL."""

    def open_page(name: str, zoo: Path | None = tiny, local: bool = True, **query: str | list[str]) -> AppTest:
        serve(zoo, local)
        app = AppTest.from_file(data_dir("app") / "explorer.py", default_timeout=60)
        if name != "zoo":
            # A page is known by its name only once the frame has run; the zoo's own parameters are read at once.
            app.run()
            app.switch_page(f"{name}.py")
        for key, value in query.items():
            app.query_params[key] = value
        return settle(app.run())

    return open_page
