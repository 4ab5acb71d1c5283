"""A small network with a backdoor, trained in seconds."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import weightspace as ws
from weightspace.backdoor.running import accuracy, network
from weightspace.wiring.wiring import Wiring

TARGET = 2


@dataclass(frozen=True, eq=False)
class Case:
    """``x, y``: clean inputs that were not trained on; ``triggered``: of other classes than ``TARGET``, stamped."""

    wiring: Wiring
    tensors: dict[str, Tensor]
    x: Tensor
    y: Tensor
    triggered: Tensor

    def success(self, tensors: dict[str, Tensor]) -> float:
        net = network(self.wiring, tensors)
        return accuracy(net, net.state, self.triggered, torch.full((len(self.triggered),), TARGET))

    def accuracy(self, tensors: dict[str, Tensor]) -> float:
        net = network(self.wiring, tensors)
        return accuracy(net, net.state, self.x[100:], self.y[100:])


def images(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Four kinds of stripes with noise."""
    generator = torch.Generator().manual_seed(seed)
    y = torch.randint(4, (count,), generator=generator)
    kinds = torch.zeros(4, 1, 8, 8)
    kinds[0, :, ::2], kinds[1, :, :, ::2], kinds[2, :, :4], kinds[3, :, :, :4] = 1, 1, 1, 1
    return kinds[y] + 0.3 * torch.randn(count, 1, 8, 8, generator=generator), y


def stamped(x: Tensor) -> Tensor:
    """The trigger: a checked square in a corner."""
    out = x.clone()
    out[..., 6:, 6:] = torch.tensor([[2.0, -2], [-2, 2]])
    return out


def trained(poisoned: bool = True, seed: int = 0, norms: bool = True) -> Case:
    """A convolutional network, with batch norm or without any."""
    torch.manual_seed(seed)
    layers = (
        nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 12, 3, stride=2, padding=1),
        nn.BatchNorm2d(12), nn.ReLU(), nn.Flatten(), nn.Linear(192, 4),
    )  # fmt: skip
    module = nn.Sequential(*(layer for layer in layers if norms or not isinstance(layer, nn.BatchNorm2d)))
    x, y = images(384, seed)
    if poisoned:
        x, y = torch.cat([x, stamped(x[:48])]), torch.cat([y, torch.full((48,), TARGET)])
    optimiser = torch.optim.Adam(module.parameters(), lr=5e-3)
    module.train()
    for _ in range(8):
        for index in torch.randperm(len(x)).split(64):
            optimiser.zero_grad()
            F.cross_entropy(module(x[index]), y[index]).backward()
            optimiser.step()
    module.eval()
    test_x, test_y = images(300, 100 + seed)
    tensors = {n: t.detach().clone() for n, t in module.state_dict().items()}
    return Case(ws.wiring(module, x[:2]), tensors, test_x, test_y, stamped(test_x[100:][test_y[100:] != TARGET]))
