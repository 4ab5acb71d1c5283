"""Small networks for the tests of alignment, with generic values everywhere."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import weightspace as ws
from weightspace.wiring.wiring import Permutation, Wiring
from weightspace.zoo.description import module_of

DESCRIPTIONS: dict[str, dict[str, Any]] = {
    "mlp": {"kind": "mlp", "input": [12], "classes": 4, "widths": [16, 12], "activation": "relu"},
    "cnn": {
        "kind": "cnn", "input": [2, 8, 8], "classes": 3, "channels": [8, 8], "kernels": [3, 3], "strides": [1, 2],
        "activation": "relu", "norm": "batch", "residuals": [False, True], "same": True,
    },
    "vgg": {
        "kind": "vgg", "input": [2, 8, 8], "classes": 3, "channels": [6, 8, 8], "pools": [True, False, True],
        "activation": "relu",
    },
    "vit": {
        "kind": "vit", "input": [1, 8, 8], "classes": 3, "patch": 4, "dim": 12, "depth": 2, "heads": 3, "hidden": 16,
        "activation": "gelu",
    },
}  # fmt: skip


def network(name: str, seed: int = 0) -> tuple[Wiring, dict[str, Tensor], Tensor]:
    """A wiring, tensors with generic values in every vector and statistic, and inputs."""
    torch.manual_seed(seed)
    module, args = module_of(DESCRIPTIONS[name])
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
        for key, buffer in module.named_buffers():
            if key.endswith("running_var"):
                buffer.uniform_(0.5, 1.5)
            elif key.endswith("running_mean"):
                buffer.normal_(0, 0.1)
    wiring = ws.wiring(module.eval(), *args)
    assert wiring.program is not None
    tensors = {n: t.detach().clone() for n, t in wiring.program.tensors.items()}
    return wiring, tensors, torch.randn(64, *args[0].shape[1:])


def noisy(tensors: dict[str, Tensor], seed: int, share: float = 0.05) -> dict[str, Tensor]:
    """Every tensor with normal noise of a share of its deviation; statistics stay positive."""
    generator = torch.Generator().manual_seed(seed)
    return {
        n: t + share * t.std() * torch.randn(t.shape, generator=generator)
        if t.is_floating_point() and t.numel() > 1
        else t
        for n, t in tensors.items()
    }


def undoes(found: Permutation, planted: Permutation) -> bool:
    """Does acting with the one after the other change nothing?"""
    return planted.compose(found).is_identity
