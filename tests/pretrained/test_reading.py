"""``embed`` and ``predict_accuracy``: what moves them, what does not, and what they say outside their range."""

from __future__ import annotations

import math
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor, nn

import weightspace as ws
from weightspace.card import RECORD_KEY
from weightspace.errors import CheckpointError, MetanetError
from weightspace.metanets import OperatorMetanet
from weightspace.pretrained.model import Shipped, shipped
from weightspace.pretrained.views import canonical, clean
from weightspace.wiring.scaling import scaling
from weightspace.zoo.description import module_of

CNN: dict[str, Any] = {
    "kind": "cnn", "input": [1, 28, 28], "classes": 10, "channels": [16, 16, 16], "kernels": [3, 3, 3],
    "strides": [2, 2, 2], "activation": "relu", "norm": "batch", "residuals": [False] * 3, "same": False,
}  # fmt: skip


def _state(seed: int) -> tuple[nn.Module, dict[str, Tensor], tuple[Tensor, ...]]:
    torch.manual_seed(seed)
    module, inputs = module_of(CNN)
    state = {name: value.clone() for name, value in module.state_dict().items()}
    for name, value in state.items():
        if name.endswith(("running_mean", "running_var")):
            state[name] = value + 0.3 * torch.rand_like(value)
    module.load_state_dict(state)
    return module.eval(), state, inputs


def _save(path: Path, state: dict[str, Tensor], **record: Any) -> Path:
    import json

    save_file(state, path, {RECORD_KEY: json.dumps({"network": CNN, **record})})
    return path


def _away(a: Tensor | None, b: Tensor | None) -> float:
    assert a is not None
    assert b is not None
    return float((a.double() - b.double()).norm())


@settings(deadline=None, max_examples=6)
@given(seed=st.integers(0, 2**31))
def test_symmetric_copies_have_one_vector_and_others_do_not(seed: int) -> None:
    module, state, inputs = _state(seed % 1000)
    wiring = ws.wiring(module, *inputs)
    group = scaling(wiring)
    floating = {name: value for name, value in state.items() if value.is_floating_point()}
    moved = wiring.apply(wiring.random(seed), floating)
    scaled = group.apply(group.random(seed, 0.5), moved)
    found = [ws.embed(t, wiring=wiring, force=True).vector for t in (floating, moved, scaled)]
    assert _away(found[0], found[1]) < 1e-4
    assert _away(found[0], found[2]) < 1e-3
    other = ws.embed(_state(seed % 1000 + 1)[1], wiring=wiring, force=True).vector
    assert _away(found[0], other) > 0.02
    same = [ws.predict_accuracy(t, wiring=wiring, force=True).value for t in (floating, scaled)]
    assert same[0] == pytest.approx(same[1], abs=1e-3)


def test_counters_records_formats_and_dtypes_move_nothing(tmp_path: Path) -> None:
    _, state, _ = _state(0)
    plain = _save(tmp_path / "plain.safetensors", state, test_accuracy=0.1, epoch=1, run="a", optimiser="sgd")
    counted = {n: torch.tensor(98765) if "num_batches" in n else v for n, v in reversed(state.items())}
    told = _save(
        tmp_path / "another name.bin", counted, test_accuracy=0.99, epoch=500, run="b", seconds=1e9, task="secret"
    )
    double = _save(tmp_path / "double.safetensors", {n: v.double() if v.is_floating_point() else v
                                                     for n, v in state.items()})  # fmt: skip
    torch.save(
        {"state_dict": OrderedDict(state), "optimizer": {"exp_avg": torch.randn(7)}, "epoch": 3}, tmp_path / "net.pt"
    )
    wiring = ws.wiring(ws.open(plain))
    first = ws.embed(plain, force=True).vector
    said = ws.predict_accuracy(plain, force=True)
    for other in (told, double):
        assert _away(first, ws.embed(other, force=True).vector) < 1e-5
        again = ws.predict_accuracy(other, force=True)
        assert (again.value, again.low, again.high) == pytest.approx((said.value, said.low, said.high), abs=1e-5)
        assert again.applicability.inside == said.applicability.inside
    pickled = ws.open(tmp_path / "net.pt")
    assert _away(first, ws.embed(pickled, wiring=wiring, force=True).vector) < 1e-5


def test_names_of_tensors_and_their_order_move_nothing() -> None:
    class Other(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.zz_last = nn.Linear(32, 10)
            self.aa = nn.ModuleList([nn.Linear(64, 784), nn.Linear(784, 64), nn.Linear(64, 32)])

        def forward(self, x: Tensor) -> Tensor:
            found: Tensor = self.zz_last(self.aa[2](self.aa[1](x.flatten(1)).relu()).relu())
            return found

    torch.manual_seed(0)
    one = nn.Sequential(nn.Flatten(), nn.Linear(784, 64), nn.ReLU(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
    two = Other()  # with a layer that nothing uses
    for a, b in ((one[1], two.aa[1]), (one[3], two.aa[2]), (one[5], two.zz_last)):
        b.load_state_dict(a.state_dict())
    x = torch.randn(2, 1, 28, 28)
    assert torch.allclose(one(x), two(x))
    assert _away(ws.embed(one, x, force=True).vector, ws.embed(two, x, force=True).vector) < 1e-5
    first, second = (ws.predict_accuracy(m, x, force=True).value for m in (one, two))
    assert first == pytest.approx(second, abs=1e-5)


def test_a_network_is_read_from_whatever_holds_it(tmp_path: Path) -> None:
    module, state, inputs = _state(3)
    path = _save(tmp_path / "net.safetensors", state)
    checkpoint = ws.open(path)
    graph = ws.graph(checkpoint)
    found = [
        ws.embed(str(path), force=True), ws.embed(checkpoint, force=True), ws.embed(graph, force=True),
        ws.embed(module, *inputs, force=True),
    ]  # fmt: skip
    assert all(_away(found[0].vector, other.vector) < 1e-5 for other in found[1:])
    assert {f.model for f in found} == {shipped().name}
    assert "vector of" in repr(found[0])
    with pytest.raises(MetanetError, match="cannot read a int"):
        ws.embed(3)
    with pytest.raises(CheckpointError):
        ws.embed(tmp_path / "missing.safetensors")


def test_outside_there_is_a_reason_and_no_number(tmp_path: Path) -> None:
    _, state, _ = _state(0)
    wild = {name: value * 30 if value.is_floating_point() else value for name, value in state.items()}
    path = _save(tmp_path / "wild.safetensors", wild)
    said = ws.predict_accuracy(path)
    assert not said.applicability.inside
    assert said.applicability.reason
    assert math.isnan(said.value)
    assert math.isnan(said.low)
    forced = ws.predict_accuracy(path, force=True)
    assert 0 <= forced.low <= forced.value <= forced.high <= 1
    assert forced.applicability == said.applicability
    assert ws.embed(path).vector is not None  # it was read, and says that it does not mean much
    assert not ws.embed(path).applicability.inside


def test_a_guessed_wiring_is_outside(tmp_path: Path) -> None:
    torch.manual_seed(0)
    state = {"first": torch.randn(784, 64), "second": torch.randn(64, 32), "third": torch.randn(32, 10)}
    save_file(state, tmp_path / "chain.safetensors")
    found = ws.embed(tmp_path / "chain.safetensors")
    assert not found.applicability.inside
    assert "not proved" in found.applicability.reason or "no wiring" in found.applicability.reason
    assert found.vector is None


def test_complex_weights_are_outside() -> None:
    class Turning(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Parameter(torch.randn(16, 12, dtype=torch.complex64))
            self.outer = nn.Linear(16, 4)

        def forward(self, x: Tensor) -> Tensor:
            found: Tensor = self.outer((x.to(self.inner.dtype) @ self.inner.T).abs())
            return found

    found = ws.embed(Turning(), torch.randn(2, 12))
    assert found.vector is None
    assert not found.applicability.inside
    assert found.applicability.reason


def test_weights_that_are_no_numbers_are_an_error(tmp_path: Path) -> None:
    _, state, _ = _state(0)
    state["output.weight"] = state["output.weight"].clone()
    state["output.weight"][0, 0] = math.nan
    with pytest.raises(MetanetError, match=r"output\.weight"):
        ws.embed(_save(tmp_path / "nan.safetensors", state))


def test_inside_the_range_there_is_an_interval_around_the_value(roomy: Shipped, tmp_path: Path) -> None:
    _, state, _ = _state(0)
    path = _save(tmp_path / "net.safetensors", state)
    said = ws.predict_accuracy(path)
    assert said.applicability.inside
    assert 0 <= said.low <= said.value <= said.high <= 1
    assert said.coverage == 0.9
    assert ws.embed(path).vector is not None
    assert len(ws.embed(path).vector) == roomy.dimension  # type: ignore[arg-type]


def test_both_metanets_read_one_preparation(monkeypatch: pytest.MonkeyPatch) -> None:
    model = shipped()
    graphs = []
    for seed in range(3):
        module, state, inputs = _state(seed)
        graphs.append(clean(state, ws.wiring(module, *inputs)))
    calls = []
    own = type(model.encoder.metanet).prepare
    monkeypatch.setattr(OperatorMetanet, "prepare", lambda self, graph: calls.append(graph) or own(self, graph))
    seen = model.see(graphs)
    assert len(calls) == 3
    settled = canonical(graphs)
    codes = torch.nn.functional.normalize(model.encoder.outputs(settled).double(), dim=1)
    assert torch.equal(seen.codes, codes)
    assert torch.equal(seen.accuracies, model.accuracy.predict(settled).double())
    # Metanets that see networks at other points of their orbits share nothing.
    plain, scaled = (OperatorMetanet(width=8, rounds=1, scale=scale) for scale in (False, True))
    assert plain.preparation != scaled.preparation
