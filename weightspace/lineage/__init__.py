"""Which models descend from which: ``zoo.lineage()``, or ``trace`` for models that are not in a zoo."""

from weightspace.lineage.entry import trace
from weightspace.lineage.lineage import Edge, Lineage

__all__ = ["Edge", "Lineage", "trace"]
