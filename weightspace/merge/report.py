"""What happened to every tensor of a merge."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch

Outcome = Literal["merged", "copied", "left out", "refused"]


@dataclass(frozen=True)
class Row:
    """One tensor: what became of it, and why. ``dtype`` and ``shape`` are the result's."""

    name: str
    outcome: Outcome
    reason: str
    shape: tuple[int, ...]
    dtype: str

    def __str__(self) -> str:
        return f"{self.name}: {self.outcome}{', ' + self.reason if self.reason else ''}"


@dataclass(frozen=True)
class Report:
    """Every tensor of a merge. ``settings``: method, hyper-parameters, weights and models. ``notes``: the rest."""

    rows: tuple[Row, ...]
    settings: Mapping[str, Any]
    seconds: float = 0.0
    notes: tuple[str, ...] = ()

    def __iter__(self) -> Iterator[Row]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, name: str) -> Row:
        for row in self.rows:
            if row.name == name:
                return row
        raise KeyError(f"the merge had no tensor {name!r}")

    def of(self, outcome: Outcome) -> tuple[Row, ...]:
        """The tensors with an outcome."""
        return tuple(row for row in self.rows if row.outcome == outcome)

    def to_json(self) -> str:
        """Everything, as JSON."""
        rows = [asdict(row) for row in self.rows]
        whole = {"settings": self.settings, "seconds": self.seconds, "notes": self.notes, "tensors": rows}
        return json.dumps(whole, default=repr)

    def __str__(self) -> str:
        counts = Counter(row.outcome for row in self.rows)
        lines = [", ".join(f"{n:,} {outcome}" for outcome, n in counts.items()) + f", {self.seconds:.1f} s"]
        grouped: dict[tuple[str, str], list[str]] = {}
        for row in self.rows:
            if row.outcome != "merged" or row.reason:
                grouped.setdefault((row.outcome, row.reason), []).append(row.name)
        for (outcome, reason), names in grouped.items():
            shown = ", ".join(names[:4]) + (f" and {len(names) - 4:,} more" if len(names) > 4 else "")
            lines.append(f"  {outcome}: {shown} ({reason})")
        lines += [f"  note: {note}" for note in self.notes]
        return "\n".join(lines)


@dataclass(frozen=True, eq=False)
class Merged:
    """The result: ``tensors`` by name where nothing was to be written, else ``path``; and the ``report``."""

    report: Report
    tensors: dict[str, torch.Tensor] | None = None
    path: Path | None = None

    def open(self) -> Mapping[str, torch.Tensor]:
        """The merged tensors, wherever they are."""
        if self.tensors is not None:
            return self.tensors
        from weightspace.checkpoint import open as open_checkpoint

        assert self.path is not None
        return open_checkpoint(self.path)

    def __repr__(self) -> str:
        where = f"in {self.path}" if self.path else "in memory"
        return f"Merged({self.report.settings.get('method')}, {where}: {self.report})"
