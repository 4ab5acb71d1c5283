"""Merges by mergekit and by weightspace from one recipe and the same files, compared element by element.

    python tests/benchmarks/mergekit_agreement.py --mergekit /venv/bin/mergekit-yaml [--types float32 bfloat16]

Both read the same YAML. ``--types``: ``float32``; ``bfloat16``, files and arithmetic (``dtype: bfloat16``, which most
recipes say); ``bfloat16:float32``, such files and arithmetic in float32. Elements count as different beyond rounding
when they are more than one unit in the last place of what is added up there (result and base) and more than 10⁻⁴ of
the tensor's largest change apart. ``explained``: of these, where signs are elected and the sum that elects them cancels
to 10⁻⁵ of its parts (10⁻² in bfloat16), so that it rounds to either side; where DELLA or Breadcrumbs rank equal
magnitudes. Random masks are those of one seed.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent))
from merging_models import write

import weightspace as ws
from weightspace.merge.mergekit import parse
from weightspace.merge.method import per_model
from weightspace.merge.settings import depth_of

SEED = 7
HALF = {"weight": [0.4, 0.9], "density": [{"filter": "mlp", "value": [0.2, 0.5]}, {"value": 0.3}]}
RECIPES: dict[str, dict[str, Any]] = {
    "linear": {"merge_method": "linear", "each": {"weight": 0.7}},
    "linear, gradients": {"merge_method": "linear", "each": {"weight": [0.1, 0.9, 0.3]}},
    "slerp": {"merge_method": "slerp", "parameters": {"t": 0.3}, "count": 1},
    "slerp, filters": {
        "merge_method": "slerp", "count": 1,
        "parameters": {"t": [{"filter": "self_attn", "value": [0, 0.5, 1]}, {"value": 0.5}]},
    },
    "task arithmetic": {"merge_method": "task_arithmetic", "each": {"weight": 0.6}, "parameters": {"lambda": 0.8}},
    "ties": {"merge_method": "ties", "each": {"weight": 1.0, "density": 0.2}},
    "ties, filters": {"merge_method": "ties", "each": HALF, "parameters": {"normalize": False, "lambda": 0.7}},
    "dare_linear": {"merge_method": "dare_linear", "each": {"weight": 0.5, "density": 0.4}},
    "dare_ties": {"merge_method": "dare_ties", "each": {"weight": 0.5, "density": 0.4}},
    "dare_ties, no rescaling": {
        "merge_method": "dare_ties", "each": {"weight": 0.5, "density": 0.4}, "parameters": {"rescale": False},
    },
    "breadcrumbs": {"merge_method": "breadcrumbs", "each": {"weight": 0.5, "density": 0.5, "gamma": 0.05}},
    "breadcrumbs_ties": {"merge_method": "breadcrumbs_ties", "each": {"weight": 0.5, "density": 0.5}},
    "della": {"merge_method": "della", "each": {"weight": 0.5, "density": 0.5, "epsilon": 0.2}},
    "della_linear": {"merge_method": "della_linear", "each": {"weight": 0.5, "density": 0.5, "epsilon": 0.2}},
    "model_stock": {"merge_method": "model_stock"},
}  # fmt: skip


def recipe(entry: dict[str, Any], base: Path, models: list[Path], dtype: str, arithmetic: str) -> str:
    """The YAML of an entry (JSON is YAML)."""
    chosen = models[: entry.get("count", len(models))]
    listed = [{"model": str(m), **({"parameters": entry["each"]} if "each" in entry else {})} for m in chosen]
    table: dict[str, Any] = {"merge_method": entry["merge_method"], "models": listed, "dtype": arithmetic}
    if dtype != arithmetic:
        table["out_dtype"] = dtype
    if entry["merge_method"] != "linear":
        table["base_model"] = str(base)
    if entry["merge_method"] == "slerp":
        table["models"] = [{"model": str(base)}, *listed]
    if "parameters" in entry:
        table["parameters"] = entry["parameters"]
    return json.dumps(table)


def compare(ours: Any, theirs: Any, base: Any, models: list[Any], settings: Any, arithmetic: str) -> dict[str, float]:
    """Differences of two results over all tensors."""
    apart = 0.0
    unequal = explained = total = 0
    assert set(ours) == set(theirs)
    for name in theirs:
        a, b = ours[name].double(), theirs[name].double()
        assert a.shape == b.shape
        assert ours[name].dtype == theirs[name].dtype
        difference = (a - b).abs()
        change = float((b - base[name].double()).abs().max())
        unit = torch.finfo(theirs[name].dtype).eps * torch.stack([a, b, base[name].double()]).abs().amax(0)
        beyond = difference > torch.clamp(unit, min=1e-4 * change)
        apart = max(apart, float(difference.max()) / max(change, 1e-30))
        unequal += int(beyond.sum())
        total += a.numel()
        if beyond.any():
            explained += int((beyond & ambiguous(name, base, models, settings(name)[0], arithmetic)).sum())
    return {"apart": apart, "elements": unequal, "explained": explained, "of": total}


def ambiguous(name: str, base: Any, models: list[Any], method: Any, arithmetic: str) -> torch.Tensor:
    """Elements of a magnitude that others have as well where ranks count, or whose elected sum may cancel."""
    deltas = [(model[name].float() - base[name].float()).to(getattr(torch, arithmetic)).float() for model in models]
    out = torch.zeros(deltas[0].shape, dtype=torch.bool)
    for i, delta in enumerate(deltas):
        size = delta.abs()
        if method.name == "breadcrumbs":
            density, gamma = (per_model(value, len(deltas), "")[i] for value in (method.density, method.gamma))
            kept, ordered = int(density * size.numel()), size.flatten().sort(descending=True).values
            top = min(int(gamma * size.numel()), size.numel() - kept)
            for place in (top, top + kept):
                if 0 < place < len(ordered):
                    out |= (size == ordered[place]) | (size == ordered[place - 1])
        elif method.name == "della":
            _, places, counts = size.flatten().unique(return_inverse=True, return_counts=True)
            out |= (counts[places] > 1).reshape(out.shape)
    if getattr(method, "electing", method.name == "ties"):
        # Which of the models take part is not known here: any selection of them may cancel.
        for chosen in range(1, 1 << len(deltas)):
            some = [d for i, d in enumerate(deltas) if chosen >> i & 1]
            total, size = sum(some[1:], some[0]), sum((d.abs() for d in some[1:]), some[0].abs())
            if len(some) > 1:
                out |= total.abs() <= (1e-5 if arithmetic == "float32" else 1e-2) * size
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mergekit", default=os.environ.get("MERGEKIT") or shutil.which("mergekit-yaml"))
    parser.add_argument("--types", nargs="+", default=["float32", "bfloat16", "bfloat16:float32"])
    parser.add_argument("--only", nargs="*", help="rows whose name has one of these")
    parser.add_argument("--results", type=Path, help="JSON lines to add to")
    arguments = parser.parse_args()
    if not arguments.mergekit:
        raise SystemExit("mergekit-yaml was not found: install mergekit, or name it with --mergekit")
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    print("recipe | type | largest difference / largest change | beyond rounding | explained | of | equal bits")
    print("--- | --- | --- | --- | --- | --- | ---")
    for type_ in arguments.types:
        dtype, _, arithmetic = type_.partition(":")
        arithmetic = arithmetic or dtype
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary)
            base, *models = write(folder, "2M", getattr(torch, dtype), 3)
            for name, entry in RECIPES.items():
                if arguments.only and not any(word in name for word in arguments.only):
                    continue
                text = recipe(entry, base, models, dtype, arithmetic)
                (folder / "recipe.yml").write_text(text)
                out = folder / "theirs"
                command = [arguments.mergekit, str(folder / "recipe.yml"), str(out), "--random-seed", str(SEED),
                           "--no-copy-tokenizer", "--quiet"]  # fmt: skip
                done = subprocess.run(command, env=environment, capture_output=True, text=True)
                if done.returncode:
                    raise SystemExit(f"mergekit failed on {name}:\n{done.stderr[-2000:]}")
                read = parse(text, seed=SEED)
                ours = read.run(folder / "ours.safetensors").open()
                settings = read.settings(depth_of(list(ours), ws.open(base).config), arithmetic)
                theirs = ws.open(out / "model.safetensors")
                found = compare(ours, theirs, ws.open(base), [ws.open(m) for m in models], settings, arithmetic)
                same = sum(torch.equal(ours[n], theirs[n]) for n in theirs)
                row = {"recipe": name, "type": type_, **found, "equal": f"{same} of {len(theirs)} tensors"}
                counts = " | ".join(f"{found[key]:,}" for key in ("elements", "explained", "of"))
                print(f"{name} | {type_} | {found['apart']:.1e} | {counts} | {row['equal']}", flush=True)
                if arguments.results:
                    with arguments.results.open("a") as stream:
                        stream.write(json.dumps(row) + "\n")
                shutil.rmtree(out)


if __name__ == "__main__":
    main()
