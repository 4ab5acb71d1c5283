"""What every rule builds on: the table, and the rules that fit most operations."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.utils._pytree import tree_leaves

from weightspace.wiring.algebra import Dim, Irreconcilable, size_of
from weightspace.wiring.trace import Label, Tracer

Rule = Callable[..., Any]
RULES: dict[str, Rule] = {}


def rule(*names: str) -> Callable[[Rule], Rule]:
    def register(fn: Rule) -> Rule:
        for name in names:
            RULES[name] = fn
        return fn

    return register


def tensors_of(*trees: Any) -> list[torch.Tensor]:
    return [x for x in tree_leaves(trees) if isinstance(x, torch.Tensor)]


def outputs_of(out: Any) -> list[torch.Tensor]:
    return tensors_of(out)


def argument(args: Sequence[Any], kwargs: dict[str, Any], i: int, name: str, default: Any = None) -> Any:
    return args[i] if i < len(args) else kwargs.get(name, default)


def broadcast(t: Tracer, tensors: Sequence[torch.Tensor], shape: Sequence[int]) -> list[Dim]:
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
    tensors = tensors_of(args, kwargs)
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
    for o in outputs_of(out):
        if o.dim() == 0 and any(x.dim() for x in tensors):
            # A loss with its reduction built in.
            broadcast(t, tensors, torch.broadcast_shapes(*(x.shape for x in tensors)))
            results.append(Label([]))
            continue
        dims = broadcast(t, [x for x in tensors if x.dim() <= o.dim()], o.shape)
        results.append(Label(dims, const=all(t.label(x).const for x in tensors), domain=domain))
    return results


_KEEP_DOMAIN = {"_to_copy", "clone", "detach", "alias", "lift_fresh", "copy", "contiguous"}


def unknown(t: Tracer, func: Any, args: Any, kwargs: Any, out: Any) -> Any:
    """No rule: everything it touches is pinned."""
    for x in tensors_of(args, kwargs):
        t.pin(t.dims(x), f"operation without a rule ({t.op})")
        held = t.label(x).domain
        if held is not None:
            t.pin(held, f"operation without a rule ({t.op})")
    reason = f"operation without a rule ({t.op})"
    return [Label(t.fresh(o.shape, reason, pinned=True)) for o in outputs_of(out)]


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


def norm_axes(ndim: int, dim: Any) -> list[int]:
    if dim is None or (isinstance(dim, list | tuple) and not dim):
        return list(range(ndim))
    dims = dim if isinstance(dim, list | tuple) else [dim]
    return [d % ndim if ndim else 0 for d in dims]


def cut(t: Tracer, dims: list[Dim], d: int, start: int, stop: int) -> list[Dim]:
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
    rest = t.ledger.restrict_rows(dims, d, cuts)
    return [piece if k == d else x for k, x in enumerate(rest)]
