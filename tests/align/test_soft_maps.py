"""Methods that go through soft maps: straight-through, Sinkhorn, optimal transport, also between widths."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import weightspace as ws
from tests.align.small import DESCRIPTIONS, network, noisy, undoes
from weightspace.align.maps import Map, carry
from weightspace.align.optimal_transport import optimal_transport
from weightspace.align.sinkhorn import balanced, sinkhorn
from weightspace.align.straight_through import straight_through
from weightspace.errors import AlignmentError
from weightspace.wiring.wiring import Wiring

pytest.importorskip("ot", reason="needs POT (pip install weightspace[ot])")


@pytest.mark.parametrize("name", DESCRIPTIONS)
def test_hard_maps_are_the_group_action(name: str) -> None:
    wiring, tensors, _ = network(name)
    perm = wiring.random(5)
    maps = {n: Map(m, m) for n, m in ((n, torch.eye(p.shape[-1])[p]) for n, p in perm.index.items())}
    moved, mapped = wiring.apply(perm, tensors), carry(tensors, wiring, maps)
    assert all(torch.allclose(moved[n], mapped[n]) for n in tensors)


def test_balanced_matrices_are_doubly_stochastic() -> None:
    soft = balanced(torch.randn(3, 6, 6), 50)
    assert torch.allclose(soft.sum(-1), torch.ones(3, 6), atol=1e-3)
    assert torch.allclose(soft.sum(-2), torch.ones(3, 6), atol=1e-5)


@pytest.mark.parametrize("name", ["mlp", "vgg"])
def test_sinkhorn_recovers_a_planted_permutation(name: str) -> None:
    wiring, tensors, _ = network(name)
    planted = wiring.random(1)
    found = sinkhorn(tensors, wiring.apply(planted, noisy(tensors, 0)), wiring)
    assert undoes(found.permutations, planted)


def test_sinkhorn_half_way() -> None:
    wiring, tensors, x = network("mlp")
    planted = wiring.random(1)
    moved = wiring.apply(planted, tensors)
    found = sinkhorn(tensors, moved, wiring, inputs=x, cost="middle", steps=150)
    out = wiring.program.run
    half = lambda t: {n: (tensors[n] + t[n]) / 2 for n in tensors}  # noqa: E731
    gap = lambda t: float((out(half(t), x) - out(tensors, x)).square().mean())  # noqa: E731
    assert gap(wiring.apply(found.permutations, moved)) < 0.5 * gap(moved)
    with pytest.raises(AlignmentError, match="pass inputs="):
        sinkhorn(tensors, moved, wiring, cost="middle")


@pytest.mark.parametrize("name", ["mlp", "cnn"])
def test_straight_through_recovers_a_planted_permutation(name: str) -> None:
    wiring, tensors, x = network(name)
    planted = wiring.random(1)
    found = straight_through(tensors, wiring.apply(planted, noisy(tensors, 0)), wiring, inputs=x, steps=5)
    assert undoes(found.permutations, planted)


def test_straight_through_takes_a_loss() -> None:
    wiring, tensors, x = network("mlp")
    y = torch.randint(4, (64,))
    _, other, _ = network("mlp", 1)
    found = straight_through(
        tensors, other, wiring, inputs=(x,), steps=10, batch=64,
        loss=lambda out, args: nn.functional.cross_entropy(out, y),
    )  # fmt: skip
    start = straight_through(tensors, other, wiring, inputs=(x,), steps=1, batch=64)
    half = [{n: (tensors[n] + t[n]) / 2 for n in tensors}
            for t in (wiring.apply(f.permutations, other) for f in (found, start))]  # fmt: skip
    losses = [float(nn.functional.cross_entropy(wiring.program.run(t, x), y)) for t in half]
    assert losses[0] <= losses[1] + 1e-6


# -------------------------------------------------------------------- optimal transport


@pytest.mark.parametrize("name", ["mlp", "cnn", "vgg"])
@pytest.mark.parametrize("ground", ["weights", "activations"])
def test_an_exact_plan_between_equal_widths_is_a_permutation(name: str, ground: Any) -> None:
    wiring, tensors, x = network(name)
    planted = wiring.random(2)
    moved = wiring.apply(planted, noisy(tensors, 0, 0.01))
    found = optimal_transport(tensors, moved, wiring, inputs=x, ground=ground)
    assert undoes(found.permutations, planted)
    assert found.aligned is None
    for plan in found.maps.values():
        assert torch.allclose(plan.sum(-1), torch.full(plan.shape[:-1], 1 / plan.shape[-1], dtype=torch.float64))


def test_regularised_plans_are_soft() -> None:
    wiring, tensors, _ = network("mlp")
    found = optimal_transport(tensors, wiring.apply(wiring.random(0), tensors), wiring, regularisation=0.1)
    assert found.aligned is not None
    assert all(int((m > 1e-6).sum()) > m.shape[-1] for m in found.maps.values())


class Net(nn.Module):
    """A small network of given widths: convolutions with batch norm, then linear layers."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.one, self.norm = nn.Conv2d(2, width, 3, padding=1), nn.BatchNorm2d(width)
        self.two = nn.Conv2d(width, 5, 3, padding=1)
        self.three, self.out = nn.Linear(5 * 16, hidden), nn.Linear(hidden, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.two(self.norm(self.one(x)).relu()).relu()
        out: Tensor = self.out(self.three(x.flatten(1)).relu())
        return out


def wired(module: nn.Module) -> tuple[Wiring, dict[str, Tensor]]:
    wiring = ws.wiring(module.eval(), torch.randn(2, 2, 4, 4))
    assert wiring.program is not None
    return wiring, {n: t.clone() for n, t in wiring.program.tensors.items()}


def duplicated(tensors: dict[str, Tensor], wiring: Wiring, seed: int) -> dict[str, Tensor]:
    """Every neuron of the first layer and the hidden one twice, weights that read it halved, in a random order."""
    generator = torch.Generator().manual_seed(seed)
    maps = {}
    for name in wiring.free:
        n = wiring.free[name].size
        if n == 5:
            continue
        rows = torch.eye(n).repeat(2, 1)[torch.randperm(2 * n, generator=generator)]
        maps[name] = Map(rows, rows / 2)
    return carry(tensors, wiring, maps)


def test_a_copy_with_duplicated_neurons_is_carried_back() -> None:
    torch.manual_seed(0)
    narrow, wide = Net(4, 6), Net(8, 12)
    of_narrow, a = wired(narrow)
    of_wide, _ = wired(wide)
    x = torch.randn(5, 2, 4, 4)
    b = duplicated(a, of_narrow, 0)
    before = of_narrow.program.run(a, x)
    assert torch.allclose(of_wide.program.run(b, x), before, atol=1e-5)
    for inputs in (None, x):
        found = optimal_transport(a, b, of_wide, wiring_a=of_narrow, inputs=inputs)
        for n, t in found.aligned.items():
            assert torch.allclose(t, a[n], atol=1e-5), n


def test_narrow_networks_keep_their_function_at_twice_the_width() -> None:
    torch.manual_seed(0)
    of_narrow, b = wired(Net(4, 6))
    of_wide, a = wired(Net(8, 12))
    x = torch.randn(5, 2, 4, 4)
    found = optimal_transport(a, b, of_narrow, wiring_a=of_wide)
    assert {n: t.shape for n, t in found.aligned.items()} == {n: t.shape for n, t in a.items()}
    assert torch.allclose(of_wide.program.run(found.aligned, x), of_narrow.program.run(b, x), atol=1e-5)


def test_networks_that_differ_in_more_than_widths_are_declined() -> None:
    of_a, a = wired(Net(4, 6))
    wiring, b, _ = network("mlp")
    with pytest.raises(AlignmentError, match="not one architecture"):
        optimal_transport(a, b, wiring, wiring_a=of_a)


def test_widths_that_meet_without_a_weight_are_declined() -> None:
    description = DESCRIPTIONS["vit"]
    from weightspace.zoo.description import module_of

    wirings = [ws.wiring(m.eval(), *args) for m, args in (module_of({**description, "dim": d}) for d in (12, 24))]
    a, b = (dict(w.program.tensors) for w in wirings)
    with pytest.raises(AlignmentError, match="queries meet keys"):
        optimal_transport(a, b, wirings[1], wiring_a=wirings[0])
