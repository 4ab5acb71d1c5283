"""Heads that read a network: blind to the order of neurons, pixels and classes, and able to learn."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import weightspace as ws
from weightspace.backdoor import detector as metanets
from weightspace.backdoor import questions as questioning
from weightspace.backdoor.detector import DetectorNet, Example, answer, loss
from weightspace.backdoor.head import EvidenceHead, Facts, relative
from weightspace.backdoor.outputs import class_axis
from weightspace.backdoor.questions import Asked, Questions
from weightspace.errors import MetanetError
from weightspace.pretrained.views import clean
from weightspace.wiring.wiring import Wiring

SMALL = {"width": 8, "rounds": 2, "hidden": 12, "probes": 4, "embedding": 12, "dropout": 0.0}


class Image(nn.Module):
    def __init__(self, classes: int = 5) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 6, 3, padding=1)
        self.last = nn.Linear(6, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.relu(self.conv(x)).mean((2, 3)))  # type: ignore[no-any-return]


def image(seed: int = 0, bad: int | None = None) -> tuple[Wiring, dict[str, Tensor]]:
    """A network; ``bad``: a class whose bias and weights stand out."""
    torch.manual_seed(seed)
    net = Image().eval()
    tensors = {n: t.detach().clone() for n, t in net.state_dict().items()}
    if bad is not None:
        tensors["last.weight"][bad] += 1.0
        tensors["last.bias"][bad] += 1.0
    return _WIRING, tensors


_WIRING = ws.wiring(Image().eval(), torch.randn(2, 1, 8, 8))


def example(net: DetectorNet, wiring: Wiring, tensors: dict[str, Tensor]) -> Example:
    axis = class_axis(wiring, tensors)
    graph = clean(tensors, wiring)
    return net.example(graph, next(c.name for c in graph.cells.values() if c.factors == (axis.factor,)))


def test_scores_follow_the_classes() -> None:
    torch.manual_seed(0)
    net = DetectorNet(**SMALL).eval()
    wiring, tensors = image(1)
    order = torch.tensor([3, 0, 4, 1, 2])
    moved = {**tensors, "last.weight": tensors["last.weight"][order], "last.bias": tensors["last.bias"][order]}
    with torch.no_grad():
        (a,), (b,) = net([example(net, wiring, tensors)]), net([example(net, wiring, moved)])
    assert torch.allclose(b[1:-1], a[1:-1][order], atol=1e-4)
    assert torch.allclose(b[[0, -1]], a[[0, -1]], atol=1e-4)
    assert float(a[1:-1].std()) > 1e-4


def test_neurons_and_pixels_have_no_order() -> None:
    torch.manual_seed(0)
    net = DetectorNet(**SMALL).eval()
    module = nn.Sequential(nn.Linear(12, 9), nn.ReLU(), nn.Linear(9, 4)).eval()
    wiring = ws.wiring(module, torch.randn(2, 12))
    tensors = {n: t.detach() for n, t in module.state_dict().items()}
    moved = dict(wiring.apply(wiring.random(1), tensors))
    moved["0.weight"] = moved["0.weight"][:, torch.randperm(12)]
    with torch.no_grad():
        (a,), (b,) = net([example(net, wiring, tensors)]), net([example(net, wiring, moved)])
    assert torch.allclose(a, b, atol=1e-4)


def test_a_network_alone_or_in_a_batch_says_the_same() -> None:
    torch.manual_seed(0)
    net = DetectorNet(**SMALL).eval()
    some = [example(net, *image(seed)) for seed in range(3)]
    with torch.no_grad():
        together = net(some)
        alone = [net([e])[0] for e in some]
    assert all(torch.allclose(a, b, atol=1e-4) for a, b in zip(together, alone, strict=True))


def test_a_metanet_learns_which_class_stands_out() -> None:
    template = DetectorNet(**SMALL)
    bad = [k % 5 if k % 2 else None for k in range(24)]
    some = [example(template, *image(k, b)) for k, b in enumerate(bad)]
    right = [answer("patch" if b is not None else "", () if b is None else (b,), 5) for b in bad]
    net = metanets.train(some, right, epochs=25, rate=1e-2, config=SMALL)
    odds, classes = metanets.read([net], some)
    poisoned = np.array([b is not None for b in bad])
    assert odds.numpy()[poisoned].min() > np.median(odds.numpy()[~poisoned])
    hits = [int(classes[k].argmax()) == b for k, b in enumerate(bad) if b is not None]
    assert np.mean(hits) > 0.8


def test_answers_are_numbers_in_the_logits() -> None:
    assert answer("", (), 10) == (0,)
    assert answer("patch", (3,), 10) == (4,)
    assert answer("multi-target", (3, 5), 10) == (4, 6)
    assert answer("all-to-all", (), 10) == (11,)
    row = torch.tensor([0.0, 1.0, 2.0, 3.0])
    several = loss([row], [(1, 2)])
    assert float(several) == pytest.approx(float(row.logsumexp(0) - row[1:3].logsumexp(0)))


def test_a_cell_that_is_not_there_is_named() -> None:
    net = DetectorNet(**SMALL)
    wiring, tensors = image()
    with pytest.raises(MetanetError, match="no cell 'classes'"):
        net.example(clean(tensors, wiring), "classes")


# ------------------------------------------------------------------------------------ questions


def asked(seed: int, bad: int | None = None) -> Asked:
    wiring, tensors = image(seed, bad)
    return Asked(wiring, tensors, class_axis(wiring, tensors))


def test_questions_follow_the_classes_and_no_neurons() -> None:
    torch.manual_seed(0)
    net = Questions(questions=6).eval()
    wiring, tensors = image(2)
    order = torch.tensor([3, 0, 4, 1, 2])
    moved = {**tensors, "last.weight": tensors["last.weight"][order], "last.bias": tensors["last.bias"][order]}
    moved = dict(wiring.apply(wiring.random(1), moved))
    axis = class_axis(wiring, tensors)
    with torch.no_grad():
        a, b = (net([Asked(wiring, t, axis)])[0] for t in (tensors, moved))
        both = net([Asked(wiring, tensors, axis), Asked(wiring, moved, axis)])
    assert torch.allclose(b[1:-1], a[1:-1][order], atol=1e-3)
    assert torch.allclose(both, torch.stack((a, b)), atol=1e-3)


def test_questions_fit_images_of_any_size() -> None:
    net = Questions(questions=4)
    for shape in ((1, 28, 28), (3, 16, 16), (5, 9, 12)):
        x = net.images(shape)
        assert x.shape == (4, *shape)
        assert float(x.detach().abs().max()) <= 3
        assert 0.5 < float(x.detach().std()) < 3


def test_questions_learn_which_class_stands_out() -> None:
    bad = [k % 5 if k % 2 else None for k in range(24)]
    some = [asked(k, b) for k, b in enumerate(bad)]
    right = [answer("patch" if b is not None else "", () if b is None else (b,), 5) for b in bad]
    net = questioning.train(some, right, [1.0] * 24, epochs=40, rate=1e-2, config={"questions": 6, "dropout": 0.0})
    _, classes = questioning.read([net], some)
    hits = [int(classes[k].argmax()) == b for k, b in enumerate(bad) if b is not None]
    assert np.mean(hits) > 0.8


def test_a_network_without_images_is_asked_nothing() -> None:
    module = nn.Sequential(nn.Linear(12, 9), nn.ReLU(), nn.Linear(9, 4)).eval()
    wiring = ws.wiring(module, torch.randn(2, 12))
    tensors = {n: t.detach() for n, t in module.state_dict().items()}
    one = Asked(wiring, tensors, class_axis(wiring, tensors))
    assert one.shape is None
    odds, classes = questioning.read([Questions(questions=4)], [one, asked(0)])
    assert float(odds[0]) == 0
    assert float(odds[1]) != 0
    assert not classes[0].any()


# ------------------------------------------------------------------------------------ evidence


def test_evidence_is_relative_to_the_other_classes() -> None:
    x = np.random.default_rng(0).normal(size=(10, 3))
    x[4, 1] = 9.0
    found = relative(x)
    assert found.shape == (10, 6)
    assert found[4, 1] > 5
    assert found[4, 4] == 1.0
    # Neither units nor offsets count, nor what all classes share.
    assert np.allclose(relative(x * 7 + 3), found)
    assert not relative(np.ones((10, 2)))[:, :2].any()
    assert np.isfinite(relative(np.array([[np.inf], [1.0], [np.nan]]))).all()


def test_the_evidence_head_learns_and_is_kept() -> None:
    rng = np.random.default_rng(0)
    facts, targets = [], []
    for k in range(60):
        x = rng.normal(size=(8, 4))
        own: tuple[int, ...] = ()
        if k % 2:
            own = (int(rng.integers(8)),)
            x[own[0], 2] += 6
        facts.append(Facts(x, rng.normal(size=2)))
        targets.append(own)
    names = (("a", "b", "c", "d"), ("e", "f"))
    head = EvidenceHead.fit(names, facts[:40], targets[:40], [bool(t) for t in targets[:40]], [1.0] * 40)
    odds, classes = head(facts[40:])
    bad = np.array([bool(t) for t in targets[40:]])
    assert odds[bad].mean() > odds[~bad].mean() + 1
    assert np.mean([int(c.argmax()) in t for c, t in zip(classes, targets[40:], strict=True) if t]) > 0.8
    again = EvidenceHead.of(names, head.tensors())
    assert np.allclose(again(facts[40:])[0], odds, atol=0.05)
