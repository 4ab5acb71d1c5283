"""Sampled recipes: all that ship make sense, draws depend on nothing but the recipe, mistakes are named."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from weightspace.errors import ZooError
from weightspace.paths import data_dir
from weightspace.zoo.data import DataSpec
from weightspace.zoo.description import module_of
from weightspace.zoo.recipe import Sampled, load, parse
from weightspace.zoo.sampling import Run, draw, runs_of

SHIPPED = [path.stem for path in sorted(data_dir("zoo").glob("*.toml")) if load(path).sampled]
FACTS = {
    "digits": ((1, 8, 8), 10), "mnist": ((1, 28, 28), 10), "cifar10": ((3, 32, 32), 10),
    "cifar10-gray": ((1, 32, 32), 10), "usps": ((1, 16, 16), 10), "text": ((64,), 65),
    "reviews": ((32,), 2),
}  # fmt: skip
PROMISED = (
    "small-cnn-cifar10", "small-cnn-mnist", "wild-park", "wild-park-mnist", "widths", "inr", "mixed", "families",
    "merging",
)  # fmt: skip


def _facts(data: DataSpec) -> tuple[tuple[int, ...], int]:
    if data.tasks:
        return (1, data.side, data.side), 10 * len(data.tasks)
    shape, classes = FACTS[data.name]
    return (shape[0], *(side // data.pool for side in shape[1:])), classes


def _runs(name: str, full: bool = False) -> list[Run]:
    recipe = load(name, full)
    plans: dict[str, list[Run]] = {}
    for population in recipe.sampled:
        plans[population.name] = runs_of(
            recipe, population, _facts(population.data), plans.get(population.parent, ()),
            plans.get(population.like, ()),
        )  # fmt: skip
    return [run for runs in plans.values() for run in runs]


@pytest.mark.parametrize("name", sorted({*SHIPPED, *PROMISED}))
def test_every_shipped_recipe_draws_networks_that_can_be_built(name: str) -> None:
    runs = _runs(name)
    assert len({run.name for run in runs}) == len(runs)
    assert len({run.seed for run in runs}) > 0.99 * len(runs)
    for run in runs[:: max(1, len(runs) // 60)]:
        module_of(run.network)


@pytest.mark.parametrize("name", PROMISED)
def test_the_full_size_is_larger(name: str) -> None:
    assert len(load(name, full=True).sampled) == len(load(name).sampled)
    assert sum(p.runs for p in load(name, full=True).sampled) > sum(p.runs for p in load(name).sampled)


@pytest.mark.parametrize("name", ["small-cnn-cifar10", "small-cnn-mnist"])
def test_the_small_cnn_has_the_published_layout(name: str) -> None:
    run = _runs(name)[0]
    module, (x,) = module_of(run.network)
    assert sum(p.numel() for p in module.parameters()) == 4970
    assert module(x).shape == (2, 10)


def test_draws_are_the_same_every_time_and_differ_between_runs() -> None:
    one, two = _runs("wild-park"), _runs("wild-park")
    assert one == two
    assert [run.digest for run in one] == [run.digest for run in two]
    assert len({str(run.network) for run in one}) > 0.9 * len(one)
    depths = {len(run.network["channels"]) for run in one}
    assert depths == {2, 3, 4, 5}
    assert {run.network["activation"] for run in one} == {"relu", "gelu", "silu", "tanh", "sigmoid"}
    assert {run.network["norm"] for run in one} == {"none", "batch", "group", "layer"}


def test_a_new_entry_leaves_other_draws_as_they_were() -> None:
    spec = {"a": {"uniform": [0, 1]}, "b": {"log_uniform": [1e-4, 1e-1]}}
    before = draw(spec, "here")
    after = draw({"c": {"choice": [1, 2]}, **spec}, "here")
    assert before == {key: after[key] for key in before}
    assert 1e-4 <= before["b"] <= 1e-1
    assert draw(spec, "there") != before


def test_children_have_the_network_and_some_of_the_classes_of_their_parents() -> None:
    runs = {run.name: run for run in _runs("families")}
    children = [run for run in runs.values() if run.parent]
    assert len(children) > 100
    for child in children:
        parent = runs[child.parent]
        assert child.network == parent.network
        assert child.parent_digest == parent.digest
        assert set(child.classes) <= set(parent.classes or range(10))
    assert {len(run.classes) for run in children} == {5, 3}


def test_full_sizes_lie_over_the_small_ones() -> None:
    small, full = load("small-cnn-cifar10"), load("small-cnn-cifar10", full=True)
    assert (full.sampled[0].runs, full.sampled[0].epochs, full.sampled[0].data.train) == (30000, 86, 0)
    assert full.sampled[0].hyper == small.sampled[0].hyper
    assert full.sampled[0].data.standardise
    with pytest.raises(ZooError, match="one size only"):
        load("starter", full=True)


def _table(**changes: Any) -> dict[str, Any]:
    network = {"kind": "mlp", "widths": [4], "activation": "relu"}
    return {"name": "r", "data": "digits", "population": [{"name": "p", "runs": 2, "network": network, **changes}]}


def test_a_small_recipe_is_read() -> None:
    (population,) = parse(_table(epochs=3, checkpoints=[0, 3])).sampled
    assert isinstance(population, Sampled)
    assert (population.checkpoints, population.data.name) == ((0, 3), "digits")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"runs": 0}, "at least 1"),
        ({"runs": "3"}, "runs is '3', expected int"),
        ({"speed": 3}, "unknown entries"),
        ({"epochs": 4, "checkpoints": [2, 1, 4]}, "rising"),
        ({"epochs": 4, "checkpoints": [1, 2]}, "up to the last"),
        ({"network": {}}, "one of a network, a parent"),
        ({"network": {"widths": [3]}}, "kind"),
        ({"hyper": {"rate": 1}}, "learning_rate"),
        ({"part": "all"}, "train or test"),
        ({"name": "../x"}, "a name is"),
        ({"parent": "q", "network": {}}, "parent 'q'"),
        ({"data": {"name": "digits", "size": 3}}, "wrong entries"),
    ],
)
def test_mistakes_are_named(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ZooError, match=message):
        parse(_table(**change))


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"x": {"pick": [1]}}, "expected uniform"),
        ({"x": {"choice": []}}, "needs a list"),
        ({"x": {"uniform": [2, 1]}}, "empty"),
        ({"x": {"log_uniform": [0, 1]}}, "empty"),
        ({"x": {"uniform": [0, "1"]}}, "two ends"),
        ({"x": {"each": {"choice": [1]}}}, "depth"),
        ({"x": {"choice": [1], "uniform": [0, 1]}}, "no draw"),
    ],
)
def test_draws_that_make_no_sense_are_named(spec: dict[str, Any], message: str) -> None:
    with pytest.raises(ZooError, match=message):
        draw(spec, "here")


def test_a_recipe_of_ones_own(tmp_path: Path) -> None:
    text = 'name = "own"\ndata = "digits"\n[[population]]\nname = "p"\nruns = 3\nnetworks = 1\n[population.network]\n'
    text += 'kind = "mlp"\ndepth = {integer = [1, 4]}\nwidths = {each = {integer = [2, 99]}}\nactivation = "relu"\n'
    (tmp_path / "own.toml").write_text(text)
    recipe = load(tmp_path / "own.toml")
    runs = runs_of(recipe, recipe.sampled[0], ((1, 8, 8), 10))
    assert runs[0].network == runs[1].network == runs[2].network
    assert len({run.seed for run in runs}) == 3
