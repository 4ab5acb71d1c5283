"""Merge-ability on the population of the recipe ``merging``: ``python tests/benchmarks/mergeability_population.py``.

    python tests/benchmarks/mergeability_population.py models/merging results/merges.jsonl

Children of eight bases (four architectures, two seeds each), fine-tuned on disjoint, overlapping and contradicting
tasks; their pairs and triples merged by several methods and measured, and pairs of children of different bases (other
seeds; other widths by optimal transport). Every merge is predicted from the weights alone by what was trained without
any of its tasks, or those grouped with them. Four tables:

- *rank correlation* (Spearman's ρ over all merges of a method; its mean within families; 95 % interval by bootstrap
  over sets of held-out tasks) beside flat scores. Each flat score gets what it can get from training merges: a
  monotone function of its own for each family, rising or falling as it is best there. "Feature model" is ridge
  regression on the published features, its penalty by cross-validation inside the training merges.
- *coverage* of 90 % intervals, which come from misses in merges of other tasks.
- *regret of a partner*: each model chooses one of the partners it was measured with by the prediction; how many points
  of retained accuracy it loses to the best of them.
- *regret of a method*: for each merge the method with the best prediction; against that which was best on the mean of
  the training merges, and against chance.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np
from numpy.typing import NDArray
from scipy.stats import spearmanr

from weightspace.mergeability.features import NAMES
from weightspace.mergeability.measure import read_rows
from weightspace.mergeability.training import Measured, coverage, gather, gather_strangers, held_out, rounds

Array = NDArray[np.float64]
DRAWS = 1000
OURS = "ours"
FEATURES = "feature model (ridge)"
_NEW = (
    "rows changed", "columns changed", "base cosine", "base on changed", "projection", "disturbance", "row cosine",
    "of the nearest",
)  # fmt: skip
"""Features that are not among the published ones, by how their names begin (or end)."""


def flat_scores(measured: Measured) -> dict[str, Array]:
    """Published one-number scores of merges, a mean over pairs: ``(merges,)`` each; higher need not be better."""
    tables: dict[str, dict[str, Array]] = {}
    for name, comparison in measured.families.items():
        tables[name] = {k: v for k, v in comparison.flat().items() if k != "cosine"}
        tables[name]["cosine"] = comparison.pairs[..., 0].mean(-1)
        tables[name]["Model Kinship"] = _kinship(measured, name)
    found = {}
    for score in next(iter(tables.values())):
        found[score] = np.array([
            np.mean([tables[f][score][i, j] for i, j in combinations(members, 2)]) for f, members in measured.merges
        ])  # fmt: skip
    return found


def _kinship(measured: Measured, family: str) -> Array:
    """Correlation of task vectors (Hu et al. 2024), over all weights."""
    reader = measured.readers[family]
    names = [n for n, t in reader.base.items() if t.is_floating_point()]
    rows = [np.concatenate([(m[n] - reader.base[n]).flatten().numpy() for n in names]) for m in reader.models]
    found: Array = np.corrcoef(np.array(rows))
    return found


def flat_columns(measured: Measured) -> dict[str, Array]:
    """The same for pairs without a common base, from the features of the second carried onto the first."""
    means = _means_of(measured)
    column = {n: means[:, i] for i, n in enumerate(NAMES)}
    return {
        "cosine": column["kinship"], "L2 distance": column["distance, mean"],
        "sign conflict": column["sign conflict, mean"], "misalignment": column["misalignment, mean"],
    }  # fmt: skip


def _means_of(measured: Measured) -> Array:
    """Features of merges: means over their models, ``(merges, features)``."""
    total = np.zeros((len(measured.merges), measured.x.shape[1]))
    np.add.at(total, measured.sets, measured.x)
    found: Array = total / np.bincount(measured.sets)[:, None]
    return found


def monotone(score: Array, y: Array, family: NDArray[np.str_], train: Any, test: Any) -> Array:
    """A score as a prediction: by family the monotone function that fits the training merges best, either way."""
    from sklearn.isotonic import IsotonicRegression

    found = np.full(len(test), np.nan)
    for name in np.unique(family[test]):
        a, b = train[family[train] == name], test[family[test] == name]
        known = a[np.isfinite(y[a])]
        if len(known) < 3:
            continue
        fits = [
            IsotonicRegression(increasing=up, out_of_bounds="clip").fit(score[known], y[known]) for up in (True, False)
        ]
        best = min(fits, key=lambda f: float(np.square(f.predict(score[known]) - y[known]).sum()))
        # Ties of the steps are broken by the score itself.
        sign = 1e-6 if best is fits[0] else -1e-6
        spread = max(float(score[known].std()), 1e-12)
        found[family[test] == name] = best.predict(score[b]) + sign * (score[b] - score[known].mean()) / spread
    return found


def predictions(measured: Measured, ours: Array, scores: Mapping[str, Array]) -> dict[str, Array]:
    """Predicted outcomes ``(merges, methods)`` of every predictor, each trained without the tasks of a merge."""
    from sklearn.linear_model import RidgeCV
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    family = np.array([f for f, _ in measured.merges])
    published = [
        i for i, n in enumerate(NAMES)
        if (n.endswith(", mean") or "," not in n) and not any(w in n for w in _NEW)
    ]  # fmt: skip
    x = _means_of(measured)[:, published]
    found = {k: np.full(measured.outcome.shape, np.nan) for k in (*scores, FEATURES, "training mean")}
    for train, test in rounds(measured):
        for m in range(len(measured.methods)):
            y = measured.outcome[:, m]
            known = train[np.isfinite(y[train])]
            for name, score in scores.items():
                found[name][test, m] = monotone(score, y, family, known, test)
            ridge = make_pipeline(StandardScaler(), RidgeCV(np.logspace(-2, 5, 15))).fit(x[known], y[known])
            found[FEATURES][test, m] = np.clip(ridge.predict(x[test]), y[known].min(), y[known].max())
            found["training mean"][test, m] = y[known].mean()
    return {OURS: measured.means(ours), **found}


def correlation(p: Array, y: Array, family: NDArray[np.str_], groups: Sequence[frozenset[int]]) -> dict[str, float]:
    """Spearman's ρ with its interval over sets of held-out tasks, its mean within families, and the mean error."""
    rho = float(spearmanr(p, y)[0]) if p.std() > 1e-12 else 0.0
    kinds: dict[frozenset[int], list[int]] = {}
    for i, g in enumerate(groups):
        kinds.setdefault(g, []).append(i)
    sets = [np.array(v) for v in kinds.values()]
    rng, drawn = np.random.default_rng(0), []
    for _ in range(DRAWS // 5):
        at = np.concatenate([sets[k] for k in rng.integers(0, len(sets), len(sets))])
        drawn.append(spearmanr(p[at], y[at])[0] if p[at].std() > 1e-12 else 0.0)
    within = [
        spearmanr(p[family == f], y[family == f])[0] if p[family == f].std() > 1e-9 else 0.0
        for f in np.unique(family) if (family == f).sum() > 9
    ]  # fmt: skip
    low, high = np.quantile(drawn, [0.025, 0.975])
    return {
        "spearman": rho, "low": float(low), "high": float(high), "within": float(np.mean(within)),
        "error": 100 * float(np.abs(p - y).mean()),
    }  # fmt: skip


def ranks(measured: Measured, found: Mapping[str, Array], ours: Array, what: str) -> list[dict[str, Any]]:
    """The first table, with coverage of our intervals."""
    family = np.array([f for f, _ in measured.merges])
    rows = []
    for m, method in enumerate(measured.methods):
        y = measured.outcome[:, m]
        for name, p in found.items():
            ok = np.flatnonzero(np.isfinite(y) & np.isfinite(p[:, m]))
            row = {"what": what, "method": method, "predictor": name, "merges": len(ok)}
            row |= correlation(p[ok, m], y[ok], family[ok], [measured.groups[i] for i in ok])
            if name == OURS:
                row["coverage"] = float(np.nanmean(coverage(measured, ours, m)))
            rows.append(row)
    return rows


def everything(
    one: Measured, found: Mapping[str, Array], other: Measured, more: Mapping[str, Array]
) -> list[dict[str, Any]]:
    """Merges with and without a common base, by all methods, as one: the first table over all of them."""
    rows = []
    for name in found:
        if name not in more:
            continue
        p, y, family, groups = [], [], [], []
        for measured, tables in ((one, found), (other, more)):
            for m, method in enumerate(measured.methods):
                ok = np.flatnonzero(np.isfinite(measured.outcome[:, m]) & np.isfinite(tables[name][:, m]))
                if method == "barrier":
                    continue
                p.append(tables[name][ok, m])
                y.append(measured.outcome[ok, m])
                family += [f"{measured.merges[i][0]} {method}" for i in ok]
                groups += [measured.groups[i] for i in ok]
        row = {"what": "everything", "method": "all", "predictor": name, "merges": len(family)}
        rows.append(row | correlation(np.concatenate(p), np.concatenate(y), np.array(family), groups))
    return rows


def partners(measured: Measured, found: Mapping[str, Array], least: int = 5) -> list[dict[str, Any]]:
    """Regret of choosing one of the partners that a model was measured with, in points of retained accuracy."""
    pairs: dict[tuple[str, int], list[int]] = {}
    for s, (family, members) in enumerate(measured.merges):
        for i in members if len(members) == 2 else ():
            pairs.setdefault((family, i), []).append(s)
    rows = []
    for m, method in enumerate(measured.methods):
        if method == "barrier":
            continue
        y = measured.outcome[:, m]
        lost: dict[str, list[float]] = {k: [] for k in (*found, "a random partner")}
        for at in pairs.values():
            if len(at) < least:
                continue
            best = y[at].max()
            lost["a random partner"].append(100 * float(best - y[at].mean()))
            for name, p in found.items():
                if name != "training mean":
                    lost[name].append(100 * float(best - y[at][np.argmax(p[at, m])]))
        rows += [
            {"what": "partner", "method": method, "predictor": k, **_mean(v), "merges": len(v)}
            for k, v in lost.items() if v
        ]  # fmt: skip
    return rows


def methods(measured: Measured, found: Mapping[str, Array]) -> list[dict[str, Any]]:
    """Regret of choosing the method for each merge, in points of retained accuracy."""
    columns = [m for m, name in enumerate(measured.methods) if name != "barrier"]
    y = measured.outcome[:, columns]
    best = y.max(1)
    lost = {"a random method": 100 * (best - y.mean(1))}
    for k, column in enumerate(columns):
        lost[f"always {measured.methods[column]}"] = 100 * (best - y[:, k])
    for name, p in found.items():
        chosen = p[:, columns].argmax(1)
        title = "the best of the training merges" if name == "training mean" else name
        lost[title] = 100 * (best - y[np.arange(len(y)), chosen])
    return [{"what": "method", "method": "", "predictor": k, **_mean(v), "merges": len(v)} for k, v in lost.items()]


def kinds(measured: Measured, rows: Sequence[Mapping[str, Any]], p: Array) -> list[dict[str, Any]]:
    """Our rank correlation by what the tasks of a merge have to do with each other."""
    tasks = {(str(r["family"]), tuple(r["models"])): r["tasks"] for r in rows}
    names = {f: c.models for f, c in measured.families.items()}
    kind = np.array([
        _kind(tasks[f, tuple(names[f][i] for i in members)]) for f, members in measured.merges
    ])  # fmt: skip
    size = np.array([len(members) for _, members in measured.merges])
    found = []
    for m, method in enumerate(measured.methods):
        y = measured.outcome[:, m]
        for label, chosen in (
            *((k, kind == k) for k in ("disjoint", "overlapping", "conflicting")),
            ("pairs", size == 2), ("triples", size == 3),
        ):  # fmt: skip
            ok = chosen & np.isfinite(y) & np.isfinite(p[:, m])
            if ok.sum() > 20:
                rho, error = float(spearmanr(p[ok, m], y[ok])[0]), 100 * float(np.abs(p[ok, m] - y[ok]).mean())
                found.append({"what": label, "method": method, "predictor": OURS, "merges": int(ok.sum()),
                              "spearman": rho, "error": error})  # fmt: skip
    return found


def _kind(tasks: Sequence[Sequence[str]]) -> str:
    found = "disjoint"
    for one, other in combinations(tasks, 2):
        for a in one:
            for b in other:
                if a.split(":")[0].split("~")[0] == b.split(":")[0].split("~")[0]:
                    if a.partition("~")[2] != b.partition("~")[2]:
                        return "conflicting"
                    found = "overlapping"
    return found


def _mean(values: Sequence[float] | Array) -> dict[str, float]:
    """A mean with its bootstrap interval."""
    v = np.asarray(values, dtype=np.float64)
    rng = np.random.default_rng(0)
    drawn = [v[rng.integers(0, len(v), len(v))].mean() for _ in range(DRAWS)]
    low, high = np.quantile(drawn, [0.025, 0.975])
    return {"regret": float(v.mean()), "low": float(low), "high": float(high)}


COLUMNS = ("what", "method", "predictor", "merges", "spearman", "regret", "low", "high", "within", "error", "coverage")


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows as a Markdown table."""
    columns = [c for c in COLUMNS if any(c in row for row in rows)]
    lines = ["| " + " | ".join(columns) + " |", "|" + " --- |" * len(columns)]
    for row in rows:
        cells = [f"{row[k]:.3f}" if isinstance(row.get(k), float) else str(row.get(k, "")) for k in columns]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def kept(path: Path | None, name: str, measured: Measured, make: Callable[[], Array]) -> Array:
    """Held-out predictions, from a file where it has those of the same merges."""
    file = None if path is None else path.with_name(f"{path.stem}-{name}.npz")
    labels = np.array([f"{f}:{','.join(map(str, s))}" for f, s in measured.merges])
    if file is not None and file.exists():
        with np.load(file, allow_pickle=False) as data:
            if np.array_equal(data["merges"], labels) and data["names"].tolist() == list(NAMES):
                found: Array = data["held"]
                return found
    made = make()
    if file is not None:
        np.savez(file, held=made, merges=labels, names=np.array(NAMES))
    return made


def main() -> None:
    """All tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("zoo", type=Path, nargs="?", default=Path("models/merging"))
    parser.add_argument("rows", type=Path, nargs="?", default=Path("models/merging/merges.jsonl"))
    parser.add_argument("--held", type=Path, help="keep held-out predictions beside this name, or take them from there")
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    if not given.zoo.is_dir() or not given.rows.exists():
        sys.exit(f"{given.zoo} or {given.rows} is missing; `weightspace train merge` makes both")
    logging.basicConfig(level=logging.WARNING)
    warnings.filterwarnings("ignore", message=".*column-vector.*")
    rows = read_rows(given.rows)
    measured, strange = gather(given.zoo, rows), gather_strangers(given.zoo, rows)
    ours = kept(given.held, "related", measured, lambda: held_out(measured))
    apart = kept(given.held, "strangers", strange, lambda: held_out(strange))
    found = predictions(measured, ours, flat_scores(measured))
    others = predictions(strange, apart, flat_columns(strange))
    tables = {
        "rank correlation, a common base": ranks(measured, found, ours, "common base"),
        "rank correlation, no common base": ranks(strange, others, apart, "no common base"),
        "rank correlation, everything": everything(measured, found, strange, others),
        "ours by kind of merge": kinds(measured, rows, found[OURS]),
        "regret of a partner, points": partners(measured, found),
        "regret of a method, points": methods(measured, found),
        "regret of a method, no common base and the same widths, points": methods(_whole(strange), {
            k: v[np.isfinite(strange.outcome).all(1)] for k, v in others.items()
        }),
    }  # fmt: skip
    if given.json:
        print(json.dumps(tables, indent=1))
        return
    for title, part in tables.items():
        print(f"## {title}\n\n{table(part)}\n")


def _whole(measured: Measured) -> Measured:
    """Only merges that were measured by every method."""
    keep = np.isfinite(measured.outcome).all(1)
    return replace(
        measured, merges=tuple(m for m, k in zip(measured.merges, keep, strict=True) if k),
        outcome=measured.outcome[keep],
    )  # fmt: skip


if __name__ == "__main__":
    main()
