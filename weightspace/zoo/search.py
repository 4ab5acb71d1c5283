"""Searches of a zoo: by rows of a task, by architecture, by filters on its table. Every answer says why."""

from __future__ import annotations

import hashlib
import json
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from weightspace.errors import WeightspaceError, ZooError
from weightspace.paths import write_whole
from weightspace.progress import bar
from weightspace.zoo.store import ModelRow

if TYPE_CHECKING:
    import pandas as pd
    from torch import Tensor

    from weightspace.checkpoint import Checkpoint
    from weightspace.retrieval.architecture import Fingerprint
    from weightspace.wiring.wiring import Wiring

GRAPHS = "graphs.json"
_CONDITION = re.compile(r"\s*(?P<column>[\w ]+?)\s*(?P<sign><=|>=|==|!=|=|<|>|~)\s*(?P<value>.+?)\s*")


@dataclass(frozen=True)
class Hit:
    """A model that was found: its ``score`` (higher is better), and ``why`` in words; ``facts`` as numbers."""

    name: str
    score: float
    why: str
    path: Path
    card: Mapping[str, Any] = field(repr=False)
    facts: Mapping[str, Any] = field(default_factory=dict, repr=False)


@dataclass(frozen=True, eq=False)
class Search:
    """What a search found, best first; iterates over the hits.

    ``left_out``: models that the question could not be put to, with the reason. ``asked``: the question in words.
    """

    asked: str
    hits: tuple[Hit, ...]
    left_out: Mapping[str, str] = field(default_factory=dict)
    seconds: float = 0.0

    def __iter__(self) -> Iterator[Hit]:
        return iter(self.hits)

    def __len__(self) -> int:
        return len(self.hits)

    def __getitem__(self, at: int) -> Hit:
        return self.hits[at]

    def table(self) -> pd.DataFrame:
        """One row per hit."""
        import pandas as pd

        rows = [{"name": h.name, "score": h.score, **h.facts, "why": h.why} for h in self.hits]
        return pd.DataFrame(rows, columns=None if rows else ["name", "score", "why"]).set_index("name")

    def to_json(self) -> dict[str, Any]:
        """Everything but the cards, as plain values."""
        hits = [{k: v for k, v in asdict(h).items() if k != "card"} | {"path": str(h.path)} for h in self.hits]
        return {"asked": self.asked, "hits": hits, "left_out": dict(self.left_out), "seconds": self.seconds}

    def __repr__(self) -> str:
        lines = [f"Search({self.asked}: {len(self.hits)} found, {len(self.left_out)} left out; {self.seconds:.1f} s)"]
        lines += [f"  {h.score:.3f}  {h.name}: {h.why}" for h in self.hits]
        reasons: dict[str, list[str]] = {}
        for name, why in self.left_out.items():
            reasons.setdefault(why, []).append(name)
        for why, names in list(reasons.items())[:6]:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            lines.append(f"  left out {names[0]}{more}: {why}")
        return "\n".join(lines)


# ------------------------------------------------------------------------------------ rows of a task


def by_task(
    folder: Path, models: Sequence[ModelRow], x: Tensor, y: object, k: int, progress: bool = False
) -> Search:
    """Models that know the task of rows ``x (n, ...)`` with labels ``y (n,)``; see ``weightspace.retrieval.task``."""
    import torch

    from weightspace.retrieval.task import knowledge, labels_of, outputs_of

    started = time.perf_counter()
    rows = torch.as_tensor(x)
    if rows.dim() < 2 or not len(rows):
        raise ZooError(f"found rows of shape {list(rows.shape)}; expected (rows, ...), as a model takes them")
    labels = labels_of(y, len(rows))
    wirings = Wirings()
    left: dict[str, str] = {}
    hits: list[Hit] = []
    with bar("running models", len(models), progress) as advance:
        for row in models:
            advance(row.name)
            try:
                model = opened(folder, row)
                outputs, remark = outputs_of(wirings(model), model, rows)
            except WeightspaceError as error:
                left[row.name] = " ".join(str(error).split())
                continue
            except (RuntimeError, ValueError, TypeError, IndexError) as error:
                what = f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"
                left[row.name] = f"it failed on these rows ({what})"
                continue
            found = knowledge(outputs, labels)
            if labels.values is None:
                words = [
                    f"its {found.outputs} outputs tell {max(found.information or 0.0, 0.0):.0%} of the labels",
                    f"a linear probe on them is right on {found.probe:.0%} (chance {labels.chance:.0%})",
                ]
                if found.direct is not None and found.direct > labels.chance:
                    words.append(f"as they stand they are right on {found.direct:.0%}")
            else:
                words = [f"a linear probe on its {found.outputs} outputs explains {found.probe:.0%} of the variance"]
            why = ", ".join([*words, *([remark] if remark else [])])
            hits.append(Hit(row.name, found.score, why, folder / row.path, row.card, asdict(found)))
    hits.sort(key=lambda h: -h.score)
    what = f"{labels.count} classes" if labels.values is None else "numbers"
    asked = f"who knows the task of {len(rows)} rows of shape {list(rows.shape[1:])}, {what}"
    return Search(asked, tuple(hits[:k]), left, time.perf_counter() - started)


# ------------------------------------------------------------------------------------ architecture


def by_architecture(
    folder: Path, models: Sequence[ModelRow], asked: Fingerprint, size: int, name: str, k: int, index: Path,
    progress: bool = False,
) -> Search:  # fmt: skip
    """Models whose wiring's graph is like ``asked``; equal ones in order of how near their numbers of weights are."""
    from weightspace.retrieval.architecture import alike, because

    started = time.perf_counter()
    graphs, left = fingerprints(folder, models, index, progress)
    scores: dict[str, float] = {}
    hits = []
    for row in models:
        if row.name not in graphs:
            continue
        graph = graphs[row.name]
        key = json.dumps(graph, sort_keys=True)
        if key not in scores:
            scores[key] = alike(asked, graph)
        hits.append((scores[key], _ratio(size, int(row.card["parameters"])), row))
    hits.sort(key=lambda h: (-round(h[0], 9), h[1], h[2].name))
    found = tuple(
        Hit(
            row.name, score,
            f"{because(asked, graphs[row.name])}; {int(row.card['parameters']):,} parameters, asked with {size:,}",
            folder / row.path, row.card, {"parameters": int(row.card["parameters"])},
        )
        for score, _, row in hits[:k]
    )  # fmt: skip
    return Search(f"architectures like {name}", found, left, time.perf_counter() - started)


def fingerprints(
    folder: Path, models: Sequence[ModelRow], index: Path, progress: bool = False
) -> tuple[dict[str, Fingerprint], dict[str, str]]:
    """The graphs of models by name, kept beside the index by what they were made from; and who has none, and why."""
    from weightspace.retrieval.architecture import VERSION, fingerprint

    kept = _kept(index / GRAPHS, VERSION)
    known = dict(kept)
    wirings = Wirings(prove=False)
    found: dict[str, Fingerprint] = {}
    left: dict[str, str] = {}
    with bar("reading graphs", len(models), progress) as advance:
        for row in models:
            advance(row.name)
            try:
                model = opened(folder, row)
                key = hashlib.sha256(_kind(model).encode()).hexdigest()[:24]
                if key not in known:
                    known[key] = fingerprint(wirings(model))
                found[row.name] = known[key]
            except WeightspaceError as error:
                left[row.name] = " ".join(str(error).split())[:300]
    if known != kept:
        # Beside an index that cannot be written to they are worked out again the next time.
        with suppress(OSError):
            write_whole(index / GRAPHS, json.dumps({"version": VERSION, "graphs": known}).encode())
    return found, left


def _kept(path: Path, version: int) -> dict[str, Fingerprint]:
    try:
        stored = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    graphs = stored.get("graphs") if isinstance(stored, dict) and stored.get("version") == version else None
    return dict(graphs) if isinstance(graphs, dict) else {}


def _ratio(one: int, other: int) -> float:
    return max(one, other, 1) / max(min(one, other), 1)


# ------------------------------------------------------------------------------------ filters


def by_filters(frame: pd.DataFrame, folder: Path, rows: Mapping[str, ModelRow], conditions: Sequence[str]) -> Search:
    """Models whose row of the table meets every condition, each ``column sign value``.

    Signs: ``<  <=  >  >=  =  !=`` for numbers and texts, ``~`` for texts that contain the value in any case. A model
    without an entry in a column does not meet a condition on it.
    """
    started = time.perf_counter()
    parsed = [_condition(text, frame) for text in conditions]
    left: dict[str, str] = {}
    hits = []
    for name, entry in frame.iterrows():
        told = []
        for column, sign, value in parsed:
            actual = str(name) if column == "name" else entry[column]
            if actual is None or actual != actual:
                left[str(name)] = f"it has no {column}"
                break
            if not _meets(actual, sign, value):
                break
            told.append(f"{column} is {actual:g}" if isinstance(actual, float) else f"{column} is {actual}")
        else:
            row = rows[str(name)]
            hits.append(Hit(row.name, 1.0, ", ".join(told) or "no condition", folder / row.path, row.card))
    return Search(" and ".join(conditions) or "everything", tuple(hits), left, time.perf_counter() - started)


def _condition(text: str, frame: pd.DataFrame) -> tuple[str, str, str | float]:
    found = _CONDITION.fullmatch(text)
    columns = ["name", *map(str, frame.columns)]
    if found is None:
        raise ZooError(f"{text!r} is no condition; write it as 'test_accuracy > 0.9' or 'architecture ~ mlp'")
    column = found["column"].replace(" ", "_") if found["column"] not in columns else found["column"]
    if column not in columns:
        raise ZooError(f"there is no column {found['column']!r} in the table; it has {', '.join(columns)}")
    value = found["value"].strip("'\"")
    try:
        return column, found["sign"], float(value.replace(",", ""))
    except ValueError:
        return column, found["sign"], value


def _meets(actual: Any, sign: str, value: str | float) -> bool:
    if sign == "~":
        return str(value).lower() in str(actual).lower()
    number = isinstance(value, float) and not isinstance(actual, str)
    a, b = (float(actual), value) if number else (str(actual).lower(), str(value).lower())
    if sign in ("=", "=="):
        return bool(a == b)
    if sign == "!=":
        return bool(a != b)
    if not number:
        raise ZooError(f"{actual!r} and {value!r} cannot be ordered; use = or ~ for texts")
    assert isinstance(a, float)
    assert isinstance(b, float)
    return {"<": a < b, "<=": a <= b, ">": a > b, ">=": a >= b}[sign]


# ------------------------------------------------------------------------------------ shared


def opened(folder: Path, row: ModelRow) -> Checkpoint:
    """The model of a row of the index."""
    from weightspace import checkpoint

    return checkpoint.open(folder / row.path, row.name.removeprefix(row.path).removeprefix("!") or None)


class Wirings:
    """Wirings of many models, one for all that say the same of their architecture."""

    def __init__(self, prove: bool = True) -> None:
        self._prove = prove
        self._known: dict[str, Wiring | WeightspaceError] = {}

    def __call__(self, model: Checkpoint) -> Wiring:
        from weightspace.wiring import wiring

        key = _kind(model)
        if key not in self._known:
            try:
                self._known[key] = wiring(model, prove=self._prove)
            except WeightspaceError as error:
                self._known[key] = error
        found = self._known[key]
        if isinstance(found, WeightspaceError):
            raise found
        return found


def _kind(model: Checkpoint) -> str:
    """What decides a model's wiring: format, configuration, description, and names, shapes and types of its tensors."""
    from weightspace.card import record_of

    # The graph of an ONNX file and the code's place in a TorchScript archive are its own.
    alone = str(model.path) if model.format in ("onnx", "torchscript") else ""
    tensors = [f"{n} {list(model.shape(n))} {model.dtype(n)}" for n in model]
    facts = [model.format, alone, model.config, record_of(model.metadata).get("network"), tensors]
    return json.dumps(facts, sort_keys=True, default=repr)


__all__ = ["Hit", "Search", "Wirings", "by_architecture", "by_filters", "by_task", "fingerprints", "opened"]
