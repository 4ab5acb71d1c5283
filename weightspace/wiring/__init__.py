"""Wirings: which axis of which tensor is which, found by tracing and proved by running."""

from __future__ import annotations

from weightspace.callable import make_callable
from weightspace.wiring.axis import Axis, Factor, Segment
from weightspace.wiring.entry import wiring
from weightspace.wiring.program import Program
from weightspace.wiring.proof import Proof
from weightspace.wiring.wiring import Permutation, Wiring

__all__ = ["Axis", "Factor", "Permutation", "Program", "Proof", "Segment", "Wiring", "wiring"]

make_callable(__name__, wiring)
