"""Keras files: ``.h5``/``.hdf5`` (whole models and weights) and the ``.keras`` zip.

Tensors are named by layer and weight, ``conv2d_1/kernel:0``; ``metadata["layers"]`` lists the names of
each layer in the order Keras gives them. A whole model's configuration is ``config``. Links and storage
that lead out of the file are refused. The HDF5 library runs in a process of its own
(`weightspace.checkpoint.hdf5_scan`) and only says where the numbers are; they are read from there.
"""

from __future__ import annotations

import atexit
import base64
import functools
import importlib.util
import itertools
import json
import os
import re
import select
import subprocess
import sys
import tempfile
import threading
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch

from weightspace.checkpoint import dtypes, limits
from weightspace.checkpoint.archive import Archive
from weightspace.checkpoint.contents import Contents, Entry, Request
from weightspace.checkpoint.safetensors import parse_json
from weightspace.checkpoint.source import Source
from weightspace.errors import CheckpointError, MissingExtraError, UnsafeCheckpointError

_MAGIC = b"\x89HDF\r\n\x1a\n"
_DEFLATE, _SHUFFLE, _CHECKSUM = 1, 2, 3
_TRAINING = ("optimizer_weights", "optimizer", "_optimizer")


def matches(source: Source) -> bool:
    """The signature of HDF5 at the file's beginning."""
    return source.head(8) == _MAGIC


def read(source: Source, request: Request) -> Contents:
    """A Keras 1 or 2 file, or any other HDF5 file with numeric data sets."""
    found = _scan(source)
    groups, arrays = found["groups"], found["arrays"]
    root = groups[""]
    prefix = "model_weights/" if "model_weights" in groups else ""
    weights = groups[prefix.rstrip("/")]
    metadata: dict[str, Any] = {}
    findings: list[str] = []
    for key in ("keras_version", "backend"):
        if key in root or key in weights:
            metadata[key] = root.get(key, weights.get(key))
    config = _json(source, root, "model_config")
    training = _json(source, root, "training_config")
    if config is not None:
        metadata["model_config"] = config
    if training is not None:
        metadata["training_config"] = training
    if "layer_names" in weights:
        tensors, layers = _legacy(source, groups, arrays, prefix)
        metadata["layers"] = layers
    else:
        tensors = {}
        for name, about in arrays.items():
            if not name.startswith(prefix) or name.split("/")[0] in _TRAINING:
                continue
            if about["shape"] is None:
                findings.append(f"{name} of type {about['dtype']} is no tensor and was left out")
            else:
                tensors[name[len(prefix) :]] = _entry(source, name, about)
    for place in _TRAINING:
        count = sum(name.startswith(f"{place}/") for name in arrays)
        if count:
            metadata.setdefault("optimizer", {})[place] = {"tensors": count}
            findings.append(f"{count} tensors of training state under {place!r} are counted but not in the mapping")
    return Contents("keras-h5", tensors, metadata, config, findings)


def read_keras(archive: Archive, request: Request) -> Contents:
    """A Keras 3 archive: configuration as JSON, weights as HDF5."""
    name = archive.source.name
    config = parse_json(archive.member("config.json").text("config.json"), f"{name}!config.json")
    contents = read(archive.member("model.weights.h5"), request)
    metadata = {"model_config": config, **contents.metadata}
    if "metadata.json" in archive:
        metadata.update(parse_json(archive.member("metadata.json").text("metadata.json"), f"{name}!metadata.json"))
    return Contents("keras-v3", contents.tensors, metadata, config, contents.findings)


def _legacy(
    source: Source, groups: dict[str, Any], arrays: dict[str, Any], prefix: str
) -> tuple[dict[str, Entry], dict[str, list[str]]]:
    tensors: dict[str, Entry] = {}
    layers: dict[str, list[str]] = {}
    for layer in groups[prefix.rstrip("/")]["layer_names"]:
        group = groups.get(prefix + layer)
        if group is None:
            raise CheckpointError(f"{source.name}: layer {layer!r} is listed but not there; the file is damaged")
        names = layers.setdefault(layer, [])
        for weight in group.get("weight_names", []):
            path = f"{layer}/{weight}"
            about = arrays.get(prefix + path)
            if about is None or about["shape"] is None:
                raise CheckpointError(f"{source.name}: weight {path!r} is listed but no array; the file is damaged")
            name = _name(layer, weight)
            name = path if name in tensors else name
            tensors[name] = _entry(source, prefix + path, about)
            names.append(name)
    return tensors, layers


def _name(layer: str, weight: str) -> str:
    # Keras repeats the layer in the weight's name, after the model's name since Keras 3, and numbers the
    # repetition when it had two graphs in one session: layer conv2d_1 may hold conv2d_1_1/kernel:0. The
    # layer's name is the one that the configuration uses.
    parts = weight.split("/")
    for index, part in enumerate(parts[:-1]):
        if part == layer or re.fullmatch(re.escape(layer) + r"_\d+", part):
            return "/".join([layer, *parts[index + 1 :]])
    return f"{layer}/{weight}"


def _json(source: Source, attributes: dict[str, Any], name: str) -> dict[str, Any] | None:
    if name not in attributes:
        return None
    try:
        value = json.loads(attributes[name])
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{source.name}: the attribute {name} is no JSON ({error})"[:300]) from error
    return value if isinstance(value, dict) else None


# ---------------------------------------------------------------------------------------------------
# Numbers, read without the library


def _entry(source: Source, name: str, about: dict[str, Any]) -> Entry:
    what = f"{source.name}: {name}"
    kind = np.dtype(about["dtype"])
    dtype = dtypes.from_numpy(kind)
    if dtype is None:
        raise CheckpointError(f"{what} has elements of type {about['dtype']}, which are no tensor")
    shape = tuple(about["shape"])
    needed = limits.count(shape, what) * dtype.itemsize
    big = kind.byteorder == ">"
    if "inline" in about:
        data = base64.b64decode(about["inline"])
        if len(data) != needed:
            raise CheckpointError(f"{what} of shape {shape} needs {needed:,} bytes, {len(data):,} are there")
        return Entry(shape, dtype, functools.partial(_load_inline, data, dtype, shape, big))
    if "offset" in about:
        source.check(about["offset"], needed, name)
        return Entry(shape, dtype, functools.partial(_load, source, about["offset"], needed, dtype, shape, big))
    limits.check_expansion(needed, about["stored"], what)
    unknown = [f for f in about["filters"] if f not in (_DEFLATE, _SHUFFLE, _CHECKSUM)]
    if unknown:
        raise CheckpointError(f"{what} is packed by HDF5 filter {unknown[0]}; save it with gzip or without packing")
    for start, _, offset, size in about["chunks"]:
        source.check(offset, size, name)
        if len(start) != len(shape):
            raise CheckpointError(f"{what} has {len(shape)} axes, a chunk of it {len(start)}")
    if sum(size for *_, size in about["chunks"]) > source.size:
        raise UnsafeCheckpointError(f"{what} uses the same bytes for several of its chunks")
    limits.check_expansion(
        limits.count(tuple(about["chunk"]), what) * len(about["chunks"]) * kind.itemsize, source.size, what
    )
    return Entry(shape, dtype, functools.partial(_load_chunks, source, what, kind, about, dtype, shape))


def _load(
    source: Source, offset: int, length: int, dtype: torch.dtype, shape: tuple[int, ...], big: bool
) -> torch.Tensor:
    return dtypes.to_tensor(source.buffer(offset, length), dtype, shape, big_endian=big)


def _load_inline(data: bytes, dtype: torch.dtype, shape: tuple[int, ...], big: bool) -> torch.Tensor:
    return dtypes.to_tensor(bytearray(data), dtype, shape, big_endian=big)


def _load_chunks(
    source: Source, what: str, kind: np.dtype[Any], about: dict[str, Any], dtype: torch.dtype, shape: tuple[int, ...]
) -> torch.Tensor:
    chunk = tuple(about["chunk"])
    whole = np.full(shape, about["fill"], dtype=kind.newbyteorder("="))
    length = int(np.prod(chunk, dtype=np.int64)) * kind.itemsize
    for start, mask, offset, size in about["chunks"]:
        data = source.read(offset, size, what)
        for index, step in reversed(list(enumerate(about["filters"]))):
            if not mask >> index & 1:
                data = _undo(step, data, length, kind.itemsize, what)
        if len(data) != length:
            raise CheckpointError(f"{what}: a chunk has {len(data):,} bytes instead of {length:,}; it is damaged")
        values = np.frombuffer(data, dtype=kind).reshape(chunk)
        spans = [(first, min(first + width, size)) for first, width, size in zip(start, chunk, shape, strict=True)]
        if all(first < last for first, last in spans):
            inner = tuple(slice(0, last - first) for first, last in spans)
            whole[tuple(itertools.starmap(slice, spans))] = values[inner]
    return torch.from_numpy(whole).to(dtype)


def _undo(step: int, data: bytes, length: int, itemsize: int, what: str) -> bytes:
    if step == _DEFLATE:
        try:
            return zlib.decompressobj().decompress(data, length + 4)
        except zlib.error as error:
            raise CheckpointError(f"{what}: a chunk is damaged ({error})") from error
    if step == _CHECKSUM:
        return data[:-4]
    whole = len(data) // itemsize * itemsize
    return np.frombuffer(data[:whole], dtype=np.uint8).reshape(itemsize, -1).T.tobytes() + data[whole:]


# ---------------------------------------------------------------------------------------------------
# The process that runs the library


class _Scanner:
    """One scanning process for this one; started on first use, replaced when a file brings it down."""

    def __init__(self) -> None:
        script = Path(__file__).with_name("hdf5_scan.py")
        self.pid = os.getpid()
        self.process = subprocess.Popen(
            [sys.executable, "-P", str(script)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
        if self.answer(60.0) is None:
            raise CheckpointError("the process that reads HDF5 files did not start; is the package h5py intact?")

    def ask(self, path: str, seconds: float) -> dict[str, Any] | None:
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(json.dumps({"path": path, "seconds": seconds}).encode() + b"\n")
            self.process.stdin.flush()
        except OSError:
            return None
        return self.answer(60.0 + 10 * seconds)

    def answer(self, seconds: float) -> dict[str, Any] | None:
        assert self.process.stdout is not None
        # The limit that matters is on processor time, in the process; this one is for a stopped process.
        if os.name == "posix" and not select.select([self.process.stdout], [], [], seconds)[0]:
            return None
        line = self.process.stdout.readline()
        value = json.loads(line) if line.endswith(b"\n") else None
        return value if isinstance(value, dict) else None

    def stop(self) -> None:
        self.process.kill()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                try:
                    pipe.close()
                except OSError:
                    continue


_lock = threading.Lock()
_scanners: list[_Scanner] = []


def _scan(source: Source) -> dict[str, Any]:
    if importlib.util.find_spec("h5py") is None:
        raise MissingExtraError("h5py", "keras", f"reading the HDF5 file {source.name}")
    if source.path is not None:
        return _scan_file(source, str(source.path.resolve()))
    with tempfile.TemporaryDirectory(prefix="weightspace-") as folder:
        copy = Path(folder) / "file.h5"
        with copy.open("wb") as file:
            for chunk in source.chunks():
                file.write(chunk)
        return _scan_file(source, str(copy))


def _scan_file(source: Source, path: str) -> dict[str, Any]:
    with _lock:
        if _scanners and _scanners[0].pid != os.getpid():
            _scanners.clear()  # after a fork, the process belongs to the parent
        if not _scanners:
            _scanners.append(_Scanner())
        answer = _scanners[0].ask(path, min(0.4 + source.size / 2e6, 10.0))
        if answer is None:
            _scanners.pop().stop()
            raise UnsafeCheckpointError(
                f"{source.name}: the HDF5 library crashed on the file or did not end; it is damaged or hostile"
            )
    if "error" in answer:
        kind = UnsafeCheckpointError if answer["kind"] == "unsafe" else CheckpointError
        raise kind(f"{source.name}: {answer['error']}")
    return answer


def _stop() -> None:
    for scanner in _scanners:
        if scanner.pid == os.getpid():
            scanner.stop()


atexit.register(_stop)
