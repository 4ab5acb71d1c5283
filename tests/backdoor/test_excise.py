"""Taking a backdoor out: with inputs, with none, and where there is nothing to take out."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from typer.testing import CliRunner

from tests.backdoor.small import TARGET, Case, trained
from weightspace.backdoor.corruptions import FAMILIES, corrupted
from weightspace.backdoor.excise import excise
from weightspace.backdoor.localise import locate
from weightspace.backdoor.running import network
from weightspace.backdoor.unlearning import reach
from weightspace.backdoor.verdict import Verdict
from weightspace.checkpoint import open as open_checkpoint
from weightspace.cli import app
from weightspace.errors import UnprovedWiringError, WeightspaceError
from weightspace.pretrained.applicability import Applicability


@pytest.fixture(scope="module")
def case() -> Case:
    return trained()


def test_the_class_of_the_backdoor_is_the_easiest_to_reach(case: Case) -> None:
    net = network(case.wiring, case.tensors)
    found = reach(net, net.state, case.x[:100])
    assert int(found.scores.argmax()) == TARGET
    assert found.outstanding()[0] == TARGET


@pytest.mark.parametrize("labelled", [True, False])
def test_clean_inputs_take_it_out(case: Case, labelled: bool, tmp_path: Path) -> None:
    assert case.success(case.tensors) > 0.9
    before = {n: t.clone() for n, t in case.tensors.items()}
    path = tmp_path / "clean.safetensors"
    found = excise(
        case.tensors, wiring=case.wiring, target=TARGET, inputs=case.x[:100], out=path,
        labels=case.y[:100] if labelled else None, steps=500,
    )  # fmt: skip
    assert found.method == "relearned"
    assert case.success(dict(found.tensors)) < 0.3
    assert case.accuracy(dict(found.tensors)) > case.accuracy(case.tensors) - 0.03
    assert all(torch.equal(case.tensors[n], t) for n, t in before.items())
    assert list(found.tensors) == list(case.tensors)
    written = open_checkpoint(path)
    assert all(torch.equal(written[n], t) for n, t in found.tensors.items())
    assert json.loads(found.to_json())["targets"] == [TARGET]
    assert "relearned, class 2" in repr(found)


def test_what_leads_to_a_class_can_be_unlearned_instead(case: Case) -> None:
    found = excise(
        case.tensors, wiring=case.wiring, target=TARGET, inputs=case.x[:100], labels=case.y[:100], method="unlearn"
    )  # fmt: skip
    assert found.method == "unlearned"
    assert case.success(dict(found.tensors)) < 0.3
    assert case.accuracy(dict(found.tensors)) > case.accuracy(case.tensors) - 0.03
    assert torch.equal(found.tensors["1.running_var"], case.tensors["1.running_var"])


def test_dtypes_are_kept(case: Case) -> None:
    half = {n: t.half() if t.is_floating_point() else t for n, t in case.tensors.items()}
    found = excise(half, wiring=case.wiring, target=TARGET, inputs=case.x[:40], steps=5)
    assert {n: t.dtype for n, t in found.tensors.items()} == {n: t.dtype for n, t in half.items()}


def test_a_clean_network_does_not_suffer() -> None:
    case = trained(poisoned=False, seed=1)
    found = excise(case.tensors, wiring=case.wiring, inputs=case.x[:100], steps=400)
    assert case.accuracy(dict(found.tensors)) > case.accuracy(case.tensors) - 0.03


def test_nothing_is_done_to_what_a_scan_did_not_flag(case: Case) -> None:
    outside = Applicability(False, 0.0, "made up")
    verdict = Verdict("tensors", 0.02, 0.8, False, ((TARGET, 1.0),), True, "", outside)
    found = excise(case.tensors, verdict, wiring=case.wiring, inputs=case.x[:100])
    assert found.method == "nothing"
    assert all(found.tensors[n] is t for n, t in case.tensors.items())


def test_without_inputs_made_up_ones_do(case: Case) -> None:
    found = excise(case.tensors, wiring=case.wiring, target=TARGET, rounds=12)
    assert found.method == "unlearned"
    assert "made-up" in found.reason
    assert case.success(dict(found.tensors)) < 0.6
    assert case.accuracy(dict(found.tensors)) > 0.8


def test_a_network_is_learned_anew_from_pictures_on_demand() -> None:
    case = trained(norms=False)
    found = excise(case.tensors, wiring=case.wiring, method="relearn")
    assert (found.method, found.targets, found.kept) == ("relearned", (TARGET,), None)
    assert found.reached is not None
    assert found.reached[1] < found.reached[0] / 2
    assert case.success(dict(found.tensors)) < case.success(case.tensors) - 0.2


def test_pictures_are_not_shown_where_norms_know_the_data(case: Case) -> None:
    with pytest.raises(WeightspaceError, match="statistics of its data in norms"):
        excise(case.tensors, wiring=case.wiring, method="relearn")
    torch.manual_seed(0)
    module = torch.nn.Sequential(torch.nn.Linear(6, 16), torch.nn.ReLU(), torch.nn.Linear(16, 3))
    with pytest.raises(WeightspaceError, match="no images"):
        excise(module.state_dict(), method="relearn")


def test_a_subspace_is_projected_out_or_left(case: Case) -> None:
    found = excise(case.tensors, locate(case.wiring, case.tensors, target=TARGET), wiring=case.wiring)
    assert found.method in ("projected", "nothing")
    assert found.targets == (TARGET,)
    if found.changed:
        assert case.success(dict(found.tensors)) < case.success(case.tensors)


def test_what_does_not_fit_is_refused(case: Case) -> None:
    with pytest.raises(WeightspaceError, match="no class 7"):
        excise(case.tensors, wiring=case.wiring, target=7)
    with pytest.raises(WeightspaceError, match="inputs have shape"):
        excise(case.tensors, wiring=case.wiring, inputs=case.x[0, 0])
    with pytest.raises(WeightspaceError, match="no method 'forget'"):
        excise(case.tensors, wiring=case.wiring, inputs=case.x[:10], method="forget")
    with pytest.raises(WeightspaceError, match="no inputs"):
        excise(case.tensors, wiring=case.wiring, labels=case.y)
    with pytest.raises(UnprovedWiringError):
        excise(case.tensors, wiring=case.wiring.with_(status="unverified"), inputs=case.x[:10])


def test_random_changes_stay_in_range_and_differ_from_input_to_input() -> None:
    x = torch.rand(1, 3, 12, 10).expand(40, -1, -1, -1) * 4 - 1
    seen = corrupted(x, torch.Generator().manual_seed(0))
    assert seen.shape == x.shape
    assert float(seen.min()) >= float(x.min()) - 1e-5
    assert float(seen.max()) <= float(x.max()) + 1e-5
    assert len(torch.unique(seen.flatten(1), dim=0)) > 30
    again = corrupted(x, torch.Generator().manual_seed(0))
    assert torch.equal(seen, again)
    for family in FAMILIES:
        one = family((x[:8] + 1) / 4, torch.Generator().manual_seed(1))
        assert one.shape == x[:8].shape
        assert not torch.allclose(one, (x[:8] + 1) / 4)
    rows = torch.randn(5, 7)
    assert corrupted(rows, torch.Generator().manual_seed(0)).shape == rows.shape


def test_the_command_writes_the_network_and_says_what_was_done(tmp_path: Path) -> None:
    torch.manual_seed(0)
    module = torch.nn.Sequential(torch.nn.Linear(6, 16), torch.nn.ReLU(), torch.nn.Linear(16, 3))
    file, data, out = (tmp_path / f"{name}.safetensors" for name in ("model", "data", "out"))
    save_file(module.state_dict(), file)
    save_file({"inputs": torch.randn(20, 6), "labels": torch.randint(3, (20,))}, data)
    given = ["excise", str(file), "--out", str(out), "--inputs", str(data), "--target", "1"]
    found = CliRunner().invoke(app, [*given, "--json"])
    assert found.exit_code == 0, found.output
    told = json.loads(found.stdout)
    assert (told["targets"], told["path"]) == ([1], str(out))
    written = open_checkpoint(out)
    assert list(written) == list(open_checkpoint(file))
    assert set(told["changes"]) == {n for n in written if not torch.equal(written[n], module.state_dict()[n])} != set()
    assert CliRunner().invoke(app, [*given, "--method", "unlearn"]).exit_code == 0
    assert CliRunner().invoke(app, [*given, "--method", "forget"]).exit_code
    assert CliRunner().invoke(app, [*given[:-1], "9"]).exit_code
    assert CliRunner().invoke(app, ["excise", str(tmp_path / "none"), "--out", str(out)]).exit_code
