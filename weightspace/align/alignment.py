"""What an alignment gives."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from weightspace.wiring.wiring import Permutation, Wiring

if TYPE_CHECKING:
    from weightspace.checkpoint import Checkpoint


@dataclass(frozen=True, eq=False)
class Found:
    """What a method hands back: the group element, and what it gives beyond that.

    ``costs``, ``diagnostics`` and ``maps`` are as in ``Alignment``. ``aligned`` are the moved tensors where acting with
    ``permutations`` on ``b`` is not all there is to it (soft maps, other widths); tensors of all of b's names.
    """

    permutations: Permutation
    costs: Mapping[str, Tensor] = field(default_factory=dict)
    diagnostics: Mapping[str, Any] = field(default_factory=dict)
    maps: Mapping[str, Tensor] = field(default_factory=dict)
    aligned: Mapping[str, Tensor] | None = None


@dataclass(frozen=True, eq=False)
class Alignment:
    """``b`` brought next to ``a``.

    - ``permutations``: the group element that moves b onto a: ``wiring.apply(alignment.permutations, b)``.
    - ``objective``: the total weight cosine ``<a, P b> / (|a| |b|)`` over the tensors that carry a free factor (running
      means and variances of norms aside: their scale is that of activations). ``before`` is the same with b as it was.
      NaN where the two differ in shape.
    - ``costs``: per factor the similarities ``(*over, n_a, n_b)`` of its elements at the end, other factors in place;
      columns are numbered as in the aligned b, so a good match has its largest values on the diagonal.
    - ``diagnostics``: ``seconds``, ``moved`` (share of elements moved, per factor) and what the method says of itself.
    - ``maps``: soft or invertible maps, where the method finds more than permutations.
    - ``aligned``: b's tensors after the move, names, order and dtypes kept; ``aligned.save("out.safetensors")``.
    """

    method: str
    wiring: Wiring = field(repr=False)
    permutations: Permutation
    objective: float
    before: float
    costs: Mapping[str, Tensor] = field(repr=False)
    diagnostics: Mapping[str, Any] = field(repr=False)
    maps: Mapping[str, Tensor] = field(repr=False)
    aligned: Checkpoint = field(repr=False)

    @property
    def gain(self) -> float:
        return self.objective - self.before

    @cached_property
    def moved(self) -> dict[str, float]:
        """Per free factor, the share of its elements that are not where they were."""
        return moved_shares(self.permutations, self.wiring)

    def to_dict(self) -> dict[str, Any]:
        """The figures as JSON can hold them; permutations as nested lists, without costs and maps."""
        return {
            "method": self.method,
            "wiring": {"origin": self.wiring.origin, "status": self.wiring.status},
            "before": self.before,
            "objective": self.objective,
            "moved": self.moved,
            "diagnostics": _plain(self.diagnostics),
            "maps": {name: list(m.shape) for name, m in self.maps.items()},
            "permutations": {name: p.tolist() for name, p in self.permutations.index.items()},
        }

    def __repr__(self) -> str:
        seconds = self.diagnostics.get("seconds")
        took = f", {seconds:.2f} s" if isinstance(seconds, float) else ""
        lines = [
            f"Alignment({self.method}: weight cosine {self.before:.4f} → {self.objective:.4f}{took}; "
            f"wiring {self.wiring.origin}, {self.wiring.status})"
        ]
        shown = list(self.moved.items())
        width = min(40, max((len(n) for n, _ in shown[:12]), default=0))
        for name, share in shown[:12]:
            factor = self.wiring.factors[name]
            over = f" over {', '.join(factor.over)}" if factor.over else ""
            lines.append(f"  {name:<{width}}  {factor.size:>6}{over}, {share:.0%} moved")
        if len(shown) > 12:
            lines.append(f"  … {len(shown) - 12} more factors")
        if self.maps:
            more = " …" if len(self.maps) > 4 else ""
            lines.append(f"  {len(self.maps)} maps: {', '.join(list(self.maps)[:4])}{more}")
        return "\n".join(lines)


def moved_shares(perm: Permutation, wiring: Wiring) -> dict[str, float]:
    """Per free factor of size 2 or more, the share of elements that a group element moves."""
    out = {}
    for name, factor in wiring.free.items():
        if factor.size > 1:
            p = perm.index.get(name)
            still = p is None or p.numel() == 0
            out[name] = 0.0 if still or p is None else float((p != torch.arange(p.shape[-1])).double().mean())
    return out


def _plain(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.tolist()
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    return value
