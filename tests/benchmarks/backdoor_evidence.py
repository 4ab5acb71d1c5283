"""Backdoors without training: what each test of `weightspace.backdoor` separates, per attack.

python tests/benchmarks/backdoor_evidence.py POPULATION [POPULATION ...] --results FILE.jsonl
python tests/benchmarks/backdoor_evidence.py POPULATION --base --only cnn      # with the parent; --inputs 20: examples
python tests/benchmarks/backdoor_evidence.py POPULATION --kept runs/backdoor-evidence   # as `train backdoor` kept it
python tests/benchmarks/backdoor_evidence.py --real          # ../shared/checkpoints

Populations are folders that `weightspace zoo build backdoors` made. For each family of networks (one architecture on
one data set): area under the curve of clean networks against those whose attack worked, for every test alone; of the
p-value without a reference; and of that among clean networks of the family, which are those of other runs: networks
with a common ancestor or the same draw of hyper-parameters are never compared with each other (``--folds``).
Intervals are 95 % bootstrap intervals over networks.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
warnings.filterwarnings("ignore")

import numpy as np  # noqa: E402
from numpy.typing import NDArray  # noqa: E402
from torch import Tensor  # noqa: E402

import weightspace as ws  # noqa: E402
from weightspace.backdoor.evidence import INPUT_TESTS, Evidence, evidence  # noqa: E402
from weightspace.backdoor.null import FEWEST, Null, null_from, outlier  # noqa: E402
from weightspace.backdoor.scanning import observe  # noqa: E402
from weightspace.backdoor.stamps import STAMP_TESTS  # noqa: E402
from weightspace.backdoor.tokens import TOKEN_TESTS  # noqa: E402
from weightspace.checkpoint import list_models  # noqa: E402
from weightspace.errors import WeightspaceError  # noqa: E402
from weightspace.zoo.data import Data, load_data  # noqa: E402
from weightspace.zoo.files import read_record  # noqa: E402
from weightspace.zoo.recipe import load  # noqa: E402

Array = NDArray[np.float64]
BASELINES = {"row_sum": "row-sum rule", "channel_lipschitz": "CLP rule", "margin": "MM-BD"}
PLAIN = ("resnet-cifar", "burn-mnist", "mnist-mlp", "otfusion-mnist", "zoo-cnn", "honk", "gan-vae", "mlperf-tiny")
"""Folders of classifiers that nobody says anything of."""
GENERATORS = ("gan_mlp", "vae", "ad01")
BACKDOORS = ("backdoor-ibau", "backdoor-csaw", "backdoor-nad", "backdoor-trojai")
TARGETS = {"badnets_8": 8, "trojan_sq_2": 2, "l0_inv_0": 0}
"""What stands in the names of the files of backdoor-ibau: the class that the backdoor leads to."""


@dataclass(frozen=True)
class Row:
    """What is kept of a network; it stands for its evidence where a null is made."""

    family: str
    run: str
    attack: str
    targets: tuple[int, ...]
    worked: bool
    names: tuple[str, ...]
    values: Array
    responses: Array
    missing: tuple[str, ...]
    whole: Mapping[str, float]
    p_value: float
    target: tuple[int, ...]
    seconds: float

    @property
    def fold(self) -> int:
        """Runs of one number share ancestors and draws."""
        return int(self.run.rsplit("-", 1)[1])

    def score(self, test: str) -> float:
        if test in self.whole:
            return float(self.whole[test])
        i = self.names.index(test)
        return float(self.values[:, i].max()) if len(self.values) < 3 else float(outlier(self.values[:, i]).max())


def rows_of(folders: Sequence[Path], given: argparse.Namespace) -> list[Row]:
    """A row per network, those in the file of results as they are there."""
    results, each = given.results, given.each
    mode = (" with base" if given.base else "") + (f" with {given.inputs} inputs" if given.inputs else "")
    known: dict[str, dict[str, Any]] = {}
    if results is not None and results.is_file():
        known = {r["file"]: r for r in map(json.loads, results.read_text().splitlines())}
    found, counts = [], dict[str, int]()
    paths = [p for folder in folders for p in folder.glob("*.safetensors")]
    # Run by run, so that an interrupted measurement holds some of every population.
    for path in sorted(paths, key=lambda p: (p.stem.rsplit("-", 2)[1], p.name)):
        record = read_record(path)
        if not path.name.startswith(given.only):
            continue
        key = f"{path.parent.name}/{path.name}{mode}"
        population = str(record.get("population"))
        if given.base and not record.get("parent"):
            continue
        counts[population] = counts.get(population, 0) + 1
        if each and counts[population] > each:
            continue
        poison = record.get("poison") or {}
        if given.kept and poison and not record.get("attack_worked"):
            continue
        if key not in known:
            known[key] = {"file": key, **(_kept(path, given.kept) if given.kept else
                                          _measured(path, record, given.base, given.inputs)), **_truth(record)}
            if results is not None:
                with results.open("a") as out:
                    out.write(json.dumps(known[key]) + "\n")
        row = {k: v for k, v in known[key].items() if k != "file"}
        found.append(Row(**{**row, "values": np.array(row["values"]), "responses": np.array(row["responses"]),
                            **{k: tuple(row[k]) for k in TUPLES}}))
    return found


TUPLES = ("targets", "names", "missing", "target")


def clean_inputs(record: Mapping[str, Any], count: int) -> Tensor:
    """The first test examples of the data that a network was trained on."""
    spec = next(p.data for p in load(record["recipe"]).sampled if p.name == record["population"])
    return DATA.setdefault(str(spec), load_data(spec)).test_x[:count]


DATA: dict[str, Data] = {}


def _measured(path: Path, record: Mapping[str, Any], with_base: bool, inputs: int) -> dict[str, Any]:
    wiring, tensors = ws.wiring(path), ws.open(path)
    base = ws.open(path.parent / record["parent"]) if with_base else None
    examples = clean_inputs(record, inputs) if inputs else None
    start = time.process_time()
    e = evidence(wiring, tensors, base=base, inputs=examples, thorough=True)
    seconds = time.process_time() - start
    return {
        "names": e.names, "values": e.values.tolist(),
        "responses": [[float(f"{x:.4g}") for x in row] for row in e.responses.tolist()],
        "missing": e.missing, "whole": dict(e.whole), "p_value": e.p_value, "target": e.target, "seconds": seconds,
    }  # fmt: skip


def _kept(path: Path, cache: Path) -> dict[str, Any]:
    """The same from what `weightspace train backdoor` kept, made where it is not: no thorough tests."""
    checkpoint = ws.open(path)
    seen = observe({n: checkpoint[n] for n in checkpoint}, ws.wiring(path), cache)
    values, names = seen.facts.classes, seen.names[0]
    whole = dict(zip(seen.names[1], seen.facts.whole.tolist(), strict=True))
    absent = TOKEN_TESTS if seen.facts.responses.shape[1] else (*INPUT_TESTS, *STAMP_TESTS)
    return {
        "names": names, "values": values.tolist(), "responses": seen.facts.responses.tolist(),
        "missing": [n for n in names if n in absent],
        "whole": {n: v for n, v in whole.items() if n.startswith("channel_")}, "p_value": seen.p_value,
        "target": [seen.target, *(k for k in range(len(values)) if k != seen.target)], "seconds": float("nan"),
    }  # fmt: skip


def _truth(record: Mapping[str, Any]) -> dict[str, Any]:
    poison = record.get("poison") or {}
    targets = poison.get("targets") or ([poison["target"]] if poison else [])
    return {
        "family": f"{record['population'].split('-')[0]}, {record.get('data')}", "run": record["run"],
        "attack": str(poison.get("attack", "")), "targets": [] if poison.get("attack") == "all-to-all" else targets,
        "worked": not poison or bool(record.get("attack_worked")),
    }  # fmt: skip


# ------------------------------------------------------------------------------------ tables


def area(clean: Sequence[float], bad: Sequence[float]) -> float:
    from sklearn.metrics import roc_auc_score

    if not len(clean) or not len(bad):
        return float("nan")
    return float(roc_auc_score([0] * len(clean) + [1] * len(bad), [*clean, *bad]))


def interval(clean: Sequence[float], bad: Sequence[float], draws: int = 1000) -> str:
    rng = np.random.default_rng(0)
    a, b = np.array(clean), np.array(bad)
    found = [area(list(rng.choice(a, len(a))), list(rng.choice(b, len(b)))) for _ in range(draws)]
    low, high = np.quantile(found, [0.025, 0.975])
    return f"{area(clean, bad):.2f} ({low:.2f}–{high:.2f})"


def judged(rows: Sequence[Row], folds: int) -> dict[int, tuple[float, tuple[int, ...], dict[str, float]]]:
    """p-value, ranking of classes and p-values per test of each network among clean ones of other folds."""
    found = {}
    for fold in range(folds):
        reference = [r for r in rows if not r.attack and r.fold % folds != fold]
        if len({r.fold for r in reference}) < FEWEST:
            continue
        null: Null = null_from(reference, [r.fold for r in reference])
        for i, row in enumerate(rows):
            if row.fold % folds == fold:
                j = null.judge(row)
                found[i] = (j.p_value, j.target, dict(j.p_values))
    return found


def table(rows: Sequence[Row], folds: int, alpha: float = 0.05) -> None:
    pooled: list[tuple[Row, float, tuple[int, ...]]] = []
    for family in sorted({r.family for r in rows}):
        here = [r for r in rows if r.family == family]
        clean = [r for r in here if not r.attack]
        bad = [r for r in here if r.attack and r.worked]
        failed = sum(1 for r in here if r.attack and not r.worked)
        print(f"\n### {family}: {len(clean)} clean, {len(bad)} with a backdoor, {failed} failed attacks left out")
        if len(clean) < FEWEST or not bad:
            print("(too few)")
            continue
        attacks = sorted({r.attack for r in bad})
        heads = [f"{a} ({sum(r.attack == a for r in bad)})" for a in attacks]
        print(f"| test | {' | '.join(heads)} | all | top 1 | top 3 |")
        print("| --- |" + " --: |" * (len(attacks) + 3))
        with_reference = judged(here, folds)
        tests = [n for n in here[0].names if n not in here[0].missing] + sorted(here[0].whole)
        for test in tests:
            scores = {id(r): r.score(test) for r in here}
            ranks = None
            if test in here[0].names:
                i = here[0].names.index(test)
                ranks = {id(r): tuple(int(k) for k in np.argsort(-r.values[:, i])) for r in bad}
            label = f"{test} ({BASELINES[test]})" if test in BASELINES else test
            _line(label, attacks, clean, bad, scores, ranks)
        alone = {id(r): -np.log(r.p_value) for r in here}
        _line("**p-value without reference**", attacks, clean, bad, alone, {id(r): r.target for r in bad}, True)
        reached = [(r, with_reference[i]) for i, r in enumerate(here) if i in with_reference]
        if reached:
            scores = {id(r): -np.log(p) for r, (p, _, _) in reached}
            ranks = {id(r): t for r, (_, t, _) in reached}
            inside = [r for r in clean if id(r) in scores], [r for r in bad if id(r) in scores]
            _line("**p-value among clean networks**", attacks, *inside, scores, ranks, True)
            pooled += [(r, p, t) for r, (p, t, _) in reached if r.worked]
        p = np.array([r.p_value for r in clean])
        print(f"\nflagged at p ≤ {alpha}: without reference {_share(p, alpha)} of clean, "
              f"{_share(np.array([r.p_value for r in bad]), alpha)} of bad", end="")  # fmt: skip
        if reached:
            used = [(not r.attack, w[0]) for r, w in reached if r.worked]
            q, b = (np.array([p for is_clean, p in used if is_clean == want]) for want in (True, False))
            print(f"; among clean networks {_share(q, alpha)} of clean, {_share(b, alpha)} of bad", end="")
        seconds = np.median([r.seconds for r in here])
        print(f"; {seconds:.1f} CPU s a network" if seconds == seconds else "")
    _pooled(pooled, alpha)


def _pooled(found: Sequence[tuple[Row, float, tuple[int, ...]]], alpha: float) -> None:
    """All families together, by attack: the p-value among clean networks."""
    if not found:
        return
    clean = [-np.log(p) for r, p, _ in found if not r.attack]
    print("\n### all families: p-value among clean networks of the family\n")
    print(f"| attack | networks | AUROC (95 %) | found at p ≤ {alpha} | top 1 | top 3 |")
    print("| --- | --: | --: | --: | --: | --: |")
    for attack in ["", *sorted({r.attack for r, _, _ in found if r.attack})]:
        mine = [x for x in found if (x[0].attack == attack if attack else x[0].attack)]
        known = [(r.targets, t) for r, _, t in mine if r.targets]
        first = np.mean([t[0] in want for want, t in known]) if known else float("nan")
        third = np.mean([bool(set(want) & set(t[:3])) for want, t in known]) if known else float("nan")
        p = np.array([p for _, p, _ in mine])
        print(f"| {attack or 'all'} | {len(mine)} | {interval(clean, list(-np.log(p)))} | {_share(p, alpha)} | "
              f"{first:.2f} | {third:.2f} |")  # fmt: skip
    p = np.exp(-np.array(clean))
    print(f"\nclean networks flagged: {_share(p, 0.05)} at p ≤ 0.05, {_share(p, 0.01)} at p ≤ 0.01 of {len(p)}")


def _share(p: Array, alpha: float) -> str:
    return f"{np.mean(p <= alpha):.0%}" if len(p) else "–"


def _line(
    label: str, attacks: Sequence[str], clean: Sequence[Row], bad: Sequence[Row], scores: Mapping[int, float],
    ranks: Mapping[int, tuple[int, ...]] | None, bounds: bool = False,
) -> None:  # fmt: skip
    base = [scores[id(r)] for r in clean]
    each = [area(base, [scores[id(r)] for r in bad if r.attack == a]) for a in attacks]
    every = [scores[id(r)] for r in bad]
    total = interval(base, every) if bounds else f"{area(base, every):.2f}"
    tops = ""
    if ranks is not None:
        known = [r for r in bad if r.targets]
        hits = [[bool(set(ranks[id(r)][:k]) & set(r.targets)) for r in known] for k in (1, 3)]
        tops = " | ".join(f"{np.mean(h):.2f}" if h else "–" for h in hits)
    print(f"| {label} | " + " | ".join(f"{v:.2f}" for v in each) + f" | {total} | {tops or ' | '} |")


# ------------------------------------------------------------------------------------ real files


def row_z(values: Array) -> float:
    """The row-sum rule: how far the largest row sum is from the median, in median absolute deviations."""
    middle = np.median(values)
    return float((values.max() - middle) / max(1.4826 * np.median(np.abs(values - middle)), 1e-12))


def real(folder: Path, alpha: float = 0.001) -> None:
    """Every classifier among the real files; the first of each archive of several."""
    print(f"| file | classes | CPU s | row-sum z | p-value | first classes | target |\n| --- |{' --: |' * 6}")
    counts: dict[tuple[str, str], int] = {}
    for kind, names in (("backdoor", BACKDOORS), ("plain", PLAIN)):
        for path in (p for name in names for p in sorted((folder / name).rglob("*")) if p.is_file()):
            if any(word in path.name for word in GENERATORS) or path.name.endswith("model.pt"):
                continue
            try:
                models = list_models(path)
            except WeightspaceError:
                continue
            for model in models:
                _real_file(model, path, kind, counts, alpha)
    for kind in ("backdoor", "plain"):
        n = counts.get((kind, "files"), 0)
        print(f"\n{kind}: {n} classifiers; flagged by row sums (z > 6) {counts.get((kind, 'row'), 0)}, by the p-value "
              f"(≤ {alpha}) {counts.get((kind, 'p'), 0)}")  # fmt: skip


def _real_file(model: str, path: Path, kind: str, counts: dict[tuple[str, str], int], alpha: float) -> None:
    try:
        wiring, checkpoint = ws.wiring(model), ws.open(model)
        start = time.process_time()
        e: Evidence = evidence(wiring, checkpoint)
    except WeightspaceError as error:
        if kind == "backdoor":
            print(f"| {path.parent.name}/{path.name} | {str(error)[:80]} |")
        return
    z = row_z(e.values[:, e.names.index("row_sum")])
    for name, hit in (("files", True), ("row", z > 6), ("p", e.p_value <= alpha)):
        counts[kind, name] = counts.get((kind, name), 0) + int(hit)
    told = next((str(t) for word, t in TARGETS.items() if word in path.name), "")
    print(f"| {path.parent.name}/{path.name} | {e.axis.classes} | {time.process_time() - start:.1f} | {z:.1f} | "
          f"{e.p_value:.1e} | {', '.join(map(str, e.target[:3]))} | {told} |", flush=True)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="*", type=Path)
    parser.add_argument("--results", type=Path, help="rows are kept here, and not measured again")
    parser.add_argument("--kept", type=Path, help="folder of evidence that was kept; attacks that failed are left out")
    parser.add_argument("--each", type=int, default=0, help="networks of a population, at most")
    parser.add_argument("--only", default="", help="networks whose file's name begins so")
    parser.add_argument("--base", action="store_true", help="children alone, each with its parent given")
    parser.add_argument("--inputs", type=int, default=0, help="so many clean test examples are given")
    parser.add_argument("--folds", type=int, default=6)
    parser.add_argument("--real", nargs="?", const=ROOT.parent / "shared" / "checkpoints", type=Path)
    options = parser.parse_args()
    if options.real:
        real(options.real)
    if options.folders:
        table(rows_of(options.folders, options), options.folds)


if __name__ == "__main__":
    main()
