"""The algebra of axes that tracing works in: which axis elements move together, and how.

Every dimension of every tensor that a trace meets is a *product* of **atoms** (``Dim``, row-major).
An atom is primitive, or it has a *form* that was learnt later:

- ``Product``  a reshape split it:            ``channels = heads x head_dim``
- ``Sum``      a slice or concatenation cut it: ``channels = left + right``
- ``Family``   its identity depends on the position along another atom of the same tensor:
  in a fused ``(3, heads, head_dim)`` projection the heads of q, of k and of v are three atoms, told
  apart by the position along ``3``.

``Ledger.unify`` says that two dims are the same dim: union-find on primitive atoms, common refinement
where forms differ. Where two forms cannot be reconciled both are pinned, so a disagreement costs
symmetry and never correctness.

An atom may also be *fibred* over others (``over``): ``head_dim`` over ``heads`` means that each head may
have a permutation of its own. An atom is fibred over exactly those atoms that accompany it, aligned, in
every tensor where it occurs; ``Ledger.observe`` narrows the set as tensors appear.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import prod


class Atom:
    """A node of the union-find. Compare by ``Ledger.find``; ``form`` is None for a primitive atom."""

    __slots__ = ("form", "ident", "over", "parent", "pinned", "reason", "size", "wards")

    def __init__(self, ident: int, size: int, pinned: bool, reason: str) -> None:
        self.ident = ident
        self.size = size
        self.pinned = pinned
        self.reason = reason
        self.parent: Atom | None = None
        self.form: Product | Sum | Family | None = None
        # Atoms that accompany this one wherever it occurs; None until it is first observed.
        self.over: set[Atom] | None = None
        # Atoms that may be fibred over this one (a superset, checked on use).
        self.wards: set[Atom] = set()

    def __repr__(self) -> str:
        form = type(self.form).__name__.lower() if self.form else "atom"
        return f"<{form} {self.ident}:{self.size}{' pinned' if self.pinned else ''}>"


Dim = list[Atom]


@dataclass(frozen=True)
class Product:
    factors: tuple[Atom, ...]


@dataclass(frozen=True)
class Sum:
    parts: tuple[tuple[Atom, ...], ...]


@dataclass(frozen=True)
class Family:
    """Member ``j`` applies where the position along ``index`` lies in ``[bounds[j], bounds[j + 1])``."""

    index: Atom
    bounds: tuple[int, ...]
    members: tuple[Atom, ...]


# A restriction of one tensor: positions [start, stop) of the atom, which then reads as `into`.
Cut = tuple[Atom, int, int, Dim]


def size_of(dim: Iterable[Atom]) -> int:
    return prod(a.size for a in dim)


class Irreconcilable(Exception):
    """Internal: a dim cannot be cut or factored where an operation cuts it."""


class Ledger:
    """All atoms of one trace and what has been learnt about them."""

    def __init__(self) -> None:
        self._count = 0
        self.conflicts: list[str] = []

    # ---------------------------------------------------------------- making and reading

    def atom(self, size: int, *, pinned: bool = False, reason: str = "") -> Atom:
        self._count += 1
        return Atom(self._count, size, pinned, reason)

    def dim(self, size: int, *, pinned: bool = False, reason: str = "") -> Dim:
        """A fresh dim; size 1 is the empty product."""
        return [] if size == 1 else [self.atom(size, pinned=pinned, reason=reason)]

    def find(self, a: Atom) -> Atom:
        root = a
        while root.parent is not None:
            root = root.parent
        while a is not root:
            assert a.parent is not None
            a.parent, a = root, a.parent
        if isinstance(root.form, Family):
            members = {self.find(m) for m in root.form.members}
            if len(members) == 1 and root not in members:
                root.parent = members.pop()
                return self.find(root)
        return root

    def normal(self, dim: Iterable[Atom]) -> Dim:
        """Products expanded, roots taken, unit atoms dropped."""
        out: Dim = []
        for a in dim:
            a = self.find(a)
            if isinstance(a.form, Product):
                out += self.normal(a.form.factors)
            elif isinstance(a.form, Sum) and len(a.form.parts) == 1:
                out += self.normal(a.form.parts[0])
            elif a.size != 1:
                out.append(a)
        return out

    def leaves(self, dim: Iterable[Atom]) -> list[Atom]:
        """Primitive atoms below a dim, in order, with repetitions."""
        out: list[Atom] = []
        for a in self.normal(dim):
            if a.form is None:
                out.append(a)
            elif isinstance(a.form, Sum):
                for part in a.form.parts:
                    out += self.leaves(part)
            else:
                assert isinstance(a.form, Family)
                for member in a.form.members:
                    out += self.leaves([member])
        return out

    def is_pinned(self, dim: Iterable[Atom]) -> bool:
        return all(a.pinned for a in self.leaves(dim))

    def pin(self, dim: Iterable[Atom], reason: str) -> None:
        for a in self.leaves(dim):
            if not a.pinned:
                a.pinned, a.reason = True, reason

    # ---------------------------------------------------------------- refining

    def _define(self, a: Atom, form: Product | Sum) -> None:
        """Give a primitive atom a form; what was fibred over it follows."""
        wards = self._wards(a)
        a.form = form
        if isinstance(form, Product):
            for ward in wards:
                assert ward.over is not None
                ward.over.discard(a)
                self._put_over(ward, form.factors)
        else:
            self._distribute(a, wards)

    def _wards(self, a: Atom) -> list[Atom]:
        """Primitive free atoms fibred over ``a``."""
        found = {self.find(w) for w in a.wards}
        return [
            w for w in found if w.form is None and not w.pinned and w.over and any(self.find(o) is a for o in w.over)
        ]

    def _put_over(self, ward: Atom, indices: Iterable[Atom]) -> None:
        assert ward.over is not None
        for index in indices:
            ward.over.add(index)
            index.wards.add(ward)

    def _distribute(self, index: Atom, wards: Sequence[Atom]) -> None:
        """``index`` was cut into parts: every atom fibred over it becomes a family, a member per part."""
        assert isinstance(index.form, Sum)
        parts = index.form.parts
        bounds = [0]
        for part in parts:
            bounds.append(bounds[-1] + size_of(part))
        members = {w: [self.atom(w.size, pinned=w.pinned, reason=w.reason) for _ in parts] for w in wards}
        for ward, twins in members.items():
            assert ward.over is not None
            for j, twin in enumerate(twins):
                twin.over = set()
                for o in ward.over:
                    o = self.find(o)
                    if o is index:
                        self._put_over(twin, self.normal(parts[j]))
                    else:
                        self._put_over(twin, [members[o][j]] if o in members else [o])
        for j, part in enumerate(parts):
            # Where index and ward were fibred over each other, each part keeps its own twin.
            for leaf in self.leaves(part):
                if leaf.over:
                    kept = [self.find(o) for o in leaf.over]
                    leaf.over = set()
                    self._put_over(leaf, [members[o][j] if o in members else o for o in kept])
        for ward, twins in members.items():
            ward.form = Family(index, tuple(bounds), tuple(twins))

    def split(self, a: Atom, at: int) -> None:
        """Cut a primitive atom at a position."""
        left = self.dim(at, pinned=a.pinned, reason=a.reason)
        right = self.dim(a.size - at, pinned=a.pinned, reason=a.reason)
        for piece in left + right:
            piece.over = None if a.over is None else set()
            if a.over is not None:
                self._put_over(piece, [self.find(o) for o in a.over])
        self._define(a, Sum((tuple(left), tuple(right))))

    def cut(self, dim: Iterable[Atom], start: int, stop: int) -> tuple[Dim, list[Cut]]:
        """Positions [start, stop) of a dim, and how the other dims of that tensor must be restricted."""
        dim = self.normal(dim)
        total = size_of(dim)
        if start == 0 and stop == total:
            return dim, []
        if not dim or stop <= start:
            raise Irreconcilable
        head, rest = dim[0], dim[1:]
        if rest:
            inner = size_of(rest)
            if start % inner == 0 and stop % inner == 0:
                kept, cuts = self.cut([head], start // inner, stop // inner)
                return kept + self.restrict(rest, cuts), cuts
            row = start // inner
            if (stop - 1) // inner == row:
                kept, cuts = self.cut([head], row, row + 1)
                inside, more = self.cut(self.restrict(kept + rest, cuts), start - row * inner, stop - row * inner)
                return inside, cuts + more
            raise Irreconcilable
        return self._cut_atom(head, start, stop)

    def _cut_atom(self, a: Atom, start: int, stop: int) -> tuple[Dim, list[Cut]]:
        if a.form is None:
            if start > 0:
                self.split(a, start)
            elif stop < a.size:
                self.split(a, stop)
            return self._cut_atom(a, start, stop)
        if isinstance(a.form, Family):
            form = a.form
            pieces = []
            for m in form.members:
                piece, inner = self.cut([m], start, stop)
                pieces.append(piece)
                for atom, *_ in inner:
                    # What the index is made of cannot follow a cut of one member: it stays one for all parts.
                    self._detach([self.find(form.index)], self.find(atom))
            return self._family_of_dims(form, pieces), []
        assert isinstance(a.form, Sum)
        found: list[tuple[Dim, int, int, list[Cut]]] = []
        offset = 0
        for part in a.form.parts:
            width = size_of(part)
            lo, hi = max(start, offset), min(stop, offset + width)
            if lo < hi:
                piece, cuts = self.cut(part, lo - offset, hi - offset)
                found.append((piece, lo, hi, cuts))
            offset += width
        if len(found) == 1:
            piece, lo, hi, cuts = found[0]
            # First down to the part, then inside it.
            offset = 0
            for part in a.form.parts:
                width = size_of(part)
                if offset <= lo < offset + width:
                    return piece, [(a, offset, offset + width, self.normal(part)), *cuts]
                offset += width
        whole = self.sum_of([piece for piece, *_ in found])
        return whole, [(a, start, stop, whole)]

    def _detach(self, dim: Iterable[Atom], index: Atom) -> None:
        """Collapse the families over ``index`` below a dim."""
        for a in self.normal(dim):
            if isinstance(a.form, Family) and self.find(a.form.index) is index:
                self.collapse(a)
            elif isinstance(a.form, Family):
                for m in a.form.members:
                    self._detach([m], index)
            elif isinstance(a.form, Sum):
                for part in a.form.parts:
                    self._detach(part, index)

    def sum_of(self, dims: Sequence[Dim]) -> Dim:
        """The concatenation of dims as one dim."""
        dims = [self.normal(d) for d in dims]
        if len(dims) == 1:
            return dims[0]
        parts: list[tuple[Atom, ...]] = []
        for d in dims:
            if len(d) == 1 and isinstance(d[0].form, Sum):
                parts += d[0].form.parts
            else:
                parts.append(tuple(d))
        a = self.atom(sum(size_of(p) for p in parts))
        a.form = Sum(tuple(parts))
        return [a]

    def stack_of(self, dims_per_item: Sequence[Sequence[Dim]]) -> tuple[Dim, list[Dim]]:
        """Items stacked along a new dim: (the new dim, the other dims), families over the new dim."""
        count = len(dims_per_item)
        if count == 1:
            return [], [self.normal(d) for d in dims_per_item[0]]
        index = self.atom(count)
        index.form = Sum(tuple(() for _ in range(count)))
        template = Family(index, tuple(range(count + 1)), ())
        others = [
            self._family_of_dims(template, [list(item[k]) for item in dims_per_item])
            for k in range(len(dims_per_item[0]))
        ]
        return [index], others

    def _family_of_dims(self, like: Family, dims: Sequence[Dim]) -> Dim:
        """One dim that reads ``dims[j]`` at range j of the family's index."""
        dims = [self.normal(d) for d in dims]
        first = dims[0]
        if all(len(d) == len(first) and all(x is y for x, y in zip(d, first, strict=True)) for d in dims):
            return first
        out: Dim = []
        for column in self._columns(dims):
            a = self.atom(size_of(column[0]))
            a.form = Family(like.index, like.bounds, tuple(self._wrapped(piece) for piece in column))
            out.append(a)
        return self.normal(out)

    def _wrapped(self, dim: Dim) -> Atom:
        """A dim as one atom."""
        if len(dim) == 1:
            return dim[0]
        a = self.atom(size_of(dim))
        a.form = Product(tuple(dim))
        return a

    @staticmethod
    def _columns(dims: Sequence[Dim]) -> list[list[Dim]]:
        """Products of equal total cut at the boundaries that they share, nothing refined."""
        ends = []
        for d in dims:
            total, marks = 1, set()
            for a in d:
                total *= a.size
                marks.add(total)
            ends.append(marks)
        shared = sorted(set.intersection(*ends))
        columns: list[list[Dim]] = [[] for _ in shared]
        for d in dims:
            rest = list(d)
            total = 1
            for k, end in enumerate(shared):
                piece: Dim = []
                while total < end:
                    piece.append(rest.pop(0))
                    total *= piece[-1].size
                columns[k].append(piece)
        return columns

    def restrict(self, dim: Iterable[Atom], cuts: Sequence[Cut]) -> Dim:
        """A dim of a tensor after other dims (or its own leading atoms) were cut."""
        out = self.normal(dim)
        for index, start, stop, into in cuts:
            out = [x for a in out for x in self._restrict(a, self.find(index), start, stop, into)]
        return self.normal(out)

    def _restrict(self, a: Atom, index: Atom, start: int, stop: int, into: Dim) -> Dim:
        a = self.find(a)
        if a is index:
            return list(into)
        if isinstance(a.form, Family):
            if self.find(a.form.index) is index:
                bounds, members = a.form.bounds, a.form.members
                kept = [j for j in range(len(members)) if bounds[j] < stop and bounds[j + 1] > start]
                if len(kept) == 1:
                    j = kept[0]
                    inner = self.find(members[j])
                    if (start, stop) != (bounds[j], bounds[j + 1]) and isinstance(inner.form, Family):
                        width = inner.form.bounds[-1]
                        if width == bounds[j + 1] - bounds[j]:
                            return self._restrict(
                                inner, self.find(inner.form.index), start - bounds[j], stop - bounds[j], into
                            )
                    return [inner]
                new_index = self.normal(into)
                if len(new_index) != 1:
                    self.collapse(a)
                    return [self.find(a)]
                fresh = self.atom(a.size)
                new_bounds = [max(bounds[j], start) - start for j in kept] + [min(bounds[kept[-1] + 1], stop) - start]
                fresh.form = Family(new_index[0], tuple(new_bounds), tuple(members[j] for j in kept))
                return [fresh]
            dims = [self._restrict(m, index, start, stop, into) for m in a.form.members]
            if all(len(d) == 1 and d[0] is self.find(m) for d, m in zip(dims, a.form.members, strict=True)):
                return [a]
            return self._family_of_dims(a.form, dims)
        if isinstance(a.form, Sum):
            parts = [[x for p in part for x in self._restrict(p, index, start, stop, into)] for part in a.form.parts]
            same = all(
                len(q) == len(self.normal(p)) and all(x is y for x, y in zip(q, self.normal(p), strict=True))
                for p, q in zip(a.form.parts, [self.normal(q) for q in parts], strict=True)
            )
            return [a] if same else self.sum_of(parts)
        if isinstance(a.form, Product):
            return [x for f in a.form.factors for x in self._restrict(f, index, start, stop, into)]
        return [a]

    def factor(self, a: Atom, outer: int) -> tuple[Dim, Dim]:
        """Write an atom as ``outer x (size / outer)``."""
        a = self.find(a)
        if a.size % outer:
            raise Irreconcilable
        inner = a.size // outer
        if outer == 1 or inner == 1:
            return ([], [a]) if outer == 1 else ([a], [])
        if a.form is None:
            x = self.atom(outer, pinned=a.pinned, reason=a.reason)
            y = self.atom(inner, pinned=a.pinned, reason=a.reason)
            if a.over is not None:
                roots = [self.find(o) for o in a.over]
                x.over, y.over = set(), set()
                self._put_over(x, [*roots, y])
                self._put_over(y, [*roots, x])
            self._define(a, Product((x, y)))
            return [x], [y]
        if isinstance(a.form, Family):
            pairs = [self.factor_dim([m], outer) for m in a.form.members]
            return (
                self._family_of_dims(a.form, [p[0] for p in pairs]),
                self._family_of_dims(a.form, [p[1] for p in pairs]),
            )
        assert isinstance(a.form, Sum)
        pairs = []
        for part in a.form.parts:
            width = size_of(part)
            if width % inner:
                raise Irreconcilable
            pairs.append(self.factor_dim(part, width // inner))
        index_dim = self.sum_of([p[0] for p in pairs])
        if len(index_dim) != 1:
            raise Irreconcilable
        index = index_dim[0]
        if not isinstance(index.form, Sum):
            raise Irreconcilable
        bounds = [0]
        for p in pairs:
            bounds.append(bounds[-1] + size_of(p[0]))
        like = Family(index, tuple(bounds), ())
        return index_dim, self._family_of_dims(like, [p[1] for p in pairs])

    def factor_dim(self, dim: Iterable[Atom], outer: int) -> tuple[Dim, Dim]:
        """Write a dim as ``outer x rest``."""
        left: Dim = []
        rest = self.normal(dim)
        need = outer
        while need > 1:
            if not rest:
                raise Irreconcilable
            head = rest.pop(0)
            if need % head.size == 0:
                left.append(head)
                need //= head.size
            else:
                x, y = self.factor(head, need)
                left += x
                rest = y + rest
                need = 1
        return left, rest

    # ---------------------------------------------------------------- unifying

    def unify(self, one: Iterable[Atom], two: Iterable[Atom], why: str) -> None:
        """Two dims of equal size are the same dim."""
        self.unify_all([(one, two)], why)

    def unify_all(self, dims: Iterable[tuple[Iterable[Atom], Iterable[Atom]]], why: str) -> None:
        """The dims of two aligned tensors are the same, pair by pair.

        Indices come before the families over them: a family can only be matched position by position
        once its index is known to be the same on both sides.
        """
        pairs = [pair for one, two in dims for pair in self._align(one, two, why)]
        late = [isinstance(a.form, Family) or isinstance(b.form, Family) for a, b in pairs]
        for wanted in (False, True):
            for (a, b), is_late in zip(pairs, late, strict=True):
                if is_late is wanted:
                    self._unify_pair(a, b, why)

    def _unify_pair(self, a: Atom, b: Atom, why: str) -> None:
        a, b = self.find(a), self.find(b)
        if a is b:
            return
        if isinstance(a.form, Product) or isinstance(b.form, Product):
            self.unify([a], [b], why)
            return
        try:
            self._unify_atoms(a, b, why)
        except Irreconcilable:
            self._clash([a, b], why)

    def _align(self, one: Iterable[Atom], two: Iterable[Atom], why: str) -> list[tuple[Atom, Atom]]:
        """Both dims as products of atoms of the same sizes."""
        f, g = self.normal(one), self.normal(two)
        if size_of(f) != size_of(g):
            raise AssertionError(f"unify of sizes {size_of(f)} and {size_of(g)} in {why}")
        pairs: list[tuple[Atom, Atom]] = []
        while f and g:
            a, b = f[0], g[0]
            try:
                if a.size == b.size:
                    pairs.append((a, b))
                    f, g = f[1:], g[1:]
                elif a.size > b.size:
                    x, y = self._factor_or_pinned(a, b.size, f)
                    f[:1] = x + y
                else:
                    x, y = self._factor_or_pinned(b, a.size, g)
                    g[:1] = x + y
                f, g = self.normal(f), self.normal(g)
            except Irreconcilable:
                self._clash([*f, *g], why)
                break
        return pairs

    def _factor_or_pinned(self, a: Atom, outer: int, context: Dim) -> tuple[Dim, Dim]:
        try:
            return self.factor(a, outer)
        except Irreconcilable:
            if self.is_pinned([a]) and a.size % outer == 0:
                return self.dim(outer, pinned=True, reason="pinned"), self.dim(
                    a.size // outer, pinned=True, reason="pinned"
                )
            raise

    def _clash(self, dim: Iterable[Atom], why: str) -> None:
        dim = list(dim)
        if not self.is_pinned(dim):
            sizes = " x ".join(str(a.size) for a in self.normal(dim))
            self.conflicts.append(f"{why}: dims cut in incompatible ways ({sizes})")
            self.pin(dim, f"cut in incompatible ways ({why})")

    def _unify_atoms(self, a: Atom, b: Atom, why: str) -> None:
        # A stack's index has a form and no leaves: it takes the structural way below.
        fixed_a, fixed_b = (bool(self.leaves([x])) and self.is_pinned([x]) for x in (a, b))
        if fixed_a or fixed_b:
            fixed, other = (a, b) if fixed_a else (b, a)
            if fixed.form is None and other.form is not None and not self.leaves([other]):
                fixed.parent = other
                return
            reason = next((x.reason for x in self.leaves([fixed])), "pinned")
            self.pin([other], reason)
            if a.form is None and b.form is None:
                self._union(b, a)
            return
        if a.form is None and b.form is None:
            self._union(a, b)
        elif a.form is None:
            self._adopt(a, b, why)
        elif b.form is None:
            self._adopt(b, a, why)
        elif isinstance(a.form, Family) and isinstance(b.form, Family):
            if self.find(a.form.index) is self.find(b.form.index):
                fa, fb = a.form, b.form
                for i, x in enumerate(fa.members):
                    for j, y in enumerate(fb.members):
                        if fa.bounds[i] < fb.bounds[j + 1] and fb.bounds[j] < fa.bounds[i + 1]:
                            self.unify([x], [y], why)
            else:
                self.collapse(a)
                self.collapse(b)
                self.unify([a], [b], why)
        else:
            self._unify_sums(a, b, why)

    def _union(self, a: Atom, b: Atom) -> None:
        """Two primitive atoms become one; it is fibred over what both were."""
        if a is b:
            return
        b.parent = a
        if b.pinned and not a.pinned:
            a.pinned, a.reason = True, b.reason
        if a.over is None:
            mine, theirs = None, b.over
        else:
            mine, theirs = a.over, b.over
        if mine is not None and theirs is not None:
            roots = {self.find(o) for o in theirs}
            a.over = {r for r in (self.find(o) for o in mine) if r in roots and r is not a}
        elif theirs is not None:
            a.over = {self.find(o) for o in theirs} - {a}
        a.wards |= b.wards
        for o in a.over or ():
            o.wards.add(a)

    def _adopt(self, a: Atom, b: Atom, why: str) -> None:
        """A primitive atom turns out to be one that has a form."""
        if isinstance(b.form, Family):
            index = self.find(b.form.index)
            aligned = a.over is None or any(self.find(o) is index for o in a.over)
            if not aligned or any(x is a for x in self.leaves([b])):
                self.collapse(b)
                self.unify([a], [b], why)
                return
        elif any(x is a for x in self.leaves([b])):
            raise Irreconcilable
        wards = self._wards(a)
        if a.over is not None:
            mine = {self.find(o) for o in a.over}
            for leaf in set(self.leaves([b])):
                if leaf.over is not None:
                    siblings = self._siblings(b, leaf)
                    leaf.over = {r for r in (self.find(o) for o in leaf.over) if r in mine or r in siblings}
        a.parent = b
        if isinstance(b.form, Sum) and wards:
            self._distribute(b, wards)

    def _siblings(self, b: Atom, leaf: Atom) -> set[Atom]:
        """Atoms that share a product with the leaf somewhere below ``b``."""
        out: set[Atom] = set()
        form = b.form
        if isinstance(form, Sum):
            for part in form.parts:
                atoms = self.normal(part)
                if leaf in self.leaves(atoms):
                    out |= {x for x in atoms if x is not leaf}
                    for x in atoms:
                        out |= self._siblings(x, leaf)
        elif isinstance(form, Family):
            for m in form.members:
                for x in self.normal([m]):
                    if leaf in self.leaves([x]):
                        # A member accompanies one part of its index.
                        index = self.find(form.index)
                        out |= {
                            index,
                            *(y for part in getattr(index.form, "parts", ()) for y in self.normal(part)),
                        }
                        out |= self._siblings(x, leaf)
        return out

    def _unify_sums(self, a: Atom, b: Atom, why: str) -> None:
        marks = sorted(self._marks(a) | self._marks(b) | {0, a.size})
        for lo, hi in pairwise(marks):
            x, _ = self.cut([a], lo, hi)
            y, _ = self.cut([b], lo, hi)
            self.unify(x, y, why)
        a, b = self.find(a), self.find(b)
        if a is not b and isinstance(a.form, Sum) and isinstance(b.form, Sum):
            b.parent = a
            a.wards |= b.wards

    def _marks(self, a: Atom) -> set[int]:
        """Where an atom is already cut."""
        if isinstance(a.form, Sum):
            marks, offset = set(), 0
            for part in a.form.parts:
                marks |= {offset + m for m in self._marks_of(part)}
                offset += size_of(part)
                marks.add(offset)
            return marks
        if isinstance(a.form, Family):
            return set().union(*(self._marks_of([m]) for m in a.form.members))
        return set()

    def _marks_of(self, dim: Iterable[Atom]) -> set[int]:
        atoms = self.normal(dim)
        if not atoms:
            return set()
        inner = size_of(atoms[1:])
        return {m * inner for m in self._marks(atoms[0])}

    def collapse(self, a: Atom) -> None:
        """A family whose index is gone: all members are one atom."""
        a = self.find(a)
        if isinstance(a.form, Family):
            first = a.form.members[0]
            members = a.form.members
            for m in members[1:]:
                self.unify([first], [m], "family without its index")
            a = self.find(a)
            if isinstance(a.form, Family):
                a.parent = self.find(first) if self.find(first) is not a else None

    # ---------------------------------------------------------------- fibres

    def observe(self, dims: Sequence[Iterable[Atom]], implied: Iterable[Atom] = ()) -> None:
        """A tensor with these dims exists: atoms lose the companions that it does not carry.

        Also used for the aligned dims of a contraction, where it says that only those positions are
        matched between the operands. ``implied`` are atoms whose position every element of the tensor
        has without carrying them as a dim (the expert that a token was sent to).
        """
        rows = [self.normal(d) for d in dims]
        for _ in range(64):
            here = {a for row in rows for a in row}
            loose = [a for a in here if isinstance(a.form, Family) and self.find(a.form.index) not in here]
            if not loose:
                break
            for a in loose:
                self.collapse(a)
            rows = [self.normal(row) for row in rows]
        places = {(d, a) for d, row in enumerate(rows) for a in row}
        self._observe(rows, places, {self.find(a) for a in implied})

    def _observe(self, rows: list[Dim], update: set[tuple[int, Atom]], implied: set[Atom]) -> None:
        for row in rows:
            for a in row:
                if isinstance(a.form, Family):
                    index = self.find(a.form.index)
                    # An index in the same dim is meant before one of that name elsewhere.
                    at = next((e for e in [row, *rows] if index in e), None)
                    if at is not None and isinstance(index.form, Sum):
                        where = next(k for k, e in enumerate(rows) if e is at)
                        self._observe_family(rows, where, index, a.form, update, implied)
                        return
        total = Counter(a for row in rows for a in row)
        for d, row in enumerate(rows):
            inside_counts = Counter(row)
            for a in row:
                if (d, a) not in update:
                    continue
                if a.form is None and not a.pinned:
                    # Aligned are the other atoms of this very dim, and those that stand once in the tensor.
                    companions = {x for x, n in inside_counts.items() if n == 1 and x is not a}
                    companions |= {x for x, n in total.items() if n == 1 and x is not a}
                    self._narrow(a, companions | (implied - set(total)))
                elif isinstance(a.form, Sum):
                    others = [x for x in row if x is not a]
                    for part in a.form.parts:
                        inside = self.normal(part)
                        if inside:
                            opened = [*rows[:d], others + inside, *rows[d + 1 :]]
                            self._observe(opened, {(d, x) for x in inside}, implied)

    def _observe_family(
        self,
        rows: list[Dim],
        where: int,
        index: Atom,
        family: Family,
        update: set[tuple[int, Atom]],
        implied: set[Atom],
    ) -> None:
        """Position by position along the index, every family over it is one of its members."""
        for lo, hi in pairwise(family.bounds):
            try:
                part, cuts = self.cut([index], lo, hi)
            except Irreconcilable:
                continue
            cuts = cuts or [(index, lo, hi, part)]
            here = self.restrict_rows(rows, where, cuts)
            touched = {
                (d, x)
                for d, row in enumerate(rows)
                for a in row
                if (d, a) in update
                for x in (self.restrict([a], cuts) if self._follows(rows, d, where, index) else [a])
            }
            if any(
                isinstance(x.form, Family) and self.find(x.form.index) is index
                for d, row in enumerate(here)
                if self._follows(rows, d, where, index)
                for x in row
            ):
                continue
            self._observe(here, touched, implied)

    def _follows(self, rows: Sequence[Dim], d: int, where: int, index: Atom) -> bool:
        """Do families in dim d follow the index that stands in dim ``where``? Not if it has one of its own."""
        return d == where or index not in rows[d]

    def restrict_rows(self, rows: Sequence[Iterable[Atom]], where: int, cuts: Sequence[Cut]) -> list[Dim]:
        """All dims of a tensor after its dim ``where`` was cut."""
        normal = [self.normal(row) for row in rows]
        out = []
        for d, row in enumerate(normal):
            applying = [c for c in cuts if d == where or not self._reaches(row, self.find(c[0]))]
            out.append(self.restrict(row, applying))
        return out

    def _reaches(self, dim: Iterable[Atom], atom: Atom) -> bool:
        for a in self.normal(dim):
            if a is atom:
                return True
            if isinstance(a.form, Sum) and any(self._reaches(p, atom) for p in a.form.parts):
                return True
            if isinstance(a.form, Family) and any(self._reaches([m], atom) for m in a.form.members):
                return True
        return False

    def _narrow(self, a: Atom, companions: set[Atom]) -> None:
        if a.over is None:
            a.over = set()
            self._put_over(a, companions)
        else:
            a.over = {r for r in (self.find(o) for o in a.over) if r in companions}
