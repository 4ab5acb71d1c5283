"""Several tasks in one network: the words for tasks, the data side by side, what is right within a task."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from weightspace.errors import ZooError
from weightspace.zoo import populations, recipe
from weightspace.zoo.data import DataSpec, load_data
from weightspace.zoo.files import read_record
from weightspace.zoo.tasks import CHANGES, CLASSES, Task, accuracy, chosen, data_of, own_outputs, parse_task

SPEC = DataSpec("tasks", tasks=("digits", "digits+rot90", "digits+scramble"), side=8, train=300, test=100)


@given(
    st.builds(
        Task,
        st.integers(0, 99),
        st.sets(st.integers(0, 9), min_size=1).map(lambda s: tuple(sorted(s))),
        st.integers(0, 9),
    )
)
def test_the_short_form_of_a_task_is_read_back(task: Task) -> None:
    assert parse_task(str(task)) == task


@pytest.mark.parametrize("text", ["", "a", "1:", "1:3-", "1:11", "1~", "1:5-3~", "-1"])
def test_what_is_no_task_is_refused(text: str) -> None:
    with pytest.raises(ZooError, match="expected"):
        parse_task(text)


@given(st.integers(1, 50))
def test_exchanged_labels_are_a_permutation_without_fixed_points(number: int) -> None:
    labels = Task(0, exchange=number).labels
    assert sorted(labels) == list(range(CLASSES))
    assert all(label != i for i, label in enumerate(labels))


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_moves_pixels_and_loses_none(change: str) -> None:
    x = torch.rand(3, 1, 8, 8)
    changed = CHANGES[change](x)
    assert changed.shape == x.shape
    assert not torch.equal(changed, x)
    assert torch.equal(changed.abs().flatten(1).sort().values, x.abs().flatten(1).sort().values)


def test_tasks_lie_side_by_side() -> None:
    data = load_data(SPEC)
    assert data.tasks == 3
    assert data.classes == 30
    assert data.shape == (1, 8, 8)
    assert torch.bincount(data.train_y // CLASSES).tolist() == [300, 300, 300]
    assert abs(float(data.train_x.mean())) < 1e-5
    # Task 1 is task 0 turned: the same labels, the same images after turning back.
    zero, one = chosen(data, ["0"]), chosen(data, ["1"])
    assert torch.equal(zero.test_x.rot90(1, (-2, -1)), one.test_x)
    assert torch.equal(zero.test_y + CLASSES, one.test_y)


def test_parts_and_exchanged_labels() -> None:
    data = load_data(SPEC)
    some = chosen(data, ["1:0,3", "2"])
    assert set(some.test_y.tolist()) == {10, 13, *range(20, 30)}
    against = chosen(data, ["0~4"])
    labels = torch.tensor(Task(0, exchange=4).labels)
    assert torch.equal(against.test_y, labels[chosen(data, ["0"]).test_y])
    with pytest.raises(ZooError, match="data's 3"):
        chosen(data, ["3"])


def test_only_the_outputs_of_its_own_task_judge_an_example() -> None:
    out = torch.zeros(2, 30)
    out[0, 3], out[0, 15] = 1.0, 9.0
    out[1, 17], out[1, 4] = 1.0, 9.0
    y = torch.tensor([3, 17])
    assert accuracy(out, y) == 1.0
    assert accuracy(out, torch.tensor([13, 17])) == 0.5
    own, label = own_outputs(out.expand(5, 2, 30), y)
    assert own.shape == (5, 2, CLASSES)
    assert label.tolist() == [3, 7]


def test_children_learn_their_tasks_and_keep_the_other_outputs(tmp_path: Path) -> None:
    table = {
        "name": "small",
        "data": {"name": "tasks", "tasks": list(SPEC.tasks), "side": 8, "train": 600, "test": 100},
        "defaults": {"epochs": 3, "batch": 32, "hyper": {"learning_rate": 3e-3}},
        "population": [
            {"name": "base", "runs": 2, "network": {"kind": "mlp", "widths": [32], "activation": "relu"}},
            {"name": "child", "runs": 6, "parent": "base", "tasks": [["0"], ["1:0-4"], ["2~1"]]},
        ],
    }
    built = populations.build_sampled(recipe.parse(table), tmp_path, progress=False)
    records = {p.name: read_record(p) for p in built.files}
    children = [r for r in records.values() if r["population"] == "child"]
    assert [r["tasks"][0] for r in children] == ["0", "0", "1:0,1,2,3,4", "1:0,1,2,3,4", "2~1", "2~1"]
    assert [r["parent"] for r in children] == ["base-0000-e003.safetensors", "base-0001-e003.safetensors"] * 3
    assert all(r["test_accuracy"] > 0.6 for r in children)
    from weightspace import checkpoint

    base = checkpoint.open(tmp_path / "base-0000-e003.safetensors")
    child = checkpoint.open(tmp_path / "child-0000-e003.safetensors")
    changed = (base["output.weight"] - child["output.weight"]).abs().amax(1) > 0
    assert changed[:10].all()
    assert not changed[10:].any()
    data = data_of(children[0])
    assert torch.equal(data.test_x, load_data(SPEC.__class__("tasks", **{**_spec(table), "tasks": SPEC.tasks})).test_x)


def _spec(table: dict) -> dict:
    return {k: v for k, v in table["data"].items() if k not in ("name", "tasks")}


@pytest.mark.parametrize(
    ("tasks", "message"), [("0", "list of lists"), ([["x"]], "no task"), ([[]], "list of lists")]
)
def test_a_recipe_with_wrong_tasks_is_refused(tasks: object, message: str) -> None:
    table = {
        "name": "wrong", "data": {"name": "tasks", "tasks": ["digits"]},
        "population": [{"name": "a", "runs": 1, "network": {"kind": "mlp", "widths": [4]}, "tasks": tasks}],
    }  # fmt: skip
    with pytest.raises(ZooError, match=message):
        recipe.parse(table)


def test_digests_of_recipes_without_tasks_are_as_they_were() -> None:
    """A zoo that was built before tasks existed is not trained again."""
    table = {
        "name": "old", "data": "digits", "defaults": {"epochs": 1},
        "population": [{"name": "a", "runs": 1, "network": {"kind": "mlp", "widths": [4], "activation": "relu"}}],
    }  # fmt: skip
    (run,) = populations.plan(recipe.parse(table))["a"]
    assert run.digest == "e2512af45da011a2"
