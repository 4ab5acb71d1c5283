"""Sinkhorn re-basin (Guerrero Peña et al. 2023): soft permutations of all factors at once, by gradient descent.

Every factor has a matrix of scores; alternately normalising the rows and columns of their exponentials gives a doubly
stochastic matrix, which takes the permutation's place. All are trained together, then rounded to the nearest
permutations.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Literal

import torch
from torch import Tensor

from weightspace.align.alignment import Found
from weightspace.align.barrier import interpolate
from weightspace.align.maps import Map, carry
from weightspace.align.straight_through import agreement
from weightspace.errors import AlignmentError
from weightspace.wiring.matching import assign, float32, inner, tensor_weights
from weightspace.wiring.replay import Inputs
from weightspace.wiring.wiring import Permutation, Wiring


def sinkhorn(
    a: Mapping[str, Tensor], b: Mapping[str, Tensor], wiring: Wiring, *, inputs: Inputs | None = None, seed: int = 0,
    cost: Literal["weights", "middle"] = "weights", steps: int = 150, rate: float = 0.3, temperature: float = 1.0,
    iterations: int = 12, batch: int = 64,
) -> Found:  # fmt: skip
    """Permutations from ``steps`` of Adam (``rate``) on the scores of all factors.

    ``cost``: ``"weights"`` pulls the weights together (the paper's L2 cost, without data); ``"middle"`` makes the
    network half way compute on ``inputs`` what the two do on average. ``temperature`` divides the scores and falls to a
    tenth over the steps; ``iterations`` of normalisation each time.
    """
    fixed, moving = float32(a), float32(b)
    weights = tensor_weights(wiring, fixed, moving)
    wanted: Callable[[dict[str, Tensor]], Tensor] | None = None
    if cost == "middle":
        if inputs is None:
            raise AlignmentError('cost="middle" runs the network half way; pass inputs=, or take cost="weights"')
        wanted = agreement(wiring, a, b, inputs, batch=batch, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    scores: dict[str, Tensor] = {}
    for name, factor in wiring.free.items():
        if factor.size > 1:
            shape = (*(wiring.factors[o].size for o in factor.over), factor.size, factor.size)
            scores[name] = (0.1 * torch.randn(shape, generator=generator)).requires_grad_()
    if not scores:
        return Found(wiring.identity())
    unit = sum(w * float(fixed[n].norm() * moving[n].norm()) for n, w in weights.items()) or 1.0
    optimiser = torch.optim.Adam(list(scores.values()), lr=rate)
    best, index = -float("inf"), {}
    for step in range(steps):
        heat = temperature * 0.1 ** (step / max(steps - 1, 1))
        soft = {n: balanced(s / heat, iterations) for n, s in scores.items()}
        mixed = carry(moving, wiring, {n: Map(m, m) for n, m in soft.items()}, only=list(weights))
        if wanted is None:
            loss = -torch.stack([w * (fixed[n] * mixed[n]).sum() for n, w in weights.items()]).sum() / unit
        else:
            loss = wanted({n: torch.lerp(t, mixed.get(n, moving[n]), 0.5) for n, t in fixed.items()})
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        if step % 10 == 9 or step == steps - 1:
            now = {n: assign(m.detach()) for n, m in soft.items()}
            moved = wiring.apply(Permutation(now, wiring.factors), moving)
            with torch.no_grad():
                value = (
                    inner(fixed, moved, weights) / unit
                    if wanted is None
                    else -float(wanted(interpolate(fixed, moved, 0.5)))
                )
            if value > best:
                best, index = value, now
    costs = {n: m.detach().gather(-1, index[n].unsqueeze(-2).expand(m.shape)) for n, m in soft.items()}
    return Found(Permutation(index, wiring.factors), costs, {"cost": cost, "value": best})


def balanced(scores: Tensor, iterations: int) -> Tensor:
    """Doubly stochastic matrices ``(…, n, n)`` from scores: rows and columns of the exponentials made to sum to 1."""
    # One round on logarithms keeps the exponentials in range; the others are products of a matrix and a vector.
    wide = scores.double()
    wide = wide - wide.logsumexp(-1, keepdim=True)
    kernel = (wide - wide.logsumexp(-2, keepdim=True)).exp()
    columns = torch.ones_like(kernel[..., :1, :])
    rows = columns.transpose(-1, -2)
    for _ in range(iterations - 1):
        rows = 1 / (kernel @ columns.transpose(-1, -2)).clamp_min(1e-200)
        columns = 1 / (rows.transpose(-1, -2) @ kernel).clamp_min(1e-200)
    found: Tensor = (rows * kernel * columns).to(scores.dtype)
    return found


__all__ = ["balanced", "sinkhorn"]
