"""Which models descend from which: ``ws.lineage(models)``, ``zoo.lineage()``, or ``trace`` for opened checkpoints."""

from weightspace.callable import make_callable
from weightspace.lineage.entry import lineage as _lineage
from weightspace.lineage.entry import trace
from weightspace.lineage.lineage import Edge, Lineage

__all__ = ["Edge", "Lineage", "trace"]

make_callable(__name__, _lineage)
