"""Making the merge-ability model that comes with weightspace: ``weightspace train merge``.

From a population of the recipe ``merging`` and its measured merges (measured where they are not there yet): features
of all models, a forest and a metanet trained on all merges, and the same trained four times without a quarter of the
tasks, whose predictions of merges of models of those tasks alone calibrate intervals and variances, and are what the
model card tells.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from weightspace.errors import WeightspaceError
from weightspace.mergeability.features import Comparison, compare
from weightspace.mergeability.forest import Forest
from weightspace.mergeability.measure import BARRIER, METHODS, families, measure_population, read_rows
from weightspace.mergeability.metanet import CONFIG, Reader, answers, train
from weightspace.mergeability.outcome import Cells, Observed, Outcome, effect_terms, link, unlink
from weightspace.mergeability.prior import _SHARE, CARD, EFFECTS, MODEL, Prior, Spread
from weightspace.metanets.operator import OperatorMetanet

Array = NDArray[np.float64]
_log = logging.getLogger(__name__)

FOLDS: tuple[tuple[int, ...], ...] = ((0, 7, 10, 12), (1, 4, 5, 14), (2, 3, 8, 11), (6, 9, 13, 15))
"""Tasks that are held out together: several data sets in each, and the two tasks of one network together."""
PLAN: Mapping[str, Any] = {"trees": 40, "leaf": 9, "epochs": 6, "cells": 1000, "seconds": 180.0, "places": 400}
"""Sizes of the forest and its leaves; epochs, cells and seconds of the metanet; cells that distances are taken to."""


@dataclass(frozen=True, eq=False)
class Measured:
    """Measured merges of several families, cell by cell.

    ``merges``: family and numbers of its models; ``slots``: numbers of the tasks they are about; ``x (cells,
    features)`` and ``y (cells, methods)`` retained accuracy (for the barrier what is left, 1 − barrier; NaN for
    triples); ``sets (cells,)`` the merge of each cell; ``outcome (merges, methods)``.
    """

    families: Mapping[str, Comparison]
    readers: Mapping[str, Reader]
    merges: tuple[tuple[str, tuple[int, ...]], ...]
    slots: tuple[frozenset[int], ...]
    methods: tuple[str, ...]
    x: Array = field(repr=False)
    y: Array = field(repr=False)
    sets: NDArray[np.int64] = field(repr=False)
    outcome: Array = field(repr=False)

    def cells(self, merges: NDArray[np.int64]) -> NDArray[np.int64]:
        """Numbers of the cells of merges."""
        return np.flatnonzero(np.isin(self.sets, merges))

    def means(self, t: Array) -> Array:
        """Outcomes of all merges from cells on the link scale: ``(merges, methods)``, NaN where cells are."""
        count = np.bincount(self.sets, minlength=len(self.merges))
        values = unlink(t)
        found: Array = np.stack(
            [np.bincount(self.sets, values[:, m], len(self.merges)) for m in range(values.shape[1])], axis=1
        ) / count[:, None]  # fmt: skip
        return found


def gather(folder: Path, rows: Sequence[Mapping[str, Any]], methods: Sequence[str] = METHODS) -> Measured:
    """Measured merges with the features of their models, read from the population's folder."""
    from weightspace.wiring import wiring

    by: dict[tuple[str, tuple[str, ...]], dict[str, Mapping[str, Any]]] = {}
    for row in rows:
        by.setdefault((str(row["family"]), tuple(row["models"])), {})[row["method"]] = row
    whole = {key: found for key, found in by.items() if all(m in found for m in methods)}
    if not whole:
        raise WeightspaceError("there are no merges measured by every method; run the harness longer")
    comparisons, readers, names = {}, {}, {}
    wirings: dict[Any, Any] = {}
    for family in families(folder):
        if not any(key[0] == family.name for key in whole):
            continue
        # Families of one architecture share a wiring, so that their networks share batches.
        shapes = tuple((n, tuple(t.shape)) for n, t in family.base.items())
        found = wirings.setdefault(shapes, None) or wiring(folder / family.name)
        wirings[shapes] = found
        names[family.name] = list(family.models)
        comparisons[family.name] = compare(family.models, family.base, found)
        readers[family.name] = Reader(family.base, list(family.models.values()), found)
        _log.info("%s: %r", family.name, comparisons[family.name])
    merges, slots, xs, ys, sets, outcomes = [], [], [], [], [], []
    for (family_name, models), found_rows in whole.items():
        members = tuple(names[family_name].index(m) for m in models)
        first = found_rows[methods[0]]
        barrier = found_rows.get("linear", {}).get(BARRIER, np.nan)
        merges.append((family_name, members))
        slots.append(frozenset(_slot(t) for own in first["tasks"] for t in own))
        xs.append(comparisons[family_name].vectors([members]))
        kept = np.array([found_rows[m]["retained"] for m in methods]).T
        ys.append(np.column_stack([kept, np.full(len(members), 1 - barrier)]))
        sets += [len(merges) - 1] * len(members)
        outcomes.append([*(found_rows[m]["outcome"] for m in methods), 1 - barrier])
    return Measured(
        comparisons, readers, tuple(merges), tuple(slots), (*methods, BARRIER), np.concatenate(xs), np.concatenate(ys),
        np.array(sets), np.array(outcomes),
    )  # fmt: skip


def _slot(task: str) -> int:
    return int(task.split(":")[0].split("~")[0])


def splits(measured: Measured) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64]]]:
    """For each fold of tasks: merges that have none of them, and merges that have no other."""
    for fold in FOLDS:
        held = set(fold)
        yield (
            np.array([i for i, s in enumerate(measured.slots) if not s & held], dtype=np.int64),
            np.array([i for i, s in enumerate(measured.slots) if s <= held], dtype=np.int64),
        )


def fit_forest(measured: Measured, merges: NDArray[np.int64], plan: Mapping[str, Any] = PLAN, seed: int = 0) -> Forest:
    """The forest of some merges; the barrier of triples, which means nothing, is filled in by that of pairs."""
    at = measured.cells(merges)
    y = link(measured.y[at])
    known = np.isfinite(measured.y[at, -1])
    x = measured.x[at]
    if not known.all() and known.any():
        y[~known, -1] = Forest.fit(x[known], y[known, -1:], trees=20, leaf=plan["leaf"], seed=seed)(x[~known])[:, 0]
    return Forest.fit(x, y, trees=plan["trees"], leaf=plan["leaf"], seed=seed)


def fit_metanet(
    measured: Measured, merges: NDArray[np.int64], plan: Mapping[str, Any] = PLAN, seed: int = 0
) -> OperatorMetanet:
    """The metanet of some merges: of a random part of their cells, as many as the plan says."""
    chosen = np.random.default_rng(seed).permutation(measured.cells(merges))[: plan["cells"]]
    y = link(measured.y[chosen])
    y[~np.isfinite(measured.y[chosen])] = np.nan
    cells = []
    for c in chosen:
        family, members = measured.merges[measured.sets[c]]
        own = members[int(c - np.flatnonzero(measured.sets == measured.sets[c])[0])]
        cells.append((measured.readers[family], own, [j for j in members if j != own]))
    return train(cells, y, epochs=plan["epochs"], seed=seed, seconds=plan["seconds"])


def ask_metanet(measured: Measured, metanet: OperatorMetanet, merges: NDArray[np.int64]) -> Array:
    """Its answers to the cells of merges, in their order: ``(cells, methods)``."""
    asked = [measured.merges[m] for m in merges]
    return np.concatenate([answers(metanet, measured.readers[family], [members]) for family, members in asked])


def out_of_fold(measured: Measured, plan: Mapping[str, Any] = PLAN, metanet: bool = True) -> dict[str, Array]:
    """Predictions of merges of held-out tasks by what was trained without them: ``(cells, methods)``, NaN elsewhere.

    ``"forest"``, ``"metanet"`` and ``"both"``, their weighted mean; ``"fold"`` ``(merges,)`` says which, -1 none.
    """
    forest, net = np.full(measured.y.shape, np.nan), np.full(measured.y.shape, np.nan)
    which = np.full(len(measured.merges), -1.0)
    for fold, (train_on, test_on) in enumerate(splits(measured)):
        at = measured.cells(test_on)
        which[test_on] = fold
        forest[at] = fit_forest(measured, train_on, plan, fold)(measured.x[at])
        if metanet:
            net[at] = ask_metanet(measured, fit_metanet(measured, train_on, plan, fold), test_on)
        _log.info("fold %d: %d merges learned from, %d held out", fold, len(train_on), len(test_on))
    both = (1 - _SHARE) * forest + _SHARE * net if metanet else forest
    return {"forest": forest, "metanet": net, "both": both, "fold": which}


def effects(measured: Measured, predicted: Array, method: int, most: int = 120) -> dict[str, float]:
    """Variances of the effects in what predictions missed: medians over families, by marginal likelihood."""
    found: list[Mapping[str, float]] = []
    for family in measured.families:
        mine = [
            m for m, (f, s) in enumerate(measured.merges)
            if f == family and len(s) == 2 and np.isfinite(predicted[measured.sets == m, method]).all()
        ][:most]  # fmt: skip
        if len(mine) < 12:
            continue
        at = np.concatenate([np.flatnonzero(measured.sets == m) for m in mine])
        cells = Cells.of([measured.merges[m][1] for m in mine], len(measured.families[family].models))
        terms = [t for t in effect_terms(cells) if t.name in EFFECTS]
        seen = Observed.cells(np.arange(len(cells)), measured.y[at, method], len(cells))
        found.append(Outcome.start(terms, predicted[at, method]).fit(seen, centred=False).variances)
    if not found:
        return dict.fromkeys(EFFECTS, 0.1)
    return {name: float(np.median([v[name] for v in found])) for name in EFFECTS}


def calibrated(
    measured: Measured, forest: Forest, metanet: OperatorMetanet | None, held: Mapping[str, Array],
    plan: Mapping[str, Any] = PLAN,
) -> Prior:  # fmt: skip
    """The model from what was trained on everything and predictions of what was held out."""
    means, test = measured.means(held["both"]), held["fold"] >= 0
    spreads, variances = {}, {}
    for m, method in enumerate(measured.methods):
        ok = test & np.isfinite(means[:, m]) & np.isfinite(measured.outcome[:, m])
        spreads[method] = Spread.fit(means[ok, m], measured.outcome[ok, m])
        variances[method] = effects(measured, held["both"], m)
    centre = np.median(measured.x, axis=0)
    unit = np.maximum(measured.x.std(0), 1e-3)
    some = np.random.default_rng(0).permutation(len(measured.x))[: plan["places"]]
    places = np.clip((measured.x[some] - centre) / unit, -20, 20).astype(np.float16).astype(np.float64)
    prior = Prior(
        measured.methods, forest, metanet, variances, spreads, centre, unit, places, np.zeros(1),
        facts={"merges": len(measured.merges), "families": len(measured.families), "date": date.today().isoformat()},
    )  # fmt: skip
    # Of merges of held-out tasks, how far they lie from those of the other tasks.
    far = []
    for train_on, test_on in splits(measured):
        at = measured.cells(train_on)
        draw = np.random.default_rng(1).permutation(len(at))[: plan["places"]]
        part = Prior(
            measured.methods, forest, None, {}, {}, centre, unit,
            np.clip((measured.x[at[draw]] - centre) / unit, -20, 20), np.zeros(1),
        )  # fmt: skip
        test_cells = measured.cells(test_on)
        d = part.far(measured.x[test_cells])
        far += [d[measured.sets[test_cells] == m].max() for m in test_on]
    return Prior(**{**prior.__dict__, "distances": np.sort(np.array(far))})


def make(
    zoo: Path, rows: Path, out: Path, *, plan: Mapping[str, Any] | None = None, pairs: int = 5600, triples: int = 960,
    held: Path | None = None, measure_more: bool = True,
) -> Prior:  # fmt: skip
    """Everything: measure what is missing, train, calibrate, write the files and the card.

    ``held``: a file (.npz) where predictions of held-out merges are kept, for ``tests/benchmarks``.
    """
    chosen = {**PLAN, **(plan or {})}
    if measure_more:
        rows.parent.mkdir(parents=True, exist_ok=True)
        measure_population(zoo, rows, pairs=pairs, triples=triples)
    measured = gather(zoo, read_rows(rows))
    _log.info("%d merges, %d cells", len(measured.merges), len(measured.sets))
    predicted = out_of_fold(measured, chosen)
    if held is not None:
        merges = np.array([f"{f}:{','.join(map(str, s))}" for f, s in measured.merges])
        np.savez(held, allow_pickle=False, **{**predicted, "merges": merges})
    everything = np.arange(len(measured.merges))
    forest = fit_forest(measured, everything, chosen)
    metanet = fit_metanet(measured, everything, chosen)
    prior = calibrated(measured, forest, metanet, predicted, chosen)
    path = prior.save(out)
    from weightspace.paths import write_whole

    write_whole(out / CARD, card(measured, predicted, prior, path.stat().st_size, chosen).encode())
    return Prior.load(out)


def figures(measured: Measured, predicted: Mapping[str, Array]) -> list[dict[str, Any]]:
    """What predictions of held-out merges are worth: rank correlation, mean error, coverage, by method and estimator.

    Intervals of one fold come from the misses in the other three.
    """
    from scipy.stats import spearmanr

    rows = []
    fold = predicted["fold"]
    for estimator in ("both", "forest", "metanet"):
        if not np.isfinite(predicted[estimator]).any():
            continue
        means = measured.means(predicted[estimator])
        for m, method in enumerate(measured.methods):
            ok = np.flatnonzero((fold >= 0) & np.isfinite(means[:, m]) & np.isfinite(measured.outcome[:, m]))
            p, y = means[ok, m], measured.outcome[ok, m]
            held = []
            for k in range(len(FOLDS)):
                here = fold[ok] == k
                if here.any() and (~here).sum() > 20:
                    reach = Spread.fit(p[~here], y[~here]).reach(p[here])
                    held += list(np.abs(y[here] - p[here]) <= reach)
            family = np.array([measured.merges[i][0] for i in ok])
            within = [
                spearmanr(p[family == f], y[family == f])[0] for f in np.unique(family) if (family == f).sum() > 9
            ]
            rows.append({
                "estimator": {"both": "forest and metanet"}.get(estimator, estimator), "method": method,
                "merges": len(ok), "spearman": float(spearmanr(p, y)[0]), "within": float(np.mean(within)),
                "error": 100 * float(np.abs(p - y).mean()), "coverage": float(np.mean(held)),
            })  # fmt: skip
    return rows


def card(
    measured: Measured, predicted: Mapping[str, Array], prior: Prior, size: int, plan: Mapping[str, Any]
) -> str:
    """The model card as Markdown."""
    lines = "\n".join(
        f"| {r['estimator']} | {r['method']} | {r['merges']} | {r['spearman']:.3f} | {r['within']:.3f} | "
        f"{r['error']:.1f} | {r['coverage']:.3f} |"
        for r in figures(measured, predicted)
    )
    triples = sum(len(s) == 3 for _, s in measured.merges)
    networks = sum(len(c.models) for c in measured.families.values())
    metanet = 0 if prior.metanet is None else sum(p.numel() for p in prior.metanet.parameters())
    low = min(c.parameters for c in measured.families.values())
    high = max(c.parameters for c in measured.families.values())
    variances = "\n".join(
        f"| {method} | " + " | ".join(f"{prior.variances[method][e]:.3f}" for e in EFFECTS) + " |"
        for method in prior.methods
    )
    return f"""# Merge-ability model of weightspace

{prior.facts.get("date", "")}. Apache-2.0, like weightspace. Made by `weightspace train merge`; {size / 1e6:.2f} MB.

What a model retains of its accuracy when it is merged with others, predicted from the weights of the models and of the
base they were fine-tuned from. A forest of {len(prior.forest.roots)} trees over {prior.places.shape[1]} features
(`weightspace/mergeability/features.py`) and an operator metanet of {metanet:,} parameters (width {CONFIG["width"]},
{CONFIG["rounds"]} rounds) over one wiring with channels w_base, τ_A, τ_B and their products give the prior mean, with
weights {1 - _SHARE:.2f} and {_SHARE:.2f}; effects of models and merges around it (variances below, on the link scale)
are updated as merges are measured.

## Learned from

{len(measured.merges):,} merges ({triples:,} of three models) of {networks}
networks of the recipe `merging`: {len(measured.families)} families of a base and its fine-tuned children on disjoint,
overlapping and contradicting tasks of small grey images; {low:,} to {high:,} parameters. Measured on at most 500 test
images of every model's own tasks, by {", ".join(prior.methods[:-1])}; the barrier is that half way between two models.

## On tasks that were held out

A quarter of the tasks at a time: trained on merges that have none of them, tested on merges of models of those tasks
alone. Spearman's ρ over all and within a family, mean error in points, coverage of 90 % intervals calibrated on the
other folds. Cells for the metanet's training: at most {plan["cells"]}, {plan["epochs"]} epochs.

| estimator | method | merges | ρ | ρ in a family | error | coverage |
| --- | --- | --- | --- | --- | --- | --- |
{lines}

## Variances of effects

| method | {" | ".join(EFFECTS)} |
| --- |{" --- |" * len(EFFECTS)}
{variances}

## Limits

- Small networks on small images, fine-tuned for minutes by one recipe: nothing is known about others, and the
  applicability flag says so (distance to the nearest merges learned from, in the forest's features, against that of
  merges of held-out tasks; a proved wiring; a base).
- Outside its range nothing is predicted from weights; measured merges of the models still are used, around the same
  prior with its variances.
- The accuracy retained is that on the models' own tasks, relative to each by itself. A weak model loses little.
- Intervals hold on average over merges like those of the population, not for each family of models.
"""


__all__ = [
    "CARD", "FOLDS", "MODEL", "PLAN", "Measured", "effects", "figures", "gather", "make", "out_of_fold", "splits",
]  # fmt: skip
