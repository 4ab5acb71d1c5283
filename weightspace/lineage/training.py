"""Families of known descent to calibrate on: small networks on scikit-learn's digits, in trees of every form.

Each family begins with one network and grows by fine-tuning one of its members: the last one (a chain, as of a
training run's checkpoints), the first one (a star), or any. What a child learns is drawn: some of the classes, all of
them again, images turned or inverted, labels that contradict; for how long, how fast, with which optimiser, with or
without weight decay, all tensors or some of them. Nothing else in the package, nor the populations that lineage is
tried on, is used.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from weightspace.lineage.fitting import Known
from weightspace.lineage.geometry import geometry
from weightspace.lineage.sample import take
from weightspace.lineage.tree import OUTSIDE

FAMILIES = 60


def families(count: int = FAMILIES, seed: int = 0) -> Iterator[Known]:
    """Train ``count`` families of 2 to 16 networks; about two seconds each."""
    from weightspace.wiring import wiring
    from weightspace.zoo.data import load_data
    from weightspace.zoo.description import module_of

    data = load_data("digits")
    images, labels = data.train_x, data.train_y
    for number in range(count):
        rng = np.random.default_rng([seed, number])
        generator = torch.Generator().manual_seed(int(rng.integers(1 << 31)))
        torch.manual_seed(int(rng.integers(1 << 31)))
        module, example = module_of(_network(rng, list(images.shape[1:])))
        size, form = int(rng.integers(2, 17)), str(rng.choice(["chain", "star", "any", "any"]))
        _learn(module, images, labels, _lesson(rng, first=True), generator)
        members, parents = [_state(module)], [OUTSIDE]
        while len(members) < size:
            parent = {"chain": len(members) - 1, "star": 0}.get(form, int(rng.integers(len(members))))
            module.load_state_dict(members[parent])
            _learn(module, images, labels, _lesson(rng, first=False), generator)
            state = _state(module)
            if all(bool(t.isfinite().all()) for t in state.values()):
                members.append(state)
                parents.append(parent)
            else:
                size -= 1
        shapes = {n: tuple(t.shape) for n, t in members[0].items() if t.is_floating_point()}
        sample = take([str(i) for i in range(len(members))], members, shapes, wiring(module.eval(), *example))
        yield Known(geometry(sample.values, sample.segments), tuple(parents))


def _network(rng: np.random.Generator, shape: list[int]) -> dict[str, Any]:
    common = {"input": shape, "classes": 10, "activation": str(rng.choice(["relu", "tanh", "gelu"]))}
    kind = str(rng.choice(["mlp", "mlp", "cnn", "cnn", "vit"]))
    if kind == "mlp":
        widths = [int(w) for w in rng.choice([24, 32, 48, 64, 96], size=int(rng.integers(1, 4)))]
        return {"kind": "mlp", "widths": widths, **common}
    if kind == "cnn":
        depth = int(rng.integers(2, 4))
        return {
            "kind": "cnn", "channels": [int(c) for c in rng.choice([8, 16, 24], size=depth)], "kernels": [3] * depth,
            "strides": [2, *([1] * (depth - 1))], "norm": str(rng.choice(["none", "batch", "layer"])),
            "residuals": [False] * depth, "same": True, **common,
        }  # fmt: skip
    return {"kind": "vit", "patch": 2, "dim": 24, "depth": int(rng.integers(1, 4)), "heads": 2, "hidden": 48, **common}


def _lesson(rng: np.random.Generator, first: bool) -> dict[str, Any]:
    classes = 10 if first or rng.random() < 0.4 else int(rng.integers(2, 9))
    return {
        "classes": sorted(int(c) for c in rng.permutation(10)[:classes]),
        "change": "none" if first else str(rng.choice(["none", "none", "turned", "inverted", "noise", "contrary"])),
        "steps": int(np.exp(rng.uniform(np.log(150), np.log(500)) if first else rng.uniform(np.log(15), np.log(400)))),
        "rate": float(np.exp(rng.uniform(np.log(5e-4), np.log(4e-3)))),
        "optimiser": str(rng.choice(["adam", "adam", "sgd", "adamw"])),
        "decay": float(rng.choice([0.0, 0.0, 1e-3, 1e-1])),
        "frozen": 0.0 if first or rng.random() < 0.8 else 0.5,
        "pick": int(rng.integers(1 << 31)),
    }


def _learn(
    module: nn.Module, images: Tensor, labels: Tensor, lesson: dict[str, Any], generator: torch.Generator
) -> None:
    rng = np.random.default_rng(lesson["pick"])
    chosen = torch.isin(labels, torch.tensor(lesson["classes"]))
    x, y = images[chosen], labels[chosen]
    if lesson["change"] == "turned":
        x = torch.rot90(x, int(rng.integers(1, 4)), (2, 3))
    elif lesson["change"] == "inverted":
        x = 1 - x
    elif lesson["change"] == "noise":
        x = x + 0.2 * torch.randn(x.shape, generator=generator)
    elif lesson["change"] == "contrary":
        y = torch.from_numpy(rng.permutation(10))[y]
    trained = [p for p in module.parameters() if rng.random() >= lesson["frozen"]] or list(module.parameters())
    rate, decay = lesson["rate"], lesson["decay"]
    optimiser: torch.optim.Optimizer
    if lesson["optimiser"] == "sgd":
        optimiser = torch.optim.SGD(trained, lr=20 * rate, momentum=0.9, weight_decay=decay / 10)
    elif lesson["optimiser"] == "adamw":
        optimiser = torch.optim.AdamW(trained, lr=rate, weight_decay=decay)
    else:
        optimiser = torch.optim.Adam(trained, lr=rate)
    module.train()
    for _ in range(lesson["steps"]):
        rows = torch.randint(len(x), (32,), generator=generator)
        optimiser.zero_grad()
        nn.functional.cross_entropy(module(x[rows]), y[rows]).backward()
        optimiser.step()
    module.eval()


def _state(module: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in module.state_dict().items()}


__all__ = ["FAMILIES", "families"]
