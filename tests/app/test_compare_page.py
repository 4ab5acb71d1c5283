"""Compare: a shuffled copy is recognised, other architectures are told apart, every view is a link."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("streamlit", reason="the explorer needs the extra app")
from streamlit.testing.v1 import AppTest

import weightspace as ws
from weightspace.explorer.diff import compare

sys.path.insert(0, str(Path(__file__).parent))
from explorer_pages import texts

Page = Callable[..., AppTest]


def test_a_shuffled_copy_is_called_one(page: Page) -> None:
    app = page("compare", a="mlp-0.safetensors", b="copy-0.safetensors")
    assert "copy-0.safetensors is mlp-0.safetensors with its neurons in another order" in texts(app)
    frame = next(f.value for f in app.dataframe if "change after" in f.value)
    assert (frame["change"] > 0.1).any()
    assert (frame["change after"] < 1e-6).all()


@pytest.mark.parametrize(
    ("view", "words"), [("Permutation", "on the diagonal"), ("Neurons", "changed"), ("Wiring", "Names, shapes and "
                                                                                               "wiring")]
)
def test_every_view_is_a_link(page: Page, view: str, words: str) -> None:
    assert words in texts(page("compare", a="mlp-0.safetensors", b="low-0.safetensors", show=view))


def test_other_architectures_are_compared_by_what_they_share(page: Page) -> None:
    app = page("compare", a="mlp-0.safetensors", b="cnn-0.safetensors", show="Wiring")
    assert "are not one architecture" in app.warning[0].value
    assert len(app.dataframe[0].value) > 2


def test_the_same_model_twice_is_a_hint(page: Page) -> None:
    app = page("compare", a="mlp-0.safetensors", b="mlp-0.safetensors")
    assert "two different models" in app.info[0].value


def test_the_rank_of_a_change_and_its_neurons_are_what_was_planted(tiny: Path, tmp_path: Path) -> None:
    model = ws.open(tiny / "mlp-0.safetensors")
    tensors = {n: model[n] for n in model}
    name = next(n for n in tensors if tensors[n].dim() == 2 and min(tensors[n].shape) > 4)
    changed = tensors[name].clone()
    changed[3] += 1.0
    from weightspace.align.entry import as_checkpoint

    as_checkpoint({**tensors, name: changed}, model).save(tmp_path / "b.safetensors")
    found = compare(str(tiny / "mlp-0.safetensors"), str(tmp_path / "b.safetensors"), align=False)
    row = found.blocks.set_index("tensor").loc[name]
    assert row["rank"] == 1
    before, after = next(v for k, v in found.neurons.items() if len(v[0]) == changed.shape[0])
    assert after is None
    assert np.argmax(before) == 3
