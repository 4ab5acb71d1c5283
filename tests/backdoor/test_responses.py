"""Made-up pictures, how they are answered when changed, and squares that send them to a class."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import weightspace as ws
from weightspace.backdoor import pictures as pictures_module
from weightspace.backdoor.evidence import evidence
from weightspace.backdoor.pictures import DRAWN, EACH, LOUDEST, shown
from weightspace.backdoor.references import FEWEST, References
from weightspace.backdoor.responses import battery, columns, responses
from weightspace.backdoor.stamps import BASE, HELD, STAMP_NUMBERS, STAMP_TESTS, base_of, stamp_tests
from weightspace.backdoor.surprise import SUMMARY, beyond, families, rarity, summary, tops
from weightspace.pictures import KINDS, pictures

SHAPE = (1, 12, 12)
CLASSES = 5
Logits = Callable[[Tensor], Tensor]

NONE = np.zeros(0, dtype=np.int64)


def linear(seed: int = 0, wave: float = 0.0, square: float = 0.0) -> Logits:
    """Logits of random patterns, of which class 3 also answers a wave of four periods, or a checked square."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(CLASSES, 144, generator=generator) / 12
    along = torch.sin(2 * torch.pi * 4 * torch.arange(12) / 12).expand(12, 12).flatten() / 12
    mark = torch.where((torch.arange(3)[:, None] + torch.arange(3)) % 2 > 0, 1.0, -1.0)

    def logits(x: Tensor) -> Tensor:
        z = x.flatten(1) @ weight.T
        extra = wave * (x.flatten(1) @ along)
        here = (x[:, 0, 6:9, 2:5] * mark).mean((1, 2))
        extra = extra + square * torch.sigmoid(6 * (here - 1))
        return z + extra[:, None] * (torch.arange(CLASSES) == 3)

    return logits


@pytest.mark.parametrize("kind", KINDS)
def test_pictures_are_the_same_each_time_and_standardised(kind: str) -> None:
    x = pictures(kind, 6, (3, 10, 14), seed=3)
    assert x.shape == (6, 3, 10, 14)
    assert torch.allclose(x.mean((1, 2, 3)), torch.zeros(6), atol=1e-5)
    assert torch.allclose(x.std((1, 2, 3)), torch.ones(6), atol=1e-4)
    pictures.cache_clear()
    assert torch.equal(x, pictures(kind, 6, (3, 10, 14), seed=3))
    assert not torch.equal(x[0], x[1])


def test_every_shape_has_the_same_columns() -> None:
    for shape in ((1, 8, 8), (3, 16, 11)):
        found = responses(lambda x: x.flatten(1)[:, :4], shape, 4)
        assert found.shape == (4, len(columns()))
        assert bool(found.isfinite().all())
    changed, groups = battery("strokes", SHAPE)
    assert len(changed) == len(groups)
    assert groups[0] == "plain"
    assert torch.equal(changed[0], pictures("strokes", len(changed[0]), SHAPE, seed=1))


@settings(max_examples=5, deadline=None)
@given(st.permutations(range(CLASSES)))
def test_responses_and_squares_follow_a_permutation_of_the_classes(order: list[int]) -> None:
    logits = linear(2, wave=3)
    a, b = (responses(f, SHAPE, CLASSES) for f in (logits, lambda x: logits(x)[:, order]))
    assert torch.allclose(a[order], b, atol=1e-4)
    targets = torch.arange(CLASSES)
    c, d = (stamp_tests(f, SHAPE, CLASSES, targets)[0] for f in (logits, lambda x: logits(x)[:, order]))
    for name in STAMP_TESTS:
        assert torch.allclose(c[name][order], d[name], atol=1e-3), name


def test_a_class_that_answers_waves_stands_out_beside_clean_networks() -> None:
    groups = list(dict.fromkeys(columns()))
    numbers = np.array([groups.index(c) for c in columns()])
    clean = [responses(linear(seed), SHAPE, CLASSES).numpy() for seed in range(12)]
    at = np.zeros(20)
    rng = np.random.default_rng(0)
    near = [at + 0.1 * rng.normal(size=20) for _ in clean]
    references = References.fit(near, [np.zeros((CLASSES, 1))] * 12, None, clean, frames=[7] * 12)
    waves = groups.index("waves strokes margin")

    def judged(logits: Logits) -> np.ndarray:
        near = references.near(at, CLASSES, frame=7)
        return references.answers(near, responses(logits, SHAPE, CLASSES).numpy(), numbers)

    odd, usual = judged(linear(99, wave=12)), judged(linear(99))
    assert odd[:, waves].argmax() == 3
    assert odd[3, waves] > 2 * usual[:, waves].max()
    again = References.of(references.tensors())
    told = again.answers(
        again.near(at, CLASSES, frame=7), responses(linear(99, wave=12), SHAPE, CLASSES).numpy(), numbers
    )
    assert np.allclose(told, odd, atol=0.3)
    assert not len(references.near(at + 100, CLASSES, frame=7)), "like none of them"
    assert not references.answers(NONE, clean[0], numbers).any()


def test_classes_with_other_numbers_are_put_in_order() -> None:
    rng = np.random.default_rng(3)
    usual = rng.normal(size=(6, 40))
    clean = [usual + 0.3 * rng.normal(size=usual.shape) for _ in range(12)]
    near = [0.1 * rng.normal(size=20) for _ in clean]
    references = References.fit(near, [np.zeros((6, 1))] * 12, None, clean, frames=[7] * 12)
    own = usual + 0.3 * rng.normal(size=usual.shape)
    own[4] += 3  # one class is odd: no reason to doubt the others' numbers
    at = np.zeros(20)
    beside = references.near(at, 6, frame=7)
    assert references.order(beside, own, frame=7).tolist() == list(range(6))
    shuffled = np.array([2, 0, 1, 5, 3, 4])
    assert references.order(beside, own[shuffled], frame=7).tolist() == shuffled.tolist()
    assert references.order(NONE, own[shuffled], frame=7).tolist() == list(range(6)), "like none of them"
    assert references.order(beside, own[shuffled], frame=8).tolist() == list(range(6)), "built otherwise"


def test_those_built_alike_are_asked_alone() -> None:
    rng = np.random.default_rng(1)
    near = [rng.normal(size=20) for _ in range(4 * FEWEST)]
    frames = [1, 2] * (2 * FEWEST)
    references = References.fit(near, [np.zeros((3, 1))] * len(near), frames=frames)
    assert set(references.near(near[0], 3, frame=2) % 2) == {1}
    assert len(set(references.near(near[0], 3, frame=9) % 2)) == 2, "nobody is built like that: all are asked"


def test_a_square_that_leads_to_a_class_is_found() -> None:
    targets = torch.arange(CLASSES)
    found, numbers = stamp_tests(linear(4, square=15), SHAPE, CLASSES, targets)
    without, _ = stamp_tests(linear(4), SHAPE, CLASSES, targets)
    assert set(found) == set(STAMP_TESTS)
    assert set(numbers) == set(STAMP_NUMBERS)
    for kind in KINDS:
        held = found[f"stamp_held_{kind}"]
        assert int(held.argmax()) == 3
        assert held[3] > 1.5 * held[torch.arange(CLASSES) != 3].max()
        assert held[3] > 2 * without[f"stamp_held_{kind}"][3]
        assert 0 <= numbers[f"away_spread_{kind}"] <= numbers[f"away_{kind}"] <= 1


def test_inputs_to_search_on_are_of_many_classes() -> None:
    logits = linear(5)
    chosen = base_of(logits, pictures("leaves", 96, SHAPE, seed=2))
    assert len(chosen) == BASE + HELD
    counts = torch.bincount(logits(chosen[:CLASSES]).argmax(1), minlength=CLASSES)
    assert int(counts.max()) == 1


def test_large_networks_are_not_put_to_it(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 12), nn.ReLU(), nn.Linear(12, 4)).eval()
    wiring = ws.wiring(net, torch.randn(2, 1, 8, 8))
    tensors = dict(net.state_dict())
    found = evidence(wiring, tensors)
    assert found.responses.shape == (4, len(columns()))
    assert not set(STAMP_TESTS) & set(found.missing)
    monkeypatch.setattr(pictures_module, "LARGEST", 10)
    less = evidence(wiring, tensors)
    assert less.responses.shape == (4, 0)
    assert set(STAMP_TESTS) <= set(less.missing)
    assert less.p_value == found.p_value


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 100))
def test_a_summary_does_not_say_which_family_stood_out(seed: int) -> None:
    rng = np.random.default_rng(seed)
    x = 3 * rng.normal(size=9)
    assert summary(x, 1.0).shape == (SUMMARY,)
    assert np.array_equal(summary(x, 1.0), summary(rng.permutation(x), 1.0))
    assert np.isfinite(summary(np.zeros(0), 0.0)).all()
    usual, order = rng.normal(size=(20, 9)), rng.permutation(9)
    assert np.isclose(rarity(x, usual, np.zeros(0)), rarity(x[order], usual[:, order], np.zeros(0)))
    assert rarity(x + 8, usual, np.zeros(0)) > rarity(usual[0], usual, np.zeros(0))
    assert rarity(np.zeros(0), np.zeros((0, 0)), np.zeros(0)) == 0


def test_families_tell_how_far_a_class_lies_from_clean_ones() -> None:
    names, groups = ("row_sum", "margin", "word_rise"), ("looks strokes share", "waves strokes share")
    judged, answers = np.zeros((4, 6)), np.zeros((4, 4))
    judged[2, [1, 4]] = 5
    answers[2, 1] = 7
    found = families(names, judged, answers, groups)
    usual = np.stack([tops(families(names, 0.1 * np.random.default_rng(k).normal(size=(4, 6)), answers * 0, groups))
                      for k in range(9)])  # fmt: skip
    told = beyond(tops(found), usual)
    assert set(found.argmax(0)[found.max(0) > 0].tolist()) == {2}
    assert told[found.max(0).argmax()] > 8
    assert np.abs(beyond(tops(found * 0), usual)).max() < 2


def test_what_is_shown_is_sure_and_alike_often_of_every_class() -> None:
    weight = torch.randn(4, 196, generator=torch.Generator().manual_seed(0))

    def logits(x: torch.Tensor) -> torch.Tensor:
        # The last class is never named.
        return torch.cat([x.flatten(1) @ weight.T / 14, torch.full((len(x), 1), -99.0)], 1)

    x = shown(logits, (1, 14, 14), 5)
    said = logits(x).argmax(1)
    assert said.bincount(minlength=5).tolist() == [EACH] * 4 + [0]
    drawn = torch.cat([pictures(kind, 500, (1, 14, 14)) for kind in KINDS])
    assert float(logits(x).softmax(1).amax(1).median()) > float(logits(drawn).softmax(1).amax(1).median())
    assert float(x.abs().max()) <= LOUDEST + 1e-5


def test_what_is_shown_takes_little_room_for_many_classes_and_large_images() -> None:
    many = shown(lambda x: x.flatten(1)[:, :1000] if x[0].numel() >= 1000 else x.flatten(1), (3, 20, 20), 1000)
    assert len(many) <= 2 * DRAWN
    large = shown(lambda x: x.mean((2, 3)), (3, 160, 160), 3)
    assert large.numel() <= 3 * EACH * 3 * 160 * 160
    assert len(large) <= 3 * EACH
