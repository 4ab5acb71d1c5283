"""The table of formats. To add one, write a module with `matches` and `read` and list it here."""

from __future__ import annotations

from weightspace.checkpoint import flax, folder, gguf, hdf5, npy, onnx, pytorch, safetensors, zips
from weightspace.checkpoint.contents import Contents, Reader, Request
from weightspace.checkpoint.source import Source
from weightspace.errors import CheckpointError, UnknownFormatError

READERS: dict[str, Reader] = {
    "zip": zips,
    "hdf5": hdf5,
    "npy": npy,
    "gguf": gguf,
    "safetensors": safetensors,
    "sharded index": folder,
    "pytorch": pytorch,
    "onnx": onnx,
    "flax": flax,
}
"""Formats in the order in which their marks are looked for: certain ones first."""


def detect(source: Source) -> str | None:
    """Which reader recognises the content; None if none does."""
    try:
        return next((name for name, reader in READERS.items() if reader.matches(source)), None)
    except CheckpointError:
        return None


def read(source: Source, request: Request) -> Contents:
    """Read ``source`` with the reader that recognises it."""
    name = detect(source)
    if name is None:
        raise UnknownFormatError(_unknown(source))
    contents = READERS[name].read(source, request)
    if request.key is not None and contents.format in _WITHOUT_KEYS:
        raise CheckpointError(
            f"{source.name}: key={request.key!r} chooses a part of a pickle; this is {contents.format}"
        )
    return contents


_WITHOUT_KEYS = ("safetensors", "onnx", "gguf", "npy", "npz", "keras-h5", "keras-v3")


def members_of(source: Source, request: Request) -> list[str]:
    """Names of the models in a file of several; empty where the file is one model."""
    if zips.matches(source):
        return zips.members(source, request)
    if npy.matches(source):
        return npy.members(source)
    return []


def _unknown(source: Source) -> str:
    head = source.head(64)
    if not head:
        return f"{source.name} is empty; fetch it again"
    if head.lstrip()[:1] in (b"{", b"["):
        found = "JSON text, but no index of shards"
    elif head.startswith(b"version https://git-lfs"):
        return f"{source.name} is a Git LFS pointer, not the weights; run `git lfs pull` in its repository"
    elif head.lstrip()[:9].lower() in (b"<!doctype", b"<html"):
        found = "a web page; the download went wrong"
    elif all(b in b"\t\r\n" or 32 <= b < 127 for b in head):
        found = "text"
    elif head[:2] == b"\x1f\x8b":
        found = "gzip; unpack it first"
    else:
        found = f"bytes beginning with {head[:8].hex(' ')}"
    return (
        f"{source.name} is in no format that is known: it holds {found}. Known: safetensors, PyTorch, TorchScript, "
        f"Stable-Baselines3, ONNX, Keras, NumPy, GGUF, Flax, PEFT and Hugging Face folders, and zips of these"
    )
