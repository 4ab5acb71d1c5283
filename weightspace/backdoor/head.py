"""The evidence head: what the training-free tests say of every class, weighed by what populations taught.

The evidence of a class is told relative to the other classes of the same network (how far from their median in units
of their spread, at which rank), so that it means the same whatever the architecture, the data or the number of classes,
and relative to the same class of the clean networks that it is most like (``weightspace.backdoor.references``).
One forest judges classes: is this one the target? A second judges networks: by the largest, second largest and smallest
values that classes have in each test, by what the first forest says of the classes, and by the statistics of the whole
network. Trees only ask whether a value lies above a threshold, so units need no care.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from weightspace.backdoor.references import FEWEST, References, deviations
from weightspace.errors import MetanetError
from weightspace.mergeability.forest import Forest

Array = NDArray[np.float64]

_FAR = 20.0
_TREES = {"trees": 150, "leaf": 3, "share": 0.35}
_CLASS_TREES = {"trees": 100, "leaf": 8, "share": 0.35}


@dataclass(frozen=True, eq=False)
class Facts:
    """Evidence of one network as numbers: ``classes (K, tests)``, ``whole (statistics,)``; not finite is unknown.

    ``descriptor (d,)``: what tells which networks it is like; empty where it is not known.
    """

    classes: Array
    whole: Array
    descriptor: Array = field(default_factory=lambda: np.zeros(0))


def relative(classes: Array) -> Array:
    """Evidence of classes ``(K, tests)`` relative to the other classes, ``(K, 2 tests)``: robust z, and rank in [0, 1].

    The z is the distance from the median in units of the median distance (times 1.4826), bent to stay below 20.
    """
    x = np.nan_to_num(np.asarray(classes, dtype=np.float64), posinf=1e12, neginf=-1e12)
    z = deviations(x)
    above = (x[:, None] > x[None]).sum(1) + 0.5 * ((x[:, None] == x[None]).sum(1) - 1)
    found: Array = np.concatenate((_FAR * np.tanh(z / _FAR), above / max(len(x) - 1, 1)), axis=1)
    return found


def standing(classes: Array) -> Array:
    """What stands out among the classes of a network: of each z the largest, second, smallest, ``(3 tests,)``."""
    z = np.sort(relative(classes)[:, : classes.shape[1]], 0)
    return np.concatenate((z[-1], z[-2] if len(z) > 1 else z[-1], z[0]))


@dataclass(frozen=True, eq=False)
class Pair:
    """A forest that judges classes, and one that judges networks by what the first says and by their evidence."""

    classes: Forest
    network: Forest

    @classmethod
    def fit(
        cls, facts: Sequence[Facts], told: Sequence[Array], targets: Sequence[Sequence[int]],
        poisoned: Sequence[bool], weights: Sequence[float], seed: int,
    ) -> Pair:  # fmt: skip
        """Of networks: what is ``told`` of their classes ``(K, …)``, their targets, whether poisoned, their weight."""
        rows, hits, worth, of = [], [], [], []
        for number, (fact, own, bad, weight) in enumerate(zip(facts, targets, poisoned, weights, strict=True)):
            if bad and not own:
                continue
            rows.append(told[number])
            hit = np.zeros(len(fact.classes))
            hit[list(own)] = 1
            hits.append(hit)
            # Targets count as much as all other classes together, whichever the number of classes.
            worth.append(weight * np.where(hit > 0, 1.0, 1.0 / len(hit)))
            of += [number] * len(hit)
        x, y, w = np.concatenate(rows), np.concatenate(hits), np.concatenate(worth)
        forest = Forest.fit(x, y[:, None], weight=w, seed=seed, **_CLASS_TREES)  # type: ignore[arg-type]
        # What the first forest says of its own training classes is too good: the second is told out-of-bag figures.
        inner = _inner(forest, x, y, w, np.asarray(of), seed)
        said = {n: inner[np.asarray(of) == n] for n in sorted(set(of))}
        table = np.stack([
            _row(f, told[n], said[n] if n in said else forest(told[n])[:, 0]) for n, f in enumerate(facts)
        ])  # fmt: skip
        truth = np.asarray(poisoned, dtype=np.float64)[:, None]
        network = Forest.fit(table, truth, weight=np.asarray(weights), seed=seed, **_TREES)  # type: ignore[arg-type]
        return cls(forest, network)

    def __call__(self, fact: Facts, told: Array) -> tuple[float, Array]:
        """Log odds of a backdoor, and of each class being the target ``(K,)``."""
        said = self.classes(told)[:, 0]
        return float(_log_odds(self.network(_row(fact, told, said)[None])[:, 0])[0]), _log_odds(said)


@dataclass(frozen=True, eq=False)
class EvidenceHead:
    """Two pairs of forests; ``names`` of the tests of classes and of statistics of whole networks, in their order.

    ``alone`` reads a network by itself; ``beside`` reads one that is like some of the ``references``, the clean
    networks it was trained on, with what is usual there. None where they were too few or have no descriptors.
    """

    names: tuple[tuple[str, ...], tuple[str, ...]]
    alone: Pair
    beside: Pair | None = None
    references: References | None = None

    @classmethod
    def fit(
        cls, names: tuple[tuple[str, ...], tuple[str, ...]], facts: Sequence[Facts],
        targets: Sequence[Sequence[int]], poisoned: Sequence[bool], weights: Sequence[float], seed: int = 0,
        groups: Sequence[str] = (),
    ) -> EvidenceHead:  # fmt: skip
        """Of networks, the targets of each, whether it is poisoned (all-to-all has no target), and its weight.

        Networks of one of the ``groups`` are related and no references for each other; none are where not given.
        """
        if len(set(map(bool, poisoned))) < 2:
            raise MetanetError("the evidence head needs networks with and without a backdoor")
        group = list(groups) or [str(n) for n in range(len(facts))]
        usable = [n for n, f in enumerate(facts) if not poisoned[n] and len(f.descriptor)]
        alone = Pair.fit(facts, [relative(f.classes) for f in facts], targets, poisoned, weights, seed)
        if len(usable) < FEWEST:
            return cls(names, alone)
        among = np.array([group[n] for n in usable])
        references = References.fit(
            [facts[n].descriptor for n in usable], [facts[n].classes for n in usable], among.tolist()
        )
        told = [_told(f, references, np.flatnonzero(among == group[n]).tolist()) for n, f in enumerate(facts)]
        return cls(names, alone, Pair.fit(facts, told, targets, poisoned, weights, seed), references)

    def __call__(self, facts: Sequence[Facts]) -> tuple[Array, list[Array]]:
        """Log odds of a backdoor ``(networks,)``, and of each class being the target ``(K,)``."""
        odds, classes = [], []
        for fact in facts:
            known = self.references
            if self.beside is None or known is None or not len(known.near(fact.descriptor, len(fact.classes))):
                whole, each = self.alone(fact, relative(fact.classes))
            else:
                whole, each = self.beside(fact, _told(fact, known))
            odds.append(whole)
            classes.append(each)
        return np.array(odds), classes

    def tensors(self) -> dict[str, NDArray[np.generic]]:
        """What ``of`` takes."""
        parts: dict[str, Forest | References] = {
            "alone.classes": self.alone.classes, "alone.network": self.alone.network
        }  # fmt: skip
        if self.beside is not None and self.references is not None:
            parts |= {"beside.classes": self.beside.classes, "beside.network": self.beside.network}
            parts["references"] = self.references
        return {f"{k}.{n}": t for k, part in parts.items() for n, t in part.tensors().items()}

    @classmethod
    def of(
        cls, names: tuple[tuple[str, ...], tuple[str, ...]], tensors: Mapping[str, NDArray[np.generic]]
    ) -> EvidenceHead:
        """What ``tensors`` gave, with the names that it is told beside."""

        def part(prefix: str) -> dict[str, NDArray[np.generic]]:
            return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}

        pairs = [
            Pair(Forest.of(part(f"{name}.classes.")), Forest.of(part(f"{name}.network.")))
            for name in ("alone", "beside") if part(f"{name}.classes.")
        ]  # fmt: skip
        if len(pairs) < 2:
            return cls(names, pairs[0])
        return cls(names, pairs[0], pairs[1], References.of(part("references.")))


def _told(fact: Facts, references: References | None, leave: Sequence[int] = ()) -> Array:
    """What the first forest sees of classes: ``(K, 2 tests)``, or ``(K, 4 tests)`` where there are references."""
    own = relative(fact.classes)
    if references is None:
        return own
    return np.concatenate((own, references.judge(fact.descriptor, fact.classes, leave)), axis=1)


def _row(fact: Facts, told: Array, said: Array) -> Array:
    """What the second forest sees of a network."""
    order = np.sort(_log_odds(said))[::-1]
    mean = float(np.mean(order))
    whole = np.nan_to_num(fact.whole, nan=-1.0, posinf=1e6, neginf=-1e6)
    suspect = [order[0], order[0] - order[min(1, len(order) - 1)], mean]
    found = np.concatenate((standing(fact.classes), whole, suspect))
    if told.shape[1] > 2 * fact.classes.shape[1]:
        # Against the networks it is like: what stands out most and next, and the class that is suspected.
        top = np.sort(told[:, 2 * fact.classes.shape[1] :], 0)
        found = np.concatenate((found, top[-1], top[-2] if len(top) > 1 else top[-1], told[int(np.argmax(said))]))
    return found


def _inner(forest: Forest, x: Array, y: Array, w: Array, of: NDArray[np.int64], seed: int) -> Array:
    """Answers about training classes by forests that were not shown their networks (four parts)."""
    part = np.random.default_rng(seed).permutation(int(of.max()) + 1)[of] % 4
    found = forest(x)[:, 0]
    for k in range(4):
        rest, own = part != k, part == k
        if own.any() and y[rest].any():
            inner = Forest.fit(x[rest], y[rest][:, None], weight=w[rest], seed=seed + k, **_CLASS_TREES)  # type: ignore[arg-type]
            found[own] = inner(x[own])[:, 0]
    return found


def _log_odds(p: Array) -> Array:
    q = np.clip(p, 0.005, 0.995)
    found: Array = np.log(q) - np.log1p(-q)
    return found


__all__ = ["EvidenceHead", "Facts", "Pair", "relative", "standing"]
