"""The index of a zoo on disk: one SQLite file for facts, one flat file of embeddings beside it.

Each file of the zoo is one transaction, written with its embeddings already on disk, so that a process
killed at any moment leaves an index that is whole and only lacks what was still to come. An embedding's row
belongs to a model only once the transaction that names it has been committed; rows of models that are gone
are used again.
"""

from __future__ import annotations

import json
import os
import sqlite3
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from weightspace.errors import ZooError

SCHEMA = 1

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
    card TEXT NOT NULL
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
    """One model in the index: its name in the zoo, its file, the file's hash, its card and its embedding."""

    name: str
    path: str
    sha256: str
    card: dict[str, Any]
    embedding: NDArray[np.float32]


class Store:
    """The index in one folder. Open it with ``Store(folder, dimension, version)``; close it when done.

    ``dimension`` is the length of the embeddings and ``version`` names how they are made: an index of other
    embeddings is emptied on opening for writing and refused on opening for reading.
    """

    def __init__(self, folder: Path, dimension: int, version: str, write: bool = True) -> None:
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
                f"{folder} and index again: it holds nothing that cannot be made again"
            ) from error
        wanted = {"schema": str(SCHEMA), "dimension": str(dimension), "embedding": version}
        if found == wanted:
            self._note_rows()
            return
        if not write:
            raise ZooError(
                f"the index {database} was made by another version of weightspace ({found or 'unknown'}, "
                f"expected {wanted}); run `weightspace index` on its folder again"
            )
        with self._db:
            for table in ("models", "files", "meta"):
                self._db.execute(f"DELETE FROM {table}")
            self._db.executemany("INSERT INTO meta VALUES (?, ?)", wanted.items())
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
            self._write_vectors(rows, [model.embedding for model in models])
            freed = self._delete_models(path)
            self._db.execute("DELETE FROM files WHERE path = ?", (path,))
            self._db.execute(
                "INSERT INTO files VALUES (?, ?, ?, ?, ?, ?)",
                (path, stamp.size, stamp.mtime_ns, stamp.sha256, outcome, reason),
            )
            self._db.executemany(
                "INSERT INTO models (row, path, name, sha256, card) VALUES (?, ?, ?, ?, ?)",
                [
                    (row, path, m.name, m.sha256, json.dumps(m.card))
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
        rows = list(self._db.execute("SELECT row, name, path, sha256, card FROM models ORDER BY name"))
        vectors = self._vectors_of([row for row, *_ in rows])
        return [
            ModelRow(name, path, sha, json.loads(card), vector)
            for (_, name, path, sha, card), vector in zip(rows, vectors, strict=True)
        ]

    def embeddings(self) -> tuple[list[str], NDArray[np.float32]]:
        """Names of all models, in order, and their embeddings: (n, dimension)."""
        rows = list(self._db.execute("SELECT row, name FROM models ORDER BY name"))
        return [name for _, name in rows], self._vectors_of([row for row, _ in rows])

    def model(self, name: str) -> ModelRow | None:
        """One model by its name in the zoo."""
        query = "SELECT row, name, path, sha256, card FROM models WHERE name = ?"
        found = self._db.execute(query, (name,)).fetchone()
        if found is None:
            return None
        row, name, path, sha, card = found
        return ModelRow(name, path, sha, json.loads(card), self._vectors_of([row])[0])

    def count(self) -> int:
        """Number of models."""
        return int(self._db.execute("SELECT count(*) FROM models").fetchone()[0])

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            with self._db:
                yield
        except (sqlite3.Error, OSError) as error:
            raise ZooError(f"the index in {self.folder} could not be written: {error}") from error

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

    def _write_vectors(self, rows: Sequence[int], vectors: Sequence[NDArray[np.float32]]) -> None:
        if not rows:
            return
        # One open file, positioned writes: a torn write can only touch rows that no transaction names yet.
        descriptor = os.open(self._vectors, os.O_RDWR | os.O_CREAT | getattr(os, "O_BINARY", 0), 0o644)
        try:
            for row, vector in zip(rows, vectors, strict=True):
                if vector.shape != (self.dimension,):
                    raise ZooError(f"an embedding has shape {vector.shape}, expected ({self.dimension},)")
                os.lseek(descriptor, row * 4 * self.dimension, os.SEEK_SET)
                os.write(descriptor, np.ascontiguousarray(vector, dtype="<f4").tobytes())
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def _vectors_of(self, rows: Sequence[int]) -> NDArray[np.float32]:
        if not rows:
            return np.zeros((0, self.dimension), dtype=np.float32)
        width = 4 * self.dimension
        present = self._vectors.stat().st_size // width if self._vectors.is_file() else 0
        if max(rows) >= present:
            raise ZooError(
                f"{self._vectors} holds {present} embeddings but the index names number {max(rows)}; "
                "run `weightspace index --force` on the folder"
            )
        stored = np.memmap(self._vectors, dtype="<f4", mode="r", shape=(present, self.dimension))
        return np.asarray(stored[np.asarray(rows)], dtype=np.float32)


def _connect_to_read(database: Path) -> sqlite3.Connection:
    """Open without writing, also where the folder itself cannot be written to."""
    if not database.is_file():
        raise ZooError(f"there is no index at {database}; run `weightspace index` on the folder first")
    uri = database.resolve().as_uri()
    writable = os.access(database.parent, os.W_OK)
    return sqlite3.connect(f"{uri}?mode=ro" + ("" if writable else "&immutable=1"), uri=True, timeout=30.0)
