"""Coefficients of the model of descent, in three regimes.

Which regime a family is of is told by its likelihood, less ``handicap``, so that the first holds unless another
explains a family clearly better. Fitted to the families of ``weightspace.lineage.training`` and to recorded trees of
the recipes ``families`` (its MNIST populations alone) and ``merging`` (its ``mlp`` and ``cnn`` alone); made anew by
``python tests/benchmarks/lineage.py --calibrate --with FAMILIES:mnist --with MERGING:mlp --with MERGING:cnn-0``.
"""

from __future__ import annotations

from dataclasses import dataclass

from weightspace.lineage.tree import Weights

_TOP = (-0.189, 1.281, 0.838, -0.491, 4.32, -0.237)


@dataclass(frozen=True)
class Regime:
    """Coefficients for one way in which families grow, and how much likelier it has to make one."""

    name: str
    weights: Weights
    handicap: float


REGIMES = (
    # All families; checkpoints of a run among them.
    Regime(
        "steps of any kind",
        Weights(
            (1.491, 1.824, -0.883, -0.157, -1.881, -1.593, 1.652, -0.724, -0.422, 3.807, -0.331, -0.458, 0.723), _TOP
        ),
        0.0,
    ),
    # Recorded trees alone, whose networks were fine-tuned to a task.
    Regime(
        "tasks learnt one after the other",
        Weights(
            (-0.613, 2.451, 0.693, -0.138, -3.387, -0.501, 1.466, -2.117, -0.135, 1.16, 1.557, -0.609, -0.558), _TOP
        ),
        1.0,
    ),
    # Of these the stars alone: many children of one base, several of which learnt the same.
    Regime(
        "many children of one base",
        Weights((-3.002, 1.337, -0.04, 0.0, -1.721, -0.002, 1.482, -1.983, 0.338, 0.338, -0.737, -0.499, -0.857), _TOP),
        4.0,
    ),
)  # fmt: skip
DIRECTION = 0.96
"""Log odds, per unit of drift, that an edge leads this way and not back."""

__all__ = ["DIRECTION", "REGIMES", "Regime"]
