"""SqueezeNet 1.0 and 1.1 with the names of torchvision (Iandola et al. 2016).

Fire modules squeeze by a 1x1 convolution and concatenate a 1x1 and a 3x3 expansion. The version shows in the
positions of the fire modules, whose gaps are the pooling layers.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import weightspace as ws

FAMILY = "squeezenet"
PRIORITY = 60
_FIRES = {"1.0": (3, 4, 5, 7, 8, 9, 10, 12), "1.1": (3, 4, 6, 7, 9, 10, 11, 12)}


class _Fire(nn.Module):
    def __init__(self, width: int, squeeze: int, narrow: int, wide: int) -> None:
        super().__init__()
        self.squeeze = nn.Conv2d(width, squeeze, 1)
        self.expand1x1 = nn.Conv2d(squeeze, narrow, 1)
        self.expand3x3 = nn.Conv2d(squeeze, wide, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.squeeze(x))
        return torch.cat((F.relu(self.expand1x1(x)), F.relu(self.expand3x3(x))), dim=1)


class _SqueezeNet(nn.Module):
    def __init__(self, features: nn.Sequential, width: int, classes: int) -> None:
        super().__init__()
        self.features = features
        self.classifier = nn.Sequential(nn.Dropout(), nn.Conv2d(width, classes, 1), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.features(x)).mean(dim=(2, 3))


def build(signature: ws.Signature) -> ws.Skeleton | None:
    """Recognise SqueezeNet; inputs ``(2, channels, 64, 64)``."""
    shapes = signature.shapes
    stem, head = shapes.get("features.0.weight", ()), shapes.get("classifier.1.weight", ())
    fires = tuple(i for i in range(32) if f"features.{i}.squeeze.weight" in shapes)
    version = next((v for v, places in _FIRES.items() if places == fires), None)
    if version is None or len(stem) != 4 or len(head) != 4:
        return None
    width = stem[0]
    with torch.device("meta"):
        layers: list[nn.Module] = [nn.Conv2d(stem[1], stem[0], stem[2:], stride=2), nn.ReLU()]
        for i in range(2, 13):
            if i not in fires:
                layers.append(nn.MaxPool2d(3, stride=2, ceil_mode=True))
                continue
            names = ("squeeze", "expand1x1", "expand3x3")
            parts = [shapes.get(f"features.{i}.{name}.weight", ()) for name in names]
            if any(len(p) != 4 for p in parts):
                return None
            layers.append(_Fire(width, parts[0][0], parts[1][0], parts[2][0]))
            width = parts[1][0] + parts[2][0]
        module = _SqueezeNet(nn.Sequential(*layers), width, head[0])
    return ws.Skeleton(module.eval(), (torch.randn(2, stem[1], 64, 64),), f"SqueezeNet {version}")
