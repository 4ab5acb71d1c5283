"""Evidence of a backdoor from weights and program: found where it was planted, blind to symmetries, never NaN."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import weightspace as ws
from weightspace.backdoor.differences import CHANGE_TESTS
from weightspace.backdoor.evidence import CLASS_TESTS, evidence
from weightspace.backdoor.outputs import NoClassesError, class_axis
from weightspace.backdoor.tokens import TOKEN_TESTS
from weightspace.errors import UnprovedWiringError, WeightspaceError
from weightspace.wiring import Wiring


class Net(nn.Module):
    """A small network of images with a batch norm."""

    def __init__(self, classes: int = 6) -> None:
        super().__init__()
        self.first = nn.Conv2d(1, 12, 3, padding=1)
        self.norm = nn.BatchNorm2d(12)
        self.second = nn.Conv2d(12, 16, 3, stride=2, padding=1)
        self.last = nn.Linear(16, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.first(x)))
        return self.last(torch.relu(self.second(x)).mean((2, 3)))  # type: ignore[no-any-return]


def made(seed: int = 0, classes: int = 6) -> tuple[Wiring, dict[str, Tensor]]:
    torch.manual_seed(seed)
    net = Net(classes).eval()
    net.norm.running_var.uniform_(0.5, 2)
    net.norm.weight.data.uniform_(0.5, 2)
    wiring = ws.wiring(net, torch.randn(2, 1, 10, 10))
    return wiring, {n: t.detach().clone() for n, t in net.state_dict().items()}


def planted(tensors: dict[str, Tensor], target: int) -> dict[str, Tensor]:
    """A path of one channel through the network that nothing else reads and that shouts for one class."""
    out = {n: t.clone() for n, t in tensors.items()}
    for name in ("first.weight", "second.weight"):
        out[name][0] = 0
    out["second.weight"][:, 0] = 0
    out["first.weight"][0, 0] = 1.0
    out["second.weight"][0, 0] = 1.0
    out["second.bias"][0] = -1.0
    out["last.weight"][:, 0] = 0
    out["last.weight"][target, 0] = 10.0
    return out


def test_class_axis_of_a_network() -> None:
    wiring, tensors = made()
    axis = class_axis(wiring, tensors)
    assert (axis.classes, [r.tensor for r in axis.weights], [r.tensor for r in axis.shifts]) == (
        6, ["last.weight"], ["last.bias"],
    )  # fmt: skip
    assert torch.equal(axis.rows(tensors), tensors["last.weight"].double())
    assert torch.equal(axis.bias(tensors), tensors["last.bias"].double())


def test_class_axis_of_a_transposed_weight() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(5, 7), nn.Parameter(torch.randn(7, 4))

        def forward(self, x: Tensor) -> Tensor:
            return (torch.relu(self.a(x)) @ self.b).softmax(-1)

    net = Net()
    wiring, tensors = ws.wiring(net, torch.randn(2, 5)), dict(net.state_dict())
    axis = class_axis(wiring, tensors)
    assert torch.equal(axis.rows(tensors), tensors["b"].double().T)
    assert axis.probabilities
    assert axis.classes == 4


@pytest.mark.parametrize(
    ("net", "shape"),
    [
        (nn.Sequential(nn.Linear(20, 8), nn.ReLU(), nn.Linear(8, 20)), (2, 20)),  # a reconstruction
        (nn.Sequential(nn.Linear(20, 8), nn.ReLU(), nn.Linear(8, 1)), (2, 20)),  # one number
        (nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 3, 1)), (2, 1, 8, 8)),  # a class for each pixel
    ],
)
def test_outputs_that_are_no_classes_are_refused(net: nn.Module, shape: tuple[int, ...]) -> None:
    with pytest.raises(NoClassesError, match=r"expected|reconstruction"):
        class_axis(ws.wiring(net, torch.randn(shape)), dict(net.state_dict()))


def test_a_wiring_that_is_not_proved_is_refused() -> None:
    wiring, tensors = made()
    with pytest.raises(UnprovedWiringError, match="unverified"):
        evidence(wiring.with_(status="unverified"), tensors)


def test_weights_that_are_not_finite_are_refused() -> None:
    wiring, tensors = made()
    tensors["second.weight"][0, 0, 0, 0] = float("nan")
    with pytest.raises(WeightspaceError, match=r"1 of .* 'second.weight'"):
        evidence(wiring, tensors)


def test_a_planted_path_is_found() -> None:
    wiring, tensors = made()
    before, after = evidence(wiring, tensors), evidence(wiring, planted(tensors, 3))
    assert after.target[0] == 3
    assert after.p_value < 0.02 < before.p_value
    assert after.whole["channel_isolation"] > before.whole["channel_isolation"]
    for name in ("first", "second"):
        scores = after.channels["isolation"][name]
        assert int(scores.argmax()) == 0


@pytest.mark.parametrize("scale", [0.0, 1e-12, 1e12])
def test_no_weights_give_nan(scale: float) -> None:
    wiring, tensors = made()
    scaled = {n: t * scale if t.is_floating_point() else t for n, t in tensors.items()}
    found = evidence(wiring, scaled)
    assert bool((abs(found.classes) <= 1e3).all())
    assert all(0 < p <= 1 for p in (found.p_value, *found.p_values.values()))


def test_columns_are_the_same_for_every_network() -> None:
    wiring, tensors = made()
    found = evidence(wiring, tensors)
    assert found.names == CLASS_TESTS
    assert found.classes.shape == (6, len(CLASS_TESTS))
    assert set(found.missing) == {*TOKEN_TESTS, *CHANGE_TESTS}
    assert not set(found.p_values) & set(found.missing)


def test_what_was_trained_into_one_channel_stands_out_against_the_base() -> None:
    wiring, base = made()
    changed = {n: t + 0.01 * torch.randn(t.shape) if t.is_floating_point() else t for n, t in base.items()}
    changed["second.weight"][5] += 0.5
    changed["last.weight"][2, 5] += 2.0
    found = evidence(wiring, changed, base=base)
    assert int(found.channels["change"]["second"].argmax()) == 5
    for name in ("change_norm", "change_leading"):
        assert int(found.classes[:, found.names.index(name)].argmax()) == 2
    siblings = [{n: t + 0.01 * torch.randn(t.shape) if t.is_floating_point() else t for n, t in base.items()}] * 3
    among = evidence(wiring, changed, siblings=siblings)
    assert int(among.channels["change"]["second"].argmax()) == 5


def test_a_base_of_another_shape_is_refused() -> None:
    wiring, tensors = made()
    _, other = made(classes=7)
    with pytest.raises(WeightspaceError, match=r"'last.weight'.*aligned"):
        evidence(wiring, tensors, base=other)
