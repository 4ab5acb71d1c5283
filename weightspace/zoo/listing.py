"""A zoo at a glance: what a table shows of every model, read without loading torch, cards or vectors.

``Zoo.table`` says the same for notebooks; this is for pages that open a zoo of thousands while someone waits.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from weightspace.zoo.store import FACTS, FileStamp, Store, described, others_in
from weightspace.zoo.zoo import Zoo

if TYPE_CHECKING:
    import pandas as pd

Vectors = Literal["descriptor", "encoder", "function"]
_FIRST = ("name", "architecture", "parameters", "test_accuracy", "predicted_accuracy", "wiring", "format", "relation",
          "parent", "task")  # fmt: skip
_LAST = ("inside", "asked", "findings", "movable", "error", "recognised", "bytes", "tensors", "file", "sha256")


@dataclass(frozen=True, eq=False)
class Listing:
    """The index of a zoo: ``frame`` has a row per model, indexed by name; ``stamp`` changes when the index does.

    Columns are those of ``Zoo.table`` (facts of the card, the training record's plain values, what the pretrained
    metanets say) and ``file``. ``failures`` and ``ignored`` are files with the reason.
    """

    folder: Path
    index: Path
    stamp: str
    frame: pd.DataFrame = field(repr=False)
    failures: tuple[tuple[str, str], ...]
    ignored: tuple[tuple[str, str], ...]
    files: Mapping[str, FileStamp] = field(repr=False)

    @property
    def names(self) -> list[str]:
        return [str(name) for name in self.frame.index]

    def path(self, name: str) -> Path:
        """The file (or folder) that a model is in."""
        return self.folder / str(self.frame.at[name, "file"])

    def address(self, name: str) -> str:
        """What ``ws.open`` takes for a model: its path, with the member where a file has several."""
        path = str(self.frame.at[name, "file"])
        return str(self.folder / path) + name.removeprefix(path)


def stamp_of_index(folder: Path) -> str:
    """Changes whenever the index in a folder does; empty where there is none."""
    found = []
    for name in ("index.sqlite", "index.sqlite-wal"):
        try:
            status = (folder / name).stat()
        except OSError:
            continue
        found.append(f"{status.st_size}-{status.st_mtime_ns}")
    return "/".join(found) if (folder / "index.sqlite").is_file() else ""


def listing(folder: Path) -> Listing:
    """Read the index of a zoo. Raises ``ZooError`` where the folder or its index is missing or damaged."""
    import pandas as pd

    zoo = Zoo(folder)
    stamp = stamp_of_index(zoo.index_folder)
    store = _opened(zoo.index_folder)
    try:
        facts, files = store.facts(), store.stamps()
        failures, ignored = store.outcomes("failed"), store.outcomes("ignored")
    finally:
        store.close()
    rows = []
    for fact in facts:
        row = dict(zip(FACTS, fact, strict=True))
        row["file"] = row.pop("path")
        record, reading = _object(row.pop("record")), _object(row.pop("reading"))
        said = {key: value for key, value in record.items() if not isinstance(value, dict | list) and key not in row}
        row["inside"], row["asked"] = bool(reading.get("inside")), str(reading.get("asked") or "")
        for ours, theirs in (("accuracy", ""), ("low", "_low"), ("high", "_high")):
            value = reading.get(f"accuracy{theirs}")
            row[f"predicted_{ours}"] = float("nan") if value is None else float(value)
        rows.append({**said, **row})
    frame = pd.DataFrame(rows)
    if rows:
        order = [c for c in _FIRST if c in frame]
        order += [str(c) for c in frame if c not in order and c not in _LAST]
        last = [c for c in _LAST if c in frame and c not in order]
        frame = frame[[*order, *last]].set_index("name")
    return Listing(zoo.folder, zoo.index_folder, stamp, frame, tuple(failures), tuple(ignored), files)


def card_of(folder: Path, name: str) -> dict[str, Any] | None:
    """The whole card of one model as it is in the index; None for a model that is not there."""
    store = _opened(Zoo(folder).index_folder)
    try:
        found = store.model(name)
        return None if found is None else {**found.card, "reading": dict(found.reading), "sha256": found.sha256}
    finally:
        store.close()


def vectors(folder: Path, kind: Vectors) -> tuple[list[str], NDArray[np.float32]]:
    """Names and vectors (models, features): descriptors of all models, of the encoder those of models inside its range,
    and of functions those of the models that were asked what most were (``asked`` of ``listing(folder).frame``)."""
    store = _opened(Zoo(folder).index_folder)
    try:
        names, plain = store.embeddings()
        if kind == "descriptor":
            return names, plain
        if kind == "function":
            computed, asked = store.functions()
            most = commonest(asked)
            some = [bool(what) and what == most for what in asked]
            return [name for name, held in zip(names, some, strict=True) if held], computed[np.array(some, dtype=bool)]
        learned, inside = store.learned()
        return [name for name, held in zip(names, inside, strict=True) if held], learned[inside]
    finally:
        store.close()


def commonest(asked: Iterable[str]) -> str:
    """What most models were asked, of those that were asked anything; "" where none was."""
    counts = Counter(what for what in asked if what)
    return max(sorted(counts), key=counts.__getitem__) if counts else ""


def _opened(index: Path) -> Store:
    """The index read as what it says it is: nothing of another version can come from it but its vectors."""
    said = described(index)
    return Store(index, int(said.get("dimension", 0)), said.get("embedding", ""), write=False, others=others_in(said))


def _object(text: Any) -> dict[str, Any]:
    found = json.loads(text) if text else {}
    return found if isinstance(found, dict) else {}


__all__ = ["Listing", "Vectors", "card_of", "commonest", "listing", "stamp_of_index", "vectors"]
