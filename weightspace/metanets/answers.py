"""Answers: what a network says to a few fixed questions that hold no data.

A network's function tells more of its training than its weights do: one that learned something tells noise apart,
surely and smoothly, and one that did not answers everything alike. So the network is run, by the program that its
wiring was proved with, on inputs that are drawn once and for all: noise of three grains, each as it is, twice as large,
a little disturbed, and moved by one place. What comes out is read as how far the answers spread over questions and over
classes, how sure they are, how many classes they name, and how little they change.

Kahana et al. (2025, "Deep Linear Probe Generators for Weight Space Learning") show that probing predicts accuracy
better than reading weights; here nothing is learned of the questions. No symmetry of a network changes its function, so
every metanet keeps with them what it had: permutations, rescalings, signs, and any other.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from weightspace.errors import UnansweredError, WiringError
from weightspace.wiring.asking import ask, complete, told
from weightspace.wiring.program import Program

if TYPE_CHECKING:
    from weightspace.graph import ParameterGraph

QUESTIONS = 32
"""Inputs of each grain."""

GRAINS = (1, 2, 4)
"""Neighbouring places of an input that are drawn together: noise, coarser noise, and coarser still."""

_DISTURBED = 0.3
# Differences of answers below this are nothing: those of a dead network are made of rounding alone.
_LEAST = 1e-4
_BLUR = 0.1
_PLACES, _CLASSES = 64, 256
_QUANTILES = (0.1, 0.5, 0.9)
_OF_ANSWERS = (
    "log spread over questions", "log spread of the mean answer", "log ratio of both", "entropy", "entropy of the mean",
    "information", "certainty", *(f"certainty q{round(100 * q)}" for q in _QUANTILES), "entropy of the first choices",
    "log effective rank", "share of the first direction", "unevenness of classes", "log margin",
)  # fmt: skip
_VARIANTS = ("disturbed", "moved", "doubled")
_OF_CHANGES = tuple(f"{what}: {how}" for what in _VARIANTS for how in ("change", "other choices"))

ANSWERS: tuple[str, ...] = tuple(f"grain {g}: {name}" for g in GRAINS for name in (*_OF_ANSWERS, *_OF_CHANGES))
"""Name of each entry of ``answers``, in order."""


def answers(graph: ParameterGraph) -> Tensor:
    """What a network answers, ``(len(ANSWERS),)``, float64; computed in float64 for weights of float64, else float32.

    Inputs are drawn like the example inputs that its wiring was proved with: numbers from a normal distribution,
    tokens from those of the example. The last axis of the first output is that of classes.

    Raises ``UnansweredError`` for a graph whose wiring has no program to run, or whose program cannot be asked.
    """
    wiring = graph.wiring
    program = wiring.program if wiring is not None else None
    if wiring is None or program is None:
        raise UnansweredError(
            f"this network ({graph.origin}) cannot be run: its wiring has no program, so it cannot be asked anything; "
            "make the graph with ws.graph from a file of a known family, or take a metanet without answers"
        )
    weights = {name: graph.tensor(name) for name in graph.shapes}
    dtype = torch.float64 if any(t.dtype == torch.float64 for t in weights.values()) else torch.float32
    try:
        parts = _ask(program, complete(wiring, weights), dtype)
    except WiringError as error:
        raise UnansweredError(f"{error}; take a metanet without answers") from error
    rows = []
    for first, *others in (parts[k : k + len(_VARIANTS) + 1] for k in range(0, len(parts), len(_VARIANTS) + 1)):
        rows += [_read(first), *(_change(first, other) for other in others)]
    # What overflowed is as far out as anything finite: no network of a batch may spoil the others.
    return torch.cat(rows).nan_to_num(nan=0.0, posinf=30.0, neginf=-30.0).clamp(-30, 30)


# -------------------------------------------------------------------- questions


def _ask(program: Program, tensors: Mapping[str, Tensor], dtype: torch.dtype) -> list[Tensor]:
    """Answers ``(rows, classes)`` to the questions of each grain and then to their variants, in float64."""
    total = QUESTIONS * len(GRAINS) * (len(_VARIANTS) + 1)

    def questions(x: Tensor) -> Tensor:
        return torch.cat([v for grain in GRAINS for v in _variants(x, grain)])

    out = ask(program, tensors, total, questions, dtype)
    return [part.flatten(0, 1) for part in told(out, total, _PLACES, _CLASSES).split(QUESTIONS)]


def _variants(x: Tensor, grain: int) -> list[Tensor]:
    """Questions in the form of an example input ``(count, …)``, and their ``_VARIANTS``, ``(QUESTIONS, …)`` each."""
    generator = torch.Generator().manual_seed(grain)
    shape = tuple(x.shape[1:])
    # Images have neighbours along two axes, series along one.
    near = min(2, max(len(shape) - 1, 1)) if shape else 0
    small = [*shape[: len(shape) - near], *(-(-n // grain) for n in shape[len(shape) - near :])]
    if x.is_floating_point():
        drawn = torch.randn(QUESTIONS, *small, generator=generator)
    else:
        among = x.flatten()
        drawn = among[torch.randint(len(among), (QUESTIONS, *small), generator=generator)]
    for axis in range(len(shape) - near, len(shape)):
        drawn = drawn.repeat_interleave(grain, axis + 1).narrow(axis + 1, 0, shape[axis])
    moved = drawn.roll(1, -1) if shape else drawn
    if not x.is_floating_point():
        return [drawn, drawn, moved, drawn]
    return [drawn, drawn + _DISTURBED * torch.randn(drawn.shape, generator=generator), moved, 2 * drawn]


# -------------------------------------------------------------------- what is read of the answers


def _read(found: Tensor) -> Tensor:
    """``_OF_ANSWERS`` of answers ``(rows, classes)``."""
    mean = found.mean(0)
    own = found - mean
    spread, common = own.square().mean().sqrt() + _LEAST, mean.square().mean().sqrt() + _LEAST
    shares = found.softmax(1)
    entropy, of_mean = _entropy(shares).mean(), _entropy(shares.mean(0))
    sure = shares.amax(1)
    energy = torch.linalg.svdvals(own).square()
    energy = energy / (energy.sum() + own.numel() * _LEAST**2)
    classes = own.square().mean(0).sqrt()
    top = found.topk(min(2, found.shape[1]), 1).values
    return torch.stack([
        spread.log(), common.log(), (spread / common).log(), entropy, of_mean, of_mean - entropy, sure.mean(),
        *torch.quantile(sure, torch.tensor(_QUANTILES, dtype=torch.float64)), _entropy(_choices(found).mean(0)),
        _entropy(energy), energy[0], classes.std(correction=0) / (classes.mean() + _LEAST),
        ((top[:, 0] - top[:, -1]).mean() + _LEAST).log(),
    ])  # fmt: skip


def _change(first: Tensor, other: Tensor) -> Tensor:
    """How far answers move, relative to their spread, and how many choose another class: ``(2,)``."""
    spread = (first - first.mean(0)).square().mean().sqrt() + _LEAST
    moved = (other - first).square().mean().sqrt() / spread
    chosen = (_choices(first) - _choices(other)).abs().sum(1).mean() / 2
    return torch.stack([torch.log1p(moved), chosen])


def _choices(found: Tensor) -> Tensor:
    """Which class each answer names, ``(rows, classes)``: one, or several where they are all but equal.

    Counts would jump where rounding decides, and two copies of one network must get the same.
    """
    return (found / (_BLUR * (found.square().mean().sqrt() + _LEAST))).softmax(1)


def _entropy(shares: Tensor) -> Tensor:
    return -torch.xlogy(shares, shares).sum(-1)
