"""The architectures that sampled recipes train: plain modules, each the function of a serialisable description.

Every module takes ``keep`` besides its input: a mask (batch, ``droppable``) that multiplies hidden channels, with
which training drops them (whole maps in a convolutional network: Tompson et al. 2015). Without it nothing is dropped,
in training mode too, so that many networks with rates of their own can be trained as one stack.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

ACTIVATIONS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "tanh": torch.tanh,
    "gelu": F.gelu,
    "silu": F.silu,
    "leaky_relu": F.leaky_relu,
    "sigmoid": torch.sigmoid,
}
NORMS = ("none", "batch", "group", "layer")
GROUPS = 4
"""Groups of a group norm; "layer" is a group norm of one group."""


def _norm(name: str, channels: int) -> nn.Module | None:
    if name == "batch":
        return nn.BatchNorm2d(channels)
    if name == "none":
        return None
    return nn.GroupNorm(GROUPS if name == "group" else 1, channels)


def _dropped(x: Tensor, keep: Tensor | None, start: int) -> Tensor:
    """``x`` (batch, channels, …) times the channels' part of the mask, which begins at ``start``."""
    if keep is None:
        return x
    mask = keep[:, start : start + x.shape[1]]
    return x * mask.reshape(mask.shape + (1,) * (x.dim() - 2))


class Perceptron(nn.Module):
    """Linear layers with an activation between them; inputs (batch, …) are flattened."""

    def __init__(self, widths: Sequence[int], activation: str) -> None:
        super().__init__()
        pairs = list(pairwise(widths))
        self.hidden = nn.ModuleList(nn.Linear(*pair) for pair in pairs[:-1])
        self.output = nn.Linear(*pairs[-1])
        self.act = ACTIVATIONS[activation]
        self.droppable = sum(widths[1:-1])

    def forward(self, x: Tensor, keep: Tensor | None = None) -> Tensor:
        """Logits (batch, classes)."""
        x, start = x.flatten(1), 0
        for layer in self.hidden:
            x = _dropped(self.act(layer(x)), keep, start)
            start += x.shape[1]
        logits: Tensor = self.output(x)
        return logits


class ConvNet(nn.Module):
    """Convolutions, each with a norm, an activation and perhaps a shortcut around it; then mean pooling, linear.

    ``channels`` are those after each convolution. A shortcut whose ends differ in channels or size goes through a
    1 × 1 convolution without bias (``skip.<i>``), as He et al. (2016) have it. ``same`` pads to keep the size.
    """

    def __init__(
        self, image: Sequence[int], classes: int, channels: Sequence[int], kernels: Sequence[int],
        strides: Sequence[int], activation: str, norm: str, residuals: Sequence[bool], same: bool,
    ) -> None:  # fmt: skip
        super().__init__()
        pairs = list(pairwise([image[0], *channels]))
        self.conv = nn.ModuleList(
            nn.Conv2d(*pair, k, stride=s, padding=k // 2 if same else 0)
            for pair, k, s in zip(pairs, kernels, strides, strict=True)
        )
        norms = [_norm(norm, c) for c in channels]
        self.norm = nn.ModuleList(n for n in norms if n is not None)
        self.skip = nn.ModuleDict(
            {
                str(i): nn.Conv2d(*pair, 1, stride=s, bias=False)
                for i, (pair, s, wanted) in enumerate(zip(pairs, strides, residuals, strict=True))
                if wanted and (pair[0] != pair[1] or s != 1)
            }
        )
        self.output = nn.Linear(channels[-1], classes)
        self.act = ACTIVATIONS[activation]
        self.residuals = tuple(residuals)
        self.droppable = sum(channels)

    def forward(self, x: Tensor, keep: Tensor | None = None) -> Tensor:
        """Logits (batch, classes) of images (batch, channels, height, width)."""
        start = 0
        for i, conv in enumerate(self.conv):
            y = conv(x)
            if self.norm:
                y = self.norm[i](y)
            if self.residuals[i]:
                y = y + (self.skip[str(i)](x) if str(i) in self.skip else x)
            x = _dropped(self.act(y), keep, start)
            start += x.shape[1]
        logits: Tensor = self.output(x.mean((2, 3)))
        return logits


class Block(nn.Module):
    """The basic block of He et al. (2016): two 3 × 3 convolutions with batch norm and a shortcut."""

    def __init__(self, inner: int, outer: int, stride: int, activation: str) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inner, outer, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outer)
        self.conv2 = nn.Conv2d(outer, outer, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outer)
        self.skip = nn.Conv2d(inner, outer, 1, stride=stride, bias=False) if (inner, stride) != (outer, 1) else None
        self.act = ACTIVATIONS[activation]

    def forward(self, x: Tensor, keep: Tensor | None = None) -> Tensor:
        """(batch, outer, height / stride, width / stride) of (batch, inner, height, width)."""
        y = _dropped(self.act(self.bn1(self.conv1(x))), keep, 0)
        y = self.bn2(self.conv2(y))
        return self.act(y + (x if self.skip is None else self.skip(x)))


class ResNet(nn.Module):
    """A stem of stride 2, one ``Block`` per entry of ``channels`` (each after the first halves the image), linear."""

    def __init__(
        self, image: Sequence[int], classes: int, channels: Sequence[int], activation: str,
        steps: Sequence[int] = (), stem: int = 2,
    ) -> None:  # fmt: skip
        super().__init__()
        self.stem = nn.Conv2d(image[0], channels[0], 3, stride=stem, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(channels[0])
        pairs = pairwise([channels[0], *channels])
        strides = steps or [2 if i else 1 for i in range(len(channels))]
        self.blocks = nn.ModuleList(Block(*pair, step, activation) for pair, step in zip(pairs, strides, strict=True))
        self.output = nn.Linear(channels[-1], classes)
        self.act = ACTIVATIONS[activation]
        self.channels = tuple(channels)
        self.droppable = sum(channels)

    def forward(self, x: Tensor, keep: Tensor | None = None) -> Tensor:
        """Logits (batch, classes) of images (batch, channels, height, width)."""
        x = self.act(self.bn(self.stem(x)))
        start = 0
        for block, width in zip(self.blocks, self.channels, strict=True):
            x = block(x, None if keep is None else keep[:, start : start + width])
            start += width
        logits: Tensor = self.output(x.mean((2, 3)))
        return logits


class Vgg(nn.Module):
    """VGG (Simonyan & Zisserman 2015) for small images: 3 × 3 convolutions with batch norm, max pooling, mean, linear.

    ``channels`` are those after each convolution; ``pools`` tells after which the maps are halved.
    """

    def __init__(
        self, image: Sequence[int], classes: int, channels: Sequence[int], pools: Sequence[bool], activation: str
    ) -> None:
        super().__init__()
        pairs = pairwise([image[0], *channels])
        self.conv = nn.ModuleList(nn.Conv2d(*pair, 3, padding=1, bias=False) for pair in pairs)
        self.norm = nn.ModuleList(nn.BatchNorm2d(c) for c in channels)
        self.output = nn.Linear(channels[-1], classes)
        self.act = ACTIVATIONS[activation]
        self.pools = tuple(pools)
        self.droppable = sum(channels)

    def forward(self, x: Tensor, keep: Tensor | None = None) -> Tensor:
        """Logits (batch, classes) of images (batch, channels, height, width)."""
        start = 0
        for conv, norm, pool in zip(self.conv, self.norm, self.pools, strict=True):
            x = _dropped(self.act(norm(conv(x))), keep, start)
            start += x.shape[1]
            x = F.max_pool2d(x, 2) if pool else x
        logits: Tensor = self.output(x.mean((2, 3)))
        return logits


class StagedResNet(ResNet):
    """The residual networks of He et al. (2016) for CIFAR: three stages of nine ``Block`` in all are ResNet-20.

    A stem at full size, then per entry of ``channels`` a stage of ``blocks`` blocks, of which each but the first begins
    by halving the image; then mean pooling, linear.
    """

    def __init__(
        self, image: Sequence[int], classes: int, channels: Sequence[int], blocks: int, activation: str
    ) -> None:
        widths = [c for c in channels for _ in range(blocks)]
        steps = [2 if i and not i % blocks else 1 for i in range(len(widths))]
        super().__init__(image, classes, widths, activation, steps, stem=1)


class TransformerBlock(nn.Module):
    """Attention and a feed-forward layer, each after a layer norm and with a shortcut (pre-norm)."""

    def __init__(self, dim: int, heads: int, hidden: int, activation: str, causal: bool) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.query = nn.Linear(dim, dim)
        self.key = nn.Linear(dim, dim)
        self.value = nn.Linear(dim, dim)
        self.proj = nn.Linear(dim, dim)
        self.norm2 = nn.LayerNorm(dim)
        self.up = nn.Linear(dim, hidden)
        self.down = nn.Linear(hidden, dim)
        self.act = ACTIVATIONS[activation]
        self.heads, self.causal = heads, causal

    def forward(self, x: Tensor) -> Tensor:
        """(batch, length, dim) of the same."""
        y: Tensor = self.norm1(x)
        q, k, v = (self._split(layer(y)) for layer in (self.query, self.key, self.value))
        scores = q @ k.transpose(-2, -1) / q.shape[-1] ** 0.5
        if self.causal:
            n = x.shape[-2]
            scores = scores.masked_fill(torch.ones(n, n, dtype=torch.bool, device=x.device).triu(1), float("-inf"))
        y = (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)
        x = x + self.proj(y)
        out: Tensor = x + self.down(self.act(self.up(self.norm2(x))))
        return out

    def _split(self, x: Tensor) -> Tensor:
        split: Tensor = x.unflatten(-1, (self.heads, -1))
        return split.transpose(1, 2)


class Vit(nn.Module):
    """A vision transformer (Dosovitskiy et al. 2021) without a class token: patches are averaged at the end."""

    def __init__(
        self, image: Sequence[int], classes: int, patch: int, dim: int, depth: int, heads: int, hidden: int,
        activation: str,
    ) -> None:  # fmt: skip
        super().__init__()
        self.patches = nn.Conv2d(image[0], dim, patch, stride=patch)
        self.position = nn.Parameter(torch.randn((image[1] // patch) * (image[2] // patch), dim) * 0.02)
        self.blocks = nn.ModuleList(TransformerBlock(dim, heads, hidden, activation, False) for _ in range(depth))
        self.norm = nn.LayerNorm(dim)
        self.output = nn.Linear(dim, classes)
        self.droppable = 0

    def forward(self, x: Tensor, keep: Tensor | None = None) -> Tensor:
        """Logits (batch, classes) of images (batch, channels, height, width)."""
        x = self.patches(x).flatten(2).transpose(1, 2) + self.position
        for block in self.blocks:
            x = block(x)
        logits: Tensor = self.output(self.norm(x).mean(1))
        return logits


class Gpt(nn.Module):
    """A decoder of characters (Radford et al. 2019): learned positions, causal attention, logits at every place."""

    def __init__(
        self, length: int, classes: int, dim: int, depth: int, heads: int, hidden: int, activation: str
    ) -> None:
        super().__init__()
        self.token = nn.Embedding(classes, dim)
        self.position = nn.Parameter(torch.randn(length, dim) * 0.02)
        self.blocks = nn.ModuleList(TransformerBlock(dim, heads, hidden, activation, True) for _ in range(depth))
        self.norm = nn.LayerNorm(dim)
        self.output = nn.Linear(dim, classes)
        self.droppable = 0

    def forward(self, x: Tensor, keep: Tensor | None = None) -> Tensor:
        """Logits (batch, length, classes) of the next token, from tokens (batch, length)."""
        y = self.token(x) + self.position
        for block in self.blocks:
            y = block(y)
        logits: Tensor = self.output(self.norm(y))
        return logits


class TextClassifier(nn.Module):
    """An encoder of words (Vaswani et al. 2017, pre-norm): learned positions, the mean over places is classified."""

    def __init__(
        self, length: int, classes: int, tokens: int, dim: int, depth: int, heads: int, hidden: int, activation: str
    ) -> None:
        super().__init__()
        self.token = nn.Embedding(tokens, dim)
        self.position = nn.Parameter(torch.randn(length, dim) * 0.02)
        self.blocks = nn.ModuleList(TransformerBlock(dim, heads, hidden, activation, False) for _ in range(depth))
        self.norm = nn.LayerNorm(dim)
        self.output = nn.Linear(dim, classes)
        self.droppable = 0

    def forward(self, x: Tensor, keep: Tensor | None = None) -> Tensor:
        """Logits (batch, classes) of tokens (batch, length)."""
        y = self.token(x) + self.position
        for block in self.blocks:
            y = block(y)
        logits: Tensor = self.output(self.norm(y).mean(1))
        return logits


class Siren(nn.Module):
    """A coordinate network with sines (Sitzmann et al. 2020): hidden layers are ``sin(omega · (W x + b))``."""

    def __init__(self, widths: Sequence[int], omega: float) -> None:
        super().__init__()
        pairs = list(pairwise(widths))
        self.hidden = nn.ModuleList(nn.Linear(*pair) for pair in pairs[:-1])
        self.output = nn.Linear(*pairs[-1])
        self.omega = omega
        self.droppable = 0

    def forward(self, x: Tensor, keep: Tensor | None = None) -> Tensor:
        """Values (batch, outputs) at coordinates (batch, inputs) in [-1, 1]."""
        for layer in self.hidden:
            x = torch.sin(self.omega * layer(x))
        values: Tensor = self.output(x)
        return values


__all__ = [
    "ACTIVATIONS", "GROUPS", "NORMS", "Block", "ConvNet", "Gpt", "Perceptron", "ResNet", "Siren", "StagedResNet",
    "TransformerBlock", "Vgg", "Vit",
]  # fmt: skip
