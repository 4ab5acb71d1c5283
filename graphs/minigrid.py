"""Actor-critic nets for MiniGrid from TrojAI's reinforcement-learning rounds.

``BasicFCModel`` flattens the 7x7x3 view into an MLP with ReLU; ``SimplifiedRLStarter`` reads it with three
2x2 convolutions (max pooling after the first) and uses tanh in its heads. Both return log-probabilities of
the actions and a value.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import weightspace as ws

FAMILY = "minigrid-actor-critic"


def _mlp(weights: list[tuple[int, ...]], activation: type[nn.Module]) -> nn.Sequential:
    layers: list[nn.Module] = []
    for out, incoming in weights:
        layers += [nn.Linear(incoming, out), activation()]
    return nn.Sequential(*layers[:-1])


class _ActorCritic(nn.Module):
    def forward(self, view: Tensor) -> tuple[Tensor, Tensor]:
        """``view``: (batch, width, height, channels), as the environment gives it."""
        x = view.permute(0, 3, 1, 2)
        x = self.embed(x)
        return F.log_softmax(self.actor(x), dim=1), self.critic(x).squeeze(1)

    def embed(self, x: Tensor) -> Tensor:
        raise NotImplementedError


class _BasicFC(_ActorCritic):
    def __init__(self, embed: list[tuple[int, ...]], heads: list[list[tuple[int, ...]]]) -> None:
        super().__init__()
        self.state_emb = nn.Sequential(*_mlp(embed, nn.ReLU), nn.ReLU())
        self.actor, self.critic = (_mlp(head, nn.ReLU) for head in heads)

    def embed(self, x: Tensor) -> Tensor:
        return self.state_emb(x.flatten(1))


class _Starter(_ActorCritic):
    def __init__(self, convs: list[tuple[int, ...]], heads: list[list[tuple[int, ...]]]) -> None:
        super().__init__()
        first, second, third = (nn.Conv2d(c[1], c[0], c[2:]) for c in convs)
        pool = nn.MaxPool2d(2)
        self.image_conv = nn.Sequential(first, nn.ReLU(), pool, second, nn.ReLU(), third, nn.ReLU())
        self.actor, self.critic = (_mlp(head, nn.Tanh) for head in heads)

    def embed(self, x: Tensor) -> Tensor:
        return self.image_conv(x).flatten(1)


def build(signature: ws.Signature) -> ws.Skeleton | None:
    """Recognise either net; inputs ``(2, side, side, channels)`` solved from the first linear layer."""
    shapes = signature.shapes

    def chain(prefix: str, indices: tuple[int, ...], rank: int) -> list[tuple[int, ...]]:
        found = [shapes.get(f"{prefix}.{i}.weight", ()) for i in indices]
        biased = all(f"{prefix}.{i}.bias" in shapes for i in indices)
        return found if biased and all(len(w) == rank for w in found) else []

    embed, convs = chain("state_emb", (0, 2), 2), chain("image_conv", (0, 3, 5), 4)
    indices = (0, 2) if embed else (0, 2, 4)
    heads = [chain("actor", indices, 2), chain("critic", indices, 2)]
    if not all(heads) or bool(embed) == bool(convs):
        return None
    if len(shapes) != 2 * (len(embed) + len(convs) + 2 * len(indices)):
        return None
    with torch.device("meta"):
        if embed:
            side, channels = math.isqrt(embed[0][1] // 3), 3
            if side * side * channels != embed[0][1]:
                return None
            module: _ActorCritic = _BasicFC(embed, heads)
        else:
            channels, out = convs[0][1], convs[2][0]
            if any(c[2:] != (2, 2) for c in convs) or not out:
                return None
            last = math.isqrt(heads[0][0][1] // out)
            if last < 1 or last * last * out != heads[0][0][1]:
                return None
            side = 2 * (last + 2) + 1
            module = _Starter(convs, heads)
    name = "BasicFCModel" if embed else "SimplifiedRLStarter"
    return ws.Skeleton(module.eval(), (torch.rand(2, side, side, channels) * 10,), f"TrojAI {name}")
