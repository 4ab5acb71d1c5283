"""LeNet-5 (LeCun et al. 1998) with ReLU and max pooling, layers named after the paper: c1, c3, c5, f6, f7."""

from __future__ import annotations

from collections import OrderedDict

import torch
from torch import Tensor, nn

import weightspace as ws

FAMILY = "lenet5"
_RANKS = {
    **{
        f"convnet.{c}.{kind}": rank for c in ("c1", "c3", "c5") for kind, rank in (("weight", 4), ("bias", 1))
    },
    **{f"fc.{f}.{kind}": rank for f in ("f6", "f7") for kind, rank in (("weight", 2), ("bias", 1))},
}


class _LeNet(nn.Module):
    def __init__(self, convs: list[tuple[int, ...]], f6: tuple[int, ...], f7: tuple[int, ...]) -> None:
        super().__init__()
        c1, c3, c5 = (nn.Conv2d(incoming, out, (h, w)) for out, incoming, h, w in convs)
        self.convnet = nn.Sequential(
            OrderedDict(
                c1=c1,
                relu1=nn.ReLU(),
                s2=nn.MaxPool2d(2),
                c3=c3,
                relu3=nn.ReLU(),
                s4=nn.MaxPool2d(2),
                c5=c5,
                relu5=nn.ReLU(),
            )
        )
        self.fc = nn.Sequential(
            OrderedDict(
                f6=nn.Linear(f6[1], f6[0]),
                relu6=nn.ReLU(),
                f7=nn.Linear(f7[1], f7[0]),
                sig7=nn.LogSoftmax(dim=-1),
            )
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.convnet(x).flatten(1))


def build(signature: ws.Signature) -> ws.Skeleton | None:
    """Recognise LeNet-5; inputs ``(2, channels, 32, 32)``, the size that leaves one pixel after c5."""
    shapes = signature.shapes
    if {name: len(shape) for name, shape in shapes.items()} != _RANKS:
        return None
    convs = [shapes[f"convnet.{c}.weight"] for c in ("c1", "c3", "c5")]
    if any(c[2:] != (5, 5) for c in convs) or shapes["fc.f6.weight"][1] != convs[-1][0]:
        return None
    with torch.device("meta"):
        module = _LeNet(convs, shapes["fc.f6.weight"], shapes["fc.f7.weight"])
    return ws.Skeleton(module.eval(), (torch.randn(2, convs[0][1], 32, 32),), "LeNet-5")
