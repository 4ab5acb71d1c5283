"""DenseNets with the names of torchvision (Huang et al. 2017): 121, 161, 169, 201 and other depths.

Growth, bottlenecks and depths are read from the shapes. Assumed: the ImageNet stem (stride 2, max pooling),
average pooling in transitions, ReLU before every convolution and before global average pooling.
"""

from __future__ import annotations

import re

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import weightspace as ws

FAMILY = "densenet"
PRIORITY = 60
_LAYER = re.compile(r"features\.denseblock(\d+)\.denselayer(\d+)\.conv1\.weight$")


class _Layer(nn.Module):
    def __init__(self, width: int, inner: int, growth: int) -> None:
        super().__init__()
        self.norm1 = nn.BatchNorm2d(width)
        self.conv1 = nn.Conv2d(width, inner, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(inner)
        self.conv2 = nn.Conv2d(inner, growth, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv1(F.relu(self.norm1(x)))
        return self.conv2(F.relu(self.norm2(x)))


class _Block(nn.Module):
    def __init__(self, layers: list[_Layer]) -> None:
        super().__init__()
        for i, layer in enumerate(layers, start=1):
            self.add_module(f"denselayer{i}", layer)

    def forward(self, x: Tensor) -> Tensor:
        seen = [x]
        for layer in self.children():
            seen.append(layer(torch.cat(seen, dim=1)))
        return torch.cat(seen, dim=1)


class _Transition(nn.Module):
    def __init__(self, width: int, out: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(width)
        self.conv = nn.Conv2d(width, out, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.avg_pool2d(self.conv(F.relu(self.norm(x))), 2)


class _DenseNet(nn.Module):
    def __init__(self, features: nn.Sequential, width: int, classes: int) -> None:
        super().__init__()
        self.features = features
        self.classifier = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(F.relu(self.features(x)).mean(dim=(2, 3)))


def build(signature: ws.Signature) -> ws.Skeleton | None:
    """Recognise a DenseNet; inputs ``(2, channels, 32, 32)``."""
    shapes = signature.shapes
    stem, head = shapes.get("features.conv0.weight", ()), shapes.get("classifier.weight", ())
    depths: dict[int, int] = {}
    for name in shapes:
        if match := _LAYER.match(name):
            depths[int(match[1])] = max(depths.get(int(match[1]), 0), int(match[2]))
    if len(stem) != 4 or len(head) != 2 or not depths or sorted(depths) != list(range(1, len(depths) + 1)):
        return None
    with torch.device("meta"):
        features = nn.Sequential()
        conv = nn.Conv2d(stem[1], stem[0], stem[2], stride=2, padding=stem[2] // 2, bias=False)
        features.add_module("conv0", conv)
        features.add_module("norm0", nn.BatchNorm2d(stem[0]))
        features.add_module("relu0", nn.ReLU())
        features.add_module("pool0", nn.MaxPool2d(3, stride=2, padding=1))
        width = stem[0]
        for block in range(1, len(depths) + 1):
            layers = []
            for i in range(1, depths[block] + 1):
                prefix = f"features.denseblock{block}.denselayer{i}."
                first, second = (shapes.get(f"{prefix}conv{j}.weight", ()) for j in (1, 2))
                if len(first) != 4 or len(second) != 4:
                    return None
                layers.append(_Layer(width, first[0], second[0]))
                width += second[0]
            features.add_module(f"denseblock{block}", _Block(layers))
            if block < len(depths):
                transition = shapes.get(f"features.transition{block}.conv.weight", ())
                if len(transition) != 4:
                    return None
                features.add_module(f"transition{block}", _Transition(width, transition[0]))
                width = transition[0]
        features.add_module("norm5", nn.BatchNorm2d(width))
        module = _DenseNet(features, width, head[0])
    for name, child in module.named_modules():
        if isinstance(child, nn.BatchNorm2d) and f"{name}.num_batches_tracked" not in shapes:
            child.register_buffer("num_batches_tracked", None)
    name = f"DenseNet-{2 * sum(depths.values()) + len(depths) + 1}"
    side = 2 ** (len(depths) + 1)
    return ws.Skeleton(module.eval(), (torch.randn(2, stem[1], side, side),), name)
