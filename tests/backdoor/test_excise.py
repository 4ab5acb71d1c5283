"""Taking a backdoor out: with inputs, with none, and where there is nothing to take out."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from tests.backdoor.small import TARGET, Case, trained
from weightspace.backdoor.excise import excise
from weightspace.backdoor.running import network
from weightspace.backdoor.unlearning import reach
from weightspace.checkpoint import open as open_checkpoint
from weightspace.errors import UnprovedWiringError, WeightspaceError


@pytest.fixture(scope="module")
def case() -> Case:
    return trained()


def test_the_class_of_the_backdoor_is_the_easiest_to_reach(case: Case) -> None:
    net = network(case.wiring, case.tensors)
    found = reach(net, net.state, case.x[:100])
    assert int(found.rates.argmax()) == TARGET


@pytest.mark.parametrize("labelled", [True, False])
def test_clean_inputs_take_it_out(case: Case, labelled: bool, tmp_path: Path) -> None:
    assert case.success(case.tensors) > 0.9
    before = {n: t.clone() for n, t in case.tensors.items()}
    path = tmp_path / "clean.safetensors"
    found = excise(
        case.tensors, wiring=case.wiring, target=TARGET, inputs=case.x[:100], out=path,
        labels=case.y[:100] if labelled else None, rounds=12,
    )  # fmt: skip
    assert found.method == "unlearned"
    assert case.success(dict(found.tensors)) < 0.3
    assert case.accuracy(dict(found.tensors)) > case.accuracy(case.tensors) - 0.03
    assert all(torch.equal(case.tensors[n], t) for n, t in before.items())
    assert list(found.tensors) == list(case.tensors)
    assert torch.equal(found.tensors["1.running_var"], case.tensors["1.running_var"])
    written = open_checkpoint(path)
    assert all(torch.equal(written[n], t) for n, t in found.tensors.items())
    assert json.loads(found.to_json())["targets"] == [TARGET]
    assert "unlearned, class 2" in repr(found)


def test_dtypes_are_kept(case: Case) -> None:
    half = {n: t.half() if t.is_floating_point() else t for n, t in case.tensors.items()}
    found = excise(half, wiring=case.wiring, target=TARGET, inputs=case.x[:40], rounds=1)
    assert {n: t.dtype for n, t in found.tensors.items()} == {n: t.dtype for n, t in half.items()}


def test_nothing_is_done_where_nothing_stands_out() -> None:
    case = trained(poisoned=False, seed=1)
    found = excise(case.tensors, wiring=case.wiring, inputs=case.x[:100])
    if found.changed:  # a network whose classes are not alike: it must not suffer
        assert case.accuracy(dict(found.tensors)) > case.accuracy(case.tensors) - 0.03
    else:
        assert found.method == "nothing"
        assert all(found.tensors[n] is t for n, t in case.tensors.items())


def test_without_inputs_little_is_risked(case: Case) -> None:
    found = excise(case.tensors, wiring=case.wiring, target=TARGET)
    assert found.method in ("projected", "nothing")
    assert case.accuracy(dict(found.tensors)) > 0.6


def test_what_does_not_fit_is_refused(case: Case) -> None:
    with pytest.raises(WeightspaceError, match="no class 7"):
        excise(case.tensors, wiring=case.wiring, target=7)
    with pytest.raises(WeightspaceError, match="inputs have shape"):
        excise(case.tensors, wiring=case.wiring, inputs=case.x[0, 0])
    with pytest.raises(WeightspaceError, match="no inputs"):
        excise(case.tensors, wiring=case.wiring, labels=case.y)
    with pytest.raises(UnprovedWiringError):
        excise(case.tensors, wiring=case.wiring.with_(status="unverified"), inputs=case.x[:10])
