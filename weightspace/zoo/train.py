"""Training a recipe, one safetensors file per network with its record inside.

Recipes of seeds are trained here, network by network; those of drawn runs in ``weightspace.zoo.populations``.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from weightspace.zoo.data import Data, load_data
from weightspace.zoo.files import read_record, save_network
from weightspace.zoo.networks import build, from_shapes
from weightspace.zoo.recipe import Population, Recipe, load


def build_zoo(
    recipe: str | os.PathLike[str] | Recipe,
    out: str | os.PathLike[str],
    progress: bool = True,
    *,
    jobs: int = 1,
    device: str = "cpu",
    data: str | os.PathLike[str] | None = None,
) -> list[Path]:
    """Train every network of a recipe into the folder ``out``; those already there are kept.

    ``jobs`` worker processes and the ``device`` serve recipes of drawn runs (``weightspace.zoo.populations``), whose
    files are ``<population>-<run>-e<epoch>.safetensors``; the networks of other recipes are small and trained one after
    the other on the CPU. ``data`` is the folder with the files of data sets.

    Each network is a safetensors file ``<population>-<seed>.safetensors`` whose metadata holds its record
    (recipe, seed, hyper-parameters, train and test accuracy and loss, parent, seconds) as JSON under
    "weightspace". Files appear whole or not at all, so an interrupted build goes on where it stopped; a
    network whose record differs from the recipe is trained again. A diverged network is kept and its record
    says so. Returns the files in the recipe's order. Raises ``ZooError`` for a recipe or data it cannot read.
    """
    from weightspace.progress import bar

    chosen = recipe if isinstance(recipe, Recipe) else load(recipe)
    if chosen.sampled:
        from weightspace.zoo.populations import build_sampled

        built = build_sampled(chosen, out, jobs=jobs, device=device, data=data, progress=progress)
        return list(built.files)
    loaded = load_data(chosen.data, data)
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    populations = {population.name: population for population in chosen.populations}
    todo = [(population, seed) for population in chosen.populations for seed in range(population.seeds)]
    files: list[Path] = []
    made: set[Path] = set()
    with bar(f"training {chosen.name}", len(todo), progress) as advance:
        for population, seed in todo:
            path = _path(folder, population.name, seed)
            plan = _plan(chosen, population, seed)
            parent = _path(folder, population.parent, seed) if population.parent else None
            # A child of a parent that was trained anew is made anew too.
            if parent in made or read_record(path).get("plan") != plan:
                _make(population, seed, plan, loaded, path, parent, populations)
                made.add(path)
            files.append(path)
            advance(path.name)
    return files


def evaluate(module: nn.Module, x: Tensor, y: Tensor) -> tuple[float, float]:
    """Accuracy and mean cross-entropy of a network on images ``x`` with labels ``y``."""
    module.eval()
    with torch.no_grad():
        logits = module(x)
    accuracy = float((logits.argmax(1) == y).double().mean())
    return accuracy, float(F.cross_entropy(logits.double(), y))


def fit(module: nn.Module, data: Data, population: Population, seed: int) -> None:
    """Train in place with AdamW and a cosine schedule, in an order of batches that ``seed`` fixes."""
    generator = torch.Generator().manual_seed(seed)
    optimiser = torch.optim.AdamW(
        module.parameters(), lr=population.learning_rate, weight_decay=population.weight_decay
    )
    steps = population.epochs * -(-len(data.train_y) // population.batch)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, max(steps, 1))
    module.train()
    for _ in range(population.epochs):
        order = torch.randperm(len(data.train_y), generator=generator)
        for start in range(0, len(order), population.batch):
            batch = order[start : start + population.batch]
            loss = F.cross_entropy(module(data.train_x[batch]), data.train_y[batch])
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            schedule.step()


def _make(
    population: Population,
    seed: int,
    plan: dict[str, Any],
    data: Data,
    path: Path,
    parent: Path | None,
    populations: Mapping[str, Population],
) -> None:
    started = time.perf_counter()
    number = _seed(population.name, seed)
    base = _root(population, populations)
    torch.manual_seed(number)
    image = (int(data.train_x.shape[1]), int(data.train_x.shape[2]), int(data.train_x.shape[3]))
    module = build(base.architecture, base.width, image, data.classes)
    part = data.only(population.classes)
    if parent is not None:
        from weightspace import checkpoint

        state = dict(checkpoint.open(parent))
        module.load_state_dict(_permute(state, number) if population.permuted else state)
    if not population.permuted:
        fit(module, part, population, number)
    train_accuracy, train_loss = evaluate(module, part.train_x, part.train_y)
    test_accuracy, test_loss = evaluate(module, part.test_x, part.test_y)
    tensors = {name: value.detach().clone() for name, value in module.state_dict().items()}
    diverged = not all(bool(torch.isfinite(value).all()) for value in tensors.values())
    record = {
        "recipe": plan["recipe"],
        "population": population.name,
        "seed": seed,
        "parent": parent.name if parent is not None else None,
        "relation": _relation(population),
        "task": _task(plan["data"], population.classes),
        "train_accuracy": train_accuracy,
        "train_loss": train_loss if math.isfinite(train_loss) else None,
        "test_accuracy": test_accuracy,
        "test_loss": test_loss if math.isfinite(test_loss) else None,
        "diverged": diverged,
        "seconds": round(time.perf_counter() - started, 3),
        "plan": plan,
    }
    save_network(tensors, record, path)


def _permute(state: dict[str, Tensor], seed: int) -> dict[str, Tensor]:
    """The state with a random element of its symmetry group applied."""
    from weightspace.wiring import wiring as find_wiring
    from weightspace.wiring.program import Program

    shapes = {name: tuple(value.shape) for name, value in state.items()}
    found = from_shapes(shapes)
    assert found is not None, "recipes train only networks of weightspace.zoo.networks"
    module, shape = found
    floating = {name: value for name, value in state.items() if value.is_floating_point()}
    program = Program(
        tensors=floating,
        run=lambda tensors, x: torch.func.functional_call(module, dict(tensors), (x,)),
        args=(torch.randn(2, *shape),),
        origin="catalogue:recipes",
    )
    module.eval()
    wiring = find_wiring(program)
    moved = wiring.apply(wiring.random(seed), floating)
    return {**state, **moved}


def _plan(recipe: Recipe, population: Population, seed: int) -> dict[str, Any]:
    """Everything in the recipe that decides how a network comes out, as JSON gives it back."""
    settings = {key: value for key, value in asdict(population).items() if key not in ("seeds", "name")}
    plan = {"recipe": recipe.name, "data": recipe.data, "seed": _seed(population.name, seed), **settings}
    return dict(json.loads(json.dumps(plan)))


def _seed(name: str, seed: int) -> int:
    """A seed of its own for each network, the same on every machine."""
    import zlib

    return zlib.crc32(f"{name}/{seed}".encode())


def _root(population: Population, populations: Mapping[str, Population]) -> Population:
    while population.parent:
        population = populations[population.parent]
    return population


def _path(folder: Path, name: str, seed: int) -> Path:
    return folder / f"{name}-{seed}.safetensors"


def _relation(population: Population) -> str:
    if population.permuted:
        return "permuted copy"
    return "fine-tuned" if population.parent else "from scratch"


def _task(data: str, classes: tuple[int, ...]) -> str:
    return data if not classes else f"{data} {','.join(map(str, classes))}"
