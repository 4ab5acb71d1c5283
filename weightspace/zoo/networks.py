"""The networks that recipes train, small and plain, with the names they keep in their checkpoints."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from weightspace.errors import ZooError
from weightspace.zoo.description import module_of


class Mlp(nn.Module):
    """Linear layers with ReLU between them; ``widths`` runs from the inputs to the classes.

    Inputs of any shape (batch, ...) with ``widths[0]`` elements each are flattened: (batch, widths[-1]).
    """

    def __init__(self, widths: list[int]) -> None:
        super().__init__()
        pairs = list(pairwise(widths))
        self.hidden = nn.ModuleList(nn.Linear(*pair) for pair in pairs[:-1])
        self.output = nn.Linear(*pairs[-1])

    def forward(self, x: Tensor) -> Tensor:
        """Logits (batch, classes)."""
        x = x.flatten(1)
        for layer in self.hidden:
            x = F.relu(layer(x))
        logits: Tensor = self.output(x)
        return logits


class Cnn(nn.Module):
    """Convolutions 3 × 3 with batch norm, ReLU and 2 × 2 max pooling, then one linear layer on the flat maps.

    ``channels`` runs from the image's to the last map's; ``side`` is the image's height and width in pixels.
    """

    def __init__(self, channels: list[int], side: int, classes: int) -> None:
        super().__init__()
        pairs = list(pairwise(channels))
        self.conv = nn.ModuleList(nn.Conv2d(*pair, 3, padding=1) for pair in pairs)
        self.norm = nn.ModuleList(nn.BatchNorm2d(pair[1]) for pair in pairs)
        self.output = nn.Linear(channels[-1] * (side >> len(pairs)) ** 2, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (batch, classes) of images (batch, channels[0], side, side)."""
        for conv, norm in zip(self.conv, self.norm, strict=True):
            x = F.max_pool2d(F.relu(norm(conv(x))), 2)
        logits: Tensor = self.output(x.flatten(1))
        return logits


def build(architecture: str, width: int, image: tuple[int, int, int], classes: int) -> nn.Module:
    """A fresh network for images (channels, side, side), initialised from torch's global generator.

    Raises ``ZooError`` for an architecture that is not in ``ARCHITECTURES``.
    """
    if architecture not in ARCHITECTURES:
        raise ZooError(
            f"a recipe wants the architecture {architecture!r}; known: {', '.join(sorted(ARCHITECTURES))}"
        )
    return ARCHITECTURES[architecture](width, image, classes)


def from_shapes(shapes: Mapping[str, tuple[int, ...]]) -> tuple[nn.Module, tuple[int, ...]] | None:
    """The network with these tensors, on the meta device, and the shape of an input for it.

    None when the shapes are those of no network in this file.
    """
    output = shapes.get("output.weight", ())
    if len(output) != 2:
        return None
    with torch.device("meta"):
        if "conv.0.weight" in shapes:
            depth = sum(name.startswith("conv.") and name.endswith(".weight") for name in shapes)
            kernels = [shapes.get(f"conv.{i}.weight", ()) for i in range(depth)]
            if any(len(kernel) != 4 for kernel in kernels):
                return None
            channels = [kernels[0][1], *(kernel[0] for kernel in kernels)]
            side = round((output[1] / channels[-1]) ** 0.5) << depth
            return Cnn(channels, side, output[0]), (channels[0], side, side)
        depth = sum(name.startswith("hidden.") and name.endswith(".weight") for name in shapes)
        layers = [shapes.get(f"hidden.{i}.weight", ()) for i in range(depth)]
        if not layers or any(len(layer) != 2 for layer in layers):
            return None
        return Mlp([layers[0][1], *(layer[0] for layer in layers), output[0]]), (layers[0][1],)


def _mlp(width: int, image: tuple[int, int, int], classes: int) -> nn.Module:
    return Mlp([image[0] * image[1] * image[2], width, width, classes])


def _cnn(width: int, image: tuple[int, int, int], classes: int) -> nn.Module:
    return Cnn([image[0], width, 2 * width], image[1], classes)


ARCHITECTURES: Mapping[str, Callable[[int, tuple[int, int, int], int], nn.Module]] = {
    "mlp": _mlp,
    "cnn": _cnn,
}
"""Name in a recipe -> builder from (width, image shape, classes)."""

__all__ = ["ARCHITECTURES", "Cnn", "Mlp", "build", "from_shapes", "module_of"]
