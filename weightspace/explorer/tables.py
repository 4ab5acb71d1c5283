"""Filtering a table of models by a line of words: ``cnn wiring:proved test_accuracy>0.9 -permuted``."""

from __future__ import annotations

import operator
import re
import shlex
from difflib import get_close_matches
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from weightspace.errors import ZooError

if TYPE_CHECKING:
    import pandas as pd

Mask = NDArray[np.bool_]
_TERM = re.compile(r"(-?)([A-Za-z_][A-Za-z0-9_.]*)(>=|<=|!=|==|=|>|<|:)(.*)", re.DOTALL)
_COMPARE = {">": operator.gt, "<": operator.lt, ">=": operator.ge, "<=": operator.le}
_SEARCHED = ("architecture", "population", "relation", "task", "recipe", "parent", "wiring", "format")
HELP = (
    "Words must all be part of a model's name, architecture, population, task or record. `column:text` looks in one "
    "column, `column=value` for that value alone, `column>0.9` compares numbers, `-word` leaves out. For example: "
    "`cnn wiring:proved test_accuracy>0.9 -permuted`"
)


def haystack(frame: pd.DataFrame) -> list[str]:
    """What bare words are looked for in, a text per model; worth keeping between filters."""
    columns = [[str(name) for name in frame.index]]
    columns += [frame[c].fillna("").astype(str).tolist() for c in _SEARCHED if c in frame]
    return ["\n".join(row).lower() for row in zip(*columns, strict=True)]


def matching(frame: pd.DataFrame, text: str, searched: list[str] | None = None) -> Mask:
    """Which rows a line of words keeps, see ``HELP``. Raises ``ZooError`` for a column that is not there."""
    kept = np.ones(len(frame), dtype=bool)
    if not text.strip() or frame.empty:
        return kept
    try:
        terms = shlex.split(text)
    except ValueError:
        terms = text.replace('"', " ").replace("'", " ").split()
    for term in terms:
        found = _TERM.fullmatch(term)
        if found is not None:
            sign, column, how, value = found.groups()
            kept &= _column(frame, column, how, value) ^ (sign == "-")
            continue
        word = term.lower()
        negated = word.startswith("-") and len(word) > 1
        word = word[1:] if negated else word
        searched = haystack(frame) if searched is None else searched
        kept &= np.fromiter((word in one for one in searched), dtype=bool, count=len(searched)) ^ negated
    return kept


def _column(frame: pd.DataFrame, name: str, how: str, value: str) -> Mask:
    import pandas as pd

    lower = {str(c).lower(): str(c) for c in frame.columns} | {"name": "name"}
    column = lower.get(name.lower())
    if column is None:
        near = get_close_matches(name.lower(), list(lower), 3, 0.5)
        meant = f"did you mean {' or '.join(near)}? " if near else ""
        raise ZooError(f"the table has no column {name!r}; {meant}it has {', '.join(map(str, frame.columns))}")
    cells = pd.Series(frame.index.astype(str), index=frame.index) if column == "name" else frame[column]
    if how in _COMPARE:
        number = _number(value)
        if number is None:
            raise ZooError(f"{name}{how}{value}: a number was expected after {how}, such as {name}{how}0.9")
        numbers = pd.to_numeric(cells, errors="coerce").to_numpy(dtype=float)
        with np.errstate(invalid="ignore"):
            return np.asarray(_COMPARE[how](numbers, number), dtype=bool)
    words = cells.astype(str).str.lower()
    if how == ":":
        return words.str.contains(value.lower(), regex=False).to_numpy(dtype=bool)
    number = _number(value)
    equal = (words == value.lower()).to_numpy(dtype=bool)
    if number is not None:
        equal |= (pd.to_numeric(cells, errors="coerce") == number).to_numpy(dtype=bool)
    return ~equal if how == "!=" else equal


def _number(text: str) -> float | None:
    scaled = re.fullmatch(r"\s*([-+0-9.eE]+)\s*([kKmMbBgG%]?)\s*", text)
    if scaled is None:
        return None
    try:
        return float(scaled[1]) * {"": 1.0, "k": 1e3, "m": 1e6, "b": 1e9, "g": 1e9, "%": 0.01}[scaled[2].lower()]
    except ValueError:
        return None


def shown_columns(frame: pd.DataFrame) -> list[str]:
    """Columns worth showing first: those that have something to say of these models."""
    wanted = (
        "architecture", "parameters", "test_accuracy", "predicted_accuracy", "wiring", "relation", "parent", "task",
        "findings", "format", "bytes",
    )  # fmt: skip
    return [c for c in wanted if c in frame and bool(frame[c].notna().any())]


def colourable(frame: pd.DataFrame) -> list[str]:
    """Columns that a map can be coloured by, the most telling first."""
    first = [c for c in ("architecture", "population", "relation", "wiring", "test_accuracy", "predicted_accuracy",
                         "parameters", "task", "format") if c in frame]  # fmt: skip
    rest = [str(c) for c in frame.columns if c not in first and c not in ("sha256", "file")]
    return [c for c in (*first, *rest) if frame[c].nunique(dropna=True) > 1]


__all__ = ["HELP", "Mask", "colourable", "haystack", "matching", "shown_columns"]
