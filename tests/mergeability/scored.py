"""``ws.score`` with the small prior, on a family that it has not seen."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import weightspace as ws
from weightspace.mergeability.report import MergeReport

sys.path.insert(0, str(Path(__file__).parent))
import small
from networks import wiring

NEW = 3
"""A family that the small prior has not seen."""


def score(models: Any, base: Any = None, **kwargs: Any) -> MergeReport:
    """``ws.score`` by the small prior, without the preflight."""
    return ws.score(models, base, **{"prior": small.prior(), "wiring": wiring("mlp"), "checks": False, **kwargs})


def rows(*keep: tuple[str, ...], method: str = "ties") -> list[dict[str, Any]]:
    """Measured merges of the family."""
    return [m.to_row() for m in small.measured(NEW) if m.method == method and m.models in keep]
