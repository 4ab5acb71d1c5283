"""Every format gives back what its own library wrote, under a name that says nothing about the format."""

from __future__ import annotations

import importlib.util
import json
import os
import pickle
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import weightspace as ws
from tests.checkpoint import fixtures
from weightspace.checkpoint import SeveralModelsError, from_tensors, list_models
from weightspace.errors import CheckpointError


@pytest.mark.parametrize("name", fixtures.FORMATS)
def test_content_decides_and_values_are_exact(name: str, tmp_path: Path) -> None:
    if name not in fixtures.available():
        pytest.skip(f"the package {fixtures.FORMATS[name][3]} is not installed")
    path, expected = fixtures.write(name, tmp_path)
    nameless = path.rename(tmp_path / "without_a_suffix")
    checkpoint = ws.open(nameless)
    assert checkpoint.format == fixtures.FORMATS[name][0]
    assert list(checkpoint) == list(expected)
    for key, value in expected.items():
        assert checkpoint.shape(key) == tuple(value.shape)
        assert checkpoint.dtype(key) == value.dtype == checkpoint[key].dtype
        torch.testing.assert_close(checkpoint[key], value, rtol=0, atol=0)
    assert checkpoint.num_parameters == sum(value.numel() for value in expected.values())
    assert checkpoint.nbytes == sum(value.nbytes for value in expected.values())
    assert list_models(nameless) == [str(nameless)]


def test_metadata_and_optimiser_are_beside_the_mapping(tmp_path: Path) -> None:
    path, _ = fixtures.write("pytorch_zip", tmp_path)
    checkpoint = ws.open(path)
    assert checkpoint.metadata["epoch"] == 3
    assert checkpoint.metadata["key"] == "state_dict"
    optimiser = nn.Linear(2, 2)
    adam = torch.optim.Adam(optimiser.parameters())
    optimiser(torch.ones(1, 2)).sum().backward()
    adam.step()
    torch.save({"net": optimiser.state_dict(), "opt": adam.state_dict(), "lr": 0.1, "best": torch.tensor(0.5)}, path)
    checkpoint = ws.open(path)
    assert list(checkpoint) == ["weight", "bias"]
    assert checkpoint.metadata["optimizer"]["opt"]["tensors"] == 6
    assert checkpoint.metadata["lr"] == 0.1
    assert any("training state" in f for f in checkpoint.findings)
    assert any("'best'" in f for f in checkpoint.findings)
    inner = ws.open(path, key="opt.state.0")
    assert list(inner) == ["step", "exp_avg", "exp_avg_sq"]
    with pytest.raises(CheckpointError, match="no 'nothing'"):
        ws.open(path, key="nothing")


def test_several_networks_keep_their_prefixes(tmp_path: Path) -> None:
    a, b = nn.Linear(2, 3), nn.Linear(3, 2)
    torch.save({"generator": a.state_dict(), "critic": b.state_dict(), "epoch": 1}, tmp_path / "gan.pt")
    checkpoint = ws.open(tmp_path / "gan.pt")
    assert list(checkpoint) == ["generator.weight", "generator.bias", "critic.weight", "critic.bias"]
    assert checkpoint.metadata["epoch"] == 1


def test_wrappers_are_stripped_only_from_all(tmp_path: Path) -> None:
    torch.save({"module.a": torch.ones(1), "module.b": torch.ones(2)}, tmp_path / "all.pt")
    checkpoint = ws.open(tmp_path / "all.pt")
    assert list(checkpoint) == ["a", "b"]
    assert any("module." in f for f in checkpoint.findings)
    torch.save({"module.a": torch.ones(1), "b": torch.ones(2)}, tmp_path / "some.pt")
    checkpoint = ws.open(tmp_path / "some.pt")
    assert list(checkpoint) == ["module.a", "b"]
    assert any("kept as they are" in f for f in checkpoint.findings)


def test_whole_module_of_a_class_that_is_gone(tmp_path: Path) -> None:
    script = tmp_path / "elsewhere.py"
    script.write_text(
        "import torch\nfrom torch import nn\n"
        "class Gone(nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.body = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2))\n"
        "        self.tied = nn.Linear(2, 2)\n"
        "        self.again = self.tied\n"
        "        self.plain = torch.ones(3)\n"
        "if __name__ == '__main__':\n"
        "    import elsewhere\n"
        "    net = elsewhere.Gone()\n"
        "    torch.save({'model': net, 'epoch': 4}, 'gone.pt')\n"
        "    torch.save({'model': net}, 'old.pt', _use_new_zipfile_serialization=False)\n"
        "    torch.save(net.state_dict(), 'state.pt')\n"
    )
    subprocess.run([sys.executable, "-W", "ignore", script], cwd=tmp_path, check=True)
    state = ws.open(tmp_path / "state.pt")
    for name in ("gone.pt", "old.pt"):
        checkpoint = ws.open(tmp_path / name)
        assert list(checkpoint) == list(state)
        assert checkpoint.content_hash() == state.content_hash()
        assert any("elsewhere.Gone" in f for f in checkpoint.findings)
        assert any("plain" in f for f in checkpoint.findings)
        assert any(f.startswith("tied:") for f in checkpoint.findings)
    assert "elsewhere" not in sys.modules


@pytest.mark.parametrize("legacy", [False, True])
def test_kinds_of_torch_tensors(tmp_path: Path, legacy: bool) -> None:
    base = torch.arange(24, dtype=torch.float32).reshape(4, 6)
    scales, zeros = torch.tensor([0.1, 0.2, 0.3, 0.4]), torch.tensor([0, 1, 2, 3])
    values = {
        "slice": base[1:3, ::2],
        "transposed": base.T,
        "expanded": torch.tensor([1.5]).expand(5),
        "parameter": nn.Parameter(base.clone()),
        "empty": torch.zeros(0, 3),
        "bool": torch.tensor([True, False]),
        "complex": torch.tensor([1 + 2j]),
        "half": base.half(),
        "bfloat": base.bfloat16(),
        "float8": base.to(torch.float8_e4m3fn),
        "uint16": torch.tensor([1, 65535], dtype=torch.uint16),
        "sparse": torch.eye(3).to_sparse(),
        "quantised": torch.quantize_per_tensor(base, 0.5, 3, torch.quint8),
        "channels": torch.quantize_per_channel(base, scales, zeros, 0, torch.qint8),
    }
    if legacy:
        values.pop("uint16")
        values.pop("float8")
    torch.save(values, tmp_path / "a.pt", _use_new_zipfile_serialization=not legacy)
    checkpoint = ws.open(tmp_path / "a.pt")
    assert list(checkpoint) == list(values)
    for name, value in values.items():
        value = value.detach()
        plain = value.dequantize() if value.is_quantized else value.to_dense() if value.is_sparse else value
        assert checkpoint.shape(name) == tuple(plain.shape)
        assert checkpoint[name].dtype == plain.dtype
        if plain.dtype in (torch.float8_e4m3fn, torch.uint16):
            plain, found = plain.view(torch.uint8), checkpoint[name].view(torch.uint8)
        else:
            found = checkpoint[name]
        torch.testing.assert_close(found, plain)


def test_saved_from_cuda(tmp_path: Path) -> None:
    torch.save({"a": torch.ones(3)}, tmp_path / "a.pt", _use_new_zipfile_serialization=False)
    data = (tmp_path / "a.pt").read_bytes()
    assert data.count(b"X\x03\x00\x00\x00cpu") == 1
    (tmp_path / "a.pt").write_bytes(data.replace(b"X\x03\x00\x00\x00cpu", b"X\x06\x00\x00\x00cuda:1"))
    checkpoint = ws.open(tmp_path / "a.pt")
    assert checkpoint["a"].device.type == "cpu"
    assert checkpoint.metadata["saved_from"] == "cuda:1"


def test_tensor_pickled_without_torch_save(tmp_path: Path) -> None:
    values = fixtures.tensors()
    for protocol in (0, 1, 2, 3, 4, 5):
        (tmp_path / "a.pkl").write_bytes(pickle.dumps(values, protocol=protocol))
        if protocol < 2:
            continue  # a text pickle has no mark of its own, so nothing tells it from other text
        checkpoint = ws.open(tmp_path / "a.pkl")
        assert checkpoint.format == "pickle"
        assert all(torch.equal(checkpoint[name], value) for name, value in values.items())


def test_scripted_module_keeps_every_prefix(tmp_path: Path) -> None:
    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(2, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.inner(x)

    torch.jit.trace(Outer(), torch.ones(1, 2)).save(str(tmp_path / "a.pt"))
    assert list(ws.open(tmp_path / "a.pt")) == ["inner.weight", "inner.bias"]

    class Constant(nn.Module):
        scale = torch.arange(4.0)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * self.scale

    torch.jit.trace(Constant(), torch.ones(4)).save(str(tmp_path / "b.pt"))
    checkpoint = ws.open(tmp_path / "b.pt")
    assert {name: checkpoint[name].tolist() for name in checkpoint} == {"CONSTANTS.c0": [0, 1, 2, 3]}


def test_onnx_external_data_and_types(tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx")
    from onnx import TensorProto, helper, numpy_helper

    values = {
        "f": np.arange(300, dtype=np.float32).reshape(3, 100),
        "i": np.arange(-4, 4, dtype=np.int64),
        "u": np.arange(4, dtype=np.uint8),
        "b": np.array([True, False]),
        "d": np.array(2.5),
    }
    parts = [numpy_helper.from_array(value, name) for name, value in values.items()]
    parts.append(helper.make_tensor("typed", TensorProto.INT32, [2], [-5, 6]))
    parts.append(helper.make_tensor("int4", TensorProto.INT4, [3], [-8, 7, 1]))
    parts.append(helper.make_tensor("bf16", TensorProto.BFLOAT16, [2], [1.0, -2.0]))
    graph = helper.make_graph([], "g", [], [], parts)
    index = numpy_helper.from_array(np.array([1, 4], dtype=np.int64), "at")
    sparse = helper.make_sparse_tensor(numpy_helper.from_array(np.array([2.0, 3.0], np.float32), "sp"), index, [2, 3])
    graph.sparse_initializer.append(sparse)
    model = helper.make_model(graph)
    onnx.save(model, tmp_path / "a.onnx", save_as_external_data=True, location="a.data", size_threshold=100)
    checkpoint = ws.open(tmp_path / "a.onnx")
    for name, value in values.items():
        np.testing.assert_array_equal(checkpoint[name].numpy(), value)
    assert checkpoint["typed"].tolist() == [-5, 6]
    assert checkpoint["int4"].tolist() == [-8, 7, 1]
    assert checkpoint["bf16"].tolist() == [1.0, -2.0]
    assert checkpoint["sp"].tolist() == [[0, 2, 0], [0, 3, 0]]
    assert any("beside the model" in f for f in checkpoint.findings)


def test_keras_writes_what_we_read(tmp_path: Path) -> None:
    for package in ("keras", "h5py"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"the package {package} is not installed")
    script = (
        "import keras, numpy as np\n"
        "net = keras.Sequential([keras.Input((8, 8, 1)), keras.layers.Conv2D(2, 3, name='c'),\n"
        "    keras.layers.BatchNormalization(name='n'), keras.layers.Flatten(), keras.layers.Dense(3, name='d')])\n"
        "net.compile('adam', 'mse'); net.fit(np.ones((2, 8, 8, 1)), np.ones((2, 3)), verbose=0)\n"
        "net.save('a.keras'); net.save('a.h5'); net.save_weights('a.weights.h5')\n"
        "np.savez('truth.npz', **{w.path: w.numpy() for w in net.weights})\n"
    )
    environment = {**os.environ, "KERAS_BACKEND": "torch", "CUDA_VISIBLE_DEVICES": ""}
    subprocess.run([sys.executable, "-W", "ignore", "-c", script], cwd=tmp_path, check=True, env=environment)
    truth = np.load(tmp_path / "truth.npz")
    legacy = ws.open(tmp_path / "a.h5")
    assert {name.partition("/")[2]: tuple(truth[name].shape) for name in truth} == legacy.shapes
    assert all(np.array_equal(legacy[name.partition("/")[2]].numpy(), truth[name]) for name in truth)
    assert legacy.config is not None
    assert legacy.config["class_name"] == "Sequential"
    assert legacy.metadata["layers"]["c"] == ["c/kernel", "c/bias"]
    for name in ("a.keras", "a.weights.h5"):
        checkpoint = ws.open(tmp_path / name)
        assert sorted(map(str, checkpoint.shapes.values())) == sorted(str(tuple(truth[n].shape)) for n in truth)
        assert not any("optimizer" in tensor for tensor in checkpoint)


@pytest.mark.parametrize(
    "options", [{}, {"compression": "gzip"}, {"compression": "gzip", "shuffle": True, "fletcher32": True}]
)
@pytest.mark.parametrize("kind", ["<f4", ">f4", "<f2", ">i8", "u1", "bool"])
def test_chunked_and_packed_arrays(tmp_path: Path, options: dict[str, object], kind: str) -> None:
    h5py = pytest.importorskip("h5py")
    value = np.random.default_rng(0).integers(0, 2, (7, 5, 3)).astype(kind)
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file.create_dataset("deep/chunked", data=value, chunks=(4, 2, 3), **options)
        file.create_dataset("whole", data=value)
        partial = file.create_dataset("partial", (7, 5, 3), kind, chunks=(4, 2, 3), fillvalue=1, **options)
        partial[:2] = value[:2]
        file.create_dataset("unwritten", (3,), kind, fillvalue=1)
        file["text"] = "left out"
    checkpoint = ws.open(tmp_path / "a.h5")
    native = value.astype(value.dtype.newbyteorder("="))
    assert set(checkpoint) == {"deep/chunked", "whole", "partial", "unwritten"}
    np.testing.assert_array_equal(checkpoint["deep/chunked"].numpy(), native)
    np.testing.assert_array_equal(checkpoint["whole"].numpy(), native)
    native[2:] = 1
    np.testing.assert_array_equal(checkpoint["partial"].numpy(), native)
    assert checkpoint["unwritten"].tolist() == [1, 1, 1]
    assert any("text" in finding for finding in checkpoint.findings)


def test_layout_cuts_a_vector_and_rows_are_models(tmp_path: Path) -> None:
    (tmp_path / "zoo_layout.csv").write_text(
        'varname,start_idx,end_idx,size,shape\na/bias:0,0,2,2,"(2,)"\na/kernel:0,2,8,6,"(3, 2)"\n'
    )
    data = np.arange(24, dtype=np.float32).reshape(3, 8)
    np.save(tmp_path / "weights.npy", data)
    np.save(tmp_path / "one.npy", data[1])
    np.save(tmp_path / "other.npy", np.ones(9))
    assert list_models(tmp_path / "weights.npy") == [f"{tmp_path}/weights.npy!{row}" for row in range(3)]
    with pytest.raises(SeveralModelsError, match="3 models"):
        ws.open(tmp_path / "weights.npy")
    row, single = ws.open(tmp_path / "weights.npy", member="1"), ws.open(tmp_path / "one.npy")
    assert row.content_hash() == single.content_hash()
    assert row["a/kernel:0"].tolist() == [[10, 11], [12, 13], [14, 15]]
    assert list(ws.open(tmp_path / "other.npy")) == ["array"]


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q4_K", "Q6_K", "TQ1_0", "BF16", "F16"])
def test_gguf_types(tmp_path: Path, kind: str) -> None:
    gguf = pytest.importorskip("gguf")
    from gguf.quants import dequantize, quantize

    number = gguf.GGMLQuantizationType[kind]
    wide = torch.randn(3, 512, generator=torch.Generator().manual_seed(0)).numpy()
    try:
        packed = quantize(wide, number)
    except NotImplementedError:
        # No quantiser in the package: any bytes are a valid block of these types.
        block, size = gguf.GGML_QUANT_SIZES[number]
        packed = np.random.default_rng(0).integers(0, 60, (3, 512 // block * size), dtype=np.uint8)
    writer = gguf.GGUFWriter(tmp_path / "a.gguf", "llama")
    writer.add_tensor("w", packed, raw_dtype=number)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    checkpoint = ws.open(tmp_path / "a.gguf")
    assert checkpoint.shape("w") == (3, 512)
    assert checkpoint.metadata["tensor_types"] == {"w": kind}
    expected = torch.from_numpy(dequantize(packed, number))
    torch.testing.assert_close(checkpoint["w"].float(), expected, rtol=0, atol=0, equal_nan=True)


def _hf_folder(folder: Path, sharded: bool) -> ws.Checkpoint:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": "tiny", "hidden_size": 4}))
    values = fixtures.tensors()
    if not sharded:
        from_tensors(values).save(folder / "model.safetensors")
    else:
        table = {}
        for number, (name, value) in enumerate(values.items()):
            shard = f"model-{number}.safetensors"
            from_tensors({name: value}).save(folder / shard)
            table[name] = shard
        text = json.dumps({"metadata": {"total_size": 1}, "weight_map": table})
        (folder / "model.safetensors.index.json").write_text(text)
    return ws.open(folder)


@pytest.mark.parametrize("sharded", [False, True])
def test_hugging_face_folder(tmp_path: Path, sharded: bool) -> None:
    checkpoint = _hf_folder(tmp_path / "model", sharded)
    assert checkpoint.format == "hf-folder"
    assert checkpoint.config == {"model_type": "tiny", "hidden_size": 4}
    assert list(checkpoint) == list(fixtures.tensors())
    assert all(torch.equal(checkpoint[name], value) for name, value in fixtures.tensors().items())
    assert len(checkpoint.sha256) == 64
    assert list_models(tmp_path) == [str(tmp_path / "model")]
    if sharded:
        index = ws.open(tmp_path / "model" / "model.safetensors.index.json")
        assert index.format == "safetensors"
        assert index.content_hash() == checkpoint.content_hash()


def test_zip_of_several_models(tmp_path: Path) -> None:
    path, expected = fixtures.write("safetensors", tmp_path)
    other, _ = fixtures.write("pytorch_legacy", tmp_path)
    with zipfile.ZipFile(tmp_path / "zoo.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.write(path, "first/model.bin")
        archive.write(other, "second/model.bin")
        archive.writestr("notes.txt", "two models")
    with zipfile.ZipFile(tmp_path / "outer.zip", "w") as archive:
        archive.write(tmp_path / "zoo.zip", "zoo.zip")
    zoo = tmp_path / "zoo.zip"
    assert list_models(zoo) == [f"{zoo}!first/model.bin", f"{zoo}!second/model.bin"]
    with pytest.raises(SeveralModelsError, match=r"member='first/model\.bin'") as caught:
        ws.open(zoo)
    assert caught.value.members == ("first/model.bin", "second/model.bin")
    by_member, by_address = ws.open(zoo, member="first/model.bin"), ws.open(f"{zoo}!first/model.bin")
    assert by_member.content_hash() == by_address.content_hash()
    assert by_member.sha256 == ws.open(path).sha256
    assert all(torch.equal(by_member[name], value) for name, value in expected.items())
    nested = list_models(tmp_path / "outer.zip")
    assert nested == [f"{tmp_path}/outer.zip!zoo.zip!{m}" for m in caught.value.members]
    assert ws.open(nested[0]).content_hash() == by_member.content_hash()
    with pytest.raises(CheckpointError, match="no model 'third'"):
        ws.open(zoo, member="third")


def test_addresses(tmp_path: Path) -> None:
    import fsspec

    path, expected = fixtures.write("safetensors", tmp_path)
    memory = fsspec.filesystem("memory")
    memory.pipe("/zoo/a.safetensors", path.read_bytes())
    memory.pipe("/zoo/config.json", b'{"model_type": "tiny"}')
    for address in (f"file://{path}", "memory://zoo/a.safetensors", "memory://zoo"):
        checkpoint = ws.open(address)
        assert all(torch.equal(checkpoint[name], value) for name, value in expected.items())
    assert ws.open("memory://zoo").config == {"model_type": "tiny"}
    assert ws.open("memory://zoo/a.safetensors").sha256 == ws.open(path).sha256
    with pytest.raises(CheckpointError, match="nowhere"):
        ws.open("memory://zoo/nowhere.pt")
    with pytest.raises(CheckpointError, match="Check the address"):
        ws.open("nosuchscheme://a/b.pt")
