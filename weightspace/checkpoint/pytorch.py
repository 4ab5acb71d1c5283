"""PyTorch files: the zip of `torch.save` and `torch.jit.save`, the older one-stream format, the oldest tar.

The pickle inside is run by `weightspace.checkpoint.pickles`, which imports and calls nothing; tensors
are located in the file and loaded on access, always to the CPU.
"""

from __future__ import annotations

import functools
import struct
import tarfile
from collections.abc import Callable
from typing import Any

import torch

from weightspace.checkpoint import dtypes, limits
from weightspace.checkpoint.archive import Archive
from weightspace.checkpoint.choose import Choice, Leaf, choose
from weightspace.checkpoint.contents import Contents, Entry, Request
from weightspace.checkpoint.pickles import (
    ArrayRef,
    Cursor,
    Record,
    Report,
    SparseRef,
    StorageRef,
    TensorRef,
    _Dtype,
    load,
    short,
    storage_dtype,
    storage_from_id,
)
from weightspace.checkpoint.source import MemorySource, Source
from weightspace.errors import CheckpointError, UnsafeCheckpointError

_MAGIC = bytes.fromhex("6cfc9c46f9206aa85019")
_PROTOCOL = 1001

Fetch = Callable[[StorageRef, int, int], bytearray | memoryview]
"""``fetch(storage, first element, elements)`` gives writable bytes."""


# ---------------------------------------------------------------------------------------------------
# The zip format, also of TorchScript


def root_of(archive: Archive) -> str | None:
    """The folder that holds ``data.pkl`` in a PyTorch archive, with its slash; None in other archives."""
    for name in archive.names:
        if name == "data.pkl" or (name.endswith("/data.pkl") and name.count("/") == 1):
            return name[: -len("data.pkl")]
    return None


def read_zip(archive: Archive, request: Request) -> Contents:
    """Read a PyTorch or TorchScript archive."""
    root = root_of(archive)
    if root is None:
        raise CheckpointError(f"{archive.source.name}: no data.pkl in the archive, so torch did not write it")
    source = archive.source
    report = Report()
    big = f"{root}byteorder" in archive and archive.member(f"{root}byteorder").text("byteorder", 16) == b"big"
    script = f"{root}constants.pkl" in archive and any(n.startswith(f"{root}code/") for n in archive.names)

    def fetch_from(folder: str, storage: StorageRef, first: int, count: int) -> bytearray | memoryview:
        member = archive.member(f"{root}{folder}/{storage.key}")
        size = storage.dtype.itemsize
        return member.buffer((storage.offset + first) * size, count * size, f"storage {storage.key}")

    def check_from(folder: str, storage: StorageRef) -> int:
        name = f"{root}{folder}/{storage.key}"
        return archive.size(name) // storage.dtype.itemsize if name in archive else -1

    value = load(Cursor(archive.member(f"{root}data.pkl")), report, nested=functools.partial(_nested, report))
    fetch, check = functools.partial(fetch_from, "data"), functools.partial(check_from, "data")
    if not script:
        return _contents("pytorch-zip", source, value, request, report, fetch, check, big)

    contents = _contents("torchscript", source, value, request, report, fetch, check, big)
    if request.key is None:
        constants = load(Cursor(archive.member(f"{root}constants.pkl")), report, nested=None)
        fetch, check = functools.partial(fetch_from, "constants"), functools.partial(check_from, "constants")
        for index, constant in enumerate(constants if isinstance(constants, list | tuple) else ()):
            if isinstance(constant, TensorRef):
                name = f"CONSTANTS.c{index}"
                contents.tensors[name] = _entry(source, name, constant, fetch, check, big)
    contents.findings = [f for f in contents.findings if not f.startswith("tensors were found inside an object")]
    contents.metadata["code"] = [n[len(root) :] for n in archive.names if n.startswith(f"{root}code/")][:1000]
    contents.metadata["class"] = value.type_name if isinstance(value, Record) else short(value)
    return contents


# ---------------------------------------------------------------------------------------------------
# The one-stream format (torch before 1.6)


def matches(source: Source) -> bool:
    """A pickle, or torch's tar."""
    head = source.head(2)
    if len(head) == 2 and head[0] == 0x80 and 2 <= head[1] <= 5:
        return source.head(3)[2:] not in (b"",)
    return matches_tar(source)


def matches_tar(source: Source) -> bool:
    """A tar archive, as torch wrote before 0.1.10."""
    return source.size > 512 and source.read(257, 5) == b"ustar"


def read(source: Source, request: Request) -> Contents:
    """Read a legacy file, a plain pickle or torch's tar."""
    if matches_tar(source):
        return _read_tar(source, request)
    report = Report()
    cursor = Cursor(source)
    nested = functools.partial(_nested, report)
    if source.head(64).find(_MAGIC) != 4:
        value = load(cursor, report, nested=nested)
        return _contents("pickle", source, value, request, report, _no_storage, lambda s: -1, False)
    value, offsets, big = _read_stream(cursor, report, nested)

    def fetch(storage: StorageRef, first: int, count: int) -> bytearray | memoryview:
        start, _ = offsets[storage.key]
        size = storage.dtype.itemsize
        return source.buffer(start + (storage.offset + first) * size, count * size, f"storage {storage.key}")

    def check(storage: StorageRef) -> int:
        return offsets[storage.key][1] if storage.key in offsets else -1

    return _contents("pytorch-legacy", source, value, request, report, fetch, check, big)


def _read_stream(
    cursor: Cursor, report: Report, nested: Callable[[bytes], Any] | None
) -> tuple[Any, dict[str, tuple[int, int]], bool]:
    magic, protocol, info = (load(cursor, report) for _ in range(3))
    if not isinstance(magic, int) or magic.to_bytes(16, "little", signed=True)[:10] != _MAGIC or protocol != _PROTOCOL:
        raise CheckpointError(f"{cursor.source.name}: not the torch format {_PROTOCOL}, but {short(protocol)}")
    big = isinstance(info, dict) and info.get("little_endian") is False
    storages: dict[str, StorageRef] = {}

    def persistent(pid: Any) -> Any:
        if isinstance(pid, tuple) and len(pid) == 4 and pid[0] == "module":
            return pid[1]  # old whole modules carry their class with its source text
        storage = storage_from_id(pid)
        storages.setdefault(storage.key, storage)
        return storage

    value = load(cursor, report, persistent, nested)
    keys = load(cursor, report)
    if not isinstance(keys, list):
        raise CheckpointError(f"{cursor.source.name}: a list of storages was expected, found {short(keys)}")
    offsets: dict[str, tuple[int, int]] = {}
    for key in keys:
        storage_ref = storages.get(str(key)) if isinstance(key, str | int) and not _is_huge(key) else None
        if storage_ref is None:
            raise CheckpointError(f"{cursor.source.name}: storage {short(key)} is listed but no tensor uses it")
        (numel,) = struct.unpack(">q" if big else "<q", cursor.take(8))
        if numel < 0:
            raise CheckpointError(f"{cursor.source.name}: storage {short(key)} claims {numel} elements")
        length = numel * storage_ref.dtype.itemsize
        cursor.source.check(cursor.at, length, f"storage {storage_ref.key}")
        offsets[storage_ref.key] = cursor.at, numel
        cursor.at += length
    return value, offsets, big


def _is_huge(key: Any) -> bool:
    return isinstance(key, int) and key.bit_length() > 256


def _nested(report: Report, data: bytes) -> Any:
    # A storage pickled outside torch.save carries a whole little torch file as bytes.
    cursor = Cursor(MemorySource("a storage held as bytes", data))
    if cursor.source.head(64).find(_MAGIC) != 4:
        raise CheckpointError("a storage held as bytes is in no format that torch wrote")
    value, offsets, big = _read_stream(cursor, report, None)
    if not isinstance(value, StorageRef) or value.key not in offsets:
        raise CheckpointError("the bytes of a storage hold something else")
    start, numel = offsets[value.key]
    return _HeldStorage(value.key, value.dtype, numel, value.location, value.offset, data, start, big)


class _HeldStorage(StorageRef):
    """A storage whose bytes were inside the pickle."""

    def __init__(
        self, key: str, dtype: torch.dtype, numel: int, location: str, offset: int, data: bytes, start: int, big: bool
    ) -> None:
        super().__init__(key, dtype, numel, location, offset)
        object.__setattr__(self, "data", data)
        object.__setattr__(self, "start", start)
        object.__setattr__(self, "big", big)


def _no_storage(storage: StorageRef, first: int, count: int) -> bytearray | memoryview:
    raise CheckpointError(f"storage {storage.key} is not in the file")


# ---------------------------------------------------------------------------------------------------
# The tar format (torch before 0.1.10)


def _read_tar(source: Source, request: Request) -> Contents:
    try:
        with tarfile.open(fileobj=source.stream(), mode="r:") as tar:
            places: dict[str, tuple[int, int]] = {}
            for info in tar:
                if info.isreg():
                    places[info.name.removeprefix("./")] = info.offset_data, info.size
                if len(places) > 64:
                    break
    except (tarfile.TarError, ValueError, EOFError, OSError, struct.error, IndexError) as error:
        raise CheckpointError(f"{source.name}: the tar archive is damaged ({error})") from error
    if not {"storages", "tensors", "pickle"} <= places.keys():
        raise CheckpointError(
            f"{source.name}: a tar archive that torch did not write; unpack it and open the files inside"
        )
    report = Report()
    objects: dict[str, Any] = {}
    offsets: dict[str, tuple[int, int]] = {}
    part = Cursor(source.window(*places["storages"], f"{source.name}!storages"))
    for _ in range(_count(load(part, report), part)):
        args = load(part, report)
        if not isinstance(args, tuple) or len(args) != 3:
            raise CheckpointError(f"{part.source.name}: a storage is described by {short(args)}")
        key, location, kind = args
        dtype = storage_dtype(kind)
        (numel,) = struct.unpack("<q", part.take(8))
        if numel < 0:
            raise CheckpointError(f"{part.source.name}: storage {short(key)} claims {numel} elements")
        part.source.check(part.at, numel * dtype.itemsize, f"storage {short(key)}")
        objects[short(key)] = StorageRef(short(key), dtype, numel, str(location)[:64])
        offsets[short(key)] = places["storages"][0] + part.at, numel
        part.at += numel * dtype.itemsize
    views = load(part, report)
    for view in views if isinstance(views, list | tuple) else ():
        if not isinstance(view, tuple) or len(view) != 4 or short(view[1]) not in objects:
            raise CheckpointError(f"{part.source.name}: a view of a storage is described by {short(view)}")
        base, offset, numel = objects[short(view[1])], view[2], view[3]
        if not isinstance(offset, int) or not isinstance(numel, int) or offset < 0 or numel < 0:
            raise CheckpointError(f"{part.source.name}: a view of a storage has no sizes")
        objects[short(view[0])] = StorageRef(base.key, base.dtype, numel, base.location, offset)
    part = Cursor(source.window(*places["tensors"], f"{source.name}!tensors"))
    for _ in range(_count(load(part, report), part)):
        args = load(part, report)
        if not isinstance(args, tuple) or len(args) != 3 or not isinstance(objects.get(short(args[1])), StorageRef):
            raise CheckpointError(f"{part.source.name}: a tensor is described by {short(args)}")
        storage = objects[short(args[1])]
        ndim, _ = struct.unpack("<ii", part.take(8))
        if not 0 <= ndim <= limits.MAX_NDIM:
            raise CheckpointError(f"{part.source.name}: a tensor claims {ndim} axes")
        shape = struct.unpack(f"<{ndim}q", part.take(8 * ndim))
        stride = struct.unpack(f"<{ndim}q", part.take(8 * ndim))
        (offset,) = struct.unpack("<q", part.take(8))
        report.locations[storage.location] = None
        objects[short(args[0])] = TensorRef(storage, offset, shape, stride, storage.dtype)

    def persistent(pid: Any) -> Any:
        if isinstance(pid, tuple):
            return pid[0] if pid else None
        if short(pid) not in objects and isinstance(pid, str):
            pid = int(pid[:32])
        if short(pid) not in objects:
            raise CheckpointError(f"{source.name}: object {short(pid)} is used but not stored")
        return objects[short(pid)]

    def fetch(storage: StorageRef, first: int, count: int) -> bytearray | memoryview:
        size = storage.dtype.itemsize
        return source.buffer(offsets[storage.key][0] + (storage.offset + first) * size, count * size)

    def check(storage: StorageRef) -> int:
        return offsets[storage.key][1] if storage.key in offsets else -1

    value = load(Cursor(source.window(*places["pickle"], f"{source.name}!pickle")), report, persistent)
    return _contents("pytorch-tar", source, value, request, report, fetch, check, False)


def _count(value: Any, part: Cursor) -> int:
    if not isinstance(value, int) or not 0 <= value <= part.source.size:
        raise CheckpointError(f"{part.source.name}: a number of objects was expected, found {short(value)}")
    return value


# ---------------------------------------------------------------------------------------------------
# From references to entries


def entries(
    source: Source,
    choice: Choice,
    fetch: Fetch = _no_storage,
    check: Callable[[StorageRef], int] = lambda storage: -1,
    big: bool = False,
) -> dict[str, Entry]:
    """Checked entries for the tensors of a choice; texts and objects held in arrays become findings."""
    found: dict[str, Entry] = {}
    for name, leaf in choice.tensors.items():
        if isinstance(leaf, ArrayRef) and _array_dtype(leaf) is None:
            choice.findings.append(f"array {name} holds texts or objects and was left out")
            continue
        found[name] = _entry(source, name, leaf, fetch, check, big)
    return found


def _contents(
    kind: str,
    source: Source,
    value: Any,
    request: Request,
    report: Report,
    fetch: Fetch,
    check: Callable[[StorageRef], int],
    big: bool,
) -> Contents:
    # A scripted module is an object whose state maps attributes to tensors and submodules: taken whole.
    choice = choose(value, request.key, through=() if kind == "torchscript" else None)
    tensors = entries(source, choice, fetch, check, big)
    places = [p for p in report.locations if p != "cpu"]
    if places:
        choice.metadata["saved_from"] = places[0] if len(places) == 1 else places
    unknown = sorted(g for g in report.globals if not g.startswith(_KNOWN))
    if unknown:
        shown = ", ".join(unknown[:8]) + (f" and {len(unknown) - 8} more" if len(unknown) > 8 else "")
        choice.findings.append(f"the pickle names classes outside torch and numpy (not loaded): {shown}")
    for name in report.odd:
        choice.findings.append(f"suspicious: the pickle asks for {name} (not run)")
    if report.data_less:
        choice.findings.append(
            f"{report.data_less} tensors were saved from the meta device, without data, and left out"
        )
    choice.findings += _tied(choice.tensors)
    return Contents(kind, tensors, choice.metadata, choice.config, choice.findings)


_KNOWN = (
    "torch.",
    "collections.",
    "numpy.",
    "_codecs.",
    "builtins.",
    "argparse.Namespace",
    "copyreg.",
    "pathlib.",
    "__torch__.",
    "__torch__",
)


def _tied(tensors: dict[str, Leaf]) -> list[str]:
    groups: dict[Any, list[str]] = {}
    for name, leaf in tensors.items():
        if isinstance(leaf, TensorRef) and leaf.storage.numel:
            spot = leaf.storage.key, leaf.storage.offset + leaf.offset, leaf.shape, leaf.stride
            groups.setdefault(spot, []).append(name)
    return [f"tied: {' = '.join(names[:8])} are one tensor" for names in groups.values() if len(names) > 1]


def _array_dtype(leaf: ArrayRef) -> torch.dtype | None:
    numpy_dtype = leaf.dtype.numpy() if isinstance(leaf.dtype, _Dtype) else None
    return None if numpy_dtype is None else dtypes.from_numpy(numpy_dtype)


def _entry(source: Source, name: str, leaf: Leaf, fetch: Fetch, check: Callable[[StorageRef], int], big: bool) -> Entry:
    what = f"{source.name}: tensor {name!r}"
    if isinstance(leaf, ArrayRef):
        return _array_entry(what, leaf)
    if isinstance(leaf, SparseRef):
        return _sparse_entry(source, name, leaf, fetch, check, big)
    storage = leaf.storage
    if isinstance(storage, _HeldStorage):
        fetch, check, big = _fetch_held, _check_held, bool(vars(storage)["big"])
    if storage.dtype != leaf.dtype:
        # torch stores newer types in untyped storages; count in the tensor's elements from here on.
        size = leaf.dtype.itemsize
        storage = _retyped(storage, leaf.dtype, storage.numel * storage.dtype.itemsize // size)
    total = limits.count(leaf.shape, what)
    if len(leaf.stride) != len(leaf.shape):
        raise CheckpointError(f"{what} has {len(leaf.shape)} axes but {len(leaf.stride)} strides")
    if leaf.offset < 0 or any(s < 0 for s in leaf.stride):
        raise UnsafeCheckpointError(f"{what} has a negative offset or stride")
    extent = 1 + sum((n - 1) * s for n, s in zip(leaf.shape, leaf.stride, strict=True)) if total else 0
    held = check(storage)
    if total and held < 0:
        raise CheckpointError(f"{what} lies in storage {storage.key}, which is not in the file")
    if extent and (leaf.offset + extent > storage.numel or storage.offset + leaf.offset + extent > held):
        raise UnsafeCheckpointError(
            f"{what} of shape {leaf.shape[:8]} reaches element {leaf.offset + extent:,} of a storage "
            f"that claims {storage.numel:,} and holds {held:,}: the file is truncated or hostile"
        )
    limits.check_expansion(total * leaf.dtype.itemsize, extent * leaf.dtype.itemsize, what)
    dtype = torch.float32 if leaf.quantizer is not None else leaf.dtype
    scale = _quantizer(source, name, leaf.quantizer, fetch, check, big) if leaf.quantizer is not None else None
    return Entry(leaf.shape, dtype, functools.partial(_load, leaf, storage, extent, fetch, big, scale))


def _retyped(storage: StorageRef, dtype: torch.dtype, numel: int) -> StorageRef:
    if storage.offset:
        raise CheckpointError(f"storage {storage.key} is a view and holds another type than its tensor")
    if isinstance(storage, _HeldStorage):
        held = vars(storage)
        return _HeldStorage(storage.key, dtype, numel, storage.location, 0, held["data"], held["start"], held["big"])
    return StorageRef(storage.key, dtype, numel, storage.location)


def _fetch_held(storage: StorageRef, first: int, count: int) -> bytearray | memoryview:
    held = vars(storage)
    size = storage.dtype.itemsize
    begin = held["start"] + (storage.offset + first) * size
    return bytearray(held["data"][begin : begin + count * size])


def _check_held(storage: StorageRef) -> int:
    return storage.numel


_RAW = {torch.qint8: torch.int8, torch.quint8: torch.uint8, torch.qint32: torch.int32}


def _load(
    leaf: TensorRef,
    storage: StorageRef,
    extent: int,
    fetch: Fetch,
    big: bool,
    scale: Callable[[torch.Tensor], torch.Tensor] | None,
) -> torch.Tensor:
    raw = _RAW.get(leaf.dtype, leaf.dtype)
    if extent == 0:
        return torch.empty(leaf.shape, dtype=torch.float32 if scale else leaf.dtype)
    flat = dtypes.to_tensor(fetch(storage, leaf.offset, extent), raw, (extent,), big_endian=big)
    tensor = flat.as_strided(leaf.shape, leaf.stride)
    # A tensor that repeats its elements (an expanded one) gets its own, so that writing to it is safe.
    if tensor.numel() > extent:
        tensor = tensor.contiguous()
    return scale(tensor) if scale is not None else tensor


def _quantizer(
    source: Source,
    name: str,
    quantizer: tuple[Any, ...],
    fetch: Fetch,
    check: Callable[[StorageRef], int],
    big: bool,
) -> Callable[[torch.Tensor], torch.Tensor]:
    scheme = str(quantizer[0])
    if scheme == "torch.per_tensor_affine" and len(quantizer) == 3:
        _, scale, zero = quantizer
        if isinstance(scale, float | int) and isinstance(zero, int):
            return functools.partial(_affine, float(scale), int(zero))
    if scheme.startswith("torch.per_channel_affine") and len(quantizer) == 4 and isinstance(quantizer[3], int):
        _, scales, zeros, axis = quantizer
        if isinstance(scales, TensorRef) and isinstance(zeros, TensorRef):
            parts = [
                _entry(source, f"{name} ({p})", t, fetch, check, big) for p, t in (("scale", scales), ("zero", zeros))
            ]
            return functools.partial(_per_channel, parts[0], parts[1], axis)
    raise CheckpointError(f"{source.name}: tensor {name!r} is quantised by the unknown scheme {scheme[:60]}")


def _affine(scale: float, zero: int, tensor: torch.Tensor) -> torch.Tensor:
    return (tensor.to(torch.float32) - zero) * scale


def _per_channel(scales: Entry, zeros: Entry, axis: int, tensor: torch.Tensor) -> torch.Tensor:
    if not 0 <= axis < tensor.ndim or scales.shape != (tensor.shape[axis],) or zeros.shape != scales.shape:
        raise CheckpointError(f"a tensor quantised per channel has {scales.shape} scales on axis {axis}")
    form = [1] * tensor.ndim
    form[axis] = -1
    scale, zero = scales.load().to(torch.float32).reshape(form), zeros.load().to(torch.float32).reshape(form)
    return (tensor.to(torch.float32) - zero) * scale


def _array_entry(what: str, leaf: ArrayRef) -> Entry:
    numpy_dtype = leaf.dtype.numpy()
    dtype = _array_dtype(leaf)
    assert dtype is not None
    needed = limits.count(leaf.shape, what) * dtype.itemsize
    if needed != len(leaf.data):
        raise UnsafeCheckpointError(
            f"{what} of shape {leaf.shape[:8]} needs {needed:,} bytes, {len(leaf.data):,} are there"
        )
    big = numpy_dtype.byteorder == ">"
    return Entry(leaf.shape, dtype, functools.partial(_load_array, leaf, dtype, big))


def _load_array(leaf: ArrayRef, dtype: torch.dtype, big: bool) -> torch.Tensor:
    return dtypes.to_tensor(bytearray(leaf.data), dtype, leaf.shape, big_endian=big, fortran=leaf.fortran)


def _sparse_entry(
    source: Source, name: str, leaf: SparseRef, fetch: Fetch, check: Callable[[StorageRef], int], big: bool
) -> Entry:
    what = f"{source.name}: tensor {name!r}"
    indices = _entry(source, f"{name} (indices)", leaf.indices, fetch, check, big)
    values = _entry(source, f"{name} (values)", leaf.values, fetch, check, big)
    total = limits.count(leaf.shape, what)
    limits.check_expansion(total * values.dtype.itemsize, indices.nbytes + values.nbytes, what)
    return Entry(leaf.shape, values.dtype, functools.partial(_load_sparse, what, indices, values, leaf.shape))


def _load_sparse(what: str, indices: Entry, values: Entry, shape: tuple[int, ...]) -> torch.Tensor:
    try:
        sparse = torch.sparse_coo_tensor(indices.load(), values.load(), shape, check_invariants=True)
        return sparse.to_dense()
    except (RuntimeError, ValueError, IndexError, TypeError) as error:
        raise CheckpointError(f"{what}: its sparse indices make no sense ({error})"[:300]) from error
