"""What the pretrained metanets are worth on networks they have not seen, beside the descriptor and chance.

    python tests/benchmarks/encoder.py models/families models/wild-park … [--json]

Each argument is a population's folder, named after its recipe (``weightspace zoo build`` makes them). Of populations
that the shipped metanets learned from, the runs of their test part are asked, by the split of ``recipe.toml``; of any
other all. Prints Markdown tables: retrieval (by the encoder, the descriptor, and both as ``similar`` takes them
together), intervals of the predicted accuracy, and applicability; ``--retrieval`` the first alone. ``--seconds`` prints
instead what reading with them adds to the time that the index takes for a file.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from dataclasses import asdict
from pathlib import Path

import torch

from weightspace.metanets.data import Sample, load_samples
from weightspace.pretrained import shipped
from weightspace.pretrained.card import applicability_table, coverage_table, retrieval_table
from weightspace.pretrained.evaluation import Coverage, Inside, Recall, applicability, coverage, retrieval
from weightspace.pretrained.networks import cleaned, parts
from weightspace.pretrained.recipe import Source, load

MOST = 400


def pools(folders: list[Path]) -> tuple[dict[str, list[Sample]], dict[str, list[Sample]]]:
    """Test networks of the populations that were learned from, and of those that were held out, by name."""
    recipe = load()
    tests: dict[str, list[Sample]] = {}
    held: dict[str, list[Sample]] = {}
    for folder in folders:
        own = [s for s in recipe.sources if s.recipe == folder.resolve().name]
        samples = load_samples(folder)
        for source in own:
            found = parts(recipe, source, samples)
            (held if source.held_out else tests)[source.name] = found.test
        if not own:
            source = Source(folder.resolve().name)
            held[source.name] = [cleaned(s, source.recipe) for s in samples]
    return tests, held


def seconds(folder: Path, files: int = 40, repeats: int = 3) -> str:
    """Processor time per model of a folder in the index, without and with the pretrained metanets; least of some."""
    from weightspace.zoo.examine import describe_model, models_in

    paths = [path for path in sorted(folder.iterdir()) if path.is_file() and not path.name.startswith(".")]
    paths = paths[:: max(1, len(paths) // files)]
    least = {False: math.inf, True: math.inf}
    for _ in range(1 + repeats):  # the first warms up
        for read in least:
            started, count = time.process_time(), 0
            for path in paths:
                for opened, name in models_in(path, path.name):
                    describe_model(opened, name, path.name, "", read=read)
                    count += 1
            least[read] = min(least[read], (time.process_time() - started) / count)
    return (
        f"{folder.name}: {count} models, {1000 * least[False]:.1f} ms each to open, wire and describe, "
        f"{1000 * least[True]:.1f} ms with the pretrained metanets"
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", type=Path, nargs="+")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--retrieval", action="store_true", help="the table of retrieval alone")
    parser.add_argument("--seconds", action="store_true", help="time alone: of opening, wiring, describing, reading")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.seconds:
        for folder in arguments.folders:
            print(seconds(folder))
        return 0
    model = shipped()
    tests, held = pools(arguments.folders)
    joined = {"held-out runs": [s for part in tests.values() for s in part]} if tests else {}
    recalls: list[Recall] = list(retrieval(model, {**joined, **held}, most=MOST))
    if arguments.retrieval:
        print(json.dumps([asdict(r) for r in recalls]) if arguments.json else retrieval_table(recalls))
        return 0
    labelled = {
        name: [s for s in part if isinstance(s.record.get("test_accuracy"), float)]
        for name, part in {**tests, **held}.items()
    }
    covered: list[Coverage] = list(coverage(model, {name: part for name, part in labelled.items() if part}))
    inside: list[Inside] = list(applicability(model, {**tests, **held}))
    if arguments.json:
        rows = {"retrieval": recalls, "coverage": covered, "applicability": inside}
        print(json.dumps({"model": model.name, **{k: [asdict(r) for r in v] for k, v in rows.items()}}, indent=2))
        return 0
    print(f"{model!r}\n")
    for text in (retrieval_table(recalls), coverage_table(covered), applicability_table(inside)):
        print(text + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
