"""Making the pretrained metanets: populations, two trainings, calibration, evaluation, files and model card."""

from __future__ import annotations

import logging
import math
import random
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from weightspace.metanets.data import Sample
from weightspace.metanets.training import Trained, fit
from weightspace.pretrained.applicability import LEAST, Limits, Range
from weightspace.pretrained.conformal import Conformal
from weightspace.pretrained.evaluation import Inside, mean_recalls
from weightspace.pretrained.model import Projection, Seen, Shipped, mixed, see
from weightspace.pretrained.networks import Population, at_canonical_points, with_views
from weightspace.pretrained.recipe import Pretraining
from weightspace.pretrained.views import described

MOST = 200
"""Validation networks that mixtures are compared on."""

_log = logging.getLogger(__name__)


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


@dataclass(frozen=True, eq=False)
class Calibrated:
    """Metanets with their ranges and intervals, and the networks behind these by population: ``known`` are those that
    distances are measured from, ``unseen`` those of calibration."""

    model: Shipped
    known: Mapping[str, Seen]
    unseen: Mapping[str, Seen]


def calibrated(recipe: Pretraining, found: Sequence[Population], encoder: Trained, accuracy: Trained) -> Calibrated:
    """Both metanets with their ranges and intervals, calibrated on runs that no training has seen."""
    learning = [p for p in found if not p.source.held_out]
    total = sum(len(p.train) for p in learning)
    share = min(1.0, recipe.reference / total)
    draw = random.Random(recipe.seed)
    reference = {
        p.source.name: [p.train[i] for i in sorted(draw.sample(range(len(p.train)), math.ceil(share * len(p.train))))]
        for p in learning
    }
    parts = {
        "reference": {name: at_canonical_points(samples) for name, samples in reference.items()},
        "validation": {p.source.name: at_canonical_points(p.validation) for p in learning},
        "calibration": {p.source.name: at_canonical_points(p.calibration) for p in learning},
    }
    descriptors = {
        part: {name: described([s.graph for s in samples]) for name, samples in of.items()}
        for part, of in parts.items()
    }
    projection = Projection.fit(torch.cat(list(descriptors["reference"].values())), recipe.components)

    def seen(part: str) -> dict[str, Seen]:
        return {
            name: see([s.graph for s in samples], encoder, accuracy, projection, descriptors[part][name])
            for name, samples in parts[part].items()
        }

    known, checked, unseen = seen("reference"), seen("validation"), seen("calibration")
    known = {name: _joined([known[name], checked[name]]) for name in known}
    classifiers = [p.source.name for p in learning if p.source.accuracy]

    def zone(names: Sequence[str]) -> Range:
        graphs = [s.graph for p in learning if p.source.name in names for s in (*p.train, *p.validation)]
        return Range.fit(
            Limits.of(graphs), _joined([known[n] for n in names]).views, _joined([unseen[n] for n in names]).views
        )

    def missed(part: str, of: Mapping[str, Seen]) -> tuple[Tensor, Tensor]:
        joined = _joined([of[name] for name in classifiers])
        truth = [float(s.record["test_accuracy"]) for name in classifiers for s in parts[part][name]]
        return joined.spots, (joined.accuracies - torch.tensor(truth, dtype=torch.float64)).abs()

    of = [name for name in classifiers for _ in parts["calibration"][name]]
    conformal = Conformal.fit(*missed("validation", checked), *missed("calibration", unseen), of)
    groups = [s.group for samples in parts["validation"].values() for s in samples]
    model = Shipped(
        "not saved yet", encoder, accuracy, projection, recipe.mixtures[0], zone(list(known)), zone(classifiers),
        conformal,
    )  # fmt: skip
    chosen = _chosen(recipe, model, [s for p in learning for s in p.validation])
    model = replace(model, mixture=_in_units(_joined(list(checked.values())), chosen, groups))
    return Calibrated(model, known, unseen)


def left_out(found: Calibrated) -> Iterator[Inside]:
    """Per population the share of its held-out runs inside a range that was fitted without it.

    The metanets have seen the population, and limits do not count: this is the work of the distances alone.
    """
    for name, asked in found.unseen.items():
        known = [seen for other, seen in found.known.items() if other != name]
        unseen = [seen for other, seen in found.unseen.items() if other != name]
        if known:
            zone = Range.fit(found.model.range.limits, _joined(known).views, _joined(unseen).views)
            yield Inside(name, len(asked), float((zone.scores(asked.views) > LEAST).double().mean()))


def pretrain(
    recipe: Pretraining, found: Sequence[Population], work: Path, out: Path
) -> tuple[Shipped, Calibrated]:
    """Train or resume both metanets in ``work``, calibrate them and write ``out``; the model card is written apart.

    The first is read back from the files, so that what is reported of it holds for them.
    """
    started = time.perf_counter()
    encoder = train_encoder(recipe, found, work / "encoder")
    _log.info("encoder: %.0f s", time.perf_counter() - started)
    accuracy = train_accuracy(recipe, found, work / "accuracy")
    _log.info("predictor: %.0f s", time.perf_counter() - started)
    made = calibrated(recipe, found, encoder, accuracy)
    out.mkdir(parents=True, exist_ok=True)
    made.model.save(out)
    _log.info("calibrated and saved: %.0f s", time.perf_counter() - started)
    return Shipped.load(out), made


def rounded(trained: Trained) -> Trained:
    """The metanet with weights that float16 holds exactly: what is calibrated is what is written."""
    with torch.no_grad():
        for parameter in trained.metanet.parameters():
            parameter.copy_(parameter.to(torch.float16).to(parameter.dtype))
    return replace(trained, history=trained.history)


def _positives(recipe: Pretraining) -> Any:
    field = "instance" if recipe.positives == "instance" else "run"
    return lambda record: str(record.get(field) or record["instance"])


def _chosen(recipe: Pretraining, model: Shipped, validation: Sequence[Sample]) -> tuple[float, float]:
    """The mixture that finds most among networks of validation runs, on average over the questions."""
    if len(recipe.mixtures) == 1:
        return recipe.mixtures[0]
    found = mean_recalls(model, validation, recipe.mixtures, MOST)
    for pair, recall in zip(recipe.mixtures, found, strict=True):
        _log.info("mixture %g : %g, mean recall@1 %.3f on validation runs", *pair, recall)
    return recipe.mixtures[found.index(max(found))]


def _joined(parts: Sequence[Seen]) -> Seen:
    return Seen(*(torch.cat([getattr(p, f) for p in parts]) for f in ("codes", "places", "accuracies")))


def _in_units(seen: Seen, mixture: tuple[float, float], groups: Sequence[str]) -> tuple[float, float]:
    """The mixture scaled so that networks of different runs usually lie at distance 1."""
    vectors = mixed(seen, mixture).double()
    number = {group: i for i, group in enumerate(dict.fromkeys(groups))}
    of = torch.tensor([number[g] for g in groups])
    usual = float(torch.cdist(vectors, vectors)[of[:, None] != of[None, :]].median())
    return mixture[0] / usual, mixture[1] / usual
