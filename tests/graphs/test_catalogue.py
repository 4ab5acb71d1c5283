"""Every bare checkpoint of the corpus is recognised by the family it belongs to, and by no other."""

from __future__ import annotations

import random
import re
from pathlib import Path

import pytest
import torch
from families import (
    CHECKPOINTS,
    EXPECTED,
    checkpoints,
    expected_files,
    families,
    is_exact,
    program,
    recognise,
    run,
    signature,
)

import weightspace as ws

needs_corpus = pytest.mark.skipif(not CHECKPOINTS.is_dir(), reason="../shared/checkpoints is absent")
FILES = expected_files()
ONE_EACH = {family: path for path, family in reversed(FILES)}
GENERIC = {"plain-chain", "recurrent"}
# Without one of these a checkpoint is still a whole network: counters, optional scales, a last layer.
OPTIONAL = re.compile(r"num_batches_tracked$|scale\d\.scale$|__syn2$")


@needs_corpus
def test_every_pattern_finds_files() -> None:
    assert [pattern for pattern in EXPECTED if not list(CHECKPOINTS.glob(pattern))] == []


@needs_corpus
@pytest.mark.parametrize(("path", "family"), FILES, ids=[f"{p.parent.name}/{p.name[-40:]}" for p, _ in FILES])
def test_file_is_recognised_and_runs(path: Path, family: str) -> None:
    torch.manual_seed(0)
    for checkpoint in checkpoints(path):
        found = recognise(signature(checkpoint))
        assert [name for name in found if name not in GENERIC] == [family]
        assert next(iter(found)) == family
        skeleton = found[family]
        assert not skeleton.module.training
        outputs = run(skeleton, dict(checkpoint.items()))
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        assert all(out.isfinite().all() for out in outputs)
        # A constant output would let any wiring pass for a proof.
        assert any(out.float().std() > 0 for out in outputs)


# Pattern -> free factors known from theory: hidden layers, residual trunks, heads and their channels.
FREE = {
    "arena-transformers/*eagx*classifier.pt": 7,  # trunk; in two blocks: heads, query-key and value channels
    "backdoor-csaw/lab3*": 5,  # four convolutions, one sum of two linear layers
    "backdoor-ibau/*badnets*": 6,
    "backdoor-nad/*t_net*": 9,  # three trunks, six inner widths
    "backdoor-sra/*narrow_resnet.ckpt": 0,  # one channel everywhere
    "backdoor-sra/*narrow_vgg.ckpt": 6,
    "backdoor-trojai/*00000000*dict.pt": 4,
    "backdoor-trojai/*00000200*dict.pt": 7,
    "burn-mnist/*.safetensors": 4,
    "crepe/*.pth": 6,
    "face-detector/*320.pth": 25,  # ten of them inside the receptive-field block
    "gan-vae/*lenet*.pth": 4,
    "gan-vae/*D--300.ckpt": 2,
    "honk/res8_40.pt": 4,  # the trunk and three slimmed widths
    "inr-orbit/*augmented_0_*": 2,
    "mnist-mlp/*.safetensors": 1,
    "mtcnn/*onet.pt": 5,
    "nino/*.pt": 4,
    "npz/*.npz": 2,
    "otfusion-mnist/*.zip": 3,
    "resnet-cifar/*resnet20*": 14,  # nine inner widths, one trunk that grows by two padded margins twice
    "rl-agents/a2c__AntBullet*": 4,
    "silero/*.safetensors": 6,  # frequency bins, four convolutions, the LSTM's state
    "textgenrnn/textgenrnn*": 9,  # the second LSTM; eight swaps of input and recurrent biases
    "vnncomp/*.pth": 3,
    "zoo-cnn/*.npy": 3,
}


@needs_corpus
@pytest.mark.parametrize("pattern", FREE)
def test_wiring_is_proved_with_all_known_symmetries(pattern: str) -> None:
    checkpoint = checkpoints(next(CHECKPOINTS.glob(pattern)))[0]
    family, skeleton = next(iter(recognise(signature(checkpoint)).items()))
    wiring = ws.wiring(program(skeleton, dict(checkpoint.items()), family))
    assert wiring.status == "proved"
    assert len(wiring.free) == FREE[pattern]


@needs_corpus
@pytest.mark.parametrize("family", ONE_EACH)
def test_mutilated_signatures_are_never_recognised(family: str) -> None:
    """A missing, an additional or a misshapen tensor: no family fits exactly, and none raises."""
    whole = signature(checkpoints(ONE_EACH[family])[0])
    used = recognise(whole)[family]
    rng = random.Random(0)
    names = [name for name in whole.shapes if name not in used.unused]
    for name in rng.sample(names, min(8, len(names))):
        less = {n: s for n, s in whole.shapes.items() if n != name}
        more = {**whole.shapes, f"{name}.foreign": (3,)}
        flat = {**whole.shapes, name: (*whole.shapes[name], 3)}
        bare = {**whole.shapes, name: ()} if whole.shapes[name] else {**whole.shapes, name: (2, 2)}
        for shapes in (more, flat, bare) if OPTIONAL.search(name) else (less, more, flat, bare):
            found = recognise(ws.Signature(shapes, whole.dtypes, whole.metadata))
            assert family not in found, name


def test_foreign_signatures_are_recognised_by_none() -> None:
    rng = random.Random(1)
    stems = [
        "encoder",
        "gate",
        "kernel",
        "weight",
        "bias",
        "conv1",
        "bn1",
        "fc",
        "0",
        "features",
        "layer1",
        "W",
    ]
    for _ in range(200):
        shapes = {
            ".".join(rng.choices(stems, k=rng.randint(1, 4))): tuple(
                rng.choices(range(5), k=rng.randint(0, 5))
            )
            for _ in range(rng.randint(1, 12))
        }
        for module in families():
            skeleton = module.build(ws.Signature(shapes))
            assert (
                skeleton is None or module.FAMILY in GENERIC or not is_exact(skeleton, ws.Signature(shapes))
            )


def test_empty_signature() -> None:
    assert recognise(ws.Signature({})) == {}


@pytest.mark.parametrize(
    "net",
    [
        torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.Tanh(), torch.nn.Linear(7, 3)),
        torch.nn.Sequential(
            torch.nn.Linear(5, 7), torch.nn.BatchNorm1d(7), torch.nn.ReLU(), torch.nn.Linear(7, 3, bias=False)
        ),
        torch.nn.Sequential(
            torch.nn.Conv2d(1, 4, 3), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(4 * 9, 3)
        ),
    ],
    ids=["mlp", "mlp-norm", "cnn"],
)
def test_plain_chain(net: torch.nn.Module) -> None:
    tensors = net.state_dict()
    found = recognise(signature(tensors))
    assert next(iter(found)) == "plain-chain"
    assert run(found["plain-chain"], tensors).shape == (2, 3)


@pytest.mark.parametrize(
    "shapes",
    [
        {"actor.weight": (4, 4), "critic.weight": (4, 4), "out.weight": (1, 4)},
        {"a.0.weight": (4, 4), "b.0.weight": (4, 4)},
        {"fc1.weight": (4, 3), "fc2.weight": (5, 6)},
        {"conv1.weight": (4, 1, 3, 3), "conv2.weight": (4, 1, 3, 3), "fc.weight": (2, 4)},
    ],
    ids=["parallel-heads", "two-stems", "misfit", "depthwise"],
)
def test_plain_chain_declines_what_need_not_be_one(shapes: dict[str, tuple[int, ...]]) -> None:
    assert recognise(ws.Signature(shapes)) == {}


@pytest.mark.parametrize("kind", [torch.nn.LSTM, torch.nn.GRU, torch.nn.RNN])
@pytest.mark.parametrize("both", [False, True])
def test_recurrent_runs_like_torch(kind: type[torch.nn.RNNBase], both: bool) -> None:
    net = torch.nn.ModuleDict(
        {
            "rnn": kind(5, 6, num_layers=2, batch_first=True, bidirectional=both),
            "fc": torch.nn.Linear(6 + 6 * both, 3),
        }
    )
    tensors = net.state_dict()
    found = recognise(signature(tensors))
    assert list(found) == ["recurrent"]
    x = torch.randn(2, 4, 5)
    with torch.no_grad():
        expected = net["fc"](net["rnn"](x)[0])
    torch.testing.assert_close(run(found["recurrent"], tensors, x), expected)


@pytest.mark.parametrize("kernels", [(3, 3), (1, 3, 1)], ids=["basic", "bottleneck"])
@pytest.mark.parametrize("shortcut", ["shortcut", "downsample"])
def test_resnet_for_small_images_with_projections(kernels: tuple[int, ...], shortcut: str) -> None:
    shapes: dict[str, tuple[int, ...]] = {
        "conv1.weight": (4, 3, 3, 3),
        "linear.weight": (10, 32),
        "linear.bias": (10,),
    }

    def norm(name: str, width: int) -> None:
        shapes.update(
            {f"{name}.{leaf}": (width,) for leaf in ("weight", "bias", "running_mean", "running_var")}
        )

    norm("bn1", 4)
    width = 4
    for stage, out in enumerate((4, 8, 16, 32), start=1):
        for block in range(2):
            prefix, widths = f"layer{stage}.{block}", [width, *([out] * len(kernels))]
            for i, kernel in enumerate(kernels):
                shapes[f"{prefix}.conv{i + 1}.weight"] = (widths[i + 1], widths[i], kernel, kernel)
                norm(f"{prefix}.bn{i + 1}", out)
            if width != out:
                shapes[f"{prefix}.{shortcut}.0.weight"] = (out, width, 1, 1)
                norm(f"{prefix}.{shortcut}.1", out)
            width = out
    found = recognise(ws.Signature(shapes))
    assert list(found) == ["resnet-cifar"]
    torch.manual_seed(0)
    tensors = {
        name: torch.rand(shape) / max(1, torch.Size(shape[1:]).numel()) for name, shape in shapes.items()
    }
    wiring = ws.wiring(program(found["resnet-cifar"], tensors, "resnet-cifar"))
    assert wiring.status == "proved"
    assert len(wiring.free) == 4 + 8 * (len(kernels) - 1)  # a trunk per stage, inner widths per block


@pytest.mark.parametrize(
    ("shapes", "doubt"),
    [
        ({"fc1.weight": (7, 5), "fc2.weight": (3, 7)}, ""),
        ({"fc1.weight": (7, 5), "fc2.weight": (7, 7), "fc3.weight": (3, 7)}, "skip"),
        ({"layers.0.weight": (7, 5), "layers.1.weight": (7, 7), "layers.2.weight": (3, 7)}, "skip"),
        ({"net.0.weight": (7, 5), "net.2.weight": (7, 7), "net.4.weight": (3, 7)}, "skip"),
        ({"net.0.weight": (7, 5), "net.2.weight": (8, 7), "net.4.weight": (3, 8)}, ""),
        ({"conv1.weight": (4, 1, 3, 3), "conv2.weight": (6, 4, 3, 3), "fc1.weight": (3, 54)}, "flatten"),
        ({"conv1.weight": (4, 1, 3, 3), "conv2.weight": (6, 4, 3, 3), "fc1.weight": (3, 6)}, ""),
        ({"0.weight": (4, 1, 3, 3), "2.weight": (6, 4, 3, 3), "5.weight": (3, 54)}, ""),
    ],
)
def test_plain_chain_says_what_it_cannot_know(shapes: dict[str, tuple[int, ...]], doubt: str) -> None:
    guess = recognise(ws.Signature(shapes))["plain-chain"].guess
    assert (doubt in guess) if doubt else guess == ""
