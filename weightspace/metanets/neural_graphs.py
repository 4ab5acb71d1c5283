"""Neural graphs with principal neighbourhood aggregation, NG-GNN (Kofinas et al. 2024)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from weightspace.metanets.pyg_features import Batch
from weightspace.metanets.pyg_layers import (
    EdgeEncoder,
    EdgeHidden,
    NodeEncoder,
    ReferenceMetanet,
    checked,
    mlp,
    pooled,
)
from weightspace.metanets.pyg_probes import EdgeProbes

_AGGREGATORS = ["mean", "min", "max", "std"]
_SCALERS = ["identity", "amplification"]


class NeuralGraphs(ReferenceMetanet):
    """The graph network of Kofinas et al. (2024, "Graph Neural Networks for Learning Equivariant Representations
    of Neural Networks"), in its form with principal neighbourhood aggregation (PNA, Corso et al. 2020).

    Neurons carry their biases, edges their kernels on a grid ``kernel`` × ``kernel``; activations and, for what is
    pinned, the position are features of nodes. Messages are modulated by the edge (Perez et al. 2018), come along
    the edges and against them, and are gathered by mean, minimum, maximum and standard deviation, each also
    amplified by the logarithm of their number, in units of that of ``degree`` messages. Edges are updated in every
    layer but the last. Weights enter through ``fourier`` random frequencies (0: as they are). ``probes``: learned
    inputs whose values in every neuron are features of it, and read out (0: none; see ``EdgeProbes``).

    The defaults are those of the paper's comparison, 4 layers of width 64; ``NeuralGraphs(hidden=16, layers=3,
    fourier=16)`` is a small one. Permutation-invariant.
    """

    def __init__(
        self, outputs: int = 1, hidden: int = 64, layers: int = 4, dropout: float = 0.0, kernel: int = 7,
        fourier: int = 64, degree: int = 32, probes: int = 0,
    ) -> None:  # fmt: skip
        super().__init__()
        self.config = checked(
            {"kind": "neural-graphs", "outputs": outputs, "hidden": hidden, "layers": layers, "dropout": dropout,
             "kernel": kernel, "fourier": fourier, "degree": degree, "probes": probes}
        )  # fmt: skip
        self.kernel = kernel
        self.probes = EdgeProbes(kernel, probes) if probes else None
        self.nodes = NodeEncoder(kernel, hidden, True, probes)
        self.edges = EdgeEncoder(kernel, hidden, fourier)
        self.layers = nn.ModuleList(_Layer(hidden, dropout, degree, i < layers - 1) for i in range(layers))
        self.head = mlp(3 * (hidden + probes), 2 * hidden, outputs, dropout)

    def forward(self, batch: Batch) -> Tensor:
        batch = batch.as_type(self.dtype)
        values = self.values(batch)
        nodes, edges = self.nodes(batch, values), self.edges(batch)
        for layer in self.layers:
            nodes, edges = layer(nodes, edges, batch)
        found: Tensor = self.head(pooled(torch.cat((nodes, values), dim=1), batch))
        return found


class _Layer(nn.Module):
    def __init__(self, hidden: int, dropout: float, degree: int, update_edges: bool) -> None:
        super().__init__()
        from torch_geometric.nn.aggr import DegreeScalerAggregation

        self.before = nn.LayerNorm(hidden)
        self.ends = nn.ModuleList(nn.Linear(hidden, 2 * hidden, bias=False) for _ in range(2))
        self.modulation = nn.Linear(hidden, 4 * hidden)
        usual = nn.functional.one_hot(torch.tensor(degree), degree + 1)
        self.gather = DegreeScalerAggregation(_AGGREGATORS, _SCALERS, usual)
        self.out = mlp(hidden * (1 + len(_AGGREGATORS) * len(_SCALERS)), hidden, hidden, dropout)
        self.edge = EdgeHidden(hidden, hidden, hidden) if update_edges else None
        update = nn.Sequential(nn.Dropout(dropout), nn.Linear(hidden, hidden), nn.LayerNorm(hidden))
        self.edge_out = update if update_edges else None

    def forward(self, nodes: Tensor, edges: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        src, dst = batch.edge_index
        v = self.before(nodes)
        to, of = (end(v) for end in self.ends)
        (to_dst, to_src), (of_src, of_dst) = to.chunk(2, dim=1), of.chunk(2, dim=1)
        gain, shift, gain_back, shift_back = self.modulation(edges).chunk(4, dim=1)
        along = (to_dst[dst] + of_src[src]) * (1 + gain) + shift
        against = (to_src[src] + of_dst[dst]) * (1 + gain_back) + shift_back
        come = self.gather(torch.cat((along, against)), torch.cat((dst, src)), dim_size=batch.num_nodes)
        nodes = nodes + self.out(torch.cat((v, come), dim=1))
        if self.edge is not None and self.edge_out is not None:
            edges = edges + self.edge_out(self.edge(nodes, edges, batch.edge_index))
        return nodes, edges
