"""What a worker does with one file of a zoo: open it, wire it, describe it."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from weightspace.errors import UnknownFormatError, WeightspaceError
from weightspace.zoo.store import FileStamp, ModelRow

if TYPE_CHECKING:
    from weightspace.checkpoint import Checkpoint
    from weightspace.wiring.wiring import Wiring

_CHUNK = 1 << 20


@dataclass(frozen=True)
class Examined:
    """The outcome of one file: "models", "ignored" (no checkpoint), "failed" or "unchanged", and why."""

    path: str
    stamp: FileStamp
    outcome: str
    reason: str
    models: tuple[ModelRow, ...] = ()


def stamp_of(path: Path) -> tuple[int, int]:
    """Size in bytes and time in nanoseconds of a file, or of everything in a folder."""
    if not path.is_dir():
        status = path.stat()
        return status.st_size, status.st_mtime_ns
    statuses = [file.stat() for file in _files_of(path)]
    return sum(s.st_size for s in statuses), max((s.st_mtime_ns for s in statuses), default=0)


def sha256_of(path: Path) -> str:
    """Hash of a file's content, or of the names and contents of everything in a folder."""
    digest = hashlib.sha256()
    for file in _files_of(path):
        if path.is_dir():
            digest.update(file.relative_to(path).as_posix().encode() + b"\0")
        with file.open("rb") as stream:
            while chunk := stream.read(_CHUNK):
                digest.update(chunk)
    return digest.hexdigest()


def examine(path: Path, name: str, known_sha256: str | None) -> Examined:
    """Open, wire and describe every model in one file. Never raises for what the file holds.

    ``known_sha256`` is the hash that the index has for the file: when it still holds, nothing else is done.
    """
    sha256, size, mtime_ns = "", 0, 0
    try:
        size, mtime_ns = stamp_of(path)
        sha256 = sha256_of(path)
        stamp = FileStamp(size, mtime_ns, sha256)
        if sha256 == known_sha256:
            return Examined(name, stamp, "unchanged", "")
        models = tuple(describe_model(ckpt, model, name, sha256)[0] for ckpt, model in models_in(path, name))
        return Examined(name, stamp, "models", "", models)
    except UnknownFormatError as error:
        return Examined(name, FileStamp(size, mtime_ns, sha256), "ignored", _one_line(error))
    except WeightspaceError as error:
        return Examined(name, FileStamp(size, mtime_ns, sha256), "failed", _one_line(error))
    except Exception as error:  # a reader's bug on one file must not stop the other thousand
        reason = f"unexpected {type(error).__name__}: {_one_line(error)}"
        return Examined(name, FileStamp(size, mtime_ns, sha256), "failed", reason)


def models_in(path: Path, name: str) -> Iterator[tuple[Checkpoint, str]]:
    """Each model in a file with its name in the zoo: the file's, or ``file!member`` if it has several."""
    from weightspace import checkpoint

    addresses = checkpoint.list_models(path)
    if len(addresses) == 1:
        yield checkpoint.open(path), name
        return
    for address in addresses:
        yield checkpoint.open(address), name + address.removeprefix(str(path))


def describe_model(
    ckpt: Checkpoint, model: str, path: str, sha256: str, read: bool = True
) -> tuple[ModelRow, tuple[str, ...]]:
    """The index entry of one checkpoint, and the names of the tensors that its descriptor speaks of.

    With ``read`` the pretrained metanets read it as well, if it is in their range, and it is told what it computes, if
    it can be run.
    """
    from weightspace.card import card_and_wiring
    from weightspace.retrieval import describe
    from weightspace.retrieval.function import function

    card, wiring = card_and_wiring(ckpt, model)
    description = describe(ckpt, wiring)
    learned, reading = _read(ckpt, wiring) if read else (None, {})
    vector, computed = description.vector.astype(np.float32), None
    if read:
        found = function(ckpt, wiring)
        computed = found.vector
        reading |= {"asked": found.asked} if computed is not None else {"unasked": found.reason}
    return ModelRow(model, path, sha256, card.to_dict(), vector, learned, reading, computed), description.used


def _read(ckpt: Checkpoint, wiring: Wiring | None) -> tuple[NDArray[np.float32] | None, dict[str, Any]]:
    """Vector of the pretrained encoder (None outside its limits), and what else the pretrained metanets say."""
    from weightspace.pretrained.model import shipped
    from weightspace.pretrained.reading import outside, read_wired

    try:
        found = outside("no wiring was found") if wiring is None else read_wired(ckpt, wiring, shipped())
    except WeightspaceError as error:
        # Weights that are not finite, say: such a model is described all the same.
        found = outside(_one_line(error))
    where = found.applicability
    reading: dict[str, Any] = {"inside": where.inside, "score": where.score, "reason": where.reason}
    if found.prediction.applicability.inside:
        said = found.prediction
        reading |= {"accuracy": said.value, "accuracy_low": said.low, "accuracy_high": said.high}
    vector = None if found.vector is None else found.vector.numpy().astype(np.float32)
    return vector, reading


def _files_of(path: Path) -> list[Path]:
    return sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
