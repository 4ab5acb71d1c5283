"""Measured merges: what a user, or the harness in ``measure``, found out by merging and evaluating.

A table of them has a row per merge: ``a``, ``b`` (``c`` …: the models), ``method``, ``outcome`` (retained accuracy,
averaged over the models' tasks) and, where it is known task by task, ``outcome_a``, ``outcome_b`` …
"""

from __future__ import annotations

import csv
import io
import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from weightspace.errors import WeightspaceError

if TYPE_CHECKING:
    import pandas as pd

    from weightspace.zoo import Zoo

LETTERS = "abcdefgh"
"""Columns of a table's models: at most as many in one merge."""


@dataclass(frozen=True)
class Measurement:
    """One measured merge.

    ``models``: their names, at least two; ``outcome``: the retained accuracy, averaged over their tasks (or another
    figure of merit, the same for all rows of a method); ``retained``: the same for each model's own tasks, in the order
    of ``models``, empty where it is not known.
    """

    models: tuple[str, ...]
    method: str
    outcome: float
    retained: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        if not 2 <= len(set(self.models)) == len(self.models) <= len(LETTERS):
            raise WeightspaceError(
                f"a measured merge names the models {', '.join(self.models) or '(none)'}; 2 to {len(LETTERS)} "
                "different ones were expected"
            )
        if self.retained and len(self.retained) != len(self.models):
            raise WeightspaceError(
                f"the merge of {', '.join(self.models)} has {len(self.retained)} outcomes by task, "
                f"one for each of the {len(self.models)} models was expected"
            )
        if not all(math.isfinite(x) for x in (self.outcome, *self.retained)):
            raise WeightspaceError(f"the merge of {', '.join(self.models)} has an outcome that is not a finite number")

    def to_row(self) -> dict[str, Any]:
        """The row of a table."""
        row: dict[str, Any] = dict(zip(LETTERS, self.models, strict=False))
        row |= {"method": self.method, "outcome": self.outcome}
        row |= {f"outcome_{letter}": value for letter, value in zip(LETTERS, self.retained, strict=False)}
        return row


Known = str | os.PathLike[str] | Iterable[Measurement | Mapping[str, Any]]
"""Where measured merges may come from: a file (CSV, JSON, JSON lines), a zoo's folder, or rows; a ``Zoo`` and a pandas
table do as well."""

BARRIER = "barrier"
"""The method's name under which barriers are kept: the accuracy that is lost half way between two models."""
_MOST = 1.5
"""Retained accuracy above this is no share: merges gain a little over single models, but not by half."""


def read_measurements(known: Known | pd.DataFrame | Zoo | None) -> tuple[Measurement, ...]:
    """Measured merges from a file, a zoo or rows; None gives none. Of a merge that is there twice the last counts.

    Raises ``WeightspaceError`` for a file that cannot be read, and for a row without models, method or outcome, or
    with an outcome that is no share (percent, for example).
    """
    if known is None:
        return ()
    if isinstance(known, str | os.PathLike):
        path = Path(known)
        if path.is_dir():
            from weightspace.zoo import Zoo

            return Zoo(path).merges()
        return latest(as_measurement(row, f"{path.name}, row {i + 1}") for i, row in enumerate(_rows_of(path)))
    merges = getattr(known, "merges", None)
    if callable(merges):
        found: tuple[Measurement, ...] = merges()
        return found
    to_dict = getattr(known, "to_dict", None)
    rows: Any = to_dict("records") if callable(to_dict) and not isinstance(known, Mapping) else known
    if isinstance(rows, Mapping | Measurement) or not isinstance(rows, Iterable):
        rows = [rows]
    return latest(as_measurement(r, f"row {i + 1}") for i, r in enumerate(rows))


def latest(measured: Iterable[Measurement]) -> tuple[Measurement, ...]:
    """One for each merge and method: the last."""
    return tuple({(frozenset(m.models), m.method): m for m in measured}.values())


def about(
    measured: Sequence[Measurement], names: Sequence[str], methods: set[str]
) -> tuple[tuple[Measurement, ...], list[str]]:
    """Measurements of these models' merges by these methods, under the models' names here; notes on the others."""
    short: dict[str, set[str]] = {}
    for name in names:
        for text in (Path(name).name, name.rsplit(".", 1)[0], Path(name).name.rsplit(".", 1)[0]):
            short.setdefault(text, set()).add(name)

    def here_of(text: str) -> str | None:
        """A model by its name, its path or its file's name without the ending, where that is one model's alone."""
        if text in names:
            return text
        found = next((short[t] for t in (text, Path(text).name) if t in short), set())
        return next(iter(found)) if len(found) == 1 else None

    kept, others, foreign = [], 0, set()
    for m in measured:
        here = [here_of(x) for x in m.models]
        if any(h is None for h in here) or len(set(here)) < len(here):
            others += 1
        elif m.method not in methods:
            foreign.add(m.method)
        else:
            kept.append(replace(m, models=tuple(str(h) for h in here)))
    notes = []
    if others:
        notes.append(f"{others} measured merges are about models that were not given and do not count")
    if foreign:
        notes.append(f"nothing was learned about {', '.join(sorted(foreign))}: their measured merges do not count")
    return tuple(kept), notes


def write_measurements(path: str | os.PathLike[str], measured: Sequence[Measurement]) -> Path:
    """Write a table, as CSV or (``.json``) JSON; the file is there whole or not at all."""
    from weightspace.paths import write_whole

    rows = [m.to_row() for m in measured]
    if Path(path).suffix == ".json":
        return write_whole(path, (json.dumps(rows, indent=1) + "\n").encode())
    most = max((len(m.models) for m in measured), default=2)
    columns = [*LETTERS[:most], "method", "outcome", *(f"outcome_{letter}" for letter in LETTERS[:most])]
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, restval="")
    writer.writeheader()
    writer.writerows(rows)
    return write_whole(path, text.getvalue().encode())


def _rows_of(path: Path) -> list[Mapping[str, Any]]:
    try:
        text = path.read_text()
        if path.suffix == ".csv":
            return list(csv.DictReader(io.StringIO(text)))
        if path.suffix == ".jsonl":
            return [json.loads(line) for line in text.splitlines() if line.strip()]
        found = json.loads(text)
    except (OSError, ValueError) as error:
        raise WeightspaceError(
            f"measured merges cannot be read from {path} ({error}); expected a .csv, .json or .jsonl table with the "
            "columns a, b, method, outcome"
        ) from error
    if not isinstance(found, list):
        kind = type(found).__name__
        raise WeightspaceError(f"{path} holds {kind}, a list of rows (a, b, method, outcome) was expected")
    return found


def as_measurement(row: Any, where: str = "the row") -> Measurement:
    """A row of a table as a measured merge; errors say ``where``. Raises ``WeightspaceError``."""
    if not isinstance(row, Mapping | Measurement):
        raise WeightspaceError(f"{where}: found {row!r}, expected a row with a, b, method and outcome")
    found = row if isinstance(row, Measurement) else _parsed(row, where)
    least, most = (-1.0, 1.0) if found.method == BARRIER else (0.0, _MOST)
    for value in (found.outcome, *found.retained):
        if not least <= value <= most:
            percent = f"; if it is percent, write {value / 100:g}" if 0 <= value / 100 <= 1 else ""
            raise WeightspaceError(
                f"{where}: the merge of {', '.join(found.models)} has the outcome {value:g}, expected a share: "
                + ("accuracy that is lost, from -1 to 1" if found.method == BARRIER else
                   "merged over single accuracy, from 0 to 1 or a little above") + percent
            )  # fmt: skip
    if found.retained and abs(sum(found.retained) / len(found.retained) - found.outcome) > 0.02:
        raise WeightspaceError(
            f"{where}: the outcome {found.outcome:g} is not the mean of the outcomes by task "
            f"({', '.join(f'{x:g}' for x in found.retained)}); leave one of the two out"
        )
    return found


def _parsed(row: Mapping[str, Any], where: str) -> Measurement:
    def wrong(what: str) -> WeightspaceError:
        shown = {str(k): v for k, v in row.items()}
        return WeightspaceError(
            f"{where}: {what} in {shown!r}; expected the columns a, b, method and outcome (a number), and perhaps "
            "outcome_a, outcome_b"
        )

    models = tuple(str(row[letter]) for letter in LETTERS if _there(row.get(letter)))
    given = row.get("models")
    if not models and isinstance(given, Sequence) and not isinstance(given, str):
        models = tuple(str(m) for m in given)
    if not models:
        raise wrong("there are no models")
    if not _there(row.get("method")):
        raise wrong("there is no method")
    by_task = [row.get(f"outcome_{letter}") for letter in LETTERS[: len(models)]]
    retained = row.get("retained") or ()
    if not retained and any(map(_there, by_task)):
        if not all(map(_there, by_task)):
            raise wrong("some of the outcomes by task are missing")
        retained = by_task
    try:
        single = tuple(float(str(x)) for x in retained)
    except (TypeError, ValueError):
        raise wrong("an outcome by task is no number") from None
    outcome = row.get("outcome")
    if not _there(outcome):
        if not single:
            raise wrong("there is no outcome")
        outcome = sum(single) / len(single)
    try:
        return Measurement(models, str(row["method"]), float(str(outcome)), single)
    except ValueError:
        raise wrong(f"the outcome {outcome!r} is no number") from None
    except WeightspaceError as error:
        raise WeightspaceError(f"{where}: {error}") from None


def _there(value: Any) -> bool:
    return value is not None and value != "" and not (isinstance(value, float) and math.isnan(value))


__all__ = [
    "BARRIER", "LETTERS", "Known", "Measurement", "about", "as_measurement", "latest", "read_measurements",
    "write_measurements",
]  # fmt: skip
