"""A verdict says where the backdoor sits."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from weightspace.backdoor.verdict import Verdict
from weightspace.errors import WeightspaceError
from weightspace.pretrained.applicability import Applicability


def verdict(path: str) -> Verdict:
    return Verdict(path, None, 0.01, True, ((2, 0.7), (0, 0.3)), False, "", Applicability(False, 0.0, "small"))


def test_a_verdict_of_a_file_has_a_subspace_for_its_class(tmp_path: Path) -> None:
    torch.manual_seed(0)
    sizes = (6, 12, 9, 4)
    tensors = {}
    for i, (a, b) in enumerate(pairwise(sizes)):
        tensors |= {f"net.{2 * i}.weight": torch.randn(b, a), f"net.{2 * i}.bias": torch.randn(b)}
    save_file(tensors, tmp_path / "model.safetensors")
    found = verdict(str(tmp_path / "model.safetensors"))
    assert found.subspace.target == 2
    assert found.subspace is found.subspace
    assert "class 2" in found.show().layout.title.text


def test_tensors_from_no_file_go_to_locate() -> None:
    with pytest.raises(WeightspaceError, match=r"ws\.locate"):
        _ = verdict("tensors").subspace
