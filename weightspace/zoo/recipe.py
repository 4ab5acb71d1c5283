"""Recipes: a TOML file that says which populations of networks to train on which data."""

from __future__ import annotations

import os
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from weightspace.errors import ZooError
from weightspace.paths import data_dir


@dataclass(frozen=True)
class Population:
    """Networks that differ in their seed alone.

    A population is trained from scratch (``architecture``, ``width``), fine-tuned from the networks of
    ``parent`` on ``classes``, or (``permuted``) copied from them with a random element of their symmetry
    group applied. Seed ``i`` descends from seed ``i`` of the parent.
    """

    name: str
    seeds: int
    architecture: str = ""
    width: int = 0
    parent: str = ""
    permuted: bool = False
    classes: tuple[int, ...] = ()
    epochs: int = 20
    batch: int = 32
    learning_rate: float = 1e-3
    weight_decay: float = 0.0


@dataclass(frozen=True)
class Recipe:
    """A named set of populations on one data set, parents before their children."""

    name: str
    data: str
    populations: tuple[Population, ...]


def load(recipe: str | os.PathLike[str]) -> Recipe:
    """Read a recipe: the path of a TOML file, or the name of one that comes with weightspace ("starter").

    Raises ``ZooError`` naming the first thing in it that makes no sense.
    """
    path = Path(recipe)
    if not path.suffix and not path.is_file():
        path = data_dir("zoo") / f"{path.name}.toml"
    if not path.is_file():
        shipped = ", ".join(sorted(file.stem for file in data_dir("zoo").glob("*.toml")))
        raise ZooError(f"there is no recipe {recipe!s}; give a TOML file, or one that comes along: {shipped}")
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ZooError(f"the recipe {path} is not TOML: {error}") from error
    return parse(table, str(path))


def parse(table: Mapping[str, Any], source: str = "recipe") -> Recipe:
    """A recipe from the values of its TOML file; ``source`` names it in errors."""
    unknown = set(table) - {"name", "data", "defaults", "population"}
    if unknown:
        raise ZooError(
            f"{source}: unknown entries {sorted(unknown)}; expected name, data, defaults, population"
        )
    if not isinstance(table.get("name"), str) or not isinstance(table.get("data"), str):
        raise ZooError(f"{source}: a recipe needs the text entries name and data")
    seen: dict[str, Population] = {}
    for entry in table.get("population", ()):
        population = _population({**table.get("defaults", {}), **entry}, source)
        if population.name in seen:
            raise ZooError(f"{source}: two populations are named {population.name!r}")
        if population.parent and population.parent not in seen:
            raise ZooError(
                f"{source}: the parent {population.parent!r} of {population.name!r} comes not before it"
            )
        if population.parent and population.seeds > seen[population.parent].seeds:
            raise ZooError(
                f"{source}: {population.name!r} has {population.seeds} seeds but its parent "
                f"{population.parent!r} only {seen[population.parent].seeds}; each child needs its own"
            )
        seen[population.name] = population
    if not seen:
        raise ZooError(f"{source}: no [[population]] in it, so there is nothing to train")
    return Recipe(table["name"], table["data"], tuple(seen.values()))


def _population(entry: Mapping[str, Any], source: str) -> Population:
    label = entry.get("name", "without a name")
    known = {field.name: field.type for field in fields(Population)}
    unknown = set(entry) - set(known)
    if unknown:
        raise ZooError(
            f"{source}: population {label!r} has unknown entries {sorted(unknown)}; known: {sorted(known)}"
        )
    values = dict(entry)
    values["classes"] = tuple(values.get("classes", ()))
    for key in ("learning_rate", "weight_decay"):
        if isinstance(values.get(key), int):
            values[key] = float(values[key])
    wrong = [
        key for key, value in values.items() if type(value).__name__ != str(known[key]).partition("[")[0]
    ]
    if wrong or not {"name", "seeds"} <= set(values):
        missing = sorted({"name", "seeds"} - set(values))
        raise ZooError(f"{source}: population {label!r}: wrong type for {wrong}, missing {missing}")
    population = Population(**values)
    if bool(population.parent) == bool(population.architecture):
        raise ZooError(f"{source}: population {label!r} needs either an architecture or a parent")
    if population.architecture and population.width < 1:
        raise ZooError(
            f"{source}: population {label!r} needs a width of at least 1, found {population.width}"
        )
    if population.permuted and not population.parent:
        raise ZooError(f"{source}: population {label!r} is permuted but has no parent to copy")
    if population.seeds < 1 or population.epochs < 0 or population.batch < 1:
        raise ZooError(f"{source}: population {label!r} needs seeds >= 1, epochs >= 0 and batch >= 1")
    if not population.name.replace("-", "").replace("_", "").replace(".", "").isalnum():
        raise ZooError(f"{source}: population {label!r}: a name is letters, digits, '-', '_' and '.'")
    return population
