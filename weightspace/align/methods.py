"""The methods of alignment, by name. A new one is a file with one function and a line here."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from weightspace.errors import AlignmentError


@dataclass(frozen=True)
class Method:
    """Where a method is, and what it needs.

    The function is called as ``f(a, b, wiring, *, seed, **options)`` with mappings of tensors as they are in the files
    and gives a ``Permutation`` or a ``Found``. Methods with ``needs_inputs`` get ``inputs=`` (a tensor or a tuple of
    tensors for ``wiring.program.run``) and raise without; ``takes_inputs``: they may get them. Where ``one_wiring`` is
    False, a and b may differ in widths or depth: the function gets the wiring of b, and that of a as ``wiring_a=``.
    """

    module: str
    name: str
    paper: str
    needs_inputs: bool = False
    takes_inputs: bool = False
    one_wiring: bool = True

    @property
    def function(self) -> Callable[..., Any]:
        found: Callable[..., Any] = getattr(import_module(self.module), self.name)
        return found


METHODS: dict[str, Method] = {
    "weight-matching": Method(
        "weightspace.align.weight_matching", "weight_matching", "Ainsworth et al. 2023, Git Re-Basin"
    ),
    "frank-wolfe": Method("weightspace.align.frank_wolfe", "frank_wolfe", "Crisostomi et al. 2024, C²M³"),
    "attention": Method(
        "weightspace.align.attention", "attention",
        "after Ainsworth et al. 2023; rotations of the residual stream: Ashkboos et al. 2024, SliceGPT",
    ),
    "activation-matching": Method(
        "weightspace.align.activation_matching", "activation_matching", "Li et al. 2016; Ainsworth et al. 2023",
        needs_inputs=True,
    ),
    "straight-through": Method(
        "weightspace.align.straight_through", "straight_through", "Ainsworth et al. 2023, section 3.3",
        needs_inputs=True,
    ),
    "sinkhorn": Method(
        "weightspace.align.sinkhorn", "sinkhorn", "Guerrero Peña et al. 2023, Re-basin via implicit Sinkhorn",
        takes_inputs=True,
    ),
    "learned": Method(
        "weightspace.align.learned", "learned", "Navon et al. 2023, Deep-Align, refined by weight matching"
    ),
    "cross-layer": Method(
        "weightspace.align.cross_layer", "cross_layer", "Nguyen et al. 2023, CLAFusion", needs_inputs=True,
        one_wiring=False,
    ),
    "pleas": Method("weightspace.align.pleas", "pleas", "Nasery et al. 2024, PLeaS", needs_inputs=True),
    "optimal-transport": Method(
        "weightspace.align.optimal_transport", "optimal_transport", "Singh & Jaggi 2020, OTFusion",
        takes_inputs=True, one_wiring=False,
    ),
}  # fmt: skip


def method_of(name: str) -> Method:
    """The method of that name; raises ``AlignmentError`` with those that there are."""
    found = METHODS.get(name)
    if found is None:
        raise AlignmentError(f"there is no alignment method {name!r}; there are {', '.join(METHODS)}")
    return found
