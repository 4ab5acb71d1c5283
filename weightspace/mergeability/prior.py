"""What is expected of a merge before any was measured: a forest over features and a metanet, learned from populations.

Both predict, for every model in a merge and every method, the retained accuracy on the link scale of
``weightspace.mergeability.outcome``; their mean is the prior mean of its effects model, whose variances are those of
what they missed on tasks that were held out. Intervals are conformal: the miss that is usual where the prediction lies,
times a factor that made them hold on held-out tasks (Papadopoulos et al. 2002; across groups, Vovk 2015).

Models with a common base and models without one have a prior each, in files of their own.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from weightspace.errors import MetanetError
from weightspace.mergeability.features import NAMES, Comparison, term_of
from weightspace.mergeability.forest import Forest
from weightspace.pretrained.applicability import Applicability
from weightspace.tagged import facts_of

if TYPE_CHECKING:
    from weightspace.mergeability.metanet import Reader
    from weightspace.metanets.operator import OperatorMetanet

Array = NDArray[np.float64]

FILES = Path(__file__).resolve().parent / "files"
MODEL, STRANGERS, CARD = "merge.safetensors", "strangers.safetensors", "MODEL_CARD.md"
_FORMAT, _VERSION = "weightspace-merge", 1
COVERAGE = 0.9
LEAST = 0.02
_NEAREST = 5
EFFECTS = ("vulnerability", "damage", "pair", "cell")


@dataclass(frozen=True, eq=False)
class Spread:
    """How far predictions miss: ``at (k,)`` predictions, ``miss (k,)`` the usual miss there, ``scores`` of held-out
    merges in units of it, sorted."""

    at: Array
    miss: Array
    scores: Array

    @classmethod
    def fit(
        cls, predicted: Array, truth: Array, groups: Sequence[frozenset[int]] | None = None, bins: int = 8
    ) -> Spread:
        """From predictions of held-out merges.

        ``groups``: what tasks each merge is about. The usual miss that a score is in units of then comes from merges
        that have none of them, as it will for new tasks.
        """
        wrong = np.abs(truth - predicted)
        at, miss = _usual(predicted, wrong, bins)
        unit = np.interp(predicted, at, miss)
        if groups is not None:
            for held in set(groups):
                here = np.array([g == held for g in groups])
                apart = np.array([not g & held for g in groups])
                if apart.sum() >= 8 * bins:
                    unit[here] = np.interp(predicted[here], *_usual(predicted[apart], wrong[apart], bins))
        return cls(at, miss, np.sort(wrong / unit))

    def reach(self, predicted: Array, coverage: float = COVERAGE) -> Array:
        """Half the width of intervals at these predictions."""
        rank = min(int(np.ceil((len(self.scores) + 1) * coverage)), len(self.scores)) - 1
        found: Array = float(self.scores[rank]) * np.interp(predicted, self.at, self.miss)
        return found


def _usual(predicted: Array, wrong: Array, bins: int) -> tuple[Array, Array]:
    """Mean predictions and mean misses of merges in order of their predictions, in so many parts."""
    parts = np.array_split(np.argsort(predicted), min(bins, max(1, len(predicted) // 8)))
    return np.array([predicted[p].mean() for p in parts]), np.array([wrong[p].mean() for p in parts]) + 0.003


@dataclass(frozen=True, eq=False)
class Prior:
    """The learned prior. ``methods`` are the outputs of forest and metanet; ``variances[method]`` of the effects.

    ``share``: weight of the metanet beside the forest. ``base``: whether it is about models with a common base.
    ``centre``, ``unit`` ``(features,)`` and ``places (n, features)`` tell how far a merge lies from those learned from;
    ``distances`` are those of held-out ones, sorted.
    """

    methods: tuple[str, ...]
    forest: Forest
    metanet: OperatorMetanet | None
    variances: Mapping[str, Mapping[str, float]]
    spreads: Mapping[str, Spread]
    centre: Array
    unit: Array
    places: Array
    distances: Array
    roles: tuple[str, ...] = ()
    share: float = 0.0
    base: bool = True
    facts: Mapping[str, Any] = field(default_factory=dict)

    def cells(self, comparison: Comparison, merges: Sequence[Sequence[int]], reader: Reader | None = None) -> Array:
        """Predictions for each model of each merge, ``(cells, methods)``, on the link scale."""
        found = self.forest(comparison.vectors(merges))
        if self.metanet is None or reader is None:
            return found
        from weightspace.mergeability.metanet import answers

        return (1 - self.share) * found + self.share * answers(self.metanet, reader, merges)

    def terms(self, comparison: Comparison, merge: Sequence[int], method: str) -> dict[str, float]:
        """By how much each kind of feature moves the forest's prediction of a merge: link scale, mean over its models.

        Each kind is put to its typical value by itself, over the quartiles of the merges learned from.
        """
        column = self.methods.index(method)
        rows = comparison.vectors([merge])
        usual = np.quantile(self.places, [0.25, 0.5, 0.75], axis=0) * self.unit + self.centre
        groups: dict[str, list[int]] = {}
        for i, name in enumerate(NAMES):
            groups.setdefault(term_of(name), []).append(i)
        changed = []
        for columns in groups.values():
            for typical in usual:
                other = rows.copy()
                other[:, columns] = typical[columns]
                changed.append(other)
        here = self.forest(rows)[:, column].mean()
        there = self.forest(np.concatenate(changed))[:, column].reshape(len(groups), -1).mean(1)
        return {name: float(here - t) for name, t in zip(groups, there, strict=True)}

    def applicability(self, comparison: Comparison, merge: Sequence[int], proved: bool = True) -> Applicability:
        """Whether predictions hold for a merge: how far its features lie from those that were learned from."""
        if self.base and not comparison.base:
            return Applicability(False, 0.0, "no base was given, and what was learned is about changes to a base")
        if comparison.base and not self.base:
            return Applicability(False, 0.0, "the models have a base, and what was learned is about models without one")
        if not proved:
            return Applicability(False, 0.0, "the models' wiring is not proved")
        far = self.far(comparison.vectors([merge])).max()
        score = float((1 + (self.distances >= far).sum()) / (1 + len(self.distances)))
        if score > LEAST:
            return Applicability(True, score)
        times = far / max(float(np.median(self.distances)), 1e-9)
        return Applicability(
            False, score, f"it lies {times:.1f} times as far from the merges learned from as held-out ones usually do"
        )

    def far(self, rows: Array) -> Array:
        """Distances of cells to the nearest learned from, ``(n,)``."""
        z = np.clip((rows - self.centre) / self.unit, -20, 20)
        apart = np.sqrt(np.maximum(
            np.square(z).sum(1)[:, None] + np.square(self.places).sum(1)[None] - 2 * z @ self.places.T, 0
        ))  # fmt: skip
        found: Array = np.partition(apart, min(_NEAREST, apart.shape[1]) - 1, axis=1)[:, _NEAREST - 1]
        return found

    # ---------------------------------------------------------------- files

    def save(self, folder: Path, name: str = MODEL) -> Path:
        """Write everything but the card, at most about a megabyte."""
        from safetensors.numpy import save

        from weightspace.paths import write_whole

        folder.mkdir(parents=True, exist_ok=True)
        tensors: dict[str, Any] = {f"forest.{k}": v for k, v in self.forest.tensors().items()}
        tensors |= {
            "range.centre": self.centre.astype(np.float32), "range.unit": self.unit.astype(np.float32),
            "range.places": self.places.astype(np.float16), "range.distances": self.distances.astype(np.float32),
        }  # fmt: skip
        for method, spread in self.spreads.items():
            for part in ("at", "miss", "scores"):
                tensors[f"spread.{method}.{part}"] = getattr(spread, part).astype(np.float32)
        if self.metanet is not None:
            for name, value in self.metanet.state_dict().items():
                tensors[f"metanet.{name}"] = value.detach().half().numpy()
        facts = {
            "format": _FORMAT, "version": _VERSION, "methods": list(self.methods), "roles": list(self.roles),
            "variances": {m: dict(v) for m, v in self.variances.items()}, "names": list(NAMES),
            "metanet": None if self.metanet is None else self.metanet.config, "facts": dict(self.facts),
            "share": self.share, "base": self.base,
        }  # fmt: skip
        data = save({k: np.ascontiguousarray(v) for k, v in tensors.items()}, {"weightspace": json.dumps(facts)})
        return write_whole(folder / name, data)

    @classmethod
    def load(cls, folder: Path = FILES, name: str = MODEL) -> Prior:
        """What ``save`` wrote. Raises ``MetanetError`` for files that are missing, damaged or of another make."""
        import torch
        from safetensors import SafetensorError
        from safetensors.numpy import load

        path = folder / name
        try:
            data = path.read_bytes()
            t = load(data)
            facts = facts_of(data, _FORMAT, _VERSION)
            if tuple(facts["names"]) != NAMES:
                raise ValueError("it was made with other features")
            metanet = None
            if facts["metanet"] is not None:
                from weightspace.metanets.operator import OperatorMetanet

                config = {k: v for k, v in facts["metanet"].items() if k not in ("kind", "centre", "unit")}
                metanet = OperatorMetanet(**config)
                state = {k.removeprefix("metanet."): torch.from_numpy(v.astype(np.float32)) for k, v in t.items()
                         if k.startswith("metanet.")}  # fmt: skip
                metanet.load_state_dict(state)
                metanet.config |= {k: facts["metanet"][k] for k in ("centre", "unit")}
                metanet.eval()
            doubles = {k: v.astype(np.float64) for k, v in t.items() if k.startswith(("range.", "spread."))}
            return cls(
                tuple(facts["methods"]),
                Forest.of({k.removeprefix("forest."): v for k, v in t.items() if k.startswith("forest.")}),
                metanet, facts["variances"],
                {m: Spread(*(doubles[f"spread.{m}.{part}"] for part in ("at", "miss", "scores")))
                 for m in facts["methods"]},
                doubles["range.centre"], doubles["range.unit"], doubles["range.places"], doubles["range.distances"],
                tuple(facts["roles"]), float(facts.get("share", 0.0)), bool(facts.get("base", True)), facts["facts"],
            )  # fmt: skip
        except (OSError, SafetensorError, ValueError, KeyError, TypeError, RuntimeError) as error:
            reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
            raise MetanetError(
                f"{path} cannot be used ({reason}); install weightspace again, or make it anew with "
                "`weightspace train merge`"
            ) from error


@lru_cache(maxsize=1)
def shipped() -> Prior:
    """The prior of models with a common base that comes with this installation, loaded once."""
    return Prior.load(FILES)


@lru_cache(maxsize=1)
def shipped_strangers() -> Prior:
    """That of pairs without a common base: features are of the second one carried onto the first (see `training`)."""
    return Prior.load(FILES, STRANGERS)
