"""The index of a zoo on disk: one SQLite file for facts, flat files of vectors beside it.

Each file of the zoo is one transaction, written with its vectors already on disk, so that a process
killed at any moment leaves an index that is whole and only lacks what was still to come. A vector's row
belongs to a model only once the transaction that names it has been committed; rows of models that are gone
are used again.

There are three vectors to a model: the training-free descriptor (``embeddings.f32``), that of the pretrained encoder
(``learned.f32``), which models outside its range may lack, and that of its function (``function.f32``), which models
lack that cannot be run. An index where one of the latter two was made otherwise, or not at all, keeps its descriptors;
its files are looked at again the next time, one by one.
"""

from __future__ import annotations

import json
import os
import sqlite3
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from weightspace.errors import ZooError

OTHERS = ("learned", "function")
"""Vectors of a model beside its descriptor, as fields of ``ModelRow`` and names of files."""

SCHEMA = 2
# Schema 1 had descriptors alone.
_READABLE = ("1", "2")

FACTS = (
    "name", "path", "sha256", "reading", "format", "architecture", "parameters", "tensors", "bytes", "recognised",
    "wiring", "error", "movable", "findings", "record",
)  # fmt: skip
"""What ``Store.facts`` gives of a model: its name, file, hash and reading, then entries of its card."""

_TABLES = """
CREATE TABLE IF NOT EXISTS meta (key TEXT PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS files (
    path TEXT PRIMARY KEY,
    size INTEGER NOT NULL,
    mtime_ns INTEGER NOT NULL,
    sha256 TEXT NOT NULL,
    outcome TEXT NOT NULL CHECK (outcome IN ('models', 'ignored', 'failed')),
    reason TEXT NOT NULL DEFAULT ''
);
CREATE TABLE IF NOT EXISTS models (
    row INTEGER PRIMARY KEY,
    path TEXT NOT NULL REFERENCES files (path) ON DELETE CASCADE,
    name TEXT NOT NULL UNIQUE,
    sha256 TEXT NOT NULL,
    card TEXT NOT NULL,
    reading TEXT NOT NULL DEFAULT ''
);
CREATE INDEX IF NOT EXISTS models_by_path ON models (path);
"""


@dataclass(frozen=True)
class FileStamp:
    """What tells whether a file has changed: its size in bytes, its time and the hash of its content."""

    size: int
    mtime_ns: int
    sha256: str


@dataclass(frozen=True)
class ModelRow:
    """One model in the index: its name in the zoo, its file, the file's hash, its card and its descriptor.

    ``learned`` is the vector of the pretrained encoder, None for a model that it did not read, ``function`` that of
    what it computes, None for one that cannot be run, and ``reading`` what goes with them: ``inside``, ``score`` and
    ``reason`` of the encoder's applicability, ``accuracy``, ``accuracy_low`` and ``accuracy_high`` where there is a
    prediction, and ``asked``, the questions that the function was told by, or ``unasked``, why not. Empty in an
    index that was made by another encoder.
    """

    name: str
    path: str
    sha256: str
    card: dict[str, Any]
    embedding: NDArray[np.float32]
    learned: NDArray[np.float32] | None = None
    reading: Mapping[str, Any] = field(default_factory=dict)
    function: NDArray[np.float32] | None = None


class Store:
    """The index in one folder. Open it with ``Store(folder, dimension, version)``; close it when done.

    ``dimension`` is the length of the descriptors and ``version`` names how they are made: an index of other
    descriptors is emptied on opening for writing and refused on opening for reading. ``others`` is the same for the
    ``OTHERS``, the vectors of the pretrained encoder and of functions: where one is of another version all are
    forgotten on opening for writing, and their files are noted as to be looked at again; on opening for reading they
    are as if they were not there. Without ``others`` an index is read as it is, and written without such vectors.
    """

    def __init__(
        self, folder: Path, dimension: int, version: str, write: bool = True,
        others: Mapping[str, tuple[int, str]] | None = None,
    ) -> None:  # fmt: skip
        self.folder = folder
        self.dimension = dimension
        self._vectors = folder / "embeddings.f32"
        database = folder / "index.sqlite"
        try:
            if write:
                folder.mkdir(parents=True, exist_ok=True)
                self._db = sqlite3.connect(database, timeout=30.0)
                self._db.execute("PRAGMA journal_mode = WAL")
            else:
                self._db = _connect_to_read(database)
            self._db.execute("PRAGMA foreign_keys = ON")
            if write:
                with self._db:
                    self._db.executescript(_TABLES)
            found = dict(self._db.execute("SELECT key, value FROM meta"))
        except (sqlite3.Error, OSError) as error:
            raise ZooError(
                f"the index {database} cannot be opened ({error}); if it is damaged, delete the folder "
                f"{folder} and index again: only merges.jsonl, if it is there, cannot be made again"
            ) from error
        described = {"dimension": str(dimension), "embedding": version}
        if others is None:
            others = {} if write else others_in(found)
        self._lengths = {kind: others.get(kind, (0, ""))[0] for kind in OTHERS}
        names = {kind: "{}/{}".format(*others.get(kind, (0, ""))) for kind in OTHERS}
        wanted = {"schema": str(SCHEMA), **described, **names}
        usable = found.get("schema") in _READABLE and described.items() <= found.items()
        # Whether the other vectors are those that are asked for.
        self.has_learned = {**dict.fromkeys(OTHERS, "0/"), **found} == wanted
        if not usable and not write:
            raise ZooError(
                f"the index {database} was made by another version of weightspace ({found or 'unknown'}, "
                f"expected {wanted}); run `weightspace index` on its folder again"
            )
        if write and found != wanted:
            with self._writing():
                self._renew(usable, found.get("schema", ""))
                self._db.execute("DELETE FROM meta")
                self._db.executemany("INSERT INTO meta VALUES (?, ?)", wanted.items())
            self.has_learned = True
        self._note_rows()

    def close(self) -> None:
        """Fold the write-ahead log into the database and close it."""
        self._db.close()

    def stamps(self) -> dict[str, FileStamp]:
        """What is known of each file."""
        rows = self._db.execute("SELECT path, size, mtime_ns, sha256 FROM files")
        return {path: FileStamp(size, mtime, sha) for path, size, mtime, sha in rows}

    def outcomes(self, outcome: str) -> list[tuple[str, str]]:
        """Path and reason of every file with this outcome: "models", "ignored" or "failed"."""
        return list(
            self._db.execute("SELECT path, reason FROM files WHERE outcome = ? ORDER BY path", (outcome,))
        )

    def put(self, path: str, stamp: FileStamp, outcome: str, reason: str, models: Sequence[ModelRow]) -> None:
        """Write everything about one file at once, in place of what was known of it."""
        rows = self._take_rows(len(models))
        with self._writing():
            self._write_vectors(self._vectors, self.dimension, rows, [model.embedding for model in models])
            for kind, length in self._lengths.items():
                if length:
                    empty = np.full(length, np.nan, dtype=np.float32)
                    held = [getattr(model, kind) for model in models]
                    self._write_vectors(self._file(kind), length, rows, [empty if v is None else v for v in held])
            freed = self._delete_models(path)
            self._db.execute("DELETE FROM files WHERE path = ?", (path,))
            self._db.execute(
                "INSERT INTO files VALUES (?, ?, ?, ?, ?, ?)",
                (path, stamp.size, stamp.mtime_ns, stamp.sha256, outcome, reason),
            )
            self._db.executemany(
                "INSERT INTO models (row, path, name, sha256, card, reading) VALUES (?, ?, ?, ?, ?, ?)",
                [
                    (row, path, m.name, m.sha256, json.dumps(m.card), json.dumps(dict(m.reading)))
                    for row, m in zip(rows, models, strict=True)
                ],
            )
        self._free.extend(freed)

    def touch(self, path: str, stamp: FileStamp) -> None:
        """Note a new time for a file whose content is the same."""
        with self._writing():
            self._db.execute(
                "UPDATE files SET size = ?, mtime_ns = ? WHERE path = ?", (stamp.size, stamp.mtime_ns, path)
            )

    def drop(self, paths: Iterable[str]) -> None:
        """Forget files and the models in them."""
        freed: list[int] = []
        with self._writing():
            for path in paths:
                freed.extend(self._delete_models(path))
                self._db.execute("DELETE FROM files WHERE path = ?", (path,))
        self._free.extend(freed)

    def models(self) -> list[ModelRow]:
        """Every model, in order of its name."""
        return self._rows("ORDER BY name")

    def embeddings(self) -> tuple[list[str], NDArray[np.float32]]:
        """Names of all models, in order, and their descriptors: (n, dimension)."""
        rows = list(self._db.execute("SELECT row, name FROM models ORDER BY name"))
        return [name for _, name in rows], self._vectors_of(self._vectors, self.dimension, [row for row, _ in rows])

    def learned(self) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
        """Vectors of the encoder, in the order of ``embeddings``, and which models are inside its range.

        Not numbers where a model has no vector.
        """
        vectors, readings = self._others("learned")
        inside = np.array([bool(reading.get("inside")) for reading in readings], dtype=bool)
        return vectors, inside & np.isfinite(vectors).all(axis=1)

    def functions(self) -> tuple[NDArray[np.float32], list[str]]:
        """Vectors of functions, in the order of ``embeddings``, and what was asked of each; "" where there is none."""
        vectors, readings = self._others("function")
        there = [bool(self._lengths["function"]) and bool(np.isfinite(vector).all()) for vector in vectors]
        asked = [str(r.get("asked") or "") if held else "" for r, held in zip(readings, there, strict=True)]
        return vectors, asked

    def facts(self) -> list[tuple[Any, ...]]:
        """``FACTS`` of every model, in order of its name: what a table shows, without reading whole cards or vectors.

        Records and readings are JSON text, as they are stored.
        """
        reading = "reading" if self.has_learned else "''"
        columns = ", ".join(
            f"json_array_length(card, '$.{name}')" if name == "findings" else f"json_extract(card, '$.{name}')"
            for name in FACTS[4:]
        )
        return list(self._db.execute(f"SELECT name, path, sha256, {reading}, {columns} FROM models ORDER BY name"))

    def model(self, name: str) -> ModelRow | None:
        """One model by its name in the zoo."""
        found = self._rows("WHERE name = ?", (name,))
        return found[0] if found else None

    def count(self) -> int:
        """Number of models."""
        return int(self._db.execute("SELECT count(*) FROM models").fetchone()[0])

    def _file(self, kind: str) -> Path:
        return self.folder / f"{kind}.f32"

    def _others(self, kind: str) -> tuple[NDArray[np.float32], list[dict[str, Any]]]:
        """Vectors of one of ``OTHERS``, not numbers where a model has none, and the readings of all models."""
        column = "reading" if self.has_learned else "''"
        rows = list(self._db.execute(f"SELECT row, {column} FROM models ORDER BY name"))
        readings = [json.loads(reading or "{}") for _, reading in rows]
        held = [bool(reading) for reading in readings]
        length = self._lengths[kind]
        vectors = np.full((len(rows), length), np.nan, dtype=np.float32)
        if any(held) and length:
            some = [row for (row, _), keep in zip(rows, held, strict=True) if keep]
            vectors[np.asarray(held)] = self._vectors_of(self._file(kind), length, some)
        return vectors, readings

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            with self._db:
                yield
        except (sqlite3.Error, OSError) as error:
            raise ZooError(f"the index in {self.folder} could not be written: {error}") from error

    def _renew(self, usable: bool, schema: str) -> None:
        """Make an index that was made otherwise one of this kind; what it knows stays where it can be used."""
        if schema == "1":
            self._db.execute("ALTER TABLE models ADD COLUMN reading TEXT NOT NULL DEFAULT ''")
        if usable:
            # No file has such a time or such a hash: each is examined anew, and until then its old entry serves.
            self._db.execute("UPDATE files SET mtime_ns = -1, sha256 = '' WHERE outcome = 'models'")
            self._db.execute("UPDATE models SET reading = ''")
            return
        for table in ("models", "files"):
            self._db.execute(f"DELETE FROM {table}")

    def _rows(self, which: str, values: tuple[str, ...] = ()) -> list[ModelRow]:
        column = "reading" if self.has_learned else "''"
        rows = list(self._db.execute(f"SELECT row, name, path, sha256, card, {column} FROM models {which}", values))
        vectors = self._vectors_of(self._vectors, self.dimension, [row for row, *_ in rows])
        found = []
        for (row, name, path, sha, card, text), vector in zip(rows, vectors, strict=True):
            reading = json.loads(text or "{}")
            others: dict[str, NDArray[np.float32] | None] = dict.fromkeys(OTHERS)
            for kind, length in self._lengths.items():
                if reading and length:
                    other = self._vectors_of(self._file(kind), length, [row])[0]
                    others[kind] = other if bool(np.isfinite(other).all()) else None
            found.append(ModelRow(name, path, sha, json.loads(card), vector, reading=reading, **others))
        return found

    def _note_rows(self) -> None:
        taken = {row for (row,) in self._db.execute("SELECT row FROM models")}
        self._next = 1 + max(taken, default=-1)
        self._free = [row for row in range(self._next) if row not in taken]

    def _take_rows(self, number: int) -> list[int]:
        """Rows of the embedding file that no committed model owns, not even one about to be replaced."""
        rows = [self._free.pop() for _ in range(min(number, len(self._free)))]
        while len(rows) < number:
            rows.append(self._next)
            self._next += 1
        return rows

    def _delete_models(self, path: str) -> list[int]:
        rows = [row for (row,) in self._db.execute("SELECT row FROM models WHERE path = ?", (path,))]
        self._db.execute("DELETE FROM models WHERE path = ?", (path,))
        return rows

    def _write_vectors(
        self, file: Path, width: int, rows: Sequence[int], vectors: Sequence[NDArray[np.float32]]
    ) -> None:
        if not rows:
            return
        # One open file, positioned writes: a torn write can only touch rows that no transaction names yet.
        descriptor = os.open(file, os.O_RDWR | os.O_CREAT | getattr(os, "O_BINARY", 0), 0o644)
        try:
            for row, vector in zip(rows, vectors, strict=True):
                if vector.shape != (width,):
                    raise ZooError(f"an embedding has shape {vector.shape}, expected ({width},)")
                os.lseek(descriptor, row * 4 * width, os.SEEK_SET)
                os.write(descriptor, np.ascontiguousarray(vector, dtype="<f4").tobytes())
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def _vectors_of(self, file: Path, dimension: int, rows: Sequence[int]) -> NDArray[np.float32]:
        if not rows:
            return np.zeros((0, dimension), dtype=np.float32)
        width = 4 * dimension
        present = file.stat().st_size // width if file.is_file() else 0
        if max(rows) >= present:
            raise ZooError(
                f"{file} holds {present} embeddings but the index names number {max(rows)}; "
                "run `weightspace index --force` on the folder"
            )
        stored = np.memmap(file, dtype="<f4", mode="r", shape=(present, dimension))
        return np.asarray(stored[np.asarray(rows)], dtype=np.float32)


def others_in(meta: Mapping[str, str]) -> dict[str, tuple[int, str]]:
    """Lengths and versions of the ``OTHERS`` as an index says them of itself."""
    found = {}
    for kind in OTHERS:
        length, _, version = meta.get(kind, "").partition("/")
        found[kind] = (int(length), version) if length.isdigit() else (0, "")
    return found


def described(folder: Path) -> dict[str, str]:
    """What an index says of itself: ``dimension`` and ``embedding`` of its descriptors, ``learned`` of its encoder.

    Raises ``ZooError`` where there is none.
    """
    database = folder / "index.sqlite"
    try:
        connection = _connect_to_read(database)
        try:
            return dict(connection.execute("SELECT key, value FROM meta"))
        finally:
            connection.close()
    except sqlite3.Error as error:
        raise ZooError(f"the index {database} cannot be opened ({error})") from error


def _connect_to_read(database: Path) -> sqlite3.Connection:
    """Open without writing, also where the folder itself cannot be written to."""
    if not database.is_file():
        raise ZooError(f"there is no index at {database}; run `weightspace index` on the folder first")
    uri = database.resolve().as_uri()
    writable = os.access(database.parent, os.W_OK)
    return sqlite3.connect(f"{uri}?mode=ro" + ("" if writable else "&immutable=1"), uri=True, timeout=30.0)
