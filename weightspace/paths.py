"""Where files lie that are read by path: the catalogues ``graphs`` and ``zoo``, the ``app``, caches."""

from __future__ import annotations

import os
import sys
from pathlib import Path

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
