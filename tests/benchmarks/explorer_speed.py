"""How quickly the explorer opens and filters a zoo of thousands: ``python tests/benchmarks/explorer_speed.py``.

Makes an index of ``--models`` made-up models in a temporary folder, serves it as ``weightspace app`` does, and measures
in a browser (``--no-browser``: only what the pages do in Python): first paint (from the request to table and map),
and a filter (from the key to the new count). A table in Markdown; ``--json`` for numbers.
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
from weightspace.retrieval import DIMENSION
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
    store = Store(Zoo(folder).index_folder, DIMENSION, f"descriptor-{VERSION}", True, (known.dimension, known.name))
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


def in_browser(folder: Path, chromium: str, times: int = 3) -> dict[str, float]:
    """Seconds from a request to the table and the map on the screen, and from a filter's key to its rows."""
    from playwright.sync_api import sync_playwright

    port = free_port("127.0.0.1", None)
    server = subprocess.Popen(
        [sys.executable, "-m", "weightspace", "app", str(folder), "--port", str(port), "--headless"],
        stdout=subprocess.DEVNULL,
    )
    address = f"http://127.0.0.1:{port}"
    try:
        end = time.monotonic() + 120
        while True:
            try:
                urllib.request.urlopen(f"{address}/_stcore/health", timeout=1).read()
                break
            except OSError:
                if time.monotonic() > end:
                    raise
                time.sleep(0.1)
        found: dict[str, list[float]] = {}
        with sync_playwright() as play:
            browser = play.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
            for _ in range(times + 1):
                page = browser.new_context(viewport={"width": 1360, "height": 900}).new_page()
                started = time.perf_counter()
                page.goto(address)
                page.get_by_test_id("stDataFrame").first.wait_for(timeout=60_000)
                found.setdefault("first paint: the table", []).append(time.perf_counter() - started)
                page.locator(".js-plotly-plot").first.wait_for(timeout=60_000)
                found.setdefault("first paint: table and map", []).append(time.perf_counter() - started)
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
                found.setdefault("a filter", []).append(time.perf_counter() - started)
                page.context.close()
            browser.close()
        first = {"first visit after the start": found["first paint: table and map"][0]}
        return first | {name: statistics.median(values[1:]) for name, values in found.items()}
    finally:
        server.terminate()
        server.wait(20)


def browser_path() -> str | None:
    """A Chromium that Playwright can drive, if there is one."""
    named = os.environ.get("CHROMIUM")
    return named or shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=int, default=10_000)
    parser.add_argument("--no-browser", action="store_true")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="explorer-speed-") as place:
        folder = Path(place) / "zoo"
        folder.mkdir()
        make_index(folder, arguments.models)
        found = in_python(folder)
        chromium = None if arguments.no_browser else browser_path()
        if chromium is not None:
            found |= in_browser(folder, chromium)
    if arguments.json:
        print(json.dumps({"models": arguments.models, "seconds": found}, indent=2))
        return
    aims = {"first paint: table and map": FIRST, "a filter": FILTER}
    print(f"{arguments.models:,} models, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}\n")
    print("In a browser: seconds on the clock, which a busy machine lengthens; the others: seconds of the processor.\n")
    print("| step | seconds | aim |\n| --- | --- | --- |")
    for name, seconds in found.items():
        print(f"| {name} | {seconds:.2f} | {f'≤ {aims[name]:g}' if name in aims else ''} |")
    if chromium is None:
        print("\nno browser: only what the pages do in Python was measured")


if __name__ == "__main__":
    main()
