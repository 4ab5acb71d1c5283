"""Parameter graphs in the terms of other libraries, and back: torch_geometric, networkx, GraphML, JSON."""

from __future__ import annotations

import base64
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from weightspace.errors import GraphError, MissingExtraError
from weightspace.graph.edges import Addresses, Materialised, assemble, materialise
from weightspace.graph.parameter_graph import EdgeKind, ParameterGraph
from weightspace.paths import whole

MARKS = ("", "input", "output")
FORMATS = ("json", "pyg", "graphml")


def to_pyg(graph: ParameterGraph, edges: EdgeKind = "scalar", dtype: torch.dtype | None = None) -> Any:
    """The graph as a ``torch_geometric.data.Data`` with N nodes and E edges.

    ``edges="scalar"``: an edge per weight; ``edge_attr (E, 1)``, and ``edge_position (E,)`` tells which kernel
    or window position it is. ``edges="channel"``: an edge per pair of channels with the kernel as features,
    ``edge_attr (E, widest)``, zeros beyond ``block_width[edge_block]``. ``dtype`` is that of ``edge_attr``
    and ``x``: float32 unless a tensor is float64.

    - ``edge_index (2, E)`` int64 from the axis summed over to the axis made; ``edge_block (E,)`` int32.
    - ``x (N, F)``: vectors as node features, columns as in ``x_columns``, zero where a cell has none.
    - ``node_cell (N,)`` int32, ``node_position (N, R)`` int32 (position in each factor of the cell, -1 beyond),
      ``node_movable (N,)`` bool, ``node_mark (N,)`` int8 (1 input, 2 output).
    - ``link_index (2, L)`` int64: edges without parameters.
    - ``graph_values``, ``exact``: tensors over no node, and those that ``dtype`` cannot hold to the last bit.
    - ``description``: the structure as JSON; with it ``ParameterGraph.from_pyg`` finds every tensor again.
    """
    try:
        from torch_geometric.data import Data
    except ImportError as error:
        raise MissingExtraError("torch_geometric", "all", "a PyG graph") from error
    return Data(**_pyg_fields(graph, edges, dtype))


def from_pyg(data: Any) -> dict[str, torch.Tensor]:
    """The tensors that a ``Data`` of ``to_pyg`` (or its ``to_dict()``) holds, in order, bit for bit.

    Edges may be in any order. Changed ``edge_attr`` and ``x`` come back changed, in the dtype of the tensor.
    Raises ``GraphError`` where edges are missing or the structure is.
    """
    found = data if isinstance(data, Mapping) else data.to_dict()
    missing = [k for k in ("edge_index", "edge_attr", "edge_block", "x", "description") if k not in found]
    if missing:
        raise GraphError(f"no parameter graph: {', '.join(missing)} missing; expected what to_pyg gave")
    if not isinstance(found["description"], str):
        raise GraphError("this is a batch of graphs; give one of them, e.g. batch.get_example(0)")
    graph = ParameterGraph.from_description(json.loads(found["description"]))
    kind: EdgeKind = "scalar" if "edge_position" in found else "channel"
    position = found.get("edge_position", torch.empty(0, dtype=torch.int32))
    where = Addresses(found["edge_index"].cpu(), found["edge_block"].cpu(), position.cpu())
    attr, x = found["edge_attr"].detach().cpu(), found["x"].detach().cpu()
    return assemble(graph, Materialised(kind, where, attr, x, dict(found["graph_values"]), dict(found["exact"])))


def to_networkx(graph: ParameterGraph, max_edges: int = 2_000_000) -> Any:
    """The graph as a ``networkx.MultiDiGraph`` whose attributes GraphML can hold.

    Nodes: ``cell``, ``position`` ("2,5"), ``movable``, ``mark``, and the vectors by column name. Edges:
    ``weight``, ``tensor``, ``block``, ``position``; links have ``block`` -1 and no weight. Graph attributes
    hold the structure and the values, so that ``ParameterGraph.from_networkx`` finds every tensor again.

    Raises ``GraphError`` above ``max_edges`` edges: networkx takes about 500 bytes for each.
    """
    try:
        import networkx
    except ImportError as error:
        raise MissingExtraError("networkx", "all", "a networkx graph") from error
    links = graph.link_index()
    total = graph.num_edges + links.shape[1]
    if total > max_edges:
        raise GraphError(
            f"the graph has {total:,} edges and networkx would need some {total * 500 / 1e9:,.1f} GB for them; "
            f"at most {max_edges:,} are made. Use to_pyg, the blocks themselves, or raise max_edges"
        )
    found = materialise(graph, "scalar", torch.float64)
    for name in graph.shapes:
        # Text knows one NaN only.
        if name not in found.values and bool(torch.isnan(graph.real(name)).any()):
            found.exact[name] = graph.tensor(name).clone()
    out = networkx.MultiDiGraph(
        description=graph.to_json(), graph_values=_packed(found.values), exact=_packed(found.exact)
    )
    columns: dict[str, list[int]] = {}
    for v in graph.vectors:
        columns.setdefault(v.dst, []).extend(range(graph.columns[v.label], graph.columns[v.label] + v.width))
    for cell in graph.cells.values():
        rows = found.x[cell.start : cell.start + cell.size].tolist()
        own = [(graph.column_names[c], c) for c in sorted(columns.get(cell.name, ()))]
        for i, (place, row) in enumerate(zip(cell.positions().tolist(), rows, strict=True)):
            features = {f"x.{label}": row[c] for label, c in own}
            out.add_node(
                cell.start + i, cell=cell.name, position=",".join(map(str, place)), movable=cell.movable,
                mark=cell.mark, **features,
            )  # fmt: skip
    names = [b.tensor for b in graph.blocks]
    where = found.addresses
    columns_of_edges = (where.index[0], where.index[1], found.attr[:, 0], where.block, where.position)
    for src, dst, weight, block, position in zip(*(c.tolist() for c in columns_of_edges), strict=True):
        out.add_edge(src, dst, weight=weight, tensor=names[block], block=block, position=position)
    for src, dst in links.T.tolist():
        out.add_edge(src, dst, block=-1)
    return out


def from_networkx(found: Any) -> dict[str, torch.Tensor]:
    """The tensors that a graph of ``to_networkx`` holds, in order, bit for bit; also from its GraphML file."""
    missing = [k for k in ("description", "graph_values", "exact") if k not in found.graph]
    if missing:
        raise GraphError(f"no parameter graph: {', '.join(missing)} missing; expected what to_networkx gave")
    graph = ParameterGraph.from_description(json.loads(found.graph["description"]))
    column = {f"x.{name}": i for i, name in enumerate(graph.column_names)}
    x = torch.zeros(graph.num_nodes, len(column), dtype=torch.float64)
    for node, attributes in found.nodes(data=True):
        for key, value in attributes.items():
            if key in column:
                x[int(node), column[key]] = value
    src, dst, weight, block, position = [], [], [], [], []
    for a, b, edge in found.edges(data=True):
        if edge.get("block", -1) < 0:
            continue
        src.append(int(a))
        dst.append(int(b))
        weight.append(edge["weight"])
        block.append(edge["block"])
        position.append(edge["position"])
    where = Addresses(
        torch.tensor([src, dst], dtype=torch.long),
        torch.tensor(block, dtype=torch.int32),
        torch.tensor(position, dtype=torch.int32),
    )
    attr = torch.tensor(weight, dtype=torch.float64).reshape(-1, 1)
    values, exact = _unpacked(found.graph["graph_values"]), _unpacked(found.graph["exact"])
    return assemble(graph, Materialised("scalar", where, attr, x, values, exact))


def save(graph: ParameterGraph, path: str | os.PathLike[str], format: str = "json") -> None:
    """Write a graph to a file, whole or not at all.

    ``"json"``: the structure, without weights. ``"pyg"``: the fields of ``to_pyg`` as a dictionary of tensors
    that ``torch.load(path, weights_only=True)`` reads and ``from_pyg`` takes. ``"graphml"``: everything, for
    graphs that networkx can hold.
    """
    write: Callable[[Path], None]
    if format == "json":
        text = graph.to_json(indent=1)

        def write(target: Path) -> None:
            target.write_text(text, encoding="utf-8")

    elif format == "pyg":
        fields = _pyg_fields(graph, "scalar", None)

        def write(target: Path) -> None:
            torch.save(fields, target)

    elif format == "graphml":
        found = to_networkx(graph)

        def write(target: Path) -> None:
            import networkx

            networkx.write_graphml_xml(found, target)

    else:
        raise GraphError(f"graphs are written as {', '.join(FORMATS)}; found {format!r}")
    with whole(path) as temporary:
        write(temporary)


def _pyg_fields(graph: ParameterGraph, edges: EdgeKind, dtype: torch.dtype | None) -> dict[str, Any]:
    found = materialise(graph, edges, dtype)
    where = found.addresses
    cells = list(graph.cells.values())
    sizes = torch.tensor([c.size for c in cells])
    rank = max((len(c.factors) for c in cells), default=0)
    position = torch.full((graph.num_nodes, rank), -1, dtype=torch.int32)
    for cell in cells:
        position[cell.start : cell.start + cell.size, : len(cell.factors)] = cell.positions().int()

    def per_node(values: list[Any], of: torch.dtype) -> torch.Tensor:
        return torch.tensor(values, dtype=of).repeat_interleave(sizes) if cells else torch.empty(0, dtype=of)

    fields = {
        "x": found.x,
        "edge_index": where.index,
        "edge_attr": found.attr,
        "edge_block": where.block,
        "node_cell": per_node(list(range(len(cells))), torch.int32),
        "node_position": position,
        "node_movable": per_node([c.movable for c in cells], torch.bool),
        "node_mark": per_node([MARKS.index(c.mark) for c in cells], torch.int8),
        "link_index": graph.link_index(),
        "block_width": torch.tensor([b.width for b in graph.blocks], dtype=torch.int32),
        "x_columns": list(graph.column_names),
        "graph_values": found.values,
        "exact": found.exact,
        "description": graph.to_json(),
        "num_nodes": graph.num_nodes,
    }
    if edges == "scalar":
        fields["edge_position"] = where.position
    return fields


def _packed(tensors: Mapping[str, torch.Tensor]) -> str:
    """Tensors as text: a safetensors file in base 64."""
    from safetensors.torch import save as to_bytes

    return base64.b64encode(to_bytes({k: v.contiguous() for k, v in tensors.items()})).decode("ascii")


def _unpacked(text: str) -> dict[str, torch.Tensor]:
    from safetensors.torch import load

    return dict(load(base64.b64decode(text)))
