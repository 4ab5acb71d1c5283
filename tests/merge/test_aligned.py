"""Models moved onto each other before they are merged, repaired after; inputs from files, in recipes and commands."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from typer.testing import CliRunner

import weightspace as ws
from weightspace.cli import app
from weightspace.errors import AlignmentError, MergeError, UnprovedWiringError
from weightspace.merge.data import MergeData
from weightspace.merge.inputs import load
from weightspace.merge.recipe import from_table, read
from weightspace.wiring.wiring import Wiring
from weightspace.zoo.description import module_of
from weightspace.zoo.files import save_network

State = dict[str, Tensor]


def perceptron(width: int = 12, seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 4))


def convolutional(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(2, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8),
        nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3),
    ).eval()  # fmt: skip


def state(module: nn.Module) -> State:
    return {name: t.detach().clone() for name, t in module.state_dict().items()}


def mixed(wiring: Wiring, tensors: State, count: int) -> list[State]:
    """The same network with its neurons in other orders."""
    return [wiring.apply(wiring.random(seed), tensors) for seed in range(1, count + 1)]


def near(a: Any, b: State, tolerance: float = 1e-5) -> bool:
    return all(torch.allclose(a[n].float(), b[n].float(), atol=tolerance) for n in b)


@pytest.fixture(scope="module")
def network() -> tuple[State, Wiring]:
    module = perceptron()
    return state(module), ws.wiring(module, torch.randn(5, 6))


@pytest.mark.parametrize("method", ["linear", "slerp"])
@pytest.mark.parametrize("align", ["weight-matching", "universe", "frank-wolfe"])
def test_permuted_copies_give_the_network_back(network: tuple[State, Wiring], method: str, align: str) -> None:
    first, wiring = network
    models = [first, *mixed(wiring, first, 1 if method == "slerp" else 3)]
    apart = ws.merge(models, method, wiring=wiring)
    merged = ws.merge(models, method, wiring=wiring, align=align)
    assert not near(apart.open(), first, 1e-2)
    assert near(merged.open(), first)
    assert any("weight cosine" in note and "1.0000" in note for note in merged.report.notes)
    assert merged.report.settings["align"] == align


@pytest.mark.parametrize("align", ["weight-matching", "universe"])
def test_models_are_moved_onto_the_base(network: tuple[State, Wiring], align: str) -> None:
    base, wiring = network
    moved = mixed(wiring, base, 3)
    tuned = [{n: t + 0.01 * torch.randn(t.shape) for n, t in m.items()} for m in moved]
    merged = ws.merge(tuned, "task-arithmetic", base=base, scale=1 / 3, wiring=wiring, align=align)
    assert near(merged.open(), base, 0.05)
    with pytest.raises(MergeError, match="no alignment method 'weights'"):
        ws.merge(tuned, "linear", wiring=wiring, align="weights")


def test_moved_models_are_read_tensor_by_tensor(network: tuple[State, Wiring], tmp_path: Path) -> None:
    """From files to a file; types are kept, and what stands beside the weights is the first model's."""
    first, wiring = network
    folders = []
    for i, tensors in enumerate([first, *mixed(wiring, first, 2)]):
        folder = tmp_path / f"m{i}"
        folder.mkdir()
        save_file({n: t.bfloat16() for n, t in tensors.items()}, folder / "model.safetensors")
        (folder / "config.json").write_text(json.dumps({"model_type": "none", "who": i}))
        folders.append(folder)
    out = ws.merge(folders, "linear", out=tmp_path / "out", wiring=wiring, align="weight-matching").path
    assert out is not None
    got = ws.open(out)
    assert got.dtypes == dict.fromkeys(first, torch.bfloat16)
    assert near(got, {n: t.bfloat16() for n, t in first.items()}, 0)
    assert json.loads((out / "config.json").read_text())["who"] == 0


def test_alignment_by_activations_takes_the_data(network: tuple[State, Wiring]) -> None:
    first, wiring = network
    models = [first, *mixed(wiring, first, 1)]
    x = torch.randn(64, 6)
    assert near(ws.merge(models, "linear", wiring=wiring, align="activation-matching", data=x).open(), first)
    with pytest.raises(MergeError, match="give inputs as data="):
        ws.merge(models, "linear", wiring=wiring, align="activation-matching")
    with pytest.raises(MergeError, match="repair='weights'"):
        ws.merge(models, "linear", wiring=wiring, repair="data")
    with pytest.raises(MergeError, match="one of data, statistics, weights"):
        ws.merge(models, "linear", wiring=wiring, repair="all")


def test_other_widths(tmp_path: Path) -> None:
    """Refused with the way out; the way out works."""
    a, b = perceptron(12), perceptron(9, 1)
    wiring = ws.wiring(a, torch.randn(5, 6))
    with pytest.raises(MergeError, match=r"align='optimal-transport'"):
        ws.merge([a, b], "linear", wiring=wiring)
    with pytest.raises(AlignmentError, match="other widths"):
        ws.merge([a, b], "linear", wiring=wiring, align="weight-matching")
    pytest.importorskip("ot")
    merged = ws.merge(
        [state(a), state(b)], "linear", wiring=wiring, align="optimal-transport", unverified=True, repair="weights",
        out=tmp_path / "o.safetensors",
    )  # fmt: skip
    got = load_file(tmp_path / "o.safetensors")
    assert {n: t.shape for n, t in got.items()} == {n: t.shape for n, t in a.state_dict().items()}
    assert merged.report.settings["repair"] == "weights"


def test_guesses_are_not_merged_by(network: tuple[State, Wiring]) -> None:
    first, wiring = network
    guess = wiring.with_(status="unverified", proof=None)
    models = [first, *mixed(wiring, first, 1)]
    with pytest.raises(UnprovedWiringError):
        ws.merge(models, "linear", wiring=guess, align="weight-matching")
    with pytest.raises(UnprovedWiringError):
        ws.merge(models, "linear", wiring=guess, repair="weights")
    assert near(ws.merge(models, "linear", wiring=guess, align="weight-matching", unverified=True).open(), first)


def spread(module: nn.Sequential, x: Tensor, layer: int) -> Tensor:
    with torch.no_grad():
        return nn.Sequential(*list(module)[: layer + 1])(x).std(0)


def test_repair_gives_layers_the_spread_of_the_ends(network: tuple[State, Wiring]) -> None:
    _, wiring = network
    a, b = perceptron(seed=3), perceptron(seed=4)
    x = torch.randn(400, 6)
    wanted = (spread(a, x, 2) + spread(b, x, 2)) / 2
    lost = []
    for repair in (None, "data"):
        merged = perceptron()
        merged.load_state_dict(dict(ws.merge([a, b], "linear", wiring=wiring, data=x, repair=repair).open()))
        lost.append(float((spread(merged, x, 2) - wanted).abs().max()))
    assert lost[1] < 1e-4 < lost[0]


def test_running_statistics_are_measured_anew() -> None:
    a, b = convolutional(0), convolutional(1)
    x = torch.randn(96, 2, 6, 6)
    wiring = ws.wiring(a, x[:2])
    plain = ws.merge([a, b], "linear", wiring=wiring).open()
    merged = ws.merge([a, b], "linear", wiring=wiring, data=x, repair="statistics")
    got = merged.open()
    with torch.no_grad():
        first = nn.functional.conv2d(x, plain["0.weight"], plain["0.bias"], padding=1)
    assert torch.allclose(got["1.running_mean"], first.mean((0, 2, 3)), atol=1e-5)
    assert torch.equal(got["0.weight"], plain["0.weight"])
    assert any("running statistics" in note for note in merged.report.notes)


# ------------------------------------------------------------------------------------ recipes, commands, files


@pytest.fixture
def folder(network: tuple[State, Wiring], tmp_path: Path) -> Path:
    first, wiring = network
    for i, tensors in enumerate([first, *mixed(wiring, first, 2)]):
        save_file(tensors, tmp_path / f"{i}.safetensors")
    save_file({"x": torch.randn(40, 6), "labels": torch.randint(4, (40,))}, tmp_path / "inputs.safetensors")
    return tmp_path


def test_a_recipe_that_aligns(folder: Path, network: tuple[State, Wiring]) -> None:
    (folder / "r.toml").write_text(
        'method = "linear"\nalign = "weight-matching"\nunverified = true\n[[models]]\npath = "0.safetensors"\n'
        '[[models]]\npath = "1.safetensors"\n[[models]]\npath = "2.safetensors"\n'
    )
    assert near(read(folder / "r.toml").run().open(), network[0])
    with pytest.raises(MergeError, match="mergekit cannot align"):
        read(folder / "r.toml").to_mergekit()
    with pytest.raises(MergeError, match="align is 3; str was expected"):
        from_table({"method": "linear", "align": 3, "models": ["a"]})


def test_the_command_aligns_and_takes_data(folder: Path, network: tuple[State, Wiring]) -> None:
    files = [str(folder / f"{i}.safetensors") for i in range(3)]
    out, words = folder / "o.safetensors", ["--align", "weight-matching", "--unverified"]
    done = CliRunner().invoke(app, ["merge", *files, "-o", str(out), *words])
    assert done.exit_code == 0, done.output
    assert near(load_file(out), network[0])
    assert "common frame" in done.output
    networks = []
    for i in range(2):
        described = {"kind": "mlp", "input": [6], "classes": 4, "widths": [8], "activation": "relu"}
        networks.append(folder / f"net-{i}.safetensors")
        save_network(module_of(described)[0].state_dict(), {"network": described, "run": str(i)}, networks[-1])
    command = ["merge", *map(str, networks), "-m", "regmean", "-o", str(out)]
    done = CliRunner().invoke(app, [*command, "--data", str(folder / "inputs.safetensors"), "--repair", "data"])
    assert done.exit_code == 0, done.output
    assert "layers have the statistics" in " ".join(done.output.split())
    assert ws.wiring(out).proved  # the result says what network it is, as its models do
    done = CliRunner().invoke(app, command)
    assert done.exit_code != 0
    assert "give them as data=" in str(done.exception)
    done = CliRunner().invoke(app, ["merge", *files, "-o", str(out), "--data", "a", "--data", "b"])
    assert done.exit_code != 0
    assert "2 files of data for 3 models" in str(done.exception)


def test_data_of_each_model(folder: Path) -> None:
    table: dict[str, Any] = {"method": "fisher", "models": [{"path": "0.safetensors", "data": "inputs.safetensors"},
                                                            {"path": "1.safetensors"}]}  # fmt: skip
    recipe = replace(from_table(table), folder=folder)
    with pytest.raises(MergeError, match=r"1.safetensors has no data, others do"):
        recipe.run()


def test_inputs_from_files(tmp_path: Path) -> None:
    x, ids = torch.randn(4, 3), torch.arange(8).view(2, 4)
    save_file({"x": x, "y": torch.tensor([0, 1, 1, 0]), "outputs": torch.tensor([2, 3])}, tmp_path / "a.safetensors")
    found = load(str(tmp_path / "a.safetensors"))
    assert isinstance(found, MergeData)
    assert torch.equal(found.args[0], x)
    assert found.outputs == [2, 3]
    assert found.y is not None
    save_file({"input_ids": ids, "attention_mask": torch.ones_like(ids)}, tmp_path / "b.safetensors")
    assert set(load(str(tmp_path / "b.safetensors")).kwargs) == {"input_ids", "attention_mask"}
    save_file({"labels": torch.tensor([1])}, tmp_path / "c.safetensors")
    with pytest.raises(MergeError, match="holds no inputs, only labels"):
        load(str(tmp_path / "c.safetensors"))
    save_file({"x": x, "outputs": x.clone()}, tmp_path / "d.safetensors")
    with pytest.raises(MergeError, match="list of the numbers"):
        load(str(tmp_path / "d.safetensors"))
