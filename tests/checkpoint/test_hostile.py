"""Hostile and broken files: refused with a clear error, in under a second, in bounded memory, running nothing."""

from __future__ import annotations

import io
import json
import os
import pickle
import resource
import struct
import time
import tracemalloc
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import weightspace as ws
from tests.checkpoint import fixtures
from weightspace.checkpoint import from_tensors, list_models
from weightspace.errors import CheckpointError, UnsafeCheckpointError, WeightspaceError

SECONDS = 3.0
MEGABYTES = 200


def processor_time() -> float:
    """Seconds of work so far, here and in ended children: a busy machine must not fail a test."""
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + children.ru_utime + children.ru_stime


def touch(path: Path) -> None:
    """Open ``path`` and read every element of every tensor."""
    for value in ws.open(path).values():
        value.sum()


def refused(path: Path, error: type[Exception] = CheckpointError, match: str = "") -> str:
    """Open and load ``path``, which must fail with ``error`` quickly and cheaply; the message."""

    def attempt() -> str:
        with pytest.raises(error, match=match or None) as caught:
            touch(path)
        return str(caught.value)

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    begin = processor_time()
    message = attempt()
    seconds = processor_time() - begin
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    assert seconds < SECONDS, f"refused only after {seconds:.2f} s"
    assert grown < MEGABYTES, f"refused, but memory grew by {grown:.0f} MB"
    tracemalloc.start()
    try:
        attempt()
        peak = tracemalloc.get_traced_memory()[1] / 2**20
    finally:
        tracemalloc.stop()
    assert peak < MEGABYTES, f"refused, but at a peak of {peak:.0f} MB"
    assert len(message) < 2000
    return message


# ---------------------------------------------------------------------------------------------------
# Pickles that want to run something


class Bomb:
    """Pickles as a call."""

    def __init__(self, function: Any, *args: Any) -> None:
        self.call = function, args

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return self.call


def containers(payload: Any, folder: Path) -> list[Path]:
    """The payload beside a harmless tensor in each file that holds pickles."""
    value = {"a": torch.ones(2), "evil": payload}
    torch.save(value, folder / "zip.pt")
    torch.save(value, folder / "legacy.pt", _use_new_zipfile_serialization=False)
    (folder / "plain.pkl").write_bytes(pickle.dumps({"a": np.ones(2), "evil": payload}, protocol=2))
    (folder / "four.pkl").write_bytes(pickle.dumps({"a": np.ones(2), "evil": payload}, protocol=4))
    inner = io.BytesIO()
    torch.save(value, inner)
    for name, member in (("agent.zip", "policy.pth"), ("plain.zip", "model.pt")):
        with zipfile.ZipFile(folder / name, "w") as archive:
            archive.writestr("data", "{}")
            archive.writestr(member, inner.getvalue())
    return sorted(folder.iterdir())


@pytest.mark.parametrize(
    ("function", "argument"),
    [
        (os.system, "touch {}"),
        (eval, "open({!r}, 'w')"),
        (exec, "open({!r}, 'w')"),
        (__import__("subprocess").check_output, "touch {}"),
        (__import__("importlib").import_module, "antigravity"),
        (open, "{}"),
        (__import__("operator").attrgetter, "system"),
        (torch.load, "{}"),
        (pickle.loads, "{}"),
        (__import__("shutil").rmtree, "{}"),
        (__import__("runpy").run_path, "{}"),
        (__import__("socket").create_connection, "{}"),
    ],
)
def test_pickles_that_call(tmp_path: Path, function: Any, argument: str) -> None:
    marker = tmp_path / "ran"
    folder = tmp_path / "files"
    folder.mkdir()
    for path in containers(Bomb(function, argument.format(marker)), folder):
        message = refused(path, UnsafeCheckpointError)
        assert "could run code" in message
        assert not marker.exists()


def _global(module: str, name: str) -> bytes:
    return b"c" + module.encode() + b"\n" + name.encode() + b"\n"


RAW: dict[str, bytes] = {
    "text instance": b"\x80\x02(S'true'\nios\nsystem\n.",
    "python 2 builtins": b"\x80\x02" + _global("__builtin__", "eval") + b"(S'1'\ntR.",
    "dotted name": b"\x80\x04\x8c\x02os\x8c\x0bpath.exists\x93.",
    "dunder attribute": b"\x80\x04\x8c\x05torch\x8c\x11Tensor.__reduce__\x93.",
    "named, not called": b"\x80\x02" + _global("posix", "system") + b".",
    "object build": b"\x80\x02(" + _global("subprocess", "Popen") + b"S'true'\no.",
    "extension code": b"\x80\x02\x82\x01.",
    "name from the memo": b"\x80\x04\x8c\x02os\x94\x8c\x06system\x940\x300h\x00h\x01\x93.",
    "persistent id": b"\x80\x02U\x04evilQ.",
}


@pytest.mark.parametrize("name", RAW)
def test_raw_pickles(tmp_path: Path, name: str) -> None:
    path = tmp_path / "a.pkl"
    path.write_bytes(RAW[name])
    refused(path)


def test_harmless_oddities_are_findings(tmp_path: Path) -> None:
    class_name = b"ctrainer.callbacks\nEarlyStopping\n"
    data = pickle.dumps({"a": np.ones(2)}, protocol=2)[:-2]  # without the final SETITEM and STOP
    path = tmp_path / "a.pkl"
    path.write_bytes(data + b"s" + b"U\x04stop" + class_name + b")R" + b"s.")
    checkpoint = ws.open(path)
    assert list(checkpoint) == ["a"]
    assert any("trainer.callbacks.EarlyStopping" in f for f in checkpoint.findings)


# ---------------------------------------------------------------------------------------------------
# Pickles that want to exhaust something


def _laughs() -> bytes:
    # A list of two lists of two lists ...: 2^60 leaves in 400 bytes.
    body = b"\x80\x02]q\x00"
    for level in range(60):
        body += b"](h" + bytes([level]) + b"h" + bytes([level]) + b"eq" + bytes([level + 1])
    return body + b"."


def _laughs_over_an_array() -> bytes:
    # The same with an array at the bottom, so that each of the 2^40 paths leads to a tensor.
    body = pickle.dumps(np.ones(2), protocol=2)[:-1] + b"q\xf0"
    for level in range(40):
        last = b"h\xf0" if level == 0 else b"h" + bytes([level + 100])
        body += b"](" + last + last + b"eq" + bytes([level + 101])
    return body + b"."


def _hash_bomb() -> bytes:
    # A dictionary key of nested shared tuples, whose hash takes 2^60 steps.
    body = b"\x80\x02}K\x01q\x00"
    for level in range(60):
        body += b"0h" + bytes([level]) + b"h" + bytes([level]) + b"\x86q" + bytes([level + 1])
    return body + b"K\x01s."


def _copies() -> bytes:
    # One long list, turned into a set again and again.
    body = b"\x80\x02" + _global("builtins", "set") + b"q\x00](" + b"K\x01" * 50_000 + b"e\x85q\x01"
    return body + b"h\x00h\x01R" * 2_000 + b"."


EXHAUSTING: dict[str, Callable[[], bytes]] = {
    "a billion laughs": _laughs,
    "a billion laughs over an array": _laughs_over_an_array,
    "a key that hashes forever": _hash_bomb,
    "copies of one list": _copies,
    "a memo of 2^31 slots": lambda: b"\x80\x02Nr\xff\xff\xff\x7f.",
    "bytes that are not there": lambda: b"\x80\x04\x8e" + struct.pack("<Q", 1 << 60) + b"x.",
    "a frame that is not there": lambda: b"\x80\x04\x95" + struct.pack("<Q", 1 << 60) + b"N.",
    "a number of many digits": lambda: b"\x80\x02L" + b"9" * 3_000_000 + b"L\n.",
    "lists nested deep": lambda: b"\x80\x02" + b"]" * 100_000 + b"a" * 99_999 + b".",
    "tuples nested deep": lambda: b"\x80\x02N" + b"\x85" * 100_000 + b".",
    "a list in itself": lambda: b"\x80\x02]q\x00h\x00a.",
    "endless instructions": lambda: b"\x80\x02" + b"N0" * 200_000 + b"N.",
    "an endless class name": lambda: b"\x80\x02c" + b"a" * 1_000_000 + b"\nb\n.",
}


@pytest.mark.parametrize("name", EXHAUSTING)
def test_pickles_that_exhaust(tmp_path: Path, name: str) -> None:
    path = tmp_path / "a.pkl"
    path.write_bytes(EXHAUSTING[name]())
    refused(path)


def _torch_pickle(body: bytes, folder: Path, data: bytes = b"\0" * 16) -> Path:
    path = folder / "a.pt"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a/data.pkl", body)
        archive.writestr("a/data/0", data)
    return path


def _torch_tensor(numel: int, offset: int, shape: tuple[int, ...], stride: tuple[int, ...]) -> bytes:
    def number(value: int) -> bytes:
        data = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
        return b"\x8a" + bytes([len(data)]) + data if len(data) < 256 else b"\x8b" + struct.pack("<I", len(data)) + data

    sizes = b"(" + b"".join(map(number, shape)) + b"t"
    strides = b"(" + b"".join(map(number, stride)) + b"t"
    storage = b"(U\x07storage" + _global("torch", "FloatStorage") + b"U\x010U\x03cpu" + number(numel) + b"tQ"
    call = (
        _global("torch._utils", "_rebuild_tensor_v2") + b"(" + storage + number(offset) + sizes + strides + b"\x89}tR"
    )
    return b"\x80\x02}U\x01a" + call + b"s."


@pytest.mark.parametrize(
    ("numel", "offset", "shape", "stride"),
    [
        (1 << 60, 0, (1 << 60,), (1,)),
        (4, 0, (1 << 60,), (0,)),
        (4, 0, (1 << 40,), (0,)),
        (4, 0, (10_000, 10_000), (0, 0)),
        (4, 1, (4,), (1,)),
        (4, -1, (4,), (1,)),
        (4, 0, (4,), (-1,)),
        (4, 0, (-4,), (1,)),
        (4, 0, (4,), (1, 1)),
        (5, 0, (5,), (1,)),
        (4, 0, (1,) * 65, (1,) * 65),
        (4, 1 << 62, (2,), (1 << 62,)),
        pytest.param(1 << 5000, 0, (-1,), (1,), id="a number of 5000 bits"),
    ],
)
def test_tensors_that_claim_more_than_there_is(
    tmp_path: Path, numel: int, offset: int, shape: tuple[int, ...], stride: tuple[int, ...]
) -> None:
    assert ws.open(_torch_pickle(_torch_tensor(4, 0, (4,), (1,)), tmp_path))["a"].tolist() == [0, 0, 0, 0]
    refused(_torch_pickle(_torch_tensor(numel, offset, shape, stride), tmp_path))


# ---------------------------------------------------------------------------------------------------
# safetensors


def _st(folder: Path, header: Any, data: bytes = b"\0" * 16, length: int | None = None) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path = folder / "a.safetensors"
    path.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + data)
    return path


def _f32(shape: Any, *offsets: Any, dtype: Any = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": list(offsets)}


SAFETENSORS: dict[str, Any] = {
    "2^60 elements": {"a": _f32([1 << 60], 0, 1 << 62)},
    "2^60 elements in little space": {"a": _f32([1 << 60], 0, 16)},
    "axes whose product overflows": {"a": _f32([1 << 32, 1 << 32], 0, 16)},
    "empty, yet huge": {"a": _f32([0, 1 << 63], 0, 0), "b": _f32([4], 0, 16)},
    "overlap": {"a": _f32([3], 0, 12), "b": _f32([2], 8, 16)},
    "the same bytes": {"a": _f32([4], 0, 16), "b": _f32([4], 0, 16)},
    "a hole": {"a": _f32([1], 0, 4), "b": _f32([2], 8, 16)},
    "bytes left over": {"a": _f32([3], 0, 12)},
    "out of bounds": {"a": _f32([4], 16, 32)},
    "falling offsets": {"a": _f32([4], 16, 0)},
    "negative": {"a": _f32([4], -16, 0)},
    "negative shape": {"a": _f32([-2, -2], 0, 16)},
    "wrong size": {"a": _f32([4], 0, 16, dtype="F64")},
    "unknown type": {"a": _f32([4], 0, 16, dtype="F33")},
    "type is a list": {"a": _f32([4], 0, 16, dtype=["F32"])},
    "shape is a text": {"a": _f32("4", 0, 16)},
    "shape of booleans": {"a": _f32([True], 0, 4)},
    "shape of floats": {"a": _f32([4.0], 0, 16)},
    "three offsets": {"a": _f32([4], 0, 8, 16)},
    "no offsets": {"a": {"dtype": "F32", "shape": [4]}},
    "a list": {"a": [1, 2]},
    "metadata of numbers": {"__metadata__": {"a": 1}, "b": _f32([4], 0, 16)},
    "climbing name": {"../../etc/cron.d/x": _f32([4], 0, 16)},
    "climbing name of Windows": {"a\\..\\x": _f32([4], 0, 16)},
    "name with zero": {"a\0b": _f32([4], 0, 16)},
    "a name twice": b'{"a":%b,"a":%b}' % ((b'{"dtype":"F32","shape":[4],"data_offsets":[0,16]}',) * 2),
    "deep JSON": b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "long number": b'{"a":{"dtype":"F32","shape":[' + b"9" * 5000 + b'],"data_offsets":[0,16]}}',
    "no JSON": b"{nothing}",
    "no text": b"{\xff\xfe}",
    "only metadata": {"__metadata__": {"a": "b"}},
}


@pytest.mark.parametrize("name", SAFETENSORS)
def test_safetensors_headers(tmp_path: Path, name: str) -> None:
    refused(_st(tmp_path, SAFETENSORS[name]))


@pytest.mark.parametrize("length", [1 << 63, 1 << 40, 1000, 200 << 20])
def test_safetensors_header_length(tmp_path: Path, length: int) -> None:
    refused(_st(tmp_path, {"a": _f32([4], 0, 16)}, length=length), UnsafeCheckpointError, "header claims")


# ---------------------------------------------------------------------------------------------------
# Archives


def test_zip_bombs(tmp_path: Path) -> None:
    for name, member in (("a.pt", "a/data.pkl"), ("a.npz", "a.npy"), ("a.zip", "model.safetensors")):
        with zipfile.ZipFile(tmp_path / name, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr(member, bytes(64 << 20))
        assert (tmp_path / name).stat().st_size < 100_000
        refused(tmp_path / name, UnsafeCheckpointError, "unfold")


def test_zip_that_lies_about_its_size(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a.npy", bytes(64 << 20))
    data = bytearray((tmp_path / "a.npz").read_bytes())
    for place in range(len(data) - 4):
        if data[place : place + 4] == struct.pack("<I", 64 << 20):
            data[place : place + 4] = struct.pack("<I", 5000)
    (tmp_path / "a.npz").write_bytes(data)
    refused(tmp_path / "a.npz", CheckpointError)


def test_overlapping_members_do_not_multiply(tmp_path: Path) -> None:
    # Many directory entries for one compressed file.
    with zipfile.ZipFile(tmp_path / "a.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a.npy", os.urandom(1 << 16) + bytes(1 << 20))
        info = archive.getinfo("a.npy")
        for number in range(1000):
            copy = zipfile.ZipInfo(f"b{number}.npy")
            for field in ("header_offset", "CRC", "compress_size", "file_size", "compress_type"):
                setattr(copy, field, getattr(info, field))
            archive.filelist.append(copy)
            archive.NameToInfo[copy.filename] = copy
    refused(tmp_path / "a.npz", UnsafeCheckpointError, "unfold")


@pytest.mark.parametrize("name", ["../a.npy", "/etc/a.npy", "a/../../b.npy", "..\\a.npy", "C:\\a.npy"])
def test_zip_members_that_climb(tmp_path: Path, name: str) -> None:
    data = io.BytesIO()
    np.save(data, np.ones(2))
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
        archive.writestr(name, data.getvalue())
    refused(tmp_path / "a.npz", UnsafeCheckpointError, "leads out")


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_zip_members_of_one_name(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
        archive.writestr("a.npy", b"1")
        archive.writestr("a.npy", b"2")
    refused(tmp_path / "a.npz", UnsafeCheckpointError, "two files")


def test_zips_in_zips(tmp_path: Path) -> None:
    path, _ = fixtures.write("npz", tmp_path)
    data = path.read_bytes()
    for _ in range(8):
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w") as archive:
            archive.writestr("inner.zip", data)
        data = buffer.getvalue()
    (tmp_path / "deep.zip").write_bytes(data)
    refused(tmp_path / "deep.zip", UnsafeCheckpointError, "nested deeper")


# ---------------------------------------------------------------------------------------------------
# Leaving the folder


def test_shards_that_leave_the_folder(tmp_path: Path) -> None:
    secret = tmp_path / "secret.safetensors"
    from_tensors({"a": torch.ones(2)}).save(secret)
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    index = folder / "model.safetensors.index.json"
    (folder / "link.safetensors").symlink_to(secret)
    (folder / "chain.safetensors").symlink_to(folder / "link.safetensors")
    for shard in ("../secret.safetensors", str(secret), "x/../../secret.safetensors", "file:///etc/passwd", "", "a\0b"):
        index.write_text(json.dumps({"weight_map": {"a": shard}}))
        refused(folder, UnsafeCheckpointError, "leads out")
        refused(index, UnsafeCheckpointError, "leads out")
    for shard in ("link.safetensors", "chain.safetensors"):
        index.write_text(json.dumps({"weight_map": {"a": shard}}))
        refused(folder, UnsafeCheckpointError, "outside its folder")
    index.write_text(json.dumps({"weight_map": {"a": "model.safetensors.index.json"}}))
    refused(folder, CheckpointError, "an index itself")
    index.write_text(json.dumps({"weight_map": {"a": "gone.safetensors"}}))
    refused(folder, CheckpointError, "not there")
    index.unlink()
    (folder / "model.safetensors").symlink_to(secret)
    refused(folder, UnsafeCheckpointError, "outside its folder")
    assert list_models(folder) == [str(folder)]


def test_the_hub_cache_may_link_to_its_blobs(tmp_path: Path) -> None:
    repository = tmp_path / "models--a--b"
    (repository / "blobs").mkdir(parents=True)
    snapshot = repository / "snapshots" / "0123"
    snapshot.mkdir(parents=True)
    from_tensors({"a": torch.ones(2)}).save(repository / "blobs" / "w.safetensors")
    (repository / "blobs" / "c").write_text('{"model_type": "tiny"}')
    (snapshot / "model.safetensors").symlink_to(Path("../../blobs/w.safetensors"))
    (snapshot / "config.json").symlink_to(Path("../../blobs/c"))
    assert ws.open(snapshot)["a"].tolist() == [1, 1]
    (snapshot / "model.safetensors").unlink()
    (snapshot / "model.safetensors").symlink_to(Path("../../../elsewhere"))
    refused(snapshot, UnsafeCheckpointError, "outside its folder")


def test_external_data_that_leaves_the_folder(tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx")
    from onnx import TensorProto, helper

    folder = tmp_path / "model"
    folder.mkdir()
    (tmp_path / "secret").write_bytes(bytes(16))
    (folder / "link").symlink_to(tmp_path / "secret")

    def write(location: str, **more: str) -> Path:
        tensor = TensorProto(name="a", data_type=TensorProto.FLOAT, dims=[4], data_location=TensorProto.EXTERNAL)
        for key, value in {"location": location, **more}.items():
            tensor.external_data.add(key=key, value=value)
        (folder / "a.onnx").write_bytes(
            helper.make_model(helper.make_graph([], "g", [], [], [tensor])).SerializeToString()
        )
        return folder / "a.onnx"

    for location in ("../secret", str(tmp_path / "secret"), "link", "x/../../secret"):
        refused(write(location), UnsafeCheckpointError)
    (folder / "data").write_bytes(bytes(16))
    assert ws.open(write("data", offset="0", length="16"))["a"].tolist() == [0] * 4
    for more in ({"offset": "8"}, {"length": "1" + "0" * 18}, {"offset": "-4"}, {"offset": "x"}, {"length": "8"}):
        refused(write("data", **more), CheckpointError)
    refused(write("gone"), CheckpointError, "not there")
    assert onnx is not None


def test_hdf5_that_leaves_the_file(tmp_path: Path) -> None:
    h5py = pytest.importorskip("h5py")
    (tmp_path / "secret").write_bytes(bytes(1000))
    with h5py.File(tmp_path / "other.h5", "w") as file:
        file["a"] = np.ones(4)
    path = tmp_path / "a.h5"

    def write(fill: Callable[[Any], Any]) -> Path:
        with h5py.File(path, "w") as file:
            fill(file)
        return path

    def virtual(file: Any) -> None:
        layout = h5py.VirtualLayout((4,), "f4")
        layout[:] = h5py.VirtualSource("other.h5", "a", (4,))
        file.create_virtual_dataset("a", layout)

    def circle(file: Any) -> None:
        file.create_group("g")["self"] = file["/"]

    refused(write(lambda f: f.__setitem__("a", h5py.ExternalLink("other.h5", "a"))), UnsafeCheckpointError, "link into")
    refused(write(lambda f: f.__setitem__("a", h5py.SoftLink("/b"))), UnsafeCheckpointError, "soft link")
    outside = [(str(tmp_path / "secret"), 0, 16)]
    refused(write(lambda f: f.create_dataset("a", (4,), "f4", external=outside)), UnsafeCheckpointError, "another file")
    refused(write(virtual), UnsafeCheckpointError, "another file")
    refused(write(circle), UnsafeCheckpointError, "circle")
    refused(
        write(lambda f: f.create_dataset("a", (1 << 40,), "f4", chunks=(1 << 10,))), UnsafeCheckpointError, "unfold"
    )
    refused(
        write(lambda f: f.create_dataset("a", data=np.zeros(1 << 24, "f4"), compression="gzip", chunks=(1 << 22,))),
        UnsafeCheckpointError,
        "unfold",
    )
    refused(write(lambda f: f.__setitem__("a", "only a text")), CheckpointError, "no tensors")


def test_hdf5_that_never_ends(tmp_path: Path) -> None:
    pytest.importorskip("h5py")
    good, expected = fixtures.write("keras_h5", tmp_path)
    ws.open(good)  # the process that reads HDF5 is there
    path = Path(__file__).parent.parent / "corpus" / "keras_h5-hangs-the-c-library"
    refused(path, UnsafeCheckpointError, "did not end")
    assert list(ws.open(good)) == list(expected)


# ---------------------------------------------------------------------------------------------------
# Numbers that cannot be true, in the other formats


def _npy(header: bytes, data: bytes = b"\0" * 16) -> bytes:
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header + data


NPY = {
    "2^60 elements": _npy(b"{'descr': '<f4', 'fortran_order': False, 'shape': (1152921504606846976,), }"),
    "objects": _npy(b"{'descr': '|O', 'fortran_order': False, 'shape': (1,), }", pickle.dumps([1])),
    "record with objects": _npy(b"{'descr': [('a', '|O')], 'fortran_order': False, 'shape': (1,), }"),
    "an expression": _npy(b"{'descr': '<f4', 'fortran_order': False, 'shape': (__import__('os').system('true'),), }"),
    "more than there is": _npy(b"{'descr': '<f4', 'fortran_order': False, 'shape': (5,), }"),
    "a long number": _npy(b"{'descr': '<f4', 'fortran_order': False, 'shape': (" + b"9" * 5000 + b",), }"),
    "an absurd element": _npy(b"{'descr': '<f999999', 'fortran_order': False, 'shape': (1,), }"),
    "header past the end": b"\x93NUMPY\x02\x00" + struct.pack("<I", 1 << 31) + b"{}",
    "version 9": b"\x93NUMPY\x09\x00" + bytes(20),
}


@pytest.mark.parametrize("name", NPY)
def test_npy_headers(tmp_path: Path, name: str) -> None:
    (tmp_path / "a.npy").write_bytes(NPY[name])
    refused(tmp_path / "a.npy")
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
        archive.writestr("a.npy", NPY[name])
    refused(tmp_path / "a.npz")


def _text(value: bytes) -> bytes:
    return struct.pack("<Q", len(value)) + value


def _gguf(tensors: int, pairs: int, body: bytes) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", 3, tensors, pairs) + body


def _gguf_tensor(shape: tuple[int, ...], kind: int, offset: int, name: bytes = b"a") -> bytes:
    sizes = struct.pack(f"<I{len(shape)}Q", len(shape), *shape)
    return _text(name) + sizes + struct.pack("<IQ", kind, offset)


GGUF = {
    "2^60 tensors": _gguf(1 << 60, 0, b""),
    "2^60 entries": _gguf(0, 1 << 60, b""),
    "2^60 letters": _gguf(0, 1, struct.pack("<Q", 1 << 60)),
    "2^60 numbers": _gguf(0, 1, _text(b"k") + struct.pack("<IIQ", 9, 4, 1 << 60)),
    "2^60 texts": _gguf(0, 1, _text(b"k") + struct.pack("<IIQ", 9, 8, 1 << 60)),
    "lists in lists": _gguf(0, 1, _text(b"k") + struct.pack("<I", 9) + struct.pack("<IQ", 9, 1) * 50 + bytes(64)),
    "2^60 elements": _gguf(1, 0, _gguf_tensor((1 << 60,), 0, 0) + bytes(64)),
    "a product that overflows": _gguf(1, 0, _gguf_tensor((1 << 32, 1 << 32), 0, 0) + bytes(64)),
    "2^31 axes": _gguf(1, 0, _text(b"a") + struct.pack("<I", 1 << 31) + bytes(64)),
    "an offset past the end": _gguf(1, 0, _gguf_tensor((4,), 0, 1 << 62) + bytes(64)),
    "an unknown type": _gguf(1, 0, _gguf_tensor((4,), 77, 0) + bytes(64)),
    "half a block": _gguf(1, 0, _gguf_tensor((33,), 8, 0) + bytes(64)),
    "a name twice": _gguf(2, 0, _gguf_tensor((4,), 0, 0) + _gguf_tensor((4,), 0, 32) + bytes(128)),
    "an overlap": _gguf(2, 0, _gguf_tensor((16,), 0, 0) + _gguf_tensor((4,), 0, 32, b"b") + bytes(128)),
    "a climbing name": _gguf(1, 0, _gguf_tensor((4,), 0, 0, b"../a") + bytes(64)),
    "an alignment of zero": _gguf(
        1, 1, _text(b"general.alignment") + struct.pack("<II", 4, 0) + _gguf_tensor((4,), 0, 0)
    ),
    "version 9": b"GGUF" + struct.pack("<IQQ", 9, 0, 0),
    "cut off": b"GGUF\x03\x00",
}


@pytest.mark.parametrize("name", GGUF)
def test_gguf_headers(tmp_path: Path, name: str) -> None:
    (tmp_path / "a.gguf").write_bytes(GGUF[name])
    refused(tmp_path / "a.gguf")


FLAX = {
    "2^32 entries": b"\x81\xa1a\xdf\xff\xff\xff\xff\xa1b\x01",
    "2^32 elements": b"\x81\xa1a\xdd\xff\xff\xff\xff\x01\x02",
    "2^32 bytes": b"\x81\xa1a\xc6\xff\xff\xff\xff\x01",
    "nested deep": b"\x81\xa1a" + b"\x91" * 100_000 + b"\x01",
    "a key twice": b"\x82\xa1a\x01\xa1a\x02",
    "an array of 2^60": b"\x81\xa1a\xc7\x12\x01\x93\x91\xcf\x10" + bytes(7) + b"\xa5int32\xc4\x00",
    "nothing after the map": b"\x81\xa1a\x01",
}


@pytest.mark.parametrize("name", FLAX)
def test_flax_messages(tmp_path: Path, name: str) -> None:
    (tmp_path / "a.msgpack").write_bytes(FLAX[name])
    refused(tmp_path / "a.msgpack")


def _field(number: int, data: bytes) -> bytes:
    length, size = len(data), b""
    while length > 127:
        size, length = size + bytes([length & 127 | 128]), length >> 7
    return bytes([number << 3 | 2]) + size + bytes([length]) + data


def test_onnx_claims(tmp_path: Path) -> None:
    pytest.importorskip("onnx")
    from onnx import TensorProto, helper

    def write(**fields: Any) -> Path:
        tensor = TensorProto(**{"name": "a", "data_type": TensorProto.FLOAT, "dims": [4], **fields})
        model = helper.make_model(helper.make_graph([], "g", [], [], [tensor]))
        (tmp_path / "a.onnx").write_bytes(model.SerializeToString())
        return tmp_path / "a.onnx"

    raw = bytes(16)
    assert ws.open(write(raw_data=raw))["a"].tolist() == [0] * 4
    for dims in ([1 << 60], [1 << 32, 1 << 32], [-4], [-2, -2], [5], [], [1] * 65):
        refused(write(raw_data=raw, dims=dims))
        refused(write(float_data=[0.0] * 4, dims=dims))
    refused(write(raw_data=raw, data_type=99))
    refused(write(raw_data=raw, name="../a"))
    graph = b""
    for _ in range(40):  # more levels than the protobuf library itself would write
        graph = _field(1, _field(5, _field(6, graph)))
    (tmp_path / "deep.onnx").write_bytes(b"\x08\x08" + _field(7, graph))
    refused(tmp_path / "deep.onnx", UnsafeCheckpointError, "nested deeper")


# ---------------------------------------------------------------------------------------------------
# Everything, cut off or not a file


@pytest.mark.parametrize("name", fixtures.FORMATS)
def test_truncated_files(tmp_path: Path, name: str) -> None:
    if name not in fixtures.available():
        pytest.skip(f"the package {fixtures.FORMATS[name][3]} is not installed")
    path, expected = fixtures.write(name, tmp_path)
    data = path.read_bytes()
    refusals = 0
    for length in sorted({*range(0, len(data), max(1, len(data) // 40)), len(data) - 1}):
        path.write_bytes(data[:length])
        begin = processor_time()
        try:
            checkpoint = ws.open(path)
            loaded = {key: checkpoint[key] for key in checkpoint}
        except WeightspaceError:
            refusals += 1
        else:
            # What still opens lost only bytes that no tensor needs.
            assert all(torch.equal(loaded[key], value) for key, value in expected.items() if key in loaded)
        assert processor_time() - begin < SECONDS
    assert refusals > 8


@pytest.mark.parametrize("place", ["/dev/zero", "/dev/random", "/proc/self/mem"])
def test_special_files(place: str) -> None:
    if not Path(place).exists():
        pytest.skip(f"no {place} here")
    refused(Path(place))


def test_pipes(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    refused(tmp_path / "pipe")
