"""Augmentations keep what they say they keep: the function, the ends of a mixture, the structure of the graph."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from tests.metanets.standin import mlp, run_mlp
from weightspace.errors import MetanetError
from weightspace.graph import ParameterGraph, graph
from weightspace.graph.build import of_tensors
from weightspace.metanets import augment
from weightspace.metanets.augment import Augmentation
from weightspace.wiring import wiring
from weightspace.wiring.matching import Matcher
from weightspace.wiring.wiring import Wiring

INPUTS = torch.randn(16, 6, generator=torch.Generator().manual_seed(5), dtype=torch.float64)


def _doubles(seed: int) -> dict[str, torch.Tensor]:
    return {name: w.double() for name, w in mlp([6, 9, 7, 3], seed).items()}


@pytest.fixture(scope="module")
def found() -> Wiring:
    return wiring(mlp([6, 9, 7, 3], 0))


@pytest.fixture(scope="module")
def net(found: Wiring) -> ParameterGraph:
    return of_tensors(_doubles(0), found)


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _tensors(x: ParameterGraph) -> dict[str, torch.Tensor]:
    return {name: x.tensor(name) for name in x.shapes}


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10_000))
def test_a_permuted_network_computes_the_same(net: ParameterGraph, seed: int) -> None:
    moved = augment.permute(net, _generator(seed))
    assert torch.allclose(run_mlp(_tensors(moved), INPUTS), run_mlp(_tensors(net), INPUTS), rtol=1e-12, atol=1e-12)
    assert moved.blocks is net.blocks
    assert moved.wiring is net.wiring
    assert not torch.equal(moved.tensor("hidden.1.weight"), net.tensor("hidden.1.weight"))


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10_000))
def test_a_rescaled_network_computes_the_same(net: ParameterGraph, seed: int) -> None:
    pytest.importorskip("weightspace.wiring.scaling", reason="scale symmetries are not there")
    moved = augment.rescale(net, _generator(seed))
    assert torch.allclose(run_mlp(_tensors(moved), INPUTS), run_mlp(_tensors(net), INPUTS), rtol=1e-9, atol=1e-9)
    assert not torch.allclose(moved.tensor("hidden.1.weight"), net.tensor("hidden.1.weight"))


def test_noise_is_relative_to_each_tensor(found: Wiring) -> None:
    tensors = {name: torch.randn(w.shape, generator=_generator(1)) for name, w in _doubles(0).items()}
    tensors["hidden.0.weight"] *= 100
    net = of_tensors(tensors, found)
    moved = augment.noise(net, _generator(0), 0.2)
    for name in ("hidden.0.weight", "hidden.1.weight"):
        relative = (moved.tensor(name) - net.tensor(name)).std() / net.tensor(name).std()
        assert 0.14 < float(relative) < 0.26
    assert torch.equal(net.tensor("hidden.0.weight"), tensors["hidden.0.weight"])


def test_noise_keeps_variances_positive() -> None:
    module = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3)).eval()
    module[1].running_var.uniform_(0.01, 5)
    net = graph(module, torch.randn(2, 3, 8, 8))
    net = of_tensors({n: net.tensor(n) for n in net.shapes if net.dtypes[n].is_floating_point}, net.wiring)
    for seed in range(5):
        moved = augment.noise(net, _generator(seed), 2.0).tensor("1.running_var")
        assert float(moved.min()) > 0
        assert not torch.equal(moved, module[1].running_var)


def test_masks_take_their_share_of_the_weights_alone(net: ParameterGraph) -> None:
    masked, pruned = augment.mask(net, _generator(0), 0.3), augment.prune(net, _generator(0), 0.5)
    shares = [float((masked.tensor(n) == 0).double().mean()) for n in net.shapes if n.endswith("weight")]
    assert 0.15 < sum(shares) / 3 < 0.45
    for name in net.shapes:
        w, left = net.tensor(name), pruned.tensor(name)
        if name.endswith("bias"):
            assert torch.equal(w, left)
            assert torch.equal(w, masked.tensor(name))
        else:
            assert int((left == 0).sum()) == w.numel() // 2
            assert float(w[left == 0].abs().max()) < float(left[left != 0].abs().min())


def test_ends_of_a_mixture(net: ParameterGraph, found: Wiring) -> None:
    other = of_tensors(_doubles(1), found)
    matcher = Matcher(found)
    assert all(torch.equal(augment.mix(net, other, 1.0, matcher).tensor(n), net.tensor(n)) for n in net.shapes)
    end = augment.mix(net, other, 0.0, matcher)
    assert torch.allclose(run_mlp(_tensors(end), INPUTS), run_mlp(_tensors(other), INPUTS), rtol=1e-12, atol=1e-12)
    middle = augment.mix(net, other, 0.25)
    expected = 0.25 * net.tensor("output.bias") + 0.75 * other.tensor("output.bias")
    assert torch.allclose(middle.tensor("output.bias"), expected)
    stranger = of_tensors(mlp([6, 9, 7, 3], 1), wiring(mlp([6, 9, 7, 3], 1)))
    with pytest.raises(MetanetError, match="share one wiring"):
        augment.mix(net, stranger, 0.5)


# -------------------------------------------------------------------- matching


def _mlp_module() -> tuple[nn.Module, tuple[torch.Tensor, ...]]:
    layers = nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 10), nn.ReLU(), nn.Linear(10, 3))
    return layers, (torch.randn(2, 6),)


def _grouped() -> tuple[nn.Module, tuple[torch.Tensor, ...]]:
    layers = nn.Sequential(nn.Conv2d(4, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=2), nn.ReLU(), nn.Conv2d(8, 4, 1))
    return layers, (torch.randn(1, 4, 8, 8),)


def _attention() -> tuple[nn.Module, tuple[torch.Tensor, ...]]:
    return nn.TransformerEncoderLayer(16, 4, 24, dropout=0.0, batch_first=True).eval(), (torch.randn(2, 5, 16),)


@pytest.mark.parametrize("make", [_mlp_module, _grouped, _attention])
def test_matching_undoes_a_permutation(
    make: Callable[[], tuple[nn.Module, tuple[torch.Tensor, ...]]],
) -> None:
    torch.manual_seed(0)
    module, inputs = make()
    found = wiring(module, *inputs)
    tensors = {name: value.detach() for name, value in module.state_dict().items()}
    assert found.free
    matcher = Matcher(found)
    for seed in range(3):
        moved = found.apply(found.random(seed), tensors)
        permutation, back = matcher.match(tensors, moved)
        distance = sum(float((back[n] - tensors[n]).square().sum()) for n in tensors)
        before = sum(float((moved[n] - tensors[n]).square().sum()) for n in tensors)
        assert distance < 1e-12 or distance < 0.5 * before
        again = found.apply(permutation, moved)
        assert all(torch.equal(again[n], back[n]) for n in tensors)


def test_matching_an_mlp_undoes_a_permutation_fully(net: ParameterGraph, found: Wiring) -> None:
    moved = found.apply(found.random(3), _tensors(net))
    noisy = {n: w + 0.05 * torch.randn(w.shape, generator=_generator(7)) for n, w in moved.items()}
    permutation, _ = Matcher(found).match(_tensors(net), noisy)
    back = found.apply(permutation, moved)
    assert all(torch.equal(back[n], net.tensor(n)) for n in net.shapes)


# -------------------------------------------------------------------- composition


def test_an_augmentation_is_made_again_from_its_options(net: ParameterGraph) -> None:
    made = Augmentation(permute=0.5, noise=0.2, mask=0.1, prune=0.1, mixup=0.4)
    again = Augmentation.from_dict(made.to_dict())
    assert again == made
    first, second = made(net, _generator(3)), again(net, _generator(3))
    assert all(torch.equal(first.tensor(n), second.tensor(n)) for n in net.shapes)
    with pytest.raises(MetanetError, match="no option 'blur'"):
        Augmentation.from_dict({"blur": 1})
    with pytest.raises(MetanetError, match=r"mask is 1\.5"):
        Augmentation(mask=1.5)


def test_probabilities(net: ParameterGraph) -> None:
    generator = _generator(0)
    sometimes = Augmentation(noise=0.1, probability=0.5)
    changed = [not torch.equal(sometimes(net, generator).tensor("output.weight"), net.tensor("output.weight"))
               for _ in range(100)]  # fmt: skip
    assert 30 < sum(changed) < 70
    assert Augmentation()(net, generator) is net
    assert not Augmentation().changes
    assert not Augmentation(noise=0.1, probability=0.0).changes


def test_mixing_a_batch_pairs_networks_of_one_wiring(net: ParameterGraph, found: Wiring) -> None:
    lone = of_tensors(mlp([6, 4, 3], 0), wiring(mlp([6, 4, 3], 0)))
    batch = [net, of_tensors(_doubles(1), found), lone, of_tensors(_doubles(2), found)]
    mixed, partners, shares = Augmentation(mixup=1.0).mixed(batch, _generator(1))
    assert partners[2] == 2
    assert mixed[2] is lone
    assert all(batch[i].wiring is batch[p].wiring for i, p in enumerate(partners))
    assert all(0.5 <= share <= 1 for share in shares)
    for number, partner in enumerate(partners):
        bias = batch[number].tensor("output.bias").double(), batch[partner].tensor("output.bias").double()
        expected = shares[number] * bias[0] + (1 - shares[number]) * bias[1]
        assert torch.allclose(mixed[number].tensor("output.bias").double(), expected, atol=1e-6)
