"""Model: every view of a network, proof in words, and links that name what is not there."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

pytest.importorskip("streamlit", reason="the explorer needs the extra app")
from streamlit.testing.v1 import AppTest

sys.path.insert(0, str(Path(__file__).parent))
from explorer_pages import texts

Page = Callable[..., AppTest]


def test_the_card_is_there_at_once(page: Page) -> None:
    app = page("model", model="cnn-0.safetensors")
    assert app.selectbox(key="model").value == "cnn-0.safetensors"
    assert {m.label for m in app.metric} == {"Parameters", "Tensors", "Size", "Movable"}
    assert "shuffling neurons along this wiring was run and changed nothing" in texts(app)


def test_a_link_to_a_model_that_is_gone_says_so(page: Page) -> None:
    app = page("model", model="gone.safetensors")
    assert "gone.safetensors, which is not among these models" in app.warning[0].value
    assert app.selectbox(key="model").value is None


def test_the_graph_draws_axes_and_opens_one(page: Page) -> None:
    app = page("model", model="mlp-0.safetensors", view="Graph")
    assert "4 axes and 3 bundles of weights" in texts(app)
    axis = app.selectbox(key="axis").options[1]
    app = page("model", model="mlp-0.safetensors", view="Graph", axis=axis)
    assert f"Neurons of {axis}" in texts(app)
    assert "strongest weights" in texts(app)


@pytest.mark.parametrize(
    ("view", "words"),
    [("Wiring", "factors permuted at random"), ("Layers", "stable rank"), ("Channels", "elements of"),
     ("Neighbours", "Distance 0 is the same network")],
)  # fmt: skip
def test_every_view_is_a_link(page: Page, view: str, words: str) -> None:
    app = page("model", model="mlp-0.safetensors", view=view)
    assert words in texts(app)


def test_the_nearest_neighbour_of_a_shuffled_copy_is_its_original(page: Page) -> None:
    app = page("model", model="copy-0.safetensors", view="Neighbours")
    frame = next(f.value for f in app.dataframe if "distance" in f.value)
    assert frame["model"].iloc[0] == "mlp-0.safetensors"


def test_a_page_without_models_says_what_to_do(page: Page) -> None:
    app = page("model", zoo=None)
    assert "open a folder, upload checkpoints, or train the starter zoo" in texts(app)
