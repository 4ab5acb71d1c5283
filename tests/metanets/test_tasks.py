"""Tasks: targets from records, losses against formulas, sentences for targets that make no sense."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.metanets.standin import population
from weightspace.errors import MetanetError
from weightspace.metanets.data import Loaded, Sample, load_samples
from weightspace.metanets.tasks import Task, make_task, named, nt_xent, pairwise_logistic


@pytest.fixture(scope="module")
def samples(tmp_path_factory: pytest.TempPathFactory) -> Loaded:
    return load_samples(population(tmp_path_factory.mktemp("population"), runs=12))


def _with(samples: Loaded, **record: Any) -> list[Sample]:
    return [Sample(s.name, s.graph, {**s.record, **record}, s.group) for s in samples]


def test_a_bounded_regression_starts_at_the_mean_and_ends_at_the_truth(samples: Loaded) -> None:
    task = make_task("regression", "test_accuracy", samples)
    truth = task.targets(samples)
    assert task.bounded
    start = task.read(torch.zeros(len(samples), 1))
    assert float(start.mean()) == pytest.approx(float(truth.mean()), abs=1e-6)
    perfect = ((torch.logit(truth) - task.shift) / task.scale)[:, None]
    assert torch.allclose(task.read(perfect), truth, atol=1e-5)
    assert float(task.loss(perfect, truth)) == pytest.approx(0.0, abs=1e-6)
    assert float(task.loss(perfect + 0.5, truth)) > 1e-3
    assert task.measures(perfect, truth)["tau"] == pytest.approx(1.0)
    squared = make_task("regression", "test_accuracy", samples, loss_of="mse")
    expected = (torch.sigmoid(torch.tensor(squared.shift)) - truth).square().mean()
    assert float(squared.loss(torch.zeros(len(samples), 1), truth)) == pytest.approx(float(expected), rel=1e-5)


def test_other_regressions_are_in_units_of_their_spread(samples: Loaded) -> None:
    task = make_task("regression", "test_loss", samples)
    truth = task.targets(samples)
    assert not task.bounded
    assert float(task.loss(torch.zeros(len(samples), 1), truth)) == pytest.approx(1.0, abs=0.1)
    gap = make_task("regression", "train_accuracy - test_accuracy", samples)
    assert not gap.bounded
    expected = torch.tensor([s.record["train_accuracy"] - s.record["test_accuracy"] for s in samples])
    assert torch.allclose(gap.targets(samples), expected)


def test_classes_are_those_of_the_training_set(samples: Loaded) -> None:
    task = make_task("classification", "hyper.size", samples)
    assert task.classes == ("large", "small")
    truth = task.targets(samples)
    outputs = torch.nn.functional.one_hot(truth, 2) * 20.0
    assert float(task.loss(outputs, truth)) == pytest.approx(0.0, abs=1e-6)
    assert task.measures(outputs, truth) == {"accuracy": 1.0}
    assert torch.allclose(task.read(outputs).sum(1), torch.ones(len(samples)))
    with pytest.raises(MetanetError, match=r"hyper\.size = 'huge', which no network of the training set has"):
        task.targets(_with(samples, hyper={"size": "huge"}))
    numbers = make_task("classification", "label", samples)
    assert numbers.classes == (0, 1, 2)
    assert Task.from_dict(numbers.to_dict()) == numbers


def test_mixed_targets_weigh_both(samples: Loaded) -> None:
    task = make_task("classification", "label", samples)
    outputs = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
    own, other, share = torch.tensor([0, 1, 2, 0]), torch.tensor([1, 1, 0, 2]), torch.full((4,), 0.75)
    expected = 0.75 * task.loss(outputs, own) + 0.25 * task.loss(outputs, other)
    assert torch.allclose(task.loss(outputs, own, other, share), expected)
    regression = Task("regression", "x", shift=0.0, scale=1.0)
    found = regression.loss(torch.zeros(1, 1), torch.tensor([1.0]), torch.tensor([3.0]), torch.tensor([0.5]))
    assert float(found) == pytest.approx(4.0)


def test_pairwise_logistic_loss() -> None:
    scores, targets = torch.tensor([0.0, 1.0, 3.0]), torch.tensor([0.1, 0.1, 0.9])
    # Pairs (2 above 0) and (2 above 1); equal targets make none.
    expected = (math.log1p(math.exp(-3)) + math.log1p(math.exp(-2))) / 2
    assert float(pairwise_logistic(scores, targets)) == pytest.approx(expected, rel=1e-5)
    assert float(pairwise_logistic(scores, torch.zeros(3))) == 0.0


def test_nt_xent_is_the_formula() -> None:
    outputs = torch.randn(6, 4, generator=torch.Generator().manual_seed(1))
    unit = torch.nn.functional.normalize(outputs, dim=1)
    alike = unit @ unit.T / 0.5
    expected = 0.0
    for i in range(6):
        rest = [float(alike[i, j].exp()) for j in range(6) if j != i]
        expected -= math.log(float(alike[i, (i + 3) % 6].exp()) / sum(rest)) / 6
    assert float(nt_xent(outputs, torch.arange(3), 0.5)) == pytest.approx(expected, rel=1e-5)
    # Networks that are positives of each other should lie together, others apart.
    near, apart = torch.eye(3)[torch.tensor([0, 0, 1, 0, 0, 1])], torch.eye(3).repeat(2, 1)
    together = torch.tensor([0, 0, 1])
    assert nt_xent(near, together, 0.1) < nt_xent(apart, together, 0.1)
    assert nt_xent(near, torch.arange(3), 0.1) > nt_xent(apart, torch.arange(3), 0.1)


def test_positives_by_a_field(samples: Loaded) -> None:
    own = make_task("contrastive", "", samples)
    assert len(own.targets(samples).unique()) == len(samples)
    runs = make_task("contrastive", "run", samples)
    assert len(runs.targets(samples).unique()) == 12
    # Networks without the field are positives of nobody else.
    assert len(make_task("contrastive", "parent", samples).targets(samples).unique()) == len(samples)


def test_names_of_tasks(samples: Loaded) -> None:
    assert named("accuracy", samples) == ("regression", "test_accuracy")
    assert named("embedding", samples) == ("contrastive", "")
    assert named("label", samples) == ("classification", "label")
    assert named("hyper.activation", samples) == ("classification", "hyper.activation")
    assert named("test_loss", samples) == ("regression", "test_loss")
    with pytest.raises(MetanetError, match=r"no task 'colour'.*no record has such a field.*test_accuracy"):
        named("colour", samples)


def test_targets_that_make_no_sense(samples: Loaded) -> None:
    with pytest.raises(MetanetError, match=r"is 0\.9 for every network"):
        make_task("regression", "train_accuracy", samples)
    with pytest.raises(MetanetError, match="have no 'top5' in their record"):
        make_task("regression", "top5", samples)
    with pytest.raises(MetanetError, match=r"run = 'run-0'.*finite numbers"):
        make_task("regression", "run", samples)
    with pytest.raises(MetanetError, match="bounded target lies in"):
        make_task("regression", "test_loss", samples, bounded=True)
    with pytest.raises(MetanetError, match="1 different values"):
        make_task("classification", "hyper.activation", samples)
    with pytest.raises(MetanetError, match="no task of the kind 'segmentation'"):
        make_task("segmentation", "x", samples)  # type: ignore[arg-type]
    with pytest.raises(MetanetError, match="training set is empty"):
        make_task("ranking", "test_accuracy", [])


def test_a_task_is_known_again(samples: Loaded, tmp_path: Path) -> None:
    task = make_task("regression", "test_accuracy", samples)
    assert Task.from_dict(task.to_dict()) == task
