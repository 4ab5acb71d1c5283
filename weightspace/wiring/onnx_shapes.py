"""ONNX operations on shapes, indices, reductions and sequences of tensors, in torch."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from weightspace.errors import WiringError
from weightspace.wiring.onnx_ops import Args, Node, State, bounded, floating, numbers, op, optional, setting

# ---- shapes ------------------------------------------------------------------------------------------


@op("Shape")
def _shape(node: Node, args: Args, state: State) -> Tensor:
    return torch.tensor(list(args[0].shape)[node.attrs.get("start", 0) : node.attrs.get("end")], dtype=torch.int64)


@op("Size")
def _size(node: Node, args: Args, state: State) -> Tensor:
    return torch.tensor(args[0].numel(), dtype=torch.int64)


@op("ConstantOfShape")
def _constant_of_shape(node: Node, args: Args, state: State) -> Tensor:
    value = node.attrs.get("value", torch.zeros(1))
    dtype = torch.float64 if state.wide and value.dtype in floating else value.dtype
    return torch.full(bounded(numbers(args[0]), node), numbers(value)[0], dtype=dtype)


@op("Range")
def _range(node: Node, args: Args, state: State) -> Tensor:
    start, limit, step = (numbers(a)[0] for a in args)
    bounded([max(0, math.ceil((limit - start) / step))], node)
    return torch.arange(start, limit, step, dtype=args[0].dtype)


@op("EyeLike")
def _eye_like(node: Node, args: Args, state: State) -> Tensor:
    dtype = state.dtype(node.attrs["dtype"], node) if "dtype" in node.attrs else args[0].dtype
    return torch.diag_embed(torch.ones(max(args[0].shape), dtype=dtype), node.attrs.get("k", 0))[
        : args[0].shape[0], : args[0].shape[1]
    ]


@op("Reshape")
def _reshape(node: Node, args: Args, state: State) -> Tensor:
    shape = setting(node, args, "shape", 1) or []
    if not node.attrs.get("allowzero"):
        shape = [args[0].shape[i] if s == 0 else s for i, s in enumerate(shape)]
    return args[0].reshape([int(s) for s in shape])


@op("Flatten")
def _flatten(node: Node, args: Args, state: State) -> Tensor:
    x, axis = args[0], node.attrs.get("axis", 1)
    axis = axis + x.ndim if axis < 0 else axis
    if axis == 1 and x.ndim >= 2:
        return x.flatten(1)
    return x.reshape(math.prod(x.shape[:axis]), math.prod(x.shape[axis:]))


@op("Transpose")
def _transpose(node: Node, args: Args, state: State) -> Tensor:
    return args[0].permute(node.attrs.get("perm") or list(reversed(range(args[0].ndim))))


@op("Squeeze")
def _squeeze(node: Node, args: Args, state: State) -> Tensor:
    axes = setting(node, args, "axes", 1)
    return args[0].squeeze() if axes is None else args[0].squeeze(tuple(int(a) for a in axes))


@op("Unsqueeze")
def _unsqueeze(node: Node, args: Args, state: State) -> Tensor:
    axes = setting(node, args, "axes", 1) or []
    x, rank = args[0], args[0].ndim + len(axes)
    for axis in sorted(int(a) % rank for a in axes):
        x = x.unsqueeze(axis)
    return x


@op("Expand")
def _expand(node: Node, args: Args, state: State) -> Tensor:
    shape = torch.broadcast_shapes(args[0].shape, [int(n) for n in numbers(args[1])])
    return args[0].expand(bounded(shape, node))


@op("Tile")
def _tile(node: Node, args: Args, state: State) -> Tensor:
    counts = [int(n) for n in numbers(args[1])]
    bounded([s * n for s, n in zip(args[0].shape, counts, strict=True)], node)
    return args[0].repeat(counts)


@op("Concat")
def _concat(node: Node, args: Args, state: State) -> Tensor:
    return torch.cat(list(args), node.attrs.get("axis", 1))


@op("Split")
def _split(node: Node, args: Args, state: State) -> tuple[Any, ...]:
    x, axis = args[0], node.attrs.get("axis", 0)
    sizes = setting(node, args, "split", 1)
    if sizes is None:
        sizes = [math.ceil(x.shape[axis] / node.attrs.get("num_outputs", len(node.outputs)))]
        return x.split(sizes[0], axis)
    return x.split([int(s) for s in sizes], axis)


@op("Slice")
def _slice(node: Node, args: Args, state: State) -> Tensor:
    x = args[0]
    starts, ends = setting(node, args, "starts", 1) or [], setting(node, args, "ends", 2) or []
    axes = setting(node, args, "axes", 3) or list(range(len(starts)))
    steps = setting(node, args, "steps", 4) or [1] * len(starts)
    for start, end, axis, step in zip(starts, ends, axes, steps, strict=True):
        first, last, stride = slice(int(start), int(end), int(step)).indices(x.shape[int(axis)])
        if stride < 0:
            x = x.index_select(int(axis), torch.arange(first, last, stride))
        elif stride != 1:
            x = x[tuple([slice(None)] * (int(axis) % x.ndim) + [slice(first, max(first, last), stride)])]
        else:
            x = x.narrow(int(axis), min(first, x.shape[int(axis)]), max(0, last - first))
    return x


@op("Pad")
def _pad(node: Node, args: Args, state: State) -> Tensor:
    x, mode = args[0], node.attrs.get("mode", "constant")
    pads = [int(p) for p in (setting(node, args, "pads", 1) or node.attrs.get("paddings") or [])]
    axes = setting(node, args, "axes", 3) or list(range(len(pads) // 2))
    value = numbers(args[2])[0] if optional(args, 2) is not None else node.attrs.get("value", 0.0)
    half = len(pads) // 2
    before, after = [0] * x.ndim, [0] * x.ndim
    for axis, low, high in zip(axes, pads[:half], pads[half:], strict=True):
        before[int(axis)], after[int(axis)] = low, high
    bounded([s + b + a for s, b, a in zip(x.shape, before, after, strict=True)], node)
    if mode == "constant":
        flat = [n for axis in reversed(range(x.ndim)) for n in (before[axis], after[axis])]
        while len(flat) > 2 and flat[-2:] == [0, 0]:
            flat = flat[:-2]
        return F.pad(x, flat, value=value)
    for axis, (low, high) in enumerate(zip(before, after, strict=True)):
        if low or high:
            n = x.shape[axis]
            where = torch.arange(-low, n + high)
            if mode == "reflect":
                where = (where + (n - 1)) % max(1, 2 * (n - 1)) - (n - 1)
                where = where.abs()
            else:
                where = where % n if mode == "wrap" else where.clamp(0, n - 1)
            x = x.index_select(axis, where)
    return x


@op("DepthToSpace")
def _depth_to_space(node: Node, args: Args, state: State) -> Tensor:
    (n, c, h, w), b = args[0].shape, node.attrs["blocksize"]
    if node.attrs.get("mode", "DCR") == "DCR":
        return args[0].reshape(n, b, b, c // b**2, h, w).permute(0, 3, 4, 1, 5, 2).reshape(n, -1, h * b, w * b)
    return args[0].reshape(n, c // b**2, b, b, h, w).permute(0, 1, 4, 2, 5, 3).reshape(n, -1, h * b, w * b)


@op("SpaceToDepth")
def _space_to_depth(node: Node, args: Args, state: State) -> Tensor:
    (n, c, h, w), b = args[0].shape, node.attrs["blocksize"]
    return args[0].reshape(n, c, h // b, b, w // b, b).permute(0, 3, 5, 1, 2, 4).reshape(n, -1, h // b, w // b)


# ---- indexing ----------------------------------------------------------------------------------------


def _wrapped(index: Tensor, size: int) -> Tensor:
    """Indices counted from the end made positive."""
    index = index.long()
    return torch.where(index < 0, index + size, index)


@op("Gather")
def _gather(node: Node, args: Args, state: State) -> Tensor:
    x, index, axis = args[0], args[1], node.attrs.get("axis", 0) % args[0].ndim
    with _disable_current_modes():
        index = _wrapped(index, x.shape[axis])
        if index.numel() and int(index.max()) >= x.shape[axis]:
            raise WiringError(f"ONNX node {node.name!r} (Gather) reads entry {int(index.max())} of {x.shape[axis]}")
    if index.ndim == 0:
        return x.select(axis, int(numbers(index)[0]))
    if axis == 0 and x.ndim == 2 and x.dtype in floating:
        return F.embedding(index, x)
    taken = x.index_select(axis, index.reshape(-1))
    return taken if index.ndim == 1 else taken.reshape(*x.shape[:axis], *index.shape, *x.shape[axis + 1 :])


@op("GatherElements")
def _gather_elements(node: Node, args: Args, state: State) -> Tensor:
    axis = node.attrs.get("axis", 0)
    return torch.gather(args[0], axis, _wrapped(args[1], args[0].shape[axis]))


def _coordinates(x: Tensor, index: Tensor, skip: int = 0) -> tuple[Tensor, ...]:
    return tuple(_wrapped(part, x.shape[skip + i]) for i, part in enumerate(index.unbind(-1)))


@op("GatherND")
def _gather_nd(node: Node, args: Args, state: State) -> Tensor:
    x, index = args
    skip = node.attrs.get("batch_dims", 0)
    if not skip:
        return x[_coordinates(x, index)]
    lead = x.shape[:skip]
    flat, where = x.reshape(-1, *x.shape[skip:]), index.reshape(-1, *index.shape[skip:])
    rows = [a[_coordinates(a, i)] for a, i in zip(flat, where, strict=True)]
    return torch.stack(rows).reshape(*lead, *rows[0].shape)


@op("ScatterND")
def _scatter_nd(node: Node, args: Args, state: State) -> Tensor:
    reduction = node.attrs.get("reduction", "none")
    if reduction not in ("none", "add"):
        raise WiringError(
            f"ONNX node {node.name!r} (ScatterND) reduces with {reduction!r}: only none and add are supported"
        )
    return torch.index_put(args[0], _coordinates(args[0], args[1]), args[2], accumulate=reduction == "add")


@op("ScatterElements", "Scatter")
def _scatter_elements(node: Node, args: Args, state: State) -> Tensor:
    axis, reduction = node.attrs.get("axis", 0), node.attrs.get("reduction", "none")
    index = _wrapped(args[1], args[0].shape[axis])
    if reduction == "none":
        return torch.scatter(args[0], axis, index, args[2])
    name = {"add": "sum", "mul": "prod", "max": "amax", "min": "amin"}[reduction]
    return torch.scatter_reduce(args[0], axis, index, args[2], name)


@op("OneHot")
def _one_hot(node: Node, args: Args, state: State) -> Tensor:
    index, depth, (off, on) = args[0], int(numbers(args[1])[0]), args[2].unbind(0)
    bounded([index.numel(), depth], node)
    hot = _wrapped(index, depth).unsqueeze(-1) == torch.arange(depth)
    axis = node.attrs.get("axis", -1)
    return torch.where(hot, on, off).movedim(-1, axis)


@op("NonZero")
def _non_zero(node: Node, args: Args, state: State) -> Tensor:
    return torch.nonzero(args[0]).t()


@op("Compress")
def _compress(node: Node, args: Args, state: State) -> Tensor:
    x = args[0] if "axis" in node.attrs else args[0].reshape(-1)
    return x.index_select(node.attrs.get("axis", 0), torch.nonzero(args[1]).reshape(-1))


@op("Trilu")
def _trilu(node: Node, args: Args, state: State) -> Tensor:
    offset = 0 if optional(args, 1) is None else int(numbers(args[1])[0])
    return torch.triu(args[0], offset) if node.attrs.get("upper", 1) else torch.tril(args[0], offset)


# ---- reductions --------------------------------------------------------------------------------------

_REDUCTIONS: dict[str, Callable[[Tensor, list[int]], Tensor]] = {
    "ReduceSum": lambda x, d: x.sum(d, keepdim=True),
    "ReduceMean": lambda x, d: x.mean(d, keepdim=True),
    "ReduceMax": lambda x, d: x.amax(d, keepdim=True),
    "ReduceMin": lambda x, d: x.amin(d, keepdim=True),
    "ReduceL1": lambda x, d: x.abs().sum(d, keepdim=True),
    "ReduceL2": lambda x, d: (x * x).sum(d, keepdim=True).sqrt(),
    "ReduceSumSquare": lambda x, d: (x * x).sum(d, keepdim=True),
    "ReduceLogSum": lambda x, d: x.sum(d, keepdim=True).log(),
    "ReduceLogSumExp": lambda x, d: torch.logsumexp(x, d, keepdim=True),
}


@op(*_REDUCTIONS, "ReduceProd")
def _reduce(node: Node, args: Args, state: State) -> Tensor:
    x, axes = args[0], setting(node, args, "axes", 1)
    if not axes and node.attrs.get("noop_with_empty_axes"):
        return args[0]
    dims = sorted(int(a) % x.ndim for a in axes) if axes else list(range(x.ndim))
    if node.op == "ReduceProd":
        for dim in dims:
            x = x.prod(dim, keepdim=True)
    elif dims:
        x = _REDUCTIONS[node.op](x, dims)
    return x if node.attrs.get("keepdims", 1) or not dims else x.squeeze(tuple(dims))


@op("ArgMax", "ArgMin")
def _arg(node: Node, args: Args, state: State) -> Tensor:
    axis, keep = node.attrs.get("axis", 0), bool(node.attrs.get("keepdims", 1))
    choose = torch.argmax if node.op == "ArgMax" else torch.argmin
    if node.attrs.get("select_last_index"):
        return args[0].shape[axis] - 1 - choose(args[0].flip(axis), axis, keepdim=keep)
    return choose(args[0], axis, keepdim=keep)


@op("TopK")
def _top_k(node: Node, args: Args, state: State) -> tuple[Any, ...]:
    k = int(node.attrs["k"] if optional(args, 1) is None else numbers(args[1])[0])
    largest = bool(node.attrs.get("largest", 1))
    return tuple(torch.topk(args[0], k, node.attrs.get("axis", -1), largest, bool(node.attrs.get("sorted", 1))))


@op("CumSum")
def _cum_sum(node: Node, args: Args, state: State) -> Tensor:
    x, axis = args[0], int(numbers(args[1])[0])
    x = x.flip(axis) if node.attrs.get("reverse") else x
    total = x.cumsum(axis).to(x.dtype)
    total = total - x if node.attrs.get("exclusive") else total
    return total.flip(axis) if node.attrs.get("reverse") else total


@op("Softmax", "LogSoftmax", "Hardmax")
def _softmax(node: Node, args: Args, state: State) -> Tensor:
    x, axis = args[0], node.attrs.get("axis", -1 if node.version >= 13 else 1)
    function: Callable[..., Tensor] = {"Softmax": torch.softmax, "LogSoftmax": torch.log_softmax}.get(node.op, _hardmax)
    if node.version >= 13 or axis in (-1, x.ndim - 1):
        return function(x, axis)
    axis %= x.ndim  # before opset 13 all axes from `axis` on are one
    return function(x.reshape(*x.shape[:axis], -1), -1).reshape(x.shape)


def _hardmax(x: Tensor, axis: int) -> Tensor:
    return torch.zeros_like(x).scatter(axis, x.argmax(axis, keepdim=True), torch.ones_like(x))


# ---- sequences of tensors ----------------------------------------------------------------------------


@op("SequenceConstruct")
def _sequence_construct(node: Node, args: Args, state: State) -> list[Any]:
    return list(args)


@op("SequenceAt")
def _sequence_at(node: Node, args: Args, state: State) -> Any:
    return args[0][int(numbers(args[1])[0])]


@op("SplitToSequence")
def _split_to_sequence(node: Node, args: Args, state: State) -> list[Any]:
    axis, keep = node.attrs.get("axis", 0), node.attrs.get("keepdims", 1)
    if (sizes := optional(args, 1)) is None:
        parts = args[0].split(1, axis)
        return list(parts) if keep else [p.squeeze(axis) for p in parts]
    lengths = [int(n) for n in numbers(sizes)]
    return list(args[0].split(lengths[0] if sizes.ndim == 0 else lengths, axis))


@op("ConcatFromSequence")
def _concat_from_sequence(node: Node, args: Args, state: State) -> Tensor:
    join = torch.stack if node.attrs.get("new_axis") else torch.cat
    return join(list(args[0]), node.attrs["axis"])
