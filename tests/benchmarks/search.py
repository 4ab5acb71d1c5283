"""Searches of a zoo: who knows a task, by its rows; and which architectures are alike, by their graphs.

    python tests/benchmarks/search.py --tasks MERGING [--rows 100]    models built from the recipe merging
    python tests/benchmarks/search.py --architectures                 the architectures of the wiring table

Rows are test images that no model was trained on, their labels renamed at random. A hit is right if the model was
fine-tuned on the task that the rows are of; the bases know every task a little and count as wrong. Architectures are
searched among all others of the table, without their names or sizes; a hit is right if it is of the same family.
"""

from __future__ import annotations

import argparse
import re
import tempfile
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

import weightspace as ws
from tests.benchmarks.lineage import interval, show

FAMILIES: Mapping[str, str] = {
    "encoders": "torch-encoder torch-encoder-prenorm torch-transformer hf-opt hf-bart hf-pegasus",
    "BERT": "hf-bert hf-roberta hf-distilbert hf-albert hf-electra hf-deberta-v2",
    "GPT-2": "hf-gpt2 gpt-tied",
    "rotary decoders": "hf-llama hf-mistral hf-phi3 llama-gqa llama-mqa hf-olmo hf-gemma hf-cohere hf-stablelm "
    "hf-qwen2 hf-qwen3 hf-gptj hf-gpt-neo",
    "gated experts": "hf-mixtral hf-qwen2-moe",
    "ViT": "vit hf-vit hf-deit hf-beit hf-clip",
    "state spaces": "mamba hf-mamba hf-mamba2 hf-mamba2-groups",
    "recurrent": "lstm gru rnn-tanh lstm-projected lstm-cell-loop",
    "ConvNeXt": "convnext hf-convnext hf-convnextv2",
    "ResNet": "resnet20-option-a resnet18 resnet50 preact-resnet wide-resnet hf-resnet",
    "RegNet": "regnet hf-regnet",
    "inverted residuals": "mobilenet-v2 mnasnet efficientnet hf-mobilenet-v2 hf-efficientnet hf-mobilenet-v1",
    "ShuffleNet": "shufflenet-v1-units shufflenet-v1 shufflenet-v2",
    "plain CNN": "cnn-flatten vgg11 conv3d tcn dueling-dqn",
    "U-Net": "unet upsample-unet",
    "speech": "hf-wav2vec2 hf-hubert",
    "triplanes": "triplane-sum triplane-concat",
    "graph networks": "pyg-gcn pyg-sage pyg-gat pyg-gin",
}
"""Families of the table's architectures that have siblings there."""


def architectures() -> list[dict[str, Any]]:
    """A row per family: recall of a sibling at 1 and 3."""
    from tests.architectures import CASES
    from weightspace.errors import WeightspaceError
    from weightspace.retrieval.architecture import alike, fingerprint

    graphs = {}
    for name, case in CASES.items():
        if case.full:
            continue
        try:
            module, args, kwargs = case.build()
            graphs[name] = fingerprint(ws.wiring(module, *args, prove=False, **kwargs))
        except (WeightspaceError, ImportError) as error:
            print(f"not wired: {name}: {' '.join(str(error).split())[:100]}")
    family = {n: f for f, names in FAMILIES.items() for n in names.split() if n in graphs}
    counts: dict[str, int] = defaultdict(int)
    for f in family.values():
        counts[f] += 1
    tally: dict[str, list[tuple[float, float, float, str]]] = defaultdict(list)
    for name, f in family.items():
        if counts[f] < 2:
            continue
        others = sorted((o for o in graphs if o != name), key=lambda o: -alike(graphs[name], graphs[o]))
        right = [family.get(o) == f for o in others]
        chance = (counts[f] - 1) / (len(graphs) - 1)
        tally[f].append((float(right[0]), float(any(right[:3])), chance, f"{name} → {others[0]}"))
    every = [x for found in tally.values() for x in found]
    rows = []
    for f, found in [*tally.items(), ("all", every)]:
        missed = [words for right, _, _, words in found if not right]
        rows.append(
            {
                "family": f, "architectures": len(found), "recall@1": interval([x[0] for x in found]),
                "recall@3": interval([x[1] for x in found]), "chance": float(np.mean([x[2] for x in found])),
                "missed": "" if f == "all" else ", ".join(missed[:3]),
            }
        )  # fmt: skip
    return rows


def tasks(folder: Path, count: int, seeds: int) -> list[dict[str, Any]]:
    """A row per measure: recall at 1 of a model that was fine-tuned on the task that the rows are of."""
    from weightspace.zoo.files import read_record
    from weightspace.zoo.tasks import CLASSES, data_of

    with tempfile.TemporaryDirectory() as index:
        zoo = ws.Zoo(folder, index=index)
        zoo.index(progress=False)
        records = {name: read_record(folder / name) for name in zoo.table().index}
        knows = {
            n: {int(m[1]) for t in r.get("tasks", ()) if (m := re.match(r"(\d+)(?!.*~)", str(t)))}
            for n, r in records.items()
        }
        data = data_of(next(r for r in records.values() if r.get("data_spec")))
        hits: dict[str, list[float]] = defaultdict(list)
        left = 0
        for seed in range(seeds):
            for task in range(data.tasks):
                rng = np.random.default_rng([seed, task])
                parts = [np.flatnonzero((data.test_y == task * CLASSES + c).numpy()) for c in range(CLASSES)]
                at = np.concatenate([rng.choice(x, min(count // CLASSES, len(x)), replace=False) for x in parts])
                labels = torch.from_numpy(rng.permutation(CLASSES))[data.test_y[torch.from_numpy(at)] % CLASSES]
                found = zoo.search_task(data.test_x[torch.from_numpy(at)], labels, k=len(records))
                left = len(found.left_out)
                for what in ("score", "information", "probe"):
                    ranked = sorted(found, key=lambda h: -(h.score if what == "score" else h.facts[what]))
                    hits[what].append(float(task in knows[ranked[0].name]))
                    first = next(i for i, h in enumerate(ranked) if task in knows[h.name])
                    hits[f"{what} rank"].append(1 / (first + 1))
    share = float(np.mean([[t in knows[n] for t in range(data.tasks)] for n in records]))
    return [
        {
            "ranked by": what, "queries": len(hits[what]), "models": len(records), "left out": left,
            "recall@1": interval(hits[what]), "mean reciprocal rank": interval(hits[f"{what} rank"]), "chance": share,
        }
        for what in ("score", "information", "probe")
    ]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", type=Path, help="models built from the recipe merging")
    parser.add_argument("--rows", type=int, default=100, help="labelled rows of a query")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--architectures", action="store_true")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    found: Sequence[Mapping[str, Any]]
    if arguments.tasks:
        found = tasks(arguments.tasks, arguments.rows, arguments.seeds)
        show(f"{arguments.tasks.name}: who knows the task of {arguments.rows} rows", found, arguments.json)
    if arguments.architectures:
        show("Architectures by their graphs", architectures(), arguments.json)


if __name__ == "__main__":
    main()
