"""Commands that train: populations from recipes, metanets on them."""

from __future__ import annotations

import os
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from weightspace.cli.base import Jobs, Json, app, settings, zoo_app
from weightspace.terminal import as_table, open_console, print_json, say, show_built, show_report, to_stderr


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
        _train_detector(zoo, out, seed, settings(setting), as_json)
        return
    if source == "merge":
        _train_prior(out, settings(setting), as_json)
        return
    from weightspace.metanets.commands import train_on

    rows, trained, folder = train_on(
        source, task, metanet={"kind": metanet, **settings(option)}, augmentation=settings(augment),
        where=settings(where), out=out, seed=seed, split_by=split_by, fresh=fresh, progress=to_stderr(),
        plan={
            "epochs": epochs, "batch": batch, "learning_rate": learning_rate, "patience": patience, "device": device,
            **settings(setting),
        },
    )  # fmt: skip
    if as_json:
        figures = {row.name: {k: asdict(v) for k, v in row.figures.items()} for row in rows}
        print_json({"folder": str(folder), "figures": figures, "history": trained.history})
        return
    say(f"{trained!r} in {folder}")
    columns = ("", *rows[0].figures)
    cells = [(row.name, *(str(row.figures.get(name, "")) for name in columns[1:])) for row in rows]
    open_console().print(as_table(f"{task} of held-out networks, with 95 % intervals", columns, cells))


def _train_detector(
    zoo: list[Path] | None, out: Path | None, seed: int, options: dict[str, Any], as_json: bool
) -> None:
    from weightspace.backdoor.commands import make

    folder = out or Path("runs/backdoor")
    detector = make(
        zoo or [Path("models/backdoors")], folder, cache=Path("runs/backdoor-evidence"), progress=to_stderr(),
        seed=seed, **options,
    )  # fmt: skip
    if as_json:
        print_json({"folder": str(folder), "figures": dict(detector.figures)})
        return
    shown = [(k, f"{v:.3f}" if isinstance(v, float) else str(v)) for k, v in detector.figures.items()]
    open_console().print(as_table(f"networks held out with their ancestry; {folder}", ("figure", "value"), shown))


def _train_prior(out: Path | None, plan: dict[str, Any], as_json: bool) -> None:
    from weightspace.mergeability.training import make

    folder, merging = out or Path("runs/merge"), Path("models/merging")
    _, found = make(merging, merging / "merges.jsonl", folder, plan=plan, progress=to_stderr())
    if as_json:
        print_json({"folder": str(folder), "figures": found})
        return
    names = ("estimator", "method", "merges", "spearman", "within", "error", "coverage")
    lines = [tuple(f"{r[n]:.3f}" if isinstance(r[n], float) else str(r[n]) for n in names) for r in found]
    open_console().print(as_table(f"merges held out with all of their tasks; the model is in {folder}", names, lines))
