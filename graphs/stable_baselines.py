"""Actor-critic policies of Stable-Baselines3 (A2C, PPO): MLPs, or the Nature CNN on Atari frames.

Returned are the action distribution's mean (or logits), the value, and the standard deviation where the
policy keeps one: a free parameter, or, with state-dependent exploration (Raffin et al. 2021), a matrix that
multiplies the squared features of the last policy layer, so that its rows follow that layer. The activation
is read from the policy's keyword arguments when the file carries them; otherwise tanh, the default (ReLU in
the CNN).
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor, nn

import weightspace as ws

FAMILY = "stable-baselines3"
PRIORITY = 45
_HIDDEN = re.compile(r"mlp_extractor\.(policy_net|value_net|shared_net)\.(\d+)\.weight$")
_NATURE = ((0, 8, 4), (2, 4, 2), (4, 3, 1))  # index, kernel, stride


class _Nature(nn.Module):
    def __init__(self, convs: list[tuple[int, ...]], linear: tuple[int, ...]) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for (_, kernel, stride), conv in zip(_NATURE, convs, strict=True):
            layers += [nn.Conv2d(conv[1], conv[0], kernel, stride=stride), nn.ReLU()]
        self.cnn = nn.Sequential(*layers, nn.Flatten())
        self.linear = nn.Sequential(nn.Linear(linear[1], linear[0]), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.cnn(x))


class _Extractor(nn.Module):
    def __init__(self, nets: dict[str, list[tuple[int, ...]]], activation: type[nn.Module]) -> None:
        super().__init__()
        for name in ("shared_net", "policy_net", "value_net"):
            layers: list[nn.Module] = []
            for out, incoming in nets.get(name, []):
                layers += [nn.Linear(incoming, out), activation()]
            self.add_module(name, nn.Sequential(*layers))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.get_submodule("shared_net")(x)
        return self.get_submodule("policy_net")(x), self.get_submodule("value_net")(x)


class _Policy(nn.Module):
    def __init__(
        self,
        features: _Nature | None,
        extractor: _Extractor,
        action: tuple[int, ...],
        value: tuple[int, ...],
        log_std: tuple[int, ...] | None,
    ) -> None:
        super().__init__()
        if log_std is not None:
            self.log_std = nn.Parameter(torch.empty(log_std))
        self.features_extractor = features
        self.mlp_extractor = extractor
        self.action_net = nn.Linear(action[1], action[0])
        self.value_net = nn.Linear(value[1], value[0])

    def forward(self, observation: Tensor) -> tuple[Tensor, ...]:
        x = observation if self.features_extractor is None else self.features_extractor(observation)
        policy, value = self.mlp_extractor(x)
        outputs = self.action_net(policy), self.value_net(value)
        if not hasattr(self, "log_std"):
            return outputs
        deviation = self.log_std.exp()
        if self.log_std.dim() == 2:
            deviation = (policy.square() @ deviation.square() + 1e-6).sqrt()
        return *outputs, deviation


def build(signature: ws.Signature) -> ws.Skeleton | None:
    """Recognise an actor-critic policy; inputs two observations (84 x 84 frames for the CNN)."""
    shapes = signature.shapes
    action, value = shapes.get("action_net.weight", ()), shapes.get("value_net.weight", ())
    if len(action) != 2 or len(value) != 2:
        return None
    found: dict[str, dict[int, tuple[int, ...]]] = {}
    for name, shape in shapes.items():
        if match := _HIDDEN.match(name):
            if len(shape) != 2:
                return None
            found.setdefault(match[1], {})[int(match[2])] = shape
    nets = {name: [layers[i] for i in sorted(layers)] for name, layers in found.items()}
    if any(sorted(layers) != list(range(0, 2 * len(layers), 2)) for layers in found.values()):
        return None

    convs = [shapes.get(f"features_extractor.cnn.{i}.weight", ()) for i, _, _ in _NATURE]
    linear = shapes.get("features_extractor.linear.0.weight", ())
    nature = all(len(c) == 4 and c[2] == kernel for c, (_, kernel, _) in zip(convs, _NATURE, strict=True))
    if nature and (len(linear) != 2 or linear[1] != 49 * convs[-1][0]):
        return None
    if not nature and not nets:
        return None
    activation = _activation(signature)
    with torch.device("meta"):
        features = _Nature(convs, linear) if nature else None
        module = _Policy(features, _Extractor(nets, activation), action, value, shapes.get("log_std"))
    if nature:
        inputs = torch.rand(2, convs[0][1], 84, 84)
    else:
        firsts = [
            layers[0][1] for name in ("shared_net", "policy_net", "value_net") if (layers := nets.get(name))
        ]
        inputs = torch.randn(2, firsts[0])
    # Later versions list a shared extractor three times.
    unused = tuple(
        n for n in shapes if nature and n.startswith(("pi_features_extractor.", "vf_features_extractor."))
    )
    kind = "Nature CNN" if nature else f"MLP, {activation.__name__}"
    return ws.Skeleton(module.eval(), (inputs,), f"Stable-Baselines3 policy ({kind})", unused=unused)


def _activation(signature: ws.Signature) -> type[nn.Module]:
    for place in (signature.metadata, signature.metadata.get("data"), signature.metadata.get("config")):
        arguments = place.get("policy_kwargs") if isinstance(place, Mapping) else None
        if isinstance(arguments, Mapping):
            given = str(arguments.get("activation_fn", ""))
            name = re.search(r"\b(ReLU|Tanh|ELU|LeakyReLU|SiLU|GELU)\b", given)
            return getattr(nn, name[1]) if name else nn.Tanh
    return nn.Tanh
