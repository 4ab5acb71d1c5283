"""Network descriptions: each kind is built, proved, and read back from a file; nonsense is declined with a reason."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import weightspace as ws
from weightspace.card import RECORD_KEY
from weightspace.errors import ZooError
from weightspace.wiring import entry
from weightspace.wiring.catalogue import recognise, signature_of
from weightspace.zoo.architectures import ACTIVATIONS
from weightspace.zoo.description import module_of

CNN: dict[str, Any] = {
    "kind": "cnn", "input": [1, 12, 12], "classes": 3, "channels": [4, 8, 8], "kernels": [3, 5, 3],
    "strides": [2, 1, 1], "activation": "relu", "norm": "none", "residuals": [False, False, False], "same": True,
}  # fmt: skip
DESCRIPTIONS: dict[str, dict[str, Any]] = {
    "mlp": {"kind": "mlp", "input": [1, 4, 4], "classes": 3, "widths": [6, 5], "activation": "tanh"},
    "cnn": CNN,
    "cnn-valid": {**CNN, "same": False, "kernels": [3, 3, 3], "activation": "tanh"},
    "cnn-batch": {**CNN, "norm": "batch", "residuals": [True, True, True], "activation": "sigmoid"},
    "cnn-group": {**CNN, "norm": "group", "residuals": [False, True, True], "activation": "gelu"},
    "cnn-layer": {**CNN, "norm": "layer", "residuals": [False, False, True], "activation": "silu"},
    "resnet": {"kind": "resnet", "input": [1, 12, 12], "classes": 3, "channels": [4, 6], "activation": "relu"},
    "vit": {
        "kind": "vit", "input": [1, 8, 8], "classes": 3, "patch": 4, "dim": 8, "depth": 2, "heads": 2, "hidden": 12,
        "activation": "gelu",
    },
    "gpt": {
        "kind": "gpt", "input": [6], "classes": 9, "dim": 8, "depth": 2, "heads": 2, "hidden": 12, "activation": "gelu",
    },
    "staged-resnet": {
        "kind": "staged-resnet", "input": [1, 8, 8], "classes": 3, "channels": [4, 6], "blocks": 2,
        "activation": "relu",
    },
    "vgg": {
        "kind": "vgg", "input": [1, 8, 8], "classes": 3, "channels": [4, 6, 6], "pools": [True, False, True],
        "activation": "relu",
    },
    "siren": {"kind": "siren", "input": [2], "classes": 1, "widths": [6, 6], "omega": 30.0},
}  # fmt: skip


def _file(path: Path, described: Any, state: dict[str, torch.Tensor] | None = None, seed: int = 0) -> Path:
    if state is None:
        torch.manual_seed(seed)
        state = dict(module_of(described)[0].state_dict())
    save_file(state, path, metadata={RECORD_KEY: json.dumps({"network": described})})
    return path


@pytest.mark.parametrize("name", DESCRIPTIONS)
def test_every_kind_is_proved_from_its_file(name: str, tmp_path: Path) -> None:
    description = DESCRIPTIONS[name]
    path = _file(tmp_path / "x.safetensors", description)
    wiring = ws.wiring(ws.open(path))
    assert wiring.status == "proved"
    assert wiring.origin == "catalogue:recipes"
    assert wiring.movable_share > 0.5
    assert not wiring.missing
    # What is built from the record is the network itself.
    module, inputs = module_of(description)
    state = dict(ws.open(path))
    module.load_state_dict(state)
    assert wiring.program is not None
    floats = {n: t for n, t in state.items() if n in wiring.program.tensors}
    with torch.no_grad():
        assert torch.allclose(module.eval()(*inputs), wiring.program.run(floats, *inputs), atol=1e-6)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_activation_is_proved(activation: str) -> None:
    module, inputs = module_of({**CNN, "activation": activation, "residuals": [False, True, True]})
    assert ws.wiring(module.eval(), *inputs).status == "proved"


def test_nothing_is_dropped_without_a_mask_and_the_mask_takes_whole_channels() -> None:
    for name in ("mlp", "cnn-batch", "resnet"):
        module, (x,) = module_of(DESCRIPTIONS[name])
        module.eval()
        ones = torch.ones(2, module.droppable)
        with torch.no_grad():
            assert torch.equal(module(x), module(x, ones))
            nothing = module(x, torch.zeros_like(ones))
        assert not torch.allclose(module(x), nothing)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "tree"}, "unknown kind"),
        ({"kind": ["cnn"]}, "unknown kind"),
        ({"activation": "__import__"}, "activation"),
        ({"activation": ["relu"]}, "activation"),
        ({"norm": "spectral"}, "norm"),
        ({"channels": [4, 8, 10**9]}, "channels"),
        ({"channels": [4, 8, True]}, "channels"),
        ({"channels": [4, 8, 8.0]}, "channels"),
        ({"channels": []}, "channels"),
        ({"channels": [4] * 1000}, "channels"),
        ({"classes": 0}, "classes"),
        ({"classes": -3}, "classes"),
        ({"input": [1, 12]}, "input"),
        ({"input": [1, 10000, 10000]}, "values"),
        ({"input": [1, 2000, 2000], "strides": [1, 1, 1]}, "values"),
        ({"kernels": [3, 3]}, "differ in length"),
        ({"kernels": [3, 4, 3]}, "odd"),
        ({"residuals": [0, 0, 0]}, "residuals"),
        ({"same": False, "residuals": [False, False, True]}, "residuals need padding"),
        ({"same": False, "strides": [4, 4, 4]}, "nothing is left"),
        ({"norm": "group", "channels": [4, 8, 6]}, "multiples"),
        ({"code": "print(1)"}, "unknown entries"),
    ],
)
def test_descriptions_that_make_no_sense_are_named(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ZooError, match=message):
        module_of({**CNN, **change})
    with pytest.raises(ZooError, match="missing entries"):
        module_of({key: value for key, value in {**CNN, "kind": "cnn"}.items() if key != "strides"})


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("vit", {"patch": 3}, "tile"),
        ("vit", {"heads": 3}, "divide"),
        ("vit", {"input": [1, 1024, 1024]}, "patches"),
        ("gpt", {"input": [4096]}, "length"),
        ("gpt", {"dim": 128, "heads": 128}, "heads"),
        ("resnet", {"input": [1, 1024, 1024], "channels": [1, 9999]}, "values"),
        ("gpt", {"input": [6, 6]}, "one length"),
        ("gpt", {"depth": 65}, "depth"),
        ("siren", {"omega": float("inf")}, "omega"),
        ("staged-resnet", {"blocks": 40}, "80 blocks"),
        ("vgg", {"pools": [True]}, "3 channels and 1 pools"),
        ("vgg", {"input": [1, 2, 2]}, "nothing is left"),
        ("siren", {"input": [2, 2]}, "coordinates"),
        ("mlp", {"input": [1000, 1000, 1000]}, "values"),
    ],
)
def test_each_kind_checks_its_own_entries(name: str, change: dict[str, Any], message: str) -> None:
    with pytest.raises(ZooError, match=message):
        module_of({**DESCRIPTIONS[name], **change})


@pytest.mark.parametrize(
    "lie", [{**CNN, "channels": [4, 8, 12]}, {**CNN, "norm": "batch"}, {**CNN, "kind": "tree"}, [1, 2], "cnn"]
)
def test_a_record_that_does_not_fit_the_tensors_is_declined(lie: Any, tmp_path: Path) -> None:
    state = dict(module_of(CNN)[0].state_dict())
    path = _file(tmp_path / "lie.safetensors", lie, state)
    recognition = recognise(signature_of(ws.open(path)))
    assert any(reason.startswith("recipes: ") for reason in recognition.declined)
    assert recognition.family is None or recognition.family.name != "recipes"


# ------------------------------------------------------------------------------------ one proof for many files


def test_files_of_one_program_share_a_proof_and_can_be_verified_each(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    entry._PROVED.clear()
    calls = []
    original = entry.from_program
    monkeypatch.setattr(entry, "from_program", lambda *a, **k: calls.append(1) or original(*a, **k))
    files = [_file(tmp_path / f"{i}.safetensors", CNN, seed=i) for i in range(3)]
    found = [ws.wiring(ws.open(path)) for path in files]
    assert len(calls) == 1
    assert all(w.proved for w in found)
    assert found[1].proof is not None
    assert found[1].proof.on == "a network of the same program"
    assert all(w.layouts == found[0].layouts for w in found)
    for path, w in zip(files, found, strict=True):
        assert w.program is not None
        assert torch.equal(w.program.tensors["conv.0.weight"], ws.open(path)["conv.0.weight"])
        assert w.verify(seed=3).holds
    # Another seed asks for another proof.
    assert ws.wiring(ws.open(files[0]), seed=1).proved
    assert len(calls) == 2


def test_programs_that_differ_share_nothing(tmp_path: Path) -> None:
    """Descriptions with the same tensors but another function: their wirings differ."""
    entry._PROVED.clear()
    straight = {**CNN, "channels": [8, 8, 8]}
    around = {**straight, "residuals": [False, True, True]}
    a = ws.wiring(ws.open(_file(tmp_path / "a.safetensors", straight)))
    b = ws.wiring(ws.open(_file(tmp_path / "b.safetensors", around)))
    assert {n: tuple(t.shape) for n, t in ws.open(tmp_path / "a.safetensors").items()} == {
        n: tuple(t.shape) for n, t in ws.open(tmp_path / "b.safetensors").items()
    }
    assert (len(a.free), len(b.free)) == (3, 1)
    assert len(entry._PROVED) == 2


def test_a_network_of_nans_is_still_wired(tmp_path: Path) -> None:
    entry._PROVED.clear()
    state = {n: torch.full_like(t, float("nan")) for n, t in module_of(CNN)[0].state_dict().items()}
    assert ws.wiring(ws.open(_file(tmp_path / "n.safetensors", CNN, state))).status in ("proved", "failed")
    assert ws.wiring(ws.open(_file(tmp_path / "good.safetensors", CNN))).proved
