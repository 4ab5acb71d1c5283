"""Metanetworks: networks that read networks, equivariant to the symmetries of what they read."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from weightspace.metanets.base import Metanet, build_metanet

if TYPE_CHECKING:
    from weightspace.metanets.answering import Answering
    from weightspace.metanets.augment import Augmentation
    from weightspace.metanets.data import Sample, load_samples, split
    from weightspace.metanets.edges import EdgeReference
    from weightspace.metanets.equivariance import assert_equivariant
    from weightspace.metanets.flat import FlatBaseline
    from weightspace.metanets.operator import OperatorMetanet
    from weightspace.metanets.readout import BlockReadout, NodeReadout
    from weightspace.metanets.training import Trained, TrainingPlan, fit

# Name -> module: torch_geometric and lightning load with what needs them.
_LAZY = {
    "OperatorMetanet": "operator",
    "Answering": "answering",
    "EdgeReference": "edges",
    "assert_equivariant": "equivariance",
    "NodeReadout": "readout",
    "BlockReadout": "readout",
    "FlatBaseline": "flat",
    "Sample": "data",
    "load_samples": "data",
    "split": "data",
    "Augmentation": "augment",
    "TrainingPlan": "training",
    "Trained": "training",
    "fit": "training",
}

__all__ = [
    "Answering", "Augmentation", "BlockReadout", "EdgeReference", "FlatBaseline", "Metanet", "NodeReadout",
    "OperatorMetanet", "Sample", "Trained", "TrainingPlan", "assert_equivariant", "build_metanet", "fit",
    "load_samples", "split",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(import_module(f"weightspace.metanets.{_LAZY[name]}"), name)
    raise AttributeError(f"module 'weightspace.metanets' has no attribute {name!r}")
