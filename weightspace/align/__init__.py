"""Alignment: which neuron, head, channel of one network is which of another.

``ws.align(a, b)`` moves ``b`` onto ``a`` by an element of their wiring's symmetry group, so that ``b`` computes what it
computed and its weights lie near those of ``a``. Every method is a file, listed in ``weightspace.align.methods``.
"""

from __future__ import annotations

from weightspace.align.alignment import Alignment, Found
from weightspace.align.entry import align
from weightspace.align.methods import METHODS, Method
from weightspace.align.universe import Universe, align_many
from weightspace.callable import make_callable

__all__ = ["METHODS", "Alignment", "Found", "Method", "Universe", "align", "align_many"]

make_callable(__name__, align)
