"""After averaging: the variance that merged networks lose, given back.

Jordan et al. 2023 ("REPAIR"): hidden units of an average of two networks vary less than those of either, more so the
deeper they are. Where batch norms follow, their statistics are measured anew (``reset_statistics``); elsewhere the rows
of every layer are rescaled and shifted until its outputs have the mean and deviation of the ends' (``repair``). Without
data, ``repair_without_data`` judges the loss of variance from the lengths of the rows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from weightspace.errors import AlignmentError
from weightspace.wiring.replay import Inputs, Watcher, batches, prepared, program_of, replay, tensors_in
from weightspace.wiring.wiring import Wiring

Tensors = Mapping[str, Tensor]
_BATCH_NORMS = {
    "native_batch_norm", "_native_batch_norm_legit_no_training", "cudnn_batch_norm", "_batch_norm_no_update",
    "_native_batch_norm_legit", "batch_norm", "miopen_batch_norm",
}  # fmt: skip
_KEEP = {"view", "_unsafe_view", "reshape", "transpose", "permute", "clone", "squeeze", "unsqueeze", "contiguous"}


def reset_statistics(
    wiring: Wiring, tensors: Tensors, inputs: Inputs, *, batch: int | None = 256
) -> dict[str, Tensor]:
    """The tensors with the running means and variances of all batch norms measured anew on ``inputs``.

    As training mode with a cumulative average does it: every batch of ``batch`` examples is normalised by its own
    moments, whose means over the batches are kept. A network without batch norms comes back as it is. Raises
    ``WiringError`` where the wiring has no program.
    """
    out = dict(tensors)
    if not any(r == "variance" for r in wiring.roles.values()):
        return out
    program = program_of(wiring)
    given = prepared(wiring, tensors)
    watcher = _Norms(given)
    for args in batches(inputs, batch):
        replay(program, given, args, watcher)
    for name, sums in watcher.moments.items():
        mean = torch.stack(sums).mean(0)
        for twin, tensor in given.items():
            if tensor is given[name]:
                out[twin] = mean.to(tensors[twin].dtype)
    return out


def repair(
    wiring: Wiring, merged: Tensors, ends: Sequence[Tensors], inputs: Inputs, *, weights: Sequence[float] | None = None,
    batch: int | None = 256,
) -> dict[str, Tensor]:  # fmt: skip
    """The merged network with the statistics of its ends at every layer, measured on ``inputs``.

    ``ends``: the networks that were merged, already aligned; ``weights``: their shares (equal if not given). Layers are
    gone through in the order in which they run: each that writes hidden units is rescaled and shifted, channel by
    channel, so that the mean and the deviation of what it writes are the weighted means of the ends' (the deviation
    alone where it has no bias). Layers in front of batch norms are left to these, which are measured anew afterwards.
    Raises ``WiringError`` where the wiring has no program.
    """
    program = program_of(wiring)
    shares = _shares(ends, weights)
    wanted = [_layer_statistics(wiring, end, inputs, batch) for end in ends]
    now = prepared(wiring, merged)
    moving = _hidden(wiring)
    for layer in [x for x in wanted[0] if x.variance is None and x.weight in moving]:
        key = layer.key
        mean = sum(s * w[i].mean for s, w in zip(shares, wanted, strict=True) for i in _at(w, key))
        deviation = sum(s * w[i].deviation for s, w in zip(shares, wanted, strict=True) for i in _at(w, key))
        watcher = _Layers(now, only=key)
        for args in batches(inputs, batch):
            replay(program, now, args, watcher)
        (is_now,) = watcher.statistics()
        factor = torch.where(is_now.deviation > 1e-6, deviation / is_now.deviation.clamp_min(1e-12), 1.0)
        dim = layer.dim
        shape = [-1 if d == dim else 1 for d in range(now[layer.weight].dim())]
        now[layer.weight].mul_(factor.reshape(shape).float())
        if layer.bias is not None:
            bias = now[layer.bias]
            bias.copy_(((bias.double() - is_now.mean) * factor + mean).float())
    out = {n: now[n].to(merged[n].dtype) if n in now else merged[n] for n in merged}
    return reset_statistics(wiring, out, inputs, batch=batch)


def repair_without_data(
    wiring: Wiring, merged: Tensors, ends: Sequence[Tensors], *, weights: Sequence[float] | None = None
) -> dict[str, Tensor]:
    """The merged network with its loss of variance judged from weights alone.

    Inputs of a layer are taken as uncorrelated and of equal size, so that the variance of what a unit writes goes with
    the squared length of its row of weights. Where a batch norm follows, its running variance becomes the mean of the
    ends' times the row's squared length over the mean of theirs; elsewhere rows get the root mean square length of the
    ends'. Raises ``WiringError`` where the wiring has no program.
    """
    program = program_of(wiring)
    shares = _shares(ends, weights)
    given = prepared(wiring, merged)
    watcher = _Layers(given)
    replay(program, given, program.args, watcher)
    out = dict(merged)
    moving = _hidden(wiring)
    for layer in watcher.statistics():
        if layer.weight not in moving:
            continue
        lengths = [_lengths(end[layer.weight], layer.dim) for end in ends]
        before = sum(s * x for s, x in zip(shares, lengths, strict=True))
        ratio = _lengths(merged[layer.weight], layer.dim) / torch.as_tensor(before).clamp_min(1e-30)
        ratio = torch.where(torch.as_tensor(before) > 1e-30, ratio, torch.ones_like(ratio))
        if layer.variance is not None:
            variance = sum(s * end[layer.variance].double() for s, end in zip(shares, ends, strict=True))
            out[layer.variance] = (variance * ratio).to(merged[layer.variance].dtype)
        else:
            scale = ratio.clamp_min(1e-12).rsqrt().clamp(max=10.0)
            for name in (layer.weight, layer.bias):
                if name is not None:
                    dim = layer.dim if name == layer.weight else 0
                    shape = [-1 if d == dim else 1 for d in range(out[name].dim())]
                    out[name] = (out[name].double() * scale.reshape(shape)).to(merged[name].dtype)
    return out


def _shares(ends: Sequence[Tensors], weights: Sequence[float] | None) -> list[float]:
    if not ends:
        raise AlignmentError("repair needs the networks that were merged; pass ends=[a, aligned b, …]")
    given = [1.0] * len(ends) if weights is None else list(weights)
    if len(given) != len(ends) or sum(given) <= 0:
        raise AlignmentError(f"{len(ends)} ends and weights {given}; give one positive share for each")
    return [w / sum(given) for w in given]


def _lengths(weight: Tensor, dim: int) -> Tensor:
    return weight.detach().double().movedim(dim, 0).flatten(1).square().sum(1)


def _hidden(wiring: Wiring) -> set[str]:
    """Weights whose results can move: rows of the last layer are outputs, and stay."""
    found = set()
    for name, layout in wiring.layouts.items():
        read = wiring.reads.get(name)
        if wiring.roles.get(name) == "weight" and any(
            f in wiring.free
            for g in layout
            if read not in g.dims
            for block in g.blocks
            for s in block
            for f in s.factors
        ):
            found.add(name)
    return found


class _Norms(Watcher):
    """Normalises by the moments of the batch instead of the running ones, and keeps them."""

    def __init__(self, given: Tensors) -> None:
        super().__init__()
        self.names = {id(t): n for n, t in reversed(list(given.items()))}
        self.moments: dict[str, list[Tensor]] = {}

    def instead(self, name: str, func: Any, args: Any, kwargs: Any) -> Any:
        if name not in _BATCH_NORMS:
            return None
        named = dict(zip((x.name for x in func._schema.arguments), args, strict=False)) | dict(kwargs)
        mean, variance = named.get("running_mean"), named.get("running_var")
        if id(mean) not in self.names or id(variance) not in self.names:
            return None
        x = named["input"]
        dims = [d for d in range(x.dim()) if d != 1]
        spread, centre = torch.var_mean(x, dims, correction=0)
        count = x.numel() // max(x.shape[1], 1)
        self.moments.setdefault(self.names[id(mean)], []).append(centre)
        self.moments.setdefault(self.names[id(variance)], []).append(spread * count / max(count - 1, 1))
        arguments = [
            {"running_mean": centre, "running_var": spread}.get(x.name, given)
            for x, given in zip(func._schema.arguments, args, strict=False)
        ]
        keywords = {k: {"running_mean": centre, "running_var": spread}.get(k, v) for k, v in kwargs.items()}
        return func(*arguments, **keywords)


@dataclass(frozen=True)
class _Layer:
    """One weight, the dim that it writes, its bias and the running variance of a batch norm behind it."""

    key: tuple[str, int]
    weight: str
    dim: int
    bias: str | None
    variance: str | None
    mean: Tensor
    deviation: Tensor


def _at(layers: Sequence[_Layer], key: tuple[str, int]) -> list[int]:
    return [i for i, layer in enumerate(layers) if layer.key == key]


def _layer_statistics(wiring: Wiring, tensors: Tensors, inputs: Inputs, batch: int | None) -> list[_Layer]:
    given = prepared(wiring, tensors)
    watcher = _Layers(given)
    for args in batches(inputs, batch):
        replay(program_of(wiring), given, args, watcher)
    return watcher.statistics()


class _Layers(Watcher):
    """Moments of what every linear layer and convolution writes, channel by channel."""

    def __init__(self, given: Tensors, only: tuple[str, int] | None = None) -> None:
        super().__init__()
        self.only = only
        self._names = {id(t): n for n, t in reversed(list(given.items()))}
        self._views: dict[int, tuple[Tensor, str, bool]] = {}
        self._wrote: dict[int, tuple[Tensor, str]] = {}
        self._sums: dict[str, list[Any]] = {}
        self._facts: dict[str, tuple[int, str | None]] = {}
        self._variance: dict[str, str] = {}

    def seen(self, name: str, func: Any, args: Any, kwargs: Any, out: Any) -> None:
        operands = tensors_in(args, kwargs)
        if name == "t" and id(operands[0]) in self._names:
            self._views[id(out)] = (out, self._names[id(operands[0])], True)
        elif name in ("addmm", "mm"):
            self._linear(operands, out)
        elif name in ("convolution", "_convolution", "convolution_overrideable"):
            named = dict(zip((x.name for x in func._schema.arguments), args, strict=False)) | dict(kwargs)
            weight = self._names.get(id(named["weight"]))
            # Groups of a transposed convolution divide its outputs: their channels are not one dim of the weight.
            if weight is not None and not (named["transposed"] and int(named["groups"]) > 1):
                bias = self._names.get(id(named["bias"])) if named["bias"] is not None else None
                self._note(weight, 1 if named["transposed"] else 0, bias, out, 1)
        elif name in _BATCH_NORMS:
            named = dict(zip((x.name for x in func._schema.arguments), args, strict=False)) | dict(kwargs)
            source, variance = self._wrote.get(id(named["input"])), self._names.get(id(named.get("running_var")))
            if source is not None and variance is not None:
                self._variance[source[1]] = variance
        elif name in _KEEP and operands and id(operands[0]) in self._wrote and isinstance(out, Tensor):
            self._wrote[id(out)] = (out, self._wrote[id(operands[0])][1])

    def _linear(self, operands: list[Tensor], out: Tensor) -> None:
        last = operands[-1]
        weight, dim = None, 0
        if id(last) in self._views:
            weight, dim = self._views[id(last)][1], 0
        elif id(last) in self._names:
            weight, dim = self._names[id(last)], 1
        if weight is not None:
            bias = self._names.get(id(operands[0])) if len(operands) == 3 else None
            self._note(weight, dim, bias, out, 1)

    def _note(self, weight: str, dim: int, bias: str | None, out: Tensor, channel: int) -> None:
        self._wrote[id(out)] = (out, weight)
        if self.only is not None and self.only[0] != weight:
            return
        rows = out.movedim(channel, -1).flatten(0, -2).double()
        self._facts.setdefault(weight, (dim, bias))
        sums = self._sums.setdefault(weight, [0, 0.0, 0.0])
        sums[0] += len(rows)
        sums[1] = sums[1] + rows.sum(0)
        sums[2] = sums[2] + rows.square().sum(0)

    def statistics(self) -> list[_Layer]:
        """The layers in the order in which they ran."""
        out = []
        for weight, (count, total, squares) in self._sums.items():
            dim, bias = self._facts[weight]
            mean = total / count
            deviation = (squares / count - mean.square()).clamp_min(0).sqrt()
            out.append(_Layer((weight, dim), weight, dim, bias, self._variance.get(weight), mean, deviation))
        return out


__all__ = ["repair", "repair_without_data", "reset_statistics"]
