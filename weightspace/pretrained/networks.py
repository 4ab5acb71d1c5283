"""The networks that the pretrained metanets are made from: loaded, chosen, split by lineage, and their views."""

from __future__ import annotations

import logging
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from weightspace.errors import MetanetError
from weightspace.graph import ParameterGraph
from weightspace.metanets.augment import noise, rescale
from weightspace.metanets.data import Sample, load_samples, split
from weightspace.pretrained.recipe import Pretraining, Source, Views
from weightspace.pretrained.views import canonical, clean

_log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Population:
    """The networks of a source, cleaned, in parts that share no lineage.

    A source that is held out has all its networks in ``test``.
    """

    source: Source
    train: list[Sample]
    validation: list[Sample]
    calibration: list[Sample]
    test: list[Sample]

    def __repr__(self) -> str:
        parts = ("train", "validation", "calibration", "test")
        return f"Population({self.source.name}: {', '.join(f'{len(getattr(self, p))} {p}' for p in parts)})"


def populations(recipe: Pretraining, zoos: Path, data: Path | None = None, build: bool = True) -> list[Population]:
    """The populations of a recipe from ``zoos/<recipe>``, trained there first where they are missing.

    Raises ``MetanetError`` where there is no folder and ``build`` is false.
    """
    found = []
    for source in recipe.sources:
        folder = zoos / source.recipe
        if not any(folder.glob("*.safetensors")):
            if not build:
                raise MetanetError(f"there is no population {folder}; `weightspace zoo build {source.recipe}` makes it")
            from weightspace.zoo.train import build_zoo

            _log.info("training the population %s", source.recipe)
            build_zoo(source.recipe, folder, progress=False, data=data)
        found.append(parts(recipe, source, load_samples(folder)))
        _log.info("%r", found[-1])
    return found


def parts(recipe: Pretraining, source: Source, samples: Sequence[Sample]) -> Population:
    """The networks of a source, which must be one of the recipe's, in the parts that the recipe splits them into.

    Raises ``MetanetError`` where there are none.
    """
    some = [cleaned(sample, source.recipe) for sample in chosen(samples, source, recipe.seed)]
    if not some:
        raise MetanetError(f"there is no network of {source.name} among {len(samples)}; build the population first")
    if source.held_out:
        return Population(source, [], [], [], some)
    return Population(source, *split(some, recipe.fractions, recipe.seed + recipe.sources.index(source), "lineage"))


def chosen(samples: Sequence[Sample], source: Source, seed: int) -> list[Sample]:
    """The networks that a source names: of its populations, so many runs, and the last checkpoints of each."""
    wanted = set(source.populations)
    some = [s for s in samples if not wanted or s.record.get("population") in wanted]
    if source.accuracy:
        some = [s for s in some if isinstance(s.record.get("test_accuracy"), float)]
    runs = sorted({s.group for s in some})
    if source.runs and len(runs) > source.runs:
        kept = set(random.Random(seed).sample(runs, source.runs))
        some = [s for s in some if s.group in kept]
    if not source.checkpoints:
        return some
    of_run: dict[str, list[Sample]] = {}
    for sample in some:
        of_run.setdefault(sample.group, []).append(sample)
    kept_names = {
        sample.name
        for own in of_run.values()
        for sample in sorted(own, key=lambda s: int(s.record.get("epoch") or 0))[-source.checkpoints :]
    }
    return [s for s in some if s.name in kept_names]


def cleaned(sample: Sample, recipe: str = "") -> Sample:
    """The sample with the weights alone that take part in the function. Names say the recipe: so they are unique."""
    graph = sample.graph
    assert graph.wiring is not None, "samples are wired"
    graph = clean({name: graph.tensor(name) for name in graph.shapes}, graph.wiring)
    if not recipe:
        return replace(sample, graph=graph)
    named = {key: f"{recipe}:{sample.record[key]}" for key in ("run", "parent") if sample.record.get(key)}
    record = {**sample.record, **named}
    return Sample(f"{recipe}:{sample.name}", graph, record, f"{recipe}:{sample.group}")


def at_canonical_points(samples: Sequence[Sample]) -> list[Sample]:
    """The samples with every network at the canonical point of its orbit."""
    graphs = canonical([sample.graph for sample in samples])
    return [replace(sample, graph=graph) for sample, graph in zip(samples, graphs, strict=True)]


def with_views(samples: Sequence[Sample], views: Views, seed: int) -> list[Sample]:
    """The samples and ``views.count`` views of each, at their canonical points; ``record["instance"]`` tells whose."""
    generator = torch.Generator().manual_seed(seed)
    out: list[Sample] = []
    for number in range(1 + views.count):
        graphs = [s.graph if number == 0 else disturbed(s.graph, views.noise, generator) for s in samples]
        for sample, graph in zip(samples, canonical(graphs), strict=True):
            record = {**sample.record, "instance": sample.name}
            out.append(replace(sample, name=f"{sample.name} view {number}", graph=graph, record=record))
    return out


def disturbed(
    graph: ParameterGraph, most: float, generator: torch.Generator, exactly: bool = False
) -> ParameterGraph:
    """A network rescaled at random and with noise of a level drawn below ``most``, or of this level exactly."""
    level = most if exactly else most * float(torch.rand((), generator=generator))
    return noise(rescale(graph, generator), generator, level)
