"""The small certified CIFAR-10 nets of Wong & Kolter 2018 used in VNN-COMP: strided 4x4 convolutions.

A Sequential of convolutions (kernel 4, stride 2, padding 1) and linear layers, ReLU between all of them.
"""

from __future__ import annotations

import re

import torch
from torch import nn

import weightspace as ws

FAMILY = "cifar-kw"
_NAME = re.compile(r"(?P<prefix>(?:.*\.)?)(?P<index>\d+)\.(weight|bias)$")


def build(signature: ws.Signature) -> ws.Skeleton | None:
    """Recognise two or more 4x4 convolutions and linear layers with a flattening between them."""
    shapes = signature.shapes
    matches = [_NAME.match(name) for name in shapes]
    if not shapes or not all(matches) or len({m["prefix"] for m in matches if m}) != 1:
        return None
    prefix = next(m["prefix"] for m in matches if m)
    indices = sorted({int(m["index"]) for m in matches if m})
    if indices[0] != 0 or indices[-1] > 64:
        return None
    weights = {i: shapes.get(f"{prefix}{i}.weight", ()) for i in indices}
    convs = [i for i in indices if len(weights[i]) == 4]
    linears = [i for i in indices if len(weights[i]) == 2]
    if len(convs) < 2 or not linears or convs + linears != indices:
        return None
    # conv, ReLU, conv, ReLU, flatten, linear, ReLU, linear
    if convs != list(range(0, 2 * len(convs), 2)) or linears[0] != 2 * len(convs) + 1:
        return None
    if linears != list(range(linears[0], linears[0] + 2 * len(linears), 2)):
        return None
    if any(weights[i][2:] != (4, 4) for i in convs):
        return None
    channels, features = weights[convs[-1]][0], weights[linears[0]][1]
    side = next((s for s in range(1, 65) if s * s * channels == features), 0)
    if not side:
        return None
    layers: list[nn.Module] = []
    with torch.device("meta"):
        for i in convs:
            layers += [nn.Conv2d(weights[i][1], weights[i][0], 4, stride=2, padding=1), nn.ReLU()]
        layers.append(nn.Flatten())
        for i in linears:
            layers += [nn.Linear(weights[i][1], weights[i][0]), nn.ReLU()]
        module = nn.Sequential(*layers[:-1])
    rename = {key: prefix + key for key in module.state_dict()} if prefix else {}
    side *= 2 ** len(convs)
    inputs = (torch.randn(2, weights[0][1], side, side),)
    return ws.Skeleton(module.eval(), inputs, "Certified CIFAR net (Wong & Kolter)", rename=rename)
