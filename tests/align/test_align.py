"""ws.align: what it promises, what it refuses, real files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from typer.testing import CliRunner

import weightspace as ws
from weightspace.align.frank_wolfe import Relaxed
from weightspace.checkpoint import list_models
from weightspace.cli import app
from weightspace.errors import AlignmentError, UnprovedWiringError
from weightspace.wiring.matching import Matching, float32, inner
from weightspace.wiring.places import places
from weightspace.wiring.proof import distance, run

SHARED = Path(__file__).resolve().parents[3] / "shared" / "checkpoints"
OTFUSION = SHARED / "otfusion-mnist" / "mnist_models.zip"
RESNET = SHARED / "resnet-cifar" / "pretrained_models__resnet20-12fca82f.th"


class Attention(nn.Module):
    """Two heads of four channels, a residual sum and a packed projection."""

    def __init__(self) -> None:
        super().__init__()
        self.enter = nn.Linear(5, 8)
        self.packed, self.out, self.leave = nn.Linear(8, 24), nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.enter(x)
        q, k, v = (t.unflatten(-1, (2, 4)).transpose(1, 2) for t in self.packed(h).chunk(3, -1))
        mixed = (torch.softmax(q @ k.transpose(-1, -2) / 2, -1) @ v).transpose(1, 2).flatten(2)
        return self.leave(torch.relu(h + self.out(mixed)))


class Cell(nn.Module):
    """A recurrence: one factor on both sides of one tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.cell, self.leave = nn.RNN(3, 6, batch_first=True), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.leave(self.cell(x)[0])


def conv() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 8, 3, groups=2), nn.ReLU(), nn.Flatten(),
        nn.Linear(32, 3),
    )  # fmt: skip


KINDS = {
    "mlp": (lambda: nn.Sequential(nn.Linear(4, 9), nn.Tanh(), nn.Linear(9, 7), nn.ReLU(), nn.Linear(7, 3)), (2, 4)),
    "conv": (conv, (2, 1, 6, 6)),
    "attention": (Attention, (2, 3, 5)),
    "cell": (Cell, (2, 4, 3)),
}
_WIRINGS: dict[str, ws.Wiring] = {}


def wired(kind: str) -> ws.Wiring:
    if kind not in _WIRINGS:
        torch.manual_seed(0)
        build, shape = KINDS[kind]
        _WIRINGS[kind] = ws.wiring(build(), torch.randn(*shape))
    assert _WIRINGS[kind].proved
    return _WIRINGS[kind]


def drawn(kind: str, seed: int) -> dict[str, Tensor]:
    torch.manual_seed(seed)
    state = KINDS[kind][0]().state_dict()
    return {n: torch.rand_like(t) + 0.5 if n.endswith("running_var") else t for n, t in state.items()}


@settings(max_examples=12, deadline=None)
@given(
    kind=st.sampled_from(list(KINDS)), seeds=st.tuples(st.integers(0, 10**6), st.integers(0, 10**6)),
    method=st.sampled_from(["weight-matching", "frank-wolfe"]),
)  # fmt: skip
def test_the_function_stays_and_the_objective_does_not_fall(kind: str, seeds: tuple[int, int], method: str) -> None:
    wiring = wired(kind)
    assert wiring.program is not None
    a, b = drawn(kind, seeds[0]), drawn(kind, seeds[1])
    found = ws.align(a, b, method, wiring=wiring, seed=seeds[0] % 7)
    # Frank-Wolfe goes its own way from the centre and need not end above where b was.
    if method == "weight-matching":
        assert found.objective >= found.before - 1e-6
    for name, p in found.permutations.index.items():
        assert torch.equal(p.sort(-1).values, torch.arange(wiring.factors[name].size).expand(p.shape))
    moved = wiring.apply(found.permutations, b)
    assert all(torch.equal(found.aligned[n], moved[n]) for n in b)
    assert distance(run(wiring.program, b, torch.float64), run(wiring.program, moved, torch.float64)) < 1e-10
    assert found.objective == pytest.approx(ws.align(a, moved, method, wiring=wiring).before)


@settings(max_examples=10, deadline=None)
@given(kind=st.sampled_from(list(KINDS)), seed=st.integers(0, 10**6))
def test_mended_similarities_are_those_computed_afresh(kind: str, seed: int) -> None:
    wiring = wired(kind)
    a, b = float32(drawn(kind, seed)), float32(drawn(kind, seed + 1))
    generator = torch.Generator().manual_seed(seed)
    found = Matching(wiring, a, b)
    for name in found.factors * 2:
        found.similarity(name)
        found.move(wiring.random(generator, only=[name]))
        found.improve(found.factors[0])
    counted = found.objective
    afresh = Matching(wiring, a, b, found.weights, start=found.permutation)
    assert counted == pytest.approx(afresh.objective, abs=1e-4)
    moved = wiring.apply(found.permutation, {n: b[n] for n in found.weights})
    assert afresh.objective == pytest.approx(inner(a, moved, found.weights), abs=1e-4)
    for name in found.factors:
        torch.testing.assert_close(found.similarity(name), afresh.similarity(name), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", list(KINDS))
def test_a_view_goes_back_to_where_it_came_from(kind: str) -> None:
    wiring, tensors = wired(kind), drawn(kind, 3)
    for row in places(wiring).values():
        for place in row:
            t = tensors[place.tensor]
            assert torch.equal(place.put(t, place.view(t)), t)
            assert torch.equal(place.view(place.put(t, 2 * place.view(t))), 2 * place.view(t))


@pytest.mark.parametrize("kind", list(KINDS))
def test_whole_matrices_are_permutations(kind: str) -> None:
    wiring = wired(kind)
    a, b = float32(drawn(kind, 0)), float32(drawn(kind, 1))
    perm = wiring.random(4)
    matching = Matching(wiring, a, b, start=perm)
    relaxed = Relaxed(wiring, a, b, matching.weights)
    relaxed.matrices = {f: nn.functional.one_hot(perm.index[f]).float() for f in relaxed.factors}
    assert relaxed.value(relaxed.matrices) == pytest.approx(matching.objective, rel=1e-5)
    gradient, value = relaxed.gradient()
    assert value == pytest.approx(matching.objective, rel=1e-5)
    if kind != "cell":
        lone = next(f for f in matching.factors if not matching.children[f])
        for name in (lone,):
            expected = matching.similarity(name).gather(
                -1, perm.index[name].argsort(-1).unsqueeze(-2).expand_as(gradient[name])
            )
            torch.testing.assert_close(gradient[name], expected, atol=1e-4, rtol=1e-4)


def test_more_search_is_not_worse() -> None:
    a, b = drawn("mlp", 0), drawn("mlp", 1)
    plain = ws.align(a, b, wiring=wired("mlp"), starts=("identity",), kicks=0)
    kicked = ws.align(a, b, wiring=wired("mlp"), starts=("identity",), kicks=60)
    assert kicked.objective > plain.objective
    assert ws.align(a, b, wiring=wired("mlp"), starts=("identity",), kicks=60).objective == kicked.objective


def test_half_precision_keeps_its_dtype() -> None:
    wiring = wired("mlp")
    a = {n: t.to(torch.bfloat16) for n, t in drawn("mlp", 0).items()}
    found = ws.align(a, wiring.apply(wiring.random(1), a), wiring=wiring)
    assert all(found.aligned[n].dtype == torch.bfloat16 and torch.equal(found.aligned[n], a[n]) for n in a)


def test_repr_and_figures() -> None:
    found = ws.align(drawn("attention", 0), drawn("attention", 1), wiring=wired("attention"))
    assert "weight-matching: weight cosine" in repr(found)
    assert "moved" in repr(found)
    figures = json.loads(json.dumps(found.to_dict()))
    assert figures["objective"] > figures["before"]
    for name, cost in found.costs.items():
        factor = found.wiring.factors[name]
        sizes = [found.wiring.factors[o].size for o in factor.over]
        assert cost.shape == (*sizes, factor.size, factor.size)


def test_refusals() -> None:
    wiring = wired("mlp")
    a, b = drawn("mlp", 0), drawn("mlp", 1)
    with pytest.raises(AlignmentError, match=r"shapes differ: 0.weight \(9, 4\) against \(5, 4\)"):
        ws.align(a, {**b, "0.weight": torch.zeros(5, 4)}, wiring=wiring)
    with pytest.raises(AlignmentError, match=r"only a has 4.bias"):
        ws.align(a, {n: t for n, t in b.items() if n != "4.bias"}, wiring=wiring)
    with pytest.raises(AlignmentError, match=r"'0.bias' of b holds 1 numbers"):
        ws.align(a, {**b, "0.bias": torch.full((9,), 1.0).index_fill(0, torch.tensor(2), float("nan"))}, wiring=wiring)
    with pytest.raises(AlignmentError, match=r"no alignment method .nearest"):
        ws.align(a, b, "nearest", wiring=wiring)
    with pytest.raises(AlignmentError, match="has no option 'kick'"):
        ws.align(a, b, wiring=wiring, kick=3)
    with pytest.raises(AlignmentError, match="there is no start"):
        ws.align(a, b, wiring=wiring, starts=("middle",))
    with pytest.raises(AlignmentError, match="takes no inputs"):
        ws.align(a, b, wiring=wiring, inputs=torch.randn(2, 4))
    with pytest.raises(AlignmentError, match="cannot align a list"):
        ws.align([a], b)  # type: ignore[arg-type]
    with pytest.raises(UnprovedWiringError, match="unverified=True"):
        ws.align(a, b, wiring=wiring.with_(status="unverified"))
    assert ws.align(a, b, wiring=wiring.with_(status="unverified"), unverified=True).objective > 0
    with pytest.raises(UnprovedWiringError, match="failed its proof"):
        ws.align(a, b, wiring=wiring.with_(status="failed"), unverified=True)


@pytest.mark.skipif(not OTFUSION.is_file(), reason="needs ../shared/checkpoints/otfusion-mnist")
def test_two_perceptrons_reach_the_best_of_fifty_restarts(tmp_path: Path) -> None:
    names = list(list_models(OTFUSION))
    found = ws.align(*names)
    assert found.objective >= 0.2131
    out = tmp_path / "moved.safetensors"
    result = CliRunner().invoke(app, ["align", *names, "--out", str(out), "--json"])
    assert result.exit_code == 0
    assert json.loads(result.stdout)["objective"] == pytest.approx(found.objective)
    written = ws.open(out)
    assert all(torch.equal(written[n], found.aligned[n]) for n in found.aligned)


@pytest.mark.skipif(not RESNET.is_file(), reason="needs ../shared/checkpoints/resnet-cifar")
def test_a_permuted_resnet_is_put_back() -> None:
    a = ws.open(RESNET)
    wiring = ws.wiring(a)
    b = wiring.apply(wiring.random(1), a)
    found = ws.align(a, b, wiring=wiring)
    assert all(torch.equal(found.aligned[n], a[n]) for n in a)
