"""safetensors written piece by piece: headers first, then every tensor's bytes at their place, in any order.

Nothing but the piece at hand is in memory. Files have no name until they are whole (where the system has no such files,
a temporary one in the target's folder) and get theirs together at the end, the index last. When anything goes wrong
they are removed; files without a name vanish even when the process is killed.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from threading import Lock
from typing import Any

import torch

from weightspace.checkpoint.dtypes import SAFETENSORS
from weightspace.errors import MergeError

_NAMES = {dtype: name for name, dtype in SAFETENSORS.items()}
_SPARE = 64 << 20  # left free on the disk


class MemorySink:
    """Collects results as tensors."""

    def __init__(self, tensors: Sequence[tuple[str, tuple[int, ...], torch.dtype]]) -> None:
        self.tensors = {name: torch.empty(shape, dtype=dtype) for name, shape, dtype in tensors}

    def write(self, name: str, start: int, values: torch.Tensor) -> None:
        """Elements from ``start`` of a flattened tensor, already of the result's type."""
        self.tensors[name].view(-1)[start : start + values.numel()] = values.reshape(-1)


class FileSink:
    """One safetensors file, or shards with an index; a context manager that leaves all or nothing.

    ``path``: a ``.safetensors`` file, or a folder for ``model.safetensors`` and ``extra`` files (name -> bytes or the
    file to copy). ``max_shard_size``: bytes of tensors in one file. Raises `MergeError` where the disk is too full,
    a type has no place in safetensors, or a folder of that name has something in it.
    """

    def __init__(
        self,
        path: Path,
        tensors: Sequence[tuple[str, tuple[int, ...], torch.dtype]],
        *,
        metadata: Mapping[str, str],
        max_shard_size: int | None = None,
        extra: Mapping[str, bytes | Path] | None = None,
    ) -> None:
        self.path = path
        self.is_folder = path.suffix != ".safetensors"
        self._sizes = {name: _bytes(name, shape, dtype) for name, shape, dtype in tensors}
        self._written = dict.fromkeys(self._sizes, 0)
        self._extra = dict(extra or {})
        self._place: dict[str, tuple[int, int, int]] = {}  # tensor -> (file, offset, bytes an element)
        self._files: list[tuple[Path, int]] = []
        self._lock = Lock()
        self._tensors, self._metadata = list(tensors), dict(metadata)
        self._shards = _shards(self._sizes, max_shard_size)
        if path.parent != Path() and not path.parent.is_dir():
            raise MergeError(f"{path}: the folder {path.parent} is not there; make it first")
        if self.is_folder and path.is_dir() and any(path.iterdir()):
            raise MergeError(f"{path} is a folder with files in it; name a new one, or empty it first")
        if self.is_folder and path.exists() and not path.is_dir():
            raise MergeError(f"{path} is a file; results are written to NAME.safetensors or to a new folder")
        free, needed = shutil.disk_usage(path.parent).free, sum(self._sizes.values())
        if needed + _SPARE > free:
            raise MergeError(
                f"{path} needs {needed / 1e9:,.2f} GB, and {free / 1e9:,.2f} GB are free there; "
                "make room, choose another disk, or write a narrower type with dtype='bfloat16'"
            )

    def __enter__(self) -> FileSink:
        self._mark = f"{os.getpid()}-{secrets.token_hex(4)}"
        self._home = self.path.parent
        if self.is_folder:
            self._home = self.path.with_name(f".{self.path.name}.{self._mark}.tmp")  # made at the end
        try:
            for index, names in enumerate(self._shards):
                self._begin(index, names)
        except BaseException:
            self._discard()
            raise
        return self

    def write(self, name: str, start: int, values: torch.Tensor) -> None:
        """Elements from ``start`` of a flattened tensor, already of the result's type."""
        if not values.numel():
            return
        file, offset, size = self._place[name]
        data = values.contiguous().reshape(-1).view(torch.uint8).numpy().data
        at = offset + start * size
        done = 0
        while done < len(data):
            done += os.pwrite(self._files[file][1], data[done:], at + done)
        with self._lock:
            self._written[name] += len(data)

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        try:
            if kind is None:
                self._finish()
        finally:
            self._discard()

    def _begin(self, index: int, names: Sequence[str]) -> None:
        of = {name: (shape, dtype) for name, shape, dtype in self._tensors}
        header: dict[str, Any] = {"__metadata__": self._metadata}
        at = 0
        for name in names:
            shape, dtype = of[name]
            header[name] = {
                "dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [at, at + self._sizes[name]],
            }  # fmt: skip
            at += self._sizes[name]
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        text += b" " * (-len(text) % 8)
        temporary = self.path.parent / f".{self.path.name}.{index}.{self._mark}.tmp"
        self._files.append((temporary, _nameless(temporary)))
        descriptor = self._files[-1][1]
        os.write(descriptor, len(text).to_bytes(8, "little") + text)
        os.truncate(descriptor, 8 + len(text) + at)
        at = 8 + len(text)
        for name in names:
            self._place[name] = (index, at, of[name][1].itemsize)
            at += self._sizes[name]

    def _name(self, index: int) -> str:
        stem = "model" if self.is_folder else self.path.stem
        if len(self._shards) == 1:
            return f"{stem}.safetensors"
        return f"{stem}-{index + 1:05d}-of-{len(self._shards):05d}.safetensors"

    def _finish(self) -> None:
        short = [name for name, size in self._sizes.items() if self._written[name] != size]
        if short:
            raise MergeError(f"{short[0]}: {self._written[short[0]]:,} of {self._sizes[short[0]]:,} bytes were written")
        for _, descriptor in self._files:
            os.fsync(descriptor)
        if len(self._shards) > 1:
            names = {name: self._name(i) for i, names in enumerate(self._shards) for name in names}
            index = {"metadata": {"total_size": sum(self._sizes.values())}, "weight_map": names}
            stem = "model.safetensors" if self.is_folder else self.path.name
            self._extra[f"{stem}.index.json"] = json.dumps(index, indent=2).encode()
        if self.is_folder:
            self._home.mkdir()
        for index_, (temporary, descriptor) in enumerate(self._files):
            if not temporary.exists():
                # A name for a file without one; absolute paths ignore the folder, which has the link followed.
                os.link(f"/proc/self/fd/{descriptor}", temporary, src_dir_fd=descriptor, follow_symlinks=True)
            temporary.replace(self._home / self._name(index_))
        for name, content in self._extra.items():
            temporary = self._home / f".{name}.{self._mark}.tmp"
            try:
                if isinstance(content, Path):
                    shutil.copyfile(content, temporary)
                else:
                    temporary.write_bytes(content)
                temporary.replace(self._home / name)
            finally:
                temporary.unlink(missing_ok=True)
        if self.is_folder:
            self._home.replace(self.path)

    def _discard(self) -> None:
        for temporary, descriptor in self._files:
            os.close(descriptor)
            temporary.unlink(missing_ok=True)
        self._files = []
        if self.is_folder and self._home.is_dir():
            shutil.rmtree(self._home)

    @property
    def result(self) -> Path:
        """What to open: the file, the index of several, or the folder."""
        if self.is_folder or len(self._shards) == 1:
            return self.path
        return self.path.with_name(f"{self.path.name}.index.json")


def _nameless(path: Path) -> int:
    """A new file in the folder of ``path`` that has no name yet; under that name where such files are not known."""
    if hasattr(os, "O_TMPFILE") and Path("/proc/self/fd").is_dir():
        try:
            return os.open(path.parent, os.O_RDWR | os.O_TMPFILE, 0o666)
        except OSError:
            pass  # a file system without such files
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0), 0o666)


def _bytes(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> int:
    if dtype not in _NAMES:
        raise MergeError(f"safetensors cannot hold {dtype} ({name!r}); copy it to another type or leave it out")
    return torch.Size(shape).numel() * dtype.itemsize


def _shards(sizes: Mapping[str, int], limit: int | None) -> list[list[str]]:
    shards: list[list[str]] = [[]]
    filled = 0
    for name, size in sizes.items():
        if limit is not None and shards[-1] and filled + size > limit:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    return shards
