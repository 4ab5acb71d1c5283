"""Commands to begin with: the explorer, and a demonstration."""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from weightspace.cli.base import Jobs, app
from weightspace.terminal import open_console, show_card, show_neighbours, show_report


@app.command(name="app")
def explorer(
    zoo: Annotated[Path | None, typer.Argument(help="Folder of models (default: this one, if it is indexed).")] = None,
    port: Annotated[int | None, typer.Option(help="Port (default: the first free one from 8501).")] = None,
    host: Annotated[str, typer.Option(help="Address to serve on; default: this machine alone.")] = "127.0.0.1",
    headless: Annotated[bool, typer.Option("--headless", help="Open no browser.")] = False,
) -> None:
    """The explorer: a folder of models in the browser, to look at, compare, merge and distrust."""
    from weightspace.explorer.launch import launch, nearby

    raise typer.Exit(launch(zoo or nearby(), port, host, headless))


@app.command()
def demo(
    folder: Annotated[Path | None, typer.Argument(help="Folder for the starter zoo (default: temporary).")] = None,
    jobs: Jobs = None,
) -> None:
    """The main job in one go: train the starter zoo, index it, search it, show a model card."""
    with _folder_or_temporary(folder) as chosen:
        _demo(chosen, jobs)


def _demo(folder: Path, jobs: int | None) -> None:
    from weightspace import card, checkpoint
    from weightspace.zoo import Zoo
    from weightspace.zoo.train import build_zoo

    console = open_console()
    console.rule("1. train the starter zoo")
    started = time.perf_counter()
    files = build_zoo("starter", folder, progress=sys.stderr.isatty())
    console.print(f"{len(files)} networks in {folder}, {time.perf_counter() - started:.0f} s")
    console.rule("2. index it: open, wire, prove, describe")
    zoo = Zoo(folder)
    show_report(zoo.index(jobs=jobs, progress=sys.stderr.isatty()))
    console.rule("3. what is similar to a permuted copy?")
    copy = next(file for file in files if file.name.startswith("cnn-16-permuted"))
    show_neighbours(copy.name, zoo.similar(copy, k=6))
    console.rule("4. the card of its nearest neighbour")
    nearest = zoo.similar(copy, k=1)[0]
    show_card(card.inspect(checkpoint.open(nearest.path), nearest.name))


@contextmanager
def _folder_or_temporary(folder: Path | None) -> Iterator[Path]:
    if folder is not None:
        yield folder
        return
    with tempfile.TemporaryDirectory(prefix="weightspace-") as temporary:
        yield Path(temporary)
