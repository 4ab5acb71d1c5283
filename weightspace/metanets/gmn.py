"""Graph metanetworks (Lim et al. 2023): message passing with a state for every node, edge and graph."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from weightspace.errors import MetanetError
from weightspace.metanets.pyg_features import Batch
from weightspace.metanets.pyg_layers import (
    EdgeEncoder,
    EdgeHidden,
    NodeEncoder,
    ReferenceMetanet,
    checked,
    mlp,
    pooled,
    scatter,
)
from weightspace.metanets.pyg_probes import EdgeProbes


class Gmn(ReferenceMetanet):
    """The graph metanetwork of Lim et al. (2023, "Graph Metanetworks for Processing Diverse Neural Architectures").

    Nodes are axis elements, and each bias or norm is a node with edges to the neurons that it belongs to. In every
    layer edges are updated from their ends, nodes from the messages along the edges and against them, and the
    state of the graph from both (Battaglia et al. 2018). Depth, role and kernel position are features.

    An edge is a pair of channels with its kernel on a grid ``kernel`` × ``kernel`` (``edges="channel"``), or every
    weight (``edges="scalar"``), as in the paper. A pair of nodes has one edge state, read in both directions.
    The default is a width of 32 with 4 layers; the paper compares metanetworks of about 50,000 parameters.
    ``Gmn(hidden=16, layers=3)`` is a small one. ``probes``: as in ``NeuralGraphs``, not in the paper.
    Permutation-invariant.
    """

    vectors = "nodes"

    def __init__(
        self, outputs: int = 1, hidden: int = 32, layers: int = 4, dropout: float = 0.0, kernel: int = 7,
        edges: str = "channel", probes: int = 0,
    ) -> None:  # fmt: skip
        super().__init__()
        self.config = checked(
            {"kind": "gmn", "outputs": outputs, "hidden": hidden, "layers": layers, "dropout": dropout,
             "kernel": kernel, "edges": edges, "probes": probes}
        )  # fmt: skip
        if edges not in ("channel", "scalar"):
            raise MetanetError(f"edges can be 'channel' or 'scalar', found {edges!r}")
        self.kernel = kernel if edges == "channel" else 1
        self.probes = EdgeProbes(self.kernel, probes) if probes else None
        self.nodes = NodeEncoder(self.kernel, hidden, False, probes)
        self.edges = EdgeEncoder(self.kernel, hidden)
        self.layers = nn.ModuleList(_Layer(hidden, dropout) for _ in range(layers))
        self.start = nn.Parameter(torch.zeros(hidden))
        self.head = mlp(5 * hidden + 3 * probes, 2 * hidden, outputs, dropout)

    def forward(self, batch: Batch) -> Tensor:
        batch = batch.as_type(self.dtype)
        values = self.values(batch)
        nodes, edges = self.nodes(batch, values), self.edges(batch)
        whole = self.start.expand(batch.size, -1)
        for layer in self.layers:
            nodes, edges, whole = layer(nodes, edges, whole, batch)
        read = pooled(torch.cat((nodes, values), dim=1), batch)
        found: Tensor = self.head(torch.cat((whole, read, scatter(edges, batch.edge_graph, batch.size, "mean")), dim=1))
        return found


class _Layer(nn.Module):
    """Edges, then nodes, then the graph. The last linear map of a message is applied after the mean."""

    def __init__(self, hidden: int, dropout: float) -> None:
        super().__init__()
        self.hidden = hidden
        self.norms = nn.ModuleList(nn.LayerNorm(hidden) for _ in range(3))
        self.whole = nn.Linear(hidden, hidden)
        self.edge = EdgeHidden(hidden, hidden, hidden)
        self.edge_out = nn.Sequential(nn.Dropout(dropout), nn.Linear(hidden, hidden))
        self.message = EdgeHidden(hidden, hidden, 2 * hidden)
        self.node_out = mlp(4 * hidden, hidden, hidden, dropout)
        self.whole_out = mlp(3 * hidden, hidden, hidden, dropout)

    def forward(self, nodes: Tensor, edges: Tensor, whole: Tensor, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        src, dst = batch.edge_index
        u = self.norms[2](whole)
        v = self.norms[0](nodes)
        # What the graph adds to an edge it adds through the ends.
        both = v + self.whole(u)[batch.node_graph]
        edges = edges + self.edge_out(self.edge(both, self.norms[1](edges), batch.edge_index))
        forth, back = self.message(both, self.norms[1](edges), batch.edge_index).split(self.hidden, dim=1)
        n = batch.num_nodes
        come = torch.cat(
            (v, scatter(forth, dst, n, "mean"), scatter(back, src, n, "mean"), u[batch.node_graph]), dim=1
        )
        nodes = nodes + self.node_out(come)
        of_nodes = scatter(nodes, batch.node_graph, batch.size, "mean")
        of_edges = scatter(edges, batch.edge_graph, batch.size, "mean")
        return nodes, edges, whole + self.whole_out(torch.cat((u, of_nodes, of_edges), dim=1))
