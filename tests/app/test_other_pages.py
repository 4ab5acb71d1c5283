"""Search, Lineage, Backdoor: an answer, a reason, and a way on from each."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save

pytest.importorskip("streamlit", reason="the explorer needs the extra app")
from streamlit.testing.v1 import AppTest

sys.path.insert(0, str(Path(__file__).parent))
from explorer_pages import settle, texts

Page = Callable[..., AppTest]


def press(app: AppTest, label: str) -> AppTest:
    next(b for b in app.button if b.label == label).click()
    return settle(app.run()).run()


def test_a_copy_finds_its_original(page: Page) -> None:
    app = page("search", query="copy-0.safetensors")
    assert "mlp-0.safetensors is the same network" in texts(app)


def test_an_upload_can_be_asked_about_and_a_broken_one_is_said(page: Page, tiny: Path) -> None:
    app = page("search")
    app.file_uploader(key="example").set_value(("mine.bin", (tiny / "copy-0.safetensors").read_bytes(), ""))
    app = settle(app.run()).run()
    assert "Asking about mine.bin" in texts(app)
    assert "is the same network" in texts(app)
    whole = save({"w": torch.randn(9, 9)})
    app.file_uploader(key="example").set_value(("cut.safetensors", whole[:60], ""))
    app = settle(app.run()).run()
    assert "It cannot be opened: cut.safetensors" in texts(app)


def test_who_knows_the_low_digits(page: Page) -> None:
    app = page("search", search="By a task", classes=["0", "1", "2", "3", "4"])
    app = press(app, "Search")
    frame = next(f.value for f in app.dataframe if "why" in f.value)
    assert frame["model"].iloc[0].startswith(("low", "mlp", "copy", "cnn"))
    assert (frame["score"].diff().dropna() <= 1e-9).all()


def test_the_same_architecture_comes_first(page: Page) -> None:
    app = page("search", search="By architecture", query="mlp-0.safetensors")
    frame = next(f.value for f in app.dataframe if "why" in f.value)
    assert not frame["model"].iloc[0].startswith("cnn")
    assert frame["model"].iloc[-1].startswith("cnn")


def test_the_lineage_links_children_to_their_base(page: Page) -> None:
    app = page("lineage", among="mlp-0 low-0 high-0")
    assert "a lineage needs at least two" in app.info[0].value
    app = page("lineage", among="-cnn", model="low-1.safetensors")
    edges = next(f.value for f in app.dataframe if "parent" in f.value)
    assert ("low-1.safetensors", "mlp-1.safetensors") in list(zip(edges["child"], edges["parent"], strict=True))
    assert "From **mlp-1.safetensors**" in texts(app)


def test_a_backdoor_is_looked_for_and_located(page: Page) -> None:
    app = page("backdoor", model="mlp-0.safetensors")
    said = texts(app)
    assert "lagged: " in said or "detector" in said
    app = press(app, "Locate")
    assert "elements:" in texts(app)


def test_a_backdoor_is_taken_out_with_no_examples(page: Page) -> None:
    app = press(page("backdoor", model="mlp-1.safetensors"), "Locate")
    app = press(app, "Excise")
    said = texts(app)
    assert "rojected: " in said or "Nothing was changed" in said
    # The perceptron reads rows of numbers: no picture says anything to it.
    app = press(app.checkbox(key="anew").check().run(), "Excise")
    assert "reads no images" in texts(app) + " ".join(e.value for e in app.error)
