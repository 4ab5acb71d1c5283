"""What a parameter graph costs: ``python -m tests.benchmarks.graph``.

Three tables, each row measured in a process of its own:

1. edges materialised one by one (``to_pyg``), seconds and bytes per parameter;
2. GPT-2 small (124 M) from a Hugging Face folder as a block graph, and then materialised;
3. a 1-billion-parameter bfloat16 Llama in safetensors shards as a block graph with the statistics of every
   block, against the speed at which plain reads into a reused buffer get through the same files.

Weights are random: nothing is downloaded. Peak memory is the process's own high-water mark (``VmHWM``: pages of
mapped files count), beside what it is before any weight is touched and the anonymous part at the end.

Published for comparison: the graphs of GMN (Lim et al. 2023) take 0.05-0.26 µs and 40 bytes per parameter;
NiNo (Knyazev et al. 2024) needs 20 s and 13.8 GB for GPT-2 small.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

Row = dict[str, Any]


def main() -> None:
    """Run the chosen tables and print them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tables", nargs="*", default=["edges", "gpt2", "llama"], help="edges, gpt2, llama")
    parser.add_argument("--repeats", type=int, default=5, help="runs of which the best counts")
    parser.add_argument("--folder", type=Path, help="where the networks are written (default: a temporary folder)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="weightspace-bench-", dir=options.folder) as name:
        folder = Path(name)
        if "edges" in options.tables:
            rows = [apart(edges, case, options.repeats) for case in ("cnn-flatten", "vgg11", "resnet18-full")]
            show("edges materialised (aim: ≤ 0.1 µs and ≤ 40 bytes per parameter)", rows)
        if "gpt2" in options.tables:
            apart(write_gpt2, folder / "gpt2")
            rows = [apart(gpt2, folder / "gpt2", what) for what in ("block graph", "and to_pyg")]
            show("GPT-2 small as a graph (aim: ≤ 5 s, ≤ 2 GB)", rows)
        if "llama" in options.tables:
            apart(write_llama, folder / "llama")
            show(
                "Llama, 1 billion parameters, bfloat16 (aim: ≤ 1 GB, at least half the speed of plain reads)",
                [apart(llama, folder / "llama", options.repeats)],
            )


# -------------------------------------------------------------------- the measurements


def edges(case: str, repeats: int) -> Row:
    """All edges and node features of a network as arrays; then the same from its tensors to a PyG object."""
    import weightspace as ws
    from tests.architectures import CASES
    from weightspace.graph.edges import materialise

    module, args, kwargs = CASES[case].build()
    graph = ws.graph(module, ws.wiring(module, *args, prove=False, **kwargs))
    before = memory()["VmHWM"]
    seconds, _ = best(repeats, lambda: materialise(graph))
    exported, data = best(repeats, lambda: ws.graph(graph.tensors, graph.wiring).to_pyg())
    stored = sum(v.nbytes for v in data.to_dict().values() if isinstance(v, torch.Tensor))
    of_edges = sum(data[k].nbytes for k in ("edge_index", "edge_attr", "edge_block", "edge_position"))
    return {
        "network": case,
        "parameters": f"{graph.num_parameters:,}",
        "edges s": f"{seconds:.4f}",
        "µs/parameter": f"{seconds / graph.num_parameters * 1e6:.3f}",
        "graph and to_pyg s": f"{exported:.4f}",
        "bytes/edge": f"{of_edges / graph.num_edges:.1f}",
        "bytes/parameter": f"{stored / graph.num_parameters:.1f}",
        "peak MB (before)": f"{memory()['VmHWM']:.0f} ({before:.0f})",
    }


def gpt2(folder: Path, what: str) -> Row:
    """From the folder to the graph: opened, wired, proved (on a small twin), laid out."""
    import transformers  # noqa: F401  (its import is not the graph's)

    import weightspace as ws

    before = memory()["VmHWM"]
    start = time.perf_counter()
    graph = ws.graph(folder)
    built = time.perf_counter() - start
    start, edges = time.perf_counter(), ""
    if what == "and to_pyg":
        data = graph.to_pyg()
        edges = f"{data.num_edges:,} in {time.perf_counter() - start:.2f} s"
    return {
        "network": f"GPT-2 small, {what}",
        "parameters": f"{graph.num_parameters:,}",
        "wiring": graph.status,
        "graph s": f"{built:.2f}",
        "edges": edges,
        "peak MB (before)": f"{memory()['VmHWM']:.0f} ({before:.0f})",
    }


def llama(folder: Path, repeats: int) -> Row:
    """A block graph and the statistics of every block, beside plain reads of the same files."""
    import transformers  # noqa: F401

    import weightspace as ws

    before = memory()["VmHWM"]
    start = time.perf_counter()
    graph = ws.graph(folder)
    built = time.perf_counter() - start
    size = sum(p.stat().st_size for p in folder.glob("*.safetensors"))
    reading: list[float] = []
    streaming: list[float] = []
    reading_cpu: list[float] = []
    streaming_cpu: list[float] = []
    for _ in range(repeats):
        for function, wall, cpu in (
            (lambda: read_plainly(folder), reading, reading_cpu),
            (graph.statistics, streaming, streaming_cpu),
        ):
            used, start = time.process_time(), time.perf_counter()
            function()
            wall.append(time.perf_counter() - start)
            cpu.append(time.process_time() - used)
    after = memory()
    return {
        "parameters": f"{graph.num_parameters:,}",
        "wiring": graph.status,
        "graph s": f"{built:.2f}",
        "statistics s": f"{min(streaming):.2f}",
        "GB/s": f"{size / min(streaming) / 1e9:.2f}",
        "plain reads GB/s": f"{size / min(reading) / 1e9:.2f}",
        "ratio": f"{min(reading) / min(streaming):.2f}",
        "CPU s (plain)": f"{min(streaming_cpu):.2f} ({min(reading_cpu):.2f})",
        "load": f"{os.getloadavg()[0]:.1f} on {os.cpu_count()} cores",
        "peak MB (before)": f"{after['VmHWM']:.0f} ({before:.0f})",
        "anonymous MB": f"{after['RssAnon']:.0f}",
    }


def read_plainly(folder: Path) -> None:
    """Every byte of the files into one reused buffer of 8 MiB."""
    buffer = memoryview(bytearray(8 << 20))
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass


# -------------------------------------------------------------------- networks


def write_gpt2(folder: Path) -> None:
    """GPT-2 small with random weights, as a Hugging Face folder."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    GPT2LMHeadModel(GPT2Config()).save_pretrained(folder)


def write_llama(folder: Path) -> None:
    """A Llama of 1.06 billion parameters in bfloat16, in shards of half a gigabyte."""
    from safetensors.torch import save_file
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=2048, num_hidden_layers=18, intermediate_size=5632, num_attention_heads=32,
        num_key_value_heads=32, vocab_size=32000, architectures=["LlamaForCausalLM"],
    )  # fmt: skip
    with torch.device("meta"):
        shapes = {n: t.shape for n, t in LlamaForCausalLM(config).state_dict().items()}
    config.save_pretrained(folder)
    generator = torch.Generator().manual_seed(0)
    shard: dict[str, torch.Tensor] = {}
    where: dict[str, str] = {}
    for i, (name, shape) in enumerate(shapes.items()):
        shard[name] = torch.randn(shape, generator=generator).mul_(0.02).to(torch.bfloat16)
        if sum(t.nbytes for t in shard.values()) > 500e6 or i == len(shapes) - 1:
            file = f"model-{len(set(where.values())) + 1:05d}.safetensors"
            save_file(shard, folder / file, metadata={"format": "pt"})
            where.update(dict.fromkeys(shard, file))
            shard = {}
    index = {"metadata": {}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


# -------------------------------------------------------------------- measuring


def apart(function: Callable[..., Any], *args: Any) -> Any:
    """Run a function in a fresh process, so that its peak memory is its own."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(function, args)


def best(repeats: int, function: Callable[[], Any]) -> tuple[float, Any]:
    """The shortest time of several runs, and a result."""
    times: list[float] = []
    result = None
    for _ in range(repeats):
        # The last result must not be held beside the next one.
        result = None
        start = time.perf_counter()
        result = function()
        times.append(time.perf_counter() - start)
    return min(times), result


def memory() -> dict[str, float]:
    """Memory of this process in MB: ``VmHWM`` its peak, ``VmRSS`` and ``RssAnon`` now. Linux only."""
    lines = Path("/proc/self/status").read_text().splitlines()
    wanted = ("VmHWM", "VmRSS", "RssAnon")
    return {k: int(v.split()[0]) / 1024 for k, v in (x.split(":", 1) for x in lines) if k in wanted}


def show(title: str, rows: list[Row]) -> None:
    """A Markdown table."""
    print(f"\n{title}\n")
    print("| " + " | ".join(rows[0]) + " |")
    print("|" + " --- |" * len(rows[0]))
    for row in rows:
        print("| " + " | ".join(str(v) for v in row.values()) + " |", flush=True)


if __name__ == "__main__":
    main()
