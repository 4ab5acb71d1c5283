"""Networks of different depths: layers matched to layers, then neurons to neurons (CLAFusion, Nguyen et al. 2023).

Layers of the shallower network are laid on layers of the deeper one, in order, so that the centred kernel alignments
(CKA, Kornblith et al. 2019) of their activations add up to the most. Where the deeper network has a layer that nothing
is laid on, the shallower one gets an identity layer, which behind a ReLU changes nothing. Both have one depth then, and
optimal transport carries one onto the other, whatever their widths are.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from weightspace.align.alignment import Found
from weightspace.align.optimal_transport import optimal_transport, reads
from weightspace.errors import AlignmentError
from weightspace.wiring.entry import from_program
from weightspace.wiring.places import places
from weightspace.wiring.program import Program
from weightspace.wiring.proof import distance
from weightspace.wiring.recording import Value, select, values
from weightspace.wiring.replay import Inputs, as_float32, batches, prepared, program_of
from weightspace.wiring.wiring import Wiring

# Functions that change nothing when they are applied a second time.
_IDEMPOTENT = {"relu", "relu6"}


@dataclass(frozen=True)
class Layer:
    """A layer of a chain: the factor that it writes (None: the outputs), its weight, its vectors with their roles."""

    factor: str | None
    weight: str
    vectors: tuple[tuple[str, str], ...]


def cross_layer(
    a: Mapping[str, Tensor], b: Mapping[str, Tensor], wiring: Wiring, *, inputs: Inputs, wiring_a: Wiring | None = None,
    seed: int = 0, examples: int = 64, ground: str = "activations",
) -> Found:  # fmt: skip
    """``b`` in a's depth and widths, its neurons laid on a's.

    ``wiring`` is b's, ``wiring_a`` that of the deeper network a; both plain chains of weights with ReLU between them
    (biases and batch norms may follow a weight). ``examples`` of the inputs are compared layer by layer; ``ground``
    goes to ``optimal_transport``. ``diagnostics["layers"]``: per layer of b the layer of a that it was laid on.

    Raises ``AlignmentError`` where b is the deeper one, where a network is no such chain, or where an identity layer
    would change what b computes.
    """
    of_a = wiring_a or wiring
    deep, shallow = chain_of(of_a, "a"), chain_of(wiring, "b")
    if len(deep) < len(shallow):
        raise AlignmentError(
            f"b has {len(shallow)} layers and a has {len(deep)}; layers are added to the shallower network, so give "
            "the deeper one as a"
        )
    first = next(batches(inputs, examples))
    every = 1 << 30
    of = [values(w, t, first, positions=every, batch=None, seed=seed) for w, t in ((of_a, a), (wiring, b))]
    alike = torch.full((len(deep) - 1, len(shallow) - 1), -float("inf"), dtype=torch.float64)
    for i, one in enumerate(deep[:-1]):
        for j, two in enumerate(shallow[:-1]):
            x, y = (_last(v[layer.factor]) for v, layer in zip(of, (one, two), strict=True) if layer.factor)
            if len(x) == len(y):
                alike[i, j] = cka(x, y)
    matched = monotone(alike)
    grown = _inserted(a, b, deep, shallow, matched, wiring)
    program = replace(program_of(of_a), tensors=grown)
    _check_function(b, program, grown, first, wiring)
    of_grown = from_program(program, prove=False).with_(status=of_a.status)
    how = "activations" if ground == "activations" else "weights"
    found = optimal_transport(
        a, grown, of_grown, wiring_a=of_a, inputs=inputs if how == "activations" else None, seed=seed
    )
    aligned = found.aligned or of_grown.apply(found.permutations, grown)
    layers = {shallow[j].weight: deep[i].weight for j, i in enumerate(matched)}
    info = {"layers": layers, "cka": [float(alike[i, j]) for j, i in enumerate(matched)]}
    return Found(wiring.identity(), found.costs, info, found.maps, aligned)


def chain_of(wiring: Wiring, who: str) -> list[Layer]:
    """The layers of a plain chain in order; raises ``AlignmentError`` where the wiring is none."""
    found = places(wiring)
    writes: dict[str, str] = {}
    takes: dict[str, str] = {}
    vectors: dict[str, list[tuple[str, str]]] = {}
    for name in wiring.free:
        for p in found[name]:
            role = wiring.roles.get(p.tensor, "other")
            if role == "weight":
                side = takes if reads(wiring, p) else writes
                if side.setdefault(name, p.tensor) != p.tensor or p.repeated:
                    raise _no_chain(who, f"several weights meet at {name!r}")
            elif len(wiring.shapes[p.tensor]) == 1 and not p.others:
                vectors.setdefault(name, []).append((role, p.tensor))
            else:
                raise _no_chain(who, f"tensor {p.tensor!r} is a {role}")
        if wiring.free[name].over or name not in writes or name not in takes:
            raise _no_chain(who, f"factor {name!r} is not written by one weight and read by another")
    weights = [n for n, r in wiring.roles.items() if r == "weight"]
    of_weight = {w: f for f, w in writes.items()}
    after = {takes[f]: w for f, w in writes.items()}
    heads = [w for w in weights if w not in after]
    ends = [w for w in weights if w not in of_weight]
    if len(heads) != 1 or len(ends) != 1 or len(after) != len(weights) - 1:
        raise _no_chain(who, f"{len(heads)} weights read inputs and {len(ends)} write outputs")
    row = [heads[0]]
    follow = {v: k for k, v in after.items()}
    while row[-1] in follow:
        row.append(follow[row[-1]])
    order = {n: k for k, n in enumerate(wiring.roles)}
    layers = []
    for w in row:
        f = of_weight.get(w)
        own = sorted(vectors.get(f, []), key=lambda rv: order.get(rv[1], 0)) if f else []
        if f is not None and not _IDEMPOTENT & set(wiring.activations.get(f, ())):
            raise _no_chain(who, f"{f!r} goes through {', '.join(wiring.activations.get(f, ())) or 'no function'}")
        layers.append(Layer(f, w, tuple(own)))
    left = set(wiring.roles) - {w for x in layers for w in (x.weight, *(n for _, n in x.vectors))}
    last = [(wiring.roles[n], n) for n in wiring.roles if n in left and wiring.roles[n] == "shift"]
    layers[-1] = replace(layers[-1], vectors=tuple(last))
    return layers


def _no_chain(who: str, why: str) -> AlignmentError:
    return AlignmentError(
        f"{who} is no plain chain of layers with ReLU between them ({why}), so there is no place where an identity "
        "layer could go; align networks of one depth"
    )


def _last(found: tuple[Value, ...]) -> Tensor:
    return select(found, "post")[-1].samples.double()


def cka(x: Tensor, y: Tensor) -> float:
    """Linear centred kernel alignment of activations (samples, n) and (samples, m): 0 to 1."""
    x, y = x - x.mean(0), y - y.mean(0)
    cross = (x.t() @ y).square().sum()
    own = (x.t() @ x).norm() * (y.t() @ y).norm()
    return float(cross / own) if float(own) > 0 else 0.0


def monotone(alike: Tensor) -> list[int]:
    """For every column a row, rising from row 0 on, of the greatest total; by dynamic programming.

    Raises ``AlignmentError`` where no such choice has finite entries alone.
    """
    rows, columns = alike.shape
    best = torch.full((rows, columns), -float("inf"), dtype=alike.dtype)
    back = torch.zeros(rows, columns, dtype=torch.long)
    if columns:
        best[0, 0] = alike[0, 0]
    for j in range(1, columns):
        for i in range(j, rows):
            value, k = best[:i, j - 1].max(0)
            best[i, j], back[i, j] = value + alike[i, j], k
    if not columns or not bool(torch.isfinite(best[:, -1]).any()):
        raise AlignmentError(
            "no order of layers fits: maps of the two networks have different sizes at every layer; align networks "
            "that reduce their maps alike"
        )
    chosen = [int(best[:, -1].argmax())]
    for j in range(columns - 1, 0, -1):
        chosen.append(int(back[chosen[-1], j]))
    return chosen[::-1]


def _inserted(
    a: Mapping[str, Tensor], b: Mapping[str, Tensor], deep: list[Layer], shallow: list[Layer], matched: list[int],
    wiring: Wiring,
) -> dict[str, Tensor]:  # fmt: skip
    """b's tensors under a's names, identity layers in between, widths as they are in b."""
    source = dict(zip([*matched, len(deep) - 1], shallow, strict=True))
    out: dict[str, Tensor] = {}
    width = 0
    for i, layer in enumerate(deep):
        own = source.get(i)
        if own is not None:
            if [r for r, _ in own.vectors] != [r for r, _ in layer.vectors]:
                raise AlignmentError(
                    f"layer {own.weight!r} of b has {[r for r, _ in own.vectors]} and layer {layer.weight!r} of a has "
                    f"{[r for r, _ in layer.vectors]}; layers are matched where both have the same norms and biases"
                )
            out[layer.weight] = b[own.weight]
            out |= {mine: b[theirs] for (_, mine), (_, theirs) in zip(layer.vectors, own.vectors, strict=True)}
            width = wiring.free[own.factor].size if own.factor else 0
            continue
        like = a[layer.weight]
        weight = like.new_zeros(width, width, *like.shape[2:])
        middle = tuple(k // 2 for k in like.shape[2:])
        centre: tuple[slice | int, ...] = (slice(None), slice(None), *middle)
        weight[centre] = torch.eye(width, dtype=like.dtype)
        out[layer.weight] = weight
        for role, name in layer.vectors:
            out[name] = a[name].new_full((width,), 1.0 if role in ("gain", "variance") else 0.0)
    return {n: out.get(n, a[n]) for n in a}


def _check_function(
    b: Mapping[str, Tensor], program: Program, grown: Mapping[str, Tensor], args: tuple[object, ...], wiring: Wiring
) -> None:
    """Raises ``AlignmentError`` where the grown network does not compute what b does."""
    given = as_float32(args)
    with torch.no_grad():
        wanted = program_of(wiring).run(prepared(wiring, b), *given)
        try:
            got = program.run({n: t.float() if t.is_floating_point() else t for n, t in grown.items()}, *given)
        except RuntimeError as error:
            raise AlignmentError(
                f"a's network does not run at b's widths ({str(error).splitlines()[0][:80]}); align others"
            ) from error
    gap = distance([wanted], [got])
    if gap > 1e-3:
        raise AlignmentError(
            f"with identity layers b computes something else (by {gap:.1e}): a layer of a that nothing is laid on "
            "changes the size of its maps, or has another function; align networks of one depth"
        )


__all__ = ["Layer", "chain_of", "cka", "cross_layer", "monotone"]
