"""ShuffleNetV2 with the names of torchvision (Ma et al. 2018), any width.

Blocks split the channels in two halves, transform one, concatenate, and interleave the halves ("shuffle").
Stage depths are read from the names; each stage's first block has stride 2 and transforms both halves.
"""

from __future__ import annotations

import re

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import weightspace as ws

FAMILY = "shufflenet-v2"
PRIORITY = 60
_BLOCK = re.compile(r"stage([234])\.(\d+)\.branch2\.0\.weight$")


class _Block(nn.Module):
    def __init__(self, width: int, half: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        incoming = width if stride > 1 else half
        if stride > 1:
            self.branch1 = nn.Sequential(*_depthwise(incoming, stride), *_pointwise(incoming, half))
        self.branch2 = nn.Sequential(
            *_pointwise(incoming, half), *_depthwise(half, stride), *_pointwise(half, half)
        )

    def forward(self, x: Tensor) -> Tensor:
        if self.stride > 1:
            halves = self.branch1(x), self.branch2(x)
        else:
            kept, changed = x.chunk(2, dim=1)
            halves = kept, self.branch2(changed)
        joined = torch.cat(halves, dim=1)
        batch, channels, height, width = joined.shape
        shuffled = joined.reshape(batch, 2, channels // 2, height, width).transpose(1, 2)
        return shuffled.reshape(batch, channels, height, width)


def _pointwise(width: int, out: int) -> list[nn.Module]:
    return [nn.Conv2d(width, out, 1, bias=False), nn.BatchNorm2d(out), nn.ReLU()]


def _depthwise(width: int, stride: int) -> list[nn.Module]:
    conv = nn.Conv2d(width, width, 3, stride=stride, padding=1, groups=width, bias=False)
    return [conv, nn.BatchNorm2d(width)]


class _ShuffleNet(nn.Module):
    def __init__(
        self, stem: tuple[int, ...], stages: list[list[_Block]], end: tuple[int, ...], head: tuple[int, ...]
    ) -> None:
        super().__init__()
        conv = nn.Conv2d(stem[1], stem[0], 3, stride=2, padding=1, bias=False)
        self.conv1 = nn.Sequential(conv, nn.BatchNorm2d(stem[0]), nn.ReLU())
        self.stage2, self.stage3, self.stage4 = (nn.Sequential(*blocks) for blocks in stages)
        self.conv5 = nn.Sequential(*_pointwise(end[1], end[0]))
        self.fc = nn.Linear(head[1], head[0])

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(self.conv1(x), 3, stride=2, padding=1)
        x = self.conv5(self.stage4(self.stage3(self.stage2(x))))
        return self.fc(x.mean(dim=(2, 3)))


def build(signature: ws.Signature) -> ws.Skeleton | None:
    """Recognise ShuffleNetV2; inputs ``(2, channels, 64, 64)``."""
    shapes = signature.shapes
    stem, end = shapes.get("conv1.0.weight", ()), shapes.get("conv5.0.weight", ())
    head = shapes.get("fc.weight", ())
    depths = {2: 0, 3: 0, 4: 0}
    for name in shapes:
        if match := _BLOCK.match(name):
            depths[int(match[1])] += 1
    if len(stem) != 4 or len(end) != 4 or len(head) != 2 or not all(depths.values()) or not stem[0]:
        return None
    width = stem[0]
    with torch.device("meta"):
        stages = []
        for stage, depth in depths.items():
            first = shapes.get(f"stage{stage}.0.branch2.0.weight", ())
            if len(first) != 4 or not first[0]:
                return None
            half = first[0]
            rest = [_Block(2 * half, half, 1) for _ in range(depth - 1)]
            stages.append([_Block(width, half, 2), *rest])
            width = 2 * half
        module = _ShuffleNet(stem, stages, end, head)
    for name, child in module.named_modules():
        if isinstance(child, nn.BatchNorm2d) and f"{name}.num_batches_tracked" not in shapes:
            child.register_buffer("num_batches_tracked", None)
    name = f"ShuffleNetV2, {2 * shapes['stage2.0.branch2.0.weight'][0]} channels first"
    return ws.Skeleton(module.eval(), (torch.randn(2, stem[1], 64, 64),), name)
