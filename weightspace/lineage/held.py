"""Tensors of a group of models, kept in memory where they are small in all."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING:
    from weightspace.checkpoint import Checkpoint

_MOST = 1 << 31


class Held:
    """``held(name)`` gives the tensors of a model; ``names``: those that are read."""

    def __init__(self, models: Mapping[str, Checkpoint], names: Sequence[str]) -> None:
        self._models, self._names = models, list(names)
        size = sum(4 * math.prod(m.shape(n)) for m in models.values() for n in self._names)
        self._kept: dict[str, dict[str, Tensor]] | None = {} if size <= _MOST else None

    def __call__(self, name: str) -> Mapping[str, Tensor]:
        model = self._models[name]
        if self._kept is None:
            return model
        if name not in self._kept:
            self._kept[name] = {n: model[n] for n in self._names}
        return self._kept[name]


__all__ = ["Held"]
