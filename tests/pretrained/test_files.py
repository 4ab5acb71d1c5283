"""The files that come along: small, whole, and a clear error where they are not."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from weightspace.errors import MetanetError
from weightspace.pretrained.model import ACCURACY, CARD, ENCODER, FILES, ZOO, Shipped, shipped
from weightspace.pretrained.recipe import load


def test_they_are_a_few_megabytes_of_plain_data() -> None:
    files = [file for file in FILES.rglob("*") if file.is_file()]
    assert {file.suffix for file in files} == {".json", ".safetensors", ".md"}
    assert sum(file.stat().st_size for file in files) < 6e6
    assert (FILES / CARD).read_text(encoding="utf-8").startswith("# Pretrained metanets")


def test_the_card_speaks_of_these_files() -> None:
    assert shipped().name in (FILES / CARD).read_text(encoding="utf-8")


def test_weights_are_float16_and_what_is_computed_with_is_float32() -> None:
    for part, trained in ((ENCODER, shipped().encoder), (ACCURACY, shipped().accuracy)):
        assert {t.dtype for t in load_file(FILES / part / "metanet.safetensors").values()} == {torch.float16}
        assert {p.dtype for p in trained.metanet.parameters()} == {torch.float32}
        assert not trained.metanet.training


def test_saved_and_loaded_again_they_are_the_same(tmp_path: Path) -> None:
    known = shipped()
    known.save(tmp_path)
    again = Shipped.load(tmp_path)
    assert again.name == known.name
    assert again.dimension == known.dimension
    assert torch.equal(again.range.calibration, known.range.calibration)
    for mine, other in zip(known.encoder.metanet.parameters(), again.encoder.metanet.parameters(), strict=True):
        assert torch.equal(mine, other)


@pytest.mark.parametrize("name", [ZOO, f"{ENCODER}/metanet.safetensors", f"{ACCURACY}/config.json"])
@pytest.mark.parametrize("how", ["missing", "cut", "flipped"])
def test_damage_is_named(tmp_path: Path, name: str, how: str) -> None:
    folder = tmp_path / "files"
    shutil.copytree(FILES, folder)
    data = (folder / name).read_bytes()
    if how == "missing":
        (folder / name).unlink()
    elif how == "cut":
        (folder / name).write_bytes(data[: len(data) // 2])
    else:
        (folder / name).write_bytes(data[:50] + bytes([data[50] ^ 0xFF]) + data[51:])
    with pytest.raises(MetanetError, match=Path(name).name if how == "missing" else "again"):
        Shipped.load(folder)


def test_parts_of_different_makes_are_refused(tmp_path: Path) -> None:
    folder = tmp_path / "files"
    shutil.copytree(FILES, folder)
    config = json.loads((folder / ENCODER / "config.json").read_text())
    config["made_of"] = "something else"
    (folder / ENCODER / "config.json").write_text(json.dumps(config))
    with pytest.raises(MetanetError, match="others than it was made with"):
        Shipped.load(folder)


def test_the_recipe_that_comes_along_is_read_and_mistakes_in_one_are_named(tmp_path: Path) -> None:
    recipe = load()
    assert any(source.held_out for source in recipe.sources)
    assert recipe.encoder.task == "contrastive"
    text = (Path(load.__code__.co_filename).parent / "recipe.toml").read_text(encoding="utf-8")
    for wrong, match in (
        (text.replace('task = "contrastive"', 'task = "ranking"'), "contrastive"),
        (text.replace("fractions = [", "fractions = [0.9, "), "fractions"),
        (text.replace("held_out = true", "held_up = true"), "held_up"),
        ("not TOML at all", "no recipe"),
    ):
        (tmp_path / "recipe.toml").write_text(wrong)
        with pytest.raises(MetanetError, match=match):
            load(tmp_path / "recipe.toml")
