"""Commands that bring models together: merge, align, score, and what a merge was found to retain."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from weightspace.cli.base import Json, app, settings, zoo_app
from weightspace.errors import MetanetError
from weightspace.terminal import as_table, open_console, print_json, say, to_stderr


@app.command()
def merge(
    inputs: Annotated[list[str], typer.Argument(help="A recipe (.toml, or mergekit's .yml), or models to merge.")],
    out: Annotated[Path | None, typer.Option("--out", "-o", help="NAME.safetensors, or a new folder.")] = None,
    method: Annotated[str | None, typer.Option("--method", "-m", help="Merging method (default: linear).")] = None,
    base: Annotated[str | None, typer.Option("--base", "-b", help="The model that they were fine-tuned from.")] = None,
    weight: Annotated[list[float] | None, typer.Option("--weight", "-w", help="One per model, in order.")] = None,
    hyper: Annotated[list[str] | None, typer.Option("--set", help="Hyper-parameter, such as density=0.2.")] = None,
    exclude: Annotated[
        list[str] | None, typer.Option(help="Tensors (* allowed) to copy from the base or first model.")
    ] = None,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16 or float16 (default: as it is).")] = None,
    max_shard_size: Annotated[str | None, typer.Option(help="Most bytes in a file, such as 5GB.")] = None,
    seed: Annotated[int | None, typer.Option(help="Of random masks.")] = None,
    align: Annotated[
        str | None, typer.Option(help="First move the models onto the base or first one, such as weight-matching.")
    ] = None,
    repair: Annotated[str | None, typer.Option(help="Then repair by weights, or by data or statistics.")] = None,
    data: Annotated[list[str] | None, typer.Option(help="File of inputs, for all models or one for each.")] = None,
    unverified: Annotated[bool, typer.Option("--unverified", help="Trust a wiring that is not proved.")] = False,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="A line for every tensor.")] = False,
    as_json: Json = False,
) -> None:
    """Merge models into one, tensor by tensor from files to a file, and report what became of each tensor."""
    from weightspace.merge.commands import run

    merged = run(
        inputs, method=method, base=base, out=out, weights=weight, exclude=exclude or (), dtype=dtype,
        max_shard_size=max_shard_size, seed=seed, hyper=hyper or (), align=align, repair=repair, data=data or (),
        unverified=unverified, progress=to_stderr(),
    )  # fmt: skip
    if as_json:
        print_json({"path": str(merged.path), **json.loads(merged.report.to_json())})
        return
    for row in merged.report if verbose else ():
        say(str(row))
    say(f"{merged.path}: {merged.report}")


@app.command()
def align(
    a: Annotated[str, typer.Argument(help="The network that stays, a file or file!member.")],
    b: Annotated[str, typer.Argument(help="The network that is moved onto it.")],
    out: Annotated[Path | None, typer.Option("--out", "-o", help="File for the moved B (.safetensors, .pt).")] = None,
    method: Annotated[str, typer.Option("--method", "-m", help="Name of a method.")] = "weight-matching",
    option: Annotated[list[str] | None, typer.Option(help="Option of the method, such as kicks=100.")] = None,
    inputs: Annotated[Path | None, typer.Option(help="File of example inputs, for methods that compare them.")] = None,
    seed: Annotated[int, typer.Option(help="Of the search.")] = 0,
    unverified: Annotated[bool, typer.Option("--unverified", help="Trust a wiring that no run has proved.")] = False,
    as_json: Json = False,
) -> None:
    """Move network B onto network A by symmetries: B computes what it did, its neurons lie where A's alike do."""
    from weightspace.align.commands import align_files, rows

    found = align_files(
        a, b, out, method=method, seed=seed, unverified=unverified, inputs=inputs, options=settings(option)
    )
    if as_json:
        print_json({**found.to_dict(), "out": None if out is None else str(out)})
        return
    title = f"{method}: weight cosine {found.before:.4f} → {found.objective:.4f}, {found.diagnostics['seconds']:.2f} s"
    open_console().print(as_table(title, ("axis", "size", "over", "moved"), rows(found)))
    if out is not None:
        say(f"wrote {out} ({out.stat().st_size:,} bytes)")


@app.command()
def score(
    models: Annotated[list[str], typer.Argument(help="Two or more models, or a folder of them, to be ranked.")],
    base: Annotated[str | None, typer.Option("--base", "-b", help="The model that they were fine-tuned from.")] = None,
    method: Annotated[
        list[str] | None, typer.Option("--method", "-m", help="Merging method to predict (default: those learned).")
    ] = None,
    known: Annotated[
        list[Path] | None, typer.Option("--known", help="Measured merges (.csv, .json, .jsonl): a, b, method, outcome.")
    ] = None,
    zoo: Annotated[
        Path | None, typer.Option("--zoo", help="Zoo whose recorded merges count (default: the nearest above).")
    ] = None,
    inputs: Annotated[
        Path | None, typer.Option("--inputs", help="File of unlabelled inputs, a tensor for each model by its name.")
    ] = None,
    no_checks: Annotated[bool, typer.Option("--no-checks", help="Look at names and shapes alone before.")] = False,
    no_scan: Annotated[bool, typer.Option("--no-scan", help="Do not look for backdoors in the models.")] = False,
    undone: Annotated[Path | None, typer.Option("--undone", help="Folder for protected models, undone.")] = None,
    least: Annotated[
        float | None,
        typer.Option("--least", help="Least retained accuracy (0.9): of groups, and below it the exit code is 2."),
    ] = None,
    blocks: Annotated[bool, typer.Option("--blocks", help="The terms block by block as well.")] = False,
    top: Annotated[int, typer.Option("--top", "-n", help="Pairs to print.", min=1)] = 20,
    prior: Annotated[
        Path | None, typer.Option("--prior", help="A merge-ability model that `weightspace train merge` wrote.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Whether models can be merged, and how well by each method, before anything is merged: from the files alone.

    First a verdict, then what was found in the files, then what each method is expected to retain and why, then what to
    do next. Exit code 2 where something stands in the way of merging these files, where some of a folder could not be
    read, or where less than --least is expected.
    """
    from weightspace.mergeability import commands

    if least is not None and not 0 < least <= 1:
        raise MetanetError(f"--least {least:g} was given, a share between 0 and 1 was expected, such as 0.9")
    report = commands.run(
        models, base=base, methods=method or (), known=known or (), zoo=zoo, inputs=inputs, checks=not no_checks,
        prior=prior, undone=undone, scan=not no_scan, progress=to_stderr(),
    )  # fmt: skip
    if as_json:
        print_json(report.to_json())
    else:
        console = open_console()
        say(f"{report.verdict[:1].upper()}{report.verdict[1:]}\n")
        for line in commands.findings(report):
            say(line)
        for table in commands.tables(report, top, least, blocks):
            console.print()
            console.print(as_table(table.title, table.columns, table.rows))
        if undone is not None:
            say(f"{len(report.undone)} undone copies written to {undone}")
        for line in commands.closing(report, models, base, undone):
            say(line)
    if report.stops or report.unreadable or (least is not None and not report.reaches(least)):
        raise typer.Exit(2)


@zoo_app.command("record")
def zoo_record(
    models: Annotated[list[str], typer.Argument(help="The models that were merged: files of one zoo.")],
    method: Annotated[str, typer.Option("--method", "-m", help="Method they were merged by, or barrier.")],
    outcome: Annotated[
        float | None, typer.Option("--outcome", help="Accuracy retained, averaged over their tasks, such as 0.93.")
    ] = None,
    retained: Annotated[
        list[float] | None, typer.Option("--retained", help="The same on each model's own tasks, one per model.")
    ] = None,
    merged: Annotated[
        list[float] | None, typer.Option("--merged", help="Or: accuracy of the merged model, on each model's tasks.")
    ] = None,
    alone: Annotated[
        list[float] | None, typer.Option("--alone", help="And that of each model by itself, in the same order.")
    ] = None,
    zoo: Annotated[Path | None, typer.Option("--zoo", help="The zoo's folder (default: the nearest indexed).")] = None,
    base: Annotated[str | None, typer.Option("--base", "-b", help="The model that they were fine-tuned from.")] = None,
    as_json: Json = False,
) -> None:
    """Keep what a merge was found to retain: `weightspace score` learns from it."""
    from weightspace.mergeability.commands import record

    kept, path = record(
        models, method, outcome, retained=retained or (), merged=merged or (), alone=alone or (), zoo=zoo, base=base
    )
    if as_json:
        print_json({**kept.to_row(), "file": str(path)})
        return
    say(f"{' + '.join(kept.models)} by {kept.method}: {kept.outcome:.4g}, kept in {path}")
