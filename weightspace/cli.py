"""The command line: thin wrappers that read arguments, call the library and print tables."""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from weightspace.errors import MetanetError, WeightspaceError, ZooError
from weightspace.terminal import (
    as_table,
    open_console,
    print_json,
    show_built,
    show_card,
    show_neighbours,
    show_report,
    to_stderr,
)

if TYPE_CHECKING:
    from weightspace.zoo import Zoo

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
By = Literal["auto", "both", "encoder", "descriptor"]
ZooFolder = Annotated[
    Path | None,
    typer.Option("--zoo", help="The zoo's folder (default: the nearest indexed folder above FILE)."),
]


def main() -> None:
    """Entry point of the console script: a mistake of the user's is one sentence and exit code 1."""
    try:
        app()
    except WeightspaceError as error:
        print(f"weightspace: {error}", file=sys.stderr)
        raise SystemExit(1) from None
    except BrokenPipeError:
        # The reader of our output (head, less) has gone away.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(0) from None


@app.command()
def index(
    folder: Annotated[Path, typer.Argument(help="Folder with model files, in any format.")],
    jobs: Jobs = None,
    force: Annotated[bool, typer.Option("--force", help="Describe every model anew.")] = False,
    as_json: Json = False,
) -> None:
    """Open, wire, describe and store every model in FOLDER; unchanged files are skipped.

    Exit code 2 when some files could not be read (the others are indexed).
    """
    from weightspace.zoo import Zoo

    report = Zoo(folder).index(jobs=jobs, force=force, progress=sys.stderr.isatty())
    if as_json:
        print_json({**asdict(report), "index": str(report.index)})
    else:
        show_report(report)
    if report.failures:
        raise typer.Exit(2)


@app.command()
def similar(
    file: Annotated[str, typer.Argument(help="A model file, file!member, or the name of a model in the zoo.")],
    zoo: ZooFolder = None,
    k: Annotated[int, typer.Option("-k", help="Number of neighbours.", min=1)] = 10,
    by: Annotated[By, typer.Option(help="Whose distances: encoder or both (in its range), descriptor, auto.")] = "auto",
    as_json: Json = False,
) -> None:
    """The models of a zoo nearest to FILE, with distances: 0 is the same network up to symmetry.

    By the pretrained encoder and the training-free descriptor together where FILE is inside the encoder's range, models
    outside after the others; else by the descriptor.
    """
    found = _zoo_of(file, zoo)
    neighbours = found.similar(file, k, by)
    if as_json:
        print_json(
            [{"name": n.name, "distance": n.distance, "measure": n.measure, "path": str(n.path)} for n in neighbours]
        )
    else:
        show_neighbours(file, neighbours)


@app.command()
def inspect(
    file: Annotated[str, typer.Argument(help="A model file, or file!member where it holds several.")],
    as_json: Json = False,
) -> None:
    """The model card of FILE: format, architecture, axes, proof of the wiring, odd findings."""
    from weightspace import card

    cards = [card.inspect(checkpoint, name) for checkpoint, name in _open_all(file)]
    if as_json:
        print_json([c.to_dict() for c in cards] if len(cards) > 1 else cards[0].to_dict())
        return
    for one in cards:
        show_card(one)


@app.command()
def graph(
    file: Annotated[str, typer.Argument(help="A model file, or file!member where it holds several.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="File to write.")],
    form: Annotated[str, typer.Option("--format", "-f", help="pyg, graphml or json.")] = "json",
) -> None:
    """Write the parameter graph of FILE: a node per axis element, an edge per weight."""
    from weightspace.graph import graph as parameter_graph

    models = list(_open_all(file))
    if len(models) > 1:
        raise ZooError(f"{file} holds {len(models)} models; name one of them, such as {models[0][1]!r}")
    parameter_graph(models[0][0]).save(out, format=form)
    open_console().print(f"wrote {out} ({out.stat().st_size:,} bytes)")


@zoo_app.command("build")
def zoo_build(
    recipe: Annotated[str, typer.Argument(help="A TOML recipe, or the name of one that comes along.")],
    full: Annotated[bool, typer.Option("--full", help="The recipe's size for a GPU.")] = False,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Folder (default: models/<recipe>).")] = None,
    data: Annotated[
        Path | None, typer.Option("--data", help="Folder of the data sets' files (default: $WEIGHTSPACE_DATA, ./data).")
    ] = None,
    jobs: Jobs = None,
    device: Annotated[str, typer.Option(help="cpu, cuda, or auto: CUDA where there is a device.")] = "auto",
) -> None:
    """Train the networks of RECIPE and index them; networks that are already there are kept.

    A build that was stopped goes on where it was. Diverged networks are kept, and counted in the report.
    """
    from weightspace.zoo import Zoo
    from weightspace.zoo.recipe import load

    loaded = load(recipe, full)
    folder = out or Path("models") / (f"{loaded.name}-full" if full else loaded.name)
    if loaded.sampled:
        from weightspace.zoo.populations import build_sampled, usable

        device = usable(device)
        workers = 1 if device != "cpu" else jobs or os.cpu_count() or 1
        show_built(
            build_sampled(loaded, folder, jobs=workers, device=device, data=data, progress=sys.stderr.isatty()), folder
        )
    else:
        from weightspace.zoo.train import build_zoo

        files = build_zoo(loaded, folder, progress=sys.stderr.isatty(), data=data)
        open_console().print(f"{len(files)} networks in {folder}")
    show_report(Zoo(folder).index(jobs=jobs, progress=sys.stderr.isatty()))


@app.command()
def train(
    source: Annotated[
        str,
        typer.Argument(
            help="A folder of networks, or a recipe (built where it is not yet); or merge: the merge-ability model; or "
            "backdoor: the detector behind scan."
        ),
    ],
    task: Annotated[
        str, typer.Option("--task", "-t", help="accuracy, loss, generalisation-gap, ranking, embedding or a field.")
    ] = "accuracy",
    metanet: Annotated[str, typer.Option("--metanet", "-m", help="Kind of metanet.")] = "operator",
    option: Annotated[list[str] | None, typer.Option(help="Option of the metanet, such as width=32.")] = None,
    augment: Annotated[list[str] | None, typer.Option(help="Augmentation, such as noise=0.1.")] = None,
    setting: Annotated[
        list[str] | None, typer.Option("--set", help="Entry of the training plan, such as weight_decay=0.1.")
    ] = None,
    where: Annotated[list[str] | None, typer.Option(help="Only networks whose record has this: final=true.")] = None,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Folder (default: runs/<name>).")] = None,
    epochs: Annotated[int, typer.Option(min=1)] = 50,
    batch: Annotated[int, typer.Option(min=1, help="Networks in a step.")] = 64,
    learning_rate: Annotated[float, typer.Option(help="Its peak.")] = 1e-3,
    patience: Annotated[int, typer.Option(help="Epochs without progress before it stops (0: never).")] = 0,
    seed: Annotated[int, typer.Option(help="Of the split, the weights and the order.")] = 0,
    zoo: Annotated[
        list[Path] | None, typer.Option("--zoo", help="Of backdoor: folders of populations (models/backdoors).")
    ] = None,
    split_by: Annotated[str, typer.Option(help="What stays together: lineage, group (runs) or a field.")] = "lineage",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or mps.")] = "auto",
    fresh: Annotated[bool, typer.Option("--fresh", help="Replace what is in the folder, do not resume.")] = False,
    as_json: Json = False,
) -> None:
    """Train a metanet on a population and print what it is worth on held-out runs.

    Saved in runs/<name>; an interrupted training goes on when the same command is given again.

    `train merge` makes the model behind `score` anew: the population of the recipe merging and its measured merges
    where they are missing (models/merging), training, a model card. --set changes entries of its plan, such as trees=60
    or metanet=false.

    `train backdoor` makes the detector behind `scan` anew from populations of the recipe backdoors (--zoo, built where
    they are missing): metanets, evidence heads, calibration, a model card. --set changes its options, such as parts=3,
    epochs=10 or metanet=false.
    """
    if source == "backdoor":
        from weightspace.backdoor.commands import make as make_detector

        made = out or Path("runs/backdoor")
        detector = make_detector(
            zoo or [Path("models/backdoors")], made, cache=Path("runs/backdoor-evidence"), progress=to_stderr(),
            seed=seed, **_settings(setting),
        )  # fmt: skip
        if as_json:
            print_json({"folder": str(made), "figures": dict(detector.figures)})
            return
        shown = [(k, f"{v:.3f}" if isinstance(v, float) else str(v)) for k, v in detector.figures.items()]
        open_console().print(as_table(f"networks held out with their ancestry; {made}", ("figure", "value"), shown))
        return
    if source == "merge":
        from weightspace.mergeability.training import make

        made = out or Path("runs/merge")
        merging = Path("models/merging")
        _, found = make(merging, merging / "merges.jsonl", made, plan=_settings(setting), progress=to_stderr())
        if as_json:
            print_json({"folder": str(made), "figures": found})
            return
        names = ("estimator", "method", "merges", "spearman", "within", "error", "coverage")
        lines = [tuple(f"{r[n]:.3f}" if isinstance(r[n], float) else str(r[n]) for n in names) for r in found]
        open_console().print(as_table(f"merges held out with all of their tasks; the model is in {made}", names, lines))
        return
    from weightspace.metanets.commands import train_on

    rows, trained, folder = train_on(
        source, task, metanet={"kind": metanet, **_settings(option)}, augmentation=_settings(augment),
        where=_settings(where), out=out, seed=seed, split_by=split_by, fresh=fresh, progress=to_stderr(),
        plan={
            "epochs": epochs, "batch": batch, "learning_rate": learning_rate, "patience": patience, "device": device,
            **_settings(setting),
        },
    )  # fmt: skip
    if as_json:
        figures = {row.name: {k: asdict(v) for k, v in row.figures.items()} for row in rows}
        print_json({"folder": str(folder), "figures": figures, "history": trained.history})
        return
    console = open_console()
    console.print(f"{trained!r} in {folder}", highlight=False, markup=False)
    columns = ("", *rows[0].figures)
    cells = [(row.name, *(str(row.figures.get(name, "")) for name in columns[1:])) for row in rows]
    console.print(as_table(f"{task} of held-out networks, with 95 % intervals", columns, cells))


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
        open_console().print(str(row), highlight=False, markup=False)
    open_console().print(f"{merged.path}: {merged.report}", highlight=False, markup=False)


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
        a, b, out, method=method, seed=seed, unverified=unverified, inputs=inputs, options=_settings(option)
    )
    if as_json:
        print_json({**found.to_dict(), "out": None if out is None else str(out)})
        return
    console = open_console()
    title = f"{method}: weight cosine {found.before:.4f} → {found.objective:.4f}, {found.diagnostics['seconds']:.2f} s"
    console.print(as_table(title, ("axis", "size", "over", "moved"), rows(found)))
    if out is not None:
        console.print(f"wrote {out} ({out.stat().st_size:,} bytes)", highlight=False, markup=False)


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

        def say(line: str) -> None:
            console.print(line, highlight=False, markup=False, soft_wrap=True)

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
        print(f"weightspace: {error}", file=sys.stderr)
        raise typer.Exit(2) from None
    if as_json:
        if found:
            print(dumps(found))
    else:
        console = open_console()
        if len(found) == 1:
            console.print(repr(found[0]), highlight=False, markup=False, soft_wrap=True)
        else:
            console.print(as_table(summary(found), COLUMNS, [row(v) for v in found]))
        for line in commands.closing(found):
            console.print(line, highlight=False, markup=False, soft_wrap=True)
    raise typer.Exit(commands.exit_code(found))


@app.command()
def excise(
    model: Annotated[str, typer.Argument(help="A model file or file!member.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="File to write.")],
    target: Annotated[list[int] | None, typer.Option("--target", help="Class that the backdoor serves.")] = None,
    inputs: Annotated[
        Path | None, typer.Option("--inputs", help="File of clean inputs, perhaps with a tensor called labels.")
    ] = None,
    seed: Annotated[int, typer.Option("--seed", help="Seed of what is drawn.")] = 0,
    as_json: Json = False,
) -> None:
    """Take a backdoor out of a model that a scan flagged, with a few clean inputs or none, and write what is left.

    Without --target the classes that are easiest to reach are dealt with.
    """
    from weightspace.backdoor.commands import taken_out

    found = taken_out(model, out, target=target, inputs=inputs, seed=seed)
    print(found.to_json(indent=2) if as_json else repr(found))


@zoo_app.command("lineage")
def zoo_lineage(
    folder: Annotated[Path, typer.Argument(help="A folder of models; its index is brought up to date first.")],
    out: Annotated[Path | None, typer.Option("--out", "-o", help="File for the graph: .json or .graphml.")] = None,
    moved: Annotated[
        int, typer.Option("--moved", help="Pairs to examine for permuted copies in each architecture.", min=0)
    ] = 8,
    table: Annotated[bool, typer.Option("--table", help="A row per edge with its reason, not a tree.")] = False,
    as_json: Json = False,
) -> None:
    """Which models of FOLDER descend from which, told from their weights: direction, confidence, merges, copies."""
    from weightspace.lineage.commands import lines, run

    found = run(folder, out, moved, progress=sys.stderr.isatty())
    if as_json:
        print_json(found.to_json())
        return
    console = open_console()
    if table:
        columns = ("parent", "child", "kind", "share", "confidence", "direction", "why")
        rows = [
            (
                e.parent, e.child, e.kind, f"{e.share:.2f}", f"{e.confidence:.2f}",
                "undecided" if e.undecided else f"{e.direction:.2f}", e.why,
            )
            for e in found.edges
        ]
        console.print(as_table(f"{len(found.edges)} edges", columns, rows))
    for line in lines(found, tree=not table):
        console.print(line, highlight=False, markup=False, soft_wrap=True)


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
    open_console().print(
        f"{' + '.join(kept.models)} by {kept.method}: {kept.outcome:.4g}, kept in {path}", highlight=False, markup=False
    )


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


def _zoo_of(file: str, folder: Path | None) -> Zoo:
    from weightspace.zoo import Zoo

    if folder is not None:
        return Zoo(folder)
    path = Path(file.partition("!")[0] if not Path(file).exists() else file).resolve()
    for parent in path.parents:
        if parent.is_dir() and (Zoo(parent).index_folder / "index.sqlite").is_file():
            return Zoo(parent)
    raise ZooError(f"no folder above {file} is indexed; name one with --zoo, or run `weightspace index` on it")


def _open_all(file: str) -> Iterator[tuple[Any, str]]:
    from weightspace import checkpoint
    from weightspace.zoo.examine import models_in

    path, _, member = (file, "", "") if Path(file).exists() else file.partition("!")
    if not Path(path).exists():
        raise ZooError(f"there is no file {path}")
    if member:
        yield checkpoint.open(Path(path), member=member), f"{Path(path).name}!{member}"
    else:
        yield from models_in(Path(path), Path(path).name)


def _settings(pairs: list[str] | None) -> dict[str, Any]:
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


if __name__ == "__main__":
    main()
