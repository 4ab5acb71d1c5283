"""ImageNet nets with the names of torchvision, recognised from their shapes and equal to the originals."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from families import recognise, run, signature

import weightspace as ws

# Names and shapes of the state dicts; batch norms are listed by their prefix and width.
NETS: dict[str, Any] = json.loads(Path(__file__).with_name("torchvision_shapes.json").read_text("utf-8"))


def _shapes(net: dict[str, Any], counters: bool = True) -> dict[str, tuple[int, ...]]:
    shapes = {name: tuple(shape) for name, shape in net["tensors"].items()}
    for prefix, width in net["norms"].items():
        shapes |= {f"{prefix}.{leaf}": (width,) for leaf in ("weight", "bias", "running_mean", "running_var")}
        if counters:
            shapes[f"{prefix}.num_batches_tracked"] = ()
    return shapes


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("counters", [True, False], ids=["", "without-counters"])
def test_recognised_from_shapes(name: str, counters: bool) -> None:
    found = recognise(ws.Signature(_shapes(NETS[name], counters)))
    assert next(iter(found)) == NETS[name]["family"]
    assert set(found) <= {NETS[name]["family"], "plain-chain"}
    skeleton = found[NETS[name]["family"]]
    assert sum(p.numel() for p in skeleton.module.parameters()) == NETS[name]["parameters"]


@pytest.mark.parametrize("name", [name for name, net in NETS.items() if net["parameters"] < 15e6])
def test_runs_with_random_weights(name: str) -> None:
    torch.manual_seed(0)
    skeleton = next(iter(recognise(ws.Signature(_shapes(NETS[name]))).values()))
    tensors = {}
    for key, tensor in skeleton.module.state_dict().items():
        fan = tensor[0].numel() if tensor.dim() > 1 else 1
        tensors[key] = (
            torch.zeros((), dtype=torch.int64) if tensor.dim() == 0 else torch.rand(tensor.shape) / fan
        )
    outputs = run(skeleton, tensors)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    assert all(out.shape == (2, 1000) and out.isfinite().all() for out in outputs)


@pytest.mark.parametrize("name", NETS)
def test_equals_torchvision(name: str) -> None:
    models = pytest.importorskip(
        "torchvision.models", reason="torchvision is no dependency", exc_type=ImportError
    )
    torch.manual_seed(0)
    net = models.get_model(
        name, weights=None, **({"init_weights": True} if name == "googlenet" else {})
    ).eval()
    tensors = net.state_dict()
    for key, tensor in tensors.items():
        if key.endswith(("running_mean", "running_var")):
            tensor.uniform_(0.5, 1.5)
    x = torch.randn(2, 3, 96, 96)
    outputs = run(next(iter(recognise(signature(tensors)).values())), tensors, x)
    with torch.no_grad():
        torch.testing.assert_close(outputs[0] if isinstance(outputs, tuple) else outputs, net(x))
