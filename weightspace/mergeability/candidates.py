"""Which models of a folder can be candidates for one merge: those that fit the base and show that they share it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from weightspace.errors import UnknownFormatError, WeightspaceError

if TYPE_CHECKING:
    from weightspace.checkpoint import Checkpoint
    from weightspace.wiring.wiring import Wiring

_EXAMINED = 16
"""So many strangers are looked at for protection; it takes seconds for each."""


@dataclass(frozen=True)
class Candidates:
    """Models by name; the reason for each that was left out, and for each file that could not be read."""

    models: Mapping[str, Checkpoint]
    left: Mapping[str, str] = field(default_factory=dict)
    unreadable: Mapping[str, str] = field(default_factory=dict)


def is_population(path: Path) -> bool:
    """A folder of models, not a model that is a folder (a configuration beside weights)."""
    from weightspace.zoo.zoo import _is_model_folder

    return path.is_dir() and not _is_model_folder([p.name for p in path.iterdir()])


def candidates(
    folder: Path, base: Checkpoint | None, wiring: Wiring | None, step: Callable[[str], object] | None = None
) -> Candidates:
    """The models below a folder that have the base's names and shapes and descend from it, judged by their weights.

    Without a base the first readable model's names and shapes are those that count. Models that show no trace of the
    base are left out, unless they turn out to be protected copies of its descendants (looked for among at most 16).
    """
    from weightspace.zoo.zoo import INDEX_FOLDER, _candidates

    found: dict[str, Checkpoint] = {}
    left: dict[str, str] = {}
    unreadable: dict[str, str] = {}
    reference = base
    for name, path in _candidates(folder.resolve(), folder.resolve() / INDEX_FOLDER):
        if base is not None and base.path is not None and path.resolve() == Path(base.path).resolve():
            continue
        try:
            for label, model in _models(path, name):
                reference = reference or model
                why = _unlike(model, reference)
                if why:
                    left[label] = why
                else:
                    found[label] = model
        except UnknownFormatError:
            continue
        except WeightspaceError as error:
            unreadable[name] = " ".join(str(error).split())
    if base is not None and wiring is not None and wiring.status != "failed":
        _strangers(found, left, base, wiring, step or (lambda _: None))
    return Candidates(found, left, unreadable)


def _models(path: Path, name: str) -> list[tuple[str, Checkpoint]]:
    from weightspace.zoo.examine import models_in

    return [(label, model) for model, label in models_in(path, name)]


def _unlike(model: Checkpoint, reference: Checkpoint) -> str:
    """Why a model cannot be merged with the reference's kind, by the headers of the files alone."""
    if any(".lora_A" in name or ".lora_B" in name for name in model):
        return ""
    missing = [n for n in reference if n not in model and reference.dtype(n).is_floating_point]
    if missing:
        return f"another architecture: it has no {missing[0]}" + (f" and {len(missing) - 1} more" * (len(missing) > 1))
    other = [n for n in reference if n in model and model.shape(n) != reference.shape(n)]
    if other:
        return f"other shapes: {other[0]} is {list(model.shape(other[0]))}, not {list(reference.shape(other[0]))}"
    return ""


def _strangers(
    found: dict[str, Checkpoint], left: dict[str, str], base: Checkpoint, wiring: Wiring, step: Callable[[str], object]
) -> None:
    from weightspace.mergeability.ancestry import ancestry

    strange = []
    for name, model in found.items():
        step(f"ancestry of {name}")
        if any(".lora_A" in n for n in model) or not _finite(model):
            continue
        told = ancestry(base, model, wiring, align=False)
        if told.relation == "unrelated":
            strange.append(name)
    for k, name in enumerate(strange):
        if k < _EXAMINED and wiring.proved:
            step(f"protection of {name}")
            if ancestry(base, found[name], wiring).relation == "moved copy":
                continue
            why = "it shows no trace of the base, nor is it a protected copy of a relative"
        else:
            why = "it shows no trace of the base (not examined for protection: name it by itself)"
        left[name] = why
        del found[name]


def _finite(model: Checkpoint) -> bool:
    return all(bool(model[n].isfinite().all()) for n in model if model.dtype(n).is_floating_point)


__all__ = ["Candidates", "candidates", "is_population"]
