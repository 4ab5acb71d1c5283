"""Commands that look at models: index, similar, inspect, graph, lineage."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from weightspace.cli.base import Jobs, Json, app, zoo_app
from weightspace.errors import ZooError
from weightspace.terminal import as_table, open_console, print_json, say, show_card, show_neighbours, show_report

if TYPE_CHECKING:
    from weightspace.zoo import Zoo

# ``weightspace.zoo.zoo.By``, whose module takes longer to import than a command line has.
By = Literal["auto", "all", "function", "both", "encoder", "descriptor"]
ZooFolder = Annotated[
    Path | None,
    typer.Option("--zoo", help="The zoo's folder (default: the nearest indexed folder above FILE)."),
]


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
    by: Annotated[By, typer.Option(help="Whose distances: encoder, function, descriptor, both, all, auto.")] = "auto",
    as_json: Json = False,
) -> None:
    """The models of a zoo nearest to FILE, with distances: 0 is the same network up to symmetry.

    By as much as FILE and a model of the zoo have in common: what they compute of the same made-up inputs (function),
    the pretrained encoder, inside its range, and the training-free descriptor. What compares by less comes after.
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


@app.command()
def lineage(
    models: Annotated[list[str], typer.Argument(help="A folder of models (indexed first), or two or more models.")],
    out: Annotated[Path | None, typer.Option("--out", "-o", help="File for the graph: .json or .graphml.")] = None,
    moved: Annotated[
        int, typer.Option("--moved", help="Pairs to examine for permuted copies in each architecture.", min=0)
    ] = 8,
    table: Annotated[bool, typer.Option("--table", help="A row per edge with its reason, not a tree.")] = False,
    as_json: Json = False,
) -> None:
    """Which of some models descend from which, told from their weights: direction, confidence, merges, copies."""
    from weightspace.lineage.commands import lines, run

    found = run(models, out, moved, progress=sys.stderr.isatty())
    if as_json:
        print_json(found.to_json())
        return
    if table:
        columns = ("parent", "child", "kind", "share", "confidence", "direction", "why")
        rows = [
            (
                e.parent, e.child, e.kind, f"{e.share:.2f}", f"{e.confidence:.2f}",
                "undecided" if e.undecided else f"{e.direction:.2f}", e.why,
            )
            for e in found.edges
        ]
        open_console().print(as_table(f"{len(found.edges)} edges", columns, rows))
    for line in lines(found, tree=not table):
        say(line)


# The same under the name that it had: populations are what it is mostly asked about.
zoo_app.command("lineage")(lineage)


def _zoo_of(file: str, folder: Path | None) -> Zoo:
    from weightspace.zoo import Zoo

    if folder is not None:
        return Zoo(folder)
    path = Path(file.partition("!")[0] if not Path(file).exists() else file).resolve()
    for parent in path.parents:
        if parent.is_dir() and (Zoo(parent).index_folder / "index.sqlite").is_file():
            return Zoo(parent)
    if not path.exists():
        raise ZooError(f"there is no file {file}, and no zoo to look for a model of that name in; name one with --zoo")
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
