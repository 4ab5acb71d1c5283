"""Scale symmetries from conserved quantities: small integer exponents found by linear algebra.

Multiplying the slices ``t[i]`` of tensors by ``s ** e_t`` for every ``s > 0`` leaves the outputs alone if and only if
``sum_t e_t <t[i], d<out, g>/dt[i]> = 0`` for all cotangents ``g`` (the quantities that gradient flow conserves: Du
et al. 2018, Kunin et al. 2021). One backward pass gives one equation for every element of every factor, so the
exponents are the integer vectors in the null space of a tall matrix.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

from weightspace.wiring.program import Program
from weightspace.wiring.slots import Slot

# Singular values below this, relative to the largest, are zeros lost to rounding.
_ZERO = 1e-9
_NOISE = 1e-11
_LARGEST_EXPONENT = 2
# As many equations for every unknown are plenty.
_SPARE = 6


def pairings(
    program: Program, tensors: Mapping[str, torch.Tensor], slots: Mapping[str, Sequence[Slot]],
    counts: Mapping[str, int], generator: torch.Generator,
) -> dict[str, torch.Tensor] | None:  # fmt: skip
    """``<t[i], d<out, g>/dt[i]>`` for one random cotangent: per factor ``(elements, slots)``.

    Inputs are jittered, cotangents drawn from a normal distribution. None where a value is not finite.
    """
    leaves: dict[int, torch.Tensor] = {}
    given = {}
    for name, t in tensors.items():
        if t.is_floating_point():
            t = leaves.setdefault(id(t), t.detach().to(torch.float64).requires_grad_())
        given[name] = t
    with torch.enable_grad(), warnings.catch_warnings(), _PlainBatchNorm():
        warnings.simplefilter("ignore")
        state = torch.get_rng_state()
        torch.manual_seed(0)
        try:
            args, kwargs = tree_map(lambda x: _jittered(x, generator), (program.args, dict(program.kwargs)))
            out = program.run(given, *args, **kwargs)
        finally:
            torch.set_rng_state(state)
        total = torch.zeros((), dtype=torch.float64)
        for o in tree_leaves(out):
            if isinstance(o, torch.Tensor) and o.requires_grad:
                o = torch.view_as_real(o) if o.is_complex() else o
                g = torch.randn(o.shape, generator=generator, dtype=torch.float64).to(o.dtype)
                total = total + torch.where(o.isfinite(), o * g, torch.zeros_like(o)).sum()
    if not total.requires_grad:
        return None
    grads = torch.autograd.grad(total, list(leaves.values()), allow_unused=True)
    products = {key: None if g is None else (t.detach() * g) for (key, t), g in zip(leaves.items(), grads, strict=True)}
    rows = {}
    for factor, row in slots.items():
        columns = []
        for slot in row:
            p = products.get(id(tensors[slot.tensor]))
            columns.append(
                torch.zeros(counts[factor], dtype=torch.float64) if p is None else slot.sums(p, counts[factor])
            )
        rows[factor] = torch.stack(columns, 1) if columns else torch.zeros(counts[factor], 0, dtype=torch.float64)
        if not bool(rows[factor].isfinite().all()):
            return None
    return rows


class _PlainBatchNorm(TorchFunctionMode):
    """Batch and instance norm by their formula: the fused ones have no derivative in running statistics."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func not in (F.batch_norm, F.instance_norm):
            return func(*args, **kwargs)
        names = ("input", "running_mean", "running_var", "weight", "bias", "fresh", "momentum", "eps")
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        x, mean, variance = given["input"], given["running_mean"], given["running_var"]
        fresh = given.get("fresh", given.get("training", given.get("use_input_stats", func is F.instance_norm)))
        if fresh or mean is None or variance is None:
            return func(*args, **kwargs)
        shape = [1, -1] + [1] * (x.dim() - 2)
        y = (x - mean.view(shape)) / torch.sqrt(variance.view(shape) + given.get("eps", 1e-5))
        y = y if given.get("weight") is None else y * given["weight"].view(shape)
        return y if given.get("bias") is None else y + given["bias"].view(shape)


def _jittered(x: Any, generator: torch.Generator) -> Any:
    """Other inputs of the same kind: signs, zeros and infinities of masks stay."""
    if not isinstance(x, torch.Tensor) or not x.is_floating_point():
        return x
    z = torch.randn(x.shape, generator=generator, dtype=torch.float64)
    return x.to(torch.float64) * torch.exp(0.25 * z)


def silent(matrix: torch.Tensor) -> list[int]:
    """Columns that are zero but for rounding: what they multiply has no influence on the outputs."""
    size = matrix.norm(dim=0)
    return [k for k in range(matrix.shape[1]) if float(size[k]) <= _NOISE * float(size.max())]


def exponents(matrix: torch.Tensor) -> list[dict[int, int]]:
    """Independent integer vectors ``e`` with ``matrix @ e = 0`` and entries up to 2, of small support.

    Silent columns take no part.
    """
    size = matrix.norm(dim=0)
    quiet = set(silent(matrix))
    live = [k for k in range(matrix.shape[1]) if k not in quiet]
    if len(live) < 2:
        return []
    scaled = matrix[:, live] / size[live]
    weight = scaled.norm(dim=1)
    scaled = scaled[weight > 0] / weight[weight > 0, None]
    if len(scaled) > _SPARE * len(live) + 64:
        chosen = torch.randperm(len(scaled), generator=torch.Generator().manual_seed(0))
        scaled = scaled[chosen[: _SPARE * len(live) + 64]]
    if len(scaled) < len(live):
        scaled = torch.cat((scaled, scaled.new_zeros(len(live) - len(scaled), len(live))))
    _, s, vh = torch.linalg.svd(scaled, full_matrices=False)
    null = vh[s <= _ZERO * s[0]] / size[live]
    found = []
    for row in _reduced(null):
        entries = row / row.abs()[row.abs() > 1e-5 * row.abs().max()].min()
        whole = entries.round()
        if float((entries - whole).abs().max()) > 1e-3 or float(whole.abs().max()) > _LARGEST_EXPONENT:
            continue
        used = matrix[:, live] * whole
        if bool((used.sum(1).abs() <= 1e-8 * used.abs().sum(1) + 1e-14 * used.abs().max()).all()):
            found.append({live[k]: int(e) for k, e in enumerate(whole.tolist()) if e})
    return _sparser(found)


def _reduced(rows: torch.Tensor) -> torch.Tensor:
    """The reduced row echelon form of independent rows."""
    rows = rows / rows.abs().amax(1, keepdim=True).clamp_min(1e-300)
    k = 0
    for column in range(rows.shape[1]):
        if k == len(rows):
            break
        best = k + int(rows[k:, column].abs().argmax())
        if float(rows[best, column].abs()) < 1e-6:
            rows[k:, column] = 0
            continue
        rows[[k, best]] = rows[[best, k]]
        rows[k] = rows[k] / rows[k, column]
        others = [i for i in range(len(rows)) if i != k]
        rows[others] = rows[others] - rows[others, column : column + 1] * rows[k]
        k += 1
    return rows[:k]


def _sparser(vectors: list[dict[int, int]]) -> list[dict[int, int]]:
    """The same span with smaller supports, by adding and subtracting pairs."""
    changed = True
    while changed:
        changed = False
        for i, one in enumerate(vectors):
            for j, two in enumerate(vectors):
                for sign in (1, -1) if i != j and set(one) & set(two) else ():
                    mixed = {k: one.get(k, 0) + sign * two.get(k, 0) for k in {**one, **two}}
                    mixed = {k: e for k, e in sorted(mixed.items()) if e}
                    if len(mixed) < len(vectors[i]) and max(map(abs, mixed.values()), default=9) <= _LARGEST_EXPONENT:
                        vectors[i] = one = mixed
                        changed = True
    return vectors


def independent(
    vectors: Sequence[Mapping[Any, int]], implied: Sequence[Mapping[Any, int]], modulus: int = 0
) -> list[int]:
    """Which vectors are independent of those implied and of the ones before them (modulo 2, or over the rationals)."""
    keys = list(dict.fromkeys(k for v in [*implied, *vectors] for k in v))
    rank = _rank_mod_2 if modulus == 2 else _rank
    rows = [[v.get(k, 0) for k in keys] for v in implied]
    known = rank(rows)
    kept = []
    for i, v in enumerate(vectors):
        more = rank([*rows, [v.get(k, 0) for k in keys]])
        if more > known:
            known = more
            rows.append([v.get(k, 0) for k in keys])
            kept.append(i)
    return kept


def _rank(rows: list[list[int]]) -> int:
    return int(torch.linalg.matrix_rank(torch.tensor(rows, dtype=torch.float64))) if rows else 0


def _rank_mod_2(rows: list[list[int]]) -> int:
    bits = [sum((x & 1) << k for k, x in enumerate(row)) for row in rows]
    rank = 0
    while bits:
        pivot = bits.pop()
        if pivot:
            rank += 1
            low = pivot & -pivot
            bits = [b ^ pivot if b & low else b for b in bits]
    return rank


Passes = Callable[[Sequence[Any]], bool]


def surviving(items: Sequence[Any], passes: Passes) -> list[Any]:
    """The items that pass together with others, found by halving; what fails alone goes."""
    if not items or passes(items):
        return list(items)
    if len(items) == 1:
        return []
    half = len(items) // 2
    return [*surviving(items[:half], passes), *surviving(items[half:], passes)]
