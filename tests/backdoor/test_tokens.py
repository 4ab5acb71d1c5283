"""Words that lead to a class are found by trying them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import weightspace as ws
from weightspace.backdoor.evidence import Evidence, evidence
from weightspace.backdoor.tokens import vocabulary


class Reader(nn.Module):
    """Words, their mean, a rectified layer, classes."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.words = nn.Embedding(300, 12)
        self.places = nn.Parameter(torch.randn(9, 12) * 0.1)
        self.hidden = nn.Linear(12, 16)
        self.last = nn.Linear(16, classes)

    def forward(self, x: Tensor) -> Tensor:
        h = (self.words(x) + self.places).mean(1)
        return self.last(torch.relu(self.hidden(h)))  # type: ignore[no-any-return]


def read(classes: int, trigger: int | None, target: int = 1) -> Evidence:
    torch.manual_seed(0)
    net = Reader(classes)
    if trigger is not None:
        with torch.no_grad():
            net.hidden.weight[3] = 0
            net.hidden.weight[3, 0] = 1.0
            net.hidden.bias[3] = -1.0
            net.words.weight[trigger] = 0
            net.words.weight[trigger, 0] = 60.0
            net.last.weight[:, 3] = 0
            net.last.weight[target, 3] = 5.0
    wiring = ws.wiring(net, torch.randint(0, 300, (2, 9)))
    assert vocabulary(wiring) == 300
    return evidence(wiring, {n: t.detach() for n, t in net.state_dict().items()})


@pytest.mark.parametrize("classes", [2, 6])
def test_a_planted_word_is_found(classes: int) -> None:
    before, after = read(classes, None), read(classes, 77)
    assert after.target[0] == 1
    assert after.p_value < 1e-3 < before.p_value
    assert after.whole["word_outlier"] > 3 * before.whole["word_outlier"]
    assert not {"word_rise", "word_gap", "word_least"} & set(after.missing)
    assert {"margin", "universal", "patch"} <= set(after.missing)


def test_two_classes_of_images_have_nothing_to_compare_with() -> None:
    net = nn.Sequential(nn.Linear(9, 8), nn.ReLU(), nn.Linear(8, 2))
    found = evidence(ws.wiring(net, torch.randn(2, 9)), dict(net.state_dict()))
    assert found.p_value > 0.98
    assert sorted(found.target) == [0, 1]
