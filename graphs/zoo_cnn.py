"""Networks of the Small CNN Zoo (Unterthiner et al. 2020), tensors named and laid out as by Keras.

Three 3x3 convolutions of stride 2 without padding, global average pooling, one dense layer. Kernels are
(height, width, in, out). Assumed: ReLU (the zoo also has tanh; pointwise either way).
"""

from __future__ import annotations

import itertools
import re

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import weightspace as ws

FAMILY = "zoo-cnn"
_NAME = re.compile(r"(?P<scope>.*/)?(?P<layer>conv2d(_\d+)?|dense(_\d+)?)/(?P<kind>kernel|bias)(:0)?$")


class _CNN(nn.Module):
    def __init__(self, kernels: list[tuple[int, ...]]) -> None:
        super().__init__()
        self.kernels = nn.ParameterList([nn.Parameter(torch.empty(k)) for k in kernels])
        self.biases = nn.ParameterList([nn.Parameter(torch.empty(k[-1])) for k in kernels])

    def forward(self, x: Tensor) -> Tensor:
        last = len(self.kernels) - 1
        for i in range(last):
            x = F.relu(F.conv2d(x, self.kernels[i].permute(3, 2, 0, 1), self.biases[i], stride=2))
        return x.mean(dim=(2, 3)) @ self.kernels[last] + self.biases[last]


def build(signature: ws.Signature) -> ws.Skeleton | None:
    """Recognise convolutions and one dense layer that takes as many features as there are channels."""
    shapes = signature.shapes
    layers: dict[str, dict[str, str]] = {}
    for name in shapes:
        if not (match := _NAME.match(name)):
            return None
        layers.setdefault(match["layer"], {})[match["kind"]] = name
    if any(set(kinds) != {"kernel", "bias"} for kinds in layers.values()):
        return None

    def number(layer: str) -> int:
        return int(layer.rsplit("_", 1)[1]) if "_" in layer else 0

    convs = sorted((layer for layer in layers if layer.startswith("conv")), key=number)
    dense = [layer for layer in layers if layer.startswith("dense")]
    if len(convs) < 2 or len(dense) != 1:
        return None
    order = [*convs, dense[0]]
    kernels = [shapes[layers[layer]["kernel"]] for layer in order]
    if any(len(k) != 4 or k[:2] != (3, 3) for k in kernels[:-1]) or len(kernels[-1]) != 2:
        return None
    if any(a[-1] != b[-2] for a, b in itertools.pairwise(kernels)):
        return None
    with torch.device("meta"):
        module = _CNN(kernels)
    rename = {f"kernels.{i}": layers[layer]["kernel"] for i, layer in enumerate(order)}
    rename |= {f"biases.{i}": layers[layer]["bias"] for i, layer in enumerate(order)}
    side = 2 ** (len(convs) + 1) + 4
    name = f"Small CNN Zoo, {len(convs)} convolutions"
    return ws.Skeleton(module.eval(), (torch.randn(2, kernels[0][2], side, side),), name, rename=rename)
