"""A small metanet for tests of training: statistics of every block, a mean over blocks, a network on top."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from weightspace.graph import ParameterGraph
from weightspace.metanets import Metanet

KIND = "tests.metanets.standin:Blocks"


@dataclass(frozen=True, eq=False)
class Batch:
    """Rows of statistics of all blocks, and which network each belongs to."""

    rows: Tensor
    network: Tensor
    size: int

    def to(self, device: torch.device | str) -> Batch:
        return Batch(self.rows.to(device), self.network.to(device), self.size)


class Blocks(Metanet):
    def __init__(self, outputs: int = 1, width: int = 16, dropout: float = 0.0) -> None:
        super().__init__()
        self.config = {"kind": "blocks", "outputs": outputs, "width": width, "dropout": dropout}
        self.inner = nn.Sequential(nn.Linear(4, width), nn.GELU(), nn.Linear(width, width))
        self.outer = nn.Sequential(nn.Dropout(dropout), nn.GELU(), nn.Linear(width, outputs))
        self.prepared = 0

    def prepare(self, graph: ParameterGraph) -> Tensor:
        self.prepared += 1
        rows = []
        for block in graph.blocks:
            w = graph.weight(block).float().flatten()
            rows.append(torch.stack((w.mean(), w.std(), w.abs().mean(), w.abs().max())))
        return torch.stack(rows)

    def collate(self, items: Sequence[Tensor]) -> Batch:
        network = torch.arange(len(items)).repeat_interleave(torch.tensor([len(i) for i in items]))
        return Batch(torch.cat(list(items)), network, len(items))

    def forward(self, batch: Batch) -> Tensor:
        h = self.inner(batch.rows)
        total = h.new_zeros(batch.size, h.shape[1]).index_add(0, batch.network, h)
        count = torch.bincount(batch.network, minlength=batch.size)[:, None]
        found: Tensor = self.outer(total / count)
        return found


def mlp(widths: Sequence[int], seed: int, gain: float = 1.0) -> dict[str, Tensor]:
    """Random weights under the names that the recipes' MLPs have."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for number, (inner, outer) in enumerate(pairwise(widths)):
        name = "output" if number == len(widths) - 2 else f"hidden.{number}"
        tensors[f"{name}.weight"] = gain * torch.randn(outer, inner, generator=generator) / inner**0.5
        tensors[f"{name}.bias"] = 0.1 * torch.randn(outer, generator=generator)
    return tensors


def run_mlp(tensors: Mapping[str, Tensor], x: Tensor) -> Tensor:
    number = 0
    while f"hidden.{number}.weight" in tensors:
        x = torch.relu(x @ tensors[f"hidden.{number}.weight"].T + tensors[f"hidden.{number}.bias"])
        number += 1
    return x @ tensors["output.weight"].T + tensors["output.bias"]


def write(path: Path, tensors: dict[str, Tensor], record: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, path, metadata={"weightspace": json.dumps(dict(record))})


def population(
    folder: Path, runs: int = 24, checkpoints: int = 2, shapes: Sequence[Sequence[int]] = ((6, 8, 8, 3), (6, 5, 3))
) -> Path:
    """Runs of networks whose "accuracy" is a function of how large their weights are."""
    for run in range(runs):
        for step in range(checkpoints):
            gain = 0.5 + ((run * 7 + step * 3) % runs) / runs
            tensors = mlp(shapes[run % len(shapes)], 100 * run + step, gain)
            size = float(tensors["output.weight"].std())
            record = {
                "run": f"run-{run}", "step": step, "final": step == checkpoints - 1, "seed": run,
                "test_accuracy": 1 / (1 + math.exp(-4 * (size - 0.6))), "train_accuracy": 0.9, "test_loss": 3 * size,
                "hyper": {"activation": "relu", "size": "large" if gain > 1 else "small"}, "label": run % 3,
            }  # fmt: skip
            write(folder / f"net-{run}-{step}.safetensors", tensors, record)
    return folder
