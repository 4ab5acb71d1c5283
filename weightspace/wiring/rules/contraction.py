"""Operations that sum products over an axis: matrix products, convolutions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from weightspace.wiring.algebra import Dim, size_of
from weightspace.wiring.rules.base import (
    argument,
    cut,
    rule,
)
from weightspace.wiring.trace import Tracer


def _contract(t: Tracer, batch: Sequence[tuple[Dim, Dim]], summed: Sequence[tuple[Dim, Dim]]) -> None:
    """Unify what is matched and summed; fibres survive only over what is matched."""
    pairs = [(a, b) for a, b in [*batch, *summed] if size_of(a) == size_of(b)]
    t.ledger.unify_all(pairs, t.op)
    t.observe([a for a, _ in batch] + [a for a, _ in summed])


@rule("mm")
def _mm(t: Tracer, func: Any, args: Any, kwargs: Any, out: Any) -> Any:
    a, b = t.dims(args[0]), t.dims(args[1])
    _contract(t, [], [(a[1], b[0])])
    t.read(args[0], 1)
    t.read(args[1], 0)
    return [a[0], b[1]]


@rule("bmm")
def _bmm(t: Tracer, func: Any, args: Any, kwargs: Any, out: Any) -> Any:
    a, b = t.dims(args[0]), t.dims(args[1])
    _contract(t, [(a[0], b[0])], [(a[2], b[1])])
    t.read(args[0], 2)
    t.read(args[1], 1)
    return [a[0], a[1], b[2]]


@rule("addmm")
def _addmm(t: Tracer, func: Any, args: Any, kwargs: Any, out: Any) -> Any:
    product = _mm(t, func, args[1:3], {}, out)
    return _add_to(t, product, args[0], out)


@rule("baddbmm")
def _baddbmm(t: Tracer, func: Any, args: Any, kwargs: Any, out: Any) -> Any:
    product = _bmm(t, func, args[1:3], {}, out)
    return _add_to(t, product, args[0], out)


@rule("addmv")
def _addmv(t: Tracer, func: Any, args: Any, kwargs: Any, out: Any) -> Any:
    return _add_to(t, _mv(t, func, args[1:3], {}, out), args[0], out)


def _add_to(t: Tracer, product: list[Dim], bias: torch.Tensor, out: torch.Tensor) -> list[Dim]:
    lead = out.dim() - bias.dim()
    for d, dim in enumerate(t.dims(bias)):
        if bias.shape[d] == out.shape[lead + d] and bias.shape[d] != 1:
            t.unify(product[lead + d], dim)
    return product


@rule("mv")
def _mv(t: Tracer, func: Any, args: Any, kwargs: Any, out: Any) -> Any:
    a, b = t.dims(args[0]), t.dims(args[1])
    _contract(t, [], [(a[1], b[0])])
    t.read(args[0], 1)
    return [a[0]]


@rule("dot", "vdot")
def _dot(t: Tracer, func: Any, args: Any, kwargs: Any, out: Any) -> Any:
    _contract(t, [], [(t.dims(args[0])[0], t.dims(args[1])[0])])
    return []


@rule("linear")
def _linear(t: Tracer, func: Any, args: Any, kwargs: Any, out: Any) -> Any:
    x, w = t.dims(args[0]), t.dims(args[1])
    _contract(t, [], [(x[-1], w[-1])])
    t.read(args[1], -1)
    result = [*x[:-1], w[0]] if len(w) == 2 else x[:-1]
    bias = argument(args, kwargs, 2, "bias")
    return result if bias is None else _add_to(t, result, bias, out)


@rule("_weight_norm_interface")
def _weight_norm(t: Tracer, func: Any, args: Any, kwargs: Any, out: Any) -> Any:
    """v / ||v|| * g, the norm over every dim but one."""
    v, g = t.dims(args[0]), t.dims(args[1])
    d = argument(args, kwargs, 2, "dim", 0) % len(v)
    for a, b in zip(v[d : d + 1], g[d : d + 1] if len(g) == len(v) else g, strict=False):
        t.unify(a, b)
    norm = [dim if k == d else [] for k, dim in enumerate(v)]
    t.observe(norm)
    return [v, list(norm) if out[1].dim() == len(v) else [v[d]]]


@rule("glu")
def _glu(t: Tracer, func: Any, args: Any, kwargs: Any, out: Any) -> Any:
    d = argument(args, kwargs, 1, "dim", -1) % args[0].dim()
    half = out.shape[d]
    left, right = cut(t, t.dims(args[0]), d, 0, half), cut(t, t.dims(args[0]), d, half, 2 * half)
    for a, b in zip(left, right, strict=True):
        t.unify(a, b)
    return left


@rule("ger", "outer")
def _outer(t: Tracer, func: Any, args: Any, kwargs: Any, out: Any) -> Any:
    return [t.dims(args[0])[0], t.dims(args[1])[0]]


@rule("_cdist_forward")
def _cdist(t: Tracer, func: Any, args: Any, kwargs: Any, out: Any) -> Any:
    a, b = t.dims(args[0]), t.dims(args[1])
    _contract(t, list(zip(a[:-2], b[:-2], strict=False)), [(a[-1], b[-1])])
    return [*a[:-1], b[-2]]


@rule("convolution", "_convolution", "mkldnn_convolution", "convolution_overrideable")
def _convolution(t: Tracer, func: Any, args: Any, kwargs: Any, out: Any) -> Any:
    x, w, bias = t.dims(args[0]), t.dims(args[1]), args[2]
    transposed, groups = args[6], args[8]
    t.read(args[1], 0 if transposed else 1)
    t.pin(x[2:], "spatial positions")
    t.pin(w[2:], "kernel positions")
    if groups == 1:
        inner, outer = (w[0], w[1]) if transposed else (w[1], w[0])
        _contract(t, [], [(x[1], inner)])
    else:
        group, inside = t.ledger.factor_dim(x[1], groups)
        w_group, w_first = t.ledger.factor_dim(w[0], groups)
        t.unify(group, w_group)
        w_in, w_out = (w_first, w[1]) if transposed else (w[1], w_first)
        _contract(t, [(group, w_group)], [(inside, w_in)])
        outer = group + w_out
    result = [x[0], outer, *t.fresh(out.shape[2:], "spatial positions", pinned=True)]
    if bias is not None:
        t.unify(result[1], t.dims(bias)[0])
    return result


@rule("im2col")
def _im2col(t: Tracer, func: Any, args: Any, kwargs: Any, out: Any) -> Any:
    x = t.dims(args[0])
    t.pin(x[-2:], "spatial positions")
    kernel = out.shape[-2] // args[0].shape[-3]
    rows = x[-3] + t.ledger.dim(kernel, pinned=True, reason="kernel positions")
    return [*x[:-3], rows, t.ledger.dim(out.shape[-1], pinned=True, reason="spatial positions")]
