"""The methods by name. A method is a frozen dataclass in a file of its own: see `weightspace.merge.method`."""

from __future__ import annotations

import dataclasses
from difflib import get_close_matches
from importlib import import_module
from typing import Any

from weightspace.errors import MergeError
from weightspace.merge.method import Method

# name -> (module, class): modules are imported on use.
_CLASSES: dict[str, tuple[str, str]] = {
    "linear": ("linear", "Linear"),
    "slerp": ("slerp", "Slerp"),
    "task-arithmetic": ("task_arithmetic", "TaskArithmetic"),
    "ties": ("ties", "Ties"),
    "fisher": ("fisher", "Fisher"),
    "regmean": ("regmean", "RegMean"),
    "adamerging": ("adamerging", "AdaMerging"),
    "concrete": ("concrete", "Concrete"),
    "dam": ("dam", "Dam"),
    "wudi": ("wudi", "Wudi"),
    "doge": ("doge", "Doge"),
    "twin-merging": ("twin", "Twin"),
    "widen": ("widen", "Widen"),
    "knots": ("knots", "Knots"),
    "ot-fusion": ("ot_fusion", "OtFusion"),
    "pleas": ("pleas", "Pleas"),
    "dare": ("dare", "Dare"),
    "breadcrumbs": ("breadcrumbs", "Breadcrumbs"),
    "della": ("della", "Della"),
    "model-stock": ("model_stock", "ModelStock"),
    "pcb": ("pcb", "Pcb"),
    "tall-masks": ("tall_masks", "TallMasks"),
    "consensus": ("tall_masks", "Consensus"),
    "tsv-m": ("tsv", "TsvM"),
    "iso-c": ("iso", "IsoC"),
    "iso-cts": ("iso", "IsoCts"),
}

METHODS = tuple(_CLASSES)
"""Names of all methods."""


def method_class(name: str) -> type[Method]:
    """The class of a method. Raises `MergeError` for an unknown name, with those that are near."""
    key = name.lower().replace("_", "-")
    if key not in _CLASSES:
        near = get_close_matches(key, METHODS, 3, 0.4)
        raise MergeError(
            f"there is no merging method {name!r}; "
            + (f"did you mean {' or '.join(near)}? " if near else "")
            + f"There are {', '.join(METHODS)}"
        )
    module, attribute = _CLASSES[key]
    found = getattr(import_module(f"{__name__}.{module}"), attribute)
    assert isinstance(found, type)
    assert issubclass(found, Method)
    return found


def make(name: str, **hyper: Any) -> Method:
    """A method with its hyper-parameters; lists become tuples. Raises `MergeError` for one that it does not have."""
    cls = method_class(name)
    fields = {f.name: f for f in dataclasses.fields(cls)}
    unknown = [key for key in hyper if key not in fields]
    if unknown:
        known = ", ".join(f"{f.name}={f.default!r}" for f in fields.values()) or "none"
        raise MergeError(f"{cls.name} has no hyper-parameter {unknown[0]!r}; it has {known}")
    return cls(**{key: tuple(value) if isinstance(value, list) else value for key, value in hyper.items()})
