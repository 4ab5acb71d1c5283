"""The small networks that weightspace's own recipes train: MLPs and CNNs with batch norm."""

from __future__ import annotations

import torch

import weightspace as ws
from weightspace.zoo import networks


def build(signature: ws.Signature) -> ws.Skeleton | None:
    """Recognise ``hidden.<i>``, ``conv.<i>``, ``norm.<i>`` and ``output``; the input size follows."""
    shapes = dict(signature.shapes)
    if any(name.partition(".")[0] not in ("hidden", "conv", "norm", "output") for name in shapes):
        return None
    found = networks.from_shapes(shapes)
    if found is None:
        return None
    module, shape = found
    name = f"{type(module).__name__.upper()} of a weightspace recipe"
    return ws.Skeleton(module.eval(), (torch.randn(2, *shape),), name)
