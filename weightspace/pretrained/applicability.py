"""Whether a learned score may be believed: how far a network lies from those that were learned from.

Cheap limits come first (parameters, roles, activations, a wiring that is proved), so that a network that is outside
for certain is not read. Then two distances count, each to the ``NEIGHBOURS``-th nearest network of the training zoo:
that of the embeddings, and that of the training-free descriptors with what their principal components leave over.
Each is divided by the same distance of those neighbours (as in the local outlier factor, Breunig et al. 2000), since
some populations lie denser than others, and by what that usually is; the larger one is the statistic, and its rank
among networks of held-out runs is the score: a conformal p-value of "this network comes from the training zoo" (Vovk et
al. 2005; for distances to neighbours Laxhammar and Falkman 2011).
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor

from weightspace.graph import ParameterGraph

NEIGHBOURS = 5
LEAST = 0.02
"""A network whose score is not above this is outside: as many of the networks of held-out runs are."""

_SLACK = 2.0
# Nearest networks that do not count for a network of the training zoo itself: other checkpoints of its run.
_OWN = 3
# Share of the median radius that is added to all, so that copies in the training zoo do not make a radius of 0.
_FLOOR = 0.3


@dataclass(frozen=True)
class Applicability:
    """Whether a learned score holds for a network.

    ``score`` is the share of networks of held-out runs that lie at least as far from the training zoo: about
    uniform in [0, 1] for networks like those, 0 for one that a limit excludes. ``inside`` is ``score > LEAST``,
    and ``reason`` says why it is not (empty inside).
    """

    inside: bool
    score: float
    reason: str = ""

    def __str__(self) -> str:
        return f"inside ({self.score:.2f})" if self.inside else f"outside: {self.reason}"


@dataclass(frozen=True)
class Limits:
    """What the training zoo holds at all: a network beyond is outside without being read.

    ``parameters``: fewest and most, widened by a factor of two; ``tensors``: most; ``rank``: most dimensions of a
    tensor; ``roles`` and ``activations`` that occur.
    """

    parameters: tuple[int, int]
    tensors: int
    rank: int
    roles: frozenset[str]
    activations: frozenset[str]

    @classmethod
    def of(cls, graphs: Collection[ParameterGraph]) -> Limits:
        """The limits that just hold these networks, with some slack in their sizes."""
        sizes = [graph.num_parameters for graph in graphs]
        parts = {id(graph.wiring): graph for graph in graphs}.values()
        return cls(
            parameters=(int(min(sizes) / _SLACK), int(max(sizes) * _SLACK)),
            tensors=int(_SLACK * max(len(graph.shapes) for graph in graphs)),
            rank=max(len(shape) for graph in parts for shape in graph.shapes.values()),
            roles=frozenset(role for graph in parts for role in _roles(graph)),
            activations=frozenset(name for graph in parts for name in _activations(graph)),
        )

    def size(self, parameters: int) -> str:
        """Why a network of so many parameters is outside; empty where it may be inside."""
        low, high = self.parameters
        if low <= parameters <= high:
            return ""
        return f"it has {parameters:,} parameters, the networks learned from have {low:,} to {high:,}"

    def excluded(self, graph: ParameterGraph) -> str:
        """Why a network is outside, from its wiring and its shapes alone; empty where it may be inside."""
        if graph.wiring is None or graph.status != "proved":
            state = "unknown" if graph.wiring is None else graph.status
            return f"its wiring is {state}, not proved"
        if reason := self.size(graph.num_parameters):
            return reason
        if len(graph.shapes) > self.tensors:
            return f"it has {len(graph.shapes)} tensors, the networks learned from at most {self.tensors}"
        rank = max((len(shape) for shape in graph.shapes.values()), default=0)
        if rank > self.rank:
            return f"it has a tensor of {rank} dimensions, the networks learned from at most {self.rank}"
        for kind, found, known in (
            ("role", _roles(graph), self.roles),
            ("activation", _activations(graph), self.activations),
        ):
            if unknown := sorted(found - known):
                return f"it has tensors of the {kind} {unknown[0]!r}, which no network learned from has" if (
                    kind == "role"
                ) else f"it has the activation {unknown[0]!r}, which no network learned from has"
        return ""

    def to_dict(self) -> dict[str, Any]:
        """The limits as JSON can hold them."""
        return {k: sorted(v) if isinstance(v, frozenset) else v for k, v in asdict(self).items()}

    @classmethod
    def from_dict(cls, found: dict[str, Any]) -> Limits:
        """What ``to_dict`` gave."""
        low, high = found["parameters"]
        return cls(
            (int(low), int(high)), int(found["tensors"]), int(found["rank"]), frozenset(found["roles"]),
            frozenset(found["activations"]),
        )  # fmt: skip


@dataclass(frozen=True, eq=False)
class Range:
    """The training zoo as its applicability needs it.

    ``views``: one matrix ``(networks, d)`` for each way of seeing a network, with ``radii (networks,)``, how far its
    neighbours are from each. ``units``: the usual ratio of distance and radius in each. ``calibration (m,)``: the
    statistic of networks of held-out runs, sorted.
    """

    limits: Limits
    views: tuple[Tensor, ...]
    radii: tuple[Tensor, ...]
    units: tuple[float, ...]
    calibration: Tensor

    @classmethod
    def fit(cls, limits: Limits, views: Sequence[Tensor], held_out: Sequence[Tensor]) -> Range:
        """From ``views`` of networks learned from and of networks of ``held_out`` runs: ``(n, d)`` and ``(m, d)``."""
        radii = tuple(_radii(view) for view in views)
        far = [_ratios(*given) for given in zip(held_out, views, radii, strict=True)]
        units = tuple(max(float(d.median()), 1e-6) for d in far)
        statistic = torch.stack([d / u for d, u in zip(far, units, strict=True)]).amax(0)
        return cls(limits, tuple(views), radii, units, statistic.sort().values)

    def statistic(self, views: Sequence[Tensor]) -> Tensor:
        """The larger of the ratios of networks seen as ``views``, in their units: ``(n,)``."""
        far = [_ratios(*given) for given in zip(views, self.views, self.radii, strict=True)]
        return torch.stack([d / u for d, u in zip(far, self.units, strict=True)]).amax(0)

    def scores(self, views: Sequence[Tensor]) -> Tensor:
        """Conformal p-values of networks seen as ``views``: ``(n,)``, above 0 and at most 1."""
        below = torch.searchsorted(self.calibration, self.statistic(views).contiguous())
        m = len(self.calibration)
        return (1 + m - below).to(torch.float64) / (1 + m)

    def of(self, views: Sequence[Tensor]) -> Applicability:
        """The applicability of one network, seen as ``views`` of ``(1, d)`` each."""
        score = float(self.scores(views)[0])
        if score > LEAST:
            return Applicability(True, score)
        times = float(self.statistic(views)[0] / self.calibration.median())
        reason = f"it lies {times:.1f} times as far from the networks learned from as held-out ones usually do"
        return Applicability(False, score, reason)


def nearest(queries: Tensor, reference: Tensor, k: int = NEIGHBOURS) -> tuple[Tensor, Tensor]:
    """Distances of ``queries (n, d)`` to the ``k`` nearest of ``reference (m, d)`` and their numbers: ``(n, k)``."""
    far = torch.cdist(queries.to(torch.float64), reference.to(torch.float64))
    found = far.topk(min(k, reference.shape[0]), dim=1, largest=False)
    return found.values, found.indices


def _radii(view: Tensor) -> Tensor:
    far, _ = nearest(view, view, NEIGHBOURS + _OWN)
    radii = far[:, -1]
    return radii + _FLOOR * radii.median().clamp_min(1e-6)


def _ratios(queries: Tensor, reference: Tensor, radii: Tensor) -> Tensor:
    """How much farther than their neighbours' neighbours the neighbours of ``queries (n, d)`` are: ``(n,)``."""
    far, which = nearest(queries, reference)
    return far[:, -1] / radii.to(torch.float64)[which].mean(1)


def parameters(tensors: Any) -> int:
    """Floating-point numbers in a mapping of tensors, from its header where it is a lazy checkpoint."""
    shape, dtype = getattr(tensors, "shape", None), getattr(tensors, "dtype", None)
    if callable(shape) and callable(dtype):
        return sum(prod(shape(name)) for name in tensors if dtype(name).is_floating_point)
    return sum(t.numel() for t in tensors.values() if t.is_floating_point())


def _roles(graph: ParameterGraph) -> frozenset[str]:
    roles: dict[str, Any] = dict(graph.wiring.roles) if graph.wiring is not None else {}
    return frozenset(str(roles.get(name, "other")) for name in graph.shapes)


def _activations(graph: ParameterGraph) -> frozenset[str]:
    if graph.wiring is None:
        return frozenset()
    return frozenset(name for names in graph.wiring.activations.values() for name in names)
