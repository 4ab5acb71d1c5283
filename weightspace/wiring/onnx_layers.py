"""ONNX layers in torch: convolution, pooling, resizing, normalisation, attention and recurrent cells."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from weightspace.errors import WiringError
from weightspace.wiring.onnx_ops import Args, Node, State, bounded, numbers, op, optional, setting

_CONV: tuple[Callable[..., Tensor], ...] = (F.conv1d, F.conv2d, F.conv3d)
_CONV_TRANSPOSE: tuple[Callable[..., Tensor], ...] = (
    F.conv_transpose1d,
    F.conv_transpose2d,
    F.conv_transpose3d,
)
_MAX_POOL: tuple[Callable[..., Any], ...] = (F.max_pool1d, F.max_pool2d, F.max_pool3d)
_AVERAGE_POOL: tuple[Callable[..., Tensor], ...] = (F.avg_pool1d, F.avg_pool2d, F.avg_pool3d)


def _spatial(node: Node, x: Tensor, kernel: Sequence[int]) -> tuple[list[int], list[int], list[int], list[int]]:
    """Strides, dilations, padding before and padding after, per spatial axis."""
    rank = len(kernel)
    if not 1 <= rank <= 3:
        raise WiringError(f"ONNX node {node.name!r} ({node.op}) has {rank} spatial axes: 1 to 3 are supported")
    strides = list(node.attrs.get("strides") or [1] * rank)
    dilations = list(node.attrs.get("dilations") or [1] * rank)
    pads = list(node.attrs.get("pads") or [0] * (2 * rank))
    before, after = pads[:rank], (pads[rank:] or pads[:rank])  # the first exporters gave one side only
    auto = node.attrs.get("auto_pad", "NOTSET")
    if auto == "VALID":
        before, after = [0] * rank, [0] * rank
    elif auto in ("SAME_UPPER", "SAME_LOWER") and node.op != "ConvTranspose":
        for i in range(rank):
            size = x.shape[2 + i]
            span = (kernel[i] - 1) * dilations[i] + 1
            total = max(0, (math.ceil(size / strides[i]) - 1) * strides[i] + span - size)
            small, large = total // 2, total - total // 2
            before[i], after[i] = (small, large) if auto == "SAME_UPPER" else (large, small)
    bounded([s + b + a for s, b, a in zip(x.shape[2:], before, after, strict=True)], node)
    return strides, dilations, before, after


def _padded(x: Tensor, before: Sequence[int], after: Sequence[int], value: float = 0.0) -> Tensor:
    flat = [n for b, a in zip(reversed(before), reversed(after), strict=True) for n in (b, a)]
    return F.pad(x, flat, value=value) if any(flat) else x


@op("Conv")
def _conv(node: Node, args: Args, state: State) -> Tensor:
    x, weight, bias = args[0], args[1], optional(args, 2)
    strides, dilations, before, after = _spatial(node, x, weight.shape[2:])
    padding = before
    if before != after:
        x, padding = _padded(x, before, after), [0] * len(before)
    convolve = _CONV[len(before) - 1]
    return convolve(x, weight, bias, strides, padding, dilations, node.attrs.get("group", 1))


@op("ConvTranspose")
def _conv_transpose(node: Node, args: Args, state: State) -> Tensor:
    x, weight, bias = args[0], args[1], optional(args, 2)
    rank = weight.ndim - 2
    strides, dilations, before, after = _spatial(node, x, weight.shape[2:])
    extra = list(node.attrs.get("output_padding") or [0] * rank)
    wanted, auto = node.attrs.get("output_shape"), node.attrs.get("auto_pad", "NOTSET")
    full = [(x.shape[2 + i] - 1) * strides[i] + (weight.shape[2 + i] - 1) * dilations[i] + 1 for i in range(rank)]
    if wanted or auto.startswith("SAME"):
        target = list(wanted)[-rank:] if wanted else [x.shape[2 + i] * strides[i] for i in range(rank)]
        for i in range(rank):
            total = max(0, full[i] + extra[i] - target[i])
            extra[i] += max(0, target[i] - full[i] - extra[i])
            before[i], after[i] = (
                (total // 2, total - total // 2) if auto == "SAME_UPPER" else (total - total // 2, total // 2)
            )
    convolve, group = _CONV_TRANSPOSE[rank - 1], node.attrs.get("group", 1)
    if before == after and all(e < max(s, d) for e, s, d in zip(extra, strides, dilations, strict=True)):
        return convolve(x, weight, bias, strides, before, extra, group, dilations)
    y = convolve(x, weight, None, strides, 0, 0, group, dilations)
    y = _padded(y, [-b for b in before], [e - a for e, a in zip(extra, after, strict=True)])
    return y if bias is None else y + bias.reshape(-1, *[1] * rank)


@op("MaxPool")
def _max_pool(node: Node, args: Args, state: State) -> Tensor:
    if len(node.outputs) > 1 and node.outputs[1]:
        raise WiringError(f"ONNX node {node.name!r} (MaxPool) returns indices: not supported")
    x, kernel = args[0], list(node.attrs["kernel_shape"])
    strides, dilations, before, after = _spatial(node, x, kernel)
    padding, ceil = before, bool(node.attrs.get("ceil_mode"))
    if before != after or any(2 * b > k for b, k in zip(before, kernel, strict=True)):
        x, padding = _padded(x, before, after, -math.inf), [0] * len(before)
    pool = _MAX_POOL[len(kernel) - 1]
    return pool(x, kernel, strides, padding, dilations, ceil)


@op("AveragePool", "LpPool")
def _average_pool(node: Node, args: Args, state: State) -> Tensor:
    x, kernel = args[0], list(node.attrs["kernel_shape"])
    strides, dilations, before, after = _spatial(node, x, kernel)
    if any(d != 1 for d in dilations) or node.op == "LpPool":
        raise WiringError(f"ONNX node {node.name!r}: {node.op} with dilations {dilations} is not supported")
    pool, ceil = _AVERAGE_POOL[len(kernel) - 1], bool(node.attrs.get("ceil_mode"))
    count_pads = bool(node.attrs.get("count_include_pad"))
    if before == after and all(2 * b <= k for b, k in zip(before, kernel, strict=True)):
        return pool(x, kernel, strides, before, ceil, count_pads)
    mean = pool(_padded(x, before, after), kernel, strides, 0, ceil)
    if count_pads:
        return mean
    there = _padded(torch.ones((1, 1, *x.shape[2:]), dtype=x.dtype), before, after)
    return mean / pool(there, kernel, strides, 0, ceil)


@op("GlobalAveragePool")
def _global_average_pool(node: Node, args: Args, state: State) -> Tensor:
    return args[0].mean(tuple(range(2, args[0].ndim)), keepdim=True)


@op("GlobalMaxPool")
def _global_max_pool(node: Node, args: Args, state: State) -> Tensor:
    return args[0].amax(tuple(range(2, args[0].ndim)), keepdim=True)


# ---- resizing ----------------------------------------------------------------------------------------


@op("Resize", "Upsample")
def _resize(node: Node, args: Args, state: State) -> Tensor:
    x, attrs = args[0], node.attrs
    mode, rank = attrs.get("mode", "nearest"), args[0].ndim
    if node.op == "Upsample" or node.version < 11:
        scales, sizes, where = setting(node, args, "scales", 1), None, "asymmetric"
    else:
        scales = numbers(args[2]) if optional(args, 2) is not None and args[2].numel() else None
        sizes = numbers(args[3]) if optional(args, 3) is not None else None
        where = attrs.get("coordinate_transformation_mode", "half_pixel")
    if (
        attrs.get("antialias")
        or where == "tf_crop_and_resize"
        or attrs.get("keep_aspect_ratio_policy", "stretch") != "stretch"
    ):
        raise WiringError(f"ONNX node {node.name!r} (Resize): antialias, crops and aspect policies are not supported")
    axes = [int(a) % rank for a in attrs.get("axes") or range(rank)]
    rounding = attrs.get("nearest_mode", "floor" if node.version < 11 else "round_prefer_floor")
    for i, axis in enumerate(axes):
        old = x.shape[axis]
        new = int(sizes[i]) if sizes else math.floor(old * (scales or [1.0] * rank)[i])
        scale = float(scales[i]) if scales else new / old
        if new == old and scale == 1:
            continue
        bounded([*x.shape[:axis], new, *x.shape[axis + 1 :]], node)
        at = _sources(scale, old, new, where)
        if mode == "nearest":
            x = x.index_select(axis, torch.tensor([_nearest(a, old, rounding) for a in at]))
        else:
            rows = _interpolation(at, old, mode, attrs).to(x.dtype)
            x = (x.movedim(axis, -1) @ rows.t()).movedim(-1, axis)
    return x


def _sources(scale: float, old: int, new: int, where: str) -> list[float]:
    """The position in the input that each output position reads, in float32 as runtimes compute it."""
    with _disable_current_modes():
        target = torch.arange(new, dtype=torch.float32)
        if where == "align_corners":
            at = target * (old - 1) / max(1, new - 1)
        elif where == "asymmetric":
            at = target / scale
        elif where == "pytorch_half_pixel" and new == 1:
            at = torch.zeros_like(target)
        else:
            at = (target + 0.5) / scale - 0.5
            if where == "half_pixel_symmetric":
                at = at + (old / 2) * (1 - new / (scale * old))
        return [float(a) for a in at.tolist()]


def _nearest(at: float, size: int, rounding: str) -> int:
    if rounding == "floor":
        index = math.floor(at)
    elif rounding == "ceil":
        index = math.ceil(at)
    else:
        index = math.ceil(at - 0.5) if rounding == "round_prefer_floor" else math.floor(at + 0.5)
    return min(max(index, 0), size - 1)


def _interpolation(at: Sequence[float], size: int, mode: str, attrs: Any) -> Tensor:
    """A matrix of shape (new, old) whose rows weigh the input positions of an output position."""
    rows = torch.zeros(len(at), size, dtype=torch.float64)
    a = attrs.get("cubic_coeff_a", -0.75)
    for i, position in enumerate(at):
        base = math.floor(position)
        t = position - base
        if mode == "linear":
            taps = {base: 1 - t, base + 1: t}
        else:
            taps = {base + k: _cubic(abs(t - k), a) for k in (-1, 0, 1, 2)}
        inside = {k: w for k, w in taps.items() if 0 <= k < size} if attrs.get("exclude_outside") else taps
        total = sum(inside.values()) if attrs.get("exclude_outside") else 1.0
        for k, weight in inside.items():
            rows[i, min(max(k, 0), size - 1)] += weight / total
    return rows


def _cubic(distance: float, a: float) -> float:
    if distance <= 1:
        return ((a + 2) * distance - (a + 3)) * distance**2 + 1
    return a * distance**3 - 5 * a * distance**2 + 8 * a * distance - 4 * a if distance < 2 else 0.0


# ---- normalisation -----------------------------------------------------------------------------------


@op("BatchNormalization")
def _batch_norm(node: Node, args: Args, state: State) -> Tensor:
    if node.attrs.get("training_mode"):
        raise WiringError(f"ONNX node {node.name!r} normalises by its batch (training_mode): export in eval mode")
    if not node.attrs.get("spatial", 1):
        raise WiringError(f"ONNX node {node.name!r} (BatchNormalization) has spatial=0: not supported")
    x, scale, bias, mean, variance = args[:5]
    return F.batch_norm(x, mean, variance, scale, bias, False, 0.0, node.attrs.get("epsilon", 1e-5))


@op("InstanceNormalization")
def _instance_norm(node: Node, args: Args, state: State) -> Tensor:
    return F.instance_norm(args[0], None, None, args[1], args[2], True, 0.0, node.attrs.get("epsilon", 1e-5))


@op("LayerNormalization")
def _layer_norm(node: Node, args: Args, state: State) -> Tensor:
    x, scale, bias = args[0], args[1], optional(args, 2)
    shape = x.shape[node.attrs.get("axis", -1) :]
    return F.layer_norm(
        x,
        shape,
        scale.expand(shape),
        None if bias is None else bias.expand(shape),
        node.attrs.get("epsilon", 1e-5),
    )


@op("GroupNormalization")
def _group_norm(node: Node, args: Args, state: State) -> Tensor:
    x, scale, bias = args[:3]
    groups, epsilon = node.attrs["num_groups"], node.attrs.get("epsilon", 1e-5)
    if scale.numel() == x.shape[1]:
        return F.group_norm(x, groups, scale, bias, epsilon)
    y = F.group_norm(x, groups, None, None, epsilon).reshape(x.shape[0], groups, -1)
    return (y * scale.reshape(-1, 1) + bias.reshape(-1, 1)).reshape(x.shape)


@op("RMSNormalization")
def _rms_norm(node: Node, args: Args, state: State) -> Tensor:
    x, axis = args[0], node.attrs.get("axis", -1) % args[0].ndim
    mean = (x * x).mean(tuple(range(axis, x.ndim)), keepdim=True)
    return x * torch.rsqrt(mean + node.attrs.get("epsilon", 1e-5)) * args[1]


@op("MeanVarianceNormalization")
def _mean_variance(node: Node, args: Args, state: State) -> Tensor:
    x, axes = args[0], tuple(node.attrs.get("axes") or (0, 2, 3))
    centred = x - x.mean(axes, keepdim=True)
    return centred / ((centred * centred).mean(axes, keepdim=True).sqrt() + 1e-9)


@op("LpNormalization")
def _lp_norm(node: Node, args: Args, state: State) -> Tensor:
    norm = torch.linalg.vector_norm(args[0], node.attrs.get("p", 2), node.attrs.get("axis", -1), keepdim=True)
    return args[0] / norm


@op("LRN")
def _lrn(node: Node, args: Args, state: State) -> Tensor:
    x, size = args[0], node.attrs["size"]
    if not 0 < size <= x.shape[1] * 2:
        raise WiringError(f"ONNX node {node.name!r} (LRN) sums over {size} channels of {x.shape[1]}")
    low = (size - 1) // 2
    squares = F.pad((x * x).movedim(1, -1), (low, size - 1 - low)).movedim(-1, 1)
    total = sum((squares.narrow(1, k, x.shape[1]) for k in range(1, size)), squares.narrow(1, 0, x.shape[1]))
    scale = node.attrs.get("bias", 1.0) + node.attrs.get("alpha", 1e-4) / size * total
    return x / scale ** node.attrs.get("beta", 0.75)


# ---- attention ---------------------------------------------------------------------------------------


@op("Attention")
def _attention(node: Node, args: Args, state: State) -> Tensor:
    attrs = node.attrs
    if any(optional(args, i) is not None for i in (4, 5, 6)) or any(node.outputs[1:]):
        raise WiringError(f"ONNX node {node.name!r} (Attention) keeps a cache or returns scores: not supported")
    if attrs.get("softcap") or attrs.get("qk_matmul_output_mode"):
        raise WiringError(f"ONNX node {node.name!r} (Attention) caps or returns its scores: not supported")
    q, k, v = args[:3]
    flat = q.ndim == 3
    if flat:
        heads, shared = attrs["q_num_heads"], attrs["kv_num_heads"]
        q = q.reshape(q.shape[0], q.shape[1], heads, -1).transpose(1, 2)
        k, v = (t.reshape(t.shape[0], t.shape[1], shared, -1).transpose(1, 2) for t in (k, v))
    y = F.scaled_dot_product_attention(
        q, k, v, optional(args, 3), 0.0, bool(attrs.get("is_causal")), scale=attrs.get("scale"),
        enable_gqa=q.shape[1] != k.shape[1],
    )  # fmt: skip
    return y.transpose(1, 2).flatten(2) if flat else y


# ---- recurrent ---------------------------------------------------------------------------------------

_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "sigmoid": torch.sigmoid, "tanh": torch.tanh, "relu": torch.relu, "softsign": F.softsign, "elu": F.elu,
}  # fmt: skip
_GATES = {"LSTM": 4, "GRU": 3, "RNN": 1}
_DEFAULT = {"LSTM": ["Sigmoid", "Tanh", "Tanh"], "GRU": ["Sigmoid", "Tanh"], "RNN": ["Tanh"]}


@op("LSTM", "GRU", "RNN")
def _recurrent(node: Node, args: Args, state: State) -> tuple[Any, ...]:
    """Recurrent layers. W: (directions, gates x hidden, in), R: (directions, gates x hidden, hidden),
    B: (directions, 2 x gates x hidden), gates in the order i o f c (LSTM) or z r h (GRU)."""
    attrs, lstm = node.attrs, node.op == "LSTM"
    x, weight, recurrent = args[:3]
    bias, lengths, first, first_cell, peepholes = (optional(args, i) for i in (3, 4, 5, 6, 7))
    if attrs.get("clip") or attrs.get("input_forget") or attrs.get("activation_alpha") or attrs.get("activation_beta"):
        raise WiringError(
            f"ONNX node {node.name!r} ({node.op}) sets clip, input_forget or activation constants: not supported"
        )
    batch_first = bool(attrs.get("layout"))
    if batch_first:
        x = x.transpose(0, 1)
        first, first_cell = (None if t is None else t.transpose(0, 1) for t in (first, first_cell))
    names = [a.lower() for a in attrs.get("activations") or _DEFAULT[node.op] * weight.shape[0]]
    if unknown := set(names) - set(_ACTIVATIONS):
        raise WiringError(f"ONNX node {node.name!r} ({node.op}) uses activations {sorted(unknown)}: not supported")
    per = len(_DEFAULT[node.op])
    sides, hiddens, cells = [], [], []
    for d in range(weight.shape[0]):
        functions = [_ACTIVATIONS[a] for a in names[d * per : (d + 1) * per]]
        backward = d == 1 or attrs.get("direction", "forward") == "reverse"
        w, r = weight.select(0, d), recurrent.select(0, d)
        b = None if bias is None else bias.select(0, d)
        h = x.new_zeros(x.shape[1], r.shape[1]) if first is None else first.select(0, d)
        c = x.new_zeros(x.shape[1], r.shape[1]) if first_cell is None else first_cell.select(0, d)
        p = peepholes.select(0, d) if lstm and peepholes is not None else None
        wb, rb = (None, None) if b is None else b.chunk(2)
        gates = x @ w.t()
        if wb is not None:
            gates = gates + wb
        steps: list[Tensor] = []
        order = range(x.shape[0] - 1, -1, -1) if backward else range(x.shape[0])
        for t in order:
            new_h, new_c = _cell(node, gates.select(0, t), h, c, r, rb, p, functions)
            if lengths is not None:  # past the end of a row its state stays and its output is zero
                alive = (lengths > t).unsqueeze(-1)
                h, c = torch.where(alive, new_h, h), torch.where(alive, new_c, c)
                steps.append(torch.where(alive, new_h, torch.zeros_like(new_h)))
            else:
                h, c = new_h, new_c
                steps.append(h)
        sides.append(torch.stack(steps[::-1] if backward else steps))
        hiddens.append(h)
        cells.append(c)
    y, last, last_cell = torch.stack(sides, 1), torch.stack(hiddens), torch.stack(cells)
    if batch_first:
        y, last, last_cell = y.permute(2, 0, 1, 3), last.transpose(0, 1), last_cell.transpose(0, 1)
    return (y, last, last_cell) if lstm else (y, last)


def _cell(
    node: Node,
    x: Tensor,
    h: Tensor,
    c: Tensor,
    r: Tensor,
    rb: Tensor | None,
    p: Tensor | None,
    f: Sequence[Callable[[Tensor], Tensor]],
) -> tuple[Tensor, Tensor]:
    """One step; ``x`` is already multiplied by W. All of shape (batch, gates x hidden) or (batch, hidden)."""
    back = h @ r.t() if node.op != "GRU" else None
    if back is not None:
        total = x + back if rb is None else x + back + rb
        if node.op == "RNN":
            return f[0](total), c
        i, o, forget, new = total.chunk(4, -1)
        pi, po, pf = (0, 0, 0) if p is None else p.chunk(3)
        keep = f[0](forget if p is None else forget + pf * c)
        c = keep * c + f[0](i if p is None else i + pi * c) * f[1](new)
        return f[0](o if p is None else o + po * c) * f[2](c), c
    xz, xr, xh = x.chunk(3, -1)
    rz, rr, rh = r.chunk(3, 0)
    bz, br, bh = (None, None, None) if rb is None else rb.chunk(3)
    z = f[0](xz + _affine(h, rz, bz))
    reset = f[0](xr + _affine(h, rr, br))
    if node.attrs.get("linear_before_reset"):
        new = f[1](xh + reset * _affine(h, rh, bh))
    else:
        new = f[1](xh + _affine(reset * h, rh, bh))
    return (1 - z) * new + z * h, c


def _affine(h: Tensor, r: Tensor, b: Tensor | None) -> Tensor:
    return h @ r.t() if b is None else h @ r.t() + b
