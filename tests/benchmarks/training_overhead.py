"""What the training loop costs beside the metanet: ``python -m tests.benchmarks.training_overhead``.

Milliseconds a step through ``fit``, against a loop written out by hand; and files read per second.
The metanet is as small as can be, so that nearly all of a step is the loop. Both see the same batches; the hand-
written loop neither validates, nor saves, nor reports.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path

import torch

from tests.metanets.standin import KIND, population
from weightspace.metanets import base
from weightspace.metanets.data import Sample, load_samples
from weightspace.metanets.training import TrainingPlan, fit


def by_hand(plan: TrainingPlan, samples: list[Sample]) -> float:
    """Seconds of the same training, written out."""
    metanet, task = base.build_metanet({**plan.metanet, "outputs": 1}), plan.make_task(samples)
    targets = task.targets(samples)
    optimiser = torch.optim.AdamW(metanet.parameters(), lr=plan.learning_rate, fused=True)
    started = time.perf_counter()
    items = [metanet.prepare(sample.graph) for sample in samples]
    for _ in range(plan.epochs):
        for rows in torch.randperm(len(samples)).tensor_split(-(-len(samples) // plan.batch)):
            loss = task.loss(metanet(metanet.collate([items[i] for i in rows.tolist()])), targets[rows])
            optimiser.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(metanet.parameters(), plan.clip)
            optimiser.step()
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    base.KINDS["blocks"] = KIND  # type: ignore[index]
    with tempfile.TemporaryDirectory() as folder:
        started = time.perf_counter()
        samples = load_samples(population(Path(folder), runs=400, checkpoints=2))
        first = time.perf_counter() - started
        started = time.perf_counter()
        load_samples(folder)
        again = time.perf_counter() - started
        plan = TrainingPlan(metanet={"kind": "blocks"}, batch=16, epochs=20, device="cpu")
        fit(TrainingPlan(metanet={"kind": "blocks"}, epochs=1, device="cpu"), samples[:600], samples[600:])
        steps = plan.epochs * -(-600 // plan.batch)
        started = time.perf_counter()
        fit(plan, samples[:600], samples[600:])
        ours = 1000 * (time.perf_counter() - started) / steps
        bare = 1000 * by_hand(plan, samples[:600]) / steps
    row = {
        "files_per_s": len(samples) / again, "first_load_s": first, "step_ms": ours, "by_hand_ms": bare,
        "overhead_ms": ours - bare,
    }  # fmt: skip
    if arguments.json:
        print(json.dumps(row))
        return
    for name, value in row.items():
        print(f"{name:>14}  {value:,.2f}")


if __name__ == "__main__":
    main()
