"""What all commands share: the application, common options, and how a mistake is told."""

from __future__ import annotations

import json
import os
import sys
from typing import Annotated, Any

import typer

from weightspace.errors import MetanetError, WeightspaceError
from weightspace.terminal import visible

app = typer.Typer(
    name="weightspace",
    help="Trained networks as data: index a folder of checkpoints, find similar models, inspect one.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)
zoo_app = typer.Typer(help="Populations of networks trained from recipes.", no_args_is_help=True)
app.add_typer(zoo_app, name="zoo")

Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")]
Jobs = Annotated[int | None, typer.Option("--jobs", "-j", help="Worker processes (default: one per core).")]


def main() -> None:
    """Entry point of the console script: a mistake of the user's is one sentence and exit code 1."""
    try:
        app()
    except WeightspaceError as error:
        print(visible(f"weightspace: {error}"), file=sys.stderr)
        raise SystemExit(1) from None
    except BrokenPipeError:
        # The reader of our output (head, less) has gone away.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(0) from None


def settings(pairs: list[str] | None) -> dict[str, Any]:
    """``["width=32", "activation=relu"]`` as names and values, which are JSON where they can be."""
    found: dict[str, Any] = {}
    for pair in pairs or ():
        name, equals, text = pair.partition("=")
        if not equals:
            raise MetanetError(f"{pair!r} is no setting; write it as name=value")
        try:
            found[name.strip()] = json.loads(text)
        except ValueError:
            found[name.strip()] = text
    return found
