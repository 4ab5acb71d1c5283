"""ResNets for small images: a 3x3 stem without pooling, then three or four stages of residual blocks.

Covers the option-A nets of He et al. 2016 ("Deep residual learning", section 4.2), whose shortcut drops
every second pixel and pads the missing channels with zeros on both sides, the option-B nets whose
shortcut is a strided 1x1 convolution (under the name ``shortcut`` or ``downsample``), basic and bottleneck
blocks, and nets without a classifier (one-channel subnets that are grafted into a larger net).

Read from the shapes: depth, widths, kind of block and of shortcut. Assumed: stride 2 at the start of every
stage but the first, ReLU, global average pooling.
"""

from __future__ import annotations

import re

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import weightspace as ws

FAMILY = "resnet-cifar"
_BLOCK = re.compile(r"layer(\d+)\.(\d+)\.(conv[123]|bn[123]|shortcut|downsample)\.")
_CONVS = {"conv1": 1, "conv2": 2, "conv3": 3}


class _Block(nn.Module):
    def __init__(self, widths: list[int], kernels: list[int], stride: int, shortcut: str | None) -> None:
        super().__init__()
        self.depth = len(kernels)
        self.stride = stride
        self.projection = shortcut
        strided = 0 if self.depth == 2 else 1
        for i, kernel in enumerate(kernels):
            conv = nn.Conv2d(
                widths[i],
                widths[i + 1],
                kernel,
                stride=stride if i == strided else 1,
                padding=kernel // 2,
                bias=False,
            )
            self.add_module(f"conv{i + 1}", conv)
            self.add_module(f"bn{i + 1}", nn.BatchNorm2d(widths[i + 1]))
        self.pad = (widths[-1] - widths[0]) // 2
        if shortcut is not None:
            project = nn.Conv2d(widths[0], widths[-1], 1, stride=stride, bias=False)
            self.add_module(shortcut, nn.Sequential(project, nn.BatchNorm2d(widths[-1])))

    def forward(self, x: Tensor) -> Tensor:
        y = x
        for i in range(1, self.depth + 1):
            y = self.get_submodule(f"bn{i}")(self.get_submodule(f"conv{i}")(y))
            if i < self.depth:
                y = F.relu(y)
        if self.projection is not None:
            x = self.get_submodule(self.projection)(x)
        elif self.stride != 1 or self.pad:
            x = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.pad, self.pad))
        return F.relu(y + x)


class _ResNet(nn.Module):
    def __init__(
        self, stem: tuple[int, ...], stages: list[list[_Block]], head: str | None, classes: int
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(stem[1], stem[0], 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(stem[0])
        self.stages = len(stages)
        for i, blocks in enumerate(stages):
            self.add_module(f"layer{i + 1}", nn.Sequential(*blocks))
        self.head = head
        if head is not None:
            width = stages[-1][-1].get_submodule(f"bn{stages[-1][-1].depth}").weight.shape[0]
            self.add_module(head, nn.Linear(width, classes))

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        for i in range(1, self.stages + 1):
            x = self.get_submodule(f"layer{i}")(x)
        x = x.mean(dim=(2, 3))
        return x if self.head is None else self.get_submodule(self.head)(x)


def build(signature: ws.Signature) -> ws.Skeleton | None:
    """Recognise a CIFAR-style ResNet; inputs ``(2, channels, 16, 16)``."""
    shapes = signature.shapes
    stem = shapes.get("conv1.weight", ())
    if len(stem) != 4 or stem[2:] != (3, 3) or "bn1.running_mean" not in shapes:
        return None
    depths: dict[int, int] = {}
    for name in shapes:
        if match := _BLOCK.match(name):
            stage, block = int(match[1]), int(match[2])
            depths[stage] = max(depths.get(stage, 0), block + 1)
    if sorted(depths) not in ([1, 2, 3], [1, 2, 3, 4]):
        return None
    heads = [name for name in ("linear", "fc", "classifier") if f"{name}.weight" in shapes]
    if len(heads) > 1:
        return None

    width, convolutions, kinds = stem[0], 1, set()
    with torch.device("meta"):
        stages: list[list[_Block]] = []
        for stage in sorted(depths):
            blocks = []
            for block in range(depths[stage]):
                prefix = f"layer{stage}.{block}."
                weights = [shapes[n] for c in _CONVS if (n := f"{prefix}{c}.weight") in shapes]
                if len(weights) not in (2, 3) or any(len(w) != 4 or w[2] != w[3] for w in weights):
                    return None
                widths = [width, *(w[0] for w in weights)]
                stride = 2 if stage > 1 and block == 0 else 1
                shortcuts = [s for s in ("shortcut", "downsample") if f"{prefix}{s}.0.weight" in shapes]
                shortcut = shortcuts[0] if shortcuts else None
                # Option A: the original pads planes // 4 on each side, which must make up the difference.
                padded = widths[0] + 2 * (widths[-1] // 4)
                if shortcut is None and widths[-1] not in (widths[0], padded):
                    return None
                kinds.add("B" if shortcut else "A" if stride == 2 else "")
                blocks.append(_Block(widths, [w[2] for w in weights], stride, shortcut))
                width, convolutions = widths[-1], convolutions + len(weights)
            stages.append(blocks)
        classes = shapes[f"{heads[0]}.weight"][0] if heads else 0
        module = _ResNet(stem, stages, heads[0] if heads else None, classes)
    _match_counters(module, signature)
    option = "/".join(sorted(k for k in kinds if k))
    name = f"ResNet-{convolutions + 1} for small images, option {option}" + (
        "" if heads else ", no classifier"
    )
    # Twice the usual spread: one-channel subnets hardly answer to less.
    return ws.Skeleton(module.eval(), (2 * torch.randn(2, stem[1], 16, 16),), name)


def _match_counters(module: nn.Module, signature: ws.Signature) -> None:
    """Drop the batch counters of norms whose checkpoint predates them."""
    for name, child in module.named_modules():
        if isinstance(child, nn.BatchNorm2d) and f"{name}.num_batches_tracked" not in signature.shapes:
            child.register_buffer("num_batches_tracked", None)
