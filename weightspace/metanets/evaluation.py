"""Held-out figures of a trained metanet, beside those of chance and of what needs no metanet."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from weightspace.metanets import metrics
from weightspace.metanets.data import Sample
from weightspace.metanets.metrics import Interval, Metric
from weightspace.metanets.tasks import Task

if TYPE_CHECKING:
    from weightspace.graph import ParameterGraph
    from weightspace.metanets.training import Trained


@dataclass(frozen=True)
class Row:
    """A predictor and its figures by name, each with a 95 % interval over the held-out runs."""

    name: str
    figures: dict[str, Interval]


def evaluate(trained: Trained, train: Sequence[Sample], test: Sequence[Sample], draws: int = 1000) -> list[Row]:
    """Rows for the metanet, for the flat baselines trained on the same networks, and for chance.

    Intervals are bootstrapped over the groups of ``test`` (training runs), which must not share any with ``train``.
    """
    kind = trained.metanet.config["kind"]
    if trained.task.kind == "contrastive":
        return _retrieval(trained, kind, test, draws)
    truth, groups = trained.task.targets(test), [sample.group for sample in test]

    def row(name: str, predicted: Tensor) -> Row:
        figures = {
            figure: metrics.bootstrap(metric, truth, predicted, groups, draws)
            for figure, metric in _metrics(trained.task).items()
        }
        return Row(name, figures)

    rows = [row(kind, trained.predict(test))]
    rows += [row(name, predicted) for name, predicted in _baselines(trained.task, train, test)]
    return [*rows, row("chance", _constant(trained.task, train, len(test)))]


def _metrics(task: Task) -> dict[str, Metric]:
    if task.kind == "classification":
        return {"accuracy": metrics.accuracy, "calibration error": metrics.calibration_error}
    tau: dict[str, Metric] = {"Kendall τ": metrics.kendall_tau}
    if task.kind == "ranking":
        return tau
    return {**tau, "R²": metrics.r_squared, "MAE": metrics.mean_absolute_error}


def _constant(task: Task, train: Sequence[Sample], count: int) -> Tensor:
    """What is best said of a network without looking at it: the mean, or the shares of the classes."""
    truth = task.targets(train)
    if task.kind == "classification":
        shares = torch.bincount(truth, minlength=task.outputs) / len(truth)
        return shares.expand(count, -1)
    return truth.mean().expand(count)


def _baselines(task: Task, train: Sequence[Sample], test: Sequence[Sample]) -> list[tuple[str, Tensor]]:
    from weightspace.metanets.flat import FlatBaseline, Kind

    kinds: list[Kind] = ["ridge", "boosting"]
    if len({tuple(sample.graph.shapes.items()) for sample in (*train, *test)}) == 1:
        kinds.insert(0, "stat-nn")
    truth = task.targets(train).numpy()
    found: list[tuple[str, Tensor]] = []
    for kind in kinds:
        if task.kind == "classification":
            model = FlatBaseline(kind, "classification", activation=True).fit(train, truth)
            # A class may be absent from the training set of a baseline's own numbering, never from the task's.
            shares = torch.zeros(len(test), task.outputs)
            shares[:, torch.from_numpy(model.classes)] = torch.from_numpy(model.probabilities(test)).float()
            found.append((kind, shares))
            continue
        predicted = torch.from_numpy(FlatBaseline(kind, activation=True).fit(train, truth).predict(test)).float()
        # Outside its bounds a linear model is wrong for certain, and easily put right.
        found.append((kind, predicted.clamp(0, 1) if task.bounded else predicted))
    return found


# -------------------------------------------------------------------- retrieval


def _retrieval(trained: Trained, kind: str, test: Sequence[Sample], draws: int) -> list[Row]:
    """Recall of each held-out network's second view among those of all, asked with its first view."""
    generator = torch.Generator().manual_seed(trained.plan.seed)
    first, second = ([trained.plan.augmentation(s.graph, generator) for s in test] for _ in range(2))
    groups = [sample.group for sample in test]
    count = len(test)

    def row(name: str, ranks: Tensor) -> Row:
        return Row(
            name,
            {
                f"recall@{k}": metrics.bootstrap(_share_within(k), np.zeros(count), ranks, groups, draws)
                for k in (1, 10)
            },
        )

    rows = [row(kind, _ranks(-trained.predict(first) @ trained.predict(second).T))]
    rows.append(row("descriptor", _ranks(torch.cdist(_described(first), _described(second)))))
    chance = {f"recall@{k}": Interval(*[min(1.0, k / count)] * 3) for k in (1, 10)}
    return [*rows, Row("chance", chance)]


def _ranks(distances: Tensor) -> Tensor:
    """How many others lie at most as near to each query as what belongs to it, ``(n,)``: ties count against."""
    own = distances.diagonal()[:, None]
    return (distances <= own).sum(1) - 1


def _share_within(k: int) -> Metric:
    return lambda _, ranks: float((ranks < k).mean())


def _described(graphs: Sequence[ParameterGraph]) -> Tensor:
    """The training-free descriptors that a zoo is searched with, ``(n, features)``."""
    from weightspace.retrieval import describe

    rows = [describe({n: g.tensor(n) for n in g.shapes}, g.wiring).vector for g in graphs]
    return torch.from_numpy(np.stack(rows))
