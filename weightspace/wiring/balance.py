"""The representative of least norm among all positive rescalings of a network's tensors.

Minimises ``F(u) = sum_x t_x^2 exp(2 sum e u)`` over the logarithms ``u`` of the scales: convex, with a unique
minimiser up to directions that move nothing, where incoming and outgoing norms are equal for exponents of 1 and -1
(Stock et al. 2019, "Equi-normalization of neural networks"). A few sweeps of block coordinate descent, each block
in closed form, lead into the region where Newton steps (solved by conjugate gradients) converge quadratically; deep
chains would keep coordinate descent alone busy for thousands of sweeps. The tensors are squared and summed over all
other dims once; after that only matrices of neurons by neurons are read.

Where all nonzero slices of an element have exponents of one sign, the infimum lies at infinity; then the weighted norm
``sum |e| |t|^2`` of that side is set to 1, which minimises ``F(u) -+ 2 u``. Elements without any weight stay.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from math import prod

import torch

from weightspace.wiring.slots import Slot

# (generator, exponent, slot)
Action = tuple[int, int, Slot]
Vector = list[torch.Tensor]
_SWEEPS = 3
_CONJUGATE = 300
# Hessians of up to as many entries are written out.
_DENSE = 4_000_000


@dataclass(frozen=True)
class _Axis:
    """One axis of a squared tensor: which elements of which generators scale its positions."""

    labels: tuple[tuple[int, int, torch.Tensor], ...]


@dataclass(frozen=True)
class _Square:
    """Squares of a tensor, ``(networks, first axis, second axis)``, the rest summed out."""

    values: torch.Tensor
    axes: tuple[_Axis, ...]


def balance(
    tensors: Mapping[str, torch.Tensor], actions: Mapping[str, Sequence[Action]], counts: Sequence[int], batch: int,
    tolerance: float, sweeps: int,
) -> Vector:  # fmt: skip
    """Logarithms of the scales, ``(networks, elements)`` for every generator, in float64.

    Stops when the largest step left is below ``tolerance`` or after ``sweeps`` sweeps and Newton steps together.
    """
    squares = [_square(tensors[name], acting, counts, batch) for name, acting in actions.items()]
    problem = _Problem(squares, counts)
    u = [torch.zeros(problem.networks, n, dtype=torch.float64, device=problem.device) for n in counts]
    before = float("inf")
    for k in range(sweeps):
        moved = problem.sweep(u) if k < _SWEEPS else problem.newton(u)
        # Below 1e-6 Newton steps square; where they do not, rounding is all that is left.
        if moved <= tolerance or (k > _SWEEPS and moved < 1e-6 and moved > before / 2):
            break
        before = moved
    return u


def _square(tensor: torch.Tensor, acting: Sequence[Action], counts: Sequence[int], batch: int) -> _Square:
    """The squares over at most two axes; a third kind of dims is joined to the second axis."""
    t = tensor.to(torch.float64)
    t = t.reshape(-1, *t.shape[batch:])
    groups = list(dict.fromkeys(slot.dims for _, _, slot in acting))
    sizes = {d: t.shape[d + 1] for g in groups for d in g}
    parts = [groups[:1], groups[1:]] if len(groups) > 1 else [groups]
    order = [d for part in parts for g in part for d in g]
    rest = [d for d in range(t.dim() - 1) if d not in order]
    # What is not finite has no norm; it stays what it is.
    q = t.square().nan_to_num(0, 0, 0).permute(0, *(d + 1 for d in order), *(d + 1 for d in rest))
    q = q.flatten(1 + len(order)).sum(-1) if rest else q
    axes, shape = [], []
    for part in parts:
        widths = [prod(sizes[d] for d in g) for g in part]
        total = prod(widths)
        shape.append(total)
        labels = []
        for generator, e, slot in acting:
            if slot.dims in part:
                k = part.index(slot.dims)
                label = torch.where(slot.label < 0, counts[generator], slot.label).reshape(
                    [widths[k] if i == k else 1 for i in range(len(part))]
                )
                labels.append((generator, e, label.expand(widths).reshape(-1).to(t.device)))
        axes.append(_Axis(tuple(labels)))
    return _Square(q.reshape(len(t), *shape), tuple(axes))


class _Problem:
    """``F`` with its blocks, gradient and Hessian."""

    def __init__(self, squares: Sequence[_Square], counts: Sequence[int]) -> None:
        self.squares, self.counts = squares, list(counts)
        self.networks = squares[0].values.shape[0] if squares else 1
        self.device = squares[0].values.device if squares else torch.device("cpu")
        zero = [torch.zeros(self.networks, n, dtype=torch.float64, device=self.device) for n in counts]
        norms = self._norms(zero, range(len(counts)))
        up = [sum((a for e, a in n.items() if e > 0), z) > 0 for n, z in zip(norms, zero, strict=True)]
        down = [sum((a for e, a in n.items() if e < 0), z) > 0 for n, z in zip(norms, zero, strict=True)]
        # The slope that makes an element with one side only end at norm 1 (see the module's head).
        self.pull = [(p & ~m).double() - (m & ~p).double() for p, m in zip(up, down, strict=True)]

    def _logs(self, axis: _Axis, u: Vector) -> torch.Tensor:
        out: torch.Tensor | None = None
        for g, e, label in axis.labels:
            padded = torch.cat((u[g], u[g].new_zeros(self.networks, 1)), 1)
            term = e * padded.index_select(1, label)
            out = term if out is None else out + term
        assert out is not None
        return out

    def _weights(self, square: _Square, u: Vector) -> list[torch.Tensor]:
        return [torch.exp(2 * self._logs(axis, u)) for axis in square.axes]

    @staticmethod
    def _sums(square: _Square, w: Sequence[torch.Tensor], k: int) -> torch.Tensor:
        """Squares summed over the axis other than ``k``, weighted there by ``w``."""
        if len(square.axes) == 1:
            return square.values
        path = "nab,nb->na" if k == 0 else "nab,na->nb"
        return torch.einsum(path, square.values, w[1 - k])

    def _gather(self, values: torch.Tensor, label: torch.Tensor, count: int) -> torch.Tensor:
        return values.new_zeros(self.networks, count + 1).index_add_(1, label, values)[:, :count]

    def _norms(self, u: Vector, generators: Sequence[int] | range) -> list[dict[int, torch.Tensor]]:
        """For each generator, squared norms ``(networks, elements)`` of what has each exponent."""
        found: dict[int, dict[int, torch.Tensor]] = {g: {} for g in generators}
        for square in self.squares:
            if not any(g in found for axis in square.axes for g, _, _ in axis.labels):
                continue
            w = self._weights(square, u)
            for k, axis in enumerate(square.axes):
                if any(g in found for g, _, _ in axis.labels):
                    a = w[k] * self._sums(square, w, k)
                    for g, e, label in axis.labels:
                        if g in found:
                            part = self._gather(a, label, self.counts[g])
                            found[g][e] = found[g][e] + part if e in found[g] else part
        return [found[g] for g in generators]

    def sweep(self, u: Vector) -> float:
        """Each generator in turn to its minimum, the others held; the largest step."""
        moved = 0.0
        for g in range(len(u)):
            (norms,) = self._norms(u, [g])
            step = _minimiser(norms, self.pull[g])
            u[g] = u[g] + step
            moved = max(moved, float(step.abs().max()) if step.numel() else 0.0)
        return moved

    def newton(self, u: Vector) -> float:
        """One damped Newton step on all generators; its largest entry (before damping)."""
        weights = [self._weights(s, u) for s in self.squares]
        sums = [[w[k] * self._sums(s, w, k) for k in range(len(w))] for s, w in zip(self.squares, weights, strict=True)]
        slope = [-2 * p for p in self.pull]
        curvature = [torch.zeros_like(p) for p in self.pull]
        for s, a in zip(self.squares, sums, strict=True):
            for axis, along in zip(s.axes, a, strict=True):
                for g, e, label in axis.labels:
                    part = self._gather(along, label, self.counts[g])
                    slope[g] = slope[g] + 2 * e * part
                    curvature[g] = curvature[g] + 4 * e * e * part
        curvature = [torch.where(c > 0, c, torch.ones_like(c)) for c in curvature]

        def hessian(v: Vector) -> Vector:
            out = [torch.zeros_like(x) for x in v]
            for s, w, a in zip(self.squares, weights, sums, strict=True):
                logs = [self._logs(axis, v) for axis in s.axes]
                turned = [w[k] * logs[k] for k in range(len(w))]
                for k, axis in enumerate(s.axes):
                    along = logs[k] * a[k]
                    if len(w) == 2:
                        along = along + w[k] * self._sums(s, turned, k)
                    for g, e, label in axis.labels:
                        out[g] = out[g] + 4 * e * self._gather(along, label, self.counts[g])
            return out

        small = sum(self.counts) ** 2 * self.networks <= _DENSE
        step = self._direct(weights, sums, slope, curvature) if small else _solve(hessian, slope, curvature)
        size = torch.stack([x.abs().amax(1) for x in step]).amax(0) if step else torch.zeros(1)
        # Third derivatives are bounded by 8 |step| times the second (two axes of exponent 1, 16 for 2): damped so that
        # F decreases (Bach 2010).
        reach = 4.0 * max(abs(e) for s in self.squares for axis in s.axes for _, e, _ in axis.labels) * size
        damp = torch.where(reach > 1e-2, torch.log1p(reach) / reach.clamp_min(1e-300), torch.ones_like(reach))
        for g, x in enumerate(step):
            u[g] = u[g] - damp[:, None] * x
        return float(size.max())

    def _direct(self, weights: list[Vector], sums: list[Vector], slope: Vector, curvature: Vector) -> Vector:
        """The Newton step from the whole Hessian, for few elements."""
        starts = [sum(self.counts[:g]) for g in range(len(self.counts))]
        total = sum(self.counts)
        h = torch.zeros(self.networks, total, total, dtype=torch.float64, device=self.device)

        def add(one: tuple[int, int, torch.Tensor], two: tuple[int, int, torch.Tensor], block: torch.Tensor) -> None:
            (g, e, _), (f, d, _) = one, two
            rows, columns = slice(starts[g], starts[g] + self.counts[g]), slice(starts[f], starts[f] + self.counts[f])
            h[:, rows, columns] += 4 * e * d * block[:, :-1, :-1]

        for s, w, a in zip(self.squares, weights, sums, strict=True):
            for axis, along in zip(s.axes, a, strict=True):
                for one, two in product(axis.labels, repeat=2):
                    n, m = self.counts[one[0]] + 1, self.counts[two[0]] + 1
                    flat = along.new_zeros(self.networks, n * m).index_add_(1, one[2] * m + two[2], along)
                    add(one, two, flat.view(-1, n, m))
            if len(w) == 2:
                v = w[0].unsqueeze(2) * s.values * w[1].unsqueeze(1)
                for one in s.axes[0].labels:
                    n = self.counts[one[0]] + 1
                    rows = v.new_zeros(self.networks, n, v.shape[2]).index_add_(1, one[2], v)
                    for two in s.axes[1].labels:
                        m = self.counts[two[0]] + 1
                        block = v.new_zeros(self.networks, n, m).index_add_(2, two[2], rows)
                        add(one, two, block)
                        add(two, one, block.mT)
        scale = torch.cat(curvature, 1).rsqrt()
        # Directions that move nothing (two ways to say one rescaling) leave it singular but for this.
        h = h * scale.unsqueeze(2) * scale.unsqueeze(1) + 1e-13 * torch.eye(total, dtype=h.dtype, device=h.device)
        idle = (h.diagonal(dim1=1, dim2=2) < 1e-9).double()
        found, _ = torch.linalg.solve_ex(h + torch.diag_embed(idle), torch.cat(slope, 1) * scale)
        return list((found * scale).split(self.counts, 1))


def _solve(hessian: Callable[[Vector], Vector], slope: Vector, curvature: Vector) -> Vector:
    """``H x = slope`` by conjugate gradients, preconditioned by the diagonal; networks side by side."""

    def dot(a: Vector, b: Vector) -> torch.Tensor:
        return torch.stack([(x * y).sum(1) for x, y in zip(a, b, strict=True)]).sum(0)

    x = [torch.zeros_like(s) for s in slope]
    r = list(slope)
    z = [a / c for a, c in zip(r, curvature, strict=True)]
    p, rz = list(z), dot(r, z)
    start = rz.clone()
    # To the square of the distance left, so that Newton's method stays quadratic.
    goal = start * (start / torch.stack([c.sum(1) for c in curvature]).sum(0)).clamp(1e-16, 1e-2)
    for _ in range(_CONJUGATE):
        active = rz > torch.maximum(goal, torch.full_like(goal, 1e-300))
        if not bool(active.any()):
            break
        hp = hessian(p)
        bend = dot(p, hp)
        alpha = torch.where(active & (bend > 0), rz / bend.clamp_min(1e-300), torch.zeros_like(rz))
        x = [a + alpha[:, None] * b for a, b in zip(x, p, strict=True)]
        r = [a - alpha[:, None] * b for a, b in zip(r, hp, strict=True)]
        z = [a / c for a, c in zip(r, curvature, strict=True)]
        new = dot(r, z)
        beta = torch.where(active, new / rz.clamp_min(1e-300), torch.zeros_like(rz))
        p = [a + beta[:, None] * b for a, b in zip(z, p, strict=True)]
        rz = torch.where(active, new, rz)
    return x


def _minimiser(norms: Mapping[int, torch.Tensor], pull: torch.Tensor) -> torch.Tensor:
    """The step ``d`` that solves ``sum_e e norms[e] exp(2 e d) = pull``, element by element."""
    step = torch.zeros_like(pull)
    live = sum(norms.values(), torch.zeros_like(pull)) > 0
    for _ in range(60):
        sides, slopes = [], []
        for sign in (1, -1):
            terms = {abs(e): abs(e) * a * torch.exp(2 * e * step) for e, a in norms.items() if e * sign > 0}
            total = sum(terms.values(), torch.zeros_like(pull))
            rate = sum((2 * e * t for e, t in terms.items()), torch.zeros_like(pull))
            there = total > 0
            sides.append(torch.where(there, torch.log(total.clamp_min(1e-300)), torch.zeros_like(pull)))
            slopes.append(torch.where(there, rate / total.clamp_min(1e-300), torch.zeros_like(pull)))
        # In logarithms the equation is nearly linear: of slope 4 where all exponents are 1 and -1.
        rate = slopes[0] + slopes[1]
        change = torch.where(live & (rate > 0), (sides[0] - sides[1]) / rate.clamp_min(1e-300), torch.zeros_like(pull))
        step = step - change
        if set(norms) <= {1, -1} or not bool((change.abs() > 1e-15 * (1 + step.abs())).any()):
            break
    return step
