"""The graph of every architecture: its parts, its symmetry, its exports and the way back."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from math import prod
from pathlib import Path
from typing import Any

import networkx as nx
import pytest
import torch
from torch import nn

import weightspace as ws
from tests.architectures import CASES
from weightspace.errors import GraphError, UnprovedWiringError, WiringError
from weightspace.graph.edges import materialise, same_bits
from weightspace.graph.layout import contained
from weightspace.graph.statistics import _of

SMALL = [n for n, c in CASES.items() if not c.full]
# One of every kind of wiring, for the tests that are slow on all.
VARIED = [
    "cnn-flatten", "resnet20-option-a", "densenet", "shufflenet-v2", "pixel-shuffle", "lstm", "gru", "mlp-mixer",
    "moe-top2", "llama-gqa", "hf-gpt2", "hf-qwen2-moe", "hf-mamba", "hf-swin", "nerf", "triplane-concat", "dueling-dqn",
]  # fmt: skip

Tensors = Mapping[str, torch.Tensor]


@cache
def built(name: str) -> tuple[dict[str, torch.Tensor], ws.Wiring]:
    module, args, kwargs = CASES[name].build()
    wiring = ws.wiring(module, *args, prove=False, **kwargs)
    return dict(module.state_dict()), wiring


def assert_same(found: Tensors, wanted: Tensors) -> None:
    assert list(found) == list(wanted)
    for name, tensor in wanted.items():
        assert found[name].dtype == tensor.dtype, name
        assert found[name].shape == tensor.shape, name
        if tensor.numel():
            assert same_bits(found[name].reshape(-1), tensor.reshape(-1)), name


def multiset(graph: ws.ParameterGraph, relabel: torch.Tensor) -> Counter[Any]:
    """Everything that the graph says about its nodes, with the nodes called by other numbers."""
    found = materialise(graph)
    src, dst = relabel[found.addresses.index]
    edges = zip(
        src.tolist(), dst.tolist(), found.addresses.block.tolist(), found.addresses.position.tolist(),
        found.attr[:, 0].tolist(), strict=True,
    )  # fmt: skip
    nodes = zip(relabel.tolist(), map(tuple, found.x.tolist()), strict=True)
    links = (("link", *pair) for pair in relabel[graph.link_index()].T.tolist())
    return Counter([*edges, *nodes, *links])


# -------------------------------------------------------------------- every architecture


@pytest.mark.parametrize("name", SMALL)
def test_round_trip_through_pyg(name: str) -> None:
    tensors, wiring = built(name)
    graph = ws.graph(tensors, wiring)
    for edges in ("scalar", "channel"):
        data = graph.to_pyg(edges)
        data.validate()
        assert_same(ws.ParameterGraph.from_pyg(data), tensors)


@pytest.mark.parametrize("name", SMALL)
def test_a_symmetry_of_the_network_is_one_of_its_graph(name: str) -> None:
    tensors, wiring = built(name)
    graph = ws.graph(tensors, wiring)
    permutation = wiring.random(3)
    moved = ws.graph(wiring.apply(permutation, tensors), wiring)
    origin = graph.node_permutation(permutation)
    assert sorted(origin.tolist()) == list(range(graph.num_nodes))
    pinned = [i for c in graph.cells.values() if not c.movable for i in range(c.start, c.start + c.size)]
    assert origin[pinned].tolist() == pinned
    assert multiset(moved, origin) == multiset(graph, torch.arange(graph.num_nodes))
    if wiring.free:
        assert not torch.equal(origin, torch.arange(graph.num_nodes))


@pytest.mark.parametrize("name", SMALL)
def test_every_parameter_has_one_place(name: str) -> None:
    tensors, wiring = built(name)
    graph = ws.graph(tensors, wiring)
    in_vectors = sum(v.numel for v in graph.vectors)
    in_values = sum(tensors[n].numel() for n in graph.values)
    assert graph.num_edges + in_vectors + in_values == sum(t.numel() for t in tensors.values())
    assert graph.num_nodes == sum(prod(c.sizes) for c in graph.cells.values())
    for bundle in (*graph.blocks, *graph.vectors):
        places = torch.zeros(tensors[bundle.tensor].shape, dtype=torch.int32)
        bundle.view(places).add_(1)
        assert int(places.sum()) == bundle.numel, "a part reads an element twice"


# Where a channel shuffle repeats a factor in one axis, what comes before it and after it stay apart.
@pytest.mark.parametrize("name", [n for n in SMALL if not n.startswith("shufflenet-v1")])
def test_every_network_reads_its_inputs_into_its_outputs(name: str) -> None:
    """No layer hangs in the air: from each cell with weights another one can be reached."""
    tensors, wiring = built(name)
    graph = ws.graph(tensors, wiring)
    joined = nx.Graph([(b.src, b.dst) for b in graph.blocks] + [(x.src, x.dst) for x in graph.links])
    assert set(joined) == set(graph.cells)
    largest = max(nx.connected_components(joined), key=len)
    assert len(largest) >= 0.6 * len(graph.cells)


@pytest.mark.parametrize("name", SMALL)
def test_matrices_are_views_between_the_right_nodes(name: str) -> None:
    tensors, wiring = built(name)
    graph = ws.graph(tensors, wiring)
    for block in graph.blocks:
        matrix, rows, columns = graph.weight(block), block.index(), block.source_index()
        assert block.view(tensors[block.tensor]).untyped_storage().data_ptr() == (
            tensors[block.tensor].untyped_storage().data_ptr()
        )
        assert tuple(matrix.shape) == (block.shared, rows.shape[1], columns.shape[1], block.width)
        assert rows.shape[0] == columns.shape[0] == block.shared
        for index, cell in ((rows, graph.cells[block.dst]), (columns, graph.cells[block.src])):
            assert index.min() >= 0
            assert index.max() < cell.size
    for vector in graph.vectors:
        assert tuple(graph.weight(vector).shape) == (graph.cells[vector.dst].size, vector.width)
        assert sorted(vector.index().tolist()) == list(range(graph.cells[vector.dst].size))


@pytest.mark.parametrize("name", VARIED)
def test_round_trip_through_networkx(name: str) -> None:
    tensors, wiring = built(name)
    graph = ws.graph(tensors, wiring)
    found = graph.to_networkx()
    assert found.number_of_nodes() == graph.num_nodes
    assert found.number_of_edges() == graph.num_edges + graph.link_index().shape[1]
    assert_same(ws.ParameterGraph.from_networkx(found), tensors)


@pytest.mark.parametrize("name", VARIED)
def test_the_description_is_complete(name: str) -> None:
    tensors, wiring = built(name)
    graph = ws.graph(tensors, wiring)
    again = ws.ParameterGraph.from_description(json.loads(graph.to_json()))
    assert again == graph
    assert again.columns == graph.columns
    with pytest.raises(GraphError, match="no weights"):
        again.tensor(next(iter(tensors)))


@pytest.mark.parametrize("name", VARIED)
def test_statistics_are_those_of_the_values(name: str) -> None:
    tensors, wiring = built(name)
    graph = ws.graph(tensors, wiring)
    found = graph.statistics()
    bundles = {b.label: b.view(tensors[b.tensor]) for b in (*graph.blocks, *graph.vectors)}
    assert set(found) == {*bundles, *graph.values}
    for label, view in bundles.items():
        x, s = view.double(), found[label]
        assert s.count == x.numel()
        assert s.mean == pytest.approx(float(x.mean()), rel=1e-5, abs=1e-6 * float(x.abs().mean()))
        assert s.std == pytest.approx(float(x.std(correction=0)), rel=1e-5, abs=1e-9)
        assert s.norm == pytest.approx(float(x.norm()), rel=1e-5)
        assert s.rms == pytest.approx(float(x.square().mean().sqrt()), rel=1e-5)
        assert s.abs_max == float(x.abs().max())
        assert (s.min, s.max) == (float(x.min()), float(x.max()))


# -------------------------------------------------------------------- what the parts are


def graph_of(module: nn.Module, *args: torch.Tensor) -> ws.ParameterGraph:
    return ws.graph(module.eval(), *args)


def test_flattened_maps_are_features() -> None:
    graph = ws.graph(*built("cnn-flatten"))
    block = next(b for b in graph.blocks if b.tensor == "7.weight")
    assert (graph.cells[block.src].name, block.width) == ("3", 9)
    data = graph.to_pyg("channel")
    assert data.edge_attr.shape == (12 * 8 + 20 * 12 + 10 * 20, 9)
    rows = data.edge_block == graph.blocks.index(block)
    assert torch.equal(data.edge_attr[rows], built("cnn-flatten")[0]["7.weight"].reshape(-1, 9))
    last = data.edge_block == len(graph.blocks) - 1
    assert data.block_width[-1] == 1
    assert not data.edge_attr[last][:, 1:].any()


def test_grouped_convolutions_share_the_nodes_of_the_layer_before() -> None:
    torch.manual_seed(0)
    module = nn.Sequential(
        nn.Conv2d(3, 12, 3), nn.ReLU(), nn.Conv2d(12, 18, 3, groups=3), nn.ReLU(), nn.Conv2d(18, 5, 1), nn.Flatten(),
        nn.Linear(5 * 16, 4),
    )  # fmt: skip
    graph = graph_of(module, torch.randn(2, 3, 8, 8))
    by_tensor = {b.tensor: b for b in graph.blocks}
    grouped = by_tensor["2.weight"]
    assert grouped.src == by_tensor["0.weight"].dst
    assert grouped.dst == by_tensor["4.weight"].src
    assert grouped.shared == 3
    assert tuple(graph.weight(grouped).shape) == (3, 6, 4, 9)
    assert torch.equal(graph.weight(grouped).reshape(18, 4, 3, 3), module[2].weight)


def test_experts_are_no_third_end() -> None:
    graph = ws.graph(*built("moe-top2"))
    up = next(b for b in graph.blocks if b.tensor == "up")
    assert {graph.cells[up.src].size, graph.cells[up.dst].size} == {4 * 24, 32}
    assert up.width == 1
    bias = next(v for v in graph.vectors if v.tensor == "bias")
    assert bias.dst in (up.src, up.dst)
    experts = next(b for b in graph.blocks if b.tensor == "router.weight").dst
    assert ws.graph(*built("moe-top2")).links[0].src == experts


def test_heads_are_linked_to_their_channels() -> None:
    graph = ws.graph(*built("hf-gpt2"))
    heads = [c for c in graph.cells.values() if c.sizes == (4,)]
    assert len(heads) == 2
    for head in heads:
        outer = [graph.cells[x.dst] for x in graph.links if x.src == head.name]
        assert [c.sizes for c in outer] == [(4, 8), (4, 8)]
        assert torch.equal(contained(head, outer[0]), torch.arange(4).repeat_interleave(8))


def test_gates_and_concatenations_share_nodes() -> None:
    graph = ws.graph(*built("lstm"))
    gates = [b for b in graph.blocks if b.tensor == "rnn.weight_hh_l0"]
    assert len(gates) == 4
    assert {(b.src, b.dst) for b in gates} == {(gates[0].dst, gates[0].dst)}
    both = [b.src for b in graph.blocks if b.tensor == "head.weight"]
    assert len(set(both)) == 2


def test_depthwise_kernels_are_node_features() -> None:
    graph = ws.graph(*built("convnext"))
    vector = next(v for v in graph.vectors if "depthwise.weight" in v.tensor)
    assert vector.width == 49


def test_single_outputs_are_nodes() -> None:
    graph = ws.graph(*built("dueling-dqn"))
    block = next(b for b in graph.blocks if b.tensor == "value.2.weight")
    assert graph.cells[block.dst].size == 1
    assert next(v for v in graph.vectors if v.tensor == "value.2.bias").dst == block.dst


class Bilinear(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.mix, self.out = nn.Linear(3, 5), nn.Linear(3, 6), nn.Bilinear(5, 6, 7), nn.Linear(7, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(torch.relu(self.mix(self.a(x), self.b(x))))


def test_of_three_ends_the_first_is_a_feature() -> None:
    torch.manual_seed(0)
    module = Bilinear()
    graph = ws.graph(module, torch.randn(2, 3))
    block = next(b for b in graph.blocks if b.tensor == "mix.weight")
    assert (graph.cells[block.dst].size * graph.cells[block.src].size, block.width) == (30, 7)
    assert_same(ws.ParameterGraph.from_pyg(graph.to_pyg()), module.state_dict())


# -------------------------------------------------------------------- dtypes


def exotic() -> tuple[dict[str, torch.Tensor], ws.Wiring]:
    """An MLP with batch norm whose tensors are of every width, with values that float32 cannot hold."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3))
    wiring = ws.wiring(net.eval(), torch.randn(2, 4), prove=False)
    tensors = dict(net.state_dict())
    tensors["0.weight"] = tensors["0.weight"].to(torch.bfloat16)
    tensors["0.bias"] = torch.tensor([1.5, float("nan"), float("inf"), -0.0, 6e-8, 65504.0], dtype=torch.float16)
    tensors["1.running_var"] = torch.rand(6, dtype=torch.float64)
    tensors["1.num_batches_tracked"] = torch.tensor(2**62 + 1)
    tensors["1.running_mean"] = torch.tensor([2**53 + 1, -1, 0, 2**62 + 3, 7, -(2**63)])
    tensors["3.weight"] = torch.randint(-128, 127, (5, 6), dtype=torch.int8)
    tensors["3.bias"] = torch.tensor([True, False, True, True, False])
    tensors["5.weight"] = torch.randn(3, 5, dtype=torch.complex64)
    tensors["5.bias"] = torch.randn(3).to(torch.float8_e4m3fn)
    return tensors, wiring


def nan_with_payload() -> torch.Tensor:
    return torch.tensor([0x7F800001, 0x7FC12345, -1, 0x7F800000, 1, 0], dtype=torch.int32).view(torch.float32)


@pytest.mark.parametrize("dtype", [None, torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("edges", ["scalar", "channel"])
def test_every_dtype_comes_back_bit_for_bit(dtype: torch.dtype | None, edges: Any) -> None:
    tensors, wiring = exotic()
    tensors["1.weight"] = nan_with_payload()
    graph = ws.graph(tensors, wiring)
    data = graph.to_pyg(edges, dtype)
    assert data.edge_attr.dtype == (dtype or torch.float64)
    assert_same(ws.ParameterGraph.from_pyg(data), tensors)


def test_every_dtype_comes_back_from_networkx_and_graphml(tmp_path: Path) -> None:
    tensors, wiring = exotic()
    tensors["1.weight"] = nan_with_payload()
    graph = ws.graph(tensors, wiring)
    assert_same(ws.ParameterGraph.from_networkx(graph.to_networkx()), tensors)
    graph.save(tmp_path / "net.graphml", format="graphml")
    read = nx.read_graphml(tmp_path / "net.graphml", force_multigraph=True)
    assert_same(ws.ParameterGraph.from_networkx(read), tensors)


def test_statistics_count_what_is_not_finite() -> None:
    tensors, wiring = exotic()
    found = ws.graph(tensors, wiring).statistics()
    bias = found["0.bias"]
    assert (bias.count, bias.nan, bias.infinite, bias.abs_max) == (4, 1, 1, 65504.0)
    assert found["1.num_batches_tracked"].max == float(2**62 + 1)
    assert found["5.weight"].count == 30


def test_statistics_of_large_means_and_extreme_values() -> None:
    net = nn.Sequential(nn.Linear(700, 900), nn.Linear(900, 2))
    wiring = ws.wiring(net.eval(), torch.randn(2, 700), prove=False)
    tensors = dict(net.state_dict())
    tensors["0.weight"] = (1000 + 0.1 * torch.randn(900, 700)).float()
    tensors["1.weight"] = torch.full((2, 900), 1e30)
    tensors["0.bias"] = torch.full((900,), 1e-30)
    found = ws.graph(tensors, wiring).statistics()
    wide = tensors["0.weight"].double()
    assert found["0.weight"].std == pytest.approx(float(wide.std(correction=0)), rel=1e-4)
    assert found["0.weight"].mean == pytest.approx(float(wide.mean()), rel=1e-7)
    assert found["1.weight"].rms == pytest.approx(1e30, rel=1e-6)
    assert found["0.bias"].rms == pytest.approx(1e-30, rel=1e-6)


# -------------------------------------------------------------------- exports


def test_shuffled_edges_find_their_way_back() -> None:
    tensors, wiring = built("cnn-flatten")
    for edges in ("scalar", "channel"):
        data = ws.graph(tensors, wiring).to_pyg(edges)
        order = torch.randperm(data.edge_index.shape[1], generator=torch.Generator().manual_seed(0))
        for key in ("edge_index", "edge_attr", "edge_block", "edge_position"):
            if key in data:
                data[key] = data[key][:, order] if key == "edge_index" else data[key][order]
        assert_same(ws.ParameterGraph.from_pyg(data), tensors)


def test_changed_weights_come_back_changed() -> None:
    tensors, wiring = exotic()
    data = ws.graph(tensors, wiring).to_pyg(dtype=torch.float32)
    data.edge_attr = data.edge_attr * 2
    data.x[:] = 1
    found = ws.ParameterGraph.from_pyg(data)
    assert torch.equal(found["0.weight"], tensors["0.weight"] * 2)
    assert torch.equal(found["5.weight"], tensors["5.weight"] * 2)
    assert torch.equal(found["1.running_var"], torch.ones(6, dtype=torch.float64))
    assert torch.equal(found["1.num_batches_tracked"], tensors["1.num_batches_tracked"])


def test_missing_and_double_edges_are_refused() -> None:
    tensors, wiring = built("mlp")
    data = ws.graph(tensors, wiring).to_pyg()
    cut = data.clone()
    for key in ("edge_attr", "edge_block", "edge_position"):
        cut[key] = cut[key][1:]
    cut.edge_index = cut.edge_index[:, 1:]
    with pytest.raises(GraphError, match="every weight needs its edge"):
        ws.ParameterGraph.from_pyg(cut)
    double = data.clone()
    double.edge_index[:, 0] = double.edge_index[:, 1]
    with pytest.raises(GraphError, match="not those of the graph"):
        ws.ParameterGraph.from_pyg(double)
    with pytest.raises(GraphError, match="description missing"):
        ws.ParameterGraph.from_pyg({k: v for k, v in data.to_dict().items() if k != "description"})


def test_pyg_batches_and_gives_back_its_graphs() -> None:
    from torch_geometric.data import Batch

    tensors, wiring = built("hf-gpt2")
    permuted = wiring.apply(wiring.random(1), tensors)
    batch = Batch.from_data_list([ws.graph(t, wiring).to_pyg() for t in (tensors, permuted)])
    nodes = ws.graph(tensors, wiring).num_nodes
    assert batch.num_nodes == 2 * nodes
    assert batch.link_index.max() >= nodes
    with pytest.raises(GraphError, match="batch"):
        ws.ParameterGraph.from_pyg(batch)
    assert_same(ws.ParameterGraph.from_pyg(batch.get_example(1)), permuted)


def test_networkx_refuses_what_is_too_large() -> None:
    graph = ws.graph(*built("mlp"))
    with pytest.raises(GraphError, match="at most 100"):
        graph.to_networkx(max_edges=100)


def test_files(tmp_path: Path) -> None:
    tensors, wiring = built("cnn-flatten")
    graph = ws.graph(tensors, wiring)
    graph.save(tmp_path / "net.json")
    assert ws.ParameterGraph.from_description(json.loads((tmp_path / "net.json").read_text())) == graph
    graph.save(tmp_path / "net.pt", format="pyg")
    assert_same(ws.ParameterGraph.from_pyg(torch.load(tmp_path / "net.pt", weights_only=True)), tensors)
    graph.save(tmp_path / "net.graphml", format="graphml")
    read = nx.read_graphml(tmp_path / "net.graphml", force_multigraph=True)
    assert_same(ws.ParameterGraph.from_networkx(read), tensors)
    with pytest.raises(GraphError, match="json, pyg, graphml"):
        graph.save(tmp_path / "net.dot", format="dot")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["net.graphml", "net.json", "net.pt"]


def test_a_foreign_description_is_refused() -> None:
    with pytest.raises(GraphError, match="version"):
        ws.ParameterGraph.from_description({"format": "other"})
    found = ws.graph(*built("mlp")).describe()
    del found["cells"][0]["sizes"]
    with pytest.raises(GraphError, match="damaged"):
        ws.ParameterGraph.from_description(found)


# -------------------------------------------------------------------- the way in


class Lazy(Mapping[str, torch.Tensor]):
    """Tensors of a file, counted as they are read."""

    def __init__(self, tensors: Tensors) -> None:
        self.tensors, self.read = tensors, Counter[str]()

    def __getitem__(self, name: str) -> torch.Tensor:
        self.read[name] += 1
        return self.tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    def __len__(self) -> int:
        return len(self.tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self.tensors[name].shape)

    def dtype(self, name: str) -> torch.dtype:
        return self.tensors[name].dtype


def test_nothing_is_read_before_it_is_asked_for() -> None:
    tensors, wiring = built("cnn-flatten")
    lazy = Lazy(tensors)
    graph = ws.graph(lazy, wiring)
    repr(graph), graph.to_json(), graph.link_index()
    assert not lazy.read
    graph.weight(graph.blocks[0])
    assert lazy.read == {graph.blocks[0].tensor: 1}
    lazy.read.clear()
    graph.statistics()
    assert lazy.read == dict.fromkeys(tensors, 1)


def test_failed_wirings_are_refused_and_guesses_marked() -> None:
    tensors, wiring = built("mlp")
    with pytest.raises(UnprovedWiringError, match="failed its proof"):
        ws.graph(tensors, wiring.with_(status="failed"))
    assert "UNVERIFIED" in repr(ws.graph(tensors, wiring.with_(status="unverified")))
    assert ws.graph(tensors, wiring.with_(status="proved")).proved


def test_a_module_is_wired_and_proved() -> None:
    graph = ws.graph(nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)), torch.randn(2, 3))
    assert graph.proved
    assert [c.mark for c in graph.cells.values()] == ["", "input", "output"]


def test_a_file_is_opened_lazily_and_wired(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    net = nn.Sequential(nn.Linear(30, 40), nn.ReLU(), nn.Linear(40, 5))
    save_file(net.state_dict(), tmp_path / "net.safetensors")
    for x in (tmp_path / "net.safetensors", str(tmp_path / "net.safetensors"), ws.open(tmp_path / "net.safetensors")):
        graph = ws.graph(x)
        assert graph.status in ("proved", "unverified")
        assert graph.num_parameters == 30 * 40 + 40 + 40 * 5 + 5
        assert_same(ws.ParameterGraph.from_pyg(graph.to_pyg()), dict(graph.tensors or {}))
        assert graph.statistics()["0.weight"].norm == pytest.approx(float(net[0].weight.detach().norm()), rel=1e-5)


def test_a_file_of_many_pages_is_streamed(tmp_path: Path) -> None:
    """Two megabytes of bfloat16 on two threads, with a segment that is no contiguous part of the tensor."""
    from safetensors.torch import save_file

    torch.manual_seed(0)
    lstm = nn.LSTM(300, 700, batch_first=True)
    wiring = ws.wiring(lstm.eval(), torch.randn(2, 3, 300), prove=False)
    tensors = {k: v.to(torch.bfloat16) for k, v in lstm.state_dict().items()}
    save_file(tensors, tmp_path / "net.safetensors")
    graph = ws.graph(ws.open(tmp_path / "net.safetensors"), wiring)
    found = graph.statistics()
    for block in graph.blocks:
        x = block.view(tensors[block.tensor]).double()
        assert found[block.label].std == pytest.approx(float(x.std(correction=0)), rel=1e-5)
        assert (found[block.label].min, found[block.label].max) == (float(x.min()), float(x.max()))
    whole = torch.randn(3000, 1500).to(torch.bfloat16)
    for x in (whole, whole.T, whole[:, 100:1400], -whole.abs(), whole.half(), whole.float()):
        got = statistics_of(x)
        y = x.double()
        assert got.count == y.numel()
        assert got.mean == pytest.approx(float(y.mean()), abs=1e-6)
        assert got.std == pytest.approx(float(y.std(correction=0)), rel=1e-5)
        assert (got.min, got.max, got.abs_max) == (float(y.min()), float(y.max()), float(y.abs().max()))


def statistics_of(x: torch.Tensor) -> Any:
    with ThreadPoolExecutor(2) as pool:
        return _of(x, pool, 2)


def test_tensors_and_wiring_must_belong_together() -> None:
    tensors, wiring = built("mlp")
    with pytest.raises(WiringError, match="not in the wiring"):
        ws.graph({**tensors, "more": torch.zeros(2)}, wiring)
    first = next(iter(tensors))
    with pytest.raises(WiringError, match="shape"):
        ws.graph({**tensors, first: tensors[first][:-1]}, wiring)
    less = {k: v for k, v in tensors.items() if k != first}
    assert first in repr(ws.graph(less, wiring))
    with pytest.raises(GraphError, match="expected a Checkpoint"):
        ws.graph(3)


def test_repr_shows_cells_blocks_and_status() -> None:
    text = repr(ws.graph(*built("hf-gpt2")))
    assert "24,512 parameters" in text
    assert "transformer.wte.1 → transformer.h.0.mlp.c_fc.1" in text
    assert all(len(line) < 200 for line in text.splitlines())
