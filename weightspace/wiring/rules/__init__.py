"""One small rule per operation: which axes of its operands are the same axis.

A rule has the signature ``rule(t, func, args, kwargs, out)``: ``t`` is the ``Tracer``, ``args`` and
``kwargs`` are those of the aten operation, ``out`` its result. It unifies dims of the operands
(``t.unify``), pins what may not move (``t.pin``), and returns the dims of the result: one list of dims per
output tensor (a plain list of dims where there is one output). To support a new operation write a rule and
put it in the table with ``@rule("name", ...)``; names are those of ``torch.ops.aten`` without overload and
in-place underscore. Operations that torch tags as pointwise need none.

Size-1 dims are the empty product ``[]``, which broadcasts against anything.

The rules stand in ``contraction``, ``reduction``, ``shape``, ``spatial`` and ``indexing``; ``base`` has the table.
"""

from __future__ import annotations

from weightspace.wiring.rules import contraction, indexing, reduction, shape, spatial
from weightspace.wiring.rules.base import CREATION, RULES, pointwise, rule, unknown

__all__ = [
    "CREATION",
    "RULES",
    "contraction",
    "indexing",
    "pointwise",
    "reduction",
    "rule",
    "shape",
    "spatial",
    "unknown",
]
