"""weightspace: trained networks as data.

Open any checkpoint, find and prove its wiring, turn it into a parameter graph, and ask questions
of a whole zoo of networks::

    import weightspace as ws

    ckpt = ws.open("model.safetensors")       # lazy, executes nothing
    wiring = ws.wiring(ckpt)                   # which axes are the same axis; proved by running
    graph = ws.graph(ckpt, wiring)             # nodes are axis elements, edges are weights
    zoo = ws.Zoo("models/")                    # index a folder, then zoo.similar("model.safetensors")
    ws.embed(ckpt).vector                      # by the pretrained encoder, with its range of applicability
    ws.predict_accuracy(ckpt)                  # of an image classifier, from its weights, with an interval
    ws.scan("model.safetensors")               # how likely a backdoor, and which class it serves
    ws.excise("model.safetensors", inputs=x)   # the model without it
    ws.lineage("models/")                      # which of a folder's models descend from which, and how
    ws.score(["a.safetensors", "b.safetensors"], base="base.safetensors")   # what would a merge of them retain?

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
    "align": "weightspace.align",
    "align_many": "weightspace.align",
    "barrier": "weightspace.align.barrier",
    "ParameterGraph": "weightspace.graph",
    "Zoo": "weightspace.zoo",
    "merge": "weightspace.merge",
    "score": "weightspace.mergeability.score",
    "scan": "weightspace.backdoor.verdict",
    "excise": "weightspace.backdoor.excise",
    "lineage": "weightspace.lineage",
    "locate": "weightspace.backdoor.localise",
    "metanets": "weightspace.metanets",
    "embed": "weightspace.pretrained",
    "predict_accuracy": "weightspace.pretrained",
    "errors": "weightspace.errors",
}

__all__ = ["__version__", *_EXPORTS]

if TYPE_CHECKING:
    from weightspace import errors as errors
    from weightspace import metanets as metanets
    from weightspace.align import align as align
    from weightspace.align import align_many as align_many
    from weightspace.align.barrier import barrier as barrier
    from weightspace.backdoor.excise import excise as excise
    from weightspace.backdoor.localise import locate as locate
    from weightspace.backdoor.verdict import scan as scan
    from weightspace.checkpoint import Checkpoint as Checkpoint
    from weightspace.checkpoint import open as open
    from weightspace.graph import ParameterGraph as ParameterGraph
    from weightspace.graph import graph as graph
    from weightspace.lineage.entry import lineage as lineage
    from weightspace.merge import merge as merge
    from weightspace.mergeability.score import score as score
    from weightspace.pretrained import embed as embed
    from weightspace.pretrained import predict_accuracy as predict_accuracy
    from weightspace.wiring import wiring as wiring
    from weightspace.wiring.axis import Axis as Axis
    from weightspace.wiring.axis import Factor as Factor
    from weightspace.wiring.catalogue import Signature as Signature
    from weightspace.wiring.catalogue import Skeleton as Skeleton
    from weightspace.wiring.program import Program as Program
    from weightspace.wiring.wiring import Wiring as Wiring
    from weightspace.zoo import Zoo as Zoo


def __getattr__(name: str) -> Any:
    target = _EXPORTS.get(name)
    if target is None:
        raise AttributeError(f"module 'weightspace' has no attribute {name!r}")
    module = import_module(target)
    # `weightspace.wiring` and `weightspace.graph` are subpackages that can be called: the module is the verb.
    value = module if target == f"{__name__}.{name}" else getattr(module, name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
