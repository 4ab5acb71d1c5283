"""Scale and sign symmetries of a traced network: found, proved by running, and divided out.

Besides permutations, networks have continuous symmetries: the rows of a ReLU layer may be multiplied by any
positive numbers if the columns that read them are divided by the same; so may queries against keys and values
against outputs inside every head of an attention layer, the gain of a norm against the weights after it. Where a
function is odd, signs may be flipped. ``scaling`` finds them without knowing any of these cases: positive ones from
the quantities that gradient flow would conserve (see ``weightspace.wiring.conserved``), signs from the structure of
the wiring; and each is kept only if a random element leaves the outputs unchanged in float64.

What holds only up to an epsilon (a convolution against the running variance of the batch norm after it) fails that
proof and is not a symmetry here.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import torch

from weightspace.errors import UnprovedWiringError, WiringError
from weightspace.wiring.balance import balance
from weightspace.wiring.slots import Slot, count_of, multiply, shape_of

if TYPE_CHECKING:
    from weightspace.wiring.wiring import Wiring


@dataclass(frozen=True)
class Generator:
    """A one-parameter group for every element of a factor: slot ``k`` is multiplied by ``s ** exponents[k]``.

    ``exponents`` is keyed by tensor; where the factor occurs in a tensor more than once (a packed projection, a
    recurrent matrix), by tensor and range, such as ``"attn.c_attn.weight[:, 0:768]"``. An element stands for one
    ``(*over, position)`` where the factor is fibred.
    """

    factor: str
    exponents: Mapping[str, int]
    slots: tuple[tuple[Slot, int], ...] = field(repr=False, compare=False)


@dataclass(frozen=True)
class Flip:
    """A change of sign for every element of a factor: the slots that flip together, named as in ``Generator``."""

    factor: str
    names: tuple[str, ...]
    slots: tuple[Slot, ...] = field(repr=False, compare=False)


@dataclass(frozen=True, eq=False)
class Rescaling:
    """An element of the group: ``scales`` (positive) per generator, ``signs`` per flip: ``(*over, size)``, float64."""

    scales: tuple[torch.Tensor, ...]
    signs: tuple[torch.Tensor, ...]

    def __repr__(self) -> str:
        flipped = sum(int((s < 0).sum()) for s in self.signs)
        return f"Rescaling({sum(s.numel() for s in self.scales):,} scales, {flipped:,} signs flipped)"


@dataclass(frozen=True, eq=False)
class Scaling:
    """The positive rescalings and sign flips of a wiring that keep the function, as far as they were found.

    ``error`` is the largest change of the outputs under random elements, ``max|y' - y| / max|y|`` in float64;
    ``control`` the least change over generators when one tensor of it is scaled alone (None: nothing to scale).
    ``refused`` says what looked like a symmetry and was not kept, and why; ``open`` is true where that was for the
    weights it was looked for with or for want of time, so that another file of the same program may show more.
    """

    wiring: Wiring = field(repr=False)
    generators: tuple[Generator, ...]
    flips: tuple[Flip, ...]
    error: float
    control: float | None
    seconds: float
    refused: tuple[str, ...] = ()
    # Names of one tensor (tied weights): the first stands for all.
    tied: Mapping[str, str] = field(default_factory=dict, repr=False)
    open: bool = False

    @property
    def positive(self) -> dict[str, dict[str, int]]:
        """``factor -> {tensor: exponent}`` for the factors that have just one generator."""
        often = Counter(g.factor for g in self.generators)
        return {g.factor: dict(g.exponents) for g in self.generators if often[g.factor] == 1}

    @property
    def signed(self) -> dict[str, tuple[str, ...]]:
        """``factor -> names that flip``; the first flip of a factor that has several."""
        found: dict[str, tuple[str, ...]] = {}
        for flip in self.flips:
            found.setdefault(flip.factor, flip.names)
        return found

    def random(self, seed: int = 0, spread: float = 0.5) -> Rescaling:
        """A random element: scales ``exp(spread z)`` with z standard normal, signs by coin."""
        generator = torch.Generator().manual_seed(seed)
        factors = self.wiring.factors
        scales = [
            torch.exp(spread * torch.randn(shape_of(factors, g.factor), generator=generator, dtype=torch.float64))
            for g in self.generators
        ]
        signs = [
            1.0 - 2.0 * torch.randint(0, 2, shape_of(factors, f.factor), generator=generator).to(torch.float64)
            for f in self.flips
        ]
        return Rescaling(tuple(scales), tuple(signs))

    def apply(self, element: Rescaling, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The tensors after the element acted on them, in their own dtype; what it does not touch comes back as it is.

        Raises ``WiringError`` for a tensor of another shape than the wiring's, or an element of another group.
        """
        if len(element.scales) != len(self.generators) or len(element.signs) != len(self.flips):
            raise WiringError(
                f"the element has {len(element.scales)} scales and {len(element.signs)} signs, this group has "
                f"{len(self.generators)} and {len(self.flips)}; draw it with this scaling's random()"
            )
        return self._acted([s.reshape(-1) for s in element.scales], [s.reshape(-1) for s in element.signs], tensors, 0)

    def verify(self, seed: int = 0) -> float:
        """``max|y' - y| / max|y|`` in float64 under a random element; raises as ``scaling`` does."""
        from weightspace.wiring.scaling_proof import error_of

        return error_of(self, seed)

    def canonical(
        self, tensors: Mapping[str, torch.Tensor], *, tolerance: float = 1e-12, max_sweeps: int = 100,
        batch_dims: int = 0, signs: bool = True,
    ) -> dict[str, torch.Tensor]:  # fmt: skip
        """The same point for all networks of an orbit: least norm, and signs settled by the weights themselves.

        Scales minimise the sum of squares (incoming and outgoing norms are then equal; see
        ``weightspace.wiring.balance``), up to steps of ``tolerance`` in the logarithm or ``max_sweeps`` steps. Signs
        are chosen flip by flip, so that a weighted sum of ``t |t|`` over what flips with an element is positive.
        ``batch_dims=1`` takes stacks ``(networks, *shape)``, each network on its own. Scales are found in float64
        whatever the dtype of the tensors.

        Raises ``WiringError`` where a tensor that takes part is missing or has another shape.
        """
        given = self._given(tensors, batch_dims)
        logs = []
        if self.generators:
            counts = [count_of(self.wiring.factors, g.factor) for g in self.generators]
            actions: dict[str, list[tuple[int, int, Slot]]] = {}
            for k, g in enumerate(self.generators):
                for slot, e in g.slots:
                    actions.setdefault(slot.tensor, []).append((k, e, slot))
            logs = balance(given, actions, counts, batch_dims, tolerance, max_sweeps)
        lead = next(iter(given.values())).shape[:batch_dims] if given else torch.Size()
        scales = [torch.exp(u).reshape(*lead, -1) for u in logs]
        settled = self._settled(given, scales, batch_dims) if signs else []
        return self._acted(scales, settled, tensors, batch_dims)

    # ---------------------------------------------------------------- inside

    def _given(self, tensors: Mapping[str, torch.Tensor], batch: int) -> dict[str, torch.Tensor]:
        """What takes part, by the name that stands for all of a tied tensor."""
        found: dict[str, torch.Tensor] = {}
        for name, t in tensors.items():
            found.setdefault(self.tied.get(name, name), t)
        wanted = dict.fromkeys(
            [s.tensor for g in self.generators for s, _ in g.slots] + [s.tensor for f in self.flips for s in f.slots]
        )
        missing = [n for n in wanted if n not in found]
        if missing:
            raise WiringError(
                f"tensor {missing[0]!r} takes part in the scale symmetries and is not among the {len(tensors)} given "
                f"({len(missing)} are missing); pass all tensors of the network"
            )
        for name in wanted:
            self._check(name, found[name], batch)
        return {n: found[n] for n in wanted}

    def _check(self, name: str, tensor: torch.Tensor, batch: int) -> None:
        if tuple(tensor.shape[batch:]) != self.wiring.shapes[name]:
            raise WiringError(
                f"tensor {name!r} has shape {tuple(tensor.shape)}, the wiring expects {self.wiring.shapes[name]}"
                + (f" after {batch} batch dims" if batch else "")
            )

    def _acted(
        self, scales: list[torch.Tensor], signs: list[torch.Tensor], tensors: Mapping[str, torch.Tensor], batch: int
    ) -> dict[str, torch.Tensor]:
        acting: dict[str, list[tuple[Slot, torch.Tensor]]] = {}
        for g, values in zip(self.generators, scales, strict=bool(scales)):
            for slot, e in g.slots:
                acting.setdefault(slot.tensor, []).append((slot, values**e))
        for f, values in zip(self.flips, signs, strict=False):
            for slot in f.slots:
                acting.setdefault(slot.tensor, []).append((slot, values))
        out = {}
        for name, t in tensors.items():
            factors = acting.get(self.tied.get(name, name), [])
            if factors:
                self._check(name, t, batch)
            out[name] = multiply(t, factors, batch) if factors else t
        return out

    def _settled(self, given: Mapping[str, torch.Tensor], scales: list[torch.Tensor], batch: int) -> list[torch.Tensor]:
        """Signs, one flip after the other, read off slots that no flip yet to come touches."""
        if not self.flips:
            return []
        now = {n: t.to(torch.float64) for n, t in self._acted(scales, [], given, batch).items()}
        lead = next(iter(now.values())).shape[:batch]
        counts = [count_of(self.wiring.factors, f.factor) for f in self.flips]
        result = [torch.ones(*lead, n, dtype=torch.float64) for n in counts]
        open_ = [torch.ones(*lead, n, dtype=torch.bool) for n in counts]
        order = self.order()
        # Where all that was read in the first round is zero, the second reads the other slots too.
        for k, readable in [*order, *((k, self._readable(self.flips[k], [k])) for k, _ in order)]:
            total = torch.zeros(*lead, counts[k], dtype=torch.float64)
            for i, slot in enumerate(readable):
                t = now[slot.tensor]
                # Balanced slots have equal norms: with equal weights, all positive and all negative ones would cancel.
                total += 0.5**i * slot.sums(t * t.abs(), counts[k], batch).cpu()
            sign = torch.where((total < 0) & open_[k], -1.0, 1.0).to(torch.float64)
            open_[k] &= total == 0
            result[k] = result[k] * sign
            for slot in self.flips[k].slots:
                now[slot.tensor] = multiply(now[slot.tensor], [(slot, sign)], batch)
        return result

    def order(self) -> list[tuple[int, list[Slot]]]:
        """The order in which signs are settled, and the slots that each is read off.

        A slot can be read where no flip still to come acts; the flip with the largest share of such goes first.
        """
        todo = list(range(len(self.flips)))
        order = []
        while todo:
            readable = {k: self._readable(self.flips[k], todo) for k in todo}
            best = max(todo, key=lambda k: len(readable[k]) / len(self.flips[k].slots))
            order.append((best, readable[best]))
            todo.remove(best)
        return order

    def _readable(self, flip: Flip, todo: list[int]) -> list[Slot]:
        """Slots that overlap with no other slot of the flips still to do."""
        others = [(self.flips[k], s) for k in todo for s in self.flips[k].slots]
        return [
            s
            for s in flip.slots
            if all((f is flip and o is s) or o.tensor != s.tensor or s.apart(o) for f, o in others)
        ]

    def __repr__(self) -> str:
        lines = [
            f"Scaling({len(self.generators)} rescalings and {len(self.flips)} sign flips of "
            f"{len({g.factor for g in self.generators} | {f.factor for f in self.flips})} factors, "
            f"error {self.error:.1e} in float64"
            + ("" if self.control is None else f", control {self.control:.1e}")
            + f", {self.seconds:.1f} s)"
        ]
        lines += [
            f"  {g.factor}: " + ", ".join(f"{n}^{e:+d}" for n, e in g.exponents.items()) for g in self.generators[:6]
        ]
        if len(self.generators) > 6:
            lines.append(f"  … {len(self.generators) - 6} more rescalings")
        lines += [f"  ± {f.factor}: {', '.join(f.names)}" for f in self.flips[:6]]
        if len(self.flips) > 6:
            lines.append(f"  … {len(self.flips) - 6} more flips")
        return "\n".join([*lines, *(f"  refused: {r}" for r in self.refused[:4])])


def scaling(wiring: Wiring, seed: int = 0) -> Scaling:
    """The scale and sign symmetries of a wiring, found by a few backward passes and proved by running.

    Kept on the wiring: a second call costs nothing, nor does one for another file of the same program, unless the
    weights at hand left something open. Raises ``UnprovedWiringError`` for a wiring that is not proved
    or has no network to run, as that of a model too large to run or of a bare chain of tensors.
    """
    known = wiring.kept.get("scaling")
    if isinstance(known, Scaling):
        return known
    known = wiring.shared.get("scaling")
    if isinstance(known, Scaling) and wiring.proved and wiring.program is not None:
        wiring.kept["scaling"] = own = replace(known, wiring=wiring)
        return own
    if not wiring.proved or wiring.program is None:
        why = "has no network to run" if wiring.program is None else f"is {wiring.status}, not proved"
        raise UnprovedWiringError(
            f"the wiring ({wiring.origin}) {why}, so scale symmetries cannot be found; wire a module with example "
            "inputs, or a file whose family the catalogue knows"
        )
    from weightspace.wiring.scaling_proof import find

    wiring.kept["scaling"] = found = find(wiring, seed)
    if not found.open:
        # Without the program, hence without the tensors of this file.
        wiring.shared["scaling"] = replace(found, wiring=wiring.with_(program=None))
    return found
