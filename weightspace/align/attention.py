"""Aligning transformers by all of their symmetries: heads, maps inside heads, rotations of the residual stream.

Permutations are few among what keeps a transformer's function: queries and keys may go through any invertible map and
its inverse inside each head, values and the output projection too, and under RMSNorm the residual stream may be rotated
(``weightspace.align.linear_symmetries``; under rotary positions only what commutes with them). Here the stream is
rotated by Procrustes, heads are matched by what no map inside them changes (the products of their two sides), and each
head is mapped so that both sides come nearest, in the sense of squares. Only maps that a run has proved are used.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from weightspace.align.alignment import Found
from weightspace.align.linear_symmetries import LinearSymmetry, linear_symmetries, rotations
from weightspace.align.weight_matching import weight_matching
from weightspace.errors import AlignmentError
from weightspace.wiring.matching import Matching, assign, float32, tensor_weights
from weightspace.wiring.places import Place, places, places_of
from weightspace.wiring.proof import TOLERANCE, distance, is_rounding, run
from weightspace.wiring.wiring import Permutation, Wiring

Tensors = dict[str, Tensor]


def attention(
    a: Mapping[str, Tensor], b: Mapping[str, Tensor], wiring: Wiring, *, seed: int = 0, stream: bool = True,
    inside: bool = True, steps: int = 60, rounds: int = 3,
) -> Found:  # fmt: skip
    """Permutations, and proved linear maps on top of them: ``maps`` has those, by ``LinearSymmetry.name``.

    ``stream``: rotate residual streams where that is a symmetry; ``inside``: map the channels inside heads. A map stays
    only where it brings the two networks nearer. ``steps``: of descent (L-BFGS) for each head's map. ``rounds``: of
    permutations and rotations in turn, where there is a stream to rotate.

    The maps take effect on b in the order streams, permutations, heads, in float64; dtypes come back at the end. Gains
    of norms are folded out for a rotation and folded in again as those of a; where a gain of either network is
    (nearly) zero that cannot be done, and the stream stays as it lies (``diagnostics["not rotated"]``).

    The function of b stays: the outputs on the wiring's example inputs are compared at the end. Raises
    ``AlignmentError`` where they differ by more than 1e-5, ``UnprovedWiringError`` for a wiring that no run has proved.
    """
    wide = {n: t.double() if t.is_floating_point() else t for n, t in b.items()}
    found = linear_symmetries(wiring)
    general = {s.factor for s in found if s.kind == "general"}
    streams = [s for s in found if s.kind == "orthogonal" and s.factor not in general] if stream else []
    closed = [s for s in streams if not (_open(s, a) and _open(s, b))]
    streams = [s for s in streams if s not in closed]
    heads = [s for s in found if s.kind != "orthogonal"] if inside else []
    maps: dict[str, Tensor] = {}
    element = weight_matching(a, b, wiring, seed=seed).permutations
    moved = wiring.apply(element, wide)
    plain = _apart(a, moved, wiring)
    now, inner_maps, exchanged = _map_heads(a, moved, wiring, heads, steps)
    if streams:
        turned, turns, other = _turn(a, wide, wiring, streams, heads, rounds, seed)
        ended, other_maps, swapped = _map_heads(a, turned, wiring, heads, steps)
        if _apart(a, ended, wiring) < _apart(a, now, wiring):
            element, maps = other, turns
            now, inner_maps, exchanged = ended, other_maps, swapped
    element = element.compose(exchanged)
    maps |= inner_maps
    error = _check(wiring, b, wide, now)
    aligned = {n: t.to(b[n].dtype) for n, t in now.items()}
    costs = Matching(wiring, float32(a), float32(aligned))
    return Found(
        element,
        {f: costs.similarity(f) for f in costs.factors},
        {
            "error": error,
            "proved": {s.name: {"kind": s.kind, "error": s.error} for s in found},
            "not rotated": [s.name for s in closed],
            "distance": {"permutations": plain**0.5, "maps": _apart(a, now, wiring) ** 0.5},
        },
        maps,
        aligned,
    )


def _open(s: LinearSymmetry, tensors: Mapping[str, Tensor]) -> bool:
    """Whether all gains that a rotation needs folded can be divided by."""
    gains = [tensors[n].double().abs() for n, _ in s.folded]
    return all(float(g.min()) > 1e-3 * float(g.max()) for g in gains)


def _map_heads(
    a: Mapping[str, Tensor], b: Mapping[str, Tensor], wiring: Wiring, heads: list[LinearSymmetry], steps: int
) -> tuple[Tensors, dict[str, Tensor], Permutation]:
    """b with its heads laid on a's and mapped inside; the maps, and how the heads were exchanged before."""
    exchanged = _match_heads(a, b, wiring, heads)
    now = dict(b) if exchanged.is_identity else wiring.apply(exchanged, b)
    maps = {}
    for s in heads:
        m = _map(a, now, s, steps)
        after = s.act(m, now)
        if _gap(a, after, s.tensors) < (1 - 1e-9) * _gap(a, now, s.tensors):
            maps[s.name] = m
            now = after
    return now, maps, exchanged


def _turn(
    a: Mapping[str, Tensor], b: Mapping[str, Tensor], wiring: Wiring, streams: list[LinearSymmetry],
    heads: list[LinearSymmetry], rounds: int, seed: int,
) -> tuple[Tensors, dict[str, Tensor], Permutation]:  # fmt: skip
    """Rotations of the streams and permutations of all else, in turn, each the best while the others stay.

    The first rotation goes by those tensors alone that carry no other free factor (embeddings, outputs); the later ones
    see the heads after the best maps inside them.
    """
    names = [s.factor for s in streams]
    still = wiring.pinning(names, "rotated")
    goal, now = {n: t.double() if t.is_floating_point() else t for n, t in a.items()}, dict(b)
    for s in streams:
        goal, now = s.fold(goal), s.fold(now)
    turns = {s.name: torch.eye(s.size, dtype=torch.float64) for s in streams}
    element = wiring.identity()
    for k in range(rounds):
        seen = now if k == 0 else _map_heads(goal, now, wiring, heads, 0)[0]
        for s in streams:
            rows = [p for p, _ in s.sides if not p.others] if k == 0 else []
            q = _polar(_cross(goal, seen, rows or [p for p, _ in s.sides]))
            now, seen = s.act(q, now), s.act(q, seen)
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

    Where several heads of queries share one of keys, groups are laid on groups, each pair with the best match inside.
    Heads with more than that inside them are left as they lie.
    """
    index: dict[str, Tensor] = {}
    by_head: dict[str, list[LinearSymmetry]] = {}
    for s in heads:
        if len(s.over) == 1:
            by_head.setdefault(s.over[0], []).append(s)
    for head, own in by_head.items():
        factor = wiring.free.get(head)
        mapped = {s.factor for s in own}
        inside = [f for f, x in wiring.free.items() if head in x.over and x.size > 1 and f not in mapped]
        if factor is None or factor.over or factor.size < 2 or len(inside) > 1:
            continue
        group = inside[0] if inside else None
        if group is not None:
            beside = any(_beside(wiring, group, p) for s in own for p, _ in s.sides)
            if wiring.free[group].over != (head,) or not beside:
                continue
        n, size = factor.size, 1 if group is None else wiring.free[group].size
        alone = torch.zeros(n, n, dtype=torch.float64)
        within = torch.zeros(n, size, n, size, dtype=torch.float64)
        for s in own:
            found = _invariant(a, b, s, wiring, head, group)
            if found.shape == (n, 1, n, 1):
                alone += found[:, 0, :, 0]
            else:
                within += found
        # What heads carry besides: biases of scores, gains per head.
        own_tensors = set().union(*(s.tensors for s in own))
        for p in places(wiring)[head]:
            if p.tensor not in own_tensors and not p.repeated and group not in p.others:
                if not a[p.tensor].is_floating_point():
                    continue
                x, y = p.view(a[p.tensor]).double(), p.view(b[p.tensor]).double()
                alone += (x @ y.T) / (x.norm() * y.norm() + 1e-30)
        pairs = within.permute(0, 2, 1, 3)
        inner = assign(pairs)
        total = alone + pairs.gather(-1, inner.unsqueeze(-1)).sum((-1, -2))
        best = assign(total)
        rows = torch.arange(n)
        stays = float(alone.trace() + within.reshape(n * size, n * size).trace())
        if float(total[rows, best].sum()) - stays > 1e-6 * float(total.abs().sum()):
            index[head] = best
            if group is not None:
                index[group] = inner[rows, best]
    return Permutation(index, wiring.factors)


def _beside(wiring: Wiring, factor: str, place: Place) -> bool:
    """Whether a factor lies in the very positions of a place."""
    return any((q.tensor, q.dims, q.block) == (place.tensor, place.dims, place.block) for q in places(wiring)[factor])


def _sides(
    m: Mapping[str, Tensor], s: LinearSymmetry, wiring: Wiring, head: str, group: str | None
) -> tuple[Tensor, Tensor]:
    """The two sides of every head, ``(heads, group, d, rest)`` each; one entry for a group where a side has none."""
    out = []
    for side in (1, -1):
        views = []
        for p, e in s.sides:
            if e != side:
                continue
            if group is None or not _beside(wiring, group, p):
                views.append(p.view(m[p.tensor]).double().unsqueeze(1))
                continue
            part = wiring.with_(
                layouts={p.tensor: wiring.layouts[p.tensor]}, shapes={p.tensor: wiring.shapes[p.tensor]}
            )
            named = replace(wiring.factors[s.factor], over=(head, group))
            factors = {head: wiring.factors[head], group: wiring.factors[group], s.factor: named}
            rows = places_of(part, factors)[s.factor]
            (same,) = [q for q in rows if (q.dims, q.block) == (p.dims, p.block)]
            views.append(same.view(m[p.tensor]).double())
        most = max(v.shape[1] for v in views)
        out.append(torch.cat([v.expand(-1, most, -1, -1) for v in views], -1))
    return out[0], out[1]


def _invariant(
    a: Mapping[str, Tensor], b: Mapping[str, Tensor], s: LinearSymmetry, wiring: Wiring, head: str, group: str | None
) -> Tensor:
    """``<X_i, Y_j>`` of the products ``X = up^T down`` of two networks' heads, relative to their lengths.

    ``(heads, group, heads, group)``, with one entry for a group where neither side has any.
    """
    (up_a, down_a), (up_b, down_b) = (_sides(m, s, wiring, head, group) for m in (a, b))
    up, down = [up_a, up_b], [down_a, down_b]
    if s.kind == "rotary":
        # A pair of positions is one complex number: every frequency keeps a product of its own.
        assert s.pairs is not None
        up, down = ([torch.complex(x[:, :, s.pairs[0]], x[:, :, s.pairs[1]]) for x in row] for row in (up, down))

        def both(i: int, j: int) -> Tensor:
            x = torch.einsum("igdr,jkdr->igjkd", up[i].conj(), up[j])
            y = torch.einsum("igdr,jkdr->igjkd", down[i].conj(), down[j])
            return (x * y.conj()).real.sum(-1)

    else:

        def both(i: int, j: int) -> Tensor:
            x = torch.einsum("igdr,jker->igjkde", up[i], up[j])
            y = torch.einsum("igdr,jker->igjkde", down[i], down[j])
            return (x * y).sum((-1, -2))

    own = []
    for k in (0, 1):
        square = both(k, k)
        n, size = square.shape[:2]
        own.append(square.reshape(n * size, -1).diagonal().reshape(n, size).clamp_min(1e-30).sqrt())
    return both(0, 1) / (own[0][:, :, None, None] * own[1])


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
        return float(total.detach())

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


def _check(wiring: Wiring, b: Mapping[str, Tensor], wide: Mapping[str, Tensor], moved: Mapping[str, Tensor]) -> float:
    """The change of b's outputs; raises ``AlignmentError`` where it is more than rounding.

    Judged before weights of lower precision are rounded to what they are stored in, which is no fault of the maps; in
    float32 besides where that is what b is stored in.
    """
    assert wiring.program is not None
    exact = distance(run(wiring.program, wide, torch.float64), run(wiring.program, moved, torch.float64))
    error = exact
    if all(torch.finfo(t.dtype).eps <= 2e-7 for t in b.values() if t.is_floating_point()):
        stored = {n: t.to(b[n].dtype) for n, t in moved.items()}
        error = distance(run(wiring.program, b, torch.float32), run(wiring.program, stored, torch.float32))
    if exact > TOLERANCE or (error > TOLERANCE and not is_rounding(error, exact)):
        raise AlignmentError(
            f"the maps change the outputs of b by {max(error, exact):.1e}, more than {TOLERANCE:.0e}; its weights are "
            "too badly conditioned for them: use stream=False or inside=False"
        )
    return error
