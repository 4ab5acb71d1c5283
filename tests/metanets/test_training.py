"""Training: it learns, gives the same twice and after an interruption, saves, loads and refuses what is damaged."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("lightning", reason="training needs the extra 'train'")

from tests.metanets.standin import KIND, Batch, Blocks, mlp, population, write
from weightspace.errors import MetanetError
from weightspace.metanets import base, loop
from weightspace.metanets.augment import Augmentation
from weightspace.metanets.data import Loaded, Sample, load_samples, split
from weightspace.metanets.training import Trained, TrainingPlan, fit

PLAN = TrainingPlan(metanet={"kind": "blocks"}, batch=8, epochs=4, learning_rate=1e-2, device="cpu")


@pytest.fixture(autouse=True)
def _kind(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(base.KINDS, "blocks", KIND)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def samples(tmp_path_factory: pytest.TempPathFactory) -> Loaded:
    return load_samples(population(tmp_path_factory.mktemp("population"), runs=40))


@pytest.fixture(scope="module")
def parts(samples: Loaded) -> tuple[list[Sample], ...]:
    return split(samples, (0.5, 0.25, 0.25))


def _weights(trained: Trained) -> dict[str, torch.Tensor]:
    return trained.metanet.state_dict()


def _equal(a: Trained, b: Trained) -> bool:
    return all(torch.equal(_weights(a)[k], _weights(b)[k]) for k in _weights(a))


# -------------------------------------------------------------------- learning


def test_regression_learns(parts: tuple[list[Sample], ...]) -> None:
    train, validation, test = parts
    trained = fit(replace(PLAN, epochs=40), train, validation)
    measures = trained.task.measures(trained.outputs(test), trained.task.targets(test))
    assert measures["tau"] > 0.5
    found = trained.predict(test)
    assert found.shape == (len(test),)
    assert 0 < float(found.min()) < float(found.max()) < 1
    # Samples or graphs, many or few at a time.
    assert torch.allclose(trained.predict([s.graph for s in test], batch=3), found, atol=1e-6)
    assert len(trained.history) == 40
    assert trained.history[-1]["train_loss"] < 0.5 * trained.history[0]["train_loss"]
    best = min(row["validation_loss"] for row in trained.history)
    reached = trained.task.loss(trained.outputs(validation), trained.task.targets(validation))
    assert float(reached) == pytest.approx(best, abs=1e-6)


def test_ranking_learns(parts: tuple[list[Sample], ...]) -> None:
    trained = fit(replace(PLAN, task="ranking", epochs=30), parts[0], parts[1])
    assert trained.task.measures(trained.outputs(parts[2]), trained.task.targets(parts[2]))["tau"] > 0.5


def test_classification_learns_with_augmentation_and_mixup(parts: tuple[list[Sample], ...]) -> None:
    augmentation = Augmentation(permute=0.5, noise=0.05, mixup=0.5)
    plan = replace(PLAN, task="classification", target="hyper.size", epochs=30, augmentation=augmentation)
    trained = fit(plan, parts[0], parts[1])
    assert trained.task.classes == ("large", "small")
    assert trained.task.measures(trained.outputs(parts[2]), trained.task.targets(parts[2]))["accuracy"] > 0.75
    short = replace(plan, epochs=2)
    assert _equal(fit(short, parts[0], parts[1]), fit(short, parts[0], parts[1]))


def test_contrast_finds_the_other_view(parts: tuple[list[Sample], ...]) -> None:
    plan = replace(
        PLAN, task="contrastive", target="", embedding=8, epochs=25, augmentation=Augmentation(permute=1.0, noise=0.05)
    )
    trained = fit(plan, parts[0], parts[1])
    first, last = trained.history[0], trained.history[-1]
    assert last["validation_loss"] < first["validation_loss"]
    assert last["validation_recall@1"] > 3 / len(parts[1])
    found = trained.predict(parts[2])
    assert found.shape == (len(parts[2]), 8)
    assert torch.allclose(found.norm(dim=1), torch.ones(len(parts[2])))


def test_contrast_with_positives_of_the_same_run(parts: tuple[list[Sample], ...]) -> None:
    plan = replace(PLAN, task="contrastive", target="run", embedding=8, augmentation=Augmentation(noise=0.02))
    by_field = fit(plan, parts[0], parts[1])
    by_function = fit(
        replace(plan, target=""), parts[0], parts[1], positives=lambda record: f"field {record['run']}"
    )
    assert _equal(by_field, by_function)
    assert not _equal(by_field, fit(replace(plan, target=""), parts[0], parts[1]))
    # Two checkpoints of each run: both of a pair are in one batch.
    batches = loop.Batches(Blocks(8), by_field.task, plan, parts[0], by_field.task.targets(parts[0]), lambda: 0)
    for example in batches:
        assert len(example[1].unique()) <= len(example[1]) // 2 + 1


# -------------------------------------------------------------------- reproducing


def test_the_same_plan_twice_gives_the_same_weights(parts: tuple[list[Sample], ...]) -> None:
    plan = replace(PLAN, metanet={"kind": "blocks", "dropout": 0.2})
    first = fit(plan, parts[0], parts[1])
    before = torch.random.get_rng_state()
    assert _equal(first, fit(plan, parts[0], parts[1]))
    assert torch.equal(before, torch.random.get_rng_state())
    assert not _equal(first, fit(replace(plan, seed=1), parts[0], parts[1]))


class _Stop(Exception):
    pass


def _interrupted_after(steps: int, monkeypatch: pytest.MonkeyPatch, error: type[BaseException] = _Stop) -> None:
    """Let training break off in the given step."""
    step = loop.Loop.training_step
    left = [steps]

    def counted(self: loop.Loop, *args: Any) -> torch.Tensor:
        left[0] -= 1
        if left[0] < 0:
            raise error
        return step(self, *args)

    monkeypatch.setattr(loop.Loop, "training_step", counted)


@pytest.mark.parametrize("augmentation", [Augmentation(), Augmentation(noise=0.1)], ids=["plain", "noise"])
def test_resuming_gives_what_an_uninterrupted_training_gives(
    parts: tuple[list[Sample], ...], tmp_path: Path, augmentation: Augmentation
) -> None:
    plan = replace(
        PLAN, metanet={"kind": "blocks", "dropout": 0.1}, epochs=5, patience=4, average=0.9, augmentation=augmentation
    )
    whole = fit(plan, parts[0], parts[1])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "SAVE_EVERY", 0.0)
        _interrupted_after(17, patch)
        with pytest.raises(_Stop):
            fit(plan, parts[0], parts[1], tmp_path / "run", resume=True)
    assert {p.name for p in (tmp_path / "run").iterdir()} == {"unfinished.json", "unfinished.ckpt"}
    assert torch.load(tmp_path / "run" / "unfinished.ckpt", weights_only=True)["epoch"] == 2
    prepared = Blocks.forward
    calls = [0]

    def counting(self: Blocks, batch: Batch) -> torch.Tensor:
        calls[0] += self.training
        return prepared(self, batch)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Blocks, "forward", counting)
        resumed = fit(plan, parts[0], parts[1], tmp_path / "run", resume=True)
    assert calls[0] == 2 * 5  # three of the five epochs of five batches were there
    assert _equal(whole, resumed)
    plain = [{k: v for k, v in row.items() if k != "seconds"} for row in whole.history]
    assert plain == [{k: v for k, v in row.items() if k != "seconds"} for row in resumed.history]
    assert {p.name for p in (tmp_path / "run").iterdir()} == {"config.json", "metanet.safetensors"}


def test_a_finished_training_is_loaded_and_another_refused(parts: tuple[list[Sample], ...], tmp_path: Path) -> None:
    first = fit(PLAN, parts[0], parts[1], tmp_path, resume=True)
    with pytest.MonkeyPatch.context() as patch:
        _interrupted_after(0, patch)
        assert _equal(first, fit(PLAN, parts[0], parts[1], tmp_path, resume=True))
    with pytest.raises(MetanetError, match="another plan or other networks"):
        fit(replace(PLAN, seed=1), parts[0], parts[1], tmp_path, resume=True)
    with pytest.raises(MetanetError, match="another plan or other networks"):
        fit(PLAN, parts[0][1:], parts[1], tmp_path, resume=True)
    assert not _equal(first, fit(replace(PLAN, seed=1), parts[0], parts[1], tmp_path))


def test_ctrl_c_stays_ctrl_c(parts: tuple[list[Sample], ...], monkeypatch: pytest.MonkeyPatch) -> None:
    import signal

    before = signal.getsignal(signal.SIGINT)
    _interrupted_after(3, monkeypatch, KeyboardInterrupt)
    with pytest.raises(KeyboardInterrupt):
        fit(PLAN, parts[0], parts[1])
    assert signal.getsignal(signal.SIGINT) is before


def test_early_stopping(parts: tuple[list[Sample], ...]) -> None:
    plan = replace(PLAN, epochs=300, learning_rate=0.05, patience=3)
    trained = fit(plan, parts[0], parts[1])
    assert len(trained.history) < 300
    losses = [row["validation_loss"] for row in trained.history]
    assert losses.index(min(losses)) == len(losses) - 4


def test_mixed_precision_learns_too(parts: tuple[list[Sample], ...]) -> None:
    trained = fit(replace(PLAN, epochs=20, precision="bf16-mixed"), parts[0], parts[1])
    assert trained.history[-1]["train_loss"] < 0.8 * trained.history[0]["train_loss"]
    assert all(value.dtype == torch.float32 for value in _weights(trained).values())


def test_what_is_kept_is_the_average_where_the_plan_wants_it(parts: tuple[list[Sample], ...]) -> None:
    plan = replace(PLAN, epochs=30, learning_rate=0.03)
    plain, averaged = fit(plan, parts[0]), fit(replace(plan, average=0.95), parts[0])
    # The way of the weights is the same, only what is kept differs.
    assert [r["train_loss"] for r in plain.history] == [r["train_loss"] for r in averaged.history]
    assert not _equal(plain, averaged)
    validated = fit(replace(plan, average=0.95), parts[0], parts[1])
    best = min(row["validation_loss"] for row in validated.history)
    reached = validated.task.loss(validated.outputs(parts[1]), validated.task.targets(parts[1]))
    assert float(reached) == pytest.approx(best, abs=1e-6)
    assert [r["train_loss"] for r in plain.history] == [r["train_loss"] for r in validated.history]


def test_a_training_that_diverges_says_so(parts: tuple[list[Sample], ...]) -> None:
    plan = replace(PLAN, target="test_loss", learning_rate=1e20, clip=0.0, warmup=0.0)
    with pytest.raises(MetanetError, match=r"diverged in epoch \d.*lower the learning rate"):
        fit(plan, parts[0])


# -------------------------------------------------------------------- batches


def test_batches_hold_every_network_once_in_another_order_each_epoch(parts: tuple[list[Sample], ...]) -> None:
    task = PLAN.make_task(parts[0])
    numbers = torch.arange(len(parts[0]))
    epoch = [0]
    metanet = Blocks()
    batches = loop.Batches(metanet, task, PLAN, parts[0], numbers, lambda: epoch[0])
    orders = []
    for epoch[0] in range(3):
        found = [example[1] for example in batches]
        assert len(found) == len(batches) == 5
        assert torch.equal(torch.cat(found).sort().values, numbers)
        orders.append(torch.cat(found))
    assert not torch.equal(orders[0], orders[1])
    assert metanet.prepared == len(parts[0])  # once each, not once an epoch


def test_kept_batches_are_dealt_anew_when_it_is_time(parts: tuple[list[Sample], ...]) -> None:
    task, plan = PLAN.make_task(parts[0]), replace(PLAN, deal_every=2)
    epoch = [0]
    batches = loop.Batches(Blocks(), task, plan, parts[0], torch.arange(len(parts[0])), lambda: epoch[0])
    sets = []
    for epoch[0] in range(4):
        sets.append({frozenset(example[1].tolist()) for example in batches})
    assert sets[0] == sets[1] != sets[2] == sets[3]


def test_lightning_counts_epochs_as_the_batches_do(
    parts: tuple[list[Sample], ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []
    walk = loop.Batches._examples

    def watched(self: loop.Batches, generator: torch.Generator) -> Iterator[loop.Example]:
        for example in walk(self, generator):
            if self.epoch is not None:
                seen.append(self.epoch())
            yield example

    monkeypatch.setattr(loop.Batches, "_examples", watched)
    fit(PLAN, parts[0], parts[1])
    assert seen == [0] * 5 + [1] * 5 + [2] * 5 + [3] * 5


# -------------------------------------------------------------------- no leaks


def test_predictions_see_the_weights_alone(parts: tuple[list[Sample], ...]) -> None:
    trained = fit(PLAN, parts[0], parts[1])
    found = trained.predict(parts[2])
    bare = [Sample(f"other-{i}", s.graph, {}, "") for i, s in enumerate(parts[2])]
    assert torch.equal(trained.predict(bare), found)
    wider = [
        replace(s.graph, tensors={k: w.double() for k, w in (s.graph.tensors or {}).items()}) for s in parts[2]
    ]
    assert torch.equal(trained.predict(wider), found)


def test_predictions_do_not_see_names_or_metadata(parts: tuple[list[Sample], ...], tmp_path: Path) -> None:
    trained = fit(PLAN, parts[0], parts[1])
    # The same weights as the recipe's MLP, and under other names, with another record, in another order.
    renamed = {"hidden.0": "layers.0", "hidden.1": "layers.1", "output": "layers.2"}
    for number, seed in enumerate((1, 2, 3)):
        tensors = mlp([6, 8, 8, 3], seed)
        write(tmp_path / "a" / f"{number}.safetensors", tensors, {"run": "x", "test_accuracy": 0.1})
        other = {f"{renamed[k.rpartition('.')[0]]}.{k.rpartition('.')[2]}": w for k, w in tensors.items()}
        write(tmp_path / "b" / f"{9 - number}-other.safetensors", dict(reversed(other.items())), {"label": 5})
    one, two = load_samples(tmp_path / "a"), load_samples(tmp_path / "b")
    assert set(one[0].graph.shapes).isdisjoint(two[0].graph.shapes)
    assert torch.allclose(trained.predict(one), trained.predict(two[::-1]), atol=1e-6)


# -------------------------------------------------------------------- folders


def test_saved_and_loaded(parts: tuple[list[Sample], ...], tmp_path: Path) -> None:
    trained = fit(PLAN, parts[0], parts[1], tmp_path / "a")
    loaded = Trained.load(tmp_path / "a")
    assert torch.equal(loaded.predict(parts[2]), trained.predict(parts[2]))
    assert loaded.plan == PLAN
    assert loaded.history == trained.history
    loaded.save(tmp_path / "b")
    for name in ("config.json", "metanet.safetensors"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    assert "40" not in repr(loaded)
    assert "369 parameters" in repr(loaded)


def _cut(data: bytes) -> bytes:
    return data[:-10]


def test_damaged_folders_are_refused(parts: tuple[list[Sample], ...], tmp_path: Path) -> None:
    fit(PLAN, parts[0], parts[1], tmp_path)
    weights, config = tmp_path / "metanet.safetensors", tmp_path / "config.json"
    good = weights.read_bytes(), config.read_bytes()

    def refused(match: str) -> None:
        with pytest.raises(MetanetError, match=match):
            Trained.load(tmp_path)
        weights.write_bytes(good[0])
        config.write_bytes(good[1])

    weights.write_bytes(_cut(good[0]))
    refused("not the file that config.json was written with")
    config.write_bytes(_cut(good[1]))
    refused("damaged metanet")
    config.write_text("[]")
    refused("damaged metanet")
    config.write_text(json.dumps({**json.loads(good[1]), "version": 2}))
    refused("version 2")
    config.write_text(json.dumps({**json.loads(good[1]), "metanet": {"kind": "blocks", "width": 8}}))
    refused("damaged metanet")
    weights.unlink()
    refused("holds no trained metanet")
    Trained.load(tmp_path)


def test_a_plan_is_made_again_and_mistakes_are_named() -> None:
    plan = replace(PLAN, augmentation=Augmentation(noise=0.1))
    assert TrainingPlan.from_dict(json.loads(json.dumps(plan.to_dict()))) == plan
    with pytest.raises(MetanetError, match="no option 'epoch'"):
        TrainingPlan.from_dict({"epoch": 3})
    with pytest.raises(MetanetError, match="epochs is 'many', expected a whole number"):
        TrainingPlan.from_dict({"epochs": "many"})
    assert TrainingPlan.from_dict({"clip": 2}) == TrainingPlan(clip=2.0)
    with pytest.raises(MetanetError, match="epochs is 0"):
        TrainingPlan(epochs=0)
    with pytest.raises(MetanetError, match="device is 'tpu'"):
        TrainingPlan(device="tpu")  # type: ignore[arg-type]
    with pytest.raises(MetanetError, match="two views that differ"):
        TrainingPlan(task="contrastive")
    with pytest.raises(MetanetError, match="mixup mixes targets"):
        TrainingPlan(task="contrastive", augmentation=Augmentation(noise=0.1, mixup=1.0))


def test_training_goes_on_from_a_given_metanet(parts: tuple[list[Sample], ...]) -> None:
    start = Blocks(1)
    first = {k: v.clone() for k, v in start.state_dict().items()}
    trained = fit(replace(PLAN, epochs=1, learning_rate=1e-6), parts[0], parts[1], metanet=start)
    assert all(torch.allclose(first[k], v, atol=1e-4) for k, v in _weights(trained).items())
    with pytest.raises(MetanetError, match="positives belong to a contrastive task"):
        fit(PLAN, parts[0], positives=lambda record: "x")


def test_it_is_quiet_and_leaves_nothing_behind(
    parts: tuple[list[Sample], ...],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
    recwarn: pytest.WarningsRecorder,
) -> None:
    monkeypatch.chdir(tmp_path)
    with caplog.at_level(logging.INFO):
        fit(PLAN, parts[0], parts[1])
    assert list(tmp_path.iterdir()) == []
    printed = capfd.readouterr()
    assert printed.out == ""
    assert printed.err == ""
    assert not [w for w in recwarn if "lightning" in str(w.filename)]
    lines = [r.getMessage() for r in caplog.records]
    assert len(lines) == PLAN.epochs
    assert all(line.startswith(f"epoch {i + 1}/4: train loss ") for i, line in enumerate(lines))
    assert "validation tau" in lines[0]


def test_without_lightning_the_extra_is_named(tmp_path: Path) -> None:
    (tmp_path / "lightning.py").write_text("raise ModuleNotFoundError('no lightning here', name='lightning')")
    code = (
        "import torch; from weightspace.metanets.training import TrainingPlan, fit; from weightspace.errors import *\n"
        "try: fit(TrainingPlan(), [])\n"
        "except MissingExtraError as error: print(error)"
    )
    env: Mapping[str, str] = {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{Path.cwd()}"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=env)
    assert "pip install 'weightspace[train]'" in done.stdout
