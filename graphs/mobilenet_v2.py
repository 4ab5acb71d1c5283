"""MobileNetV2 with the names of torchvision (Sandler et al. 2018), any width.

Inverted residuals: expand, depthwise convolution, project. Shapes do not show strides, which decide where the
shortcuts are; they are those of the paper's table, so that only its 17 blocks are recognised.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

import weightspace as ws

FAMILY = "mobilenet-v2"
PRIORITY = 60
_STRIDES = (1, 2, 1, 2, 1, 1, 2, 1, 1, 1, 1, 1, 1, 2, 1, 1, 1)


def _conv(width: int, out: int, kernel: int, stride: int = 1, groups: int = 1) -> nn.Sequential:
    conv = nn.Conv2d(width, out, kernel, stride=stride, padding=kernel // 2, groups=groups, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(out), nn.ReLU6())


class _Inverted(nn.Module):
    def __init__(self, width: int, hidden: int | None, out: int, stride: int) -> None:
        super().__init__()
        self.residual = stride == 1 and width == out
        inner = width if hidden is None else hidden
        layers: list[nn.Module] = [] if hidden is None else [_conv(width, hidden, 1)]
        layers.append(_conv(inner, inner, 3, stride, inner))
        layers += [nn.Conv2d(inner, out, 1, bias=False), nn.BatchNorm2d(out)]
        self.conv = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(x) if self.residual else self.conv(x)


class _MobileNet(nn.Module):
    def __init__(self, features: list[nn.Module], head: tuple[int, ...]) -> None:
        super().__init__()
        self.features = nn.Sequential(*features)
        self.classifier = nn.Sequential(nn.Dropout(), nn.Linear(head[1], head[0]))

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.features(x).mean(dim=(2, 3)))


def build(signature: ws.Signature) -> ws.Skeleton | None:
    """Recognise MobileNetV2; inputs ``(2, channels, 32, 32)``."""
    shapes = signature.shapes
    last = len(_STRIDES) + 1
    stem, end = shapes.get("features.0.0.weight", ()), shapes.get(f"features.{last}.0.weight", ())
    head = shapes.get("classifier.1.weight", ())
    if len(stem) != 4 or len(end) != 4 or len(head) != 2:
        return None
    width = stem[0]
    with torch.device("meta"):
        layers: list[nn.Module] = [_conv(stem[1], stem[0], 3, 2)]
        for i, stride in enumerate(_STRIDES, start=1):
            expands = f"features.{i}.conv.1.0.weight" in shapes
            hidden = shapes.get(f"features.{i}.conv.0.0.weight", ())
            project = shapes.get(f"features.{i}.conv.{2 if expands else 1}.weight", ())
            if len(hidden) != 4 or len(project) != 4 or not width:
                return None
            layers.append(_Inverted(width, hidden[0] if expands else None, project[0], stride))
            width = project[0]
        layers.append(_conv(width, end[0], 1))
        module = _MobileNet(layers, head)
    for name, child in module.named_modules():
        if isinstance(child, nn.BatchNorm2d) and f"{name}.num_batches_tracked" not in shapes:
            child.register_buffer("num_batches_tracked", None)
    return ws.Skeleton(module.eval(), (torch.randn(2, stem[1], 32, 32),), f"MobileNetV2, {end[0]} features")
