"""The straight-through estimator of Ainsworth et al. 2023 ("Git Re-Basin", section 3.3).

A copy of network a is trained so that the average of a with b's weights, permuted as near to the copy as weight
matching gets, does well: the forward pass sees the permuted b, the gradient goes to the copy.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves

from weightspace.align.alignment import Found
from weightspace.align.repair import reset_statistics
from weightspace.wiring.matching import Matching, float32, tensor_weights
from weightspace.wiring.replay import Inputs, as_float32, batches, prepared, program_of
from weightspace.wiring.wiring import Wiring

Loss = Callable[[Any, tuple[Any, ...]], Tensor]


def straight_through(
    a: Mapping[str, Tensor], b: Mapping[str, Tensor], wiring: Wiring, *, inputs: Inputs, seed: int = 0,
    loss: Loss | None = None, steps: int = 60, rate: float = 0.1, batch: int = 128,
) -> Found:  # fmt: skip
    """The permutation, of all that the training passes, whose network half way has the least loss on ``inputs``.

    ``loss(outputs, inputs)``: what training minimises, over the arguments of one run; without it, the squared distance
    of the outputs half way to the mean of both networks' outputs, which needs no labels. ``rate``: step of Adam
    relative to each tensor's root mean square. Where there are batch norms their statistics are measured half way
    at every step.
    """
    fixed, moving = float32(a), float32(b)
    weights = tensor_weights(wiring, fixed, moving)
    start = Matching(wiring, fixed, moving, weights)
    start.anchored()
    start.ascend(sweeps=20)
    wanted = agreement(wiring, a, b, inputs, batch=batch, seed=seed, loss=loss)
    judged = agreement(wiring, a, b, inputs, batch=4 * batch, seed=seed + 1, loss=loss, same=True)
    latent = {n: t.clone().requires_grad_() for n, t in fixed.items() if n in weights}
    scale = {n: float(t.square().mean().sqrt()) for n, t in fixed.items()}
    groups = [{"params": [t], "lr": rate * max(scale[n], 1e-8)} for n, t in latent.items()]
    optimiser = torch.optim.Adam(groups, betas=(0.9, 0.99))
    found = best = start.permutation
    least = float("inf")
    seen: dict[str, float] = {}
    for _ in range(steps):
        moved = float32(wiring.apply(found, b))
        middle = {
            n: 0.5 * (t + (latent[n] + (moved[n] - latent[n]).detach() if n in latent else moved[n]))
            for n, t in fixed.items()
        }
        key = repr([p.tolist() for p in found.index.values()])
        if key not in seen:
            with torch.no_grad():
                seen[key] = float(judged({n: t.detach() for n, t in middle.items()}))
        if seen[key] < least:
            least, best = seen[key], found
        value = wanted(middle)
        optimiser.zero_grad()
        value.backward()
        optimiser.step()
        nearest = Matching(wiring, {n: t.detach() for n, t in latent.items()}, moving, weights, start=found)
        nearest.ascend(sweeps=5)
        found = nearest.permutation
    return Found(best, {}, {"loss": least, "permutations tried": len(seen)})


def agreement(
    wiring: Wiring, a: Mapping[str, Tensor], b: Mapping[str, Tensor], inputs: Inputs, *, batch: int, seed: int,
    loss: Loss | None = None, same: bool = False,
) -> Callable[[dict[str, Tensor]], Tensor]:  # fmt: skip
    """A loss of tensors on inputs, differentiable: ``loss``, or how far the outputs are from the two networks' mean.

    Every call takes the next batch, in an order that ``seed`` fixes (``same``: always the first). Tensors that are
    missing are a's; batch norms are measured on the batch.
    """
    program = program_of(wiring)
    one, two = prepared(wiring, a), prepared(wiring, b)
    runs = list(batches(inputs, batch))
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(runs), generator=generator).tolist()
    has_norms = any(r == "variance" for r in wiring.roles.values())
    targets: dict[int, list[Tensor]] = {}
    calls = [0]

    def outputs(tensors: Mapping[str, Tensor], args: tuple[Any, ...]) -> Any:
        return program.run(tensors, *args, **dict(program.kwargs))

    def value(tensors: dict[str, Tensor]) -> Tensor:
        k = order[0 if same else calls[0] % len(order)]
        calls[0] += 1
        args = as_float32(runs[k])
        full: dict[str, Tensor] = {**one, **{n: t for n, t in tensors.items() if n in one}}
        if has_norms:
            measured = reset_statistics(wiring, {n: t.detach() for n, t in full.items()}, args, batch=None)
            full |= {n: measured[n] for n, r in wiring.roles.items() if r in ("mean", "variance") and n in full}
        out = outputs(full, args)
        if loss is not None:
            return loss(out, args)
        if k not in targets:
            with torch.no_grad():
                pair = [[x for x in tree_leaves(outputs(t, args)) if _real(x)] for t in (one, two)]
            targets[k] = [(x + y) / 2 for x, y in zip(*pair, strict=True)]
        mine = [x for x in tree_leaves(out) if _real(x)]
        return torch.stack(
            [F.mse_loss(x, y) / y.var().clamp_min(1e-12) for x, y in zip(mine, targets[k], strict=True)]
        ).sum()

    return value


def _real(x: Any) -> bool:
    return isinstance(x, Tensor) and x.is_floating_point() and x.numel() > 1


__all__ = ["agreement", "straight_through"]
