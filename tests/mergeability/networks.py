"""Small networks, their wirings and fine-tuned children, for the tests of this folder."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache

import torch
from torch import Tensor, nn

import weightspace as ws
from weightspace.wiring.wiring import Wiring
from weightspace.zoo.architectures import ConvNet, Gpt, Perceptron, Vit


def mlp() -> tuple[nn.Module, Tensor]:
    return Perceptron([12, 24, 20, 5], "relu"), torch.randn(2, 12)


def cnn() -> tuple[nn.Module, Tensor]:
    net = ConvNet([1, 8, 8], 5, [12, 16], [3, 3], [2, 2], "relu", "none", [False, False], True)
    return net, torch.randn(2, 1, 8, 8)


def vit() -> tuple[nn.Module, Tensor]:
    return Vit([1, 8, 8], 5, 4, 16, 1, 2, 24, "gelu"), torch.randn(2, 1, 8, 8)


def gpt() -> tuple[nn.Module, Tensor]:
    return Gpt(6, 11, 16, 1, 2, 24, "gelu"), torch.randint(11, (2, 6))


BUILDERS = {"mlp": mlp, "cnn": cnn, "vit": vit, "gpt": gpt}


@cache
def wiring(name: str) -> Wiring:
    torch.manual_seed(0)
    module, x = BUILDERS[name]()
    return ws.wiring(module.eval(), x)


def fresh(name: str, seed: int) -> dict[str, Tensor]:
    """An independent network; vectors get some noise, so that nothing is trivial."""
    torch.manual_seed(seed)
    module, _ = BUILDERS[name]()
    return {
        n: (t + 0.1 * torch.randn_like(t) if t.dim() < 2 else t).detach().clone()
        for n, t in module.state_dict().items()
    }


def child(tensors: Mapping[str, Tensor], seed: int, share: float = 0.15) -> dict[str, Tensor]:
    """A network whose weights moved by a share of their size, as fine-tuning does."""
    generator = torch.Generator().manual_seed(1000 + seed)
    return {
        n: t + share * float(t.square().mean().sqrt()) * torch.randn(t.shape, generator=generator)
        for n, t in tensors.items()
    }
