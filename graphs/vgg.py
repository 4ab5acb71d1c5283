"""VGG nets (Simonyan & Zisserman 2015) of any width, with or without batch norm.

Tensors live under ``features`` and ``classifier``. Covers torchvision's VGG-11 to 19, the CIFAR versions
with a smaller classifier, and the narrow subnets grafted into them by subnet replacement attacks (Qi et al.
2022). The indices inside ``features`` tell where pooling layers sit; a last pooling layer is assumed. The
map that the classifier flattens is brought to the size that its weights ask for by adaptive average
pooling, as torchvision does. Assumed: ReLU after every convolution and between linear layers, and, as in
those subnets, after a classifier with a single output.
"""

from __future__ import annotations

import math
import re

import torch
from torch import Tensor, nn

import weightspace as ws

FAMILY = "vgg"
_NAME = re.compile(
    r"(features\.\d+|classifier(\.\d+)?)\.(weight|bias|running_mean|running_var|num_batches_tracked)$"
)


class _VGG(nn.Module):
    def __init__(self, features: nn.Sequential, side: int, classifier: nn.Module) -> None:
        super().__init__()
        self.features = features
        self.avgpool = nn.AdaptiveAvgPool2d(side)
        self.classifier = classifier

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.avgpool(self.features(x)).flatten(1))


def build(signature: ws.Signature) -> ws.Skeleton | None:
    """Recognise a VGG; inputs ``(2, channels, 32, 32)``."""
    shapes = signature.shapes
    if not shapes or not all(_NAME.match(name) for name in shapes):
        return None
    indices = sorted({int(name.split(".")[1]) for name in shapes if name.startswith("features.")})
    convs = [i for i in indices if len(shapes.get(f"features.{i}.weight", ())) == 4]
    if len(convs) < 4 or convs[0] != 0 or any(shapes[f"features.{i}.weight"][2:] != (3, 3) for i in convs):
        return None
    bias = "features.0.bias" in shapes
    with torch.device("meta"):
        layers: list[nn.Module] = []
        for i, following in zip(convs, [*convs[1:], None], strict=True):
            out, incoming, kernel, _ = shapes[f"features.{i}.weight"]
            layers.append(nn.Conv2d(incoming, out, kernel, padding=1, bias=bias))
            if f"features.{i + 1}.running_mean" in shapes:
                layers.append(nn.BatchNorm2d(out))
            layers.append(nn.ReLU())
            if following is None or following == len(layers) + 1:
                layers.append(nn.MaxPool2d(2))
            elif following != len(layers):
                return None
        channels = shapes[f"features.{convs[-1]}.weight"][0]
        classifier = _classifier(shapes)
        if classifier is None:
            return None
        first = classifier[0] if isinstance(classifier, nn.Sequential) else classifier
        side = math.isqrt(first.in_features // channels) if channels else 0
        if side < 1 or side * side * channels != first.in_features:
            return None
        module = _VGG(nn.Sequential(*layers), side, classifier)
    for name, child in module.named_modules():
        if isinstance(child, nn.BatchNorm2d) and f"{name}.num_batches_tracked" not in shapes:
            child.register_buffer("num_batches_tracked", None)
    linears = 1 if isinstance(classifier, nn.Linear) else sum(isinstance(c, nn.Linear) for c in classifier)
    norm = " with batch norm" if any(isinstance(layer, nn.BatchNorm2d) for layer in layers) else ""
    inputs = (torch.randn(2, shapes["features.0.weight"][1], 32, 32),)
    name = f"VGG-{len(convs) + linears}{norm}, {shapes['features.0.weight'][0]} channels first"
    return ws.Skeleton(module.eval(), inputs, name)


def _classifier(shapes: dict[str, tuple[int, ...]]) -> nn.Linear | nn.Sequential | None:
    """Linear layers at their indices, ReLU right after each, nothing (dropout) in the other places."""
    if "classifier.weight" in shapes:
        weight = shapes["classifier.weight"]
        return nn.Linear(weight[1], weight[0]) if len(weight) == 2 else None
    indices = sorted({int(name.split(".")[1]) for name in shapes if name.startswith("classifier.")})
    if not indices or indices[-1] > 16:
        return None
    layers: list[nn.Module] = [nn.Identity() for _ in range(indices[-1] + 1)]
    for i in indices:
        weight = shapes.get(f"classifier.{i}.weight", ())
        if len(weight) != 2:
            return None
        layers[i] = nn.Linear(weight[1], weight[0])
        if i + 1 < len(layers) and i + 1 not in indices:
            layers[i + 1] = nn.ReLU()
    if layers[-1].out_features == 1:
        layers.append(nn.ReLU())
    # Leading dropout must not hide the first linear layer from the caller.
    return nn.Sequential(*layers) if isinstance(layers[0], nn.Linear) else None
