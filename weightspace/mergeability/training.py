"""Making the merge-ability model that comes with weightspace: ``weightspace train merge``.

From a population of the recipe ``merging`` and its measured merges (both made where they are not there yet): features
of all models, a forest trained on all merges, and forests trained without the tasks of a merge, for every merge, whose
predictions calibrate intervals and variances and are what the model card tells. Models without a common base have a
forest of their own. A metanet is trained four times without a quarter of the tasks, and once more on everything where
that showed that it helps.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import date
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from weightspace.errors import WeightspaceError
from weightspace.mergeability.features import NAMES, Comparison, compare
from weightspace.mergeability.forest import Forest
from weightspace.mergeability.measure import BARRIER, METHODS, STRANGERS, families, measure_population, read_rows
from weightspace.mergeability.metanet import CONFIG, Reader, answers, train
from weightspace.mergeability.outcome import Cells, Observed, Outcome, effect_terms, link, unlink
from weightspace.mergeability.prior import CARD, COVERAGE, EFFECTS, MODEL, Prior, Spread
from weightspace.mergeability.prior import STRANGERS as STRANGE
from weightspace.metanets.operator import OperatorMetanet

Array = NDArray[np.float64]
_log = logging.getLogger(__name__)

RECIPE = "merging"
GROUPS: tuple[tuple[int, ...], ...] = ((0, 7), (1, 2), (3, 8), (4, 5), (6, 9), (10, 12), (11, 14), (13, 15))
"""Tasks that are held out together: different data sets, and as far as possible the two tasks of one network."""
FOLDS: tuple[tuple[int, ...], ...] = ((0, 7, 10, 12), (1, 2, 4, 5), (3, 8, 11, 14), (6, 9, 13, 15))
"""Groups two by two, where training takes too long to hold out those of every merge by themselves."""
PLAN: Mapping[str, Any] = {
    "trees": 40, "leaf": 4, "metanet": True, "epochs": 6, "cells": 1200, "seconds": 300.0, "places": 400,
    "least": 100, "pairs": 2240, "triples": 384, "strangers": 640,
}  # fmt: skip
"""Sizes of the forest and its leaves; whether to try a metanet, its epochs, cells and seconds; cells that distances
are taken to; fewest merges to learn from where some are held out; merges to measure."""


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

    @cached_property
    def groups(self) -> tuple[frozenset[int], ...]:
        """The groups of tasks that each merge is about."""
        of = {slot: g for g, group in enumerate(GROUPS) for slot in group}
        return tuple(frozenset(of[t] for t in s) for s in self.slots)

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


def gather_strangers(folder: Path, rows: Sequence[Mapping[str, Any]]) -> Measured:
    """Measured pairs without a common base, with the features of the first and of the second carried onto it.

    Methods that were not measured of a pair (of different widths) are NaN.
    """
    from weightspace.align.optimal_transport import optimal_transport
    from weightspace.wiring import wiring

    by: dict[tuple[str, str], dict[str, Mapping[str, Any]]] = {}
    tensors: dict[str, tuple[str, Mapping[str, Tensor]]] = {}
    wirings = {}
    for family in families(folder):
        wirings[family.name] = wiring(folder / family.name)
        tensors |= {name: (family.name, model) for name, model in family.models.items()}
    for row in rows:
        if " | " in str(row["family"]):
            by.setdefault((row["models"][0], row["models"][1]), {})[row["method"]] = row
    merges, slots, xs, ys, outcomes = [], [], [], [], []
    for (one, other), found in by.items():
        (family_a, a), (family_b, b) = tensors[one], tensors[other]
        moved = optimal_transport(a, b, wirings[family_b], wiring_a=wirings[family_a])
        carried = wirings[family_b].apply(moved.permutations, b) if moved.aligned is None else moved.aligned
        merges.append((f"{family_a} | {family_b}", (0, 1)))
        slots.append(frozenset(_slot(t) for own in next(iter(found.values()))["tasks"] for t in own))
        xs.append(compare({one: a, other: dict(carried)}, None, wirings[family_a]).vectors([(0, 1)]))
        ys.append([[found[m]["retained"][i] if m in found else np.nan for m in STRANGERS] for i in (0, 1)])
        outcomes.append([found[m]["outcome"] if m in found else np.nan for m in STRANGERS])
    if not merges:
        raise WeightspaceError("there are no measured merges of models without a common base; run the harness longer")
    return Measured(
        {}, {}, tuple(merges), tuple(slots), STRANGERS, np.concatenate(xs), np.concatenate([np.array(y) for y in ys]),
        np.repeat(np.arange(len(merges)), 2), np.array(outcomes, dtype=np.float64),
    )  # fmt: skip


def _slot(task: str) -> int:
    return int(task.split(":")[0].split("~")[0])


def rounds(measured: Measured, least: int = PLAN["least"]) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64]]]:
    """For each set of groups of tasks that merges are about: all merges that have none of them, and those merges.

    Every merge is held out once, with all of its tasks and those that are grouped with them; not those that leave too
    few to learn from.
    """
    for held in sorted(set(measured.groups), key=sorted):
        train_on = np.array([i for i, g in enumerate(measured.groups) if not g & held], dtype=np.int64)
        if len(train_on) >= least:
            yield train_on, np.array([i for i, g in enumerate(measured.groups) if g == held], dtype=np.int64)


def splits(measured: Measured) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64]]]:
    """For each fold of tasks: merges that have none of them, and merges that have no other."""
    for fold in FOLDS:
        held = set(fold)
        yield (
            np.array([i for i, s in enumerate(measured.slots) if not s & held], dtype=np.int64),
            np.array([i for i, s in enumerate(measured.slots) if s <= held], dtype=np.int64),
        )


def fit_forest(measured: Measured, merges: NDArray[np.int64], plan: Mapping[str, Any] = PLAN, seed: int = 0) -> Forest:
    """The forest of some merges; what was not measured of all (barriers of triples) is filled in by a smaller one."""
    at = measured.cells(merges)
    y, x = link(measured.y[at]), measured.x[at]
    for m in range(y.shape[1]):
        known = np.isfinite(measured.y[at, m])
        if not known.all() and known.any():
            y[~known, m] = Forest.fit(x[known], y[known, m : m + 1], trees=20, leaf=plan["leaf"], seed=seed)(x[~known])[
                :, 0
            ]
    return Forest.fit(x, y, trees=plan["trees"], leaf=plan["leaf"], seed=seed)


def held_out(measured: Measured, plan: Mapping[str, Any] = PLAN) -> Array:
    """Predictions of every merge by forests that were trained without its tasks: ``(cells, methods)``, NaN where none.

    On the link scale.
    """
    found = np.full(measured.y.shape, np.nan)
    for k, (train_on, test_on) in enumerate(rounds(measured, plan["least"])):
        at = measured.cells(test_on)
        found[at] = fit_forest(measured, train_on, plan, k)(measured.x[at])
    count = len(np.unique(measured.sets[np.isfinite(found[:, 0])]))
    _log.info("%d of %d merges held out with all of their tasks", count, len(measured.merges))
    return found


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


def out_of_fold(measured: Measured, plan: Mapping[str, Any] = PLAN) -> dict[str, Array]:
    """Forest and metanet, trained without a quarter of the tasks, on merges of those tasks: ``(cells, methods)``.

    ``"forest"``, ``"metanet"`` and ``"both"``, their mean with the weight that was best in the other quarters, NaN
    where a merge is about several; ``"fold"`` ``(merges,)`` says which, -1 none; ``"share"`` ``()`` the metanet's
    weight that is best in all.
    """
    forest, net = np.full(measured.y.shape, np.nan), np.full(measured.y.shape, np.nan)
    which = np.full(len(measured.merges), -1.0)
    for fold, (train_on, test_on) in enumerate(splits(measured)):
        at = measured.cells(test_on)
        if not len(train_on) or not len(test_on):
            continue
        which[test_on] = fold
        forest[at] = fit_forest(measured, train_on, plan, fold)(measured.x[at])
        net[at] = ask_metanet(measured, fit_metanet(measured, train_on, plan, fold), test_on)
        _log.info("fold %d: %d merges learned from, %d held out", fold, len(train_on), len(test_on))
    truth, of = link(measured.y), which[measured.sets]

    def best(cells: NDArray[np.bool_]) -> float:
        shares = np.linspace(0, 0.6, 13)
        missed = [np.nanmean(np.abs(truth - (1 - w) * forest - w * net)[cells]) for w in shares]
        return float(shares[int(np.argmin(missed))])

    both = np.full(measured.y.shape, np.nan)
    for fold in range(len(FOLDS)):
        share = best((of >= 0) & (of != fold))
        both[of == fold] = ((1 - share) * forest + share * net)[of == fold]
    return {"forest": forest, "metanet": net, "both": both, "fold": which, "share": np.array(best(of >= 0))}


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
    measured: Measured, forest: Forest, held: Array, plan: Mapping[str, Any] = PLAN, *,
    metanet: OperatorMetanet | None = None, share: float = 0.0, base: bool = True,
) -> Prior:  # fmt: skip
    """The model from what was trained on everything, and predictions ``held (cells, methods)`` of what was held out."""
    means = measured.means(held)
    spreads, variances = {}, {}
    for m, method in enumerate(measured.methods):
        ok = np.flatnonzero(np.isfinite(means[:, m]) & np.isfinite(measured.outcome[:, m]))
        spreads[method] = Spread.fit(means[ok, m], measured.outcome[ok, m], [measured.groups[i] for i in ok])
        variances[method] = effects(measured, held, m)
    centre = np.median(measured.x, axis=0)
    unit = np.maximum(measured.x.std(0), 1e-3)

    def places(cells: NDArray[np.int64], seed: int) -> Array:
        some = np.random.default_rng(seed).permutation(cells)[: plan["places"]]
        z = np.clip((measured.x[some] - centre) / unit, -20, 20)
        found: Array = z.astype(np.float16).astype(np.float64)
        return found

    prior = Prior(
        measured.methods, forest, metanet, variances, spreads, centre, unit, places(np.arange(len(measured.x)), 0),
        np.zeros(1), share=share, base=base,
        facts={"merges": len(measured.merges), "families": len(measured.families), "date": date.today().isoformat()},
    )  # fmt: skip
    # Of merges of held-out tasks, how far they lie from those of the other tasks.
    far = []
    for train_on, test_on in splits(measured):
        part = replace(prior, places=places(measured.cells(train_on), 1))
        test_cells = measured.cells(test_on)
        d = part.far(measured.x[test_cells])
        far += [d[measured.sets[test_cells] == m].max() for m in test_on]
    return replace(prior, distances=np.sort(np.array(far)))


def make(
    zoo: Path, rows: Path, out: Path, *, plan: Mapping[str, Any] | None = None, held: Path | None = None,
    measure_more: bool = True, progress: bool = False,
) -> tuple[Prior, list[dict[str, Any]]]:  # fmt: skip
    """Everything: build the population and measure merges where they are missing, train, calibrate, write the files.

    ``plan``: entries of ``PLAN`` to change. ``held``: a file (.npz) where the metanet's predictions of held-out merges
    are kept; what is in it is not trained again. An interrupted call goes on where it was. Gives the model for merges
    with a common base and the figures of its card. Raises ``WeightspaceError`` for an entry that ``PLAN`` does not
    have, and where there are too few merges to learn from.
    """
    if unknown := sorted(set(plan or {}) - set(PLAN)):
        raise WeightspaceError(f"the plan has no entry {unknown[0]!r}; it has {', '.join(PLAN)}")
    chosen = {**PLAN, **(plan or {})}
    if not any(zoo.glob("*.safetensors")):
        from weightspace.zoo.recipe import load
        from weightspace.zoo.train import build_zoo

        build_zoo(load(RECIPE), zoo, progress=progress)
    if measure_more:
        rows.parent.mkdir(parents=True, exist_ok=True)
        measure_population(
            zoo, rows, pairs=chosen["pairs"], triples=chosen["triples"], strangers=chosen["strangers"]
        )  # fmt: skip
    found = read_rows(rows)
    measured, strange = gather(zoo, found), gather_strangers(zoo, found)
    _log.info("%d merges, %d without a common base", len(measured.merges), len(strange.merges))
    predicted, apart = held_out(measured, chosen), held_out(strange, chosen)
    if not (np.isfinite(predicted).any() and np.isfinite(apart).any()):
        raise WeightspaceError(
            f"no merge leaves {chosen['least']} others that have none of its tasks: measure more, or lower `least`"
        )
    everything = np.arange(len(measured.merges))
    forest = fit_forest(measured, everything, chosen)
    least = int(chosen["least"])
    table = [
        *figures(measured, predicted, least=least), *figures(strange, apart, "forest, no common base", least=least)
    ]  # fmt: skip
    metanet, share = None, 0.0
    if chosen["metanet"]:
        folds = _kept(held, measured) or out_of_fold(measured, chosen)
        if held is not None:
            np.savez(held, allow_pickle=False, **folds, merges=_labels(measured))
        rivals = {
            k: figures(measured, folds[k], f"{k}, a quarter held out", least) for k in ("forest", "metanet", "both")
        }  # fmt: skip
        table += [row for k in rivals for row in rivals[k]]
        share = float(folds["share"])
        if share > 0 and _helps(rivals["forest"], rivals["both"]):
            metanet, predicted = fit_metanet(measured, everything, chosen), folds["both"]
    prior = calibrated(measured, forest, predicted, chosen, metanet=metanet, share=share if metanet else 0.0)
    prior.save(out)
    everything = np.arange(len(strange.merges))
    calibrated(strange, fit_forest(strange, everything, chosen), apart, chosen, base=False).save(out, STRANGE)
    from weightspace.paths import write_whole

    write_whole(out / CARD, card(measured, strange, table, out, chosen).encode())
    return Prior.load(out), table


def _labels(measured: Measured) -> NDArray[np.str_]:
    return np.array([f"{f}:{','.join(map(str, s))}" for f, s in measured.merges])


def _kept(path: Path | None, measured: Measured) -> dict[str, Array] | None:
    """What an earlier run kept of the same merges."""
    if path is None or not path.exists():
        return None
    with np.load(path, allow_pickle=False) as file:
        found = {k: file[k] for k in file.files}
    same = np.array_equal(found.pop("merges", None), _labels(measured)) and found["forest"].shape == measured.y.shape
    return found if same else None


def _helps(without: Sequence[Mapping[str, Any]], with_: Sequence[Mapping[str, Any]]) -> bool:
    """Whether the error of methods is smaller with the metanet, on the mean over them."""
    return float(np.mean([r["error"] for r in with_])) < float(np.mean([r["error"] for r in without]))


def coverage(
    measured: Measured, predicted: Array, method: int, level: float = COVERAGE, least: int = PLAN["least"]
) -> Array:
    """Whether intervals hold the outcomes of held-out merges, by misses in merges of other tasks alone: ``(merges,)``.

    NaN where a merge was not predicted, or too few others were.
    """
    mean, truth = measured.means(predicted)[:, method], measured.outcome[:, method]
    known = np.isfinite(mean) & np.isfinite(truth)
    found = np.full(len(mean), np.nan)
    for held in set(measured.groups):
        here = known & np.array([g == held for g in measured.groups])
        apart = np.flatnonzero(known & np.array([not g & held for g in measured.groups]))
        if here.any() and len(apart) >= least:
            spread = Spread.fit(mean[apart], truth[apart], [measured.groups[i] for i in apart])
            found[here] = np.abs(truth - mean)[here] <= spread.reach(mean[here], level)
    return found


def figures(
    measured: Measured, predicted: Array, estimator: str = "forest", least: int = PLAN["least"]
) -> list[dict[str, Any]]:
    """What predictions of held-out merges are worth: rank correlation, mean error, coverage, by method."""
    from scipy.stats import spearmanr

    means = measured.means(predicted)
    rows = []
    for m, method in enumerate(measured.methods):
        ok = np.flatnonzero(np.isfinite(means[:, m]) & np.isfinite(measured.outcome[:, m]))
        if len(ok) < 2:
            continue
        p, y = means[ok, m], measured.outcome[ok, m]
        family = np.array([measured.merges[i][0] for i in ok])
        within = [spearmanr(p[family == f], y[family == f])[0] for f in np.unique(family) if (family == f).sum() > 9]
        rows.append({
            "estimator": estimator, "method": method, "merges": len(ok), "spearman": float(spearmanr(p, y)[0]),
            "within": float(np.mean(within)) if within else float("nan"), "error": 100 * float(np.abs(p - y).mean()),
            "coverage": _known_mean(coverage(measured, predicted, m, least=least)),
        })  # fmt: skip
    return rows


def _known_mean(values: Array) -> float:
    known = values[np.isfinite(values)]
    return float(known.mean()) if len(known) else float("nan")


def card(
    measured: Measured, strange: Measured, table: Sequence[Mapping[str, Any]], folder: Path, plan: Mapping[str, Any]
) -> str:
    """The model card as Markdown."""
    prior = Prior.load(folder)
    lines = "\n".join(
        f"| {r['estimator']} | {r['method']} | {r['merges']} | {r['spearman']:.3f} | {r['within']:.3f} | "
        f"{r['error']:.1f} | {r['coverage']:.3f} |"
        for r in table
    )
    triples = sum(len(s) == 3 for _, s in measured.merges)
    networks = sum(len(c.models) for c in measured.families.values())
    low = min(c.parameters for c in measured.families.values())
    high = max(c.parameters for c in measured.families.values())
    variances = "\n".join(
        f"| {method} | " + " | ".join(f"{prior.variances[method][e]:.3f}" for e in EFFECTS) + " |"
        for method in prior.methods
    )
    size = sum((folder / name).stat().st_size for name in (MODEL, STRANGE))
    tried = ""
    if prior.metanet is not None or any(str(r["estimator"]).startswith("metanet") for r in table):
        what = "is part of it, with" if prior.metanet is not None else "is not part of it, since it did not help:"
        count = sum(p.numel() for p in OperatorMetanet(len(prior.methods), **CONFIG).parameters())
        tried = f"""
An operator metanet ({count:,} parameters, width {CONFIG["width"]}, {CONFIG["rounds"]} rounds; {plan["epochs"]} epochs
over {plan["cells"]} cells) over one wiring, with channels w_base, τ_A, τ_B and their products, {what}
weight {prior.share:.2f} (figures below).
"""
    return f"""# Merge-ability model of weightspace

{prior.facts.get("date", "")}. Apache-2.0, like weightspace. Made by `weightspace train merge`; {size / 1e6:.2f} MB.

What a model retains of its accuracy when it is merged with others, predicted from the weights of the models and of the
base they were fine-tuned from: a forest of {len(prior.forest.roots)} trees over {len(NAMES)} features
(`weightspace/mergeability/features.py`) for every model of a merge gives the prior mean; effects of models and merges
around it (variances below, on the link scale) are updated as merges are measured.
{tried}
`{STRANGE}` is the same for pairs without a common base, with the features of the first and of the second
carried onto its neurons by optimal transport.

## Learned from

{len(measured.merges):,} merges ({triples:,} of three models) of {networks} networks of the recipe `{RECIPE}`:
{len(measured.families)} families of a base and its fine-tuned children on disjoint, overlapping and contradicting tasks
of small grey images; {low:,} to {high:,} parameters. Measured on at most 500 test images of every model's own tasks,
by {", ".join(prior.methods[:-1])}; the barrier is that half way between two models. And {len(strange.merges)} pairs of
different bases (other seeds; other widths, {int((~np.isfinite(strange.outcome[:, 0])).sum())} of them).

## On tasks that were held out

Every merge is predicted by a forest that was trained without any of its tasks or of those grouped with them (8 groups);
"a quarter held out" is trained without a quarter of the tasks, tested on merges of those tasks alone. Spearman's ρ over
all and within a family, mean error in points of retained accuracy (and of the barrier), coverage of 90 % intervals that
were calibrated on merges without the tasks.

| estimator | method | merges | ρ | ρ in a family | error | coverage |
| --- | --- | --- | --- | --- | --- | --- |
{lines}

Baselines beside it and the regret of choosing by it: `python tests/benchmarks/mergeability_population.py`.

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
- Which features are read was worked out on some 1,100 of these merges (with tasks held out), so the figures above are
  somewhat optimistic.
"""


__all__ = [
    "FOLDS", "GROUPS", "PLAN", "Measured", "calibrated", "coverage", "effects", "figures", "fit_forest", "gather",
    "gather_strangers", "held_out", "make", "out_of_fold", "rounds", "splits",
]  # fmt: skip
