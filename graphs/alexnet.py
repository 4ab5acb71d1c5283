"""AlexNet with the names of torchvision (Krizhevsky 2014, "one weird trick")."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

import weightspace as ws

FAMILY = "alexnet"
PRIORITY = 60
_CONVS = {0: (4, 2), 3: (1, 2), 6: (1, 1), 8: (1, 1), 10: (1, 1)}  # index: stride, padding
_LINEARS = (1, 4, 6)


class _AlexNet(nn.Module):
    def __init__(self, convs: list[tuple[int, ...]], linears: list[tuple[int, ...]], side: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for (index, (stride, padding)), conv in zip(_CONVS.items(), convs, strict=True):
            layers += [nn.Conv2d(conv[1], conv[0], conv[2:], stride=stride, padding=padding), nn.ReLU()]
            if index in (0, 3, 10):
                layers.append(nn.MaxPool2d(3, stride=2))
        self.features = nn.Sequential(*layers)
        self.avgpool = nn.AdaptiveAvgPool2d(side)
        first, second, third = (nn.Linear(w[1], w[0]) for w in linears)
        drop = nn.Dropout()
        self.classifier = nn.Sequential(drop, first, nn.ReLU(), drop, second, nn.ReLU(), third)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.avgpool(self.features(x)).flatten(1))


def build(signature: ws.Signature) -> ws.Skeleton | None:
    """Recognise AlexNet; inputs ``(2, channels, 64, 64)``."""
    shapes = signature.shapes
    convs = [shapes.get(f"features.{i}.weight", ()) for i in _CONVS]
    linears = [shapes.get(f"classifier.{i}.weight", ()) for i in _LINEARS]
    if any(len(c) != 4 for c in convs) or any(len(w) != 2 for w in linears) or not convs[-1][0]:
        return None
    side = math.isqrt(linears[0][1] // convs[-1][0])
    if convs[0][2:] != (11, 11) or side < 1 or side * side * convs[-1][0] != linears[0][1]:
        return None
    with torch.device("meta"):
        module = _AlexNet(convs, linears, side)
    return ws.Skeleton(module.eval(), (torch.randn(2, convs[0][1], 64, 64),), "AlexNet")
