"""Operations in which values of one tensor are positions of another."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from weightspace.wiring.algebra import Dim, size_of
from weightspace.wiring.rules.base import (
    broadcast,
    cut,
    outputs_of,
    rule,
    tensors_of,
)
from weightspace.wiring.trace import Implied, Label, Tracer


def _address(t: Tracer, dim: Dim, index: torch.Tensor, why: str) -> None:
    """Positions along ``dim`` are chosen by the values of ``index``."""
    domain = t.label(index).domain
    if domain is not None and size_of(domain) == size_of(dim):
        t.unify(dim, domain)
    else:
        t.pin(dim, why)
        if domain is not None:
            t.pin(domain, why)


@rule("embedding")
def _embedding(t: Tracer, func: Any, args: Any, kwargs: Any, out: Any) -> Any:
    w = t.dims(args[0])
    _address(t, w[0], args[1], "vocabulary")
    t.read(args[0], 0)
    return [*t.dims(args[1]), w[1]]


@rule("_embedding_bag", "_embedding_bag_forward_only")
def _embedding_bag(t: Tracer, func: Any, args: Any, kwargs: Any, out: Any) -> Any:
    w = t.dims(args[0])
    t.pin(w[0], "vocabulary")
    outs = outputs_of(out)
    first = [t.ledger.dim(outs[0].shape[0], pinned=True, reason="bags"), w[1]]
    return [Label(first), *(Label(t.fresh(o.shape, "bags", pinned=True)) for o in outs[1:])]


@rule("index_select")
def _index_select(t: Tracer, func: Any, args: Any, kwargs: Any, out: Any) -> Any:
    x, d, index = args[0], args[1], args[2]
    dims = t.dims(x)
    if not dims:
        return []
    _address(t, dims[d], index, "indexed positions")
    dims[d] = t.dims(index)[0] if index.dim() else []
    return dims


@rule("index", "_unsafe_index")
def _index(t: Tracer, func: Any, args: Any, kwargs: Any, out: Any) -> Any:
    x, indices = args[0], list(args[1])
    dims = t.dims(x)
    if any(i is not None and i.dtype in (torch.bool, torch.uint8) for i in indices):
        return _masked_index(t, dims, indices, out)
    positions = [k for k, i in enumerate(indices) if i is not None]
    given = [i for i in indices if i is not None]
    shape = torch.broadcast_shapes(*(i.shape for i in given))
    run = _as_range(given[0], x.shape[positions[0]]) if len(given) == 1 and t.label(given[0]).const else None
    if run is not None:
        return cut(t, dims, positions[0], *run)
    for k, i in zip(positions, given, strict=True):
        _address(t, dims[k], i, "indexed positions")
    looked_up = broadcast(t, given, shape)
    implied = tuple(
        Implied(tuple(dims[k]), tuple(a for d in t.dims(i) for a in d), id(i))
        for k, i in zip(positions, given, strict=True)
        if t.label(i).domain is not None and i.dim()
    )
    rest = [d for k, d in enumerate(dims) if k not in positions]
    adjacent = positions == list(range(positions[0], positions[0] + len(positions)))
    lead = positions[0] if adjacent else 0
    result = [*rest[:lead], *looked_up, *rest[lead:]]
    return Label(result, domain=t.label(x).domain, implied=implied)


def _as_range(index: torch.Tensor, size: int) -> tuple[int, int] | None:
    """Start and stop of a constant one-dimensional index that counts upwards."""
    if index.dim() != 1 or index.numel() == 0 or index.device.type == "meta" or index.dtype == torch.bool:
        return None
    values = [v + size if v < 0 else v for v in index.tolist()]
    start = values[0]
    return (start, start + len(values)) if values == list(range(start, start + len(values))) and start >= 0 else None


def _masked_index(t: Tracer, dims: list[Dim], indices: Sequence[Any], out: torch.Tensor) -> list[Dim]:
    kept: list[Dim] = []
    k = 0
    for i in indices:
        if i is None:
            kept.append(dims[k])
            k += 1
        else:
            width = i.dim() if i.dtype in (torch.bool, torch.uint8) else 1
            t.pin(dims[k : k + width], "masked positions")
            t.pin(t.dims(i), "masked positions")
            k += width
    kept += dims[k:]
    lead = 0
    while lead < len(indices) and indices[lead] is None:
        lead += 1
    extra = out.dim() - len(kept)
    middle = t.fresh(out.shape[lead : lead + extra], "masked positions", pinned=True)
    return [*kept[:lead], *middle, *kept[lead:]]


@rule("index_put", "_index_put_impl", "_unsafe_index_put")
def _index_put(t: Tracer, func: Any, args: Any, kwargs: Any, out: Any) -> Any:
    x, indices, values = args[0], list(args[1]), args[2]
    dims = t.dims(x)
    if any(i is not None and i.dtype in (torch.bool, torch.uint8) for i in indices):
        region = _masked_index(t, dims, indices, x[tuple(slice(None) if i is None else i for i in indices)])
    else:
        region = _index(t, func, (x, indices), {}, None).dims
    lead = len(region) - values.dim()
    for d, v in enumerate(t.dims(values)):
        if lead + d >= 0 and v and size_of(v) == size_of(region[lead + d]):
            t.unify(region[lead + d], v)
    return t.dims(x)


@rule("gather")
def _gather(t: Tracer, func: Any, args: Any, kwargs: Any, out: Any) -> Any:
    x, d, index = args[0], args[1], args[2]
    dims, idims = t.dims(x), t.dims(index)
    if not dims:
        return idims
    d %= x.dim()
    for k in range(x.dim()):
        if k == d:
            _address(t, dims[k], index, "gathered positions")
        elif x.shape[k] == index.shape[k]:
            t.unify(dims[k], idims[k])
        else:
            t.pin([dims[k], idims[k]], "gathered positions")
    return Label(idims, domain=t.label(x).domain)


@rule("scatter", "scatter_add", "scatter_reduce", "index_add", "index_copy", "index_fill")
def _scatter(t: Tracer, func: Any, args: Any, kwargs: Any, out: Any) -> Any:
    x, d, index = args[0], args[1], args[2]
    source = args[3] if len(args) > 3 and isinstance(args[3], torch.Tensor) else None
    dims = t.dims(x)
    if not dims:
        return dims
    d %= x.dim()
    _address(t, dims[d], index, "scattered positions")
    if t.op.removeprefix("aten.").startswith("index"):
        if source is not None and source.dim() == x.dim():
            for k, s in enumerate(t.dims(source)):
                t.unify(t.dims(index)[0] if k == d else dims[k], s)
        return dims
    for k, i in enumerate(t.dims(index)):
        if k != d and index.shape[k] == x.shape[k]:
            t.unify(dims[k], i)
        elif k != d:
            t.pin([dims[k], i], "scattered positions")
    if source is not None and source.dim():
        for s, i in zip(t.dims(source), t.dims(index), strict=True):
            if size_of(s) == size_of(i):
                t.unify(s, i)
            else:
                t.pin([s, i], "scattered positions")
    return dims


@rule("nonzero", "masked_select", "bincount", "histc", "unique_consecutive", "_unique2")
def _positions(t: Tracer, func: Any, args: Any, kwargs: Any, out: Any) -> Any:
    """Positions become values: they may not move."""
    for x in tensors_of(args, kwargs):
        t.pin(t.dims(x), f"positions become values ({t.op})")
        held = t.label(x).domain
        if held is not None:
            t.pin(held, f"positions become values ({t.op})")
    return [Label(t.fresh(o.shape, "positions", pinned=True)) for o in outputs_of(out)]


@rule("isin", "bucketize", "searchsorted")
def _lookup_values(t: Tracer, func: Any, args: Any, kwargs: Any, out: Any) -> Any:
    """Each value of one operand is compared with all of the other, whose order matters."""
    values, table = (args[1], args[0]) if t.op == "aten.searchsorted" else (args[0], args[1])
    if isinstance(table, torch.Tensor):
        t.pin(t.dims(table), f"order matters ({t.op})")
    if not isinstance(values, torch.Tensor) or values.shape != out.shape:
        return t.fresh(out.shape, f"order matters ({t.op})", pinned=True)
    held = t.label(values).domain
    if held is not None:
        t.pin(held, f"index arithmetic ({t.op})")
    return t.dims(values)


@rule("zeros_like", "ones_like", "full_like", "new_zeros", "new_ones", "new_full", "empty_like", "new_empty",
      "new_empty_strided", "rand_like", "randn_like")  # fmt: skip
def _like(t: Tracer, func: Any, args: Any, kwargs: Any, out: Any) -> Any:
    if "rand" in t.op:
        return t.fresh(out.shape, "random", pinned=True)
    return Label(t.fresh(out.shape), const=True)
