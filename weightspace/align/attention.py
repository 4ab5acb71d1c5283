"""Aligning transformers by all of their symmetries: heads, maps inside heads, rotations of the residual stream.

Permutations are few among what keeps a transformer's function: queries and keys may go through any invertible map and
its inverse inside each head, values and the output projection too, and under RMSNorm the residual stream may be rotated
(``weightspace.align.linear_symmetries``; under rotary positions only what commutes with them). Here the stream is
rotated by Procrustes, heads are matched by what no map inside them changes (the products of their two sides), and each
head is mapped so that both sides come nearest, in the sense of squares. Only maps that a run has proved are used.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor

from weightspace.align.alignment import Found
from weightspace.align.linear_symmetries import LinearSymmetry, linear_symmetries, rotations
from weightspace.align.weight_matching import weight_matching
from weightspace.errors import AlignmentError
from weightspace.wiring.matching import Matching, assign, float32, tensor_weights
from weightspace.wiring.places import Place, places
from weightspace.wiring.proof import TOLERANCE, distance, is_rounding, run
from weightspace.wiring.wiring import Permutation, Wiring

Tensors = dict[str, Tensor]


def attention(
    a: Mapping[str, Tensor], b: Mapping[str, Tensor], wiring: Wiring, *, seed: int = 0, stream: bool = True,
    inside: bool = True, steps: int = 60, rounds: int = 3,
) -> Found:  # fmt: skip
    """Permutations, and proved linear maps on top of them: ``maps`` has those, by ``LinearSymmetry.name``.

    ``stream``: rotate residual streams where that is a symmetry; ``inside``: map the channels inside heads. A map stays
    only where it brings the two networks nearer. ``steps``: of Gauss-Newton-like descent for each head's map.
    ``rounds``: of permutations and rotations in turn, where there is a stream to rotate.

    The function of b stays: the outputs on the wiring's example inputs are compared at the end, and
    ``AlignmentError`` is raised where they differ by more than 1e-5. The maps take effect on b in the order streams,
    permutations, heads. Gains of norms are folded out for a rotation and folded in again as those of a.
    """
    now: Tensors = dict(b)
    found = linear_symmetries(wiring)
    general = {s.factor for s in found if s.kind == "general"}
    streams = [s for s in found if s.kind == "orthogonal" and s.factor not in general] if stream else []
    heads = [s for s in found if s.kind != "orthogonal"] if inside else []
    maps: dict[str, Tensor] = {}
    plain = weight_matching(a, b, wiring, seed=seed)
    element = plain.permutations
    moved = wiring.apply(element, b)
    if streams:
        turned, turns, other = _turn(a, b, wiring, streams, rounds, seed)
        if _apart(a, turned, wiring) < _apart(a, moved, wiring):
            moved, element, maps = turned, other, turns
    now = moved
    exchanged = _match_heads(a, now, wiring, heads)
    if not exchanged.is_identity:
        element = element.compose(exchanged)
        now = wiring.apply(exchanged, now)
    for s in heads:
        m = _map(a, now, s, steps)
        after = s.act(m, now)
        if _gap(a, after, s.tensors) < (1 - 1e-9) * _gap(a, now, s.tensors):
            maps[s.name] = m
            now = after
    error = _check(wiring, b, now)
    costs = Matching(wiring, float32(a), float32(now))
    return Found(
        element,
        {f: costs.similarity(f) for f in costs.factors},
        {
            "error": error,
            "proved": {s.name: {"kind": s.kind, "error": s.error} for s in found},
            "distance": {"permutations": _apart(a, moved, wiring) ** 0.5, "maps": _apart(a, now, wiring) ** 0.5},
        },
        maps,
        now,
    )


def _turn(
    a: Mapping[str, Tensor], b: Mapping[str, Tensor], wiring: Wiring, streams: list[LinearSymmetry], rounds: int,
    seed: int,
) -> tuple[Tensors, dict[str, Tensor], Permutation]:  # fmt: skip
    """Rotations of the streams and permutations of all else, in turn, each the best while the others stay.

    The first rotation goes by those tensors alone that carry no other free factor (embeddings, outputs).
    """
    names = [s.factor for s in streams]
    still = wiring.pinning(names, "rotated")
    goal, now = dict(a), dict(b)
    for s in streams:
        goal, now = s.fold(goal), s.fold(now)
    turns = {s.name: torch.eye(s.size, dtype=torch.float64) for s in streams}
    element = wiring.identity()
    for k in range(rounds):
        for s in streams:
            rows = [p for p, _ in s.sides if not p.others] if k == 0 else [p for p, _ in s.sides]
            q = _polar(_cross(goal, now, rows or [p for p, _ in s.sides]))
            now = s.act(q, now)
            turns[s.name] = q @ turns[s.name]
        step = weight_matching(goal, now, still, seed=seed, kicks=0).permutations
        if k and step.is_identity:
            break
        step = Permutation(step.index, wiring.factors)
        element = element.compose(step)
        now = wiring.apply(step, now)
    for s in streams:
        now = s.unfold(now, a)
    return now, turns, element


def _cross(a: Mapping[str, Tensor], b: Mapping[str, Tensor], rows: list[Place]) -> Tensor:
    """``sum <a, M b>`` over places is ``<cross, M>``: ``(*over, d, d)``, float64."""
    return sum(
        (p.view(a[p.tensor]).double() @ p.view(b[p.tensor]).double().transpose(-1, -2) for p in rows),
        torch.zeros((), dtype=torch.float64),
    )


def _polar(cross: Tensor) -> Tensor:
    """The orthogonal matrix of largest inner product with a square one (Procrustes)."""
    u, _, vh = torch.linalg.svd(cross)
    turn: Tensor = u @ vh
    return turn


def _match_heads(
    a: Mapping[str, Tensor], b: Mapping[str, Tensor], wiring: Wiring, heads: list[LinearSymmetry]
) -> Permutation:
    """Heads laid on heads by the products of their two sides, which no map inside changes; kept where that is better.

    Only for factors that nothing but mapped channels is fibred over: heads that share keys are left as they lie.
    """
    index: dict[str, Tensor] = {}
    by_head: dict[str, list[LinearSymmetry]] = {}
    for s in heads:
        if len(s.over) == 1:
            by_head.setdefault(s.over[0], []).append(s)
    for head, own in by_head.items():
        factor = wiring.free.get(head)
        mapped = {s.factor for s in own}
        inner = {f for f, x in wiring.free.items() if head in x.over and x.size > 1}
        if factor is None or factor.over or factor.size < 2 or inner - mapped:
            continue
        total = torch.zeros(factor.size, factor.size, dtype=torch.float64)
        for s in own:
            total += _invariant(a, b, s)
        # What heads carry besides: biases of scores, gains per head.
        own_tensors = set().union(*(s.tensors for s in own))
        for p in places(wiring)[head]:
            if p.tensor not in own_tensors and not p.repeated and a[p.tensor].is_floating_point():
                x, y = p.view(a[p.tensor]).double(), p.view(b[p.tensor]).double()
                total += (x @ y.T) / (x.norm() * y.norm() + 1e-30)
        best = assign(total)
        if float(total[torch.arange(len(best)), best].sum() - total.trace()) > 1e-6 * float(total.abs().sum()):
            index[head] = best
    return Permutation(index, wiring.factors)


def _invariant(a: Mapping[str, Tensor], b: Mapping[str, Tensor], s: LinearSymmetry) -> Tensor:
    """``<X_i, Y_j>`` of the products ``X = up^T down`` of two networks' heads, relative to their lengths: (h, h)."""
    up, down = (
        [torch.cat([p.view(m[p.tensor]).double() for p, e in s.sides if e == side], -1) for m in (a, b)]
        for side in (1, -1)
    )
    if s.kind == "rotary":
        # A pair of positions is one complex number: every frequency keeps a product of its own.
        assert s.pairs is not None
        up, down = ([torch.complex(x[:, s.pairs[0]], x[:, s.pairs[1]]) for x in row] for row in (up, down))

        def both(i: int, j: int) -> Tensor:
            x = torch.einsum("idr,jdr->ijd", up[i].conj(), up[j])
            y = torch.einsum("idr,jdr->ijd", down[i].conj(), down[j])
            return (x * y.conj()).real.sum(-1)

    else:

        def both(i: int, j: int) -> Tensor:
            x = torch.einsum("idr,jer->ijde", up[i], up[j])
            y = torch.einsum("idr,jer->ijde", down[i], down[j])
            return (x * y).sum((-1, -2))

    lengths = [both(k, k).diagonal().clamp_min(1e-30).sqrt() for k in (0, 1)]
    return both(0, 1) / (lengths[0][:, None] * lengths[1])


def _map(a: Mapping[str, Tensor], b: Mapping[str, Tensor], s: LinearSymmetry, steps: int) -> Tensor:
    """The map for every head that brings both sides nearest in squares, from several starts, refined by descent."""
    up_a, up_b, down_a, down_b = (
        torch.cat([p.view(m[p.tensor]).double() for p, e in s.sides if e == side], -1)
        for side in (1, -1) for m in (a, b)
    )  # fmt: skip
    starts = [_start(s, up_a, up_b, down_a, down_b, kind) for kind in ("turn", "up", "down", "none")]

    def loss(m: Tensor) -> Tensor:
        back = torch.linalg.inv(m).transpose(-1, -2)
        up = (up_a - m @ up_b).square().sum((-1, -2))
        down = (down_a - back @ down_b).square().sum((-1, -2))
        return torch.add(up, down)

    best = starts[0]
    lowest = loss(best)
    for m in starts[1:]:
        here = loss(m)
        better = here < lowest
        best, lowest = torch.where(better[..., None, None], m, best), torch.where(better, here, lowest)
    return _refined(s, best, loss, steps)


def _start(s: LinearSymmetry, up_a: Tensor, up_b: Tensor, down_a: Tensor, down_b: Tensor, kind: str) -> Tensor:
    """The best turn, the least squares of one side, or no map at all; ``(*over, d, d)``."""
    eye = torch.eye(s.size, dtype=torch.float64).expand(*s.shape, s.size).clone()
    if kind == "none":
        return eye
    if s.kind == "rotary":
        assert s.pairs is not None
        one, two = (list(p) for p in s.pairs)
        ua, ub, da, db = (torch.complex(x[..., one, :], x[..., two, :]) for x in (up_a, up_b, down_a, down_b))
        up, down = ((x * y.conj()).sum(-1) for x, y in ((ua, ub), (da, db)))
        if kind == "turn":
            c = (up + down) / (up + down).abs().clamp_min(1e-30)
        elif kind == "up":
            c = up / ub.abs().square().sum(-1).clamp_min(1e-30)
        else:
            c = down / db.abs().square().sum(-1).clamp_min(1e-30)
            c = c / c.abs().square().clamp_min(1e-30)
        c = torch.where((c.abs() > 1e-3) & (c.abs() < 1e3), c, torch.ones_like(c))
        return rotations(c.real, c.imag, s.pairs)
    turn = _polar(up_a @ up_b.transpose(-1, -2) + down_a @ down_b.transpose(-1, -2))
    if kind == "turn":
        return turn
    x, y = (up_a, up_b) if kind == "up" else (down_a, down_b)
    m = x @ torch.linalg.pinv(y)
    values = torch.linalg.svdvals(m)
    whole = values[..., -1] > 1e-4 * values[..., 0].clamp_min(1e-30)
    m = torch.where(whole[..., None, None], m, eye)
    back: Tensor = torch.linalg.inv(m).transpose(-1, -2)
    return m if kind == "up" else back


def _refined(s: LinearSymmetry, m: Tensor, loss: Callable[[Tensor], Tensor], steps: int) -> Tensor:
    """Descent from a map; what does not lower the loss of a head is not kept."""
    if not steps:
        return m
    if s.kind == "rotary":
        assert s.pairs is not None
        one, two = (list(p) for p in s.pairs)
        first = torch.stack((m[..., one, one], m[..., two, one]))
    else:
        first = m

    def whole(x: Tensor) -> Tensor:
        return x if s.pairs is None else rotations(x[0], x[1], s.pairs)

    free = first.clone().requires_grad_()
    search = torch.optim.LBFGS([free], max_iter=steps, line_search_fn="strong_wolfe", tolerance_change=1e-14)

    def closure() -> float:
        search.zero_grad()
        total = loss(whole(free)).sum()
        total.backward()
        return float(total)

    with torch.enable_grad():
        search.step(closure)
    ended = whole(free.detach())
    better = (loss(ended) < loss(m)) & ended.isfinite().all(-1).all(-1)
    return torch.where(better[..., None, None], ended, m)


def _gap(a: Mapping[str, Tensor], b: Mapping[str, Tensor], names: Iterable[str]) -> float:
    """The squared distance of two networks over the named tensors."""
    return float(sum((a[n].double() - b[n].double()).square().sum() for n in sorted(names) if n in a))


def _apart(a: Mapping[str, Tensor], b: Mapping[str, Tensor], wiring: Wiring) -> float:
    """The squared distance over all tensors that count in an alignment."""
    counted = tensor_weights(wiring, float32(a), float32(b))
    return _gap(a, b, counted)


def _check(wiring: Wiring, b: Mapping[str, Tensor], moved: Mapping[str, Tensor]) -> float:
    """The change of b's outputs; raises ``AlignmentError`` where it is more than rounding."""
    assert wiring.program is not None

    def change(dtype: torch.dtype) -> float:
        assert wiring.program is not None
        return distance(run(wiring.program, b, dtype), run(wiring.program, moved, dtype))

    error = change(torch.float32)
    # Weights stored in half precision are rounded after a map, which is no fault of the map.
    coarse = max((torch.finfo(t.dtype).eps for t in b.values() if t.is_floating_point()), default=0.0) > 1e-6
    if error > TOLERANCE and not coarse and not is_rounding(error, change(torch.float64)):
        raise AlignmentError(
            f"the maps change the outputs of b by {error:.1e}, more than {TOLERANCE:.0e}; its weights are too badly "
            "conditioned for them: use stream=False or inside=False"
        )
    return error
