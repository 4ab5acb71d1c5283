"""Inputs for the methods that run the network, and the network as a function of the tensors that are merged."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch.utils._pytree import tree_leaves

from weightspace.errors import MergeError
from weightspace.merge.method import Models
from weightspace.wiring.program import Program

if TYPE_CHECKING:
    from weightspace.wiring.wiring import Wiring

Tensor = torch.Tensor


@dataclass(frozen=True, eq=False)
class MergeData:
    """Examples of one model's task.

    ``x``: inputs (n, …), or a tuple of positional arguments of the network, or a mapping of keyword arguments; tensors
    whose first dim is n are cut into batches, everything else goes into every run as it is. ``y``: labels (n,), counted
    over all outputs of the network; hardly any method asks for them. ``outputs``: which of the network's outputs (along
    the last dim) are this task's, a slice or their numbers, where one network has the outputs of several tasks side by
    side: probabilities are then taken over these alone. None: all.
    """

    x: Tensor | tuple[Any, ...] | Mapping[str, Any]
    y: Tensor | None = None
    outputs: slice | Sequence[int] | None = None

    def __post_init__(self) -> None:
        if self.outputs is not None and not isinstance(self.outputs, slice):
            object.__setattr__(self, "outputs", [int(i) for i in self.outputs])
        if len(self) == 0:
            raise MergeError("data without examples: x has no tensor with a first dim of 1 or more")
        if self.y is not None and len(self.y) != len(self):
            raise MergeError(f"{len(self)} inputs and {len(self.y)} labels; one label per input was expected")

    def __len__(self) -> int:
        found = next((t for t in self._parts() if isinstance(t, Tensor) and t.dim()), None)
        return 0 if found is None else int(found.shape[0])

    @property
    def args(self) -> tuple[Any, ...]:
        """Positional arguments of the network."""
        if isinstance(self.x, Mapping):
            return ()
        return self.x if isinstance(self.x, tuple) else (self.x,)

    @property
    def kwargs(self) -> dict[str, Any]:
        """Keyword arguments of the network."""
        return dict(self.x) if isinstance(self.x, Mapping) else {}

    def take(self, which: Tensor | slice) -> MergeData:
        """Some of the examples."""
        count = len(self)

        def cut(t: Any) -> Any:
            return t[which] if isinstance(t, Tensor) and t.dim() and t.shape[0] == count else t

        x: Any = (
            {k: cut(v) for k, v in self.x.items()} if isinstance(self.x, Mapping)
            else tuple(map(cut, self.x)) if isinstance(self.x, tuple) else cut(self.x)
        )  # fmt: skip
        return replace(self, x=x, y=None if self.y is None else self.y[which])

    def batches(self, size: int) -> Iterator[MergeData]:
        """All examples, ``size`` at a time."""
        for start in range(0, len(self), size):
            yield self.take(slice(start, start + size))

    def draw(self, size: int, generator: torch.Generator) -> MergeData:
        """``size`` examples at random, each at most once (all of them where there are no more)."""
        return self.take(torch.randperm(len(self), generator=generator)[:size])

    def own(self, outputs: Tensor) -> Tensor:
        """The outputs (…, all) that are this task's: (…, own)."""
        return outputs if self.outputs is None else outputs[..., self.outputs]

    def labels(self, total: int) -> Tensor:
        """``y`` counted within the task's own outputs, of ``total`` that the network has. Raises `MergeError`."""
        if self.y is None:
            raise MergeError("labels are needed: give the data as (x, y)")
        if self.outputs is None:
            return self.y
        place = torch.full((total,), -1)
        own = torch.arange(total)[self.outputs]
        place[own] = torch.arange(len(own))
        found = place[self.y]
        if bool((found < 0).any()):
            wrong = int(self.y[found < 0][0])
            raise MergeError(f"label {wrong} is none of the outputs {own.tolist()}; labels count over all outputs")
        return found

    def _parts(self) -> list[Any]:
        return list(self.x.values()) if isinstance(self.x, Mapping) else list(self.args)


def entries(models: Models) -> tuple[MergeData, ...]:
    """The data of each model: a tensor of inputs, ``(inputs, labels)`` or a `MergeData`.

    One that is not in a list is for all models. Raises `MergeError` for anything else.
    """
    given, count = models.data, len(models.models)
    if isinstance(given, (list, tuple)) and not (isinstance(given, tuple) and _is_pair(given)):
        if len(given) != count:
            raise MergeError(f"data has {len(given)} entries for {count} models; give one per model, or one for all")
        return tuple(_entry(item) for item in given)
    return (_entry(given),) * count


def joined(models: Models) -> MergeData:
    """The inputs of all models' data as one. Raises `MergeError` where they are of different forms."""
    found = list(dict.fromkeys(entries(models)))
    if len(found) == 1:
        return found[0]
    if any(len(d.args) != len(found[0].args) or set(d.kwargs) != set(found[0].kwargs) for d in found):
        raise MergeError("the models' data are put together, so their inputs have to be of one form")
    counts = [len(d) for d in found]

    def along(parts: Sequence[Any]) -> Any:
        cut = [isinstance(p, Tensor) and p.dim() > 0 and len(p) == n for p, n in zip(parts, counts, strict=True)]
        return torch.cat(list(parts)) if all(cut) else parts[0]

    if found[0].kwargs:
        return MergeData({k: along([d.kwargs[k] for d in found]) for k in found[0].kwargs})
    return MergeData(tuple(along(parts) for parts in zip(*(d.args for d in found), strict=True)))


def arguments(program: Program, data: MergeData) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """What a program is run with: the data, and of its example's keyword arguments those that are no tensors.

    Inputs by position for a network whose example has them by name take these names in order. Floating-point inputs
    become float32. Raises `MergeError` for more inputs than the network has names for.
    """
    args, kwargs = data.args, data.kwargs
    names = [k for k, v in program.kwargs.items() if isinstance(v, Tensor)]
    if args and names and not program.args:
        if len(args) > len(names):
            raise MergeError(f"{len(args)} inputs were given; the network was wired with {', '.join(names)}")
        args, kwargs = (), dict(zip(names, args, strict=False))
    fixed = {k: v for k, v in program.kwargs.items() if not isinstance(v, Tensor)}
    return tuple(map(_input, args)), {**fixed, **{k: _input(v) for k, v in kwargs.items()}}


def by_position(wiring: Wiring, data: MergeData) -> tuple[Wiring, tuple[Any, ...]]:
    """The wiring with a program that takes all inputs by position, and the inputs."""
    program = wiring.program
    if program is None or not (program.kwargs or data.kwargs):
        return wiring, tuple(map(_input, data.args))
    args, kwargs = arguments(program, data)
    names = [k for k, v in kwargs.items() if isinstance(v, Tensor)]
    fixed = {k: v for k, v in kwargs.items() if k not in names}
    count, whole = len(args), program.run

    def run(tensors: Mapping[str, Tensor], *given: Any) -> Any:
        return whole(tensors, *given[:count], **dict(zip(names, given[count:], strict=True)), **fixed)

    inputs = (*args, *(kwargs[n] for n in names))
    return wiring.with_(program=replace(program, run=run, args=inputs, kwargs={})), inputs


def _input(value: Any) -> Any:
    return value.to(torch.float32) if isinstance(value, Tensor) and value.is_floating_point() else value


def _is_pair(item: tuple[Any, ...]) -> bool:
    return len(item) == 2 and all(isinstance(t, Tensor) for t in item) and not item[1].is_floating_point()


def _entry(item: Any) -> MergeData:
    if isinstance(item, MergeData):
        return item
    if isinstance(item, (Tensor, Mapping)):
        return MergeData(item)
    if isinstance(item, (tuple, list)) and _is_pair(tuple(item)):
        return MergeData(item[0], item[1])
    raise MergeError(
        f"data holds a {type(item).__name__}; per model a tensor of inputs (n, …), (inputs, labels), or a MergeData "
        "was expected"
    )


class Network:
    """The network as a function of the tensors that are merged.

    ``names``: those of `Models.names` that it runs on, tied ones under one name; ``learned``: of these, what has a
    gradient, which running statistics of norms have not. Raises `UnprovedWiringError` where
    there is no proved wiring with a program.
    """

    def __init__(self, models: Models) -> None:
        self.program: Program = models.program
        first: dict[int, str] = {}
        merged = set(models.names)
        # Of tied tensors the one that is merged stands for all.
        for name in sorted(self.program.tensors, key=lambda n: n not in merged):
            first.setdefault(id(self.program.tensors[name]), name)
        self.twin = {name: first[id(tensor)] for name, tensor in self.program.tensors.items()}
        self.names = tuple(n for n in models.names if self.twin.get(n) == n)
        self.reads = models.proved.reads
        roles = models.proved.roles
        self.learned = tuple(n for n in self.names if roles.get(n) not in ("mean", "variance"))

    def tensors(self, model: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """A model's tensors for ``outputs``: float32, in memory, tied ones once."""
        return {name: _float32(model[name]) for name, twin in self.twin.items() if name == twin}

    def outputs(self, tensors: Mapping[str, Tensor], data: MergeData) -> Tensor:
        """All outputs for some examples: (n, …, outputs). Raises `MergeError` where the network returns no such
        thing."""
        args, kwargs = arguments(self.program, data)
        given = {name: tensors[twin] for name, twin in self.twin.items()}
        found = self.program.run(given, *args, **kwargs)
        if isinstance(found, Mapping) and isinstance(found.get("logits"), Tensor):
            found = found["logits"]
        if not isinstance(found, Tensor):
            leaves = [t for t in tree_leaves(found) if isinstance(t, Tensor) and t.is_floating_point() and t.dim() > 1]
            if not leaves:
                raise MergeError("the network returns no tensor of outputs (n, …, outputs)")
            found = leaves[0]
        return found

    def own(self, tensors: Mapping[str, Tensor], data: MergeData) -> Tensor:
        """The outputs of the examples' own task: (n, …, own)."""
        return data.own(self.outputs(tensors, data))


def _float32(tensor: Tensor) -> Tensor:
    tensor = tensor.detach()
    return tensor.to(torch.float32) if tensor.is_floating_point() else tensor


def foreign(network: Network, tensors: Mapping[str, Tensor], data: MergeData, examples: int = 64) -> dict[str, Tensor]:
    """Which elements of each tensor only other tasks' outputs depend on: bool, of its shape. Empty without ``outputs``.

    A row of a weight is so (an element of another tensor) where the gradient of all own outputs is zero on these
    examples and that of others is not: the rows of an output layer with the outputs of several tasks.
    """
    if data.outputs is None:
        return {}
    few = data.take(slice(0, examples))
    with torch.enable_grad():
        leaves = {n: tensors[n].clone().requires_grad_(True) for n in network.learned}
        out = network.outputs({**tensors, **leaves}, few)
        mine = torch.zeros(out.shape[-1])
        mine[data.outputs] = 1.0
        # Random weights, so that outputs do not cancel each other (those of a softmax sum to one).
        mix = torch.rand(out.shape, generator=torch.Generator().manual_seed(0)) + 0.5
        grads = [
            torch.autograd.grad((out * mix * part).sum(), list(leaves.values()), retain_graph=True, allow_unused=True)
            for part in (mine, 1 - mine)
        ]
    found = {}
    for (name, leaf), own, other in zip(leaves.items(), *grads, strict=True):
        mine = torch.zeros_like(leaf, dtype=torch.bool) if own is None else own != 0
        theirs = torch.zeros_like(leaf, dtype=torch.bool) if other is None else other != 0
        if name in network.reads:
            # A row as a whole: inputs that happen to be zero on these examples say nothing of it.
            mine, theirs = (m.any(network.reads[name], keepdim=True).expand_as(leaf) for m in (mine, theirs))
        found[name] = theirs & ~mine
    return found


def owned(tensors: Sequence[Tensor], weights: Sequence[float], others: Sequence[Tensor | None]) -> Tensor:
    """The weighted mean over the models that an element belongs to, over all where it belongs to none.

    ``others``: per model, which elements are other tasks' (see `foreign`); None: none of them.
    """
    total = sum(weights)
    plain = sum((t * (w / total) for t, w in zip(tensors, weights, strict=True)), torch.zeros(()))
    if all(o is None for o in others):
        return plain
    shares = [
        torch.full_like(t, w) if o is None else w * (~o).to(t)
        for t, w, o in zip(tensors, weights, others, strict=True)
    ]
    below = sum(shares, torch.zeros(()))
    above = sum((t * s for t, s in zip(tensors, shares, strict=True)), torch.zeros(()))
    return torch.where(below > 0, above / below.clamp(min=1e-12), plain)


__all__ = ["MergeData", "Network", "arguments", "by_position", "entries", "foreign", "joined", "owned"]
