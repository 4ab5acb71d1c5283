"""Methods that run the network, or work on whole weights: against closed forms, naive references and properties."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

import weightspace as ws
from weightspace.errors import MergeError, UnprovedWiringError
from weightspace.merge import MergeData
from weightspace.merge.data import Network, entries, foreign
from weightspace.merge.method import Models
from weightspace.merge.methods.adamerging import entropy
from weightspace.merge.methods.fisher import information
from weightspace.merge.methods.knots import adapted, basis
from weightspace.merge.methods.twin import experts, with_experts
from weightspace.merge.methods.wudi import as_matrices, from_matrix
from weightspace.zoo.description import module_of
from weightspace.zoo.files import save_network

State = dict[str, Tensor]


def near(a: Tensor, b: Tensor, tolerance: float = 1e-5) -> bool:
    return torch.allclose(a, b, rtol=tolerance, atol=tolerance)


def drawn(module: nn.Module, count: int, size: float = 0.3) -> tuple[State, list[State]]:
    """A base, and models around it."""
    base = {n: t.clone() for n, t in module.state_dict().items()}
    return base, [{n: t + size * torch.randn_like(t) for n, t in base.items()} for _ in range(count)]


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="module")
def perceptron() -> tuple[nn.Module, Any]:
    torch.manual_seed(1)
    module = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 6))
    return module, ws.wiring(module, torch.randn(2, 5))


def models_of(wiring: Any, states: list[State], data: Any, base: State | None = None) -> Models:
    return Models(base, tuple(states), tuple(states[0]), (1.0,) * len(states), data=data, wiring=wiring)


# ------------------------------------------------------------------------------------ data


def test_data_cut_and_counted() -> None:
    x, y = torch.randn(6, 3), torch.tensor([20, 21, 29, 20, 22, 23])
    data = MergeData((x, torch.randn(4)), y, slice(20, 30))
    assert len(data) == 6
    assert [len(b) for b in data.batches(4)] == [4, 2]
    assert data.take(slice(1, 3)).args[1].shape == (4,)
    assert data.labels(160).tolist() == [0, 1, 9, 0, 2, 3]
    assert MergeData(x, y, [29, 20, 21, 22, 23]).labels(160).tolist() == [1, 2, 0, 1, 3, 4]
    assert data.own(torch.arange(160.0)).tolist() == list(range(20, 30))
    with pytest.raises(MergeError, match="label 29 is none"):
        MergeData(x, y, slice(20, 25)).labels(160)
    with pytest.raises(MergeError, match="6 inputs and 2 labels"):
        MergeData(x, y[:2])
    with pytest.raises(MergeError, match="without examples"):
        MergeData(())


def test_data_of_every_model(perceptron: tuple[nn.Module, Any]) -> None:
    module, wiring = perceptron
    states = [dict(module.state_dict())] * 2
    x, y = torch.randn(6, 5), torch.zeros(6, dtype=torch.long)
    for data in (x, (x, y), [x, (x, y)], [MergeData(x), {"input": x}]):
        assert [len(d) for d in entries(models_of(wiring, states, data))] == [6, 6]
    assert entries(models_of(wiring, states, (x, y)))[1].y is not None
    assert entries(models_of(wiring, states, (x, torch.randn(6, 5))))[1].y is None
    with pytest.raises(MergeError, match="3 entries for 2 models"):
        entries(models_of(wiring, states, [x, x, x]))
    with pytest.raises(MergeError, match="holds a str"):
        entries(models_of(wiring, states, "images"))


@pytest.mark.parametrize("method", ["fisher", "regmean", "adamerging", "concrete", "dam"])
def test_what_runs_the_network_needs_data_and_a_proof(method: str, perceptron: tuple[nn.Module, Any]) -> None:
    module, wiring = perceptron
    base, states = drawn(module, 2)
    with pytest.raises(MergeError, match="data="):
        ws.merge(states, method, base=base, wiring=wiring)
    x = torch.randn(4, 5)
    with pytest.raises(UnprovedWiringError, match="not proved"):
        ws.merge(states, method, base=base, wiring=wiring.with_(status="unverified"), data=x)
    with pytest.raises(UnprovedWiringError, match="no program"):
        ws.merge(states, method, base=base, wiring=wiring.with_(program=None), data=x)


def test_rows_of_other_tasks_are_foreign(perceptron: tuple[nn.Module, Any]) -> None:
    module, wiring = perceptron
    network = Network(models_of(wiring, [dict(module.state_dict())], None))
    found = foreign(network, network.tensors(module.state_dict()), MergeData(torch.randn(9, 5), outputs=slice(2, 4)))
    assert found["2.bias"].tolist() == [True, True, False, False, True, True]
    assert found["2.weight"].all(1).tolist() == found["2.bias"].tolist()
    assert not found["0.weight"].any()
    # An input that happens to be zero on all examples says nothing of the rows.
    dead = {**module.state_dict(), "0.weight": torch.eye(8, 5) * 0, "0.bias": torch.tensor([0.0] * 7 + [1.0])}
    found = foreign(network, network.tensors(dead), MergeData(torch.randn(9, 5), outputs=slice(2, 4)))
    assert found["2.weight"].all(1).tolist() == [True, True, False, False, True, True]
    assert found["2.weight"].any(1).tolist() == [True, True, False, False, True, True]


# ------------------------------------------------------------------------------------ Fisher


def test_fisher_of_linear_regression_in_closed_form() -> None:
    module = nn.Linear(4, 1)
    wiring = ws.wiring(module, torch.randn(2, 4))
    _, states = drawn(module, 2)
    xs = [torch.randn(30, 4) * torch.tensor([1.0, 2.0, 0.1, 3.0]), torch.randn(50, 4)]
    how = {"labels": "expected", "likelihood": "gaussian", "normalize": False}
    merged = ws.merge(states, "fisher", wiring=wiring, data=xs, **how)
    # y = w x + noise of variance 1: the information is E x² for the weights, 1 for the bias.
    f = [x.square().mean(0, keepdim=True) for x in xs]
    wanted = (f[0] * states[0]["weight"] + f[1] * states[1]["weight"]) / (f[0] + f[1])
    assert merged.tensors is not None
    assert near(merged.tensors["weight"], wanted)
    assert near(merged.tensors["bias"], (states[0]["bias"] + states[1]["bias"]) / 2)


@pytest.mark.parametrize("labels", ["expected", "given"])
def test_fisher_against_one_gradient_after_the_other(labels: Any) -> None:
    module = nn.Sequential(nn.Conv2d(1, 3, 3), nn.ReLU(), nn.Flatten(), nn.Linear(12, 6))
    x, y = torch.randn(7, 1, 4, 4), torch.randint(2, 5, (7,))
    wiring = ws.wiring(module, x[:2])
    network = Network(models_of(wiring, [dict(module.state_dict())], None))
    data = MergeData(x, y, slice(2, 5))
    found = information(network, network.tensors(module.state_dict()), data, network.names, labels)
    wanted = {n: torch.zeros_like(p) for n, p in module.named_parameters()}
    for i in range(7):
        logs = module(x[i : i + 1])[0, 2:5].log_softmax(-1)
        for c in range(3) if labels == "expected" else [int(y[i]) - 2]:
            share = float(logs[c].detach().exp()) if labels == "expected" else 1.0
            for (n, _), g in zip(
                module.named_parameters(),
                torch.autograd.grad(logs[c], list(module.parameters()), retain_graph=True), strict=True,
            ):  # fmt: skip
                wanted[n] += share * g.square() / 7
    assert all(near(found[n], wanted[n]) for n in wanted)
    assert not found["3.bias"][[0, 1, 5]].any()


def test_sampled_labels_estimate_the_expectation(perceptron: tuple[nn.Module, Any]) -> None:
    module, wiring = perceptron
    network = Network(models_of(wiring, [dict(module.state_dict())], None))
    data = MergeData(torch.randn(1, 5).expand(4000, 5))
    tensors = network.tensors(module.state_dict())
    exact = information(network, tensors, data.take(slice(0, 1)), network.names, "expected")
    generator = torch.Generator().manual_seed(0)
    found = information(network, tensors, data, network.names, "sampled", generator=generator)
    assert torch.cat([(found[n] - exact[n]).flatten() for n in exact]).norm() < 0.1 * torch.cat(
        [exact[n].flatten() for n in exact]
    ).norm()


def test_fisher_of_what_cannot_be_batched_over() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.line = nn.Linear(3, 4)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.line(x)
            # A decision that depends on the values: no batched gradient can take it.
            return out if bool((x.sum() > -1e9).item()) else -out

    module = Odd()
    x = torch.randn(5, 3)
    wiring = ws.wiring(module, x[:2])
    network = Network(models_of(wiring, [dict(module.state_dict())], None))
    found = information(network, network.tensors(module.state_dict()), MergeData(x), network.names, "expected")
    p = module(x).softmax(-1)
    assert near(found["line.bias"], (p * (1 - p)).mean(0))


def test_fisher_of_a_text_network_with_inputs_by_name() -> None:
    sizes = {"input": [6], "classes": 9, "dim": 8, "depth": 1, "heads": 2, "hidden": 8}
    module, args = module_of({"kind": "gpt", **sizes, "activation": "gelu"})
    wiring = ws.wiring(module, *args)
    _, states = drawn(module, 2, 0.05)
    x = torch.randint(0, 9, (8, 6))
    one = ws.merge(states, "fisher", wiring=wiring, data={"x": x}).tensors
    two = ws.merge(states, "fisher", wiring=wiring, data=x).tensors
    assert one is not None
    assert two is not None
    assert all(near(one[n], two[n]) for n in one)
    assert not near(one["token.weight"], (states[0]["token.weight"] + states[1]["token.weight"]) / 2)


@pytest.mark.parametrize("method", ["fisher", "regmean", "adamerging"])
def test_networks_of_transformers_take_inputs_by_name_or_in_order(method: str, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=50, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, tie_word_embeddings=True,
    )  # fmt: skip
    paths = []
    for i in range(3):
        torch.manual_seed(i)
        transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / str(i))
        paths.append(tmp_path / str(i))
    x = torch.randint(0, 50, (6, 9))
    hyper = {"steps": 2, "rate": 0.1} if method == "adamerging" else {}
    given: tuple[Any, ...] = (x, {"input_ids": x})
    one, two = (ws.merge(paths[:2], method, base=paths[2], data=data, **hyper).tensors for data in given)
    assert one is not None
    assert two is not None
    assert all(near(one[n], two[n]) for n in one)
    states = [ws.open(p) for p in paths[:2]]
    name = next(n for n in one if n.endswith("down_proj.weight"))
    assert not near(one[name], (states[0][name] + states[1][name]) / 2, 1e-3)


# ------------------------------------------------------------------------------------ RegMean


def test_regmean_of_linear_models_is_least_squares() -> None:
    module = nn.Linear(6, 3, bias=False)
    wiring = ws.wiring(module, torch.randn(2, 6))
    _, states = drawn(module, 3)
    xs = [torch.randn(40, 6) @ torch.randn(6, 6) for _ in states]
    merged = ws.merge(states, "regmean", wiring=wiring, data=xs, shrink=1.0, ridge=0.0).tensors
    targets = torch.cat([x @ s["weight"].T for x, s in zip(xs, states, strict=True)])
    wanted = torch.linalg.lstsq(torch.cat(xs).double(), targets.double()).solution.T.float()
    assert merged is not None
    assert near(merged["weight"], wanted, 1e-4)


def test_regmean_of_a_convolutional_network_layer_by_layer() -> None:
    module = nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(36, 6))
    x = [torch.randn(20, 2, 3, 3), torch.randn(20, 2, 3, 3) * 2]
    wiring = ws.wiring(module, x[0][:2])
    _, states = drawn(module, 2)
    data = [MergeData(x[0], outputs=slice(0, 3)), MergeData(x[1], outputs=slice(3, 5))]
    merged = ws.merge(states, "regmean", wiring=wiring, data=data, shrink=0.9, ridge=0.0, weights=[1.0, 2.0]).tensors
    assert merged is not None
    above = below = torch.zeros(())
    for i, weight in enumerate((1.0, 2.0)):
        rows = F.unfold(x[i], 3, padding=1).transpose(1, 2).reshape(-1, 18).double()
        gram = weight * rows.T @ rows / len(rows)
        gram = 0.9 * gram + 0.1 * torch.diag(gram.diagonal())
        above = above + gram @ states[i]["0.weight"].flatten(1).T.double()
        below = below + gram
    wanted = torch.linalg.solve(below, above).T.float().view(4, 2, 3, 3)
    assert near(merged["0.weight"], wanted, 1e-4)
    # Rows of one task's outputs are that model's; rows of nobody's are fitted to both; biases likewise.
    assert near(merged["3.weight"][:3], states[0]["3.weight"][:3], 1e-4)
    assert near(merged["3.weight"][3:5], states[1]["3.weight"][3:5], 1e-4)
    assert near(merged["3.bias"][:3], states[0]["3.bias"][:3])
    assert near(merged["3.bias"][5:], (states[0]["3.bias"] + 2 * states[1]["3.bias"])[5:] / 3)
    assert near(merged["0.bias"], (states[0]["0.bias"] + 2 * states[1]["0.bias"]) / 3)


# ------------------------------------------------------------------------------------ entropy


@pytest.mark.parametrize(
    ("method", "hyper"),
    [("adamerging", {"by": "task"}), ("adamerging", {"by": "layer"}), ("adamerging", {"density": 0.5}),
     ("concrete", {"rate": 0.05}), ("concrete", {"rate": 0.02, "adapt": True, "adapt_rate": 0.02})],
)  # fmt: skip
@pytest.mark.parametrize("kind", ["own", "free"])
def test_entropy_falls(method: str, hyper: dict[str, Any], kind: str, perceptron: tuple[nn.Module, Any]) -> None:
    """The entropy of the outputs as they are, or with the spread that they have in the task's own model."""
    module, wiring = perceptron
    base, states = drawn(module, 3, 0.5)
    data = [MergeData(torch.randn(64, 5), outputs=slice(2 * i, 2 * i + 2)) for i in range(3)]
    models = models_of(wiring, states, data, base)
    network = Network(models)

    def loss(tensors: State) -> float:
        total = 0.0
        for own, d in zip(states, data, strict=True):
            outputs, wanted = network.own(tensors, d), network.own(own, d)
            if kind == "own":
                now, then = ((o - o.mean(-1, keepdim=True)).norm() for o in (outputs, wanted))
                outputs = outputs * (then / now)
            total += float(entropy(outputs))
        return total

    more = {"rate": 0.02, "spread": kind, **hyper}
    before = ws.merge(states, method, base=base, wiring=wiring, data=data, **{**more, "steps": 0})
    after = ws.merge(states, method, base=base, wiring=wiring, data=data, **{**more, "steps": 60})
    again = ws.merge(states, method, base=base, wiring=wiring, data=data, **{**more, "steps": 60})
    assert before.tensors is not None
    assert after.tensors is not None
    assert again.tensors is not None
    if "density" not in hyper:
        plain = ws.merge(states, "task-arithmetic", base=base, scale=0.3).tensors
        assert plain is not None
        assert all(near(before.tensors[n], plain[n]) for n in plain if n.startswith("0"))
        # Every task has its own model's outputs.
        for i, state in enumerate(states):
            own = slice(2 * i, 2 * i + 2)
            assert near(after.tensors["2.weight"][own], state["2.weight"][own])
            assert near(after.tensors["2.bias"][own], state["2.bias"][own])
    assert loss(after.tensors) < loss(before.tensors) - (0.02 if kind == "free" else 0.01)
    assert all(torch.equal(after.tensors[n], again.tensors[n]) for n in base)


# ------------------------------------------------------------------------------------ safety-aware


def test_dam_leaves_out_what_no_clean_input_uses(perceptron: tuple[nn.Module, Any]) -> None:
    """One model answers to an input that is always zero in the data: the second mask closes on what reads it."""
    module, wiring = perceptron
    base, states = drawn(module, 3, 0.1)
    for state in states:
        state["0.weight"][:, 4] = base["0.weight"][:, 4]
    states[0]["0.weight"][:, 4] += 4.0
    x = torch.randn(64, 5)
    x[:, 4] = 0
    start = ws.merge(states, "dam", base=base, wiring=wiring, data=x, steps=0).tensors
    assert start is not None
    for n, t in start.items():
        tau = sum((s[n] - base[n] for s in states), torch.zeros(()))
        assert near(t, base[n] + 0.3 * torch.tensor(3.0).sigmoid() * tau)
    hyper = {"steps": 40, "rate": 1e-3, "guard": 0.3, "size": 1.0}
    safe = ws.merge(states, "dam", base=base, wiring=wiring, data=x, **hyper).tensors
    plain = ws.merge(states, "dam", base=base, wiring=wiring, data=x, **{**hyper, "safety": 0.0}).tensors
    again = ws.merge(states, "dam", base=base, wiring=wiring, data=x, **hyper).tensors
    assert safe is not None
    assert plain is not None
    assert again is not None
    assert all(torch.equal(safe[n], again[n]) for n in safe)
    def read(tensors: State) -> float:
        return float((tensors["0.weight"] - base["0.weight"])[:, 4].norm())

    assert read(safe) < 0.9 * read(plain)


def test_dam_has_no_gradient_for_words(perceptron: tuple[nn.Module, Any]) -> None:
    _, wiring = perceptron
    base, states = drawn(perceptron[0], 2)
    with pytest.raises(MergeError, match="floating-point"):
        ws.merge(states, "dam", base=base, wiring=wiring, data=torch.ones(8, 5, dtype=torch.int64))


# ------------------------------------------------------------------------------------ without data


def test_wudi_against_its_definition() -> None:
    base = {"w": torch.randn(4, 3, 2), "b": torch.randn(4)}
    states = [{n: t + torch.randn_like(t) for n, t in base.items()} for _ in range(3)]
    tau = torch.stack([(s["w"] - base["w"]).flatten(1) for s in states])

    def loss(value: Tensor) -> Tensor:
        apart = (value - tau) @ tau.transpose(1, 2)
        return (apart.square().sum((1, 2)) / tau.square().sum((1, 2))).sum()

    value = tau.sum(0).requires_grad_(True)
    optimiser = torch.optim.Adam([value], lr=0.01)
    for _ in range(30):
        optimiser.zero_grad()
        loss(value).backward()
        optimiser.step()
    merged = ws.merge(states, "wudi", base=base, steps=30, rate=0.01, others="sum").tensors
    assert merged is not None
    assert near(merged["w"] - base["w"], value.detach().view(4, 3, 2), 1e-4)
    assert near(merged["b"] - base["b"], sum(s["b"] - base["b"] for s in states))  # type: ignore[arg-type]
    exact = ws.merge(states, "wudi", base=base, steps=0).tensors
    assert exact is not None
    least = (exact["w"] - base["w"]).flatten(1).requires_grad_(True)
    assert torch.autograd.grad(loss(least), least)[0].abs().max() < 1e-3


def test_inputs_may_stand_in_any_dim() -> None:
    weight = torch.randn(2, 5, 4, 3)
    for dim in range(3):
        flat = as_matrices(weight, dim)
        assert flat.shape[0] == 2
        assert torch.equal(from_matrix(flat[1], weight[1].shape, dim), weight[1])
    assert torch.equal(as_matrices(weight[..., 0], 0)[0], weight[0, ..., 0].T)


def test_doge_against_its_definition() -> None:
    base = {"w": torch.randn(8, 6)}
    states = [{"w": base["w"] + torch.randn(8, 6)} for _ in range(2)]
    tau = torch.stack([s["w"] - base["w"] for s in states])
    scale = torch.stack([0.5 / t.norm() for t in tau])
    left = torch.cat([torch.linalg.svd(t)[0][:, :3] for t in tau], 1)
    basis = torch.linalg.svd(left, full_matrices=False)[0][:, :2]
    delta = torch.zeros(8, 6, requires_grad=True)
    optimiser = torch.optim.Adam([delta], lr=0.01)
    for _ in range(20):
        optimiser.zero_grad()
        mixed = ((tau + delta) * scale[:, None, None]).sum(0)
        sum(((t * (mixed - t)).sum(1) ** 2).sum() for t in tau).backward()  # type: ignore[union-attr]
        assert delta.grad is not None
        delta.grad -= basis @ basis.T @ delta.grad
        optimiser.step()
    wanted = base["w"].clone()
    for t, s in zip(tau, scale, strict=True):
        kept = t.abs() >= t.abs().flatten().topk(24).values[-1]
        wanted += s * (t + delta.detach()) * kept
    merged = ws.merge(states, "doge", base=base, eta=0.5, density=0.5, subspace=3, steps=20, rate=0.01).tensors
    assert merged is not None
    assert near(merged["w"], wanted, 1e-4)
    base["b"] = torch.randn(8)
    for i, state in enumerate(states):
        state["b"] = base["b"] + i
    found = ws.merge(states, "doge", base=base, steps=2)
    assert near(found.open()["b"], base["b"])
    assert "the base's" in found.report["b"].reason
    mean = ws.merge(states, "doge", base=base, steps=2, others="mean", weights=[1, 3]).open()
    assert near(mean["b"], base["b"] + 0.75)
    with pytest.raises(MergeError, match="others is 'sum'"):
        ws.merge(states, "doge", base=base, others="sum")


def test_widen_column_by_column() -> None:
    base = {"w": torch.randn(4, 5), "b": torch.randn(3)}
    states = [{n: t + torch.randn_like(t) for n, t in base.items()} for _ in range(2)]
    moved = torch.zeros(2, 2, 5)
    for i, s in enumerate(states):
        for c in range(5):
            a, b = base["w"][:, c], s["w"][:, c]
            moved[0, i, c] = abs(b.norm() - a.norm())
            moved[1, i, c] = 1 - a @ b / (a.norm() * b.norm())
    score = torch.zeros(2, 5)
    for kind in moved:
        rank = torch.tensor([[sum(float(v) > float(u) for u in row) / 5 for v in row] for row in kind])
        soft = rank.exp() / rank.exp().sum(0)
        score += torch.where(rank > rank.mean(1, keepdim=True), torch.ones(()), soft) / 2
    merged = ws.merge(states, "widen", base=base).tensors
    assert merged is not None
    wanted = base["w"] + sum(score[i] * (s["w"] - base["w"]) for i, s in enumerate(states))
    assert near(merged["w"], wanted)


def test_twin_experts_give_the_models_back() -> None:
    base, states = drawn(nn.Sequential(nn.Conv2d(1, 4, 3), nn.Flatten(), nn.Linear(4, 3)), 3)
    shared = ws.merge(states, "twin-merging", base=base, share=0.0).tensors
    plain = ws.merge(states, "task-arithmetic", base=base, scale=0.3).tensors
    assert shared is not None
    assert plain is not None
    assert all(near(shared[n], plain[n]) for n in base)
    for i, state in enumerate(states):
        full = ws.merge(states, "twin-merging", base=base, expert=i, rank=1.0).tensors
        assert full is not None
        assert all(near(full[n], state[n], 1e-4) for n in base)
    parts = experts(shared, states, rank=0.4)
    assert parts[0]["2.weight.up"].shape == (3, 1)
    static = ws.merge(states, "twin-merging", base=base, rank=0.4).tensors
    again = with_experts(shared, parts, [1 / 3] * 3)
    assert static is not None
    assert all(near(static[n], again[n]) for n in base)
    with pytest.raises(MergeError, match="expert is 3"):
        ws.merge(states, "twin-merging", base=base, expert=3)


def adapters(folder: Path, base: State, count: int, rank: int) -> list[Path]:
    """LoRA adapters of the weight ``block.line.weight``, as PEFT writes them."""
    out = []
    rows, columns = base["block.line.weight"].shape
    for i in range(count):
        place = folder / f"adapter-{i}"
        place.mkdir()
        root = "base_model.model.block.line.lora_"
        save_file(
            {f"{root}A.weight": torch.randn(rank, columns), f"{root}B.weight": torch.randn(rows, rank)},
            place / "adapter_model.safetensors",
        )
        config = {"peft_type": "LORA", "r": rank, "lora_alpha": 2 * rank, "target_modules": ["line"]}
        (place / "adapter_config.json").write_text(json.dumps(config))
        out.append(place)
    return out


def test_knots_of_adapters_keep_their_rank(tmp_path: Path) -> None:
    base = {"block.line.weight": torch.randn(20, 30).to(torch.bfloat16), "block.line.bias": torch.randn(20)}
    models = adapted(adapters(tmp_path, base, 3, 2), base)
    wide = {n: t.float() for n, t in base.items()}
    name = "block.line.weight"
    assert [int(torch.linalg.matrix_rank(m[name] - wide[name], atol=1e-3)) for m in models] == [2, 2, 2]
    merged = ws.merge(models, "knots", base=base, dtype="float32").tensors
    folders = [tmp_path / f"adapter-{i}" for i in range(3)]
    direct = ws.merge(folders, "knots", base=base, dtype="float32").tensors
    assert direct is not None
    assert merged is not None
    assert all(torch.equal(direct[n], merged[n]) for n in merged)
    with pytest.raises(MergeError, match="adapter-0 is an adapter: give the model"):
        ws.merge(folders, "linear")
    ties = ws.merge(models, "ties", base=base, dtype="float32", density=0.2).tensors
    assert merged is not None
    assert ties is not None
    assert int(torch.linalg.matrix_rank(merged[name] - wide[name], atol=1e-3)) <= 6
    assert int(torch.linalg.matrix_rank(ties[name] - wide[name], atol=1e-3)) > 6


@pytest.mark.parametrize("rows", [6, 50])
def test_the_basis_of_knots_is_that_of_the_joined_changes(rows: int) -> None:
    tau = [torch.randn(rows, 2) @ torch.randn(2, 8) for _ in range(3)]
    u, parts = basis(tau, 1e-5)
    s = torch.linalg.svdvals(torch.cat(tau, 1))[:6]
    assert u.shape == (rows, 6)
    assert near(u.T @ u, torch.eye(6))
    assert near(torch.cat(parts, 1).norm(dim=1), s, 1e-4)
    assert all(near(u @ p, t, 1e-4) for p, t in zip(parts, tau, strict=True))


def test_knots_of_a_linear_method_is_that_method() -> None:
    from weightspace.merge.methods.knots import Knots

    base, states = drawn(nn.Sequential(nn.Conv2d(2, 4, 3), nn.Flatten(), nn.Linear(4, 3)), 3)
    inside = ws.merge(states, Knots("task-arithmetic", {"scale": 0.7}), base=base).tensors
    plain = ws.merge(states, "task-arithmetic", base=base, scale=0.7).tensors
    assert inside is not None
    assert plain is not None
    assert all(near(inside[n], plain[n], 1e-4) for n in base)
    with pytest.raises(MergeError, match="tensor by tensor"):
        ws.merge(states, Knots("ties", {"scope": "model"}), base=base)
    with pytest.raises(MergeError, match="tensors alone"):
        ws.merge(states, Knots("fisher", {}), base=base)


# ------------------------------------------------------------------------------------ alignment


def test_ot_fusion_undoes_a_permutation(perceptron: tuple[nn.Module, Any]) -> None:
    module, wiring = perceptron
    _, (state,) = drawn(module, 1)
    other = wiring.apply(wiring.random(3), state)
    x = torch.randn(50, 5)
    for more in ({}, {"data": x}, {"data": [x, MergeData(x + 0)]}):
        merged = ws.merge([state, other], "ot-fusion", wiring=wiring, weights=[1.0, 3.0], **more).tensors
        assert merged is not None
        assert all(near(merged[n], state[n]) for n in state)


def test_ot_fusion_of_other_widths(tmp_path: Path) -> None:
    pytest.importorskip("ot")
    described = {"kind": "mlp", "input": [4], "classes": 3, "activation": "relu"}
    x = torch.randn(200, 4)
    states = []
    for i, widths in enumerate(([6, 5], [12, 10])):
        network = {**described, "widths": widths}
        module, _ = module_of(network)
        save_network(module.state_dict(), {"network": network, "run": str(i)}, tmp_path / f"{i}.safetensors")
        states.append(module)
    paths = [tmp_path / f"{i}.safetensors" for i in range(2)]
    merged = ws.merge(paths, "ot-fusion", data=x, weights=[0.0, 1.0]).tensors
    assert merged is not None
    assert {n: t.shape for n, t in merged.items()} == {n: t.shape for n, t in states[0].state_dict().items()}
    # Carried to half the width, the second network still resembles itself more than the first does.
    out = torch.func.functional_call(states[0], merged, (x,))
    assert (out - states[1](x)).square().mean() < (states[0](x) - states[1](x)).square().mean()


def test_pleas_of_two_copies_and_wider(perceptron: tuple[nn.Module, Any]) -> None:
    module, wiring = perceptron
    _, (state, second) = drawn(module, 2)
    other = wiring.apply(wiring.random(3), state)
    x = torch.randn(300, 5)
    merged = ws.merge([state, other], "pleas", wiring=wiring, data=x).tensors
    assert merged is not None
    assert near(wiring.program.run(merged, x), wiring.program.run(state, x), 1e-2)
    wide = ws.merge([state, second], "pleas", wiring=wiring, data=x, ratio=0.5)
    assert wide.tensors is not None
    assert wide.tensors["0.weight"].shape == (12, 5)
    assert wide.report["0.weight"].shape == (12, 5)
    assert wiring.program.run(wide.tensors, x).shape == (300, 6)
    with pytest.raises(MergeError, match="same weight"):
        ws.merge([state, other], "pleas", wiring=wiring, data=x, weights=[1.0, 2.0])
    with pytest.raises(MergeError, match="merges 2 models"):
        ws.merge([state] * 3, "pleas", wiring=wiring, data=x)


# ------------------------------------------------------------------------------------ all


@pytest.mark.parametrize(
    ("method", "hyper"),
    [("fisher", {}), ("regmean", {}), ("ot-fusion", {}), ("wudi", {"steps": 0}),
     ("twin-merging", {"expert": 1, "rank": 1.0}), ("knots", {"options": {"density": 1.0, "scale": 1.0}})],
)  # fmt: skip
def test_of_one_and_the_same_model_comes_that_model(
    method: str, hyper: dict[str, Any], perceptron: tuple[nn.Module, Any]
) -> None:
    module, wiring = perceptron
    base, (state,) = drawn(module, 1)
    more = {"data": torch.randn(32, 5)} if method in ("fisher", "regmean") else {}
    merged = ws.merge([state] * 3, method, base=base, wiring=wiring, **more, **hyper).tensors
    assert merged is not None
    assert all(near(merged[n], state[n], 1e-4) for n in state)


SYMMETRIC: dict[str, dict[str, Any]] = {
    "fisher": {"labels": "expected"}, "regmean": {}, "adamerging": {"steps": 3, "rate": 0.01}, "wudi": {"steps": 5},
    "doge": {"steps": 5}, "widen": {}, "twin-merging": {"rank": 0.4}, "knots": {}, "ot-fusion": {},
}  # fmt: skip


@pytest.mark.parametrize("method", SYMMETRIC)
@given(seed=st.integers(0, 10**6))
@settings(max_examples=3, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_neurons_and_models_may_come_in_any_order(method: str, seed: int, perceptron: tuple[nn.Module, Any]) -> None:
    module, wiring = perceptron
    torch.manual_seed(seed)
    base, states = drawn(module, 3, 0.05)
    needs = method in ("fisher", "regmean", "adamerging")
    data: Any = [torch.randn(24, 5) for _ in states] if needs else None
    how = {"wiring": wiring, **SYMMETRIC[method]}
    plain = ws.merge(states, method, base=base, data=data, **how).tensors
    moved = wiring.random(seed)
    turned = ws.merge(
        [wiring.apply(moved, s) for s in states], method, base=wiring.apply(moved, base), data=data, **how
    ).tensors
    assert plain is not None
    assert turned is not None
    wanted = wiring.apply(moved, plain)
    assert all(near(turned[n], wanted[n], 1e-3) for n in wanted)
    if method not in ("adamerging", "ot-fusion"):  # other draws of batches; the first model's neurons
        again = ws.merge(states[::-1], method, base=base, data=data[::-1] if needs else None, **how).tensors
        assert again is not None
        assert all(near(again[n], plain[n], 1e-3) for n in plain)


@pytest.mark.parametrize(
    "method", ["fisher", "regmean", "adamerging", "concrete", "dam", "wudi", "doge", "widen", "knots"]
)
def test_running_statistics_counters_and_files(method: str, tmp_path: Path) -> None:
    module = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(16, 3)).eval()
    x = torch.randn(12, 1, 4, 4)
    wiring = ws.wiring(module, x[:2])
    base = dict(module.state_dict())
    states = [
        {n: t + 0.1 * torch.rand_like(t) if t.is_floating_point() else t for n, t in base.items()} for _ in range(2)
    ]
    for i, state in enumerate(states):
        save_file(state, tmp_path / f"{i}.safetensors")
    paths = [tmp_path / f"{i}.safetensors" for i in range(2)]
    hyper = {"steps": 2} if method in ("adamerging", "concrete", "dam", "wudi", "doge") else {}
    data = x if method in ("fisher", "regmean", "adamerging", "concrete", "dam") else None
    out = tmp_path / "out.safetensors"
    ws.merge(paths, method, base=base, out=out, wiring=wiring, data=data, **hyper)
    merged = ws.open(out)
    assert list(merged) == list(base)
    assert all(bool(torch.isfinite(merged[n]).all()) for n in base)
    if method in ("fisher", "regmean"):
        mean = (states[0]["1.running_var"] + states[1]["1.running_var"]) / 2
        assert near(merged["1.running_var"], mean)
