"""Plain chains: numbered convolutions, then numbered linear layers (``nn.Sequential``; ``conv1, fc1``).

The last resort of the catalogue. Recognised are perceptrons and plain convolutional nets whose layers share
one numbered name (``net.0``, ``net.2``; ``fc1``, ``fc2``), optionally closed by one layer with a usual name
(``out``, ``head`` ...), with batch norm after any layer and layer norm after linear ones; every size must
fit the next. Assumed, for shapes cannot tell: no skip connections, one pointwise activation after every
layer but the last (ReLU stands in for it; any pointwise function has the same permutation symmetries), maps
flattened channels first. Pooling and strides are unknown too, so that maps are averaged to the size that
the first linear layer asks for. What would change the symmetries if it were otherwise is said in the
skeleton's ``guess``. These stand-ins leave the symmetries as they are, but the skeleton's outputs need not
be the net's.
"""

from __future__ import annotations

import itertools
import math
import re

import torch
from torch import Tensor, nn

import weightspace as ws

FAMILY = "plain-chain"
PRIORITY = 90
_LAST = {"out", "output", "head", "classifier", "fc", "final", "last", "linear", "logits", "fc_out"}
_PARAMETERS = {"weight", "bias", "running_mean", "running_var", "num_batches_tracked"}


class _Flatten(nn.Module):
    """Averages a map to (height, width) and flattens it channels first."""

    def __init__(self, size: tuple[int, int]) -> None:
        super().__init__()
        self.pool = nn.AdaptiveAvgPool2d(size)

    def forward(self, x: Tensor) -> Tensor:
        return self.pool(x).flatten(1)


class _Chain(nn.Module):
    def __init__(self, layers: list[nn.Module]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def build(signature: ws.Signature) -> ws.Skeleton | None:
    """Recognise a chain; inputs two vectors, or two images of at least the kernels' reach."""
    layers: dict[str, dict[str, tuple[int, ...]]] = {}
    for name, shape in signature.shapes.items():
        prefix, _, leaf = name.rpartition(".")
        if leaf not in _PARAMETERS:
            return None
        layers.setdefault(prefix, {})[leaf] = shape
    if any("weight" not in parts for parts in layers.values()):
        return None
    rank = {name: len(parts["weight"]) for name, parts in layers.items()}
    if not set(rank.values()) <= {1, 2, 4}:
        return None
    convs = _ordered([name for name in layers if rank[name] == 4])
    linears = _ordered([name for name in layers if rank[name] == 2])
    norms = [name for name in layers if rank[name] == 1]
    if convs is None or linears is None or not linears or len(convs) + len(linears) < 2:
        return None
    if any("running_mean" in layers[name] for name in [*convs, *linears]):
        return None

    with torch.device("meta"):
        built: list[nn.Module] = []
        rename: dict[str, str] = {}

        def add(name: str, module: nn.Module) -> None:
            for key in module.state_dict():
                rename[f"layers.{len(built)}.{key}"] = f"{name}.{key}"
            built.append(module)

        width, following = None, [*convs, *linears][1:]
        for i, name in enumerate([*convs, *linears]):
            shape, bias = layers[name]["weight"], "bias" in layers[name]
            if rank[name] == 4:
                if width not in (None, shape[1]):
                    return None
                padding = shape[2] // 2, shape[3] // 2
                add(name, nn.Conv2d(shape[1], shape[0], shape[2:], padding=padding, bias=bias))
            else:
                if width is not None and i == len(convs):
                    if not width or shape[1] % width:
                        return None
                    built.append(_Flatten(_area(shape[1] // width)))
                elif width not in (None, shape[1]):
                    return None
                add(name, nn.Linear(shape[1], shape[0], bias=bias))
            width = shape[0]
            for norm in _norms_after(name, following[i] if i < len(following) else None, norms, layers):
                module = _norm(layers[norm], width, rank[name] == 4)
                if module is None:
                    return None
                norms.remove(norm)
                add(norm, module)
            if i < len(following):
                built.append(nn.ReLU())
        if norms:
            return None
        module = _Chain(built)
    first = layers[(convs or linears)[0]]["weight"]
    side = max(8, *(max(layers[name]["weight"][2:]) for name in convs)) if convs else 0
    inputs = torch.randn(2, first[1], side, side) if convs else torch.randn(2, first[1])
    kind = f"{len(convs)} convolutions and " if convs else ""
    name = f"plain chain of {kind}{len(linears)} linear layers (no skips, activations assumed)"
    guess = _doubts([*convs, *linears], layers)
    return ws.Skeleton(module.eval(), (inputs,), name, rename=rename, guess=guess)


def _doubts(order: list[str], layers: dict[str, dict[str, tuple[int, ...]]]) -> str:
    """Why the true network may be wired otherwise; empty where the shapes leave no other way."""
    weights = [layers[name]["weight"] for name in order]
    doubts = []
    widths = [weights[0][1], *(w[0] for w in weights)]
    places = [(m[1], int(m[2])) for name in order if (m := re.fullmatch(r"(.*?)(\d+)", name))]
    # Gaps in the numbering are layers without parameters in one list: an nn.Sequential in all likelihood, which
    # flattens channels first. A list of layers called one by one has the same names, and may skip.
    one = len(places) == len(order) and len({prefix for prefix, _ in places}) == 1
    gaps = all(b - a > 1 for (_, a), (_, b) in itertools.pairwise(places))
    if len(set(widths)) < len(widths):
        doubts.append("layers of equal width may be joined by skip connections")
    for before, after in itertools.pairwise(weights):
        if not (one and gaps) and len(before) == 4 and len(after) == 2 and after[1] > before[0] > 1:
            doubts.append("the map may be flattened in another order than channels first")
    return "; ".join(doubts)


def _ordered(names: list[str]) -> list[str] | None:
    """Layers of one numbered name by number, then at most one with a usual last name; else None."""
    numbered: dict[str, list[tuple[int, str]]] = {}
    last = []
    for name in names:
        if match := re.fullmatch(r"(.*?)(\d+)", name):
            numbered.setdefault(match[1], []).append((int(match[2]), name))
        elif name.rpartition(".")[2] in _LAST:
            last.append(name)
        else:
            return None
    if len(numbered) > 1 or len(last) > 1:
        return None
    order = [name for _, name in sorted(item for items in numbered.values() for item in items)]
    return order + last


def _norms_after(
    name: str, following: str | None, norms: list[str], layers: dict[str, dict[str, tuple[int, ...]]]
) -> list[str]:
    """The norm that belongs to a layer: same number, or an index between it and the next layer."""
    found = []
    match = re.fullmatch(r"(.*?)(\d+)", name)
    if match is None:
        return []
    upper = re.fullmatch(r"(.*?)(\d+)", following) if following else None
    for norm in norms:
        own = re.fullmatch(r"(.*?)(\d+)", norm)
        if own is None:
            continue
        if own[1] == match[1]:  # positions in one Sequential
            after = int(own[2]) > int(match[2])
            before = upper is None or upper[1] != match[1] or int(own[2]) < int(upper[2])
            if after and before:
                found.append(norm)
        elif own[2] == match[2] and layers[norm]["weight"] == layers[name]["weight"][:1]:
            found.append(norm)
    return found if len(found) == 1 else []


def _norm(parts: dict[str, tuple[int, ...]], width: int, convolutional: bool) -> nn.Module | None:
    if parts["weight"] != (width,) or "bias" not in parts:
        return None
    if "running_mean" in parts:
        norm = nn.BatchNorm2d(width) if convolutional else nn.BatchNorm1d(width)
        if "num_batches_tracked" not in parts:
            norm.register_buffer("num_batches_tracked", None)
        return norm
    # After a convolution it could be a group norm of any number of groups, whose symmetries differ.
    return None if convolutional else nn.LayerNorm(width)


def _area(size: int) -> tuple[int, int]:
    side = math.isqrt(size)
    return (side, side) if side * side == size else (size, 1)
