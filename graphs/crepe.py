"""CREPE pitch tracker (Kim et al. 2018), names of torchcrepe, any capacity from tiny to full.

Six convolutions over 1,024 samples, each followed by ReLU, batch norm (eps 1e-3) and max pooling by two,
then one linear layer over the map flattened time-major, with a sigmoid over 360 pitch bins.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import weightspace as ws

FAMILY = "crepe"
_LAYERS = range(1, 7)


class _Crepe(nn.Module):
    def __init__(self, widths: list[int], kernels: list[int], bins: int) -> None:
        super().__init__()
        for i in _LAYERS:
            stride = (4, 1) if i == 1 else (1, 1)
            self.add_module(
                f"conv{i}", nn.Conv2d(widths[i - 1], widths[i], (kernels[i - 1], 1), stride=stride)
            )
            self.add_module(f"conv{i}_BN", nn.BatchNorm2d(widths[i], eps=0.0010000000474974513))
        self.classifier = nn.Linear(4 * widths[-1], bins)

    def forward(self, x: Tensor) -> Tensor:
        """``x``: (batch, 1024) samples at 16 kHz. Returns (batch, bins) in [0, 1]."""
        x = x[:, None, :, None]
        for i in _LAYERS:
            x = F.pad(x, (0, 0, 254, 254) if i == 1 else (0, 0, 31, 32))
            x = self.get_submodule(f"conv{i}_BN")(F.relu(self.get_submodule(f"conv{i}")(x)))
            x = F.max_pool2d(x, (2, 1), (2, 1))
        return torch.sigmoid(self.classifier(x.permute(0, 2, 1, 3).flatten(1)))


def build(signature: ws.Signature) -> ws.Skeleton | None:
    """Recognise CREPE; inputs ``(2, 1024)``, the frame length that the last layer fixes."""
    shapes = signature.shapes
    convs = [shapes.get(f"conv{i}.weight", ()) for i in _LAYERS]
    if any(len(c) != 4 or c[3] != 1 for c in convs) or "conv1_BN.running_mean" not in shapes:
        return None
    if [c[2] for c in convs] != [512, 64, 64, 64, 64, 64] or len(shapes.get("classifier.weight", ())) != 2:
        return None
    with torch.device("meta"):
        widths = [convs[0][1], *(c[0] for c in convs)]
        module = _Crepe(widths, [c[2] for c in convs], shapes["classifier.weight"][0])
    for name, child in module.named_modules():
        if isinstance(child, nn.BatchNorm2d) and f"{name}.num_batches_tracked" not in shapes:
            child.register_buffer("num_batches_tracked", None)
    size = {4: "tiny", 8: "small", 16: "medium", 24: "large", 32: "full"}.get(convs[1][0] // 4, "custom")
    return ws.Skeleton(module.eval(), (torch.randn(2, 1024),), f"CREPE {size}")
