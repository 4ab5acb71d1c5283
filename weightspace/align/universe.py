"""A common frame for many networks, after C²M³ (Crisostomi et al. 2024, "Cycle-consistent multi-model merging").

Aligning each network to a reference leaves the others strangers to each other, and which one is the reference matters.
Here every network has one group element into a *universe*, and all pairs meet there: the map from ``j`` to ``i`` is
``j → universe → i``, so that maps composed around a cycle are the identity, exactly. The elements together maximise the
inner products of all pairs.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from weightspace.align.entry import (
    Model,
    as_checkpoint,
    check_proved,
    check_same,
    opened,
    read,
    shapes_of,
)
from weightspace.align.frank_wolfe import Relaxed
from weightspace.align.weight_matching import weight_matching
from weightspace.errors import AlignmentError
from weightspace.wiring.entry import wiring as find_wiring
from weightspace.wiring.matching import Matching, acted, float32, inner, tensor_weights
from weightspace.wiring.wiring import Permutation, Wiring

if TYPE_CHECKING:
    from weightspace.checkpoint import Checkpoint


@dataclass(frozen=True, eq=False)
class Universe:
    """Networks in a common frame.

    ``permutations[i]`` moves network i into the universe: ``wiring.apply(permutations[i], model_i)`` is ``aligned[i]``.
    The universe is numbered as the first network is, which therefore stays as it was. ``objective`` is the mean weight
    cosine over all pairs (as ``Alignment.objective``), ``before`` the same of the networks as they came.
    """

    wiring: Wiring = field(repr=False)
    permutations: tuple[Permutation, ...]
    objective: float
    before: float
    diagnostics: Mapping[str, Any] = field(repr=False)
    aligned: tuple[Checkpoint, ...] = field(repr=False)

    def between(self, i: int, j: int) -> Permutation:
        """The element that moves network j onto network i, by way of the universe."""
        return self.permutations[j].compose(self.permutations[i].invert())

    def consistent(self) -> bool:
        """Whether every way round closes: j → i and then i → k is j → k, for all triples, to the last index."""
        n = range(len(self.permutations))
        return all(
            _equal(self.between(i, j).compose(self.between(k, i)), self.between(k, j), self.wiring)
            for i in n
            for j in n
            for k in n
        )

    def mean(self) -> dict[str, Tensor]:
        """The mean of the networks in the universe, dtypes kept; integers are those of the first network."""
        out = {}
        for name in self.aligned[0]:
            first = self.aligned[0][name]
            if not (first.is_floating_point() or first.is_complex()):
                out[name] = first
                continue
            wide = torch.complex128 if first.is_complex() else torch.float64
            total = sum((c[name].to(wide) for c in self.aligned), torch.zeros(first.shape, dtype=wide))
            out[name] = (total / len(self.aligned)).to(first.dtype)
        return out

    def __repr__(self) -> str:
        seconds = self.diagnostics.get("seconds")
        took = f", {seconds:.2f} s" if isinstance(seconds, float) else ""
        return (
            f"Universe({len(self.permutations)} networks: mean pairwise weight cosine {self.before:.4f} → "
            f"{self.objective:.4f}{took}; wiring {self.wiring.origin}, {self.wiring.status})"
        )


def align_many(
    models: Sequence[Model], *, wiring: Wiring | None = None, seed: int = 0, unverified: bool = False,
    rounds: int = 20, kicks: int = 0, steps: int = 60, restarts: int = 0, weighting: str = "plain",
) -> Universe:  # fmt: skip
    """Move networks of one wiring into a common frame; the function of each stays what it was.

    From a match of all to the first network, each in turn is matched to the sum of the others: by coordinate ascent
    from where it is and, in the first round and where the network is small, by ``steps`` of Frank-Wolfe from the centre
    (0: never); what raises the sum of all pairwise inner products is kept. Ends when a round changes nothing, or after
    ``rounds``. ``restarts``: so many searches more, each from a match to the next network; the best is kept. ``kicks``
    of each network in each round, and ``weighting``, as for weight matching.

    Raises as ``align`` does, and ``AlignmentError`` for fewer than two models.
    """
    if len(models) < 2:
        raise AlignmentError(f"a common frame needs two or more networks, found {len(models)}")
    started = time.perf_counter()
    sources = [opened(m) for m in models]
    found = wiring or find_wiring(sources[0])
    check_proved(found, unverified, "aligned")
    for number, source in enumerate(sources):
        check_same(
            found.shapes, shapes_of(source), ("the wiring", f"model {number}"), "Pass networks of one architecture"
        )
    tensors = [read(s, f"model {n}") for n, s in enumerate(sources)]
    wide = [float32(t) for t in tensors]
    weights = tensor_weights(found, wide[0], wide[1], weighting)
    before = _mean_cosine(wide, weights)
    best: tuple[float, list[Permutation], dict[str, Any]] | None = None
    for start in range(restarts + 1):
        tried = _search(found, wide, weights, start % len(wide), seed + start, rounds, kicks, steps, weighting)
        if best is None or tried[0] > best[0]:
            best = tried
    assert best is not None
    _, elements, info = best
    # The universe is numbered as the first network.
    back = elements[0].invert()
    elements = [p.compose(back) for p in elements]
    final = [found.apply(p, t) for p, t in zip(elements, tensors, strict=True)]
    diagnostics = {"seconds": time.perf_counter() - started, **info}
    aligned = tuple(as_checkpoint(t, s) for t, s in zip(final, sources, strict=True))
    objective = _mean_cosine([float32(t) for t in final], weights)
    return Universe(found, tuple(elements), objective, before, diagnostics, aligned)


def _search(
    wiring: Wiring, models: Sequence[Mapping[str, Tensor]], weights: Mapping[str, float], reference: int, seed: int,
    rounds: int, kicks: int, steps: int, weighting: str,
) -> tuple[float, list[Permutation], dict[str, Any]]:  # fmt: skip
    """One search from a match to a reference: the mean cosine of all pairs, the elements, and what happened."""
    generator = torch.Generator().manual_seed(seed)
    elements = [
        wiring.identity() if n == reference
        else weight_matching(
            models[reference], m, wiring, seed=seed + n, kicks=kicks, weighting=weighting
        ).permutations
        for n, m in enumerate(models)
    ]  # fmt: skip
    moved = [acted(wiring, p, m) for p, m in zip(elements, models, strict=True)]
    at_first = _mean_cosine(moved, weights)
    done = 0
    for _ in range(rounds):
        done += 1
        changed = False
        for n in torch.randperm(len(models), generator=generator).tolist():
            others = {t: sum((m[t] for k, m in enumerate(moved) if k != n), torch.zeros(())) for t in weights}
            best = _settle(wiring, others, models[n], weights, elements[n], generator, steps if done == 1 else 0, kicks)
            if best is not None:
                elements[n], changed = best, True
                moved[n] = acted(wiring, best, models[n])
        if not changed:
            break
    info = {"rounds": done, "reference": reference, "to the reference": at_first}
    return _mean_cosine(moved, weights), elements, info


def _settle(
    wiring: Wiring, others: Mapping[str, Tensor], own: Mapping[str, Tensor], weights: Mapping[str, float],
    now: Permutation, generator: torch.Generator, steps: int, kicks: int,
) -> Permutation | None:  # fmt: skip
    """A better place for one network beside the sum of the others, or None where it has the best found."""
    here = Matching(wiring, others, own, weights, start=now)
    before = here.recount()
    here.ascend(generator)
    best = here
    if steps and here.work <= 1e9:
        relaxed = Relaxed(wiring, others, own, weights)
        relaxed.begin("centre")
        relaxed.climb(steps, 1e-5)
        there = Matching(wiring, others, own, weights, start=relaxed.rounded())
        there.ascend(generator)
        if there.recount() > here.recount():
            best = there
    for _ in range(kicks):
        best.kick(generator)
    return best.permutation if best.recount() > before + 1e-6 * best.unit else None


def _mean_cosine(models: Sequence[Mapping[str, Tensor]], weights: Mapping[str, float]) -> float:
    norms = [inner(m, m, weights) ** 0.5 or 1.0 for m in models]
    pairs = [(i, j) for i in range(len(models)) for j in range(i)]
    return sum(inner(models[i], models[j], weights) / (norms[i] * norms[j]) for i, j in pairs) / len(pairs)


def _equal(p: Permutation, q: Permutation, wiring: Wiring) -> bool:
    return all(torch.equal(p._of(f), q._of(f)) for f in wiring.free)
