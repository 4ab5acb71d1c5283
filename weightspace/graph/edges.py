"""Materialising a parameter graph edge by edge, and reading the tensors back from the edges.

Edges come block by block, those of a block in the order of the tensor's own elements, so that writing them
is a copy and reading them back is one too. Where something else has put them in another order they are
found again by (block, destination, source, position), which names every edge of a network once.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from weightspace.errors import GraphError
from weightspace.graph.layout import Block, Vector, spread
from weightspace.graph.parameter_graph import EdgeKind, ParameterGraph


@dataclass(frozen=True)
class Addresses:
    """Which edge is which: ``index (2, E)`` (source, destination) int64, ``block`` and ``position (E,)`` int32.

    ``position`` is empty where an edge is a pair of channels.
    """

    index: torch.Tensor
    block: torch.Tensor
    position: torch.Tensor


@dataclass(frozen=True)
class Materialised:
    """A graph as arrays: ``attr (E, P)``, node features ``x (N, F)``, and what these cannot hold exactly.

    ``exact`` holds tensors of which a value changes on the way into the dtype of ``attr`` and ``x`` and back;
    ``values`` the tensors over no node.
    """

    kind: EdgeKind
    addresses: Addresses
    attr: torch.Tensor
    x: torch.Tensor
    values: dict[str, torch.Tensor]
    exact: dict[str, torch.Tensor]


def materialise(graph: ParameterGraph, kind: EdgeKind = "scalar", dtype: torch.dtype | None = None) -> Materialised:
    """Every edge and node feature of a graph, at 28 bytes for a scalar edge in float32.

    ``dtype`` defaults to float32, or float64 where a tensor is that wide. Peak memory is the result and one
    tensor at a time.
    """
    if kind not in ("scalar", "channel"):
        raise GraphError(f"edges can be 'scalar' or 'channel', found {kind!r}")
    dtype = dtype or default_dtype(graph)
    if not dtype.is_floating_point:
        raise GraphError(f"edge attributes need a floating point dtype, found {dtype}")
    where = addresses(graph, kind)
    widest = 1 if kind == "scalar" else max((b.width for b in graph.blocks), default=1)
    # Only what is narrower than the widest kernel is padded.
    padded = any(b.width < widest for b in graph.blocks)
    attr = (torch.zeros if padded else torch.empty)(where.index.shape[1], widest, dtype=dtype)
    x = torch.zeros(graph.num_nodes, len(graph.column_names), dtype=dtype)
    exact: dict[str, torch.Tensor] = {}
    targets = _targets(graph, kind, attr, x)
    for name, parts in _by_tensor(graph).items():
        tensor = graph.real(name)
        for part in parts:
            targets[part.label].copy_(part.view(tensor))
        if tensor.dtype != dtype and not all(
            same_bits(_cast(targets[p.label], tensor.dtype), p.view(tensor)) for p in parts
        ):
            exact[name] = graph.tensor(name).clone()
    values = {name: graph.tensor(name).clone() for name in graph.values}
    return Materialised(kind, where, attr, x, values, exact)


def assemble(graph: ParameterGraph, found: Materialised) -> dict[str, torch.Tensor]:
    """The tensors of a graph, from its arrays: the inverse of ``materialise``, bit for bit.

    ``graph`` needs no weights. An edge or feature that was changed since wins over the exact copy.
    """
    order = _order(graph, found)
    attr = found.attr if order is None else found.attr[order]
    wanted = graph.num_nodes, len(graph.column_names)
    if tuple(found.x.shape) != wanted:
        raise GraphError(f"node features of shape {tuple(found.x.shape)}; the graph has {wanted}")
    sources = _targets(graph, found.kind, attr, found.x)
    out: dict[str, torch.Tensor] = {}
    parts = _by_tensor(graph)
    for name, shape in graph.shapes.items():
        dtype = graph.dtypes[name]
        if name not in parts:
            if name not in found.values:
                raise GraphError(f"the value {name!r} is missing; it belongs to the graph and to none of its nodes")
            out[name] = found.values[name].clone()
            continue
        kept = found.exact.get(name)
        if kept is not None:
            real = torch.view_as_real(kept) if kept.is_complex() else kept
            if all(_same_values(p.view(real).to(found.attr.dtype), sources[p.label]) for p in parts[name]):
                out[name] = kept.clone()
                continue
        tensor = torch.empty(shape, dtype=dtype)
        real = torch.view_as_real(tensor) if dtype.is_complex else tensor
        for part in parts[name]:
            part.view(real).copy_(_cast(sources[part.label], real.dtype))
        out[name] = tensor
    return out


def addresses(graph: ParameterGraph, kind: EdgeKind) -> Addresses:
    """Which edge is which, in the order of ``materialise``."""
    total = sum(_count(b, kind) for b in graph.blocks)
    index = torch.empty(2, total, dtype=torch.long)
    block = torch.empty(total, dtype=torch.int32)
    position = torch.empty(total if kind == "scalar" else 0, dtype=torch.int32)
    at = 0
    for number, b in enumerate(graph.blocks):
        loops = b.loops if kind == "scalar" else [x for x in b.loops if not x.feature]
        sizes, end = [x.size for x in loops], at + _count(b, kind)
        index[0, at:end].view(sizes).copy_(spread(loops, "src", graph.cells[b.src].start))
        index[1, at:end].view(sizes).copy_(spread(loops, "dst", graph.cells[b.dst].start))
        block[at:end] = number
        if kind == "scalar":
            position[at:end].view(sizes).copy_(spread(loops, "feature"))
        at = end
    return Addresses(index, block, position)


def default_dtype(graph: ParameterGraph) -> torch.dtype:
    """float32, or float64 where a tensor with edges or node features is that wide."""
    wide = (torch.float64, torch.complex128)
    return torch.float64 if any(graph.dtypes[n] in wide for n in _by_tensor(graph)) else torch.float32


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal to the last bit: NaN equals the same NaN, and -0 differs from 0."""
    integer = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[a.dtype.itemsize]
    return torch.equal(a.view(integer), b.view(integer))


def _same_values(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal, where any NaN equals any other: a cast gives NaN whose bits depend on the memory layout."""
    return bool(((a == b) | ((a != a) & (b != b))).all())


def _by_tensor(graph: ParameterGraph) -> dict[str, list[Vector]]:
    out: dict[str, list[Vector]] = {}
    for part in (*graph.blocks, *graph.vectors):
        out.setdefault(part.tensor, []).append(part)
    return out


def _count(block: Block, kind: EdgeKind) -> int:
    return block.numel if kind == "scalar" or not block.numel else block.numel // block.width


def _targets(graph: ParameterGraph, kind: EdgeKind, attr: torch.Tensor, x: torch.Tensor) -> dict[str, torch.Tensor]:
    """For every block and vector the slots of the arrays that hold it, as a view with a dim per loop."""
    out: dict[str, torch.Tensor] = {}
    at = 0
    for b in graph.blocks:
        count = _count(b, kind)
        rows = attr[at : at + count]
        at += count
        if kind == "scalar":
            out[b.label] = rows.view(b.sizes)
            continue
        # Pairs of channels in their own order, features by their steps along the row.
        strides, step = [0] * len(b.loops), attr.stride(0)
        for i in reversed(range(len(b.loops))):
            if b.loops[i].feature:
                strides[i] = b.loops[i].feature * attr.stride(1)
            else:
                strides[i], step = step, step * b.loops[i].size
        out[b.label] = rows.as_strided(b.sizes, strides, rows.storage_offset())
    for v in graph.vectors:
        start = graph.cells[v.dst].start * x.stride(0) + graph.columns[v.label] * x.stride(1)
        strides = [loop.dst * x.stride(0) + loop.feature * x.stride(1) for loop in v.loops]
        out[v.label] = x.as_strided(v.sizes, strides, x.storage_offset() + start)
    return out


def _cast(values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    if dtype.is_floating_point or dtype == torch.bool or values.dtype == dtype:
        return values.to(dtype)
    # A float that no integer is near cannot be carried; nothing defined comes of converting it.
    return values.nan_to_num(0.0).to(dtype)


def _order(graph: ParameterGraph, found: Materialised) -> torch.Tensor | None:
    """Where each edge of the graph is among those found; None where they are in order already."""
    wanted, given = addresses(graph, found.kind), found.addresses
    if wanted.index.shape != given.index.shape or len(found.attr) != wanted.index.shape[1]:
        raise GraphError(
            f"{given.index.shape[-1]:,} edges with {len(found.attr):,} attributes were found, the graph has "
            f"{wanted.index.shape[1]:,}; every weight needs its edge"
        )
    if _same(wanted, given):
        return None
    a, b = _keys(wanted), _keys(given)
    here, there = np.lexsort(a), np.lexsort(b)
    if any(not np.array_equal(p[here], q[there]) for p, q in zip(a, b, strict=True)):
        raise GraphError("the edges are not those of the graph: some weights have no edge, or several")
    order = np.empty_like(here)
    order[here] = there
    return torch.from_numpy(order)


def _same(a: Addresses, b: Addresses) -> bool:
    return torch.equal(a.index, b.index) and torch.equal(a.block, b.block) and torch.equal(a.position, b.position)


def _keys(where: Addresses) -> list[np.ndarray[Any, Any]]:
    keys = [where.index[0].numpy(), where.index[1].numpy(), where.block.numpy()]
    return [where.position.numpy(), *keys] if len(where.position) else keys
