"""What the reference metanetworks have in common: encoders of weights, small networks over edges, read-outs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from weightspace.errors import MetanetError, MissingExtraError
from weightspace.metanets.base import Metanet
from weightspace.metanets.pyg_features import TYPE_FEATURES, WIDTH, Batch, Item, batch_of, item_of, tables_of
from weightspace.metanets.pyg_probes import EdgeProbes
from weightspace.metanets.structure import ROLES

try:
    from torch_geometric.utils import scatter as _scatter
except ImportError as error:
    raise MissingExtraError("torch_geometric", "all", "a reference metanetwork") from error

if TYPE_CHECKING:
    from weightspace.graph import ParameterGraph


class ReferenceMetanet(Metanet):
    """A metanetwork over materialised edges; ``kernel`` and ``vectors`` are the form of its tables, ``probes`` what
    follows learned inputs, where it has any."""

    kernel: int
    vectors: str = "entries"
    probes: EdgeProbes | None

    @property
    def dtype(self) -> torch.dtype:
        return next(self.parameters()).dtype

    def prepare(self, graph: ParameterGraph) -> Item:
        """The weights of a network laid end to end; where each one goes is found once per wiring.

        Raises ``MetanetError`` for a graph without weights or wiring, or with too many edges to materialise.
        """
        return item_of(graph, tables_of(graph, self.kernel, self.vectors), self.probes is not None)

    def values(self, batch: Batch) -> Tensor:
        """Values of the nodes for the probes, ``(N, probes)``; ``(N, 0)`` without."""
        return batch.nodes[:, :0] if self.probes is None else self.probes(batch)

    def collate(self, items: Sequence[Item]) -> Batch:
        """One graph of several networks, of any architectures."""
        return batch_of(items)


# What weight decay has made of weights that nothing needs, down to the least number there is: no measure of anything.
_NOTHING = 1e-8


class RunningScale(nn.Module):
    """Divides weights by what is usual for tensors of their role: ``(n, P), (n,) roles -> (n, P)``.

    While training, the median over the rows of a batch of their largest magnitude is followed as a running
    average; a factor per role changes no symmetry. Before anything was seen the factor is 1.
    """

    scale: Tensor
    seen: Tensor

    def __init__(self, momentum: float = 0.05) -> None:
        super().__init__()
        self.momentum = momentum
        self.register_buffer("scale", torch.ones(len(ROLES)))
        self.register_buffer("seen", torch.zeros(len(ROLES)))

    def forward(self, weights: Tensor, roles: Tensor) -> Tensor:
        if self.training:
            self._follow(weights.detach(), roles)
        return weights / self.scale[roles].unsqueeze(1)

    def _follow(self, weights: Tensor, roles: Tensor) -> None:
        size = weights.abs().amax(dim=1)
        for role in range(len(ROLES)):
            own = size[(roles == role) & (size > _NOTHING)]
            if own.numel():
                self.seen[role] += 1
                share = max(self.momentum, 1 / float(self.seen[role]))
                self.scale[role] += share * (own.median() - self.scale[role])


def mlp(into: int, hidden: int, out: int, dropout: float = 0.0) -> nn.Sequential:
    """Two linear layers with a norm, SiLU and dropout between them."""
    return nn.Sequential(
        nn.Linear(into, hidden), nn.LayerNorm(hidden), nn.SiLU(), nn.Dropout(dropout), nn.Linear(hidden, out)
    )


class EdgeHidden(nn.Module):
    """A linear layer and SiLU over (destination, source, edge), ``(E, out)``.

    Equal to a layer over the three laid end to end, but what belongs to nodes is multiplied once per node.
    """

    def __init__(self, nodes: int, edges: int, out: int) -> None:
        super().__init__()
        self.dst = nn.Linear(nodes, out, bias=False)
        self.src = nn.Linear(nodes, out, bias=False)
        self.edge = nn.Linear(edges, out)

    def forward(self, nodes: Tensor, edges: Tensor, index: Tensor) -> Tensor:
        src, dst = index
        found: Tensor = self.edge(edges) + self.dst(nodes).index_select(0, dst) + self.src(nodes).index_select(0, src)
        return nn.functional.silu(found)


class NodeEncoder(nn.Module):
    """First states of the nodes ``(N, hidden)``: what they are, and where given their biases and norms, and values of
    ``probes`` learned inputs."""

    def __init__(self, kernel: int, hidden: int, entries: bool, probes: int = 0) -> None:
        super().__init__()
        self.nodes = mlp(WIDTH + probes, hidden, hidden)
        self.scale = RunningScale() if entries else None
        self.values = nn.Linear(kernel**2, hidden, bias=False) if entries else None
        self.types = nn.Linear(TYPE_FEATURES, hidden) if entries else None
        self.mix = mlp(hidden, hidden, hidden) if entries else None

    def forward(self, batch: Batch, values: Tensor) -> Tensor:
        nodes: Tensor = self.nodes(torch.cat((batch.nodes, values), dim=1))
        if self.scale is None or self.values is None or self.types is None or self.mix is None:
            return nodes
        entries = self.values(self.scale(batch.entries, batch.type_role[batch.entry_type]))
        each = self.mix(entries + self.types(batch.types)[batch.entry_type])
        return nodes + scatter(each, batch.entry_node, batch.num_nodes, "sum")


class EdgeEncoder(nn.Module):
    """First states of the edges ``(E, hidden)``: their kernel, role, depth and place in the kernel.

    ``fourier`` > 0: sines and cosines of that many random projections of the kernel instead of the kernel
    itself, with frequencies of the size ``frequency`` (Tancik et al. 2020).
    """

    frequencies: Tensor

    def __init__(self, kernel: int, hidden: int, fourier: int = 0, frequency: float = 1.0) -> None:
        super().__init__()
        self.scale = RunningScale()
        self.fourier = fourier
        self.register_buffer("frequencies", frequency * torch.randn(kernel**2, fourier))
        self.values = nn.Linear(2 * fourier if fourier else kernel**2, hidden, bias=False)
        self.types = nn.Linear(TYPE_FEATURES, hidden)

    def forward(self, batch: Batch) -> Tensor:
        values = self.scale(batch.edges, batch.type_role[batch.edge_type])
        if self.fourier:
            turned = values @ self.frequencies
            values = torch.cat((turned.sin(), turned.cos()), dim=1)
        found: Tensor = self.values(values) + self.types(batch.types).index_select(0, batch.edge_type)
        return found


def scatter(rows: Tensor, index: Tensor, size: int, reduce: str) -> Tensor:
    """``torch_geometric.utils.scatter`` over the first dim: ``(n, d), (n,) -> (size, d)``."""
    found: Tensor = _scatter(rows, index, dim=0, dim_size=size, reduce=reduce)
    return found


def pooled(nodes: Tensor, batch: Batch) -> Tensor:
    """Means over the hidden, input and output nodes of each network, ``(networks, 3 d)``; zero where it has none."""
    found = scatter(nodes, 3 * batch.node_graph + batch.node_mark, 3 * batch.size, "mean")
    return found.reshape(batch.size, -1)


def checked(config: dict[str, Any]) -> dict[str, Any]:
    """The configuration, if its options make sense; raises ``MetanetError`` otherwise."""
    for name in ("outputs", "hidden", "layers", "kernel"):
        value = config[name]
        if not isinstance(value, int) or value < 1:
            raise MetanetError(f"{name}={value!r} for the metanet {config['kind']!r}; expected a positive integer")
    if not 0.0 <= config["dropout"] < 1.0:
        raise MetanetError(f"dropout={config['dropout']!r}; expected a share from 0 to below 1")
    return config
