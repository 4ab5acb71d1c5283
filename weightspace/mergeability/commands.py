"""What ``weightspace score`` and ``weightspace zoo record`` do: arguments to a report, and a report to text."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from weightspace.errors import WeightspaceError
from weightspace.mergeability.backdoors import warnings
from weightspace.mergeability.measurements import BARRIER, Measurement, read_measurements
from weightspace.mergeability.report import GROUPED, MergeReport, Prediction, Scored
from weightspace.mergeability.score import score

if TYPE_CHECKING:
    from torch import Tensor

FINDINGS = 12
"""So many lines of the preflight are printed; ``--json`` has all."""


@dataclass(frozen=True)
class Table:
    """A table to print: its title, its columns, and rows of text."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


def run(
    models: Sequence[str], *, base: str | None = None, methods: Sequence[str] = (), known: Sequence[Path] = (),
    zoo: Path | None = None, inputs: Path | None = None, checks: bool = True, prior: Path | None = None,
    undone: Path | None = None, scan: bool = True, progress: bool = False,
) -> MergeReport:  # fmt: skip
    """The report of the models that are named, or of the one folder. ``undone``: where to write undone copies to.

    Merges that were recorded in ``zoo``, or in the nearest zoo above the models that has some, count as known.
    """
    from weightspace.mergeability.candidates import is_population

    folder = len(models) == 1 and is_population(Path(models[0]))
    if not folder:
        several = [m for m in models if is_population(Path(m))]
        if several:
            raise WeightspaceError(
                f"{several[0]} is a folder of models, given beside {len(models) - 1} others; name one folder, whose "
                "models are ranked, or the files of two or more models"
            )
    measured: list[Measurement] = [*_recorded(models, zoo, folder)]
    for file in known:
        measured += read_measurements(file)
    report = score(
        models[0] if len(models) == 1 else list(models), base, tuple(methods) or None, measured or None,
        None if inputs is None else _inputs(inputs), checks=checks, prior=prior, scan=scan,
        progress=progress,
    )  # fmt: skip
    if undone is not None:
        write_undone(report, undone)
    return report


def record(
    models: Sequence[str], method: str, outcome: float | None, *, retained: Sequence[float] = (),
    merged: Sequence[float] = (), alone: Sequence[float] = (), zoo: Path | None = None, base: str | None = None,
) -> tuple[Measurement, Path]:  # fmt: skip
    """Keep a measured merge in a zoo (default: the nearest indexed folder above the first model); where it went."""
    from weightspace.zoo import Zoo
    from weightspace.zoo.merges import FILE

    found = Zoo(zoo) if zoo is not None else _zoo_above(models[0], ("index.sqlite", FILE))
    if found is None:
        raise WeightspaceError(
            f"no folder above {models[0]} is indexed; name the zoo's with --zoo, or run `weightspace index` on it"
        )
    facts = {} if base is None else {"base": base}
    kept = found.record_merge(models, method, outcome, retained=retained, merged=merged, alone=alone, **facts)
    return kept, found.index_folder / FILE


def write_undone(report: MergeReport, folder: Path) -> list[Path]:
    """Write the models whose protection was undone as safetensors files. Raises ``WeightspaceError`` for none."""
    from weightspace.checkpoint import from_tensors

    if not report.undone:
        raise WeightspaceError(
            "no model was found to be protected, so there is nothing to undo" + (
                "" if "protection" not in report.preflight.skipped else
                f" (not looked for: {report.preflight.skipped['protection']})"
            )
        )  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for name, tensors in report.undone.items():
        path = folder / f"{Path(name).stem}-undone.safetensors"
        held: dict[str, Tensor] = {n: t.contiguous() for n, t in tensors.items()}
        written.append(Path(from_tensors(held).save(path)))
    return written


# ------------------------------------------------------------------------------------ what is printed


def findings(report: MergeReport) -> list[str]:
    """The preflight in lines, the gravest first."""
    flight = report.preflight
    base = f"base {flight.base}" if flight.base else "no base"
    lines = [f"preflight: {len(flight.models)} models, {base}, wiring {flight.wiring} ({flight.seconds:.1f} s)"]
    found = [f"{f.severity:<8}{f.check}: {f.sentence}" for s in ("stop", "warning", "note") for f in flight.of(s)]
    lines += [f"  {line}" for line in found[:FINDINGS]]
    if len(found) > FINDINGS:
        lines.append(f"  and {len(found) - FINDINGS} more (--json has all)")
    if not found:
        lines.append("  nothing was found that speaks against a merge")
    lines += [f"  not made {check}: {why}" for check, why in list(flight.skipped.items())[:4]]
    lines += [f"  {'warning':<8}backdoors: {warning}" for warning in warnings(report.backdoors)]
    if report.backdoors and not any(v.flagged for v in report.backdoors.values()):
        lines.append(f"  scanned for backdoors: none of {len(report.backdoors)} models is flagged")
    return lines


def tables(report: MergeReport, top: int = 20, least: float | None = None, blocks: bool = False) -> list[Table]:
    """The methods of the first merge; the pairs, the most promising first; groups; blocks."""
    found: list[Table] = []
    if not report.merges:
        return found
    first = report.merges[0]
    if any(p.known for p in first.predictions.values()):
        found.append(_methods(first))
    based = report.comparison is not None and report.comparison.base
    found.append(Table(
        f"what the weights say of {' + '.join(first.models)}", ("term", "value", "meaning"),
        tuple((name, f"{value:.3f}", meaning(name, based)) for name, value in first.terms.items()),
    ))  # fmt: skip
    pairs = report.ranked(2)
    if len(pairs) > 1:
        found.append(_pairs(pairs, top))
        enough = least or GROUPED
        groups = report.groups(enough)
        if groups:
            found.append(Table(
                f"groups in which every pair is expected to retain {100 * enough:g} %", ("number", "models"),
                tuple((str(len(g)), ", ".join(g)) for g in groups[:5]),
            ))  # fmt: skip
    if blocks and report.comparison is not None:
        frame = report.blocks()
        frame["overlap"] = (frame["left subspace"] + frame["right subspace"]) / 2
        shown = {
            "share": "share", "cosine": "cosine", "sign conflict": "signs", "overlap": "overlap",
            "singular interference": "interference", "norm ratio": "ratio", "axis misalignment": "axes",
        }  # fmt: skip
        found.append(Table(
            f"block by block: {' + '.join(first.models)}", ("block", *shown.values()),
            tuple((str(name), *(f"{float(row[c]):.3f}" for c in shown)) for name, row in frame.iterrows()),
        ))  # fmt: skip
    return found


_MEANING = {
    "cosine": "of the {what}: 0 is {unlike}, 1 the same, below 0 contrary",
    "sign conflict": "share of large {what} with opposite signs: 0.5 is chance",
    "subspace overlap": "of the leading singular vectors of the {what}, 0 to 1",
    "singular interference": "of singular vectors, when the {what} are added (0 is none)",
    "norm ratio": "the larger over the smaller of the {what}",
    "axis misalignment": "what a better matching of neurons would gain (0 is none)",
    "size of the change": "norm of the {what} over that of the {reference}",
}


def meaning(term: str, based: bool) -> str:
    """What a term is of, with a base and without."""
    words = ("changes", "independent work", "base") if based else ("weights", "unrelated", "first model")
    return _MEANING.get(term, "").format(what=words[0], unlike=words[1], reference=words[2])


def closing(report: MergeReport, models: Sequence[str], base: str | None, undone: Path | None = None) -> list[str]:
    """What a user can do next, as commands. ``undone``: where undone copies were written to."""
    reasons: dict[str, list[str]] = {}
    for name, why in [*report.left.items(), *report.unreadable.items()]:
        if not any(f.found == why for f in report.stops):
            reasons.setdefault(why, []).append(name)
    lines = [
        f"left out: {who[0]}{f' and {len(who) - 1} more' if len(who) > 1 else ''} ({why})"
        for why, who in sorted(reasons.items(), key=lambda kv: -len(kv[1]))[:8]
    ]
    if len(reasons) > 8:
        lines.append(f"and others for {len(reasons) - 8} more reasons (--json has all)")
    lines += [f"note: {note}" for note in report.notes]
    if report.undone:
        lines.append(
            f"next: merge the undone copies in {undone}" if undone is not None
            else "next: write the undone copies with --undone FOLDER, and merge these"
        )  # fmt: skip
        return lines
    if report.stops and not report.merges:
        return lines
    suggestion = None
    if len(report.models) > 2:
        try:
            suggestion = report.suggest()
        except WeightspaceError:
            suggestion = None
    top = report.top
    if suggestion is not None:
        lines.append(f"next: {suggestion}")
        who, method = suggestion.models, suggestion.method
    elif top is not None:
        # Without a prediction a first measurement is what helps most.
        who, method = top.models, top.best or ("ot-fusion" if report.strangers else "linear")
    else:
        return lines
    if any(m.method == method and set(m.models) == set(who) for m in report.known):
        return lines
    files = [_file(name, models) for name in who]
    given = f" --base {shlex.quote(base)}" if base else ""
    lines += [
        "to measure it: " + shlex.join(["weightspace", "merge", *files, "--method", method])
        + f"{given}{_needs(method)} --out merged.safetensors",
        "and to keep what it retained: " + shlex.join(["weightspace", "zoo", "record", *files, "--method", method])
        + " --outcome 0.93",
    ]  # fmt: skip
    return lines


def _needs(method: str) -> str:
    """The option that a method cannot do without."""
    from weightspace.merge.method import WithData
    from weightspace.merge.methods import make

    return " --data INPUTS.safetensors" if isinstance(make(method), WithData) else ""


def _methods(merge: Scored) -> Table:
    several = sum(m != BARRIER for m in merge.predictions) > 1
    rows = tuple(
        (
            "barrier (lost half way)" if method == BARRIER else method, *_numbers(p),
            "best" if several and method == merge.best else "", _each(p), p.why,
        )
        for method, p in merge.predictions.items()
    )  # fmt: skip
    coverage = f"{next(iter(merge.predictions.values())).coverage:.0%}"
    return Table(
        f"{' + '.join(merge.models)}: accuracy retained",
        ("method", "retained", f"{coverage} interval", "", "by model", "why: points above or below a usual merge"),
        rows,
    )


def _numbers(p: Prediction) -> tuple[str, str]:
    if not p.known:
        return "—", ""
    unit = " points" if p.method == BARRIER else " %"
    if p.measured:
        return f"{100 * p.value:.1f}{unit}", "measured"
    return f"{100 * p.value:.1f}{unit}", f"{100 * p.low:.1f} to {100 * p.high:.1f}"


def _each(p: Prediction) -> str:
    return ", ".join(f"{100 * v:.0f}" for v in p.retained.values())


def _pairs(pairs: Sequence[Scored], top: int) -> Table:
    rows = []
    for k, m in enumerate(pairs[:top], 1):
        best = m.best
        numbers = _numbers(m.predictions[best]) if best else ("—", "")
        barrier = m.predictions.get(BARRIER)
        terms = [f"{m.terms[t]:.2f}" for t in ("cosine", "sign conflict", "subspace overlap")]
        rows.append((
            str(k), m.models[0], m.models[1], best or "", *numbers, _numbers(barrier)[0] if barrier else "", *terms,
        ))  # fmt: skip
    more = f", {top} of {len(pairs)}" if len(pairs) > top else ""
    order = "the most promising first" if pairs[0].best else "in no order, for nothing is predicted"
    return Table(
        f"pairs, {order}{more}",
        ("", "model", "partner", "by", "retained", "interval", "barrier", "cosine", "sign conflict", "overlap"),
        tuple(rows),
    )


# ------------------------------------------------------------------------------------ parts


def _recorded(models: Sequence[str], zoo: Path | None, folder: bool) -> Iterable[Measurement]:
    """Measured merges of the zoo that is named, or of the nearest one above (of a folder, ``score`` reads its own)."""
    from weightspace.zoo import Zoo
    from weightspace.zoo.merges import FILE

    if zoo is not None:
        return Zoo(zoo).merges()
    found = None if folder else _zoo_above(models[0], (FILE,))
    return () if found is None else found.merges()


def _zoo_above(file: str, marks: Sequence[str]) -> Any:
    """The nearest zoo above a file whose index folder has one of these files."""
    from weightspace.zoo import Zoo

    path = Path(file.partition("!")[0] if not Path(file).exists() else file).resolve()
    for parent in path.parents:
        if parent.is_dir():
            zoo = Zoo(parent)
            if any((zoo.index_folder / mark).is_file() for mark in marks):
                return zoo
    return None


def _inputs(file: Path) -> dict[str, Any]:
    """Tensors by model name; ``name.0``, ``name.1`` … where a network takes several."""
    from weightspace.checkpoint import open as open_

    held = open_(file)
    found: dict[str, Any] = {}
    several: dict[str, list[str]] = {}
    for key in held:
        name, dot, number = key.rpartition(".")
        if dot and number.isdigit():
            several.setdefault(name, []).append(key)
        else:
            found[key] = held[key]
    found |= {n: tuple(held[k] for k in sorted(ks, key=lambda k: int(k.rpartition(".")[2]))) for n, ks in
              several.items()}  # fmt: skip
    return found


def _file(name: str, models: Sequence[str]) -> str:
    """The path that a name stands for."""
    for given in models:
        if Path(given).name == name or given.endswith(name):
            return given
    if len(models) > 1:
        return name
    return str(Path(models[0]) / name) if Path(models[0]).is_dir() else f"{models[0]}!{name}"


__all__ = ["FINDINGS", "Table", "closing", "findings", "meaning", "record", "run", "tables", "write_undone"]
