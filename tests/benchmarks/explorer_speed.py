"""How quickly the explorer opens and filters a zoo of thousands: ``python tests/benchmarks/explorer_speed.py``.

Makes an index of ``--models`` made-up models in a temporary folder, serves it as ``weightspace app`` does, and measures
in a browser (``--no-browser``: only what the pages do in Python): first paint (from the request to the table and the
picture of the map), the map that answers to the mouse, and a filter (from the key to the new count). In turn with it
the floor: ``streamlit run`` of a page that shows the same table and nothing else. Every visit is a browser's first one:
nothing is in its cache. A table in Markdown; ``--json`` for numbers.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from weightspace.explorer import maps, tables
from weightspace.explorer.launch import free_port
from weightspace.retrieval import DIMENSION, function
from weightspace.retrieval.descriptor import VERSION
from weightspace.zoo import Zoo
from weightspace.zoo.listing import listing
from weightspace.zoo.store import FileStamp, ModelRow, Store

FIRST, FILTER = 2.0, 0.5
"""Seconds that are aimed at."""
KINDS = ("MLP", "CNN", "ResNet-20", "ViT", "GPT-2", "LSTM", "VGG", "SIREN")


def make_index(folder: Path, count: int, seed: int = 0) -> None:
    """An index of so many models in a folder, as `weightspace index` would leave it, without their files."""
    from weightspace.pretrained import shipped

    rng = np.random.default_rng(seed)
    known = shipped()
    others = {"learned": (known.dimension, known.name), "function": (function.LENGTH, f"function-{function.VERSION}")}
    store = Store(Zoo(folder).index_folder, DIMENSION, f"descriptor-{VERSION}", True, others)
    centres, learned = rng.normal(size=(40, DIMENSION)), rng.normal(size=(40, known.dimension))
    axes = [{"name": f"axis.{i}", "size": 64, "kind": "free", "tensors": 3, "detail": ""} for i in range(24)]
    try:
        for start in range(0, count, 1000):
            rows = []
            for i in range(start, min(start + 1000, count)):
                group = int(rng.integers(40))
                kind = KINDS[group % len(KINDS)]
                record = {
                    "recipe": "made-up", "population": f"{kind.lower()}-{group}", "seed": i, "relation": "from scratch",
                    "task": ("mnist", "cifar10")[group % 2], "test_accuracy": float(rng.uniform(0.3, 0.99)),
                    "network": {"kind": "mlp", "widths": [64] * 8},
                }  # fmt: skip
                card = {
                    "name": f"m{i}", "format": "safetensors", "parameters": int(10 ** rng.uniform(3, 9)), "tensors": 24,
                    "bytes": 10**6, "dtypes": ["float32 × 24"], "architecture": kind, "recognised": "catalogue:made-up",
                    "wiring": "proved", "proof": "made up", "error": 1e-7, "movable": 0.9, "axes": axes, "notes": [],
                    "findings": [], "record": record,
                }  # fmt: skip
                vector = (centres[group] + rng.normal(size=DIMENSION)).astype(np.float32)
                encoded = (learned[group] + 0.3 * rng.normal(size=known.dimension)).astype(np.float32)
                path = f"models-{start // 1000:03d}.zip"
                name = f"{path}!{kind.lower()}-{i:06d}.safetensors"
                rows.append(ModelRow(name, path, f"{i:064x}", card, vector, encoded, {"inside": True, "score": 0.5}))
            store.put(f"models-{start // 1000:03d}.zip", FileStamp(1, 1, f"{start:064x}"), "models", "", rows)
    finally:
        store.close()


def timed(work: Callable[[], Any], times: int = 3) -> float:
    """The median of a few runs, in seconds of this process, which hardly depend on what else the machine does."""
    found = []
    for _ in range(times):
        started = time.process_time()
        work()
        found.append(time.process_time() - started)
    return statistics.median(found)


def in_python(folder: Path) -> dict[str, float]:
    """What a page does before it has anything to send."""
    zoo = listing(folder)
    searched = tables.haystack(zoo.frame)
    names, places, _ = maps.place(folder, "descriptor", "PCA")
    kept = tables.matching(zoo.frame, "cnn test_accuracy>0.9", searched)
    return {
        "read the index": timed(lambda: listing(folder)),
        "filter": timed(lambda: tables.matching(zoo.frame, "cnn test_accuracy>0.9", searched)),
        "place the map (PCA)": timed(lambda: maps.place(folder, "descriptor", "PCA")),
        "draw the map": timed(
            lambda: maps.draw(names, places, zoo.frame, "architecture", kept.tolist(), names[:3]).to_json()
        ),
    }


BARE = """import pandas as pd
import streamlit as st

@st.cache_resource
def frame():
    return pd.read_pickle({path!r})

st.dataframe(frame(), height=440)
"""
GRID, SKETCH = "data-grid-canvas", ".st-key-map-place"
DRAWN = f"""() => document.querySelector('{SKETCH} .main-svg') || document.querySelector('{SKETCH}') &&
    getComputedStyle(document.querySelector('{SKETCH}')).backgroundImage.startsWith('url("data:image/svg')"""


def served(command: list[str], port: int) -> subprocess.Popen[bytes]:
    """A server that answers."""
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    end = time.monotonic() + 120
    while True:
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{port}/_stcore/health", timeout=1).read()
            return server
        except OSError:
            if time.monotonic() > end or server.poll() is not None:
                server.kill()
                raise
            time.sleep(0.1)


def in_browser(folder: Path, chromium: str, times: int) -> dict[str, list[float]]:
    """Seconds from a request to the table and the map on the screen, and from a filter's key to its rows, visit by
    visit; the very first visit apart."""
    from playwright.sync_api import sync_playwright

    zoo = listing(folder)
    frame = folder.parent / "frame.pickle"
    zoo.frame[tables.shown_columns(zoo.frame)].to_pickle(frame)
    script = folder.parent / "bare.py"
    script.write_text(BARE.format(path=str(frame)))
    port = free_port("127.0.0.1", None)
    ours = [sys.executable, "-m", "weightspace", "app", str(folder), "--port", str(port), "--headless"]
    servers = [served(ours, port)]
    address = f"http://127.0.0.1:{port}"
    try:
        other = free_port("127.0.0.1", None)
        options = {"server.port": other, "server.address": "127.0.0.1", "server.headless": "true",
                   "server.fileWatcherType": "none", "browser.gatherUsageStats": "false"}  # fmt: skip
        flags = [part for name, value in options.items() for part in (f"--{name}", str(value))]
        servers.append(served([sys.executable, "-m", "streamlit", "run", str(script), *flags], other))
        found: dict[str, list[float]] = {}

        def passed(step: str, since: float) -> None:
            found.setdefault(step, []).append(time.perf_counter() - since)

        with sync_playwright() as play:
            browser = play.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
            for visit in range(times + 1):
                page = browser.new_context(viewport={"width": 1360, "height": 900}).new_page()
                started = time.perf_counter()
                page.goto(address, wait_until="commit")
                page.get_by_test_id(GRID).first.wait_for(timeout=60_000)
                passed("the table", started)
                page.wait_for_function(DRAWN, timeout=60_000)
                passed("first paint: table and picture of the map", started)
                page.locator(".js-plotly-plot .main-svg").first.wait_for(timeout=60_000, state="attached")
                passed("the map answers to the mouse", started)
                page.wait_for_timeout(1000)
                box = page.get_by_role("textbox", name="Filter")
                box.fill("cnn test_accuracy>0.9")
                counted = page.get_by_text(re.compile(r"^[\d,]+ of [\d,]+ models$")).first
                before = counted.inner_text()
                started = time.perf_counter()
                box.press("Enter")
                page.wait_for_function(
                    "before => ![...document.querySelectorAll('p')].some(p => p.innerText === before)", arg=before,
                    polling=10, timeout=60_000,
                )  # fmt: skip
                passed("a filter", started)
                page.context.close()
                page = browser.new_context(viewport={"width": 1360, "height": 900}).new_page()
                started = time.perf_counter()
                page.goto(f"http://127.0.0.1:{other}", wait_until="commit")
                page.get_by_test_id(GRID).first.wait_for(timeout=60_000)
                passed("floor: a bare page with this table", started)
                page.context.close()
                if not visit:
                    first = found.pop("first paint: table and picture of the map")
                    found.clear()
                    found["first paint of the first visit after the start"] = first
            browser.close()
        return found
    finally:
        for server in servers:
            server.terminate()
        for server in servers:
            server.wait(20)


def browser_path() -> str | None:
    """A Chromium that Playwright can drive, if there is one."""
    named = os.environ.get("CHROMIUM")
    return named or shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=int, default=10_000)
    parser.add_argument("--visits", type=int, default=5)
    parser.add_argument("--no-browser", action="store_true")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="explorer-speed-") as place:
        folder = Path(place) / "zoo"
        folder.mkdir()
        make_index(folder, arguments.models)
        python = in_python(folder)
        chromium = None if arguments.no_browser else browser_path()
        visits = {} if chromium is None else in_browser(folder, chromium, arguments.visits)
    if arguments.json:
        print(json.dumps({"models": arguments.models, "processor": python, "visits": visits}, indent=2))
        return
    aims = {"first paint: table and picture of the map": FIRST, "a filter": FILTER}
    print(f"{arguments.models:,} models, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}\n")
    print("| in Python | seconds of the processor |\n| --- | --- |")
    for name, seconds in python.items():
        print(f"| {name} | {seconds:.2f} |")
    if chromium is None:
        print("\nno browser: only what the pages do in Python was measured")
        return
    print("\nOn the clock, which a busy machine lengthens; floor and explorer were visited in turn.\n")
    print("| in a browser | median seconds | least | aim |\n| --- | --- | --- | --- |")
    for name, values in visits.items():
        aim = f"≤ {aims[name]:g}" if name in aims else ""
        print(f"| {name} | {statistics.median(values):.2f} | {min(values):.2f} | {aim} |")
    ours, floor = visits["first paint: table and picture of the map"], visits["floor: a bare page with this table"]
    over = statistics.median(ours) - statistics.median(floor)
    print(f"| first paint above the floor | {over:.2f} | {min(ours) - min(floor):.2f} | |")


if __name__ == "__main__":
    main()
