"""Second moments of what each weight is multiplied with, on real inputs.

A weight ``W`` with inputs ``x`` computes ``W x``. The second-moment matrix ``Σ x xᵀ`` is all that is needed to keep
what a layer computes while its weights are merged (RegMean, Jin et al. 2023) or refitted by least squares (PLeaS,
Nasery et al. 2024). Which entries of which tensor an operation multiplies is followed exactly: every weight is
shadowed by the addresses of its entries, which go through the same views, slices, transpositions and copies.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any

import torch
from torch.utils._pytree import tree_map

from weightspace.errors import WiringError
from weightspace.wiring.replay import Inputs, Watcher, batches, prepared, program_of, replay, tensors_in
from weightspace.wiring.wiring import Wiring

# Operations that move the entries of a tensor and nothing else.
_MOVES = {
    "view", "_unsafe_view", "reshape", "_reshape_alias", "t", "transpose", "permute", "slice", "select", "split",
    "split_with_sizes", "chunk", "unbind", "squeeze", "unsqueeze", "expand", "clone", "contiguous", "detach", "alias",
    "_to_copy", "unflatten", "flatten", "movedim", "narrow", "as_strided", "flip",
}  # fmt: skip
_CONVOLUTIONS = {"convolution", "_convolution", "convolution_overrideable"}


@dataclass(frozen=True, eq=False)
class Gram:
    """Second moments of the inputs of one weight tensor, for each part of it that has inputs of its own.

    ``inputs``: the dims of the tensor that are summed over, flattened in this order to ``n`` (a convolution's are its
    input channels and kernel positions). ``parts``: ranges along dim ``split``; a plain layer has one part, the whole
    dim; a grouped convolution one per group; queries, keys and values packed into one tensor one each where their
    inputs differ. ``moments``: per part the sum of ``x xᵀ`` over ``count`` sampled positions, (n, n) float64;
    ``totals``: the sum of ``x``, (n,).
    """

    inputs: tuple[int, ...]
    split: int
    parts: tuple[tuple[int, int], ...]
    moments: tuple[torch.Tensor, ...]
    totals: tuple[torch.Tensor, ...]
    counts: tuple[int, ...]

    def matrices(self, tensor: torch.Tensor) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Per part, ``moments / count`` (n, n) and the part of the tensor as a matrix (n, outputs)."""
        for (lo, hi), moment, count in zip(self.parts, self.moments, self.counts, strict=True):
            yield moment / max(count, 1), self._front(tensor.narrow(self.split, lo, hi - lo))

    def assemble(self, matrices: Sequence[torch.Tensor], like: torch.Tensor) -> torch.Tensor:
        """The tensor whose parts are these matrices (n, outputs); the shape and dtype of ``like``."""
        out = torch.empty_like(like)
        for (lo, hi), matrix in zip(self.parts, matrices, strict=True):
            part = out.narrow(self.split, lo, hi - lo)
            rest = [d for d in range(part.dim()) if d not in self.inputs]
            order = [*self.inputs, *rest]
            spread = matrix.reshape([part.shape[d] for d in order])
            part.copy_(spread.permute([order.index(d) for d in range(part.dim())]))
        return out

    def _front(self, part: torch.Tensor) -> torch.Tensor:
        rest = [d for d in range(part.dim()) if d not in self.inputs]
        n = prod(part.shape[d] for d in self.inputs)
        return part.permute(*self.inputs, *rest).reshape(n, -1)

    def __repr__(self) -> str:
        n = self.moments[0].shape[0]
        return f"Gram({len(self.parts)} part(s) of {n} inputs, {sum(self.counts):,} positions)"


class Grams(Mapping[str, Gram]):
    """``tensor name -> Gram``; ``left_out`` says of every other weight why it has none."""

    def __init__(self, grams: Mapping[str, Gram], left_out: Mapping[str, str]) -> None:
        self._grams = dict(grams)
        self.left_out = dict(left_out)

    def __getitem__(self, name: str) -> Gram:
        try:
            return self._grams[name]
        except KeyError:
            why = self.left_out.get(name, "no operation of the network contracts it")
            raise KeyError(f"no second moments for {name!r}: {why}") from None

    def __contains__(self, name: object) -> bool:
        return name in self._grams

    def __iter__(self) -> Iterator[str]:
        return iter(self._grams)

    def __len__(self) -> int:
        return len(self._grams)

    def __repr__(self) -> str:
        return f"Grams({len(self)} tensors, {len(self.left_out)} left out)"


def contractions(
    wiring: Wiring, tensors: Mapping[str, torch.Tensor], inputs: Inputs, *, only: Sequence[str] | None = None,
    positions: int = 4096, batch: int | None = 64, seed: int = 0, largest: int = 8192,
) -> Grams:  # fmt: skip
    """Second-moment matrices of the inputs of every weight, from ``inputs`` sent through the wiring's program.

    ``positions`` bounds how many positions (examples × places) of each operation and batch of ``batch`` examples
    count; they are drawn with ``seed``, the same for two networks of one wiring. ``only`` names the tensors wanted, so
    that a large network can be gone through in portions; weights with more than ``largest`` inputs are left out and
    named in ``left_out``, and so are tables that are looked up and weights that go through other operations first.

    Memory: a float64 matrix (n, n) per part of every tensor wanted, and the activations of one batch.
    Raises ``WiringError`` where the wiring has no program or a tensor is missing.
    """
    program = program_of(wiring)
    given = prepared(wiring, tensors)
    watcher = _Contractions(given, only, positions, seed, largest)
    for args in batches(inputs, batch):
        watcher.start()
        replay(program, given, args, watcher)
    grams: dict[str, Gram] = {}
    first: dict[int, str] = {}
    for name, tensor in given.items():
        twin = first.setdefault(id(tensor), name)
        if twin in watcher.parts:
            try:
                grams[name] = watcher.gram(twin, tensor)
            except WiringError as error:
                watcher.left_out[name] = str(error)
        elif twin in watcher.left_out:
            watcher.left_out[name] = watcher.left_out[twin]
    wanted = set(given if only is None else only)
    unknown = wanted - set(given)
    if unknown:
        raise WiringError(
            f"no tensor {min(unknown)!r} in the network ({wiring.origin}), which has {', '.join(list(given)[:5])} …"
        )
    for name, role in wiring.roles.items():
        if role in ("weight", "lookup") and name in wanted and name not in grams:
            table = "looked up, not multiplied" if role == "lookup" else "goes through other operations before its use"
            watcher.left_out.setdefault(name, table)
    return Grams(
        {n: g for n, g in grams.items() if n in wanted}, {n: r for n, r in watcher.left_out.items() if n in wanted}
    )


@dataclass
class _Part:
    """What has been summed for one part of a tensor."""

    moment: torch.Tensor
    total: torch.Tensor
    count: int = 0


@dataclass
class _Sums:
    """The parts of a tensor by (split dim, start, stop), and the dims they are summed over."""

    inputs: tuple[int, ...]
    parts: dict[tuple[int, int, int], _Part] = field(default_factory=dict)


class _Contractions(Watcher):
    def __init__(
        self, given: Mapping[str, torch.Tensor], only: Sequence[str] | None, positions: int, seed: int, largest: int
    ) -> None:
        super().__init__()
        self.given, self.positions, self.seed, self.largest = given, positions, seed, largest
        self.wanted = set(given if only is None else only)
        self.parts: dict[str, _Sums] = {}
        self.left_out: dict[str, str] = {}
        self._runs = 0
        self._shadows: dict[int, tuple[torch.Tensor, str, torch.Tensor]] = {}
        # Tied tensors are wanted under any of their names.
        self._twins: dict[int, list[str]] = {}
        for name, tensor in given.items():
            self._twins.setdefault(id(tensor), []).append(name)

    def start(self) -> None:
        """Before each run: the shadow of every named tensor holds the addresses of its entries."""
        self._runs += 1
        self._shadows = {}
        for tensor in self.given.values():
            names = self._twins[id(tensor)]
            if tensor.is_floating_point() and tensor.dim() >= 2 and self.wanted & set(names):
                dtype = torch.int32 if tensor.numel() < 1 << 31 else torch.int64
                addresses = torch.arange(tensor.numel(), dtype=dtype).view(tensor.shape)
                self._shadows[id(tensor)] = (tensor, names[0], addresses)

    def seen(self, name: str, func: Any, args: Any, kwargs: Any, out: Any) -> None:
        operands = tensors_in(args, kwargs)
        shadowed = [x for x in operands if id(x) in self._shadows]
        if not shadowed:
            return
        if name in _MOVES and len(operands) == 1:
            _, source, addresses = self._shadows[id(operands[0])]
            moved = tensors_in(_moved(func, args, kwargs, addresses))
            for result, shadow in zip(tensors_in(out), moved, strict=True):
                self._shadows[id(result)] = (result, source, shadow)
            return
        if name in _CONVOLUTIONS:
            self._convolution(func, args, kwargs)
        elif name in ("mm", "addmm"):
            x, w = operands[-2:]
            if id(w) in self._shadows and id(x) not in self._shadows:
                self._contract(w, self._of(w)[None], lambda _: x)
            elif id(x) in self._shadows and id(w) not in self._shadows:
                self._contract(x, self._of(x).t()[None], lambda _: w.t())
        elif name in ("bmm", "baddbmm"):
            x, w = operands[-2:]
            if id(w) in self._shadows and id(x) not in self._shadows:
                self._contract(w, self._of(w), lambda g: x[g])
            elif id(x) in self._shadows and id(w) not in self._shadows:
                self._contract(x, self._of(x).transpose(1, 2), lambda g: w[g].t())
        elif name in ("mv", "addmv"):
            w, x = operands[-2:]
            if id(w) in self._shadows and id(x) not in self._shadows:
                self._contract(w, self._of(w).t()[None], lambda _: x[None])

    def _of(self, tensor: torch.Tensor) -> torch.Tensor:
        return self._shadows[id(tensor)][2]

    def _contract(self, weight: torch.Tensor, addresses: torch.Tensor, inputs: Any) -> None:
        """A weight used as matrices (g, n, outputs), given by their addresses; ``inputs(g)`` is (positions, n)."""
        _, name, _ = self._shadows[id(weight)]
        shape = self.given[name].shape
        for g, matrix in enumerate(addresses.unbind(0)):
            found = _geometry(matrix, shape)
            if found is None:
                self.left_out[name] = "used in pieces that are not whole rows"
                return
            dims, order, part = found
            if self._refused(name, dims):
                return
            self._add(name, dims, part, self._sample(inputs(g))[:, order])

    def _convolution(self, func: Any, args: Any, kwargs: Any) -> None:
        named = dict(zip((a.name for a in func._schema.arguments), args, strict=False)) | dict(kwargs)
        x, w = named["input"], named["weight"]
        if id(w) not in self._shadows:
            return
        _, name, addresses = self._shadows[id(w)]
        shape = self.given[name].shape
        whole = addresses.shape == shape or addresses.squeeze().shape == torch.Size(n for n in shape if n > 1)
        if not whole or not bool((addresses.reshape(-1) == torch.arange(addresses.numel())).all()):
            self.left_out[name] = "a convolution uses it in another order than it is kept in"
            return
        if w.shape != shape:
            # Unsqueezed on the way (a 1-d convolution run as a 2-d one): dims of size 1 stand for nothing.
            self.left_out[name] = f"kept as {tuple(shape)} and convolved as {tuple(w.shape)}"
            return
        groups, transposed = int(named["groups"]), bool(named["transposed"])
        spatial = w.dim() - 2
        kernel = tuple(w.shape[2:])
        stride, padding, dilation = (_spread(named[k], spatial) for k in ("stride", "padding", "dilation"))
        dims = (0, *range(2, w.dim())) if transposed else tuple(range(1, w.dim()))
        if self._refused(name, dims, groups if transposed else 1):
            return
        if transposed:
            # The same sums as a plain convolution over the input with zeros between its entries, kernel reversed.
            x = _dilated(x, stride)
            padding = tuple(d * (k - 1) - p for d, k, p in zip(dilation, kernel, padding, strict=True))
            extra = _spread(named["output_padding"], spatial)
            pads = [(p, p + e) for p, e in zip(padding, extra, strict=True)]
            stride = (1,) * spatial
        else:
            pads = [(p, p) for p in padding]
        patches = _patches(x, kernel, stride, pads, dilation)
        places = torch.Size((patches.shape[0], *patches.shape[2 : 2 + spatial]))
        at = torch.unravel_index(self._chosen(places.numel()), places)
        moved = patches.movedim(1, 1 + spatial)
        rows = moved[at]
        if transposed:
            rows = rows.flip(list(range(2, rows.dim())))
        split = 0
        width = w.shape[0] // groups
        for g, part in enumerate(rows.unflatten(1, (groups, -1)).unbind(1)):
            self._add(name, dims, (split, g * width, (g + 1) * width), part.flatten(1))

    def _refused(self, name: str, dims: tuple[int, ...], share: int = 1) -> bool:
        n = prod(self.given[name].shape[d] for d in dims) // share
        if n > self.largest:
            self.left_out[name] = f"{n:,} inputs, more than {self.largest:,} (largest=)"
        return n > self.largest

    def _add(self, name: str, dims: tuple[int, ...], part: tuple[int, int, int], rows: torch.Tensor) -> None:
        sums = self.parts.setdefault(name, _Sums(dims))
        if sums.inputs != dims:
            self.left_out[name] = f"summed over dims {sums.inputs} in one operation and {dims} in another"
            return
        x = rows.to(torch.float64)
        kept = sums.parts.get(part)
        if kept is None:
            n = x.shape[1]
            kept = sums.parts[part] = _Part(torch.zeros(n, n, dtype=x.dtype), torch.zeros(n, dtype=x.dtype))
        kept.moment.addmm_(x.t(), x)
        kept.total += x.sum(0)
        kept.count += len(x)

    def _chosen(self, count: int) -> torch.Tensor:
        if count <= self.positions:
            return torch.arange(count)
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self._runs * 1009 + self.step)
        return torch.randperm(count, generator=generator)[: self.positions].sort().values

    def _sample(self, rows: torch.Tensor) -> torch.Tensor:
        return rows[self._chosen(len(rows))] if len(rows) > self.positions else rows

    def gram(self, name: str, tensor: torch.Tensor) -> Gram:
        """What was summed for a tensor; raises ``WiringError`` where its parts do not tile it."""
        sums = self.parts[name]
        if name in self.left_out:
            raise WiringError(self.left_out[name])
        splits = {s for s, _, _ in sums.parts}
        ranges = sorted((lo, hi) for _, lo, hi in sums.parts)
        split = splits.pop()
        tiles = [0, *(hi for _, hi in ranges)] == [*(lo for lo, _ in ranges), tensor.shape[split]]
        if splits or not tiles:
            raise WiringError("parts of it are used in ways that do not tile it")
        parts = [sums.parts[(split, lo, hi)] for lo, hi in ranges]
        return Gram(
            sums.inputs, split, tuple(ranges), tuple(p.moment for p in parts), tuple(p.total for p in parts),
            tuple(p.count for p in parts),
        )  # fmt: skip


def _moved(func: Any, args: Any, kwargs: Any, addresses: torch.Tensor) -> Any:
    """The operation carried out on the addresses instead."""
    keywords = {k: v for k, v in kwargs.items() if k not in ("dtype", "device", "layout", "pin_memory")}
    return func(*tree_map(lambda x: addresses if isinstance(x, torch.Tensor) else x, tuple(args)), **keywords)


def _geometry(
    matrix: torch.Tensor, shape: torch.Size
) -> tuple[tuple[int, ...], torch.Tensor, tuple[int, int, int]] | None:
    """Of a matrix (n, outputs) of addresses in a tensor: the dims summed over, the order of the n, and which part.

    The order sorts the inputs as the tensor has them. None where the inputs are not whole dims, or the outputs are not
    a range along one dim.
    """
    down = torch.stack(torch.unravel_index(matrix[:, 0].long(), shape))
    across = torch.stack(torch.unravel_index(matrix[0].long(), shape))
    dims = tuple(d for d in range(len(shape)) if len(down) and bool((down[d] != down[d, 0]).any()))
    if not dims:
        # One input: any dim of one entry stands for it.
        single = [d for d, n in enumerate(shape) if n == 1]
        dims = tuple(single[:1])
    if not dims or prod(shape[d] for d in dims) != len(matrix):
        return None
    order = torch.argsort(matrix[:, 0])
    whole = [d for d in range(len(shape)) if d not in dims]
    ranges = {d: (int(across[d].min()), int(across[d].max()) + 1) for d in whole}
    if prod(hi - lo for lo, hi in ranges.values()) != matrix.shape[1]:
        return None
    cut = [d for d, (lo, hi) in ranges.items() if hi - lo != shape[d]]
    if len(cut) > 1:
        return None
    split = cut[0] if cut else (whole[0] if whole else 0)
    lo, hi = ranges.get(split, (0, shape[split]))
    return dims, order, (split, lo, hi)


def _spread(value: Any, spatial: int) -> tuple[int, ...]:
    found = tuple(int(v) for v in value)
    return found * spatial if len(found) == 1 else found


def _dilated(x: torch.Tensor, stride: Sequence[int]) -> torch.Tensor:
    """Zeros between the entries of the spatial dims."""
    sizes = [(n - 1) * s + 1 for n, s in zip(x.shape[2:], stride, strict=True)]
    out = x.new_zeros(*x.shape[:2], *sizes)
    out[(slice(None), slice(None), *(slice(None, None, s) for s in stride))] = x
    return out


def _patches(
    x: torch.Tensor, kernel: Sequence[int], stride: Sequence[int], pads: Sequence[tuple[int, int]],
    dilation: Sequence[int],
) -> torch.Tensor:  # fmt: skip
    """What each output position sees: (batch, channels, *places, *kernel), a view of the padded input."""
    flat = [p for pair in reversed(pads) for p in pair]
    x = torch.nn.functional.pad(x, flat) if any(flat) else x
    for d, (k, s, step) in enumerate(zip(kernel, stride, dilation, strict=True)):
        x = x.unfold(2 + d, step * (k - 1) + 1, s)
    for d, step in enumerate(dilation):
        at = x.dim() - len(kernel) + d
        if step > 1:
            x = x[(*(slice(None),) * at, slice(None, None, step))]
    return x


__all__ = ["Gram", "Grams", "contractions"]
