"""The shipped metanets with ranges that hold everything, for what does not depend on where a range ends."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import weightspace.pretrained
from weightspace.pretrained import model as model_module
from weightspace.pretrained import reading
from weightspace.pretrained.model import Shipped, shipped


@pytest.fixture
def roomy(monkeypatch: pytest.MonkeyPatch) -> Shipped:
    """Every network within the limits is inside."""
    known = shipped()
    far = torch.full((100,), torch.inf, dtype=torch.float64)
    found = replace(
        known,
        range=replace(known.range, calibration=far),
        accuracy_range=replace(known.accuracy_range, calibration=far),
    )
    for place in (weightspace.pretrained, model_module, reading):
        monkeypatch.setattr(place, "shipped", lambda: found)
    return found
