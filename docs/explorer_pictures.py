"""The pictures of the explorer in this folder, taken anew:
``python docs/explorer_pictures.py [STARTER] [--merge CANDIDATES] [--bad ZOO]``.

``STARTER`` is the starter zoo (``weightspace zoo build starter``), ``CANDIDATES`` the one of
``tests/benchmarks/candidates.toml``, ``--bad`` a zoo with a network that is flagged; without the last two their
pictures are left as they are. Needs Playwright and Chromium, as the browser tests do.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from weightspace.explorer.launch import free_port

HERE = Path(__file__).parent
PAIR = "models=two-0001-e004.safetensors&models=task-0004-e004.safetensors&base=base-0000-e004.safetensors"
PICTURES = {
    "zoo": ("?sel=cnn-16-0.safetensors&sel=cnn-16-low-1.safetensors&colour=population", 960),
    "model": ("model?model=mlp-32-0.safetensors&view=Graph&axis=hidden.0", 1230),
    "compare": ("compare?a=mlp-32-0.safetensors&b=mlp-32-permuted-0.safetensors&show=Permutation", 1120),
    "lineage": ("lineage?model=mlp-64-0.safetensors", 1120),
}
"""Name -> address in the explorer of the starter zoo, and pixels of height."""


@contextmanager
def served(zoo: Path) -> Iterator[str]:
    """The explorer on a folder."""
    port = free_port("127.0.0.1", None)
    command = [sys.executable, "-m", "weightspace", "app", str(zoo), "--port", str(port), "--headless"]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        for _ in range(600):
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/_stcore/health", timeout=1).read()
                break
            except OSError:
                time.sleep(0.2)
        yield f"http://127.0.0.1:{port}"
    finally:
        server.terminate()
        server.wait(30)


def settle(page: Any) -> None:
    """Wait until nothing is in work and nothing is about to be drawn."""
    page.locator("h1").first.wait_for(timeout=120_000)
    calm = 0
    while calm < 6:
        page.wait_for_timeout(250)
        waiting = page.get_by_text("In work:").count()
        waiting += sum(page.get_by_test_id(i).count() for i in ("stStatusWidget", "stSkeleton"))
        calm = 0 if waiting else calm + 1


def press(page: Any, label: str) -> None:
    page.get_by_role("button", name=label, exact=True).first.click()
    settle(page)


def take(page: Any, name: str, height: int) -> None:
    page.set_viewport_size({"width": 1360, "height": height})
    page.mouse.move(0, 0)
    page.wait_for_timeout(1500)
    page.screenshot(path=HERE / f"explorer-{name}.png")
    print(f"explorer-{name}.png")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("zoo", type=Path, nargs="?", default=Path("models/starter"))
    parser.add_argument("--merge", type=Path)
    parser.add_argument("--bad", type=Path)
    parser.add_argument("--model", default="", help="the flagged network of --bad (default: its first poisoned one)")
    parser.add_argument("--only", nargs="*", help="names of pictures")
    arguments = parser.parse_args()
    from playwright.sync_api import sync_playwright

    wanted = set(arguments.only or [*PICTURES, "merge", "measured", "backdoor"])
    chromium = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
    with sync_playwright() as play:
        browser = play.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        with served(arguments.zoo) as address:
            for name, (where, height) in PICTURES.items():
                page = browser.new_page(viewport={"width": 1360, "height": height})
                if name in wanted:
                    page.goto(f"{address}/{where}")
                    settle(page)
                    take(page, name, height)
                page.close()
        if arguments.merge is not None and wanted & {"merge", "measured"}:
            with served(arguments.merge) as address:
                page = browser.new_page(viewport={"width": 1360, "height": 1060})
                page.goto(f"{address}/merge?{PAIR}")
                settle(page)
                take(page, "merge", 1060)
                press(page, "Merge")
                press(page, "Measure")
                page.set_viewport_size({"width": 1360, "height": 860})
                page.get_by_text("Merged in").first.evaluate("e => e.scrollIntoView({block: 'start'})")
                take(page, "measured", 860)
                page.close()
        if arguments.bad is not None and "backdoor" in wanted:
            name = arguments.model or min(p.name for p in arguments.bad.glob("*bad*.safetensors"))
            with served(arguments.bad) as address:
                page = browser.new_page(viewport={"width": 1360, "height": 1720})
                page.goto(f"{address}/backdoor?model={name}")
                settle(page)
                press(page, "Locate")
                take(page, "backdoor", 1720)
        browser.close()


if __name__ == "__main__":
    main()
