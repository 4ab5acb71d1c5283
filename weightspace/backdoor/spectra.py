"""Channels that stand out in the weights: how much each can carry, and how cut off from the others it is.

Everything is per node of the parameter graph's cells, from blocks (dense bundles of weights) with the norm after them
folded in, and does not depend on the order of channels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from weightspace.backdoor.outputs import parts_of
from weightspace.graph.layout import Block, Cell, Vector
from weightspace.wiring.wiring import Wiring

EPSILON = 1e-5
"""Added to running variances."""
BALANCED = 20
"""Steps that bring the rows and columns of a block to equal sums."""
LARGEST = 2048
"""Matrices with a longer short side are not decomposed."""


@dataclass(frozen=True, eq=False)
class Folded:
    """A block with the norm that follows it folded in: ``matrix (out, in, positions)`` float64.

    ``dst (out,)`` and ``src (in,)`` are numbers of nodes in the block's cells.
    """

    block: Block
    matrix: Tensor
    dst: Tensor
    src: Tensor


def folded(wiring: Wiring, tensors: Mapping[str, Tensor]) -> list[Folded]:
    """The blocks of weights in order of use, a block-diagonal one as its parts."""
    lain = parts_of(wiring)
    order = {name: i for i, name in enumerate(wiring.roles)}
    blocks = [b for b in lain.blocks if wiring.roles.get(b.tensor) == "weight" and b.numel]
    blocks.sort(key=lambda b: order[b.tensor])
    found = []
    for block in blocks:
        scale = _scale(wiring, tensors, block, lain.vectors, blocks, order, lain.cells[block.dst].size)
        value = block.matrix(tensors[block.tensor].detach().to(torch.float64))
        for matrix, dst, src in zip(value, block.index(), block.source_index(), strict=True):
            found.append(Folded(block, matrix * scale[dst][:, None, None], dst, src))
    return found


def lipschitz(parts: Sequence[Folded], cells: Mapping[str, Cell]) -> dict[str, list[Tensor]]:
    """For every cell that may be permuted and every block that leads there, the spectral norm of each channel's kernel.

    Channel Lipschitz pruning (CLP, Zheng et al., ECCV 2022): the kernel of a channel as a matrix (inputs, positions);
    for a dense layer the norm of its row. ``(size,)`` each; a block of several parts counts once.
    """
    found: dict[str, dict[str, Tensor]] = {}
    for part in parts:
        cell = cells[part.block.dst]
        if not cell.movable:
            continue
        table = found.setdefault(cell.name, {})
        here = table.setdefault(part.block.tensor, torch.zeros(cell.size, dtype=torch.float64))
        short = min(part.matrix.shape[1:])
        if short == 1 or short > LARGEST:
            norm = part.matrix.flatten(1).norm(dim=1)
        else:
            gram = part.matrix @ part.matrix.mT if part.matrix.shape[1] == short else part.matrix.mT @ part.matrix
            norm = torch.linalg.eigvalsh(gram)[:, -1].clamp_min(0).sqrt()
        here[part.dst] = torch.maximum(here[part.dst], norm)
    return {name: list(table.values()) for name, table in found.items()}


def isolation(
    parts: Sequence[Folded], cells: Mapping[str, Cell], balanced: bool = False
) -> dict[str, list[Tensor]]:
    """How few others each channel is joined to: ``-log`` of the share of partners that carry its weights, ``(size,)``.

    A grafted subnet (SRA, Qi et al. 2022) hangs on its own channels alone. The number of partners is the participation
    ratio of squared weights, each relative to what that partner's others have, so that scales of layers do not count;
    if ``balanced``, after rows and columns have been brought to equal sums (Sinkhorn & Knopp 1967), so that the scale
    of no channel counts.
    """
    found: dict[str, list[Tensor]] = {}
    for part in parts:
        mass = part.matrix.square().sum(2)
        if min(mass.shape) < 3:
            continue
        mass = _balanced(mass) if balanced else mass
        for name, nodes, table in ((part.block.dst, part.dst, mass), (part.block.src, part.src, mass.T)):
            cell = cells[name]
            if not cell.movable:
                continue
            relative = table / table.mean(0, keepdim=True).clamp_min(1e-30)
            ratio = relative.sum(1).square() / relative.square().sum(1).clamp_min(1e-30) / table.shape[1]
            here = torch.zeros(cell.size, dtype=torch.float64)
            here[nodes] = -ratio.clamp(1e-6, 1).log()
            found.setdefault(name, []).append(here)
    return found


def _balanced(mass: Tensor) -> Tensor:
    """A matrix of masses with rows, then columns, divided by their means, over and over; zeros stay zero."""
    mass = mass / mass.max().clamp_min(1e-300)
    for _ in range(BALANCED):
        mass = mass / mass.mean(1, keepdim=True).clamp_min(1e-30)
        mass = mass / mass.mean(0, keepdim=True).clamp_min(1e-30)
    return mass


def leading(parts: Sequence[Folded], cells: Mapping[str, Cell]) -> tuple[dict[str, list[Tensor]], dict[str, float]]:
    """Outliers of each block's spectrum: weight of every channel in the first singular vector, and of the block.

    The first ``(size,)``: how much more than its part a channel has, ``size * u**2``. The second, for each tensor, by
    how much the first singular value stands above the second (a logarithm).
    """
    channels: dict[str, list[Tensor]] = {}
    blocks: dict[str, float] = {}
    for part in parts:
        flat = part.matrix.flatten(1)
        if min(flat.shape) < 3 or min(flat.shape) > LARGEST:
            continue
        wide = flat.shape[1] > flat.shape[0]
        gram = flat @ flat.T if wide else flat.T @ flat
        values, vectors = torch.linalg.eigh(gram)
        first = vectors[:, -1] if wide else flat @ vectors[:, -1]
        share = first.square() / first.square().sum().clamp_min(1e-30)
        gap = 0.5 * float((values[-1].clamp_min(1e-30) / values[-2].clamp_min(1e-30)).log())
        blocks[part.block.label] = max(gap, blocks.get(part.block.label, 0.0))
        cell = cells[part.block.dst]
        if cell.movable:
            here = torch.zeros(cell.size, dtype=torch.float64)
            here[part.dst] = share * len(part.dst)
            channels.setdefault(cell.name, []).append(here)
    return channels, blocks


def by_factor(found: Mapping[str, Sequence[Tensor]], cells: Mapping[str, Cell], wiring: Wiring) -> dict[str, Tensor]:
    """Scores of cells as scores of free factors ``(*over, size)``: how far each stands out, the largest of all.

    Of every vector the distance from the median in units of the median absolute deviation is taken first.
    """
    out: dict[str, Tensor] = {}
    for name, vectors in found.items():
        cell = cells[name]
        for vector in vectors:
            scores = standing(vector).reshape(cell.sizes)
            for factor in cell.factors:
                f = wiring.factors[factor]
                if f.pinned or any(o not in cell.factors for o in f.over):
                    continue
                kept = [*(cell.factors.index(o) for o in f.over), cell.factors.index(factor)]
                others = [d for d in range(scores.dim()) if d not in kept]
                values = scores.permute(*kept, *others).flatten(len(kept)).amax(-1) if others else scores.permute(kept)
                out[factor] = torch.maximum(out[factor], values) if factor in out else values.contiguous()
    return out


def standing(x: Tensor) -> Tensor:
    """Distance from the median over the median absolute deviation; bounded, 0 where all are alike. Same shape."""
    middle = x.median()
    away = x - middle
    spread = 1.4826 * away.abs().median()
    floor = 1e-6 * x.abs().mean() + 1e-30
    return (away / torch.maximum(spread, floor)).clamp(-1e3, 1e3)


def _scale(
    wiring: Wiring, tensors: Mapping[str, Tensor], block: Block, vectors: Sequence[Vector], blocks: Sequence[Block],
    order: Mapping[str, int], size: int,
) -> Tensor:  # fmt: skip
    """What the norm after a block multiplies each of its channels by, ``(size,)``."""
    mine = order[block.tensor]
    until = min((order[b.tensor] for b in blocks if order[b.tensor] > mine), default=len(order))
    # What follows a block belongs to it up to the next block, where it lies on the block's channels.
    scale = torch.ones(size, dtype=torch.float64)
    for vector in vectors:
        role = wiring.roles.get(vector.tensor)
        here = mine < order.get(vector.tensor, -1) < until
        if vector.dst != block.dst or vector.width != 1 or not here or role not in ("gain", "variance"):
            continue
        value = vector.matrix(tensors[vector.tensor].detach().to(torch.float64))[:, 0]
        factor = value.abs() if role == "gain" else (value.clamp_min(0) + EPSILON).rsqrt()
        scale[vector.index()] *= factor
    return scale


__all__ = ["Folded", "by_factor", "folded", "isolation", "leading", "lipschitz", "standing"]
