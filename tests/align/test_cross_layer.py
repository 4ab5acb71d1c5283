"""Networks of different depths."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import weightspace as ws
from tests.align.small import network
from weightspace.align.cross_layer import cka, cross_layer, monotone
from weightspace.errors import AlignmentError
from weightspace.wiring.wiring import Wiring
from weightspace.zoo.description import module_of

pytest.importorskip("ot", reason="needs POT (pip install weightspace[ot])")


def wired(seed: int, **description: Any) -> tuple[Wiring, dict[str, Tensor]]:
    torch.manual_seed(seed)
    module, args = module_of(description)
    wiring = ws.wiring(module.eval(), *args)
    assert wiring.program is not None
    return wiring, {n: t.clone() for n, t in wiring.program.tensors.items()}


def mlp(seed: int, widths: list[int], **more: Any) -> tuple[Wiring, dict[str, Tensor]]:
    return wired(seed, **{"kind": "mlp", "input": [10], "classes": 4, "widths": widths, "activation": "relu", **more})


def test_layers_are_laid_in_order() -> None:
    alike = torch.tensor([[0.9, 0.1], [0.5, 0.3], [0.2, 0.8], [0.1, 0.9]])
    assert monotone(alike) == [0, 3]
    assert monotone(torch.eye(3)) == [0, 1, 2]
    with pytest.raises(AlignmentError, match="no order"):
        monotone(torch.full((2, 2), -float("inf")))


def test_cka_knows_rotations() -> None:
    x = torch.randn(50, 6, dtype=torch.float64)
    turn, _ = torch.linalg.qr(torch.randn(6, 6, dtype=torch.float64))
    assert cka(x, x @ turn) == pytest.approx(1)
    assert cka(x, torch.randn(50, 6, dtype=torch.float64)) < 0.5


@pytest.mark.parametrize("widths", [[8, 12], [16, 12], [24]])
def test_a_shallower_network_keeps_its_function_at_the_depth_of_another(widths: list[int]) -> None:
    """Widths of a are multiples of b's, so that neurons are copied whole."""
    of_a, a = mlp(0, [48, 48, 48, 48])
    of_b, b = mlp(1, widths)
    x = torch.randn(40, 10)
    found = cross_layer(a, b, of_b, wiring_a=of_a, inputs=x)
    assert {n: t.shape for n, t in found.aligned.items()} == {n: t.shape for n, t in a.items()}
    assert torch.allclose(of_a.program.run(found.aligned, x), of_b.program.run(b, x), atol=1e-4)
    assert found.diagnostics["layers"]["hidden.0.weight"] == "hidden.0.weight"


def test_an_identity_layer_is_found() -> None:
    """A network, and the same with one layer more that does nothing and neurons in another order."""
    of_b, b = mlp(0, [12, 8])
    of_a, a = mlp(0, [12, 12, 8])
    a = {
        "hidden.0.weight": b["hidden.0.weight"], "hidden.0.bias": b["hidden.0.bias"], "hidden.1.weight": torch.eye(12),
        "hidden.1.bias": torch.zeros(12), "hidden.2.weight": b["hidden.1.weight"], "hidden.2.bias": b["hidden.1.bias"],
        "output.weight": b["output.weight"], "output.bias": b["output.bias"],
    }  # fmt: skip
    a = of_a.apply(of_a.random(0), a)
    x = torch.randn(60, 10)
    found = cross_layer(a, b, of_b, wiring_a=of_a, inputs=x)
    # Neurons that never fire are alike to none and may change places.
    for n, t in found.aligned.items():
        assert float(((t - a[n]).abs() < 1e-6).double().mean()) > 0.5, n
    assert torch.allclose(of_a.program.run(found.aligned, x), of_b.program.run(b, x), atol=1e-4)


def test_convolutions_with_batch_norms() -> None:
    common = {"kind": "vgg", "input": [2, 8, 8], "classes": 3, "activation": "relu"}
    of_a, a = wired(0, channels=[8, 8, 16, 16], pools=[False, True, False, True], **common)
    of_b, b = wired(1, channels=[4, 8], pools=[True, True], **common)
    x = torch.randn(20, 2, 8, 8)
    found = cross_layer(a, b, of_b, wiring_a=of_a, inputs=x)
    assert torch.allclose(of_a.program.run(found.aligned, x), of_b.program.run(b, x), atol=1e-3)


def test_what_has_no_place_for_an_identity_is_declined() -> None:
    of_a, a = mlp(0, [12, 12, 8])
    of_b, b = mlp(0, [12, 8])
    x = torch.randn(8, 10)
    with pytest.raises(AlignmentError, match="deeper one as a"):
        cross_layer(b, a, of_a, wiring_a=of_b, inputs=x)
    of_tanh, tanh = mlp(0, [12, 8], activation="tanh")
    with pytest.raises(AlignmentError, match="tanh"):
        cross_layer(a, tanh, of_tanh, wiring_a=of_a, inputs=x)
    of_residual, residual, images = network("cnn")
    with pytest.raises(AlignmentError, match="no plain chain"):
        cross_layer(residual, residual, of_residual, inputs=images)
