"""Training the detector on populations of clean and poisoned networks.

All heads are trained several times, each time without one part of the networks (families stay whole), and asked about
that part: on these out-of-fold answers the heads are stacked, the probability calibrated and the threshold set. What is
kept of metanets and questions is the average of their trainings, and of forests one more that has seen all networks, so
none is spent on calibration alone.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from weightspace.backdoor import detector as metanets
from weightspace.backdoor import questions as questioning
from weightspace.backdoor.calibration import Stack, auroc, brier, cross_entropy, folds, rate_at
from weightspace.backdoor.head import EvidenceHead, Facts
from weightspace.backdoor.population import Labelled
from weightspace.backdoor.scanning import Observed, observe
from weightspace.backdoor.shipped import HEADS, Detector, Heads, fit_mixture, joined, mixed
from weightspace.errors import MetanetError, WeightspaceError
from weightspace.graph import ParameterGraph
from weightspace.metanets.metrics import calibration_error
from weightspace.pretrained.applicability import Limits, Range
from weightspace.pretrained.model import Projection

Array = NDArray[np.float64]
Names = tuple[tuple[str, ...], tuple[str, ...]]
_log = logging.getLogger(__name__)

FOLDS = 4
COMPONENTS = 12


@dataclass(frozen=True, eq=False)
class Entry:
    """A labelled network, and what is seen of it."""

    truth: Labelled
    seen: Observed

    @property
    def graph(self) -> ParameterGraph:
        return self.seen.graph

    @property
    def facts(self) -> Facts:
        return self.seen.facts


@dataclass(frozen=True, eq=False)
class Trained:
    """Heads with their out-of-fold answers about the networks they were trained on.

    ``odds (networks, heads)``; ``classes``: of each network those of the heads about its classes, ``(heads, K)``.
    """

    heads: Heads
    stack: Stack
    mixture: Array
    odds: Array
    classes: list[Array]


def entries(
    networks: Sequence[Labelled], cache: Path | None = None, progress: bool = False, tests: bool = True
) -> tuple[list[Entry], Names, dict[str, str]]:
    """The networks as heads read them, the names of their evidence, and those left out with the reason.

    ``cache``: a folder that evidence is kept in, by the content of the weights; it is the costly part, and not
    made where ``tests`` is false.
    """
    from weightspace.progress import bar

    found: list[Entry] = []
    left: dict[str, str] = {}
    names: Names = ((), ())
    with bar("evidence", len(networks), progress) as advance:
        for number, network in enumerate(networks):
            graph = network.sample.graph
            tensors = {n: graph.tensor(n) for n in graph.shapes}
            assert graph.wiring is not None, "samples are wired"
            try:
                seen = observe(tensors, graph.wiring, cache, tests)
            except WeightspaceError as error:
                left[network.sample.name] = " ".join(str(error).split())
                continue
            names = seen.names
            found.append(Entry(network, seen))
            advance(network.sample.name)
            if not progress and number % 50 == 49:
                _log.info("evidence of %d of %d networks", number + 1, len(networks))
    if not found:
        raise MetanetError(f"none of {len(networks)} networks could be read: {next(iter(left.values()), '')}")
    return found, names, left


def balance(networks: Sequence[Labelled]) -> Array:
    """How much each network counts, ``(networks,)``: clean and poisoned alike in every family of networks.

    Within the poisoned ones of a family an attack counts by the root of its number, so that none rules the others.
    """
    family = [(n.kind, n.data) for n in networks]
    attacks = Counter((f, n.attack) for f, n in zip(family, networks, strict=True))
    each = np.array([attacks[f, n.attack] ** -0.5 for f, n in zip(family, networks, strict=True)])
    sums: dict[Any, float] = {}
    counts: Counter[Any] = Counter()
    for f, n, w in zip(family, networks, each, strict=True):
        sums[f, n.poisoned] = sums.get((f, n.poisoned), 0.0) + float(w)
        counts[f, n.poisoned] += 1
    # A family with one kind alone teaches little: it counts as if it had a single one of the other.
    return np.array([
        w / sums[f, n.poisoned] * max(1, min(counts[f, True], counts[f, False]))
        for f, n, w in zip(family, networks, each, strict=True)
    ])  # fmt: skip


def train(
    some: Sequence[Entry], names: Names, *, parts: int = FOLDS, metanet: bool = True, questions: bool = True,
    evidence: bool = True, epochs: int = 8, asked: int = 20, seed: int = 0, config: dict[str, Any] | None = None,
) -> Trained:  # fmt: skip
    """Heads and how they are weighed, from networks with a backdoor that worked and clean ones.

    ``metanet``, ``questions``, ``evidence``: whether these heads are trained, the former for so many ``epochs`` and
    ``asked``. Raises ``MetanetError`` where there are too few: fewer groups than parts, or one kind alone.
    """
    truths = [e.truth for e in some]
    if any(not t.worked for t in truths):
        raise MetanetError("networks whose attack failed are neither clean nor poisoned; leave them out")
    y = np.array([t.poisoned for t in truths])
    part = folds([t.group for t in truths], y, parts, seed)
    weights = balance(truths)
    answers = [metanets.answer(t.attack, t.targets, len(e.facts.classes)) for t, e in zip(truths, some, strict=True)]
    odds = np.zeros((len(some), len(HEADS)))
    classes = [np.zeros((len(HEADS), len(e.facts.classes))) for e in some]
    template = metanets.DetectorNet(**(config or {}))
    examples = [template.example(e.graph, e.seen.cell) for e in some] if metanet else []
    networks = [e.seen.asked for e in some]
    made: list[Heads] = []

    def forests(of: list[int], number: int) -> tuple[EvidenceHead, ...]:
        if not evidence:
            return ()
        return (EvidenceHead.fit(
            names, [some[i].facts for i in of], [truths[i].targets for i in of], y[of].tolist(), weights[of].tolist(),
            seed + number, [truths[i].group for i in of],
        ),)  # fmt: skip

    for k in range(parts):
        rest, own = np.flatnonzero(part != k).tolist(), np.flatnonzero(part == k).tolist()
        nets: list[metanets.DetectorNet] = []
        asking: list[questioning.Questions] = []
        right, share = [answers[i] for i in rest], weights[rest].tolist()
        if metanet:
            nets.append(metanets.train(
                [examples[i] for i in rest], right, share, epochs=epochs, seed=seed + k, config=config
            ))  # fmt: skip
        if questions:
            asking.append(questioning.train([networks[i] for i in rest], right, share, epochs=asked, seed=seed + k))
        held = Heads(tuple(nets), tuple(asking), forests(rest, k))
        made.append(replace(held, evidence=()))
        told, rows = held([some[i].seen for i in own])
        odds[own] = told
        for i, row in zip(own, rows, strict=True):
            classes[i] = row
        areas = ", ".join(f"{auroc(y[own].astype(float), odds[own, n]):.3f} {name}" for n, name in enumerate(HEADS))
        _log.info("part %d of %d: area under the curve %s", k + 1, parts, areas)
    stack = Stack.fit(odds, y, weights=weights)
    aimed = [i for i, t in enumerate(truths) if t.targets]
    mixture = fit_mixture([classes[i] for i in aimed], [truths[i].targets for i in aimed])
    heads = replace(joined(made), evidence=forests(list(range(len(some))), parts))
    return Trained(heads, stack, mixture, odds, classes)


def fit(some: Sequence[Entry], names: Names, *, seed: int = 0, **options: Any) -> Detector:
    """The detector of all networks, with its range and the figures of its out-of-fold answers."""
    trained = train(some, names, seed=seed, **options)
    truths = [e.truth for e in some]
    y = np.array([t.poisoned for t in truths], dtype=np.float64)
    # The stack itself is refitted without each part, so that its figures are not those of its own training.
    probability = honest(trained.odds, [t.group for t in truths], y, balance(truths), seed)
    odds = trained.stack.odds(trained.odds)
    figures: dict[str, Any] = {
        "networks": len(y), "poisoned": int(y.sum()), "auroc": auroc(y, probability),
        "tpr_at_5": rate_at(y, probability),
        "cross_entropy": cross_entropy(y, probability), "brier": brier(y, probability),
        "ece": calibration_error(y, probability, 10),
        **{f"auroc_{name}": auroc(y, trained.odds[:, n]) for n, name in enumerate(HEADS)},
        "attacks": dict(Counter(t.attack or "clean" for t in truths)),
        "families": dict(Counter(f"{t.kind} on {t.data}" for t in truths)),
    }  # fmt: skip
    figures |= {"by_attack": by_attack(truths, probability, trained), "by_family": by_family(truths, probability)}
    projection, range_ = zone([e.graph for e in some], [t.group for t in truths], y, seed)
    clean = odds[y < 0.5]
    plain = np.array([-np.log10(max(e.seen.p_value, 1e-300)) for e in some if not e.truth.poisoned and e.seen.names[0]])
    return Detector("", trained.heads, trained.stack, trained.mixture, clean, projection, range_, plain, figures)


def by_attack(truths: Sequence[Labelled], probability: Array, trained: Trained) -> dict[str, list[float]]:
    """Of each attack: networks, AUROC against all clean ones, how often its target comes first, and in three."""
    attack = np.array([t.attack for t in truths])
    found = {}
    for name in sorted(set(attack) - {""}):
        own = np.flatnonzero(attack == name)
        beside = (attack == name) | (attack == "")
        ranks = [
            min(int((odds > odds[t]).sum()) for t in truths[i].targets)
            for i in own.tolist() if truths[i].targets for odds in [mixed(trained.mixture, trained.classes[i])]
        ]  # fmt: skip
        first, three = (float(np.mean([r < k for r in ranks])) if ranks else float("nan") for k in (1, 3))
        area = auroc((attack[beside] != "").astype(np.float64), probability[beside])
        found[str(name)] = [round(x, 4) if x == x else -1.0 for x in (float(len(own)), area, first, three)]
    return found


def by_family(truths: Sequence[Labelled], probability: Array) -> dict[str, list[float]]:
    """Of each family: networks, poisoned ones, AUROC within it."""
    family = np.array([f"{t.kind} on {t.data}" for t in truths])
    y = np.array([t.poisoned for t in truths], dtype=np.float64)
    found = {}
    for name in sorted(set(family)):
        own = family == name
        area = auroc(y[own], probability[own])
        found[str(name)] = [float(own.sum()), float(y[own].sum()), round(area, 4) if area == area else -1.0]
    return found


def honest(odds: Array, groups: Sequence[str], y: Array, weights: Array, seed: int = 0, parts: int = 5) -> Array:
    """Probabilities ``(networks,)`` by stacks that were fitted without each network's group."""
    part = folds(groups, y > 0.5, parts, seed + 1)
    out = np.zeros(len(y))
    for k in range(parts):
        rest, own = part != k, part == k
        out[own] = Stack.fit(odds[rest], y[rest], weights=weights[rest]).probability(odds[own])
    return out


def zone(graphs: Sequence[ParameterGraph], groups: Sequence[str], y: Array, seed: int) -> tuple[Projection, Range]:
    """What tells whether a network is like these: limits, and distances between descriptors of weights.

    A fifth of the groups is held out to say how far networks like these lie apart.
    """
    from weightspace.pretrained.views import described

    part = folds(groups, y > 0.5, 5, seed + 2)
    rows = described(graphs)
    projection = Projection.fit(rows[torch.from_numpy(part != 0)], min(COMPONENTS, len(graphs) - 1))
    places: Tensor = projection(rows)
    near, held = places[torch.from_numpy(part != 0)], places[torch.from_numpy(part == 0)]
    return projection, Range.fit(Limits.of(graphs), [near], [held])


__all__ = ["COMPONENTS", "FOLDS", "Entry", "Names", "Trained", "balance", "entries", "fit", "honest", "train", "zone"]
