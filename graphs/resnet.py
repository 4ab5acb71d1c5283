"""ImageNet ResNets with the names of torchvision: 18 to 152, wide ones and ResNeXt.

He et al. 2016, Zagoruyko & Komodakis 2016, Xie et al. 2017. Depth, widths and the number of groups are
read from the shapes. Assumed: 7x7 stem of stride 2 and max pooling, stride on the 3x3 convolution
("v1.5"), ReLU, global average pooling; none of these touches a channel axis.
"""

from __future__ import annotations

import re

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import weightspace as ws

FAMILY = "resnet"
PRIORITY = 60
_BLOCK = re.compile(r"layer([1-4])\.(\d+)\.conv1\.weight$")


class _Block(nn.Module):
    def __init__(self, width: int, weights: list[tuple[int, ...]], stride: int, downsample: bool) -> None:
        super().__init__()
        self.depth = len(weights)
        incoming = width
        for i, (out, per_group, kernel, _) in enumerate(weights):
            conv = nn.Conv2d(
                incoming,
                out,
                kernel,
                stride=stride if i == self.depth - 2 else 1,
                padding=kernel // 2,
                groups=incoming // per_group,
                bias=False,
            )
            self.add_module(f"conv{i + 1}", conv)
            self.add_module(f"bn{i + 1}", nn.BatchNorm2d(out))
            incoming = out
        self.downsample: nn.Module | None = None
        if downsample:
            project = nn.Conv2d(width, incoming, 1, stride=stride, bias=False)
            self.downsample = nn.Sequential(project, nn.BatchNorm2d(incoming))

    def forward(self, x: Tensor) -> Tensor:
        y = x
        for i in range(1, self.depth + 1):
            y = self.get_submodule(f"bn{i}")(self.get_submodule(f"conv{i}")(y))
            if i < self.depth:
                y = F.relu(y)
        return F.relu(y + (x if self.downsample is None else self.downsample(x)))


class _ResNet(nn.Module):
    def __init__(
        self, stem: tuple[int, ...], stages: list[list[_Block]], head: tuple[int, ...] | None
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(stem[1], stem[0], stem[2], stride=2, padding=stem[2] // 2, bias=False)
        self.bn1 = nn.BatchNorm2d(stem[0])
        for i, blocks in enumerate(stages):
            self.add_module(f"layer{i + 1}", nn.Sequential(*blocks))
        self.fc: nn.Module | None = None if head is None else nn.Linear(head[1], head[0])

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.bn1(self.conv1(x))), 3, stride=2, padding=1)
        for i in range(1, 5):
            x = self.get_submodule(f"layer{i}")(x)
        x = x.mean(dim=(2, 3))
        return x if self.fc is None else self.fc(x)


def build(signature: ws.Signature) -> ws.Skeleton | None:
    """Recognise a torchvision ResNet; inputs ``(2, channels, 32, 32)``."""
    shapes = signature.shapes
    stem = shapes.get("conv1.weight", ())
    if len(stem) != 4 or stem[2:] != (7, 7):
        return None
    depths = dict.fromkeys(range(1, 5), 0)
    for name in shapes:
        if match := _BLOCK.match(name):
            depths[int(match[1])] += 1
    if not all(depths.values()):
        return None
    head = shapes.get("fc.weight")
    if head is not None and len(head) != 2:
        return None
    width, layers, groups = stem[0], 2, 1
    with torch.device("meta"):
        stages = []
        for stage, depth in depths.items():
            blocks = []
            for block in range(depth):
                prefix = f"layer{stage}.{block}."
                weights = [shapes[n] for i in "123" if (n := f"{prefix}conv{i}.weight") in shapes]
                if len(weights) not in (2, 3) or any(len(w) != 4 for w in weights):
                    return None
                incoming = width
                for weight in weights:
                    if weight[1] == 0 or incoming % weight[1] or weight[0] % (incoming // weight[1]):
                        return None
                    groups = max(groups, incoming // weight[1])
                    incoming = weight[0]
                downsample = f"{prefix}downsample.0.weight" in shapes
                if not downsample and incoming != width:
                    return None
                blocks.append(_Block(width, weights, 2 if stage > 1 and block == 0 else 1, downsample))
                width, layers = incoming, layers + len(weights)
            stages.append(blocks)
        module = _ResNet(stem, stages, head)
    for name, child in module.named_modules():
        if isinstance(child, nn.BatchNorm2d) and f"{name}.num_batches_tracked" not in shapes:
            child.register_buffer("num_batches_tracked", None)
    kind = f"ResNeXt-{layers} ({groups} groups)" if groups > 1 else f"ResNet-{layers}"
    return ws.Skeleton(module.eval(), (torch.randn(2, stem[1], 32, 32),), kind)
