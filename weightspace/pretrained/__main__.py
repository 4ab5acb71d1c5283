"""``python -m weightspace.pretrained``: train the pretrained metanets anew and write their files and model card."""

from __future__ import annotations

import argparse
import logging
import sys
from pathlib import Path

import torch

from weightspace.errors import WeightspaceError
from weightspace.paths import write_whole
from weightspace.pretrained import evaluation
from weightspace.pretrained.card import model_card
from weightspace.pretrained.model import CARD, FILES
from weightspace.pretrained.networks import populations
from weightspace.pretrained.recipe import DEFAULT, load
from weightspace.pretrained.train import left_out, pretrain

MOST = 150
"""Networks in a pool of the retrieval figures."""


def main() -> int:
    """Build what is missing of the populations, train, calibrate, evaluate, write."""
    parser = argparse.ArgumentParser(prog="python -m weightspace.pretrained", description=main.__doc__)
    parser.add_argument("--recipe", type=Path, default=DEFAULT)
    parser.add_argument("--zoos", type=Path, default=Path("models"), help="folder of the populations' folders")
    parser.add_argument("--data", type=Path, default=None, help="folder of the data sets' files")
    parser.add_argument("--work", type=Path, default=Path("runs/pretrained"), help="where trainings are kept")
    parser.add_argument("--out", type=Path, default=FILES, help="where the files are written")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    torch.set_num_threads(1)
    try:
        recipe = load(arguments.recipe)
        found = populations(recipe, arguments.zoos, arguments.data)
        model, made = pretrain(recipe, found, arguments.work, arguments.out)
    except WeightspaceError as error:
        print(f"weightspace: {error}", file=sys.stderr)
        return 1
    tests = {p.source.name: p.test for p in found if not p.source.held_out}
    held = {p.source.name: p.test for p in found if p.source.held_out}
    joined = {"held-out runs": [s for part in tests.values() for s in part]}
    within = {name: [s for s in part if not model.range.limits.excluded(s.graph)] for name, part in held.items()}
    pools = {**joined, **{name: part for name, part in within.items() if part}}
    recalls = list(evaluation.retrieval(model, pools, most=MOST))
    accuracies = {p.source.name: p.test for p in found if p.source.accuracy}
    covered = list(evaluation.coverage(model, accuracies))
    inside = list(evaluation.applicability(model, {**tests, **held}))
    card = model_card(recipe, model, found, recalls, covered, inside, list(left_out(made)))
    write_whole(arguments.out / CARD, card.encode())
    print(card)
    return 0


if __name__ == "__main__":
    sys.exit(main())
