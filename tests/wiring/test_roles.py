"""Roles and activations: what theory says of networks whose every tensor is known."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import weightspace as ws


def affine(*layers: str) -> dict[str, str]:
    return {f"{n}.{k}": v for n in layers for k, v in (("weight", "weight"), ("bias", "shift"))}


def norm(*layers: str) -> dict[str, str]:
    return {f"{n}.{k}": v for n in layers for k, v in (("weight", "gain"), ("bias", "shift"))}


def batch_norm(layer: str) -> dict[str, str]:
    return {**norm(layer), f"{layer}.running_mean": "mean", f"{layer}.running_var": "variance"}


def same_order(found: dict[str, str], expected: dict[str, str]) -> bool:
    return list(found.items()) == list(expected.items())


def functions(wiring: ws.Wiring) -> list[tuple[str, ...]]:
    return [wiring.activations.get(f, ()) for f in wiring.free]


def test_a_perceptron() -> None:
    wiring = ws.wiring(nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)))
    assert same_order(wiring.roles, affine("0", "2", "4"))
    assert functions(wiring) == [("relu",), ("tanh",)]


def test_a_convolutional_network_with_norms() -> None:
    module = nn.Sequential(
        nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU6(), nn.Conv2d(6, 8, 3, bias=False), nn.GroupNorm(2, 8),
        nn.SiLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3),
    )  # fmt: skip
    wiring = ws.wiring(module, torch.randn(2, 3, 9, 9))
    expected = {
        **affine("0"), **batch_norm("1"), "3.weight": "weight", **norm("4"), **affine("8"),
        "1.num_batches_tracked": "other",
    }  # fmt: skip
    assert same_order(wiring.roles, expected)
    assert functions(wiring) == [("relu6",), ("group_norm", "silu"), ("group_norm", "silu")]


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        # Registered in another order than they run in.
        self.head, self.second, self.first = nn.Linear(6, 3), nn.Conv2d(6, 6, 3, padding=1), nn.Conv2d(3, 6, 1)
        self.norm, self.scale = nn.BatchNorm2d(6), nn.Parameter(torch.full((6, 1, 1), 0.5))

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        x = F.relu(x + self.scale * self.norm(self.second(x)))
        return self.head(x.mean((2, 3)))


def test_a_residual_network_in_the_order_of_its_run() -> None:
    module = Residual()
    wiring = ws.wiring(module, torch.randn(2, 3, 5, 5))
    expected = {
        **affine("first", "second"), **batch_norm("norm"), "scale": "gain", **affine("head"),
        "norm.num_batches_tracked": "other",
    }  # fmt: skip
    assert same_order(wiring.roles, expected)
    assert list(wiring) == list(module.state_dict())
    assert functions(wiring) == [("relu",)]


@pytest.mark.parametrize("reverse", [False, True])
def test_the_order_of_a_file_does_not_matter(tmp_path: Path, reverse: bool) -> None:
    module = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(32, 4))
    state = module.state_dict()
    names = sorted(state, reverse=reverse)
    torch.save({n: state[n] for n in names}, tmp_path / "m.pt")
    wiring = ws.wiring(tmp_path / "m.pt")
    expected = {**affine("0"), **batch_norm("1"), **affine("4"), "1.num_batches_tracked": "other"}
    assert same_order(wiring.roles, expected)
    pinned = wiring.pinning(list(wiring.free), "for the test")
    assert same_order(pinned.roles, expected)
    assert pinned.activations == wiring.activations


def test_recurrent_cells() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cell, self.head = nn.LSTM(4, 6), nn.Linear(6, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.cell(x)[0][-1])

    wiring = ws.wiring(Net(), torch.randn(3, 2, 4))
    assert dict(wiring.roles) == {
        "cell.weight_ih_l0": "weight", "cell.weight_hh_l0": "weight", "cell.bias_ih_l0": "shift",
        "cell.bias_hh_l0": "shift", **affine("head"),
    }  # fmt: skip
    (along,) = functions(wiring)
    assert set(along) == {"sigmoid", "tanh", "mul"}


def test_packed_projections_and_class_tokens() -> None:
    class Vision(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.patch = nn.Conv2d(3, 16, 4, 4)
            self.token, self.place = nn.Parameter(torch.randn(1, 1, 16)), nn.Parameter(torch.randn(1, 5, 16))
            self.layer = nn.TransformerEncoderLayer(16, 4, 24, batch_first=True, activation="gelu", norm_first=True)
            self.head = nn.Linear(16, 3)

        def forward(self, x: Tensor) -> Tensor:
            x = self.patch(x).flatten(2).mT
            x = torch.cat([self.token.expand(len(x), -1, -1), x], 1) + self.place
            return self.head(self.layer(x)[:, 0])

    wiring = ws.wiring(Vision(), torch.randn(2, 3, 8, 8))
    attention = {"layer.self_attn.in_proj_weight": "weight", "layer.self_attn.in_proj_bias": "shift"}
    expected = {
        **affine("patch"), "token": "other", "place": "shift", **norm("layer.norm1"), **attention,
        **affine("layer.self_attn.out_proj"), **norm("layer.norm2"), **affine("layer.linear1", "layer.linear2", "head"),
    }  # fmt: skip
    assert same_order(wiring.roles, expected)
    assert wiring.activations[next(f.name for f in wiring.free.values() if f.size == 24)] == ("gelu",)
    assert wiring.activations[next(f.name for f in wiring.free.values() if f.size == 4 and not f.over)] == ("softmax",)


class Between(nn.Module):
    """Linear, a function of the hidden values and a parameter, Linear."""

    def __init__(self, fn: Callable[[Tensor, Tensor], Tensor], *shape: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.p, self.b, self.fn = nn.Linear(5, 8), nn.Parameter(torch.rand(*shape)), nn.Linear(8, 3), fn

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.fn(self.a(x), self.p))


@pytest.mark.parametrize(
    ("fn", "shape", "role"),
    [
        (lambda h, p: h + p, (8,), "shift"),
        (lambda h, p: p - h, (8,), "shift"),
        (lambda h, p: h * (1 + p), (8,), "gain"),
        (lambda h, p: h / p, (8,), "gain"),
        (lambda h, p: h * -torch.exp(p), (8,), "gain"),
        (lambda h, p: h * p.half().float().view(2, 4).view(8), (8,), "gain"),
        (lambda h, p: h + p[8:], (16,), "shift"),
        (lambda h, p: h @ p.chunk(2)[1], (16, 8), "weight"),
        (lambda h, p: F.linear(h, F.normalize(p, dim=1)), (8, 8), "weight"),
        (lambda h, p: torch.einsum("bi,ij->bj", h, p), (8, 8), "weight"),
        (lambda h, p: torch.einsum("bi,i->bi", h, p), (8,), "gain"),
        (lambda h, p: F.prelu(h, p), (8,), "gain"),
        (lambda h, p: h + p[(h[:, 0] > 0).long()], (2, 8), "lookup"),
        (lambda h, p: h + p[[1, 0]], (2, 8), "shift"),
        (lambda h, p: torch.maximum(h, p), (8,), "other"),
        (lambda h, p: h * torch.rsqrt(p + 1e-5), (8,), "variance"),
    ],
)
def test_one_parameter_between_two_layers(fn, shape, role) -> None:  # type: ignore[no-untyped-def]
    assert ws.wiring(Between(fn, *shape), torch.randn(2, 5)).roles["p"] == role


@pytest.mark.parametrize(
    ("fn", "names"),
    [
        (lambda h: h.clamp(min=0), ("relu",)),
        (lambda h: torch.where(h > 0, h, torch.zeros(())), ("relu",)),
        (lambda h: F.hardtanh(h), ("hardtanh",)),
        (lambda h: h * torch.sigmoid(h), ("silu",)),
        (lambda h: 0.5 * h * (1 + torch.erf(h / 2**0.5)), ("gelu",)),
        (lambda h: 0.5 * h * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (h + 0.044715 * h**3))), ("gelu",)),
        (lambda h: torch.sin(30 * h), ("sin",)),
        (lambda h: F.leaky_relu(h, 0.2), ("leaky_relu",)),
        (lambda h: h.abs().sqrt(), ("abs", "sqrt")),
        (lambda h: h.square(), ("pow",)),
        (lambda h: F.layer_norm(h, (8,)), ("layer_norm",)),
        (lambda h: (h - h.mean(-1, keepdim=True)) / (h.var(-1, keepdim=True) + 1e-5).sqrt(), ("layer_norm",)),
        (lambda h: h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-5), ("rms_norm",)),
        (lambda h: h.softmax(-1), ("softmax",)),
        (lambda h: 3 * h + 1, ()),
    ],
)
def test_functions_are_named_however_they_are_written(fn, names) -> None:  # type: ignore[no-untyped-def]
    wiring = ws.wiring(Between(lambda h, p: fn(h) + p, 8), torch.randn(2, 5))
    assert functions(wiring) == [names]


def test_a_transformers_config_too_large_to_run() -> None:
    transformers = pytest.importorskip("transformers")
    wiring = ws.wiring(transformers.GPT2Config(n_layer=2))
    assert wiring.program is None
    assert wiring.proved
    by_role: dict[str, set[str]] = {}
    for name, role in wiring.roles.items():
        by_role.setdefault(role, set()).add(".".join(name.split(".")[-2:]))
    assert by_role["lookup"] == {"wte.weight", "wpe.weight", "lm_head.weight"}
    assert by_role["gain"] == {"ln_1.weight", "ln_2.weight", "ln_f.weight"}
    assert by_role["weight"] == {"c_attn.weight", "c_proj.weight", "c_fc.weight"}
    assert set(by_role) == {"lookup", "gain", "weight", "shift"}
    assert [wiring.activations[f] for f, v in wiring.free.items() if v.size == 3072] == [("gelu",)] * 2


def test_rms_norms_and_gates() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2, intermediate_size=48,
        vocab_size=64,
    )  # fmt: skip
    wiring = ws.wiring(config)
    assert [n.split(".")[-2] for n, r in wiring.roles.items() if r == "gain"] == [
        "input_layernorm", "post_attention_layernorm", "norm",
    ]  # fmt: skip
    assert next(iter(wiring.roles)) == "model.embed_tokens.weight"
    sizes = {v.size: wiring.activations.get(f) for f, v in wiring.free.items()}
    assert sizes[48] == ("silu", "mul")
    assert sizes[32] == ("rms_norm",)


def test_an_onnx_graph(tmp_path: Path) -> None:
    pytest.importorskip("onnx", reason="the onnx package is not installed: nothing to write a graph with")
    module = nn.Sequential(nn.Conv2d(3, 6, 3), nn.SiLU(), nn.Flatten(), nn.Linear(54, 4)).eval()
    path = tmp_path / "m.onnx"
    torch.onnx.export(module, (torch.randn(2, 3, 5, 5),), str(path), dynamo=False, input_names=["x"])
    wiring = ws.wiring(path)
    assert [wiring.roles[n] for n in wiring.roles if wiring.roles[n] != "other"] == ["weight", "shift"] * 2
    assert functions(wiring) == [("silu",)]
