"""Bytes at an address: a local file, a part of one, a remote object or memory, with checked bounds.

A source never reads past its end and never believes a length that the file cannot hold. Local files
are opened anew for each access, so that thousands of checkpoints may be open without holding a
descriptor each, and a file that changed since is noticed.
"""

from __future__ import annotations

import hashlib
import io
import mmap
import os
import stat
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any, Protocol

from weightspace.checkpoint.limits import MAX_HEADER_BYTES
from weightspace.errors import CheckpointError, UnknownFormatError, UnsafeCheckpointError

_MAP_FROM = 256 << 10  # below this, copying beats mapping
_CHUNK = 8 << 20


class Folder(Protocol):
    """What lies beside a file: the only place that its shards and external data may come from."""

    def names(self) -> list[str]:
        """Names of the files directly in the folder, sorted."""
        ...

    def open(self, name: str) -> Source:
        """The file ``name``, relative to the folder and inside it."""
        ...


class Source:
    """Random access to ``size`` bytes. Subclasses give ``_read``; ``buffer`` may be mapped."""

    def __init__(self, name: str, size: int, path: Path | None = None, folder: Folder | None = None) -> None:
        self.name = name
        self.size = size
        self.path = path
        self.folder = folder

    def _read(self, offset: int, length: int) -> bytes | bytearray:
        raise NotImplementedError

    def check(self, offset: int, length: int, what: str = "a part") -> None:
        """Raise unless ``length`` bytes from ``offset`` lie inside the source."""
        if offset < 0 or length < 0 or offset + length > self.size:
            raise CheckpointError(
                f"{self.name}: {what} would take bytes {offset:,} to {offset + length:,}, but there are "
                f"{self.size:,}. The file is truncated or damaged: fetch it again."
            )

    def read(self, offset: int, length: int, what: str = "a part") -> bytes:
        """Exactly ``length`` bytes from ``offset``."""
        self.check(offset, length, what)
        data = self._read(offset, length)
        if len(data) != length:
            raise CheckpointError(f"{self.name}: {what} ends early, {len(data):,} of {length:,} bytes are there")
        return bytes(data)

    def head(self, length: int) -> bytes:
        """The first bytes, fewer where the source is shorter."""
        return self.read(0, min(length, self.size))

    def buffer(self, offset: int, length: int, what: str = "a part") -> bytearray | memoryview:
        """``length`` writable bytes that belong to the caller alone."""
        return bytearray(self.read(offset, length, what))

    def text(self, what: str, limit: int = MAX_HEADER_BYTES) -> bytes:
        """The whole source, which must be a small one (a header, a configuration)."""
        if self.size > limit:
            raise UnsafeCheckpointError(f"{self.name}: {what} has {self.size:,} bytes; at most {limit:,} are read")
        return self.read(0, self.size, what)

    def window(self, offset: int, length: int, name: str) -> Source:
        """A part of this source as a source of its own."""
        self.check(offset, length, name)
        return _Window(self, offset, length, name)

    def stream(self) -> io.BufferedReader:
        """The source as a seekable file object."""
        return io.BufferedReader(_Raw(self), 1 << 16)

    def chunks(self) -> Iterator[bytes]:
        """All bytes, some megabytes at a time."""
        for offset in range(0, self.size, _CHUNK):
            yield self.read(offset, min(_CHUNK, self.size - offset))

    def sha256(self) -> str:
        """Hexadecimal SHA-256 of all bytes."""
        digest = hashlib.sha256()
        for chunk in self.chunks():
            digest.update(chunk)
        return digest.hexdigest()


class _Window(Source):
    def __init__(self, parent: Source, offset: int, length: int, name: str) -> None:
        super().__init__(name, length, folder=None)
        self._parent, self._offset = parent, offset

    def _read(self, offset: int, length: int) -> bytes | bytearray:
        return self._parent.read(self._offset + offset, length, self.name)

    def buffer(self, offset: int, length: int, what: str = "a part") -> bytearray | memoryview:
        self.check(offset, length, what)
        return self._parent.buffer(self._offset + offset, length, what)


class MemorySource(Source):
    """Bytes in memory."""

    def __init__(self, name: str, data: bytes, folder: Folder | None = None) -> None:
        super().__init__(name, len(data), folder=folder)
        self._data = data

    def _read(self, offset: int, length: int) -> bytes:
        return self._data[offset : offset + length]


class FileSource(Source):
    """A local file. Large parts are mapped privately: touching them reads, writing leaves the file alone."""

    def __init__(self, path: Path, folder: Folder | None = None) -> None:
        try:
            status = path.stat()
        except OSError as error:
            raise CheckpointError(f"{path}: {error.strerror or error}. Check the path.") from error
        except ValueError as error:
            raise CheckpointError(f"{path!r}: {error}. Check the path.") from error
        if not stat.S_ISREG(status.st_mode):
            raise UnknownFormatError(f"{path} is neither a file nor a folder, so no checkpoint can be in it")
        super().__init__(str(path), status.st_size, path, folder or LocalFolder(path.parent))
        self._stamp = (status.st_size, status.st_mtime_ns)

    def _open(self) -> int:
        assert self.path is not None
        try:
            descriptor = os.open(self.path, os.O_RDONLY | getattr(os, "O_BINARY", 0))
        except OSError as error:
            raise CheckpointError(f"{self.path}: {error.strerror or error}") from error
        status = os.fstat(descriptor)
        if (status.st_size, status.st_mtime_ns) != self._stamp:
            os.close(descriptor)
            raise CheckpointError(f"{self.path} changed since it was opened; open it again")
        return descriptor

    def _read(self, offset: int, length: int) -> bytes | bytearray:
        descriptor = self._open()
        try:
            with os.fdopen(descriptor, "rb", buffering=0) as file:
                file.seek(offset)
                data = bytearray(length)
                view, filled = memoryview(data), 0
                while filled < length:
                    got = file.readinto(view[filled:])
                    if not got:
                        break
                    filled += got
                return data if filled == length else data[:filled]
        except OSError as error:
            raise CheckpointError(f"{self.path}: {error.strerror or error}") from error

    def read(self, offset: int, length: int, what: str = "a part") -> bytes:
        self.check(offset, length, what)
        return bytes(self._read(offset, length))

    def buffer(self, offset: int, length: int, what: str = "a part") -> bytearray | memoryview:
        self.check(offset, length, what)
        if length < _MAP_FROM:
            return bytearray(self._read(offset, length))
        descriptor = self._open()
        try:
            start = offset - offset % mmap.ALLOCATIONGRANULARITY
            mapped = mmap.mmap(descriptor, offset - start + length, access=mmap.ACCESS_COPY, offset=start)
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{self.path}: cannot map {length:,} bytes: {error}") from error
        finally:
            os.close(descriptor)
        return memoryview(mapped)[offset - start :]


class RemoteSource(Source):
    """An object behind an fsspec file system, read by ranges."""

    def __init__(self, system: Any, location: str, folder: Folder | None = None) -> None:
        try:
            size = system.info(location).get("size")
        except Exception as error:  # each file system has errors of its own
            raise CheckpointError(f"{location}: {type(error).__name__}: {error}. Check the address.") from error
        if not isinstance(size, int):
            raise CheckpointError(f"{location}: the server does not say how long it is; download it first")
        super().__init__(location, size, folder=folder)
        self._system = system

    def _read(self, offset: int, length: int) -> bytes:
        if length == 0:
            return b""
        try:
            return bytes(self._system.cat_file(self.name, start=offset, end=offset + length))
        except Exception as error:
            raise CheckpointError(f"{self.name}: {type(error).__name__}: {error}") from error


class LocalFolder:
    """A local folder that nothing leaves: neither by ``..``, nor by an absolute path, nor by a symlink."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def names(self) -> list[str]:
        return sorted(entry.name for entry in os.scandir(self.root) if not entry.is_dir())

    def open(self, name: str) -> Source:
        check_relative(name, str(self.root))
        path = self.root.joinpath(*PurePosixPath(name).parts)
        root, target = self.root.resolve(), path.resolve()
        if not target.is_relative_to(root) and not self._is_hub_blob(root, target):
            raise UnsafeCheckpointError(
                f"{path} is a link to {target}, outside its folder {root}. "
                f"Replace the link by the file if you trust it."
            )
        if not path.exists():
            raise CheckpointError(f"{path} is named by the checkpoint but is not there; fetch it as well")
        return FileSource(path, self)

    @staticmethod
    def _is_hub_blob(root: Path, target: Path) -> bool:
        # The Hugging Face cache keeps snapshots/<revision>/<file> as links to blobs/<hash> beside it.
        return root.parent.name == "snapshots" and target.parent == root.parent.parent / "blobs"


class RemoteFolder:
    """A folder behind an fsspec file system."""

    def __init__(self, system: Any, root: str) -> None:
        self.system, self.root = system, root.rstrip("/")

    def names(self) -> list[str]:
        try:
            entries = self.system.ls(self.root or "/", detail=True)
        except Exception as error:
            raise CheckpointError(f"{self.root}: {type(error).__name__}: {error}") from error
        return sorted(PurePosixPath(e["name"]).name for e in entries if e.get("type") != "directory")

    def open(self, name: str) -> Source:
        check_relative(name, self.root)
        return RemoteSource(self.system, f"{self.root}/{name}", self)


def check_relative(name: str, where: str) -> None:
    """Refuse a file name that could lead out of its folder or archive."""
    parts = name.replace("\\", "/").split("/")
    if not name or "\0" in name or parts[0] == "" or ".." in parts or ":" in parts[0] or "://" in name:
        raise UnsafeCheckpointError(
            f"{where}: the name {name!r} leads out of it; only names inside the same folder or archive are read"
        )


class _Raw(io.RawIOBase):
    def __init__(self, source: Source) -> None:
        self._source, self._at = source, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._source.size}[whence]
        if base + offset < 0:
            raise ValueError("negative seek position")
        self._at = base + offset
        return self._at

    def tell(self) -> int:
        return self._at

    def readinto(self, target: Any) -> int:
        length = max(0, min(len(target), self._source.size - self._at))
        target[:length] = self._source.read(self._at, length) if length else b""
        self._at += length
        return length
