"""Metanetworks: networks that read networks, equivariant to the symmetries of what they read."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from weightspace.metanets.base import Metanet, build_metanet

if TYPE_CHECKING:
    from weightspace.metanets.edges import EdgeReference
    from weightspace.metanets.equivariance import assert_equivariant
    from weightspace.metanets.operator import OperatorMetanet
    from weightspace.metanets.readout import BlockReadout, NodeReadout

# Name -> module: torch_geometric and lightning load with what needs them.
_LAZY = {
    "OperatorMetanet": "operator",
    "EdgeReference": "edges",
    "assert_equivariant": "equivariance",
    "NodeReadout": "readout",
    "BlockReadout": "readout",
}

__all__ = [
    "BlockReadout", "EdgeReference", "Metanet", "NodeReadout", "OperatorMetanet", "assert_equivariant", "build_metanet",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(import_module(f"weightspace.metanets.{_LAZY[name]}"), name)
    raise AttributeError(f"module 'weightspace.metanets' has no attribute {name!r}")
