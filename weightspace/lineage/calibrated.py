"""Coefficients of the model of descent.

Fitted to the families of ``weightspace.lineage.training`` and to recorded trees of the recipes ``families`` (its MNIST
populations alone) and ``merging`` (its ``mlp`` and ``cnn`` alone); made anew by ``python tests/benchmarks/lineage.py
--calibrate --with FAMILIES:mnist --with MERGING:mlp --with MERGING:cnn-0``.
"""

from __future__ import annotations

from weightspace.lineage.tree import Weights

WEIGHTS = Weights(
    deep=(1.491, 1.824, -0.883, -0.157, -1.881, -1.593, 1.652, -0.724, -0.422, 3.807, -0.331, -0.458, 0.723),
    top=(-0.189, 1.281, 0.838, -0.491, 4.32, -0.237),
)
DIRECTION = 0.96
"""Log odds, per unit of drift, that an edge leads this way and not back."""

__all__ = ["DIRECTION", "WEIGHTS"]
