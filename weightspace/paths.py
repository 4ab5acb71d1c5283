"""Where files lie that are read by path: the catalogues ``graphs`` and ``zoo``, the ``app``, caches; writing whole."""

from __future__ import annotations

import os
import secrets
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from weightspace.errors import WeightspaceError

_PACKAGE = Path(__file__).resolve().parent


def data_dir(name: str) -> Path:
    """The folder "graphs", "zoo" or "app": beside the package in a checkout, inside it once installed.

    Raises ``WeightspaceError`` where neither exists.
    """
    checkout, installed = _PACKAGE.parent / name, _PACKAGE / "_data" / name
    # An unrelated folder of the same name may lie in site-packages: only a checkout has pyproject.toml.
    if checkout.is_dir() and (_PACKAGE.parent / "pyproject.toml").is_file():
        return checkout
    if installed.is_dir():
        return installed
    raise WeightspaceError(
        f"the folder {name!r} of weightspace is neither at {checkout} nor at {installed}; "
        "the installation is incomplete: install weightspace again"
    )


def cache_dir() -> Path:
    """Where what can be made again is kept: ``$WEIGHTSPACE_CACHE`` or the platform's cache. Not created."""
    chosen = os.environ.get("WEIGHTSPACE_CACHE")
    if chosen:
        return Path(chosen).expanduser().resolve()
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "weightspace"
    if sys.platform == "win32":
        local = os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local"
        return Path(local) / "weightspace" / "Cache"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "weightspace"


def write_whole(path: str | os.PathLike[str], data: bytes | Callable[[BinaryIO], object]) -> Path:
    """Write a file that is there whole or not at all, whatever stops the writing; returns its path.

    ``data`` is what the file holds, or a function that writes it to the open file it is given. Raises what that
    raises, and ``OSError``; the file that was there before is then as it was.
    """
    with whole(path) as temporary, temporary.open("xb") as stream:
        if callable(data):
            data(stream)
        else:
            stream.write(data)
    return Path(path)


@contextmanager
def whole(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A name beside ``path`` to make a file or a folder at, which is renamed to ``path`` in the end.

    The name is one of its own for every process and thread, and begins with a dot. A file replaces the one that was
    there; a folder is discarded where another process was faster. What was begun is removed when the body raises.
    """
    final = Path(path)
    temporary = final.with_name(f".{final.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")
    try:
        yield temporary
        if temporary.is_dir():
            try:
                temporary.rename(final)
            except OSError:
                if not final.is_dir():
                    raise
        else:
            # On the disk before it has the name: a rename can outlive a power cut that its contents do not.
            with temporary.open("rb+") as stream:
                os.fsync(stream.fileno())
            temporary.replace(final)
    finally:
        if temporary.is_dir():
            shutil.rmtree(temporary)
        temporary.unlink(missing_ok=True)
