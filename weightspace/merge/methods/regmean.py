"""Least squares on what each layer computes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch

from weightspace.merge.data import Network, by_position, entries, foreign, owned
from weightspace.merge.method import Merger, Models, Tensor, WithData, in_range
from weightspace.wiring.contractions import Gram, contractions


@dataclass(frozen=True)
class RegMean(WithData):
    """Each weight W minimises Σ wᵢ E ‖(W − Wᵢ) xᵢ‖² over the inputs xᵢ it has in model i (Jin et al. 2023, "RegMean").

    With Gᵢ = E xᵢxᵢᵀ and weights as matrices (inputs, outputs): W = (Σ wᵢ G̃ᵢ)⁻¹ Σ wᵢ G̃ᵢ Wᵢ, where G̃ᵢ keeps the
    diagonal of Gᵢ and shrinks all else by ``shrink``. Layer by layer, as in the original; biases, norms, tables that
    are looked up and other weights without such inputs get the weighted mean (the report says which). Convolutions are
    matrices over input channels and kernel positions. The base takes no part.

    ``data``: inputs per model, unlabelled (`MergeData`). Where it says ``outputs``, rows that only other tasks' outputs
    depend on take no part for that model, as the heads of several tasks are not merged in the original.

    ``shrink``: 0.9 in the paper (0.1 for T5). ``ridge``: this share of the mean diagonal ties W to the plain mean along
    inputs that no model uses. ``samples``: most examples per model; ``positions``: most places of an operation per
    batch of 64. ``largest``: weights of more inputs get the mean.

    Memory: two float64 matrices per weight, (inputs, inputs) and (inputs, outputs), and one model in float32.
    """

    shrink: float = 0.9
    ridge: float = 1e-6
    samples: int = 1024
    positions: int = 4096
    largest: int = 8192

    name: ClassVar[str] = "regmean"
    paper: ClassVar[str] = "Jin et al. (2023), Dataless knowledge fusion by merging weights of language models"

    def check(self, count: int) -> None:
        in_range(self.shrink, 0, 1, "shrink")
        in_range(self.ridge, 0, 1, "ridge")

    def prepare(self, models: Models) -> Merger:
        network = Network(models)
        sums: dict[str, _Sums] = {}
        skipped: set[str] = set()
        given = entries(models)
        others = [foreign(network, network.tensors(m), d) for m, d in zip(models.models, given, strict=True)]
        for i, (model, data, weight) in enumerate(zip(models.models, given, models.weights, strict=True)):
            drawn = data.draw(self.samples, torch.Generator().manual_seed(models.seed * 1009 + i))
            wiring, inputs = by_position(models.proved, drawn)
            grams = contractions(
                wiring, _whole(models, network, model), inputs, only=network.names,
                positions=self.positions, seed=models.seed, largest=self.largest,
            )  # fmt: skip
            for name in network.names:
                if name not in grams:
                    skipped.add(name)
                    if name in grams.left_out:
                        models.notes[name] = f"the mean: {grams.left_out[name]}"
                    continue
                weights = Models.float(model, name)
                if name not in sums:
                    sums[name] = _Sums(grams[name], [o.get(name) for o in others], weights)
                sums[name].add(grams[name], weights, weight, self.shrink, i)

        def merge(name: str, base: Tensor | None, tensors: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
            mean = owned(tensors, weights, [o.get(name) for o in others])
            if name not in sums or name in skipped:
                return mean
            return sums[name].solve(mean, self.ridge)

        return merge


def _whole(models: Models, network: Network, model: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {n: model[twin] for n, twin in network.twin.items()}


@dataclass
class _Part:
    """Some outputs of a part of a weight whose models are the same: Σ w G̃ and Σ w G̃ W."""

    columns: Tensor
    models: frozenset[int]
    below: Tensor
    above: Tensor


@dataclass
class _Sums:
    """The sums of one weight, per part of it (see `Gram`), and within each by which models the outputs belong to."""

    first: Gram
    others: Sequence[Tensor | None]
    like: Tensor
    parts: list[list[_Part]] = field(default_factory=list)

    def __post_init__(self) -> None:
        everyone = frozenset(range(len(self.others)))
        kept = [
            None if o is None else [m.any(0) for _, m in self.first.matrices((~o).to(self.like))] for o in self.others
        ]
        for at, (moment, matrix) in enumerate(self.first.matrices(self.like)):
            owners: dict[frozenset[int], list[int]] = {}
            for c in range(matrix.shape[1]):
                mine = frozenset(i for i, k in enumerate(kept) if k is None or bool(k[at][c]))
                owners.setdefault(mine or everyone, []).append(c)
            n = moment.shape[0]
            self.parts.append([
                _Part(torch.tensor(cs), who, torch.zeros(n, n, dtype=torch.float64),
                      torch.zeros(n, len(cs), dtype=torch.float64))
                for who, cs in owners.items()
            ])  # fmt: skip

    def add(self, gram: Gram, tensor: Tensor, weight: float, shrink: float, model: int) -> None:
        for group, (moment, matrix) in zip(self.parts, gram.matrices(tensor), strict=True):
            shrunk = moment * shrink
            shrunk.diagonal().copy_(moment.diagonal())
            shrunk *= weight
            for part in group:
                if model in part.models:
                    part.below += shrunk
                    part.above += shrunk @ matrix[:, part.columns].to(torch.float64)

    def solve(self, mean: Tensor, ridge: float) -> Tensor:
        matrices = []
        for group, (_, matrix) in zip(self.parts, self.first.matrices(mean), strict=True):
            out = matrix.to(torch.float64).clone()
            for part in group:
                n = len(part.below)
                pull = ridge * float(part.below.diagonal().mean()) + 1e-30
                below = part.below + pull * torch.eye(n, dtype=torch.float64)
                out[:, part.columns] = torch.linalg.solve(below, part.above + pull * out[:, part.columns])
            matrices.append(out.to(mean.dtype))
        return self.first.assemble(matrices, mean)
