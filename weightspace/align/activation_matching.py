"""Matching by what neurons do on real inputs.

Li et al. 2016 ("Convergent learning") lay neurons on those whose activations correlate most; Ainsworth et al. 2023
("Git Re-Basin", section 3.1) solve it layer by layer as linear assignments. Here a layer is a free factor of the
wiring, and its activations are all intermediate values that carry it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor

from weightspace.align.alignment import Found
from weightspace.wiring.matching import assign
from weightspace.wiring.recording import Value, select, values
from weightspace.wiring.replay import Inputs
from weightspace.wiring.wiring import Permutation, Wiring

Measure = Literal["correlation", "inner"]


def activation_matching(
    a: Mapping[str, Tensor], b: Mapping[str, Tensor], wiring: Wiring, *, inputs: Inputs, seed: int = 0,
    at: Literal["post", "pre", "all"] = "post", measure: Measure = "correlation", positions: int = 8192,
    batch: int | None = 64,
) -> Found:  # fmt: skip
    """The permutations that pair the elements of every factor by their activations on ``inputs``.

    ``at``: activations after the nonlinear function, before it, or all intermediate values. ``measure``: Pearson
    correlation, or the inner product (least squares, as Ainsworth et al. have it). ``positions``: samples of each
    value at most. Heads are matched by their attention scores before the channels inside them are.
    """
    of_a = values(wiring, a, inputs, positions=positions, batch=batch, seed=seed)
    of_b = values(wiring, b, inputs, positions=positions, batch=batch, seed=seed)
    index: dict[str, Tensor] = {}
    costs: dict[str, Tensor] = {}
    unseen = []
    for name in sorted(wiring.free, key=lambda n: len(wiring.free[n].over)):
        if wiring.free[name].size < 2:
            continue
        if name not in of_a:
            unseen.append(name)
            continue
        now = Permutation(index, wiring.factors)
        alike = similarity(select(of_a[name], at), select(of_b[name], at), now, wiring.free[name].over, measure)
        index[name] = assign(alike)
        costs[name] = alike.gather(-1, index[name].unsqueeze(-2).expand(alike.shape))
    return Found(Permutation(index, wiring.factors), costs, {"not seen": tuple(unseen)})


def similarity(
    of_a: Sequence[Value], of_b: Sequence[Value], moved: Permutation, over: Sequence[str], measure: Measure
) -> Tensor:
    """How alike the elements of a factor are, ``(*over, n_a, n_b)``, the mean over its values.

    ``moved`` says which elements of the factors it is fibred over have been laid on which.
    """
    total: Tensor | None = None
    for x, y in zip(of_a, of_b, strict=True):
        one, two = x.samples.double(), y.samples.double()
        if over:
            two = two.movedim(0, -1)[tuple(moved._grid(list(over)))].movedim(-1, 0)
        one, two = (_standard(t, measure).movedim(0, -1) for t in (one, two))
        value = one @ two.transpose(-1, -2)
        total = value if total is None else total + value
    assert total is not None
    return total / len(of_a)


def _standard(samples: Tensor, measure: Measure) -> Tensor:
    """Columns of unit length, centred for a correlation; those that never vary count nothing."""
    if measure == "inner":
        # Values of several places count alike, whatever their scale is.
        return samples / samples.square().sum(0).mean().sqrt().clamp_min(1e-30)
    centred = samples - samples.mean(0)
    length = centred.square().sum(0).sqrt()
    return torch.where(length > 1e-12, centred / length.clamp_min(1e-30), torch.zeros_like(centred))


__all__ = ["activation_matching", "similarity"]
