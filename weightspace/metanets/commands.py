"""From a recipe or a folder to a trained metanet with figures: what ``weightspace train`` does."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from weightspace.errors import MetanetError
from weightspace.metanets.augment import Augmentation
from weightspace.metanets.data import Where, load_samples, split
from weightspace.metanets.tasks import named
from weightspace.metanets.training import Trained, TrainingPlan, fit

if TYPE_CHECKING:
    from weightspace.metanets.evaluation import Row

_log = logging.getLogger(__name__)

FRACTIONS = (0.7, 0.1, 0.2)
"""Of the networks for training, for validation, and held out."""

VIEWS = Augmentation(permute=1.0, rescale=0.5, noise=0.2, mask=0.1)
"""What makes two views of a network where a contrastive training is not told otherwise."""


def train_on(
    source: str,
    task: str = "accuracy",
    *,
    metanet: Mapping[str, Any],
    augmentation: Mapping[str, Any] | None = None,
    where: Where | None = None,
    out: Path | None = None,
    seed: int = 0,
    split_by: str = "lineage",
    fresh: bool = False,
    progress: bool = True,
    plan: Mapping[str, Any] | None = None,
) -> tuple[list[Row], Trained, Path]:
    """Build a population where it is absent, train a metanet on most of its runs and measure it on the others.

    ``source`` is a folder of networks, or a recipe, built in ``models/<recipe>``. ``task`` is a name of
    ``tasks.NAMED`` or a field of the records; ``plan`` holds further entries of a ``TrainingPlan``. A training
    that was interrupted goes on unless it should be ``fresh``. Gives the rows of ``evaluation.evaluate``, what was
    trained, and the folder it was saved in (default: ``runs/<source>-<task>-<metanet>-<seed>``).
    """
    from weightspace.metanets.evaluation import evaluate

    folder = _population(source, progress)
    samples = load_samples(folder, where or None, progress)
    kind, target = named(task, samples)
    views = VIEWS if kind == "contrastive" and not augmentation else Augmentation.from_dict(augmentation or {})
    chosen = TrainingPlan.from_dict(
        {
            "task": kind,
            "target": target,
            "metanet": dict(metanet),
            "augmentation": views.to_dict(),
            "seed": seed,
            **(plan or {}),
        }
    )
    train, validation, test = split(samples, FRACTIONS, seed, split_by)
    _log.info("%r: %d to train on, %d to validate, %d held out", samples, len(train), len(validation), len(test))
    saved = out or Path("runs") / f"{folder.resolve().name}-{task}-{metanet['kind']}-{seed}"
    trained = fit(chosen, train, validation, saved, resume=not fresh, progress=progress)
    return evaluate(trained, [*train, *validation], test), trained, saved


def _population(source: str, progress: bool) -> Path:
    path = Path(source)
    if path.is_dir():
        return path
    from weightspace.errors import ZooError
    from weightspace.zoo.recipe import load
    from weightspace.zoo.train import build_zoo

    try:
        recipe = load(source)
    except ZooError as error:
        raise MetanetError(f"{source} is neither a folder of networks nor a recipe: {error}") from error
    folder = Path("models") / recipe.name
    build_zoo(recipe, folder, progress=progress)
    return folder
