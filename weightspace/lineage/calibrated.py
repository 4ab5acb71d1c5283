"""Coefficients of the model of descent, as ``python tests/benchmarks/lineage.py --calibrate`` prints them.

Fitted to the families of ``weightspace.lineage.training`` alone.
"""

from __future__ import annotations

from weightspace.lineage.tree import Weights

WEIGHTS = Weights(
    inside=(
        -1.186, 0.588, 0.886, 0.255, -0.048, -1.465, -0.17, 0.814, -1.42, 0.456, 1.611, 0.331, -0.429, -0.248, 1.165,
        1.397, -0.607,
    ),
    outside=(-0.341, -3.095, -0.109),
)  # fmt: skip
DIRECTION = 3.0
"""Log odds, per unit of drift, that an edge leads this way and not back."""

__all__ = ["DIRECTION", "WEIGHTS"]
