"""Operations that cut, join and rearrange axes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from weightspace.wiring.algebra import Dim, Irreconcilable, size_of
from weightspace.wiring.rules.base import (
    argument,
    cut,
    outputs_of,
    rule,
    unknown,
)
from weightspace.wiring.trace import Label, Tracer


def _regroup(t: Tracer, dims: Sequence[Dim], shape: Sequence[int]) -> list[Dim]:
    """Dims of a row-major reshape."""
    result: list[Dim] = []
    source = [t.ledger.normal(d) for d in dims]
    if any(n == 0 for n in shape):
        return t.fresh(shape, "empty", pinned=True)
    i = 0
    todo = list(shape)
    k = 0
    while k < len(todo) or i < len(source):
        # The smallest run of source dims and of target dims with equal products.
        left: list[Dim] = []
        right: list[int] = []
        a = b = 1
        while not left or not right or a != b:
            if (a <= b and i < len(source)) or k >= len(todo):
                if i >= len(source):
                    break
                left.append(source[i])
                a *= size_of(source[i])
                i += 1
            else:
                right.append(int(todo[k]))
                b *= int(todo[k])
                k += 1
        flat = [x for d in left for x in d]
        try:
            pieces: list[Dim] = []
            rest: Dim = flat
            for n in right:
                piece, rest = t.ledger.factor_dim(rest, n)
                pieces.append(piece)
            if size_of(rest) != 1:
                raise Irreconcilable
        except Irreconcilable:
            if not t.ledger.is_pinned(flat):
                t.missing[f"{t.op} (reshape across axes)"] += 1
                t.pin(flat, f"reshape across axes ({t.op})")
            pieces = t.fresh(right, "reshape across axes", pinned=True)
        result += pieces
    return result


@rule("view", "_unsafe_view", "reshape", "_reshape_alias", "view_copy", "unflatten", "flatten")
def _view(t: Tracer, func: Any, args: Any, kwargs: Any, out: Any) -> Any:
    if args[0].numel() != out.numel():
        return unknown(t, func, args, kwargs, out)
    if len(args) > 1 and isinstance(args[1], torch.dtype):
        if args[0].shape == out.shape:
            return t.dims(args[0])
        return unknown(t, func, args, kwargs, out)
    return Label(_regroup(t, t.dims(args[0]), out.shape), True, t.label(args[0]).domain)


@rule("permute")
def _permute(t: Tracer, func: Any, args: Any, kwargs: Any, out: Any) -> Any:
    dims = t.dims(args[0])
    return Label([dims[d] for d in args[1]], True, t.label(args[0]).domain)


@rule("transpose", "swapaxes")
def _transpose(t: Tracer, func: Any, args: Any, kwargs: Any, out: Any) -> Any:
    dims = t.dims(args[0])
    if dims:
        dims[args[1]], dims[args[2]] = dims[args[2]], dims[args[1]]
    return Label(dims, True, t.label(args[0]).domain)


@rule("t")
def _t(t: Tracer, func: Any, args: Any, kwargs: Any, out: Any) -> Any:
    return Label(t.dims(args[0])[::-1], True, t.label(args[0]).domain)


@rule("squeeze", "unsqueeze", "squeeze_copy", "view_as_real", "view_as_complex")
def _squeeze(t: Tracer, func: Any, args: Any, kwargs: Any, out: Any) -> Any:
    if t.op.startswith("aten.view_as"):
        dims = t.dims(args[0])
        if t.op == "aten.view_as_real":
            return [*dims, t.ledger.dim(2, pinned=True, reason="real and imaginary")]
        t.pin(dims[-1], "real and imaginary")
        return dims[:-1]
    return Label(_regroup(t, t.dims(args[0]), out.shape), True, t.label(args[0]).domain)


@rule("expand", "expand_as", "broadcast_to")
def _expand(t: Tracer, func: Any, args: Any, kwargs: Any, out: Any) -> Any:
    lead = out.dim() - args[0].dim()
    dims = t.dims(args[0])
    result = []
    for d, n in enumerate(out.shape):
        if d >= lead and args[0].shape[d - lead] == n:
            result.append(dims[d - lead])
        else:
            result.append(t.ledger.dim(int(n)))
    return Label(result, True, t.label(args[0]).domain)


@rule("repeat", "tile")
def _repeat(t: Tracer, func: Any, args: Any, kwargs: Any, out: Any) -> Any:
    dims = t.dims(args[0])
    lead = out.dim() - len(dims)
    padded: list[Dim] = [[]] * lead + dims
    return [t.ledger.dim(int(r)) + d for r, d in zip(args[1], padded, strict=True)]


@rule("repeat_interleave")
def _repeat_interleave(t: Tracer, func: Any, args: Any, kwargs: Any, out: Any) -> Any:
    x, repeats = args[0], args[1] if len(args) > 1 else None
    dim = argument(args, kwargs, 2, "dim")
    if not isinstance(repeats, int) or dim is None:
        return unknown(t, func, args, kwargs, out)
    dims = t.dims(x)
    dims[dim] = dims[dim] + t.ledger.dim(repeats)
    return dims


@rule("slice", "narrow")
def _slice(t: Tracer, func: Any, args: Any, kwargs: Any, out: Any) -> Any:
    x = args[0]
    d = argument(args, kwargs, 1, "dim", 0) % x.dim()
    n = x.shape[d]
    if t.op == "aten.narrow":
        start, step = args[2], 1
    else:
        start = argument(args, kwargs, 2, "start") or 0
        step = argument(args, kwargs, 4, "step", 1)
    start = max(0, min(n, start + n if start < 0 else start))
    count = out.shape[d]
    domain = t.label(x).domain
    dims = t.dims(x)
    if count == 0:
        dims[d] = t.ledger.dim(0, pinned=True, reason="empty")
        return Label(dims, True, domain)
    if step == 1:
        return Label(cut(t, dims, d, start, start + count), True, domain)
    if n % step == 0 and start < step and count == n // step:
        try:
            outer, inner = t.ledger.factor_dim(dims[d], n // step)
            split = [*dims[:d], outer, inner, *dims[d + 1 :]]
            picked = cut(t, split, d + 1, start, start + 1)
            picked.pop(d + 1)
            return Label(picked, True, domain)
        except Irreconcilable:
            pass
    if not t.ledger.is_pinned(dims[d]):
        t.pin(dims[d], f"strided slice ({t.op})")
    dims[d] = t.ledger.dim(count, pinned=True, reason="strided slice")
    return Label(dims, True, domain)


@rule("select")
def _select(t: Tracer, func: Any, args: Any, kwargs: Any, out: Any) -> Any:
    x, d, i = args[0], args[1] % args[0].dim(), args[2]
    i = i + x.shape[d] if i < 0 else i
    dims = cut(t, t.dims(x), d, i, i + 1)
    dims.pop(d)
    return Label(dims, True, t.label(x).domain)


@rule("unbind")
def _unbind(t: Tracer, func: Any, args: Any, kwargs: Any, out: Any) -> Any:
    x = args[0]
    d = argument(args, kwargs, 1, "dim", 0) % x.dim()
    results = []
    for i in range(x.shape[d]):
        dims = cut(t, t.dims(x), d, i, i + 1)
        dims.pop(d)
        results.append(Label(dims, True, t.label(x).domain))
    return results


@rule(
    "split",
    "split_with_sizes",
    "unsafe_split",
    "unsafe_split_with_sizes",
    "chunk",
    "unsafe_chunk",
    "tensor_split",
)
def _split(t: Tracer, func: Any, args: Any, kwargs: Any, out: Any) -> Any:
    x = args[0]
    d = argument(args, kwargs, 2, "dim", 0) % x.dim()
    results, start = [], 0
    for o in outputs_of(out):
        stop = start + o.shape[d]
        results.append(Label(cut(t, t.dims(x), d, start, stop), True, t.label(x).domain))
        start = stop
    return results


@rule("cat", "concat")
def _cat(t: Tracer, func: Any, args: Any, kwargs: Any, out: Any) -> Any:
    tensors = [x for x in args[0] if not (x.dim() == 1 and x.numel() == 0 and out.dim() != 1)]
    d = argument(args, kwargs, 1, "dim", 0) % out.dim()
    dims = [t.dims(x) for x in tensors]
    result = []
    for k in range(out.dim()):
        if k == d:
            # An empty part (an expert that no token was sent to) is tied in its other dims all the same.
            parts = [x[k] for x, tensor in zip(dims, tensors, strict=True) if tensor.shape[d] > 0]
            parts = parts or [t.ledger.dim(0, pinned=True, reason="empty")]
            result.append(parts[0] if len(parts) == 1 else t.ledger.sum_of(parts))
        else:
            for other in dims[1:]:
                t.unify(dims[0][k], other[k])
            result.append(dims[0][k])
    # Along a pinned dim the structure is of no use, and sequences grow long.
    if len(tensors) > 1 and t.ledger.is_pinned(result[d]):
        result[d] = t.ledger.dim(out.shape[d], pinned=True, reason="pinned")
    return result


@rule("stack")
def _stack(t: Tracer, func: Any, args: Any, kwargs: Any, out: Any) -> Any:
    tensors = args[0]
    d = argument(args, kwargs, 1, "dim", 0) % out.dim()
    dims = [t.dims(x) for x in tensors]
    same = all(all(t.ledger.normal(a) == t.ledger.normal(b) for a, b in zip(dims[0], x, strict=True)) for x in dims[1:])
    if same:
        new = t.ledger.dim(len(tensors), pinned=True, reason="stacked positions")
        result = dims[0]
    else:
        try:
            new, result = t.ledger.stack_of(dims)
        except Irreconcilable:
            for x in dims:
                t.pin(x, f"stacked tensors of different structure ({t.op})")
            return t.fresh(out.shape, "stacked", pinned=True)
    return [*result[:d], new, *result[d:]]


@rule("constant_pad_nd")
def _pad(t: Tracer, func: Any, args: Any, kwargs: Any, out: Any) -> Any:
    x, pads = args[0], list(args[1])
    dims = t.dims(x)
    for k in range(len(pads) // 2):
        d = x.dim() - 1 - k
        left, right = pads[2 * k], pads[2 * k + 1]
        if left < 0 or right < 0:
            start, stop = max(0, -left), x.shape[d] - max(0, -right)
            dims = cut(t, dims, d, start, stop)
        parts = [t.ledger.dim(left)] if left > 0 else []
        parts.append(dims[d])
        parts += [t.ledger.dim(right)] if right > 0 else []
        if len(parts) > 1:
            if t.ledger.is_pinned(dims[d]):
                dims[d] = t.ledger.dim(out.shape[d], pinned=True, reason="padded positions")
            elif dims[d]:
                dims[d] = t.ledger.sum_of([p if p else [] for p in parts])
            else:
                dims[d] = t.ledger.sum_of(parts)
    return dims


@rule("pixel_shuffle")
def _pixel_shuffle(t: Tracer, func: Any, args: Any, kwargs: Any, out: Any) -> Any:
    r = args[1]
    *lead, c, h, w = t.dims(args[0])
    channel, offsets = t.ledger.factor_dim(c, args[0].shape[-3] // (r * r))
    t.pin([offsets, h, w], "spatial positions")
    return [*lead, channel, *t.fresh(out.shape[-2:], "spatial positions", pinned=True)]


@rule("pixel_unshuffle")
def _pixel_unshuffle(t: Tracer, func: Any, args: Any, kwargs: Any, out: Any) -> Any:
    r = args[1]
    *lead, c, h, w = t.dims(args[0])
    t.pin([h, w], "spatial positions")
    offsets = t.ledger.dim(r * r, pinned=True, reason="spatial positions")
    return [*lead, c + offsets, *t.fresh(out.shape[-2:], "spatial positions", pinned=True)]


@rule("channel_shuffle", "native_channel_shuffle")
def _channel_shuffle(t: Tracer, func: Any, args: Any, kwargs: Any, out: Any) -> Any:
    dims = t.dims(args[0])
    group, inside = t.ledger.factor_dim(dims[1], args[1])
    dims[1] = inside + group
    return dims


@rule("unfold")
def _unfold(t: Tracer, func: Any, args: Any, kwargs: Any, out: Any) -> Any:
    x, d = args[0], args[1] % max(args[0].dim(), 1)
    dims = t.dims(x)
    t.pin(dims[d], "window positions")
    dims[d] = t.ledger.dim(out.shape[d], pinned=True, reason="window positions")
    return [*dims, t.ledger.dim(out.shape[-1], pinned=True, reason="window positions")]


@rule("as_strided")
def _as_strided(t: Tracer, func: Any, args: Any, kwargs: Any, out: Any) -> Any:
    if args[0].shape == out.shape and args[0].stride() == out.stride():
        return t.dims(args[0])
    return unknown(t, func, args, kwargs, out)


@rule("diagonal", "diag_embed", "trace")
def _diagonal(t: Tracer, func: Any, args: Any, kwargs: Any, out: Any) -> Any:
    x = args[0]
    offset, d1, d2 = (argument(args, kwargs, i, n, v) for i, n, v in ((1, "offset", 0), (2, "dim1", 0), (3, "dim2", 1)))
    if t.op != "aten.diagonal" or offset != 0 or x.shape[d1] != x.shape[d2]:
        return unknown(t, func, args, kwargs, out)
    dims = t.dims(x)
    d1, d2 = d1 % x.dim(), d2 % x.dim()
    t.unify(dims[d1], dims[d2])
    return [*(dim for k, dim in enumerate(dims) if k not in (d1, d2)), dims[d1]]


@rule("tril", "triu")
def _triangle(t: Tracer, func: Any, args: Any, kwargs: Any, out: Any) -> Any:
    dims = t.dims(args[0])
    t.pin(dims[-2:], "triangular mask")
    return dims
