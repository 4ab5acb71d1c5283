"""The architecture catalogue: rebuilds a skeleton module for a bare checkpoint from names and shapes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn


@dataclass(frozen=True)
class Signature:
    """What a family may look at to recognise a checkpoint: names, shapes, dtypes and metadata."""

    shapes: Mapping[str, tuple[int, ...]]
    dtypes: Mapping[str, torch.dtype] = field(default_factory=dict)
    metadata: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Skeleton:
    """A module with the names and shapes of a checkpoint, and inputs to run it on.

    ``rename`` maps a key of the module's state dict to the checkpoint's name where they differ;
    ``unused`` names checkpoint tensors that take no part in the function (counters, optimiser state).
    """

    module: nn.Module
    inputs: tuple[Any, ...]
    name: str
    rename: Mapping[str, str] = field(default_factory=dict)
    unused: tuple[str, ...] = ()
