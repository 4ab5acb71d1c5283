"""One small rule per operation: which axes of its operands are the same axis.

A rule has the signature ``rule(t, func, args, kwargs, out)``: ``t`` is the ``Tracer``, ``args`` and
``kwargs`` are those of the aten operation, ``out`` its result. It unifies dims of the operands
(``t.unify``), pins what may not move (``t.pin``), and returns the dims of the result: one list of dims per
output tensor (a plain list of dims where there is one output). To support a new operation write a rule and
put it in the table with ``@rule("name", ...)``; names are those of ``torch.ops.aten`` without overload and
in-place underscore. Operations that torch tags as pointwise need none.

Size-1 dims are the empty product ``[]``, which broadcasts against anything.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.utils._pytree import tree_leaves

from weightspace.wiring.algebra import Dim, Irreconcilable, size_of
from weightspace.wiring.trace import Implied, Label, Tracer

Rule = Callable[..., Any]
RULES: dict[str, Rule] = {}


def rule(*names: str) -> Callable[[Rule], Rule]:
    def register(fn: Rule) -> Rule:
        for name in names:
            RULES[name] = fn
        return fn

    return register


def _tensors(*trees: Any) -> list[torch.Tensor]:
    return [x for x in tree_leaves(trees) if isinstance(x, torch.Tensor)]


def _outs(out: Any) -> list[torch.Tensor]:
    return _tensors(out)


def _arg(args: Sequence[Any], kwargs: dict[str, Any], i: int, name: str, default: Any = None) -> Any:
    return args[i] if i < len(args) else kwargs.get(name, default)


# -------------------------------------------------------------------- pointwise, unknown, creation


def _broadcast(t: Tracer, tensors: Sequence[torch.Tensor], shape: Sequence[int]) -> list[Dim]:
    """Unify the dims of tensors that broadcast to ``shape``."""
    result: list[Dim] = [[] for _ in shape]
    # Few-dimensional operands last: families along an index must meet their index first.
    for x in sorted(tensors, key=lambda x: -x.dim()):
        lead = len(shape) - x.dim()
        pairs = []
        for d, dim in enumerate(t.dims(x)):
            n = int(shape[lead + d])
            if x.shape[d] != n or n == 1:
                continue
            if result[lead + d]:
                pairs.append((result[lead + d], dim))
            else:
                result[lead + d] = dim
        t.ledger.unify_all(pairs, t.op)
    for d, n in enumerate(shape):
        if not result[d] and n != 1:
            result[d] = t.ledger.dim(int(n), pinned=n == 0, reason="empty")
    return result


def pointwise(t: Tracer, func: Any, args: Any, kwargs: Any, out: Any) -> Any:
    """out[i] depends on the operands at i alone."""
    tensors = _tensors(args, kwargs)
    domain = None
    same = t.op.removeprefix("aten.").rstrip("_") in _KEEP_DOMAIN
    for x in tensors:
        held = t.label(x).domain
        if held is not None:
            if same:
                domain = held
            else:
                t.pin(held, f"index arithmetic ({t.op})")
    results = []
    for o in _outs(out):
        if o.dim() == 0 and any(x.dim() for x in tensors):
            # A loss with its reduction built in.
            _broadcast(t, tensors, torch.broadcast_shapes(*(x.shape for x in tensors)))
            results.append(Label([]))
            continue
        dims = _broadcast(t, [x for x in tensors if x.dim() <= o.dim()], o.shape)
        results.append(Label(dims, const=all(t.label(x).const for x in tensors), domain=domain))
    return results


_KEEP_DOMAIN = {"_to_copy", "clone", "detach", "alias", "lift_fresh", "copy", "contiguous"}


def unknown(t: Tracer, func: Any, args: Any, kwargs: Any, out: Any, count: bool = True) -> Any:
    """No rule: everything it touches is pinned."""
    for x in _tensors(args, kwargs):
        t.pin(t.dims(x), f"operation without a rule ({t.op})")
        held = t.label(x).domain
        if held is not None:
            t.pin(held, f"operation without a rule ({t.op})")
    return [t.fresh(o.shape, f"operation without a rule ({t.op})", pinned=True) for o in _outs(out)]


def _varying(t: Tracer, o: torch.Tensor) -> list[Dim]:
    return t.fresh(o.shape, "constant table", pinned=True)


CREATION: dict[str, Callable[[Tracer, torch.Tensor], list[Dim]]] = {
    **{
        n: (lambda t, o: t.by_value(o))
        for n in (
            "scalar_tensor", "full", "zeros", "ones", "arange", "linspace", "eye", "range", "logspace", "tril_indices",
            "triu_indices", "_efficientzerotensor",
        )
    },
    **{n: (lambda t, o: t.fresh(o.shape)) for n in ("empty", "empty_strided", "empty_permuted")},
    **dict.fromkeys(("rand", "randn", "randint", "randperm", "normal", "bernoulli"), _varying),
}  # fmt: skip


# -------------------------------------------------------------------- contraction


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


@rule("addmm", "addbmm")
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
    bias = _arg(args, kwargs, 2, "bias")
    return result if bias is None else _add_to(t, result, bias, out)


@rule("_weight_norm_interface")
def _weight_norm(t: Tracer, func: Any, args: Any, kwargs: Any, out: Any) -> Any:
    """v / ||v|| * g, the norm over every dim but one."""
    v, g = t.dims(args[0]), t.dims(args[1])
    d = _arg(args, kwargs, 2, "dim", 0) % len(v)
    for a, b in zip(v[d : d + 1], g[d : d + 1] if len(g) == len(v) else g, strict=False):
        t.unify(a, b)
    norm = [dim if k == d else [] for k, dim in enumerate(v)]
    t.observe(norm)
    return [v, list(norm) if out[1].dim() == len(v) else [v[d]]]


@rule("glu")
def _glu(t: Tracer, func: Any, args: Any, kwargs: Any, out: Any) -> Any:
    d = _arg(args, kwargs, 1, "dim", -1) % args[0].dim()
    half = out.shape[d]
    left, right = _cut(t, t.dims(args[0]), d, 0, half), _cut(t, t.dims(args[0]), d, half, 2 * half)
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


@rule("unfold_backward", "im2col")
def _im2col(t: Tracer, func: Any, args: Any, kwargs: Any, out: Any) -> Any:
    x = t.dims(args[0])
    t.pin(x[-2:], "spatial positions")
    kernel = out.shape[-2] // args[0].shape[-3]
    rows = x[-3] + t.ledger.dim(kernel, pinned=True, reason="kernel positions")
    return [*x[:-3], rows, t.ledger.dim(out.shape[-1], pinned=True, reason="spatial positions")]


# -------------------------------------------------------------------- normalisation, reduction


def _norm_axes(ndim: int, dim: Any) -> list[int]:
    if dim is None or (isinstance(dim, list | tuple) and not dim):
        return list(range(ndim))
    dims = dim if isinstance(dim, list | tuple) else [dim]
    return [d % ndim if ndim else 0 for d in dims]


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
    outs = _outs(out)
    if "other" in [a.name for a in func._schema.arguments]:
        return pointwise(t, func, args, kwargs, out)
    names = [a.name for a in func._schema.arguments]
    dim = None
    for key in ("dim", "axis"):
        if key in names:
            dim = _arg(args, kwargs, names.index(key), key)
    axes = _norm_axes(x.dim(), dim)
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
    t.observe(_reduced(t, args[0], _norm_axes(args[0].dim(), args[1])))
    return t.dims(args[0])


@rule("cumsum", "cumprod", "cummax", "cummin", "logcumsumexp", "flip", "roll", "diff", "cumulative_trapezoid")
def _ordered(t: Tracer, func: Any, args: Any, kwargs: Any, out: Any) -> Any:
    """Order along the dim matters."""
    x = args[0]
    dim = args[2] if t.op == "aten.roll" and len(args) > 2 else args[1] if len(args) > 1 else kwargs.get("dim")
    dims = t.dims(x)
    for d in _norm_axes(x.dim(), dim):
        t.pin(dims[d], f"order matters ({t.op})")
    return [[list(d) for d in dims] for _ in _outs(out)]


@rule("sort", "topk", "argsort", "kthvalue")
def _sorted(t: Tracer, func: Any, args: Any, kwargs: Any, out: Any) -> Any:
    """Values come by rank, which no permutation of the dim changes; indices are positions along it."""
    x = args[0]
    names = [a.name for a in func._schema.arguments]
    dim = _arg(args, kwargs, names.index("dim"), "dim", -1) if "dim" in names else -1
    d = (-1 if dim is None else dim) % max(x.dim(), 1)
    source = t.dims(x)[d]
    results = []
    for o in _outs(out):
        dims = t.dims(x)
        if o.dim() < len(dims):
            dims.pop(d)
        else:
            dims[d] = t.ledger.dim(o.shape[d], pinned=True, reason="rank")
        results.append(Label(dims, domain=source if not o.is_floating_point() else None))
    return results


@rule("native_layer_norm", "_fused_rms_norm", "rms_norm", "native_layer_norm_backward")
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
    return [dims if o.shape == x.shape else [list(d) for d in stats] for o in _outs(out)]


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
    for o in _outs(out):
        if o.shape == args[0].shape:
            results.append(dims)
        elif o.numel() == args[0].shape[1] and o.dim() == 1:
            results.append([channel])
        else:
            results.append(t.fresh(o.shape))
    return results


# -------------------------------------------------------------------- shape


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
    dim = _arg(args, kwargs, 2, "dim")
    if not isinstance(repeats, int) or dim is None:
        return unknown(t, func, args, kwargs, out)
    dims = t.dims(x)
    dims[dim] = dims[dim] + t.ledger.dim(repeats)
    return dims


def _cut(t: Tracer, dims: list[Dim], d: int, start: int, stop: int) -> list[Dim]:
    """Positions [start, stop) along dim d of a tensor."""
    dims = [t.ledger.normal(x) for x in dims]
    d %= len(dims)
    if start == 0 and stop == size_of(dims[d]):
        return dims
    pinned = t.ledger.is_pinned(dims[d])
    if pinned and not any(a.form for a in dims[d]):
        out = list(dims)
        out[d] = t.ledger.dim(stop - start, pinned=True, reason="pinned")
        return out
    try:
        piece, cuts = t.ledger.cut(dims[d], start, stop)
    except Irreconcilable:
        if not pinned:
            t.missing[f"{t.op} (slice across axes)"] += 1
            t.pin(dims[d], f"slice across axes ({t.op})")
        out = list(dims)
        out[d] = t.ledger.dim(stop - start, pinned=True, reason="pinned")
        return out
    # cut() may have refined atoms of the other dims too.
    return [piece if k == d else t.ledger.restrict(x, cuts) for k, x in enumerate(dims)]


@rule("slice", "narrow")
def _slice(t: Tracer, func: Any, args: Any, kwargs: Any, out: Any) -> Any:
    x = args[0]
    d = _arg(args, kwargs, 1, "dim", 0) % x.dim()
    n = x.shape[d]
    if t.op == "aten.narrow":
        start, step = args[2], 1
    else:
        start = _arg(args, kwargs, 2, "start") or 0
        step = _arg(args, kwargs, 4, "step", 1)
    start = max(0, min(n, start + n if start < 0 else start))
    count = out.shape[d]
    domain = t.label(x).domain
    dims = t.dims(x)
    if count == 0:
        dims[d] = t.ledger.dim(0, pinned=True, reason="empty")
        return Label(dims, True, domain)
    if step == 1:
        return Label(_cut(t, dims, d, start, start + count), True, domain)
    if n % step == 0 and start < step and count == n // step:
        try:
            outer, inner = t.ledger.factor_dim(dims[d], n // step)
            split = [*dims[:d], outer, inner, *dims[d + 1 :]]
            picked = _cut(t, split, d + 1, start, start + 1)
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
    dims = _cut(t, t.dims(x), d, i, i + 1)
    dims.pop(d)
    return Label(dims, True, t.label(x).domain)


@rule("unbind")
def _unbind(t: Tracer, func: Any, args: Any, kwargs: Any, out: Any) -> Any:
    x = args[0]
    d = _arg(args, kwargs, 1, "dim", 0) % x.dim()
    results = []
    for i in range(x.shape[d]):
        dims = _cut(t, t.dims(x), d, i, i + 1)
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
    d = _arg(args, kwargs, 2, "dim", 0) % x.dim()
    results, start = [], 0
    for o in _outs(out):
        stop = start + o.shape[d]
        results.append(Label(_cut(t, t.dims(x), d, start, stop), True, t.label(x).domain))
        start = stop
    return results


@rule("cat", "concat")
def _cat(t: Tracer, func: Any, args: Any, kwargs: Any, out: Any) -> Any:
    tensors = [x for x in args[0] if not (x.dim() == 1 and x.numel() == 0 and out.dim() != 1)]
    d = _arg(args, kwargs, 1, "dim", 0) % out.dim()
    tensors = [x for x in tensors if x.shape[d] > 0] or tensors
    dims = [t.dims(x) for x in tensors]
    result = []
    for k in range(out.dim()):
        if k == d:
            parts = [x[k] for x in dims]
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
    d = _arg(args, kwargs, 1, "dim", 0) % out.dim()
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
            dims = _cut(t, dims, d, start, stop)
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
    offset, d1, d2 = (_arg(args, kwargs, i, n, v) for i, n, v in ((1, "offset", 0), (2, "dim1", 0), (3, "dim2", 1)))
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


# -------------------------------------------------------------------- spatial


@rule(
    "max_pool2d_with_indices", "max_pool3d_with_indices", "avg_pool2d", "avg_pool3d", "avg_pool1d",
    "_adaptive_avg_pool2d", "_adaptive_avg_pool3d", "adaptive_avg_pool1d", "adaptive_max_pool2d",
    "adaptive_max_pool3d", "max_pool2d", "max_pool1d", "reflection_pad1d", "reflection_pad2d",
    "reflection_pad3d", "replication_pad1d", "replication_pad2d", "replication_pad3d",
    "upsample_nearest1d", "upsample_nearest2d", "upsample_nearest3d", "upsample_bilinear2d",
    "upsample_bicubic2d", "upsample_linear1d", "upsample_trilinear3d", "_upsample_bilinear2d_aa",
    "_upsample_bicubic2d_aa", "_upsample_nearest_exact2d", "_upsample_nearest_exact1d",
    "_adaptive_avg_pool2d_backward", "fractional_max_pool2d", "adaptive_avg_pool2d", "mkldnn_max_pool2d",
)  # fmt: skip
def _pool(t: Tracer, func: Any, args: Any, kwargs: Any, out: Any) -> Any:
    """Works inside each channel on spatial positions: the trailing dims whose number the name tells."""
    x = args[0]
    dims = t.dims(x)
    rank = next(r for r in (1, 2, 3) if f"{r}d" in t.op)
    t.pin(dims[-rank:], "spatial positions")
    return [[*dims[:-rank], *t.fresh(o.shape[-rank:], "spatial positions", pinned=True)] for o in _outs(out)]


@rule("grid_sampler_2d", "grid_sampler_3d", "_grid_sampler_2d_cpu_fallback", "grid_sampler")
def _grid_sample(t: Tracer, func: Any, args: Any, kwargs: Any, out: Any) -> Any:
    x, grid = t.dims(args[0]), t.dims(args[1])
    t.pin(x[2:], "spatial positions")
    t.pin(grid[-1], "coordinates")
    if args[0].shape[0] == args[1].shape[0]:
        t.unify(x[0], grid[0])
    return [x[0], x[1], *grid[1:-1]]


@rule("_fft_r2c", "_fft_c2c", "_fft_c2r")
def _fft(t: Tracer, func: Any, args: Any, kwargs: Any, out: Any) -> Any:
    dims = t.dims(args[0])
    for d in _norm_axes(args[0].dim(), args[1]):
        t.pin(dims[d], "frequencies")
        dims[d] = t.ledger.dim(out.shape[d], pinned=True, reason="frequencies")
    return dims


# -------------------------------------------------------------------- indexing


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
    outs = _outs(out)
    first = [t.ledger.dim(outs[0].shape[0], pinned=True, reason="bags"), w[1]]
    return [first, *(t.fresh(o.shape, "bags", pinned=True) for o in outs[1:])]


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
        return _cut(t, dims, positions[0], *run)
    for k, i in zip(positions, given, strict=True):
        _address(t, dims[k], i, "indexed positions")
    looked_up = _broadcast(t, given, shape)
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
    for x in _tensors(args, kwargs):
        t.pin(t.dims(x), f"positions become values ({t.op})")
        held = t.label(x).domain
        if held is not None:
            t.pin(held, f"positions become values ({t.op})")
    return [t.fresh(o.shape, "positions", pinned=True) for o in _outs(out)]


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
