"""Training in stacks: the same as one by one, and each run's own."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch

from weightspace.errors import ZooError
from weightspace.zoo.data import Data, DataSpec, load_data
from weightspace.zoo.description import module_of
from weightspace.zoo.sampling import Run, describe
from weightspace.zoo.stacked import INITIALISERS, Snapshot, initial_state, train_stack

NETWORKS: dict[str, dict[str, Any]] = {
    "mlp": {"kind": "mlp", "widths": [6], "activation": "tanh"},
    "cnn": {"kind": "cnn", "channels": [4, 4], "activation": "relu"},
    "cnn-batch": {
        "kind": "cnn", "channels": [4, 4], "activation": "gelu", "norm": "batch", "residuals": [False, True],
        "same": True,
    },
    "resnet": {"kind": "resnet", "channels": [4], "activation": "relu"},
    "vit": {
        "kind": "vit", "patch": 4, "dim": 8, "depth": 1, "heads": 2, "hidden": 8, "activation": "gelu",
    },
}  # fmt: skip
SMALL = DataSpec("digits", train=64, test=40)


def _runs(network: Mapping[str, Any], **hyper: Any) -> list[Run]:
    full = describe(network, (1, 8, 8), 10)
    settings = [
        {"optimiser": "sgd", "learning_rate": 0.02, "dropout": 0.3},
        {"optimiser": "adam", "learning_rate": 0.01, "dropout": 0.0, "weight_decay": 0.01},
        {"optimiser": "rmsprop", "learning_rate": 0.003, "dropout": 0.5, "initialiser": "orthogonal"},
        {"optimiser": "adam", "learning_rate": 0.002, "initialiser": "he_normal"},
    ]
    return [
        Run("r", "p", i, full, {**chosen, **hyper}, SMALL, epochs=2, batch=16, checkpoints=(0, 1, 2))
        for i, chosen in enumerate(settings)
    ]


def _by_name(snapshots: list[Snapshot]) -> dict[tuple[str, int], Snapshot]:
    return {(s.run.name, s.epoch): s for s in snapshots}


@pytest.fixture(scope="module")
def data() -> Data:
    return load_data(SMALL)


@pytest.fixture
def _double() -> Iterator[None]:
    """Weights of float64: parameters without influence (a bias before a norm) have a gradient of mere rounding, which
    an adaptive step would blow up."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.usefixtures("_double")
@pytest.mark.parametrize("name", NETWORKS)
def test_a_stack_gives_what_one_by_one_gives(name: str, data: Data) -> None:
    data = replace(data, train_x=data.train_x.double(), test_x=data.test_x.double())
    runs = _runs(NETWORKS[name])
    together = _by_name(list(train_stack(runs, data)))
    alone = _by_name([s for run in runs for s in train_stack([run], data)])
    assert set(together) == set(alone)
    for key, one in alone.items():
        stacked = together[key]
        assert list(stacked.tensors) == list(module_of(one.run.network)[0].state_dict())
        for tensor, value in one.tensors.items():
            assert torch.allclose(stacked.tensors[tensor], value, rtol=1e-6, atol=1e-7), (key, tensor)
        assert stacked.test_loss == pytest.approx(one.test_loss, rel=1e-6)
    moved = together[runs[0].name, 0].tensors["output.weight"] - together[runs[0].name, 2].tensors["output.weight"]
    assert float(moved.abs().max()) > 1e-4


@pytest.mark.parametrize(
    ("optimiser", "reference"),
    [
        ("adam", lambda p: torch.optim.Adam(p, lr=0.01, weight_decay=0.02)),
        ("rmsprop", lambda p: torch.optim.RMSprop(p, lr=0.01, weight_decay=0.02)),
        ("sgd", lambda p: torch.optim.SGD(p, lr=0.01, weight_decay=0.02, momentum=0.9)),
    ],
)
def test_optimisers_are_those_of_torch(optimiser: str, reference: Any, data: Data) -> None:
    hyper = {"optimiser": optimiser, "learning_rate": 0.01, "weight_decay": 0.02, "dropout": 0.0}
    run = replace(_runs(NETWORKS["mlp"], **hyper)[1], epochs=3, checkpoints=(3,), batch=64)
    (found,) = train_stack([run], data)
    module, _ = module_of(run.network)
    module.load_state_dict(initial_state(run))
    steps = reference(module.parameters())
    for _ in range(3):  # the batch is all there is, so its order does not matter
        steps.zero_grad()
        torch.nn.functional.cross_entropy(module(data.train_x), data.train_y).backward()
        steps.step()
    for name, value in module.state_dict().items():
        assert torch.allclose(found.tensors[name], value, atol=2e-5), name


def test_accuracy_and_loss_are_those_of_the_network(data: Data) -> None:
    run = _runs(NETWORKS["cnn-batch"])[1]
    *_, last = train_stack([run], data)
    module, _ = module_of(run.network)
    module.load_state_dict(last.tensors)
    with torch.no_grad():
        logits = module.eval()(data.test_x)
    assert last.test_accuracy == pytest.approx(float((logits.argmax(1) == data.test_y).double().mean()))
    assert last.test_loss == pytest.approx(float(torch.nn.functional.cross_entropy(logits, data.test_y)), rel=1e-4)


def test_one_network_that_diverges_leaves_the_others_alone(data: Data) -> None:
    runs = _runs(NETWORKS["cnn"])
    wild = [runs[0], replace(runs[1], hyper={"learning_rate": 1e30}), *runs[2:]]
    calm, stormy = _by_name(list(train_stack(runs, data))), _by_name(list(train_stack(wild, data)))
    assert stormy[runs[1].name, 2].diverged
    for i in (0, 2, 3):
        key = (runs[i].name, 2)
        assert not stormy[key].diverged
        assert torch.allclose(stormy[key].tensors["output.weight"], calm[key].tensors["output.weight"], atol=1e-4)


def test_a_fraction_of_the_data_is_a_fraction(data: Data) -> None:
    run = replace(_runs(NETWORKS["mlp"])[1], hyper={"train_fraction": 0.25, "learning_rate": 0.05}, epochs=60)
    *_, last = train_stack([replace(run, checkpoints=(60,))], data)
    assert last.train_accuracy == 1.0  # of the 16 examples it has seen
    assert last.test_accuracy is not None
    assert last.test_accuracy < 1


def test_sirens_fit_their_own_images() -> None:
    data = load_data("digits")
    network = describe({"kind": "siren", "widths": [24, 24], "omega": 10.0}, data.shape, data.classes)
    hyper = {"initialiser": "siren", "learning_rate": 3e-3}
    runs = [Run("r", "p", i, network, hyper, DataSpec("digits"), 150, 64, (150,), part="test") for i in range(3)]
    snapshots = list(train_stack(runs, data))
    assert [s.label for s in snapshots] == data.test_y[:3].tolist()
    grid = torch.cartesian_prod(torch.linspace(-1, 1, 8), torch.linspace(-1, 1, 8))
    for i, snapshot in enumerate(snapshots):
        module, _ = module_of(network)
        module.load_state_dict(snapshot.tensors)
        with torch.no_grad():
            image = module(grid).reshape(8, 8)
        errors = [(image - data.test_x[j, 0]).square().mean().item() for j in range(3)]
        assert errors[i] == pytest.approx(snapshot.test_loss, rel=1e-3)
        assert errors[i] < 0.01 < min(errors[:i] + errors[i + 1 :])
        assert snapshot.test_accuracy is None


def test_text(data: Data) -> None:
    tokens = torch.arange(40 * 12).reshape(40, 12) % 5
    text = Data(tokens, (tokens + 1) % 5, tokens[:10], (tokens[:10] + 1) % 5)
    table = {"kind": "gpt", "dim": 8, "depth": 1, "heads": 2, "hidden": 16, "activation": "gelu"}
    network = describe(table, text.shape, text.classes)
    runs = [Run("r", "p", i, network, {"learning_rate": 0.02}, SMALL, 8, 10, (0, 8)) for i in range(2)]
    snapshots = _by_name(list(train_stack(runs, text)))
    for run in runs:
        before, after = snapshots[run.name, 0], snapshots[run.name, 8]
        assert before.test_accuracy is not None
        assert before.test_accuracy < 0.7
        assert after.test_accuracy == 1.0


@pytest.mark.parametrize("initialiser", INITIALISERS)
def test_initialisers(initialiser: str) -> None:
    table = {"kind": "siren", "widths": [64, 64], "omega": 30.0} if initialiser == "siren" else {
        "kind": "mlp", "widths": [64, 64], "activation": "relu",
    }  # fmt: skip
    network = describe(table, (1, 8, 8), 10)
    run = Run("r", "p", 3, network, {"initialiser": initialiser, "init_std": 0.03}, SMALL, 1, 1, (1,))
    state = initial_state(run)
    assert all(torch.equal(state[n], t) for n, t in initial_state(run).items())
    other = initial_state(replace(run, index=4))
    assert not torch.equal(state["hidden.1.weight"], other["hidden.1.weight"])
    w = state["hidden.1.weight"]
    if initialiser == "orthogonal":
        assert torch.allclose(w @ w.T, torch.eye(64), atol=1e-5)
        return
    expected = {
        "default": (1 / 3 / 64) ** 0.5, "xavier_normal": (2 / 128) ** 0.5, "xavier_uniform": (2 / 128) ** 0.5,
        "he_normal": (2 / 64) ** 0.5, "normal": 0.03, "truncated_normal": 0.03 * 0.88, "siren": (2 / 64) ** 0.5 / 30,
    }[initialiser]  # fmt: skip
    assert float(w.std()) == pytest.approx(expected, rel=0.06)
    if initialiser not in ("default", "siren"):
        assert float(state["hidden.1.bias"].abs().max()) == 0


@pytest.mark.parametrize(
    ("hyper", "message"),
    [
        ({"optimiser": "lion"}, "optimiser 'lion'"),
        ({"initialiser": "ones"}, "initialiser 'ones'"),
        ({"dropout": 1.0}, "dropout"),
        ({"train_fraction": 0.0}, "train_fraction"),
        ({"learning_rate": "fast"}, "expected a number"),
    ],
)
def test_hyper_parameters_that_are_not_known_are_named(hyper: dict[str, Any], message: str, data: Data) -> None:
    with pytest.raises(ZooError, match=message):
        list(train_stack([replace(_runs(NETWORKS["mlp"])[0], hyper=hyper)], data))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_cuda_gives_what_the_cpu_gives(data: Data) -> None:
    runs = _runs(NETWORKS["cnn"])
    there, here = _by_name(list(train_stack(runs, data, device="cuda"))), _by_name(list(train_stack(runs, data)))
    for key, snapshot in here.items():
        assert there[key].test_loss == pytest.approx(snapshot.test_loss, rel=0.05)
