"""The networks that weightspace's own recipes train.

A network that carries its description in its record is built from that; one without (MLPs and CNNs with batch norm of
the starter zoo) is recognised by its shapes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import torch

import weightspace as ws
from weightspace.card import record_of
from weightspace.errors import WiringError, ZooError
from weightspace.zoo import networks

# A record says what the network is; shapes only suggest it.
PRIORITY = 10


def build(signature: ws.Signature) -> ws.Skeleton | None:
    """The network that the record describes, else one with ``hidden.<i>``, ``conv.<i>``, ``norm.<i>`` and ``output``.

    Raises ``WiringError`` for a description that makes no sense; whether its shapes are the file's is checked by the
    catalogue.
    """
    described = record_of(signature.metadata).get("network")
    if described is not None:
        return _described(described)
    shapes = dict(signature.shapes)
    if any(name.partition(".")[0] not in ("hidden", "conv", "norm", "output") for name in shapes):
        return None
    found = networks.from_shapes(shapes)
    if found is None:
        return None
    module, shape = found
    name = f"{type(module).__name__.upper()} of a weightspace recipe"
    # The shapes, part of every key, decide the module.
    return ws.Skeleton(module.eval(), (torch.randn(2, *shape),), name, key="shapes")


def _described(description: Mapping[str, Any]) -> ws.Skeleton:
    try:
        with torch.device("meta"):
            module, inputs = networks.module_of(description)
    except ZooError as error:
        raise WiringError(f"the network that the record describes cannot be built: {error}") from error
    name = f"{str(description['kind']).upper()} of a weightspace recipe, as its record says"
    return ws.Skeleton(module.eval(), inputs, name, key=json.dumps(description, sort_keys=True))
