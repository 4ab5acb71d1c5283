"""Reductions, orderings and norms."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from weightspace.wiring.algebra import Dim
from weightspace.wiring.rules.base import (
    argument,
    norm_axes,
    outputs_of,
    pointwise,
    rule,
)
from weightspace.wiring.trace import Label, Tracer


def _reduced(t: Tracer, x: torch.Tensor, axes: Sequence[int]) -> list[Dim]:
    return [[] if d in axes else dim for d, dim in enumerate(t.dims(x))]


@rule(
    "sum", "mean", "amax", "amin", "var", "std", "prod", "any", "all", "logsumexp", "linalg_vector_norm",
    "norm", "nansum", "max", "min", "var_mean", "std_mean", "argmax", "argmin", "aminmax", "median",
    "count_nonzero", "_is_all_true", "_is_any_true", "equal", "mode", "nanmedian",
)  # fmt: skip
def _reduce(t: Tracer, func: Any, args: Any, kwargs: Any, out: Any) -> Any:
    """A symmetric function over the dims that go."""
    x = args[0]
    outs = outputs_of(out)
    if "other" in [a.name for a in func._schema.arguments]:
        return pointwise(t, func, args, kwargs, out)
    names = [a.name for a in func._schema.arguments]
    dim = None
    for key in ("dim", "axis"):
        if key in names:
            dim = argument(args, kwargs, names.index(key), key)
    axes = norm_axes(x.dim(), dim)
    dims = t.dims(x)
    results = []
    for k, o in enumerate(outs):
        keep = o.dim() == x.dim()
        label = Label([([] if keep else None) if d in axes else dims[d] for d in range(x.dim())])  # type: ignore[misc]
        label.dims = [d for d in label.dims if d is not None]
        if (t.op.rstrip("_").endswith(("argmax", "argmin")) or (k == 1 and t.op in _WITH_INDEX)) and len(axes) == 1:
            label.domain = dims[axes[0]]
        results.append(label)
    return results


_WITH_INDEX = {"aten.max", "aten.min", "aten.median", "aten.mode"}


@rule("_softmax", "_log_softmax", "softmax", "log_softmax", "_safe_softmax")
def _softmax(t: Tracer, func: Any, args: Any, kwargs: Any, out: Any) -> Any:
    t.observe(_reduced(t, args[0], norm_axes(args[0].dim(), args[1])))
    return t.dims(args[0])


@rule("cumsum", "cumprod", "cummax", "cummin", "logcumsumexp", "flip", "roll", "diff", "cumulative_trapezoid")
def _ordered(t: Tracer, func: Any, args: Any, kwargs: Any, out: Any) -> Any:
    """Order along the dim matters."""
    x = args[0]
    dim = args[2] if t.op == "aten.roll" and len(args) > 2 else args[1] if len(args) > 1 else kwargs.get("dim")
    dims = t.dims(x)
    for d in norm_axes(x.dim(), dim):
        t.pin(dims[d], f"order matters ({t.op})")
    return [[list(d) for d in dims] for _ in outputs_of(out)]


@rule("sort", "topk", "argsort", "kthvalue")
def _sorted(t: Tracer, func: Any, args: Any, kwargs: Any, out: Any) -> Any:
    """Values come by rank, which no permutation of the dim changes; indices are positions along it."""
    x = args[0]
    names = [a.name for a in func._schema.arguments]
    dim = argument(args, kwargs, names.index("dim"), "dim", -1) if "dim" in names else -1
    d = (-1 if dim is None else dim) % max(x.dim(), 1)
    source = t.dims(x)[d]
    results = []
    for o in outputs_of(out):
        dims = t.dims(x)
        if o.dim() < len(dims):
            dims.pop(d)
        else:
            dims[d] = t.ledger.dim(o.shape[d], pinned=True, reason="rank")
        results.append(Label(dims, domain=source if not o.is_floating_point() else None))
    return results


@rule("native_layer_norm", "_fused_rms_norm", "rms_norm")
def _layer_norm(t: Tracer, func: Any, args: Any, kwargs: Any, out: Any) -> Any:
    x, shape = args[0], args[1]
    dims = t.dims(x)
    k = len(shape)
    for affine in args[2:4]:
        if isinstance(affine, torch.Tensor):
            for mine, other in zip(dims[-k:], t.dims(affine), strict=True):
                t.unify(mine, other)
    stats = [*dims[:-k], *([[]] * k)]
    t.observe(stats)
    return [dims if o.shape == x.shape else [list(d) for d in stats] for o in outputs_of(out)]


@rule("native_group_norm")
def _group_norm(t: Tracer, func: Any, args: Any, kwargs: Any, out: Any) -> Any:
    x, weight, bias, groups = args[0], args[1], args[2], args[6]
    dims = t.dims(x)
    group, _ = t.ledger.factor_dim(dims[1], groups)
    for affine in (weight, bias):
        if affine is not None:
            t.unify(dims[1], t.dims(affine)[0])
    t.observe([dims[0], group])
    return [dims, [dims[0], group], [dims[0], group]]


@rule(
    "native_batch_norm", "_native_batch_norm_legit", "_native_batch_norm_legit_no_training", "cudnn_batch_norm",
    "_batch_norm_with_update", "_batch_norm_no_update", "miopen_batch_norm", "batch_norm_update_stats",
    "_native_batch_norm_legit_functional", "_batch_norm_with_update_functional",
)  # fmt: skip
def _batch_norm(t: Tracer, func: Any, args: Any, kwargs: Any, out: Any) -> Any:
    dims = t.dims(args[0])
    channel: Dim = dims[1]
    for v in args[1:5]:
        if isinstance(v, torch.Tensor) and v.numel() == args[0].shape[1]:
            t.unify(channel, t.dims(v)[0])
    results = []
    for o in outputs_of(out):
        if o.shape == args[0].shape:
            results.append(dims)
        elif o.numel() == args[0].shape[1] and o.dim() == 1:
            results.append([channel])
        else:
            results.append(t.fresh(o.shape))
    return results
