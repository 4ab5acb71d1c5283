"""The recipe of the pretrained metanets: which populations, how they are split, and the plans of both trainings."""

from __future__ import annotations

import os
import tomllib
from dataclasses import dataclass, field
from pathlib import Path

from weightspace.errors import MetanetError
from weightspace.metanets.training import TrainingPlan

DEFAULT = Path(__file__).resolve().parent / "recipe.toml"


@dataclass(frozen=True)
class Source:
    """Networks of one recipe of the zoo.

    ``populations`` of it (empty: all), at most ``checkpoints`` of each run (the last ones; 0: all), at most ``runs``
    runs (0: all). ``accuracy``: whether its test accuracy is one that the predictor learns. ``held_out``: kept from
    everything, for tests alone.
    """

    recipe: str
    populations: tuple[str, ...] = ()
    checkpoints: int = 0
    runs: int = 0
    accuracy: bool = True
    held_out: bool = False

    @property
    def name(self) -> str:
        """The recipe with its populations, where they are not all."""
        return self.recipe + (f" ({', '.join(self.populations)})" if self.populations else "")


@dataclass(frozen=True)
class Views:
    """What is done to a network before it is settled at its canonical point, to make ``count`` views besides itself.

    Rescalings ``exp(z)`` of every neuron that allows them, then noise of a level drawn below ``noise`` (in standard
    deviations of each tensor). ``networks``: most that the encoder is trained on, drawn at random (0: all).
    """

    count: int = 1
    noise: float = 0.5
    networks: int = 0


@dataclass(frozen=True)
class Pretraining:
    """Everything that decides how the pretrained metanets come out.

    ``fractions``: shares of lineages for training, validation, calibration and test. ``components``: coordinates of
    a descriptor. ``positives``: "instance" (views of a network alone) or "run". ``mixtures``: weights of the encoder's
    output and of the projected descriptor in a vector, 0 leaves one out; of several the one that finds most in the
    validation part is taken. ``reference``: most networks that distances to the training zoo are measured from.
    """

    sources: tuple[Source, ...]
    encoder: TrainingPlan
    accuracy: TrainingPlan
    views: Views = field(default_factory=Views)
    fractions: tuple[float, ...] = (0.64, 0.08, 0.14, 0.14)
    components: int = 64
    positives: str = "instance"
    reference: int = 4000
    mixtures: tuple[tuple[float, float], ...] = ((1.0, 1.0),)
    seed: int = 0


def load(path: str | os.PathLike[str] = DEFAULT) -> Pretraining:
    """Read a recipe. Raises ``MetanetError`` naming the first thing in it that makes no sense."""
    file = Path(path)
    try:
        table = tomllib.loads(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise MetanetError(f"{file} is no recipe for pretraining: {error}") from error
    try:
        encoder, accuracy = (TrainingPlan.from_dict(dict(table.pop(name))) for name in ("encoder", "accuracy"))
        sources = tuple(
            Source(**{**entry, "populations": tuple(entry.get("populations", ()))}) for entry in table.pop("source")
        )
        fractions = tuple(float(x) for x in table.pop("fractions", Pretraining.fractions))
        views = Views(**table.pop("views", {}))
        mixtures = tuple((float(code), float(place)) for code, place in table.pop("mixtures", Pretraining.mixtures))
        found = Pretraining(
            sources, encoder, accuracy, views=views, fractions=fractions, mixtures=mixtures, **table
        )
    except (KeyError, TypeError, ValueError) as error:
        raise MetanetError(f"{file}: {type(error).__name__}: {error}; compare it with {DEFAULT}") from error
    _check(found, file)
    return found


def _check(found: Pretraining, file: Path) -> None:
    def wrong(text: str) -> MetanetError:
        return MetanetError(f"{file}: {text}")

    if len(found.fractions) != 4 or min(found.fractions) <= 0 or sum(found.fractions) > 1 + 1e-9:
        raise wrong(f"fractions are {found.fractions}, expected four above 0 that add up to 1 at most")
    if not found.mixtures or any(min(pair) < 0 or max(pair) <= 0 for pair in found.mixtures):
        raise wrong(f"mixtures are {found.mixtures}, expected pairs of weights, none below 0 and one of each above")
    if found.positives not in ("instance", "run"):
        raise wrong(f"positives is {found.positives!r}, expected 'instance' or 'run'")
    if found.encoder.task != "contrastive" or found.accuracy.task != "regression":
        raise wrong("the encoder's task is 'contrastive' and the predictor's 'regression'")
    if not any(s.accuracy and not s.held_out for s in found.sources):
        raise wrong("no source is for training and has an accuracy to learn")


