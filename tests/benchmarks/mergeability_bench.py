"""Merge-ability on the public benchmark of 190 merged ViT pairs: ``python tests/benchmarks/mergeability_bench.py``.

Twenty ViT-B/16, each fine-tuned on a task of its own; for every pair 29 metrics taken before the merge and the accuracy
after weight averaging and task arithmetic. Three questions:

- *One task held out*: every merge of one model is predicted, its partners' other merges are known. Within-fold r is
  Pearson's over the 19 merges of a held-out model, averaged over models; pooled r is over all 380 predictions.
- *After k measured merges* of the held-out model: the rest is predicted; over all choices of one, random ones of three,
  and the one that ``suggest`` picks.
- *Both tasks unseen*: a random half of the tasks is known, the pairs of the other half are predicted (200 draws).

Everything is chosen inside the training tasks: variances, and whether features are used (none; of damage; all), by the
marginal likelihood of training merges. A level estimated without a model is low where that model is high, which lowers
every pooled correlation before a measurement (it is -0.6 for the global mean). So "ours" does not learn the level of a
new model's merges from the others: it is a retained accuracy of 0.95 for both methods, effects of partners count as
contrasts, and one of six families of metrics, summarised over all partners (mean, least, largest), moves it. Which one
is chosen by leaving out one training task at a time, for both methods together; its weight by marginal likelihood.
"Level estimated" is the same model without that rule.

Intervals are a jackknife over tasks (Barber et al. 2021): with each training task left out in turn, how many deviations
of the posterior the outcomes of its merges miss by, and a quantile of that: the one that, taken over the other training
tasks, holds 90 % of each one's merges on the average. Baselines read no weights, or the published metrics by ridge.
Mean errors are in points of retained accuracy.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np
from numpy.typing import NDArray

from weightspace.mergeability.outcome import (
    Cells,
    Observed,
    Outcome,
    Posterior,
    effect_terms,
    expected,
    feature_terms,
    link,
    most_informative,
)

Array = NDArray[np.float64]
FOLDER = Path(__file__).resolve().parents[3] / "shared" / "benchmarks" / "mergeability-bench"
METHODS = {"weight averaging": "weight_avg", "task arithmetic": "arithmetic"}
LEVEL = 0.95
"""Retained accuracy around which the merges of a new model are thought to lie."""
FAMILIES = {
    "task vectors": ("task_vector", "weight_space"),
    "subspaces": ("right_subspace", "subspace", "interaction", "singular_value_overlap"),
    "spectra": ("effective_rank", "stable_rank", "layerwise", "spectral_gap", "singular_value_ratio"),
    "activations": ("activation",),
    "gradients of the encoder": ("encoder_gradient",),
    "gradients of the input": ("input_gradient",),
}
"""Families of metrics by how their names begin."""
AIMS = {
    "weight averaging": {"within": 0.87, "pooled": 0.70, "one": 0.85, "three": 0.90, "unseen": 0.4},
    "task arithmetic": {"within": 0.98, "pooled": 0.70, "one": 0.98, "three": 0.99, "unseen": 0.4},
}


@dataclass(frozen=True, eq=False)
class Bench:
    """``metrics (29, n, n)`` symmetric, by name; ``retained[method] (n, n)``: row i is what model i retains with j."""

    tasks: tuple[str, ...]
    names: tuple[str, ...]
    metrics: Array
    retained: dict[str, Array]

    @property
    def pairs(self) -> list[tuple[int, int]]:
        return list(combinations(range(len(self.tasks)), 2))


def load(folder: Path = FOLDER) -> Bench:
    """The benchmark's three files."""
    found = json.loads((folder / "results__mergeability__ViT-B-16__pairwise_metrics_N20.json").read_text())
    tasks = tuple(found["datasets"])
    n = len(tasks)
    stack = []
    for entry in found["metrics"].values():
        upper = np.array([[np.nan if x is None else x for x in row] for row in entry["matrix"]], dtype=np.float64)
        whole = np.where(np.isnan(upper), upper.T, upper)
        stack.append(np.where(np.isnan(whole) & ~np.eye(n, dtype=bool), np.nanmedian(whole), whole))
    retained = {}
    for method, word in METHODS.items():
        rows = json.loads((folder / f"results__ViT-B-16__{word}__all_pairwise_summary_N20.json").read_text())
        table = np.full((n, n), np.nan)
        for pair, row in rows.items():
            a, b = pair.split("__")
            table[tasks.index(a), tasks.index(b)] = row[a][0][f"normalized_acc/test/{a}"]
            table[tasks.index(b), tasks.index(a)] = row[b][0][f"normalized_acc/test/{b}"]
        retained[method] = table
    return Bench(tasks, tuple(found["metrics"]), np.array(stack), retained)


def features(bench: Bench) -> tuple[Array, Array]:
    """Features of models, ``(n, 4)``, and of cells, ``(380, 29)``; ranks as normal deviates.

    Nothing here knows the outcome of a merge. Of models: the norms of task vector and activations, which follow from
    the metrics (a pair's dot product over its cosine is the product of two norms), and the mean distance of gradients.
    """
    n = len(bench.tasks)
    of = dict(zip(bench.names, bench.metrics, strict=True))
    off = ~np.eye(n, dtype=bool)

    def norms(kind: str) -> Array:
        sums = np.log(np.abs(of[f"{kind}_dot_product"] / of[f"{kind}_cosine_similarity"]))
        design = np.zeros((len(bench.pairs), n))
        for row, pair in enumerate(bench.pairs):
            design[row, list(pair)] = 1
        found: Array = np.linalg.lstsq(design, np.array([sums[p] for p in bench.pairs]), rcond=None)[0]
        return found

    distances = [
        np.array([of[f"{kind}_gradient_l2_distance"][i][off[i]].mean() for i in range(n)])
        for kind in ("encoder", "input")
    ]
    models = np.array([_normal(row) for row in (norms("task_vector"), norms("activation"), *distances)]).T
    cells = Cells.of(bench.pairs, n)
    other = cells.partners.argmax(1)
    return models, np.array([_normal(m[cells.own, other]) for m in bench.metrics]).T


def families(bench: Bench) -> dict[str, Array]:
    """What each family of metrics says of models: mean, least and largest over all partners, ``(n, 3 · metrics)``."""
    off = ~np.eye(len(bench.tasks), dtype=bool)
    found = {}
    for family, starts in FAMILIES.items():
        chosen = [m for name, m in zip(bench.names, bench.metrics, strict=True) if name.startswith(starts)]
        rows = [_normal(np.array([f(row[o]) for row, o in zip(m, off, strict=True)]))
                for m in chosen for f in (np.mean, np.min, np.max)]  # fmt: skip
        found[family] = np.array(rows).T
    return found


def levels(table: Array, tasks: Sequence[int]) -> Array:
    """Of each task, its mean vulnerability and damage on the link scale, added, among the merges of ``tasks``."""
    part = link(table[np.ix_(tasks, tasks)])
    np.fill_diagonal(part, np.nan)
    found: Array = np.nanmean(part, 1) + np.nanmean(part, 0)
    return found


def moved(x: Array, y: Array, new: Array) -> float:
    """How far from the mean of levels ``y (n,)`` that of a model with features ``new (d,)`` lies, by those of ``x``.

    Gaussian-process regression with a linear kernel, averaged over the kernel's share of the variance by its evidence.
    """
    rows = np.vstack((x, new))
    kernel = rows @ rows.T
    kernel = kernel / np.diag(kernel).mean()
    centred, n = y - y.mean(), len(y)
    weights, found = [], []
    for share in np.linspace(0.02, 0.98, 25):
        total = centred.var() * (share * kernel[:n, :n] + (1 - share) * np.eye(n))
        back = np.linalg.solve(total, centred)
        evidence = -0.5 * centred @ back - 0.5 * np.linalg.slogdet(total)[1] + 0.5 * np.log(share * (1 - share))
        weights.append(evidence)
        found.append(centred.var() * share * kernel[n, :n] @ back)
    weight = np.exp(np.array(weights) - max(weights))
    return float(weight @ np.array(found) / weight.sum())


def telling(bench: Bench, tasks: Sequence[int]) -> str | None:
    """The family of metrics that tells levels of left-out tasks best, both methods together; None where none does."""
    errors: dict[str | None, float] = dict.fromkeys([None, *FAMILIES], 0.0)
    kinds = families(bench)
    for table in bench.retained.values():
        missed: dict[str | None, list[float]] = {k: [] for k in errors}
        for q in tasks:
            rest = [i for i in tasks if i != q]
            known = levels(table, rest)
            off = float(np.mean(link(table[q, rest])) + np.mean(link(table[rest, q])) - known.mean())
            missed[None].append(off)
            for name, x in kinds.items():
                missed[name].append(off - moved(x[rest], known, x[q]))
        plain = float(np.square(missed[None]).mean())
        for key, values in missed.items():
            errors[key] += float(np.square(values).mean()) / plain
    return min(errors, key=lambda k: errors[k])


def _normal(x: Array) -> Array:
    from scipy.stats import norm, rankdata

    found: Array = norm.ppf((rankdata(x) - 0.5) / len(x))
    return found


def fitted(bench: Bench, method: str, train: NDArray[np.int64], starts: Sequence[Outcome], given: bool) -> Outcome:
    """The model with the highest evidence of the merges ``train``; ``given``: none estimates the common level."""
    cells = Cells.of(bench.pairs, len(bench.tasks))
    seen = observed(bench, method, np.flatnonzero(np.isin(cells.sets, train)))
    return max((start.fit(seen, centred=not given) for start in starts), key=lambda m: m.evidence)


def observed(bench: Bench, method: str, which: NDArray[np.int64]) -> Observed:
    """Cells as they were measured."""
    cells = Cells.of(bench.pairs, len(bench.tasks))
    other = cells.partners.argmax(1)
    return Observed.cells(which, bench.retained[method][cells.own[which], other[which]], len(cells))


def _quantile(groups: Sequence[Array], coverage: float) -> float:
    """The quantile of all scores whose like among the other groups holds that share of each group, on the average."""
    level = coverage
    for level in np.arange(coverage, 1, 0.005):
        held = [
            np.mean(group <= np.quantile(np.concatenate([g for g in groups if g is not group]), level))
            for group in groups
        ]
        if np.mean(held) >= coverage:
            break
    return float(np.quantile(np.concatenate(groups), level))


def r(a: Any, b: Any) -> float:
    """Pearson's correlation; 0 where one side is constant."""
    a, b = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    return float(np.corrcoef(a, b)[0, 1]) if a.std() > 1e-12 and b.std() > 1e-12 else 0.0


class Experiment:
    """All questions for one method."""

    def __init__(self, bench: Bench, method: str, draws: int, told: Sequence[str | None]) -> None:
        self.bench, self.method, self.draws, self.told = bench, method, draws, told
        self.n = len(bench.tasks)
        self.cells = Cells.of(bench.pairs, self.n)
        self.directed = bench.retained[method]
        self.table = (self.directed + self.directed.T) / 2
        self.truth = np.array([self.table[p] for p in bench.pairs])
        self.kinds = families(bench)
        models, pair = features(bench)
        self.plain = effect_terms(self.cells)
        more = feature_terms(self.cells, models, pair)
        damage = [t for t in more if t.name == "damage by features"]
        self.starts = {
            given: [
                Outcome.start([*self.plain[int(given) :], *terms], float(link(np.array(LEVEL))) if given else 0.0)
                for terms in ((), damage, more)
            ]
            for given in (False, True)
        }
        flat = bench.metrics[:, [p[0] for p in bench.pairs], [p[1] for p in bench.pairs]].T
        self.flat = (flat - flat.mean(0)) / flat.std(0)

    def means(self, posterior: Posterior, merges: Sequence[int] | NDArray[np.int64], shift: float = 0.0) -> Array:
        """Outcomes of pairs; ``shift`` moves all of their cells on the link scale."""
        at = np.concatenate([self.cells.where(int(s)) for s in merges])
        moved_to = Posterior(posterior.mean + shift, posterior.covariance)
        found: Array = expected(moved_to, at).reshape(-1, 2).mean(1)
        return found

    def spread(self, posterior: Posterior, merges: Sequence[int] | NDArray[np.int64]) -> Array:
        """Deviation of the mean of each pair's cells on the link scale."""
        return np.array([
            np.sqrt(posterior.covariance[np.ix_(c, c)].mean()) for c in (self.cells.where(int(s)) for s in merges)
        ])  # fmt: skip

    def shift(self, posterior: Posterior, merges: NDArray[np.int64], tasks: Sequence[int], new: int,
              told: str | None) -> float:  # fmt: skip
        """From the level of a new model's merges under the posterior to the one given and moved by its features."""
        at = np.concatenate([self.cells.where(int(s)) for s in merges])
        by = 0.0
        if told is not None:
            x = self.kinds[told]
            by = moved(x[list(tasks)], levels(self.directed, tasks), x[new]) / 2
        # Means under the posterior lie below medians: the level is that of the mean.
        return float(link(np.array(LEVEL)) + by - (posterior.mean[at] - np.diag(posterior.covariance)[at] / 2).mean())

    def ridge(self, x: Array, train: NDArray[np.int64], test: NDArray[np.int64]) -> Array:
        """Features of pairs by ridge, its penalty chosen by cross-validation inside the training merges."""
        from sklearn.linear_model import RidgeCV

        found: Array = RidgeCV(np.logspace(-1, 4, 20)).fit(x[train], self.truth[train]).predict(x[test])
        return found

    # ---------------------------------------------------------------- one task held out

    def held_out(self) -> Iterator[dict[str, Any]]:
        pairs = np.array(self.bench.pairs)
        kinds = ("global mean", "partner mean", "ridge", "ours, level estimated", "ours")
        zero: dict[str, list[tuple[Array, Array]]] = {k: [] for k in kinds}
        measured: dict[tuple[str, int], list[list[tuple[Array, Array]]]] = {}
        chosen: dict[str, list[tuple[Array, Array]]] = {}
        inside, raw, rng = [], [], np.random.default_rng(0)
        for t in range(self.n):
            mine = np.flatnonzero((pairs == t).any(1))
            rest = np.flatnonzero(~(pairs == t).any(1))
            tasks = [i for i in range(self.n) if i != t]
            partners = pairs[mine].sum(1) - t
            y = self.truth[mine]
            others = [np.mean([self.table[p, q] for q in range(self.n) if q not in (p, t)]) for p in partners]
            zero["global mean"].append((np.full(len(y), self.truth[rest].mean()), y))
            zero["partner mean"].append((np.array(others), y))
            zero["ridge"].append((self.ridge(self.flat, rest, mine), y))
            known = observed(self.bench, self.method, np.flatnonzero(np.isin(self.cells.sets, rest)))
            model = fitted(self.bench, self.method, rest, self.starts[True], True)
            posterior = model.posterior(known)
            mean = self.means(posterior, mine, self.shift(posterior, mine, tasks, t, self.told[t]))
            zero["ours"].append((mean, y))
            reach = self.spread(posterior, mine)
            missed = np.abs(link(y) - link(mean)) / reach
            inside.append(missed <= self.reach(model, tasks, self.told[t]))
            raw.append(missed <= 1.645)
            model = fitted(self.bench, self.method, rest, self.starts[False], False)
            zero["ours, level estimated"].append((self.means(model.posterior(known), mine), y))

            def after(given: list[int], model: Any = model, known: Any = known, mine: Any = mine, y: Any = y,
                      others: Any = others) -> tuple[tuple[Array, Array], tuple[Array, Array]]:  # fmt: skip
                cells = np.flatnonzero(np.isin(self.cells.sets, mine[given]))
                found = model.posterior(known.and_(observed(self.bench, self.method, cells)))
                left = [i for i in range(len(mine)) if i not in given]
                level = np.mean(y[given]) - np.mean(np.array(others)[given])
                return (self.means(found, mine[left]), y[left]), (np.array(others)[left] + level, y[left])

            for count, sets in ((1, [[i] for i in range(len(mine))]),
                                (3, [list(rng.choice(len(mine), 3, replace=False)) for _ in range(30)])):  # fmt: skip
                for name, column in (("ours", 0), ("partner mean + offset", 1)):
                    measured.setdefault((name, count), []).append([after(s)[column] for s in sets])
            targets = np.flatnonzero(np.isin(self.cells.sets, mine))
            pick, _ = most_informative(model, known, {i: self.cells.where(s) for i, s in enumerate(mine)}, targets)
            for name, column in (("ours", 0), ("partner mean + offset", 1)):
                chosen.setdefault(name, []).append(after([pick])[column])
        aims = AIMS[self.method]
        for name, folds in zero.items():
            aim = {"aim within": aims["within"], "aim pooled": aims["pooled"]} if name == "ours" else {}
            within = np.mean([r(*f) for f in folds])
            more = {"coverage": np.mean(inside)} if name == "ours" else {}
            yield self.row("one task held out", name, within=within, **self.pooled(folds), **aim, **more)
        yield self.row("one task held out", "ours, intervals as the posterior has them", coverage=np.mean(raw))
        for (name, count), runs in measured.items():
            aim = {"aim pooled": aims["one" if count == 1 else "three"]} if name == "ours" else {}
            scores = [self.pooled([fold[c] for fold in runs]) for c in range(len(runs[0]))]
            mean_ = {k: float(np.mean([s[k] for s in scores])) for k in scores[0]}
            yield self.row(f"after {count} measured", name, **mean_, **aim)
        for name, folds in chosen.items():
            yield self.row("after 1, as suggested", name, **self.pooled(folds))

    def reach(self, model: Outcome, tasks: Sequence[int], told: str | None, coverage: float = 0.9) -> float:
        """Deviations that intervals of a new task's merges reach: each training task left out, its variances kept."""
        pairs = np.array(self.bench.pairs)
        groups = []
        for q in tasks:
            rest = [i for i in tasks if i != q]
            own = np.array([s for s, p in enumerate(self.bench.pairs) if q in p and set(p) <= set(tasks)])
            seen = np.flatnonzero(np.isin(pairs, rest).all(1))
            known = observed(self.bench, self.method, np.flatnonzero(np.isin(self.cells.sets, seen)))
            posterior = model.posterior(known)
            mean = self.means(posterior, own, self.shift(posterior, own, rest, q, told))
            groups.append(np.abs(link(self.truth[own]) - link(mean)) / self.spread(posterior, own))
        return _quantile(groups, coverage)

    # ---------------------------------------------------------------- both tasks unseen

    def unseen(self) -> Iterator[dict[str, Any]]:
        pairs, rng = np.array(self.bench.pairs), np.random.default_rng(0)
        summed = np.concatenate([x[pairs[:, 0]] + x[pairs[:, 1]] for x in self.kinds.values()], axis=1)
        both = feature_terms(self.cells, np.concatenate(list(self.kinds.values()), axis=1), features(self.bench)[1])
        pair = [t for t in both if t.name == "features of the pair"]
        few = feature_terms(self.cells, *features(self.bench))
        ours = {
            "ours": [*self.plain, *few],
            "ours, kernel of the pair's metrics": [*self.plain, *pair],
            "ours, kernels of both models' metrics": [*self.plain, *[t for t in both if t not in pair]],
        }
        scores: dict[str, list[float]] = {"ridge": [], "ridge, both models' metrics added": [], **{k: [] for k in ours}}
        for _ in range(self.draws):
            seen = np.zeros(self.n, dtype=bool)
            seen[rng.permutation(self.n)[: self.n // 2]] = True
            train = np.flatnonzero(seen[pairs].all(1))
            test = np.flatnonzero(~seen[pairs].any(1))
            scores["ridge"].append(r(self.ridge(self.flat, train, test), self.truth[test]))
            scores["ridge, both models' metrics added"].append(r(self.ridge(summed, train, test), self.truth[test]))
            known = observed(self.bench, self.method, np.flatnonzero(np.isin(self.cells.sets, train)))
            for name, terms in ours.items():
                model = fitted(self.bench, self.method, train, [Outcome.start(terms)], False)
                scores[name].append(r(self.means(model.posterior(known), test), self.truth[test]))
        yield self.row("both tasks unseen", "global or partner mean", pooled=0.0)
        for name, found in scores.items():
            low, high = np.quantile(found, [0.025, 0.975])
            aim = {"aim pooled": AIMS[self.method]["unseen"]} if name == "ours" else {}
            yield self.row("both tasks unseen", name, pooled=float(np.mean(found)), low=float(low), high=float(high),
                           positive=float(np.mean(np.array(found) > 0)), **aim)  # fmt: skip

    def pooled(self, folds: list[tuple[Array, Array]]) -> dict[str, float]:
        p, y = (np.concatenate(x) for x in zip(*folds, strict=True))
        return {"pooled": r(p, y), "error": 100 * float(np.abs(p - y).mean())}

    def row(self, question: str, name: str, **figures: Any) -> dict[str, Any]:
        return {"method": self.method, "question": question, "predictor": name,
                **{k: float(v) for k, v in figures.items()}}  # fmt: skip


COLUMNS = ("within", "aim within", "pooled", "low", "high", "positive", "aim pooled", "error", "coverage")


def table(rows: list[dict[str, Any]]) -> str:
    """Rows as a Markdown table."""
    head = ("method", "question", "predictor", *COLUMNS)
    lines = ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    for row in rows:
        cells = [f"{row[k]:.3f}" if isinstance(row.get(k), float) else str(row.get(k, "")) for k in head]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    """All rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draws", type=int, default=200, help="halves of the tasks for which both are unseen")
    parser.add_argument("--folder", type=Path, default=FOLDER)
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    if not given.folder.is_dir():
        sys.exit(f"the benchmark's files are not in {given.folder}")
    bench, rows = load(given.folder), []
    n = len(bench.tasks)
    told = [telling(bench, [i for i in range(n) if i != t]) for t in range(n)]
    print(f"what moves the level: {', '.join(f'{told.count(k)} × {k}' for k in sorted(set(told), key=str))}",
          file=sys.stderr)  # fmt: skip
    for method in METHODS:
        experiment = Experiment(bench, method, given.draws, told)
        for part in (experiment.held_out, experiment.unseen):
            for row in part():
                rows.append(row)
                if not given.json:
                    print(json.dumps(row), file=sys.stderr, flush=True)
    print(json.dumps(rows, indent=1) if given.json else table(rows))


if __name__ == "__main__":
    main()
