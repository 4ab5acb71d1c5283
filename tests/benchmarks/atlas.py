"""The atlas: every model type in the transformers registry, built small, traced and proved.

    python tests/benchmarks/atlas.py                    # all types not yet in build/atlas.jsonl
    python tests/benchmarks/atlas.py --only bert llama  # some types, again
    python tests/benchmarks/atlas.py --retry            # all that were not proved
    python tests/benchmarks/atlas.py --table            # the counts of what is recorded

Each type runs in a process of its own with a time limit and a memory limit; a line of JSON is written as
soon as it is done, so that a stopped run goes on where it was. Nothing is downloaded.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import resource
import sys
import time
import warnings
from collections import Counter
from collections.abc import Sequence
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_OFFLINE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(Path(__file__).resolve().parent)]

import torch  # noqa: E402
from architectures.registry import enliven  # noqa: E402

from weightspace.wiring.small import build, model_types  # noqa: E402
from weightspace.wiring.small_inputs import brief  # noqa: E402

OUTCOMES = ("proved", "wrong", "refused", "crashed", "timeout", "not built", "part")


def record(model_type: str, trace: bool) -> dict[str, Any]:
    """What became of one model type."""
    start = time.perf_counter()
    entry: dict[str, Any] = {"type": model_type, "built": False, "outcome": "not built"}
    try:
        small = build(model_type)
    except Exception as error:
        outcome = "part" if "no model class" in str(error) else "not built"
        return {**entry, "outcome": outcome, "reason": str(error), "seconds": time.perf_counter() - start}
    entry |= {
        "built": True,
        "outcome": "untraced",
        "class": small.name,
        "inputs": sorted(small.kwargs),
        "parameters": sum(p.numel() for p in small.module.parameters()),
        "width": small.scale.width,
    }
    if trace:
        entry |= traced(small.module, small.kwargs)
    return {**entry, "seconds": round(time.perf_counter() - start, 2)}


def traced(module: torch.nn.Module, kwargs: Any) -> dict[str, Any]:
    """The wiring's own account of a module."""
    import weightspace as ws

    torch.manual_seed(0)
    enliven(module)
    try:
        wiring = ws.wiring(module, **kwargs)
    except ws.errors.WeightspaceError as error:
        return {"outcome": "refused", "reason": brief(error)}
    except Exception as error:
        return {"outcome": "crashed", "reason": brief(error)}
    outcome = {"proved": "proved", "failed": "wrong"}.get(wiring.status, "refused")
    if outcome == "proved" and wiring.movable_share == 0:
        outcome = "refused"  # an empty group is kept by any network: nothing was shown
    proof = wiring.proof
    return {
        "outcome": outcome,
        "error": None if proof is None else proof.error32,
        "demoted": 0 if proof is None else len(proof.demoted),
        "vacuous": 0 if proof is None else len(proof.vacuous),
        "movable": round(float(wiring.movable_share), 4),
        "factors": sum(not factor.pinned for factor in wiring.factors.values()),
        "notes": list(wiring.notes),
    }


def child(model_type: str, trace: bool, memory: int, pipe: Connection) -> None:
    """Runs one type under a memory limit and sends its record."""
    warnings.filterwarnings("ignore")
    sink = os.open(os.devnull, os.O_WRONLY)
    os.dup2(sink, 1)
    os.dup2(sink, 2)
    resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    torch.set_num_threads(1)
    try:
        pipe.send(record(model_type, trace))
    except BaseException as error:
        pipe.send({"type": model_type, "built": False, "outcome": "not built", "reason": brief(error)})


def survey(types: Sequence[str], out: Path, jobs: int, limit: float, memory: int, trace: bool) -> None:
    """Records all types, ``jobs`` at a time."""
    import transformers
    from transformers import AutoModel, GenerationMixin, PreTrainedModel  # noqa: F401

    transformers.logging.set_verbosity_error()
    context = multiprocessing.get_context("fork")  # the libraries are imported once, here
    waiting = list(types)
    running: dict[Connection, tuple[str, Any, float]] = {}
    done = 0
    with out.open("a") as lines:
        while waiting or running:
            while waiting and len(running) < jobs:
                model_type = waiting.pop(0)
                ours, theirs = context.Pipe(duplex=False)
                process = context.Process(target=child, args=(model_type, trace, memory, theirs), daemon=True)
                process.start()
                theirs.close()
                running[ours] = (model_type, process, time.monotonic())
            ready = wait(list(running), timeout=0.5)
            for pipe in list(running):
                model_type, process, start = running[pipe]
                if pipe in ready:
                    try:
                        entry = pipe.recv()
                    except EOFError:
                        entry = {"type": model_type, "outcome": "crashed", "reason": "the process died"}
                elif time.monotonic() - start > limit:
                    entry = {"type": model_type, "outcome": "timeout", "reason": f"over {limit:.0f} s"}
                else:
                    continue
                process.kill()
                process.join()
                del running[pipe]
                pipe.close()
                done += 1
                lines.write(json.dumps(entry) + "\n")
                lines.flush()
                print(
                    f"{done:4d}/{len(types)} {entry['outcome']:10s} {model_type:32s} {summary(entry)}",
                    flush=True,
                )


def summary(entry: dict[str, Any]) -> str:
    if entry["outcome"] in ("proved", "wrong", "untraced"):
        movable = entry.get("movable")
        return f"{entry['class']:40s} {entry['seconds']:5.1f} s" + ("" if movable is None else f" {movable:.3f}")
    return str(entry.get("reason") or "; ".join(entry.get("notes", ())))[:150]


def load(out: Path) -> dict[str, dict[str, Any]]:
    """The last record of every type."""
    if not out.exists():
        return {}
    entries = [json.loads(line) for line in out.read_text().splitlines() if line.strip()]
    return {entry["type"]: entry for entry in entries}


def table(entries: dict[str, dict[str, Any]]) -> None:
    """Counts, then the operations and reasons that stood in the way."""
    counts = Counter(entry["outcome"] for entry in entries.values())
    built = sum(entry.get("built", False) for entry in entries.values())
    models = len(entries) - counts["part"]
    print(f"{len(entries)} configurations: {models} models (the others are parts of one), {built} built")
    for outcome in (*OUTCOMES, "untraced"):
        if counts[outcome]:
            print(f"  {outcome:10s} {counts[outcome]:4d}")
    claimed = [t for t, entry in entries.items() if entry.get("demoted")]
    if claimed:
        names = ", ".join(claimed)
        print(f"  proved after the proof pinned axes that the rules left free: {len(claimed)} ({names})")
    if built and counts["proved"]:
        print(f"  proved of built: {counts['proved'] / built:.1%}")
    movable = [entry["movable"] for entry in entries.values() if entry["outcome"] == "proved"]
    for share in (0.95, 0.5):
        print(f"  proved with {share:.0%} of parameters movable: {sum(m >= share for m in movable)}")
    notes = Counter(note for e in entries.values() if e["outcome"] != "proved" for note in e.get("notes", ()))
    for note, count in notes.most_common(20):
        print(f"  {count:4d} × {note}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "atlas.jsonl")
    parser.add_argument("--only", nargs="+", default=None, metavar="TYPE")
    parser.add_argument("--retry", action="store_true", help="again all that were not proved")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--limit", type=float, default=60, help="seconds for one type")
    parser.add_argument("--memory", type=float, default=12, help="GB of address space for one type")
    parser.add_argument("--build-only", action="store_true", help="build and run, without tracing")
    parser.add_argument("--table", action="store_true", help="only print what is recorded")
    options = parser.parse_args()
    options.out.parent.mkdir(parents=True, exist_ok=True)
    known = load(options.out)
    if not options.table:
        types = options.only or model_types()
        if not options.only:
            good = {"untraced"} if options.build_only else {"proved"}
            keep = {t for t, e in known.items() if not options.retry or e["outcome"] in {*good, "part"}}
            types = [t for t in types if t not in keep]
        survey(
            types,
            options.out,
            options.jobs,
            options.limit,
            int(options.memory * 2**30),
            not options.build_only,
        )
        known = load(options.out)
    table(known)


if __name__ == "__main__":
    main()
