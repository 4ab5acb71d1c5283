"""MNASNet with the names of torchvision (Tan et al. 2019), any width.

Inverted residuals in six stacks. Shapes do not show strides, which decide where the shortcuts are; they are
those of the paper's figure.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

import weightspace as ws

FAMILY = "mnasnet"
PRIORITY = 60
_STRIDES = {8: 2, 9: 2, 10: 2, 11: 1, 12: 2, 13: 1}  # index of the stack: stride of its first block


def _conv(width: int, out: int, kernel: int, stride: int = 1, groups: int = 1) -> list[nn.Module]:
    conv = nn.Conv2d(width, out, kernel, stride=stride, padding=kernel // 2, groups=groups, bias=False)
    return [conv, nn.BatchNorm2d(out)]


class _Inverted(nn.Module):
    def __init__(self, width: int, hidden: int, kernel: int, out: int, stride: int) -> None:
        super().__init__()
        self.residual = stride == 1 and width == out
        self.layers = nn.Sequential(
            *_conv(width, hidden, 1),
            nn.ReLU(),
            *_conv(hidden, hidden, kernel, stride, hidden),
            nn.ReLU(),
            *_conv(hidden, out, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layers(x) if self.residual else self.layers(x)


class _MNASNet(nn.Module):
    def __init__(self, layers: list[nn.Module], head: tuple[int, ...]) -> None:
        super().__init__()
        self.layers = nn.Sequential(*layers)
        self.classifier = nn.Sequential(nn.Dropout(), nn.Linear(head[1], head[0]))

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.layers(x).mean(dim=(2, 3)))


def build(signature: ws.Signature) -> ws.Skeleton | None:
    """Recognise MNASNet; inputs ``(2, channels, 32, 32)``."""
    shapes = signature.shapes
    stem, first, end = (shapes.get(f"layers.{i}.weight", ()) for i in (0, 6, 14))
    head = shapes.get("classifier.1.weight", ())
    if any(len(w) != 4 for w in (stem, first, end)) or len(head) != 2 or not stem[0]:
        return None
    with torch.device("meta"):
        layers = [*_conv(stem[1], stem[0], 3, 2), nn.ReLU()]
        layers += [*_conv(stem[0], stem[0], 3, 1, stem[0]), nn.ReLU(), *_conv(stem[0], first[0], 1)]
        width = first[0]
        for stack, stride in _STRIDES.items():
            blocks: list[nn.Module] = []
            while f"layers.{stack}.{len(blocks)}.layers.0.weight" in shapes:
                prefix = f"layers.{stack}.{len(blocks)}.layers."
                expand, depth, project = (shapes.get(f"{prefix}{i}.weight", ()) for i in (0, 3, 6))
                if any(len(w) != 4 for w in (expand, depth, project)) or not expand[0]:
                    return None
                blocks.append(_Inverted(width, expand[0], depth[2], project[0], 1 if blocks else stride))
                width = project[0]
            layers.append(nn.Sequential(*blocks))
        layers += [*_conv(width, end[0], 1), nn.ReLU()]
        module = _MNASNet(layers, head)
    for name, child in module.named_modules():
        if isinstance(child, nn.BatchNorm2d) and f"{name}.num_batches_tracked" not in shapes:
            child.register_buffer("num_batches_tracked", None)
    name = f"MNASNet, {first[0]} channels first"
    return ws.Skeleton(module.eval(), (torch.randn(2, stem[1], 32, 32),), name)
