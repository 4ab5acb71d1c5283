"""What the command line prints: tables where a person reads, whole lines where a program does."""

from __future__ import annotations

import json
import logging
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console

    from weightspace.card import Card
    from weightspace.zoo import IndexReport, Neighbour
    from weightspace.zoo.populations import Built


def to_stderr() -> bool:
    """Whether there is a terminal for bars; where there is none, the library's log goes to standard error."""
    if sys.stderr.isatty():
        return True
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Visible("%(message)s"))
    logger = logging.getLogger("weightspace")
    logger.handlers = [handler]
    logger.setLevel(logging.INFO)
    return False


def open_console() -> Console:
    from rich.console import Console

    # Piped output keeps whole lines: a table cut at 80 columns is of no use to grep.
    return Console() if sys.stdout.isatty() else Console(width=160)


def print_json(value: Any) -> None:
    print(json.dumps(value, indent=2, default=str))


def visible(text: str) -> str:
    """Text with its control characters spelled out: names in files are a stranger's, and could drive the terminal."""
    return "".join(c if c.isprintable() or c in "\n\t" else c.encode("unicode_escape").decode() for c in text)


class _Visible(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return visible(super().format(record))


def say(line: str) -> None:
    """A line as it is, never cut."""
    open_console().print(visible(line), highlight=False, markup=False, soft_wrap=True)


def show_report(report: IndexReport) -> None:
    from rich.markup import escape

    console = open_console()
    console.print(
        f"{report.models} models in the index; this run: {report.described} files described, "
        f"{report.unchanged} unchanged, {report.removed} removed, {len(report.ignored)} no checkpoints, "
        f"{len(report.failures)} failed; {report.seconds:.1f} s"
    )
    console.print(
        f"{report.inside} models inside the range of the pretrained encoder; the others by function or descriptor"
    )
    console.print(f"index: {escape(str(report.index))}")
    if report.failures:
        console.print(as_table("could not be read", ("file", "reason"), report.failures))


def show_built(built: Built, folder: Path) -> None:
    console = open_console()
    console.print(
        f"{len(built.files)} networks in {folder}; {built.trained} trained in {built.seconds:.0f} s "
        f"({built.rate:.2f} a second), {built.diverged} diverged, {len(built.failures)} runs failed"
    )
    rows = [
        (name, str(number), " to ".join(f"{x:.4f}" for x in built.scores[name]) if name in built.scores else "")
        for name, number in built.counts.items()
    ]
    console.print(as_table("populations", ("population", "networks", "test accuracy (siren: loss)"), rows))
    if built.failures:
        console.print(as_table("could not be trained", ("run", "reason"), built.failures))


def show_neighbours(query: str, neighbours: list[Neighbour]) -> None:
    rows = []
    for neighbour in neighbours:
        card = neighbour.card
        record = card.get("record") or {}
        relation = record.get("relation", "")
        if record.get("parent"):
            preposition = "from" if relation == "fine-tuned" else "of"
            relation = f"{relation} {preposition} {record['parent']}"
        rows.append(
            (
                f"{neighbour.distance:.6f}",
                neighbour.measure,
                neighbour.name,
                str(card["architecture"]),
                f"{card['parameters']:,}",
                str(card["wiring"]),
                relation,
            )
        )
    columns = ("distance", "by", "model", "architecture", "parameters", "wiring", "record")
    open_console().print(as_table(f"nearest to {query}", columns, rows))


def show_card(card: Card) -> None:
    console = open_console()
    facts = [
        ("format", card.format),
        ("architecture", card.architecture),
        ("recognised by", card.recognised),
        ("parameters", f"{card.parameters:,} in {card.tensors} tensors ({', '.join(card.dtypes)})"),
        ("bytes", f"{card.bytes:,}"),
        ("wiring", card.wiring),
    ]
    if card.proof:
        facts.append(("proof", card.proof))
    if card.movable is not None:
        facts.append(("movable", f"{card.movable:.1%} of the parameters lie on an axis that may be permuted"))
    facts.extend(("note", note) for note in card.notes)
    facts.extend(("finding", finding) for finding in card.findings)
    for key in (
        "recipe",
        "relation",
        "parent",
        "task",
        "seed",
        "train_accuracy",
        "test_accuracy",
        "test_loss",
    ):
        value = card.record.get(key)
        if value is not None:
            facts.append((key.replace("_", " "), f"{value:.4f}" if isinstance(value, float) else str(value)))
    console.print(as_table(card.name, ("", ""), facts))
    if card.axes:
        shown = [axis for axis in card.axes if axis.detail != "kernel positions" and axis.size > 1]
        rows = [(axis.name, f"{axis.size:,}", axis.kind, str(axis.tensors), axis.detail) for axis in shown]
        console.print(as_table("axes", ("axis", "size", "kind", "tensors", "made of / why pinned"), rows))
        if len(card.axes) > len(shown):
            console.print(f"and {len(card.axes) - len(shown)} axes of kernel positions or of size 1")


def as_table(title: str, columns: tuple[str, ...], rows: Any) -> Any:
    from rich.markup import escape
    from rich.table import Table

    table = Table(title=escape(visible(title)), title_justify="left", show_header=any(columns), header_style="bold")
    for column in columns:
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(*(escape(visible(str(cell))) for cell in row))
    return table
