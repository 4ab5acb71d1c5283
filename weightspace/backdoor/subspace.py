"""Where a backdoor sits: which elements of which axes carry it, which layers, and along which directions.

``locate`` (``weightspace.backdoor.localise``) finds a ``Subspace``; ``weightspace.backdoor.show`` draws it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from weightspace.errors import WeightspaceError
from weightspace.paths import write_whole
from weightspace.tagged import KEY, facts_of

if TYPE_CHECKING:
    from weightspace.wiring.wiring import Wiring

_FORMAT = "weightspace-subspace"
_VERSION = 1
_LISTED = 200
"""Elements that ``to_json`` names; files hold all."""


@dataclass(frozen=True)
class Element:
    """One element of an axis: position ``index`` (within what the factor is fibred over, then its own) and score."""

    factor: str
    index: tuple[int, ...]
    score: float

    def __str__(self) -> str:
        return f"{self.factor}[{', '.join(map(str, self.index))}]"


@dataclass(frozen=True, eq=False)
class Basis:
    """The part of one block of weights that reads the backdoor, ``U diag(S) Vᵀ``: low rank.

    The block is a tensor laid out as a matrix (outputs, inputs): ``inputs`` are the dims that its operation sums over,
    flattened in this order. ``low`` to ``high`` along dim ``split`` is the part of the tensor that is meant (a grouped
    convolution and packed projections have several; else the whole). ``U (outputs, r)`` and ``V (inputs, r)`` have
    orthonormal columns, ``S (r,)`` is in the units of the weights, descending. ``strength``: share of the change of the
    block's inputs under the trigger that ``V`` spans, in [0, 1].
    """

    tensor: str
    inputs: tuple[int, ...]
    split: int
    low: int
    high: int
    U: Tensor = field(repr=False)
    S: Tensor = field(repr=False)
    V: Tensor = field(repr=False)
    strength: float = 1.0

    def __iter__(self) -> Iterator[Tensor]:
        """``U, S, V``."""
        return iter((self.U, self.S, self.V))

    @property
    def rank(self) -> int:
        return len(self.S)

    def matrix(self, tensor: Tensor) -> Tensor:
        """This part of the tensor as (outputs, inputs)."""
        part = tensor.narrow(self.split, self.low, self.high - self.low)
        rest = [d for d in range(part.dim()) if d not in self.inputs]
        return part.permute(*rest, *self.inputs).reshape(-1, self.V.shape[0])

    def put(self, tensor: Tensor, matrix: Tensor) -> Tensor:
        """The tensor with this part replaced by ``matrix (outputs, inputs)``; a new one."""
        out = tensor.clone()
        part = out.narrow(self.split, self.low, self.high - self.low)
        rest = [d for d in range(part.dim()) if d not in self.inputs]
        order = [*rest, *self.inputs]
        spread = matrix.to(tensor).reshape([part.shape[d] for d in order])
        part.copy_(spread.permute([order.index(d) for d in range(part.dim())]))
        return out

    def carried(self) -> Tensor:
        """``U diag(S) Vᵀ``, (outputs, inputs)."""
        return (self.U * self.S) @ self.V.T

    def without(self, tensor: Tensor, share: float = 1.0) -> Tensor:
        """The tensor with ``share`` of what is carried taken off."""
        return self.put(tensor, self.matrix(tensor) - share * self.carried().to(tensor))

    def __repr__(self) -> str:
        return f"Basis({self.tensor}, rank {self.rank}, {len(self.U)} × {len(self.V)}, strength {self.strength:.2f})"


@dataclass(frozen=True, eq=False)
class Subspace:
    """The elements, layers and directions that a backdoor uses.

    - ``targets``: classes that it serves, likeliest first; ``target`` is the first, None where none was found.
    - ``elements``: factor -> scores (*over, size) in [0, 1], higher is more; comparable within a factor.
    - ``ranked``: elements of all factors, highest score first.
    - ``layers``: (factor, score) of the axes, highest first.
    - ``blocks``: label of a block of weights -> its ``Basis``.
    - ``size``: how many elements, from the top of ``ranked``, the method takes for the backdoor's own.
    - ``method``: ``"cut"`` (a subnet apart from the rest), ``"response"`` (what a found trigger excites) or both.
    - ``diagnostics``: plain values about how it was found.
    """

    targets: tuple[int, ...]
    elements: Mapping[str, Tensor] = field(repr=False)
    ranked: tuple[Element, ...] = field(repr=False)
    layers: tuple[tuple[str, float], ...] = field(repr=False)
    blocks: Mapping[str, Basis] = field(repr=False)
    size: int
    method: str
    diagnostics: Mapping[str, Any] = field(repr=False)

    @property
    def target(self) -> int | None:
        return self.targets[0] if self.targets else None

    def top(self, count: int | None = None) -> dict[str, Tensor]:
        """The first ``count`` of ``ranked`` (``size`` where not given) as factor -> bool (*over, size)."""
        found = {name: torch.zeros(score.shape, dtype=torch.bool) for name, score in self.elements.items()}
        for element in self.ranked[: self.size if count is None else count]:
            found[element.factor][element.index] = True
        return found

    def show(self, wiring: Wiring, tensors: Mapping[str, Tensor], *, top: int = 12) -> Any:
        """The subspace on the parameter graph, a plotly figure; see ``weightspace.backdoor.show``."""
        from weightspace.backdoor.show import figure

        return figure(self, wiring, tensors, top=top)

    def spectra(self, tensors: Mapping[str, Tensor]) -> Any:
        """Singular values of the blocks and of what they carry, a plotly figure."""
        from weightspace.backdoor.show import spectra

        return spectra(self, tensors)

    def to_json(self, indent: int | None = None) -> str:
        """Everything but the directions themselves, as JSON text; of the elements the first 200."""
        return json.dumps(self.to_dict(), indent=indent)

    def to_dict(self) -> dict[str, Any]:
        """The same as plain lists and dicts."""
        return {
            "target": self.target, "targets": list(self.targets), "method": self.method, "size": self.size,
            "elements": [
                {"factor": e.factor, "index": list(e.index), "score": round(e.score, 6)} for e in self.ranked[:_LISTED]
            ],
            "layers": [{"factor": name, "score": round(score, 6)} for name, score in self.layers],
            "blocks": [
                {
                    "block": label, "tensor": b.tensor, "rank": b.rank, "strength": round(b.strength, 4),
                    "singular_values": [round(v, 6) for v in b.S.tolist()],
                }
                for label, b in self.blocks.items()
            ],
            "diagnostics": dict(self.diagnostics),
        }  # fmt: skip

    def save(self, path: str | PathLike[str]) -> Path:
        """Write everything as safetensors, whole or not at all."""
        from safetensors.torch import save

        tensors = {f"element.{name}": score.contiguous() for name, score in self.elements.items()}
        blocks = []
        for label, b in self.blocks.items():
            tensors |= {f"{part}.{label}": x.contiguous() for part, x in zip("USV", b, strict=True)}
            blocks.append([label, b.tensor, list(b.inputs), b.split, b.low, b.high, b.strength])
        facts = {
            "format": _FORMAT, "version": _VERSION, "targets": list(self.targets), "size": self.size,
            "method": self.method, "layers": [list(row) for row in self.layers], "blocks": blocks,
            "factors": list(self.elements), "diagnostics": dict(self.diagnostics),
        }  # fmt: skip
        return write_whole(path, save(tensors, metadata={KEY: json.dumps(facts)}))

    @classmethod
    def load(cls, path: str | PathLike[str]) -> Subspace:
        """What ``save`` wrote. Raises ``WeightspaceError`` for files that are missing, damaged or something else."""
        from safetensors import SafetensorError
        from safetensors.torch import load

        try:
            data = Path(path).read_bytes()
            found, facts = load(data), facts_of(data, _FORMAT, _VERSION)
            elements = {name: found[f"element.{name}"] for name in facts["factors"]}
            blocks = {
                label: Basis(
                    tensor, tuple(inputs), split, low, high, found[f"U.{label}"], found[f"S.{label}"],
                    found[f"V.{label}"], strength,
                )
                for label, tensor, inputs, split, low, high, strength in facts["blocks"]
            }  # fmt: skip
            return cls(
                tuple(facts["targets"]), elements, rank(elements), tuple((n, s) for n, s in facts["layers"]), blocks,
                int(facts["size"]), str(facts["method"]), facts["diagnostics"],
            )  # fmt: skip
        except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
            reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
            raise WeightspaceError(
                f"{path} is no subspace that can be read ({reason}); expected a file written by Subspace.save"
            ) from error

    def __repr__(self) -> str:
        served = "no class" if self.target is None else f"class {', '.join(map(str, self.targets[:3]))}"
        total = sum(x.numel() for x in self.elements.values())
        lines = [
            f"Subspace({self.method}: {self.size} of {total:,} elements in {len(self.elements)} factors, "
            f"{len(self.blocks)} blocks, serves {served})"
        ]
        shown = ", ".join(f"{e} {e.score:.2f}" for e in self.ranked[:8])
        lines.append(f"  elements: {shown}" + (" …" if len(self.ranked) > 8 else ""))
        lines.append("  layers: " + ", ".join(f"{name} {score:.2f}" for name, score in self.layers[:6]))
        strongest = sorted(self.blocks.items(), key=lambda item: -float(item[1].S.sum()))[:6]
        lines.append("  blocks: " + ", ".join(f"{label} rank {b.rank}" for label, b in strongest))
        return "\n".join(lines)


def rank(elements: Mapping[str, Tensor]) -> tuple[Element, ...]:
    """Elements of all factors, highest score first; of equal ones wholes (heads) before what is in them."""
    found = []
    for name, score in elements.items():
        places = torch.cartesian_prod(*(torch.arange(n) for n in score.shape)).reshape(score.numel(), -1)
        found += [
            Element(name, tuple(place), value)
            for place, value in zip(places.tolist(), score.reshape(-1).double().tolist(), strict=True)
        ]
    return tuple(sorted(found, key=lambda e: (-e.score, len(e.index))))


__all__ = ["Basis", "Element", "Subspace", "rank"]
