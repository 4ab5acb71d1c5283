"""Zip archives by what is inside: PyTorch, Keras, npz, Stable-Baselines3, or just files of which some are models."""

from __future__ import annotations

from typing import Any

from weightspace.checkpoint import hdf5, npy, pytorch
from weightspace.checkpoint.archive import Archive
from weightspace.checkpoint.contents import Contents, Request, SeveralModelsError
from weightspace.checkpoint.limits import MAX_NESTED_ARCHIVES
from weightspace.checkpoint.safetensors import parse_json
from weightspace.checkpoint.source import Source
from weightspace.errors import CheckpointError, UnknownFormatError, UnsafeCheckpointError


def matches(source: Source) -> bool:
    """The signature of a zip's first file, or of an empty zip."""
    return source.head(4) in (b"PK\x03\x04", b"PK\x05\x06")


def read(source: Source, request: Request) -> Contents:
    """Read the model that the archive is, or the one that it holds."""
    _limit(source, request)
    archive = Archive(source)
    kind = kind_of(archive)
    if kind is not None and request.member is not None:
        raise CheckpointError(f"{source.name} is one {kind} model; there is no member {request.member!r} to choose")
    if kind == "pytorch":
        return pytorch.read_zip(archive, request)
    if kind == "keras":
        return hdf5.read_keras(archive, request)
    if kind == "npz":
        return npy.read_npz(archive, request)
    if kind == "sb3":
        return _read_sb3(archive, request)
    return _read_member(archive, request)


def kind_of(archive: Archive) -> str | None:
    """The model format that the whole archive is; None for a plain zip."""
    if pytorch.root_of(archive) is not None:
        return "pytorch"
    if "config.json" in archive and "model.weights.h5" in archive:
        return "keras"
    if "policy.pth" in archive and ("data" in archive or "_stable_baselines3_version" in archive):
        return "sb3"
    if archive.names and all(name.endswith(".npy") for name in archive.names):
        return "npz"
    return None


def members(source: Source, request: Request) -> list[str]:
    """Models inside a plain zip, as names for ``member``; empty where the zip itself is one model."""
    from weightspace.checkpoint.readers import detect, members_of

    _limit(source, request)
    archive = Archive(source)
    if kind_of(archive) is not None:
        return []
    found: list[str] = []
    for name in archive.names:
        inner = archive.member(name)
        if detect(inner) is None:
            continue
        below = members_of(inner, request.inside())
        found += [f"{name}!{below_name}" for below_name in below] or [name]
    return found


def _limit(source: Source, request: Request) -> None:
    if request.depth > MAX_NESTED_ARCHIVES:
        raise UnsafeCheckpointError(f"{source.name}: archives are nested deeper than {MAX_NESTED_ARCHIVES} levels")


def _read_member(archive: Archive, request: Request) -> Contents:
    from weightspace.checkpoint.readers import read as read_any

    name = archive.source.name
    listed = members(archive.source, request)
    if not listed:
        raise UnknownFormatError(
            f"{name}: none of the {len(archive.names)} files in this zip is a model that can be read"
        )
    wanted = request.member
    if wanted is None:
        if len(listed) > 1:
            raise SeveralModelsError(name, listed)
        wanted = listed[0]
    outer, _, inner = wanted.partition("!")
    if outer not in archive:
        raise CheckpointError(f"{name} has no model {wanted!r}; it holds: {', '.join(listed[:12])}")
    contents = read_any(archive.member(outer), request.inside(inner or None))
    contents.findings.insert(0, f"read from {outer} inside a zip")
    contents.metadata["member"] = wanted
    return contents


def _read_sb3(archive: Archive, request: Request) -> Contents:
    # Layout: https://stable-baselines3.readthedocs.io/en/master/guide/save_format.html
    name = archive.source.name
    policy = Archive(archive.member("policy.pth")) if matches(archive.member("policy.pth")) else None
    if policy is not None:
        contents = pytorch.read_zip(policy, request)
    else:
        contents = pytorch.read(archive.member("policy.pth"), request)
    metadata: dict[str, Any] = dict(contents.metadata)
    findings = list(contents.findings)
    if "data" in archive:
        data = parse_json(archive.member("data").text("data"), f"{name}!data")
        metadata["data"] = {key: _without_code(value) for key, value in data.items()}
        held = [key for key, value in data.items() if isinstance(value, dict) and ":serialized:" in value]
        if held:
            findings.append(f"pickled objects in the agent's data were left alone: {', '.join(held[:20])}")
    for key in ("_stable_baselines3_version", "system_info.txt"):
        if key in archive:
            metadata[key.strip("_").removesuffix(".txt")] = (
                archive.member(key).text(key, 1 << 16).decode("utf-8", "replace")
            )
    training: dict[str, Any] = {}
    for other in archive.names:
        if other.endswith(".optimizer.pth"):
            training[other] = {"bytes": archive.size(other)}
        elif other.endswith(".pth") and other != "policy.pth" and archive.size(other) > 1 << 10:
            findings.append(f"{other} ({archive.size(other):,} bytes) holds variables beside the policy; left out")
    if training:
        metadata["optimizer"] = training
        findings.append(f"training state in {', '.join(training)} is counted but not part of the mapping")
    return Contents("sb3", contents.tensors, metadata, contents.config, findings)


def _without_code(value: Any) -> Any:
    if isinstance(value, dict) and ":serialized:" in value:
        size = len(str(value[":serialized:"])) * 3 // 4  # kept as base64
        plain = {k: v for k, v in value.items() if k not in (":serialized:", "__doc__") and not str(k).startswith("<")}
        return {**plain, ":serialized:": f"<about {size} bytes, not read>"}
    return value
