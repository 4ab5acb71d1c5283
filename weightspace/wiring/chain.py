"""The last resort: a chain of layers inferred from the order and the shapes of tensors alone.

Nothing is run, so the result is ``unverified`` wherever it is shown. The guess is made only where it is
forced: every weight must read what the one before it wrote, by size, and no two hidden axes may have the
same size in a way that would allow a skip connection to tie them unseen.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING

from weightspace.wiring.axis import Factor, Segment
from weightspace.wiring.wiring import DimGroup, Layout, Wiring

if TYPE_CHECKING:
    from weightspace.checkpoint import Checkpoint


def wiring_from_order(checkpoint: Checkpoint) -> Wiring | None:
    """A chain of ``(out, in, *kernel)`` or ``(in, out)`` in file order; None where sizes do not fit."""
    shapes = {n: tuple(checkpoint.shape(n)) for n in checkpoint if checkpoint.dtype(n).is_floating_point}
    weights = [n for n, s in shapes.items() if len(s) >= 2]
    if not weights:
        return None
    for transposed in (False, True):
        sides = [_sides(shapes[n], transposed) for n in weights]
        if all(a[0] == b[1] for a, b in pairwise(sides)):
            return _chain(shapes, weights, sides, transposed)
    return None


def _sides(shape: Sequence[int], transposed: bool) -> tuple[int, int]:
    """(written, read)."""
    if len(shape) == 2:
        return (shape[1], shape[0]) if transposed else (shape[0], shape[1])
    return (shape[-1], shape[-2]) if transposed else (shape[0], shape[1])


def _chain(
    shapes: dict[str, tuple[int, ...]], weights: list[str], sides: list[tuple[int, int]], transposed: bool
) -> Wiring | None:
    factors: dict[str, Factor] = {}
    layouts: dict[str, Layout] = {}

    def whole(d: int, name: str, size: int, pinned: bool, reason: str = "") -> DimGroup:
        factors.setdefault(name, Factor(name, size, pinned, (), reason))
        return DimGroup((d,), ((Segment(0, (name,), (1,), (size,)),),))

    writes: dict[str, str] = {}
    current = "input"
    last = weights[-1]
    for name, (out, read) in zip(weights, sides, strict=True):
        shape = shapes[name]
        written = "output" if name == last else name.rsplit(".", 1)[0]
        writes[name] = written
        place = (len(shape) - 1, len(shape) - 2) if transposed else (0, 1)
        groups = []
        for d, n in enumerate(shape):
            if d == place[0]:
                groups.append(whole(d, written, out, name == last, "output"))
            elif d == place[1]:
                groups.append(whole(d, current, read, current == "input", "input"))
            else:
                groups.append(whole(d, f"{written}.k{d}", n, True, "kernel positions"))
        layouts[name] = tuple(groups)
        current = written
    owner = weights[0]
    for name, shape in shapes.items():
        if name in layouts:
            owner = name
            continue
        size = factors[writes[owner]].size
        if len(shape) == 1 and shape[0] == size:
            f = factors[writes[owner]]
            layouts[name] = (whole(0, f.name, f.size, f.pinned, f.reason),)
        elif len(shape) == 0 or shape == (1,):
            layouts[name] = tuple(DimGroup((d,), ((Segment(0, (), (), ()),),)) for d in range(len(shape)))
        else:
            return None
    notes = ["a chain guessed from the order and shapes of tensors; nothing was run"]
    hidden = [out for out, _ in sides]
    if len(set(hidden)) < len(hidden):
        notes.append("layers of equal width could be tied by skip connections that names do not show")
    ordered = {n: layouts[n] for n in shapes}
    return Wiring(ordered, shapes, factors, origin="chain", status="unverified", notes=tuple(notes))
