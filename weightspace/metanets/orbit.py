"""One representative of each orbit: networks that differ by a rescaling of neurons alone are read as one."""

from __future__ import annotations

from typing import TYPE_CHECKING

from weightspace.graph.build import of_tensors
from weightspace.wiring.scaling import scaling

if TYPE_CHECKING:
    from weightspace.graph import ParameterGraph


def canonical(graph: ParameterGraph) -> ParameterGraph:
    """The graph at the canonical point of its orbit under positive rescaling and sign flips."""
    assert graph.wiring is not None
    tensors = {n: graph.tensor(n) for n in graph.shapes}
    return of_tensors(scaling(graph.wiring).canonical(tensors), graph.wiring)
