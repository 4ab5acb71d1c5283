"""A progress bar on the terminal, or nothing where there is no terminal or it is not wanted; or told to a listener."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

Tell = Callable[[str, int, int, str], None]
"""``(title, done, total, word)`` of the step that was just done."""

_LISTENER: ContextVar[Tell | None] = ContextVar("progress listener", default=None)


@contextmanager
def listening(tell: Tell) -> Iterator[None]:
    """While this lasts, every bar that is begun in this context tells ``tell`` of its steps, and draws nothing."""
    token = _LISTENER.set(tell)
    try:
        yield
    finally:
        _LISTENER.reset(token)


@contextmanager
def bar(title: str, total: int, show: bool = True) -> Iterator[Callable[[str], None]]:
    """A bar of ``total`` steps on standard error; call what it yields with a word on each step done."""
    tell = _LISTENER.get()
    if tell is not None:
        done = 0

        def told(word: str) -> None:
            nonlocal done
            done += 1
            tell(title, done, total, word)

        tell(title, 0, total, "")
        yield told
        return
    if not show or total == 0:
        yield lambda _: None
        return
    from rich.console import Console
    from rich.markup import escape
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from weightspace.terminal import visible

    # Names of files are a stranger's: no markup, no control characters.
    columns = (
        TextColumn("[bold]{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("[dim]{task.fields[current]}"),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(escape(visible(title)), total=total, current="")
        yield lambda current: progress.update(task, advance=1, current=escape(visible(current[-48:])))
