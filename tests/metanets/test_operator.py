"""Operator message passing: equivariant, equal to its edge-by-edge form, whatever the batch."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import weightspace as ws
from tests.architectures import CASES, Case
from weightspace.errors import MetanetError
from weightspace.graph import ParameterGraph
from weightspace.graph.build import of_tensors
from weightspace.metanets import BlockReadout, NodeReadout, OperatorMetanet, assert_equivariant, build_metanet
from weightspace.metanets import batch as batches

SMALL = [case for case in CASES.values() if not case.full]


def double(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {n: t.double() if t.is_floating_point() else t for n, t in tensors.items()}


def cnn(seed: int = 0, channels: tuple[int, ...] = (4, 6), kernel: int = 3) -> ParameterGraph:
    torch.manual_seed(seed)
    layers: list[nn.Module] = []
    for a, b in pairwise((1, *channels)):
        layers += [nn.Conv2d(a, b, kernel, 2, kernel // 2), nn.ReLU()]
    module = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels[-1], 3)).eval()
    return of_tensors(module.state_dict(), ws.wiring(module, torch.randn(2, 1, 12, 12)))


def mlp(seed: int = 0, widths: tuple[int, ...] = (5, 7, 6, 3)) -> ParameterGraph:
    torch.manual_seed(seed)
    layers: list[nn.Module] = []
    for a, b in pairwise(widths):
        layers += [nn.Linear(a, b), nn.ReLU()]
    module = nn.Sequential(*layers[:-1]).eval()
    return of_tensors(module.state_dict(), ws.wiring(module, torch.randn(2, widths[0])))


def small(**options: object) -> OperatorMetanet:
    torch.manual_seed(0)
    made = build_metanet({"kind": "operator", "width": 8, "rounds": 2, "embedding": 8, "probes": 4, **options})
    assert isinstance(made, OperatorMetanet)
    return made.double().eval()


@pytest.mark.parametrize("case", SMALL, ids=lambda c: c.name)
def test_every_architecture_is_equivariant_and_agrees_with_the_edge_form(case: Case) -> None:
    pytest.importorskip("torch_geometric")
    if case.group == "transformers":
        pytest.importorskip("transformers")
    from weightspace.metanets import EdgeReference

    module, args, kwargs = case.build()
    wiring = ws.wiring(module, *args, **kwargs)
    graph = of_tensors(double(module.state_dict()), wiring)
    metanet = small()
    assert assert_equivariant(metanet, graph, draws=1) < 1e-9
    batch = metanet.collate([metanet.prepare(graph)])
    with torch.no_grad():
        torch.testing.assert_close(EdgeReference(metanet).states(batch), metanet.states(batch), rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(EdgeReference(metanet)(batch), metanet(batch), rtol=1e-9, atol=1e-9)


@settings(max_examples=15, deadline=None)
@given(
    st.lists(st.integers(1, 9), min_size=3, max_size=5), st.lists(st.integers(1, 7), min_size=1, max_size=3),
    st.sampled_from([1, 3, 5]), st.integers(0, 1000),
)  # fmt: skip
def test_a_batch_of_different_networks_gives_what_each_gives_alone(
    widths: list[int], channels: list[int], kernel: int, seed: int
) -> None:
    metanet = small()
    graphs = [mlp(seed, tuple(widths)), cnn(seed, tuple(channels), kernel), mlp(seed + 1), cnn(seed + 1)]
    together = metanet.read(*graphs)
    for graph, row in zip(graphs, together, strict=True):
        torch.testing.assert_close(metanet.read(graph)[0], row, rtol=1e-9, atol=1e-9)


def test_stacks_of_several_kernels_give_what_each_gives_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    metanet = small()
    graphs = [cnn(0, (4, 6), 3), cnn(1, (5, 3), 5), cnn(2, (6,), 1), mlp(3), cnn(4, (3, 4), 4)]
    items = [metanet.prepare(graph) for graph in graphs]
    batch = metanet.collate(items)
    with torch.no_grad():
        together = metanet(batch)
    monkeypatch.setattr(batches, "STACK", -(10**9))
    monkeypatch.setattr(batches, "_PLANS", type(batches._PLANS)())
    apart = metanet.collate(items)
    assert len(batch.buckets) < len(apart.buckets)
    # Odd kernels share their middle; those of four positions lie between.
    assert max(len(b.coordinates) for b in batch.buckets) == 25 + 16
    with torch.no_grad():
        torch.testing.assert_close(together, metanet(apart), rtol=1e-12, atol=1e-12)


class Block(nn.Module):
    """A residual block with a norm, on maps or on features."""

    def __init__(self, width: int, flat: bool) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(width) if flat else nn.BatchNorm2d(width)
        self.inner = nn.Linear(width, width + 1) if flat else nn.Conv2d(width, width + 1, 3, padding=1)
        self.outer = nn.Linear(width + 1, width) if flat else nn.Conv2d(width + 1, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = x + self.outer(self.inner(self.norm(x)).relu())
        return found


@settings(max_examples=12, deadline=None)
@given(st.booleans(), st.lists(st.sampled_from(["plain", "residual", "tanh"]), min_size=1, max_size=4),
       st.integers(2, 6), st.booleans(), st.integers(0, 1000))  # fmt: skip
def test_random_architectures_are_equivariant(flat: bool, kinds: list[str], width: int, scale: bool, seed: int) -> None:
    torch.manual_seed(seed)
    layers: list[nn.Module] = [nn.Linear(4, width) if flat else nn.Conv2d(2, width, 3)]
    for kind in kinds:
        if kind == "residual":
            layers.append(Block(width, flat))
        else:
            layers.append(nn.Tanh() if kind == "tanh" else nn.ReLU())
            layers.append(nn.Linear(width, width + 1) if flat else nn.Conv2d(width, width + 1, 3, padding=1))
            width += 1
    layers += [nn.ReLU()] if flat else [nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten()]
    module = nn.Sequential(*layers, nn.Linear(width if flat else 4 * width, 3)).eval()
    example = torch.randn(2, 4) if flat else torch.randn(2, 2, 7, 7)
    graph = of_tensors(module.state_dict(), ws.wiring(module, example))
    assert assert_equivariant(small(scale=scale), graph, draws=2) < 1e-6


def test_single_precision_agrees_with_the_edge_form_to_1e5() -> None:
    pytest.importorskip("torch_geometric")
    from weightspace.metanets import EdgeReference

    metanet = OperatorMetanet(width=64).eval()
    batch = metanet.collate([metanet.prepare(g) for g in (cnn(0, (16, 16, 16)), mlp(1), cnn(2))])
    with torch.no_grad():
        found, reference = metanet(batch), EdgeReference(metanet)(batch)
    assert float((found - reference).abs().max() / reference.abs().max()) < 1e-5


def test_streaming_reads_chunks_and_gives_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    metanet, graphs = small(), [cnn(0), mlp(0)]
    whole = metanet.read(*graphs)
    monkeypatch.setattr(batches, "CHUNK", 20)
    monkeypatch.setattr("weightspace.metanets.operator.CHUNK", 20)
    batches._PLANS.clear()
    for lazy in (None, True, False):
        batch = metanet.collate([metanet.prepare(g, lazy=lazy) for g in graphs])
        assert any(b.rows is not None for b in batch.buckets)
        with torch.no_grad():
            torch.testing.assert_close(metanet(batch), whole, rtol=1e-9, atol=1e-9)
    batches._PLANS.clear()


def test_gradients_agree_between_streamed_and_stacked_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    def gradients(metanet: OperatorMetanet) -> list[Tensor]:
        metanet.zero_grad()
        metanet(metanet.collate([metanet.prepare(g) for g in (cnn(0), mlp(0))])).square().sum().backward()
        return [p.grad.clone() for p in metanet.parameters() if p.grad is not None]

    metanet = small()
    stacked = gradients(metanet)
    monkeypatch.setattr(batches, "CHUNK", 20)
    monkeypatch.setattr("weightspace.metanets.operator.CHUNK", 20)
    batches._PLANS.clear()
    streamed = gradients(metanet)
    batches._PLANS.clear()
    for a, b in zip(stacked, streamed, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-9)


def test_a_lazy_network_holds_no_weights() -> None:
    item = small().prepare(cnn(0), lazy=True)
    assert all(w is None for w in item.weights)


def duplicated(graph: ParameterGraph, times: int) -> ParameterGraph:
    """Every hidden neuron of the MLP ``times`` times, outgoing weights divided among the copies."""
    tensors = {n: graph.tensor(n).double() for n in graph.shapes}
    layers = sorted({n.rpartition(".")[0] for n in tensors}, key=int)
    module = nn.Sequential()
    for k, layer in enumerate(layers):
        weight, bias = tensors[f"{layer}.weight"], tensors[f"{layer}.bias"]
        if k:
            weight = weight.repeat_interleave(times, 1) / times
        if k < len(layers) - 1:
            weight, bias = weight.repeat_interleave(times, 0), bias.repeat_interleave(times, 0)
        linear = nn.Linear(weight.shape[1], weight.shape[0]).double()
        linear.weight.data, linear.bias.data = weight, bias
        module.append(linear)
        module.append(nn.ReLU())
    wide = module[:-1].eval()
    return of_tensors(wide.state_dict(), ws.wiring(wide, torch.randn(2, 5, dtype=torch.float64)))


@pytest.mark.parametrize("times", [2, 3, 8])
def test_duplicated_neurons_change_nothing_with_transfer(times: int) -> None:
    graph = mlp(0)
    wide = duplicated(graph, times)
    metanet = small(transfer=True)
    torch.testing.assert_close(metanet.read(graph), metanet.read(wide), rtol=0, atol=1e-12)
    plain = small()
    assert float((plain.read(graph) - plain.read(wide)).abs().max()) > 1e-8


def test_scale_makes_rescaling_invisible() -> None:
    graph = cnn(0, (6, 5, 4))
    assert assert_equivariant(small(scale=True), graph, scale=True) < 1e-6
    with pytest.raises(AssertionError, match="rescaling"):
        assert_equivariant(small(), graph, scale=True)


def test_what_is_no_feature_changes_nothing() -> None:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3)).eval()
    wiring = ws.wiring(module, torch.randn(2, 1, 6, 6))
    state = module.state_dict()
    counted = {**state, "1.num_batches_tracked": torch.tensor(12345)}
    shuffled = {n: state[n] for n in reversed(state)}
    metanet = small()
    plain = metanet.read(of_tensors(state, wiring))
    assert torch.equal(metanet.read(of_tensors(counted, wiring)), plain)
    torch.testing.assert_close(metanet.read(of_tensors(shuffled, wiring)), plain, rtol=1e-12, atol=1e-12)

    class Renamed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.z, self.y, self.a = module[0], module[1], module[4]

        def forward(self, x: Tensor) -> Tensor:
            found: Tensor = self.a(self.y(self.z(x)).relu().flatten(1))
            return found

    other = Renamed().eval()
    renamed = of_tensors(other.state_dict(), ws.wiring(other, torch.randn(2, 1, 6, 6)))
    torch.testing.assert_close(metanet.read(renamed), plain, rtol=1e-12, atol=1e-12)


def test_several_models_on_one_wiring() -> None:
    base, one, two = mlp(0), mlp(1), mlp(2)
    one, two = (of_tensors(g.tensors or {}, base.wiring) for g in (one, two))  # type: ignore[arg-type]
    metanet = small(models=3)

    def read(*graphs: ParameterGraph) -> Tensor:
        with torch.no_grad():
            found: Tensor = metanet(metanet.collate([metanet.prepare(*graphs)]))
        return found

    plain = read(base, one, two)
    assert base.wiring is not None
    p = base.wiring.random(3)
    moved = [of_tensors(base.wiring.apply(p, g.tensors or {}), base.wiring) for g in (base, one, two)]
    torch.testing.assert_close(read(*moved), plain, rtol=1e-9, atol=1e-9)
    # Permuting one of the models alone is no symmetry of the three.
    assert float((read(base, moved[1], two) - plain).abs().max()) > 1e-9
    with pytest.raises(MetanetError, match="reads 3 networks"):
        metanet.prepare(base)


def test_node_and_block_readouts_move_with_the_neurons() -> None:
    graph = cnn(0)
    wiring = graph.wiring
    assert wiring is not None
    metanet = small()
    width = metanet.state_width
    nodes, blocks = NodeReadout(width, 2).double(), BlockReadout(width, 4).double()
    p = wiring.random(5)
    tensors = double({n: graph.tensor(n) for n in graph.shapes})
    before, after = of_tensors(tensors, wiring), of_tensors(wiring.apply(p, tensors), wiring)
    found = []
    with torch.no_grad():
        for g in (before, after):
            batch = metanet.collate([metanet.prepare(g)])
            states = metanet.states(batch)
            cells = nodes.by_cell(states, batch)[0]
            values = {}
            for block in g.blocks:
                made = torch.zeros(g.shapes[block.tensor], dtype=torch.float64)
                block.matrix(made).copy_(blocks(states, batch, 0, block))
                values[block.tensor] = made
            found.append((cells, values))
    (cells, values), (moved_cells, moved_values) = found
    # A value per weight is permuted like the weights themselves.
    for name, value in wiring.apply(p, values).items():
        torch.testing.assert_close(moved_values[name], value, rtol=1e-9, atol=1e-12)
        assert float(value.std()) > 0
    order = before.node_permutation(p)
    flat = torch.cat([c.flatten(0, -2) for c in cells.values()])
    torch.testing.assert_close(torch.cat([c.flatten(0, -2) for c in moved_cells.values()]), flat[order])
    with pytest.raises(MetanetError, match="has no block"):
        blocks(states, batch, 0, mlp(0).blocks[0])


def test_weights_that_are_not_finite_are_refused() -> None:
    graph = mlp(0)
    broken = {n: graph.tensor(n).clone() for n in graph.shapes}
    next(iter(broken.values()))[0] = float("nan")
    with pytest.raises(MetanetError, match="infinite or not a number"):
        small().prepare(of_tensors(broken, graph.wiring))  # type: ignore[arg-type]


def test_a_graph_without_a_wiring_is_refused() -> None:
    bare = ParameterGraph.from_description(mlp(0).describe())
    with pytest.raises(MetanetError, match="no wiring"):
        small().prepare(bare)


def test_assert_equivariant_catches_what_is_not() -> None:
    class Broken(OperatorMetanet):
        def states(self, batch: batches.Batch) -> Tensor:
            found = super().states(batch)
            return found + torch.arange(len(found), dtype=found.dtype).unsqueeze(1) / 100

    torch.manual_seed(0)
    with pytest.raises(AssertionError, match="permutation"):
        assert_equivariant(Broken(width=8, rounds=1, embedding=8), mlp(0))

    class Blind(OperatorMetanet):
        def forward(self, batch: batches.Batch) -> Tensor:
            return torch.ones(batch.size, 1, dtype=torch.float64)

    with pytest.raises(MetanetError, match="do not depend"):
        assert_equivariant(Blind(width=8, rounds=1, embedding=8), mlp(0))


def test_unknown_kinds_and_options_are_named() -> None:
    with pytest.raises(MetanetError, match="'transformer'"):
        build_metanet({"kind": "transformer"})
    with pytest.raises(MetanetError, match="widht"):
        build_metanet({"kind": "operator", "widht": 3})
    with pytest.raises(MetanetError, match="at least 1"):
        OperatorMetanet(rounds=0)


def test_probes_are_the_values_of_the_network_itself() -> None:
    """For a feed-forward network of linear layers they are what the network computes for the learned inputs."""
    torch.manual_seed(0)
    metanet = OperatorMetanet(width=8, rounds=1, embedding=8, probes=6).double()
    assert metanet.probes is not None
    for function in (nn.Tanh(), nn.ReLU(), nn.SiLU(), Sine(30.0), Sine(1.0)):
        module = nn.Sequential(nn.Linear(3, 5), function, nn.Linear(5, 4), function, nn.Linear(4, 2)).double().eval()
        graph = of_tensors(module.state_dict(), ws.wiring(module, torch.randn(2, 3, dtype=torch.float64)))
        batch = metanet.collate([metanet.prepare(graph)])
        with torch.no_grad():
            inputs = metanet.probes.input(batch.nodes.double())
            values = metanet.states(batch)[:, -6:]
            start = {c.mark: c.start for c in graph.cells.values()}
            expected = module(inputs[start["input"] : start["input"] + 3].T).T
        found = values[start["output"] : start["output"] + 2]
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


class Sine(nn.Module):
    def __init__(self, frequency: float) -> None:
        super().__init__()
        self.frequency = frequency

    def forward(self, x: Tensor) -> Tensor:
        return torch.sin(self.frequency * x)
