"""Making the pretrained metanets: populations, two trainings, calibration, evaluation, files and model card."""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from weightspace.metanets.data import Sample
from weightspace.metanets.training import Trained, fit
from weightspace.pretrained.applicability import LEAST, Limits, Range
from weightspace.pretrained.conformal import Conformal
from weightspace.pretrained.evaluation import Inside
from weightspace.pretrained.model import Projection, Seen, Shipped, mixed, see
from weightspace.pretrained.networks import Population, at_canonical_points, with_views
from weightspace.pretrained.recipe import Pretraining
from weightspace.pretrained.views import described

_log = logging.getLogger(__name__)

Parts = Mapping[str, Sequence[Sample]]


def train_encoder(recipe: Pretraining, found: Sequence[Population], out: Path) -> Trained:
    """The encoder: views of a network are positives of each other, all others of the batch are not."""
    learning = [p for p in found if not p.source.held_out]
    networks = [s for p in learning for s in p.train]
    if 0 < recipe.views.networks < len(networks):
        kept = sorted(random.Random(recipe.seed).sample(range(len(networks)), recipe.views.networks))
        networks = [networks[i] for i in kept]
    train = with_views(networks, recipe.views, recipe.seed)
    validation = with_views([s for p in learning for s in p.validation], recipe.views, recipe.seed + 1)
    return rounded(
        fit(recipe.encoder, train, validation, out, resume=True, positives=_positives(recipe), progress=False)
    )


def train_accuracy(recipe: Pretraining, found: Sequence[Population], out: Path) -> Trained:
    """The predictor of test accuracy, of all sources whose accuracy is one to learn."""
    learning = [p for p in found if p.source.accuracy and not p.source.held_out]
    train = at_canonical_points([s for p in learning for s in p.train])
    validation = at_canonical_points([s for p in learning for s in p.validation])
    return rounded(fit(recipe.accuracy, train, validation, out, resume=True, progress=False))


def calibrated(recipe: Pretraining, found: Sequence[Population], encoder: Trained, accuracy: Trained) -> Shipped:
    """Both metanets with their ranges and intervals, calibrated on runs that no training has seen."""
    learning = [p for p in found if not p.source.held_out]
    train = {p.source.name: at_canonical_points(p.train) for p in learning}
    projection = Projection.fit(described([s.graph for part in train.values() for s in part]), recipe.components)

    def seen(samples: Sequence[Sample]) -> Seen:
        return see([s.graph for s in samples], encoder, accuracy, projection)

    # What training, validation and calibration look like is asked for once.
    known = {name: seen(part) for name, part in train.items()}
    chosen = {p.source.name: at_canonical_points(p.validation) for p in learning}
    checked = {name: seen(part) for name, part in chosen.items()}
    held = {p.source.name: at_canonical_points(p.calibration) for p in learning}
    unseen = {name: seen(part) for name, part in held.items()}
    classifiers = [p.source.name for p in learning if p.source.accuracy]

    def zone(names: Sequence[str]) -> Range:
        graphs = [s.graph for p in learning if p.source.name in names for s in (*p.train, *p.validation)]
        reference = _joined([*(known[n] for n in names), *(checked[n] for n in names)], recipe.reference, recipe.seed)
        return Range.fit(Limits.of(graphs), reference.views, _joined([unseen[n] for n in names]).views)

    at, around = _joined([unseen[n] for n in classifiers]), _joined([checked[n] for n in classifiers])
    missed = (at.accuracies - _truth([s for n in classifiers for s in held[n]])).abs()
    around_missed = (around.accuracies - _truth([s for n in classifiers for s in chosen[n]])).abs()
    conformal = Conformal.fit(around.places, around_missed, at.places, missed)
    mixture = _in_units(_joined(list(checked.values())), recipe.mixture, _groups(chosen))
    return Shipped(
        "not saved yet", encoder, accuracy, projection, mixture, zone(list(known)), zone(classifiers), conformal
    )


def pretrain(
    recipe: Pretraining, found: Sequence[Population], work: Path, out: Path
) -> Shipped:
    """Train or resume both metanets in ``work``, calibrate them and write ``out``. The model card is written apart."""
    started = time.perf_counter()
    encoder = train_encoder(recipe, found, work / "encoder")
    _log.info("encoder: %.0f s", time.perf_counter() - started)
    accuracy = train_accuracy(recipe, found, work / "accuracy")
    _log.info("predictor: %.0f s", time.perf_counter() - started)
    out.mkdir(parents=True, exist_ok=True)
    calibrated(recipe, found, encoder, accuracy).save(out)
    # Read back, so that everything reported is of the files.
    return Shipped.load(out)


def left_out(recipe: Pretraining, found: Sequence[Population], model: Shipped) -> Iterator[Inside]:
    """Per population the share of its held-out runs inside a range that was fitted without it.

    The metanets have seen the population, and limits do not count: this is the work of the distances alone.
    """
    learning = [p for p in found if not p.source.held_out]
    known = {p.source.name: model.see([s.graph for s in (*p.train, *p.validation)]) for p in learning}
    held = {p.source.name: model.see([s.graph for s in p.calibration]) for p in learning}
    for name, asked in held.items():
        rest = [key for key in known if key != name]
        if rest:
            reference = _joined([known[key] for key in rest], recipe.reference, recipe.seed)
            zone = Range.fit(model.range.limits, reference.views, _joined([held[key] for key in rest]).views)
            yield Inside(name, len(asked), float((zone.scores(asked.views) > LEAST).double().mean()))


def rounded(trained: Trained) -> Trained:
    """The metanet with weights that float16 holds exactly: what is calibrated is what is written."""
    with torch.no_grad():
        for parameter in trained.metanet.parameters():
            parameter.copy_(parameter.to(torch.float16).to(parameter.dtype))
    return replace(trained, history=trained.history)


def _positives(recipe: Pretraining) -> Any:
    field = "instance" if recipe.positives == "instance" else "run"
    return lambda record: str(record.get(field) or record["instance"])


def _joined(parts: Sequence[Seen], most: int = 0, seed: int = 0) -> Seen:
    """Several as one, at most ``most`` of them drawn at random."""
    joined = Seen(*(torch.cat([getattr(p, f) for p in parts]) for f in ("codes", "places", "accuracies")))
    if not most or len(joined) <= most:
        return joined
    rows = torch.randperm(len(joined), generator=torch.Generator().manual_seed(seed))[:most].sort().values
    return joined[rows]


def _truth(samples: Sequence[Sample]) -> Tensor:
    return torch.tensor([float(s.record["test_accuracy"]) for s in samples], dtype=torch.float64)


def _groups(parts: Parts) -> list[str]:
    return [s.group for part in parts.values() for s in part]


def _in_units(seen: Seen, mixture: tuple[float, float], groups: Sequence[str]) -> tuple[float, float]:
    """The mixture scaled so that networks of different runs usually lie at distance 1."""
    vectors = mixed(seen, mixture).double()
    number = {group: i for i, group in enumerate(dict.fromkeys(groups))}
    of = torch.tensor([number[g] for g in groups])
    usual = float(torch.cdist(vectors, vectors)[of[:, None] != of[None, :]].median())
    return mixture[0] / usual, mixture[1] / usual
