"""What networks answer: the same for every copy of one function, and a help to any metanet."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

pytest.importorskip("torch_geometric")

import weightspace as ws
from weightspace.errors import MetanetError, UnansweredError
from weightspace.graph import ParameterGraph
from weightspace.graph.build import of_tensors
from weightspace.metanets import Answering, FlatBaseline, Sample, TrainingPlan, assert_equivariant, build_metanet, fit
from weightspace.metanets.answers import ANSWERS, answers
from weightspace.wiring.scaling import scaling

from .references import ARCHITECTURES, network, permuted

INNER = {
    "operator": {"width": 8, "rounds": 2},
    "gmn": {"hidden": 8, "layers": 2},
    "neural-graphs": {"hidden": 8, "layers": 2, "fourier": 4},
    "scalegmn": {"hidden": 8, "layers": 2},
}


@settings(max_examples=25, deadline=None)
@given(st.sampled_from(ARCHITECTURES), st.integers(0, 1000))
def test_no_symmetry_changes_an_answer(architecture: str, seed: int) -> None:
    graph = network(architecture, seed)
    found = answers(graph)
    assert found.shape == (len(ANSWERS),)
    assert bool(torch.isfinite(found).all())
    torch.testing.assert_close(answers(permuted(graph, seed)), found, rtol=1e-7, atol=1e-7)
    assert graph.wiring is not None
    assert graph.tensors is not None
    group = scaling(graph.wiring)
    moved = of_tensors(dict(group.apply(group.random(seed), dict(graph.tensors))), graph.wiring)
    torch.testing.assert_close(answers(moved), found, rtol=1e-6, atol=1e-6)
    other = answers(network(architecture, seed + 1))
    assert float((other - found).abs().max()) > 1e-3


@pytest.mark.parametrize("kind", INNER)
@settings(max_examples=5, deadline=None)
@given(architecture=st.sampled_from(ARCHITECTURES), seed=st.integers(0, 1000))
def test_a_metanet_that_hears_answers_stays_equivariant(kind: str, architecture: str, seed: int) -> None:
    torch.manual_seed(seed)
    metanet = build_metanet({"kind": kind, **INNER[kind], "answers": True, "outputs": 3})
    assert isinstance(metanet, Answering)
    assert assert_equivariant(metanet, network(architecture, seed), draws=2) < 1e-6


def test_with_scale_it_sees_no_rescaling_either() -> None:
    metanet = build_metanet({"kind": "operator", **INNER["operator"], "scale": True, "answers": True})
    assert metanet.scale
    assert assert_equivariant(metanet, network("cnn"), scale=True) < 1e-6


def test_told_statistics_it_stays_equivariant_and_knows_the_flat_features() -> None:
    metanet = build_metanet({"kind": "operator", **INNER["operator"], "answers": True, "statistics": True})
    assert isinstance(metanet, Answering)
    assert_equivariant(metanet, network("cnn"), scale=False)
    told = metanet.told(network("cnn"))
    flat = FlatBaseline("boosting", activation=True).features([network("cnn")])[0]
    assert told.numpy() == pytest.approx(np.concatenate((answers(network("cnn")).numpy(), flat)))
    # Rescaling changes statistics of weights, and the metanet says so of itself.
    options = {"scale": True, "answers": True, "statistics": True}
    scaled = build_metanet({"kind": "operator", **INNER["operator"], **options})
    assert not scaled.scale
    # Two metanets that are told different things do not take each other's batches.
    assert metanet.preparation != build_metanet({"kind": "operator", **INNER["operator"], "answers": True}).preparation


def test_around_a_batch_of_the_inner_metanet_it_says_the_same() -> None:
    metanet = build_metanet({"kind": "operator", **INNER["operator"], "answers": True})
    assert isinstance(metanet, Answering)
    graphs = [network("cnn"), network("mlp")]
    around = metanet.around(metanet.inner.batched(graphs), graphs)
    torch.testing.assert_close(metanet.answer(around), metanet.read(*graphs))


def test_a_weight_that_is_missing_is_not_taken_from_the_example() -> None:
    graph = network("cnn")
    assert graph.wiring is not None
    assert graph.tensors is not None
    name = next(n for n, t in graph.tensors.items() if t.dim() == 4)
    lacking = of_tensors({n: t for n, t in graph.tensors.items() if n != name}, graph.wiring)
    with pytest.raises(UnansweredError, match=name):
        answers(lacking)


def test_single_precision_says_the_same() -> None:
    """Dead networks too, whose answers differ by rounding alone."""
    for gain in (1.0, 0.0):
        graph = network("cnn", 3)
        assert graph.tensors is not None
        assert graph.wiring is not None
        exact = {n: gain * t if t.dim() > 1 else t for n, t in graph.tensors.items()}
        single = of_tensors({n: t.float() for n, t in exact.items()}, graph.wiring)
        torch.testing.assert_close(answers(single), answers(of_tensors(exact, graph.wiring)), rtol=1e-3, atol=1e-3)


class Tokens(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(11, 6)
        self.inner = nn.Linear(6, 9)
        self.out = nn.Linear(9, 11)

    def forward(self, ids: Tensor) -> Tensor:
        found: Tensor = self.out(self.inner(self.table(ids)).relu())
        return found


def test_networks_of_tokens_are_asked_tokens() -> None:
    torch.manual_seed(0)
    module = Tokens().eval()
    graph = of_tensors(module.state_dict(), ws.wiring(module, torch.randint(11, (2, 7))))
    found = answers(graph)
    assert float(found.abs().max()) > 0.1
    torch.testing.assert_close(answers(permuted(graph)), found, rtol=1e-4, atol=1e-4)


def test_a_program_bound_to_its_examples_is_asked_in_pieces() -> None:
    graph = network("mlp")
    assert graph.wiring is not None
    program = graph.wiring.program
    assert program is not None

    def bound(tensors: object, x: Tensor) -> Tensor:
        if len(x) != 2:
            raise RuntimeError("expected 2 examples")
        return program.run(tensors, x)  # type: ignore[no-any-return, arg-type]

    wiring = graph.wiring.with_(program=replace(program, run=bound))
    torch.testing.assert_close(answers(replace(graph, wiring=wiring)), answers(graph), rtol=1e-9, atol=1e-9)


def test_what_cannot_be_asked_is_refused() -> None:
    graph = network("mlp")
    assert graph.wiring is not None
    with pytest.raises(MetanetError, match="no program"):
        answers(replace(graph, wiring=graph.wiring.with_(program=None)))
    program = graph.wiring.program
    assert program is not None

    def broken(tensors: object, x: Tensor) -> Tensor:
        raise RuntimeError("no noise today")

    with pytest.raises(MetanetError, match="no noise today"):
        answers(replace(graph, wiring=graph.wiring.with_(program=replace(program, run=broken))))
    with pytest.raises(MetanetError, match="no metanet of the kind"):
        build_metanet({"kind": "unheard", "answers": True})
    with pytest.raises(MetanetError, match="at least 1"):
        Answering(width=0)


def test_a_training_begins_with_answers_alone() -> None:
    torch.manual_seed(0)
    metanet = build_metanet({"kind": "operator", **INNER["operator"], "answers": True})
    assert isinstance(metanet, Answering)
    items = [metanet.prepare(network("mlp", s)) for s in range(24)]
    targets = torch.stack([item.answers[0] for item in items]).float()
    metanet.begin(lambda: items, lambda outputs, rows: (outputs[:, 0] - targets[rows]).square().mean())
    batch = metanet.collate(items)
    found = metanet.answer(batch)
    assert np.corrcoef(found[:, 0].numpy(), targets.numpy())[0, 1] > 0.9
    for parameter in metanet.inner.parameters():
        nn.init.normal_(parameter)
    torch.testing.assert_close(metanet.answer(batch), found)
    assert all(parameter.grad is None for parameter in metanet.parameters())


def trained_by(gain: float, seed: int) -> ParameterGraph:
    graph = network("cnn", seed)
    assert graph.tensors is not None
    assert graph.wiring is not None
    tensors = {n: gain * t.float() if t.dim() > 1 else t.float() for n, t in graph.tensors.items()}
    return of_tensors(tensors, graph.wiring)


def test_training_saving_and_baselines(tmp_path) -> None:  # type: ignore[no-untyped-def]
    pytest.importorskip("lightning")
    gains = np.linspace(0.2, 2.0, 40)
    samples = [
        Sample(f"n{i}", trained_by(float(g), i), {"test_accuracy": float(g) / 2.1}, f"r{i}")
        for i, g in enumerate(gains)
    ]
    config = {"kind": "operator", "width": 8, "rounds": 1, "answers": True}
    plan = TrainingPlan(metanet=config, epochs=5, batch=8, learning_rate=5e-3, device="cpu")
    trained = fit(plan, samples[::2], samples[1::4], tmp_path, progress=False)
    predicted = trained.predict(samples[3::4]).numpy()
    assert np.corrcoef(predicted, gains[3::4])[0, 1] > 0.8
    loaded = type(trained).load(tmp_path)
    np.testing.assert_array_equal(loaded.predict(samples[3::4]).numpy(), predicted)
    plain, told = FlatBaseline("ridge"), FlatBaseline("ridge", answers=True)
    assert told.features(samples[:2]).shape[1] == plain.features(samples[:2]).shape[1] + len(ANSWERS)


def test_what_was_begun_may_learn_more_slowly(tmp_path) -> None:  # type: ignore[no-untyped-def]
    samples = [Sample(f"{i}", network("mlp", i), {"target": float(i % 3), "run": str(i)}, str(i)) for i in range(9)]
    config = {"kind": "operator", **INNER["operator"], "answers": True}
    plan = TrainingPlan(target="target", metanet=config, batch=3, epochs=1, begun=0.0)
    held = fit(plan, samples, progress=False).metanet
    free = fit(replace(plan, begun=1.0), samples, progress=False).metanet
    torch.manual_seed(plan.seed)
    alone = build_metanet({**plan.metanet, "outputs": 1})
    assert isinstance(alone, Answering)
    assert isinstance(held, Answering)
    assert isinstance(free, Answering)
    task = plan.make_task(samples)
    targets = task.targets(samples)
    items = [alone.prepare(s.graph) for s in samples]
    alone.begin(lambda: items, lambda outputs, rows: task.loss(outputs, targets[rows]))
    for expected, still, moved in zip(alone.begun(), held.begun(), free.begun(), strict=True):
        torch.testing.assert_close(still, expected)
        assert not torch.equal(moved, expected)
    changed = zip(alone.inner.parameters(), free.inner.parameters(), strict=True)
    assert any(not torch.equal(a, b) for a, b in changed)
    with pytest.raises(MetanetError, match="begun is 2"):
        replace(plan, begun=2)
