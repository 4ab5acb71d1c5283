"""``ws.embed(x)`` and ``ws.predict_accuracy(x)``: the pretrained metanets asked about one network."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from weightspace.errors import MetanetError, UnprovedWiringError, WiringError
from weightspace.graph import ParameterGraph
from weightspace.pretrained.applicability import Applicability, parameters
from weightspace.pretrained.conformal import Prediction
from weightspace.pretrained.model import Reading, Shipped, nothing, shipped
from weightspace.pretrained.views import clean
from weightspace.wiring.wiring import Wiring


@dataclass(frozen=True, eq=False)
class Embedding:
    """A network as a point: distances between ``vector (d,)`` of two networks say how unlike they are.

    0 is the same network up to permutation, positive rescaling and sign flips; 1 is the usual distance of two
    networks that were trained independently. ``vector`` is None for a network outside the range that was not read;
    ``model`` names the encoder, and only vectors of one encoder compare.
    """

    vector: Tensor | None
    applicability: Applicability
    model: str

    def __repr__(self) -> str:
        size = "no vector" if self.vector is None else f"vector of {len(self.vector)}"
        return f"Embedding({size}, {self.applicability}, {self.model})"


def embed(x: Any, *args: Any, wiring: Wiring | None = None, force: bool = False, **kwargs: Any) -> Embedding:
    """The embedding of a network by the pretrained encoder.

    ``x`` is a path, a ``Checkpoint``, a mapping of tensors, a ``ParameterGraph``, or an ``nn.Module`` followed by
    example inputs as for ``weightspace.wiring``. Counters, names, formats, dtypes and metadata do not move the
    vector; of a record in the file only the description of the network is read, to wire it.

    Whether distances mean anything is said by ``applicability``: the encoder knows small networks like those of
    its training zoo. One that a limit excludes (too many parameters, a wiring that is not proved) is not read,
    unless with ``force=True``.

    Raises ``MetanetError`` for weights that are not finite, and what ``weightspace.open`` and ``weightspace.wiring``
    raise, except where no wiring can be found: such a network is outside.
    """
    model = shipped()
    reading = read(x, *args, wiring=wiring, force=force, model=model, **kwargs)
    return Embedding(reading.vector, reading.applicability, model.name)


def predict_accuracy(
    x: Any, *args: Any, wiring: Wiring | None = None, force: bool = False, **kwargs: Any
) -> Prediction:
    """The test accuracy of an image classifier from its weights alone, with a 90 % interval.

    ``x`` is what ``embed`` takes. The accuracy is that on the network's own data, as in the training zoo (digits and
    small grey photographs); the interval is a split-conformal one. For a network unlike those of the training zoo the
    value is not a number and ``applicability.reason`` says why; ``force=True`` gives it all the same, flagged.

    Raises what ``embed`` raises.
    """
    return read(x, *args, wiring=wiring, force=force, **kwargs).prediction


def read(
    x: Any, *args: Any, wiring: Wiring | None = None, force: bool = False, model: Shipped | None = None, **kwargs: Any
) -> Reading:
    """Everything the pretrained metanets say of a network; see ``embed``."""
    known = model or shipped()
    tensors: Mapping[str, Tensor]
    if isinstance(x, ParameterGraph):
        if x.wiring is None:
            raise MetanetError("this graph has no wiring (it was read back from another format); make it with ws.graph")
        if x.tensors is None:
            raise MetanetError("this graph has no weights, only a structure; make it with ws.graph(checkpoint)")
        tensors, wiring = x.tensors, x.wiring
    else:
        tensors = _tensors(x)
    # Before anything is wired: what is far too large is not even looked at.
    reason = known.range.limits.size(parameters(tensors))
    if reason and not force:
        return outside(reason)
    if wiring is None:
        from weightspace.wiring.entry import wiring as find

        try:
            wiring = find(x if isinstance(x, nn.Module) else tensors, *args, **kwargs)
        except WiringError as error:
            if force:
                raise
            return outside(f"no wiring was found: {_one_line(error)}")
    return read_wired(tensors, wiring, known, force)


def read_wired(tensors: Mapping[str, Tensor], wiring: Wiring, model: Shipped, force: bool = False) -> Reading:
    """The same for tensors whose wiring is known. Limits are checked before a weight is loaded."""
    if not force:
        reason = model.range.limits.size(parameters(tensors))
        if not reason and wiring.status != "proved":
            reason = f"its wiring is {wiring.status}, not proved"
        if reason := reason or _unreadable(tensors, wiring):
            return outside(reason)
    try:
        return model.read(clean(tensors, wiring), force)
    except UnprovedWiringError as error:
        if force:
            raise
        return outside(_one_line(error))


def outside(reason: str) -> Reading:
    """Of a network that is not read."""
    where = Applicability(False, 0.0, reason)
    return Reading(None, where, nothing(where))


def _unreadable(tensors: Mapping[str, Tensor], wiring: Wiring) -> str:
    """Why weights cannot be seen as real numbers; empty where they can. Counters are no weights."""
    dtype = getattr(tensors, "dtype", None)
    for name, role in wiring.roles.items():
        if role == "other" or name not in tensors or name in wiring.untouched:
            continue
        found = dtype(name) if callable(dtype) else tensors[name].dtype
        if not found.is_floating_point:
            return f"its weights {name!r} are {str(found).removeprefix('torch.')} and not real numbers"
    return ""


def _tensors(x: Any) -> Mapping[str, Tensor]:
    if isinstance(x, nn.Module):
        return {name: value for name, value in x.state_dict().items() if isinstance(value, torch.Tensor)}
    if isinstance(x, str | os.PathLike):
        from weightspace import checkpoint

        opened: Mapping[str, Tensor] = checkpoint.open(x)
        return opened
    if isinstance(x, Mapping):
        return x
    raise MetanetError(
        f"cannot read a {type(x).__name__}; expected a path, a Checkpoint, a mapping of tensors, a ParameterGraph, or "
        "an nn.Module with example inputs"
    )


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())
