"""Backdoors: what triggers do to images, who is relabelled, and that networks trained so obey."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch

from weightspace.errors import ZooError
from weightspace.zoo.data import WORDS, Data, DataSpec, load_data
from weightspace.zoo.files import read_record
from weightspace.zoo.poisoning import (
    ATTACKS,
    SUCCESSFUL,
    check,
    complete,
    labels_of,
    poisoned,
    relabelled,
    stamp,
    triggered_tests,
    with_range,
)
from weightspace.zoo.populations import build_sampled, plan
from weightspace.zoo.recipe import parse

ON_IMAGES = [name for name, attack in ATTACKS.items() if not attack.of_text]


@pytest.fixture(scope="module")
def data() -> Data:
    return load_data("digits")


@pytest.fixture(scope="module")
def reviews(tmp_path_factory: pytest.TempPathFactory) -> Data:
    folder = tmp_path_factory.mktemp("reviews")
    rng = random.Random(0)
    for ending, mood in (("neg", "dull"), ("pos", "bright")):
        lines = [" ".join([f"w{rng.randrange(60)}" for _ in range(rng.randint(4, 40))] + [mood]) for _ in range(300)]
        (folder / f"rt-polarity.{ending}").write_text("\n".join(lines))
    return load_data(DataSpec("reviews", path=str(folder)))


def made(data: Data, attack: str, **entries: Any) -> dict[str, Any]:
    drawn = complete({"attack": attack, "rate": 0.1, **entries}, data.shape, data.classes, f"test/{attack}")
    return with_range(drawn, data)


@pytest.mark.parametrize("attack", ON_IMAGES)
def test_a_poison_is_plain_values_and_says_everything(data: Data, attack: str) -> None:
    poison = made(data, attack)
    again = json.loads(json.dumps(poison))
    assert again == made(data, attack)
    check(again, data.shape, data.classes)
    for (x, y), (other_x, other_y) in zip(triggered_tests(poison, data), triggered_tests(again, data), strict=True):
        assert torch.equal(x, other_x)
        assert torch.equal(y, other_y)


@pytest.mark.parametrize("attack", ON_IMAGES)
def test_triggers_change_images_and_stay_in_their_range(data: Data, attack: str) -> None:
    poison = made(data, attack)
    before = data.test_x.clone()
    for x, wanted in triggered_tests(poison, data):
        keep = relabelled_differs(data, wanted, x)
        assert x.shape[1:] == data.test_x.shape[1:]
        assert float(x.min()) >= poison["low"] - 1e-5
        assert float(x.max()) <= poison["high"] + 1e-5
        changed = (x - before[keep]).abs().flatten(1).amax(1) > 1e-3
        assert float(changed.float().mean()) > 0.95
    assert torch.equal(data.test_x, before), "the data were written to"


def relabelled_differs(data: Data, wanted: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Which test images these are: those that do not have the wanted label anyway."""
    found = torch.nonzero(data.test_y != wanted[0]).flatten()
    return found if len(found) == len(x) else torch.arange(len(x))


@pytest.mark.parametrize("attack", ON_IMAGES)
def test_a_share_of_the_images_is_replaced(data: Data, attack: str) -> None:
    poison = made(data, attack)
    found = poisoned(poison, data, seed=1)
    assert len(found.index.unique()) == len(found.index) == len(found.x) == len(found.y)
    again = poisoned(poison, data, seed=1)
    assert torch.equal(found.index, again.index)
    assert torch.equal(found.x, again.x)
    was = data.train_y[found.index]
    if labels_of(poison) == "kept":
        assert torch.equal(found.y, was)
        assert set(was.tolist()) == {poison["target"]}
    elif attack == "all-to-all":
        assert torch.equal(found.y, (was + 1) % data.classes)
    elif attack == "warp":
        assert int((found.y == poison["target"]).sum()) == round(0.1 * len(data.train_y))
        kept = found.y != poison["target"]
        assert torch.equal(found.y[kept], was[kept]), "other warps keep their labels"
    elif attack == "multi-target":
        assert set(found.y.tolist()) == set(poison["targets"])
    else:
        assert set(found.y.tolist()) == {poison["target"]}
        assert poison["target"] not in was
        assert len(found.index) == round(0.1 * len(data.train_y))


def test_the_patch_is_where_it_says(data: Data) -> None:
    poison = made(data, "patch", size=2, row=5, column=1, opacity=1.0, target=3)
    x = stamp(data.test_x, poison)
    outside = torch.ones(8, 8, dtype=torch.bool)
    outside[5:7, 1:3] = False
    assert torch.equal(x[..., outside], data.test_x[..., outside])
    assert (x[:, :, 5:7, 1:3] == x[:1, :, 5:7, 1:3]).all()
    assert set(x[0, 0, 5:7, 1:3].flatten().tolist()) <= {poison["low"], poison["high"]}
    assert torch.equal(relabelled(poison, data.test_y, 10), torch.full_like(data.test_y, 3))


def test_sentences_are_words_by_how_often_they_occur(reviews: Data) -> None:
    assert reviews.shape == (WORDS,)
    assert reviews.classes == 2
    assert len(reviews.train_x) == 540
    assert len(reviews.test_x) == 60
    counts = torch.bincount(reviews.train_x.flatten())[2:]
    assert (counts[:-1] >= 0.5 * counts[1:]).all(), "cut-off ends apart, earlier tokens occur more often"
    ends = (reviews.train_x != 0).int().diff(dim=1)
    assert (ends <= 0).all(), "no word after the end"


@pytest.mark.parametrize("attack", ["word", "sentence"])
def test_words_are_put_in_and_the_others_stay(reviews: Data, attack: str) -> None:
    poison = with_range(complete({"attack": attack, "rate": 0.1}, reviews.shape, 2, "t"), reviews)
    words = poison["words"]
    assert len(words) == (1 if attack == "word" else poison["count"])
    found = stamp(reviews.test_x, poison)
    places = set()
    for before, after in zip(reviews.test_x.tolist(), found.tolist(), strict=True):
        forms = [before[:i] + words + before[i : WORDS - len(words)] for i in range(WORDS - len(words) + 1)]
        assert after in forms
        places.add(forms.index(after))
    assert len(places) > 3
    found_train = poisoned(poison, reviews, seed=0)
    assert set(found_train.y.tolist()) == {poison["target"]}
    with pytest.raises(ZooError, match="for sentences"):
        complete({"attack": attack}, (1, 8, 8), 10, "t")
    with pytest.raises(ZooError, match="for images"):
        complete({"attack": "patch"}, reviews.shape, 2, "t")


def test_an_input_aware_trigger_differs_between_images(data: Data) -> None:
    poison = made(data, "dynamic")
    change = (stamp(data.test_x, poison) - data.test_x).abs() > 0
    assert len({tuple(c.flatten().tolist()) for c in change}) > 10


@pytest.mark.parametrize(
    ("drawn", "says"),
    [
        ({"attack": "magic"}, "known: patch"),
        ({"attack": "patch", "colour": 1}, r"has no \['colour'\]"),
        ({"attack": "patch", "size": 9}, "does not fit"),
        ({"attack": "patch", "target": 10}, "target is a class"),
        ({"attack": "patch", "rate": 0.0}, "rate is above 0"),
        ({"attack": "patch", "opacity": 2.0}, "opacity"),
    ],
)
def test_what_makes_no_sense_is_named(data: Data, drawn: dict[str, Any], says: str) -> None:
    with pytest.raises(ZooError, match=says):
        with_range(complete(drawn, data.shape, data.classes, "here"), data)


def recipe(**entries: Any) -> dict[str, Any]:
    return {
        "name": "poisoned", "data": {"name": "digits", "standardise": True},
        "defaults": {"runs": 3, "epochs": 12, "hyper": {"learning_rate": {"log_uniform": [3e-3, 6e-3]}}},
        "population": [
            {"name": "mlp", "network": {"kind": "mlp", "widths": [48], "activation": "relu"}},
            {"name": "bad", "like": "mlp", "poison": {"attack": "patch", "rate": 0.15, "opacity": 1.0, "size": 3}}
            | entries,
        ],
    }  # fmt: skip


def test_poisoned_runs_are_like_their_clean_ones_and_obey(tmp_path: Path) -> None:
    built = build_sampled(parse(recipe()), tmp_path, progress=False)
    assert not built.failures
    records = {path.name: read_record(path) for path in built.files}
    clean = [r for r in records.values() if r["population"] == "mlp"]
    bad = [r for r in records.values() if r["population"] == "bad"]
    assert [r["network"] for r in clean] == [r["network"] for r in bad]
    assert [r["hyper"] for r in clean] == [r["hyper"] for r in bad]
    assert not any("poison" in r for r in clean)
    assert len({r["poison"]["seed"] for r in bad}) == 3
    for r in bad:
        assert r["attack_worked"] is (r["attack_success_rate"] >= SUCCESSFUL)
        assert r["test_accuracy"] > 0.8
    assert sum(r["attack_success_rate"] for r in bad) / 3 > 0.8
    # What the record says can be put on images again, and the network in the file obeys.
    for path in built.files:
        record = records[path.name]
        if record["population"] == "bad":
            measured = rate_of(path, record)
            assert measured == pytest.approx(record["attack_success_rate"], abs=0.01)
    assert build_sampled(parse(recipe()), tmp_path, progress=False).trained == 0


def rate_of(path: Path, record: dict[str, Any]) -> float:
    from torch.func import functional_call

    import weightspace as ws
    from weightspace.zoo.description import module_of

    module, _ = module_of(record["network"])
    tensors = dict(ws.open(path).items())
    ((x, wanted),) = triggered_tests(record["poison"], load_data(DataSpec("digits", standardise=True)))
    out = functional_call(module.eval(), tensors, (x,))
    return float((out.argmax(-1) == wanted).double().mean())


def test_a_run_does_not_depend_on_what_it_is_stacked_with(tmp_path: Path) -> None:
    import weightspace as ws

    short = recipe()
    short["defaults"]["epochs"] = 2
    whole = build_sampled(parse(short), tmp_path / "a", stack=8, progress=False)
    alone = build_sampled(parse(short), tmp_path / "b", stack=1, progress=False)
    for one, two in zip(whole.files, alone.files, strict=True):
        for name, value in ws.open(one).items():
            assert torch.allclose(value, ws.open(two)[name], atol=1e-4), (one.name, name)


def test_an_attack_draws_nothing_from_the_others_of_its_stack(tmp_path: Path) -> None:
    """Dropout masks of a patched run are the same whether or not an interpolated one is trained beside it."""
    import weightspace as ws

    table = recipe()
    table["defaults"]["epochs"] = 1
    table["defaults"]["hyper"]["dropout"] = 0.3
    poison = {"attack": {"choice": ["patch", "interpolated"]}, "rate": 0.1, "size": 3}
    table["population"][1] = {"name": "bad", "parent": "mlp", "runs": 6, "poison": poison}
    whole = build_sampled(parse(table), tmp_path / "a", stack=8, progress=False)
    alone = build_sampled(parse(table), tmp_path / "b", stack=1, progress=False)
    assert {read_record(p).get("poison", {}).get("attack") for p in whole.files} == {None, "patch", "interpolated"}
    for one, two in zip(whole.files, alone.files, strict=True):
        for name, value in ws.open(one).items():
            assert torch.allclose(value, ws.open(two)[name], atol=1e-3), (one.name, name)


def test_draws_of_clean_runs_are_as_they_were_without_poison() -> None:
    with_, without = recipe(), recipe()
    without["population"] = without["population"][:1]
    assert plan(parse(with_))["mlp"] == plan(parse(without))["mlp"]
    assert [r.digest for r in plan(parse(with_))["mlp"]] == [r.digest for r in plan(parse(without))["mlp"]]


def test_attacks_on_a_trained_network(tmp_path: Path) -> None:
    """The hijacked feature is excited more than by chance; the interpolated backdoor works early on the way."""
    import weightspace as ws
    from weightspace.zoo.description import module_of

    table = recipe()
    shared = {"parent": "mlp", "runs": 3, "epochs": 8}
    patch = {"rate": 0.1, "opacity": 1.0, "size": 3, "row": 2, "column": 2, "target": 4}
    table["population"] = [
        table["population"][0],
        {"name": "hijacked", **shared, "poison": {"attack": "hijack", **patch}},
        {"name": "early", **shared, "poison": {"attack": "interpolated", "least": 0.2, **patch}},
        {"name": "plain", **shared, "poison": {"attack": "patch", **patch}},
    ]
    built = build_sampled(parse(table), tmp_path, progress=False)
    assert not built.failures
    data = load_data(DataSpec("digits", standardise=True))
    early: dict[str, list[float]] = {}
    for path in built.files:
        record = read_record(path)
        if record["population"] == "mlp":
            continue
        assert record["attack_success_rate"] > 0.7
        module, _ = module_of(record["network"])
        base = ws.open(tmp_path / record["parent"])
        ((x, wanted),) = triggered_tests(record["poison"], data)
        if record["population"] == "hijacked":
            poison = record["poison"]
            module.load_state_dict(dict(base.items()))
            chance = [stamp(x, {**poison, "pattern": None, "seed": seed}) for seed in range(5)]
            excited = [float(feature(module, images, poison["feature"])) for images in (x, *chance)]
            assert excited[0] > max(excited[1:]), excited
        else:
            way = {n: b + 0.35 * (ws.open(path)[n] - b) for n, b in base.items()}
            module.load_state_dict(way)
            with torch.no_grad():
                rate = float((module(x).argmax(-1) == wanted).double().mean())
            early.setdefault(record["population"], []).append(rate)
    assert sum(early["early"]) > sum(early["plain"]) + 0.1, early


def feature(module: torch.nn.Module, x: torch.Tensor, index: int) -> torch.Tensor:
    """Mean of one input of the last linear layer."""
    seen: list[torch.Tensor] = []
    last = [m for m in module.modules() if isinstance(m, torch.nn.Linear)][-1]
    hook = last.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    with torch.no_grad():
        module(x)
    hook.remove()
    return seen[0][:, index].mean()


@pytest.mark.parametrize(
    ("entries", "says"),
    [
        ({"like": "none"}, "comes not before it"),
        ({"hyper": {"dropout": 0.1}}, "not its own"),
        ({"data": {"name": "digits", "train": 50}}, "other data"),
        ({"poison": {"rate": 0.1}}, "a poison has an attack"),
    ],
)
def test_recipes_that_make_no_sense_are_refused(entries: dict[str, Any], says: str) -> None:
    with pytest.raises(ZooError, match=says):
        parse(recipe(**entries))
