"""What ``ws.wiring`` does with files: the catalogue, the chain of last resort, and honest refusals."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import weightspace as ws
from weightspace.errors import WiringError


def save(path: Path, tensors: dict[str, torch.Tensor]) -> Path:
    torch.save(tensors, path)
    return path


def test_a_bare_state_dict_goes_through_the_catalogue(tmp_path: Path) -> None:
    module = nn.Sequential(nn.Linear(6, 9), nn.ReLU(), nn.Linear(9, 7), nn.ReLU(), nn.Linear(7, 4))
    wiring = ws.wiring(save(tmp_path / "m.pt", module.state_dict()))
    assert wiring.origin.startswith("catalogue:")
    assert wiring.proved
    assert sorted(f.size for f in wiring.free.values()) == [7, 9]
    assert set(wiring) == set(module.state_dict())
    assert ws.wiring(module.state_dict()).proved


def test_layers_of_equal_width_are_a_guess(tmp_path: Path) -> None:
    # A skip connection between two layers of 8 would not show in names or shapes.
    module = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
    wiring = ws.wiring(save(tmp_path / "m.pt", module.state_dict()))
    assert wiring.status == "unverified"
    assert any("guess" in note for note in wiring.notes)


def test_a_chain_of_unknown_names_is_unverified(tmp_path: Path) -> None:
    tensors = {"alpha": torch.randn(9, 6), "beta": torch.randn(9), "gamma": torch.randn(4, 9)}
    wiring = ws.wiring(save(tmp_path / "m.pt", tensors))
    assert wiring.status == "unverified"
    assert wiring.origin == "chain"
    assert wiring["alpha"][0] == wiring["beta"][0] == wiring["gamma"][1]
    assert wiring["alpha"][1].kind == wiring["gamma"][0].kind == "pinned"
    moved = wiring.apply(wiring.random(0), tensors)
    x = torch.randn(5, 6)

    def run(t: dict[str, torch.Tensor]) -> torch.Tensor:
        return torch.relu(x @ t["alpha"].T + t["beta"]) @ t["gamma"].T

    assert torch.allclose(run(tensors), run(moved), atol=1e-5)


def test_what_does_not_line_up_is_refused_with_the_remedy(tmp_path: Path) -> None:
    tensors = {"a": torch.randn(9, 6), "b": torch.randn(5, 7)}
    with pytest.raises(WiringError, match=r"ws\.wiring\(module, x\), or add a family to graphs/"):
        ws.wiring(save(tmp_path / "m.pt", tensors))


def test_tensors_outside_the_function_join_pinned(tmp_path: Path) -> None:
    module = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(32, 4))
    state = module.state_dict()
    wiring = ws.wiring(save(tmp_path / "m.pt", state))
    assert set(wiring) == set(state)
    assert "1.num_batches_tracked" in wiring
    assert torch.equal(wiring.apply(wiring.random(1), state)["1.num_batches_tracked"], state["1.num_batches_tracked"])


def test_a_family_of_ones_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine.py").write_text(
        "import torch\nfrom torch import nn\nimport weightspace as ws\n"
        "FAMILY = 'mine'\nPRIORITY = 1\n"
        "class Net(nn.Module):\n"
        "    def __init__(self):\n        super().__init__()\n        self.q = nn.Linear(5, 6)\n"
        "    def forward(self, x):\n        return self.q(x).sum(-1)\n"
        "def build(signature):\n"
        "    if set(signature.shapes) != {'q.weight', 'q.bias'}:\n        return None\n"
        "    return ws.Skeleton(Net(), (torch.randn(2, 5),), 'Mine')\n"
    )
    monkeypatch.setenv("WEIGHTSPACE_GRAPHS", str(tmp_path))
    path = save(tmp_path / "m.pt", {f"q.{k}": v for k, v in nn.Linear(5, 6).state_dict().items()})
    wiring = ws.wiring(path)
    assert wiring.origin == "catalogue:mine"
    assert [f.size for f in wiring.free.values()] == [6]
    # A skeleton of other shapes does not account for the file.
    other = save(tmp_path / "o.pt", {"q.weight": torch.zeros(7, 5), "q.bias": torch.zeros(7)})
    assert ws.wiring(other).origin != "catalogue:mine"


def test_inputs_that_the_network_does_not_take_are_shown() -> None:
    net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    with pytest.raises(TypeError) as caught:
        ws.wiring(net, (torch.rand(2, 3),))
    assert "ran Sequential on (tuple); example inputs are given as for its forward" in caught.value.__notes__[0]
    with pytest.raises(RuntimeError) as other:
        ws.wiring(net, torch.rand(2, 5))
    assert "((2, 5))" in other.value.__notes__[0]
