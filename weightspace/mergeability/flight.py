"""A preflight under way: the models as they were opened, and what the checks share; findings, and their report."""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from weightspace.checkpoint import Checkpoint
from weightspace.errors import WeightspaceError
from weightspace.mergeability import health as vitals

if TYPE_CHECKING:
    from weightspace.wiring.wiring import Wiring

Severity = Literal["stop", "warning", "note"]
Model = str | os.PathLike[str] | Checkpoint | Mapping[str, torch.Tensor]

CHECKS = (
    "adapters", "quantised", "tensors", "wiring", "configuration", "tokeniser", "dtype", "values", "equal", "ancestry",
    "protection",
)  # fmt: skip
"""What ``preflight`` looks at, in this order."""


@dataclass(frozen=True)
class Finding:
    """One thing that was found. ``models`` are the names of those it speaks of, ``tensors`` where it lies."""

    severity: Severity
    check: str
    models: tuple[str, ...]
    found: str
    expected: str
    remedy: str
    tensors: tuple[str, ...] = ()

    def __repr__(self) -> str:
        return f"{self.severity}: {self.sentence}"

    @property
    def sentence(self) -> str:
        """All three in one line."""
        who = f"{', '.join(self.models)}: " if self.models else ""
        return f"{who}{self.found}; expected: {self.expected}; {self.remedy}"


@dataclass(frozen=True)
class Preflight:
    """What was found before a merge. ``ok`` unless something stops it.

    ``models`` and ``base`` are names; ``wiring`` is "proved", "unverified", "failed" or "none"; ``ancestry`` and
    ``protection`` hold what those two checks measured, model by model; ``skipped`` says which checks could not be made,
    and why. ``undone``: tensors of protected models without the protection, which compute the same.
    """

    models: tuple[str, ...]
    base: str | None
    wiring: str
    findings: tuple[Finding, ...]
    ancestry: tuple[Any, ...] = ()
    protection: tuple[Any, ...] = ()
    skipped: Mapping[str, str] = field(default_factory=dict)
    seconds: float = 0.0
    undone: Mapping[str, Mapping[str, torch.Tensor]] = field(default_factory=dict, repr=False)

    @property
    def ok(self) -> bool:
        """True when nothing was found that stops the merge."""
        return not self.of("stop")

    @property
    def clean(self) -> bool:
        """True when there is neither a stop nor a warning."""
        return not self.of("stop") and not self.of("warning")

    def of(self, severity: str | None = None, check: str | None = None) -> tuple[Finding, ...]:
        """The findings of one severity, of one check, or both."""
        return tuple(
            f
            for f in self.findings
            if (severity is None or f.severity == severity) and (check is None or f.check == check)
        )

    def to_json(self) -> dict[str, Any]:
        """Everything as values that ``json.dumps`` takes."""
        return {
            "models": list(self.models),
            "base": self.base,
            "ok": self.ok,
            "wiring": self.wiring,
            "findings": [asdict(f) for f in self.findings],
            "ancestry": [a.to_json() for a in self.ancestry],
            "protection": [p.to_json() for p in self.protection],
            "skipped": dict(self.skipped),
            "seconds": self.seconds,
        }

    def __repr__(self) -> str:
        counts = Counter(f.severity for f in self.findings)
        base = "no base" if self.base is None else f"base {self.base}"
        said = ", ".join(f"{counts[s]} {s}{'s' if counts[s] != 1 else ''}" for s in ("stop", "warning", "note"))
        verdict = "can be merged" if self.ok else "cannot be merged as they are"
        lines = [
            f"Preflight({len(self.models)} models, {base}: {verdict}; {said}; "
            f"wiring {self.wiring}, {self.seconds:.1f} s)"
        ]
        for severity in ("stop", "warning", "note"):
            lines += [f"  {severity:<8}{f.check}: {f.sentence}" for f in self.of(severity)]
        lines += [f"  not made {check}: {why}" for check, why in self.skipped.items()]
        return "\n".join(lines)


@dataclass
class Flight:
    """Models under examination, and what is known of them so far.

    ``unlike``: models whose tensors are others than the reference's; ``broken``: with values that are not finite;
    ``unusable``: that cannot be read as weights. None of these can be scored.
    """

    models: dict[str, Checkpoint]
    base: Checkpoint | None
    seed: int
    base_name: str | None = None
    given_wiring: Wiring | None = None
    wiring: Wiring | None = None
    wiring_sought: bool = False
    findings: list[Finding] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)
    ancestry: list[Any] = field(default_factory=list)
    protection: list[Any] = field(default_factory=list)
    related: dict[str, Any] = field(default_factory=dict)
    seen: vitals.Health | None = None
    # Of another architecture: nothing else need be said of their settings.
    foreign: set[str] = field(default_factory=set)
    unlike: set[str] = field(default_factory=set)
    broken: set[str] = field(default_factory=set)
    unusable: set[str] = field(default_factory=set)
    undone: dict[str, Mapping[str, torch.Tensor]] = field(default_factory=dict)
    step: Callable[[str], object] = field(default=lambda _: None, repr=False)
    started: float = field(default_factory=time.perf_counter)

    def report(self) -> Preflight:
        """What was found, the gravest first."""
        order = {"stop": 0, "warning": 1, "note": 2}
        return Preflight(
            tuple(self.models), self.base_name, "none" if self.wiring is None else self.wiring.status,
            tuple(sorted(self.findings, key=lambda f: order[f.severity])), tuple(self.ancestry), tuple(self.protection),
            self.skipped, time.perf_counter() - self.started, self.undone,
        )  # fmt: skip

    def say(
        self, severity: Severity, check: str, models: Sequence[str] | str, found: str, expected: str, remedy: str,
        tensors: Sequence[str] = (),
    ) -> None:  # fmt: skip
        who = (models,) if isinstance(models, str) else tuple(models)
        self.findings.append(Finding(severity, check, who, found, expected, remedy, tuple(tensors)))

    @property
    def reference(self) -> tuple[str, Checkpoint]:
        """What each model is held against: the base, or the first model that can be read as one."""
        if self.base is not None:
            return self.base_name or "base", self.base
        name = next((n for n in self.models if n not in self.unusable), next(iter(self.models)))
        return name, self.models[name]

    def others(self) -> dict[str, Checkpoint]:
        """The models but the reference."""
        reference = self.reference[1]
        return {n: c for n, c in self.models.items() if c is not reference}

    def find_wiring(self) -> Wiring | None:
        """The reference's wiring, sought once."""
        if not self.wiring_sought:
            self.wiring_sought = True
            self.wiring = self.given_wiring
            if self.wiring is None:
                from weightspace.wiring import wiring as find

                try:
                    self.wiring = find(self.reference[1])
                except WeightspaceError as error:
                    self.skipped["wiring"] = one_line(error)
        return self.wiring


def named(models: Sequence[Model] | Mapping[str, Model]) -> dict[str, Model]:
    """Models by name: that of the file or folder, with as many of the folders above as tell them apart."""
    if isinstance(models, str | os.PathLike | Checkpoint):
        models = [models]
    if isinstance(models, Mapping):
        if models and all(isinstance(v, torch.Tensor) for v in models.values()):
            raise WeightspaceError(
                "the models are a mapping of tensors, which is one model; expected a list of models, or a mapping of "
                "names to models"
            )
        return {str(n): m for n, m in models.items()}
    listed = list(models)
    names = [name_of(model, f"model {i}") for i, model in enumerate(listed)]
    for parts in (2, 3, 4):
        often = Counter(names)
        names = [name_of(m, n, parts) if often[n] > 1 else n for n, m in zip(names, listed, strict=True)]
    found: dict[str, Model] = {}
    for name, model in zip(names, listed, strict=True):
        unique, k = name, 2
        while unique in found:
            unique, k = f"{name} ({k})", k + 1
        found[unique] = model
    return found


def name_of(model: Model, otherwise: str, parts: int = 1) -> str:
    path = model.path if isinstance(model, Checkpoint) else model if isinstance(model, str | os.PathLike) else None
    if path is None:
        return otherwise
    return "/".join(Path(path).absolute().parts[-parts:])


def opened(model: Model) -> Checkpoint:
    """A model as a checkpoint: a file or folder (also ``file!member``), a checkpoint, or a mapping of tensors."""
    from weightspace.checkpoint import from_tensors
    from weightspace.checkpoint import open as open_checkpoint

    if isinstance(model, Checkpoint):
        return model
    if not isinstance(model, str | os.PathLike):
        if not isinstance(model, Mapping) or not all(isinstance(v, torch.Tensor) for v in model.values()):
            raise WeightspaceError(
                f"found {type(model).__name__} as a model, expected a path, a checkpoint or a mapping of tensors"
            )
        return from_tensors(model)
    text = os.fspath(model)
    if "!" in text and not Path(text).exists():
        path, _, member = text.partition("!")
        return open_checkpoint(path, member=member)
    return open_checkpoint(model)


def one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def listed(names: Sequence[str], most: int = 4) -> str:
    shown = ", ".join(map(str, names[:most]))
    return shown if len(names) <= most else f"{shown} and {len(names) - most} more"


def everything(f: Flight) -> dict[str, Checkpoint]:
    return {**({f.base_name or "base": f.base} if f.base is not None else {}), **f.models}

__all__ = [
    "CHECKS", "Finding", "Flight", "Model", "Preflight", "Severity", "everything", "listed", "name_of", "named",
    "one_line", "opened",
]  # fmt: skip
