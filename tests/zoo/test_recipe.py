from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from weightspace.errors import ZooError
from weightspace.zoo.recipe import load, parse

GOOD: dict[str, Any] = {
    "name": "r",
    "data": "digits",
    "defaults": {"epochs": 1},
    "population": [
        {"name": "base", "architecture": "mlp", "width": 4, "seeds": 2},
        {"name": "child", "parent": "base", "seeds": 1, "classes": [0, 1], "learning_rate": 1},
    ],
}


def test_the_starter_recipe_is_what_the_readme_says() -> None:
    recipe = load("starter")
    populations = recipe.populations
    assert 25 <= sum(p.seeds for p in populations) <= 40
    assert {p.architecture for p in populations if p.architecture} == {"mlp", "cnn"}
    assert len({(p.architecture, p.width) for p in populations if p.architecture}) == 4
    assert any(p.permuted for p in populations)
    assert any(p.classes for p in populations)


def test_defaults_reach_every_population() -> None:
    recipe = parse(GOOD)
    assert [p.epochs for p in recipe.populations] == [1, 1]
    assert recipe.populations[1].classes == (0, 1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": 3}, "needs the text entries"),
        ({"extra": 1}, "unknown entries"),
        ({"population": []}, "nothing to train"),
        ({"population": [{"name": "a", "seeds": 1}]}, "either an architecture or a parent"),
        ({"population": [{"name": "a", "architecture": "mlp", "seeds": 1}]}, "width"),
        ({"population": [{"name": "a", "architecture": "mlp", "width": "4", "seeds": 1}]}, "wrong type"),
        ({"population": [{"name": "a", "parent": "b", "seeds": 1}]}, "parent 'b'"),
        ({"population": [{"name": "a/../b", "architecture": "mlp", "width": 4, "seeds": 1}]}, "a name is"),
        ({"population": [GOOD["population"][0]] * 2}, "two populations"),
        ({"population": [GOOD["population"][0], {**GOOD["population"][1], "seeds": 3}]}, "only 2"),
        ({"population": [{**GOOD["population"][0], "permuted": True}]}, "no parent to copy"),
        ({"population": [{**GOOD["population"][0], "speed": 3}]}, "unknown entries"),
    ],
)
def test_a_recipe_that_makes_no_sense_is_named(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ZooError, match=message):
        parse({**GOOD, **change})


def test_files_that_are_no_recipes(tmp_path: Path) -> None:
    (tmp_path / "broken.toml").write_text("name = ")
    with pytest.raises(ZooError, match="not TOML"):
        load(tmp_path / "broken.toml")
    with pytest.raises(ZooError, match="starter"):
        load("no-such-recipe")
