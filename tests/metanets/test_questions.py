"""Learned questions: what networks answer to them is no matter of symmetry, and can be learned from."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

pytest.importorskip("torch_geometric")

import weightspace as ws
from weightspace.errors import MetanetError
from weightspace.graph import ParameterGraph
from weightspace.graph.build import of_tensors
from weightspace.metanets import Answering, assert_equivariant, build_metanet
from weightspace.metanets.questions import LearnedImages, LearnedQuestions, asked

from .references import ARCHITECTURES, network, permuted


def convolutional(seed: int, side: int = 10, classes: int = 4, double: bool = True) -> ParameterGraph:
    torch.manual_seed(seed)
    net = nn.Sequential(
        nn.Conv2d(1, 5, 3, stride=2), nn.ReLU(), nn.Conv2d(5, 6, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(6, classes),
    ).eval()  # fmt: skip
    wiring = ws.wiring(net, torch.randn(2, 1, side, side))
    return of_tensors({n: t.double() if double else t for n, t in net.state_dict().items()}, wiring)


def test_images_are_smooth_and_fit_any_shape() -> None:
    torch.manual_seed(0)
    made = LearnedImages(6)
    for shape in ((1, 14, 14), (3, 16, 16), (3, 20, 9)):
        x = made.images(shape).detach()
        assert x.shape == (6, *shape)
        assert float(x.abs().max()) <= 3
        assert 0.5 < float(x.std()) < 3
        assert float((x[..., 1:] - x[..., :-1]).std() / x.std()) < 1.4, "neighbours of noise differ by 1.41 deviations"


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 1000))
def test_no_permutation_changes_an_answer(seed: int) -> None:
    graph = convolutional(seed)
    torch.manual_seed(seed)
    questions = LearnedQuestions(5, 6).double()
    found = questions([asked(graph)]).detach()
    assert found.shape == (1, 2 * 5 * 6)
    torch.testing.assert_close(questions([asked(permuted(graph, seed))]), found, rtol=1e-9, atol=1e-9)
    assert float((questions([asked(convolutional(seed + 1))]).detach() - found).abs().max()) > 1e-6


def test_networks_of_one_program_are_run_together_and_say_the_same() -> None:
    questions = LearnedQuestions(4, 4)
    first = convolutional(0, double=False)
    assert first.wiring is not None
    weights = [dict(convolutional(s, double=False).tensors or {}) for s in range(3)]
    alike = [asked(of_tensors(w, first.wiring)) for w in weights]
    strange = [asked(convolutional(9, side=12, double=False)), None]
    together = questions([alike[0], strange[0], alike[1], None, alike[2]])
    apart = torch.cat([questions([n]) for n in (alike[0], strange[0], alike[1], None, alike[2])])
    torch.testing.assert_close(together, apart, rtol=1e-4, atol=1e-5)
    assert not bool(together[3].any()), "what reads no images is asked nothing"


def test_a_network_of_other_inputs_is_asked_nothing_and_more_classes_are_refused() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3))
    wiring = ws.wiring(net, torch.randn(2, 6))
    assert asked(of_tensors(dict(net.state_dict()), wiring)) is None
    with pytest.raises(MetanetError, match="at most 3 classes"):
        LearnedQuestions(4, 3).double()([asked(convolutional(0))])
    with pytest.raises(MetanetError, match="questions no fewer than 0"):
        Answering(questions=-1)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_metanet_with_questions_stays_equivariant(architecture: str) -> None:
    torch.manual_seed(1)
    inner = {"kind": "operator", "width": 8, "rounds": 2}
    metanet = build_metanet({**inner, "answers": True, "questions": 4, "classes": 16, "outputs": 2})
    assert assert_equivariant(metanet, network(architecture, 3), draws=2) < 1e-6


def test_what_weights_and_noise_do_not_tell_is_asked_for() -> None:
    """The target is the answer to one image that nobody knows: only a question can find it."""
    image = torch.linspace(-2, 2, 100).reshape(1, 1, 10, 10)
    graphs = []
    for seed in range(120):
        torch.manual_seed(seed)
        net = nn.Sequential(nn.Flatten(), nn.Linear(100, 2)).eval()
        graphs.append((ws.wiring(net, torch.randn(2, 1, 10, 10)), net))
    wiring = graphs[0][0]
    samples = [of_tensors(dict(net.state_dict()), wiring) for _, net in graphs]
    with torch.no_grad():
        targets = torch.stack([(net(image)[0, 0] - net(image)[0, 1]) for _, net in graphs])

    def correlation(questions: int) -> float:
        torch.manual_seed(0)
        metanet = build_metanet(
            {"kind": "operator", "width": 4, "rounds": 1, "answers": True, "questions": questions, "classes": 2}
        )
        items = [metanet.prepare(g) for g in samples]
        metanet.begin(lambda: items[:60], lambda out, rows: (out[:, 0] - targets[:60][rows]).square().mean())
        found = metanet.answer(metanet.collate(items[60:]))[:, 0]
        return float(torch.corrcoef(torch.stack((found, targets[60:])))[0, 1])

    asking, hearing = correlation(8), correlation(0)
    assert asking > 0.8
    assert asking > hearing + 0.15
