"""The family that reports on merges are tried on."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from weightspace.mergeability.report import MergeReport

sys.path.insert(0, str(Path(__file__).parent))
import small
from scored import NEW, score


@pytest.fixture(scope="module")
def base() -> dict[str, Tensor]:
    return small.family(NEW)[0]


@pytest.fixture(scope="module")
def models() -> dict[str, dict[str, Tensor]]:
    return small.family(NEW)[1]


@pytest.fixture(scope="module")
def plain(models: Mapping[str, Any], base: Any) -> MergeReport:
    return score(models, base, checks=True)
