"""Merge-ability on the public benchmark of 190 merged ViT pairs: ``python tests/benchmarks/mergeability_bench.py``.

Twenty ViT-B/16, each fine-tuned on a task of its own; for every pair 29 metrics taken before the merge and the accuracy
after weight averaging and task arithmetic. Three questions:

- *One task held out*: every merge of one model is predicted, its partners' other merges are known. Within-fold r is
  Pearson's over the 19 merges of a held-out model, averaged over models; pooled r is over all 380 predictions.
- *After k measured merges* of the held-out model: the rest is predicted; over all choices of one, random ones of three,
  and the one that ``suggest`` picks.
- *Both tasks unseen*: a random half of the tasks is known, the pairs of the other half are predicted (200 draws).

Variances, and whether features are used, maximise the marginal likelihood of training merges alone. "Level given" does
not estimate the common level but takes a retained accuracy of 0.95 for it: a level estimated without a model is low
where that model is high, which lowers every pooled correlation without a measurement (so it is -0.6 for the global
mean). Baselines read no weights, or the published metrics by ridge. Mean errors are in points of retained accuracy.
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
    effect_terms,
    feature_terms,
    link,
    most_informative,
    unlink,
)

Array = NDArray[np.float64]
FOLDER = Path(__file__).resolve().parents[3] / "shared" / "benchmarks" / "mergeability-bench"
METHODS = {"weight averaging": "weight_avg", "task arithmetic": "arithmetic"}
LEVEL = 0.95
"""Retained accuracy around which models' effects lie where that level is not estimated."""
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


def r(a: Any, b: Any) -> float:
    """Pearson's correlation; 0 where one side is constant."""
    a, b = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    return float(np.corrcoef(a, b)[0, 1]) if a.std() > 1e-12 and b.std() > 1e-12 else 0.0


class Experiment:
    """All questions for one method."""

    def __init__(self, bench: Bench, method: str, draws: int) -> None:
        self.bench, self.method, self.draws = bench, method, draws
        self.n = len(bench.tasks)
        self.cells = Cells.of(bench.pairs, self.n)
        directed = bench.retained[method]
        self.table = (directed + directed.T) / 2
        self.truth = np.array([self.table[p] for p in bench.pairs])
        self.models, self.pair = features(bench)
        plain = effect_terms(self.cells)
        more = feature_terms(self.cells, self.models, self.pair)
        self.starts = {
            given: [
                Outcome.start([*plain[int(given) :], *terms], float(link(np.array(LEVEL))) if given else 0.0)
                for terms in ((), more)
            ]
            for given in (False, True)
        }
        flat = bench.metrics[:, [p[0] for p in bench.pairs], [p[1] for p in bench.pairs]].T
        self.flat = (flat - flat.mean(0)) / flat.std(0)

    def means(self, mean: Array) -> Array:
        """Outcomes of all pairs from the means of all cells."""
        found: Array = unlink(mean).reshape(-1, 2).mean(1)
        return found

    def ridge(self, train: NDArray[np.int64], test: NDArray[np.int64]) -> Array:
        """The published metrics by ridge, its penalty chosen by cross-validation inside the training merges."""
        from sklearn.linear_model import RidgeCV

        found: Array = RidgeCV(np.logspace(-1, 4, 20)).fit(self.flat[train], self.truth[train]).predict(self.flat[test])
        return found

    # ---------------------------------------------------------------- one task held out

    def held_out(self) -> Iterator[dict[str, Any]]:
        pairs = np.array(self.bench.pairs)
        kinds = ("global mean", "partner mean", "ridge", "ours", "ours, level given")
        zero: dict[str, list[tuple[Array, Array]]] = {k: [] for k in kinds}
        measured: dict[tuple[str, int], list[list[tuple[Array, Array]]]] = {}
        chosen: dict[str, list[tuple[Array, Array]]] = {}
        inside, rng = [], np.random.default_rng(0)
        for t in range(self.n):
            mine = np.flatnonzero((pairs == t).any(1))
            rest = np.flatnonzero(~(pairs == t).any(1))
            partners = pairs[mine].sum(1) - t
            y = self.truth[mine]
            others = [np.mean([self.table[p, q] for q in range(self.n) if q not in (p, t)]) for p in partners]
            zero["global mean"].append((np.full(len(y), self.truth[rest].mean()), y))
            zero["partner mean"].append((np.array(others), y))
            zero["ridge"].append((self.ridge(rest, mine), y))
            known = observed(self.bench, self.method, np.flatnonzero(np.isin(self.cells.sets, rest)))
            for given in (True, False):
                model = fitted(self.bench, self.method, rest, self.starts[given], given)
                posterior = model.posterior(known)
                zero["ours, level given" if given else "ours"].append((self.means(posterior.mean)[mine], y))
            inside.append(self.coverage(posterior, mine))

            def after(given: list[int], model: Any = model, known: Any = known, mine: Any = mine, y: Any = y,
                      others: Any = others) -> tuple[tuple[Array, Array], tuple[Array, Array]]:  # fmt: skip
                cells = np.flatnonzero(np.isin(self.cells.sets, mine[given]))
                found = model.posterior(known.and_(observed(self.bench, self.method, cells)))
                left = [i for i in range(len(mine)) if i not in given]
                level = np.mean(y[given]) - np.mean(np.array(others)[given])
                return (self.means(found.mean)[mine[left]], y[left]), (np.array(others)[left] + level, y[left])

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
            aim = {"aim within": aims["within"], "aim pooled": aims["pooled"]} if name.startswith("ours") else {}
            within = np.mean([r(*f) for f in folds])
            yield self.row("one task held out", name, within=within, **self.pooled(folds), **aim)
        for (name, count), runs in measured.items():
            aim = {"aim pooled": aims["one" if count == 1 else "three"]} if name == "ours" else {}
            scores = [self.pooled([fold[c] for fold in runs]) for c in range(len(runs[0]))]
            mean = {k: float(np.mean([s[k] for s in scores])) for k in scores[0]}
            yield self.row(f"after {count} measured", name, **mean, **aim)
        for name, folds in chosen.items():
            yield self.row("after 1, as suggested", name, **self.pooled(folds))
        yield self.row("one task held out", "ours, 90 % intervals", coverage=float(np.mean(inside)))

    def coverage(self, posterior: Any, mine: NDArray[np.int64]) -> float:
        from weightspace.mergeability.outcome import outcome_interval

        ends = [outcome_interval(posterior, self.cells.where(s)) for s in mine]
        return float(np.mean([low <= self.truth[s] <= high for (low, high), s in zip(ends, mine, strict=True)]))

    # ---------------------------------------------------------------- both tasks unseen

    def unseen(self) -> Iterator[dict[str, Any]]:
        pairs, rng = np.array(self.bench.pairs), np.random.default_rng(0)
        scores: dict[str, list[float]] = {"ridge": [], "ours": []}
        for _ in range(self.draws):
            seen = np.zeros(self.n, dtype=bool)
            seen[rng.permutation(self.n)[: self.n // 2]] = True
            train = np.flatnonzero(seen[pairs].all(1))
            test = np.flatnonzero(~seen[pairs].any(1))
            scores["ridge"].append(r(self.ridge(train, test), self.truth[test]))
            known = observed(self.bench, self.method, np.flatnonzero(np.isin(self.cells.sets, train)))
            mean = fitted(self.bench, self.method, train, self.starts[False], False).posterior(known).mean
            scores["ours"].append(r(self.means(mean)[test], self.truth[test]))
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
    for method in METHODS:
        experiment = Experiment(bench, method, given.draws)
        for part in (experiment.held_out, experiment.unseen):
            for row in part():
                rows.append(row)
                if not given.json:
                    print(json.dumps(row), file=sys.stderr, flush=True)
    print(json.dumps(rows, indent=1) if given.json else table(rows))


if __name__ == "__main__":
    main()
