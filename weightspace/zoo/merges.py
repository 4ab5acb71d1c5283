"""Measured merges of a zoo's models, kept beside its index as lines of JSON that are only ever added.

A line names the models, the method, what was retained, and the hashes of the models' files, so that measurements of a
model that was trained anew under its old name are left out instead of believed.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from weightspace.errors import ZooError

FILE = "merges.jsonl"


def append(path: Path, row: Mapping[str, Any]) -> None:
    """Add a line, whole or not at all; what an interrupted writer left unfinished is cut off first.

    Writers in several processes take turns. Raises ``ZooError`` where the folder cannot be written to.
    """
    from filelock import FileLock

    line = (json.dumps(dict(row), sort_keys=True) + "\n").encode()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(path.with_name(f"{path.name}.lock")), path.open("ab+") as stream:
            size = stream.seek(0, os.SEEK_END)
            whole = _whole(stream, size)
            if whole < size:
                stream.truncate(whole)
            stream.write(line)
            stream.flush()
            os.fsync(stream.fileno())
    except OSError as error:
        raise ZooError(f"the measured merge cannot be written to {path} ({error})") from error


def read(path: Path) -> list[dict[str, Any]]:
    """All lines; a last one that was not finished does not count. Raises ``ZooError`` for one that is damaged."""
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return []
    except OSError as error:
        raise ZooError(f"measured merges cannot be read from {path} ({error})") from error
    rows = []
    for number, line in enumerate(data[: data.rfind(b"\n") + 1].splitlines(), 1):
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        if not isinstance(row, dict):
            raise ZooError(f"line {number} of {path} is damaged ({line[:60]!r}); take it out of the file")
        rows.append(row)
    return rows


def stamp(path: Path) -> dict[str, Any] | None:
    """Size, time and hash of a model's file; None for folders."""
    if not path.is_file():
        return None
    found = path.stat()
    with path.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    return {"size": found.st_size, "mtime_ns": found.st_mtime_ns, "sha256": digest}


def unchanged(path: Path, known: Mapping[str, Any] | None) -> bool:
    """Whether a file is what it was when it was stamped; read again only where its time says that it may not be."""
    if known is None or not path.is_file():
        return True
    found = path.stat()
    if found.st_size != known.get("size"):
        return False
    if found.st_mtime_ns == known.get("mtime_ns"):
        return True
    now = stamp(path)
    return now is not None and now["sha256"] == known.get("sha256")


def _whole(stream: Any, size: int) -> int:
    """Length up to the end of the last whole line."""
    end = size
    while end > 0:
        start = max(0, end - (1 << 16))
        stream.seek(start)
        at = stream.read(end - start).rfind(b"\n")
        if at >= 0:
            return int(start + at + 1)
        end = start
    return 0
