"""weightspace: trained networks as data.

Open any checkpoint, find and prove its wiring, turn it into a parameter graph, and ask questions
of a whole zoo of networks::

    import weightspace as ws

    ckpt = ws.open("model.safetensors")       # lazy, executes nothing
    wiring = ws.wiring(ckpt)                   # which axes are the same axis; proved by running
    graph = ws.graph(ckpt, wiring)             # nodes are axis elements, edges are weights
    zoo = ws.Zoo("models/")                    # index a folder, then zoo.similar("model.safetensors")

Names are imported on first use, so that ``import weightspace`` costs little beyond torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_EXPORTS = {
    "open": "weightspace.checkpoint",
    "Checkpoint": "weightspace.checkpoint",
    "wiring": "weightspace.wiring",
    "Axis": "weightspace.wiring.axis",
    "Factor": "weightspace.wiring.axis",
    "Wiring": "weightspace.wiring.wiring",
    "Program": "weightspace.wiring.program",
    "Signature": "weightspace.wiring.catalogue",
    "Skeleton": "weightspace.wiring.catalogue",
    "graph": "weightspace.graph",
    "ParameterGraph": "weightspace.graph",
    "Zoo": "weightspace.zoo",
    "errors": "weightspace.errors",
}

__all__ = ["__version__", *_EXPORTS]

if TYPE_CHECKING:
    from weightspace import errors
    from weightspace.checkpoint import Checkpoint, open
    from weightspace.graph import ParameterGraph, graph
    from weightspace.wiring import wiring
    from weightspace.wiring.axis import Axis, Factor
    from weightspace.wiring.catalogue import Signature, Skeleton
    from weightspace.wiring.program import Program
    from weightspace.wiring.wiring import Wiring
    from weightspace.zoo import Zoo


class _LazyModule(__import__("types").ModuleType):
    """Resolves exported names on first use, also where a subpackage has the same name as a function.

    ``weightspace.wiring`` and ``weightspace.graph`` are both subpackages and verbs: importing the
    subpackage would bind the module over the verb, so the verb wins on the package object.
    """

    def __setattr__(self, name: str, value: Any) -> None:
        if name in _EXPORTS and _EXPORTS[name] == f"{__name__}.{name}" and isinstance(value, type(self).__base__):
            value = getattr(value, name, value)
        super().__setattr__(name, value)


def __getattr__(name: str) -> Any:
    target = _EXPORTS.get(name)
    if target is None:
        raise AttributeError(f"module 'weightspace' has no attribute {name!r}")
    module = import_module(target)
    value = module if target == f"{__name__}.{name}" and not hasattr(module, name) else getattr(module, name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)


__import__("sys").modules[__name__].__class__ = _LazyModule
