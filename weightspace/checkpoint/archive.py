"""Zip archives whose names and sizes are checked before they are believed."""

from __future__ import annotations

import functools
import struct
import zipfile
import zlib

from weightspace.checkpoint.limits import check_expansion
from weightspace.checkpoint.source import MemorySource, Source, check_relative
from weightspace.errors import CheckpointError, UnsafeCheckpointError

_LOCAL = struct.Struct("<4s5H3I2H")


class Archive:
    """The files in a zip, as sources. Stored ones are read in place, deflated ones on first use."""

    def __init__(self, source: Source) -> None:
        self.source = source
        try:
            self._zip = zipfile.ZipFile(source.stream())
        except (zipfile.BadZipFile, struct.error, ValueError, NotImplementedError, EOFError, OSError) as error:
            raise CheckpointError(
                f"{source.name}: the archive is damaged or truncated ({error}); fetch it again"
            ) from error
        self._infos: dict[str, zipfile.ZipInfo] = {}
        for info in self._zip.infolist():
            if info.filename.endswith("/"):
                continue
            check_relative(info.filename, source.name)
            if info.filename in self._infos:
                raise UnsafeCheckpointError(f"{source.name}: two files in the archive are called {info.filename!r}")
            if info.flag_bits & 1:
                raise CheckpointError(f"{source.name}: {info.filename} is encrypted; decrypt the archive first")
            check_expansion(info.file_size, info.compress_size, f"{source.name}: {info.filename}")
            self._infos[info.filename] = info
        # zipfile finds the last directory there is: in a truncated archive, that of an archive inside it.
        if self._infos and min(info.header_offset for info in self._zip.infolist()) != 0:
            raise CheckpointError(f"{source.name}: the archive's own directory is missing; it is truncated")
        check_expansion(sum(i.file_size for i in self._infos.values()), source.size, source.name)
        self.names = list(self._infos)

    def __contains__(self, name: str) -> bool:
        return name in self._infos

    def size(self, name: str) -> int:
        """Declared, checked size of a file in bytes."""
        return self._info(name).file_size

    def _info(self, name: str) -> zipfile.ZipInfo:
        if name not in self._infos:
            raise CheckpointError(f"{self.source.name}: there is no {name!r} in the archive")
        return self._infos[name]

    def member(self, name: str) -> Source:
        """A file of the archive."""
        info = self._info(name)
        label = f"{self.source.name}!{name}"
        header = self.source.read(info.header_offset, _LOCAL.size, name)
        signature, *_, name_length, extra_length = _LOCAL.unpack(header)
        if signature != b"PK\x03\x04":
            raise CheckpointError(f"{label}: the archive's directory points at something else; it is damaged")
        start = info.header_offset + _LOCAL.size + name_length + extra_length
        packed = self.source.window(start, info.compress_size, label)
        if info.compress_type == zipfile.ZIP_STORED:
            if info.compress_size != info.file_size:
                raise UnsafeCheckpointError(f"{label}: stored, yet its two sizes differ")
            return packed
        if info.compress_type == zipfile.ZIP_DEFLATED:
            return _Deflated(packed, info.file_size, label)
        raise CheckpointError(f"{label}: compression method {info.compress_type} is not read; store or deflate it")


class _Deflated(Source):
    def __init__(self, packed: Source, size: int, name: str) -> None:
        super().__init__(name, size)
        self._packed = packed

    @functools.cached_property
    def _plain(self) -> MemorySource:
        inflate = zlib.decompressobj(-15)
        data = bytearray()
        try:
            for chunk in self._packed.chunks():
                while chunk and len(data) <= self.size:
                    data += inflate.decompress(chunk, self.size + 1 - len(data))
                    chunk = inflate.unconsumed_tail
            data += inflate.decompress(b"", max(1, self.size + 1 - len(data)))
        except zlib.error as error:
            raise CheckpointError(f"{self.name}: the compressed data is damaged ({error})") from error
        if len(data) != self.size:
            raise CheckpointError(f"{self.name}: unfolds to another size than the {self.size:,} bytes it declares")
        return MemorySource(self.name, bytes(data))

    def _read(self, offset: int, length: int) -> bytes | bytearray:
        return self._plain.read(offset, length)
