"""Folders: a Hugging Face model, a PEFT adapter, or a folder with one weight file; and sharded indices."""

from __future__ import annotations

from typing import Any

from weightspace.checkpoint.contents import Contents, Request, SeveralModelsError
from weightspace.checkpoint.safetensors import parse_json
from weightspace.checkpoint.source import Folder, Source
from weightspace.errors import CheckpointError, UnknownFormatError

_INDICES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
_SINGLE = ("model.safetensors", "pytorch_model.bin", "model.bin", "flax_model.msgpack", "tf_model.h5", "model.onnx")
_ADAPTERS = ("adapter_model.safetensors", "adapter_model.bin")


def matches(source: Source) -> bool:
    """A JSON object with a ``weight_map``."""
    head = source.head(1 << 12).lstrip()
    if not head.startswith(b"{") or source.size > 100 << 20:
        return False
    return b'"weight_map"' in head or (source.size > 1 << 12 and b'"weight_map"' in source.read(0, source.size))


def read(source: Source, request: Request) -> Contents:
    """A sharded model by its index: every tensor from the shard that the index names, in the index's order."""
    from weightspace.checkpoint.readers import read as read_any

    index = parse_json(source.text("the index"), source.name)
    table = index.get("weight_map")
    if not isinstance(table, dict) or not table or not all(isinstance(v, str) for v in table.values()):
        raise CheckpointError(f"{source.name}: the weight_map should name a file for every tensor")
    if source.folder is None:
        raise CheckpointError(f"{source.name}: an index without the folder of its shards; unpack the archive first")
    shards: dict[str, Contents] = {}
    for shard in dict.fromkeys(table.values()):
        file = source.folder.open(shard)
        if matches(file):
            raise CheckpointError(f"{source.name}: the shard {shard} is an index itself")
        shards[shard] = read_any(file, request.inside())
    missing = [name for name, shard in table.items() if name not in shards[shard].tensors]
    if missing:
        raise CheckpointError(f"{source.name}: {len(missing)} tensors are not in their shard, e.g. {missing[0]!r}")
    tensors = {name: shards[shard].tensors[name] for name, shard in table.items()}
    findings = list(dict.fromkeys(f for part in shards.values() for f in part.findings))
    extra = sum(len(part.tensors) for part in shards.values()) - len(tensors)
    if extra:
        findings.append(f"{extra} tensors of the shards are not in the index and were left out")
    metadata: dict[str, Any] = {}
    for part in shards.values():
        metadata.update(part.metadata)
    metadata["shards"] = list(shards)
    if isinstance(index.get("metadata"), dict):
        metadata["index"] = index["metadata"]
    kinds = dict.fromkeys(part.format for part in shards.values())
    return Contents("+".join(kinds), tensors, metadata, findings=findings)


def weights_of(folder: Folder, where: str) -> tuple[str, list[str]]:
    """How a folder is read, ``peft``, ``hf-folder`` or ``folder``, and its weight file (or files, if several)."""
    from weightspace.checkpoint.readers import detect

    names = folder.names()
    if "adapter_config.json" in names:
        found = [n for n in _ADAPTERS if n in names]
        if not found:
            raise CheckpointError(f"{where} has an adapter_config.json but none of {', '.join(_ADAPTERS)}")
        return "peft", found[:1]
    kind = "hf-folder" if "config.json" in names else "folder"
    for name in (_INDICES[0], _SINGLE[0], _INDICES[1], *_SINGLE[1:]):
        if name in names and (kind == "hf-folder" or name != "model.onnx"):
            return kind, [name]
    indices = [n for n in names if n.endswith(".index.json")]
    if indices:
        return kind, indices
    skip = ("optimizer", "scheduler", "training_args", "rng_state", "scaler")
    return kind, [n for n in names if not n.startswith(skip) and detect(folder.open(n)) is not None]


def read_folder(folder: Folder, where: str, request: Request) -> Contents:
    """Read a folder as one model."""
    from weightspace.checkpoint.readers import read as read_any

    kind, found = weights_of(folder, where)
    if not found:
        raise UnknownFormatError(f"{where}: no file in this folder is a model that can be read")
    if request.member is not None:
        name, _, inner = request.member.partition("!")
        return read_any(folder.open(name), Request(member=inner or None, key=request.key))
    if len(found) > 1:
        raise SeveralModelsError(where, found)
    contents = read_any(folder.open(found[0]), request)
    if kind == "folder":
        return contents
    names = folder.names()
    config_name = "adapter_config.json" if kind == "peft" else "config.json"
    config = parse_json(folder.open(config_name).text(config_name), f"{where}/{config_name}")
    metadata = {**contents.metadata, "config": config, "weights": found[0], "weights_format": contents.format}
    if kind == "hf-folder" and "generation_config.json" in names:
        text = folder.open("generation_config.json").text("generation_config.json")
        metadata["generation_config"] = parse_json(text, f"{where}/generation_config.json")
    return Contents(kind, contents.tensors, metadata, config, contents.findings)
