"""Keras layers that merge several inputs, and the functions of keras.ops that a model calls, in torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from weightspace.wiring.keras_layers import Call, activate, layer

# ---- merging -----------------------------------------------------------------------------------------


def _two(a: Any, b: Any) -> list[Any]:
    return list(a) if b is None else [a, b]


@layer("Add", "Multiply", "Maximum", "Minimum", "Average", "Subtract")
@layer("ops.Add", "ops.Multiply", "ops.Maximum", "ops.Minimum", "ops.Subtract", "ops.TrueDivide")
def _merge(call: Call, a: Any, b: Any = None) -> Any:
    items = _two(a, b)
    total = items[0]
    kind = call.kind.removeprefix("ops.")
    for item in items[1:]:
        if kind in ("Add", "Average"):
            total = total + item
        elif kind == "Multiply":
            total = total * item
        elif kind == "Subtract":
            total = total - item
        elif kind == "TrueDivide":
            total = total / item
        else:
            total, item = torch.as_tensor(total), torch.as_tensor(item)
            total = torch.maximum(total, item) if kind == "Maximum" else torch.minimum(total, item)
    return total / len(items) if kind == "Average" else total


@layer("ops.NotEqual")
def _not_equal(call: Call, a: Any, b: Any) -> Any:
    return a != b


@layer("ops.Any")
def _any(call: Call, x: Tensor, axis: int = -1, keepdims: bool = False) -> Tensor:
    return x.any(axis, keepdim=keepdims)


@layer("Concatenate", "ops.Concatenate")
def _concatenate(call: Call, xs: Sequence[Tensor], **unused: Any) -> Tensor:
    return torch.cat(list(xs), call.get("axis", "concat_axis", default=-1))


@layer("Merge")
def _keras_1_merge(call: Call, xs: Sequence[Tensor]) -> Any:
    mode = call.get("mode", default="sum")
    if mode == "concat":
        return _concatenate(call, xs)
    names = {"sum": "Add", "mul": "Multiply", "ave": "Average", "max": "Maximum"}
    if mode not in names:
        raise call.refuse(f"mode {mode!r}")
    return _merge(Call(call.name, names[mode], {}, call.weight, call.inside, {}, call.major), list(xs))


@layer("Dot")
def _dot(call: Call, xs: Sequence[Tensor]) -> Tensor:
    axes = call.config["axes"]
    i, j = (axes, axes) if isinstance(axes, int) else axes
    a, b = (x.movedim(d, -1) for x, d in zip(xs, (i, j), strict=True))
    if call.config.get("normalize"):
        a, b = (x / torch.linalg.vector_norm(x, dim=-1, keepdim=True) for x in (a, b))
    y = torch.einsum(
        "bik,bjk->bij",
        a.flatten(1, -2) if a.ndim > 2 else a.unsqueeze(1),
        b.reshape(b.shape[0], -1, b.shape[-1]),
    )
    shape = [a.shape[0], *a.shape[1:-1], *b.shape[1:-1]]
    return y.reshape(shape if len(shape) > 1 else [a.shape[0], 1])


# ---- functions of keras.ops that a model calls between its layers -----------------------------------


@layer(*(f"ops.{n}" for n in ("Relu", "Sigmoid", "Tanh", "Gelu", "Silu", "Elu", "Selu", "Softplus", "Exp", "Softmax")))
def _function(call: Call, x: Tensor) -> Tensor:
    name = call.kind.removeprefix("ops.").lower()
    if name == "softmax":
        return torch.softmax(x, call.get("axis", default=-1))
    if name == "gelu":
        return F.gelu(x, approximate="tanh" if call.config.get("approximate", True) else "none")
    return activate(call, x, "exponential" if name == "exp" else name)


@layer("ops.Transpose")
def _transpose(call: Call, x: Tensor) -> Tensor:
    return x.permute(call.config.get("axes") or list(reversed(range(x.ndim))))


@layer("ops.Matmul")
def _matmul(call: Call, a: Tensor, b: Tensor) -> Tensor:
    return a @ b


@layer("ops.Reshape")
def _reshape_all(call: Call, x: Tensor) -> Tensor:
    return x.reshape([x.shape[0] if n is None else int(n) for n in call.config["newshape"]])


@layer("ops.Mean", "ops.Sum", "ops.Max")
def _reduce(call: Call, x: Tensor) -> Tensor:
    axis, keep = call.config.get("axis"), bool(call.config.get("keepdims"))
    dims = tuple(range(x.ndim)) if axis is None else tuple(axis) if isinstance(axis, (list, tuple)) else (int(axis),)
    if call.kind == "ops.Max":
        return x.amax(dims, keepdim=keep)
    return x.mean(dims, keepdim=keep) if call.kind == "ops.Mean" else x.sum(dims, keepdim=keep)


@layer("ops.GetItem")
def _get_item(call: Call, x: Tensor, key: Any) -> Tensor:
    def part(item: Any) -> Any:
        if isinstance(item, Mapping) and item.get("class_name") == "__slice__":
            ends = item["config"]
            return slice(ends["start"], ends["stop"], ends["step"])
        if item is None or isinstance(item, int):
            return item
        raise call.refuse(f"indexing with {item!r}")

    return x[tuple(part(i) for i in key) if isinstance(key, (list, tuple)) else part(key)]
