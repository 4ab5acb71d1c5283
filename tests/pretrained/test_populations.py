"""The range on networks nobody here has trained, and on fresh runs of a population that was learned from."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

import weightspace as ws
from weightspace.errors import WeightspaceError
from weightspace.metanets.data import load_samples
from weightspace.pretrained.evaluation import applicability, coverage, retrieval
from weightspace.pretrained.model import shipped
from weightspace.pretrained.networks import at_canonical_points, cleaned, disturbed
from weightspace.zoo.examine import models_in
from weightspace.zoo.populations import build_sampled
from weightspace.zoo.recipe import load

SHARED = Path(__file__).resolve().parents[2].parent / "shared"
FILES = SHARED / "checkpoints"
LARGEST = 40_000_000
"""Bytes of a file beyond which opening it takes more time than a test should."""


def _real_files() -> list[Path]:
    """The smallest files of every origin."""
    found = []
    for folder in sorted(path for path in FILES.iterdir() if path.is_dir()):
        weights = (p for p in folder.rglob("*") if p.suffix in {".pt", ".pth", ".th", ".safetensors", ".h5", ".onnx"})
        found += sorted((p for p in weights if p.stat().st_size < LARGEST), key=lambda p: p.stat().st_size)[:1]
    return found


@pytest.mark.slow
@pytest.mark.skipif(not FILES.is_dir(), reason="needs the real files beside the project")
def test_real_files_are_mostly_outside() -> None:
    outside, inside = [], []
    for path in _real_files():
        try:
            opened = next(iter(models_in(path, path.name)))[0]
            where = ws.embed(opened).applicability
        except WeightspaceError:
            continue
        (inside if where.inside else outside).append((path.name, where.reason))
    assert len(outside) + len(inside) >= 8
    assert all(reason for _, reason in outside)
    assert len(outside) >= 0.8 * (len(outside) + len(inside)), inside


@pytest.mark.slow
@pytest.mark.skipif(not (SHARED / "data").is_dir(), reason="needs the data sets beside the project")
def test_fresh_runs_are_inside_and_their_accuracy_is_in_the_interval(tmp_path: Path) -> None:
    recipe = load("families")
    base = next(p for p in recipe.sampled if p.name == "mnist-mlp")
    # Another name, so other seeds than any network that was learned from.
    fresh = replace(recipe, name="fresh", sampled=(replace(base, name="fresh-mlp", runs=8),))
    build_sampled(fresh, tmp_path, data=SHARED / "data", progress=False)
    samples = [cleaned(s, "fresh") for s in load_samples(tmp_path)]
    (row,) = applicability(shipped(), {"fresh": samples})
    assert row.inside >= 0.75  # of eight
    covered = next(iter(coverage(shipped(), {"fresh": samples}, draws=20)))
    assert covered.coverage.value >= 0.75
    assert covered.error < 0.1
    rows = {(r.question, r.measure): r for r in retrieval(shipped(), {"fresh": samples}, draws=20)}
    assert rows["permuted and rescaled copy", "encoder"].figures[1].value == 1.0
    assert rows["permuted and rescaled copy", "both"].figures[1].value == 1.0
    assert rows["permuted and rescaled copy", "chance"].figures[1].value == pytest.approx(1 / 8)
    assert rows["copy with 10% noise", "encoder"].figures[10].value == 1.0


def test_views_are_settled_and_disturbed_networks_are_not_the_same() -> None:
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.ReLU(), torch.nn.Linear(8, 3))
    graph = ws.graph(net, torch.randn(2, 6))
    from weightspace.metanets.augment import rescale
    from weightspace.metanets.data import Sample

    generator = torch.Generator().manual_seed(0)
    sample = Sample("net", graph, {}, "net")
    scaled = replace(sample, graph=rescale(graph, generator))
    one, two = (at_canonical_points([s])[0].graph for s in (sample, scaled))
    noisy = at_canonical_points([replace(sample, graph=disturbed(graph, 0.3, generator, exactly=True))])[0].graph
    for name in graph.shapes:
        assert torch.allclose(one.tensor(name), two.tensor(name), atol=1e-4)
    assert any(not torch.allclose(one.tensor(n), noisy.tensor(n), atol=1e-2) for n in graph.shapes)
