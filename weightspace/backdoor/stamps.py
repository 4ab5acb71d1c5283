"""The square that sends most inputs to a class, whatever they show: a search with the network, without data.

For every class squares are placed where a first-order estimate promises most, and the best of them are improved by
ascent, fewer and fewer the longer it takes (successive halving). What the square does to other pictures than those it
was found on is what counts: a trigger works on all of them. One more search wants inputs to leave their class, wherever
to: a backdoor without a target (all-to-all) shows there.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from weightspace.backdoor.margins import margins
from weightspace.pictures import KINDS, pictures

Logits = Callable[[Tensor], Tensor]

POOL = 96
"""Half the pictures of each kind that inputs are chosen from."""
FEWEST = 8
"""Examples from which on they are used in place of pictures that are made up."""
BASE, HELD = 12, 24
"""Inputs that a square is looked for on, and others that it is judged on."""
ROUNDS = ((16, 0), (5, 6), (2, 16))
"""How many squares of each class go into a round, and its steps."""
SHARE = 3.75
"""Sides of an image in one of the square."""
MEASURED = ("stamp", "stamp_held", "stamp_least", "stamp_share")
STAMP_TESTS = tuple(f"{name}_{kind}" for kind in KINDS for name in MEASURED)
STAMP_NUMBERS = tuple(f"{name}_{kind}" for kind in KINDS for name in ("away", "away_spread"))


def stamp_tests(
    logits: Logits, shape: tuple[int, int, int], classes: int, targets: Tensor, inputs: Tensor | None = None
) -> tuple[dict[str, Tensor], dict[str, float]]:
    """``stamped`` on each kind of picture, or on ``inputs`` in their place: ``STAMP_TESTS`` and ``STAMP_NUMBERS``."""
    tests: dict[str, Tensor] = {}
    numbers: dict[str, float] = {}
    for kind in KINDS:
        pool = pictures(kind, 2 * POOL, shape, seed=2) if inputs is None or len(inputs) < FEWEST else inputs.float()
        found, whole = stamped(logits, shape, classes, targets, base_of(logits, pool))
        tests |= {f"{k}_{kind}": v for k, v in found.items()}
        numbers |= {f"{k}_{kind}": v for k, v in whole.items()}
    return tests, numbers


def base_of(logits: Logits, pool: Tensor) -> Tensor:
    """``BASE + HELD`` inputs that the network takes for as many different classes as it can, surest first."""
    with torch.no_grad():
        sure, said = margins(logits(pool)).max(1)
    order = sure.argsort(descending=True).tolist()
    seen: dict[int, int] = {}
    rank = {}
    for i in order:
        rank[i] = seen[int(said[i])] = seen.get(int(said[i]), -1) + 1
    chosen = sorted(order, key=lambda i: rank[i])[: BASE + HELD]
    return pool[chosen]


def stamped(
    logits: Logits, shape: tuple[int, int, int], classes: int, targets: Tensor, x: Tensor
) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Tests ``(targets,)`` float64 on inputs ``x``, and numbers of the network.

    ``stamp``, ``stamp_held``: mean margin under the best square, on the inputs it was found on and on others, in
    deviations of margins without it; ``stamp_least``: the margin that nine of ten others exceed; ``stamp_share``: mean
    of the logistic function of others' margins. ``away``: share of others that leave their class under the square that
    was looked for to that end; ``away_spread``: that, times the entropy of where they go relative to its largest value.
    """
    with torch.no_grad():
        plain = margins(logits(x))
    unit, said = float(plain.std().clamp_min(1e-12)), plain.argmax(1)
    some = min(BASE, len(x) // 2)
    base, held = x[:some], x[some:]
    low, high = float(x.min()), float(x.max())
    side = max(3, round(min(shape[1:]) / SHARE))
    # Rows: one for each target, and one that wants inputs to leave their class.
    wants = torch.cat([targets, targets.new_tensor([-1])])

    def reach(z: Tensor, own: Tensor, rows: Tensor) -> Tensor:
        """Margins ``(rows, n)`` of what each row wants; ``z (rows * n, classes)``, ``own (n,)``."""
        m = margins(z).view(len(rows), -1, classes)
        index = torch.where(rows[:, None] < 0, own[None], rows[:, None].expand(-1, m.shape[1]))
        picked = m.gather(2, index[:, :, None])[:, :, 0]
        return torch.where(rows[:, None] < 0, -picked, picked)

    masks, patterns = _promising(logits, base, said[:some], wants, side, low, high, reach)
    count = len(wants)
    score = torch.zeros(count, masks.shape[1])
    for number, (squares, steps) in enumerate(ROUNDS):
        if number:
            keep = score.topk(min(squares, score.shape[1]), 1).indices
            take = keep[:, :, None, None, None]
            masks = masks.gather(1, take.expand(-1, -1, *masks.shape[2:]))
            patterns = patterns.gather(1, take.expand(-1, -1, *patterns.shape[2:]))
        rows = wants.repeat_interleave(masks.shape[1])
        patterns, score = _improved(
            logits, base, said[:some], rows, masks, patterns, steps, (low, high), unit, reach, side
        )
        score = score.view(count, -1)
    best = score.argmax(1)
    each = torch.arange(count)
    mask, pattern = masks[each, best], patterns[each, best]
    with torch.no_grad():
        z = logits(_put(held, mask, pattern).flatten(0, 1))
        others = reach(z, said[some:], wants)
    # Inputs that are of the class as they are say nothing.
    counted = (said[some:][None] != wants[:, None]).double()
    amount = counted.sum(1).clamp_min(1)
    scaled = others.double() / unit
    least = torch.where(counted > 0, scaled, torch.inf).sort(1).values[:, max(0, len(held) // 10)]
    tests = {
        "stamp": score[each, best].double() / unit, "stamp_held": (scaled * counted).sum(1) / amount,
        "stamp_least": torch.where(least.isfinite(), least, 0.0),
        "stamp_share": (others.double().sigmoid() * counted).sum(1) / amount,
    }  # fmt: skip
    went = z.view(count, len(held), classes)[-1].argmax(1)
    left = went != said[some:]
    shares = torch.bincount(went[left], minlength=classes).double() / max(1, int(left.sum()))
    entropy = float(-(shares * shares.clamp_min(1e-12).log()).sum()) / float(torch.tensor(float(classes)).log())
    away = float(left.double().mean())
    return {k: v[:-1] for k, v in tests.items()}, {"away": away, "away_spread": away * entropy}


Reach = Callable[[Tensor, Tensor, Tensor], Tensor]


def _promising(
    logits: Logits, base: Tensor, said: Tensor, wants: Tensor, side: int, low: float, high: float, reach: Reach
) -> tuple[Tensor, Tensor]:
    """Squares of every row that a first-order estimate prefers, none over another: masks and patterns."""
    rows, n = len(wants), len(base)
    x = base[None].expand(rows, *base.shape).flatten(0, 1).clone().requires_grad_()
    (slope,) = torch.autograd.grad(reach(logits(x), said, wants).sum(), x)
    slope = slope.view(rows, n, *base.shape[1:])
    gain = torch.maximum((slope * (high - base)).mean(1), (slope * (low - base)).mean(1)).sum(1)
    windows = F.avg_pool2d(gain[:, None], side, 1)[:, 0]
    squares = ROUNDS[0][0]
    masks = torch.zeros(rows, squares, 1, *base.shape[2:])
    around = max(1, side // 2)
    for row, heat in enumerate(windows):
        for k in range(squares):
            r, c = divmod(int(heat.argmax()), heat.shape[1])
            masks[row, k, :, r : r + side, c : c + side] = 1
            heat[max(0, r - around) : r + around + 1, max(0, c - around) : c + around + 1] = -torch.inf
    pattern = torch.where(slope.mean(1) > 0, high, low)
    return masks, pattern[:, None].expand(-1, squares, *base.shape[1:]).clone()


def _put(x: Tensor, mask: Tensor, pattern: Tensor) -> Tensor:
    """Inputs ``(n, …)`` with every square on: ``(squares, n, …)``."""
    return x[None] * (1 - mask[:, None]) + pattern[:, None] * mask[:, None]


def _improved(
    logits: Logits, base: Tensor, said: Tensor, rows: Tensor, masks: Tensor, patterns: Tensor, steps: int,
    bounds: tuple[float, float], unit: float, reach: Reach, side: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Patterns after some steps of ascent, and the mean margins ``(squares,)`` that they reach."""
    mask, pattern = masks.flatten(0, 1), patterns.flatten(0, 1)
    low, high = bounds
    speed = torch.zeros_like(pattern)
    counted = (said[None] != rows[:, None]).float()
    for step in range(steps):
        given = pattern.clone().requires_grad_()
        reached = reach(logits(_put(base, mask, given).flatten(0, 1)), said, rows)
        # What is moved far enough counts no more, so that a square serves all inputs.
        (slope,) = torch.autograd.grad((reached.clamp(max=2 * unit) * counted).sum(), given)
        size = slope.flatten(1).norm(dim=1).clamp_min(1e-12).view(-1, 1, 1, 1)
        speed = 0.7 * speed + slope / size
        pattern = (pattern + 0.2 * (high - low) * side * (1 - step / steps) * speed).clamp(low, high)
    with torch.no_grad():
        reached = reach(logits(_put(base, mask, pattern).flatten(0, 1)), said, rows)
    mean = (reached * counted).sum(1) / counted.sum(1).clamp_min(1)
    return pattern.view_as(patterns), mean


__all__ = ["STAMP_NUMBERS", "STAMP_TESTS", "base_of", "stamp_tests", "stamped"]
