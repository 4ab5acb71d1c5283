"""What is usual for a class among the clean networks that a network is like."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from weightspace.backdoor.head import EvidenceHead, Facts
from weightspace.backdoor.references import FEWEST, References, bounded

NAMES = (("first", "second"), ("whole",))
CLASSES = 6


def clean(rng: np.random.Generator, family: int) -> tuple[np.ndarray, np.ndarray]:
    """Descriptor and evidence of a clean network: in each family other classes are high by nature."""
    usual = np.linspace(0, 5, CLASSES)[:, None] * (1 if family else -1) * np.array([1.0, 0.5])
    return rng.normal(size=20) + 6 * family, usual + 0.1 * rng.normal(size=(CLASSES, 2))


def judged(references: References, descriptor: np.ndarray, values: np.ndarray, leave: Sequence[int] = ()) -> np.ndarray:
    return references.judge(references.near(descriptor, len(values), leave), values)


def fitted(seed: int = 0, count: int = 40) -> References:
    rng = np.random.default_rng(seed)
    pairs = [clean(rng, n % 2) for n in range(count)]
    return References.fit([d for d, _ in pairs], [v for _, v in pairs])


@pytest.mark.parametrize("family", [0, 1])
def test_a_class_is_compared_with_the_same_class_of_its_like(family: int) -> None:
    rng = np.random.default_rng(9)
    descriptor, values = clean(rng, family)
    target = CLASSES - 1 if family == 0 else 0  # lowest by nature: raised, it is still far from the highest
    values[target] += 1.5
    found = judged(fitted(), descriptor, values)
    assert found.shape == (CLASSES, 4)
    assert found[:, 2].argmax() == target
    assert found[target, 2] > 8
    assert np.abs(np.delete(found[:, 2], target)).max() < 5
    assert values[:, 0].argmax() != target


def test_relatives_are_not_asked_and_too_few_say_nothing() -> None:
    references = fitted(count=2 * FEWEST)
    descriptor, values = clean(np.random.default_rng(3), 0)
    assert judged(references, descriptor, values).any()
    assert not judged(references, descriptor, values, leave=range(FEWEST + 1)).any()
    assert not judged(references, descriptor, values[:4]).any(), "no network has four classes"
    assert not judged(references, np.zeros(0), values).any()


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 100), st.sampled_from([np.inf, -np.inf, np.nan, 1e300, 0.0]))
def test_nothing_that_is_not_finite_comes_out(seed: int, strange: float) -> None:
    descriptor, values = clean(np.random.default_rng(seed), seed % 2)
    values[seed % CLASSES, 1] = strange
    assert np.isfinite(judged(fitted(), descriptor, values)).all()
    assert np.isfinite(bounded(values)).all()


def test_round_trip() -> None:
    references = fitted()
    again = References.of(references.tensors())
    descriptor, values = clean(np.random.default_rng(5), 1)
    assert np.allclose(judged(again, descriptor, values), judged(references, descriptor, values), atol=0.2)


def test_a_head_learns_from_them_what_it_could_not_know_otherwise() -> None:
    rng = np.random.default_rng(1)

    def some(count: int) -> tuple[list[Facts], list[tuple[int, ...]], list[bool]]:
        facts, targets, bad = [], [], []
        for n in range(count):
            descriptor, values = clean(rng, n % 2)
            poisoned = n % 4 >= 2
            target = int(rng.integers(CLASSES))
            if poisoned:
                values[target] += 0.4  # less than classes differ by nature
            facts.append(Facts(values, np.zeros(1), descriptor))
            targets.append((target,) if poisoned else ())
            bad.append(poisoned)
        return facts, targets, bad

    facts, targets, bad = some(120)
    asked, aimed, truth = some(60)
    blind = [Facts(f.classes, f.whole) for f in facts]
    with_, without = (EvidenceHead.fit(NAMES, f, targets, bad, [1.0] * len(f)) for f in (facts, blind))
    assert without.references is None
    odds, classes = with_(asked)
    assert np.mean((odds > 0) == np.array(truth)) > 0.85

    def first(said: list[np.ndarray]) -> float:
        return float(np.mean([int(c.argmax()) in t for c, t in zip(said, aimed, strict=True) if t]))

    _, blindly = without([Facts(f.classes, f.whole) for f in asked])
    assert first(classes) > 0.9
    assert first(classes) > first(blindly) + 0.2
    again = EvidenceHead.of(NAMES, with_.tensors())
    assert np.allclose(again(asked)[0], odds, atol=0.5)


def test_a_network_unlike_all_of_them_is_read_by_itself() -> None:
    references = fitted()
    rng = np.random.default_rng(4)
    descriptor, values = clean(rng, 1)
    assert len(references.near(descriptor, CLASSES)) > 0
    far = descriptor + 60 * rng.normal(size=len(descriptor))
    assert not len(references.near(far, CLASSES))
    assert not judged(references, far, values).any()


def test_relatives_do_not_make_the_circle_narrow() -> None:
    """Copies of one network are no neighbours of each other, so others are not called strangers for their sake."""
    rng = np.random.default_rng(2)
    pairs = [clean(rng, 0) for _ in range(30)]
    copies = [(pairs[0][0] + 1e-6 * rng.normal(size=20), pairs[0][1]) for _ in range(30)]
    groups = [str(n) for n in range(30)] + ["0"] * 30
    references = References.fit([d for d, _ in pairs + copies], [v for _, v in pairs + copies], groups)
    descriptor, _ = clean(rng, 0)
    assert len(references.near(descriptor, CLASSES, leave=range(30, 60))) > 0
