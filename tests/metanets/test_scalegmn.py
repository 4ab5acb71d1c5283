"""ScaleGMN: invariant to permutations, positive rescalings and sign flips, in both directions of messages."""

from __future__ import annotations

import logging

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

pytest.importorskip("torch_geometric")

import weightspace as ws
from weightspace.errors import MetanetError, UnprovedWiringError
from weightspace.graph import ParameterGraph
from weightspace.graph.build import of_tensors
from weightspace.metanets import Metanet, assert_equivariant, build_metanet
from weightspace.metanets.scalegmn import _per_length
from weightspace.metanets.scales import scales_of
from weightspace.wiring.scaling import scaling
from weightspace.wiring.wiring import Wiring

from .references import ARCHITECTURES, check_batches, check_config, check_training, metanet, network, permuted


def rescaled(graph: ParameterGraph, seed: int, spread: float = 1.0, signs: bool = True) -> ParameterGraph:
    """The same function with other scales, by factors of about ``exp(spread)``."""
    assert graph.wiring is not None
    assert graph.tensors is not None
    group = scaling(graph.wiring)
    element = group.random(seed, spread)
    if not signs:
        element = type(element)(element.scales, tuple(torch.ones_like(s) for s in element.signs))
    return of_tensors(group.apply(element, dict(graph.tensors)), graph.wiring)


def error(net: Metanet, graph: ParameterGraph, other: ParameterGraph) -> float:
    a, b = net.read(graph), net.read(other)
    return float((a - b).abs().max() / a.abs().max())


@settings(max_examples=25, deadline=None)
@given(st.sampled_from(ARCHITECTURES), st.sampled_from(["forward", "both"]), st.integers(0, 1000))
def test_rescaling_flipping_and_permuting_change_nothing(architecture: str, direction: str, seed: int) -> None:
    net = metanet(kind="scalegmn", direction=direction)
    graph = network(architecture, seed)
    assert error(net, graph, permuted(graph, seed)) < 1e-9
    assert error(net, graph, rescaled(graph, seed)) < 1e-9
    # Scales over twelve orders of magnitude.
    assert error(net, graph, rescaled(permuted(graph, seed), seed, spread=5.0)) < 1e-6


class Bottleneck(nn.Module):
    """Wide, depthwise and narrow convolutions, each with a batch norm, on a residual stream without activations."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(2, 4, 3, padding=1)
        wide = [nn.Conv2d(4, 6, 1), nn.BatchNorm2d(6), nn.ReLU()]
        deep = [nn.Conv2d(6, 6, 3, padding=1, groups=6), nn.BatchNorm2d(6), nn.ReLU()]
        self.body = nn.Sequential(*wide, *deep, nn.Conv2d(6, 4, 1), nn.BatchNorm2d(4))
        self.out = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.out((x + self.body(x)).mean((2, 3)))


class Gated(nn.Module):
    """A gated block behind a norm on a residual stream, whose signs may flip."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(3, 6, bias=False)
        self.norm, self.last = nn.RMSNorm(6), nn.RMSNorm(6)
        self.up, self.gate, self.down = nn.Linear(6, 8), nn.Linear(6, 8), nn.Linear(8, 6, bias=False)
        self.out = nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        y = self.norm(x)
        x = x + self.down(self.up(y) * torch.sigmoid(self.gate(y)))
        return self.out(self.last(x))


@pytest.mark.parametrize("module", [Bottleneck(), Gated()], ids=lambda m: type(m).__name__)
def test_symmetries_that_meet_on_one_tensor(module: nn.Module, caplog: pytest.LogCaptureFixture) -> None:
    """Convolutions against gains against convolutions, signs of a whole stream against those behind its norms."""
    x = torch.randn(2, 2, 6, 6) if isinstance(module, Bottleneck) else torch.randn(2, 3)
    graph = of_tensors(module.state_dict(), ws.wiring(module.eval(), x))
    assert len(scaling(graph.wiring).generators) >= 3
    assert len(scaling(graph.wiring).flips) >= 3
    for direction in ("forward", "both"):
        assert assert_equivariant(metanet(kind="scalegmn", direction=direction), graph) < 1e-9
    assert not caplog.records


def test_what_it_is_not_invariant_to() -> None:
    """Only the scales that the network has: a wrong exponent, a tensor alone, or a sign of a ReLU neuron show."""
    net = metanet(kind="scalegmn")
    graph = network("mlp")
    assert graph.wiring is not None
    tensors = dict(graph.tensors or {})
    factor = torch.full((7,), 3.0, dtype=torch.float64)
    rows = {**tensors, "0.weight": tensors["0.weight"] * factor[:, None], "0.bias": tensors["0.bias"] * factor}
    both = {**rows, "2.weight": tensors["2.weight"] / factor}
    wrong = {**rows, "2.weight": tensors["2.weight"] * factor}
    flipped = {n: -t if n in ("0.weight", "0.bias", "2.weight") else t for n, t in tensors.items()}
    assert error(net, graph, of_tensors(both, graph.wiring)) < 1e-12
    for other in (rows, wrong, flipped, {**tensors, "4.bias": 2 * tensors["4.bias"]}):
        assert error(net, graph, of_tensors(other, graph.wiring)) > 1e-5
    tanh = network("tanh")
    assert tanh.wiring is not None
    larger = {n: t * 2 if n.startswith("0.") else t for n, t in (tanh.tensors or {}).items()}
    assert error(net, tanh, of_tensors(larger, tanh.wiring)) > 1e-5


def test_symmetries_can_be_left_out() -> None:
    both, scale, sign = (metanet(kind="scalegmn", symmetry=s) for s in ("both", "scale", "sign"))
    graph, tanh = network("attention"), network("tanh")
    assert error(scale, graph, rescaled(graph, 0, signs=False)) < 1e-12
    assert error(scale, graph, rescaled(graph, 0)) > 1e-6
    assert error(sign, tanh, rescaled(tanh, 0)) < 1e-12
    assert error(scale, tanh, rescaled(tanh, 0)) > 1e-6
    assert both.scale
    assert not scale.scale


def test_directions_differ_and_both_sees_the_weights_ahead() -> None:
    """Without messages against the edges nothing that leaves a neuron reaches it."""
    graph = network("mlp")
    assert graph.wiring is not None
    other = of_tensors({**(graph.tensors or {}), "4.weight": graph.tensor("4.weight").flip(0)}, graph.wiring)
    seen = {}
    for direction in ("forward", "both"):
        net = metanet(kind="scalegmn", direction=direction)
        inner = []
        net.layers[-1].register_forward_hook(lambda *given, into=inner: into.append(given[2][2]))
        net.read(graph)
        net.read(other)
        # The first hidden layer is the first cell of the graph.
        cell = next(c for c in graph.cells.values() if c.size == 7)
        seen[direction] = float((inner[0] - inner[1])[cell.start : cell.start + 7].abs().max())
    assert seen["forward"] == 0
    assert seen["both"] > 1e-6


def test_grades_of_batch_norm() -> None:
    """What comes in is scaled against the gain, and the gain against what goes out."""
    graph = network("residual")
    found = scales_of(graph)
    assert found.grades["first.weight"] == (1, 0)
    assert found.grades["norm.running_mean"] == (1, 0)
    assert found.grades["norm.weight"] == (1, -1)
    assert found.grades["second.weight"] == (1, -1)
    assert found.grades["deep.weight"] == (1, -1)
    assert found.grades["out.weight"] == (0, -1)
    assert "out.bias" not in found.grades
    assert found.ends["norm.weight", False] is found.ends["first.weight", True]
    assert found.ends["norm.weight", True] is found.ends["norm.bias", True] is found.ends["deep.weight", False]
    assert [c.signed for c in found.copies] == [True, False, False]


def test_batches_training_and_configuration() -> None:
    for direction in ("forward", "both"):
        check_batches(metanet(kind="scalegmn", outputs=2, direction=direction))
    check_training(metanet(kind="scalegmn", hidden=16))
    check_config(metanet(kind="scalegmn", outputs=3, dropout=0.1, kernel=3, symmetry="scale"))


def test_weights_of_zero_and_tiny_ones_have_gradients() -> None:
    graph = network("cnn")
    assert graph.wiring is not None
    tensors = {n: t * (0 if n.endswith("bias") else 1e-8) for n, t in (graph.tensors or {}).items()}
    tensors["2.weight"][0] = 0
    net = metanet(kind="scalegmn")
    net(net.collate([net.prepare(of_tensors(tensors, graph.wiring))])).sum().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in net.parameters())


def test_a_power_of_two_is_refused_aloud(caplog: pytest.LogCaptureFixture) -> None:
    """A squared ReLU multiplies by the square of the scale, which no state here meets."""
    module = nn.Sequential(nn.Linear(3, 4), Squared(), nn.Linear(4, 2))
    graph = ws.graph(module.double(), torch.randn(2, 3, dtype=torch.float64))
    assert [dict(g.exponents) for g in scaling(graph.wiring).generators]
    with caplog.at_level(logging.WARNING):
        net = metanet(kind="scalegmn")
        net.prepare(graph)
    assert "not kept" in caplog.text
    assert error(net, graph, permuted(graph)) < 1e-12


class Squared(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(x).square()


def test_misuse() -> None:
    for options in ({"direction": "backward"}, {"symmetry": "none"}, {"hidden": -1}):
        with pytest.raises(MetanetError):
            build_metanet({"kind": "scalegmn", **options})
    graph = network("mlp")
    assert isinstance(graph.wiring, Wiring)
    unproved = of_tensors(dict(graph.tensors or {}), graph.wiring.with_(status="unverified"))
    with pytest.raises(UnprovedWiringError):
        metanet(kind="scalegmn").prepare(unproved)


def test_gradients_are_finite_where_states_are_tiny() -> None:
    """The inverse cube of such a length does not fit into single precision."""
    for size in (1e-3, 1e-14, 1e-17):
        x = torch.full((2, 4), size, requires_grad=True)
        (x * _per_length(x, torch.ones(2, 1, dtype=torch.bool)))[:, 0].sum().backward()
        assert x.grad is not None
        assert bool(torch.isfinite(x.grad).all())
