"""Read-outs: the whole graph, its axis elements, and its blocks (one value per weight)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from weightspace.errors import MetanetError
from weightspace.graph.layout import Block
from weightspace.metanets.batch import SHAPE_FEATURES, Batch
from weightspace.metanets.structure import BLOCK_FEATURES, COORDINATES


class GraphReadout(nn.Module):
    """States of all nodes to one embedding per network: cells are pooled first, then networks.

    Means, deviations and maxima over a cell do not change when each of its neurons is duplicated. The cells
    that hold the network's inputs and outputs are pooled once more on their own. Every block adds what its
    weights are like as a whole; ``transfer`` leaves out their scale.
    """

    def __init__(
        self, width: int, embedding: int, outputs: int, dropout: float = 0.0, *, models: int = 1, transfer: bool = False
    ) -> None:
        super().__init__()
        self.transfer = transfer
        tokens = BLOCK_FEATURES + models * (SHAPE_FEATURES + (0 if transfer else 2)) + 4 * width
        self.block = nn.Sequential(nn.Linear(tokens, 2 * width), nn.GELU(), nn.Linear(2 * width, 2 * width))
        self.cell = nn.Sequential(nn.Linear(3 * width, 2 * width), nn.GELU(), nn.Linear(2 * width, 2 * width))
        self.mix = nn.Sequential(nn.Linear(12 * width, embedding), nn.GELU(), nn.Linear(embedding, embedding))
        self.head = nn.Sequential(nn.GELU(), nn.Dropout(dropout), nn.Linear(embedding, outputs))

    def forward(self, states: Tensor, batch: Batch) -> Tensor:
        """Embeddings ``(networks, embedding)`` of states ``(nodes, width)``."""
        cells = len(batch.cell_network)
        mean = cell_mean(states, batch.cell, cells)
        spread = (cell_mean(states.square(), batch.cell, cells) - mean.square()).clamp_min(0)
        top = _maximum(states, batch.cell, cells)
        pooled = self.cell(torch.cat((mean, (spread + 1e-6).sqrt(), top), dim=1))
        network = batch.cell_network
        marks = batch.marks.to(pooled.dtype)
        ends = [_marked_mean(pooled, network, batch.size, marks[:, k]) for k in range(2)]
        tokens = self.block(self._tokens(pooled, batch))
        of = batch.block_network
        whole = [cell_mean(pooled, network, batch.size), _maximum(pooled, network, batch.size)]
        whole += [cell_mean(tokens, of, batch.size), _maximum(tokens, of, batch.size)]
        embedding: Tensor = self.mix(torch.cat((*whole, *ends), dim=1))
        return embedding

    def _tokens(self, pooled: Tensor, batch: Batch) -> Tensor:
        """What is said of every block: role and depth, how its weights are distributed, and the cells at its ends."""
        dtype = pooled.dtype
        parts = [batch.block_features.to(dtype), batch.block_shapes.flatten(1).to(dtype)]
        if not self.transfer:
            parts.append(relative_scales(batch.block_scales, batch.block_fans[:, 1] * batch.block_fans[:, 2]).to(dtype))
        ends = pooled[batch.block_cells]
        return torch.cat((*parts, ends.flatten(1)), dim=1)


class NodeReadout(nn.Module):
    """Outputs per axis element (a class, a neuron, a head): ``(nodes, outputs)`` from states ``(nodes, width)``."""

    def __init__(self, width: int, outputs: int = 1) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Linear(width, outputs))

    def forward(self, states: Tensor) -> Tensor:
        found: Tensor = self.layers(states)
        return found

    def by_cell(self, states: Tensor, batch: Batch) -> list[dict[str, Tensor]]:
        """The same per network and cell: name of the cell to ``(*sizes of its factors, outputs)``."""
        values = self(states)
        out = []
        for item, start in zip(batch.items, batch.starts, strict=False):
            own = values[start : start + item.structure.num_nodes]
            out.append({c.name: own[c.start : c.start + c.size].view(*c.sizes, -1) for c in item.structure.cells})
        return out


class BlockReadout(nn.Module):
    """One value per weight, block by block and only when asked for: what edge states would have been for.

    A weight w at position p from node j to node i gets
    ``Σ_c φ_c(w) ⟨h_i Q_c, h_j K_c ⊙ a_cp⟩`` over the channels 1, w / rms and |w| / rms of its block.
    """

    def __init__(self, width: int, rank: int = 16) -> None:
        super().__init__()
        self.rank = rank
        self.query = nn.Linear(width, 3 * rank)
        self.key = nn.Linear(width, 3 * rank)
        self.gate = nn.Linear(COORDINATES + BLOCK_FEATURES, 3 * rank)

    def forward(self, states: Tensor, batch: Batch, network: int, block: Block) -> Tensor:
        """Values ``(shared, out, in, positions)`` for one block of one network of the batch.

        ``block.matrix(tensor)`` has the same shape, so ``block.view(x)``-like writes put them in the tensor's own
        order. Raises ``MetanetError`` for a block that is not in the network.
        """
        item, start = batch.items[network], batch.starts[network]
        number = next((k for k, p in enumerate(item.structure.blocks) if p.block == block), None)
        if number is None:
            known = ", ".join(p.block.label for p in item.structure.blocks[:5])
            raise MetanetError(f"network {network} of the batch has no block {block.label!r}; it has {known} …")
        part = item.structure.blocks[number]
        dtype, device = states.dtype, states.device
        graph = item.graphs[0]
        weight = graph.weight(block).to(device=device, dtype=dtype)
        relative = weight / item.scales[number, 0, 1].clamp_min(1e-30).sqrt().to(dtype)
        features = torch.cat((part.coordinates, part.features.expand(len(part.coordinates), -1)), dim=1)
        gate = self.gate(features.to(device=device, dtype=dtype)).view(-1, 3, self.rank)
        query = self.query(states[(part.dst + start).to(device)]).unflatten(-1, (3, self.rank))
        key = self.key(states[(part.src + start).to(device)]).unflatten(-1, (3, self.rank))
        pairs = torch.einsum("socr,sicr,pcr->csoip", query, key, gate) / self.rank**0.5
        found: Tensor = pairs[0] + pairs[1] * relative + pairs[2] * relative.abs()
        return found


def relative_scales(scales: Tensor, fan_in: Tensor) -> Tensor:
    """Logarithms of mean |w| and mean w² ``(K, models, 2)`` relative to an initialisation that keeps variances.

    ``fan_in (K,)``: weights that each output sums. Returns ``(K, 2 models)``, float64.
    """
    fan = fan_in.to(torch.float64)
    relative = scales.to(torch.float64) * torch.stack((fan.sqrt(), fan), dim=1).unsqueeze(1)
    return relative.clamp(1e-8, 1e8).log().flatten(1)


def cell_mean(x: Tensor, cell: Tensor, cells: int) -> Tensor:
    """Means over groups of rows: x ``(n, d)``, the group of each row ``(n,)``, to ``(cells, d)``."""
    total = torch.zeros(cells, x.shape[1], dtype=x.dtype, device=x.device).index_add(0, cell, x)
    count = torch.bincount(cell, minlength=cells).clamp_min(1).to(x.dtype)
    return total / count.unsqueeze(1)


def _maximum(x: Tensor, group: Tensor, groups: int) -> Tensor:
    start = torch.full((groups, x.shape[1]), float("-inf"), dtype=x.dtype, device=x.device)
    top = start.scatter_reduce(0, group.unsqueeze(1).expand_as(x), x, "amax")
    return torch.where(torch.isfinite(top), top, torch.zeros_like(top))


def _marked_mean(x: Tensor, network: Tensor, networks: int, mark: Tensor) -> Tensor:
    total = torch.zeros(networks, x.shape[1], dtype=x.dtype, device=x.device)
    total = total.index_add(0, network, x * mark.unsqueeze(1))
    count = torch.zeros(networks, dtype=x.dtype, device=x.device).index_add(0, network, mark)
    return total / count.clamp_min(1).unsqueeze(1)
