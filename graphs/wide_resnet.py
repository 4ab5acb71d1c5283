"""Wide ResNets for CIFAR (Zagoruyko & Komodakis 2016): pre-activation basic blocks, three stages.

Where a block changes the width, batch norm and ReLU come before the shortcut's 1x1 convolution as well;
elsewhere the shortcut carries the raw sum. Names of the common PyTorch version, ``block1.layer.0.bn1`` ....
Assumed: stride 2 at the start of the second and third stage, ReLU, global average pooling.
"""

from __future__ import annotations

import re

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import weightspace as ws

FAMILY = "wide-resnet"
_BLOCK = re.compile(r"block([123])\.layer\.(\d+)\.conv1\.weight$")


class _Block(nn.Module):
    def __init__(self, incoming: int, first: int, out: int, stride: int, project: bool) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(incoming)
        self.conv1 = nn.Conv2d(incoming, first, 3, stride=stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(first)
        self.conv2 = nn.Conv2d(first, out, 3, padding=1, bias=False)
        self.convShortcut = nn.Conv2d(incoming, out, 1, stride=stride, bias=False) if project else None

    def forward(self, x: Tensor) -> Tensor:
        active = F.relu(self.bn1(x))
        y = self.conv2(F.relu(self.bn2(self.conv1(active))))
        return y + (x if self.convShortcut is None else self.convShortcut(active))


class _Stage(nn.Module):
    def __init__(self, blocks: list[_Block]) -> None:
        super().__init__()
        self.layer = nn.Sequential(*blocks)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


class _WideResNet(nn.Module):
    def __init__(self, stem: tuple[int, ...], stages: list[_Stage], head: tuple[int, ...]) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(stem[1], stem[0], 3, padding=1, bias=False)
        self.block1, self.block2, self.block3 = stages
        self.bn1 = nn.BatchNorm2d(head[1])
        self.fc = nn.Linear(head[1], head[0])

    def forward(self, x: Tensor) -> Tensor:
        x = self.block3(self.block2(self.block1(self.conv1(x))))
        return self.fc(F.relu(self.bn1(x)).mean(dim=(2, 3)))


def build(signature: ws.Signature) -> ws.Skeleton | None:
    """Recognise a WRN; inputs ``(2, channels, 16, 16)``."""
    shapes = signature.shapes
    stem, head = shapes.get("conv1.weight", ()), shapes.get("fc.weight", ())
    if len(stem) != 4 or len(head) != 2:
        return None
    depths = {1: 0, 2: 0, 3: 0}
    for name in shapes:
        if match := _BLOCK.match(name):
            depths[int(match[1])] += 1
    if not all(depths.values()):
        return None
    width = stem[0]
    with torch.device("meta"):
        stages = []
        for stage, depth in depths.items():
            blocks = []
            for i in range(depth):
                prefix = f"block{stage}.layer.{i}."
                first, second = (shapes.get(f"{prefix}conv{j}.weight", ()) for j in (1, 2))
                if len(first) != 4 or len(second) != 4:
                    return None
                project = f"{prefix}convShortcut.weight" in shapes
                if not project and width != second[0]:
                    return None
                blocks.append(_Block(width, first[0], second[0], 2 if stage > 1 and i == 0 else 1, project))
                width = second[0]
            stages.append(_Stage(blocks))
        module = _WideResNet(stem, stages, head)
    for name, child in module.named_modules():
        if isinstance(child, nn.BatchNorm2d) and f"{name}.num_batches_tracked" not in shapes:
            child.register_buffer("num_batches_tracked", None)
    factor = shapes["block1.layer.0.conv1.weight"][0] // stem[0] if stem[0] else 0
    name = f"WRN-{2 * sum(depths.values()) + 4}-{factor}"
    return ws.Skeleton(module.eval(), (torch.randn(2, stem[1], 16, 16),), name)
