"""Commands on backdoors: scan, excise."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from weightspace.cli.base import Json, app
from weightspace.errors import WeightspaceError
from weightspace.terminal import as_table, open_console, say, visible


@app.command()
def scan(
    models: Annotated[list[str], typer.Argument(help="A model file, file!member, or a folder of models.")],
    base: Annotated[str | None, typer.Option("--base", "-b", help="The model that they were fine-tuned from.")] = None,
    sibling: Annotated[list[str] | None, typer.Option("--sibling", help="Another fine-tuned from this base.")] = None,
    inputs: Annotated[
        Path | None, typer.Option("--inputs", help="File of a few clean inputs, perhaps with a tensor called labels.")
    ] = None,
    level: Annotated[float, typer.Option("--level", help="Share of clean models that may be flagged.")] = 0.05,
    detector: Annotated[
        Path | None, typer.Option("--detector", help="Folder that `weightspace train backdoor` wrote.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object per model, on a line each.")] = False,
) -> None:
    """How likely a model has a backdoor, and which class it serves: from its weights alone, nothing in it is executed.

    Exit code 0 where none is flagged, 1 where one is, 2 where none is but something could not be scanned (or the
    command makes no sense).
    """
    from weightspace.backdoor import commands
    from weightspace.backdoor.verdict import COLUMNS, dumps, row, summary

    try:
        found = commands.run(
            models, base=base, siblings=sibling or (), inputs=inputs, level=level, detector=detector,
            progress=sys.stderr.isatty(),
        )  # fmt: skip
    except WeightspaceError as error:
        # Exit code 1 says that a model was flagged.
        print(visible(f"weightspace: {error}"), file=sys.stderr)
        raise typer.Exit(2) from None
    if as_json:
        if found:
            print(dumps(found))
    else:
        if len(found) == 1:
            say(repr(found[0]))
        else:
            open_console().print(as_table(summary(found), COLUMNS, [row(v) for v in found]))
        for line in commands.closing(found):
            say(line)
    raise typer.Exit(commands.exit_code(found))


@app.command()
def excise(
    model: Annotated[str, typer.Argument(help="A model file or file!member.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="File to write.")],
    target: Annotated[list[int] | None, typer.Option("--target", help="Class that the backdoor serves.")] = None,
    inputs: Annotated[
        Path | None, typer.Option("--inputs", help="File of clean inputs, perhaps with a tensor called labels.")
    ] = None,
    method: Annotated[
        str | None, typer.Option("--method", help="relearn or unlearn; relearn also without inputs, at some accuracy.")
    ] = None,
    seed: Annotated[int, typer.Option("--seed", help="Seed of what is drawn.")] = 0,
    as_json: Json = False,
) -> None:
    """Take a backdoor out of a model that a scan flagged, with a few clean inputs or none, and write what is left.

    Without --target the classes that are easiest to reach are dealt with.
    """
    from weightspace.backdoor.commands import taken_out

    found = taken_out(model, out, target=target, inputs=inputs, method=method, seed=seed)
    print(found.to_json(indent=2) if as_json else visible(repr(found)))
