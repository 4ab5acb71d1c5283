"""A small population for the tests: perceptrons trained on one task and fine-tuned on parts of others, merges measured.

What is learned from it is real but little: features of these networks, a small forest, intervals from merges left out.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from functools import cache
from itertools import combinations
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import weightspace as ws
from weightspace.mergeability.features import compare
from weightspace.mergeability.forest import Forest
from weightspace.mergeability.measurements import BARRIER, Measurement
from weightspace.mergeability.outcome import link, unlink
from weightspace.mergeability.prior import Prior, Spread

sys.path.insert(0, str(Path(__file__).parent))
from networks import fresh, mlp, wiring

METHODS = ("linear", "task-arithmetic", "ties")
Tensors = dict[str, Tensor]
CHILDREN = 6


def data(task: int, count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Five clusters of 12 numbers; tasks are rotated against each other by their number."""
    generator = torch.Generator().manual_seed(7)
    centres = 2.0 * torch.randn(5, 12, generator=generator)
    turn = torch.linalg.matrix_exp(0.45 * task * _skew(torch.randn(12, 12, generator=generator)))
    draw = torch.Generator().manual_seed(1000 * task + seed)
    y = torch.randint(5, (count,), generator=draw)
    return (centres[y] + 1.4 * torch.randn(count, 12, generator=draw)) @ turn.T, y


def _skew(x: Tensor) -> Tensor:
    return (x - x.T) / 6


def train(tensors: Tensors, task: int, steps: int, rate: float, seed: int = 0) -> Tensors:
    module, _ = mlp()
    module.load_state_dict(tensors)
    optimiser = torch.optim.Adam(module.parameters(), lr=rate)
    x, y = data(task, 256, seed)
    for _ in range(steps):
        optimiser.zero_grad()
        torch.nn.functional.cross_entropy(module(x), y).backward()
        optimiser.step()
    return {n: t.detach().clone() for n, t in module.state_dict().items()}


def accuracy(tensors: Mapping[str, Tensor], task: int) -> float:
    module, _ = mlp()
    x, y = data(task, 400, 99)
    with torch.no_grad():
        return float((torch.func.functional_call(module, dict(tensors), (x,)).argmax(1) == y).float().mean())


@cache
def family(number: int) -> tuple[Tensors, dict[str, Tensors]]:
    """A base and six children on the tasks 0 to 5, each fine-tuned more or less."""
    base = train(fresh("mlp", 50 + number), 0, 80, 5e-3)
    rates = (2e-3, 5e-3, 1e-2)
    return base, {f"m{k}": train(base, k, 40, rates[(k + number) % 3], k) for k in range(CHILDREN)}


@cache
def measured(number: int) -> tuple[Measurement, ...]:
    """All pairs of a family, by every method, and the barrier half way."""
    base, models = family(number)
    alone = {(m, t): accuracy(models[m], int(t[1:])) for m in models for t in models}
    found = []
    for a, b in combinations(models, 2):
        for method in METHODS:
            merged = ws.merge([models[a], models[b]], method, base=base).tensors
            assert merged is not None
            reached = [accuracy(merged, int(m[1:])) for m in (a, b)]
            kept = tuple(r / alone[m, m] for r, m in zip(reached, (a, b), strict=True))
            found.append(Measurement((a, b), method, sum(kept) / 2, kept))
            if method == "linear":
                ends = sum(alone[m, t] for m in (a, b) for t in (a, b)) / 4
                found.append(Measurement((a, b), BARRIER, ends - sum(reached) / 2))
    return tuple(found)


@cache
def prior() -> Prior:
    """Learned from two families."""
    methods = (*METHODS, BARRIER)
    xs, ys, sets = [], [], 0
    for number in range(2):
        base, models = family(number)
        comparison = compare(models, base, wiring("mlp"))
        pairs = list(combinations(range(CHILDREN), 2))
        xs.append(comparison.vectors(pairs))
        by = {(m.models, m.method): m for m in measured(number)}
        for i, j in pairs:
            names = (f"m{i}", f"m{j}")
            rows = [by[names, m].retained for m in METHODS] + [(1 - by[names, BARRIER].outcome,) * 2]
            ys.append(np.array(rows).T)
            sets += 1
    x, y = np.concatenate(xs), link(np.concatenate(ys))
    order = np.random.default_rng(0).permutation(sets)
    out = np.full(y.shape, np.nan)
    for part in np.array_split(order, 4):
        held = np.isin(np.repeat(np.arange(sets), 2), part)
        out[held] = Forest.fit(x[~held], y[~held], trees=15, leaf=3)(x[held])
    means, truth = unlink(out).reshape(sets, 2, -1).mean(1), unlink(y).reshape(sets, 2, -1).mean(1)
    centre, unit = np.median(x, 0), np.maximum(x.std(0), 1e-3)
    places = (x - centre) / unit
    forest = Forest.fit(x, y, trees=15, leaf=3)
    found = Prior(
        methods, forest, None,
        {m: {"vulnerability": 0.05, "damage": 0.02, "pair": 0.01, "cell": 0.01} for m in methods},
        {m: Spread.fit(means[:, k], truth[:, k]) for k, m in enumerate(methods)},
        centre, unit, places, np.zeros(1),
    )  # fmt: skip
    far = np.sort(np.concatenate([found.far(x[k : k + 1]) for k in range(len(x))])) * 2
    return Prior(**{**found.__dict__, "distances": far})


@cache
def strangers() -> Prior:
    """About networks without a common base: the features of one with another carried onto it."""
    from weightspace.align.optimal_transport import optimal_transport

    xs, ys = [], []
    for k in range(CHILDREN):
        a, b = family(0)[1][f"m{k}"], family(1)[1][f"m{(k * 2) % CHILDREN}"]
        moved = optimal_transport(a, b, wiring("mlp"), wiring_a=wiring("mlp"))
        carried = wiring("mlp").apply(moved.permutations, b)
        xs.append(compare({"a": a, "b": carried}, None, wiring("mlp")).vectors([(0, 1)]))
        ys.append([[0.4 + 0.05 * k]] * 2)
    x, y = np.concatenate(xs), link(np.concatenate(ys))
    centre, unit = np.median(x, 0), np.maximum(x.std(0), 1e-3)
    return Prior(
        ("linear",), Forest.fit(x, y, trees=5, leaf=2), None,
        {"linear": {"vulnerability": 0.05, "damage": 0.02, "pair": 0.01, "cell": 0.01}},
        {"linear": Spread(np.array([0.4, 0.7]), np.array([0.1, 0.1]), np.array([0.5, 1.0]))},
        centre, unit, (x - centre) / unit, np.array([200.0]), base=False,
    )  # fmt: skip
