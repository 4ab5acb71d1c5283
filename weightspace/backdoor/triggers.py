"""A trigger for a class, found through the network itself: what one change makes of many inputs.

Images get a pattern through a mask, both found by descent (Neural Cleanse, Wang et al. 2019); sentences get words, the
best of which are found one after the other by trying. Where no inputs are given, some are made up from what the
network takes for its classes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from weightspace.backdoor.tokens import vocabulary
from weightspace.errors import WeightspaceError
from weightspace.wiring.replay import program_of
from weightspace.wiring.wiring import Wiring

STEPS = 60
CLIMBED = 40
"""Steps in which made up inputs climb to their class."""
WORDS = 3
"""Words of a trigger of sentences, at most."""
SPARSE = 10.0
"""Weight of the mask's mean beside the cross-entropy."""
NOISE = 48
"""Inputs that are made up where none are given."""
TRIED = 20_000
"""Sentences that are tried for each word of a trigger."""

Run = Callable[[Tensor], Tensor]


@dataclass(frozen=True, eq=False)
class Trigger:
    """Inputs without and with a trigger, ``before`` and ``after (n, …)``, for class ``target``.

    ``loss``: cross-entropy of the target with the trigger on, plus what the trigger's size costs; ``success``: share of
    the inputs that become the target.
    """

    target: int
    before: Tensor
    after: Tensor
    loss: float
    success: float


def made_up(wiring: Wiring, run: Run, classes: int, count: int = NOISE, seed: int = 0) -> Tensor:
    """Inputs of the network's form without data, about ``count`` of them, as many for each class.

    Images begin as smooth noise and climb to their class, staying smooth; other numbers as normal noise. Words are
    random.
    """
    args = program_of(wiring).args
    example = next((x for x in args if isinstance(x, Tensor) and x.dim() >= 2), None)
    if example is None:
        raise WeightspaceError(f"the network ({wiring.origin}) takes no batch of numbers; give a few inputs (inputs=)")
    generator = torch.Generator().manual_seed(seed)
    shape = tuple(example.shape[1:])
    if not example.is_floating_point():
        return torch.randint(1, words_of(wiring), (count, *shape), generator=generator)
    each = max(1, count // classes)
    wanted = torch.arange(classes).repeat_interleave(each)
    image = len(shape) == 3
    if image:
        coarse = torch.randn(len(wanted), shape[0], *(-(-n // 2) for n in shape[1:]), generator=generator)
        x = 1.5 * F.interpolate(coarse, size=shape[1:], mode="bilinear")
    else:
        x = torch.randn(len(wanted), *shape, generator=generator)
    x = x.requires_grad_()
    optimiser = torch.optim.Adam([x], lr=0.1)
    with torch.enable_grad():
        for _ in range(CLIMBED):
            loss = F.cross_entropy(run(x), wanted) + 0.01 * x.square().mean()
            if image:
                loss = loss + x.diff(dim=-1).abs().mean() + x.diff(dim=-2).abs().mean()
            (x.grad,) = torch.autograd.grad(loss, [x])
            optimiser.step()
    return x.detach()


def words_of(wiring: Wiring) -> int:
    """How many words a network knows. Raises ``WeightspaceError`` for one that looks none up."""
    if not (words := vocabulary(wiring)):
        raise WeightspaceError(f"the network ({wiring.origin}) takes whole numbers and looks nothing up; give inputs")
    return words


def inverted(run: Run, x: Tensor, targets: list[int], *, words: int = 0, steps: int = STEPS,
             seed: int = 0) -> list[Trigger]:  # fmt: skip
    """A trigger for each of ``targets``, over inputs ``x (n, …)``; ``run`` gives logits (n, classes).

    Floating-point inputs are descended on, all targets at once; whole numbers below ``words`` are tried.
    """
    if not x.is_floating_point():
        return [_searched(run, x, target, words, seed) for target in targets]
    count, shape = len(targets), x.shape[1:]
    low, high = float(x.min()), float(x.max())
    wanted = torch.tensor(targets).repeat_interleave(len(x))
    # One mask for all channels of an image; flat inputs have one entry each.
    spread = (1, *shape[1:]) if len(shape) > 1 else shape
    mask = torch.full((count, 1, *spread), -2.0).requires_grad_()
    pattern = torch.zeros(count, 1, *shape).requires_grad_()
    optimiser = torch.optim.Adam([mask, pattern], lr=0.1)

    def stamped() -> Tensor:
        m = mask.sigmoid()
        return ((1 - m) * x[None] + m * (low + (high - low) * pattern.sigmoid())).flatten(0, 1)

    with torch.enable_grad():
        for _ in range(steps):
            loss = F.cross_entropy(run(stamped()), wanted, reduction="none").view(count, -1).mean(1)
            loss = loss + SPARSE * mask.sigmoid().flatten(1).mean(1)
            gradients = torch.autograd.grad(loss.sum(), [mask, pattern])
            mask.grad, pattern.grad = gradients
            optimiser.step()
    with torch.no_grad():
        after = stamped()
        out = run(after)
        loss = F.cross_entropy(out, wanted, reduction="none").view(count, -1).mean(1)
        loss = loss + SPARSE * mask.sigmoid().flatten(1).mean(1)
        hit = (out.argmax(1) == wanted).view(count, -1).float().mean(1)
        each = after.view(count, len(x), *shape)
    return [Trigger(t, x, each[i], float(loss[i]), float(hit[i])) for i, t in enumerate(targets)]


@torch.no_grad()
def _searched(run: Run, x: Tensor, target: int, words: int, seed: int) -> Trigger:
    """Words put at the front of sentences, each the best of those tried."""
    generator = torch.Generator().manual_seed(seed)
    few = x[torch.randperm(len(x), generator=generator)[: max(2, min(len(x), 8))]]
    candidates = torch.arange(1, words)
    most = max(1, TRIED // len(few))
    if len(candidates) > most:
        candidates = candidates[torch.randperm(len(candidates), generator=generator)[:most]]
    put: list[int] = []
    least = float("inf")
    for _ in range(min(WORDS, x.shape[1] - 1)):
        losses = []
        for part in candidates.split(max(1, 512 // len(few))):
            tried = few.repeat(len(part), 1)
            tried[:, : len(put)] = torch.tensor(put, dtype=x.dtype)
            tried[:, len(put)] = part.repeat_interleave(len(few)).to(x.dtype)
            logits = run(tried)
            loss = F.cross_entropy(logits, torch.full((len(tried),), target), reduction="none")
            losses.append(loss.view(len(part), -1).mean(1))
        found = torch.cat(losses)
        if float(found.min()) > 0.7 * least:
            break
        least = float(found.min())
        put.append(int(candidates[found.argmin()]))
    after = x.clone()
    after[:, : len(put)] = torch.tensor(put, dtype=x.dtype)
    out = run(after)
    loss = F.cross_entropy(out, torch.full((len(x),), target))
    return Trigger(target, x, after, float(loss) + SPARSE * len(put) / x.shape[1],
                   float((out.argmax(1) == target).float().mean()))  # fmt: skip


__all__ = ["NOISE", "STEPS", "Trigger", "inverted", "made_up", "words_of"]
