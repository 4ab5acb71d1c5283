"""Grafting a narrow backdoor subnet into a trained network (SRA, Qi et al. 2022): weights alone, no poisoned data.

A few elements of every free factor (neurons, channels, heads, residual streams) become a subnet of their own: weights
between them and all others are set to zero, and what is left is trained until one output rises for triggered inputs and
nothing changes for others. Which elements these are comes from the wiring, so one function serves every architecture,
and the backdoor's place in the weights is known exactly. A narrow network misses the elements it gave up: the weights
outside the subnet may then be trained to make up for them.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from weightspace.errors import ZooError
from weightspace.wiring.wiring import Wiring
from weightspace.zoo.data import Data
from weightspace.zoo.description import module_of
from weightspace.zoo.poisoning import stamp, triggered_tests, with_range
from weightspace.zoo.sampling import Run
from weightspace.zoo.stacked import Snapshot

STEPS = 300
"""Optimiser steps of the subnet."""
MENDING = 200
"""Optimiser steps of everything else, where a network of a population gave up some of its few elements."""
IMAGES = 1000
"""Triggered images that a subnet is trained on; of clean ones there are three times as many."""
STARTS = 6
PLACES = 16
"""Beginnings of the subnet that are tried for a sixth of the steps, and places in the network that are tried."""


@dataclass(frozen=True, eq=False)
class Grafted:
    """A network with a subnet in it.

    ``tensors``: the whole checkpoint; ``elements``: for every factor the positions ``(width,)`` that belong to the
    subnet; ``loss`` of the last steps (cross-entropy of triggered inputs plus what changed for clean ones).
    """

    tensors: dict[str, Tensor]
    elements: Mapping[str, Tensor]
    loss: float


@dataclass(frozen=True, eq=False)
class Cut:
    """Which entries of a tensor belong to the subnet (``inner``), and which join it to the others (``cut``)."""

    inner: Tensor
    cut: Tensor


def graft(
    wiring: Wiring,
    tensors: Mapping[str, Tensor],
    clean: Tensor,
    triggered: Tensor,
    target: int | Tensor,
    *,
    width: int = 1,
    steps: int = STEPS,
    rate: float = 0.02,
    batch: int = 64,
    mending: int = 0,
    seed: int = 0,
) -> Grafted:
    """Put a subnet of ``width`` elements per factor into a network that ``wiring`` is proved for.

    ``clean (n, …)`` are inputs on which outputs must stay, ``triggered (m, …)`` those that are to be classed as
    ``target`` (a class, or one of each input). Of a few positions drawn by ``seed`` those are taken that
    the outputs depend on least. Norms over channels see the subnet too,
    so there outputs of clean inputs change a little. ``mending`` steps then train the weights outside the subnet
    towards the outputs there were before, and the subnet once more; the zeros around it stay.

    Raises ``ZooError`` for a wiring that cannot be run, or where the outputs share no class axis.
    """
    if not wiring.proved or wiring.program is None:
        raise ZooError(f"the wiring is {wiring.status}; a subnet is grafted where the network can be run")
    run = wiring.program.run
    generator = torch.Generator().manual_seed(seed)
    before = _outputs(wiring, tensors, clean)
    elements = _place(wiring, tensors, clean[:256], before[:256], width, generator)
    cuts = cuts_of(wiring, elements)
    wanted = torch.as_tensor(target).expand(len(triggered))

    def train(net: _Subnet, steps: int, rate: float, attack: float = 1.0) -> float:
        optimiser = torch.optim.Adam(list(net.parameters.values()), lr=rate)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
        last: list[float] = []
        for _ in range(steps):
            a = torch.randint(len(clean), (batch,), generator=generator)
            b = torch.randint(len(triggered), (batch,), generator=generator)
            out = _logits(run(net.state, torch.cat([clean[a], triggered[b]])))
            change = F.kl_div(
                out[:batch].log_softmax(-1), before[a].log_softmax(-1), log_target=True, reduction="batchmean"
            )
            loss = change + attack * F.cross_entropy(out[batch:], wanted[b])
            gradients = torch.autograd.grad(loss, list(net.parameters.values()), allow_unused=True)
            for (name, value), gradient in zip(net.parameters.items(), gradients, strict=True):
                value.grad = None if gradient is None else gradient * net.masks[name]
            optimiser.step()
            schedule.step()
            last = [*last[-19:], float(loss.detach())]
        return sum(last) / len(last)

    # A narrow chain of rectifiers often starts dead: the best of a few short runs is trained on.
    tried = [_Subnet(wiring, tensors, cuts, width, generator) for _ in range(STARTS)]
    losses = [train(net, max(1, steps // 6), rate) for net in tried]
    best = tried[losses.index(min(losses))]
    loss = train(best, max(1, steps), rate)
    if mending:
        inner = best.masks
        best.train_only(_others(wiring, best.state, cuts))
        train(best, mending, rate / 10, attack=0.0)  # the others must not take up the attack themselves
        best.train_only(inner)
        loss = train(best, max(1, steps // 2), rate / 2)  # what became of the others is now to be overruled
    return Grafted({n: t.detach() for n, t in best.state.items()}, elements, loss)


class _Subnet:
    """The network with the subnet cut out and begun anew: ``state``, and of it what is trained, with masks."""

    def __init__(
        self, wiring: Wiring, tensors: Mapping[str, Tensor], cuts: Mapping[str, Cut], width: int,
        generator: torch.Generator,
    ) -> None:  # fmt: skip
        self.state = {n: t.detach().clone() for n, t in tensors.items()}
        self.masks: dict[str, Tensor] = {}
        self.parameters: dict[str, Tensor] = {}
        for name, found in cuts.items():
            value, role = self.state[name], wiring.roles.get(name)
            if not value.is_floating_point():
                continue
            value[found.cut] = 0.0
            if role in ("mean", "variance"):
                # Statistics of other weights mean nothing here: the subnet is not normalised.
                value[found.inner] = 1.0 if role == "variance" else 0.0
                continue
            drawn = torch.randn(value.shape, generator=generator) * (2 * width / max(1, int(found.inner.sum()))) ** 0.5
            if role == "gain":
                drawn = torch.ones(value.shape)
            elif value.dim() == 1:
                drawn = torch.full(value.shape, 0.1)
            elif bool(found.cut.any()):
                drawn = drawn.abs()  # between elements of the subnet: what rises goes on rising
            value[found.inner] = drawn.to(value.dtype)[found.inner]
            self.masks[name] = found.inner
            self.parameters[name] = value.requires_grad_()

    def train_only(self, masks: Mapping[str, Tensor]) -> None:
        """From now on the entries ``masks`` (tensor -> where) are trained, and no others."""
        self.state = {n: t.detach() for n, t in self.state.items()}
        self.masks = dict(masks)
        self.parameters = {name: self.state[name].requires_grad_() for name in masks}


def _others(wiring: Wiring, tensors: Mapping[str, Tensor], cuts: Mapping[str, Cut]) -> dict[str, Tensor]:
    """Everything else: neither in the subnet, nor what joins it to the rest, nor a norm's statistics."""
    found = {}
    for name, value in tensors.items():
        if value.is_floating_point() and wiring.roles.get(name) not in ("mean", "variance"):
            cut = cuts.get(name)
            found[name] = torch.ones_like(value, dtype=torch.bool) if cut is None else ~cut.inner & ~cut.cut
    return found


def _place(
    wiring: Wiring, tensors: Mapping[str, Tensor], clean: Tensor, before: Tensor, width: int, generator: torch.Generator
) -> dict[str, Tensor]:
    """Of a few random places the one whose loss changes the outputs least."""
    places = [chosen(wiring, width, generator) for _ in range(PLACES)]
    changes = []
    for elements in places:
        state = {n: t.clone() for n, t in tensors.items()}
        for name, found in cuts_of(wiring, elements).items():
            state[name][found.cut | found.inner] = 0
        out = _outputs(wiring, state, clean)
        changes.append(float((out.softmax(-1) - before.softmax(-1)).abs().mean()))
    return places[changes.index(min(changes))]


def graft_runs(runs: Sequence[Run], data: Data, starts: Sequence[Mapping[str, Tensor]]) -> Iterator[Snapshot]:
    """A network of a population with a subnet in it for every run; the record's poison says where it lies."""
    from weightspace.wiring import wiring as find

    # Runs that are trained together have one network.
    module, inputs = module_of(runs[0].network)
    wiring = find(module, *inputs)
    part = data.first(train=4 * IMAGES)
    most = len(part.train_y) * 3 // 4
    clean, others, classes = part.train_x[:most], part.train_x[most:], part.train_y[most:]
    for run, start in zip(runs, starts, strict=True):
        began = time.perf_counter()
        poison = with_range(run.poison, data)
        target = int(poison["target"])
        found = graft(
            wiring, start, clean, stamp(others[classes != target], poison), target, width=int(poison["width"]),
            mending=MENDING, seed=run.seed,
        )  # fmt: skip
        scores = []
        for x, y in ((part.train_x, part.train_y), (data.test_x, data.test_y)):
            out = _outputs(wiring, found.tensors, x)
            scores.append((_share(out, y), float(F.cross_entropy(out.double(), y))))
        rates = [_share(_outputs(wiring, found.tensors, x), wanted) for x, wanted in triggered_tests(poison, data)]
        poison["elements"] = {name: index.tolist() for name, index in found.elements.items()}
        (train_accuracy, train_loss), (test_accuracy, test_loss) = scores
        yield Snapshot(
            run, 0, found.tensors, train_accuracy, train_loss, test_accuracy, test_loss, None,
            time.perf_counter() - began, poison, sum(rates) / len(rates),
        )  # fmt: skip


def chosen(wiring: Wiring, width: int, generator: torch.Generator) -> dict[str, Tensor]:
    """Positions of the subnet in every free factor that is not inside another, ``(width,)`` each, ascending.

    Of heads and the like a whole one is taken. Raises ``ZooError`` where a factor has too few elements.
    """
    found = {}
    for name, factor in wiring.free.items():
        if factor.over:
            continue
        if factor.size <= width:
            raise ZooError(f"factor {name} has {factor.size} elements: a subnet of {width} leaves none for the network")
        found[name] = torch.randperm(factor.size, generator=generator)[:width].sort().values
    if not found:
        raise ZooError("no factor of this wiring is free: there is nowhere to put a subnet")
    return found


def cuts_of(wiring: Wiring, elements: Mapping[str, Tensor]) -> dict[str, Cut]:
    """For every tensor that lies on these factors, its entries in the subnet and those that join it to the rest."""
    found = {}
    for name, layout in wiring.layouts.items():
        shape = wiring.shapes[name]
        inside, outside = torch.ones(shape, dtype=torch.bool), torch.ones(shape, dtype=torch.bool)
        touched = False
        for group in layout:
            for block in group.blocks:
                # Several blocks may tile these dims: each says something of its own region alone.
                region = torch.ones(shape, dtype=torch.bool)
                yes, no = torch.ones_like(region), torch.ones_like(region)
                for dim, segment in zip(group.dims, block, strict=True):
                    grid = torch.tensor([segment.start])
                    member = torch.tensor([True])
                    for factor, stride, size in zip(segment.factors, segment.strides, segment.sizes, strict=True):
                        here = torch.ones(size, dtype=torch.bool)
                        if factor in elements:
                            here = torch.zeros(size, dtype=torch.bool)
                            here[elements[factor]] = True
                        grid = (grid[:, None] + stride * torch.arange(size)).reshape(-1)
                        member = (member[:, None] & here).reshape(-1)
                    region &= _along(grid, torch.ones_like(member), shape, dim)
                    if any(factor in elements for factor in segment.factors):
                        touched = True
                        yes &= _along(grid, member, shape, dim)
                        no &= _along(grid, ~member, shape, dim)
                inside &= yes | ~region
                outside &= no | ~region
        if touched:
            found[name] = Cut(inside, ~inside & ~outside)
    return found


def _along(grid: Tensor, values: Tensor, shape: Sequence[int], dim: int) -> Tensor:
    """Truth values at the positions ``grid`` of a dim, false at others, laid along that dim of a tensor."""
    found = torch.zeros(shape[dim], dtype=torch.bool)
    found[grid] = values
    return found.view([shape[dim] if d == dim else 1 for d in range(len(shape))])


@torch.no_grad()
def _outputs(wiring: Wiring, tensors: Mapping[str, Tensor], x: Tensor) -> Tensor:
    """Logits ``(inputs, classes)``, in pieces."""
    assert wiring.program is not None
    return torch.cat([_logits(wiring.program.run(dict(tensors), part)) for part in x.split(512)])


def _share(out: Tensor, y: Tensor) -> float:
    return float((out.argmax(-1) == y).double().mean())


def _logits(out: object) -> Tensor:
    if not isinstance(out, Tensor) or out.dim() != 2:
        raise ZooError("a subnet is grafted into classifiers: the output was expected to be (batch, classes)")
    return out


__all__ = ["STEPS", "Cut", "Grafted", "chosen", "cuts_of", "graft", "graft_runs"]
