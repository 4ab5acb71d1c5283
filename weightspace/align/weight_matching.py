"""Weight matching (Ainsworth et al. 2023, "Git Re-Basin"), with more than one start."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from weightspace.align.alignment import Found
from weightspace.wiring.matching import Matching, float32, tensor_weights
from weightspace.wiring.wiring import Wiring


def weight_matching(
    a: Mapping[str, Tensor], b: Mapping[str, Tensor], wiring: Wiring, *, seed: int = 0, sweeps: int = 100,
    weighting: str = "plain",
) -> Found:  # fmt: skip
    """The group element of largest inner product of weights that coordinate ascent finds.

    ``sweeps``: passes over all factors at most. ``weighting``: see ``weightspace.wiring.matching.tensor_weights``.
    """
    fixed, moving = float32(a), float32(b)
    weights = tensor_weights(wiring, fixed, moving, weighting)
    best: Matching | None = None
    tried = []
    for start in ("as it is", "anchored"):
        found = Matching(wiring, fixed, moving, weights)
        if start == "anchored":
            found.anchored()
        count = found.ascend(torch.Generator().manual_seed(seed), sweeps)
        tried.append({"start": start, "cosine": found.objective / found.unit, "sweeps": count})
        if best is None or found.objective > best.objective:
            best = found
    assert best is not None
    return Found(best.permutation, costs_of(best), {"starts": tried})


def costs_of(matching: Matching) -> dict[str, Tensor]:
    """The similarities of every factor as they are now."""
    return {f: matching.similarity(f) for f in matching.factors}
