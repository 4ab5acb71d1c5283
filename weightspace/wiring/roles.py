"""What each tensor of a network does: is it contracted, looked up, added, multiplied?

The roles are found while a trace runs, from the operation that first uses a tensor together with data:

- ``weight``: contracted (matrix product, convolution, einsum over a summed dim);
- ``lookup``: read at positions (embedding, index);
- ``shift``: added (biases, positional embeddings); ``gain``: multiplied (the weight of a norm, layer scale);
- ``mean``, ``variance``: running statistics of a normalisation;
- ``other``: anything else (class tokens that are concatenated, tables of positions, counters, unused tensors).

A tensor stays itself through casts, views, slices and arithmetic with constants or with other parameters, so
that a packed projection, a bias shaped ``(1, C, 1, 1)`` or ``1 + w`` keep their roles.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch.utils._pytree import tree_leaves

Role = Literal["weight", "lookup", "shift", "gain", "mean", "variance", "other"]

_ORDER: tuple[Role, ...] = ("weight", "lookup", "gain", "shift", "mean", "variance", "other")
# Tensors that another one is made of, and the role that was settled on the way (None: none yet).
_Parts = dict[str, "Role | None"]

_CONTRACTIONS = {
    "mm", "bmm", "mv", "dot", "vdot", "linear", "ger", "outer", "_cdist_forward", "_trilinear", "matmul", "_grouped_mm",
}  # fmt: skip
_ADDED_CONTRACTIONS = {"addmm", "baddbmm", "addmv", "addbmm", "addr"}
_LOOKUPS = {
    "embedding", "_embedding_bag", "_embedding_bag_forward_only", "index", "_unsafe_index", "index_select", "gather",
    "take", "grid_sampler_2d", "grid_sampler_3d", "grid_sampler",
}  # fmt: skip
_ADDITIONS = {"add", "sub", "rsub", "__add__"}
_PRODUCTS = {"mul", "div", "_prelu_kernel", "prelu", "true_divide", "lerp"}
# Fused operations name their operands.
_BY_NAME: Mapping[str, Role] = {
    "weight": "gain", "gamma": "gain", "bias": "shift", "beta": "shift", "running_mean": "mean",
    "running_var": "variance",
}  # fmt: skip
_NORMS = {
    "native_batch_norm", "_native_batch_norm_legit", "_native_batch_norm_legit_no_training", "cudnn_batch_norm",
    "_batch_norm_with_update", "_batch_norm_no_update", "miopen_batch_norm", "native_layer_norm", "_fused_rms_norm",
    "rms_norm", "native_group_norm", "_native_batch_norm_legit_functional", "_batch_norm_with_update_functional",
}  # fmt: skip
_CONVOLUTIONS = {"convolution", "_convolution", "mkldnn_convolution", "convolution_overrideable"}


class RoleBook:
    """Follows named tensors through a trace and notes what first happens to them."""

    def __init__(self) -> None:
        self._parts: dict[int, _Parts] = {}
        self._sizes: dict[str, int] = {}
        self._roles: dict[str, tuple[int, Role]] = {}
        self._seen: dict[str, int] = {}
        self._step = 0

    def name(self, name: str, tensor: torch.Tensor) -> None:
        """A named tensor; several names may share one tensor."""
        self._parts.setdefault(id(tensor), {})[name] = None
        self._sizes[name] = tensor.numel()

    def knows(self, tensor: torch.Tensor) -> bool:
        """Is it a named tensor, or made of such alone?"""
        return id(tensor) in self._parts

    def watch(
        self, op: str, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], outputs: Sequence[torch.Tensor],
        tensors: Sequence[torch.Tensor], varies: Sequence[bool],
    ) -> None:  # fmt: skip
        """One operation that the output depends on; ``varies`` is False for operands that are constants."""
        self._step += 1
        parts = [self._parts.get(id(x)) for x in tensors]
        for o in outputs:
            self._parts.pop(id(o), None)
        if not any(parts):
            return
        for p in parts:
            for name in p or ():
                self._seen.setdefault(name, self._step)
        data = any(p is None and v for p, v in zip(parts, varies, strict=True))
        given = {id(x): p for x, p in zip(tensors, parts, strict=True) if p}
        # Entries picked by constants are a view; by a named table of positions, they are looked up.
        chosen = op.startswith(("embedding", "_embedding")) or len(given) > 1
        for tensor, role in _uses(op, func, args, kwargs):
            if data or role == "weight" or op in _NORMS or (role == "lookup" and chosen):
                self._assign(given.get(id(tensor)), role)
        if not data:
            made = self._combined(op, [(x, p) for x, p in zip(tensors, parts, strict=True) if p])
            for o in outputs:
                self._parts[id(o)] = dict(made)

    def _combined(self, op: str, operands: Sequence[tuple[torch.Tensor, _Parts]]) -> _Parts:
        """What comes of parameters alone is still made of them."""
        made: _Parts = {}
        largest = max(x.numel() for x, _ in operands)
        several = len({frozenset(p) for _, p in operands}) > 1
        for x, p in operands:
            for name, settled in p.items():
                role = settled
                if op in ("sqrt", "rsqrt") and len(p) == 1 and x.numel() == self._sizes[name]:
                    role = role or "variance"
                elif op in _PRODUCTS and several and x.numel() < largest:
                    # A weight with a gain of its own (weight normalisation).
                    role = role or "gain"
                # A tensor that goes more ways than one is what its plainest way says.
                made[name] = None if name in made and made[name] is None else role
        if op == "_weight_norm_interface" and len(operands) == 2:
            made |= dict.fromkeys(operands[1][1], "gain")
        return made

    def _assign(self, parts: _Parts | None, role: Role) -> None:
        for name, settled in (parts or {}).items():
            self._roles.setdefault(name, (self._step, settled or role))

    def roles(self, names: Sequence[str]) -> dict[str, Role]:
        """A role for every name, in the order of first use; tensors that nothing uses come last."""
        never = self._step + 1
        found = {n: self._roles.get(n, (self._seen.get(n, never), "other")) for n in names}
        order = sorted(found, key=lambda n: (found[n][0], _ORDER.index(found[n][1]), n))
        return {n: found[n][1] for n in order}


def _uses(op: str, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[tuple[torch.Tensor, Role]]:
    """What an operation does with each of its operands, where it is more than moving them."""
    named = dict(zip((a.name for a in func._schema.arguments), args, strict=False)) | dict(kwargs)
    operands = [x for x in tree_leaves((list(args), dict(kwargs))) if isinstance(x, torch.Tensor)]
    if op in _NORMS:
        return [(x, _BY_NAME[n]) for n, x in named.items() if isinstance(x, torch.Tensor) and n in _BY_NAME]
    if op in _CONVOLUTIONS or op == "linear":
        bias = named.get("bias")
        weights: list[tuple[torch.Tensor, Role]] = [(x, "weight") for x in operands if x is not bias]
        return [*weights, (bias, "shift")] if isinstance(bias, torch.Tensor) else weights
    if op == "bmm" and operands[0].shape[2] == 1:
        # Nothing is summed: einsum writes products of elements so.
        return [(x, "gain") for x in operands]
    if op in _CONTRACTIONS:
        return [(x, "weight") for x in operands]
    if op in _ADDED_CONTRACTIONS:
        return [(operands[0], "shift"), *((x, "weight") for x in operands[1:])]
    if op in _LOOKUPS:
        return [(operands[0], "lookup")]
    if op in _ADDITIONS:
        return [(x, "shift") for x in operands]
    if op in _PRODUCTS:
        return [(x, "gain") for x in operands]
    if op in ("addcmul", "addcdiv"):
        return [(operands[0], "shift"), *((x, "gain") for x in operands[1:])]
    return []
