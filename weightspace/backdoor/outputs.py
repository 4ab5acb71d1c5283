"""The class axis of a network: which outputs are classes, and where the weights hold one row for each of them.

Found from the wiring and one run on its example inputs; no tensor's name and no architecture is looked at.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from weightspace.errors import UnprovedWiringError, WeightspaceError
from weightspace.graph.layout import Block, Cell, Structure, Vector, structure
from weightspace.wiring.wiring import Wiring

MOST_CLASSES = 5000
"""More outputs than this are taken for a vocabulary."""

RECONSTRUCTED = 16
"""Where as many numbers go in as come out, from this number on, the network is taken to reproduce its input."""


class NoClassesError(WeightspaceError):
    """The outputs of a network share no class axis, so nothing can be said about its classes."""


@dataclass(frozen=True)
class Rows:
    """One part of a tensor that holds a row for every class: ``part`` of the layout, ``role`` of its tensor."""

    part: Vector
    role: str
    transposed: bool

    @property
    def tensor(self) -> str:
        return self.part.tensor

    @property
    def source(self) -> str:
        """The cell that is read, for a weight."""
        if not isinstance(self.part, Block):
            return ""
        return self.part.dst if self.transposed else self.part.src

    def columns(self) -> Tensor:
        """Of every entry of a row the number of the node that it reads in ``source``, ``(entries,)``."""
        assert isinstance(self.part, Block)
        ends = self.part.index() if self.transposed else self.part.source_index()
        return ends[0].repeat_interleave(self.part.width)

    def of(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """The rows ``(classes, entries)`` in float64; the entries are ordered by feature, then kernel position."""
        value = tensors[self.part.tensor].detach().to(torch.float64)
        if not isinstance(self.part, Block):
            found = self.part.matrix(value)
            return found[torch.argsort(self.part.index())]
        blocks = self.part.matrix(value)
        ends = self.part.source_index() if self.transposed else self.part.index()
        lain = blocks.transpose(1, 2) if self.transposed else blocks
        rows = lain.reshape(-1, lain.shape[2] * lain.shape[3])
        return rows[torch.argsort(ends.reshape(-1))]


@dataclass(frozen=True)
class ClassAxis:
    """The outputs that are classes.

    ``factor`` of the wiring is the axis, ``classes`` its size. ``weights`` hold a row ``(features)`` for each class,
    ``shifts`` a number; ``output`` is the number of the leaf among the program's outputs, ``probabilities`` says that
    the network ends in a softmax, so that logits are logarithms of its outputs.
    """

    factor: str
    classes: int
    weights: tuple[Rows, ...]
    shifts: tuple[Rows, ...]
    output: int
    probabilities: bool

    def rows(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """What the classes read, ``(classes, features)`` float64: all weights side by side."""
        return torch.cat([r.of(tensors) for r in self.weights], 1)

    def bias(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """Constant part of each class, ``(classes,)`` float64; zero where there is none."""
        found = [r.of(tensors).sum(1) for r in self.shifts]
        return torch.stack(found).sum(0) if found else torch.zeros(self.classes, dtype=torch.float64)

    def logits(self, outputs: object) -> Tensor:
        """Logits ``(inputs, classes)`` of what the program returned (up to a constant for each input)."""
        found: Tensor = tree_leaves(outputs)[self.output]
        # Run in float64, or margins end where float32 does: at e**-87.
        return found.clamp_min(torch.finfo(found.dtype).tiny).log() if self.probabilities else found


def class_axis(wiring: Wiring, tensors: Mapping[str, Tensor]) -> ClassAxis:
    """The class axis of a network whose wiring is proved.

    It is a pinned axis of outputs ``(inputs, classes)`` that weights lead to. Raises ``UnprovedWiringError`` for a
    wiring that is not proved or cannot be run, and ``NoClassesError`` (what was found, what was expected) where no
    output has that shape, several have, or the outputs are the inputs' own axis (a vocabulary, a reconstruction). A
    regression with several outputs looks like a classifier from here.
    """
    if not wiring.proved or wiring.program is None:
        raise UnprovedWiringError(
            f"the wiring ({wiring.origin}) is {wiring.status}: where its classes are was found for proved ones that "
            "can be run only"
        )
    key = "backdoor class axis"
    known = wiring.shared.get(key)
    if not isinstance(known, ClassAxis):
        wiring.shared[key] = known = _find(wiring, tensors)
    return known


def check_finite(tensors: Mapping[str, Tensor]) -> None:
    """Raise ``WeightspaceError`` that names the first tensor with an entry that is infinite or not a number."""
    for name, value in tensors.items():
        if value.is_floating_point() and not bool(torch.isfinite(value).all()):
            bad = int((~torch.isfinite(value)).sum())
            raise WeightspaceError(
                f"{bad} of {value.numel()} entries of {name!r} are infinite or not numbers; a network with finite "
                "weights was expected (the file may be damaged, or the training diverged)"
            )


def parts_of(wiring: Wiring) -> Structure:
    """Cells, blocks and vectors of the parameter graph, made once for all files of a program."""
    key = "backdoor structure"
    known = wiring.shared.get(key)
    if not isinstance(known, Structure):
        wiring.shared[key] = known = structure(wiring, list(wiring))
    return known


def _find(wiring: Wiring, tensors: Mapping[str, Tensor]) -> ClassAxis:
    program = wiring.program
    assert program is not None
    with torch.no_grad():
        leaves = tree_leaves(program.run(dict(tensors), *program.args, **program.kwargs))
    given = [x for x in tree_leaves((program.args, dict(program.kwargs))) if isinstance(x, Tensor)]
    batch = given[0].shape[0] if given and given[0].dim() else 0
    found = []
    for number, leaf in enumerate(leaves):
        if isinstance(leaf, Tensor) and leaf.is_floating_point() and leaf.dim() == 2 and leaf.shape[0] == batch:
            cells = _cells(wiring, leaf.shape[1])
            found += [(number, leaf, cell) for cell in cells]
    shapes = [tuple(x.shape) for x in leaves if isinstance(x, Tensor)]
    if len(found) != 1:
        raise NoClassesError(
            f"{len(found)} outputs of {shapes} lie on an axis of classes; exactly one (inputs, classes) with at least "
            "two classes was expected: a classifier with one head"
        )
    number, leaf, cell = found[0]
    if cell.size > MOST_CLASSES:
        raise NoClassesError(f"{cell.size} outputs: taken for a vocabulary; {MOST_CLASSES} classes at most are read")
    lain = parts_of(wiring)
    if cell.size >= RECONSTRUCTED and any(x.numel() == batch * cell.size for x in given):
        raise NoClassesError(f"the {cell.size} outputs are as many as the inputs: a reconstruction, no classes")
    _no_vocabulary(wiring, lain, cell)
    weights, shifts = [], []
    for block in lain.blocks:
        role = wiring.roles.get(block.tensor, "other")
        if role == "weight" and cell.name in (block.dst, block.src):
            weights.append(Rows(block, role, transposed=block.dst != cell.name))
    for vector in lain.vectors:
        role = wiring.roles.get(vector.tensor, "other")
        if vector.dst == cell.name and role == "shift":
            shifts.append(Rows(vector, role, transposed=False))
    if not weights:
        raise NoClassesError(f"no weight leads to the {cell.size} outputs; a linear last layer was expected")
    with torch.no_grad():
        sums = leaf.double().sum(1)
        probabilities = bool((leaf >= 0).all()) and bool(((sums - 1).abs() < 1e-4).all())
    return ClassAxis(cell.factors[0], cell.size, tuple(weights), tuple(shifts), number, probabilities)


def _cells(wiring: Wiring, size: int) -> list[Cell]:
    """Cells of one factor and this size that the wiring knows as outputs."""
    return [
        c
        for c in parts_of(wiring).cells.values()
        if c.mark == "output" and c.size == size > 1 and len(c.factors) == 1
    ]


def _no_vocabulary(wiring: Wiring, lain: Structure, cell: Cell) -> None:
    """Refuse outputs that are the words that the network reads: predictions of the next one."""
    for block in lain.blocks:
        if wiring.roles.get(block.tensor) == "lookup":
            ends = lain.cells[block.dst], lain.cells[block.src]
            if any(e.name == cell.name or (e.mark == "input" and e.size == cell.size) for e in ends):
                raise NoClassesError(f"the {cell.size} outputs are the words that the network reads, no classes")


__all__ = ["MOST_CLASSES", "ClassAxis", "NoClassesError", "Rows", "check_finite", "class_axis", "parts_of"]
