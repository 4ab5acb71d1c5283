"""``weightspace align A B``: files in, a moved file out, figures as a table or as JSON."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner

import weightspace as ws
from tests.align.small import DESCRIPTIONS
from weightspace.align.commands import align_files
from weightspace.cli import app
from weightspace.errors import AlignmentError
from weightspace.wiring.wiring import Wiring
from weightspace.zoo.description import module_of
from weightspace.zoo.files import save_network


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path, dict[str, Tensor], Wiring]:
    """A network and a copy of it in another order, as files whose records say what network they are."""
    torch.manual_seed(0)
    module, _ = module_of(DESCRIPTIONS["mlp"])
    tensors = {n: t.detach().clone() for n, t in module.state_dict().items()}
    save_network(tensors, {"network": DESCRIPTIONS["mlp"]}, tmp_path / "a.safetensors")
    wiring = ws.wiring(tmp_path / "a.safetensors")
    assert wiring.proved
    moved = wiring.apply(wiring.random(3), tensors)
    save_network(moved, {"network": DESCRIPTIONS["mlp"]}, tmp_path / "b.safetensors")
    return tmp_path / "a.safetensors", tmp_path / "b.safetensors", tensors, wiring


def test_a_copy_is_moved_back(pair: tuple[Path, Path, dict[str, Tensor], Wiring], tmp_path: Path) -> None:
    a, b, tensors, _ = pair
    out = tmp_path / "moved.safetensors"
    result = CliRunner().invoke(app, ["align", str(a), str(b), "--out", str(out)])
    assert result.exit_code == 0, result.output
    assert "→ 1.0000" in result.output
    assert "hidden.0" in result.output
    written = ws.open(out)
    assert all(torch.equal(written[n], t) for n, t in tensors.items())


@pytest.mark.parametrize("method", ["frank-wolfe", "sinkhorn", "attention", "learned"])
def test_figures_as_json(pair: tuple[Path, Path, dict[str, Tensor], Wiring], tmp_path: Path, method: str) -> None:
    a, b, tensors, wiring = pair
    out = tmp_path / "moved.pt"
    result = CliRunner().invoke(app, ["align", str(a), str(b), "--out", str(out), "--method", method, "--json"])
    assert result.exit_code == 0, result.output
    figures = json.loads(result.stdout)
    assert figures["method"] == method
    assert figures["objective"] == pytest.approx(1, abs=1e-4)
    assert figures["out"] == str(out)
    assert set(figures["permutations"]) == set(wiring.free)
    assert all(torch.equal(ws.open(out)[n], t) for n, t in tensors.items())


def test_options_and_inputs(pair: tuple[Path, Path, dict[str, Tensor], Wiring], tmp_path: Path) -> None:
    a, b, _, _ = pair
    from safetensors.torch import save_file

    save_file({"x": torch.randn(64, 12)}, tmp_path / "x.safetensors")
    command = ["align", str(a), str(b), "--method", "activation-matching", "--json"]
    result = CliRunner().invoke(app, [*command, "--inputs", str(tmp_path / "x.safetensors"), "--option", "at=pre"])
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["objective"] > 0.99
    result = CliRunner().invoke(app, ["align", str(a), str(b), "--option", "kicks=3", "--json"])
    assert json.loads(result.stdout)["diagnostics"]["kicks"] == 3


def test_nothing_is_written_where_it_fails(pair: tuple[Path, Path, dict[str, Tensor], Wiring], tmp_path: Path) -> None:
    a, b, tensors, _ = pair
    out = tmp_path / "moved.safetensors"
    with pytest.raises(AlignmentError, match="no alignment method"):
        align_files(str(a), str(b), out, method="nearest")
    with pytest.raises(AlignmentError, match="needs inputs"):
        align_files(str(a), str(b), out, method="activation-matching")
    with pytest.raises(AlignmentError, match=r"cannot write \.onnx"):
        align_files(str(a), str(b), tmp_path / "moved.onnx")
    broken = {n: torch.full_like(t, float("nan")) for n, t in tensors.items()}
    save_network(broken, {"network": DESCRIPTIONS["mlp"]}, tmp_path / "broken.safetensors")
    with pytest.raises(AlignmentError, match="infinite or no numbers"):
        align_files(str(a), str(tmp_path / "broken.safetensors"), out)
    result = CliRunner().invoke(app, ["align", str(a), str(tmp_path / "broken.safetensors"), "-o", str(out)])
    assert result.exit_code != 0
    assert not out.exists()
