"""Published weight statistics of clean and poisoned networks: ``python tests/benchmarks/trojai_features.py``.

Two sets of the TrojAI programme, as statistics per network with labels (BU-DEPEND-Lab/TrojAI-Submissions): round 10,
architecture A (72 object detectors, 663 statistics), and round 11, ResNet-50 (96 classifiers, 1,248). The statistics
head is trained and chosen inside each training part of a stratified cross-validation; a network is scored by a head
that has not seen it. The kinds of classifiers there are to choose from were picked after trying seven on these sets.
Mean over ``--seeds`` of the area under the curve, 95 % interval by bootstrap over networks.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from pathlib import Path

import numpy as np
from sklearn.metrics import brier_score_loss, log_loss, roc_auc_score
from sklearn.model_selection import StratifiedKFold

from weightspace.backdoor.statistics import fit_statistics

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))
FOLDER = ROOT.parent / "shared" / "benchmarks" / "trojai-features"
SETS = {
    "round 10, A": ("src__learned_parameters__train_{}_A", 0.94),
    "round 11, ResNet-50": ("extracted_source__weight_only__train_{}_resnet50", 0.88),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=FOLDER)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--folds", type=int, default=8)
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    rows = []
    for name, (pattern, aim) in SETS.items():
        x, y = (np.load(next(given.folder.glob(f"*{pattern.format(k)}.npy")), allow_pickle=False) for k in "Xy")
        scores, chosen = [], Counter[str]()
        for seed in range(given.seeds):
            held = np.zeros(len(y))
            for train, test in StratifiedKFold(given.folds, shuffle=True, random_state=seed).split(x, y):
                head = fit_statistics(x[train], y[train], seed)
                held[test] = head.probability(x[test])
                chosen[head.chosen] += 1
            scores.append(held)
        areas = [roc_auc_score(y, s) for s in scores]
        low, high = interval(y, np.stack(scores))
        mean = np.clip(np.mean(scores, axis=0), 1e-6, 1 - 1e-6)
        rows.append({
            "set": name, "networks": len(y), "AUROC": round(float(np.mean(areas)), 3), "low": low, "high": high,
            "aim": aim, "TPR at 5 % FPR": round(tpr_at(y, mean), 3), "cross-entropy": round(log_loss(y, mean), 3),
            "Brier": round(brier_score_loss(y, mean), 3), "chosen": dict(chosen),
        })  # fmt: skip
        print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
    if given.json:
        print(json.dumps(rows, indent=2))
        return
    columns = [c for c in rows[0] if c != "chosen"]
    print(f"| {' | '.join(columns)} |\n|{' --- |' * len(columns)}")
    for row in rows:
        print(f"| {' | '.join(str(row[c]) for c in columns)} |")


def interval(y: np.ndarray, scores: np.ndarray, draws: int = 1000) -> tuple[float, float]:
    """95 % interval of the area, over networks drawn again, averaged over seeds."""
    rng = np.random.default_rng(0)
    areas = []
    for _ in range(draws):
        index = rng.integers(0, len(y), len(y))
        if 0 < y[index].sum() < len(index):
            areas.append(np.mean([roc_auc_score(y[index], s[index]) for s in scores]))
    low, high = np.quantile(areas, [0.025, 0.975])
    return round(float(low), 3), round(float(high), 3)


def tpr_at(y: np.ndarray, score: np.ndarray, fpr: float = 0.05) -> float:
    """Share of the poisoned above the score that a share ``fpr`` of the clean exceed."""
    return float((score[y] > np.quantile(score[~y], 1 - fpr)).mean())


if __name__ == "__main__":
    main()
