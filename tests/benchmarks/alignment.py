"""What alignment by weights finds, and how fast: planted permutations, two perceptrons, large networks, merges of many.

    python tests/benchmarks/alignment.py planted                          # every architecture of tests/architectures
    python tests/benchmarks/alignment.py perceptrons                      # ../shared/checkpoints/otfusion-mnist
    OMP_NUM_THREADS=2 python tests/benchmarks/alignment.py speed          # shapes of ResNet-18 and ResNet-50
    python tests/benchmarks/alignment.py universe --zoo zoos/universe     # five networks into one: zoo/universe.toml
    python tests/benchmarks/alignment.py matcher --zoo zoos/pairs         # the learned matcher: zoo/pairs.toml

Networks of a recipe that are not in the folder are trained first. Each prints a markdown table, ``--json`` its rows.
Seconds are of the wall clock, those of the processor beside them: on a busy machine these say more.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"
ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
warnings.filterwarnings("ignore")

import torch  # noqa: E402
from torch import Tensor  # noqa: E402
from torch.nn import functional as F  # noqa: E402

import weightspace as ws  # noqa: E402
from tests.architectures import CASES  # noqa: E402
from weightspace.align.barrier import interpolate  # noqa: E402
from weightspace.align.repair import repair  # noqa: E402
from weightspace.wiring.proof import generic  # noqa: E402
from weightspace.wiring.wiring import Permutation, Wiring  # noqa: E402
from weightspace.zoo.data import Data, DataSpec, load_data  # noqa: E402

Row = dict[str, Any]
Tensors = Mapping[str, Tensor]
PERCEPTRONS = ROOT.parent / "shared" / "checkpoints" / "otfusion-mnist" / "mnist_models.zip"


def timed(work: Callable[[], Any]) -> tuple[Any, float, float]:
    """What it gives, seconds of the wall clock, seconds of the processor."""
    wall, own = time.perf_counter(), time.process_time()
    found = work()
    return found, time.perf_counter() - wall, time.process_time() - own


def shaken(tensors: Tensors, level: float, seed: int) -> dict[str, Tensor]:
    """Every tensor with normal noise of a share of its deviation."""
    generator = torch.Generator().manual_seed(seed)
    return {
        n: t + level * t.std() * torch.randn(t.shape, generator=generator)
        if t.is_floating_point() and t.numel() > 1 and not n.endswith("running_var")
        else t
        for n, t in tensors.items()
    }


# -------------------------------------------------------------------- planted permutations


def planted(args: argparse.Namespace) -> Iterator[Row]:
    """A random permutation of each architecture, to be undone to the last bit."""
    for name, case in CASES.items():
        if args.only and not any(o in name for o in args.only):
            continue
        try:
            module, given, kwargs = case.build()
        except ImportError as error:
            yield {"architecture": name, "exact": None, "why": str(error)}
            continue
        wiring = ws.wiring(module, *given, **kwargs)
        assert wiring.program is not None
        a = generic(wiring.program.tensors, 3)
        b = wiring.apply(wiring.random(5), a)
        found, wall, own = timed(lambda: ws.align(a, b, wiring=wiring))  # noqa: B023
        yield {
            "architecture": name, "parameters": sum(t.numel() for t in a.values()), "factors": len(wiring.free),
            "exact": all(torch.equal(found.aligned[n], a[n]) for n in a), "cosine": found.objective,
            "seconds": wall, "processor": own,
        }  # fmt: skip


# -------------------------------------------------------------------- two perceptrons


def perceptrons(args: argparse.Namespace) -> Iterator[Row]:
    """Two independent perceptrons on MNIST (Singh & Jaggi 2020), several seeds, and what others find."""
    from weightspace.align.entry import opened
    from weightspace.checkpoint import list_models

    if not PERCEPTRONS.is_file():
        raise SystemExit(f"{PERCEPTRONS} is not there")
    a, b = (dict(opened(n).items()) for n in list_models(PERCEPTRONS))
    wiring = ws.wiring(opened(next(iter(list_models(PERCEPTRONS)))))
    data = load_data(DataSpec(name="mnist", train=10000), args.data)
    # The images were standardised when the two were trained.
    x, y = ((data.test_x - 0.1307) / 0.3081).flatten(1), data.test_y
    both = scores(wiring, x, y)
    some = ((data.train_x[:512] - 0.1307) / 0.3081).flatten(1)
    yield {"method": "ends", "accuracy": (both(a)[0], both(b)[0])}
    middle = interpolate(a, b, 0.5)
    yield {
        "method": "as they are", "cosine": ws.align(a, b, wiring=wiring, starts=(), kicks=0).before,
        "accuracy": both(middle)[0], "repaired": both(repair(wiring, middle, [a, b], some))[0],
    }  # fmt: skip
    plain: dict[str, Any] = {"starts": ("random",), "kicks": 0}
    tries = [
        ("plain weight matching (Ainsworth et al. 2023), one run", plain, 5),
        ("plain weight matching, best of 50 restarts", {**plain, "starts": (), "restarts": 50}, 1),
        ("weight matching, anchored start alone", {"starts": ("anchored",), "kicks": 0}, 5),
        ("Frank-Wolfe (Crisostomi et al. 2024)", {}, 1),
        ("weight matching", {}, 5),
        ("weight matching, 200 kicks", {"kicks": 200}, 3),
    ]
    for name, options, seeds in tries:
        method = "frank-wolfe" if name.startswith("Frank") else "weight-matching"
        for seed in range(seeds):
            found, wall, own = timed(lambda: ws.align(a, b, method, wiring=wiring, seed=seed, **options))  # noqa: B023
            middle = interpolate(a, found.aligned, 0.5)
            yield {
                "method": name, "seed": seed, "cosine": found.objective, "seconds": wall, "processor": own,
                "accuracy": both(middle)[0],
                "repaired": both(repair(wiring, middle, [a, dict(found.aligned)], some))[0],
            }  # fmt: skip


def scores(wiring: Wiring, x: Tensor, y: Tensor) -> Callable[[Tensors], tuple[float, float]]:
    """Accuracy and loss of tensors."""
    assert wiring.program is not None
    run = wiring.program.run

    def both(tensors: Tensors) -> tuple[float, float]:
        with torch.no_grad():
            logits = torch.cat([run(tensors, part) for part in x.split(2000)])
        return float((logits.argmax(-1) == y).double().mean()), float(F.cross_entropy(logits, y))

    return both


# -------------------------------------------------------------------- speed


def speed(args: argparse.Namespace) -> Iterator[Row]:
    """Shapes of ResNet-18 and ResNet-50: two random initialisations, and a permuted copy with noise."""
    for name in ("resnet18-full", "resnet50-full"):
        module, given, kwargs = CASES[name].build()
        wiring = ws.wiring(module, *given, **kwargs)
        assert wiring.program is not None
        a = generic(wiring.program.tensors, 3)
        copy = wiring.apply(wiring.random(5), shaken(a, 0.5, 1))
        generator = torch.Generator().manual_seed(7)
        stranger = {
            n: t.std() * torch.randn(t.shape, generator=generator) if t.is_floating_point() and t.dim() > 1 else t
            for n, t in a.items()
        }
        for kind, b in (("permuted copy, noise of half the deviation", copy), ("independent", stranger)):
            best: Row = {}
            for _ in range(args.repeats):
                found, wall, own = timed(lambda: ws.align(a, b, wiring=wiring))  # noqa: B023
                row = {
                    "network": name, "parameters": sum(t.numel() for t in a.values()), "pair": kind,
                    "threads": torch.get_num_threads(), "before": found.before, "cosine": found.objective,
                    "matching": found.diagnostics["seconds"], "seconds": wall, "processor": own,
                }  # fmt: skip
                best = row if not best or wall < best["seconds"] else best
            yield best


# -------------------------------------------------------------------- merges of many


def universe(args: argparse.Namespace) -> Iterator[Row]:
    """Sets of five independent perceptrons averaged: by every reference, and in one frame."""
    files, data = networks("universe", args.zoo or Path("zoos/universe"), args.data, every=True)["mlp"]
    wiring = ws.wiring(files[0])
    both = scores(wiring, data.test_x, data.test_y)
    some = data.train_x[:512]
    for number in range(len(files) // 5):
        models = [dict(ws.open(f).items()) for f in files[5 * number : 5 * number + 5]]

        def row(name: str, aligned: Sequence[Tensors], number: int = number, **more: Any) -> Row:
            mean = {n: torch.stack([m[n] for m in aligned]).mean(0) for n in aligned[0]}
            plain, repaired = both(mean), both(repair(wiring, mean, aligned, some))
            return {"set": number, "way": name, "accuracy": plain[0], "loss": plain[1], "repaired": repaired[0],
                    "repaired loss": repaired[1], **more}  # fmt: skip

        ends = [both(m) for m in models]
        accuracy, loss = (sum(e[k] for e in ends) / 5 for k in (0, 1))
        yield {"set": number, "way": "ends", "accuracy": accuracy, "loss": loss}
        yield row("as they are", models)
        searches: dict[str, dict[str, Any]] = {
            "no kicks": {"kicks": 0}, "25 kicks": {"kicks": 25}, "weighted alike": {"weighting": "rms", "kicks": 0},
        }  # fmt: skip
        for search, options in searches.items():
            for r in range(5):
                moved, wall, own = timed(
                    lambda: [m if i == r else dict(ws.align(models[r], m, wiring=wiring, **options).aligned)  # noqa: B023
                             for i, m in enumerate(models)]  # noqa: B023
                )  # fmt: skip
                yield row(f"pairwise to {r}, {search}", moved, seconds=wall, processor=own, reference=r)
        ways: dict[str, dict[str, Any]] = {
            "universe": {}, "universe, 4 restarts": {"restarts": 4},
            "universe, 4 restarts, tensors weighted alike": {"restarts": 4, "weighting": "rms"},
        }  # fmt: skip
        for name, options in ways.items():
            found, wall, own = timed(lambda: ws.align_many(models, wiring=wiring, **options))  # noqa: B023
            yield row(name, [dict(c) for c in found.aligned], seconds=wall, processor=own, cosine=found.objective,
                      consistent=found.consistent())  # fmt: skip


def summary(rows: Sequence[Row]) -> list[Row]:
    """Of the references of a set: the mean, the worst and the best by each figure."""
    out = []
    for number in dict.fromkeys(r["set"] for r in rows):
        own = [r for r in rows if r["set"] == number]
        out += [r for r in own if "reference" not in r]
        for search in dict.fromkeys(r["way"].split(", ")[1] for r in own if "reference" in r):
            group = [r for r in own if "reference" in r and r["way"].endswith(f", {search}")]
            for word, of in (("mean of", None), ("best of", True)):
                row: Row = {"set": number, "way": f"pairwise to a reference, {search}, {word} {len(group)}"}
                for key, better in (("accuracy", max), ("loss", min), ("repaired", max), ("repaired loss", min)):
                    values = [r[key] for r in group]
                    row[key] = better(values) if of else sum(values) / len(values)
                row["processor"] = sum(r["processor"] for r in group) / len(group)
                out.append(row)
    return out


def networks(
    recipe: str, folder: Path, data: str | None, *, every: bool = False
) -> dict[str, tuple[list[Path], Data]]:
    """Last checkpoints of a recipe's populations (the first two, or ``every``), trained where they are missing."""
    from weightspace.zoo.populations import build_sampled, is_complete, plan
    from weightspace.zoo.recipe import load

    loaded = load(recipe)
    plans = plan(loaded, data)
    if not all(is_complete(r, folder) for runs in plans.values() for r in runs):
        build_sampled(loaded, folder, data=data)
    found = {}
    for name, runs in plans.items():
        files = [folder / r.file(r.checkpoints[-1]) for r in (runs if every else runs[:2])]
        found[name] = files, load_data(runs[0].data, data)
    return found


# -------------------------------------------------------------------- the learned matcher


def matcher(args: argparse.Namespace) -> Iterator[Row]:
    """Share of elements put right, objective and seconds, of the learned matcher and of cold weight matching."""
    from weightspace.align.learned import FILE, ElementEncoder, learned, load_matcher, matched, states_of

    torch.manual_seed(0)
    encoders = {"learned": load_matcher(args.matcher or FILE), "not trained": ElementEncoder().eval()}
    folder = args.zoo or Path("zoos/pairs")
    for population, (files, _) in networks("pairs", folder, args.data).items():
        if args.only and population not in args.only:
            continue
        a, other = (dict(ws.open(f).items()) for f in files)
        wiring = ws.wiring(files[0])
        for level in (0.0, 0.1, 0.3, 1.0):
            element = wiring.random(5)
            b = wiring.apply(element, shaken(a, level, 1))
            row: Row = {"network": population, "pair": f"copy, noise {level:g}"}
            for name, encoder in encoders.items():
                def read(encoder: ElementEncoder = encoder, b: Tensors = b) -> Permutation:
                    with torch.no_grad():
                        of_a, of_b = (states_of(encoder, [m], wiring)[0] for m in (a, b))  # noqa: B023
                    return matched(of_a, of_b, wiring)[0]  # noqa: B023

                found, _, own = timed(read)
                row |= {name: right(wiring, element, found), f"{name} seconds": own}
            cold, _, own = timed(lambda: ws.align(a, b, wiring=wiring, starts=("anchored",), kicks=0))  # noqa: B023
            row |= {"cold": right(wiring, element, cold.permutations), "cold seconds": own}
            refined, _, own = timed(lambda: learned(a, b, wiring, matcher=args.matcher))  # noqa: B023
            yield row | {"refined": right(wiring, element, refined.permutations), "refined seconds": own}
        cold, _, own = timed(lambda: ws.align(a, other, wiring=wiring, starts=("anchored",), kicks=0))  # noqa: B023
        full, _, most = timed(lambda: ws.align(a, other, wiring=wiring))  # noqa: B023
        options = {} if args.matcher is None else {"matcher": args.matcher}
        warm, _, time_warm = timed(lambda: ws.align(a, other, "learned", wiring=wiring, **options))  # noqa: B023
        yield {
            "network": population, "pair": "independent", "learned": warm.diagnostics["found"],
            "learned seconds": warm.diagnostics["reading"], "cold": cold.objective, "cold seconds": own,
            "refined": warm.objective, "refined seconds": time_warm, "full search": full.objective,
            "full seconds": most,
        }  # fmt: skip


def right(wiring: Wiring, planted: Permutation, found: Permutation) -> float:
    """The share of elements that are where they were before the planted permutation."""
    both = planted.compose(found)
    hits = [both._of(f) == torch.arange(x.size) for f, x in wiring.free.items() if x.size > 1]
    return float(torch.cat([h.flatten() for h in hits]).double().mean()) if hits else 1.0


# -------------------------------------------------------------------- output

PARTS: dict[str, Callable[[argparse.Namespace], Iterator[Row]]] = {
    "planted": planted, "perceptrons": perceptrons, "speed": speed, "universe": universe, "matcher": matcher,
}  # fmt: skip


def table(rows: Sequence[Row]) -> str:
    """The rows as a markdown table; a column for every key."""
    keys = list(dict.fromkeys(k for r in rows for k in r))
    lines = [f"| {' | '.join(keys)} |", "|---" * len(keys) + "|"]
    lines += [f"| {' | '.join(_cell(k, r.get(k)) for k in keys)} |" for r in rows]
    return "\n".join(lines)


def _cell(key: str, value: Any) -> str:
    if isinstance(value, tuple):
        return ", ".join(_cell(key, v) for v in value)
    if value is None or isinstance(value, str | bool):
        return "" if value is None else "yes" if value is True else "no" if value is False else value
    if isinstance(value, float):
        how = ".2%" if key in ("accuracy", "repaired") else ".2f" if "sec" in key or key == "processor" else ".4f"
        return format(value, how)
    return f"{value:,}"


def main() -> None:
    """Measure one part and print its table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=list(PARTS))
    parser.add_argument("--only", nargs="*", help="architectures or populations")
    parser.add_argument("--zoo", type=Path, help="folder of the recipe's networks")
    parser.add_argument("--data", help="folder with the data sets")
    parser.add_argument("--matcher", type=Path, help="file of another matcher")
    parser.add_argument("--repeats", type=int, default=3, help="of a timing; the best counts")
    parser.add_argument("--results", type=Path, help="JSON lines: rows are added")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    rows = []
    for row in PARTS[args.part](args):
        rows.append(row)
        if args.results is not None:
            with args.results.open("a") as file:
                file.write(json.dumps({"part": args.part, **row}) + "\n")
        if sys.stderr.isatty() or args.results is not None:
            print(" ".join(f"{k}={_cell(k, v)}" for k, v in row.items()), file=sys.stderr, flush=True)
    if args.json:
        print(json.dumps(rows, indent=1))
        return
    print(table(summary(rows) if args.part == "universe" else rows))
    if args.part == "planted":
        done = [r for r in rows if r["exact"] is not None]
        print(f"\nrecovered exactly: {sum(r['exact'] for r in done)} of {len(done)}")


if __name__ == "__main__":
    main()
