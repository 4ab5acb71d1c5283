"""Searches of a zoo by rows of a task, by architecture and by filters, on networks trained here in seconds."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

import weightspace as ws
from tests.lineage.trees import family, train, write
from weightspace.errors import WeightspaceError, ZooError
from weightspace.zoo.data import load_data
from weightspace.zoo.description import module_of
from weightspace.zoo.files import save_network


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> ws.Zoo:
    folder = tmp_path_factory.mktemp("zoo")
    nets = {"all": family()["root"], "low": train(None, 7, (0, 1, 2, 3, 4), 300), "untrained": train(None, 8, (), 0)}
    records = {"all": {"test_accuracy": 0.9}, "low": {"test_accuracy": 0.5, "task": "low digits"}}
    write(folder, nets, **records)
    described = {
        "kind": "cnn", "input": [1, 8, 8], "classes": 10, "channels": [8, 8], "kernels": [3, 3], "strides": [1, 1],
        "activation": "relu", "norm": "batch", "residuals": [False, False], "same": True,
    }  # fmt: skip
    for name, channels in (("cnn", [8, 8]), ("cnn-wide", [16, 24])):
        network = {**described, "channels": channels}
        module, _ = module_of(network)
        save_network(module.state_dict(), {"network": network}, folder / f"{name}.safetensors")
    flat = {"kind": "mlp", "input": [5], "classes": 3, "widths": [8], "activation": "tanh"}
    module, _ = module_of(flat)
    save_network(module.state_dict(), {"network": flat}, folder / "other-inputs.safetensors")
    found = ws.Zoo(folder)
    found.index(jobs=1, progress=False)
    return found


def rows(classes: tuple[int, ...], count: int = 60) -> tuple[torch.Tensor, torch.Tensor]:
    data = load_data("digits")
    chosen = torch.isin(data.test_y, torch.tensor(classes))
    return data.test_x[chosen][:count], data.test_y[chosen][:count]


def test_the_model_that_knows_a_task_is_found_whatever_its_classes_are_called(zoo: ws.Zoo) -> None:
    x, y = rows((5, 6, 7, 8, 9))
    found = zoo.search_task(x, y)
    assert found[0].name == "all.safetensors"
    assert found[0].facts["direct"] > 0.8
    names = [f"class {(int(c) * 7) % 10}" for c in y]
    renamed = zoo.search_task(x, names)
    assert [h.name for h in renamed] == [h.name for h in found]
    assert [h.score for h in renamed] == pytest.approx([h.score for h in found])
    assert renamed[0].facts["direct"] is None
    untrained = next(h for h in found if h.name == "untrained.safetensors")
    assert found[0].score > untrained.score + 0.2


def test_models_that_cannot_take_the_rows_are_left_out_and_say_why(zoo: ws.Zoo) -> None:
    x, y = rows((0, 1))
    found = zoo.search_task(x, y)
    assert "shape [5]" in found.left_out["other-inputs.safetensors"]
    assert set(found.left_out) | {h.name for h in found} == set(zoo.table().index)
    flat = zoo.search_task(x.flatten(1), y)
    assert "reshaped" in flat[0].why
    tokens = zoo.search_task(torch.randint(9, (20, 5)), torch.arange(20) % 2)
    assert not len(tokens)
    assert "takes numbers" in tokens.left_out["all.safetensors"]


def test_numbers_are_explained_by_outputs(zoo: ws.Zoo) -> None:
    x, y = rows((0, 1, 2, 3, 4), 80)
    found = zoo.search_task(x, (y == 2).to(torch.float64))
    known = {h.name: h.score for h in found}
    assert known["low.safetensors"] > 0.5 > known["untrained.safetensors"]


@pytest.mark.parametrize(("labels", "what"), [(torch.zeros(48), "differ"), (torch.zeros(48).long(), "two or more")])
def test_labels_of_no_use_are_refused(zoo: ws.Zoo, labels: torch.Tensor, what: str) -> None:
    with pytest.raises(WeightspaceError, match=what):
        zoo.search_task(rows((0, 1), 48)[0], labels)


def test_architectures_are_found_at_other_widths(zoo: ws.Zoo) -> None:
    found = zoo.search_architecture("cnn.safetensors")
    assert found[0].name == "cnn-wide.safetensors"
    assert found[0].score == pytest.approx(1)
    assert "same graph" in found[0].why
    assert {h.name for h in found} == set(zoo.table().index) - {"cnn.safetensors"}
    assert found[1].score < 0.7
    by_module = zoo.search_architecture(nn.Sequential(nn.Linear(5, 30), nn.Tanh(), nn.Linear(30, 3)), torch.rand(2, 5))
    assert by_module[0].name == "other-inputs.safetensors"
    assert (zoo.index_folder / "graphs.json").is_file()


def test_filters_name_what_they_met(zoo: ws.Zoo) -> None:
    found = zoo.search("test_accuracy > 0.8")
    assert [h.name for h in found] == ["all.safetensors"]
    assert found[0].why == "test_accuracy is 0.9"
    assert found.left_out["cnn.safetensors"] == "it has no test_accuracy"
    assert {h.name for h in zoo.search("name ~ CNN", "parameters < 1e5")} == {"cnn.safetensors", "cnn-wide.safetensors"}
    assert len(zoo.search()) == 6
    json.dumps(found.to_json())
    assert len(found.table()) == 1


@pytest.mark.parametrize("text", ["accuracy", "colour = red", "name < 3"])
def test_conditions_that_are_none_are_refused(zoo: ws.Zoo, text: str) -> None:
    with pytest.raises(ZooError):
        zoo.search(text)


def test_an_index_that_cannot_be_written_to_is_read_all_the_same(zoo: ws.Zoo, tmp_path: Path) -> None:
    file = zoo.index_folder / "graphs.json"
    kept = file.read_bytes() if file.is_file() else b"{}"
    file.write_text("not json")
    assert zoo.search_architecture("cnn.safetensors")[0].name == "cnn-wide.safetensors"
    file.write_bytes(kept)
