"""GoogLeNet with batch norm and the names of torchvision (Szegedy et al. 2015).

Inception modules concatenate four branches. Auxiliary classifiers, where the file has them, are run as
further outputs: they read inner channels and would break unseen if those were permuted without them.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import weightspace as ws

FAMILY = "googlenet"
PRIORITY = 60
_MODULES = ("3a", "3b", "4a", "4b", "4c", "4d", "4e", "5a", "5b")
_POOLED = {"3b": 3, "4e": 2}  # max pooling of this size after the module
_AUXILIARY = {"4a": "aux1", "4d": "aux2"}


class _Conv(nn.Module):
    def __init__(self, weight: tuple[int, ...], stride: int = 1) -> None:
        super().__init__()
        out, width, kernel, _ = weight
        self.conv = nn.Conv2d(width, out, kernel, stride=stride, padding=kernel // 2, bias=False)
        self.bn = nn.BatchNorm2d(out, eps=0.001)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)))


class _Inception(nn.Module):
    def __init__(self, weights: list[tuple[int, ...]]) -> None:
        super().__init__()
        self.branch1 = _Conv(weights[0])
        self.branch2 = nn.Sequential(_Conv(weights[1]), _Conv(weights[2]))
        self.branch3 = nn.Sequential(_Conv(weights[3]), _Conv(weights[4]))
        self.branch4 = nn.Sequential(nn.MaxPool2d(3, stride=1, padding=1, ceil_mode=True), _Conv(weights[5]))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat((self.branch1(x), self.branch2(x), self.branch3(x), self.branch4(x)), dim=1)


class _Auxiliary(nn.Module):
    def __init__(self, conv: tuple[int, ...], fc1: tuple[int, ...], fc2: tuple[int, ...]) -> None:
        super().__init__()
        self.conv = _Conv(conv)
        self.fc1, self.fc2 = nn.Linear(fc1[1], fc1[0]), nn.Linear(fc2[1], fc2[0])

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(F.adaptive_avg_pool2d(x, (4, 4))).flatten(1)
        return self.fc2(F.relu(self.fc1(x)))


class _GoogLeNet(nn.Module):
    def __init__(
        self,
        stem: list[tuple[int, ...]],
        modules: list[list[tuple[int, ...]]],
        auxiliary: dict[str, list[tuple[int, ...]]],
        head: tuple[int, ...],
    ) -> None:
        super().__init__()
        self.conv1, self.conv2, self.conv3 = _Conv(stem[0], 2), _Conv(stem[1]), _Conv(stem[2])
        for name, weights in zip(_MODULES, modules, strict=True):
            self.add_module(f"inception{name}", _Inception(weights))
        self.auxiliary = tuple(auxiliary)
        for name, (conv, fc1, fc2) in auxiliary.items():
            self.add_module(name, _Auxiliary(conv, fc1, fc2))
        self.fc = nn.Linear(head[1], head[0])

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, ...]:
        x = F.max_pool2d(self.conv1(x), 3, stride=2, ceil_mode=True)
        x = F.max_pool2d(self.conv3(self.conv2(x)), 3, stride=2, ceil_mode=True)
        outputs = []
        for name in _MODULES:
            x = self.get_submodule(f"inception{name}")(x)
            if _AUXILIARY.get(name) in self.auxiliary:
                outputs.append(self.get_submodule(_AUXILIARY[name])(x))
            if name in _POOLED:
                x = F.max_pool2d(x, _POOLED[name], stride=2, ceil_mode=True)
        logits = self.fc(x.mean(dim=(2, 3)))
        return (logits, *outputs) if outputs else logits


def build(signature: ws.Signature) -> ws.Skeleton | None:
    """Recognise GoogLeNet; inputs ``(2, channels, 32, 32)``."""
    shapes = signature.shapes

    def conv(name: str) -> tuple[int, ...]:
        return shapes.get(f"{name}.conv.weight", ())

    branches = ("branch1", "branch2.0", "branch2.1", "branch3.0", "branch3.1", "branch4.1")
    stem = [conv(f"conv{i}") for i in (1, 2, 3)]
    modules = [[conv(f"inception{name}.{branch}") for branch in branches] for name in _MODULES]
    head = shapes.get("fc.weight", ())
    if any(len(w) != 4 for w in [*stem, *(w for weights in modules for w in weights)]) or len(head) != 2:
        return None
    auxiliary = {}
    for name in _AUXILIARY.values():
        if f"{name}.fc1.weight" in shapes:
            parts = [conv(f"{name}.conv"), *(shapes.get(f"{name}.fc{i}.weight", ()) for i in (1, 2))]
            if [len(p) for p in parts] != [4, 2, 2] or parts[1][1] != 16 * parts[0][0]:
                return None
            auxiliary[name] = parts
    with torch.device("meta"):
        module = _GoogLeNet(stem, modules, auxiliary, head)
    for name, child in module.named_modules():
        if isinstance(child, nn.BatchNorm2d) and f"{name}.num_batches_tracked" not in shapes:
            child.register_buffer("num_batches_tracked", None)
    return ws.Skeleton(module.eval(), (torch.randn(2, stem[0][1], 32, 32),), "GoogLeNet")
