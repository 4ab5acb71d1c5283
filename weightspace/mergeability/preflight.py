"""Can these models be merged at all? What can be said from the files alone, before anything is merged.

``preflight(models, base)`` reads the models once, tensor by tensor, and lists findings: what was found, what was
expected, what to do. A *stop* makes merging these files wrong or impossible as they are; a *warning* makes it likely
to disappoint; a *note* is good to know.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import TYPE_CHECKING

from weightspace.errors import WeightspaceError
from weightspace.mergeability.configuration import configuration, dtype, settings_of, tokeniser, vocabulary_of
from weightspace.mergeability.flight import CHECKS, Finding, Flight, Model, Preflight, Severity, name_of, named, opened
from weightspace.mergeability.origins import ancestors, protections
from weightspace.mergeability.structure import adapters, quantised, tensors, wirings
from weightspace.mergeability.values import equal, values

if TYPE_CHECKING:
    from weightspace.wiring.wiring import Wiring


def preflight(
    models: Sequence[Model] | Mapping[str, Model],
    base: Model | None = None,
    *,
    wiring: Wiring | None = None,
    checks: Collection[str] = CHECKS,
    seed: int = 0,
) -> Preflight:
    """Look at models, and the base they come from, before they are merged.

    ``models``: paths, checkpoints or mappings of tensors, or a mapping of names to such. Each is held against the base,
    or against the first model where there is none. ``wiring``: the models' wiring where it is known; otherwise it is
    found from the reference. ``checks``: some of ``CHECKS``. ``seed`` draws the null distribution of the ancestry test.

    Tensors are read one at a time for everything but the search for permuted or protected copies, which holds two
    models. Raises ``WeightspaceError`` for an unknown check or a file that cannot be opened; whatever else is wrong
    with the models is a finding.
    """
    return fly(models, base, wiring=wiring, checks=checks, seed=seed).report()


def fly(
    models: Sequence[Model] | Mapping[str, Model], base: Model | None = None, *, wiring: Wiring | None = None,
    checks: Collection[str] = CHECKS, seed: int = 0, step: Callable[[str], object] | None = None,
) -> Flight:  # fmt: skip
    """``preflight`` with what it worked with: models as they were opened, adapters merged into their base, the wiring.

    ``step`` is called with a word before each model that takes time.
    """
    unknown = sorted(set(checks) - set(CHECKS))
    if unknown:
        raise WeightspaceError(f"there is no check {unknown[0]!r}; expected some of {', '.join(CHECKS)}")
    given = named(models)
    if not given:
        raise WeightspaceError("no models were given; expected one or more paths, checkpoints or mappings of tensors")
    flight = Flight({n: opened(m) for n, m in given.items()}, None if base is None else opened(base), seed)
    flight.base_name = None if base is None else name_of(base, "base")
    flight.given_wiring = wiring
    flight.step = step or (lambda _: None)
    for check in CHECKS:
        if check in checks:
            _STEPS[check](flight)
    return flight


_STEPS = {
    "adapters": adapters, "quantised": quantised, "tensors": tensors, "wiring": wirings,
    "configuration": configuration, "tokeniser": tokeniser, "dtype": dtype, "values": values, "equal": equal,
    "ancestry": ancestors, "protection": protections,
}  # fmt: skip

__all__ = [
    "CHECKS", "Finding", "Flight", "Model", "Preflight", "Severity", "fly", "named", "opened", "preflight",
    "settings_of", "vocabulary_of",
]  # fmt: skip
