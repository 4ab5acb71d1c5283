"""The pretrained detector as one file, and what it says of a network.

``weightspace/backdoor/files/detector.safetensors`` holds small metanets, forests, the weights that both are stacked
with, the log odds of clean networks that none of them was trained on, and what is kept of the training zoo to tell
whether a network is like it. Loading it executes nothing.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from weightspace.backdoor import detector as metanets
from weightspace.backdoor.calibration import Stack, conformal, threshold
from weightspace.backdoor.head import EvidenceHead
from weightspace.backdoor.null import tail
from weightspace.backdoor.questions import Questions
from weightspace.backdoor.questions import read as read_answers
from weightspace.errors import MetanetError
from weightspace.paths import write_whole
from weightspace.pretrained.applicability import Limits, Range
from weightspace.pretrained.model import Projection
from weightspace.tagged import facts_of

if TYPE_CHECKING:
    from weightspace.backdoor.scanning import Observed

Array = NDArray[np.float64]
FILES = Path(__file__).parent / "files"
WEIGHTS, CARD = "detector.safetensors", "MODEL_CARD.md"
_FORMAT, _VERSION = "weightspace-backdoor", 3


HEADS = ("metanet", "questions", "evidence")
"""What is asked, in the order of everything that has an entry per head."""


@dataclass(frozen=True, eq=False)
class Said:
    """What the detector says of networks, a row or an entry each.

    ``heads (networks, heads)``: log odds of a backdoor by each head; ``odds (networks,)`` of all together;
    ``classes``: of each the log odds of its classes relative to each other ``(K,)``.
    """

    heads: Array
    odds: Array
    classes: list[Array]


@dataclass(frozen=True, eq=False)
class Heads:
    """Heads of each kind, each trained on another part of the networks; the answers of a kind are averaged.

    A kind that there are none of, or that cannot read a network, says 0.
    """

    nets: tuple[metanets.DetectorNet, ...]
    questions: tuple[Questions, ...]
    evidence: tuple[EvidenceHead, ...]

    def __call__(self, seen: Sequence[Observed]) -> tuple[Array, list[Array]]:
        """Log odds ``(networks, heads)``, and of each network those of its classes ``(heads, K)``."""
        odds = np.zeros((len(seen), len(HEADS)))
        classes = [np.zeros((len(HEADS), len(s.facts.classes))) for s in seen]
        told: list[tuple[Any, Sequence[Any]]] = []
        if self.nets:
            examples = [self.nets[0].example(s.graph, s.cell) for s in seen]
            told.append((0, metanets.read(self.nets, examples)))
        if self.questions:
            told.append((1, read_answers(self.questions, [s.asked for s in seen])))
        if self.evidence:
            by_tests = [head([s.facts for s in seen]) for head in self.evidence]
            told.append((2, (
                np.mean([t[0] for t in by_tests], axis=0),
                [np.mean([t[1][n] for t in by_tests], axis=0) for n in range(len(seen))],
            )))  # fmt: skip
        for number, (whole, each) in told:
            odds[:, number] = np.asarray(whole)
            for row, own in zip(classes, each, strict=True):
                row[number] = np.asarray(own)
        return odds, classes


def joined(parts: Sequence[Heads]) -> Heads:
    """All heads of several."""
    return Heads(
        tuple(n for p in parts for n in p.nets), tuple(q for p in parts for q in p.questions),
        tuple(e for p in parts for e in p.evidence),
    )  # fmt: skip


@dataclass(frozen=True, eq=False)
class Detector:
    """A trained detector with what it needs to know of the networks it comes from.

    ``mixture (heads,)``: weights of the heads among classes; ``clean``: out-of-fold log odds of clean networks;
    ``plain``: -log10 of the p-values that untrained tests give them; ``figures``: what was measured out
    of fold. ``name`` changes whenever any of it does.
    """

    name: str
    heads: Heads
    stack: Stack
    mixture: Array
    clean: Array
    projection: Projection
    range: Range
    plain: Array
    figures: Mapping[str, Any] = field(default_factory=dict)

    def __repr__(self) -> str:
        known = len(self.range.views[0])
        heads = f"{len(self.heads.nets)} metanets, {len(self.heads.questions)} sets of questions, "
        heads += f"{len(self.heads.evidence)} evidence heads"
        return f"Detector({self.name}, {heads}, range of {known} networks)"

    @property
    def tests(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """Names of the evidence it reads, of classes and of whole networks; empty where it reads none."""
        return self.heads.evidence[0].names if self.heads.evidence else ((), ())

    def read(self, seen: Sequence[Observed]) -> Said:
        """About networks that were observed."""
        heads, classes = self.heads(seen)
        return Said(heads, self.stack.odds(heads), [mixed(self.mixture, c) for c in classes])

    def flags(self, odds: Array, level: float) -> NDArray[np.bool_]:
        """Which log odds are above those that a share ``level`` of clean networks has."""
        found: NDArray[np.bool_] = np.asarray(odds) > threshold(self.clean, level)
        return found

    def rarity(self, odds: Array) -> Array:
        """Shares of clean networks with log odds as high."""
        return conformal(self.clean, odds)

    def untrained(self, p_value: float) -> float:
        """The p-value of untrained tests among those that clean networks of the training zoo have.

        The classes of a clean network are not alike, so that as they stand these p-values are too small.
        """
        return p_value if len(self.plain) < 8 else tail(self.plain, -float(np.log10(max(p_value, 1e-300))))

    # ---------------------------------------------------------------- files

    def save(self, folder: Path) -> Detector:
        """Write everything but the model card, whole or not at all; what ``load`` then gives."""
        from safetensors.torch import save

        tensors: dict[str, Tensor] = {
            "clean": torch.from_numpy(np.sort(self.clean)).float(),
            "plain": torch.from_numpy(np.sort(self.plain)).float(),
            "projection.mean": self.projection.mean.float(), "projection.scale": self.projection.scale.float(),
            "projection.basis": self.projection.basis.half(), "range.view": self.range.views[0].half(),
            "range.radii": self.range.radii[0].float(), "range.calibration": self.range.calibration.float(),
        }  # fmt: skip
        for number, net in enumerate(self.heads.nets):
            tensors |= {f"net.{number}.{k}": v.half() for k, v in net.state_dict().items()}
        for number, asking in enumerate(self.heads.questions):
            tensors |= {f"questions.{number}.{k}": v.half() for k, v in asking.state_dict().items()}
        for number, head in enumerate(self.heads.evidence):
            own = head.tensors()
            tensors |= {f"head.{number}.{k}": torch.from_numpy(np.ascontiguousarray(v)) for k, v in own.items()}
        facts = {
            "format": _FORMAT, "version": _VERSION, "config": self.heads.nets[0].config if self.heads.nets else None,
            "nets": len(self.heads.nets), "questions": [q.config for q in self.heads.questions],
            "evidence": len(self.heads.evidence), "tests": self.tests,
            "stack": self.stack.to_dict(), "mixture": self.mixture.tolist(), "units": list(self.range.units),
            "limits": self.range.limits.to_dict(), "figures": dict(self.figures),
        }  # fmt: skip
        data = save({k: v.contiguous() for k, v in tensors.items()}, {"weightspace": json.dumps(facts)})
        folder.mkdir(parents=True, exist_ok=True)
        write_whole(folder / WEIGHTS, data)
        return Detector.load(folder)

    @classmethod
    def load(cls, folder: Path) -> Detector:
        """What ``save`` wrote. Raises ``MetanetError`` for a file that is missing or damaged."""
        from safetensors import SafetensorError
        from safetensors.torch import load

        path = folder / WEIGHTS
        try:
            data = path.read_bytes()
            t = load(data)
            facts = facts_of(data, _FORMAT, _VERSION)
            nets = []
            for number in range(int(facts["nets"])):
                net = metanets.DetectorNet(**facts["config"])
                net.load_state_dict({k: v.float() for k, v in _part(t, f"net.{number}.").items()})
                nets.append(net.eval())
            names = (tuple(facts["tests"][0]), tuple(facts["tests"][1]))
            heads = [
                EvidenceHead.of(names, {k: v.numpy() for k, v in _part(t, f"head.{n}.").items()})
                for n in range(int(facts["evidence"]))
            ]
            asking = []
            for number, config in enumerate(facts["questions"]):
                one = Questions(**config)
                one.load_state_dict({k: v.float() for k, v in _part(t, f"questions.{number}.").items()})
                asking.append(one.eval())
            return cls(
                name=f"backdoor-{_VERSION}-{hashlib.sha256(data).hexdigest()[:12]}",
                heads=Heads(tuple(nets), tuple(asking), tuple(heads)),
                stack=Stack.from_dict(facts["stack"]),
                mixture=np.asarray(facts["mixture"], dtype=np.float64),
                clean=t["clean"].double().numpy(),
                projection=Projection(*(t[f"projection.{k}"].double() for k in ("mean", "scale", "basis"))),
                range=Range(
                    Limits.from_dict(facts["limits"]), (t["range.view"].double(),), (t["range.radii"].double(),),
                    tuple(float(u) for u in facts["units"]), t["range.calibration"].double(),
                ),
                plain=t["plain"].double().numpy(),
                figures=facts["figures"],
            )  # fmt: skip
        except (OSError, SafetensorError, ValueError, KeyError, TypeError, IndexError, RuntimeError) as error:
            reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
            raise MetanetError(
                f"{path} cannot be used ({reason}); install weightspace again, or make it anew with "
                "`weightspace train backdoor`"
            ) from error


@lru_cache(maxsize=1)
def shipped() -> Detector:
    """The detector that comes with this installation, loaded once. Raises ``MetanetError`` where it is missing."""
    return Detector.load(FILES)


def mixed(mixture: Array, classes: Array) -> Array:
    """Log odds of classes ``(K,)`` by all heads ``(heads, K)``, relative to each other."""
    found: Array = mixture @ (classes - classes.max(1, keepdims=True))
    return found


def fit_mixture(classes: Sequence[Array], targets: Sequence[Sequence[int]]) -> Array:
    """Weights of the heads under which out-of-fold targets are likeliest, from ``(heads, K)`` of each network."""
    from scipy.optimize import minimize

    start = np.full(len(HEADS), 1 / len(HEADS))

    def lost(w: Array) -> float:
        total = 0.02 * len(targets) * float(((w - start) ** 2).sum())
        for each, own in zip(classes, targets, strict=True):
            z = mixed(w, each)
            total += float(np.logaddexp.reduce(z) - np.logaddexp.reduce(z[list(own)]))
        return total

    if not targets:
        return start
    found = minimize(lost, start, bounds=[(0, 5)] * len(HEADS), method="L-BFGS-B")
    return np.asarray(found.x, dtype=np.float64)


def _part(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}


__all__ = [
    "CARD", "FILES", "HEADS", "WEIGHTS", "Detector", "Heads", "Said", "fit_mixture", "joined", "mixed", "shipped",
]  # fmt: skip
