"""Small networks of several architectures, wired once, and what every reference metanetwork must do with them."""

from __future__ import annotations

import functools

import torch
from torch import Tensor, nn

import weightspace as ws
from weightspace.graph import ParameterGraph
from weightspace.graph.build import of_tensors
from weightspace.metanets import Metanet, build_metanet
from weightspace.wiring import Wiring

ARCHITECTURES = ("mlp", "cnn", "residual", "attention", "tanh")


class Residual(nn.Module):
    """Convolutions of several kernels with batch norms, a residual sum, a depthwise one, and flattened maps."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 6, 5, padding=2)
        self.norm = nn.BatchNorm2d(6)
        self.second = nn.Conv2d(6, 6, 3, padding=1)
        self.deep = nn.Conv2d(6, 6, 3, padding=1, groups=6)
        self.out = nn.Linear(6 * 4 * 4, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.first(x)))
        x = torch.relu(self.deep(x + self.second(x)))
        return self.out(nn.functional.adaptive_avg_pool2d(x, 4).flatten(1))


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(6, 8)
        self.block = nn.TransformerEncoderLayer(8, 2, 12, batch_first=True, dropout=0.0)
        self.out = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.block(self.embed(x)).mean(1))


def _module(architecture: str) -> tuple[nn.Module, Tensor]:
    if architecture == "mlp":
        layers = [nn.Linear(5, 7), nn.ReLU(), nn.Linear(7, 6), nn.ReLU(), nn.Linear(6, 3)]
        return nn.Sequential(*layers), torch.randn(2, 5)
    if architecture == "tanh":
        layers = [nn.Linear(2, 6), nn.Tanh(), nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 1)]
        return nn.Sequential(*layers), torch.randn(2, 2)
    if architecture == "cnn":
        layers = [nn.Conv2d(1, 4, 3, 2), nn.ReLU(), nn.Conv2d(4, 5, 3, 2), nn.ReLU()]
        return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(5, 4)), torch.randn(2, 1, 16, 16)
    if architecture == "residual":
        return Residual(), torch.randn(2, 3, 8, 8)
    return Attention(), torch.randn(2, 5, 6)


@functools.cache
def wiring(architecture: str) -> tuple[Wiring, dict[str, Tensor]]:
    """A proved wiring and the tensors of one network."""
    torch.manual_seed(0)
    module, x = _module(architecture)
    return ws.wiring(module.eval(), x), dict(module.state_dict())


def network(architecture: str, seed: int = 0) -> ParameterGraph:
    """A network with random weights in float64; a positive running variance."""
    found, tensors = wiring(architecture)
    generator = torch.Generator().manual_seed(seed)
    drawn = {
        n: torch.randn(t.shape, generator=generator, dtype=torch.float64) if t.is_floating_point() else t
        for n, t in tensors.items()
    }
    return of_tensors({n: t.abs() + 0.1 if n.endswith("running_var") else t for n, t in drawn.items()}, found)


def permuted(graph: ParameterGraph, seed: int = 0) -> ParameterGraph:
    """The same function with its neurons in another order."""
    assert graph.wiring is not None
    assert graph.tensors is not None
    return of_tensors(graph.wiring.apply(graph.wiring.random(seed), dict(graph.tensors)), graph.wiring)


def metanet(**config: object) -> Metanet:
    """A small metanet in float64, in evaluation mode."""
    torch.manual_seed(1)
    return build_metanet({"hidden": 8, "layers": 2, **config}).double().eval()


def check_batches(net: Metanet) -> None:
    """Networks of all architectures in one batch, in any order, give what each gives alone."""
    graphs = [network(a, seed) for seed in (0, 1) for a in ARCHITECTURES]
    together = net.read(*graphs)
    assert together.shape == (len(graphs), net.config["outputs"])
    torch.testing.assert_close(together, torch.cat([net.read(g) for g in graphs]), rtol=1e-9, atol=1e-12)
    assert len(torch.unique(together[:, 0])) == len(graphs)


def check_training(net: Metanet) -> None:
    """Every parameter gets a gradient from a batch of several architectures, and a step lowers the loss."""
    batch = net.collate([net.prepare(network(a, s)) for a in ARCHITECTURES for s in (0, 1)])
    target = torch.arange(batch.size, dtype=torch.float64).unsqueeze(1) / batch.size
    net.train()
    optimiser = torch.optim.Adam(net.parameters(), lr=1e-2)
    losses = []
    for _ in range(25):
        optimiser.zero_grad()
        loss = (net(batch) - target).square().mean()
        torch.autograd.backward(loss)
        optimiser.step()
        losses.append(float(loss.detach()))
    idle = [n for n, p in net.named_parameters() if p.grad is None or not bool(p.grad.abs().sum() > 0)]
    assert not idle
    assert losses[-1] < losses[0] / 3


def check_config(net: Metanet) -> None:
    """The configuration alone makes a metanet that the same parameters fit."""
    again = build_metanet(net.config).double().eval()
    again.load_state_dict(net.state_dict())
    graph = network("residual")
    assert again.config == net.config
    torch.testing.assert_close(again.read(graph), net.read(graph), rtol=0, atol=0)
