"""The five stories in a real browser: find a model, diff two, score and merge two, scan one, read the lineage.

Chromium through Playwright, on a small zoo trained here and on real files; hostile uploads on the way.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save

pytest.importorskip("streamlit", reason="the explorer needs the extra app")
playwright = pytest.importorskip("playwright.sync_api", reason="a browser is driven by Playwright, which is not "
                                                               "installed")

CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
SHARED = Path(__file__).resolve().parents[2].parent / "shared" / "checkpoints"
PATIENCE = 240_000
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium; name one in CHROMIUM"),
]


class Visitor:
    """Someone at the explorer, and what the browser's console said meanwhile."""

    def __init__(self, page: Any, address: str) -> None:
        self.page, self.address = page, address
        self.complaints: list[str] = []
        page.on("console", lambda m: self.complaints.append(m.text) if m.type == "error" else None)
        page.on("pageerror", lambda e: self.complaints.append(str(e)))
        page.set_default_timeout(PATIENCE)

    def visit(self, where: str = "") -> None:
        self.page.goto(f"{self.address}/{where}")
        self.settle()

    def settle(self) -> None:
        """Wait until nothing is in work."""
        self.page.locator("h1").first.wait_for()
        end = time.monotonic() + PATIENCE / 1000
        calm = 0
        while calm < 3:
            assert time.monotonic() < end, self.page.locator("body").inner_text()
            self.page.wait_for_timeout(250)
            busy = self.page.get_by_text("In work:").count() + self.page.get_by_test_id("stStatusWidget").count()
            calm = 0 if busy else calm + 1

    def press(self, label: str) -> None:
        self.page.get_by_role("button", name=label, exact=True).first.click()
        self.settle()

    def turn_to(self, view: str) -> None:
        """Choose among the views of a page."""
        self.page.get_by_test_id("stButtonGroup").get_by_text(view, exact=True).first.click()
        self.settle()

    def follow(self, label: str) -> None:
        self.page.get_by_test_id("stPageLink").get_by_text(label).first.click()
        self.settle()

    def sees(self, words: str) -> None:
        self.page.get_by_text(words).first.wait_for()

    def text(self) -> str:
        return str(self.page.locator("body").inner_text())

    def draws(self, kind: str = ".scatterlayer .point") -> int:
        """Wait for a figure that shows something; how many marks it has."""
        marks = self.page.locator(f".js-plotly-plot {kind}")
        marks.first.wait_for(state="attached")
        return int(marks.count())

    def chosen(self) -> Any:
        """What all widgets of the page say."""
        return self.page.evaluate("""() => {
            const at = document.querySelector('[data-testid=stMain]');
            const all = q => [...at.querySelectorAll(q)];
            return [
                all('input:not([type=file])').filter(i => i.offsetParent).map(i => [i.value, i.checked]),
                all('button[role=radio][aria-checked=true]').map(b => b.innerText),
                all('[data-testid=stMultiSelect]').map(m => m.innerText),
            ]
        }""")

    def check(self) -> None:
        """Nothing failed: no traceback on the page, nothing in the console but what every Streamlit server answers when
        a page is opened by its address (it asks below the page first, and is told that there is nothing)."""
        assert "Traceback" not in self.text()
        assert not [c for c in self.complaints if "404" not in c], self.complaints


def serve(zoo: Path | None, work: Path) -> Iterator[str]:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port = one.getsockname()[1]
    log = (work / "server.log").open("w")
    process = subprocess.Popen(
        [sys.executable, "-m", "weightspace", "app", *([] if zoo is None else [str(zoo)]), "--port", str(port),
         "--headless"], stdout=log, stderr=subprocess.STDOUT, cwd=work,
    )  # fmt: skip
    address = f"http://127.0.0.1:{port}"
    try:
        end = time.monotonic() + 180
        while True:
            try:
                urllib.request.urlopen(f"{address}/_stcore/health", timeout=2).read()
                break
            except OSError:
                assert process.poll() is None, (work / "server.log").read_text()
                assert time.monotonic() < end
                time.sleep(0.2)
        yield address
    finally:
        process.terminate()
        process.wait(30)
        log.close()


@pytest.fixture(scope="module")
def address(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    # A copy: recorded merges are written beside the index.
    work = tmp_path_factory.mktemp("served")
    shutil.copytree(tiny, work / "models")
    yield from serve(work / "models", work)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as play:
        found = play.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield found
        found.close()


@pytest.fixture
def visitor(browser: Any, address: str) -> Iterator[Visitor]:
    context = browser.new_context(viewport={"width": 1360, "height": 900})
    yield Visitor(context.new_page(), address)
    context.close()


def test_find_a_model_by_keyboard_and_select_it_in_both(visitor: Visitor) -> None:
    visitor.visit()
    visitor.sees("8 of 8 models")
    visitor.page.get_by_role("textbox", name="Filter").focus()
    visitor.page.keyboard.type("relation:permuted")
    visitor.page.keyboard.press("Enter")
    visitor.sees("1 of 8 models")
    assert "q=relation" in visitor.page.url
    # A row's box in the table; the map rings the same model.
    grid = visitor.page.get_by_test_id("stDataFrame").first
    grid.click(position={"x": 16, "y": 52})
    visitor.settle()
    visitor.sees("1 selected")
    assert "sel=copy-0.safetensors" in visitor.page.url
    visitor.follow("What is like it?")
    visitor.sees("mlp-0.safetensors is the same network")
    visitor.check()


def test_a_point_of_the_map_selects_its_row(visitor: Visitor) -> None:
    visitor.visit()
    visitor.page.locator(".js-plotly-plot").first.wait_for()
    point = visitor.page.locator(".scatterlayer .point").last
    point.click(force=True)
    visitor.settle()
    visitor.sees("1 selected")
    visitor.check()


def test_diff_two(visitor: Visitor) -> None:
    visitor.visit("?sel=mlp-0.safetensors&sel=copy-0.safetensors")
    visitor.follow("Compare the first two")
    visitor.sees("with its neurons in another order")
    visitor.turn_to("Permutation")
    visitor.sees("on the diagonal once B is aligned")
    visitor.turn_to("Neurons")
    visitor.sees("How much the weights into and out of each")
    visitor.check()


def test_score_merge_and_measure_two(visitor: Visitor) -> None:
    visitor.visit("?sel=low-0.safetensors&sel=high-0.safetensors")
    visitor.follow("Score a merge of 2")
    visitor.sees("What the weights say")
    visitor.press("Merge")
    visitor.sees("Merged in")
    with visitor.page.expect_download() as saved:
        visitor.page.get_by_text("Recipe (TOML)").first.click()
    assert "[[models]]" in Path(saved.value.path()).read_text()
    visitor.press("Measure")
    visitor.sees("Retained, measured")
    visitor.check()


def test_scan_one(visitor: Visitor) -> None:
    visitor.visit("?sel=cnn-0.safetensors")
    visitor.follow("Scan it")
    visitor.press("Locate")
    visitor.sees("elements:")
    visitor.check()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_read_the_lineage(browser: Any, address: str, scheme: str) -> None:
    context = browser.new_context(viewport={"width": 1360, "height": 900}, color_scheme=scheme)
    visitor = Visitor(context.new_page(), address)
    visitor.visit()
    visitor.page.get_by_role("link", name="Lineage").first.click()
    visitor.settle()
    visitor.sees("related models, parents left of their children")
    # The words are there before plotly is read: what counts is a dot for every model, and its name in the page's ink.
    assert visitor.draws() == 7
    names = visitor.page.locator(".js-plotly-plot .textpoint text")
    assert {names.nth(i).text_content() for i in range(names.count())} >= {"mlp-0", "low-0", "copy-0"}
    ink = names.first.evaluate("e => getComputedStyle(e).fill")
    assert (int(ink.removeprefix("rgb(").split(",")[0]) > 128) == (scheme == "dark")
    visitor.check()
    context.close()


LINKS = {
    "?q=-cnn&colour=test_accuracy&map_of=encoder%2C+PCA&sel=mlp-0.safetensors&sel=low-0.safetensors": "2 selected",
    "model?model=cnn-0.safetensors&view=Layers&layer=conv.1.weight": "Values of conv.1.weight",
    "model?model=mlp-0.safetensors&view=Graph&axis=hidden.0": "Neurons of hidden.0",
    "model?model=cnn-0.safetensors&view=Channels&of=conv.1": "elements of conv.1",
    "compare?a=mlp-0.safetensors&b=low-0.safetensors&show=Neurons&of_axis=hidden.1": "elements of hidden.1",
    "compare?a=mlp-0.safetensors&b=low-0.safetensors&align=false&measure=Cosine": "Cosine between the tensors",
    "merge?models=low-0.safetensors&models=high-0.safetensors&base=mlp-0.safetensors&method=ties"
    "&hyper-ties-density=0.35&merge_align=true": "Make the merge",
    "backdoor?model=cnn-0.safetensors&base=mlp-0.safetensors": "Where it sits",
    "lineage?among=-cnn&model=low-1.safetensors": "From mlp-1.safetensors",
    "search?search=By+a+task&set=digits&classes=0&classes=3": "Which model knows a task?",
    "search?query=copy-0.safetensors&by=training-free+descriptor&k=5": "is the same network",
    "search?search=By+architecture&query=cnn-0.safetensors": "architectures like cnn-0.safetensors",
}


@pytest.mark.parametrize("link", list(LINKS))
def test_a_link_brings_back_what_was_seen(browser: Any, address: str, link: str) -> None:
    """Opened, copied from the address bar, and opened by somebody else."""
    seen = []
    where = link
    for _ in range(2):
        context = browser.new_context(viewport={"width": 1360, "height": 900})
        visitor = Visitor(context.new_page(), address)
        visitor.visit(where)
        visitor.sees(LINKS[link])
        # What was worked out for the first time is drawn by a second run of the page.
        visitor.settle()
        seen.append(visitor.chosen())
        where = visitor.page.url.removeprefix(f"{address}/")
        assert not visitor.page.get_by_text("which is not among these models").count()
        visitor.check()
        context.close()
    assert seen[0] == seen[1]
    said = str(seen[0])
    for part in link.partition("?")[2].split("&"):
        name, _, value = part.partition("=")
        if name in ("q", "model", "axis", "layer", "of", "a", "b", "of_axis", "base", "method", "among", "query"):
            assert value in said
        elif name in ("hyper-ties-density", "measure", "by", "view", "show", "search"):
            assert value.replace("+", " ") in said


def children(parent: int) -> set[int]:
    """Processes that descend from one."""
    of: dict[int, set[int]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            fields = stat.read_text().rpartition(")")[2].split()
            if fields[0] != "Z":
                of.setdefault(int(fields[1]), set()).add(int(stat.parent.name))
    found, waiting = set(), [parent]
    while waiting:
        below = of.get(waiting.pop(), set())
        found |= below
        waiting += below
    return found


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="processes are told apart by /proc")
def test_cancel_ends_the_processes_that_worked(browser: Any, tmp_path: Path) -> None:
    before = children(os.getpid())
    pages = serve(None, tmp_path)
    context = browser.new_context(viewport={"width": 1360, "height": 900})
    try:
        visitor = Visitor(context.new_page(), next(pages))
        visitor.visit()
        visitor.page.get_by_role("tab", name="Starter zoo").click()
        visitor.page.get_by_role("button", name="Train the starter zoo").click()
        visitor.sees("Training the starter zoo")
        bar = visitor.page.get_by_role("button", name="Cancel")
        bar.wait_for()
        visitor.page.wait_for_timeout(2000)
        workers = [p for p in children(os.getpid()) - before if b"explorer.worker" in _command(p)]
        assert workers
        bar.click()
        visitor.sees("Training the starter zoo was cancelled")
        visitor.settle()
        visitor.page.wait_for_timeout(1000)
        left = [p for p in workers if b"explorer.worker" in _command(p)]
        # One process may stand by for the next job; the one that trained is gone.
        assert len(left) < len(workers)
        assert not list(tmp_path.glob("models/starter/.weightspace/index.sqlite"))
        visitor.check()
    finally:
        context.close()
        pages.close()


def _command(process: int) -> bytes:
    try:
        return Path(f"/proc/{process}/cmdline").read_bytes()
    except OSError:
        return b""


def test_every_view_of_a_model_opens_by_its_link(visitor: Visitor) -> None:
    views = {
        "Card": "shuffling neurons along this wiring was run", "Graph": "Discs are axes",
        "Wiring": "Tensors that share an axis are wired together", "Layers": "Singular values of",
        "Channels": "norm of the weights that lead to each", "Neighbours": "Compare with copy-0.safetensors",
    }  # fmt: skip
    for view, words in views.items():
        visitor.visit(f"model?model=mlp-0.safetensors&view={view}")
        visitor.sees(words)
        assert visitor.page.get_by_role("combobox", name="Model").input_value() == "mlp-0.safetensors"
    visitor.check()


class _Evil:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, ("touch weightspace-was-here",)


def test_hostile_uploads_are_refused_and_the_app_lives_on(visitor: Visitor, tmp_path: Path) -> None:
    good = save({"w": torch.randn(8, 8), "b": torch.randn(8)})
    vast = b'{"w": {"dtype": "F32", "shape": [1000000, 1000000], "data_offsets": [0, 4000000000000]}}'
    files = {
        "evil.pt": pickle.dumps(_Evil()), "cut.safetensors": good[:90], "empty.safetensors": b"",
        "note.safetensors": b"this is no model at all", "fine.txt": good,
        "vast.safetensors": len(vast).to_bytes(8, "little") + vast, "long.safetensors": b"\xff" * 8 + b"{}",
    }  # fmt: skip
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    # A browser strips folders from names; a hostile client does not.
    upward = {"name": "../../up.safetensors", "mimeType": "application/octet-stream", "buffer": good}
    visitor.visit()
    visitor.page.get_by_text("Open a folder, upload checkpoints").click()
    visitor.page.get_by_role("tab", name="Upload").click()
    visitor.page.locator("input[type=file]").first.set_input_files([str(tmp_path / name) for name in files])
    visitor.sees("6 of these files cannot be opened")
    visitor.sees("1 of your uploads can be chosen")
    refused = visitor.text()
    for name in files.keys() - {"fine.txt"}:
        assert name in refused
    visitor.page.locator("input[type=file]").first.set_input_files([upward])
    visitor.sees("2 of your uploads can be chosen")
    assert "up.safetensors" in visitor.text()
    visitor.follow("Look at fine.txt")
    visitor.sees("Nothing odd was found")
    assert not list(Path.cwd().glob("weightspace-was-here"))
    visitor.check()


def test_dark_and_narrow(browser: Any, address: str) -> None:
    context = browser.new_context(viewport={"width": 420, "height": 860}, color_scheme="dark")
    visitor = Visitor(context.new_page(), address)
    visitor.visit()
    visitor.sees("8 of 8 models")
    ground = visitor.page.evaluate("getComputedStyle(document.querySelector('.stApp')).backgroundColor")
    assert max(int(x) for x in ground.removeprefix("rgb(").removesuffix(")").split(", ")) < 60
    wide = visitor.page.evaluate("document.documentElement.scrollWidth")
    assert wide <= 425
    visitor.check()
    context.close()


REAL = ("textgenrnn", "otfusion-mnist", "burn-mnist", "fer-trajectory")


@pytest.mark.skipif(not SHARED.is_dir(), reason=f"there are no real checkpoints at {SHARED}")
def test_the_stories_on_real_files(browser: Any, tmp_path: Path) -> None:
    import weightspace as ws

    for name in REAL[:3]:
        shutil.copytree(SHARED / name, tmp_path / "real" / name)
    ws.Zoo(tmp_path / "real").index(jobs=1, progress=False)
    pages = serve(tmp_path / "real", tmp_path)
    context = browser.new_context(viewport={"width": 1360, "height": 900})
    try:
        visitor = Visitor(context.new_page(), next(pages))
        visitor.visit()
        names = [str(n) for n in ws.Zoo(tmp_path / "real").table().index]
        visitor.sees(f"{len(names)} of {len(names)} models")
        twins = [n for n in names if n.startswith("otfusion-mnist")][:2]
        visitor.visit(f"compare?a={twins[0]}&b={twins[1]}")
        visitor.sees("Cosine of the weights")
        visitor.visit(f"merge?models={twins[0]}&models={twins[1]}")
        visitor.sees("Make the merge")
        visitor.visit(f"backdoor?model={twins[0]}")
        visitor.sees("Where it sits")
        visitor.visit("lineage?among=textgenrnn")
        visitor.sees("Descents found")
        visitor.check()
    finally:
        context.close()
        pages.close()
