"""OTFusion (Singh & Jaggi 2020): neurons laid on neurons by optimal transport, between networks of any widths.

Layer after layer, b's weights are first carried along what was found for their inputs; then the neurons' rows of
weights (or their activations) are compared, and the transport plan between uniform masses is the layer's map.
Between equal widths an exact plan is a permutation.

A plan ``T`` (n_a, n_b) becomes two maps: neurons of a are the average of those of b whose mass they get
(``T`` with rows made to sum to 1), and a weight that reads neuron j gives its share ``T_ij / sum_i T_ij`` to neuron i,
so that what it sums stays the same. For equal widths that is the paper's; for others, duplicated neurons add up.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from weightspace.align.activation_matching import _standard
from weightspace.align.alignment import Found
from weightspace.align.maps import Map, carry
from weightspace.errors import AlignmentError, MissingExtraError
from weightspace.wiring.places import Place, places
from weightspace.wiring.recording import select, values
from weightspace.wiring.replay import Inputs
from weightspace.wiring.wiring import Permutation, Wiring


def optimal_transport(
    a: Mapping[str, Tensor], b: Mapping[str, Tensor], wiring: Wiring, *, wiring_a: Wiring | None = None,
    inputs: Inputs | None = None, seed: int = 0, ground: Literal["weights", "activations"] | None = None,
    regularisation: float = 0.0, positions: int = 2048, batch: int | None = 64,
) -> Found:  # fmt: skip
    """``b`` carried onto a's neurons, at a's widths.

    ``ground``: what neurons are compared by; activations where ``inputs`` are given, weights otherwise.
    ``regularisation``: 0 for the exact plan; above, the entropy's share of the mean cost (soft maps, Sinkhorn's
    algorithm). Where all widths are equal and plans exact the result is a permutation; otherwise ``maps`` holds the
    plans and ``aligned`` the carried tensors.

    Raises ``AlignmentError`` where a and b differ in more than widths, or where a factor's width differs that no weight
    reads (channels of queries and keys), and ``MissingExtraError`` without POT.
    """
    try:
        import ot
    except ImportError as error:
        raise MissingExtraError("ot", "ot", "alignment by optimal transport") from error
    of_a = wiring_a or wiring
    ground = ground or ("weights" if inputs is None else "activations")
    if ground == "activations" and inputs is None:
        raise AlignmentError('ground="activations" needs inputs=; pass a batch for the network, or ground="weights"')
    check_one_architecture(of_a, wiring)
    order = in_order(wiring)
    for name in order:
        if of_a.factors[name].size != wiring.factors[name].size:
            _check_read(name, wiring)
    seen: tuple[Any, Any] | None = None
    if ground == "activations" and inputs is not None:
        given = {"positions": positions, "batch": batch, "seed": seed}
        seen = (values(of_a, a, inputs, **given), values(wiring, b, inputs, **given))  # type: ignore[arg-type]
    maps: dict[str, Map] = {}
    plans: dict[str, Tensor] = {}
    costs: dict[str, Tensor] = {}
    for name in order:
        fa, fb = of_a.factors[name], wiring.factors[name]
        if fa.size == fb.size == 1:
            continue
        over = [fb.over, [of_a.factors[o].size for o in fb.over]]
        if fb.over and [wiring.factors[o].size for o in fb.over] != over[1]:
            raise AlignmentError(
                f"factor {name!r} differs between positions of {', '.join(fb.over)}, of which a and b have different "
                "numbers (heads, groups); only widths inside may differ"
            )
        rows = _by_activations(name, seen, maps, wiring) if seen is not None and name in seen[1] else None
        one, two = rows or _by_weights(name, a, b, of_a, wiring, maps)
        lengths = one.square().sum(-1).unsqueeze(-1) + two.square().sum(-1).unsqueeze(-2)
        distance = (lengths - 2 * one @ two.transpose(-1, -2)).clamp_min(0)
        lead, flat = distance.shape[:-2], distance.reshape(-1, *distance.shape[-2:])
        found = []
        for cost in flat:
            mass = [torch.full((n,), 1.0 / n, dtype=torch.float64).numpy() for n in cost.shape]
            scaled = (cost / cost.mean().clamp_min(1e-30)).numpy()
            plan = ot.sinkhorn(*mass, scaled, regularisation) if regularisation > 0 else ot.emd(*mass, scaled)
            found.append(torch.as_tensor(plan, dtype=torch.float64))
        plan = torch.stack(found).reshape(*lead, *distance.shape[-2:])
        maps[name] = Map(
            plan / plan.sum(-1, keepdim=True).clamp_min(1e-30), plan / plan.sum(-2, keepdim=True).clamp_min(1e-30)
        )
        plans[name], costs[name] = plan, -distance
    same = all(of_a.factors[n].size == wiring.factors[n].size for n in order)
    info = {"ground": ground, "regularisation": regularisation}
    if same and regularisation == 0:
        index = {n: p.argmax(-1) for n, p in plans.items()}
        moved = {n: c.gather(-1, index[n].unsqueeze(-2).expand(c.shape)) for n, c in costs.items()}
        return Found(Permutation(index, wiring.factors), moved, info, plans)
    wide = {n: t.to(torch.float64) if t.is_floating_point() else t for n, t in b.items()}
    aligned = {n: t.to(b[n].dtype) for n, t in carry(wide, wiring, maps).items()}
    return Found(wiring.identity(), costs, info, plans, aligned)


def check_one_architecture(of_a: Wiring, of_b: Wiring) -> None:
    """Raises ``AlignmentError`` where two wirings differ in anything but the sizes of free factors."""
    names = [n for n in of_a if n not in of_b] + [n for n in of_b if n not in of_a]
    if names:
        raise AlignmentError(
            f"a and b are not one architecture: {len(names)} tensors are in one only ({', '.join(names[:3])}); "
            "networks of different depths are aligned by 'cross-layer'"
        )

    def shape(w: Wiring, n: str) -> Any:
        return [(g.dims, [[s.factors for s in block] for block in g.blocks]) for g in w.layouts[n]]

    odd = [n for n in of_a if shape(of_a, n) != shape(of_b, n)]
    pinned = [n for n in of_a.factors if n not in of_b.factors or (n not in of_a.free and of_a.factors[n].size
              != of_b.factors[n].size) or (n in of_a.free) != (n in of_b.free)]  # fmt: skip
    if odd or pinned:
        what = f"tensor {odd[0]!r} is wired differently" if odd else f"axis {pinned[0]!r} is not free in both"
        raise AlignmentError(f"a and b differ in more than their widths: {what}; inputs, outputs and wiring must agree")


def in_order(wiring: Wiring) -> list[str]:
    """Free factors in the order in which the network's weights write them, outer ones before what is inside them."""
    rank: dict[str, int] = {}
    ordered = [n for n in wiring.roles if n in wiring] or list(wiring)
    for k, tensor in enumerate(ordered):
        for name, row in places(wiring).items():
            if name not in rank and any(p.tensor == tensor and not reads(wiring, p) for p in row):
                rank[name] = k
    return sorted(wiring.free, key=lambda n: (rank.get(n, len(ordered)), len(wiring.free[n].over)))


def reads(wiring: Wiring, place: Place) -> bool:
    """Is the factor summed over at this place?"""
    from weightspace.align.maps import _dim

    dim = _dim(place.dims, place.sizes, place.front[-1], len(wiring.shapes[place.tensor]))
    return wiring.reads.get(place.tensor) == dim


def _check_read(name: str, wiring: Wiring) -> None:
    for factor in [name, *(n for n, f in wiring.free.items() if name in f.over)]:
        if not any(reads(wiring, p) for p in places(wiring)[factor]):
            raise AlignmentError(
                f"factor {factor!r} has another width in a than in b and no weight reads it (queries meet keys), so "
                "there is no way to carry it over; align networks that differ in other widths"
            )


def _by_weights(
    name: str, a: Mapping[str, Tensor], b: Mapping[str, Tensor], of_a: Wiring, of_b: Wiring, maps: Mapping[str, Map]
) -> tuple[Tensor, Tensor]:
    """Rows of weights that write the factor, b's carried to a's neurons on their other side."""
    mine, theirs = places(of_a)[name], places(of_b)[name]
    pairs = [(p, q) for p, q in zip(mine, theirs, strict=True) if not reads(of_b, q)]
    weights = [(p, q) for p, q in pairs if of_b.roles.get(q.tensor) in ("weight", "lookup")]
    ready = [(p, q) for p, q in weights if all(o in maps or o in of_b.factors[name].over for o in q.others)]
    # Tables and biases where no weight writes it; what reads it, where nothing else tells.
    chosen = ready or weights or pairs or list(zip(mine, theirs, strict=True))
    one, two = [], []
    for p, q in chosen:
        carried = carry(b, of_b, {f: m for f, m in maps.items() if f != name}, only=[q.tensor])[q.tensor]
        x = p.view(a[p.tensor].double())
        same = carried.shape == b[q.tensor].shape
        y = q.view(carried.double()) if same else _view_wide(carried.double(), q, of_b)
        one.append(x)
        two.append(y)
    both = [(x, y) for x, y in zip(one, two, strict=True) if x.shape[-1] == y.shape[-1]]
    if not both:
        raise AlignmentError(
            f"nothing of factor {name!r} can be compared before its neighbours are matched; pass inputs= to compare "
            "activations"
        )
    return torch.cat([x for x, _ in both], -1), torch.cat([y for _, y in both], -1)


def _view_wide(tensor: Tensor, place: Place, of_b: Wiring) -> Tensor:
    """A place's view of a tensor whose other dims have a's widths already."""
    sizes = []
    for d, row in zip(place.dims, place.sizes, strict=True):
        sizes.append(row)
        if tensor.shape[d] != of_b.shapes[place.tensor][d] and any(p is not None for p in place.positions):
            raise AlignmentError(f"tensor {place.tensor!r} is joined from parts whose widths differ; pass inputs=")
    parts: list[int] = []
    for d, n in enumerate(tensor.shape):
        inside = place.dims.index(d) if d in place.dims else -1
        parts += sizes[inside] if inside >= 0 and n == of_b.shapes[place.tensor][d] else (n,)
    if len(parts) != sum(len(place.sizes[place.dims.index(d)]) if d in place.dims else 1 for d in range(tensor.dim())):
        raise AlignmentError(f"tensor {place.tensor!r} ties widths that differ to one another; pass inputs=")
    spread = tensor.reshape(parts)
    rest = [i for i in range(spread.dim()) if i not in place.front]
    lead = [parts[i] for i in place.front]
    return spread.permute(*place.front, *rest).reshape(*lead, -1)


def _by_activations(name: str, seen: tuple[Any, Any], maps: Mapping[str, Map], wiring: Wiring) -> tuple[Tensor, Tensor]:
    """What the elements do on real inputs, standardised sample by sample: (*over, n, samples)."""
    of_a, of_b = (select(s[name], "post") for s in seen)
    one, two = [], []
    for x, y in zip(of_a, of_b, strict=True):
        p, q = x.samples.double(), y.samples.double()
        for k, outer in enumerate(wiring.factors[name].over):
            if outer in maps:
                q = torch.movedim(torch.tensordot(maps[outer].write, q.movedim(1 + k, 0), 1), 0, 1 + k)
        one.append(_standard(p, "correlation").movedim(0, -1))
        two.append(_standard(q, "correlation").movedim(0, -1))
    return torch.cat(one, -1), torch.cat(two, -1)


__all__ = ["check_one_architecture", "in_order", "optimal_transport", "reads"]
