"""A progress bar on the terminal, or nothing where there is no terminal or it is not wanted."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def bar(title: str, total: int, show: bool = True) -> Iterator[Callable[[str], None]]:
    """A bar of ``total`` steps on standard error; call what it yields with a word on each step done."""
    if not show or total == 0:
        yield lambda _: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("[bold]{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("[dim]{task.fields[current]}"),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(title, total=total, current="")
        yield lambda current: progress.update(task, advance=1, current=current[-48:])
