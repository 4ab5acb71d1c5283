"""MobileNetV3 large and small with the names of torchvision (Howard et al. 2019).

Inverted residuals with squeeze-and-excitation. Shapes do not show strides, which decide where the shortcuts
are; they are those of the paper's two tables. Activations (ReLU or hard-swish) follow the tables as well.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import weightspace as ws

FAMILY = "mobilenet-v3"
PRIORITY = 60
# Blocks: strides, and the index of the first block with hard-swish.
_TABLES = {
    "large": ((1, 2, 1, 2, 1, 1, 2, 1, 1, 1, 1, 1, 2, 1, 1), 6),
    "small": ((2, 2, 1, 2, 1, 1, 1, 1, 2, 1, 1), 3),
}


def _conv(weight: tuple[int, ...], stride: int, groups: int, act: type[nn.Module] | None) -> nn.Sequential:
    out, per_group, kernel, _ = weight
    conv = nn.Conv2d(
        per_group * groups, out, kernel, stride=stride, padding=kernel // 2, groups=groups, bias=False
    )
    layers: list[nn.Module] = [conv, nn.BatchNorm2d(out, eps=0.001)]
    return nn.Sequential(*layers, act()) if act else nn.Sequential(*layers)


class _Excitation(nn.Module):
    def __init__(self, weight: tuple[int, ...]) -> None:
        super().__init__()
        self.fc1 = nn.Conv2d(weight[1], weight[0], 1)
        self.fc2 = nn.Conv2d(weight[0], weight[1], 1)

    def forward(self, x: Tensor) -> Tensor:
        scale = self.fc2(F.relu(self.fc1(x.mean(dim=(2, 3), keepdim=True))))
        return x * F.hardsigmoid(scale)


class _Inverted(nn.Module):
    def __init__(self, layers: list[nn.Module], residual: bool) -> None:
        super().__init__()
        self.block = nn.Sequential(*layers)
        self.residual = residual

    def forward(self, x: Tensor) -> Tensor:
        return x + self.block(x) if self.residual else self.block(x)


class _MobileNet(nn.Module):
    def __init__(self, features: list[nn.Module], linears: list[tuple[int, ...]]) -> None:
        super().__init__()
        self.features = nn.Sequential(*features)
        first, second = (nn.Linear(w[1], w[0]) for w in linears)
        self.classifier = nn.Sequential(first, nn.Hardswish(), nn.Dropout(), second)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.features(x).mean(dim=(2, 3)))


def build(signature: ws.Signature) -> ws.Skeleton | None:
    """Recognise MobileNetV3; inputs ``(2, channels, 32, 32)``."""
    shapes = signature.shapes
    blocks = 0
    while f"features.{blocks + 1}.block.0.0.weight" in shapes:
        blocks += 1
    size = next((name for name, (strides, _) in _TABLES.items() if len(strides) == blocks), None)
    linears = [shapes.get(f"classifier.{i}.weight", ()) for i in (0, 3)]
    stem, end = shapes.get("features.0.0.weight", ()), shapes.get(f"features.{blocks + 1}.0.weight", ())
    if size is None or len(stem) != 4 or len(end) != 4 or any(len(w) != 2 for w in linears):
        return None
    strides, swish = _TABLES[size]
    width = stem[0]
    with torch.device("meta"):
        layers: list[nn.Module] = [_conv(stem, 2, 1, nn.Hardswish)]
        for i, stride in enumerate(strides, start=1):
            act: type[nn.Module] = nn.Hardswish if i > swish else nn.ReLU
            parts: list[nn.Module] = []
            incoming = width
            prefix = f"features.{i}.block."
            count = 0
            while any(f"{prefix}{count}.{leaf}.weight" in shapes for leaf in ("0", "fc1")):
                squeeze = f"{prefix}{count}.fc1.weight" in shapes
                weight = shapes[f"{prefix}{count}.{'fc1' if squeeze else '0'}.weight"]
                if len(weight) != 4:
                    return None
                if squeeze:
                    parts.append(_Excitation(weight))
                elif weight[2] > 1:  # depthwise
                    if weight[:2] != (width, 1):
                        return None
                    parts.append(_conv(weight, stride, width, act))
                else:
                    last = f"{prefix}{count + 1}.0.weight" not in shapes
                    last = last and f"{prefix}{count + 1}.fc1.weight" not in shapes
                    if weight[1] != width:
                        return None
                    parts.append(_conv(weight, 1, 1, None if last else act))
                    width = weight[0]
                count += 1
            layers.append(_Inverted(parts, stride == 1 and incoming == width))
        layers.append(_conv(end, 1, 1, nn.Hardswish))
        module = _MobileNet(layers, linears)
    for name, child in module.named_modules():
        if isinstance(child, nn.BatchNorm2d) and f"{name}.num_batches_tracked" not in shapes:
            child.register_buffer("num_batches_tracked", None)
    return ws.Skeleton(module.eval(), (torch.randn(2, stem[1], 32, 32),), f"MobileNetV3 {size}")
