"""Coefficients of the model of descent, in three regimes, and of its confidences: ``calibrated.json``.

Which regime a family is of is told by its likelihood, less ``handicap``, so that the first holds unless another
explains a family clearly better. All numbers are fitted to the families of ``weightspace.lineage.training`` and to
recorded trees of the recipes ``families`` (its MNIST populations alone) and ``merging`` (its ``mlp`` and ``cnn``
alone), and written by one command, which the file names.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from weightspace.lineage.tree import Weights

FILE = Path(__file__).with_name("calibrated.json")


@dataclass(frozen=True)
class Regime:
    """Coefficients for one way in which families grow, and how much likelier it has to make one."""

    name: str
    weights: Weights
    handicap: float


_READ = json.loads(FILE.read_text())
REGIMES = tuple(
    Regime(r["name"], Weights(tuple(r["deep"]), tuple(r["top"])), float(r["handicap"])) for r in _READ["regimes"]
)
CONFIDENCE: tuple[float, ...] = tuple(_READ["confidence"])
"""Weights of ``confidence.FEATURES``."""
DIRECTION: tuple[float, ...] = tuple(_READ["direction"])
"""Weights of ``confidence.WAY``."""

__all__ = ["CONFIDENCE", "DIRECTION", "FILE", "REGIMES", "Regime"]
