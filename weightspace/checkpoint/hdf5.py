"""Keras files: ``.h5``/``.hdf5`` (whole models and weights) and the ``.keras`` zip.

Tensors are named by layer and weight, ``conv2d_1/kernel:0``; ``metadata["layers"]`` lists the names of
each layer in the order Keras gives them. A whole model's configuration is ``config``. HDF5 links and
storage that lead out of the file are refused.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
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


def matches(source: Source) -> bool:
    """The signature of HDF5 at the file's beginning."""
    return source.head(8) == _MAGIC


def read(source: Source, request: Request) -> Contents:
    """A Keras 1 or 2 file, or any other HDF5 file with numeric data sets."""
    with _open(source) as file:
        metadata: dict[str, Any] = {}
        findings: list[str] = []
        for key in ("keras_version", "backend"):
            for place in (file, file.get("model_weights", default=None)):
                if place is not None and key in place.attrs:
                    metadata[key] = _text(place.attrs[key])
        config = _json_attribute(source, file, "model_config")
        training = _json_attribute(source, file, "training_config")
        if config is not None:
            metadata["model_config"] = config
        if training is not None:
            metadata["training_config"] = training
        if "model_weights" in file and hasattr(file["model_weights"], "keys"):
            weights, prefix = file["model_weights"], "model_weights/"
        else:
            weights, prefix = file, ""
        if "layer_names" in weights.attrs or "layer_names0" in weights.attrs:
            tensors, layers = _legacy(source, weights, prefix)
            metadata["layers"] = layers
        else:
            tensors = _walk(source, weights, prefix, skip=("optimizer", "optimizer_weights", "_optimizer"))
        extra = [n for n in ("optimizer_weights", "optimizer", "_optimizer") if n in file]
        for name in extra:
            count = len(_walk(source, file[name], f"{name}/"))
            metadata.setdefault("optimizer", {})[name] = {"tensors": count}
            if count:
                findings.append(f"{count} tensors of training state under {name!r} are counted but not in the mapping")
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


def _legacy(source: Source, weights: Any, prefix: str) -> tuple[dict[str, Entry], dict[str, list[str]]]:
    tensors: dict[str, Entry] = {}
    layers: dict[str, list[str]] = {}
    for layer in _names(weights, "layer_names"):
        if layer not in weights:
            raise CheckpointError(f"{source.name}: layer {layer!r} is listed but not there; the file is damaged")
        group = weights[layer]
        listed = _names(group, "weight_names")
        for weight in listed:
            path = f"{layer}/{weight}"
            if path not in weights:
                raise CheckpointError(f"{source.name}: weight {path!r} is listed but not there; the file is damaged")
            name = _name(layer, weight)
            if name in tensors:
                name = path
            tensors[name] = _entry(source, weights, path, prefix)
            layers.setdefault(layer, []).append(name)
        layers.setdefault(layer, [])
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


def _walk(source: Source, group: Any, prefix: str, skip: tuple[str, ...] = ()) -> dict[str, Entry]:
    found: dict[str, Entry] = {}
    pending = [(group, "", 0)]
    while pending:
        place, path, depth = pending.pop()
        if depth > 40 or len(found) > 1_000_000:
            raise UnsafeCheckpointError(f"{source.name}: groups are nested deeper than 40 levels, or in a circle")
        if hasattr(place, "keys"):
            names = [n for n in place if not (depth == 0 and n in skip)]
            for name in reversed(names):
                full = f"{path}/{name}" if path else name
                pending.append((_child(source, place, name), full, depth + 1))
        elif hasattr(place, "dtype") and dtypes.from_numpy(place.dtype) is not None and place.shape is not None:
            found[path] = _entry(source, group, path, prefix)
    return found


def _child(source: Source, group: Any, name: str) -> Any:
    import h5py

    link = group.get(name, getlink=True)
    if isinstance(link, h5py.ExternalLink):
        raise UnsafeCheckpointError(f"{source.name}: {name!r} is a link into the file {link.filename!r}; not followed")
    if isinstance(link, h5py.SoftLink):
        raise UnsafeCheckpointError(f"{source.name}: {name!r} is a soft link; weights are stored in place")
    return group[name]


def _entry(source: Source, weights: Any, path: str, prefix: str) -> Entry:
    place = weights
    for part in path.split("/"):
        if part:
            place = _child(source, place, part)
    what = f"{source.name}: {prefix}{path}"
    if not hasattr(place, "shape") or place.shape is None:
        raise CheckpointError(f"{what} is no array")
    if place.external or place.is_virtual:
        raise UnsafeCheckpointError(f"{what} keeps its data in another file; only data in this file is read")
    dtype = dtypes.from_numpy(place.dtype)
    if dtype is None:
        raise CheckpointError(f"{what} has elements of type {place.dtype}, which are no tensor")
    shape = tuple(int(n) for n in place.shape)
    needed = limits.count(shape, what) * dtype.itemsize
    limits.check_expansion(needed, place.id.get_storage_size(), what)
    if place.chunks is None and needed > source.size:
        raise CheckpointError(f"{what} needs {needed:,} bytes in a file of {source.size:,}; it is truncated")
    return Entry(shape, dtype, functools.partial(_load, source, prefix + path, shape, dtype))


def _load(source: Source, path: str, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    with _open(source) as file:
        array = np.asarray(file[path][()])
    if tuple(array.shape) != shape:
        raise CheckpointError(f"{source.name}: {path} changed its shape since it was opened")
    return torch.from_numpy(array.astype(array.dtype.newbyteorder("="), copy=True).reshape(shape)).to(dtype)


@contextmanager
def _open(source: Source) -> Iterator[Any]:
    try:
        import h5py
    except ImportError as error:
        raise MissingExtraError("h5py", "keras", f"reading the HDF5 file {source.name}") from error
    try:
        with h5py.File(source.path if source.path is not None else source.stream(), "r") as file:
            yield file
    except (OSError, KeyError, ValueError, RuntimeError, TypeError, AttributeError, UnicodeError, MemoryError) as error:
        text = str(error)[:300]
        raise CheckpointError(f"{source.name}: the HDF5 file is damaged or truncated ({text})") from error


def _names(group: Any, attribute: str) -> list[str]:
    # Keras splits a list over 64 KiB into attributes name0, name1, ...
    if attribute in group.attrs:
        return [_text(n) for n in group.attrs[attribute]]
    found: list[str] = []
    index = 0
    while f"{attribute}{index}" in group.attrs:
        found += [_text(n) for n in group.attrs[f"{attribute}{index}"]]
        index += 1
    return found


def _text(value: Any) -> str:
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)


def _json_attribute(source: Source, file: Any, name: str) -> dict[str, Any] | None:
    if name not in file.attrs:
        return None
    try:
        value = json.loads(_text(file.attrs[name]))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{source.name}: the attribute {name} is no JSON ({error})"[:300]) from error
    return value if isinstance(value, dict) else None
