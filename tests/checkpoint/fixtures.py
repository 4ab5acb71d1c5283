"""A small valid file of every format, written with the format's own library where it is installed."""

from __future__ import annotations

import importlib.util
import io
import json
import pickle
import struct
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import nn

Tensors = dict[str, torch.Tensor]


def tensors() -> Tensors:
    """Three tensors of a tiny network, in an order that is not alphabetical."""
    generator = torch.Generator().manual_seed(0)
    return {
        "layer.weight": torch.randn(4, 3, generator=generator),
        "layer.bias": torch.randn(4, generator=generator),
        "count": torch.tensor(7),
    }


class Net(nn.Module):
    """A module with a parameter, a buffer, a buffer that is not saved, and a submodule."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(3, 4)
        self.norm = nn.BatchNorm1d(4)
        self.register_buffer("scratch", torch.ones(2), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(self.fc(x))


def numeric(values: Tensors) -> Tensors:
    return {name: value for name, value in values.items() if value.ndim}


def safetensors(path: Path) -> Tensors:
    from safetensors.torch import save_file

    save_file(tensors(), path, {"author": "test"})
    return dict(sorted(tensors().items()))  # the library orders by element size, then by name


def pytorch_zip(path: Path) -> Tensors:
    optimiser = torch.optim.Adam([nn.Parameter(torch.ones(3))])
    torch.save({"epoch": 3, "state_dict": tensors(), "optimizer": optimiser.state_dict()}, path)
    return tensors()


def pytorch_legacy(path: Path) -> Tensors:
    torch.save({"epoch": 3, "state_dict": tensors()}, path, _use_new_zipfile_serialization=False)
    return tensors()


def pytorch_tar(path: Path) -> Tensors:
    """torch before 0.1.10, written here byte by byte."""
    storages, table, values = io.BytesIO(), io.BytesIO(), tensors()
    pickle.dump(len(values), storages, 2)
    pickle.dump(len(values), table, 2)
    for key, value in enumerate(values.values()):
        kind = torch.FloatStorage if value.dtype == torch.float32 else torch.LongStorage
        pickle.dump((key, "cpu", kind), storages, 2)
        storages.write(struct.pack("<q", value.numel()) + value.numpy().tobytes())
        pickle.dump((100 + key, key, torch.FloatTensor), table, 2)
        table.write(struct.pack("<ii", value.ndim, 0))
        table.write(struct.pack(f"<{value.ndim}q", *value.shape) + struct.pack(f"<{value.ndim}q", *value.stride()))
        table.write(struct.pack("<q", 0))
    pickle.dump([], storages, 2)

    class Pickler(pickle.Pickler):
        def persistent_id(self, obj: object) -> str | None:
            return str(obj.args[0]) if isinstance(obj, Reference) else None

    body = io.BytesIO()
    Pickler(body, 2).dump({name: Reference(100 + key) for key, name in enumerate(values)})
    with tarfile.open(path, "w:", format=tarfile.PAX_FORMAT) as tar:
        for name, data in (("storages", storages), ("tensors", table), ("pickle", body)):
            info = tarfile.TarInfo(name)
            info.size = len(data.getvalue())
            tar.addfile(info, io.BytesIO(data.getvalue()))
    return values


class Reference(Exception):
    """Stands for a tensor that is stored elsewhere."""


def whole_module(path: Path) -> Tensors:
    torch.manual_seed(0)
    net = Net()
    torch.save(net, path)
    return dict(net.state_dict())


def numpy_pickle(path: Path) -> Tensors:
    values = {name: value.numpy() for name, value in tensors().items()}
    path.write_bytes(pickle.dumps({"weights": values, "step": np.float64(0.5)}, protocol=4))
    return tensors()


def torchscript(path: Path) -> Tensors:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    torch.jit.trace(net, torch.ones(1, 3)).save(str(path))
    return dict(net.state_dict())


def sb3(path: Path) -> Tensors:
    policy, optimiser = io.BytesIO(), io.BytesIO()
    torch.save(tensors(), policy)
    torch.save({"state": {}, "param_groups": []}, optimiser)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(
            "data", json.dumps({"gamma": 0.9, "policy_class": {":type:": "type", ":serialized:": "gASVOwA="}})
        )
        archive.writestr("policy.pth", policy.getvalue())
        archive.writestr("policy.optimizer.pth", optimiser.getvalue())
        archive.writestr("_stable_baselines3_version", "2.0.0")
    return tensors()


def onnx(path: Path) -> Tensors:
    from onnx import TensorProto, helper, numpy_helper, save

    values = tensors()
    inner = helper.make_graph(
        [helper.make_node("Constant", [], ["c"], value=numpy_helper.from_array(values["layer.bias"].numpy(), "v"))],
        "then",
        [],
        [helper.make_tensor_value_info("c", TensorProto.FLOAT, [4])],
    )
    nodes = [
        helper.make_node("If", ["flag"], ["chosen"], name="if0", then_branch=inner, else_branch=inner),
        helper.make_node("Constant", [], ["two"], value_ints=[2, -3]),
        helper.make_node("MatMul", ["x", "layer.weight"], ["y"]),
    ]
    typed = helper.make_tensor("typed", TensorProto.FLOAT16, [2], [1.5, -2.0])
    graph = helper.make_graph(
        nodes,
        "net",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 4])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 3])],
        [numpy_helper.from_array(values["layer.weight"].numpy(), "layer.weight"), typed],
    )
    save(helper.make_model(graph), path)
    return {
        "if0/else_branch/c": values["layer.bias"],
        "if0/then_branch/c": values["layer.bias"],
        "two": torch.tensor([2, -3]),
        "layer.weight": values["layer.weight"],
        "typed": torch.tensor([1.5, -2.0], dtype=torch.float16),
    }


def keras_h5(path: Path) -> Tensors:
    import h5py

    values = tensors()
    with h5py.File(path, "w") as file:
        file.attrs["model_config"] = json.dumps({"class_name": "Sequential", "config": {"layers": []}})
        weights = file.create_group("model_weights")
        weights.attrs["layer_names"] = [b"dense_1", b"flat", b"count"]
        for layer, listed in (
            ("dense_1", {"kernel:0": "layer.weight", "bias:0": "layer.bias"}),
            ("count", {"n:0": "count"}),
        ):
            inner = f"{layer}_1" if layer == "dense_1" else layer
            group = weights.create_group(layer)
            group.attrs["weight_names"] = [f"{inner}/{weight}".encode() for weight in listed]
            for weight, name in listed.items():
                group[f"{inner}/{weight}"] = values[name].numpy()
        weights.create_group("flat").attrs["weight_names"] = np.array([], dtype="S1")
        file["optimizer_weights/Adam/m:0"] = np.ones(3)
    return {
        "dense_1/kernel:0": values["layer.weight"],
        "dense_1/bias:0": values["layer.bias"],
        "count/n:0": values["count"],
    }


def keras_v3(path: Path) -> Tensors:
    import h5py

    values, data = tensors(), io.BytesIO()
    with h5py.File(data, "w") as file:
        file["layers/dense/vars/0"] = values["layer.weight"].numpy()
        file["layers/dense/vars/1"] = values["layer.bias"].numpy()
        file["optimizer/vars/0"] = np.ones(3)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("metadata.json", json.dumps({"keras_version": "3.0.0"}))
        archive.writestr("config.json", json.dumps({"class_name": "Sequential", "config": {}}))
        archive.writestr("model.weights.h5", data.getvalue())
    return {"layers/dense/vars/0": values["layer.weight"], "layers/dense/vars/1": values["layer.bias"]}


def npy(path: Path) -> Tensors:
    value = tensors()["layer.weight"]
    np.save(path, np.asfortranarray(value.numpy().astype(">f4")))
    return {"array": value}


def npz(path: Path) -> Tensors:
    values = tensors()
    with path.open("wb") as file:
        np.savez_compressed(file, **{name: value.numpy() for name, value in values.items()}, note=np.array("hello"))
    return values


def gguf(path: Path) -> Tensors:
    from gguf import GGUFWriter
    from gguf.constants import GGMLQuantizationType
    from gguf.quants import dequantize, quantize

    values = numeric(tensors())
    wide = torch.randn(2, 64, generator=torch.Generator().manual_seed(1))
    writer = GGUFWriter(path, "llama")
    writer.add_array("names", ["a", "b"])
    writer.add_uint32("llama.block_count", 1)
    for name, value in values.items():
        writer.add_tensor(name, value.numpy())
    packed = quantize(wide.numpy(), GGMLQuantizationType.Q8_0)
    writer.add_tensor("wide", packed, raw_dtype=GGMLQuantizationType.Q8_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return {**values, "wide": torch.from_numpy(dequantize(packed, GGMLQuantizationType.Q8_0))}


def flax(path: Path) -> Tensors:
    import msgpack

    def array(value: torch.Tensor) -> msgpack.ExtType:
        data = value.numpy()
        return msgpack.ExtType(1, msgpack.packb((data.shape, data.dtype.name, data.tobytes()), use_bin_type=True))

    values = tensors()
    params = {"Dense_0": {"kernel": array(values["layer.weight"]), "bias": array(values["layer.bias"])}}
    state = {"step": 12, "params": params, "opt_state": {"0": {"mu": array(values["layer.bias"])}}}
    path.write_bytes(msgpack.packb(state, use_bin_type=True))
    return {"Dense_0/kernel": values["layer.weight"], "Dense_0/bias": values["layer.bias"]}


def plain_zip(path: Path) -> Tensors:
    data = io.BytesIO()
    torch.save(tensors(), data)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("readme.txt", "a model")
        archive.writestr("deep/model.pt", data.getvalue())
    return tensors()


FORMATS: dict[str, tuple[str, str, Callable[[Path], Tensors], str | None]] = {
    # name: (format that `open` reports, file name, writer, package the fixture or the reader needs)
    "safetensors": ("safetensors", "a.safetensors", safetensors, None),
    "pytorch_zip": ("pytorch-zip", "a.pt", pytorch_zip, None),
    "pytorch_legacy": ("pytorch-legacy", "a.pth", pytorch_legacy, None),
    "pytorch_tar": ("pytorch-tar", "a.tar", pytorch_tar, None),
    "whole_module": ("pytorch-zip", "net.pt", whole_module, None),
    "numpy_pickle": ("pickle", "a.pkl", numpy_pickle, None),
    "torchscript": ("torchscript", "script.pt", torchscript, None),
    "sb3": ("sb3", "agent.zip", sb3, None),
    "onnx": ("onnx", "a.onnx", onnx, "onnx"),
    "keras_h5": ("keras-h5", "a.h5", keras_h5, "h5py"),
    "keras_v3": ("keras-v3", "a.keras", keras_v3, "h5py"),
    "npy": ("npy", "a.npy", npy, None),
    "npz": ("npz", "a.npz", npz, None),
    "gguf": ("gguf", "a.gguf", gguf, "gguf"),
    "flax": ("flax-msgpack", "a.msgpack", flax, "msgpack"),
    "plain_zip": ("pytorch-zip", "a.zip", plain_zip, None),
}


def available() -> list[str]:
    """Formats whose packages are installed."""
    return [name for name, (_, _, _, needs) in FORMATS.items() if needs is None or importlib.util.find_spec(needs)]


def write(name: str, folder: Path) -> tuple[Path, Tensors]:
    """Write the fixture ``name`` into ``folder``; its path and what must come out of it."""
    _, file_name, writer, _ = FORMATS[name]
    path = folder / file_name
    return path, writer(path)
