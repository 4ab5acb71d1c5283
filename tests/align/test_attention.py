"""Transformers by all of their symmetries: maps inside heads, rotary ones, rotations of the residual stream."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch
from torch import Tensor, nn

import weightspace as ws
from tests.align.small import network
from tests.architectures import CASES
from weightspace.align.attention import attention
from weightspace.align.linear_symmetries import LinearSymmetry, linear_symmetries
from weightspace.errors import AlignmentError, UnprovedWiringError
from weightspace.wiring.proof import distance, generic, run
from weightspace.wiring.wiring import Wiring

_KNOWN: dict[str, tuple[Wiring, dict[str, Tensor]]] = {}


class RootMean(nn.Module):
    """RMSNorm: a division by the stream's length and a gain."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)


class Stream(nn.Module):
    """One layer of attention (three heads of four) and one MLP around a residual stream under RMSNorm."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(17, 12)
        self.norms = nn.ModuleList(RootMean(12) for _ in range(3))
        self.q, self.k, self.v, self.o = (nn.Linear(12, 12, bias=False) for _ in range(4))
        self.up, self.down, self.head = nn.Linear(12, 20), nn.Linear(20, 12), nn.Linear(12, 5, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        h = self.norms[0](x)
        q, k, v = (m(h).unflatten(-1, (3, 4)).transpose(1, 2) for m in (self.q, self.k, self.v))
        mixed = torch.softmax(q @ k.transpose(-1, -2) / 2, -1) @ v
        x = x + self.o(mixed.transpose(1, 2).flatten(2))
        x = x + self.down(torch.relu(self.up(self.norms[1](x))))
        out: Tensor = self.head(self.norms[2](x))
        return out


def wired(name: str) -> tuple[Wiring, dict[str, Tensor]]:
    """A wiring and tensors with generic values, float32."""
    if name not in _KNOWN:
        torch.manual_seed(0)
        if name == "stream":
            wiring = ws.wiring(Stream(), torch.randint(17, (2, 6)))
        else:
            module, args, kwargs = CASES[name].build()
            wiring = ws.wiring(module, *args, **kwargs)
        assert wiring.proved
        assert wiring.program is not None
        _KNOWN[name] = wiring, generic(wiring.program.tensors, 3)
    return _KNOWN[name]


def computes(wiring: Wiring, one: Mapping[str, Tensor], two: Mapping[str, Tensor], dtype: torch.dtype) -> float:
    assert wiring.program is not None
    return distance(run(wiring.program, one, dtype), run(wiring.program, two, dtype))


def planted(wiring: Wiring, a: Mapping[str, Tensor], seed: int, kinds: tuple[str, ...]) -> dict[str, Tensor]:
    """``a`` after random maps of the given kinds and a random permutation; what it computes stays."""
    b = dict(a)
    for s in linear_symmetries(wiring):
        if s.kind in kinds:
            b = s.fold(b) if s.folded else b
            b = s.act(s.random(seed), b)
    b = wiring.apply(wiring.random(seed), b)
    wide = {n: t.double() if t.is_floating_point() else t for n, t in a.items()}
    assert computes(wiring, wide, b, torch.float32) < 1e-4
    return b


def gap(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> float:
    """Distance relative to the length."""
    pairs = [(a[n].double(), b[n].double()) for n in a if a[n].is_floating_point()]
    apart = sum(float((x - y).square().sum()) for x, y in pairs)
    return float((apart / sum(float(x.square().sum()) for x, _ in pairs)) ** 0.5)


INSIDE = ["torch-encoder", "gpt-tied", "llama-gqa", "llama-mqa", "stream"]


@pytest.mark.parametrize("name", INSIDE)
def test_planted_maps_inside_heads_are_undone(name: str) -> None:
    wiring, a = wired(name)
    assert any(s.kind in ("general", "rotary") for s in linear_symmetries(wiring))
    b = planted(wiring, a, 1, ("general", "rotary"))
    plain = ws.align(a, b, wiring=wiring)
    found = ws.align(a, b, "attention", wiring=wiring)
    assert gap(a, plain.aligned) > 0.05
    assert gap(a, found.aligned) < 1e-4
    assert found.maps
    assert found.diagnostics["distance"]["maps"] < found.diagnostics["distance"]["permutations"]


@pytest.mark.parametrize("name", ["stream", "llama-gqa"])
def test_planted_rotations_of_the_stream_are_undone(name: str) -> None:
    wiring, a = wired(name)
    (stream,) = [s for s in linear_symmetries(wiring) if s.kind == "orthogonal" and s.folded]
    b = planted(wiring, a, 2, ("general", "rotary", "orthogonal"))
    assert gap(a, ws.align(a, b, "attention", wiring=wiring, stream=False).aligned) > 0.2
    found = ws.align(a, b, "attention", wiring=wiring)
    assert gap(a, found.aligned) < 1e-4
    turn = found.maps[stream.name]
    torch.testing.assert_close(turn @ turn.T, torch.eye(stream.size, dtype=turn.dtype), atol=1e-9, rtol=0)


@pytest.mark.parametrize("name", [*INSIDE, "linear-attention", "cross-attention"])
@pytest.mark.parametrize("seed", [5, 6])
def test_strangers_come_nearer_and_keep_their_function(name: str, seed: int) -> None:
    wiring, a = wired(name)
    assert wiring.program is not None
    wide = {n: t.double() if t.is_floating_point() else t for n, t in generic(wiring.program.tensors, seed).items()}
    # Weights of a network of its own: the same shapes with another draw.
    generator = torch.Generator().manual_seed(seed)
    b = {
        n: t.std() * torch.randn(t.shape, generator=generator, dtype=t.dtype)
        if t.is_floating_point() and t.dim() > 1
        else t
        for n, t in wide.items()
    }
    same: dict[int, str] = {}
    for n, t in wiring.program.tensors.items():
        b[n] = b[same.setdefault(id(t), n)]
    found = attention(a, b, wiring)
    assert found.aligned is not None
    assert computes(wiring, b, found.aligned, torch.float64) < 1e-8
    assert found.diagnostics["distance"]["maps"] <= found.diagnostics["distance"]["permutations"] * (1 + 1e-9)


def test_a_rotation_survives_noise() -> None:
    wiring, a = wired("stream")
    b = planted(wiring, a, 4, ("general", "orthogonal"))
    generator = torch.Generator().manual_seed(0)
    b = {n: t + 0.02 * t.std() * torch.randn(t.shape, generator=generator) for n, t in b.items()}
    found = ws.align(a, b, "attention", wiring=wiring)
    assert gap(a, found.aligned) < 0.06
    assert computes(wiring, b, found.aligned, torch.float32) < 1e-5


def test_half_precision_is_rounded_once() -> None:
    wiring, a = wired("stream")
    b = {n: t.to(torch.bfloat16) for n, t in planted(wiring, a, 1, ("general",)).items()}
    found = attention({n: t.to(torch.bfloat16) for n, t in a.items()}, b, wiring)
    assert found.aligned is not None
    assert all(t.dtype == torch.bfloat16 for t in found.aligned.values())
    assert gap(a, found.aligned) < 0.02
    assert found.diagnostics["error"] < 1e-8


def test_a_gain_of_zero_cannot_be_folded() -> None:
    wiring, a = wired("stream")
    b = planted(wiring, a, 1, ("general",))
    b["norms.0.weight"] = b["norms.0.weight"].clone().index_fill_(0, torch.tensor(3), 0.0)
    found = attention(a, b, wiring)
    assert len(found.diagnostics["not rotated"]) == 1
    assert found.aligned is not None
    assert all(bool(t.isfinite().all()) for t in found.aligned.values())
    assert computes(wiring, b, found.aligned, torch.float32) < 1e-5


def test_layer_norm_forbids_rotations() -> None:
    wiring, a, _ = network("vit")
    found = linear_symmetries(wiring)
    assert {s.kind for s in found} == {"general"}
    assert ws.align(a, a, "attention", wiring=wiring).maps == {}


def test_a_wrong_map_would_be_seen() -> None:
    """The proof behind every map can fail: one that turns only one side changes the outputs."""
    wiring, a = wired("stream")
    for s in linear_symmetries(wiring):
        half = LinearSymmetry(s.factor, s.kind, s.over, s.shape, 0.0, s.sides[:1], s.pairs, s.folded, s.tied)
        base = half.fold(a) if s.folded else a
        assert computes(wiring, base, s.act(s.random(3), base), torch.float32) < 1e-4
        assert computes(wiring, base, half.act(s.random(3), base), torch.float32) > 1e-2


def test_refusals() -> None:
    wiring, a = wired("stream")
    with pytest.raises(UnprovedWiringError):
        ws.align(a, a, "attention", wiring=wiring.with_(status="unverified"))
    with pytest.raises(UnprovedWiringError):
        ws.align(a, a, "attention", wiring=wiring.with_(status="unverified", program=None), unverified=True)
    with pytest.raises(AlignmentError, match="no option 'turn'"):
        ws.align(a, a, "attention", wiring=wiring, turn=False)
