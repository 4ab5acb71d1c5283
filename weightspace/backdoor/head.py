"""The evidence head: what the training-free tests say of every class, weighed by what populations taught.

The evidence of a class is told relative to the other classes of the same network (how far from their median in units
of their spread, at which rank), so that it means the same whatever the architecture, the data or the number of classes,
and relative to the same class of the clean networks that it is most like (``weightspace.backdoor.references``).
One forest judges classes: is this one the target? A second judges networks: by the largest, second largest and smallest
values that classes have in each test, by what the first forest says of the classes, and by the statistics of the whole
network. A third judges networks too, by how large the largest deviations are, whichever test they lie in. Trees only
ask whether a value lies above a threshold, so units need no care.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from weightspace.backdoor.references import FEWEST, References, deviations, within
from weightspace.backdoor.responses import by_group, group_numbers
from weightspace.backdoor.surprise import beyond, families, of_network, rarity, summary, tops
from weightspace.errors import MetanetError
from weightspace.mergeability.forest import Forest

Array = NDArray[np.float64]

_FAR = 20.0
_TREES = {"trees": 150, "leaf": 3, "share": 0.3}
_CLASS_TREES = {"trees": 60, "leaf": 8, "share": 0.25}
_FEW_TREES = {"trees": 100, "leaf": 8, "share": 0.6}
_KNOWN = 0.75
"""Weight of the forest that knows which tests attacks show in, beside the one that does not."""


@dataclass(frozen=True, eq=False)
class Facts:
    """Evidence of one network as numbers: ``classes (K, tests)``, ``whole (statistics,)``; not finite is unknown.

    ``descriptor (d,)``: what tells which networks it is like; empty where it is not known. ``responses (K, changes)``:
    answers to changed pictures, without columns where there are none;
    ``frame``: what it is built of (``scanning.frame_of``), 0 where that is not known.
    """

    classes: Array
    whole: Array
    descriptor: Array = field(default_factory=lambda: np.zeros(0))
    responses: Array = field(default_factory=lambda: np.zeros((0, 0)))
    frame: int = 0


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
class Told:
    """What forests see of a network: of each class ``(K, features)``, of the whole ``(features,)``, and the ``summary``
    of how surprising it is (``weightspace.backdoor.surprise``); ``tests`` come first among the features of a class,
    twice."""

    classes: Array
    whole: Array
    summary: Array
    tests: int


@dataclass(frozen=True, eq=False)
class Pair:
    """A forest that judges classes, one that judges networks by what the first says and by their evidence, and one
    that judges them by how surprising they are alone."""

    classes: Forest
    network: Forest
    surprise: Forest

    @classmethod
    def fit(
        cls, told: Sequence[Told], targets: Sequence[Sequence[int]], poisoned: Sequence[bool],
        weights: Sequence[float], seed: int,
    ) -> Pair:  # fmt: skip
        """Of networks: what is told of them, their targets, whether poisoned, their weight."""
        rows, hits, worth, of = [], [], [], []
        for number, (one, own, bad, weight) in enumerate(zip(told, targets, poisoned, weights, strict=True)):
            if bad and not own:
                continue
            rows.append(one.classes)
            hit = np.zeros(len(one.classes))
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
        table = np.stack([_row(t, said[n] if n in said else forest(t.classes)[:, 0]) for n, t in enumerate(told)])
        truth, share = np.asarray(poisoned, dtype=np.float64)[:, None], np.asarray(weights)
        network = Forest.fit(table, truth, weight=share, seed=seed, **_TREES)  # type: ignore[arg-type]
        summaries = np.stack([t.summary for t in told])
        surprise = Forest.fit(summaries, truth, weight=share, seed=seed, **_FEW_TREES)  # type: ignore[arg-type]
        return cls(forest, network, surprise)

    def __call__(self, told: Told) -> tuple[float, Array]:
        """Log odds of a backdoor, and of each class being the target ``(K,)``."""
        said = self.classes(told.classes)[:, 0]
        known = _log_odds(self.network(_row(told, said)[None])[:, 0])[0]
        new = _log_odds(self.surprise(told.summary[None])[:, 0])[0]
        return float(_KNOWN * known + (1 - _KNOWN) * new), _log_odds(said)


@dataclass(frozen=True, eq=False)
class EvidenceHead:
    """Two ``Pair``s of forests; ``names`` of the tests of classes and of statistics of whole networks, in their order.

    ``alone`` reads a network by itself; ``beside`` reads one that is like some of the ``references``, the clean
    networks it was trained on, with what is usual there: ``usual (references, …)`` is what each of them shows among the
    others. None where they were too few or have no descriptors.
    """

    names: tuple[tuple[str, ...], tuple[str, ...]]
    alone: Pair
    beside: Pair | None = None
    references: References | None = None
    usual: Array = field(default_factory=lambda: np.zeros((0, 0)))

    @classmethod
    def fit(
        cls, names: tuple[tuple[str, ...], tuple[str, ...]], facts: Sequence[Facts],
        targets: Sequence[Sequence[int]], poisoned: Sequence[bool], weights: Sequence[float], seed: int = 0,
        groups: Sequence[str] = (),
    ) -> EvidenceHead:  # fmt: skip
        """Of networks, the targets of each, whether it is poisoned (all-to-all has no target), and its weight.

        Networks of one of the ``groups`` are related and no references for each other; none are where not given.
        Those that are built as only clean or only poisoned ones are serve as references at most: they would teach that
        everything built like that is.
        """
        if len(set(map(bool, poisoned))) < 2:
            raise MetanetError("the evidence head needs networks with and without a backdoor")
        kinds = {f.frame: {bool(b) for g, b in zip(facts, poisoned, strict=True) if g.frame == f.frame} for f in facts}
        telling = [n for n, f in enumerate(facts) if len(kinds[f.frame]) > 1] or list(range(len(facts)))

        def pair(told: Sequence[Told]) -> Pair:
            return Pair.fit(
                [told[n] for n in telling], [targets[n] for n in telling], [poisoned[n] for n in telling],
                [weights[n] for n in telling], seed,
            )  # fmt: skip

        group = list(groups) or [str(n) for n in range(len(facts))]
        usable = [n for n, f in enumerate(facts) if not poisoned[n] and len(f.descriptor)]
        if len(usable) < FEWEST:
            return cls(names, pair([_alone(names, f, None) for f in facts]))
        among = np.array([group[n] for n in usable])
        references = References.fit(
            [facts[n].descriptor for n in usable], [facts[n].classes for n in usable], among.tolist(),
            [facts[n].responses for n in usable], [facts[n].whole for n in usable], [facts[n].frame for n in usable],
        )  # fmt: skip
        related = [np.flatnonzero(among == group[n]).tolist() for n in range(len(facts))]
        near = [_near(f, references, r) for f, r in zip(facts, related, strict=True)]
        usual = np.stack([tops(_beside(names, facts[n], references, near[n])[1]) for n in usable])
        alone = pair([_alone(names, f, references) for f in facts])
        told = [_told(names, f, references, usual, n) for f, n in zip(facts, near, strict=True)]
        return cls(names, alone, pair(told), references, usual)

    def __call__(self, facts: Sequence[Facts]) -> tuple[Array, list[Array]]:
        """Log odds of a backdoor ``(networks,)``, and of each class being the target ``(K,)``."""
        odds, classes = [], []
        for fact in facts:
            known = self.references
            near = _near(fact, known) if known is not None else np.zeros(0, dtype=np.int64)
            if self.beside is None or known is None or not len(near):
                whole, each = self.alone(_alone(self.names, fact, known))
            else:
                whole, each = self.beside(_told(self.names, fact, known, self.usual, near))
            odds.append(whole)
            classes.append(each)
        return np.array(odds), classes

    def tensors(self) -> dict[str, NDArray[np.generic]]:
        """What ``of`` takes."""
        pairs = {"alone": self.alone} | ({} if self.beside is None else {"beside": self.beside})
        parts: dict[str, Forest | References] = {
            f"{name}.{f}": getattr(pair, f) for name, pair in pairs.items() for f in ("classes", "network", "surprise")
        }  # fmt: skip
        if self.references is not None:
            parts["references"] = self.references
        found = {f"{k}.{n}": t for k, part in parts.items() for n, t in part.tensors().items()}
        return found | {"usual": self.usual.astype(np.float32)}

    @classmethod
    def of(
        cls, names: tuple[tuple[str, ...], tuple[str, ...]], tensors: Mapping[str, NDArray[np.generic]]
    ) -> EvidenceHead:
        """What ``tensors`` gave, with the names that it is told beside."""

        def part(prefix: str) -> dict[str, NDArray[np.generic]]:
            return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}

        pairs = [
            Pair(*(Forest.of(part(f"{name}.{f}.")) for f in ("classes", "network", "surprise")))
            for name in ("alone", "beside") if part(f"{name}.classes.")
        ]  # fmt: skip
        if len(pairs) < 2:
            return cls(names, pairs[0])
        usual = np.asarray(tensors["usual"], dtype=np.float64)
        return cls(names, pairs[0], pairs[1], References.of(part("references.")), usual)


def _groups(responses: Array) -> tuple[NDArray[np.int64], tuple[str, ...]]:
    """Of every change the number of its group, and the groups; no numbers where there are no responses."""
    numbers, groups = group_numbers()
    return (numbers if responses.shape[1] else numbers[:0]), groups


def _near(fact: Facts, references: References, leave: Sequence[int] = ()) -> NDArray[np.int64]:
    return references.near(fact.descriptor, len(fact.classes), leave, frame=fact.frame)


def _among(fact: Facts) -> Array:
    """Of each group of responses the largest deviation from the other classes, and the mean, ``(K, 2 groups)``."""
    numbers, groups = _groups(fact.responses)
    if len(numbers) and len(numbers) == fact.responses.shape[1] and len(fact.classes) > 2:
        return by_group(within(fact.responses), numbers)
    return np.zeros((len(fact.classes), 2 * len(groups)))


def _alone(names: tuple[tuple[str, ...], tuple[str, ...]], fact: Facts, references: References | None) -> Told:
    """A network by itself; statistics of the whole, which mean the same in all networks, are held beside all."""
    numbers = np.zeros(len(fact.whole))
    if references is not None:
        numbers = references.numbers(np.zeros(0, dtype=np.int64), fact.whole)
    surprise = of_network(names[1], numbers)
    classes = np.concatenate((relative(fact.classes), _among(fact)), axis=1)
    told = summary(surprise, rarity(np.zeros(0), np.zeros((0, 0)), surprise))
    return Told(classes, np.concatenate((_whole(fact), surprise)), told, fact.classes.shape[1])


def _beside(
    names: tuple[tuple[str, ...], tuple[str, ...]], fact: Facts, references: References, near: NDArray[np.int64]
) -> tuple[Array, Array]:
    """What is told of classes beside clean networks ``(K, …)``, and of the families of tests ``(K, families)``."""
    numbers, groups = _groups(fact.responses)
    classes, responses, order = fact.classes, fact.responses, np.arange(len(fact.classes))
    if len(responses):
        order = references.order(near, responses, fact.frame)
        back = np.argsort(order)
        classes, responses = classes[back], responses[back]
    judged = references.judge(near, classes)[order]
    answers = references.answers(near, responses, numbers)
    answers = answers[order] if answers.shape[1] else np.zeros((len(judged), 2 * len(groups)))
    return np.concatenate((judged, answers), axis=1), families(names[0], judged, answers, groups)


def _told(
    names: tuple[tuple[str, ...], tuple[str, ...]], fact: Facts, references: References, usual: Array,
    near: NDArray[np.int64],
) -> Told:  # fmt: skip
    """A network beside the clean ones that it is like, ``near``."""
    beside, found = _beside(names, fact, references, near)
    numbers = references.numbers(near, fact.whole)
    most = tops(found)
    over = beyond(most, usual[near]) if len(near) else np.zeros(usual.shape[1])
    shared = of_network(names[1], numbers)
    surprise = np.concatenate((over, shared))
    in_order = summary(surprise, rarity(most, usual[near], shared))
    classes = np.concatenate((relative(fact.classes), _among(fact), beside), axis=1)
    return Told(classes, np.concatenate((_whole(fact), numbers, surprise, in_order)), in_order, fact.classes.shape[1])


def _whole(fact: Facts) -> Array:
    found = np.nan_to_num(fact.whole, nan=-1.0, posinf=1e6, neginf=-1e6)
    return np.concatenate((standing(fact.classes), found))


def _row(told: Told, said: Array) -> Array:
    """What the second forest sees of a network: what stands out most and next, and the class that is suspected."""
    order = np.sort(_log_odds(said))[::-1]
    suspect = [order[0], order[0] - order[min(1, len(order) - 1)], float(np.mean(order))]
    top = np.sort(told.classes[:, 2 * told.tests :], 0)
    second = top[-2] if len(top) > 1 else top[-1]
    return np.concatenate((told.whole, suspect, top[-1], second, told.classes[int(np.argmax(said))]))


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


__all__ = ["EvidenceHead", "Facts", "Pair", "Told", "relative", "standing"]
