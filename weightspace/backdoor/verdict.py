"""``ws.scan(x)``: how likely a network has a backdoor, and which class it serves, from its weights."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from weightspace.errors import CheckpointError, UnknownFormatError, WeightspaceError
from weightspace.pretrained.applicability import Applicability

if TYPE_CHECKING:
    from weightspace.backdoor.null import Null
    from weightspace.backdoor.shipped import Detector
    from weightspace.backdoor.subspace import Subspace
    from weightspace.wiring.wiring import Wiring

LEVEL = 0.05
"""Share of clean networks that may be flagged."""
_MODEL_SUFFIXES = frozenset(
    (".safetensors", ".pt", ".pth", ".bin", ".ckpt", ".h5", ".hdf5", ".keras", ".onnx", ".npz", ".npy", ".gguf",
     ".msgpack", ".pkl", ".pickle")
)


@dataclass(frozen=True)
class Verdict:
    """What was found in one network.

    - ``probability`` that it has a backdoor, by the pretrained detector, at the share ``prior`` of networks with one
      among those it was trained on (``at`` gives it at another); None where the detector does not apply.
    - ``p_value``: how many clean networks look as suspect, by tests that were not trained; None where none could be
      made.
    - ``flagged``: whether it is more suspect than all but ``level`` of clean networks: by the probability where that
      applies, else by the p-value.
    - ``targets``: classes and their shares of the suspicion, the most suspect first.
    - ``applicable``: whether the network is like those that the detector was trained on; ``applicability`` says more.
    - ``calibration``: what is known of the probability (expected calibration error, Brier score, networks).
    - ``reason``: the verdict in words. ``error``: why the network could not be scanned; empty where it was.
    """

    path: str
    probability: float | None
    p_value: float | None
    flagged: bool
    targets: tuple[tuple[int, float], ...]
    applicable: bool
    reason: str
    applicability: Applicability
    prior: float = 0.5
    level: float = LEVEL
    detector: str = ""
    calibration: Mapping[str, float] = field(default_factory=dict)
    evidence: Mapping[str, float] = field(default_factory=dict)
    error: str = ""

    @property
    def target(self) -> int | None:
        """The most suspect class."""
        return self.targets[0][0] if self.targets else None

    def at(self, prior: float) -> float | None:
        """The probability if a share ``prior`` of all networks had a backdoor. Raises ``WeightspaceError`` for others.

        Half of those that the detector was trained on have one; of what is downloaded hardly so many.
        """
        if not 0 < prior < 1:
            raise WeightspaceError(f"a share between 0 and 1 was expected, such as 0.01, found {prior}")
        if self.probability is None:
            return None
        odds = self.probability / max(1 - self.probability, 1e-12)
        odds *= prior / (1 - prior) * (1 - self.prior) / self.prior
        return odds / (1 + odds)

    @cached_property
    def subspace(self) -> Subspace:
        """Where a backdoor for the most suspect class sits; the file is opened again. See ``ws.locate`` for options.

        Raises ``WeightspaceError`` for tensors that came from no file: ``ws.locate`` takes them, with their wiring.
        """
        from weightspace.backdoor.localise import locate

        return locate(*self._network(), target=self.target)

    def show(self) -> Any:
        """The subspace on the parameter graph, a plotly figure."""
        wiring, tensors = self._network()
        return self.subspace.show(wiring, tensors)

    def _network(self) -> tuple[Wiring, Mapping[str, Tensor]]:
        from weightspace.wiring.entry import wiring

        if self.path == "tensors":
            raise WeightspaceError("the tensors that were scanned came from no file; use ws.locate(wiring, tensors)")
        found = opened(self.path)
        return wiring(found), found

    def to_json(self) -> dict[str, Any]:
        """``path, probability, p_value, flagged, targets, applicable``, and ``error`` where it could not be scanned."""
        found: dict[str, Any] = {
            "path": self.path, "probability": self.probability, "p_value": self.p_value, "flagged": self.flagged,
            "targets": [c for c, _ in self.targets], "applicable": self.applicable,
        }  # fmt: skip
        return {**found, "error": self.error} if self.error else found

    def __repr__(self) -> str:
        if self.error:
            return f"{self.path}: not scanned: {self.error}"
        lines = [f"{self.path}: {'FLAGGED' if self.flagged else 'not flagged'}. {self.reason}"]
        if self.probability is not None:
            error = self.calibration.get("ece")
            known = "" if error is None else f" (calibration error {error:.2f})"
            lines.append(
                f"  probability of a backdoor {self.probability:.3f}{known}, if {self.prior:.0%} of networks had one; "
                f"{self.at(0.01):.3f} if 1% had"
            )
        if self.p_value is not None:
            lines.append(f"  p-value {self.p_value:.3g} (untrained tests: the share of clean networks as suspect)")
        if self.targets:
            ranking = ", ".join(f"{c} ({share:.0%})" for c, share in self.targets[:3])
            lines.append(f"  target classes, the most suspect first: {ranking}")
        if not self.applicable:
            lines.append(f"  the pretrained detector does not apply: {self.applicability.reason}")
        return "\n".join(lines)


class Verdicts(list[Verdict]):
    """A verdict for each model of a folder; ``ignored``: files that hold no model by their content, and why."""

    def __init__(self, found: Iterable[Verdict] = (), ignored: Mapping[str, str] | None = None) -> None:
        super().__init__(found)
        self.ignored = dict(ignored or {})

    @property
    def flagged(self) -> list[Verdict]:
        return [v for v in self if v.flagged]

    @property
    def unreadable(self) -> list[Verdict]:
        return [v for v in self if v.error]

    def to_json(self) -> list[dict[str, Any]]:
        """One object per model."""
        return [v.to_json() for v in self]

    def __repr__(self) -> str:
        rows = [row(v) for v in self]
        widths = [max(len(r[k]) for r in [COLUMNS, *rows]) for k in range(len(COLUMNS))]
        lines = ["  ".join(c.ljust(w) for c, w in zip(r, widths, strict=True)).rstrip() for r in [COLUMNS, *rows]]
        return "\n".join([*lines, summary(self)])


COLUMNS = ("verdict", "model", "probability", "p-value", "target", "why")


def row(verdict: Verdict) -> tuple[str, ...]:
    """One line of a table, see ``COLUMNS``."""
    if verdict.error:
        return "not scanned", verdict.path, "", "", "", verdict.error
    probability = "outside" if verdict.probability is None else f"{verdict.probability:.3f}"
    p = "" if verdict.p_value is None else f"{verdict.p_value:.3g}"
    target = "" if verdict.target is None or not verdict.flagged else str(verdict.target)
    return "FLAGGED" if verdict.flagged else "not flagged", verdict.path, probability, p, target, verdict.reason


def summary(found: Sequence[Verdict]) -> str:
    """What was found in how many, in a sentence."""
    bad, failed = sum(v.flagged for v in found), sum(bool(v.error) for v in found)
    outside = sum(not v.applicable and not v.error for v in found)
    level = found[0].level if found else LEVEL
    said = f"{bad} of {len(found)} models flagged (of clean ones {level:.0%} are)"
    said += f", {outside} outside the detector's range, judged by p-value alone" if outside else ""
    return said + (f", {failed} could not be scanned" if failed else "")


def scan(
    x: Any, *, base: Any = None, siblings: Sequence[Any] = (), inputs: Tensor | None = None,
    labels: Tensor | None = None, null: Null | None = None, wiring: Wiring | None = None, level: float = LEVEL,
    detector: Detector | None = None, progress: bool = False,
) -> Any:  # fmt: skip
    """How likely a network has a backdoor, and which class it serves: a ``Verdict``, or ``Verdicts`` of a folder.

    ``x`` is a path (``file!member`` where it holds several models), a ``Checkpoint``, a mapping of tensors, or a folder
    of models. Nothing in a file is executed. Of a record in the file only the description of the network is read, to
    wire it: counters, names, formats, dtypes and what else the metadata say move nothing.

    - ``base``: the model it was fine-tuned from; ``siblings``: others that were. What differs is then tested too.
    - ``inputs`` (n, …): a few clean examples; tests then run the network on them. With their ``labels`` (n,) the
      verdict says how many it answers right: hardly any, where they are scaled otherwise than it was trained with.
    - ``null``: clean networks' evidence that p-values are counted in, as ``null.null_from`` makes of your own.
    - ``wiring``: of a network that no family of the catalogue knows, ``ws.wiring(module, example_inputs)``.
    - ``level``: share of clean networks that may be flagged.
    - ``detector``: another than the one shipped, see ``weightspace train backdoor``.

    Raises ``WeightspaceError`` for one model that cannot be scanned. In a folder it is reported in its verdict.
    """
    from weightspace.backdoor.shipped import shipped
    from weightspace.mergeability.candidates import is_population

    if not 0 < level < 1:
        raise WeightspaceError(f"level is {level}; a share of clean networks was expected, such as 0.05")
    known = detector or shipped()
    options: dict[str, Any] = {
        "base": base, "siblings": tuple(siblings), "inputs": inputs, "labels": labels, "null": null, "wiring": wiring,
        "level": level,
    }  # fmt: skip
    if isinstance(x, str | os.PathLike) and is_population(Path(x)):
        return _folder(Path(x), known, options, progress)
    from weightspace.backdoor.scanning import scan_one

    name = str(x) if isinstance(x, str | os.PathLike) else str(getattr(x, "path", None) or "tensors")
    return scan_one(opened(x), name, known, **options)


def _folder(folder: Path, known: Detector, options: Mapping[str, Any], progress: bool) -> Verdicts:
    from weightspace.progress import bar
    from weightspace.zoo.zoo import INDEX_FOLDER, _candidates

    files = list(_candidates(folder.resolve(), folder.resolve() / INDEX_FOLDER))
    found: list[Verdict] = []
    ignored: dict[str, str] = {}
    with bar(f"scanning {folder.name}", len(files), progress) as advance:
        for name, path in files:
            try:
                found += _models(path, str(folder / name), known, options)
            except UnknownFormatError as error:
                if path.suffix.lower() in _MODEL_SUFFIXES:
                    found.append(failed(str(folder / name), error, float(options["level"])))
                else:
                    ignored[str(folder / name)] = one_line(error)
            except WeightspaceError as error:
                found.append(failed(str(folder / name), error, float(options["level"])))
            advance(name)
    return Verdicts(found, ignored)


def _models(path: Path, name: str, known: Detector, options: Mapping[str, Any]) -> Iterator[Verdict]:
    """A verdict for each model in a file; raises where the file itself cannot be read."""
    from weightspace.backdoor.scanning import scan_one
    from weightspace.zoo.examine import models_in

    for model, label in models_in(path, name):
        try:
            yield scan_one(model, label, known, **options)
        except WeightspaceError as error:
            yield failed(label, error, float(options["level"]))
        except Exception as error:  # one odd file must not end the scan of a thousand; it is reported, not passed over
            yield failed(label, error, float(options["level"]), f"unexpected {type(error).__name__}: ")


def failed(path: str, error: BaseException, level: float, prefix: str = "") -> Verdict:
    """The verdict of a network that could not be scanned."""
    why = prefix + one_line(error)
    outside = Applicability(False, 0.0, why)
    return Verdict(path, None, None, False, (), False, "", outside, level=level, error=why)


def one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def opened(x: Any) -> Mapping[str, Tensor]:
    from weightspace import checkpoint

    if isinstance(x, str | os.PathLike):
        path, _, member = (str(x), "", "") if Path(x).exists() else str(x).partition("!")
        if not Path(path).exists():
            raise CheckpointError(f"there is no file {path}; a model's file or a folder of models was expected")
        opened: Mapping[str, Tensor] = checkpoint.open(path, member=member or None)
        return opened
    if isinstance(x, Mapping):
        return x
    state = getattr(x, "state_dict", None)
    if callable(state):
        raise WeightspaceError(
            "a module was given; pass its tensors with its wiring: "
            "ws.scan(module.state_dict(), wiring=ws.wiring(module, example_inputs))"
        )
    raise WeightspaceError(f"cannot scan a {type(x).__name__}; expected a path, a Checkpoint or a mapping of tensors")


def dumps(found: Verdict | Sequence[Verdict]) -> str:
    """JSON, one object per line and model; numbers that are not finite as null."""
    some = [found] if isinstance(found, Verdict) else found
    return "\n".join(json.dumps({k: _plain(v) for k, v in one.to_json().items()}) for one in some)


def _plain(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


__all__ = ["COLUMNS", "LEVEL", "Verdict", "Verdicts", "dumps", "failed", "one_line", "row", "scan", "summary"]
