"""What can be done to each class through the inputs: margins reached from noise, without any data.

A network with a backdoor has a short way to its target class from everywhere. Three tests look for it, all classes and
starts in one batch, with the network as it is (``wiring.program``):

- the largest margin that gradient ascent reaches in the box of inputs, the maximum-margin statistic of Wang, Xiang,
  Miller & Kesidis ("MM-BD", IEEE S&P 2024), anomalous for the target class whatever the trigger looks like;
- the mean margin that one bounded perturbation reaches on inputs of all classes (universal perturbations, after
  Moosavi-Dezfooli et al. 2017, Wang et al. 2020 for networks without data). The inputs are noise and what MM-BD found
  for each class;
- the same within a small square, placed where the slope is steepest.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

Logits = Callable[[Tensor], Tensor]

NOISE = 64
"""Random inputs on which outputs are described."""
STARTS = 2
"""Random starts for each class."""
CLIMB = 24
"""Steps towards the largest margin."""
PUSH = 10
"""Steps towards a universal perturbation."""
BASE = 10
"""Inputs of noise and of other classes that one perturbation is to move."""
MOST = 48
"""Classes whose margin is looked for; of more those that noise leads to."""
PUSHED = 16
"""Classes that perturbations are looked for; of more half are those of the largest margins, half the others."""


@dataclass(frozen=True)
class Box:
    """Bounds of the inputs: ``low`` and ``high``, broadcastable to one input."""

    low: Tensor
    high: Tensor

    @property
    def width(self) -> Tensor:
        return self.high - self.low

    def clamp(self, x: Tensor) -> Tensor:
        return torch.minimum(torch.maximum(x, self.low), self.high)

    def noise(self, count: int, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
        """Uniform in the box, ``(count, *shape)``."""
        return self.low + self.width * torch.rand(count, *shape, generator=generator)


def margins(z: Tensor) -> Tensor:
    """Of every class its logit less the largest other one, ``(..., classes)``."""
    top = z.topk(2, dim=-1)
    first, second = top.values[..., :1], top.values[..., 1:]
    return z - torch.where(torch.arange(z.shape[-1]) == top.indices[..., :1], second, first)


def climb(logits: Logits, start: Tensor, targets: Tensor, box: Box, steps: int = CLIMB) -> tuple[Tensor, Tensor]:
    """Margins ``(n,)`` of ``targets (n,)`` that ascent from ``start (n, ...)`` reaches in the box; where it ends."""
    x, speed = start.clone().requires_grad_(), torch.zeros_like(start)
    best = torch.full((len(start),), -torch.inf)
    last = start
    for step in range(steps):
        reached = margins(logits(x)).gather(1, targets[:, None])[:, 0]
        best = torch.maximum(best, reached.detach())
        (slope,) = torch.autograd.grad(reached.sum(), x)
        with torch.no_grad():
            speed = 0.9 * speed + slope / _each(slope.flatten(1).norm(dim=1), slope)
            x += 0.1 * box.width * (1 - step / steps) * speed / _each(speed.flatten(1).abs().amax(1), speed)
            x.copy_(box.clamp(x))
    last = x.detach()
    with torch.no_grad():
        reached = margins(logits(last)).gather(1, targets[:, None])[:, 0]
    return torch.maximum(best, reached), last


def push(
    logits: Logits, base: Tensor, targets: Tensor, box: Box, radius: float, mask: Tensor | None = None,
    steps: int = PUSH,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """One perturbation for every target that moves all of ``base (n, ...)`` towards it.

    The perturbation, in units of the box's width, has a Euclidean norm of at most ``radius``; ``mask (targets, ...)``
    bounds where it lies. Returns the margins ``(targets, n)`` it ends with, and the perturbations.
    """
    count, n = len(targets), len(base)
    given = torch.zeros(count, *base.shape[1:], requires_grad=True)
    speed = torch.zeros_like(given)
    wanted = targets.repeat_interleave(n)[:, None]

    def reach(by: Tensor) -> Tensor:
        x = box.clamp(base[None] + box.width * by[:, None]).flatten(0, 1)
        return margins(logits(x)).gather(1, wanted).view(count, n)

    for step in range(steps):
        reached = reach(given)
        # What is moved far enough counts no more, so that a perturbation serves all inputs.
        cap = reached.detach().std().clamp_min(1e-12)
        (slope,) = torch.autograd.grad(reached.clamp(max=float(cap)).sum(), given)
        with torch.no_grad():
            slope = slope if mask is None else slope * mask
            speed = 0.7 * speed + slope / _each(slope.flatten(1).norm(dim=1), slope)
            given += 0.3 * radius * (1 - step / steps) * speed
            given *= (radius / _each(given.flatten(1).norm(dim=1), given)).clamp(max=1)
    with torch.no_grad():
        return reach(given), given.detach()


def steepest(logits: Logits, base: Tensor, targets: Tensor, size: int) -> Tensor:
    """Of every target the square of ``size`` where its margin's slope is largest: masks ``(targets, c, h, w)``."""
    x = base.clone().requires_grad_()
    reached = margins(logits(x))
    found = torch.zeros(len(targets), *base.shape[1:])
    for k, target in enumerate(targets.tolist()):
        (slope,) = torch.autograd.grad(reached[:, target].sum(), x, retain_graph=True)
        heat = slope.sum(0).abs().sum(0)[None, None]
        windows = torch.nn.functional.avg_pool2d(heat, size, 1)[0, 0]
        row, column = divmod(int(windows.argmax()), windows.shape[1])
        found[k, :, row : row + size, column : column + size] = 1
    return found


def strongest(perturbations: Tensor, places: int) -> Tensor:
    """Of every perturbation ``(targets, channels, …)`` the places where it is largest, as a mask of its shape."""
    heat = perturbations.square().sum(1, keepdim=True)
    flat = heat.flatten(1)
    top = flat.topk(min(places, flat.shape[1]), 1).indices
    return torch.zeros_like(flat).scatter(1, top, 1.0).view_as(heat).expand_as(perturbations)


def _each(norms: Tensor, like: Tensor) -> Tensor:
    return norms.clamp_min(1e-20).view(-1, *[1] * (like.dim() - 1))


def explore(
    logits: Logits, shape: tuple[int, ...], classes: int, box: Box, generator: torch.Generator,
    inputs: Tensor | None = None, thorough: bool = False,
) -> dict[str, Tensor]:  # fmt: skip
    """Statistics of every class ``(classes,)``, float64: larger means easier to reach.

    ``noise_mean``, ``noise_share``, ``noise_std``: its logit on noise, the share of noise that is taken for it, how
    much its logit varies; ``margin``, ``margin_mean``: MM-BD, best and mean of the starts; ``universal``: mean margin
    under one perturbation; ``patch``: under one within a square (0 where inputs are no images). Perturbations are
    looked for on noise and what was found for a few classes, or on ``inputs``. If ``thorough``, on what was found for
    all classes too: ``seen_mean``: mean logit there; ``universal_small``, ``universal_wide``: margins under one
    perturbation of less, of more norm; ``sparse``: under one of few places, those where the former is strongest.
    """
    noise = box.noise(NOISE, shape, generator)
    with torch.no_grad():
        z = logits(noise).double()
    share = torch.nn.functional.one_hot(z.argmax(1), classes).double().mean(0)
    found = {"noise_mean": z.mean(0), "noise_share": share, "noise_std": z.std(0)}
    targets = chosen(z)
    starts = box.noise(len(targets) * STARTS, shape, generator)
    reached, ends = climb(logits, starts, targets.repeat_interleave(STARTS), box)
    reached = reached.view(-1, STARTS)
    few = targets[:: max(1, 2 * len(targets) // BASE)][: BASE // 2]
    _, seen = climb(logits, box.noise(len(few), shape, generator), few, box, CLIMB // 4)
    base = torch.cat([seen, noise[: BASE - len(few)]])
    middle = (box.low + box.high) / 2
    base = middle + (base - middle) / 2 if inputs is None else _few(inputs.float())
    size = float(torch.tensor(shape).prod()) ** 0.5
    pushed = easiest(targets, reached.amax(1))
    universal, _ = push(logits, base, pushed, box, 0.075 * size)
    found |= {
        "margin": _filled(reached.amax(1), targets, classes),
        "margin_mean": _filled(reached.mean(1), targets, classes),
        "universal": _filled(universal.mean(1), pushed, classes),
        "patch": torch.zeros(classes, dtype=torch.float64),
    }
    side = patch_side(shape)
    if side:
        mask = steepest(logits, base, pushed, side)
        stamped, _ = push(logits, base, pushed, box, (shape[0] * side * side) ** 0.5, mask)
        found["patch"] = _filled(stamped.mean(1), pushed, classes)
    if not thorough:
        return found
    seen = ends[::STARTS] if inputs is None else inputs.float()
    with torch.no_grad():
        found["seen_mean"] = logits(seen[:NOISE]).double().mean(0)
    base = _few(seen)
    small, _ = push(logits, base, pushed, box, 0.05 * size)
    wide, by = push(logits, base, pushed, box, 0.1 * size)
    places = strongest(by, side * side or by[0, 0].numel())
    few_places, _ = push(logits, base, pushed, box, 0.7 * side * shape[0] ** 0.5 or 0.1 * size, places)
    for name, reach in (("universal_small", small), ("universal_wide", wide), ("sparse", few_places)):
        found[name] = _filled(reach.mean(1), pushed, classes)
    return found


def _few(inputs: Tensor) -> Tensor:
    """``BASE`` of the inputs, evenly spread."""
    return inputs[torch.linspace(0, len(inputs) - 1, min(BASE, len(inputs))).long()]


def patch_side(shape: tuple[int, ...]) -> int:
    """Side of the square that is looked for in images ``(channels, height, width)``; 0 for other inputs."""
    if len(shape) != 3 or min(shape[1:]) < 8:
        return 0
    return max(3, round(min(shape[1:]) / 5))


def chosen(z: Tensor) -> Tensor:
    """Classes to look at, ascending: all of them, or ``MOST`` where there are more."""
    classes = z.shape[1]
    if classes <= MOST:
        return torch.arange(classes)
    return z.mean(0).topk(MOST).indices.sort().values


def easiest(targets: Tensor, reached: Tensor) -> Tensor:
    """Of the classes looked at those to go on with: all, or ``PUSHED``, ascending."""
    if len(targets) <= PUSHED:
        return targets
    order = reached.argsort(descending=True)
    first, rest = order[: PUSHED // 2], order[PUSHED // 2 :]
    others = rest[torch.linspace(0, len(rest) - 1, PUSHED - len(first)).long()]
    return targets[torch.cat([first, others])].sort().values


def _filled(values: Tensor, targets: Tensor, classes: int) -> Tensor:
    """Values of the classes looked at, in their places; the others get the median."""
    out = torch.full((classes,), float(values.median()), dtype=torch.float64)
    out[targets] = values.double()
    return out


__all__ = ["Box", "chosen", "climb", "easiest", "explore", "margins", "patch_side", "push", "steepest", "strongest"]
