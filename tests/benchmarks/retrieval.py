"""What descriptor and function find on real files: `python tests/benchmarks/retrieval.py [--json]`.

Indexes the folder of checkpoints beside the project (``../shared/checkpoints``; ``--folder`` names
another with the same sub-folders) and prints a table: what was asked, what came out, whether it holds.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch

import weightspace as ws
from weightspace.retrieval import describe, distances
from weightspace.retrieval.function import function

SHARED = Path(__file__).resolve().parents[2].parent / "shared" / "checkpoints"
SAME = 1e-5
NEAR = 1e-3


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    question: str
    result: str
    holds: bool
    seconds: float


@dataclass(frozen=True)
class Embedded:
    """The embeddings of an indexed zoo."""

    zoo: ws.Zoo
    names: list[str]
    vectors: np.ndarray

    def matching(self, pattern: str) -> list[int]:
        """Positions of the models whose name matches."""
        return [i for i, name in enumerate(self.names) if re.search(pattern, name)]

    def between(self, i: int, j: int) -> float:
        """Distance of two models."""
        return float(distances(self.vectors[i], self.vectors[[j]])[0])

    def nearest(self, i: int) -> int:
        """Position of the nearest other model."""
        away = distances(self.vectors[i], self.vectors)
        away[i] = np.inf
        return int(away.argmin())


def embed(folder: Path, jobs: int | None = None) -> Embedded:
    """Bring the index of a folder up to date and read its embeddings."""
    zoo = ws.Zoo(folder)
    zoo.index(jobs=jobs, progress=sys.stderr.isatty())
    return Embedded(zoo, *zoo.embeddings())


def permuted_copies(zoo: Embedded, orbit_sample: int = 4, limit: int | None = None) -> tuple[str, bool]:
    """Is a permuted copy of each proved model its own nearest neighbour? Few of the orbit stand for all."""
    from weightspace.zoo.examine import models_in

    worst = 0.0
    asked = 0
    wrong: list[str] = []
    table = zoo.zoo.table()
    # Members of the orbit are each other's copies already.
    names = [n for n in table.index[table["wiring"] == "proved"] if "inr-orbit" not in n]
    orbit = [n for n in table.index[table["wiring"] == "proved"] if "inr-orbit" in n]
    files = sorted({n.partition("!")[0] for n in [*names, *orbit[:orbit_sample]]})[:limit]
    for file in files:
        for checkpoint, name in models_in(zoo.zoo.folder / file, file):
            wiring = ws.wiring(checkpoint)
            if not wiring.proved:
                continue
            only = [tensor for tensor in wiring if tensor not in wiring.untouched]
            tensors = {tensor: checkpoint[tensor] for tensor in only}
            moved = wiring.apply(wiring.random(7), tensors)
            away = distances(describe(moved, wiring).vector.astype(np.float32), zoo.vectors)
            found = int(away.argmin())
            own = float(away[zoo.names.index(name)])
            # A model that the zoo holds twice is as near as its own copy.
            if own > SAME or away[found] < own - SAME:
                wrong.append(f"{name} ({own:.1e}, nearest {zoo.names[found]})")
            worst = max(worst, own)
            asked += 1
    text = f"{asked - len(wrong)} of {asked} models, largest distance {worst:.1e}"
    return text + (f"; not {', '.join(wrong[:3])}" if wrong else ""), bool(asked) and not wrong


def same_function(zoo: Embedded, orbit_sample: int = 4) -> tuple[str, bool]:
    """How many models can be asked what they compute, and how far off are their permuted copies?"""
    from weightspace.zoo.examine import models_in

    worst, asked, total = 0.0, 0, 0
    orbit = 0
    for name in zoo.names:
        orbit += "inr-orbit" in name
        if "inr-orbit" in name and orbit > orbit_sample:
            continue
        file = name.partition("!")[0]
        checkpoint = next(c for c, n in models_in(zoo.zoo.folder / file, file) if n == name)
        wiring = ws.wiring(checkpoint)
        total += 1
        own = function(checkpoint, wiring)
        if own.vector is None:
            continue
        asked += 1
        only = {t: checkpoint[t] for t in wiring if t not in wiring.untouched}
        moved = function({**dict(checkpoint), **wiring.apply(wiring.random(7), only)}, wiring)
        assert moved.vector is not None
        worst = max(worst, float(np.linalg.norm(own.vector - moved.vector)))
    return f"{asked} of {total} models asked, largest distance of a permuted copy {worst:.1e}", worst < NEAR


def two_formats(zoo: Embedded) -> tuple[str, bool]:
    """Is the network that is there as ONNX and as PyTorch its own nearest by function?"""
    i, j = zoo.matching(r"cifar_base_kw")
    found = [zoo.zoo.similar(zoo.names[k], k=2, by="function") for k in (i, j)]
    text = f"distance {max(f[0].distance for f in found):.1e}, next model at {min(f[1].distance for f in found):.2f}"
    return text, [f[0].name for f in found] == [zoo.names[j], zoo.names[i]]


def burn_pair(zoo: Embedded) -> tuple[str, bool]:
    """Are the two files of the Burn MNIST net each other's nearest?"""
    i, j = zoo.matching(r"^burn-mnist/")
    others = [n for n in range(len(zoo.names)) if n not in (i, j)]
    next_best = min(float(distances(zoo.vectors[i], zoo.vectors[others]).min()) for i in (i, j))
    mutual = zoo.nearest(i) == j and zoo.nearest(j) == i
    return f"distance {zoo.between(i, j):.4f}, next model at {next_best:.4f}", mutual


def resaved(zoo: Embedded, folder: Path) -> tuple[str, bool]:
    """One of them saved again as .safetensors and as .pt: at what distance?"""
    import tempfile

    source = ws.open(next((folder / "burn-mnist").glob("*.pt")))
    worst = 0.0
    with tempfile.TemporaryDirectory() as temporary:
        for name in ("again.safetensors", "again.pt"):
            source.save(Path(temporary) / name)
            nearest = zoo.zoo.similar(Path(temporary) / name, k=1)[0]
            if not nearest.name.endswith(".pt"):
                return f"{name} is nearest to {nearest.name}", False
            worst = max(worst, nearest.distance)
    return f"distance {worst:.1e}", worst <= SAME


def orbit(zoo: Embedded) -> tuple[str, bool]:
    """Do the symmetry copies of one image network collapse to one point?"""
    members = zoo.matching(r"^inr-orbit/")
    vectors = zoo.vectors[members]
    diameter = max(float(distances(vector, vectors).max()) for vector in vectors)
    others = [n for n in range(len(zoo.names)) if n not in set(members)]
    outside = float(distances(vectors[0], zoo.vectors[others]).min())
    return (
        f"{len(members)} copies within {diameter:.1e}, next model at {outside:.2f}",
        len(members) > 1 and diameter <= SAME < outside,
    )


def children(zoo: Embedded) -> tuple[str, bool]:
    """Are textgenrnn's children nearer to their base than to anything else?"""
    (base,) = zoo.matching(r"^textgenrnn/textgenrnn")
    young = [i for i in zoo.matching(r"^textgenrnn/") if i != base]
    return (
        ", ".join(f"{zoo.between(i, base):.4f}" for i in young)
        + f" to the base, {zoo.between(*young):.4f} between them",
        all(zoo.nearest(i) == base for i in young),
    )


def trajectory(zoo: Embedded) -> tuple[str, bool]:
    """Is a training run ordered along its first principal direction?"""
    from scipy.stats import spearmanr

    members = zoo.matching(r"^fer-trajectory/")
    epochs = [int(found[1]) for i in members if (found := re.search(r"\.(\d+)-", zoo.names[i]))]
    vectors = zoo.vectors[members].astype(np.float64)
    left, singular, _ = np.linalg.svd(vectors - vectors.mean(axis=0), full_matrices=False)
    rank = abs(float(spearmanr(left[:, 0], epochs).statistic))
    share = float(singular[0] ** 2 / (singular**2).sum())
    return f"Spearman {rank:.3f} over {len(members)} epochs ({share:.0%} of the variance)", rank >= 0.95


def rows(folder: Path, jobs: int | None = None) -> Iterator[Row]:
    """The table, one line after the other."""
    started = time.perf_counter()
    zoo = embed(folder, jobs)
    table = zoo.zoo.table()
    proved = int((table["wiring"] == "proved").sum())
    failures = zoo.zoo.failures()
    yield Row(
        "models opened and described",
        f"{len(zoo.names)} models, {proved} proved, {len(failures)} files failed",
        not failures,
        time.perf_counter() - started,
    )
    questions: list[tuple[str, Callable[[], tuple[str, bool]]]] = [
        ("permuted copy is its own nearest neighbour", lambda: permuted_copies(zoo)),
        ("burn-mnist .pt and .safetensors are each other's nearest", lambda: burn_pair(zoo)),
        ("burn-mnist .pt saved again in two formats", lambda: resaved(zoo, folder)),
        ("inr-orbit collapses to one point", lambda: orbit(zoo)),
        ("textgenrnn children are nearest to their base", lambda: children(zoo)),
        ("fer-trajectory is ordered along its run", lambda: trajectory(zoo)),
        ("permuted copies compute the same", lambda: same_function(zoo)),
        ("one network as ONNX and as PyTorch is its own nearest", lambda: two_formats(zoo)),
    ]
    for question, ask in questions:
        started = time.perf_counter()
        result, holds = ask()
        yield Row(question, result, holds, time.perf_counter() - started)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=SHARED)
    parser.add_argument("--jobs", type=int, default=None)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    if not arguments.folder.is_dir():
        print(f"there is no folder {arguments.folder}; name one with --folder", file=sys.stderr)
        return 1
    torch.set_num_threads(1)  # the networks are small, and cores may be shared
    table = []
    if not arguments.json:
        print("| question | result | holds | s |\n|---|---|---|---|")
    for row in rows(arguments.folder, arguments.jobs):
        table.append(row)
        if not arguments.json:
            holds = "yes" if row.holds else "no"
            print(f"| {row.question} | {row.result} | {holds} | {row.seconds:.1f} |", flush=True)
    if arguments.json:
        print(json.dumps([asdict(row) for row in table], indent=2))
    return 0 if all(row.holds for row in table) else 1


if __name__ == "__main__":
    raise SystemExit(main())
