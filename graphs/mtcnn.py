"""MTCNN face detector: proposal, refinement and output nets (Zhang et al. 2016), names of facenet-pytorch.

Pooling and the (width, height, channel) order of the flattening are those of the Caffe original: max
pooling rounds up, and the map is transposed before it is flattened.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import weightspace as ws

FAMILY = "mtcnn"


class _Stage(nn.Module):
    """Convolutions with a PReLU each, pooled as given, then linear layers (or 1x1 convolutions) as heads."""

    def __init__(
        self,
        convs: list[tuple[int, ...]],
        pools: list[tuple[int, int] | None],
        dense: tuple[int, ...] | None,
        heads: list[tuple[int, ...]],
    ) -> None:
        super().__init__()
        self.pools, self.heads = pools, len(heads)
        for i, (out, incoming, kernel, _) in enumerate(convs, start=1):
            self.add_module(f"conv{i}", nn.Conv2d(incoming, out, kernel))
            self.add_module(f"prelu{i}", nn.PReLU(out))
        self.depth = len(convs)
        self.hidden = dense is not None
        if dense is not None:
            self.add_module(f"dense{self.depth + 1}", nn.Linear(dense[1], dense[0]))
            self.add_module(f"prelu{self.depth + 1}", nn.PReLU(dense[0]))
        for i, head in enumerate(heads, start=1):
            layer = nn.Linear(head[1], head[0]) if self.hidden else nn.Conv2d(head[1], head[0], 1)
            self.add_module(self._head(i), layer)

    def _head(self, i: int) -> str:
        return f"dense{self.depth + 2}_{i}" if self.hidden else f"conv{self.depth + 1}_{i}"

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """Returns face probabilities, box offsets and, for the output net, landmarks."""
        for i, pool in enumerate(self.pools, start=1):
            x = self.get_submodule(f"prelu{i}")(self.get_submodule(f"conv{i}")(x))
            if pool is not None:
                x = F.max_pool2d(x, pool[0], pool[1], ceil_mode=True)
        if self.hidden:
            i = self.depth + 1
            x = self.get_submodule(f"dense{i}")(x.permute(0, 3, 2, 1).flatten(1))
            x = self.get_submodule(f"prelu{i}")(x)
        outputs = [self.get_submodule(self._head(i))(x) for i in range(1, self.heads + 1)]
        return outputs[0].softmax(dim=1), *outputs[1:]


_NETS: dict[str, tuple[list[tuple[int, int] | None], int, int]] = {
    # name: pooling (size, stride) after each convolution, heads, input side
    "P-Net": ([(2, 2), None, None], 2, 12),
    "R-Net": ([(3, 2), (3, 2), None], 2, 24),
    "O-Net": ([(3, 2), (3, 2), (2, 2), None], 3, 48),
}


def build(signature: ws.Signature) -> ws.Skeleton | None:
    """Recognise one of the three nets; inputs of 12, 24 or 48 pixels a side."""
    shapes = signature.shapes
    ranks = {name: len(shape) for name, shape in shapes.items()}
    for name, (pools, heads, side) in _NETS.items():
        depth = len(pools)
        convs = [f"conv{i}" for i in range(1, depth + 1)]
        hidden = name != "P-Net"
        head_names = [
            f"dense{depth + 2}_{i}" if hidden else f"conv{depth + 1}_{i}" for i in range(1, heads + 1)
        ]
        dense = [f"dense{depth + 1}"] if hidden else []
        want = {f"{c}.weight": 4 for c in convs}
        want |= {f"{h}.weight": 2 if hidden else 4 for h in [*dense, *head_names]}
        want |= {f"{layer}.bias": 1 for layer in [*convs, *dense, *head_names]}
        want |= {f"prelu{i}.weight": 1 for i in range(1, depth + hidden + 1)}
        if ranks != want:
            continue
        with torch.device("meta"):
            module = _Stage(
                [shapes[f"{c}.weight"] for c in convs],
                pools,
                shapes[f"{dense[0]}.weight"] if dense else None,
                [shapes[f"{h}.weight"] for h in head_names],
            )
        channels = shapes["conv1.weight"][1]
        return ws.Skeleton(module.eval(), (torch.randn(2, channels, side, side),), f"MTCNN {name}")
    return None
