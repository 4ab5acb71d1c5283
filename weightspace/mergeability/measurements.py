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
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from weightspace.errors import WeightspaceError

if TYPE_CHECKING:
    import pandas as pd

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
"""Where measured merges may come from: a file (CSV, JSON, JSON lines), rows, or a pandas table."""


def read_measurements(known: Known | pd.DataFrame | None) -> tuple[Measurement, ...]:
    """Measured merges from a file or rows; None gives none.

    Raises ``WeightspaceError`` for a file that cannot be read and for rows without models, method or outcome.
    """
    if known is None:
        return ()
    if isinstance(known, str | os.PathLike):
        return tuple(_row(row, f"{Path(known).name}, row {i + 1}") for i, row in enumerate(_rows_of(Path(known))))
    to_dict = getattr(known, "to_dict", None)
    rows: Iterable[Any] = to_dict("records") if callable(to_dict) and not isinstance(known, Mapping) else known
    return tuple(r if isinstance(r, Measurement) else _row(r, f"row {i + 1}") for i, r in enumerate(rows))


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


def _row(row: Any, where: str) -> Measurement:
    if not isinstance(row, Mapping):
        raise WeightspaceError(f"{where}: found {row!r}, expected a row with a, b, method and outcome")
    models = tuple(str(row[letter]) for letter in LETTERS if _there(row.get(letter)))
    if not models and isinstance(row.get("models"), Sequence):
        models = tuple(str(m) for m in row["models"])
    by_task = [row.get(f"outcome_{letter}") for letter in LETTERS[: len(models)]]
    retained = row.get("retained") or ([] if not all(map(_there, by_task)) else by_task)
    try:
        single = tuple(float(str(x)) for x in retained)
        outcome = row.get("outcome")
        if not _there(outcome):
            outcome = sum(single) / len(single)
        return Measurement(models, str(row["method"]), float(str(outcome)), single)
    except (KeyError, TypeError, ValueError, ZeroDivisionError) as error:
        raise WeightspaceError(
            f"{where}: found {dict(row)!r}, expected the columns a, b, method and outcome (a number)"
        ) from error


def _there(value: Any) -> bool:
    return value is not None and value != "" and not (isinstance(value, float) and math.isnan(value))
