"""``weightspace train``: from a folder or a recipe to a table, resumed when asked again, mistakes in sentences."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner

pytest.importorskip("lightning", reason="training needs the extra 'train'")

from tests.metanets.standin import KIND, population
from weightspace.cli import app
from weightspace.errors import MetanetError
from weightspace.metanets import base
from weightspace.metanets.training import Trained

RECIPE = """
name = "tiny"
data = "digits"

[[population]]
name = "mlp"
architecture = "mlp"
width = 4
seeds = 12
epochs = 1
"""


@pytest.fixture(autouse=True)
def _surroundings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    monkeypatch.setitem(base.KINDS, "blocks", KIND)  # type: ignore[arg-type]
    monkeypatch.chdir(tmp_path)
    yield
    logging.getLogger("weightspace").handlers.clear()


def _run(*arguments: str) -> str:
    result = CliRunner().invoke(app, ["train", *arguments, "--metanet", "blocks", "--batch", "8"])
    if result.exception is not None:
        raise result.exception
    return result.output


def test_a_folder_is_trained_on_and_resumed(tmp_path: Path) -> None:
    folder = population(tmp_path / "nets", runs=30)
    arguments = (str(folder), "--epochs", "3", "--option", "width=8", "--where", "final=true", "--augment", "noise=0.1")
    first = _run(*arguments)
    for word in ("blocks", "ridge", "boosting", "chance", "Kendall τ", "R²", "MAE", "epoch 3/3"):
        assert word in first
    saved = tmp_path / "runs" / "nets-accuracy-blocks-0"
    trained = Trained.load(saved)
    assert trained.metanet.config["width"] == 8
    assert trained.plan.augmentation.noise == 0.1
    again = json.loads(_run(*arguments, "--json").partition("\n{")[2].join(("{", "")))
    assert again["folder"] == str(saved.relative_to(tmp_path))
    assert len(again["history"]) == 3
    with pytest.raises(MetanetError, match="another plan"):
        _run(*arguments[:2], "4", *arguments[3:])
    assert "epoch 4/4" in _run(*arguments[:2], "4", *arguments[3:], "--fresh")


def test_a_recipe_is_built_first(tmp_path: Path) -> None:
    (tmp_path / "tiny.toml").write_text(RECIPE)
    found = _run("tiny.toml", "--epochs", "1", "--out", "here")
    assert "of test_accuracy, 1 epochs) in here" in found
    assert len(list((tmp_path / "models" / "tiny").glob("*.safetensors"))) == 12
    assert (tmp_path / "here" / "metanet.safetensors").is_file()


def test_other_tasks(tmp_path: Path) -> None:
    folder = str(population(tmp_path / "nets", runs=24))
    assert "calibration error" in _run(folder, "--task", "label", "--epochs", "1")
    assert "regression of train_accuracy - test_accuracy" in _run(folder, "-t", "generalisation-gap", "--epochs", "1")
    found = _run(folder, "--task", "embedding", "--epochs", "1", "--augment", "noise=0.1")
    assert "recall@10" in found
    assert "descriptor" in found


def test_mistakes_are_sentences(tmp_path: Path) -> None:
    folder = str(population(tmp_path / "nets", runs=3))
    for arguments, match in (
        (("nowhere",), "neither a folder of networks nor a recipe"),
        ((folder, "--task", "colour"), "no task 'colour'"),
        ((folder, "--augment", "blur=1"), "no option 'blur'"),
        ((folder, "--option", "depth=3"), "does not take these options"),
        ((folder, "--option", "depth"), "write it as name=value"),
        ((folder, "--where", "final=7"), "6 of which do not fit"),
        ((folder, "--device", "tpu"), "device is 'tpu'"),
        ((folder, "--set", "warmup=long"), "warmup is 'long', expected a number"),
        ((folder, "--augment", "noise=loud"), "noise is 'loud', expected a number"),
        ((folder, "--split-by", "colour"), "no field 'colour'"),
    ):
        with pytest.raises(MetanetError, match=match):
            _run(*arguments)
