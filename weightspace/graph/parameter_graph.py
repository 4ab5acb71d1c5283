"""``ParameterGraph``: a view of (checkpoint, wiring). Nodes are axis elements, tensors are blocks of edges."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from functools import cached_property
from math import prod
from typing import TYPE_CHECKING, Any, Literal

import torch

from weightspace.errors import GraphError
from weightspace.graph.layout import Block, Cell, Link, Loop, Vector, contained
from weightspace.wiring.wiring import Permutation, Status, Wiring

if TYPE_CHECKING:
    from os import PathLike

    from weightspace.graph.statistics import Statistics

EdgeKind = Literal["scalar", "channel"]
_VERSION = 1


@dataclass(frozen=True, repr=False)
class ParameterGraph:
    """A network as a graph over its neurons; built by ``weightspace.graph``.

    - ``cells``: groups of nodes (see ``Cell``), by name. Node ``i`` of a cell has number ``cell.start + i``.
    - ``blocks``: dense bundles of edges between two cells, one per tensor, or one per segment of it where an
      axis is a concatenation. ``block.matrix(graph.tensor(block.tensor))`` is ``(shared, out, in, width)``.
    - ``vectors``: tensors over one cell: features of its nodes.
    - ``values``: names of tensors over no cell (counters, scalars): features of the graph.
    - ``links``: edges without parameters between cells that share factors (heads and their channels).
    - ``tensors``: the weights, loaded when asked for. The graph holds no copy of them.

    A tensor with three dims of nodes of its own (a bilinear layer) is a block between the last two; the first
    is among its features.
    """

    cells: Mapping[str, Cell]
    blocks: tuple[Block, ...]
    vectors: tuple[Vector, ...]
    values: tuple[str, ...]
    links: tuple[Link, ...]
    shapes: Mapping[str, tuple[int, ...]]
    dtypes: Mapping[str, torch.dtype]
    status: Status
    origin: str
    notes: tuple[str, ...] = ()
    tensors: Mapping[str, torch.Tensor] | None = field(default=None, compare=False)
    wiring: Wiring | None = field(default=None, compare=False)

    # ---------------------------------------------------------------- size

    @property
    def num_nodes(self) -> int:
        return sum(cell.size for cell in self.cells.values())

    @property
    def num_edges(self) -> int:
        """Edges with a parameter: elements of the blocks."""
        return sum(block.numel for block in self.blocks)

    @property
    def num_parameters(self) -> int:
        return sum(prod(shape) for shape in self.shapes.values())

    @property
    def proved(self) -> bool:
        return self.status == "proved"

    # ---------------------------------------------------------------- weights

    def tensor(self, name: str) -> torch.Tensor:
        """A tensor as it is in the checkpoint; of a lazy one it is loaded (mapped) now and not kept."""
        if self.tensors is None:
            raise GraphError(f"this graph has no weights, only a structure; {name!r} cannot be read from it")
        try:
            found = self.tensors[name]
        except KeyError:
            raise KeyError(f"the graph has no tensor {name!r}; it has {', '.join(list(self.shapes)[:5])} …") from None
        return found.detach()

    def real(self, name: str) -> torch.Tensor:
        """The same as real numbers: a complex tensor gets a last dim of 2. Blocks are laid out over this."""
        found = self.tensor(name)
        return torch.view_as_real(found.resolve_conj()) if found.is_complex() else found

    def weight(self, bundle: Vector) -> torch.Tensor:
        """The weights of a block ``(shared, out, in, width)`` or vector ``(nodes, width)``; see ``matrix``."""
        return bundle.matrix(self.real(bundle.tensor))

    def statistics(self) -> dict[str, Statistics]:
        """Statistics of every block, vector and value by label, streamed; see ``weightspace.graph.statistics``."""
        from weightspace.graph.statistics import statistics

        return statistics(self)

    # ---------------------------------------------------------------- structure

    @cached_property
    def columns(self) -> dict[str, int]:
        """Where each vector starts in the node features: label -> first column; ``column_names`` has the rest."""
        return self._columns[0]

    @cached_property
    def column_names(self) -> tuple[str, ...]:
        """What the columns of the node features hold: role of the tensor, count where a cell has several."""
        return self._columns[1]

    @cached_property
    def _json(self) -> str:
        return json.dumps(self.describe())

    @cached_property
    def _columns(self) -> tuple[dict[str, int], tuple[str, ...]]:
        # Vectors of the same role in different cells share their columns.
        seen: dict[tuple[str, str], int] = {}
        slots: dict[tuple[str, int], int] = {}
        slot_of: dict[str, tuple[str, int]] = {}
        for v in self.vectors:
            role = v.tensor.replace("/", ".").rpartition(".")[2].removesuffix(":0")
            count = seen.get((v.dst, role), 0)
            seen[v.dst, role] = count + 1
            slot_of[v.label] = slot = (role, count)
            slots[slot] = max(slots.get(slot, 0), v.width)
        start: dict[tuple[str, int], int] = {}
        names: list[str] = []
        for (role, count), width in sorted(slots.items()):
            start[role, count] = len(names)
            base = role if count == 0 else f"{role}.{count}"
            names += [base if width == 1 else f"{base}[{i}]" for i in range(width)]
        return {label: start[slot] for label, slot in slot_of.items()}, tuple(names)

    def node_permutation(self, permutation: Permutation) -> torch.Tensor:
        """Where each node of the permuted network comes from, shape ``(num_nodes,)``, int64.

        Node ``i`` of ``graph(wiring.apply(p, tensors), wiring)`` is node ``graph.node_permutation(p)[i]`` here.
        """
        out = torch.arange(self.num_nodes)
        for cell in self.cells.values():
            if not any(f in permutation.index for f in cell.factors):
                continue
            columns = cell.positions().T
            where = dict(zip(cell.factors, columns, strict=True))
            origin = torch.full((cell.size,), cell.start, dtype=torch.long)
            for f, at, step in zip(cell.factors, columns, cell.steps, strict=True):
                p = permutation.index.get(f)
                moved = at if p is None else p[(*(where[o] for o in permutation.factors[f].over), at)]
                origin += step * moved
            out[cell.start : cell.start + cell.size] = origin
        return out

    def link_index(self) -> torch.Tensor:
        """All links as pairs of node numbers, from the part to what it is part of, shape ``(2, n)``, int64."""
        pairs = [torch.empty(2, 0, dtype=torch.long)]
        for link in self.links:
            inner, outer = self.cells[link.src], self.cells[link.dst]
            numbers = torch.arange(outer.start, outer.start + outer.size)
            pairs.append(torch.stack((contained(inner, outer) + inner.start, numbers)))
        return torch.cat(pairs, dim=1)

    def describe(self) -> dict[str, Any]:
        """The structure without the weights, as plain lists and dicts that JSON can hold."""
        return {
            "format": "weightspace-graph",
            "version": _VERSION,
            "status": self.status,
            "origin": self.origin,
            "notes": list(self.notes),
            "nodes": self.num_nodes,
            "edges": self.num_edges,
            "parameters": self.num_parameters,
            "tensors": {
                n: {"shape": list(s), "dtype": str(self.dtypes[n]).removeprefix("torch.")}
                for n, s in self.shapes.items()
            },
            "cells": [_record(cell) for cell in self.cells.values()],
            "blocks": [_plain(block) for block in self.blocks],
            "vectors": [_plain(vector) for vector in self.vectors],
            "values": list(self.values),
            "links": [_record(link) for link in self.links],
        }

    @classmethod
    def from_description(cls, found: Mapping[str, Any]) -> ParameterGraph:
        """The graph that ``describe`` described, without weights. Raises ``GraphError`` for anything else."""
        if found.get("format") != "weightspace-graph" or found.get("version") != _VERSION:
            raise GraphError(
                f"no description of a parameter graph of version {_VERSION} (format {found.get('format')!r}, "
                f"version {found.get('version')!r}); expected what ParameterGraph.describe or to_json gave"
            )
        try:
            cells = [
                Cell(**{**c, "factors": tuple(c["factors"]), "sizes": tuple(c["sizes"])}) for c in found["cells"]
            ]
            return cls(
                {c.name: c for c in cells},
                tuple(Block(**_unplain(b)) for b in found["blocks"]),
                tuple(Vector(**_unplain(v)) for v in found["vectors"]),
                tuple(found["values"]),
                tuple(Link(**link) for link in found["links"]),
                {n: tuple(t["shape"]) for n, t in found["tensors"].items()},
                {n: getattr(torch, t["dtype"]) for n, t in found["tensors"].items()},
                found["status"],
                found["origin"],
                tuple(found["notes"]),
            )
        except (KeyError, TypeError, AttributeError) as error:
            raise GraphError(f"a damaged description of a parameter graph: {type(error).__name__} {error}") from error

    # ---------------------------------------------------------------- exports

    def to_pyg(self, edges: EdgeKind = "scalar", dtype: torch.dtype | None = None) -> Any:
        """A ``torch_geometric.data.Data``; see ``weightspace.graph.export.to_pyg``."""
        from weightspace.graph.export import to_pyg

        return to_pyg(self, edges, dtype)

    @staticmethod
    def from_pyg(data: Any) -> dict[str, torch.Tensor]:
        """The tensors that a ``Data`` of ``to_pyg`` holds, bit for bit."""
        from weightspace.graph.export import from_pyg

        return from_pyg(data)

    def to_networkx(self, max_edges: int = 2_000_000) -> Any:
        """A ``networkx.MultiDiGraph``; see ``weightspace.graph.export.to_networkx``."""
        from weightspace.graph.export import to_networkx

        return to_networkx(self, max_edges)

    @staticmethod
    def from_networkx(graph: Any) -> dict[str, torch.Tensor]:
        """The tensors that a graph of ``to_networkx`` (or its GraphML file) holds, bit for bit."""
        from weightspace.graph.export import from_networkx

        return from_networkx(graph)

    def to_json(self, indent: int | None = None) -> str:
        """The structure (cells, blocks, vectors, links) as JSON text, without the weights."""
        return self._json if indent is None else json.dumps(self.describe(), indent=indent)

    def save(self, path: str | PathLike[str], format: str = "json") -> None:
        """Write the graph: ``"json"`` (structure), ``"pyg"`` (everything) or ``"graphml"`` (everything)."""
        from weightspace.graph.export import save

        save(self, path, format)

    def __repr__(self) -> str:
        return _text(self)


def _record(part: Cell | Link) -> dict[str, Any]:
    found = {f.name: getattr(part, f.name) for f in fields(part)}
    return {k: list(v) if isinstance(v, tuple) else v for k, v in found.items()}


def _plain(bundle: Vector) -> dict[str, Any]:
    out: dict[str, Any] = {"tensor": bundle.tensor, "part": bundle.part, "parts": bundle.parts, "dst": bundle.dst}
    if isinstance(bundle, Block):
        out["src"] = bundle.src
    out["origin"] = list(bundle.origin)
    out["loops"] = [[x.size, x.dim, x.stride, x.dst, x.src, x.feature] for x in bundle.loops]
    return out


def _unplain(found: Mapping[str, Any]) -> dict[str, Any]:
    loops = tuple(Loop(*row) for row in found["loops"])
    return {**found, "origin": tuple(found["origin"]), "loops": loops}


# -------------------------------------------------------------------- text

_SHOWN = 12
_WIDE = 52


def _text(graph: ParameterGraph) -> str:
    status = {"proved": "proved", "unverified": "UNVERIFIED wiring", "failed": "FAILED wiring"}[graph.status]
    lines = [
        f"ParameterGraph({graph.origin}, {status}: {graph.num_parameters:,} parameters, {graph.num_nodes:,} nodes "
        f"in {len(graph.cells)} cells, {len(graph.blocks)} blocks, {len(graph.vectors)} vectors, "
        f"{len(graph.values)} values, {len(graph.links)} links)"
    ]
    cells = list(graph.cells.values())
    lines += _section("cells", [_cell_row(c) for c in cells])
    blocks = []
    for b in graph.blocks:
        form = f"{graph.cells[b.dst].size:,} × {graph.cells[b.src].size:,}"
        form += f", {b.shared} diagonal blocks" if b.shared > 1 else ""
        form += f", width {b.width}" if b.width > 1 else ""
        blocks.append((_cut(b.label), f"{_cut(b.src)} → {_cut(b.dst)}", f"({form})"))
    lines += _section("blocks", blocks)
    rows: dict[str, list[str]] = {}
    for v in graph.vectors:
        rows.setdefault(v.dst, []).append(v.label + (f" [{v.width}]" if v.width > 1 else ""))
    listed = [(_cut(c), ", ".join(v[:3]) + (f", … {len(v) - 3} more" if len(v) > 3 else "")) for c, v in rows.items()]
    lines += _section("vectors", listed)
    links: dict[str, list[str]] = {}
    for link in graph.links:
        links.setdefault(link.src, []).append(link.dst)
    lines += _section("links", [(_cut(c), "→ " + ", ".join(map(_cut, outer[:3])) + (" …" if len(outer) > 3 else ""))
                                for c, outer in links.items()])
    lines += [f"  note: {note}" for note in graph.notes]
    return "\n".join(lines)


def _cell_row(cell: Cell) -> tuple[str, str, str]:
    size = "×".join(f"{n:,}" for n in cell.sizes) or "1"
    return _cut(cell.name), size, ", ".join(x for x in ("movable" if cell.movable else "pinned", cell.mark) if x)


def _section(title: str, rows: list[Any]) -> list[str]:
    if not rows:
        return []
    # Both ends of a long list: what a network begins and ends with says most.
    hidden = len(rows) - _SHOWN
    shown = rows if hidden <= 0 else rows[: _SHOWN - 3] + rows[-3:]
    widths = [max(len(r[i]) for r in shown) for i in range(len(shown[0]))]
    lines = ["  ".join(x.ljust(w) for x, w in zip(r, widths, strict=True)).rstrip() for r in shown]
    if hidden > 0:
        lines.insert(_SHOWN - 3, f"… {hidden} more")
    return [f"  {title}", *(f"    {line}" for line in lines)]


def _cut(name: str) -> str:
    return name if len(name) <= _WIDE else f"{name[: _WIDE // 2 - 1]}…{name[-_WIDE // 2 :]}"
