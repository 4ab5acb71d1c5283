"""Honk keyword-spotting ResNets (Tang & Lin 2018), also slimmed to fewer channels inside each block.

A first 3x3 convolution with ReLU and average pooling, then pairs of 3x3 convolutions with ReLU whose second
member is added to the running sum, each followed by batch norm without affine parameters and, where the
checkpoint has one, a per-channel scale; then global average pooling and a linear layer. Slimmed files also
record which channels of the wide parent were kept; these lists take no part in the function. Assumed:
pooling of 4x3 (res8; it touches no channel), no dilation, scale after batch norm.
"""

from __future__ import annotations

import re

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import weightspace as ws

FAMILY = "honk-res"
_NAME = re.compile(
    r"(conv\d+\.weight|bn\d+\.(running_mean|running_var|num_batches_tracked)|output\.(weight|bias)"
    r"|scale\d+\.(scale|drop_indices|keep_indices))$"
)


class _Scale(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.empty(width))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale[:, None, None]


class _Res(nn.Module):
    def __init__(self, convs: list[tuple[int, ...]], scaled: set[int], classes: int) -> None:
        super().__init__()
        self.depth = len(convs)
        self.scaled = scaled
        for i, (out, incoming, kernel, _) in enumerate(convs):
            self.add_module(f"conv{i}", nn.Conv2d(incoming, out, kernel, padding=kernel // 2, bias=False))
            if i:
                self.add_module(f"bn{i}", nn.BatchNorm2d(out, affine=False))
            if i in scaled:
                self.add_module(f"scale{i}", _Scale(out))
        self.output = nn.Linear(convs[-1][0], classes)

    def forward(self, x: Tensor) -> Tensor:
        """``x``: (batch, frames, coefficients). Returns class logits."""
        x = F.avg_pool2d(F.relu(self.conv0(x.unsqueeze(1))), (4, 3))
        total = x
        for i in range(1, self.depth):
            x = F.relu(self.get_submodule(f"conv{i}")(x))
            if i % 2 == 0:
                x = total = x + total
            x = self.get_submodule(f"bn{i}")(x)
            if i in self.scaled:
                x = self.get_submodule(f"scale{i}")(x)
        return self.output(x.mean(dim=(2, 3)))


def build(signature: ws.Signature) -> ws.Skeleton | None:
    """Recognise a res8-like net of an even number of inner convolutions; inputs ``(2, 20, 15)``."""
    shapes = signature.shapes
    if not all(_NAME.match(name) for name in shapes) or "bn1.running_mean" not in shapes:
        return None
    depth = sum(name.startswith("conv") for name in shapes)
    convs = [shapes.get(f"conv{i}.weight", ()) for i in range(depth)]
    if depth % 2 == 0 or any(len(c) != 4 for c in convs) or len(shapes.get("output.weight", ())) != 2:
        return None
    scaled = {i for i in range(1, depth) if f"scale{i}.scale" in shapes}
    with torch.device("meta"):
        module = _Res(convs, scaled, shapes["output.weight"][0])
    for name, child in module.named_modules():
        if isinstance(child, nn.BatchNorm2d) and f"{name}.num_batches_tracked" not in shapes:
            child.register_buffer("num_batches_tracked", None)
    unused = tuple(name for name in shapes if name.endswith("_indices"))
    slim = ", slimmed" if convs[1][0] != convs[0][0] else ""
    name = f"Honk res{depth + 1}, {convs[0][0]} maps{slim}"
    return ws.Skeleton(module.eval(), (torch.randn(2, 20, 15),), name, unused=unused)
