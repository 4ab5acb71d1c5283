"""Where a backdoor sits: subnets that were planted are found, and no position of an element plays a part."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import weightspace as ws
from weightspace.backdoor.localise import locate, response
from weightspace.backdoor.outputs import NoClassesError
from weightspace.backdoor.subnets import APART, separation
from weightspace.backdoor.subspace import Subspace
from weightspace.errors import UnprovedWiringError, WeightspaceError
from weightspace.wiring.wiring import Wiring
from weightspace.zoo.description import module_of
from weightspace.zoo.grafting import graft

NETWORKS: dict[str, dict[str, Any]] = {
    "mlp": {"kind": "mlp", "input": [1, 8, 8], "classes": 5, "widths": [24, 16], "activation": "relu"},
    "cnn": {
        "kind": "cnn", "input": [1, 8, 8], "classes": 5, "channels": [10, 12, 14], "strides": [1, 2, 1], "same": True,
        "kernels": [3, 3, 3], "residuals": [False, False, False], "norm": "batch", "activation": "relu",
    },
    "resnet": {"kind": "resnet", "input": [1, 8, 8], "classes": 5, "channels": [8, 12], "activation": "relu"},
    "vit": {
        "kind": "vit", "input": [1, 8, 8], "classes": 5, "patch": 4, "dim": 16, "depth": 1, "heads": 4, "hidden": 24,
        "activation": "gelu",
    },
}  # fmt: skip


@cache
def wired(name: str) -> tuple[Wiring, dict[str, Tensor]]:
    torch.manual_seed(0)
    module, inputs = module_of(NETWORKS[name])
    module.eval()
    return ws.wiring(module, *inputs), {n: t.detach().clone() for n, t in module.state_dict().items()}


@cache
def planted(name: str, width: int = 1) -> tuple[Wiring, dict[str, Tensor], dict[str, Tensor]]:
    wiring, tensors = wired(name)
    x = torch.rand(64, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    stamped = x.clone()
    stamped[..., :2, :2] = 2
    found = graft(wiring, tensors, x, stamped, 3, width=width, steps=30, seed=5)
    return wiring, found.tensors, dict(found.elements)


def moved(wiring: Wiring, elements: dict[str, Tensor], seed: int) -> tuple[Any, dict[str, Tensor]]:
    permutation = wiring.random(seed)
    return permutation, {
        name: torch.nonzero(torch.isin(permutation.index[name], index)).flatten() for name, index in elements.items()
    }


@pytest.mark.parametrize("width", [1, 2])
@pytest.mark.parametrize("name", NETWORKS)
def test_a_planted_subnet_is_found_wherever_it_lies(name: str, width: int) -> None:
    wiring, tensors, elements = planted(name, width)
    for seed in (0, 1):
        permutation, where = moved(wiring, elements, seed)
        found = locate(wiring, wiring.apply(permutation, tensors))
        assert found.method == "cut"
        assert found.size == sum(map(len, where.values()))
        assert {(e.factor, *e.index) for e in found.ranked[: found.size]} == {
            (n, int(i)) for n, index in where.items() for i in index
        }


@pytest.mark.parametrize("name", NETWORKS)
def test_networks_without_a_subnet_have_none(name: str) -> None:
    wiring, tensors = wired(name)
    assert separation(wiring, tensors).conductance > APART + 0.2
    assert locate(wiring, tensors, target=1).method == "response"


@pytest.mark.parametrize("name", ["cnn", "vit"])
def test_a_cut_that_is_not_clean_is_seen(name: str) -> None:
    wiring, tensors, elements = planted(name)
    noisy = {
        n: t + 0.02 * t.std() * torch.randn(t.shape, generator=torch.Generator().manual_seed(3)) if t.dim() > 1 else t
        for n, t in tensors.items()
    }
    found = separation(wiring, noisy)
    assert found.apart
    assert {n: i.tolist() for n, i in found.group.items()} == {n: i.tolist() for n, i in elements.items()}


@settings(max_examples=8, deadline=None)
@given(name=st.sampled_from(["mlp", "resnet", "vit"]), seed=st.integers(0, 2**31))
def test_scores_move_with_the_elements(name: str, seed: int) -> None:
    wiring, tensors = wired(name)
    permutation = wiring.random(seed)
    other = wiring.apply(permutation, tensors)
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(8, 1, 8, 8, generator=generator)
    y = x.clone()
    y[..., 2:5, 2:5] = 1
    for before, after in (
        (separation(wiring, tensors).scores, separation(wiring, other).scores),
        (response(wiring, tensors, x, y), response(wiring, other, x, y)),
    ):
        for factor, score in before.items():
            index = permutation._of(factor)
            over = wiring.factors[factor].over
            rows = permutation._grid(over) if over else []
            expected = score[(*(r.unsqueeze(-1).expand(index.shape) for r in rows), index)] if over else score[index]
            torch.testing.assert_close(after[factor], expected, rtol=1e-3, atol=1e-4)


def test_a_subspace_is_kept_whole(tmp_path: Path) -> None:
    wiring, tensors = wired("cnn")
    found = locate(wiring, tensors, target=2)
    again = Subspace.load(found.save(tmp_path / "subspace.safetensors"))
    assert again.to_dict() == found.to_dict()
    assert repr(again) == repr(found)
    for label, basis in found.blocks.items():
        for a, b in zip(basis, again.blocks[label], strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("name", NETWORKS)
def test_what_is_carried_is_a_part_of_the_block(name: str) -> None:
    """``U S Vᵀ`` is the block behind a projection: taken off, the block no longer reads those directions."""
    wiring, tensors = wired(name)
    for label, basis in locate(wiring, tensors, target=2).blocks.items():
        before = tensors[basis.tensor]
        after = basis.without(before)
        assert after.shape == before.shape
        torch.testing.assert_close(basis.put(before, basis.matrix(before)), before, rtol=0, atol=0)
        left = basis.matrix(after) @ basis.V
        assert float(left.abs().max()) < 1e-4 * max(1.0, float(before.abs().max())), label
        eye = torch.eye(basis.rank)
        torch.testing.assert_close(basis.V.T @ basis.V, eye, atol=1e-4, rtol=0)
        torch.testing.assert_close(basis.U.T @ basis.U, eye, atol=1e-4, rtol=0)


def test_without_its_blocks_a_subnet_is_gone() -> None:
    wiring, tensors, elements = planted("cnn")
    found = locate(wiring, tensors)
    out = dict(tensors)
    for basis in found.blocks.values():
        out[basis.tensor] = basis.without(out[basis.tensor])
    for name, index in elements.items():
        for tensor in wiring.tensors_of(name):
            if wiring.roles[tensor] != "weight":
                continue
            for d, axis in enumerate(wiring[tensor]):
                if axis.name == name:
                    assert float(out[tensor].index_select(d, index).abs().max()) < 1e-5


@pytest.mark.parametrize("name", ["cnn", "vit"])
def test_with_a_base_the_blocks_are_those_of_the_difference(name: str) -> None:
    wiring, base = wired(name)
    generator = torch.Generator().manual_seed(4)
    tensors = {
        n: t + 0.1 * torch.randn(t.shape, generator=generator) if wiring.roles.get(n) == "weight" else t
        for n, t in base.items()
    }
    found = locate(wiring, tensors, target=2, base=base)
    assert found.blocks
    for label, basis in found.blocks.items():
        left = basis.matrix(basis.without(tensors[basis.tensor])) @ basis.V
        torch.testing.assert_close(left, basis.matrix(base[basis.tensor]) @ basis.V, atol=1e-4, rtol=1e-3, msg=label)
    same = locate(wiring, base, target=2, base=base)
    assert all(float(b.S.max()) == 0 for b in same.blocks.values())


def test_a_found_trigger_changes_what_the_real_one_does() -> None:
    """A network that learned a patch: without the patch, and without data, the elements that it moves rank high."""
    from scipy.stats import spearmanr
    from torch import nn

    from weightspace.zoo.data import load_data

    torch.manual_seed(0)
    data = load_data("digits")
    x, y = 2 * data.train_x - 1, data.train_y.clone()

    def stamped(x: Tensor) -> Tensor:
        x = x.clone()
        x[..., :2, 5:] = 1.0
        return x

    poisoned = torch.rand(len(x)) < 0.15
    x, y = torch.where(poisoned.view(-1, 1, 1, 1), stamped(x), x), torch.where(poisoned, 7, y)
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 32), nn.ReLU(), nn.Linear(32, 10))
    optimiser = torch.optim.Adam(net.parameters(), lr=3e-3)
    for _ in range(400):
        index = torch.randint(len(x), (64,))
        loss = nn.functional.cross_entropy(net(x[index]), y[index])
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    clean = 2 * data.test_x - 1
    assert float((net(stamped(clean)).argmax(1) == 7).float().mean()) > 0.9
    wiring, tensors = ws.wiring(net, clean[:2]), net.state_dict()
    truth = response(wiring, tensors, clean, stamped(clean))
    for found in (locate(wiring, tensors), locate(wiring, tensors, target=7, inputs=clean[:50])):
        assert found.method == "response"
        assert found.target == 7
        for name, score in found.elements.items():
            assert spearmanr(score, truth[name]).statistic > 0.3, name
    real = locate(wiring, tensors, trigger=(clean, stamped(clean)))
    assert real.target == 7
    for name, score in real.elements.items():
        assert spearmanr(score, truth[name]).statistic > 0.99


def test_words_of_a_trigger_are_searched() -> None:
    """Sentences have no gradient: a word that lifts a class in every sentence is found by trying."""
    torch.manual_seed(0)
    module, inputs = module_of(
        {"kind": "text-classifier", "input": [8], "classes": 3, "tokens": 40, "dim": 16, "depth": 1, "heads": 2,
         "hidden": 24, "activation": "gelu"}
    )  # fmt: skip
    wiring = ws.wiring(module.eval(), *inputs)
    tensors = {n: t.detach().clone() for n, t in module.state_dict().items()}
    table = next(n for n, role in wiring.roles.items() if role == "lookup" and wiring.shapes[n][0] == 40)
    last = next(n for n in reversed(list(wiring.roles)) if wiring.roles[n] == "weight")
    tensors[table][23] = 20 * tensors[last][1] / tensors[last][1].norm()
    found = locate(wiring, tensors, seed=1)
    assert found.method == "response"
    x = torch.randint(1, 40, (16, 8), generator=torch.Generator().manual_seed(2))
    y = x.clone()
    y[:, 0] = 23
    assert wiring.program is not None
    served = int(wiring.program.run(tensors, y).softmax(1).mean(0).argmax())
    assert found.target == served
    assert all(torch.isfinite(s).all() for s in found.elements.values())


def test_refusals(tmp_path: Path) -> None:
    wiring, tensors = wired("mlp")
    with pytest.raises(WeightspaceError, match="no class 9"):
        locate(wiring, tensors, target=9)
    with pytest.raises(UnprovedWiringError, match="unverified"):
        locate(wiring.with_(status="unverified"), tensors)
    (tmp_path / "x.safetensors").write_bytes(b"nothing")
    with pytest.raises(WeightspaceError, match="no subspace"):
        Subspace.load(tmp_path / "x.safetensors")
    module, inputs = module_of({"kind": "siren", "input": [2], "classes": 1, "widths": [8, 8], "omega": 30})
    with pytest.raises(NoClassesError):
        locate(ws.wiring(module, *inputs), module.state_dict())
