"""What reading networks costs: ``python tests/benchmarks/metanet_speed.py [--json] [--device cuda]``.

1. A batch of 64 small CNNs (4,970 weights each, the layout of the Small CNN Zoo) through our metanet and through
   the published ones at their papers' sizes, all on parameter graphs and all in this run: networks per second
   without gradients (prepared once, collated each time), seconds of a training step (forward, backward, AdamW),
   and the peak memory of a process that does nothing else.
2. How time and memory of our metanet grow with the size of one network, 5 thousand to 100 million parameters.
3. With ``--ragged`` (alone): 32 networks of 32 shapes, drawn as in ``zoo/wild-park.toml``, in stacks of one shape each,
   and in those that our metanet makes by padding.
4. With ``--answers`` (alone): what it costs to hear what networks answer (``weightspace.metanets.answers``), beside
   reading their weights, in ms a network: 32 small CNNs, of the wild park, and ViTs of ``zoo/mixed.toml``.
5. With ``--billion``: a network of 1 billion parameters in bfloat16, streamed from its file in chunks, against
   the time that reading the same file once per round takes.

Each row is measured in a process of its own. Random weights; nothing is downloaded.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import resource
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn

Row = dict[str, Any]

# Ours, and the published ones at the sizes of their papers (the defaults; GMN with an edge per weight).
METANETS: dict[str, dict[str, Any]] = {
    "operator (ours, d=64)": {"kind": "operator", "width": 64},
    "operator (ours, d=64, transfer)": {"kind": "operator", "width": 64, "transfer": True},
    "operator (ours, d=32)": {"kind": "operator", "width": 32},
    "gmn (Lim et al. 2023)": {"kind": "gmn", "edges": "scalar"},
    "neural-graphs (Kofinas et al. 2024)": {"kind": "neural-graphs"},
    "scalegmn (Kalogeropoulos et al. 2024)": {"kind": "scalegmn", "direction": "forward"},
    "scalegmn, both directions": {"kind": "scalegmn", "direction": "both"},
}
# Networks for table 4: a recipe, its population and the data's shape and classes; none for the small CNN.
ANSWERING: dict[str, tuple[str, str, tuple[int, ...]] | None] = {
    "small CNN": None,
    "wild-park CNN": ("wild-park-mnist", "wild-park-mnist", (1, 14, 14)),
    "vision transformer": ("mixed", "vit", (1, 16, 16)),
}
SIZES = ((64, 1), (256, 3), (1024, 3), (3072, 3), (5000, 4))


def main() -> None:
    """Measure and print the chosen tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print rows as JSON")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--repeats", type=int, default=5, help="runs of which the median counts")
    parser.add_argument("--only", nargs="*", help="metanets to measure, by a part of their name")
    parser.add_argument("--no-growth", action="store_true", help="leave out table 2")
    parser.add_argument("--billion", action="store_true", help="table 5: needs 2 GB of disk")
    parser.add_argument("--ragged", action="store_true", help="table 3 alone")
    parser.add_argument("--answers", action="store_true", help="table 4 alone")
    options = parser.parse_args()
    if options.ragged:
        for padded in (False, True):
            print_row(apart(ragged, padded, options.device, options.threads, options.repeats))
        return
    if options.answers:
        for what in ANSWERING:
            print_row(apart(answering, what, options.threads, options.repeats))
        return
    chosen = {n: c for n, c in METANETS.items() if matches(n, options.only)}
    rows = []
    for name, config in chosen.items():
        rows.append({"model": name, **apart(speed, config, options.device, options.threads, options.repeats)})
        if not options.json:
            print_row(rows[-1])
    growth = [] if options.no_growth else [apart(grow, size, options.device, options.threads) for size in SIZES]
    billion = []
    if options.billion:
        with tempfile.TemporaryDirectory(prefix="weightspace-bench-") as folder:
            billion = [apart(one_billion, folder, options.device, options.threads)]
    if options.json:
        print(json.dumps([*rows, *growth, *billion], indent=2))
        return
    for row in (*growth, *billion):
        print_row(row)
    if len(growth) > 1:
        print(f"slope of log seconds over log parameters, last two rows: {slope(growth[-2:]):.2f}")


def matches(name: str, only: list[str] | None) -> bool:
    return not only or any(part in name for part in only)


# -------------------------------------------------------------------- the measurements


def small_cnn() -> nn.Module:
    """Three convolutions 3 × 3 with 16 channels and stride 2, global pooling, ten classes: 4,970 parameters."""
    layers: list[nn.Module] = []
    for a, b in ((1, 16), (16, 16), (16, 16)):
        layers += [nn.Conv2d(a, b, 3, 2, 1), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10)).eval()


def speed(config: dict[str, Any], device: str, threads: int, repeats: int) -> Row:
    """Networks per second, seconds a training step, peak memory, for 64 small CNNs."""
    import weightspace as ws
    from weightspace.graph.build import of_tensors
    from weightspace.metanets import build_metanet

    torch.set_num_threads(threads)
    torch.manual_seed(0)
    wiring = ws.wiring(small_cnn(), torch.randn(2, 1, 32, 32))
    graphs = [of_tensors(small_cnn().state_dict(), wiring) for _ in range(64)]
    metanet = build_metanet({**config, "outputs": 1}).to(device)
    before = peak()
    started = time.perf_counter()
    items = [metanet.prepare(g) for g in graphs]
    prepared = time.perf_counter() - started
    reading, training = passes(metanet, items, device, repeats)
    memory = torch.cuda.max_memory_allocated() / 1e9 if device.startswith("cuda") else peak()
    parameters = sum(p.numel() for p in metanet.parameters())
    return {
        "parameters": parameters, "nets_per_s": 64 / reading, "step_s": training, "peak_gb": memory,
        "prepare_s": prepared, "peak_before_gb": before, "device": device_name(device), "threads": threads,
    }  # fmt: skip


def passes(metanet: Any, items: list[Any], device: str, repeats: int) -> tuple[float, float]:
    """Seconds of one batch without gradients, and of a training step."""

    def inference() -> None:
        with torch.no_grad():
            metanet(metanet.collate(items).to(device))

    optimiser = torch.optim.AdamW(metanet.parameters(), lr=1e-3)

    def step() -> None:
        optimiser.zero_grad()
        metanet(metanet.collate(items).to(device)).square().mean().backward()
        optimiser.step()

    metanet.eval()
    reading = timed(inference, device, repeats)
    metanet.train()
    return reading, timed(step, device, repeats)


def answering(what: str, threads: int, repeats: int) -> Row:
    """Milliseconds a network: asking it, preparing it for our metanet, and reading it among 32 (on the CPU)."""
    import weightspace as ws
    from weightspace.graph.build import of_tensors
    from weightspace.metanets import build_metanet
    from weightspace.metanets.answers import answers

    torch.set_num_threads(threads)
    torch.manual_seed(0)
    count = 32
    if ANSWERING[what] is None:
        wiring = ws.wiring(small_cnn(), torch.randn(2, 1, 32, 32))
        graphs = [of_tensors(small_cnn().state_dict(), wiring) for _ in range(count)]
    else:
        graphs = drawn(*ANSWERING[what], count)  # type: ignore[misc]
    metanet = build_metanet({"kind": "operator", "width": 64}).eval()
    items = [metanet.prepare(g) for g in graphs]

    def read() -> None:
        with torch.no_grad():
            metanet(metanet.collate(items))

    found = {
        "answers_ms": timed(lambda: [answers(g) for g in graphs], "cpu", repeats),
        "prepare_ms": timed(lambda: [metanet.prepare(g) for g in graphs], "cpu", repeats),
        "read_ms": timed(read, "cpu", repeats),
    }
    found = {name: 1000 * seconds / count for name, seconds in found.items()}
    weights = sum(g.num_parameters for g in graphs) // count
    ratio = found["answers_ms"] / (found["prepare_ms"] + found["read_ms"])
    return {"model": f"{what}, {weights:,} weights", **found, "answers_over_reading": ratio, "threads": threads}


def drawn(recipe: str, population: str, shape: tuple[int, ...], count: int) -> list[Any]:
    """Parameter graphs of the first untrained networks of a population, with proved wirings."""
    import weightspace as ws
    from weightspace.graph.build import of_tensors
    from weightspace.zoo.description import module_of
    from weightspace.zoo.recipe import load
    from weightspace.zoo.sampling import runs_of
    from weightspace.zoo.stacked import initial_state

    plan = load(recipe)
    found = []
    for run in runs_of(plan, next(p for p in plan.sampled if p.name == population), (shape, 10))[:count]:
        module, inputs = module_of(run.network)
        state = {name: value for name, value in initial_state(run).items() if value.is_floating_point()}
        found.append(of_tensors(state, ws.wiring(module.eval(), *inputs)))
    return found


def ragged(padded: bool, device: str, threads: int, repeats: int) -> Row:
    """The same for 32 untrained networks of the wild park; not ``padded``: a stack for every shape."""
    from weightspace.metanets import OperatorMetanet, batch

    torch.set_num_threads(threads)
    torch.manual_seed(0)
    if not padded:
        batch.STACK = -(1 << 40)
    metanet = OperatorMetanet(width=64).to(device)
    items = [metanet.prepare(g) for g in drawn("wild-park", "wild-park", (1, 16, 16), 32)]
    reading, training = passes(metanet, items, device, repeats)
    return {
        "model": f"operator, 32 shapes, {'padded' if padded else 'a stack for every shape'}",
        "nets_per_s": 32 / reading, "step_s": training, "peak_gb": peak(),
        "stacks": len(metanet.collate(items).buckets), "device": device_name(device), "threads": threads,
    }  # fmt: skip


def grow(size: tuple[int, int], device: str, threads: int) -> Row:
    """One MLP of ``depth`` square layers through our metanet, without gradients."""
    import weightspace as ws
    from weightspace.graph.build import of_tensors
    from weightspace.metanets import OperatorMetanet

    torch.set_num_threads(threads)
    width, depth = size
    layers: list[nn.Module] = []
    for _ in range(depth):
        layers += [nn.Linear(width, width), nn.ReLU()]
    module = nn.Sequential(*layers[:-1]).eval()
    graph = of_tensors(module.state_dict(), ws.wiring(module, torch.randn(2, width)))
    metanet = OperatorMetanet(width=64).eval().to(device)
    before = peak()

    def read() -> None:
        with torch.no_grad():
            metanet(metanet.collate([metanet.prepare(graph)]).to(device))

    seconds = timed(read, device, 3)
    count = graph.num_parameters
    return {
        "model": f"operator, one network of {count:,}", "nets_per_s": 1 / seconds, "step_s": None, "peak_gb": peak(),
        "weights": count, "seconds": seconds, "ns_per_weight": seconds / count * 1e9, "peak_before_gb": before,
        "weights_gb": count * 4 / 1e9, "device": device_name(device),
    }  # fmt: skip


def one_billion(folder: str, device: str, threads: int) -> Row:
    """A network of a billion parameters, read from its safetensors file a chunk at a time in every round."""
    from safetensors.torch import save_file

    import weightspace as ws
    from weightspace.graph.build import of_tensors
    from weightspace.metanets import OperatorMetanet

    torch.set_num_threads(threads)
    width, depth = 8192, 15
    path = Path(folder) / "billion.safetensors"
    state = {}
    for k in range(depth):
        state[f"{2 * k}.weight"] = torch.randn(width, width, dtype=torch.bfloat16) / width**0.5
        state[f"{2 * k}.bias"] = torch.zeros(width, dtype=torch.bfloat16)
    save_file(state, path)
    del state
    with torch.device("meta"):
        layers: list[nn.Module] = []
        for _ in range(depth):
            layers += [nn.Linear(width, width), nn.ReLU()]
        module = nn.Sequential(*layers[:-1])
    wiring = ws.wiring(module, torch.randn(2, width, device="meta"), prove=False)
    metanet = OperatorMetanet(width=64).eval().to(device)
    checkpoint = ws.open(path)
    graph = of_tensors(checkpoint, wiring)
    started = time.perf_counter()
    with torch.no_grad():
        embedding = metanet.embed(metanet.collate([metanet.prepare(graph, lazy=True)]).to(device))
    if device.startswith("cuda"):
        torch.cuda.synchronize()
    seconds = time.perf_counter() - started
    started = time.perf_counter()
    total = 0.0
    for name in checkpoint:
        total += float(checkpoint[name].to(device).sum(dtype=torch.float32))
    reading = time.perf_counter() - started
    assert bool(torch.isfinite(embedding).all())
    # Twice for the statistics of the blocks, then once in every step of the probes and every round.
    reads = 2 + (metanet.probes.steps if metanet.probes is not None else 0) + len(metanet.rounds)
    return {
        "model": f"operator, streamed, {graph.num_parameters:,}", "nets_per_s": 1 / seconds, "step_s": None,
        "peak_gb": peak(), "weights": graph.num_parameters, "seconds": seconds, "one_plain_read_s": reading,
        "share_of_plain_reads": reads * reading / seconds, "device": device_name(device),
    }  # fmt: skip


# -------------------------------------------------------------------- measuring


def timed(run: Any, device: str, repeats: int) -> float:
    """Median seconds of several runs after two that do not count."""
    found = []
    for k in range(repeats + 2):
        if device.startswith("cuda"):
            torch.cuda.synchronize()
        started = time.perf_counter()
        run()
        if device.startswith("cuda"):
            torch.cuda.synchronize()
        if k >= 2:
            found.append(time.perf_counter() - started)
    return statistics.median(found)


def peak() -> float:
    """Most memory that this process has had, in GB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6


def device_name(device: str) -> str:
    return torch.cuda.get_device_name() if device.startswith("cuda") else "cpu"


def apart(run: Any, *arguments: Any) -> Row:
    """The result of a measurement in a fresh process."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        found: Row = pool.apply(run, arguments)
    return found


def slope(rows: list[Row]) -> float:
    import math

    a, b = rows
    return math.log(b["seconds"] / a["seconds"]) / math.log(b["weights"] / a["weights"])


def print_row(row: Row) -> None:
    def shown(value: Any) -> str:
        return f"{value:,.4g}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else str(value)

    print(" | ".join(v if k == "model" else f"{k} {shown(v)}" for k, v in row.items()), flush=True)


if __name__ == "__main__":
    main()
