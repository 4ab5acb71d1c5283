"""Held-out figures: the right ones for each task, chance where chance is, baselines that learn what they can."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.metanets.standin import Blocks, population
from weightspace.metanets.augment import Augmentation
from weightspace.metanets.data import Sample, load_samples, split
from weightspace.metanets.evaluation import Row, evaluate
from weightspace.metanets.tasks import Task
from weightspace.metanets.training import Trained, TrainingPlan


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[Sample], ...]:
    folder: Path = population(tmp_path_factory.mktemp("population"), runs=60, shapes=((6, 8, 3),))
    return split(load_samples(folder), (0.6, 0.4))


def _untrained(plan: TrainingPlan, train: list[Sample]) -> Trained:
    task: Task = plan.make_task(train)
    torch.manual_seed(0)
    return Trained(Blocks(task.outputs).eval(), task, plan, ())


def _rows(plan: TrainingPlan, parts: tuple[list[Sample], ...]) -> dict[str, Row]:
    return {row.name: row for row in evaluate(_untrained(plan, parts[0]), *parts, draws=50)}


def test_regression(parts: tuple[list[Sample], ...]) -> None:
    rows = _rows(TrainingPlan(), parts)
    assert list(rows) == ["blocks", "stat-nn", "ridge", "boosting", "chance"]
    assert rows["chance"].figures["Kendall τ"].value == 0
    assert rows["chance"].figures["R²"].value < 0.05
    # How large the weights are is what flat statistics know.
    assert rows["ridge"].figures["Kendall τ"].low > 0.5
    assert rows["ridge"].figures["MAE"].value < rows["chance"].figures["MAE"].value
    for row in rows.values():
        for interval in row.figures.values():
            assert interval.low <= interval.value <= interval.high or row.name == "chance"


def test_classification(parts: tuple[list[Sample], ...]) -> None:
    rows = _rows(TrainingPlan(task="classification", target="hyper.size"), parts)
    truth = [sample.record["hyper"]["size"] for sample in parts[1]]
    assert rows["chance"].figures["accuracy"].value in (
        pytest.approx(truth.count("small") / len(truth)), pytest.approx(truth.count("large") / len(truth))
    )  # fmt: skip
    assert rows["boosting"].figures["accuracy"].value > 0.75
    assert set(rows["blocks"].figures) == {"accuracy", "calibration error"}


def test_ranking_and_several_architectures(tmp_path: Path) -> None:
    train, test = split(load_samples(population(tmp_path, runs=20)), (0.6, 0.4))
    rows = _rows(TrainingPlan(task="ranking"), (train, test))
    # Statistics tensor by tensor compare networks of one architecture alone.
    assert list(rows) == ["blocks", "ridge", "boosting", "chance"]
    assert set(rows["ridge"].figures) == {"Kendall τ"}


def test_retrieval_of_second_views(parts: tuple[list[Sample], ...]) -> None:
    plan = TrainingPlan(task="contrastive", target="", embedding=16, augmentation=Augmentation(permute=1.0))
    rows = _rows(plan, parts)
    assert list(rows) == ["blocks", "descriptor", "chance"]
    # A permutation alone changes nothing of what either of them reads.
    assert rows["descriptor"].figures["recall@1"].value == 1.0
    assert rows["blocks"].figures["recall@10"].value == 1.0
    assert rows["chance"].figures["recall@1"].value == pytest.approx(1 / len(parts[1]))
    noisy = _rows(replace(plan, augmentation=Augmentation(noise=50.0)), parts)
    assert noisy["descriptor"].figures["recall@1"].value < 0.9
