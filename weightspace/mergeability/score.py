"""``ws.score``: whether models can be merged and what each would retain, before anything is merged."""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from weightspace.errors import WeightspaceError
from weightspace.mergeability.measurements import BARRIER, Known, latest, read_measurements
from weightspace.mergeability.predicting import JOINT
from weightspace.mergeability.preflight import CHECKS, Model, fly, named, opened
from weightspace.mergeability.report import MergeReport
from weightspace.mergeability.scoring import Scoring, wired
from weightspace.progress import bar

if TYPE_CHECKING:
    import pandas as pd

    from weightspace.mergeability.prior import Prior
    from weightspace.wiring.wiring import Wiring
    from weightspace.zoo import Zoo

MOST = 512
"""Models of one report."""
_HEADERS = ("adapters", "quantised", "tensors")
"""What is looked at in any case: without it nothing can be compared."""


def score(
    models: Sequence[Model] | Mapping[str, Model] | str | os.PathLike[str] | Zoo,
    base: Model | None = None,
    methods: Sequence[str] | None = None,
    known: Known | pd.DataFrame | Zoo | None = None,
    inputs: Mapping[str, Any] | None = None,
    *,
    wiring: Wiring | None = None,
    checks: bool = True,
    scan: bool = True,
    prior: Prior | str | os.PathLike[str] | None = None,
    progress: bool = False,
) -> MergeReport:
    """Whether models can be merged, how well by each method, and why: from the files alone.

    ``models``: two or more paths, checkpoints or mappings of tensors, or a mapping of names to such; or a folder of
    models (a ``Zoo``), of which those that fit the base are taken and whose recorded merges count as ``known``; or one
    file that holds several.
    ``base``: what they were fine-tuned from; without it nothing is predicted unless merges were measured. ``methods``:
    those to predict (default: all that were learned). ``known``: measured merges of these models (a table with
    ``a, b, method, outcome``; see ``measurements``), which sharpen all else. ``inputs``: a few unlabelled inputs by
    model name, of that model's task: models are merged in memory, and how often the merged one answers as the single
    one does counts as an uncertain measurement. ``checks``: do the preflight; without, only names and shapes are looked
    at. ``scan``: look whether models carry backdoors that a merge would inherit (``ws.scan``; not of more than 8
    models, or of large ones). ``prior``: another merge-ability model than that which comes with weightspace, or the
    folder that ``weightspace train merge`` wrote it to. ``progress``: show bars on the terminal.

    Protected models are scored as they are once undone (``report.undone``); models that do not fit are left out and
    named. Of more than 64 models all pairs are ranked, but measured merges cannot be taken into account.

    Raises ``WeightspaceError`` for fewer than two models, more than 512, unknown methods, measurements that make no
    sense, and files that cannot be read.
    """
    started = time.perf_counter()
    using = _prior(prior, base is not None, methods)
    methods = [m for m in using.methods if m != BARRIER] if methods is None else list(methods)
    unknown = [m for m in methods if m not in using.methods]
    if unknown or not methods:
        found = repr(unknown[0]) if unknown else "no method"
        raise WeightspaceError(f"nothing was learned about {found}; expected some of {', '.join(using.methods)}")
    origin = None if base is None else opened(base)
    folder = _population(models)
    left: dict[str, str] = {}
    unreadable: Mapping[str, str] = {}
    measured = list(read_measurements(known))
    if folder is not None:
        from weightspace.mergeability.candidates import candidates
        from weightspace.zoo import Zoo

        if wiring is None and origin is not None:
            wiring, _ = wired(None, origin)
        with bar("choosing", 0, progress) as step:
            chosen = candidates(folder, origin, wiring, step)
        left, unreadable = dict(chosen.left), chosen.unreadable
        measured = [*Zoo(folder).merges(), *measured]
        given: dict[str, Model] = dict(chosen.models)
        if len(given) < 2:
            raise WeightspaceError(
                f"{len(given)} models of {folder} can be candidates, two or more were expected; "
                + _reasons({**left, **unreadable})
            )
    else:
        given = _members(models) or named(models)  # type: ignore[arg-type]
    _count(len(given), bool(measured))
    origin_name = base if base is not None and origin is not None and origin.path is not None else origin
    with bar("looking", 2 * len(given) if checks else 0, progress) as step:
        flight = fly(given, origin_name, wiring=wiring, checks=CHECKS if checks else _HEADERS, step=step)
    scoring = Scoring(
        flight, using, tuple(methods), latest(measured), inputs, left, unreadable, started, scan, progress
    )
    return scoring.report()


def _prior(prior: Prior | str | os.PathLike[str] | None, base: bool, methods: Sequence[str] | None) -> Prior:
    """The one that was given, or that which comes along; without a base, that of models without one if it has it."""
    from weightspace.mergeability.prior import FILES, STRANGERS, Prior, shipped, shipped_strangers

    if isinstance(prior, Prior):
        return prior
    folder = FILES if prior is None else Path(prior)
    if not base and (folder / STRANGERS).is_file():
        strange = shipped_strangers() if prior is None else Prior.load(folder, STRANGERS)
        if methods is None or set(methods) <= set(strange.methods):
            return strange
    return shipped() if prior is None else Prior.load(folder)


def _population(models: Any) -> Path | None:
    """The folder of models that was given, if it is one."""
    from weightspace.mergeability.candidates import is_population

    folder = getattr(models, "folder", None)
    if isinstance(folder, Path):
        return folder
    if isinstance(models, str | os.PathLike) and is_population(Path(models)):
        return Path(models)
    return None


def _members(models: Any) -> dict[str, Model]:
    """The models in one file that holds several; none otherwise."""
    from weightspace.checkpoint import list_models

    if not isinstance(models, str | os.PathLike) or not Path(models).is_file():
        return {}
    found = list_models(models)
    return {m.rpartition("!")[2]: opened(m) for m in found} if len(found) > 1 else {}


def _count(count: int, measured: bool) -> None:
    if count < 2:
        given = "1 model was" if count == 1 else f"{count} models were"
        raise WeightspaceError(f"{given} given, two or more were expected (or a folder of them)")
    if count > MOST:
        raise WeightspaceError(
            f"{count} models were given, at most {MOST} are scored at once; choose by task or by date, or score parts "
            "of them and then the best of each"
        )
    if measured and count > JOINT:
        raise WeightspaceError(
            f"{count} models were given with measured merges, which can be taken into account for at most {JOINT} "
            "models at once: rank them without first (known=None), and score the most promising with them"
        )


def _reasons(left: Mapping[str, str], most: int = 5) -> str:
    often = Counter(left.values())
    told = [f"{why} ({n} models)" if n > 1 else f"{next(k for k, v in left.items() if v == why)}: {why}"
            for why, n in often.most_common(most)]  # fmt: skip
    return "; ".join(told) or "it holds no other models"


__all__ = ["JOINT", "MOST", "score"]
