"""The same values under other names: copies of a model in another format, or with tensors transposed or fused apart.

Of every floating tensor a fingerprint is taken that neither names nor the order of its axes change: number of
elements, root mean square, mean absolute value and fourth moment. Two models of different tensor names are copies when
nearly all of their weights lie in tensors whose fingerprints agree, to the precision of the narrower type; what agrees
is then held against each other by the sorted values.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from weightspace.lineage.sample import Array
from weightspace.lineage.steps import Kind

if TYPE_CHECKING:
    from weightspace.checkpoint import Checkpoint

_LEAST = 32
_SHARE = 0.9
_LOOSE = 4e-3
"""Relative difference of fingerprints; eight-bit types change a root mean square by less."""
_HELD = 4


def same_values(
    models: Mapping[str, Checkpoint], groups: Sequence[Sequence[str]]
) -> list[tuple[str, str, Kind, str]]:
    """Pairs (parent, child, kind, detail) over different groups; the narrower type is the child.

    Only models of about equal numbers of weights are read.
    """
    sizes: dict[str, int] = {}
    for group in groups:
        for name in group:
            model = models[name]
            sizes[name] = sum(
                int(np.prod(model.shape(n)))
                for n in model
                if model.dtype(n).is_floating_point and np.prod(model.shape(n)) >= _LEAST
            )
    number = {name: i for i, group in enumerate(groups) for name in group}
    ordered = sorted((s, n) for n, s in sizes.items() if s >= _LEAST)
    near = _neighbours(ordered, number)
    prints: dict[str, dict[int, list[tuple[str, Array]]]] = {}
    found: list[tuple[str, str, Kind, str]] = []
    taken: set[str] = set()
    for one, other in near:
        if one in taken and other in taken:
            continue
        for name in (one, other):
            if name not in prints:
                prints[name] = _prints(models[name])
        matched = _matched(prints[one], prints[other])
        share = sum(models[one][a].numel() for a, _ in matched) / max(sizes[one], sizes[other])
        if share < _SHARE:
            continue
        apart = max(_apart(models[one][a], models[other][b]) for a, b in matched)
        narrow = {n: _bits(models[n]) for n in (one, other)}
        if apart > 0.02:
            continue
        # Of equal types the one with more models of its kind stays where it is.
        crowd = {n: len(groups[number[n]]) for n in (one, other)}
        first = (narrow[one], crowd[one], other) >= (narrow[other], crowd[other], one)
        parent, child = (one, other) if first else (other, one)
        formats = f"{models[parent].format} and {models[child].format}"
        if apart <= 1e-6:
            kind: Kind = "copy" if narrow[one] == narrow[other] else "converted"
            detail = f"{share:.0%} of the weights have equal values in {formats}"
        else:
            kind, detail = "quantised", f"{share:.0%} of the weights are equal to {apart:.1e} in {formats}"
        found.append((parent, child, kind, detail))
        taken |= {parent, child}
    return found


def _neighbours(ordered: Sequence[tuple[int, str]], number: Mapping[str, int]) -> list[tuple[str, str]]:
    """Pairs of models of different groups whose numbers of weights differ by a tenth at most."""
    by_size: defaultdict[int, list[str]] = defaultdict(list)
    for size, name in ordered:
        by_size[size].append(name)
    values = sorted(by_size)
    pairs: list[tuple[str, str]] = []
    for k, size in enumerate(values):
        for other in values[k:]:
            if other > 1.1 * size:
                break
            for i, one in enumerate(by_size[size]):
                rest = by_size[size][i + 1 :] if other == size else by_size[other]
                pairs.extend((one, two) for two in rest if number[one] != number[two])
    return pairs


def _bits(model: Checkpoint) -> int:
    """Bits of the narrowest floating type of a model."""
    return min(int(torch.finfo(t).bits) for t in model.dtypes.values() if t.is_floating_point)


def _prints(model: Checkpoint) -> dict[int, list[tuple[str, Array]]]:
    found: dict[int, list[tuple[str, Array]]] = {}
    for name in model:
        if not model.dtype(name).is_floating_point or np.prod(model.shape(name)) < _LEAST:
            continue
        x = model[name].reshape(-1).to(torch.float64)
        square = float(x.square().mean())
        if square <= 0:
            continue
        found.setdefault(x.numel(), []).append(
            (name, np.array([square**0.5, float(x.abs().mean()), float(x.square().square().mean()) ** 0.25]))
        )
    return found


def _matched(
    one: Mapping[int, Sequence[tuple[str, Array]]], other: Mapping[int, Sequence[tuple[str, Array]]]
) -> list[tuple[str, str]]:
    pairs: list[tuple[str, str]] = []
    for count, mine in one.items():
        left = list(other.get(count, ()))
        for name, values in mine:
            close = [(float(np.abs(v / values - 1).max()), k) for k, (_, v) in enumerate(left)]
            if close and min(close)[0] <= _LOOSE:
                pairs.append((name, left.pop(min(close)[1])[0]))
    return pairs


def _apart(one: Tensor, other: Tensor) -> float:
    """Relative distance of the sorted values."""
    a, b = (t.reshape(-1).to(torch.float64).sort().values for t in (one, other))
    return float((a - b).norm() / a.norm().clamp_min(1e-30))


__all__ = ["same_values"]
