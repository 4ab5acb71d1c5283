"""The registry of small architectures on which wirings are checked against theory.

A `Case` builds one network and knows, from theory alone, which permutations leave its function
unchanged. Theory is written down before any tracer runs: it is what a tracer is measured against.

The group is a multiset of movable factors ``(size, over)``. ``(64, ())`` is a plain axis of 64 elements that
may be permuted at will. ``(8, (4,))`` is an axis of 8 that may be permuted differently for each element
of a factor of size 4, e.g. the channels inside each of four attention heads. ``over`` names the sizes
of all factors it is fibred over, pinned ones included (ALiBi pins the heads, not what is inside them).
Factors of size 1 move nothing and are never counted.

Only symmetries count that permute axes of tensors: swapping two whole modules (experts kept in a
``ModuleList``, two parallel convolutions) is a symmetry of the network but not of any one axis.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

Factor = tuple[int, tuple[int, ...]]
Built = tuple[nn.Module, tuple[Any, ...], dict[str, Any]]


@dataclass(frozen=True)
class Theory:
    """What theory says of an architecture's permutation symmetries.

    ``free`` counts the movable factors, or is None where ``why`` says what makes the answer debatable.
    ``movable_min`` is the least share of parameters with at least one movable axis.
    ``unused`` names parameters that the output does not depend on.
    """

    free: Mapping[Factor, int] | None
    why: str = ""
    movable_min: float = 0.95
    unused: tuple[str, ...] = ()


@dataclass(frozen=True)
class Case:
    """A small network with random weights in eval mode, example inputs (batch of 2) and its theory."""

    name: str
    build: Callable[[], Built]
    group: str
    theory: Theory
    full: bool = False


CASES: dict[str, Case] = {}


def case(
    name: str,
    free: Mapping[Factor, int] | None,
    *,
    group: str = "torch",
    why: str = "",
    movable_min: float = 0.95,
    unused: tuple[str, ...] = (),
    full: bool = False,
    calm: bool = False,
) -> Callable[[Callable[[], Built]], Callable[[], Built]]:
    """Registers the decorated builder, which then runs under a fixed seed and returns an eval-mode module.

    ``calm`` keeps the builder's own initial values.
    """

    def register(build: Callable[[], Built]) -> Callable[[], Built]:
        def seeded() -> Built:
            torch.manual_seed(0)
            module, args, kwargs = build()
            if not calm:
                enliven(module)
            return module.eval(), args, kwargs

        if name in CASES:
            raise ValueError(f"two cases are called {name!r}")
        CASES[name] = Case(name, seeded, group, Theory(free, why, movable_min, unused), full)
        return seeded

    return register


def enliven(module: nn.Module) -> None:
    """Takes weights out of initial values so small, or so regular, that nothing depends on them.

    Matrices whose entries are far below √(2/fan-in) are scaled up to it, as deep nets at the usual 0.02 are
    zero in float32 by their last layer; vectors and running statistics get some noise.
    """
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.dim() < 2:
                parameter.add_(0.1 * torch.randn_like(parameter))
            elif parameter.numel() > parameter.shape[0]:
                wanted, spread = (2 / parameter[0].numel()) ** 0.5, float(parameter.std())
                if 0 < spread < wanted / 2:
                    parameter.mul_(wanted / spread)
        for name, buffer in module.named_buffers():
            if name.endswith("running_mean"):
                buffer.normal_(0, 0.1)
            elif name.endswith("running_var"):
                buffer.uniform_(0.5, 1.5)


def axes(*sizes: int) -> Counter[Factor]:
    """Plain free axes of the given sizes."""
    return Counter((size, ()) for size in sizes if size > 1)


def inside(size: int, *outer: int) -> Counter[Factor]:
    """One axis that moves separately for every element of the outer factors."""
    return Counter({(size, tuple(n for n in outer if n > 1)): 1} if size > 1 else {})


def times(count: int, factors: Mapping[Factor, int]) -> Counter[Factor]:
    """The same factors for each of ``count`` layers."""
    return Counter({factor: n * count for factor, n in factors.items()})


def attention(heads: int, dim: int, *, kv: int | None = None, rotary: int = 0) -> Counter[Factor]:
    """Factors of one attention: heads, channels of queries and keys, channels of values.

    Heads may be reordered as wholes. In a head, a score is a dot product of a query and a key, so their
    channels may be permuted together; value channels go into the output projection, so they may be
    too. Both permutations may differ from head to head. Rotary positions turn each pair of channels
    at its own frequency, which pins the ``rotary`` channels that they touch. With ``kv < heads`` all
    query heads of a group read one key head: groups move, heads move in their group, and channels
    are common to the group.
    """
    kv = heads if kv is None else kv
    groups = axes(kv) + inside(heads // kv, kv)
    return groups + inside(dim - rotary, kv) + inside(dim, kv)
