"""p-values: fair where the assumptions hold, and calibrated by clean networks where they do not."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import pytest

from weightspace.backdoor.null import (
    Array,
    cauchy,
    class_p_values,
    largest_p_value,
    null_from,
    outlier,
    standing,
    tail,
)
from weightspace.backdoor.responses import columns
from weightspace.errors import WeightspaceError

NAMES = ("noise_mean", "margin", "universal", "row_sum", "bias")


@dataclass(frozen=True)
class Drawn:
    """A network that only exists as numbers: classes that differ by nature, and a noise of its own."""

    values: Array
    names: tuple[str, ...] = NAMES
    missing: tuple[str, ...] = ()
    whole: dict[str, float] = field(default_factory=dict)
    responses: Array = field(default_factory=lambda: np.zeros((0, 0)))


def drawn(rng: np.random.Generator, lift: float = 0.0) -> Drawn:
    nature = np.linspace(-2, 2, 10)[:, None] * np.array([1.0, 1.0, 1.0, 0.0, 0.0])
    values = nature + 0.5 * rng.standard_normal((10, len(NAMES)))
    values[4] += lift
    return Drawn(values, whole={"channel_isolation": float(rng.gamma(4.0))})


@pytest.mark.parametrize("classes", [3, 5, 10, 43])
def test_p_values_of_normal_classes_are_fair(classes: int) -> None:
    x = np.random.default_rng(0).standard_normal((classes, 8000))
    p = largest_p_value(class_p_values(x))
    for alpha in (0.01, 0.05, 0.2):
        assert 0.7 * alpha < np.mean(p <= alpha) < 1.05 * alpha + 0.003


def test_one_extreme_class_does_not_hide_itself() -> None:
    x = np.array([0.1, -0.2, 0.0, 0.3, -0.1, 50.0])
    assert outlier(x).argmax() == 5
    assert outlier(x)[5] > 100
    assert largest_p_value(class_p_values(x)) < 1e-6


def test_numbers_of_any_size_stay_finite() -> None:
    for scale in (0.0, 1e-300, 1e300):
        x = scale * np.array([[1.0], [2.0], [4.0], [3.0]])
        assert np.isfinite(outlier(x)).all()
        assert np.isfinite(standing(x)).all()
    assert outlier(np.ones((2, 3))).shape == (2, 3)


def test_cauchy_of_the_same_p_value_is_it() -> None:
    for p in (1e-12, 1e-4, 0.05, 0.7):
        assert cauchy(np.full(5, p)) == pytest.approx(p, rel=1e-6)


def test_tail_holds_for_what_it_assumes() -> None:
    rng = np.random.default_rng(0)
    for n in (8, 20, 60):
        p = np.array([tail(r[:-1], float(r[-1])) for r in rng.gumbel(size=(600, n + 1))])
        assert np.mean(p <= 0.05) == pytest.approx(0.05, abs=0.03)


def test_a_null_flags_as_many_clean_networks_as_it_says() -> None:
    rng = np.random.default_rng(1)
    p = []
    for _ in range(10):
        null = null_from([drawn(rng) for _ in range(24)])
        p += [null.judge(drawn(rng)).p_value for _ in range(25)]
    assert np.mean(np.array(p) <= 0.05) == pytest.approx(0.05, abs=0.03)


def test_a_null_sees_a_class_that_is_not_extreme_but_unlike_itself() -> None:
    rng = np.random.default_rng(2)
    null = null_from([drawn(rng) for _ in range(24)])
    found = drawn(rng, lift=2.0)
    assert outlier(found.values[:, 0]).argmax() != 4
    judged = null.judge(found)
    assert judged.target[0] == 4
    assert judged.p_value < 0.01


def test_other_families_are_refused() -> None:
    rng = np.random.default_rng(3)
    clean = [drawn(rng) for _ in range(10)]
    with pytest.raises(WeightspaceError, match="at least 8"):
        null_from(clean[:5])
    with pytest.raises(WeightspaceError, match="one family"):
        null_from([*clean, Drawn(clean[0].values[:7], whole=clean[0].whole)])
    null = null_from(clean)
    with pytest.raises(WeightspaceError, match="7 classes"):
        null.judge(Drawn(clean[0].values[:7], whole=clean[0].whole))
    with pytest.raises(WeightspaceError, match="margin"):
        null.judge(Drawn(clean[0].values, missing=("margin",), whole=clean[0].whole))


def test_what_changed_of_a_base_counts_by_itself() -> None:
    rng = np.random.default_rng(4)
    names = (*NAMES, "change_sum", "change_norm", "change_leading")

    def fine_tuned(lift: float) -> Drawn:
        network = drawn(rng)
        change = rng.standard_normal((10, 3))
        change[6] += lift
        return Drawn(np.concatenate([network.values, change], 1), names, whole=network.whole | {"change_share": 0.3})

    null = null_from([fine_tuned(0.0) for _ in range(24)])
    judged = null.judge(fine_tuned(6.0))
    assert judged.target[0] == 6
    assert judged.p_value < 0.01


def test_of_two_classes_the_one_that_is_unlike_itself_is_found() -> None:
    rng = np.random.default_rng(5)

    def of_two(lift: float) -> Drawn:
        values = 5 + 0.3 * rng.standard_normal((2, len(NAMES)))
        values[1] += lift
        return Drawn(values, whole={"word_outlier": 4 + float(rng.standard_normal()) + 2 * lift})

    null = null_from([of_two(0.0) for _ in range(24)])
    judged = null.judge(of_two(2.0))
    assert judged.target == (1, 0)
    assert judged.p_value < 0.02


def test_networks_of_one_lineage_are_no_proof_of_each_other() -> None:
    rng = np.random.default_rng(6)

    def twins() -> list[Drawn]:
        one = drawn(rng)
        return [Drawn(one.values + 0.02 * rng.standard_normal(one.values.shape), whole=one.whole) for _ in range(3)]

    alone, grouped = [], []
    for _ in range(25):
        clean = [c for _ in range(10) for c in twins()]
        nulls = null_from(clean), null_from(clean, [i // 3 for i in range(30)])
        for _ in range(10):
            found = drawn(rng)
            for p, null in zip((alone, grouped), nulls, strict=True):
                p.append(null.judge(found).p_value)
    assert np.mean(np.array(grouped) <= 0.05) < 0.09 < np.mean(np.array(alone) <= 0.05)
    with pytest.raises(WeightspaceError, match="3 groups"):
        null_from(clean, [1, 2, 3])


def test_answers_that_no_clean_network_gives_are_told() -> None:
    rng = np.random.default_rng(5)
    usual = rng.normal(size=(6, len(columns())))

    def one(lift: float = 0.0) -> Drawn:
        answers = usual + 0.3 * rng.normal(size=usual.shape)
        answers[2] += lift
        return Drawn(rng.normal(size=(6, len(NAMES))), responses=answers)

    null = null_from([one() for _ in range(16)])
    odd = null.judge(one(2.0))
    assert odd.p_value < 0.01
    assert odd.target[0] == 2
    assert np.mean([null.judge(one()).p_value <= 0.1 for _ in range(40)]) < 0.3
    blind = Drawn(rng.normal(size=(6, len(NAMES))))
    assert "answers" not in null.judge(blind).p_values
