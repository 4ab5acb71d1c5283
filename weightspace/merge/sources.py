"""The models of a merge: opened, and compared before anything is read. What does not fit is refused by name."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch

from weightspace.checkpoint import Checkpoint
from weightspace.checkpoint import open as open_checkpoint
from weightspace.errors import MergeError
from weightspace.merge.report import Outcome, Row

Shape = tuple[int, ...]
FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_SHOWN = 8
_HEADS = 3  # tensors of other shapes that a head or a vocabulary may have; more are another width
_VOCABULARY = 1000  # an axis this long that differs alone is more likely a vocabulary than a width


class Model:
    """One model: a lazy mapping of its tensors, and what to call it."""

    def __init__(self, source: Any, label: str | None = None, otherwise: str = "a model") -> None:
        if isinstance(source, (str, os.PathLike)):
            self.tensors: Mapping[str, torch.Tensor] = open_checkpoint(source)
            self.label = label or os.fspath(source)
        elif isinstance(source, Mapping):
            self.tensors = source
            path = source.path if isinstance(source, Checkpoint) else None
            self.label = label or (str(path) if path else otherwise)
        elif isinstance(source, torch.nn.Module):
            self.tensors, self.label = source.state_dict(), label or otherwise
        else:
            raise MergeError(
                f"a model is a path, a Checkpoint, a mapping of tensors or a module; found {type(source).__name__}"
            )
        if not self.tensors:
            raise MergeError(f"{self.label} holds no tensors")
        if isinstance(self.tensors, Checkpoint):
            self.shapes, self.dtypes = self.tensors.shapes, self.tensors.dtypes
        else:
            for name, tensor in self.tensors.items():
                if not isinstance(tensor, torch.Tensor):
                    raise MergeError(f"{self.label}: {name!r} is a {type(tensor).__name__}, a tensor was expected")
            self.shapes = {name: tuple(t.shape) for name, t in self.tensors.items()}
            self.dtypes = {name: t.dtype for name, t in self.tensors.items()}

    def reads_parts(self, name: str) -> bool:
        """Whether parts of a tensor can be had without loading all of it."""
        return not isinstance(self.tensors, Checkpoint) or self.tensors.reads_parts(name)

    def part(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Elements of a flattened tensor, on the CPU. Not to be written to."""
        if isinstance(self.tensors, Checkpoint):
            return self.tensors.part(name, start, stop)
        return self.tensors[name].detach().reshape(-1)[start:stop].to("cpu")

    def whole(self, name: str) -> torch.Tensor:
        """A tensor in its shape, on the CPU. Not to be written to."""
        return self.tensors[name].detach().to("cpu")

    @property
    def config(self) -> dict[str, Any]:
        """The configuration beside the weights, if any."""
        return (self.tensors.config if isinstance(self.tensors, Checkpoint) else None) or {}

    @property
    def folder(self) -> Path | None:
        """The folder of a Hugging Face model."""
        here = self.tensors
        if isinstance(here, Checkpoint) and here.format == "hf-folder" and here.path is not None:
            return here.path
        return None

    @property
    def files(self) -> set[Path]:
        """The files it may be read from, resolved."""
        path = self.tensors.path if isinstance(self.tensors, Checkpoint) else None
        if path is None:
            return set()
        inside = {p.resolve() for p in path.iterdir() if p.is_file()} if path.is_dir() else set()
        shards = self.tensors.metadata.get("shards") if isinstance(self.tensors, Checkpoint) else None
        beside = {(path.parent / name).resolve() for name in shards} if isinstance(shards, list) else set()
        return {path.resolve(), *inside, *beside}


@dataclass(frozen=True)
class Action:
    """What is to be done for one tensor of the result.

    ``source``: the model it is copied from (None: merged). ``same_as``: the tensor that it is tied to, whose result it
    gets. ``shape`` and ``dtype``: the result's.
    """

    name: str
    shape: Shape
    dtype: torch.dtype
    reason: str = ""
    source: Model | None = None
    same_as: str | None = None

    @property
    def numel(self) -> int:
        total = 1
        for n in self.shape:
            total *= n
        return total

    def row(self, note: str = "") -> Row:
        outcome: Outcome = "merged" if self.source is None else "copied"
        reason = "; ".join(text for text in (self.reason, note) if text)
        return Row(self.name, outcome, reason, self.shape, _short(self.dtype))


@dataclass
class Plan:
    """Actions in the order of the result, and rows of what has no place in it."""

    actions: list[Action]
    left_out: list[Row] = field(default_factory=list)

    @property
    def merged(self) -> list[Action]:
        return [a for a in self.actions if a.source is None]


def plan(
    models: Sequence[Model],
    base: Model | None,
    *,
    exclude: Sequence[str] = (),
    dtype: torch.dtype | None = None,
    any_shape: bool = False,
    needs_base: bool = False,
) -> Plan:
    """What to do for each tensor. Raises `MergeError` that names all that cannot be merged, with the remedy."""
    first = base or models[0]
    everyone = [*([base] if base else []), *models]
    involved = everyone if needs_base or base is None else [*models]
    actions: list[Action] = []
    refused: list[str] = []
    left_out: list[Row] = []
    names = list(dict.fromkeys(name for model in (first, *everyone) for name in model.shapes))
    unused = [g for g in exclude if not any(fnmatchcase(name, g) for name in names)]
    if unused:
        raise MergeError(
            f"exclude={unused[0]!r} is the name of no tensor; they are called {', '.join(names[:4])}, …; "
            "* stands for anything"
        )
    everywhere = [name for name in names if all(name in m.shapes for m in (first, *involved))]
    wide = sum(len({m.shapes[name] for m in (first, *involved)}) > 1 for name in everywhere) > _HEADS
    for name in names:
        has = [m for m in involved if name in m.shapes]
        if name not in first.shapes or len(has) < len(involved):
            lacking = [m.label for m in [first, *involved] if name not in m.shapes]
            if any(fnmatchcase(name, g) for g in exclude):
                if name in first.shapes:
                    actions.append(_copy(name, first, dtype, "excluded"))
                else:
                    owner = next(m for m in everyone if name in m.shapes)
                    text = f"excluded, and not in {first.label}"
                    left_out.append(Row(name, "left out", text, owner.shapes[name], _short(owner.dtypes[name])))
            else:
                refused.append(_missing(name, lacking, first, has))
            continue
        kinds = [m.dtypes[name] for m in involved]
        if any(fnmatchcase(name, g) for g in exclude):
            actions.append(_copy(name, first, dtype, "excluded"))
        elif not all(kind.is_floating_point for kind in (*kinds, first.dtypes[name])):
            reason = _whole_numbers(name, first, involved)
            if reason.startswith("!"):
                refused.append(reason[1:])
            else:
                actions.append(_copy(name, first, None, reason))
        elif any(kind not in FLOATS for kind in (*kinds, first.dtypes[name])):
            odd = next(k for k in (*kinds, first.dtypes[name]) if k not in FLOATS)
            refused.append(
                f"{name}: {_short(odd)} cannot be averaged, its scales lie elsewhere; "
                f"convert the models to bfloat16 first, or copy it with exclude=[{name!r}]"
            )
        elif not any_shape and len({m.shapes[name] for m in [first, *involved]}) > 1:
            refused.append(_shapes(name, [first, *involved], wide))
        else:
            varied = list(dict.fromkeys(_short(k) for k in kinds))
            reason = "" if len(varied) == 1 else f"types differ: {', '.join(varied)}"
            actions.append(Action(name, first.shapes[name], dtype or first.dtypes[name], reason))
    if refused:
        more = f"\n  … and {len(refused) - _SHOWN:,} more" if len(refused) > _SHOWN else ""
        strangers = "These seem to be different networks. " if len(refused) > max(2, len(names) // 2) else ""
        error = MergeError(
            f"{strangers}{len(refused):,} of {len(names):,} tensors cannot be merged; nothing was written.\n  "
            + "\n  ".join(refused[:_SHOWN]) + more
        )  # fmt: skip
        error.add_note(f"models: {', '.join(m.label for m in everyone)}")
        raise error
    if not any(a.source is None for a in actions):
        raise MergeError("no tensor is left to merge: all are excluded, or none is floating point")
    return Plan(actions, left_out)


def tie(merging: Plan, everyone: Sequence[Model]) -> Plan:
    """Tensors that are one and the same in every model (tied weights) are merged once, and written under each name."""
    groups: dict[tuple[Shape, bytes], list[Action]] = {}
    for action in merging.merged:
        if action.numel >= 64:
            head = everyone[0].part(action.name, 0, 64).contiguous()
            groups.setdefault((action.shape, head.view(torch.uint8).numpy().tobytes()), []).append(action)
    same: dict[str, str] = {}
    for group in groups.values():
        for other in group[1:]:
            if all(_equal(model, group[0].name, other.name) for model in everyone):
                same[other.name] = group[0].name
    if not same:
        return merging
    actions = [
        Action(a.name, a.shape, a.dtype, f"tied: the same weights as {same[a.name]}", None, same[a.name])
        if a.name in same
        else a
        for a in merging.actions
    ]
    return Plan(actions, merging.left_out)


def _equal(model: Model, left: str, right: str) -> bool:
    if left not in model.shapes or right not in model.shapes or model.shapes[left] != model.shapes[right]:
        return False
    total, step = torch.Size(model.shapes[left]).numel(), 1 << 20
    if not (model.reads_parts(left) and model.reads_parts(right)):
        return bool(torch.equal(model.whole(left), model.whole(right)))
    return all(
        bool(torch.equal(model.part(left, at, min(at + step, total)), model.part(right, at, min(at + step, total))))
        for at in range(0, total, step)
    )


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _copy(name: str, source: Model, dtype: torch.dtype | None, reason: str) -> Action:
    kind = source.dtypes[name]
    return Action(name, source.shapes[name], dtype if dtype and kind in FLOATS else kind, reason, source)


def _whole_numbers(name: str, first: Model, involved: Sequence[Model]) -> str:
    """Why a tensor of whole numbers is copied; with a ``!`` in front, why it cannot be."""
    kind = _short(first.dtypes[name])
    if any(m.shapes[name] != first.shapes[name] for m in involved):
        return "!" + _shapes(name, [first, *involved])
    mine = first.whole(name)
    if all(torch.equal(m.whole(name), mine) for m in involved):
        return f"{kind}, the same in all models"
    if mine.numel() == 1:
        return f"{kind} counter, from {first.label}; it differs among the models"
    return (
        f"!{name}: {kind} of shape {first.shapes[name]} differs among the models; whole numbers (indices, quantised "
        f"weights) cannot be averaged. Merge the models before quantising, or copy it with exclude=[{name!r}]"
    )


def _missing(name: str, lacking: Sequence[str], first: Model, has: Sequence[Model]) -> str:
    where = ", ".join(dict.fromkeys(lacking))
    text = f"{name}: missing in {where}"
    if has and any(m.config.get("tie_word_embeddings") for m in (first, *has)):
        text += " (the configuration ties the word embeddings: one file may leave out what another writes twice)"
    take = f"copy it from {first.label}" if name in first.shapes else "leave it out"
    return f"{text}. A head or an adapter that only some models have? {take} with exclude=[{name!r}]"


def _shapes(name: str, models: Sequence[Model], wide: bool = False) -> str:
    """What to do about other shapes; ``wide``: so many tensors differ that it is no head or vocabulary alone."""
    by: dict[Shape, list[str]] = {}
    for model in models:
        by.setdefault(model.shapes[name], []).append(model.label)
    listed = "; ".join(f"{list(shape)} in {', '.join(dict.fromkeys(labels))}" for shape, labels in by.items())
    shapes = list(by)
    same_tail = len({shape[1:] for shape in shapes}) == 1
    lengths = {shape[0] for shape in shapes if shape}
    vocabularies = {v for m in models if (v := m.config.get("vocab_size"))}
    if same_tail and (lengths & vocabularies or min(lengths, default=0) >= _VOCABULARY):
        remedy = (
            "The vocabularies differ in size: bring the models to one tokeniser "
            f"(model.resize_token_embeddings), or keep the first model's with exclude=[{name!r}]"
        )
    elif same_tail and not wide and max(len(shape) for shape in shapes) <= 2:
        remedy = f"Heads for other tasks? Keep the first model's with exclude=[{name!r}]"
    else:
        remedy = (
            "The architectures differ (width, heads, kernel): carry the neurons of the one onto the other's by "
            f"method='ot-fusion' or align='optimal-transport', or keep the first model's with exclude=[{name!r}]"
        )
    return f"{name}: shapes differ, {listed}. {remedy}"
