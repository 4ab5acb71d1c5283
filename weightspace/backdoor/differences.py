"""What a network changed of its base, or what sets it apart from its siblings: classes and channels that stand out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from weightspace.backdoor.outputs import ClassAxis, parts_of
from weightspace.backdoor.spectra import LARGEST, by_factor
from weightspace.errors import WeightspaceError
from weightspace.wiring.wiring import Wiring

CHANGE_TESTS = ("change_sum", "change_norm", "change_bias", "change_leading")


def change_of(
    wiring: Wiring, tensors: Mapping[str, Tensor], base: Mapping[str, Tensor] | None,
    siblings: Sequence[Mapping[str, Tensor]],
) -> dict[str, Tensor] | None:  # fmt: skip
    """The tensors less those of the base, or without one less the mean of the siblings; None where neither is given.

    Raises ``WeightspaceError`` where one of them has other names or shapes: networks are compared entry by entry, so
    they have to be aligned.
    """
    others = [base] if base is not None else list(siblings)
    if not others:
        return None
    found = {}
    for name in wiring:
        value = tensors[name]
        if not value.is_floating_point():
            continue
        given = []
        for other in others:
            if name not in other or tuple(other[name].shape) != tuple(value.shape):
                has = tuple(other[name].shape) if name in other else "nothing"
                raise WeightspaceError(
                    f"the base or a sibling has {has} for {name!r}, the network {tuple(value.shape)}; networks of the "
                    "same wiring, aligned with each other, were expected"
                )
            given.append(other[name].detach().to(torch.float64))
        found[name] = value.detach().to(torch.float64) - torch.stack(given).mean(0)
    return found


def change_tests(axis: ClassAxis, change: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """How the rows of the classes changed, ``(classes,)`` float64 each.

    ``change_sum``, ``change_norm`` of the row, ``change_bias``, and ``change_leading``: what of the row lies along the
    first right singular vector of all rows' change, with the sign that makes the largest entry positive.
    """
    rows = axis.rows(change)
    rows = rows - rows.mean(0)
    along = rows.new_zeros(len(rows))
    if bool(rows.any()):
        left, values, _ = torch.linalg.svd(rows, full_matrices=False)
        along = left[:, 0] * values[0]
        along = along * (1.0 if along[along.abs().argmax()] >= 0 else -1.0)
    return {
        "change_sum": rows.sum(1), "change_norm": rows.norm(dim=1), "change_bias": axis.bias(change),
        "change_leading": along,
    }  # fmt: skip


def change_of_channels(
    wiring: Wiring, tensors: Mapping[str, Tensor], change: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], dict[str, float]]:
    """How much more of its weights each channel changed than the others, per factor ``(*over, size)``.

    And of the blocks the largest share of the change that its first singular value has: a backdoor that is trained into
    a network changes it in few directions.
    """
    lain = parts_of(wiring)
    found: dict[str, list[Tensor]] = {}
    shares = [0.0]
    for block in lain.blocks:
        if wiring.roles.get(block.tensor) != "weight" or not block.numel:
            continue
        delta = block.matrix(change[block.tensor])
        own = block.matrix(tensors[block.tensor].detach().to(torch.float64))
        cell = lain.cells[block.dst]
        moved = torch.zeros(cell.size, dtype=torch.float64)
        for d, w, dst in zip(delta, own, block.index(), strict=True):
            # In units of the typical channel, so that one that had next to nothing does not count for that alone.
            moved[dst] = d.flatten(1).norm(dim=1) / (
                w.flatten(1).norm(dim=1) + w.flatten(1).norm(dim=1).median() + 1e-30
            )
            flat = d.flatten(1)
            if 3 <= min(flat.shape) <= LARGEST and bool(flat.any()):
                gram = flat @ flat.T if flat.shape[0] <= flat.shape[1] else flat.T @ flat
                values = torch.linalg.eigvalsh(gram).clamp_min(0)
                shares.append(float(values[-1] / values.sum()))
        if cell.movable:
            found.setdefault(cell.name, []).append(moved)
    return by_factor(found, lain.cells, wiring), {"change_share": max(shares)}


__all__ = ["CHANGE_TESTS", "change_of", "change_of_channels", "change_tests"]
