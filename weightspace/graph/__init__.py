"""Parameter graphs: nodes are axis elements, edges are weights, large networks are never materialised."""

from __future__ import annotations

from weightspace.callable import make_callable
from weightspace.graph.build import graph
from weightspace.graph.layout import Block, Cell, Link, Vector
from weightspace.graph.parameter_graph import ParameterGraph

__all__ = ["Block", "Cell", "Link", "ParameterGraph", "Vector", "graph"]

make_callable(__name__, graph)
