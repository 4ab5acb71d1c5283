"""`Checkpoint`, a lazy mapping of names to tensors, and the functions that make one."""

from __future__ import annotations

import functools
import hashlib
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from weightspace.checkpoint import folder as folders
from weightspace.checkpoint import readers, zips
from weightspace.checkpoint.contents import Contents, Entry, Request
from weightspace.checkpoint.safetensors import parse_json
from weightspace.checkpoint.source import FileSource, Folder, LocalFolder, RemoteFolder, RemoteSource, Source
from weightspace.errors import CheckpointError, UnknownFormatError, UnsafeCheckpointError

_URL = re.compile(r"[a-zA-Z][a-zA-Z0-9+.-]+(::[a-zA-Z0-9+.-]+)*://")


class Checkpoint(Mapping[str, torch.Tensor]):
    """A model file as a mapping of names to tensors, in file order. Tensors load on access, to the CPU.

    Each access gives a tensor of its own: writing to it changes neither the file nor later accesses.
    Large tensors are memory-mapped privately where the format stores them plainly.

    ``path``: where it was opened from, None for an in-memory one. ``format``: "safetensors",
    "pytorch-zip", "pytorch-legacy", "pytorch-tar", "pickle", "torchscript", "sb3", "onnx", "keras-h5",
    "keras-v3", "npy", "npz", "gguf", "flax-msgpack", "peft", "hf-folder" or "memory". ``metadata``: what
    the file says beside its tensors. ``config``: the architecture's configuration, if any. ``findings``:
    what is odd about the file or was decided while reading it.
    """

    def __init__(
        self,
        contents: Contents,
        *,
        path: Path | None = None,
        address: str | None = None,
        request: Request | None = None,
        parts: tuple[Source, ...] = (),
    ) -> None:
        if not contents.tensors:
            raise CheckpointError(f"{address or 'the mapping'} holds no tensors, so it is no checkpoint of a model")
        for name in contents.tensors:
            _check_name(name, address or "the mapping")
        self.path = path
        self.format = contents.format
        self.metadata: Mapping[str, Any] = dict(contents.metadata)
        self.config: dict[str, Any] | None = contents.config
        self.findings: list[str] = list(contents.findings)
        self._entries = dict(contents.tensors)
        self._address, self._request, self._parts = address, request or Request(), parts

    # The mapping

    def __getitem__(self, name: str) -> torch.Tensor:
        entry = self._entry(name)
        tensor = entry.load()
        if tuple(tensor.shape) != entry.shape or tensor.dtype != entry.dtype:
            raise CheckpointError(
                f"{self._where()}: {name!r} loaded as {tensor.dtype} {tuple(tensor.shape)}, "
                f"the file promised {entry.dtype} {entry.shape}"
            )
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    def _entry(self, name: str) -> Entry:
        try:
            return self._entries[name]
        except KeyError:
            near = [n for n in self._entries if name in n or n in name][:5]
            hint = f"; near: {', '.join(near)}" if near else f"; it begins with {', '.join(list(self)[:5])}"
            raise KeyError(f"{self._where()} has no tensor {name!r}{hint}") from None

    def part(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Elements ``start`` to ``stop`` of a flattened tensor, shape (stop - start,).

        Reads no more than these from safetensors; other formats load the tensor and give a view of it.
        Raises ``IndexError`` outside ``0 <= start <= stop <= elements``.
        """
        entry = self._entry(name)
        if not 0 <= start <= stop <= entry.numel:
            raise IndexError(f"{self._where()}: {name!r} has {entry.numel:,} elements, not {start:,} to {stop:,}")
        if entry.part is None:
            return self[name].reshape(-1)[start:stop]
        return entry.part(start, stop)

    def reads_parts(self, name: str) -> bool:
        """Whether `part` reads no more of a tensor than it is asked for."""
        return self._entry(name).part is not None

    # What is known without loading

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, without loading it."""
        return self._entry(name).shape

    def dtype(self, name: str) -> torch.dtype:
        """Element type of a tensor as it loads, without loading it."""
        return self._entry(name).dtype

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of all tensors."""
        return {name: entry.shape for name, entry in self._entries.items()}

    @property
    def dtypes(self) -> dict[str, torch.dtype]:
        """Element types of all tensors."""
        return {name: entry.dtype for name, entry in self._entries.items()}

    @property
    def num_parameters(self) -> int:
        """Elements of all tensors, buffers included."""
        return sum(entry.numel for entry in self._entries.values())

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors once loaded."""
        return sum(entry.nbytes for entry in self._entries.values())

    @functools.cached_property
    def sha256(self) -> str:
        """SHA-256 of the file; of a member's bytes in an archive; of names and digests where it is several files."""
        if not self._parts:
            return self.content_hash()
        if len(self._parts) == 1:
            return self._parts[0].sha256()
        digest = hashlib.sha256()
        for part in self._parts:
            digest.update(f"{Path(part.name).name}\0{part.sha256()}\n".encode())
        return digest.hexdigest()

    def content_hash(self) -> str:
        """SHA-256 of names, types, shapes and values: equal for one model in two formats. Reads everything."""
        digest = hashlib.sha256()
        for name in sorted(self._entries):
            tensor = self[name].contiguous()
            digest.update(f"{name}\0{tensor.dtype}\0{tuple(tensor.shape)}\0".encode())
            if tensor.numel():
                digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
        return digest.hexdigest()

    # Out

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write to ``.safetensors`` or ``.pt``/``.pth`` by suffix: atomically, order and types kept.

        Raises `CheckpointError` for another suffix or a type that the format cannot hold.
        """
        from weightspace.checkpoint.write import save

        return save(self, Path(path))

    def _where(self) -> str:
        return self._address or "this checkpoint"

    def __repr__(self) -> str:
        kinds = ", ".join(dict.fromkeys(str(e.dtype).removeprefix("torch.") for e in self._entries.values()))
        lines = [
            f"Checkpoint({self._where()!r}, {self.format}, {len(self):,} tensors, "
            f"{self.num_parameters:,} parameters, {_size(self.nbytes)}, {kinds})"
        ]
        names = list(self._entries)
        shown = names if len(names) <= 12 else [*names[:8], "", *names[-3:]]
        width = min(max(len(n) for n in shown), 60)
        for name in shown:
            if name:
                entry = self._entries[name]
                lines.append(f"  {name:<{width}}  {list(entry.shape)}")
            else:
                lines.append(f"  ... {len(names) - 11} more")
        lines += [f"  note: {finding}" for finding in self.findings[:5]]
        return "\n".join(lines)

    def __reduce__(self) -> tuple[Any, ...]:
        # Workers open the file again; only what has no file travels as tensors.
        if self._address is not None:
            return _reopen, (self._address, self._request.key)
        return from_tensors, (dict(self), dict(self.metadata))


def open(path: str | os.PathLike[str], member: str | None = None, *, key: str | None = None) -> Checkpoint:
    """Open any checkpoint, lazily, by its content; nothing in it is executed.

    ``path``: a file, a Hugging Face or PEFT folder, an index of shards, or an fsspec URL (``s3://...``).
    ``member``: which model, where a file holds several; ``"zoo.zip!a.pt"`` says the same.
    ``key``: which part of a pickle is the model, a dotted path such as ``"teacher.state_dict"``; without
    it the choice follows the rules of `weightspace.checkpoint.choose`.

    Raises `UnknownFormatError` for something else, `UnsafeCheckpointError` for a hostile file,
    `CheckpointError` for a damaged one or one of several models, `MissingExtraError` where HDF5 or
    quantised GGUF tensors need a package.
    """
    text = os.fspath(path)
    if not isinstance(text, str):
        raise CheckpointError(f"a path as text was expected, found {type(text).__name__}")
    text, member = _split(text, member)
    request = Request(member=member, key=key)
    place = _place(text)
    if isinstance(place, Source):
        contents = readers.read(place, request)
        parts = _parts(place, contents)
    else:
        contents = folders.read_folder(place, text, request)
        parts = tuple(place.open(name) for name in _files(place, text, contents, request))
    address = text if member is None else f"{text}!{member}"
    return Checkpoint(
        contents, path=None if _is_remote(text) else Path(_local(text)), address=address, request=request, parts=parts
    )


def list_models(path: str | os.PathLike[str]) -> list[str]:
    """Addresses of the models in a file or below a folder, each fit for `open`.

    One address for a plain model file, a Hugging Face or a PEFT folder; ``"zoo.zip!a.pt"`` for each model
    of an archive; all of them for a folder of files. Files that no reader recognises are not listed in a
    folder; given alone, such a file raises `UnknownFormatError`. A recognised but damaged file is listed,
    so that opening it can say what is wrong.
    """
    text = os.fspath(path)
    if not _is_remote(text) and Path(_local(text)).is_dir():
        return sorted(_below(Path(_local(text)), text))
    place = _place(text)
    if not isinstance(place, Source):
        kind, found = folders.weights_of(place, text)
        return [text] if kind != "folder" else [f"{text.rstrip('/')}/{name}" for name in found]
    if readers.detect(place) is None:
        readers.read(place, Request())  # raises UnknownFormatError with the reason
    members = readers.members_of(place, Request())
    return [f"{text}!{member}" for member in members] if len(members) > 1 else [text]


def from_tensors(tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, Any] | None = None) -> Checkpoint:
    """A checkpoint over tensors in memory; access gives copies, so that the originals stay as they are."""
    entries: dict[str, Entry] = {}
    for name, tensor in tensors.items():
        if not isinstance(name, str) or not isinstance(tensor, torch.Tensor):
            raise CheckpointError(
                f"names and tensors were expected, found {type(name).__name__}: {type(tensor).__name__}"
            )
        held = tensor.detach()
        entries[name] = Entry(tuple(held.shape), held.dtype, functools.partial(_copy, held))
    given = dict(metadata or {})
    config = given.get("config")
    return Checkpoint(Contents("memory", entries, given, config if isinstance(config, dict) else None))


def from_entries(
    entries: Mapping[str, Entry], kind: str, metadata: Mapping[str, Any], config: dict[str, Any] | None = None
) -> Checkpoint:
    """A checkpoint whose tensors are computed on access."""
    return Checkpoint(Contents(kind, dict(entries), dict(metadata), config))


def _reopen(address: str, key: str | None) -> Checkpoint:
    return open(address, key=key)


def _copy(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to("cpu", copy=True)


def _check_name(name: str, where: str) -> None:
    # Names become file and group names when tensors are exported, so none may climb.
    if "\0" in name or any(part == ".." for part in re.split(r"[/\\]", name)):
        raise UnsafeCheckpointError(f"{where}: the tensor name {name[:200]!r} could be used to climb out of a folder")


def _split(text: str, member: str | None) -> tuple[str, str | None]:
    if "!" not in text or (not _is_remote(text) and os.path.lexists(_local(text))):
        return text, member
    outer, _, inner = text.partition("!")
    while not _is_remote(outer) and not os.path.lexists(_local(outer)) and "!" in inner:
        more, _, inner = inner.partition("!")
        outer = f"{outer}!{more}"
    if member is not None:
        raise CheckpointError(f"the member is given twice: {inner!r} in the path and {member!r}")
    return outer, inner


def _is_remote(text: str) -> bool:
    return bool(_URL.match(text)) and not text.startswith(("file://", "local://"))


def _local(text: str) -> str:
    return re.sub(r"^(file|local)://", "", text)


def _place(text: str) -> Source | Folder:
    if not _is_remote(text):
        path = Path(_local(text)).expanduser()
        try:
            return LocalFolder(path) if path.is_dir() else FileSource(path)
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{text[:200]!r}: {error}. Check the path.") from error
    import fsspec

    try:
        system, location = fsspec.core.url_to_fs(text)
        is_folder = system.isdir(location)
    except Exception as error:  # ImportError for a missing driver, and each system's own errors
        raise CheckpointError(f"{text}: {type(error).__name__}: {error}. Check the address.") from error
    if is_folder:
        return RemoteFolder(system, location)
    return RemoteSource(system, location, RemoteFolder(system, location.rpartition("/")[0]))


def _parts(source: Source, contents: Contents) -> tuple[Source, ...]:
    member = contents.metadata.get("member")
    shards = contents.metadata.get("shards")
    if isinstance(shards, list) and source.folder is not None and folders.matches(source):
        return (source, *(source.folder.open(name) for name in shards))
    if isinstance(member, str) and zips.matches(source):
        from weightspace.checkpoint.archive import Archive

        for name in member.split("!"):
            if not zips.matches(source):
                break  # a row of an array, which has no bytes of its own file
            source = Archive(source).member(name)
    return (source,)


def _files(folder: Folder, where: str, contents: Contents, request: Request) -> list[str]:
    if request.member is not None:
        return [request.member.partition("!")[0]]
    kind, found = folders.weights_of(folder, where)
    shards = contents.metadata.get("shards")
    config = {"peft": ["adapter_config.json"], "hf-folder": ["config.json"]}.get(kind, [])
    return [*config, *found, *(shards if isinstance(shards, list) else [])]


def _below(root: Path, text: str) -> Iterator[str]:
    folder = LocalFolder(root)
    names = folder.names()
    if "adapter_config.json" in names or ("config.json" in names and folders.weights_of(folder, text)[1]):
        yield text
        return
    shards: set[str] = set()
    for name in names:
        if name.endswith(".index.json"):
            try:
                source = folder.open(name)
                table = parse_json(source.text("the index"), name).get("weight_map")
                shards |= set(table.values()) if isinstance(table, dict) else set()
            except (CheckpointError, TypeError):
                continue
    for name in names:
        if name in shards or name.startswith("."):
            continue
        address = f"{text.rstrip('/')}/{name}"
        try:
            yield from list_models(address)
        except UnsafeCheckpointError:
            yield address
        except UnknownFormatError:
            continue
        except CheckpointError:
            yield address
    for entry in sorted(os.scandir(root), key=lambda e: e.name):
        if entry.is_dir(follow_symlinks=False) and not entry.name.startswith("."):
            yield from _below(Path(entry.path), f"{text.rstrip('/')}/{entry.name}")


def _size(count: int) -> str:
    value = float(count)
    for unit in ("B", "kB", "MB", "GB"):
        if value < 1000:
            return f"{value:.3g} {unit}"
        value /= 1000
    return f"{value:.3g} TB"
