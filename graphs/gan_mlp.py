"""The fully connected MNIST GAN that many tutorials train: three linear layers ``0, 2, 4`` in a Sequential.

The generator maps noise to an image (ReLU, tanh at the end), the discriminator an image to one probability
(leaky ReLU of slope 0.2, sigmoid at the end). Activations are assumed from the tutorial.
"""

from __future__ import annotations

import itertools
import math

import torch
from torch import nn

import weightspace as ws

FAMILY = "gan-mlp"


def build(signature: ws.Signature) -> ws.Skeleton | None:
    """Recognise a discriminator (square image in, one out) or a generator (square image out)."""
    shapes = signature.shapes
    if set(shapes) != {f"{i}.{kind}" for i in (0, 2, 4) for kind in ("weight", "bias")}:
        return None
    weights = [shapes[f"{i}.weight"] for i in (0, 2, 4)]
    if any(len(w) != 2 for w in weights):
        return None
    if any(a[0] != b[1] for a, b in itertools.pairwise(weights)):
        return None
    incoming, out = weights[0][1], weights[-1][0]
    with torch.device("meta"):
        layers = [nn.Linear(w[1], w[0]) for w in weights]
        if _image(incoming) and out == 1:
            kind, inner, last = "discriminator", nn.LeakyReLU(0.2), nn.Sigmoid()
        elif _image(out) and incoming < out:
            kind, inner, last = "generator", nn.ReLU(), nn.Tanh()
        else:
            return None
        module = nn.Sequential(layers[0], inner, layers[1], inner, layers[2], last)
    # On plain noise a trained discriminator's sigmoid is exactly zero; a faint image on black is not so sure.
    inputs = torch.rand(2, incoming) * 0.05 - 1 if kind == "discriminator" else torch.randn(2, incoming)
    return ws.Skeleton(module.eval(), (inputs,), f"MLP GAN {kind}")


def _image(size: int) -> bool:
    return size >= 256 and math.isqrt(size) ** 2 == size
