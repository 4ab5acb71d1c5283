"""The models that pages speak of: those of the open zoo by their names, uploaded ones as ``upload/NAME``."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import Any

from weightspace.errors import ZooError
from weightspace.explorer import maps, tables
from weightspace.explorer.maps import Points
from weightspace.zoo.examine import stamp_of
from weightspace.zoo.listing import Listing, Vectors, card_of, listing, stamp_of_index
from weightspace.zoo.zoo import Zoo

UPLOAD = "upload/"
_KEPT = 8
_LOCK = Lock()
_LISTINGS: OrderedDict[tuple[Path, str], tuple[Listing, list[str]]] = OrderedDict()
_MAPS: OrderedDict[tuple[Path, str, Vectors], tuple[list[str], Points, str]] = OrderedDict()


@dataclass(frozen=True, eq=False)
class Shelf:
    """What can be chosen from: the open zoo, and the uploads of this session; None where there is no index."""

    zoo: Listing | None
    uploads: Listing | None

    @property
    def names(self) -> list[str]:
        """All models, uploaded ones first."""
        own = [] if self.zoo is None else self.zoo.names
        return [*self.uploaded, *own]

    @property
    def uploaded(self) -> list[str]:
        return [] if self.uploads is None else [UPLOAD + name for name in self.uploads.names]

    def __contains__(self, name: str) -> bool:
        bare = name.removeprefix(UPLOAD)
        if bare != name and self.uploads is not None and bare in self.uploads.frame.index:
            return True
        return self.zoo is not None and name in self.zoo.frame.index

    def _where(self, name: str) -> tuple[Listing, str]:
        bare = name.removeprefix(UPLOAD)
        if name.startswith(UPLOAD) and self.uploads is not None and bare in self.uploads.frame.index:
            return self.uploads, bare
        if self.zoo is not None and name in self.zoo.frame.index:
            return self.zoo, name
        where = "no zoo is open" if self.zoo is None else f"{self.zoo.folder} has no such model"
        raise ZooError(
            f"there is no model {name}: {where}, or its index is older than the file; index the folder again"
        )

    def address(self, name: str) -> str:
        """What ``ws.open`` takes for a model. Raises ``ZooError`` for one that is not there."""
        shelf, bare = self._where(name)
        return shelf.address(bare)

    def fact(self, name: str, column: str) -> Any:
        """An entry of the table; None where it has none."""
        import pandas as pd

        shelf, bare = self._where(name)
        if column not in shelf.frame:
            return None
        found: Any = shelf.frame.at[bare, column]
        return None if found is None or found is pd.NA or found != found else found

    def card(self, name: str) -> Mapping[str, Any]:
        """The whole card as it is in the index."""
        shelf, bare = self._where(name)
        found = card_of(shelf.folder, bare)
        if found is None:
            raise ZooError(f"the index has no card of {name}; index the folder again")
        return found

    def content(self, name: str) -> str:
        """What decides a result about a model: the hash of its file's content, or, where the file has changed since it
        was indexed, its size and time."""
        shelf, bare = self._where(name)
        file = str(shelf.frame.at[bare, "file"])
        known = shelf.files.get(file)
        try:
            now = stamp_of(shelf.folder / file)
        except OSError as error:
            raise ZooError(f"{name} is gone from {shelf.folder} ({error.strerror}); index the folder again") from None
        if known is not None and (known.size, known.mtime_ns) == now:
            return f"{known.sha256}{bare.removeprefix(file)}"
        return f"{shelf.folder / file}{bare.removeprefix(file)} {now}"


def opened(folder: Path) -> tuple[Listing, list[str]]:
    """The listing of a zoo and what words are looked for in, kept until its index changes.

    Raises ``ZooError`` where there is no folder, or no index.
    """
    index = Zoo(folder).index_folder
    stamp = stamp_of_index(index)
    key = (index, stamp)
    with _LOCK:
        if stamp and key in _LISTINGS:
            _LISTINGS.move_to_end(key)
            return _LISTINGS[key]
    found = listing(folder)
    kept = found, tables.haystack(found.frame)
    with _LOCK:
        _LISTINGS[index, found.stamp] = kept
        while len(_LISTINGS) > _KEPT:
            _LISTINGS.popitem(last=False)
    return kept


def placed(zoo: Listing, kind: Vectors) -> tuple[list[str], Points, str]:
    """The map of a zoo by principal components (see ``maps.place``), kept until its index changes."""
    key = (zoo.index, zoo.stamp, kind)
    with _LOCK:
        if key in _MAPS:
            _MAPS.move_to_end(key)
            return _MAPS[key]
    found = maps.place(zoo.folder, kind, "PCA")
    with _LOCK:
        _MAPS[key] = found
        while len(_MAPS) > 2 * _KEPT:
            _MAPS.popitem(last=False)
    return found


def is_indexed(folder: Path) -> bool:
    """Whether a folder has an index."""
    return bool(stamp_of_index(Zoo(folder).index_folder))


def index(folder: str, jobs: int | None = None) -> Any:
    """Bring a zoo's index up to date; an ``IndexReport``. For a worker."""
    return Zoo(folder).index(jobs=jobs, progress=False)


def build_starter(folder: str) -> Any:
    """Train the starter zoo in a folder and index it; an ``IndexReport``. For a worker."""
    from weightspace.zoo.train import build_zoo

    build_zoo("starter", Path(folder), progress=True)
    return Zoo(folder).index(progress=True)


__all__ = ["UPLOAD", "Shelf", "build_starter", "index", "is_indexed", "opened", "placed"]
