"""Drawing the networks of a population: what each run trains, decided by the recipe and the run's number alone.

A value in a recipe's ``network`` and ``hyper`` tables is itself, or a table that says what to draw from::

    activation = { choice = ["relu", "tanh"] }
    dropout = { uniform = [0.0, 0.7] }
    learning_rate = { log_uniform = [5e-4, 5e-2] }
    depth = { integer = [2, 5] }                          # both ends included
    channels = { each = { choice = [4, 8, 16, 32] } }     # a list of ``depth`` draws

Each entry is drawn from its own generator, so that a new entry leaves the others as they were.
"""

from __future__ import annotations

import hashlib
import json
import math
import random
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from weightspace.errors import ZooError
from weightspace.zoo.data import DataSpec
from weightspace.zoo.recipe import Recipe, Sampled


@dataclass(frozen=True)
class Run:
    """One training run: a network, its hyper-parameters, its data, and where its checkpoints are taken.

    ``classes`` is the subset of labels it is trained on, ``tasks`` that of the tasks of its data (empty: all);
    ``parent`` the name of the run from whose last checkpoint it starts (empty: from scratch). ``digest`` names
    everything that decides the outcome.
    """

    recipe: str
    population: str
    index: int
    network: Mapping[str, Any]
    hyper: Mapping[str, Any]
    data: DataSpec
    epochs: int
    batch: int
    checkpoints: tuple[int, ...]
    part: str = "train"
    classes: tuple[int, ...] = ()
    tasks: tuple[str, ...] = ()
    parent: str = ""
    parent_digest: str = ""
    poison: Mapping[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """The run's name, unique in the recipe."""
        return f"{self.population}-{self.index:04d}"

    @property
    def seed(self) -> int:
        """A seed of its own for each run, the same on every machine."""
        return zlib.crc32(f"{self.recipe}/{self.population}/{self.index}".encode())

    @property
    def digest(self) -> str:
        """Hash of everything in the recipe that decides how the run comes out (not of where its data lie)."""
        facts = asdict(self)
        facts["data"].pop("path")
        # Entries that only data of several tasks or poisoned runs have leave the digests of all others as they are.
        for table, key in ((facts, "tasks"), (facts["data"], "tasks"), (facts["data"], "side"), (facts, "poison")):
            if not table[key]:
                table.pop(key)
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]

    def file(self, epoch: int) -> str:
        """Name of the file of a checkpoint."""
        return f"{self.name}-e{epoch:03d}.safetensors"


def runs_of(
    recipe: Recipe,
    population: Sampled,
    facts: tuple[tuple[int, ...], int],
    parents: Sequence[Run] = (),
    like: Sequence[Run] = (),
) -> list[Run]:
    """Every run of a population. ``facts``: shape of an example and number of classes of its data.

    A run ``i`` with a parent starts from run ``i mod len(parents)`` of it, has its network, and is trained on a random
    subset of that run's classes, or on the tasks that the population lists. With ``like`` it has the network and
    hyper-parameters of run ``i mod len(like)``, but a seed of its own. A poison is drawn for each run.
    """
    from weightspace.zoo.poisoning import complete

    runs = []
    shape, classes = facts
    for index in range(population.runs):
        where = f"{recipe.name}/{population.name}/{index}"
        hyper = draw(population.hyper, where)
        parent = parents[index % len(parents)] if parents else None
        task: tuple[int, ...] = ()
        given: tuple[str, ...] = ()
        if population.tasks:
            given = population.tasks[index // max(len(parents), 1) % len(population.tasks)]
        if parent is not None:
            network: Mapping[str, Any] = parent.network
            held = parent.classes or tuple(range(classes))
            if population.classes > len(held):
                raise ZooError(
                    f"population {population.name!r}: {population.classes} classes of the {len(held)} of its parent"
                )
            if population.classes:
                task = tuple(sorted(random.Random(f"{where}/classes").sample(held, population.classes)))
        elif like:
            network, hyper = like[index % len(like)].network, dict(like[index % len(like)].hyper)
        else:
            # Runs may share a network, so that they can be trained as one stack.
            drawn = f"{recipe.name}/{population.name}/{index % population.networks}" if population.networks else where
            network = describe(draw(population.network, f"{drawn}/network"), shape, classes)
        runs.append(
            Run(
                recipe=recipe.name,
                population=population.name,
                index=index,
                network=network,
                hyper=hyper,
                data=population.data,
                epochs=population.epochs,
                batch=population.batch,
                checkpoints=population.checkpoints,
                part=population.part,
                classes=task,
                tasks=given,
                parent=parent.name if parent else "",
                parent_digest=parent.digest if parent else "",
                poison=complete(draw(population.poison, f"{where}/poison"), shape, classes, f"{where}/poison")
                if population.poison
                else {},
            )
        )
    return runs


_DEEP = ("vit", "gpt", "text-classifier")
"""Kinds of networks whose description has a depth; elsewhere it only says how long the lists are."""


def describe(drawn: Mapping[str, Any], shape: tuple[int, ...], classes: int) -> dict[str, Any]:
    """A complete network description from what a recipe drew: the data's shape and usual values are filled in."""
    found = {key: value for key, value in drawn.items() if key != "depth" or drawn["kind"] in _DEEP}
    if found["kind"] == "siren":
        return {"input": [2], "classes": shape[0], **found}
    full = {"input": list(shape), "classes": classes, **found}
    if found["kind"] == "cnn":
        depth = len(found["channels"])
        usual = {"kernels": [3] * depth, "strides": [2] * depth, "norm": "none", "residuals": [False] * depth}
        full = {**usual, "same": False, **full}
        # A list meant for the deepest of a population is cut to the depth.
        full |= {key: full[key][:depth] for key in ("kernels", "strides", "residuals")}
    return full


def draw(table: Mapping[str, Any], where: str) -> dict[str, Any]:
    """A value for each entry of a table; ``where`` seeds the draws. Raises ``ZooError`` for a table it cannot read."""
    depth = _drawn(table.get("depth", 0), f"{where}/depth", 0)
    found = {key: _drawn(value, f"{where}/{key}", int(depth)) for key, value in table.items() if key != "depth"}
    return {**found, "depth": depth} if "depth" in table else found


def _drawn(value: Any, where: str, depth: int) -> Any:
    if not isinstance(value, Mapping):
        return value
    if len(value) != 1:
        known = "choice, uniform, log_uniform, integer, each"
        raise ZooError(f"{where}: {dict(value)} is no draw; expected one of {known}")
    ((how, among),) = value.items()
    rng = random.Random(where)
    if how == "each":
        if depth < 1:
            raise ZooError(f"{where}: 'each' needs an entry 'depth' of at least 1 in the same table")
        return [_drawn(among, f"{where}/{i}", depth) for i in range(depth)]
    if not isinstance(among, list) or not among:
        raise ZooError(f"{where}: {how} needs a list, found {among!r}")
    if how == "choice":
        return rng.choice(among)
    if how not in ("uniform", "log_uniform", "integer") or len(among) != 2 or not all(map(_number, among)):
        raise ZooError(f"{where}: {dict(value)} is no draw; expected uniform, log_uniform or integer with two ends")
    low, high = among
    if not low <= high or (how == "log_uniform" and low <= 0):
        raise ZooError(f"{where}: {how} from {low} to {high} is empty")
    if how == "integer":
        return rng.randint(int(low), int(high))
    if how == "uniform":
        return rng.uniform(low, high)
    return math.exp(rng.uniform(math.log(low), math.log(high)))


def _number(x: Any) -> bool:
    return isinstance(x, int | float) and not isinstance(x, bool)


__all__ = ["Run", "describe", "draw", "runs_of"]
