"""The pretrained metanets that come with the package, and how a network is read with them.

They lie in ``weightspace/pretrained/files``: two folders of a trained metanet each (``encoder``, ``accuracy``) and
``zoo.safetensors``, what is kept of the networks they were trained on. Loading them executes nothing.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F

from weightspace.errors import MetanetError, UnansweredError
from weightspace.graph import ParameterGraph
from weightspace.paths import write_whole
from weightspace.pretrained.applicability import Applicability, Limits, Range
from weightspace.pretrained.conformal import COVERAGE, Conformal, Prediction
from weightspace.pretrained.views import canonical, described
from weightspace.tagged import facts_of

if TYPE_CHECKING:
    from weightspace.metanets.base import Metanet
    from weightspace.metanets.training import Trained

FILES = Path(__file__).resolve().parent / "files"
ENCODER, ACCURACY, ZOO, CARD = "encoder", "accuracy", "zoo.safetensors", "MODEL_CARD.md"
_FORMAT, _VERSION = "weightspace-pretrained", 1
_BATCH = 32
_PREDICTED = 2.0


@dataclass(frozen=True, eq=False)
class Projection:
    """Descriptors in a few coordinates: their principal components, and how much these leave over.

    ``mean``, ``scale`` ``(DIMENSION,)`` and ``basis (components, DIMENSION)``; a scale of 0 leaves a feature out.
    """

    mean: Tensor
    scale: Tensor
    basis: Tensor

    @classmethod
    def fit(cls, descriptors: Tensor, components: int) -> Projection:
        """Of descriptors ``(n, DIMENSION)``, each feature in units of its deviation."""
        mean, deviation = descriptors.mean(0), descriptors.std(0, correction=0)
        scale = torch.where(deviation > 1e-6, 1 / deviation.clamp_min(1e-6), torch.zeros_like(deviation))
        _, _, basis = torch.linalg.svd((descriptors - mean) * scale, full_matrices=False)
        return cls(mean, scale, basis[:components])

    def __call__(self, descriptors: Tensor) -> Tensor:
        """Coordinates ``(n, components + 1)`` in units of the typical length of a descriptor."""
        z = (descriptors - self.mean) * self.scale / math.sqrt(max(int((self.scale > 0).sum()), 1))
        inner = z @ self.basis.T
        # A feature that never varied where this was fitted counts as soon as it does.
        still = (self.scale == 0) & ((descriptors - self.mean).abs() > 1e-4)
        rest = (z - inner @ self.basis).norm(dim=1) + still.sum(1) / math.sqrt(len(self.scale))
        return torch.cat((inner, rest.unsqueeze(1)), dim=1)


@dataclass(frozen=True, eq=False)
class Seen:
    """Networks as the pretrained metanets see them: ``codes (n, d)`` of length 1, ``places (n, c + 1)`` of their
    descriptors, ``accuracies (n,)`` predicted."""

    codes: Tensor
    places: Tensor
    accuracies: Tensor

    def __len__(self) -> int:
        return len(self.codes)

    def __getitem__(self, rows: Any) -> Seen:
        return Seen(self.codes[rows], self.places[rows], self.accuracies[rows])

    @property
    def views(self) -> tuple[Tensor, Tensor]:
        """What distances to the training zoo are measured in."""
        return self.codes, self.places

    @property
    def spots(self) -> Tensor:
        """Where errors of predicted accuracies are alike: descriptors and the prediction itself, ``(n, ·)``."""
        return torch.cat((self.places, _PREDICTED * self.accuracies.unsqueeze(1)), dim=1)


@dataclass(frozen=True, eq=False)
class Reading:
    """What the pretrained metanets say of one network.

    ``vector`` is None for a network that was not read, since a limit excludes it.
    """

    vector: Tensor | None
    applicability: Applicability
    prediction: Prediction


@dataclass(frozen=True, eq=False)
class Shipped:
    """A pretrained encoder and predictor of accuracy with what they need to know of the networks they come from.

    ``mixture``: weights of code and place in a vector. ``name`` changes whenever any of it does.
    """

    name: str
    encoder: Trained
    accuracy: Trained
    projection: Projection
    mixture: tuple[float, float]
    range: Range
    accuracy_range: Range
    conformal: Conformal

    def __repr__(self) -> str:
        known = len(self.range.views[0])
        return f"Shipped({self.name}, vectors of {self.dimension} numbers, learned from {known:,} networks)"

    @cached_property
    def dimension(self) -> int:
        """Length of a vector."""
        return int(sum(view.shape[1] for view, weight in zip(self.range.views, self.mixture, strict=True) if weight))

    def see(self, graphs: Sequence[ParameterGraph]) -> Seen:
        """Networks whose graphs come from ``clean``; raises where a wiring is not proved."""
        return see(canonical(graphs), self.encoder, self.accuracy, self.projection)

    def vectors(self, seen: Seen) -> Tensor:
        """The vectors that distances are measured between, ``(n, dimension)``, float32."""
        return mixed(seen, self.mixture)

    def read(self, graph: ParameterGraph, force: bool = False) -> Reading:
        """Everything about one network whose graph comes from ``clean``; ``force`` reads it whatever the limits."""
        reason = self.range.limits.excluded(graph)
        if reason and not force:
            outside = Applicability(False, 0.0, reason)
            return Reading(None, outside, nothing(outside))
        seen = self.see([graph])
        found = Applicability(False, 0.0, reason) if reason else self.range.of(seen.views)
        reason = self.accuracy_range.limits.excluded(graph)
        silent = bool(seen.accuracies.isnan())
        if silent:
            reason = reason or "it does not run on noise, and the predictor hears what a network answers to that"
        where = Applicability(False, 0.0, reason) if reason else self.accuracy_range.of(seen.views)
        if silent:
            return Reading(self.vectors(seen)[0], found, nothing(where))
        low, high = self.conformal.intervals(seen.accuracies, seen.spots)
        prediction = Prediction(float(seen.accuracies[0]), float(low[0]), float(high[0]), COVERAGE, where)
        return Reading(self.vectors(seen)[0], found, prediction if where.inside or force else nothing(where))

    # ---------------------------------------------------------------- files

    def save(self, folder: Path) -> None:
        """Write everything but the model card; metanets as float16."""
        from safetensors.torch import save

        for trained, part in ((self.encoder, ENCODER), (self.accuracy, ACCURACY)):
            trained.metanet.half()
            trained.save(folder / part)
            trained.metanet.float()
        tensors = {
            "projection.mean": self.projection.mean.float(),
            "projection.scale": self.projection.scale.float(),
            "projection.basis": self.projection.basis.float(),
            "range.codes": self.range.views[0].half(),
            "range.places": self.range.views[1].half(),
            "range.radii": torch.stack(self.range.radii).float(),
            "range.calibration": self.range.calibration.float(),
            "accuracy.codes": self.accuracy_range.views[0].half(),
            "accuracy.places": self.accuracy_range.views[1].half(),
            "accuracy.radii": torch.stack(self.accuracy_range.radii).float(),
            "accuracy.calibration": self.accuracy_range.calibration.float(),
            "conformal.places": self.conformal.places.half(),
            "conformal.misses": self.conformal.misses.float(),
            "conformal.scores": self.conformal.scores.float(),
        }
        facts = {
            "format": _FORMAT,
            "version": _VERSION,
            "mixture": list(self.mixture),
            "range": {"units": list(self.range.units), "limits": self.range.limits.to_dict()},
            "accuracy": {"units": list(self.accuracy_range.units), "limits": self.accuracy_range.limits.to_dict()},
            "encoder": _digest(folder / ENCODER),
            "predictor": _digest(folder / ACCURACY),
        }
        data = save({name: value.contiguous() for name, value in tensors.items()}, {"weightspace": json.dumps(facts)})
        write_whole(folder / ZOO, data)

    @classmethod
    def load(cls, folder: Path) -> Shipped:
        """What ``save`` wrote. Raises ``MetanetError`` for files that are missing, damaged or of different makes."""
        from safetensors import SafetensorError
        from safetensors.torch import load

        from weightspace.metanets.training import Trained

        encoder, accuracy = Trained.load(folder / ENCODER), Trained.load(folder / ACCURACY)
        path = folder / ZOO
        try:
            data = path.read_bytes()
            t = load(data)
            facts = facts_of(data, _FORMAT, _VERSION)
            if (facts["encoder"], facts["predictor"]) != (_digest(folder / ENCODER), _digest(folder / ACCURACY)):
                raise ValueError("the metanets beside it are others than it was made with")

            def zone(kind: str) -> Range:
                units = tuple(float(u) for u in facts[kind]["units"])
                views = (t[f"{kind}.codes"].double(), t[f"{kind}.places"].double())
                limits = Limits.from_dict(facts[kind]["limits"])
                code_radii, place_radii = t[f"{kind}.radii"].double()
                return Range(limits, views, (code_radii, place_radii), units, t[f"{kind}.calibration"].double())

            parts = ("mean", "scale", "basis")
            code, place = (float(w) for w in facts["mixture"])
            return cls(
                name=f"encoder-{_VERSION}-{hashlib.sha256(data).hexdigest()[:12]}",
                encoder=encoder,
                accuracy=accuracy,
                projection=Projection(*(t[f"projection.{part}"].double() for part in parts)),
                mixture=(code, place),
                range=zone("range"),
                accuracy_range=zone("accuracy"),
                conformal=Conformal(*(t[f"conformal.{part}"].double() for part in ("places", "misses", "scores"))),
            )
        except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
            reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
            raise MetanetError(
                f"{path} cannot be used ({reason}); install weightspace again, or make it anew with "
                "`python -m weightspace.pretrained`"
            ) from error


@lru_cache(maxsize=1)
def shipped() -> Shipped:
    """The metanets that come with this installation, loaded once.

    Raises ``MetanetError`` where files of it are missing or damaged.
    """
    if not FILES.is_dir():
        raise MetanetError(
            f"there are no pretrained metanets in {FILES}: the installation is incomplete; install weightspace again"
        )
    return Shipped.load(FILES)


def see(
    graphs: Sequence[ParameterGraph], encoder: Trained, accuracy: Trained, projection: Projection,
    descriptors: Tensor | None = None,
) -> Seen:  # fmt: skip
    """Networks at their canonical points, as they are seen; ``descriptors`` are theirs, where known already."""
    codes, accuracies = _outputs((encoder, accuracy), graphs)
    places = projection(described(graphs) if descriptors is None else descriptors)
    return Seen(F.normalize(codes.double(), dim=1), places, accuracy.task.read(accuracies).double())


def _outputs(some: Sequence[Trained], graphs: Sequence[ParameterGraph]) -> list[Tensor]:
    """Outputs of several metanets, ``(networks, outputs)`` each; networks are prepared once for those that allow it.

    Not numbers for a network that a metanet would ask and that does not answer.
    """
    found: list[list[Tensor]] = [[torch.empty(0, trained.task.outputs)] for trained in some]
    for start in range(0, len(graphs), _BATCH):
        part = graphs[start : start + _BATCH]
        batches: dict[Hashable, Any] = {}
        for trained, parts in zip(some, found, strict=True):
            try:
                parts.append(_answer(trained.metanet, part, batches))
            except UnansweredError:
                parts += [_answer_or_nothing(trained, graph) for graph in part]
    return [torch.cat(parts) for parts in found]


def _answer(metanet: Metanet, graphs: Sequence[ParameterGraph], batches: dict[Hashable, Any]) -> Tensor:
    """Outputs for one batch; ``batches`` are those that other metanets prepared of the same graphs."""
    from weightspace.metanets.answering import Answering

    if metanet.preparation not in batches:
        known = isinstance(metanet, Answering) and metanet.inner.preparation in batches
        batches[metanet.preparation] = (
            metanet.around(batches[metanet.inner.preparation], graphs)
            if known and isinstance(metanet, Answering)
            else metanet.batched(graphs)
        )
    return metanet.answer(batches[metanet.preparation]).cpu()


def _answer_or_nothing(trained: Trained, graph: ParameterGraph) -> Tensor:
    try:
        return _answer(trained.metanet, [graph], {})
    except UnansweredError:
        return torch.full((1, trained.task.outputs), torch.nan)


def mixed(seen: Seen, mixture: tuple[float, float]) -> Tensor:
    """Codes and places side by side, each times its weight; what has the weight 0 is left out."""
    parts = [weight * view for weight, view in zip(mixture, seen.views, strict=True) if weight]
    return torch.cat(parts, dim=1).float()


def nothing(where: Applicability) -> Prediction:
    """No prediction, and why."""
    return Prediction(math.nan, math.nan, math.nan, COVERAGE, where)


def _digest(folder: Path) -> str:
    """What tells one trained metanet from another: the hash of its configuration, which holds that of its weights."""
    return hashlib.sha256((folder / "config.json").read_bytes()).hexdigest()
