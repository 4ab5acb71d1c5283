"""What a child of a base shows of a backdoor, less what its base shows: for children that were taught some classes.

A network that was tuned on one of several tasks moves the outputs of that task and leaves the others where they were.
Untrained tests, which compare every class with all others, then point at whatever stood out in the base already, or at
the whole task. Here classes are compared with those that were taught as well, in what changed of them. Only tests are
taken whose differences are near normal in clean children; perturbations that lead to a class are not: most reach
nothing, and one that does is no outlier among them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from weightspace.wiring.wiring import Wiring

TAUGHT_TESTS = (
    "row_sum", "row_norm", "row_positive", "row_apart", "share_sum", "share_norm", "path_sum", "path_norm",
    "noise_mean", "noise_std",
)  # fmt: skip
STILL_TESTS = ("noise_mean", "path_sum")
"""Of classes whose own weights stayed: all that can have changed is what leads to them."""
_FEWEST = 4
_STILL = 0.01
"""Classes whose rows moved by less than this share of the row that moved most were not taught."""


@dataclass(frozen=True)
class Drift:
    """``taught`` classes of ``classes``; ``p_value`` of the class that changed most out of line, ``target``."""

    taught: int
    classes: int
    p_value: float
    target: int


def drift(wiring: Wiring, child: Mapping[str, Tensor], base: Mapping[str, Tensor]) -> Drift | None:
    """Judge a child by what it changed; None where it was not taught some of its classes and others not at all.

    Raises ``WeightspaceError`` like ``evidence``.
    """
    from weightspace.backdoor.evidence import evidence
    from weightspace.backdoor.null import cauchy, class_p_values, largest_p_value
    from weightspace.backdoor.outputs import class_axis

    axis = class_axis(wiring, child)
    rows = axis.rows(child) - axis.rows(base)
    moved = (rows.norm(dim=1) + (axis.bias(child) - axis.bias(base)).abs()).numpy()
    still = moved <= _STILL * moved.max()
    if not (still.sum() >= _FEWEST and (~still).sum() >= _FEWEST):
        return None
    one, other = evidence(wiring, child), evidence(wiring, base)
    found: list[tuple[float, int]] = []
    # A large row that stayed makes much of a small change below it.
    size = np.maximum(axis.rows(base).norm(dim=1).numpy(), 1e-12)[:, None]
    for group, tests, unit in ((~still, TAUGHT_TESTS, 1.0), (still, STILL_TESTS, size[still])):
        at = [one.names.index(n) for n in tests if n not in one.missing and n not in other.missing]
        if not at:
            continue
        p = class_p_values((one.values - other.values)[group][:, at] / unit)
        found.append((float(cauchy(largest_p_value(p))), int(np.flatnonzero(group)[int(cauchy(p).argmin())])))
    if not found:
        return None
    p_value, target = min(found)
    return Drift(int((~still).sum()), len(moved), min(1.0, len(found) * p_value), target)


__all__ = ["STILL_TESTS", "TAUGHT_TESTS", "Drift", "drift"]
