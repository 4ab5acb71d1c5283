"""Values that depend on the tensor, as in mergekit's recipes: a number, a gradient over layers, or filters."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from weightspace.errors import MergeError

Setting = Any
"""A number, text or bool; a list of numbers (from the first layer to the last); a list of {filter, value}."""

_NUMBER = re.compile(r"(?:^|\.)(\d+)(?=\.|$)")


@dataclass(frozen=True)
class Depth:
    """Where a tensor stands between the first layer (0) and the last (1), by the first number in its name."""

    layers: int

    def __call__(self, name: str) -> float:
        found = _NUMBER.search(name)
        if found is None:
            return 0.0
        return min(1.0, int(found[1]) / (self.layers - 1)) if self.layers > 1 else 1.0


def depth_of(names: Sequence[str], config: Mapping[str, Any] | None = None) -> Depth:
    """Depth for these tensors; the number of layers from the configuration, or else from the names."""
    said = (config or {}).get("num_hidden_layers")
    if isinstance(said, int) and said > 0:
        return Depth(said)
    numbers = [int(found[1]) for name in names if (found := _NUMBER.search(name))]
    return Depth(max(numbers, default=-1) + 1)


def check(setting: Setting, what: str) -> None:
    """Raise `MergeError` for something that is no setting."""
    if isinstance(setting, Mapping):
        setting = [setting]
    if isinstance(setting, (bool, int, float, str)):
        return
    if isinstance(setting, tuple) and all(isinstance(e, (int, float)) for e in setting):
        return  # one number per model
    if isinstance(setting, list) and setting:
        if all(isinstance(e, (bool, int, float)) for e in setting):
            return
        if all(isinstance(e, Mapping) for e in setting):
            for entry in setting:
                if "value" not in entry or entry.keys() - {"value", "filter"}:
                    raise MergeError(f"{what}: {dict(entry)} should have a value, perhaps a filter, and nothing else")
                if not isinstance(entry.get("filter"), (str, type(None))):
                    raise MergeError(f"{what}: the filter {entry['filter']!r} should be a part of tensor names")
                check(entry["value"], what)
            return
    raise MergeError(
        f"{what} is {setting!r}; a number, a list of numbers (a gradient over layers) or a list of "
        "{filter, value} was expected"
    )


def is_constant(setting: Setting) -> bool:
    """Whether it is the same for every tensor."""
    return not isinstance(setting, (list, Mapping))


def value_of(setting: Setting, name: str, depth: Depth) -> Any:
    """The value for a tensor; None where no filter is for it. Gradients are linear between their numbers."""
    if isinstance(setting, Mapping):
        setting = [setting]
    if not isinstance(setting, list):
        return setting
    if isinstance(setting[0], Mapping):
        for entry in setting:
            part = entry.get("filter")
            if part is None or part == "*" or part in name:
                return value_of(entry["value"], name, depth)
        return None
    at = depth(name) * (len(setting) - 1)
    low = int(at)
    high = min(len(setting) - 1, low + 1)
    return (1 - (at - low)) * setting[low] + (at - low) * setting[high]
