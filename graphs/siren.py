"""SIREN image networks (Sitzmann et al. 2020), layers ``seq.<i>``: pixel coordinates in, intensity out.

``sin(30 (W x + b))`` after every layer but the last, whose output is shifted by one half, as in the INR
data sets of Navon et al. 2023. The frequency 30 and the shift are assumed. (The sine also allows sign flips
of its neurons, which permutations do not describe.)
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor, nn

import weightspace as ws

FAMILY = "siren"


class _Siren(nn.Module):
    def __init__(self, weights: list[tuple[int, ...]], frequency: float = 30.0) -> None:
        super().__init__()
        self.seq = nn.ModuleList([nn.Linear(w[1], w[0]) for w in weights])
        self.frequency = frequency

    def forward(self, x: Tensor) -> Tensor:
        """``x``: (points, coordinates) in [-1, 1]."""
        for i, layer in enumerate(self.seq, start=1):
            x = layer(x)
            if i < len(self.seq):
                x = torch.sin(self.frequency * x)
        return x + 0.5


def build(signature: ws.Signature) -> ws.Skeleton | None:
    """Recognise layers ``seq.0`` ... with two or three coordinates in and one to four values out."""
    shapes = signature.shapes
    depth = len(shapes) // 2
    if set(shapes) != {f"seq.{i}.{kind}" for i in range(depth) for kind in ("weight", "bias")}:
        return None
    weights = [shapes[f"seq.{i}.weight"] for i in range(depth)]
    if depth < 2 or any(len(w) != 2 for w in weights):
        return None
    if any(a[0] != b[1] for a, b in itertools.pairwise(weights)):
        return None
    if weights[0][1] not in (2, 3) or weights[-1][0] > 4:
        return None
    with torch.device("meta"):
        module = _Siren(weights)
    widths = "-".join(str(w) for w in [weights[0][1], *(w[0] for w in weights)])
    return ws.Skeleton(module.eval(), (torch.rand(4, weights[0][1]) * 2 - 1,), f"SIREN {widths}")
