"""The straight path between two networks: what lies on it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from weightspace.errors import AlignmentError

Tensors = Mapping[str, Tensor]


@dataclass(frozen=True)
class Barrier:
    """What was measured at ``at`` (0: a, 1: b) on the straight path.

    ``height`` is the barrier: the worst rise of a loss, or drop of an accuracy, over the line between the two ends'
    values (at least 0); ``where`` is the place of it, ``middle`` the value half way, ``ends`` those of a and b.
    """

    at: tuple[float, ...]
    values: tuple[float, ...]
    higher_is_better: bool

    @property
    def ends(self) -> tuple[float, float]:
        return self.values[0], self.values[-1]

    @property
    def rises(self) -> tuple[float, ...]:
        """How far each point is worse than the line between the ends."""
        (first, last), sign = self.ends, -1.0 if self.higher_is_better else 1.0
        return tuple(sign * (v - ((1 - t) * first + t * last)) for t, v in zip(self.at, self.values, strict=True))

    @property
    def height(self) -> float:
        return max(0.0, *self.rises)

    @property
    def where(self) -> float:
        return self.at[max(range(len(self.at)), key=lambda i: self.rises[i])]

    @property
    def middle(self) -> float:
        return self.values[min(range(len(self.at)), key=lambda i: abs(self.at[i] - 0.5))]

    def __repr__(self) -> str:
        what = "accuracy" if self.higher_is_better else "loss"
        return (
            f"Barrier({self.height:.4g} of {what} at {self.where:.2f}; ends {self.ends[0]:.4g}, {self.ends[1]:.4g}, "
            f"middle {self.middle:.4g}, {len(self.at)} points)"
        )


def barrier(
    a: Tensors, b: Tensors, evaluate: Callable[[dict[str, Tensor]], float], n: int = 25, *,
    higher_is_better: bool = False, reset: Callable[[dict[str, Tensor], float], Tensors] | None = None,
) -> Barrier:  # fmt: skip
    """Evaluate ``n`` evenly spaced networks on the straight path from ``a`` to ``b``, both ends among them.

    ``evaluate``: tensors to a loss, or to an accuracy with ``higher_is_better``. ``reset`` is called with every network
    between the ends and its place, before it is evaluated, and gives the tensors to evaluate instead:
    ``lambda t, at: reset_statistics(wiring, t, x)`` resets batch norms (Jordan et al. 2023). The barrier is that of
    Frankle et al. 2020 and Entezari et al. 2022: over the interpolation of the ends' losses. b should be aligned first:
    ``ws.align(a, b).aligned``.

    Tensors that are not of floating point are taken from ``a``. Raises ``AlignmentError`` where the two differ in names
    or shapes, or ``n`` is below 3.
    """
    if n < 3:
        raise AlignmentError(f"a path of {n} points has no middle; take n of 3 or more")
    differing = [k for k in a if k not in b or a[k].shape != b[k].shape] + [k for k in b if k not in a]
    if differing:
        raise AlignmentError(
            f"{len(differing)} tensors of a and b differ in name or shape ({', '.join(differing[:3])}); "
            "align networks of different widths first, ws.align(a, b, 'optimal-transport')"
        )
    at = tuple(i / (n - 1) for i in range(n))
    found = []
    for place in at:
        point = interpolate(a, b, place)
        between = 0 < place < 1
        found.append(float(evaluate(dict(reset(point, place)) if reset is not None and between else point)))
    return Barrier(at, tuple(found), higher_is_better)


def interpolate(a: Tensors, b: Tensors, at: float) -> dict[str, Tensor]:
    """``(1 - at) a + at b``, dtypes kept; what is not of floating point is a's."""
    out = {}
    for name in a:
        x = a[name].detach()
        if x.is_floating_point() or x.is_complex():
            y = b[name].detach()
            wide = torch.promote_types(x.dtype, torch.float32)
            out[name] = x if at == 0 else torch.lerp(x.to(wide), y.to(wide), at).to(x.dtype)
        else:
            out[name] = x
    return out


__all__ = ["Barrier", "barrier", "interpolate"]
