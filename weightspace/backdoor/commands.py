"""What ``weightspace scan``, ``excise`` and ``train backdoor`` do: arguments to verdicts, models and a detector."""

from __future__ import annotations

import logging
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from weightspace.backdoor.shipped import CARD, Detector
from weightspace.backdoor.verdict import LEVEL, Verdict, Verdicts, scan
from weightspace.errors import WeightspaceError
from weightspace.paths import write_whole

if TYPE_CHECKING:
    from weightspace.backdoor.excise import Excised

_log = logging.getLogger(__name__)

CLEAN, FOUND, UNSCANNED = 0, 1, 2
"""Exit codes: none flagged; some flagged; none flagged but some that could not be scanned."""


def run(
    models: Sequence[str], *, base: str | None = None, siblings: Sequence[str] = (), inputs: Path | None = None,
    level: float = LEVEL, detector: Path | None = None, progress: bool = False,
) -> Verdicts:  # fmt: skip
    """Verdicts of files and folders in the order given; what cannot be scanned has a verdict that says so.

    Raises ``WeightspaceError`` for what is wrong with the question: a path that is not there, a base that cannot be
    read.
    """
    from weightspace.backdoor.verdict import failed

    missing = [m for m in models if not Path(m.partition("!")[0]).exists() and not Path(m).exists()]
    if missing:
        raise WeightspaceError(f"there is no {missing[0]}; the file of a model or a folder of models was expected")
    given, labels = _inputs(inputs)
    known = None if detector is None else Detector.load(detector)
    found = Verdicts()
    for model in models:
        try:
            one = scan(
                model, base=base, siblings=tuple(siblings), inputs=given, labels=labels, level=level, detector=known,
                progress=progress,
            )  # fmt: skip
        except WeightspaceError as error:
            one = failed(model, error, level)
        if isinstance(one, Verdict):
            found.append(one)
        else:
            found.extend(one)
            found.ignored.update(one.ignored)
    return found


def exit_code(found: Sequence[Verdict]) -> int:
    """For pipelines: 1 where a model is flagged, else 2 where one could not be scanned or none was found, else 0."""
    if any(v.flagged for v in found):
        return FOUND
    return UNSCANNED if not found or any(v.error for v in found) else CLEAN


def closing(found: Verdicts) -> list[str]:
    """What to do next, in lines."""
    lines = []
    if found.ignored:
        names = ", ".join(list(found.ignored)[:3]) + (" …" if len(found.ignored) > 3 else "")
        lines.append(f"{len(found.ignored)} files hold no model by their content and were passed over: {names}")
    if found.flagged and len(found) > 1:
        lines.append(f"look closer: weightspace scan {shlex.quote(found.flagged[0].path)}")
    return lines


def taken_out(
    model: str, out: Path, *, target: Sequence[int] | None = None, inputs: Path | None = None,
    method: str | None = None, seed: int = 0,
) -> Excised:  # fmt: skip
    """The model without its backdoor, written to ``out``; labels come from the file of inputs, where it has any.

    Raises ``WeightspaceError`` for a model that is not there and for what ``excise`` refuses.
    """
    from weightspace.backdoor.excise import excise

    if not Path(model.partition("!")[0]).is_file():
        raise WeightspaceError(f"there is no {model}; the file of a model was expected")
    given, labels = _inputs(inputs)
    return excise(model, target=target or None, inputs=given, labels=labels, out=out, method=method, seed=seed)


def _inputs(file: Path | None) -> tuple[Any, Any]:
    """The inputs in a file, and the labels where it has a tensor of this name."""
    if file is None:
        return None, None
    from weightspace.merge.inputs import load

    found = load(str(file))
    if isinstance(found.x, tuple) and len(found.x) == 1:
        return found.x[0], found.y
    raise WeightspaceError(f"{file}: one tensor of inputs (and perhaps one called labels) was expected, found several")


# ------------------------------------------------------------------------------------ training


def make(
    zoos: Sequence[Path], out: Path, *, cache: Path | None = None, data: Path | None = None, progress: bool = False,
    **options: Any,
) -> Detector:  # fmt: skip
    """Train the detector on populations, built first where a folder holds none, and write its file and card.

    ``options`` are those of ``training.train``. Raises ``MetanetError`` for populations without clean or poisoned ones.
    """
    from weightspace.backdoor.card import model_card
    from weightspace.backdoor.population import labelled
    from weightspace.backdoor.training import entries, fit

    for zoo in zoos:
        if not any(zoo.glob("*.safetensors")):
            from weightspace.zoo.recipe import load
            from weightspace.zoo.train import build_zoo

            _log.info("training the population backdoors in %s", zoo)
            build_zoo(load("backdoors"), zoo, progress=progress, data=data)
    networks = labelled(zoos, progress)
    worked = [n for n in networks if n.worked]
    some, names, left = entries(worked, cache, progress, tests=bool(options.get("evidence", True)))
    _log.info("%d networks, %d attacks that failed, %d not read", len(some), len(networks) - len(worked), len(left))
    out.mkdir(parents=True, exist_ok=True)
    detector = fit(some, names, **options).save(out)
    write_whole(out / CARD, model_card(detector, len(networks) - len(worked), left).encode())
    return detector


__all__ = ["CLEAN", "FOUND", "UNSCANNED", "closing", "exit_code", "make", "run", "taken_out"]
