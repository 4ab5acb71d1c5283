"""The skeletons compute the true functions: accuracies on real data, equality with ONNX twins.

The CIFAR-10 images of the corpus are JPEG-compressed, which costs nets trained on the originals some ten
points (ResNet-20: 91.8 % on the originals, about 80 % here); a wrong shortcut or norm costs all of them.
"""

from __future__ import annotations

import functools
import io
from pathlib import Path

import pytest
import torch
from families import CHECKPOINTS, SHARED, load, run
from torch import Tensor
from torch.nn import functional as F

pytestmark = pytest.mark.skipif(not CHECKPOINTS.is_dir(), reason="../shared is absent")


@functools.cache
def images(name: str, count: int = 200) -> tuple[Tensor, Tensor]:
    """Every n-th test image in [0, 1], (count, channels, height, width), and the labels."""
    parquet = pytest.importorskip("pyarrow.parquet", reason="pyarrow reads the images (extra: data)")
    image = pytest.importorskip("PIL.Image", reason="pillow decodes the images (extra: data)")
    numpy = pytest.importorskip("numpy")
    table = parquet.read_table(SHARED / "data" / f"{name}-test.parquet")
    rows = table.take(list(range(0, table.num_rows, table.num_rows // count))).to_pydict()
    arrays = [numpy.asarray(image.open(io.BytesIO(data))) for data in rows["image"]]
    x = torch.from_numpy(numpy.stack(arrays)).float() / 255
    return (x[:, None] if x.dim() == 3 else x.permute(0, 3, 1, 2)), torch.tensor(rows["label"])


def accuracy(path: Path, x: Tensor, labels: Tensor) -> float:
    skeleton, tensors = load(path)
    return float((run(skeleton, tensors, x).argmax(dim=1) == labels).float().mean())


def standard(x: Tensor, mean: list[float], std: list[float]) -> Tensor:
    return (x - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]


IMAGENET = ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
CIFAR = {
    # pattern: (statistics the net was trained with or None, least accuracy)
    "resnet-cifar/*resnet20*": (IMAGENET, 0.72),
    "backdoor-ibau/*badnets*": (None, 0.68),
    "backdoor-ibau/*l0_inv*": (None, 0.68),
    "backdoor-nad/*t_net*": (None, 0.70),
    "backdoor-nad/*s_net*": (None, 0.70),
    "vnncomp/*.pth": (([0.485, 0.456, 0.406], [0.225] * 3), 0.5),
}


@pytest.mark.parametrize("pattern", CIFAR)
def test_cifar10(pattern: str) -> None:
    statistics, least = CIFAR[pattern]
    x, labels = images("cifar10")
    x = x if statistics is None else standard(x, *statistics)
    assert accuracy(next(CHECKPOINTS.glob(pattern)), x, labels) >= least


def test_small_cnn_zoo_on_grey_cifar10() -> None:
    x, labels = images("cifar10")
    grey = (x * torch.tensor([0.299, 0.587, 0.114])[:, None, None]).sum(dim=1, keepdim=True) * 2 - 1
    assert accuracy(next(CHECKPOINTS.glob("zoo-cnn/*.npy")), grey, labels) >= 0.4


MNIST = ([0.1307], [0.3081])


@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
def test_burn_mnist(suffix: str) -> None:
    x, labels = images("mnist")
    path = next(CHECKPOINTS.glob(f"burn-mnist/*.{suffix}"))
    assert accuracy(path, standard(x, *MNIST), labels) >= 0.96


def test_lenet5() -> None:
    x, labels = images("mnist")
    x = standard(F.interpolate(x, size=(32, 32), mode="bilinear"), *MNIST)
    assert accuracy(next(CHECKPOINTS.glob("gan-vae/*lenet*")), x, labels) >= 0.96


def test_tinygrad_mlp() -> None:
    x, labels = images("mnist")
    assert accuracy(next(CHECKPOINTS.glob("mnist-mlp/*")), x.flatten(1), labels) >= 0.85


def test_numpy_mlp() -> None:
    x, labels = images("mnist", 400)
    x = x.flatten(1).double() * 255 / 256
    assert accuracy(next(CHECKPOINTS.glob("npz/*")), x - x.mean(0), labels) >= 0.95


def test_palindromes() -> None:
    """The classifiers say at the last position whether 20 digits between two marks are a palindrome."""
    torch.manual_seed(0)
    half = torch.randint(31, (100, 10))
    digits = torch.cat((torch.cat((half, half.flip(1)), 1), torch.randint(31, (100, 20))))
    tokens = torch.cat((torch.full((200, 1), 31), digits, torch.full((200, 1), 32)), dim=1)
    labels = torch.arange(200) < 100
    for path in CHECKPOINTS.glob("arena-transformers/*palindrome*"):
        skeleton, tensors = load(path)
        said = run(skeleton, tensors, tokens)[:, -1].argmax(dim=1).bool()
        assert (said == labels).float().mean() >= 0.95, path.name


def test_brackets() -> None:
    """The classifier says at the first position whether a string of 40 brackets is balanced."""
    torch.manual_seed(0)
    rows, labels = [], []
    for i in range(200):
        depth, row = 0, []
        for left in range(40, 0, -1):
            opens = depth == 0 or (depth < left and torch.rand(()) < 0.5)
            row.append(3 if opens else 4)
            depth += 1 if opens else -1
        balanced = i % 2 == 0
        if not balanced:
            row = row[1:] + row[:1]  # closes before it opens, or ends open
            level = torch.tensor([1 if bracket == 3 else -1 for bracket in row]).cumsum(0)
            balanced = bool((level >= 0).all())
        rows.append([0, *row, 2])
        labels.append(balanced)
    skeleton, tensors = load(next(CHECKPOINTS.glob("arena-transformers/*brackets*")))
    said = run(skeleton, tensors, torch.tensor(rows))[:, 0].argmax(dim=1).bool()
    assert (said == torch.tensor(labels)).float().mean() >= 0.95


def test_symmetry_copies_of_the_siren_draw_one_image() -> None:
    y, x = torch.meshgrid(torch.linspace(-1, 1, 28), torch.linspace(-1, 1, 28), indexing="ij")
    points = torch.stack((y, x), dim=-1).reshape(-1, 2)
    drawn = torch.stack(
        [run(*load(path), points) for path in sorted(CHECKPOINTS.glob("inr-orbit/*.pth"))[::32]]
    )
    assert drawn.std(dim=0).max() < 1e-4
    assert drawn[0].max() > 0.9
    assert drawn[0].median() < 0.2


def test_textgenrnn_predicts_english() -> None:
    """Half of the next characters of plain text; reading the CuDNN kernels untransposed gives none."""
    numbers = [5, 14, 7, 2, 4, 8, 9, 17, 10, 15, 28, 35, 24, 32, 25, 31, 30, 11, 41, 22, 55, 13, 48]
    codes = dict(zip(" eitsnaolrhdcupmgyfwbvk", numbers, strict=True))
    text = "the people of the world want to see more of this and they will come back to the same place again"
    ids = [464, *(codes[c] for c in text)]
    windows = torch.tensor([([0] * 40 + ids[:i])[-40:] for i in range(8, len(ids))])
    skeleton, tensors = load(CHECKPOINTS / "textgenrnn" / "textgenrnn__textgenrnn_weights.hdf5")
    said = run(skeleton, tensors, windows).argmax(dim=1)
    assert (said == torch.tensor(ids[8:])).float().mean() >= 0.4


def test_face_detector_equals_its_onnx_twin() -> None:
    runtime = pytest.importorskip("onnxruntime")
    skeleton, tensors = load(next(CHECKPOINTS.glob("face-detector/*RFB-320.pth")))
    torch.manual_seed(0)
    x = torch.randn(1, 3, 240, 320)
    session = _session(runtime, next(CHECKPOINTS.glob("face-detector/*.onnx")))
    for ours, theirs in zip(run(skeleton, tensors, x), session.run(None, {"input": x.numpy()}), strict=True):
        torch.testing.assert_close(ours, torch.from_numpy(theirs), rtol=1e-4, atol=1e-4)


def test_certified_net_equals_its_onnx_twin() -> None:
    runtime = pytest.importorskip("onnxruntime")
    skeleton, tensors = load(next(CHECKPOINTS.glob("vnncomp/*.pth")))
    torch.manual_seed(0)
    x = torch.randn(1, 3, 32, 32)
    theirs = _session(runtime, next(CHECKPOINTS.glob("vnncomp/*kw.onnx"))).run(None, {"input.1": x.numpy()})
    torch.testing.assert_close(run(skeleton, tensors, x), torch.from_numpy(theirs[0]), rtol=1e-4, atol=1e-4)


def test_silero_equals_its_onnx_twin() -> None:
    """With the twin's own weights: the two files of the corpus are different trainings."""
    runtime = pytest.importorskip("onnxruntime")
    onnx = pytest.importorskip("onnx")
    path = next(CHECKPOINTS.glob("silero/*.onnx"))
    named = {i.name: torch.tensor(onnx.numpy_helper.to_array(i)) for i in onnx.load(path).graph.initializer}
    tensors = {"stft_conv.weight": named["model.stft.forward_basis_buffer"]}
    for kind in ("weight", "bias"):
        for i in range(4):
            tensors[f"conv{i + 1}.{kind}"] = named[f"model.encoder.{i}.reparam_conv.{kind}"]
        for side in ("ih", "hh"):
            tensors[f"lstm_cell.{kind}_{side}"] = named[f"model.decoder.rnn.{kind}_{side}"]
        tensors[f"final_conv.{kind}"] = named[f"model.decoder.decoder.2.{kind}"]
    skeleton, _ = load(next(CHECKPOINTS.glob("silero/*.safetensors")))
    torch.manual_seed(0)
    audio = torch.randn(2, 3, 576) * 0.1
    session, state, theirs = _session(runtime, path), torch.zeros(2, 2, 128).numpy(), []
    for i in range(3):
        feed = {"input": audio[:, i].numpy(), "state": state, "sr": torch.tensor(16000).numpy()}
        speech, state = session.run(None, feed)
        theirs.append(torch.from_numpy(speech))
    torch.testing.assert_close(run(skeleton, tensors, audio), torch.cat(theirs, dim=1), rtol=1e-4, atol=1e-5)


def _session(runtime: object, path: Path) -> object:
    options = runtime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    return runtime.InferenceSession(str(path), options)
