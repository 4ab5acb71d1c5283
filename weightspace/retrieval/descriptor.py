"""A fixed-length description of a network that needs no training and that no symmetry changes.

Every feature is a function of one tensor that stays the same when the elements of any of its axes are
permuted, when its axes change places (a kernel stored HWIO or OIHW, a linear layer stored transposed),
when axes of size one come or go, and when rows or columns change sign (the symmetry of odd activations):
quantiles of absolute values, moments of even order, norms of the slices along each axis, singular values of
the unfolding along each axis. Tensors are then pooled as a set, so their order and their names do not matter
either. A proved wiring adds what one tensor cannot tell: axes that are permuted together count as one. What
is left out on purpose: names, formats, dtypes, integer tensors (counters, position tables), tensors of one
element and optimiser state, none of which say what the network computes.

The features are scaled by fixed numbers, not by a fit to some zoo: a distance between two models means the
same in every zoo and does not move when models are added.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from weightspace.errors import WeightspaceError

if TYPE_CHECKING:
    from weightspace.wiring.wiring import Wiring

VERSION = 2
"""Raised whenever the features change, so that an index made with older ones is made again."""

Array = NDArray[np.float64]

_VALUE_QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95, 0.99, 1.0)
_SLICE_QUANTILES = (0.0, 0.1, 0.25, 0.5, 0.75, 0.9, 1.0)
_SPECTRUM_QUANTILES = (0.0, 0.1, 0.25, 0.5, 0.75, 0.9)
_POOL_QUANTILES = (0.0, 0.25, 0.5, 0.75, 1.0)
_POOLS = ("mean", "deviation", "min", "q25", "median", "q75", "max")

_LARGEST_SORT = 1 << 23
"""Tensors with more elements than this are read in float32, their values through a histogram of log |w|."""

_LARGEST_SPECTRUM = 1536
"""Sides longer than this get their spectrum from its first two moments instead of an eigenvalue problem."""

_OPTIMISER = re.compile(
    r"(^|[./_])(optimi[sz]er(_\w+)?|optim|exp_avg(_sq)?|momentum_buffer|max_exp_avg_sq|adam_[mv]|training_weights)([./]|$)"
)


def _names(prefix: str, quantiles: Iterable[float]) -> list[str]:
    return [f"{prefix} q{round(100 * q)}" for q in quantiles]


_VECTOR_FEATURES = ["log rms", *_names("|w|", _VALUE_QUANTILES), "log kurtosis"]
_AXIS_FEATURES = [
    "top singular value",
    "effective rank",
    "participation",
    *_names("singular value", _SPECTRUM_QUANTILES),
    "slice spread",
    *_names("slice norm", _SLICE_QUANTILES),
    "slice kurtosis",
]
_BLOCK_FEATURES = [
    *_VECTOR_FEATURES,
    *(f"{feature} ({pool} over axes)" for pool in ("mean", "max") for feature in _AXIS_FEATURES),
    "log longest axis",
    "log next axis",
    "log elements",
]
_GLOBAL_FEATURES = ["log elements", "log blocks", "log vectors", "share in vectors"]

FEATURES: tuple[str, ...] = (
    *(f"model: {feature}" for feature in _GLOBAL_FEATURES),
    *(f"blocks: {feature}, {pool}" for pool in _POOLS for feature in _BLOCK_FEATURES),
    *(f"vectors: {feature}, {pool}" for pool in _POOLS for feature in _VECTOR_FEATURES),
)
"""Name of each entry of a descriptor, in order."""

DIMENSION = len(FEATURES)


@dataclass(frozen=True)
class Description:
    """A descriptor and what it was made from.

    ``vector`` has shape (DIMENSION,), float64. ``used`` and ``left_out`` partition the tensor names;
    ``left_out`` maps each to the reason.
    """

    vector: Array
    used: tuple[str, ...]
    left_out: Mapping[str, str]


def describe(tensors: Mapping[str, Tensor], wiring: Wiring | None = None) -> Description:
    """Describe a network by what no symmetry of it changes.

    ``tensors`` maps names to tensors of any shape and dtype and may be lazy: one tensor is held at a time.
    A proved ``wiring`` says which tensors take part in the function, and which of their axes belong together
    because one is permuted in its own way at each position of the other: heads and the channels inside each
    head, when they are kept as two axes. Without it every tensor counts and every axis stands for itself;
    a wiring that is not proved changes nothing.
    Non-finite entries count as zero. Raises ``WeightspaceError`` when no tensor is left to describe.
    """
    proved = wiring if wiring is not None and wiring.status == "proved" else None
    chosen = None if proved is None else frozenset(proved) - frozenset(proved.untouched)
    blocks: list[Array] = []
    vectors: list[Array] = []
    used: list[str] = []
    left_out: dict[str, str] = {}
    for name in tensors:
        reason = _why_not(name, chosen)
        if reason is None:
            value = tensors[name]
            if not (value.is_floating_point() or value.is_complex()):
                reason = f"{str(value.dtype).removeprefix('torch.')} values are not weights"
            elif value.numel() <= 1:
                reason = "one element"
        if reason is not None:
            left_out[name] = reason
            continue
        value = torch.view_as_real(value) if value.is_complex() else value
        value = value.detach()
        if proved is not None and value.dim() == len(proved[name]):
            value = _joined(value, together(proved, name))
        value = value.squeeze()
        (blocks if value.dim() >= 2 else vectors).append(_features(value))
        used.append(name)
    if not used:
        raise WeightspaceError(
            f"nothing to describe: of {len(left_out)} tensors none holds floating-point weights of more "
            "than one element; a descriptor needs at least one such tensor"
        )
    log_elements = _BLOCK_FEATURES.index("log elements")
    in_blocks = sum(10 ** float(block[log_elements]) for block in blocks)
    in_vectors = sum(10 ** float(vector[-1]) for vector in vectors)
    model = np.array(
        [
            math.log10(in_blocks + in_vectors),
            math.log10(1 + len(blocks)),
            math.log10(1 + len(vectors)),
            in_vectors / (in_blocks + in_vectors),
        ]
    )
    pooled = [_pool(blocks, len(_BLOCK_FEATURES)), _pool([v[:-1] for v in vectors], len(_VECTOR_FEATURES))]
    return Description(np.concatenate([model, *pooled]), tuple(used), left_out)


def together(wiring: Wiring, name: str) -> list[tuple[int, ...]]:
    """The axes of a tensor in groups that the wiring's symmetries move as one: a partition of its dims."""
    groups = [
        (set(group.dims), {f for b in group.blocks for s in b for f in s.factors}) for group in wiring.layouts[name]
    ]
    found: list[tuple[set[int], set[str]]] = []
    for dims, factors in groups:
        kept = []
        for other_dims, other_factors in found:
            if _fibred(wiring, factors, other_factors) or _fibred(wiring, other_factors, factors):
                dims, factors = dims | other_dims, factors | other_factors
            else:
                kept.append((other_dims, other_factors))
        found = [*kept, (dims, factors)]
    return sorted(tuple(sorted(dims)) for dims, _ in found)


def distances(query: Array, others: Array) -> Array:
    """Distances from ``query`` (DIMENSION,) to each row of ``others`` (n, DIMENSION): shape (n,).

    Root mean square over features, so that a distance of 1 means features one unit apart (a factor of ten in
    a norm or a size, all of the range of a share).
    """
    difference = np.asarray(others, dtype=np.float64) - np.asarray(query, dtype=np.float64)
    return np.asarray(np.sqrt(np.mean(difference * difference, axis=-1)), dtype=np.float64)


def _fibred(wiring: Wiring, factors: set[str], over: set[str]) -> bool:
    """Is one of the factors permuted in its own way at each position of one of the others?"""
    return any(base in over for factor in factors for base in wiring.factors[factor].over)


def _joined(value: Tensor, groups: Sequence[tuple[int, ...]]) -> Tensor:
    """The tensor with one axis for each group of its axes."""
    if all(len(group) == 1 for group in groups):
        return value
    sizes = [math.prod(value.shape[dim] for dim in group) for group in groups]
    return value.permute([dim for group in groups for dim in group]).reshape(sizes)


def _why_not(name: str, chosen: frozenset[str] | None) -> str | None:
    if chosen is not None and name not in chosen:
        return "takes no part in the wired function"
    if _OPTIMISER.search(name):
        return "optimiser state"
    return None


def _pool(rows: list[Array], width: int) -> Array:
    """Pool the features of a set of tensors, whatever its order: (n, width) -> (len(_POOLS) * width,)."""
    if not rows:
        return np.zeros(len(_POOLS) * width)
    table = np.sort(np.stack(rows), axis=0)
    quantiles = np.quantile(table, _POOL_QUANTILES, axis=0)
    return np.concatenate([table.mean(axis=0), table.std(axis=0), *quantiles])


def _features(value: Tensor) -> Array:
    """Features of one tensor without axes of size one; the last entry is log10 of its number of elements."""
    count = value.numel()
    value = value.to(torch.float64 if count <= _LARGEST_SORT else torch.float32)
    value = torch.nan_to_num(value, nan=0.0, posinf=0.0, neginf=0.0)
    rms = float(_norm(value, 2)) / math.sqrt(count)
    shared = [math.log10(rms + 1e-6), *_shape_of_values(value, rms)]
    if value.dim() < 2:
        return np.array([*shared, math.log10(count)])
    axes = np.stack([_axis_features(value, axis, rms) for axis in range(value.dim())])
    lengths = sorted(value.shape, reverse=True)[:2]
    return np.array(
        [*shared, *axes.mean(axis=0), *axes.max(axis=0), *np.log10(lengths), math.log10(count)],
        dtype=np.float64,
    )


def _norm(value: Tensor, order: int, dim: tuple[int, ...] | None = None) -> Tensor:
    """The p-norm over some axes, accumulated in float64 without a copy of the powers."""
    norm: Tensor = torch.linalg.vector_norm(value, order, dim=dim, dtype=torch.float64)
    return norm


def _shape_of_values(value: Tensor, rms: float) -> list[float]:
    """Quantiles of |w| in units of the root mean square, and the log of the kurtosis."""
    if rms == 0.0:
        return [0.0] * (len(_VALUE_QUANTILES) + 1)
    log_kurtosis = 4 * math.log10(float(_norm(value, 4)) / rms) - math.log10(value.numel())
    return [*(_quantiles(value.abs().flatten(), _VALUE_QUANTILES) / rms), log_kurtosis]


def _quantiles(values: Tensor, quantiles: tuple[float, ...]) -> Array:
    """Quantiles of non-negative values, interpolated; from a histogram of log2 when there are many."""
    if values.numel() <= _LARGEST_SORT:
        return np.asarray(np.quantile(values.numpy(), quantiles), dtype=np.float64)
    largest = float(values.max())
    # 2**-40 of the largest value is below what float16 resolves; everything smaller falls in the lowest bin.
    bins, lowest = 1 << 14, -40.0
    logs = torch.log2(values / largest).clamp_(min=lowest)
    counts = torch.histc(logs, bins=bins, min=lowest, max=0.0)
    cumulative = torch.cumsum(counts, 0) / values.numel()
    edges = torch.linspace(lowest, 0.0, bins + 1, dtype=torch.float64)
    wanted = torch.tensor(quantiles, dtype=cumulative.dtype)
    index = torch.searchsorted(cumulative, wanted).clamp_(max=bins - 1)
    result = (largest * torch.exp2((edges[index] + edges[index + 1]) / 2)).numpy()
    return np.where(np.asarray(quantiles) >= 1.0, largest, result)


def _axis_features(value: Tensor, axis: int, rms: float) -> list[float]:
    """Features of the unfolding of ``value`` along one axis: its spectrum and the norms of its slices."""
    if rms == 0.0:
        return [0.0] * len(_AXIS_FEATURES)
    length = value.shape[axis]
    width = value.numel() // length
    others = tuple(dim for dim in range(value.dim()) if dim != axis)
    slice_rms = _norm(value, 2, others) / math.sqrt(width)
    alive = slice_rms > 0
    log_fourth = 4 * torch.log10(_norm(value, 4, others)[alive] / slice_rms[alive]) - math.log10(width)
    slice_rms /= rms
    spectrum = _spectrum(value.movedim(axis, 0).reshape(length, width))
    share = spectrum / spectrum.sum()
    positive = share[share > 0]
    rank = len(share)
    entropy = -float((positive * np.log(positive)).sum())
    singular = np.sqrt(spectrum) / (rms * (math.sqrt(length) + math.sqrt(width)))
    return [
        math.log10(float(singular.max())),
        math.exp(entropy) / rank,
        1.0 / (rank * float((share * share).sum())),
        *np.quantile(singular, _SPECTRUM_QUANTILES),
        float(slice_rms.std(correction=0)),
        *np.quantile(slice_rms.numpy(), _SLICE_QUANTILES),
        float(log_fourth.mean()),
    ]


def _spectrum(matrix: Tensor) -> Array:
    """Squared singular values of a matrix (rows, columns), ascending, min(rows, columns) of them."""
    if matrix.shape[0] > matrix.shape[1]:
        matrix = matrix.T
    gram = (matrix @ matrix.T).to(torch.float64)
    side = gram.shape[0]
    if side <= _LARGEST_SPECTRUM:
        return np.asarray(np.clip(torch.linalg.eigvalsh(gram).numpy(), 0.0, None), dtype=np.float64)
    # Too long to diagonalise: the log-normal spectrum with the same trace and the same sum of squares.
    trace, fourth = float(gram.diagonal().sum()), float((gram * gram).sum())
    spread = math.sqrt(max(0.0, math.log(side * fourth / trace**2)))
    positions = torch.special.ndtri((torch.arange(side, dtype=torch.float64) + 0.5) / side)
    spectrum = torch.exp(spread * positions)
    return np.asarray((spectrum * (trace / float(spectrum.sum()))).numpy(), dtype=np.float64)
