"""The wiring of a network and its symmetry group.

A ``Wiring`` says for every dimension of every tensor which axis it is. Its symmetry group is spanned by
the free factors: a group element (``Permutation``) holds, for each of them, an index array ``p`` of shape
``(*sizes of the factors it is fibred over, size)``. Acting on a tensor it reads position ``x`` of a factor
from position ``p[f, x]``, where ``f`` are the positions of the factors it is fibred over; every tensor
that carries the factor is read in the same way, so the function computed stays the same.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from math import prod
from typing import TYPE_CHECKING, Any, Literal

import torch

from weightspace.errors import WiringError
from weightspace.wiring.axis import Axis, Factor, Kind, Segment

if TYPE_CHECKING:
    from weightspace.wiring.program import Program
    from weightspace.wiring.proof import Proof
    from weightspace.wiring.roles import Role

Status = Literal["proved", "unverified", "failed"]
# One way to fill a group of dims: a segment for each of them.
Block = tuple[Segment, ...]


@dataclass(frozen=True)
class DimGroup:
    """Dims of a tensor whose segments go together, and the blocks that tile them."""

    dims: tuple[int, ...]
    blocks: tuple[Block, ...]


Layout = tuple[DimGroup, ...]


@dataclass(frozen=True)
class Permutation:
    """An element of a wiring's symmetry group: factor name -> index array (see the module's head).

    Factors that are not named stay as they are.
    """

    index: Mapping[str, torch.Tensor]
    factors: Mapping[str, Factor] = field(repr=False)

    def compose(self, then: Permutation) -> Permutation:
        """Acting with the result equals acting with ``self`` and then with ``then``."""
        out: dict[str, torch.Tensor] = {}
        for name in {**self.index, **then.index}:
            first, second = self._of(name), then._of(name)
            over = self.factors[name].over
            if not over:
                out[name] = first[second]
                continue
            # Row f of the result reads row then[f] of the first.
            rows = then._grid(over)
            out[name] = first[(*(r.unsqueeze(-1).expand(second.shape) for r in rows), second)]
        return Permutation(out, self.factors)

    def invert(self) -> Permutation:
        """The group inverse: ``p.compose(p.invert())`` is the identity."""
        out: dict[str, torch.Tensor] = {}
        for name in self.index:
            p = self._of(name)
            over = self.factors[name].over
            inverse = torch.argsort(p, dim=-1)
            if over:
                moved = torch.empty_like(inverse)
                moved[tuple(self._grid(over))] = inverse
                inverse = moved
            out[name] = inverse
        return Permutation(out, self.factors)

    @property
    def is_identity(self) -> bool:
        return all(bool((p == torch.arange(p.shape[-1])).all()) for p in self.index.values())

    def _of(self, name: str) -> torch.Tensor:
        found = self.index.get(name)
        if found is not None:
            return found
        factor = self.factors[name]
        shape = [self.factors[o].size for o in factor.over]
        return torch.arange(factor.size).expand(*shape, factor.size).contiguous()

    def _grid(self, over: Sequence[str]) -> list[torch.Tensor]:
        """For every combination of positions of the named factors, where each is read from."""
        return _grid_of(self, over)

    def __repr__(self) -> str:
        moved = sum(int((p != torch.arange(p.shape[-1])).sum()) for p in self.index.values())
        return f"Permutation({len(self.index)} factors, {moved:,} elements moved)"


def _grid_of(perm: Permutation, names: Sequence[str]) -> list[torch.Tensor]:
    sizes = [perm.factors[n].size for n in names]
    out = []
    for n in names:
        p = perm._of(n)
        inner = perm.factors[n].over
        axes = [*(names.index(i) for i in inner), names.index(n)]
        order = sorted(range(len(axes)), key=lambda k: axes[k])
        shape = [1] * len(names)
        for k in axes:
            shape[k] = sizes[k]
        out.append(p.permute(order).reshape(shape).expand(sizes))
    return out


class Wiring(Mapping[str, tuple[Axis, ...]]):
    """``tensor name -> one Axis per dimension``, with the symmetry group and its proof.

    Built by ``weightspace.wiring``; immutable. ``status`` is ``"proved"`` when a random group element left
    the outputs unchanged, ``"unverified"`` when nothing could be run (a guess from names and shapes),
    ``"failed"`` when the outputs changed.
    """

    def __init__(
        self,
        layouts: Mapping[str, Layout],
        shapes: Mapping[str, tuple[int, ...]],
        factors: Mapping[str, Factor],
        *,
        origin: str,
        status: Status = "unverified",
        proof: Proof | None = None,
        program: Program | None = None,
        missing: Mapping[str, int] | None = None,
        untouched: tuple[str, ...] = (),
        notes: tuple[str, ...] = (),
        reads: Mapping[str, int] | None = None,
        roles: Mapping[str, Role] | None = None,
        activations: Mapping[str, tuple[str, ...]] | None = None,
        frequencies: Mapping[str, float] | None = None,
    ) -> None:
        self.layouts = dict(layouts)
        self.shapes = dict(shapes)
        self.factors = dict(factors)
        self.origin = origin
        self.status: Status = status
        self.proof = proof
        self.program = program
        self.missing = dict(missing or {})
        self.untouched = untouched
        self.notes = notes
        # Of each weight the dim that its operation sums over, where the trace saw it.
        self.reads = dict(reads or {})
        # What each tensor does (see ``weightspace.wiring.roles``), in order of first use in the traced run, which no
        # order of the tensors in a file can change; empty where nothing was traced.
        self.roles: dict[str, Role] = dict(roles or {})
        # Per factor, the nonlinear functions seen on intermediate values that carry it, in order of appearance.
        self.activations = dict(activations or {})
        # Of a factor that goes through a sine, what the argument is multiplied by first (30 in SIREN).
        self.frequencies = dict(frequencies or {})
        # What was worked out from this wiring and is asked for again; and what holds for every file of its program
        # (see ``weightspace.wiring.entry``), so that the wirings of all of them have this one dictionary.
        self.kept: dict[str, object] = {}
        self.shared: dict[str, object] = {}
        self._tensors, self.axes = _axes(self.layouts, self.shapes, self.factors)

    # ---------------------------------------------------------------- mapping

    def __getitem__(self, name: str) -> tuple[Axis, ...]:
        try:
            return self._tensors[name]
        except KeyError:
            raise KeyError(f"the wiring has no tensor {name!r}; it has {', '.join(list(self)[:5])} …") from None

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    # ---------------------------------------------------------------- the group

    @property
    def free(self) -> dict[str, Factor]:
        """The factors that may be permuted."""
        return {n: f for n, f in self.factors.items() if not f.pinned}

    @property
    def proved(self) -> bool:
        return self.status == "proved"

    @property
    def movable_share(self) -> float:
        """Share of all parameters (elements of the wired tensors) that lie on at least one movable factor."""
        total = moving = 0.0
        for name, layout in self.layouts.items():
            count = prod(self.shapes[name])
            still = 1.0
            for group in layout:
                extent = prod(self.shapes[name][d] for d in group.dims)
                if extent:
                    fixed = sum(
                        prod(s.size for s in block)
                        for block in group.blocks
                        if all(self.factors[f].pinned for s in block for f in s.factors)
                    )
                    still *= fixed / extent
            total += count
            moving += count * (1 - still)
        return moving / total if total else 0.0

    def identity(self) -> Permutation:
        return Permutation({}, self.factors)

    def random(self, seed: int | torch.Generator = 0, only: Sequence[str] | None = None) -> Permutation:
        """A uniformly random group element (of the named factors only, where given)."""
        generator = seed if isinstance(seed, torch.Generator) else torch.Generator().manual_seed(seed)
        index = {}
        for name, f in self.free.items():
            if only is not None and name not in only:
                continue
            shape = [self.factors[o].size for o in f.over]
            index[name] = torch.rand(*shape, f.size, generator=generator).argsort(dim=-1)
        return Permutation(index, self.factors)

    def apply(self, perm: Permutation, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The tensors after the group element acted on them: exact, bit for bit a rearrangement.

        Tensors that the wiring does not describe raise ``WiringError``; so does a wrong shape. Dtype and
        order are kept, and the input is left as it was.
        """
        out: dict[str, torch.Tensor] = {}
        for name in tensors:
            layout = self.layouts.get(name)
            if layout is None:
                raise WiringError(
                    f"tensor {name!r} is not in the wiring ({self.origin}), which describes {len(self)} tensors; "
                    "pass the tensors that the wiring was made for"
                )
            tensor = tensors[name]
            if tuple(tensor.shape) != self.shapes[name]:
                raise WiringError(
                    f"tensor {name!r} has shape {tuple(tensor.shape)}, the wiring expects {self.shapes[name]}"
                )
            out[name] = _act(tensor, layout, perm)
        return out

    def verify(self, seed: int = 0) -> Proof:
        """Run the network before and after a random group element; see ``weightspace.wiring.proof``."""
        from weightspace.wiring.proof import verify

        return verify(self, seed)

    def with_(self, **changes: Any) -> Wiring:
        """A copy with some attributes replaced."""
        fields: dict[str, Any] = {
            "origin": self.origin, "status": self.status, "proof": self.proof, "program": self.program,
            "missing": self.missing, "untouched": self.untouched, "notes": self.notes, "reads": self.reads,
            "roles": self.roles, "activations": self.activations,
            "frequencies": self.frequencies,
        }  # fmt: skip
        factors = changes.pop("factors", self.factors)
        layouts = changes.pop("layouts", self.layouts)
        shapes = changes.pop("shapes", self.shapes)
        return Wiring(layouts, shapes, factors, **{**fields, **changes})

    def pinning(self, names: Sequence[str], reason: str) -> Wiring:
        """A copy in which the named factors may not move."""
        chosen = set(names)
        factors = {
            n: replace(f, pinned=True, over=(), reason=reason) if n in chosen else f for n, f in self.factors.items()
        }
        return self.with_(factors=factors)

    def tensors_of(self, factor: str) -> list[str]:
        """Names of the tensors that carry a factor."""
        return [
            n
            for n, layout in self.layouts.items()
            if any(factor in s.factors for g in layout for b in g.blocks for s in b)
        ]

    def __repr__(self) -> str:
        free = [f for f in self.free.values() if not f.over]
        fibred = [f for f in self.free.values() if f.over]
        lines = [
            f"Wiring({self.origin}, {self.status}: {len(self)} tensors, {len(self.axes)} axes, "
            f"{len(free)} free factors, {len(fibred)} fibred, {self.movable_share:.1%} of parameters movable)"
        ]
        lines += [f"  {name}: ({', '.join(map(repr, self[name]))})" for name in list(self)[:6]]
        if len(self) > 6:
            lines.append(f"  … {len(self) - 6} more")
        return "\n".join(lines)


# -------------------------------------------------------------------- acting on a tensor


def _act(tensor: torch.Tensor, layout: Layout, perm: Permutation) -> torch.Tensor:
    out = tensor
    for dims, blocks in _joint(layout, perm.factors):
        if not any(f in perm.index for block in blocks for s in block for f in s.factors):
            continue
        if len(dims) == 1:
            source = torch.arange(tensor.shape[dims[0]])
            for block in blocks:
                (target,), (origin,) = _addresses(block, perm)
                source[target.reshape(-1)] = origin.reshape(-1)
            out = out.index_select(dims[0], source.to(out.device))
            continue
        moved = out.movedim(dims, tuple(range(len(dims))))
        result = moved.clone()
        for block in blocks:
            targets, origins = _addresses(block, perm)
            result[tuple(targets)] = moved[tuple(origins)]
        out = result.movedim(tuple(range(len(dims))), dims).contiguous()
    return out.clone() if out is tensor else out


def _joint(layout: Layout, factors: Mapping[str, Factor]) -> list[tuple[tuple[int, ...], list[Block]]]:
    """Dim groups merged where a factor in one is fibred over a factor in another."""
    groups = [(list(g.dims), list(g.blocks)) for g in layout]
    merged = True
    while merged:
        merged = False
        for i, (_, blocks) in enumerate(groups):
            needed = {
                o
                for block in blocks
                for s in block
                for f in s.factors
                for o in factors[f].over
                if o not in {x for y in block for x in y.factors}
            }
            if not needed:
                continue
            for j, (_, others) in enumerate(groups):
                if j != i and any(f in needed for b in others for s in b for f in s.factors):
                    lo, hi = sorted((i, j))
                    dims = groups[lo][0] + groups[hi][0]
                    combined = [a + b for a, b in product(groups[lo][1], groups[hi][1])]
                    groups[lo] = (dims, combined)
                    groups.pop(hi)
                    merged = True
                    break
            if merged:
                break
    return [(tuple(d), b) for d, b in groups]


def _addresses(block: Block, perm: Permutation) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """For each dim of a block: where it is written and where it is read, broadcastable over the block."""
    places = [(d, k) for d, s in enumerate(block) for k in range(len(s.factors))]
    sizes = [block[d].sizes[k] for d, k in places]
    where: dict[str, int] = {}
    for i, (d, k) in enumerate(places):
        where.setdefault(block[d].factors[k], i)

    def spread(x: torch.Tensor, axes: Sequence[int]) -> torch.Tensor:
        order = sorted(range(len(axes)), key=lambda j: axes[j])
        shape = [1] * len(places)
        for j in axes:
            shape[j] = sizes[j]
        return x.permute(order).reshape(shape)

    targets, origins = [], []
    for d, segment in enumerate(block):
        target = origin = torch.full((), segment.start, dtype=torch.long)
        for k, (f, stride, size) in enumerate(zip(segment.factors, segment.strides, segment.sizes, strict=True)):
            axis = places.index((d, k))
            steps = spread(torch.arange(size), [axis])
            target = target + stride * steps
            p = perm.index.get(f)
            if p is None:
                origin = origin + stride * steps
            else:
                # A factor in the same dim is meant before one of that name elsewhere.
                here = {segment.factors[j]: places.index((d, j)) for j in range(len(segment.factors))}
                over = [here[o] if o in here else where[o] for o in perm.factors[f].over]
                origin = origin + stride * spread(p, [*over, axis])
        # Flat per dim of the tensor: positions of this dim, over all places of the block.
        targets.append(target)
        origins.append(origin)
    if len(block) == 1:
        full = torch.Size(sizes)
        return [targets[0].expand(full)], [origins[0].expand(full)]
    return targets, origins


# -------------------------------------------------------------------- axes for display


def _axes(
    layouts: Mapping[str, Layout], shapes: Mapping[str, tuple[int, ...]], factors: Mapping[str, Factor]
) -> tuple[dict[str, tuple[Axis, ...]], dict[str, Axis]]:
    tensors: dict[str, tuple[Axis, ...]] = {}
    known: dict[tuple[Any, ...], Axis] = {}
    names: dict[str, Axis] = {}
    for tensor, layout in layouts.items():
        row: list[Axis | None] = [None] * len(shapes[tensor])
        for group in layout:
            for k, d in enumerate(group.dims):
                segments = tuple(dict.fromkeys((b[k].start, b[k].factors, b[k].strides) for b in group.blocks))
                key = (shapes[tensor][d], segments)
                axis = known.get(key)
                if axis is None:
                    used = [f for _, fs, _ in segments for f in fs]
                    kind: Kind
                    if all(factors[f].pinned for f in used):
                        kind = "pinned"
                    elif len(segments) == 1 and len(used) == 1:
                        kind = "free"
                    else:
                        kind = "structured"
                    name = used[0] if len(used) == 1 else f"{_stem(tensor)}.{d}" if d else _stem(tensor)
                    if not used:
                        name = "1"
                    base, n = name, 2
                    while name in names and names[name] is not axis:
                        name, n = f"{base}~{n}", n + 1
                    axis = Axis(name, shapes[tensor][d], kind, tuple(fs for _, fs, _ in segments))
                    known[key] = axis
                    names[name] = axis
                row[d] = axis
        tensors[tensor] = tuple(a for a in row if a is not None)
    return tensors, names


def _stem(tensor: str) -> str:
    for ending in (".weight", ".bias", "/kernel:0", "/bias:0", "_weight", "_bias"):
        if tensor.endswith(ending) and len(tensor) > len(ending):
            return tensor[: -len(ending)]
    return tensor
