"""Training a recipe: what is recorded, what is kept, what is made again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from weightspace.errors import ZooError
from weightspace.zoo.data import load_data
from weightspace.zoo.files import read_record
from weightspace.zoo.networks import Cnn, Mlp, build, from_shapes
from weightspace.zoo.recipe import parse
from weightspace.zoo.train import build_zoo


def _recipe(**changes: Any) -> dict[str, Any]:
    base = {"name": "base", "architecture": "cnn", "width": 4, "seeds": 2, **changes}
    child = {"name": "child", "parent": "base", "seeds": 1, "classes": [0, 1, 2]}
    copy = {"name": "copy", "parent": "base", "seeds": 1, "permuted": True}
    plain = {"name": "plain", "architecture": "mlp", "width": 8, "seeds": 1}
    shuffled = {"name": "shuffled", "parent": "plain", "seeds": 1, "permuted": True}
    population = [base, child, copy, plain, shuffled]
    return {
        "name": "tiny",
        "data": "digits",
        "defaults": {"epochs": 1, "learning_rate": 5e-3},
        "population": population,
    }


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("built")
    build_zoo(parse(_recipe()), folder, progress=False)
    return folder


def test_each_network_carries_its_record(built: Path) -> None:
    files = sorted(file.name for file in built.iterdir())
    assert files == [
        f"{name}.safetensors" for name in ("base-0", "base-1", "child-0", "copy-0", "plain-0", "shuffled-0")
    ]
    record = read_record(built / "child-0.safetensors")
    assert record["parent"] == "base-0.safetensors"
    assert record["task"] == "digits 0,1,2"
    assert record["relation"] == "fine-tuned"
    assert 0.4 < record["test_accuracy"] <= 1
    assert record["plan"]["epochs"] == 1
    assert not record["diverged"]


def test_the_same_recipe_gives_the_same_weights(built: Path, tmp_path: Path) -> None:
    for path in build_zoo(parse(_recipe()), tmp_path, progress=False):
        one, two = load_file(path), load_file(built / path.name)
        assert all(torch.equal(one[name], two[name]) for name in two)


@pytest.mark.parametrize(("copy", "original"), [("copy-0", "base-0"), ("shuffled-0", "plain-0")])
def test_a_permuted_copy_is_another_point_with_the_same_function(
    built: Path, copy: str, original: str
) -> None:
    moved, state = (load_file(built / f"{name}.safetensors") for name in (copy, original))
    found = from_shapes({name: tuple(value.shape) for name, value in state.items()})
    assert found is not None
    module = found[0].to_empty(device="cpu").eval()
    x = load_data("digits").test_x[:50].reshape(50, *found[1])
    with torch.no_grad():
        expected = torch.func.functional_call(module, state, (x,))
        assert torch.allclose(torch.func.functional_call(module, moved, (x,)), expected, atol=1e-5)
    assert any(not torch.equal(moved[name], state[name]) for name in state)


def test_what_is_there_is_kept_and_what_changed_is_made_again(tmp_path: Path) -> None:
    def times() -> dict[str, int]:
        return {file.name: file.stat().st_mtime_ns for file in tmp_path.iterdir()}

    build_zoo(parse(_recipe()), tmp_path, progress=False)
    before = times()
    (tmp_path / "plain-0.safetensors").unlink()
    (tmp_path / "child-0.safetensors").write_bytes(b"torn")
    build_zoo(parse(_recipe()), tmp_path, progress=False)
    after = times()
    remade = {name for name in before if before[name] != after[name]}
    assert remade == {"plain-0.safetensors", "shuffled-0.safetensors", "child-0.safetensors"}
    build_zoo(parse(_recipe(width=5)), tmp_path, progress=False)
    untouched = {name for name in before if times()[name] == after[name]}
    assert untouched == {"plain-0.safetensors", "shuffled-0.safetensors"}


def test_a_diverged_network_is_kept_and_said_to_be(tmp_path: Path) -> None:
    table = _recipe()
    table["population"] = [{**table["population"][3], "learning_rate": 1e30, "epochs": 2}]
    (path,) = build_zoo(parse(table), tmp_path, progress=False)
    record = read_record(path)
    assert record["diverged"] is True
    assert record["train_loss"] is None


def test_unknown_names_are_errors(tmp_path: Path) -> None:
    with pytest.raises(ZooError, match="mnist-of-mars"):
        load_data("mnist-of-mars")
    with pytest.raises(ZooError, match="architecture 'tree'"):
        build("tree", 3, (1, 8, 8), 10)


@pytest.mark.parametrize("module", [Mlp([64, 5, 6, 10]), Cnn([1, 3, 7], 8, 10), Cnn([3, 2, 4, 5], 32, 4)])
def test_a_network_is_found_again_from_its_shapes(module: torch.nn.Module) -> None:
    shapes = {name: tuple(value.shape) for name, value in module.state_dict().items()}
    found = from_shapes(shapes)
    assert found is not None
    again = {name: tuple(value.shape) for name, value in found[0].state_dict().items()}
    assert again == shapes
    assert module.eval()(torch.randn(2, *found[1])).shape[0] == 2
    assert from_shapes({"weight": (3, 3)}) is None
