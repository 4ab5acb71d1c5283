"""Seconds and memory of merging, ours and mergekit, on the same files in the same run.

    python tests/benchmarks/merging_speed.py [--mergekit /venv/bin/mergekit-yaml] [--sizes 63M:float32 301M:bfloat16]

Each merge is a process of its own, timed from its start to its end, imports included; the best of ``--repeat``. Every
size is a base and three fine-tunes of it, written to a temporary folder first, so that the files are in the page
cache for both programs; both may use ``--threads``. ``peak`` is the largest resident size (the kernel's VmHWM, pages of
mapped files included): the figure to compare, since it is never too small. ``private`` is its largest anonymous part,
polled: what the process takes from the machine that could not be dropped at once. (The maxrss of ``getrusage`` would
count this program's own memory before it becomes the other one.)

mergekit is best installed in an environment of its own; without it only our rows are printed.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))
from merging_models import write

DENSITY = 0.2
OURS = """
import sys, weightspace as ws
method, density, out, base, *models = sys.argv[1:]
hyper = {"ties": {"density": float(density)}, "task-arithmetic": {"scale": 1.0}, "dare": {"density": float(density)}}
ws.merge(models, method, base=base, out=out, **hyper.get(method, {}))
"""
MERGEKIT = {"linear": "linear", "task-arithmetic": "task_arithmetic", "ties": "ties", "dare": "dare_linear"}


def measured(command: list[str], environment: dict[str, str]) -> tuple[float, int, int]:
    """Seconds, peak resident bytes and peak anonymous bytes of a process."""
    peaks = [0, 0]
    over = threading.Event()

    def poll(pid: int) -> None:
        while not over.wait(0.01):
            try:
                status = Path(f"/proc/{pid}/status").read_text()
            except OSError:
                return
            found = dict(line.split()[:2] for line in status.splitlines() if line.startswith(("VmHWM", "RssAnon")))
            peaks[0] = max(peaks[0], int(found.get("VmHWM:", 0)) << 10)
            peaks[1] = max(peaks[1], int(found.get("RssAnon:", 0)) << 10)

    with tempfile.TemporaryFile() as output:
        started = time.perf_counter()
        process = subprocess.Popen(command, env=environment, stdout=output, stderr=subprocess.STDOUT)
        watcher = threading.Thread(target=poll, args=(process.pid,))
        watcher.start()
        process.wait()
        seconds = time.perf_counter() - started
        over.set()
        watcher.join()
        if process.returncode:
            output.seek(0)
            raise SystemExit(f"{' '.join(command[:4])} … failed:\n{output.read().decode()[-3000:]}")
    return seconds, peaks[0], peaks[1]


def mergekit_config(method: str, base: Path, models: list[Path], dtype: str) -> str:
    """A recipe of mergekit, as JSON (which is YAML)."""
    parameters = {"weight": 1.0, **({"density": DENSITY} if method in ("ties", "dare") else {})}
    return json.dumps({
        "merge_method": MERGEKIT[method], "base_model": str(base), "dtype": dtype,
        "models": [{"model": str(m), "parameters": parameters} for m in models],
        "parameters": {"normalize": method in ("linear", "ties")},
    } | ({} if method != "linear" else {"base_model": None}))  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mergekit", default=os.environ.get("MERGEKIT") or shutil.which("mergekit-yaml"))
    parser.add_argument("--sizes", nargs="+", default=["63M:float32", "301M:bfloat16"])
    parser.add_argument("--methods", nargs="+", default=["linear", "task-arithmetic", "ties"])
    parser.add_argument("--threads", default="2", help="OMP_NUM_THREADS of both programs")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--mergekit-repeat", type=int, default=1)
    parser.add_argument("--results", type=Path, help="JSON lines to add to")
    parser.add_argument("--folder", type=Path, help="where the models are written (default: a temporary folder)")
    arguments = parser.parse_args()
    environment = {**os.environ, "OMP_NUM_THREADS": arguments.threads, "MKL_NUM_THREADS": arguments.threads}
    environment["PYTHONPATH"] = str(Path(__file__).resolve().parents[2])
    rows = []
    for size in arguments.sizes:
        name, dtype = size.split(":")
        with tempfile.TemporaryDirectory(dir=arguments.folder) as temporary:
            folder = Path(temporary)
            base, *models = write(folder, name, getattr(torch, dtype), 3)
            for method in arguments.methods:
                runs: dict[str, list[tuple[float, int, int]]] = {}
                for _ in range(arguments.repeat):
                    out = folder / "ours.safetensors"
                    command = [sys.executable, "-c", OURS, method, str(DENSITY), str(out), str(base), *map(str, models)]
                    runs.setdefault("weightspace", []).append(measured(command, environment))
                    out.unlink()
                for _ in range(arguments.mergekit_repeat if arguments.mergekit else 0):
                    recipe, out = folder / "recipe.yml", folder / "mergekit"
                    recipe.write_text(mergekit_config(method, base, models, dtype))
                    command = [arguments.mergekit, str(recipe), str(out), "--no-copy-tokenizer", "--quiet"]
                    runs.setdefault("mergekit", []).append(measured(command, environment))
                    shutil.rmtree(out)
                for program, found in runs.items():
                    seconds, peak, private = (min(column) for column in zip(*found, strict=True))
                    rows.append({
                        "models": f"{name} × 3, {dtype}", "method": method, "program": program,
                        "seconds": round(seconds, 2), "peak GB": round(peak / 1e9, 2),
                        "private GB": round(private / 1e9, 2), "runs": len(found),
                    })  # fmt: skip
                    print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
                    if arguments.results:
                        with arguments.results.open("a") as stream:
                            stream.write(json.dumps(rows[-1]) + "\n")
    print(" | ".join(rows[0]))
    print(" | ".join("---" for _ in rows[0]))
    for row in rows:
        print(" | ".join(map(str, row.values())))


if __name__ == "__main__":
    main()
