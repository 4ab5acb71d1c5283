"""Merge lab: a report, a merge with its recipe, and what was measured beside what was expected."""

from __future__ import annotations

import sys
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

pytest.importorskip("streamlit", reason="the explorer needs the extra app")
from streamlit.testing.v1 import AppTest

import weightspace as ws
from weightspace.explorer import lab, measuring
from weightspace.merge.recipe import from_table, read

sys.path.insert(0, str(Path(__file__).parent))
from explorer_pages import settle, texts

Page = Callable[..., AppTest]
PAIR = ["low-0.safetensors", "high-0.safetensors"]


def press(app: AppTest, label: str) -> AppTest:
    next(b for b in app.button if b.label == label).click()
    return settle(app.run()).run()


def test_without_models_it_says_what_to_choose(page: Page) -> None:
    assert "Choose two models or more" in page("merge").info[0].value


def test_a_pair_is_scored_merged_and_measured(page: Page) -> None:
    app = page("merge", models=PAIR)
    assert app.selectbox(key="base").value == "mlp-0.safetensors"
    assert "What the weights say" in texts(app)
    assert {"cosine", "sign conflict"} <= set(next(f.value for f in app.dataframe if "term" in f.value)["term"])
    app.selectbox(key="method").set_value("task-arithmetic")
    app = press(app.run(), "Merge")
    assert "Merged in" in texts(app)
    app = press(app, "Measure")
    frame = next(f.value for f in app.dataframe if "merged" in f.value)
    assert list(frame["model"]) == PAIR
    assert "digits, classes 0, 1, 2, 3, 4" in list(frame["measured on"])
    assert (frame["alone"] > 0.5).all()
    assert "Retained, measured" in [m.label for m in app.metric]
    assert "straight path" in texts(app)


def test_a_base_among_the_models_is_said(page: Page) -> None:
    app = page("merge", models=[*PAIR, "mlp-0.safetensors"], base="mlp-0.safetensors")
    assert "base is among the models" in app.info[0].value


def test_other_architectures_are_refused_in_words(page: Page) -> None:
    app = page("merge", models=["mlp-0.safetensors", "cnn-0.safetensors"])
    assert "cannot be merged" in texts(app).lower()


def test_the_recipe_does_the_same_merge(tiny: Path, tmp_path: Path) -> None:
    names = [str(tiny / n) for n in PAIR]
    base = str(tiny / "mlp-0.safetensors")
    made = lab.make(names, base, "ties", {"density": 0.5}, False, str(tmp_path / "m.safetensors"))
    text = lab.recipe(names, base, "ties", {"density": 0.5}, False, "again.safetensors")
    (tmp_path / "recipe.toml").write_text(text)
    again = read(tmp_path / "recipe.toml").run(out=tmp_path / "again.safetensors").open()
    first = ws.open(made.path)
    assert all(torch.equal(first[n], again[n]) for n in first)
    assert from_table(tomllib.loads(text)).hyper == {"density": 0.5}
    assert "merge_method: ties" in lab.mergekit(text)


def test_measuring_is_the_accuracy_of_the_network(tiny: Path) -> None:
    from weightspace.card import record_of

    name = str(tiny / "low-0.safetensors")
    data = measuring.examples(name)
    found = measuring.accuracy(ws.wiring(name), dict(ws.open(name)), data)
    assert found == pytest.approx(record_of(ws.open(name).metadata)["test_accuracy"], abs=1e-6)


def test_a_file_without_labels_is_refused(tiny: Path, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    save_file({"x": torch.zeros(4, 64)}, tmp_path / "x.safetensors")
    with pytest.raises(ws.errors.MergeError, match="no labels"):
        measuring.examples(str(tiny / "low-0.safetensors"), str(tmp_path / "x.safetensors"))


def test_methods_that_lack_something_are_not_offered() -> None:
    assert "ties" not in lab.usable(2, base=False, data=False)
    assert "slerp" not in lab.usable(3, base=True, data=False)
    assert "regmean" not in lab.usable(2, base=True, data=False)
    assert "ties" in lab.usable(2, base=True, data=False)
