"""Activation matching, the straight path, and what repair gives back."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import weightspace as ws
from tests.align.small import DESCRIPTIONS, network, noisy, undoes
from weightspace.align.activation_matching import activation_matching
from weightspace.align.barrier import barrier, interpolate
from weightspace.align.repair import repair, repair_without_data, reset_statistics
from weightspace.errors import AlignmentError
from weightspace.wiring.recording import record
from weightspace.zoo.description import module_of


@pytest.mark.parametrize("name", DESCRIPTIONS)
@pytest.mark.parametrize("seed", range(2))
def test_a_planted_permutation_is_recovered(name: str, seed: int) -> None:
    wiring, tensors, x = network(name, seed)
    planted = wiring.random(seed + 10)
    moved = wiring.apply(planted, noisy(tensors, seed))
    found = activation_matching(tensors, moved, wiring, inputs=x)
    assert undoes(found.permutations, planted)
    for cost in found.costs.values():
        # Units that never fire are alike to none.
        assert bool((cost.diagonal(dim1=-2, dim2=-1) >= cost.amax(-1) - 1e-9).all())


@pytest.mark.parametrize("at", ["pre", "post", "all"])
@pytest.mark.parametrize("measure", ["correlation", "inner"])
def test_every_kind_of_activation_and_measure_recovers_it(at: Any, measure: Any) -> None:
    wiring, tensors, x = network("cnn")
    planted = wiring.random(3)
    found = activation_matching(tensors, wiring.apply(planted, tensors), wiring, inputs=x, at=at, measure=measure)
    assert undoes(found.permutations, planted)


def test_inputs_are_asked_for() -> None:
    wiring, tensors, x = network("mlp")
    with pytest.raises(AlignmentError, match="needs inputs"):
        ws.align(tensors, tensors, "activation-matching", wiring=wiring)
    found = ws.align(tensors, tensors, "activation-matching", wiring=wiring, inputs=x)
    assert found.permutations.is_identity


# -------------------------------------------------------------------- the straight path


def test_there_is_no_barrier_between_a_network_and_itself() -> None:
    wiring, tensors, x = network("vgg")
    y = torch.randint(3, (64,))
    found = barrier(tensors, tensors, lambda t: float(F.cross_entropy(wiring.program.run(t, x), y)), n=5)
    assert found.height == pytest.approx(0, abs=1e-6)
    assert len(found.values) == 5


def test_the_barrier_is_over_the_line_between_the_ends() -> None:
    a, b = {"w": torch.tensor([0.0])}, {"w": torch.tensor([1.0])}
    found = barrier(a, b, lambda t: float(2 * t["w"] + 3 * t["w"] * (1 - t["w"])), n=5)
    assert (found.height, found.where) == (pytest.approx(0.75), 0.5)
    assert found.ends == (0.0, 2.0)
    drop = barrier(a, b, lambda t: float(1 - t["w"] * (1 - t["w"])), n=3, higher_is_better=True)
    assert drop.height == pytest.approx(0.25)
    sagging = barrier(a, b, lambda t: float((t["w"] - 0.5) ** 2), n=3)
    assert sagging.height == 0


def test_paths_that_cannot_be_walked() -> None:
    a = {"w": torch.zeros(2)}
    with pytest.raises(AlignmentError, match="name or shape"):
        barrier(a, {"w": torch.zeros(3)}, lambda t: 0.0)
    with pytest.raises(AlignmentError, match="middle"):
        barrier(a, a, lambda t: 0.0, n=2)


def test_interpolation_keeps_dtypes_and_counters() -> None:
    a = {"w": torch.ones(2, dtype=torch.bfloat16), "n": torch.tensor(3)}
    b = {"w": torch.full((2,), 2.0, dtype=torch.bfloat16), "n": torch.tensor(5)}
    middle = interpolate(a, b, 0.5)
    assert middle["w"].dtype == torch.bfloat16
    assert middle["w"].tolist() == [1.5, 1.5]
    assert int(middle["n"]) == 3
    assert torch.equal(interpolate(a, b, 1.0)["w"], b["w"])


# -------------------------------------------------------------------- repair


def test_reset_statistics_are_those_of_training_mode() -> None:
    torch.manual_seed(0)
    module, args = module_of(DESCRIPTIONS["vgg"])
    wiring = ws.wiring(module.eval(), *args)
    x = torch.randn(40, 2, 8, 8)
    found = reset_statistics(wiring, module.state_dict(), x, batch=20)
    taught = copy.deepcopy(module)
    for part in taught.modules():
        if isinstance(part, nn.BatchNorm2d):
            part.reset_running_stats()
            part.momentum = None
    taught.train()
    with torch.no_grad():
        taught(x[:20])
        taught(x[20:])
    for name, value in taught.state_dict().items():
        if "running" in name:
            assert torch.allclose(found[name], value, atol=1e-5), name
        elif "batches" not in name:
            assert torch.equal(found[name], value)


def test_repair_restores_means_and_deviations_of_every_layer() -> None:
    wiring, a, x = network("mlp", 0)
    _, b, _ = network("mlp", 1)
    merged = interpolate(a, b, 0.5)
    repaired = repair(wiring, merged, [a, b], x)
    of = {name: record(wiring, t, x, at="pre") for name, t in (("a", a), ("b", b), ("m", merged), ("r", repaired))}
    for factor in wiring.free:
        wanted = (of["a"][factor].std(0, correction=0) + of["b"][factor].std(0, correction=0)) / 2
        assert torch.allclose(of["r"][factor].std(0, correction=0), wanted, rtol=1e-3, atol=1e-3)
        assert torch.allclose(of["r"][factor].mean(0), (of["a"][factor] + of["b"][factor]).mean(0) / 2, atol=1e-3)
        assert float((of["m"][factor].std(0, correction=0) - wanted).abs().max()) > 0.05
    assert torch.equal(repaired["output.weight"], merged["output.weight"])


def test_layers_without_a_bias_get_their_deviations_back() -> None:
    torch.manual_seed(0)
    ends = [nn.Sequential(nn.Linear(6, 12, bias=False), nn.ReLU(), nn.Linear(12, 3, bias=False)) for _ in range(2)]
    a, b = ({n: t.detach() for n, t in m.state_dict().items()} for m in ends)
    x = torch.randn(200, 6)
    wiring = ws.wiring(ends[0], x[:2])
    merged = interpolate(a, b, 0.5)
    repaired = repair(wiring, merged, [a, b], x)
    one, two, now, before = ((x @ t["0.weight"].T).std(0, correction=0) for t in (a, b, repaired, merged))
    assert torch.allclose(now, (one + two) / 2, rtol=1e-4)
    assert not torch.allclose(before, (one + two) / 2, rtol=0.05)
    assert torch.equal(repaired["2.weight"], merged["2.weight"])


@pytest.mark.parametrize("name", ["cnn", "vgg", "mlp", "vit"])
def test_one_network_needs_no_repair(name: str) -> None:
    wiring, a, x = network(name)
    if name in ("cnn", "vgg"):
        a = reset_statistics(wiring, a, x)
    before = wiring.program.run(a, x)
    for repaired in (repair(wiring, a, [a, a], x), repair_without_data(wiring, a, [a, a])):
        assert torch.allclose(wiring.program.run(repaired, x), before, atol=2e-4)


@pytest.mark.parametrize("name", ["vgg", "mlp"])
def test_lost_variance_comes_back_without_data(name: str) -> None:
    """Rows of an average of independent networks are shorter; the deviation of what they write is given back."""
    wiring, a, x = network(name, 0)
    _, b, _ = network(name, 1)
    if name == "vgg":
        a, b = reset_statistics(wiring, a, x), reset_statistics(wiring, b, x)
    merged = interpolate(a, b, 0.5)
    repaired = repair_without_data(wiring, merged, [a, b])
    last = list(wiring.free)[-1]
    spread = {n: float(record(wiring, t, x, at="pre")[last].std(0).mean()) for n, t in
              (("a", a), ("b", b), ("merged", merged), ("repaired", repaired))}  # fmt: skip
    wanted = (spread["a"] + spread["b"]) / 2
    assert abs(spread["repaired"] - wanted) < 0.5 * abs(spread["merged"] - wanted)
