"""Backdoors from weights alone: ``python tests/benchmarks/backdoor_detection.py FOLDER…``.

Populations of clean and poisoned networks (``weightspace zoo build backdoors``) are split by what has to generalise:

- ``models``: five parts by ancestry and draw of hyper-parameters; attacks, data and architectures were seen;
- ``attack``: a group of attacks that are alike is left out of training, and tested against clean networks held out;
- ``data``: a data set is left out; ``architecture``: a kind of network is left out.

``--shipped`` trains nothing: it asks the detector of the package about populations that were built after it.

Methods: the verdict (all heads, stacked and calibrated inside the training part), each of them alone, the untrained
p-value, and what was published or is simple: flat statistics of the weights with boosted trees, an aligned linear
classifier (tensors laid on a reference by weight matching, ravelled, principal components, logistic regression, after
Peraton's entries to TrojAI; one architecture at a time), the row-sum rule of the last layer, and channel Lipschitz
constants (Zheng et al. 2022). Attacks that failed are neither clean nor poisoned; they are left out and counted.

Every score is written to ``--results`` as soon as it is there, and is not computed again. Intervals: 95 %, bootstrap
over ancestries.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from weightspace.backdoor.calibration import FIGURES, folds  # noqa: E402
from weightspace.backdoor.population import ALIKE, Labelled, labelled  # noqa: E402
from weightspace.backdoor.training import Entry, Names, entries, train  # noqa: E402
from weightspace.metanets.metrics import bootstrap, calibration_error  # noqa: E402

OURS = ("verdict", "metanet alone", "questions alone", "evidence alone", "p-value")
RULES = ("row sums", "CLP")
FLAT = ("flat statistics", "aligned linear")
METHODS = (*OURS, *FLAT, *RULES)
PROBABILITIES = {"verdict", "metanet alone", "questions alone", "evidence alone", *FLAT}


@dataclass(frozen=True)
class Split:
    """Numbers of the networks to train on and to test on. ``name``: what is left out."""

    kind: str
    name: str
    train: tuple[int, ...]
    test: tuple[int, ...]

    @property
    def key(self) -> str:
        return f"{self.kind}: {self.name}"


def splits(networks: Sequence[Labelled], kinds: Sequence[str], parts: int, halves: int) -> Iterator[Split]:
    """All splits of these kinds. Nobody's relative is both trained on and tested."""
    groups = [n.group for n in networks]
    y = [n.poisoned for n in networks]
    part = folds(groups, y, parts)
    everyone = np.arange(len(networks))
    if "models" in kinds:
        for k in range(parts):
            yield Split("models", str(k), tuple(everyone[part != k]), tuple(everyone[part == k]))
    if "attack" in kinds:
        half = folds(groups, y, 2, seed=1)
        for name in sorted({ALIKE[n.attack] for n in networks if n.attack}):
            of = np.array([bool(n.attack) and ALIKE[n.attack] == name for n in networks])
            clean = ~np.array(y)
            for k in range(halves):
                test = (half == k) & (of | clean)
                yield Split("attack", f"{name}/{k}", tuple(everyone[(half != k) & ~of]), tuple(everyone[test]))
    for kind, field in (("data", "data"), ("architecture", "kind")):
        if kind in kinds:
            values = [getattr(n, field) for n in networks]
            for name in sorted(set(values)):
                own = np.array([v == name for v in values])
                if len({y[i] for i in everyone[own]}) == 2:
                    yield Split(kind, name, tuple(everyone[~own]), tuple(everyone[own]))


# ------------------------------------------------------------------------------------ methods


def ours(some: Sequence[Entry], split: Split, names: Names, options: dict[str, Any]) -> dict[str, np.ndarray]:
    """Probabilities of the verdict and of each head alone (with a calibration of its own)."""
    from weightspace.backdoor.calibration import Stack
    from weightspace.backdoor.shipped import HEADS, mixed
    from weightspace.backdoor.training import balance

    learn, asked = [some[i] for i in split.train], [some[i] for i in split.test]
    trained = train(learn, names, **options)
    heads, classes = trained.heads([e.seen for e in asked])
    y = np.array([e.truth.poisoned for e in learn])
    weights = balance([e.truth for e in learn])
    found = {"verdict": trained.stack.probability(heads)}
    for number, name in enumerate(HEADS):
        if options.get(name, True):
            alone = Stack.fit(trained.odds[:, [number]], y, weights=weights)
            found[f"{name} alone"] = alone.probability(heads[:, [number]])
    hits = []
    for e, own in zip(asked, classes, strict=True):
        order = np.argsort(-mixed(trained.mixture, own), kind="stable").tolist()
        hits.append(float(min((order.index(t) for t in e.truth.targets), default=np.nan)))
    found["rank of target"] = np.array(hits)
    return found


def packaged(some: Sequence[Entry], rows: Rows) -> None:
    """What the detector of the package says of networks, which must be none of those it was trained on."""
    from weightspace.backdoor.scanning import applies
    from weightspace.backdoor.shipped import shipped

    known, keys = shipped(), [key(e.truth) for e in some]
    said = known.read([e.seen for e in some])
    verdict = known.stack.probability(said.heads)
    hits = []
    for e, own in zip(some, said.classes, strict=True):
        order = np.argsort(-own, kind="stable").tolist()
        hits.append(float(min((order.index(t) for t in e.truth.targets), default=np.nan)))
    p_values = [max(e.seen.p_value, 1e-300) for e in some]
    for method, values in (("verdict", verdict), ("rank of target", hits), ("p-value", -np.log10(p_values))):
        rows.add("shipped: all", method, dict(zip(keys, map(float, values), strict=True)))
    bad = np.array([e.truth.poisoned for e in some])
    inside = np.array([applies(known, e.seen).inside for e in some])
    flags = known.flags(said.odds, 0.05)
    print(
        f"\n{known.name}: {inside.sum()} of {len(some)} networks are inside its range; flagged at 5 %: "
        f"{(flags & bad).sum()} of {bad.sum()} poisoned, {(flags & ~bad).sum()} of {(~bad).sum()} clean"
    )


def blinded(entry: Entry) -> Entry:
    """Without the answers to those changes that are attacks of the population in other words.

    They are four looks (``filter``) and the waves along columns of three to seven periods (``sinusoid``).
    """
    from weightspace.backdoor.responses import FREQUENCIES, columns

    groups, responses = np.array(columns()), entry.facts.responses.copy()
    if not responses.shape[1]:
        return entry
    for group in dict.fromkeys(groups):
        own = np.flatnonzero(groups == group)
        if group.startswith("looks"):
            responses[:, own[[0, 3, 4, 6]]] = 0
        elif group.startswith("waves"):
            responses[:, own.reshape(FREQUENCIES, 2, 4)[2:7, 1].ravel()] = 0
    return replace(entry, seen=replace(entry.seen, facts=replace(entry.facts, responses=responses)))


def flat(some: Sequence[Entry], split: Split) -> np.ndarray:
    """Statistics of every tensor by depth, and boosted trees."""
    from weightspace.metanets.flat import FlatBaseline

    learn = [some[i].graph for i in split.train]
    y = np.array([some[i].truth.poisoned for i in split.train])
    model = FlatBaseline("boosting", "classification").fit(learn, y)
    return model.probabilities([some[i].graph for i in split.test])[:, list(model.classes).index(True)]


def aligned(some: Sequence[Entry], split: Split, seed: int = 0) -> np.ndarray:
    """Networks laid on a reference of their architecture, ravelled, principal components, logistic regression.

    Not a number where nothing of that architecture is in the training part.
    """
    from sklearn.decomposition import PCA
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    shapes = [tuple(sorted(e.graph.shapes.items())) for e in some]
    out = np.full(len(split.test), np.nan)
    for shape in {shapes[i] for i in split.test}:
        learn = [i for i in split.train if shapes[i] == shape]
        asked = [k for k, i in enumerate(split.test) if shapes[i] == shape]
        y = np.array([some[i].truth.poisoned for i in learn])
        if len(learn) < 8 or len(set(y.tolist())) < 2:
            continue
        # The same for all splits: it says where the others are laid, and nothing of them.
        reference = next(e.graph for e, s in zip(some, shapes, strict=True) if s == shape and not e.truth.poisoned)
        x = np.stack([laid(some[i], reference) for i in learn])
        model = make_pipeline(
            StandardScaler(), PCA(min(32, len(learn) // 2), random_state=seed), StandardScaler(),
            LogisticRegression(C=0.1, max_iter=2000),
        ).fit(x, y)  # fmt: skip
        out[asked] = model.predict_proba(np.stack([laid(some[split.test[k]], reference) for k in asked]))[:, 1]
    return out


_LAID: dict[tuple[int, int], np.ndarray] = {}


def laid(entry: Entry, reference: Any) -> np.ndarray:
    """All weights of a network, laid on the reference."""
    from weightspace.wiring.matching import matcher_of

    key = id(entry), id(reference)
    if key not in _LAID:
        a = {n: reference.tensor(n) for n in reference.shapes}
        b = {n: entry.graph.tensor(n) for n in entry.graph.shapes}
        _, moved = matcher_of(reference.wiring).match(a, b)
        _LAID[key] = torch.cat([moved[n].flatten() for n in sorted(moved)]).numpy()
    return _LAID[key]


def row_sums(entry: Entry) -> float:
    """How far the largest sum of a class' weights lies from the others, in robust deviations."""
    asked = entry.seen.asked
    sums = asked.axis.rows(asked.tensors).sum(1)
    middle = sums.median()
    return float((sums.max() - middle) / (1.4826 * (sums - middle).abs().median() + 1e-12))


def clp(entry: Entry) -> float:
    """How far the largest channel Lipschitz constant of a layer lies above its mean, in deviations: most of any."""
    from weightspace.backdoor.defences import clp_scores

    scores = clp_scores(entry.seen.asked.wiring, entry.seen.asked.tensors)
    top = [float((s.max() - s.mean()) / (s.std() + 1e-12)) for s in scores.values() if s.numel() > 2]
    return max(top, default=0.0)


# ------------------------------------------------------------------------------------ running


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", type=Path)
    parser.add_argument("--results", type=Path, default=Path("backdoor-detection.jsonl"))
    parser.add_argument("--cache", type=Path, default=None, help="folder that evidence is kept in")
    parser.add_argument("--splits", nargs="+", default=["models", "attack", "data", "architecture"])
    parser.add_argument("--methods", nargs="+", default=["ours", *FLAT, *RULES])
    parser.add_argument("--parts", type=int, default=5)
    parser.add_argument("--halves", type=int, default=2, help="of unseen attacks: halves of the ancestries to test on")
    parser.add_argument("--inner", type=int, default=4, help="parts inside the training networks")
    parser.add_argument("--epochs", type=int, default=8, help="of the metanet")
    parser.add_argument("--asked", type=int, default=20, help="epochs of the questions")
    parser.add_argument("--without", nargs="*", default=[], choices=["metanet", "questions"], help="heads to leave out")
    parser.add_argument("--blind", action="store_true", help="without answers to looks and waves that attacks have")
    parser.add_argument("--shipped", action="store_true", help="only the detector that comes with the package")
    parser.add_argument("--tables-only", action="store_true", help="print what is in --results")
    given = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    torch.set_num_threads(1)
    networks = labelled(given.folders)
    worked = [n for n in networks if n.worked]
    failed = len(networks) - len(worked)
    rows = Rows(given.results)
    if not given.tables_only:
        some, names, left = entries(worked, given.cache)
        for name, why in left.items():
            print(f"left out {name}: {why}", file=sys.stderr)
        if given.shipped:
            packaged(some, rows)
        else:
            run([blinded(e) for e in some] if given.blind else some, names, rows, given)
        worked = [e.truth for e in some]
    poisoned = sum(n.poisoned for n in worked)
    print(f"\n{len(worked)} networks, {poisoned} poisoned; {failed} attacks that failed left out\n")
    print(tables(worked, rows))


class Rows:
    """Scores by split, method and network, in a file of JSON lines."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.found: dict[tuple[str, str], dict[str, float]] = {}
        if path.is_file():
            for line in path.read_text().splitlines():
                row = json.loads(line)
                self.found[row["split"], row["method"]] = row["scores"]

    def add(self, split: str, method: str, scores: dict[str, float]) -> None:
        self.found[split, method] = scores
        with self.path.open("a") as file:
            file.write(json.dumps({"split": split, "method": method, "scores": scores}) + "\n")


def run(some: Sequence[Entry], names: Names, rows: Rows, given: argparse.Namespace) -> None:
    truths = [e.truth for e in some]
    keys = [key(t) for t in truths]
    rules: dict[str, Callable[[Entry], float]] = {"row sums": row_sums, "CLP": clp}
    for name, rule in rules.items():
        if name in given.methods and ("all", name) not in rows.found:
            rows.add("all", name, {k: rule(e) for k, e in zip(keys, some, strict=True)})
    if ("all", "p-value") not in rows.found:
        p_values = [max(e.seen.p_value, 1e-300) for e in some]
        rows.add("all", "p-value", dict(zip(keys, (-np.log10(p_values)).tolist(), strict=True)))
    options = {"parts": given.inner, "epochs": given.epochs, "asked": given.asked}
    options |= dict.fromkeys(given.without, False)
    for split in splits(truths, given.splits, given.parts, given.halves):
        tested = [keys[i] for i in split.test]
        started = time.perf_counter()
        if "ours" in given.methods and (split.key, "verdict") not in rows.found:
            for method, values in ours(some, split, names, options).items():
                rows.add(split.key, method, dict(zip(tested, values.tolist(), strict=True)))
        for method, compute in (("flat statistics", flat), ("aligned linear", aligned)):
            if method in given.methods and (split.key, method) not in rows.found:
                rows.add(split.key, method, dict(zip(tested, compute(some, split).tolist(), strict=True)))
        print(f"{split.key}: {time.perf_counter() - started:.0f} s", file=sys.stderr, flush=True)


def key(truth: Labelled) -> str:
    return f"{truth.path.parent.name}/{truth.path.name}"


# ------------------------------------------------------------------------------------ tables


def tables(truths: Sequence[Labelled], rows: Rows) -> str:
    """Markdown: per kind of split every method, and per attack (or what is left out) the verdict and its rivals."""
    of = {key(t): t for t in truths}
    out = []
    for kind in ("shipped", "models", "attack", "data", "architecture"):
        held = {split for split, _ in rows.found if split.startswith(f"{kind}: ")}
        if not held:
            continue
        parts = [
            f"### {TITLES[kind]}",
            overall(of, rows, sorted(held)),
            detailed(of, rows, sorted(held), BY.get(kind, kind)),
            "",
        ]
        out.append("\n\n".join(parts))
    return "\n".join(out)


TITLES = {
    "models": "Unseen models (attacks, data and architectures seen)", "attack": "Unseen attacks",
    "data": "Unseen data", "architecture": "Unseen architectures", "shipped": "The detector of the package",
}  # fmt: skip
BY = {"shipped": "models"}


def gathered(of: dict[str, Labelled], rows: Rows, held: Sequence[str], method: str) -> tuple[np.ndarray, ...]:
    """Truth, score, group, attack and split of all networks tested in some splits."""
    out: list[tuple[Any, ...]] = []
    for split in held:
        tested = rows.found.get((split, "verdict")) or rows.found.get((split, "flat statistics")) or {}
        scores = rows.found.get((split, method)) or rows.found.get(("all", method)) or {}
        out += [
            (of[k].poisoned, scores[k], of[k].group, of[k].attack, split.partition(": ")[2].partition("/")[0])
            for k in tested if k in of and np.isfinite(scores.get(k, np.nan))
        ]  # fmt: skip
    if not out:
        return tuple(np.zeros(0) for _ in range(5))
    return tuple(np.array(column) for column in zip(*out, strict=True))


def overall(of: dict[str, Labelled], rows: Rows, held: Sequence[str]) -> str:
    lines = [["method", "networks", *FIGURES, "ECE"]]
    for method in METHODS:
        y, score, group, _, _ = gathered(of, rows, held, method)
        if not len(y):
            continue
        y = y.astype(float)
        cells = [method, str(len(y))]
        for name, figure in FIGURES.items():
            told = name in ("AUROC", "TPR at 5 % FPR") or method in PROBABILITIES
            cells.append(shown(bootstrap(figure, y, score, list(group), draws=300)) if told else "")
        cells.append(f"{calibration_error(y, score, 10):.3f}" if method in PROBABILITIES else "")
        lines.append(cells)
    return table(lines)


def detailed(of: dict[str, Labelled], rows: Rows, held: Sequence[str], kind: str) -> str:
    """AUROC per attack against all clean networks of the same splits (or per what is left out)."""
    y, _, _, attack, name = gathered(of, rows, held, "verdict")
    if not len(y):
        return ""
    labels = sorted(set(attack[y.astype(bool)])) if kind in ("models", "attack") else sorted(set(name))
    from weightspace.backdoor.calibration import auroc, brier, cross_entropy, rate_at

    methods = [m for m in METHODS if len(gathered(of, rows, held, m)[0])]
    lines = [[kind if kind != "models" else "attack", "poisoned", *methods, "TPR at 5 %", "cross-entropy", "Brier",
              "target first", "in 3"]]  # fmt: skip
    for label in labels:
        cells = [label]
        for method in methods:
            y, score, group, attack, name = gathered(of, rows, held, method)
            y = y.astype(float)
            if kind == "models":
                own = (attack == label) | (y < 0.5)
            elif kind == "attack":
                own = (name == ALIKE[label]) & ((attack == label) | (y < 0.5))
            else:
                own = name == label
            if method == "verdict":
                cells.append(str(int(y[own].sum())))
                verdict = y[own], score[own]
            if not own.any() or not 0 < y[own].mean() < 1:
                cells.append("")
            elif method == "verdict":
                cells.append(shown(bootstrap(auroc, y[own], score[own], list(group[own]), draws=300)))
            else:
                cells.append(f"{auroc(y[own], score[own]):.3f}")
        cells += [f"{f(*verdict):.3f}" for f in (rate_at, cross_entropy, brier)]
        lines.append([*cells, *targets(of, rows, held, kind, label)])
    return table(lines)


def targets(of: dict[str, Labelled], rows: Rows, held: Sequence[str], kind: str, label: str) -> list[str]:
    """Shares of poisoned networks whose target is the most suspect class, or among the first three."""
    y, rank, _, attack, name = gathered(of, rows, held, "rank of target")
    if not len(y):
        return ["", ""]
    own = attack == label if kind in ("models", "attack") else name == label
    ranks = rank[own & y.astype(bool)]
    return ["", ""] if not len(ranks) else [f"{(ranks < 1).mean():.2f}", f"{(ranks < 3).mean():.2f}"]


def shown(found: Any) -> str:
    return f"{found.value:.3f} [{found.low:.2f}, {found.high:.2f}]"


def table(lines: Sequence[Sequence[str]]) -> str:
    body = [lines[0], ["---"] * len(lines[0]), *lines[1:]]
    return "\n".join(f"| {' | '.join(line)} |" for line in body)


if __name__ == "__main__":
    main()
