"""The DeepID face net (Sun et al. 2014) of the CSAW backdoor challenge, weights only, Keras layouts.

Three convolutions with max pooling; two linear layers read the third pooled map and the fourth convolution
above it; their sum passes ReLU into the classifier. Kernels are (height, width, in, out) and maps are
flattened channels-last. Assumed: ReLU after each convolution, no padding, softmax at the end.
"""

from __future__ import annotations

import re

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import weightspace as ws

FAMILY = "deepid"
_LAYERS = ("conv_1", "conv_2", "conv_3", "conv_4", "fc_1", "fc_2", "output")
_NAME = re.compile(r"(?P<layer>conv_[1-4]|fc_[12]|output)/(?:.*/)?(?P<kind>kernel|bias)(:0)?$")


class _DeepID(nn.Module):
    def __init__(self, kernels: dict[str, tuple[int, ...]]) -> None:
        super().__init__()
        self.kernel = nn.ParameterDict({k: nn.Parameter(torch.empty(s)) for k, s in kernels.items()})
        self.bias = nn.ParameterDict({k: nn.Parameter(torch.empty(s[-1])) for k, s in kernels.items()})

    def conv(self, name: str, x: Tensor) -> Tensor:
        return F.relu(F.conv2d(x, self.kernel[name].permute(3, 2, 0, 1), self.bias[name]))

    def dense(self, name: str, x: Tensor) -> Tensor:
        return x @ self.kernel[name] + self.bias[name]

    def forward(self, x: Tensor) -> Tensor:
        """``x``: (batch, channels, height, width). Returns class probabilities."""
        for name in ("conv_1", "conv_2", "conv_3"):
            x = F.max_pool2d(self.conv(name, x), 2)
        upper = self.conv("conv_4", x)
        first = self.dense("fc_1", x.permute(0, 2, 3, 1).flatten(1))
        second = self.dense("fc_2", upper.permute(0, 2, 3, 1).flatten(1))
        return self.dense("output", F.relu(first + second)).softmax(dim=1)


def build(signature: ws.Signature) -> ws.Skeleton | None:
    """Recognise the net; inputs ``(2, 3, 55, 47)``, the size of the challenge's faces."""
    shapes = signature.shapes
    names: dict[tuple[str, str], str] = {}
    for name in shapes:
        if not (match := _NAME.match(name)):
            return None
        names[match["layer"], match["kind"]] = name
    if set(names) != {(layer, kind) for layer in _LAYERS for kind in ("kernel", "bias")}:
        return None
    kernels = {layer: shapes[names[layer, "kernel"]] for layer in _LAYERS}
    if any(len(kernels[layer]) != (4 if layer.startswith("conv") else 2) for layer in _LAYERS):
        return None
    height, width = 55, 47
    for layer in ("conv_1", "conv_2", "conv_3"):
        height = (height - kernels[layer][0] + 1) // 2
        width = (width - kernels[layer][1] + 1) // 2
    upper = (height - kernels["conv_4"][0] + 1) * (width - kernels["conv_4"][1] + 1)
    if kernels["fc_1"][0] != height * width * kernels["conv_3"][3]:
        return None
    if kernels["fc_2"][0] != upper * kernels["conv_4"][3]:
        return None
    with torch.device("meta"):
        module = _DeepID(kernels)
    rename = {f"{kind}.{layer}": name for (layer, kind), name in names.items()}
    inputs = (torch.rand(2, kernels["conv_1"][2], 55, 47),)
    return ws.Skeleton(module.eval(), inputs, "DeepID face net", rename=rename)
