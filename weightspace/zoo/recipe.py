"""Recipes: a TOML file that says which populations of networks to train on which data."""

from __future__ import annotations

import os
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from weightspace.errors import ZooError
from weightspace.paths import data_dir
from weightspace.zoo.data import DataSpec
from weightspace.zoo.poisoning import BY_WEIGHTS, OF_A_PARENT


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
class Sampled:
    """Training runs whose networks and hyper-parameters are drawn, each kept at several epochs.

    ``network`` and ``hyper`` hold values or draws (see ``weightspace.zoo.sampling``); ``networks`` is the number of
    different networks drawn (0: one for each run). With a ``parent`` the runs start from that population's last
    checkpoints and are trained on ``classes`` of their parent's labels (0: all of them), or, where the data are several
    tasks, on ``tasks``: run ``i`` on entry ``i // parents`` of that list, round and round. ``part`` says which images
    coordinate networks are fitted to, "train" or "test". ``checkpoints`` are epochs, 0 before any training.

    ``poison`` draws a backdoor for each run (``weightspace.zoo.poisoning``). With ``like`` run ``i`` has the network
    and hyper-parameters of run ``i`` of an earlier population, so that poisoned and clean networks differ in nothing
    else.
    """

    name: str
    runs: int
    data: DataSpec
    epochs: int = 10
    batch: int = 64
    checkpoints: tuple[int, ...] = ()
    network: Mapping[str, Any] = field(default_factory=dict)
    hyper: Mapping[str, Any] = field(default_factory=dict)
    networks: int = 0
    parent: str = ""
    classes: int = 0
    tasks: tuple[tuple[str, ...], ...] = ()
    part: str = "train"
    poison: Mapping[str, Any] = field(default_factory=dict)
    like: str = ""


@dataclass(frozen=True)
class Recipe:
    """A named set of populations, parents before their children.

    All are ``Population`` (networks that differ in their seed) or all ``Sampled``. ``data`` names the data set.
    """

    name: str
    data: str
    populations: tuple[Population, ...] = ()
    sampled: tuple[Sampled, ...] = ()


HYPER = (
    "learning_rate", "weight_decay", "dropout", "train_fraction", "optimiser", "initialiser", "init_std",
)  # fmt: skip
"""Entries of a ``hyper`` table."""


def load(recipe: str | os.PathLike[str], full: bool = False) -> Recipe:
    """Read a recipe: the path of a TOML file, or the name of one that comes with weightspace ("starter").

    ``full`` takes the size for a GPU, which the recipe's ``[full]`` table tells.
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
    return parse(table, str(path), full)


def parse(table: Mapping[str, Any], source: str = "recipe", full: bool = False) -> Recipe:
    """A recipe from the values of its TOML file; ``source`` names it in errors."""
    unknown = set(table) - {"name", "data", "defaults", "population", "full"}
    if unknown:
        raise ZooError(
            f"{source}: unknown entries {sorted(unknown)}; expected name, data, defaults, population, full"
        )
    if not isinstance(table.get("name"), str) or not isinstance(table.get("data"), str | Mapping):
        raise ZooError(f"{source}: a recipe needs the text entries name and data")
    if any("runs" in entry for entry in (table.get("defaults", {}), *table.get("population", ()))):
        return _sampled_recipe(_enlarged(table, source) if full else table, source)
    if full:
        raise ZooError(f"{source}: the recipe has one size only, so there is no full one")
    if not isinstance(table["data"], str):
        raise ZooError(f"{source}: data is a name in a recipe of seeds")
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


# ------------------------------------------------------------------------------------ sampled recipes


def _enlarged(table: Mapping[str, Any], source: str) -> dict[str, Any]:
    """The recipe with its ``[full]`` table laid over it, population by population."""
    larger = table.get("full")
    if not isinstance(larger, Mapping) or set(larger) - {"data", "defaults", "population"}:
        raise ZooError(f"{source}: the full size needs a table [full] with data, defaults or population.<name>")
    entries = {entry.get("name"): entry for entry in table["population"]}
    changes = larger.get("population", {})
    strange = sorted(set(changes) - set(entries))
    if strange:
        raise ZooError(f"{source}: [full] speaks of the populations {strange}, which the recipe does not have")
    populations = [
        _over(_over(entry, larger.get("defaults", {})), changes.get(name, {})) for name, entry in entries.items()
    ]
    data = _over(_as_table(table["data"]), _as_table(larger.get("data", {})))
    return {**table, "data": data, "population": populations}


def _over(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """``above`` laid over ``below``; the tables network, hyper, data and poison entry by entry."""
    merged = {**below, **above}
    for key in ("network", "hyper", "data", "poison"):
        if isinstance(below.get(key), Mapping) and isinstance(above.get(key), Mapping):
            merged[key] = {**below[key], **above[key]}
    return merged


def _as_table(data: Any) -> dict[str, Any]:
    return {"name": data} if isinstance(data, str) else dict(data)


def _sampled_recipe(table: Mapping[str, Any], source: str) -> Recipe:
    seen: dict[str, Sampled] = {}
    for entry in table["population"]:
        merged = _over(table.get("defaults", {}), entry)
        merged["data"] = {**_as_table(table["data"]), **_as_table(entry["data"])} if "data" in entry else table["data"]
        if merged.get("like"):
            if "hyper" in entry or "network" in entry:
                raise ZooError(f"{source}: {merged['name']!r} has network and hyper of {merged['like']!r}, not its own")
            merged |= {"hyper": {}, "network": {}}
        population = _sampled(merged, source)
        if population.name in seen:
            raise ZooError(f"{source}: two populations are named {population.name!r}")
        if population.parent and population.parent not in seen:
            raise ZooError(f"{source}: the parent {population.parent!r} of {population.name!r} comes not before it")
        if population.like and population.like not in seen:
            raise ZooError(f"{source}: {population.name!r} is like {population.like!r}, which comes not before it")
        if population.like and population.data != seen[population.like].data:
            raise ZooError(f"{source}: {population.name!r} is like {population.like!r}, but has other data")
        seen[population.name] = population
    return Recipe(table["name"], str(_as_table(table["data"]).get("name")), sampled=tuple(seen.values()))


def _sampled(entry: Mapping[str, Any], source: str) -> Sampled:
    label = f"{source}: population {entry.get('name', 'without a name')!r}"
    known = {f.name: str(f.type).partition("[")[0] for f in fields(Sampled)}
    unknown = sorted(set(entry) - set(known))
    if unknown or "name" not in entry or "runs" not in entry:
        missing = sorted({"name", "runs"} - set(entry))
        raise ZooError(f"{label}: unknown entries {unknown}, missing {missing}; known: {sorted(known)}")
    values = {**entry, "data": _data_spec(entry["data"], label)}
    values["checkpoints"] = tuple(values.get("checkpoints") or (values.get("epochs", 10),))
    values["tasks"] = _task_lists(values.get("tasks", ()), label)
    types = {"int": int, "str": str, "tuple": tuple, "Mapping": Mapping, "DataSpec": DataSpec}
    for key, value in values.items():
        if not isinstance(value, types[known[key]]) or isinstance(value, bool):
            raise ZooError(f"{label}: {key} is {value!r}, expected {known[key]}")
    found = Sampled(**values)
    by_weights = found.poison.get("attack") in BY_WEIGHTS
    plain = found.name.replace("-", "").replace("_", "").replace(".", "")
    checks = {
        "runs, epochs and batch are at least 1": min(found.runs, found.epochs or int(by_weights), found.batch) >= 1,
        "an attack on weights has epochs = 0": not by_weights or not found.epochs,
        f"attacks on trained networks ({', '.join(OF_A_PARENT)}) have a parent": bool(found.parent)
        or found.poison.get("attack") not in OF_A_PARENT,
        "classes and networks are at least 0": min(found.classes, found.networks) >= 0,
        "checkpoints are rising epochs, up to the last": all(isinstance(c, int) for c in found.checkpoints)
        and list(found.checkpoints) == sorted(set(found.checkpoints))
        and found.checkpoints[0] >= 0
        and found.checkpoints[-1] == found.epochs,
        "a population has one of a network, a parent, and another that it is like": sum(
            map(bool, (found.parent, found.network, found.like))
        )
        == 1,
        "a network has a kind": not found.network or isinstance(found.network.get("kind"), str),
        "a poison has an attack": not found.poison or "attack" in found.poison,
        "tasks need the data 'tasks', and exclude classes": not found.tasks
        or (bool(found.data.tasks) and not found.classes),
        "part is train or test": found.part in ("train", "test"),
        f"hyper has entries of {', '.join(HYPER)}": set(found.hyper) <= set(HYPER),
        "a name is letters, digits, '-', '_' and '.'": plain.isalnum(),
    }
    for rule, holds in checks.items():
        if not holds:
            raise ZooError(f"{label}: {rule}")
    return found


def _task_lists(lists: Any, label: str) -> tuple[tuple[str, ...], ...]:
    from weightspace.zoo.tasks import parse_task

    if not isinstance(lists, list | tuple) or not all(isinstance(t, list) and t for t in lists):
        raise ZooError(f'{label}: tasks is {lists!r}, expected a list of lists, [["0"], ["1:0-4", "2"]]')
    return tuple(tuple(str(parse_task(str(t))) for t in entry) for entry in lists)


def _data_spec(data: Any, label: str) -> DataSpec:
    values = _as_table(data)
    known = {f.name: str(f.type).partition("[")[0] for f in fields(DataSpec)}
    if isinstance(values.get("tasks"), list) and all(isinstance(t, str) for t in values["tasks"]):
        values["tasks"] = tuple(values["tasks"])
    wrong = [k for k, v in values.items() if type(v).__name__ != known.get(k)]
    if wrong or "name" not in values:
        raise ZooError(f"{label}: data has wrong entries {wrong}; expected a name, or a table of {known}")
    return DataSpec(**values)
