"""The small VGG of backdoor benchmarks (I-BAU, Zeng et al. 2022): three pairs of convolutions with ELU.

Convolution, batch norm and ELU (assumed from the benchmark) take three places in ``features``, max pooling
and dropout two more after each pair; one linear layer follows.
"""

from __future__ import annotations

import re

import torch
from torch import Tensor, nn

import weightspace as ws

FAMILY = "small-vgg"
_CONVS = (0, 3, 8, 11, 16, 19)
_NAME = re.compile(r"(features\.\d+|classifier)\.(weight|bias|running_mean|running_var|num_batches_tracked)$")


class _VGG(nn.Module):
    def __init__(self, weights: list[tuple[int, ...]], classes: int, features: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for i, (out, incoming, kernel, _) in enumerate(weights):
            layers += [nn.Conv2d(incoming, out, kernel, padding=kernel // 2), nn.BatchNorm2d(out), nn.ELU()]
            if i % 2:
                layers += [nn.MaxPool2d(2), nn.Dropout(0.4)]
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Linear(features, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.features(x).flatten(1))


def build(signature: ws.Signature) -> ws.Skeleton | None:
    """Recognise the net; input side solved from the flattened map (32 for CIFAR-10 and GTSRB)."""
    shapes = signature.shapes
    if not all(_NAME.match(name) for name in shapes):
        return None
    weights = [shapes.get(f"features.{i}.weight", ()) for i in _CONVS]
    head = shapes.get("classifier.weight", ())
    if any(len(w) != 4 for w in weights) or len(head) != 2 or weights[-1][0] == 0:
        return None
    side = next((s for s in range(1, 33) if s * s * weights[-1][0] == head[1]), 0)
    if not side:
        return None
    with torch.device("meta"):
        module = _VGG(weights, head[0], head[1])
    for name, child in module.named_modules():
        if isinstance(child, nn.BatchNorm2d) and f"{name}.num_batches_tracked" not in shapes:
            child.register_buffer("num_batches_tracked", None)
    inputs = (torch.randn(2, weights[0][1], 8 * side, 8 * side),)
    return ws.Skeleton(module.eval(), inputs, f"small VGG, {head[0]} classes")
