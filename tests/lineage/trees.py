"""Small families for the tests: perceptrons on scikit-learn's digits, trained in well under a second each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from weightspace.zoo.data import load_data
from weightspace.zoo.description import module_of
from weightspace.zoo.files import save_network

NETWORK = {"kind": "mlp", "input": [1, 8, 8], "classes": 10, "widths": [48, 32], "activation": "relu"}


def train(
    start: Mapping[str, Tensor] | None, seed: int, classes: Sequence[int] = (), steps: int = 120, rate: float = 2e-3
) -> dict[str, Tensor]:
    """Fine-tune ``start``, or train a new network, on some classes (all of them when empty)."""
    torch.manual_seed(seed)
    module, _ = module_of(NETWORK)
    if start is not None:
        module.load_state_dict(dict(start))
    data = load_data("digits")
    chosen = torch.isin(data.train_y, torch.tensor(list(classes) or list(range(10))))
    x, y = data.train_x[chosen], data.train_y[chosen]
    optimiser = torch.optim.Adam(module.parameters(), lr=rate)
    for _ in range(steps):
        rows = torch.randint(len(x), (32,))
        optimiser.zero_grad()
        nn.functional.cross_entropy(module(x[rows]), y[rows]).backward()
        optimiser.step()
    return {n: t.detach().clone() for n, t in module.state_dict().items()}


@cache
def family() -> dict[str, dict[str, Tensor]]:
    """Two roots; the first has two children, one of which has a child of its own; the second has one child."""
    made = {"root": train(None, 0, steps=300), "other": train(None, 1, steps=300)}
    made["left"] = train(made["root"], 2, (0, 1, 2, 3, 4))
    made["right"] = train(made["root"], 3, (5, 6, 7, 8, 9))
    made["below"] = train(made["left"], 4, (0, 1, 2), steps=80)
    made["others"] = train(made["other"], 5, (0, 2, 4, 6, 8))
    return made


PARENTS = {"left": "root", "right": "root", "below": "left", "others": "other"}


def write(folder: Path, networks: Mapping[str, Mapping[str, Tensor]], **records: Any) -> Path:
    """Networks as files, ``name.safetensors``, that say how they are built; ``records``: more for some of them."""
    for name, tensors in networks.items():
        save_network(tensors, {"network": NETWORK, **records.get(name, {})}, folder / f"{name}.safetensors")
    return folder
