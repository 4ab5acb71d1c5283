"""One network taken apart for its page: wiring table, graph, layers, channels. Everything here is picklable and small.

``structure`` reads no weights: the graph of a billion parameters is there in seconds. ``examine`` reads every weight
once, tensor by tensor, in a worker; nothing in its result grows with the number of weights.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from math import prod
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from weightspace.errors import WeightspaceError
from weightspace.graph.statistics import of_tensor
from weightspace.progress import bar

if TYPE_CHECKING:
    import pandas as pd
    from torch import Tensor

    from weightspace.checkpoint import Checkpoint
    from weightspace.graph import ParameterGraph
    from weightspace.wiring.wiring import Wiring

Array = NDArray[np.float64]
_BINS = 80
_SAMPLE = 2_000_000
"""Elements of a tensor, evenly spaced, that its distribution is taken of; up to twice as many where that is all."""
_EXACT = 2_000_000_000
"""Multiplications that the singular values of a matrix may cost exactly; above, the leading ones are estimated."""
_LEADING = 64
_ODD = 6.0
"""Deviations (robust ones) from the median of its axis at which a channel is called odd."""
_PIECE = 1 << 24
"""Elements that are squared at once."""


@dataclass(frozen=True)
class Layer:
    """One tensor: its statistics, its distribution (``counts`` in ``edges``) and its singular values, where it has any.

    Statistics are of all finite elements (``zeros`` their share that is zero), ``broken`` is the number of the others;
    of a large tensor the distribution is that of two million elements or a few more, evenly spaced. ``exact`` is False
    where only the leading singular values were estimated. ``rank`` is the stable rank ``|W|² / σ₁²``, NaN for vectors.
    """

    name: str
    role: str
    shape: tuple[int, ...]
    axes: tuple[str, ...]
    mean: float
    std: float
    low: float
    high: float
    norm: float
    zeros: float
    broken: int
    counts: Array = field(repr=False)
    edges: Array = field(repr=False)
    values: Array = field(repr=False)
    exact: bool = True

    @property
    def rank(self) -> float:
        if not len(self.values) or not self.values[0]:
            return float("nan")
        return float((self.values**2).sum() / self.values[0] ** 2)


@dataclass(frozen=True)
class Channels:
    """The elements of one axis: norms of what comes into each and of what goes out (NaN where nothing does)."""

    axis: str
    kind: str
    into: Array = field(repr=False)
    out: Array = field(repr=False)

    def odd(self) -> list[tuple[int, str]]:
        """Elements that are dead (nothing comes in, or nothing goes out) or far from the others, with the reason."""
        found: dict[int, str] = {}
        for words, values in (("incoming", self.into), ("outgoing", self.out)):
            known = np.isfinite(values)
            for i in np.flatnonzero(known & (values == 0)):
                found.setdefault(int(i), f"dead: its {words} weights are all zero")
            if not (values[known] > 0).any():
                continue
            logs = np.log(np.where(known & (values > 0), values, np.nan))
            middle = np.nanmedian(logs)
            spread = max(1.4826 * float(np.nanmedian(np.abs(logs - middle))), 0.02)
            away = (logs - middle) / spread
            for i in np.flatnonzero(np.nan_to_num(np.abs(away)) > _ODD):
                times = float(np.exp(logs[i] - middle))
                found.setdefault(int(i), f"odd: the norm of its {words} weights is {times:.2g} times the usual one")
        return sorted(found.items())


@dataclass(frozen=True)
class Structure:
    """What ``structure`` found without reading weights. ``graph``: as ``ParameterGraph.describe`` has it, None where
    there is none; ``rows`` the wiring table: tensor, role, shape, axes. ``why`` says what is missing and why."""

    rows: tuple[tuple[str, str, str, str], ...]
    graph: Mapping[str, Any] | None
    why: str = ""


@dataclass(frozen=True)
class Anatomy:
    """What ``examine`` found in the weights."""

    layers: tuple[Layer, ...]
    channels: tuple[Channels, ...]

    def layer_table(self) -> pd.DataFrame:
        """A row per tensor."""
        import pandas as pd

        return pd.DataFrame(
            {
                "tensor": [x.name for x in self.layers], "role": [x.role for x in self.layers],
                "shape": [" × ".join(map(str, x.shape)) or "1" for x in self.layers],
                "elements": [prod(x.shape) for x in self.layers], "mean": [x.mean for x in self.layers],
                "std": [x.std for x in self.layers], "min": [x.low for x in self.layers],
                "max": [x.high for x in self.layers], "norm": [x.norm for x in self.layers],
                "largest singular value": [x.values[0] if len(x.values) else np.nan for x in self.layers],
                "stable rank": [x.rank for x in self.layers], "zeros": [x.zeros for x in self.layers],
                "not finite": [x.broken for x in self.layers],
            }
        )  # fmt: skip

    def odd_table(self) -> pd.DataFrame:
        """A row per dead or odd channel."""
        import pandas as pd

        rows = [
            (c.axis, i, why.partition(":")[0], why.partition(": ")[2], c.into[i], c.out[i])
            for c in self.channels for i, why in c.odd()
        ]  # fmt: skip
        columns = ["axis", "element", "kind", "why", "incoming norm", "outgoing norm"]
        return pd.DataFrame(rows, columns=columns)


def structure(address: str) -> Structure:
    """How a model is wired: no weight is read but those that a proof draws, so that a billion parameters take seconds.
    Raises ``CheckpointError`` for a file that cannot be read."""
    from weightspace.checkpoint import open as open_checkpoint
    from weightspace.graph import graph as parameter_graph

    checkpoint = open_checkpoint(address)
    with bar("wiring", 1) as step:
        wiring, why = _wired(checkpoint)
        step("")
    rows = []
    for name in _ordered(checkpoint, wiring):
        role, axes = _place(name, wiring)
        rows.append((name, role, " × ".join(map(str, checkpoint.shape(name))) or "1", ", ".join(axes)))
    described = None
    if wiring is not None:
        try:
            described = parameter_graph(checkpoint, wiring).describe()
        except WeightspaceError as error:
            why = str(error)
    return Structure(tuple(rows), described, why)


def examine(address: str) -> Anatomy:
    """Read every weight once. Raises ``CheckpointError`` for a file that cannot be read."""
    from weightspace.checkpoint import open as open_checkpoint
    from weightspace.graph import graph as parameter_graph

    checkpoint = open_checkpoint(address)
    with bar("wiring", 1) as step:
        wiring, _ = _wired(checkpoint)
        step("")
    layers = []
    names = _ordered(checkpoint, wiring)
    with bar("layers", len(names)) as step:
        for name in names:
            role, axes = _place(name, wiring)
            layers.append(layer(name, checkpoint[name], role, axes, wiring))
            step(name)
    channels: list[Channels] = []
    if wiring is not None:
        # Without a graph there are no channels; the page on the graph says why.
        with contextlib.suppress(WeightspaceError):
            channels = channels_of(parameter_graph(checkpoint, wiring))
    return Anatomy(tuple(layers), tuple(channels))


def _wired(checkpoint: Checkpoint) -> tuple[Wiring | None, str]:
    from weightspace.wiring import wiring as find_wiring

    try:
        return find_wiring(checkpoint), ""
    except WeightspaceError as error:
        return None, str(error)


def _ordered(checkpoint: Checkpoint, wiring: Wiring | None) -> list[str]:
    """Tensors in order of use, then the others."""
    roles = {} if wiring is None else wiring.roles
    return [n for n in roles if n in checkpoint] + [n for n in checkpoint if n not in roles]


def _place(name: str, wiring: Wiring | None) -> tuple[str, tuple[str, ...]]:
    """A tensor's role and axes."""
    if wiring is None or name not in wiring:
        return "", ()
    return str(wiring.roles.get(name, "")), tuple(a.name for a in wiring[name])


def layer(name: str, tensor: Tensor, role: str, axes: tuple[str, ...], wiring: Wiring | None) -> Layer:
    """Statistics, distribution and singular values of one tensor."""
    import torch

    value = torch.view_as_real(tensor.detach()) if tensor.is_complex() else tensor.detach()
    flat = value.reshape(-1)
    whole = of_tensor(flat)
    broken = whole.nan + whole.infinite
    empty, shape = np.zeros(0), tuple(tensor.shape)
    if whole.count == 0:
        nan = float("nan")
        return Layer(name, role, shape, axes, nan, nan, nan, nan, nan, 0.0, broken, empty, empty, empty)
    some = flat[:: max(1, flat.numel() // _SAMPLE)].double()
    bins = min(_BINS, max(8, int(min(whole.count, _SAMPLE) ** 0.5)))
    counts, edges = empty, empty
    # No bins where doubles do not reach, or cannot tell them apart.
    with contextlib.suppress(ValueError), np.errstate(all="ignore"):
        counts, edges = np.histogram(some[torch.isfinite(some)].numpy(), bins=bins, range=(whole.min, whole.max))
    values, exact = (empty, True)
    if role not in ("mean", "variance", "other") and value.dim() >= 2 and not broken:
        values, exact = singular_values(matrix_of(name, value, wiring))
    zeros = (flat.numel() - int(flat.count_nonzero())) / whole.count
    return Layer(
        name, role, shape, axes, whole.mean, whole.std, whole.min, whole.max, whole.norm, zeros, broken,
        counts.astype(float), edges, values, exact,
    )  # fmt: skip


def matrix_of(name: str, value: Tensor, wiring: Wiring | None) -> Tensor:
    """A tensor as (outputs, all that is summed over): the dim that its operation contracts joins the trailing ones."""
    if wiring is not None and wiring.reads.get(name) == 0 and value.dim() == 2:
        return value.T
    return value.reshape(value.shape[0], -1)


def singular_values(matrix: Tensor) -> tuple[Array, bool]:
    """Singular values, largest first, and whether they are all of them: of large matrices the leading 64 are estimated
    (Halko, Martinsson & Tropp 2011)."""
    import torch

    rows, columns = matrix.shape
    small = min(rows, columns)
    if small * rows * columns <= _EXACT:
        found = torch.linalg.svdvals(matrix.float())
        return found.double().numpy(), True
    with torch.random.fork_rng():
        torch.manual_seed(0)
        _, found, _ = torch.svd_lowrank(matrix.float(), q=_LEADING, niter=2)
    return found.double().numpy(), False


def channels_of(graph: ParameterGraph) -> list[Channels]:
    """Norms into and out of every element of every movable axis."""
    into: dict[str, Array] = {}
    out: dict[str, Array] = {}

    with bar("channels", len(graph.blocks)) as step:
        for block in graph.blocks:
            tensor = graph.real(block.tensor)
            if tensor.is_floating_point() and graph.cells[block.dst].movable | graph.cells[block.src].movable:
                rows, columns = squares_of(block.matrix(tensor))
                for store, cell, places, sums in (
                    (into, block.dst, block.index(), rows), (out, block.src, block.source_index(), columns)
                ):  # fmt: skip
                    np.add.at(store.setdefault(cell, np.zeros(graph.cells[cell].size)), places.numpy(), sums)
            step(block.tensor)
    found = []
    for name, held in graph.cells.items():
        if not held.movable or held.size < 2 or (name not in into and name not in out):
            continue
        missing = np.full(held.size, np.nan)
        found.append(
            Channels(name, "movable", np.sqrt(into[name]) if name in into else missing,
                     np.sqrt(out[name]) if name in out else missing)
        )  # fmt: skip
    return found


def squares_of(matrix: Tensor) -> tuple[Array, Array]:
    """Sums of squares over the columns and over the rows of ``(shared, out, in, width)``, some rows at a time."""
    import torch

    shared, out, into, width = matrix.shape
    rows, columns = torch.zeros(shared, out, dtype=torch.float64), torch.zeros(shared, into, dtype=torch.float64)
    at_once = max(1, _PIECE // max(1, shared * into * width))
    for start in range(0, out, at_once):
        squares = matrix[:, start : start + at_once].float().square().sum(-1)
        rows[:, start : start + at_once] = squares.sum(2).double()
        columns += squares.sum(1).double()
    return rows.numpy(), columns.numpy()


__all__ = [
    "Anatomy", "Channels", "Layer", "Structure", "channels_of", "examine", "layer", "singular_values", "squares_of",
    "structure",
]  # fmt: skip
