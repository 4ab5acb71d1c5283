"""The model card: what a checkpoint is, how it was recognised, how it is wired, and what is odd about it."""

from __future__ import annotations

import hashlib
import json
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from weightspace.errors import WeightspaceError
from weightspace.tagged import KEY

if TYPE_CHECKING:
    from weightspace.checkpoint import Checkpoint
    from weightspace.wiring.axis import Axis
    from weightspace.wiring.wiring import Wiring

RECORD_KEY = KEY
"""Metadata entry under which a model trained here keeps its record, as JSON."""


@dataclass(frozen=True)
class AxisRow:
    """One axis of a wiring: its name, its size, its kind, how many tensors carry it, and its make-up.

    ``detail`` says why a pinned axis may not move, and for a structured one which factors it is made of:
    ``4 × 8`` for four heads of eight channels, ``16 + 8`` for two concatenated segments.
    """

    name: str
    size: int
    kind: str
    tensors: int
    detail: str = ""


@dataclass(frozen=True)
class Card:
    """What ``weightspace inspect`` shows of one model; ``to_dict`` gives it as plain JSON values.

    ``wiring`` is "proved", "unverified" or "failed"; ``proof`` what was run; ``error`` its relative output error, and
    ``movable`` the share of parameters on at least one axis that may be permuted, each None where unknown.
    """

    name: str
    format: str
    parameters: int
    tensors: int
    bytes: int
    dtypes: tuple[str, ...]
    architecture: str
    recognised: str
    wiring: str
    proof: str
    error: float | None
    movable: float | None
    axes: tuple[AxisRow, ...]
    notes: tuple[str, ...]
    findings: tuple[str, ...]
    record: Mapping[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """The card as values that ``json.dumps`` takes."""
        return asdict(self)


def inspect(checkpoint: Checkpoint, name: str | None = None) -> Card:
    """Read a checkpoint through once and say what it is. See ``Card``.

    A network that cannot be wired still gets a card, with the reason among its notes.
    """
    return card_and_wiring(checkpoint, name)[0]


def card_and_wiring(checkpoint: Checkpoint, name: str | None = None) -> tuple[Card, Wiring | None]:
    """The card together with the wiring it speaks of, None where none was found."""
    from weightspace.wiring import wiring as find_wiring

    wiring: Wiring | None = None
    axes: tuple[AxisRow, ...] = ()
    reason: str | None = None
    try:
        wiring = find_wiring(checkpoint)
    except WeightspaceError as error:
        reason = str(error)
    shapes = {tensor: tuple(checkpoint.shape(tensor)) for tensor in checkpoint}
    dtypes = Counter(str(checkpoint.dtype(tensor)).removeprefix("torch.") for tensor in checkpoint)
    if wiring is None:
        status, error_found, movable = "failed", None, None
        notes: tuple[str, ...] = (reason or "no wiring was found",)
        recognised = "not recognised"
    else:
        status, movable = wiring.status, float(wiring.movable_share)
        error_found = _proof_error(wiring)
        axes = _axis_rows(wiring)
        notes = tuple(wiring.notes)
        if wiring.missing:
            named = ", ".join(f"{op} ×{n}" for op, n in wiring.missing.items())
            notes = (*notes, f"operations that pinned axes for want of a rule: {named}")
        recognised = wiring.origin
    path = checkpoint.path
    return (
        Card(
            name=name or (path.name if path is not None else "in memory"),
            format=checkpoint.format,
            parameters=int(checkpoint.num_parameters),
            tensors=len(shapes),
            bytes=int(checkpoint.nbytes),
            dtypes=tuple(f"{dtype} × {count}" for dtype, count in dtypes.most_common()),
            architecture=architecture(shapes, recognised, checkpoint.config, notes),
            recognised=recognised,
            wiring=status,
            proof=_proof_text(wiring),
            error=error_found,
            movable=movable,
            axes=axes,
            notes=notes,
            findings=(*checkpoint.findings, *oddities(checkpoint, wiring)),
            record=record_of(checkpoint.metadata),
        ),
        wiring,
    )


def architecture(
    shapes: Mapping[str, tuple[int, ...]],
    recognised: str,
    config: Mapping[str, Any] | None,
    notes: Sequence[str] = (),
) -> str:
    """A short name for the architecture: from the config, the catalogue, or the shapes of the blocks."""
    if config:
        declared = config.get("architectures") or config.get("model_type") or config.get("class_name")
        if isinstance(declared, (list, tuple)) and declared:
            declared = declared[0]
        if isinstance(declared, str) and declared not in ("Model", "Functional", "Sequential"):
            return declared
    for note in notes:
        if note.startswith("recognised as "):  # the catalogue's own words
            return note.removeprefix("recognised as ")
    if recognised.startswith(("catalogue:", "transformers:")):
        return recognised.split(":", 1)[1]
    kinds = Counter(
        {0: "scalar", 1: "vector", 2: "matrix"}.get(len(shape), f"{len(shape) - 2}-d kernel")
        for shape in shapes.values()
    )
    plural = {"matrix": "matrices"}
    parts = [f"{count} {kind if count == 1 else plural.get(kind, kind + 's')}" for kind, count in sorted(kinds.items())]
    return ", ".join(parts) or "empty"


def record_of(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """The training record of a model trained here, empty for any other."""
    text = metadata.get(RECORD_KEY)
    if isinstance(text, str):
        try:
            text = json.loads(text)
        except ValueError:
            return {}
    return dict(text) if isinstance(text, Mapping) else {}


def oddities(tensors: Mapping[str, Tensor], wiring: Wiring | None = None) -> list[str]:
    """What is odd about the values: non-finite entries, constant tensors, dead slices, duplicated tensors.

    Reads one tensor at a time. Axes are called by their wiring's name where there is one.
    """
    found: list[str] = []
    same: defaultdict[tuple[tuple[int, ...], str], list[str]] = defaultdict(list)
    for name in tensors:
        value = tensors[name].detach()
        if value.numel() <= 1 or not value.is_floating_point():
            continue
        finite = torch.isfinite(value)
        if not bool(finite.all()):
            nans = int(torch.isnan(value).sum())
            infinite = value.numel() - int(finite.sum()) - nans
            found.append(f"{name}: {nans} NaN and {infinite} infinite of {value.numel()} values")
            continue
        if bool((value == value.flatten()[0]).all()):
            if value.dim() >= 2:
                found.append(f"{name}: constant, every value is {float(value.flatten()[0]):g}")
            continue
        if value.dim() >= 2:
            found.extend(_dead_slices(name, value, wiring))
        data = value.contiguous().view(torch.uint8).numpy()
        same[(tuple(value.shape), hashlib.sha256(data.tobytes()).hexdigest())].append(name)
    found.extend(f"{' = '.join(names)}: the same values" for names in same.values() if len(names) > 1)
    return found


def _dead_slices(name: str, value: Tensor, wiring: Wiring | None) -> list[str]:
    """Axis elements (channels, neurons, tokens) whose weights in this tensor are all zero."""
    found = []
    nonzero = value != 0
    for dim in range(min(value.dim(), 2) if wiring is None else value.dim()):
        others = tuple(d for d in range(value.dim()) if d != dim)
        dead = int((~nonzero.any(dim=others)).sum()) if value.shape[dim] > 1 else 0
        if dead:
            axes = wiring.get(name) if wiring is not None else None
            axis = f"axis {axes[dim].name!r}" if axes is not None else f"dimension {dim}"
            found.append(f"{name}: {dead} of {value.shape[dim]} slices along {axis} are all zero")
    return found


def _axis_rows(wiring: Wiring) -> tuple[AxisRow, ...]:
    carriers: Counter[str] = Counter()
    for axes in wiring.values():
        carriers.update({axis.name for axis in axes})
    return tuple(
        AxisRow(axis.name, int(axis.size), str(axis.kind), carriers[axis.name], _make_up(axis, wiring))
        for axis in wiring.axes.values()
    )


def _make_up(axis: Axis, wiring: Wiring) -> str:
    if axis.kind == "free":
        return ""
    if axis.kind == "pinned":
        return ", ".join(dict.fromkeys(wiring.factors[f].reason for s in axis.segments for f in s))
    parts = []
    for segment in axis.segments:
        sizes = [f"{wiring.factors[f].size}{' (pinned)' if wiring.factors[f].pinned else ''}" for f in segment]
        parts.append(" × ".join(sizes) or "1")
    return " + ".join(parts) if len(parts) <= 6 else f"{' + '.join(parts[:5])} + … ({len(parts)} segments)"


def _proof_text(wiring: Wiring | None) -> str:
    if wiring is None or wiring.proof is None:
        return ""
    proof = wiring.proof
    text = (
        f"{proof.moved} factors permuted at random on {proof.on}, relative output change {proof.error32:.1e} in float32"
    )
    if proof.error64 is not None:
        text += f", {proof.error64:.1e} in float64"
    if proof.control is not None:
        text += f"; at least {proof.control:.1e} when one tensor alone is permuted"
    if proof.demoted:
        text += f"; {len(proof.demoted)} axes failed and were pinned: {', '.join(proof.demoted[:4])}"
    if proof.vacuous:
        text += f"; without influence on the output: {', '.join(proof.vacuous[:4])}"
    return text


def _proof_error(wiring: Wiring) -> float | None:
    return None if wiring.proof is None else float(wiring.proof.error32)
