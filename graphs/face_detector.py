"""Ultra-light face detector, RFB variant (version-RFB-320 and 640): a single-shot detector.

A backbone of depthwise-separable convolutions with one receptive-field block (Liu et al. 2018), four
feature maps with a class head and a box head each. Strides, dilations and activations are those of the ONNX
twin. Raw box offsets are returned; decoding them against the fixed priors adds no parameters.
"""

from __future__ import annotations

import re

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import weightspace as ws

FAMILY = "face-detector-rfb"
_STRIDED = (2, 4, 8, 11)
_RFB = 7
_SOURCES = (8, 11, 13)


class _Basic(nn.Module):
    def __init__(self, incoming: int, out: int, kernel: int, dilation: int = 1, relu: bool = True) -> None:
        super().__init__()
        padding = dilation * (kernel // 2)
        self.conv = nn.Conv2d(incoming, out, kernel, padding=padding, dilation=dilation, bias=False)
        self.bn = nn.BatchNorm2d(out)
        self.relu = relu

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn(self.conv(x))
        return F.relu(x) if self.relu else x


class _ReceptiveField(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        inner = channels // 8
        middle = inner // 2 * 3
        self.branch0 = nn.Sequential(
            _Basic(channels, inner, 1, relu=False),
            _Basic(inner, 2 * inner, 3),
            _Basic(2 * inner, 2 * inner, 3, dilation=2, relu=False),
        )
        self.branch1 = nn.Sequential(
            _Basic(channels, inner, 1, relu=False),
            _Basic(inner, 2 * inner, 3),
            _Basic(2 * inner, 2 * inner, 3, dilation=3, relu=False),
        )
        self.branch2 = nn.Sequential(
            _Basic(channels, inner, 1, relu=False),
            _Basic(inner, middle, 3),
            _Basic(middle, 2 * inner, 3),
            _Basic(2 * inner, 2 * inner, 3, dilation=5, relu=False),
        )
        self.ConvLinear = _Basic(6 * inner, channels, 1, relu=False)
        self.shortcut = _Basic(channels, channels, 1, relu=False)

    def forward(self, x: Tensor) -> Tensor:
        branches = torch.cat((self.branch0(x), self.branch1(x), self.branch2(x)), dim=1)
        return F.relu(self.ConvLinear(branches) + self.shortcut(x))


def _separable(incoming: int, out: int, stride: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(incoming, incoming, 3, stride=stride, padding=1, groups=incoming, bias=False),
        nn.BatchNorm2d(incoming),
        nn.ReLU(),
        nn.Conv2d(incoming, out, 1, bias=False),
        nn.BatchNorm2d(out),
        nn.ReLU(),
    )


def _plain_separable(incoming: int, out: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(incoming, incoming, 3, stride=stride, padding=1, groups=incoming),
        nn.ReLU(),
        nn.Conv2d(incoming, out, 1),
    )


class _Detector(nn.Module):
    def __init__(self, widths: list[int], extra: int, classes: list[int], boxes: list[int]) -> None:
        super().__init__()
        layers: list[nn.Module] = [
            nn.Sequential(
                nn.Conv2d(widths[0], widths[1], 3, stride=2, padding=1, bias=False),
                nn.BatchNorm2d(widths[1]),
                nn.ReLU(),
            )
        ]
        for i in range(1, 13):
            if i == _RFB:
                layers.append(_ReceptiveField(widths[i]))
            else:
                layers.append(_separable(widths[i], widths[i + 1], 2 if i in _STRIDED else 1))
        self.base_net = nn.Sequential(*layers)
        last = widths[-1]
        self.extras = nn.ModuleList(
            [nn.Sequential(nn.Conv2d(last, extra, 1), nn.ReLU(), _plain_separable(extra, last, 2), nn.ReLU())]
        )
        maps = [widths[i] for i in _SOURCES]
        self.classification_headers = self._heads(maps, last, classes)
        self.regression_headers = self._heads(maps, last, boxes)

    @staticmethod
    def _heads(maps: list[int], last: int, outputs: list[int]) -> nn.ModuleList:
        heads: list[nn.Module] = [_plain_separable(m, o) for m, o in zip(maps, outputs, strict=False)]
        return nn.ModuleList([*heads, nn.Conv2d(last, outputs[3], 3, padding=1)])

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Returns class probabilities (batch, anchors, 2) and box offsets (batch, anchors, 4)."""
        maps = []
        for i, layer in enumerate(self.base_net, start=1):
            x = layer(x)
            if i in _SOURCES:
                maps.append(x)
        maps.append(self.extras[0](x))
        scores = [h(m).permute(0, 2, 3, 1).flatten(1, 2) for h, m in
                  zip(self.classification_headers, maps, strict=True)]  # fmt: skip
        boxes = [h(m).permute(0, 2, 3, 1).flatten(1, 2) for h, m in
                 zip(self.regression_headers, maps, strict=True)]  # fmt: skip
        return (
            torch.cat([s.reshape(s.shape[0], -1, 2) for s in scores], dim=1).softmax(dim=2),
            torch.cat([b.reshape(b.shape[0], -1, 4) for b in boxes], dim=1),
        )


def build(signature: ws.Signature) -> ws.Skeleton | None:
    """Recognise the detector; inputs ``(2, 3, 64, 64)``."""
    shapes = signature.shapes
    firsts = ["base_net.0.0.weight", *(f"base_net.{i}.3.weight" for i in range(1, 13) if i != _RFB)]
    heads = [f"{kind}_headers.{i}{'' if i == 3 else '.2'}.weight"
             for kind in ("classification", "regression") for i in range(4)]  # fmt: skip
    needed = [*firsts, *heads, "base_net.7.ConvLinear.conv.weight", "extras.0.0.weight"]
    if not all(len(shapes.get(name, ())) == 4 for name in needed):
        return None
    if not all(re.match(r"(base_net|extras|classification_headers|regression_headers)\.", n) for n in shapes):
        return None
    widths = [shapes["base_net.0.0.weight"][1], shapes["base_net.0.0.weight"][0]]
    for i in range(1, 13):
        widths.append(widths[-1] if i == _RFB else shapes[f"base_net.{i}.3.weight"][0])
    if widths[_RFB] % 16:
        return None
    outputs = [shapes[name][0] for name in heads]
    with torch.device("meta"):
        module = _Detector(widths, shapes["extras.0.0.weight"][0], outputs[:4], outputs[4:])
    for name, child in module.named_modules():
        if isinstance(child, nn.BatchNorm2d) and f"{name}.num_batches_tracked" not in shapes:
            child.register_buffer("num_batches_tracked", None)
    return ws.Skeleton(module.eval(), (torch.randn(2, widths[0], 64, 64),), "Ultra-light face detector, RFB")
