"""Uploaded files: kept in a private folder, never executed, with limits and harmless names."""

from __future__ import annotations

import os
import re
import secrets
import shutil
import tempfile
import unicodedata
from pathlib import Path
from typing import BinaryIO

from weightspace.errors import ZooError
from weightspace.explorer.style import size as as_size

LARGEST = 400
"""Megabytes of one uploaded file; larger models are opened from their folder."""
MOST_FILES = 200
MOST_BYTES = 4 << 30
"""Files and bytes of one collection of uploads."""
_TOKEN = re.compile(r"[A-Za-z0-9_-]{16}")
_LONGEST = 100


def private_folder() -> Path:
    """A new folder that only this user can read (mode 0700); remove it with ``shutil.rmtree`` in the end."""
    return Path(tempfile.mkdtemp(prefix="weightspace-explorer-"))


def new_token() -> str:
    """A name for a collection of uploads that nobody can guess."""
    return secrets.token_urlsafe(12)


def folder_of(private: Path, token: str, make: bool = False) -> Path | None:
    """The folder of a collection; None where a token is no token, or its collection is gone."""
    if not _TOKEN.fullmatch(token):
        return None
    folder = private / "uploads" / token
    if make:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        (private / "uploads").chmod(0o700)
    return folder if folder.is_dir() else None


def harmless(name: str) -> str:
    """A file name that means nothing to any system: letters, digits, dots and dashes, not hidden, not long."""
    base = re.split(r"[/\\]", unicodedata.normalize("NFKC", name))[-1]
    plain = re.sub(r"[^A-Za-z0-9._-]+", "_", base).strip("._-")
    stem, dot, ending = plain.rpartition(".")
    if not dot:
        stem, ending = plain, ""
    ending = ending[:16]
    stem = stem[: _LONGEST - len(ending) - 1].rstrip("._-")
    whole = f"{stem}.{ending}" if ending and stem else stem or ending
    return whole or "upload"


def keep(folder: Path, name: str, data: BinaryIO) -> Path:
    """Copy an upload into its collection, with mode 0600; the same bytes again are the file that is there.

    Raises ``ZooError`` for an empty file and beyond the limits; nothing is left of it then.
    """
    data.seek(0, os.SEEK_END)
    length = data.tell()
    data.seek(0)
    if not length:
        raise ZooError(f"{harmless(name)} is empty: it has 0 bytes, so there is no model in it")
    if length > LARGEST << 20:
        raise ZooError(
            f"{harmless(name)} has {as_size(length)}, more than the {LARGEST} MB that are taken as an upload; "
            "put it into a folder and open that"
        )
    held = [f for f in folder.iterdir() if f.is_file()]
    if len(held) >= MOST_FILES or sum(f.stat().st_size for f in held) + length > MOST_BYTES:
        raise ZooError(
            f"this collection of uploads is full ({len(held)} files, at most {MOST_FILES} and {as_size(MOST_BYTES)}); "
            "put the models into a folder and open that"
        )
    target = folder / harmless(name)
    number = 2
    while target.exists():
        # Pages run again while a worker reads it: the same bytes are left where they are.
        if _same(target, data, length):
            return target
        base = harmless(name)
        target = folder / (f"{Path(base).stem}-{number}{Path(base).suffix}")
        number += 1
    descriptor, temporary = tempfile.mkstemp(prefix=".upload-", dir=folder)
    try:
        with os.fdopen(descriptor, "wb") as out:
            data.seek(0)
            shutil.copyfileobj(data, out, 1 << 20)
        Path(temporary).replace(target)
    finally:
        Path(temporary).unlink(missing_ok=True)
    return target


def _same(path: Path, data: BinaryIO, length: int) -> bool:
    if path.stat().st_size != length:
        return False
    data.seek(0)
    with path.open("rb") as held:
        while part := held.read(1 << 20):
            if part != data.read(1 << 20):
                return False
    return True


__all__ = ["LARGEST", "MOST_BYTES", "MOST_FILES", "folder_of", "harmless", "keep", "new_token", "private_folder"]
