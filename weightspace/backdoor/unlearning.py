"""Unlearn what leads to a class: the worst changes of the inputs are found, and the network taught to ignore them.

After I-BAU (Zeng et al. 2022), which minimises over the weights the loss under the worst universal perturbation of
clean inputs. Four things differ, so that a hundred inputs do: perturbations are sought for the classes alone that are
easiest to reach, in several sizes and as a few entries only, for patches; they are found anew in every round in place
of implicit gradients; inputs changed at random (``weightspace.backdoor.corruptions``) are to be answered as they were,
which is what takes triggers that no one perturbation stands for; and the network's own answers to the inputs, and to
mixtures of them, hold the rest in place (distillation, Hinton et al. 2015).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from weightspace.backdoor.corruptions import FAMILIES, corrupted
from weightspace.backdoor.running import Net, State, accuracy, logits
from weightspace.backdoor.triggers import inverted, words_of

PROBES = ((0.15, 1.0), (0.25, 1.0), (0.0, 0.03), (0.0, 0.08))
"""Perturbations by which classes are compared: (root mean square in deviations of the inputs, share of the entries
changed); a size of 0 is as large as inputs allow."""
SIZES = ((0.1, 1.0), (0.2, 1.0), (0.4, 1.0), (0.0, 0.06))
"""Perturbations that are unlearned, as ``PROBES``."""
PROBED = 12
"""Steps of the search by which classes are compared."""
DRAWN = 16
"""Inputs that a step of the search looks at."""
ELSEWHERE = -1
"""In place of a class: anywhere but to the answer as it is, which is what all-to-all attacks do."""


STANDS_OUT = 1.5
"""Times as easy to reach as the median class, from which on a class is suspected."""


@dataclass(frozen=True, eq=False)
class Reach:
    """How easily each class is reached: ``rates (probes, classes)``, the share of other classes' inputs that one
    perturbation of each of ``PROBES`` sends there, and of images one square of pixels.

    ``scores (classes,)``: rates over the median class's (0.05 added), the mean over probes.
    """

    rates: Tensor

    @property
    def scores(self) -> Tensor:
        usual = self.rates.median(dim=1, keepdim=True).values
        return (self.rates / (usual + 0.05)).mean(0)

    def outstanding(self, most: int = 3) -> list[int]:
        """Classes that are easier to reach than usual, the easiest first, at most so many; perhaps none."""
        scores = self.scores
        top = float(scores.max())
        order = scores.argsort(descending=True).tolist()[:most]
        return [c for c in order if top >= STANDS_OUT and float(scores[c]) >= 0.75 * top]


def reach(net: Net, state: State, x: Tensor, seed: int = 0) -> Reach:
    """How easily each class is reached from inputs ``x (n, …)``: one short search for all classes at once."""
    out = logits(net, state, x).argmax(1)
    classes = list(range(logits(net, state, x[:2]).shape[1]))
    moved = found(net, state, x, classes, PROBES, PROBED, torch.Generator().manual_seed(seed), squares=True)
    rates = torch.zeros(len(PROBES) + (x.dim() == 4) if x.is_floating_point() else 1, len(classes))
    for c in classes:
        others = x[out != c]
        for kind in range(len(rates)):
            if len(others):
                rates[kind, c] = (logits(net, state, moved(others, c, kind)).argmax(1) == c).float().mean()
    return Reach(rates)


def _squares(
    net: Net, still: State, x: Tensor, classes: Sequence[int], steps: int, generator: torch.Generator
) -> Tensor:
    """For each class a square of pixels that leads images ``x`` there, where its slope is steep: (classes, *shape).

    Zero outside; what is added may be as large as the images' range. Sides are a sixth to a third of the images'.
    """
    low, high = float(x.min()), float(x.max())
    sides = x.shape[-2:]
    said = logits(net, still, x).argmax(1)

    def slope(d: Tensor) -> Tensor:
        index = torch.randint(len(x), (DRAWN,), generator=generator)
        some = x[index]
        d = d.detach().requires_grad_(True)
        with torch.enable_grad():
            shifted = (some[None] + d[:, None]).clamp(low, high).flatten(0, 1)
            loss = _away(net.outputs(still, shifted), list(classes), said[index])
        (found,) = torch.autograd.grad(loss, d)
        return found

    d = torch.zeros(len(classes), *x.shape[1:])
    first = slope(d)
    side = int(torch.randint(max(1, min(sides) // 6), max(2, min(sides) // 3 + 1), (), generator=generator))
    energy = F.avg_pool2d(first.square().sum(1, keepdim=True), side, stride=1)
    mask = torch.zeros_like(d)
    for row, e in enumerate(energy.flatten(1)):
        # One of the steepest places, another in every search.
        best = e.topk(min(8, len(e))).indices
        at = int(best[torch.randint(len(best), (), generator=generator)])
        top, left = divmod(at, energy.shape[-1])
        mask[row, :, top : top + side, left : left + side] = 1
    for _ in range(steps):
        d = (d - 0.3 * (high - low) * slope(d).sign() * mask).clamp(low - high, high - low)
    return d


def _away(out: Tensor, classes: Sequence[int], said: Tensor) -> Tensor:
    """What a search makes small: cross-entropy of outputs (classes · inputs, all classes) with the class wanted of
    each run of inputs; of ``ELSEWHERE`` that with the answers ``said (inputs,)``, negated."""
    n = len(said)
    wanted = torch.cat([said if c == ELSEWHERE else torch.full((n,), c) for c in classes])
    sign = torch.tensor([-1.0 if c == ELSEWHERE else 1.0 for c in classes]).repeat_interleave(n)
    return (sign * F.cross_entropy(out, wanted, reduction="none")).sum()


Moved = Callable[[Tensor, int, int], Tensor]
"""(inputs, class, number of the kind) -> the inputs with what was found for that class."""


def found(
    net: Net, state: State, x: Tensor, classes: Sequence[int], sizes: Sequence[tuple[float, float]], steps: int,
    generator: torch.Generator, squares: bool = False,
) -> Moved:  # fmt: skip
    """What leads inputs ``x`` to each of ``classes``, one per size: of sentences words, else what is added.

    ``squares``: of images a square of pixels besides.
    """
    if not x.is_floating_point():
        return _words(net, state, x, classes, generator)
    low, high, spread, count = float(x.min()), float(x.max()), float(x.std()), x[0].numel()
    kept = [max(1, round(share * count)) for _, share in sizes]
    norms = [
        size * spread * count**0.5 if size else (high - low) * k**0.5 / 2
        for (size, _), k in zip(sizes, kept, strict=True)
    ]
    most = torch.tensor(norms).repeat(len(classes))[:, None]
    wanted = [c for c in classes for _ in sizes]
    d = 0.1 * most / count**0.5 * torch.randn(len(wanted), count, generator=generator)
    still = {n: t.detach() for n, t in state.items()}
    said = logits(net, still, x).argmax(1)
    for step in range(steps):
        index = torch.randperm(len(x), generator=generator)[:DRAWN]
        some = x[index]
        d.requires_grad_(True)
        with torch.enable_grad():
            shifted = (some[None] + d.view(-1, 1, *x.shape[1:])).clamp(low, high).flatten(0, 1)
            loss = _away(net.outputs(still, shifted), wanted, said[index])
        (slope,) = torch.autograd.grad(loss, d)
        with torch.no_grad():
            length = 0.5 if step < steps // 2 else 0.15
            d = d - length * most * slope / slope.norm(dim=1, keepdim=True).clamp(min=1e-12)
            for number, k in enumerate(kept):
                if k < count:
                    rows = d[number :: len(sizes)]
                    least = rows.abs().topk(k, dim=1).values[:, -1:]
                    d[number :: len(sizes)] = torch.where(rows.abs() >= least, rows, 0)
            d = d * (most / d.norm(dim=1, keepdim=True).clamp(min=1e-12)).clamp(max=1)
    place = {c: i for i, c in enumerate(classes)}
    final = d.detach().view(len(classes), len(sizes), *x.shape[1:])
    if squares and x.dim() == 4:
        final = torch.cat([final, _squares(net, still, x, classes, steps, generator)[:, None]], 1)

    def moved(inputs: Tensor, c: int, kind: int) -> Tensor:
        added: Tensor = inputs + final[place[c], kind % final.shape[1]]
        return added.clamp(low, high)

    return moved


def _words(
    net: Net, state: State, x: Tensor, classes: Sequence[int], generator: torch.Generator
) -> Moved:  # fmt: skip
    """Runs of words that lead to each class, put anywhere into sentences."""
    still = {n: t.detach() for n, t in state.items()}
    out = logits(net, still, x).argmax(1)
    runs: dict[int, Tensor] = {}
    for c in classes:
        others = x[out != c]
        seed = int(torch.randint(2**31, (), generator=generator))
        (trigger,) = inverted(
            lambda z: net.outputs(still, z), others if len(others) else x, [c], words=words_of(net.wiring), seed=seed
        )  # fmt: skip
        changed = (trigger.before != trigger.after).any(0).nonzero().flatten()
        runs[c] = trigger.after[0, : int(changed.max()) + 1] if len(changed) else trigger.after[0, :1]

    def moved(inputs: Tensor, c: int, kind: int) -> Tensor:
        put = inputs.clone()
        lengths = (inputs != 0).sum(1).clamp(min=len(runs[c]))
        for row, length in enumerate(lengths.tolist()):
            at = int(torch.randint(max(1, length - len(runs[c]) + 1), (), generator=generator))
            put[row, at : at + len(runs[c])] = runs[c]
        return put

    return moved


@dataclass(frozen=True)
class Unlearned:
    """What unlearning came to: ``rounds`` done, ``before`` and ``after`` the highest share of inputs that what was
    found sent to the classes, ``kept``: share of held-out clean inputs that are still answered alike."""

    rounds: int
    before: float
    after: float
    kept: float


def unlearn(
    net: Net, state: State, x: Tensor, y: Tensor, classes: Sequence[int], *, rounds: int = 60, steps: int = 5,
    search: int = 4, rate: float = 2e-3, weight: float = 0.5, steady: float = 1.0, batch: int = 64,
    more: Tensor | None = None, drawn: int = 2, seed: int = 0,
) -> tuple[State, Unlearned]:  # fmt: skip
    """Teach the network to ignore what leads inputs ``x (n, …)`` with labels ``y`` to ``classes``.

    ``more (all classes,)``: weights by which every round draws ``drawn`` further classes, where it is not sure which
    they are.

    Each of ``rounds`` searches perturbations anew and takes ``steps`` of Adam on: the divergence from the answers that
    the network gave at first to ``batch`` of the inputs and to mixtures of them, the labels, ``weight`` times the
    labels under the perturbations, and ``steady`` times those under random changes (of numbers; words have none), of
    those families more often that make more inputs wrong.
    ``rate`` falls to a fiftieth, so that what is given up at first comes back. A tenth of the inputs is held out, to
    tell how many answers were kept.
    """
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(x), generator=generator)
    held, mine = (order[: len(x) // 10], order[len(x) // 10 :]) if len(x) >= 20 else (order, order)
    first = {n: t.detach() for n, t in state.items()}
    leaves = {n: first[n].clone().requires_grad_(True) for n in net.learned}
    now: State = {**first, **leaves}
    optimiser = torch.optim.Adam(list(leaves.values()), lr=rate)
    part, wanted = x[mine], y[mine]
    every = list(classes) if more is None else list(range(len(more)))
    elsewhere = {c: torch.nonzero(wanted != c).flatten() for c in [*every, ELSEWHERE]}
    kinds = (len(SIZES) + (x.dim() == 4)) if x.is_floating_point() else 1
    steady = steady if x.is_floating_point() else 0.0
    rates: list[float] = []
    for number in range(rounds + 1):
        still = {n: t.detach() for n, t in now.items()}
        now_on = list(classes)
        if more is not None and 0 < number < rounds:
            left = more.clone()
            left[now_on] = 0
            now_on += torch.multinomial(left, min(drawn, int((left > 0).sum())), generator=generator).tolist()
            now_on += [ELSEWHERE] if x.is_floating_point() else []
        others = {c: elsewhere[c] for c in now_on if len(elsewhere[c])}
        each = max(2, batch // max(1, len(others) * kinds))
        moved = found(net, still, part, list(others), SIZES, search, generator, squares=True)
        if number in (0, rounds):
            rates.append(_rate(net, still, part, wanted, list(others), moved))
        if number == rounds:
            break
        shares = _unsteady(net, still, part, wanted, generator) if steady and x.dim() == 4 else None
        for group in optimiser.param_groups:
            group["lr"] = rate * max(0.02, 1 - number / rounds)
        for _ in range(steps):
            some = torch.randperm(len(part), generator=generator)[:batch]
            several = torch.cat([part[some], mixed(part[some], generator)])
            soft = logits(net, first, several).softmax(1)
            bad, right = [], []
            for c, index in others.items():
                for kind in range(kinds):
                    those = index[torch.randint(len(index), (each,), generator=generator)]
                    bad.append(moved(part[those], c, kind))
                    right.append(wanted[those])
            # Drawn anew in every step: none of them is seen twice.
            changed = [corrupted(part[some], generator, shares)] if steady else []
            with torch.enable_grad():
                out = net.outputs(now, torch.cat([several, *changed, *bad]))
                clean, rest = out[: len(several)], out[len(several) :]
                loss = F.kl_div(clean.log_softmax(1), soft, reduction="batchmean")
                loss = loss + 0.3 * F.cross_entropy(clean[: len(some)], wanted[some])
                if changed:
                    loss = loss + steady * F.cross_entropy(rest[: len(some)], wanted[some])
                    rest = rest[len(some) :]
                if bad:
                    loss = loss + weight * F.cross_entropy(rest, torch.cat(right))
                optimiser.zero_grad()
                loss.backward()
            optimiser.step()
    final = {n: t.detach() for n, t in now.items()}
    same = logits(net, first, x[held]).argmax(1) == logits(net, final, x[held]).argmax(1)
    return final, Unlearned(rounds, rates[0], rates[-1], float(same.float().mean()))


def _unsteady(net: Net, state: State, x: Tensor, y: Tensor, generator: torch.Generator) -> Tensor:
    """Share of inputs that each family of random changes makes wrong, (families,); a twentieth at least."""
    errors = []
    for number in range(len(FAMILIES)):
        alone = F.one_hot(torch.tensor(number), len(FAMILIES)).float()
        errors.append(1 - accuracy(net, state, corrupted(x, generator, alone), y))
    return torch.tensor(errors).clamp(min=0.05)


def _rate(net: Net, state: State, x: Tensor, y: Tensor, classes: Sequence[int], moved: Moved) -> float:
    """The highest share of other classes' inputs that the probe-sized or sparse changes send to one of the classes."""
    most = 0.0
    for c in classes:
        others = x[y != c][: 2 * DRAWN]
        for kind in (1, len(SIZES) - 1) if x.is_floating_point() else (0,):
            if len(others):
                got = logits(net, state, moved(others, c, kind)).argmax(1)
                most = max(most, float((got == c).float().mean()))
    return most


def mixed(x: Tensor, generator: torch.Generator) -> Tensor:
    """Other inputs made of these: mixtures of two with a little noise, of sentences some words exchanged."""
    other = x[torch.randperm(len(x), generator=generator)]
    if not x.is_floating_point():
        swap = torch.rand(x.shape, generator=generator) < 0.15
        return torch.where(swap & (x != 0) & (other != 0), other, x)
    share = 0.5 * torch.rand(len(x), *[1] * (x.dim() - 1), generator=generator)
    z = (1 - share) * x + share * other
    if x.dim() == 4:
        z = z.roll(torch.randint(-1, 2, (2,), generator=generator).tolist(), (2, 3))
    return z + 0.1 * x.std() * torch.randn(z.shape, generator=generator)


__all__ = ["PROBES", "SIZES", "Reach", "Unlearned", "found", "mixed", "reach", "unlearn"]
