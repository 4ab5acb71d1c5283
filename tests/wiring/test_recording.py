"""Recorded activations against hooks, and second moments against the sums that they are made of."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import weightspace as ws
from tests.architectures.registry import CASES
from weightspace.errors import WiringError
from weightspace.wiring.recording import contractions, record, values
from weightspace.wiring.wiring import Permutation
from weightspace.zoo.description import module_of


def hooked(module: nn.Module, inputs: tuple[Any, ...], names: list[str]) -> dict[str, list[tuple[Tensor, Tensor]]]:
    """What each of the named parts is given and returns, run by run."""
    found: dict[str, list[tuple[Tensor, Tensor]]] = {n: [] for n in names}
    parts = dict(module.named_modules())
    handles = [
        parts[n].register_forward_hook(lambda _, given, out, n=n: found[n].append((given[0].clone(), out.clone())))
        for n in names
    ]
    with torch.no_grad():
        module.eval()(*inputs)
    for handle in handles:
        handle.remove()
    return found


def same_samples(one: Tensor, two: Tensor) -> bool:
    """The same rows, in whatever order places and examples are gone through."""
    a, b = (x.flatten(1).to(torch.float64) for x in (one, two))
    weights = torch.linspace(1, 2, a.shape[1], dtype=torch.float64)
    order = [(x @ weights).argsort() for x in (a, b)]
    return a.shape == b.shape and torch.allclose(a[order[0]], b[order[1]], atol=1e-5)


def test_a_perceptron_records_what_hooks_see() -> None:
    module = nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 3))
    x = torch.randn(100, 5)
    wiring = ws.wiring(module)
    seen = hooked(module, (x,), ["1", "3"])
    given = wiring.program.tensors
    for at, k in (("pre", 0), ("post", 1)):
        found = record(wiring, given, x, at=at, batch=32)
        assert list(found) == ["0", "2"]
        assert torch.allclose(found["0"], seen["1"][0][k], atol=1e-6)
        assert torch.allclose(found["2"], seen["3"][0][k], atol=1e-6)


def test_maps_of_a_convolutional_network_are_samples_at_every_place() -> None:
    module = nn.Sequential(
        nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(24, 4)
    ).eval()
    x = torch.randn(10, 3, 6, 6)
    wiring = ws.wiring(module, x[:2])
    seen = hooked(module, (x,), ["1", "2"])
    found = values(wiring, wiring.program.tensors, x, batch=4)
    (factor,) = wiring.free
    by = {(v.op, v.stage): v.samples for v in found[factor]}
    assert same_samples(by["convolution", "linear"], seen["1"][0][0].movedim(1, -1).flatten(0, 2))
    assert same_samples(by["native_batch_norm", "pre"], seen["1"][0][1].movedim(1, -1).flatten(0, 2))
    assert same_samples(by["relu", "post"], seen["2"][0][1].movedim(1, -1).flatten(0, 2))


def test_heads_and_channels_of_attention() -> None:
    module, args = module_of(
        {"kind": "vit", "input": [1, 8, 8], "classes": 3, "patch": 4, "dim": 12, "depth": 1, "heads": 3, "hidden": 10,
         "activation": "gelu"}
    )  # fmt: skip
    wiring = ws.wiring(module, *args)
    x = torch.randn(6, 1, 8, 8)
    seen = hooked(module, (x,), ["blocks.0.query", "blocks.0.key", "blocks.0.value", "blocks.0.up"])
    found = values(wiring, wiring.program.tensors, x)
    q, k = (seen[f"blocks.0.{n}"][0][1].unflatten(-1, (3, 4)) for n in ("query", "key"))
    inner = next(n for n, f in wiring.free.items() if f.over and "query" in n)
    assert [same_samples(v.samples, y.flatten(0, 1)) for v, y in zip(found[inner], (q, k), strict=True)] == [True, True]
    (heads,) = wiring.free[inner].over
    scores = torch.einsum("bthd,bshd->btsh", q, k)
    probabilities = (scores / 2).softmax(2)
    last = [v for v in found[heads] if v.op == "_softmax"]
    assert same_samples(last[0].samples, probabilities.flatten(0, 2))
    assert not last[0].beside
    aside = next(v for v in found[heads] if inner in v.beside)
    assert same_samples(aside.samples, q.square().mean(-1).sqrt().flatten(0, 1))
    hidden = record(wiring, wiring.program.tensors, x)["blocks.0.up"]
    assert torch.allclose(hidden, F.gelu(seen["blocks.0.up"][0][1]).flatten(0, 1), atol=1e-6)


@pytest.mark.parametrize("seed", range(3))
def test_permuted_weights_permute_what_is_recorded(seed: int) -> None:
    """Of every factor and value: the samples of the moved network are those of the network, moved."""
    description = {
        "kind": "cnn", "input": [2, 8, 8], "classes": 3, "channels": [8, 8], "kernels": [3, 3], "strides": [1, 2],
        "activation": "silu", "norm": "group", "residuals": [False, True], "same": True,
    }  # fmt: skip
    module, args = module_of(description)
    wiring = ws.wiring(module, *args)
    x = torch.randn(5, 2, 8, 8)
    tensors = dict(wiring.program.tensors)
    perm = wiring.random(seed)
    one = values(wiring, tensors, x, positions=50)
    two = values(wiring, wiring.apply(perm, tensors), x, positions=50)
    for name, factor in wiring.free.items():
        alone = Permutation({name: perm.index[name]}, wiring.factors)
        over = [perm.index[o] for o in factor.over]
        for a, b in zip(one[name], two[name], strict=True):
            moved = a.samples
            if over:
                moved = moved[:, over[0]].gather(-1, alone.index[name].expand_as(moved))
            else:
                moved = moved[:, alone.index[name]]
            assert torch.allclose(moved, b.samples, atol=1e-4), (name, a)


def test_samples_are_bounded_and_the_same_for_two_networks() -> None:
    module = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 2))
    wiring = ws.wiring(module, torch.randn(2, 1, 8, 8))
    x = torch.randn(20, 1, 8, 8)
    tensors = wiring.program.tensors
    found = record(wiring, tensors, x, positions=64, batch=5)
    assert found["0"].shape == (64, 4)
    assert torch.equal(found["0"], record(wiring, dict(tensors), x, positions=64, batch=5)["0"])
    assert not torch.equal(found["0"], record(wiring, tensors, x, positions=64, batch=5, seed=1)["0"])


def test_what_cannot_be_recorded_says_so() -> None:
    wiring = ws.wiring(nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 3)))
    tensors = dict(wiring.program.tensors)
    with pytest.raises(WiringError, match="is not among"):
        record(wiring, {"0.weight": tensors["0.weight"]}, torch.randn(3, 5))
    with pytest.raises(WiringError, match="no network to run"):
        record(wiring.with_(program=None), tensors, torch.randn(3, 5))
    with pytest.raises(WiringError, match="no inputs"):
        record(wiring, tensors, [])
    with pytest.raises(WiringError, match="no tensor 'other'"):
        contractions(wiring, tensors, torch.randn(3, 5), only=["other"])


# -------------------------------------------------------------------- second moments


def test_moments_of_linear_layers() -> None:
    module = nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 3))
    wiring = ws.wiring(module)
    x = torch.randn(50, 5)
    grams = contractions(wiring, wiring.program.tensors, x, batch=16)
    h = F.relu(module[0](x)).detach().double()
    assert torch.allclose(grams["0.weight"].moments[0], x.double().t() @ x.double())
    assert torch.allclose(grams["2.weight"].moments[0], h.t() @ h, atol=1e-5)
    assert torch.allclose(grams["2.weight"].totals[0], h.sum(0), atol=1e-5)
    assert grams["0.weight"].counts == (50,)
    assert not grams.left_out


CONVOLUTIONS = [
    nn.Conv2d(4, 6, 3, padding=1),
    nn.Conv2d(4, 6, (3, 2), stride=2, padding=(2, 1), dilation=2),
    nn.Conv2d(4, 8, 3, groups=2),
    nn.Conv2d(4, 4, 3, groups=4),
    nn.Conv1d(4, 6, 3, stride=2),
    nn.Conv3d(4, 6, 2),
    nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1, output_padding=1),
    nn.ConvTranspose2d(4, 6, 3, stride=2, groups=2, dilation=2),
]


@pytest.mark.parametrize("layer", CONVOLUTIONS, ids=repr)
def test_moments_of_convolutions_are_those_of_what_they_sum(layer: nn.Module) -> None:
    """|W x|² over all places is tr(Wᵀ G W), whatever stride, padding, dilation and groups are."""
    spatial = layer.weight.dim() - 2
    module = nn.Sequential(nn.Conv1d(2, 4, 1) if spatial == 1 else nn.Conv2d(2, 4, 1), nn.ReLU(), layer)
    if spatial == 3:
        module[0] = nn.Conv3d(2, 4, 1)
    x = torch.randn(3, 2, *(6, 7, 5)[:spatial])
    wiring = ws.wiring(module, x[:2])
    grams = contractions(wiring, wiring.program.tensors, x, positions=10**6)
    gram = grams["2.weight"]
    layer.bias.data.zero_()
    wiring = ws.wiring(module, x[:2])
    with torch.no_grad():
        y = module(x).double().movedim(1, -1).flatten(0, -2)
    energy = torch.cat([(m.t() @ g @ m).diagonal() * gram.counts[0] for g, m in gram.matrices(layer.weight.double())])
    assert torch.allclose(energy, y.square().sum(0), rtol=1e-4)
    assert gram.counts[0] == len(y)
    parts = [m for _, m in gram.matrices(layer.weight)]
    assert torch.equal(gram.assemble(parts, layer.weight), layer.weight)


class Packed(nn.Module):
    """Attention of one sequence to another: one tensor holds three projections with two kinds of inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        out: Tensor = self.attention(x, y, y, need_weights=False)[0]
        return out


def test_packed_projections_have_a_part_for_every_kind_of_inputs() -> None:
    module = Packed().eval()
    x, y = torch.randn(4, 3, 8), torch.randn(4, 5, 8)
    wiring = ws.wiring(module, x[:2], y[:2])
    gram = contractions(wiring, wiring.program.tensors, (x, y))["attention.in_proj_weight"]
    assert (gram.parts[0], gram.parts[-1][1]) == ((0, 8), 24)
    assert gram.split == 0
    flat = [t.flatten(0, 1).double() for t in (x, y)]
    assert torch.allclose(gram.moments[0], flat[0].t() @ flat[0], atol=1e-5)
    assert torch.allclose(gram.moments[-1], flat[1].t() @ flat[1], atol=1e-5)


class Einsums(nn.Module):
    """Projections kept as (heads, model, head) and (heads, head, model)."""

    def __init__(self) -> None:
        super().__init__()
        self.into = nn.Parameter(torch.randn(3, 6, 4))
        self.back = nn.Parameter(torch.randn(3, 4, 6))

    def forward(self, x: Tensor) -> Tensor:
        y = torch.einsum("bpm,hmd->bphd", x, self.into).relu()
        out: Tensor = torch.einsum("bphd,hdm->bpm", y, self.back)
        return out


def test_projections_kept_head_by_head() -> None:
    module = Einsums()
    x = torch.randn(4, 5, 6)
    wiring = ws.wiring(module, x[:2])
    grams = contractions(wiring, wiring.program.tensors, x)
    assert grams["into"].inputs == (1,)
    assert grams["back"].inputs == (0, 1)
    flat = x.flatten(0, 1).double()
    assert torch.allclose(grams["into"].moments[0], flat.t() @ flat, atol=1e-5)
    h = torch.einsum("bpm,hmd->bphd", x, module.into.detach()).relu().flatten(2).flatten(0, 1).double()
    assert torch.allclose(grams["back"].moments[0], h.t() @ h, atol=1e-4)
    (matrix,) = [m for _, m in grams["into"].matrices(module.into.detach())]
    assert torch.allclose(flat.float() @ matrix, torch.einsum("pm,hmd->phd", flat.float(), module.into).flatten(1))


def test_moments_can_be_had_in_portions_and_name_what_is_left_out() -> None:
    module, args = module_of(
        {"kind": "gpt", "input": [6], "classes": 9, "dim": 8, "depth": 1, "heads": 2, "hidden": 12,
         "activation": "gelu"}
    )  # fmt: skip
    wiring = ws.wiring(module, *args)
    grams = contractions(wiring, wiring.program.tensors, args, largest=8)
    assert "looked up" in grams.left_out["token.weight"]
    assert "12 inputs" in grams.left_out["blocks.0.down.weight"]
    with pytest.raises(KeyError, match="12 inputs"):
        grams["blocks.0.down.weight"]
    some = contractions(wiring, wiring.program.tensors, args, only=["blocks.0.key.weight"])
    assert list(some) == ["blocks.0.key.weight"]
    assert not some.left_out
    assert torch.equal(some["blocks.0.key.weight"].moments[0], grams["blocks.0.key.weight"].moments[0])


NETWORKS = ["llama-gqa", "moe-top2", "resnet18", "densenet", "shufflenet-v2", "lstm-projected", "pyg-gcn"]


@pytest.mark.parametrize("name", NETWORKS)
def test_networks_of_the_registry_record(name: str) -> None:
    module, args, kwargs = CASES[name].build()
    wiring = ws.wiring(module, *args, **kwargs)
    found = values(wiring, wiring.program.tensors, wiring.program.args, batch=None)
    assert set(found) == set(wiring.free)
