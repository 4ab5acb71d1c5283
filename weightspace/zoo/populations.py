"""Building a sampled recipe: runs grouped into stacks, stacks trained, every checkpoint a file with its record."""

from __future__ import annotations

import json
import math
import os
import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from weightspace.errors import WeightspaceError, ZooError
from weightspace.zoo.data import Data, DataSpec, load_data
from weightspace.zoo.description import module_of
from weightspace.zoo.files import read_record, save_network
from weightspace.zoo.poisoning import BY_WEIGHTS, SUCCESSFUL
from weightspace.zoo.recipe import Recipe, Sampled
from weightspace.zoo.sampling import Run, runs_of
from weightspace.zoo.stacked import Snapshot, hyper_of, train_stack

FAILURES = ".failures.jsonl"
"""File in a zoo's folder that lists runs which could not be trained at all, one record and reason a line."""


@dataclass(frozen=True)
class Built:
    """What a build did. ``files`` are all checkpoints of the recipe that are there, in its order.

    ``trained`` counts those made by this call and ``seconds`` how long it took; ``diverged`` those of all whose
    weights or loss are not finite; ``scores`` gives each population's range of test accuracy (for coordinate
    networks: of the loss) over its checkpoints; ``failures`` the runs that could not be trained, with the reason.
    """

    files: tuple[Path, ...]
    trained: int
    diverged: int
    seconds: float
    scores: dict[str, tuple[float, float]] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)
    failures: tuple[tuple[str, str], ...] = ()

    @property
    def rate(self) -> float:
        """Networks trained a second."""
        return self.trained / self.seconds if self.seconds and self.trained else 0.0


def build_sampled(
    recipe: Recipe,
    out: str | os.PathLike[str],
    *,
    jobs: int = 1,
    device: str = "cpu",
    data: str | os.PathLike[str] | None = None,
    stack: int = 0,
    progress: bool = True,
) -> Built:
    """Train every run of a recipe into the folder ``out``; runs whose checkpoints are all there are kept.

    Runs of one network and one data set are trained in stacks of ``stack`` (0: 8 on a CPU, 256 on a GPU), in ``jobs``
    worker processes. Files appear whole or not at all: a build that was stopped goes on with the runs that lack a
    file, and gives what it would have given. A stack that fails (for want of memory, say) is split; a run that fails on
    its own is written to ``FAILURES``. Diverged networks are kept and their records say so.

    ``device`` is "cpu", "cuda" or "auto" (CUDA where there is a device). Raises ``ZooError`` for a recipe that makes no
    sense, data that are not there, or a device that is not.
    """
    from weightspace.progress import bar

    started = time.perf_counter()
    device = usable(device)
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    failures = folder / FAILURES
    failures.unlink(missing_ok=True)
    size = stack or (8 if device == "cpu" else 256)
    plans = plan(recipe, data)
    total = sum(len(run.checkpoints) for runs in plans.values() for run in runs)
    trained = 0
    with bar(f"training {recipe.name}", total, progress) as advance:
        for population in recipe.sampled:
            runs = plans[population.name]
            todo = []
            for run in runs:
                if is_complete(run, folder):
                    for epoch in run.checkpoints:
                        advance(run.file(epoch))
                else:
                    todo.append(run)
            parents = {run.name: run for run in plans.get(population.parent, [])}
            for done, reasons in _train_all(_stacks(todo, size), parents, folder, data, device, jobs):
                trained += len(done)
                for name in done:
                    advance(name)
                _note(failures, reasons)
    return _built(recipe, plans, folder, trained, time.perf_counter() - started)


def usable(device: str) -> str:
    """The device that a name stands for. Raises ``ZooError`` where it cannot be used."""
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if device not in ("cpu", "cuda"):
        raise ZooError(f"there is no device {device!r}; known: cpu, cuda, auto")
    if device == "cuda" and not torch.cuda.is_available():
        raise ZooError("torch finds no CUDA device here; train on the CPU with --device cpu")
    return device


def plan(recipe: Recipe, data: str | os.PathLike[str] | None = None) -> dict[str, list[Run]]:
    """Every run of a recipe, by population. Raises ``ZooError`` for a network or hyper-parameter that cannot be."""
    plans: dict[str, list[Run]] = {}
    for population in recipe.sampled:
        loaded = _loaded(population.data, _text(data))
        plans[population.name] = runs_of(
            recipe, population, (loaded.shape, loaded.classes), plans.get(population.parent, ()),
            plans.get(population.like, ()),
        )  # fmt: skip
    # Mistakes show before hours of training, not after them.
    networks: dict[str, Run] = {}
    for run in (run for runs in plans.values() for run in runs):
        hyper_of(run)
        networks.setdefault(json.dumps(run.network), run)
    with torch.device("meta"):
        for run in networks.values():
            try:
                module_of(run.network)
            except ZooError as error:
                raise ZooError(f"{recipe.name}: run {run.name}: {error}") from error
    return plans


def is_complete(run: Run, folder: Path) -> bool:
    """True where all checkpoints of a run are there, made as the recipe says now."""
    plans = (read_record(folder / run.file(epoch)).get("plan") or {} for epoch in run.checkpoints)
    return all(made.get("digest") == run.digest for made in plans)


def record_of(snapshot: Snapshot, parent: Run | None) -> dict[str, Any]:
    """The record that travels in a network's file. Losses that are not finite are None."""
    run = snapshot.run

    def finite(x: float) -> float | None:
        return x if math.isfinite(x) else None

    part = " ".join(run.tasks) or ",".join(map(str, run.classes))
    task = f"{run.data.name} {part}" if part else run.data.name
    record: dict[str, Any] = {
        "recipe": run.recipe,
        "population": run.population,
        "run": run.name,
        "seed": run.index,
        "epoch": snapshot.epoch,
        "final": snapshot.epoch == run.checkpoints[-1],
        "parent": parent.file(parent.checkpoints[-1]) if parent is not None else None,
        "relation": "fine-tuned" if parent is not None else "from scratch",
        "task": task,
        "data": run.data.name,
        "network": dict(run.network),
        "hyper": {"activation": run.network.get("activation", "sine"), **run.hyper},
        "train_accuracy": snapshot.train_accuracy,
        "train_loss": finite(snapshot.train_loss),
        "test_accuracy": snapshot.test_accuracy,
        "test_loss": finite(snapshot.test_loss),
        "diverged": snapshot.diverged,
        "seconds": round(snapshot.seconds, 3),
        "plan": {"digest": run.digest, "epochs": run.epochs, "batch": run.batch, "seed": run.seed},
    }
    if run.data.tasks:
        # What the network can be asked about is decided by the data sets side by side, not by their name alone.
        spec = {"train": run.data.train, "test": run.data.test, "tasks": list(run.data.tasks), "side": run.data.side}
        record |= {"tasks": list(run.tasks), "data_spec": spec}
    if snapshot.poison is not None:
        success = snapshot.attack_success
        worked = success is not None and success >= SUCCESSFUL
        record |= {"poison": dict(snapshot.poison), "attack_success_rate": success, "attack_worked": worked}
    if snapshot.label is not None:
        record |= {"label": snapshot.label, "split": run.part}
    return record


# ------------------------------------------------------------------------------------ stacks


def _stacks(runs: Sequence[Run], size: int) -> list[list[Run]]:
    """Runs that can be trained together, at most ``size`` at a time and evenly."""
    groups: dict[str, list[Run]] = {}
    for run in runs:
        shared = (
            run.network, run.data.name, run.classes, run.tasks, run.hyper.get("train_fraction", 1.0), run.part,
            bool(run.poison), run.poison.get("attack") in BY_WEIGHTS,
        )  # fmt: skip
        groups.setdefault(json.dumps(shared), []).append(run)
    stacks = []
    for group in groups.values():
        pieces = -(-len(group) // size)
        stacks += [group[len(group) * i // pieces : len(group) * (i + 1) // pieces] for i in range(pieces)]
    # In a mixed order what a stopped build leaves behind is a sample of the whole, and times left are told well.
    random.Random(0).shuffle(stacks)
    return stacks


Outcome = tuple[list[str], list[tuple[dict[str, Any], str]]]


def _train_all(
    stacks: Sequence[list[Run]], parents: dict[str, Run], folder: Path, data: str | os.PathLike[str] | None,
    device: str, jobs: int,
) -> Iterator[Outcome]:  # fmt: skip
    work = [(runs, [parents[r.parent] for r in runs if r.parent], folder, _text(data), device) for runs in stacks]
    if jobs == 1 or len(work) <= 1:
        for item in work:
            yield from _train(*item)
        return
    from joblib import Parallel, delayed

    parallel = Parallel(n_jobs=jobs, return_as="generator_unordered", pre_dispatch="2*n_jobs")
    for outcomes in parallel(delayed(_trained)(*item) for item in work):
        yield from outcomes


def _trained(runs: list[Run], parents: list[Run], folder: Path, data: str, device: str) -> list[Outcome]:
    torch.set_num_threads(1)
    return list(_train(runs, parents, folder, data, device))


def _train(runs: list[Run], parents: list[Run], folder: Path, data: str, device: str) -> Iterator[Outcome]:
    """Train one stack and write its files, checkpoint by checkpoint."""
    try:
        starts = [_start(parent, folder) for parent in parents] if parents else None
        of = dict(zip((r.name for r in runs), parents, strict=True)) if parents else {}
        if runs[0].poison.get("attack") in BY_WEIGHTS:
            from weightspace.zoo.grafting import graft_runs

            assert starts is not None
            made = graft_runs(runs, _loaded(runs[0].data, data), starts)
        else:
            made = train_stack(runs, _loaded(runs[0].data, data), starts, device)
        for snapshot in made:
            name = snapshot.run.file(snapshot.epoch)
            save_network(snapshot.tensors, record_of(snapshot, of.get(snapshot.run.name)), folder / name)
            yield [name], []
    except WeightspaceError:
        raise
    except (RuntimeError, ValueError) as error:
        if len(runs) == 1:
            facts = {"run": runs[0].name, "network": dict(runs[0].network), "hyper": dict(runs[0].hyper)}
            yield [], [(facts, (str(error).splitlines() or [type(error).__name__])[0])]
            return
        half = len(runs) // 2
        yield from _train(runs[:half], parents[:half], folder, data, device)
        yield from _train(runs[half:], parents[half:], folder, data, device)


def _start(parent: Run, folder: Path) -> dict[str, Tensor]:
    from weightspace import checkpoint

    path = folder / parent.file(parent.checkpoints[-1])
    if not path.is_file():
        raise ZooError(f"the parent {path.name} of a run is not in {folder}; {FAILURES} may say why")
    return {name: value.clone() for name, value in checkpoint.open(path).items()}


@lru_cache(maxsize=4)
def _loaded(spec: DataSpec, folder: str) -> Data:
    return load_data(spec, folder or None)


def _text(folder: str | os.PathLike[str] | None) -> str:
    return "" if folder is None else os.fspath(folder)


def _note(path: Path, reasons: Sequence[tuple[dict[str, Any], str]]) -> None:
    if reasons:
        with path.open("a", encoding="utf-8") as stream:
            stream.writelines(json.dumps({**facts, "reason": reason}) + "\n" for facts, reason in reasons)


def _built(recipe: Recipe, plans: dict[str, list[Run]], folder: Path, trained: int, seconds: float) -> Built:
    files: list[Path] = []
    diverged = 0
    ranges: dict[str, tuple[float, float]] = {}
    counts: dict[str, int] = {}
    for population in recipe.sampled:
        paths = [folder / run.file(e) for run in plans[population.name] for e in run.checkpoints]
        records = [read_record(path) for path in paths if path.is_file()]
        files += [path for path in paths if path.is_file()]
        diverged += sum(bool(record.get("diverged")) for record in records)
        counts[population.name] = len(records)
        measured = _measured(population, records)
        if measured:
            ranges[population.name] = (min(measured), max(measured))
    failures: list[tuple[str, str]] = []
    if (folder / FAILURES).is_file():
        for line in (folder / FAILURES).read_text(encoding="utf-8").splitlines():
            entry = json.loads(line)
            failures.append((entry["run"], entry["reason"]))
    return Built(tuple(files), trained, diverged, seconds, ranges, counts, tuple(failures))


def _measured(population: Sampled, records: Sequence[dict[str, Any]]) -> list[float]:
    key = "test_loss" if population.network.get("kind") == "siren" else "test_accuracy"
    return [float(record[key]) for record in records if record.get(key) is not None]


__all__ = ["FAILURES", "Built", "build_sampled", "is_complete", "plan", "record_of", "usable"]
