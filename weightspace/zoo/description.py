"""Network descriptions: plain values from which a network of a recipe is built again, checked before they are used.

A description travels in the record inside a network's file, and a file may come from anywhere: kinds, activations and
norms are looked up in fixed tables, every size is bounded before anything is built, and what is built is compared with
the tensors by the catalogue.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from weightspace.errors import ZooError
from weightspace.zoo.architectures import (
    ACTIVATIONS,
    GROUPS,
    NORMS,
    ConvNet,
    Gpt,
    Perceptron,
    ResNet,
    Siren,
    StagedResNet,
    TextClassifier,
    Vgg,
    Vit,
)

_MAX_SIZE = 1 << 14
_MAX_DEPTH = 64
# A small file may describe a network whose activations fill the memory: these bound what one example may need.
_MAX_VALUES = 1 << 22
_MAX_TOKENS = 512
_MAX_HEADS = 64


def module_of(description: Mapping[str, Any]) -> tuple[nn.Module, tuple[Tensor, ...]]:
    """The module that a description speaks of, and example inputs (a batch of 2) for it.

    ``description["kind"]`` is one of ``KINDS``; the other entries are that kind's, none missing and none besides:

    - ``mlp``: ``input`` (any shape), ``classes``, ``widths`` of the hidden layers, ``activation``
    - ``cnn``: ``input`` (channels, height, width), ``classes``, ``channels``, ``kernels``, ``strides``, ``activation``,
      ``norm``, ``residuals`` (a truth value per convolution), ``same`` (padding)
    - ``resnet``: ``input``, ``classes``, ``channels`` (one block each), ``activation``
    - ``staged-resnet``: ``input``, ``classes``, ``channels`` (one stage each), ``blocks`` in a stage, ``activation``
    - ``vgg``: ``input``, ``classes``, ``channels``, ``pools`` (a truth value per convolution), ``activation``
    - ``vit``: ``input``, ``classes``, ``patch``, ``dim``, ``depth``, ``heads``, ``hidden``, ``activation``
    - ``gpt``: ``input`` (length,), ``classes`` (tokens), ``dim``, ``depth``, ``heads``, ``hidden``, ``activation``
    - ``text-classifier``: ``input`` (length,), ``classes``, ``tokens``, ``dim``, ``depth``, ``heads``, ``hidden``,
      ``activation``
    - ``siren``: ``input`` (coordinates,), ``classes`` (outputs), ``widths``, ``omega``

    Built under the ambient device (``with torch.device("meta")`` for a skeleton without data).
    Raises ``ZooError`` naming the first entry that makes no sense.
    """
    if not isinstance(description, Mapping):
        raise ZooError(f"a network description is a table, found {type(description).__name__}")
    kind = description.get("kind")
    if not isinstance(kind, str) or kind not in KINDS:
        raise ZooError(f"unknown kind of network {str(kind)[:40]!r}; known: {', '.join(KINDS)}")
    entries = KINDS[kind].entries
    given = set(description) - {"kind"}
    if given != set(entries):
        missing, extra = sorted(set(entries) - given), sorted(map(str, given - set(entries)))
        raise ZooError(f"network of kind {kind}: missing entries {missing}, unknown entries {extra[:5]}")
    values = {key: _checked(kind, key, description[key]) for key in entries}
    KINDS[kind].check(values)
    return KINDS[kind].build(values)


@dataclass(frozen=True)
class Kind:
    """A kind of network: its entries in the description, what they have to satisfy together, its builder."""

    entries: tuple[str, ...]
    check: Callable[[Mapping[str, Any]], None]
    build: Callable[[Mapping[str, Any]], tuple[nn.Module, tuple[Tensor, ...]]]


def _checked(kind: str, key: str, value: Any) -> Any:
    """One entry of a description, of the right type and within bounds."""

    def wrong(expected: str) -> ZooError:
        return ZooError(f"network of kind {kind}: {key} is {str(value)[:60]}, expected {expected}")

    def size(x: Any, low: int = 1, high: int = _MAX_SIZE) -> bool:
        return isinstance(x, int) and not isinstance(x, bool) and low <= x <= high

    if key == "activation":
        if not isinstance(value, str) or value not in ACTIVATIONS:
            raise wrong(f"one of {', '.join(ACTIVATIONS)}")
        return value
    if key == "norm":
        if value not in NORMS:
            raise wrong(f"one of {', '.join(NORMS)}")
        return value
    if key == "same":
        if not isinstance(value, bool):
            raise wrong("true or false")
        return value
    if key == "omega":
        if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value <= 1000:
            raise wrong("a number above 0, at most 1000")
        return float(value)
    if key in ("classes", "tokens", "patch", "dim", "depth", "heads", "hidden", "blocks"):
        high = _MAX_DEPTH if key in ("depth", "blocks") else _MAX_SIZE
        if not size(value, 1, high):
            raise wrong(f"a whole number from 1 to {high}")
        return value
    if not isinstance(value, list | tuple) or not 1 <= len(value) <= _MAX_DEPTH:
        raise wrong(f"a list of 1 to {_MAX_DEPTH} entries")
    if key in ("residuals", "pools"):
        if not all(isinstance(x, bool) for x in value):
            raise wrong("a list of truth values")
        return tuple(value)
    high = {"kernels": 31, "strides": 16}.get(key, _MAX_SIZE)
    if not all(size(x, 1, high) for x in value):
        raise wrong(f"a list of whole numbers from 1 to {high}")
    return tuple(value)


def _needs(holds: bool, message: str) -> None:
    if not holds:
        raise ZooError(message)


def _check_image(v: Mapping[str, Any]) -> None:
    _needs(len(v["input"]) == 3, f"input is {v['input']}, expected channels, height, width")
    count = prod(v["input"])
    _needs(count <= _MAX_VALUES, f"input is {v['input']}, {count:,} values, expected at most {_MAX_VALUES:,}")


def _check_cnn(v: Mapping[str, Any]) -> None:
    _check_image(v)
    depth = len(v["channels"])
    _needs(
        all(len(v[key]) == depth for key in ("kernels", "strides", "residuals")),
        f"channels, kernels, strides and residuals differ in length ({depth} channels)",
    )
    _needs(v["same"] or not any(v["residuals"]), "residuals need padding that keeps the size (same = true)")
    _needs(all(k % 2 for k in v["kernels"]) or not v["same"], f"kernels are {v['kernels']}, expected odd ones")
    if v["norm"] == "group":
        _needs(all(c % GROUPS == 0 for c in v["channels"]), f"channels {v['channels']} are not multiples of {GROUPS}")
    sides = v["input"][1:]
    for c, k, s in zip(v["channels"], v["kernels"], v["strides"], strict=True):
        sides = [(side + (2 * (k // 2) if v["same"] else 0) - k) // s + 1 for side in sides]
        _needs(min(sides) >= 1, f"nothing is left of {v['input']} after kernels {v['kernels']}, strides {v['strides']}")
        _needs(c * prod(sides) <= _MAX_VALUES, f"{c} channels of {sides} are more than {_MAX_VALUES:,} values")


def _check_resnet(v: Mapping[str, Any]) -> None:
    _check_image(v)
    # Every block after the first halves the sides; the widest map is bounded by the first one's sides.
    values = max(v["channels"]) * prod(v["input"][1:]) // 4
    _needs(values <= _MAX_VALUES, f"{max(v['channels'])} channels on {v['input']} are more than {_MAX_VALUES:,} values")


def _check_staged(v: Mapping[str, Any]) -> None:
    _check_image(v)
    depth = len(v["channels"]) * v["blocks"]
    _needs(depth <= _MAX_DEPTH, f"{depth} blocks, expected at most {_MAX_DEPTH}")
    values = max(v["channels"]) * prod(v["input"][1:])
    _needs(values <= _MAX_VALUES, f"{max(v['channels'])} channels on {v['input']} are more than {_MAX_VALUES:,} values")


def _check_vgg(v: Mapping[str, Any]) -> None:
    _check_image(v)
    _needs(len(v["pools"]) == len(v["channels"]), f"{len(v['channels'])} channels and {len(v['pools'])} pools")
    pools = sum(v["pools"])
    _needs(min(v["input"][1:]) >> pools >= 1, f"nothing is left of {v['input']} after {pools} pools")
    values = max(v["channels"]) * prod(v["input"][1:])
    _needs(values <= _MAX_VALUES, f"{max(v['channels'])} channels on {v['input']} are more than {_MAX_VALUES:,} values")


def _check_vit(v: Mapping[str, Any]) -> None:
    _check_image(v)
    _check_heads(v)
    height, width = v["input"][1:]
    _needs(height % v["patch"] == 0 == width % v["patch"], f"patches of {v['patch']} do not tile {height} × {width}")
    tokens = height * width // v["patch"] ** 2
    _needs(tokens <= _MAX_TOKENS, f"{tokens} patches, expected at most {_MAX_TOKENS}")


def _check_gpt(v: Mapping[str, Any]) -> None:
    _check_heads(v)
    fits = len(v["input"]) == 1 and v["input"][0] <= _MAX_TOKENS
    _needs(fits, f"input is {v['input']}, expected one length up to {_MAX_TOKENS}")


def _check_heads(v: Mapping[str, Any]) -> None:
    _needs(v["dim"] % v["heads"] == 0, f"{v['heads']} heads do not divide dim {v['dim']}")
    _needs(v["heads"] <= _MAX_HEADS, f"heads is {v['heads']}, expected at most {_MAX_HEADS}")


def _check_mlp(v: Mapping[str, Any]) -> None:
    count = prod(v["input"])
    _needs(count <= _MAX_VALUES, f"input is {v['input']}, {count:,} values, expected at most {_MAX_VALUES:,}")


def _check_siren(v: Mapping[str, Any]) -> None:
    _needs(len(v["input"]) == 1, f"input is {v['input']}, expected one number of coordinates")


def _example(shape: tuple[int, ...]) -> Tensor:
    return torch.randn(2, *shape, device="cpu", generator=torch.Generator().manual_seed(0))


def _mlp(v: Mapping[str, Any]) -> tuple[nn.Module, tuple[Tensor, ...]]:
    count = int(torch.Size(v["input"]).numel())
    return Perceptron([count, *v["widths"], v["classes"]], v["activation"]), (_example(v["input"]),)


def _cnn(v: Mapping[str, Any]) -> tuple[nn.Module, tuple[Tensor, ...]]:
    module = ConvNet(
        v["input"], v["classes"], v["channels"], v["kernels"], v["strides"], v["activation"], v["norm"],
        v["residuals"], v["same"],
    )  # fmt: skip
    return module, (_example(v["input"]),)


def _resnet(v: Mapping[str, Any]) -> tuple[nn.Module, tuple[Tensor, ...]]:
    return ResNet(v["input"], v["classes"], v["channels"], v["activation"]), (_example(v["input"]),)


def _staged(v: Mapping[str, Any]) -> tuple[nn.Module, tuple[Tensor, ...]]:
    module = StagedResNet(v["input"], v["classes"], v["channels"], v["blocks"], v["activation"])
    return module, (_example(v["input"]),)


def _vgg(v: Mapping[str, Any]) -> tuple[nn.Module, tuple[Tensor, ...]]:
    return Vgg(v["input"], v["classes"], v["channels"], v["pools"], v["activation"]), (_example(v["input"]),)


def _vit(v: Mapping[str, Any]) -> tuple[nn.Module, tuple[Tensor, ...]]:
    sizes = (v["patch"], v["dim"], v["depth"], v["heads"], v["hidden"])
    return Vit(v["input"], v["classes"], *sizes, v["activation"]), (_example(v["input"]),)


def _gpt(v: Mapping[str, Any]) -> tuple[nn.Module, tuple[Tensor, ...]]:
    module = Gpt(v["input"][0], v["classes"], v["dim"], v["depth"], v["heads"], v["hidden"], v["activation"])
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(v["classes"], (2, v["input"][0]), device="cpu", generator=generator)
    return module, (tokens,)


def _text_classifier(v: Mapping[str, Any]) -> tuple[nn.Module, tuple[Tensor, ...]]:
    sizes = (v["tokens"], v["dim"], v["depth"], v["heads"], v["hidden"])
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(v["tokens"], (2, v["input"][0]), device="cpu", generator=generator)
    return TextClassifier(v["input"][0], v["classes"], *sizes, v["activation"]), (tokens,)


def _siren(v: Mapping[str, Any]) -> tuple[nn.Module, tuple[Tensor, ...]]:
    return Siren([v["input"][0], *v["widths"], v["classes"]], v["omega"]), (_example(v["input"]),)


KINDS: Mapping[str, Kind] = {
    "mlp": Kind(("input", "classes", "widths", "activation"), _check_mlp, _mlp),
    "cnn": Kind(
        ("input", "classes", "channels", "kernels", "strides", "activation", "norm", "residuals", "same"),
        _check_cnn,
        _cnn,
    ),
    "resnet": Kind(("input", "classes", "channels", "activation"), _check_resnet, _resnet),
    "staged-resnet": Kind(("input", "classes", "channels", "blocks", "activation"), _check_staged, _staged),
    "vgg": Kind(("input", "classes", "channels", "pools", "activation"), _check_vgg, _vgg),
    "vit": Kind(
        ("input", "classes", "patch", "dim", "depth", "heads", "hidden", "activation"), _check_vit, _vit
    ),
    "gpt": Kind(("input", "classes", "dim", "depth", "heads", "hidden", "activation"), _check_gpt, _gpt),
    "text-classifier": Kind(
        ("input", "classes", "tokens", "dim", "depth", "heads", "hidden", "activation"), _check_gpt, _text_classifier
    ),
    "siren": Kind(("input", "classes", "widths", "omega"), _check_siren, _siren),
}
"""Kind in a description -> its entries and its builder."""

__all__ = ["KINDS", "Kind", "module_of"]
