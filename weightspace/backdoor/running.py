"""A network as a function of tensors that are being changed: what removal methods share.

``Net`` runs a proved wiring's program on float32 copies of a model's tensors, knows which of them learn (parameters,
not running statistics), and gives results back in the file's dtypes with everything else as it was. ``Site`` is a
layer's output side: one weight, the factor that it writes, and the norm and biases that follow it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional as F

from weightspace.backdoor.outputs import class_axis
from weightspace.errors import UnprovedWiringError, WeightspaceError
from weightspace.wiring.places import Place, places
from weightspace.wiring.replay import prepared
from weightspace.wiring.wiring import Wiring

State = dict[str, Tensor]
EPSILON = 1e-5
"""Added to running variances; norms of other programs differ little from it."""


@dataclass(frozen=True, eq=False)
class Net:
    """A network that can be run and changed: ``state`` is float32, tied tensors under one name.

    ``learned`` names what has a gradient: floating-point tensors that the network runs on, without running statistics.
    """

    wiring: Wiring
    given: Mapping[str, Tensor] = field(repr=False)
    state: State = field(repr=False)
    twin: Mapping[str, str] = field(repr=False)
    learned: tuple[str, ...] = field(repr=False)

    def outputs(self, state: Mapping[str, Tensor], x: Tensor) -> Tensor:
        """Logits (n, classes) of inputs (n, …), also where the network ends in a softmax.

        Raises ``NoClassesError`` where its outputs share no class axis.
        """
        program = self.wiring.program
        assert program is not None
        full = {name: state[twin] for name, twin in self.twin.items()}
        axis = class_axis(self.wiring, full)
        return axis.logits(program.run(full, x, *program.args[1:], **dict(program.kwargs)))

    def finish(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """All tensors that were given, in their dtype and order; those that did not change are the very same."""
        out = {}
        for name in self.given:
            twin, tensor = self.twin.get(name), self.given[name]
            changed = twin is not None and not torch.equal(state[twin], self.state[twin])
            out[name] = state[twin].detach().to(tensor.dtype).contiguous() if changed and twin else tensor
        return out


def network(wiring: Wiring, tensors: Mapping[str, Tensor]) -> Net:
    """A model ready to be run and changed.

    Raises ``UnprovedWiringError`` for a wiring that was not proved, ``WiringError`` where there is no program or a
    tensor is missing or of another shape.
    """
    if not wiring.proved:
        raise UnprovedWiringError(
            f"the wiring ({wiring.origin}) is {wiring.status}, not proved; give the module that the model belongs to, "
            "ws.wiring(module, inputs)"
        )
    full = prepared(wiring, tensors)
    first: dict[int, str] = {}
    twin = {name: first.setdefault(id(tensor), name) for name, tensor in full.items()}
    state = {name: full[name] for name, of in twin.items() if of == name}
    still = ("mean", "variance")
    learned = tuple(n for n, t in state.items() if t.is_floating_point() and wiring.roles.get(n) not in still)
    return Net(wiring, tensors, state, twin, learned)


def accuracy(net: Net, state: Mapping[str, Tensor], x: Tensor, y: Tensor) -> float:
    """Share of inputs whose largest output is the label."""
    with torch.no_grad():
        return float((logits(net, state, x).argmax(1) == y).float().mean())


def logits(net: Net, state: Mapping[str, Tensor], x: Tensor, batch: int = 512) -> Tensor:
    """Outputs without gradients, (n, classes), ``batch`` inputs at a time."""
    with torch.no_grad():
        return torch.cat([net.outputs(state, part) for part in x.split(batch)])


def own_labels(net: Net, x: Tensor, labels: Tensor | None) -> Tensor:
    """The labels, or what the network itself says where there are none (n,)."""
    if labels is not None:
        if labels.shape != (len(x),):
            raise WeightspaceError(f"{len(x)} inputs and labels of shape {tuple(labels.shape)}; one label per input")
        return labels.to(torch.int64)
    return logits(net, net.state, x).argmax(1)


Loss = Callable[[Mapping[str, Tensor], Tensor, Tensor], Tensor]


def fit(
    net: Net, state: Mapping[str, Tensor], x: Tensor, y: Tensor, *, epochs: int, rate: float, batch: int = 32,
    decay: float = 0.0, seed: int = 0, loss: Loss | None = None, epoch: Callable[[int, State], bool] | None = None,
) -> State:  # fmt: skip
    """Descend by Adam on what is learned, from ``state``; returns a new state.

    ``loss(state, x, y)``: cross-entropy where not given. ``epoch(number, state)`` is asked after each epoch and may
    stop.
    """
    generator = torch.Generator().manual_seed(seed)
    leaves = {n: state[n].detach().clone().requires_grad_(True) for n in net.learned}
    now: State = {**state, **leaves}
    optimiser = torch.optim.Adam(list(leaves.values()), lr=rate, weight_decay=decay)
    for number in range(epochs):
        for index in torch.randperm(len(x), generator=generator).split(batch):
            with torch.enable_grad():
                value = F.cross_entropy(net.outputs(now, x[index]), y[index]) if loss is None else loss(
                    now, x[index], y[index]
                )  # fmt: skip
                optimiser.zero_grad()
                value.backward()
            optimiser.step()
        if epoch is not None and epoch(number, now):
            break
    return {n: t.detach() for n, t in now.items()}


# ------------------------------------------------------------------------------------ layers


@dataclass(frozen=True, eq=False)
class Site:
    """Where a layer writes a factor: ``weight``, and of what follows it on this factor gains, shifts and statistics.

    ``mean`` and ``variance`` are there for a norm with running statistics only; ``gains`` then are that norm's.
    """

    factor: str
    weight: Place
    gains: tuple[Place, ...]
    shifts: tuple[Place, ...]
    mean: Place | None = None
    variance: Place | None = None

    @property
    def name(self) -> str:
        return self.weight.tensor


def sites(wiring: Wiring) -> tuple[Site, ...]:
    """Every layer's output side, in order of use; layers that write what is pinned (the outputs) have none."""
    known = wiring.kept.get("sites")
    if isinstance(known, tuple):
        return known
    order = list(wiring.roles)
    found: list[tuple[int, Site]] = []
    for factor, spots in places(wiring).items():
        by_tensor = {p.tensor: p for p in spots if not _reads(wiring, p)}
        for name, place in by_tensor.items():
            if wiring.roles.get(name) != "weight":
                continue
            rest = order[order.index(name) + 1 :]
            stop = next((i for i, n in enumerate(rest) if wiring.roles[n] == "weight"), len(rest))
            # A shift or norm on this factor before the next layer; a norm without statistics belongs to its readers.
            after = [n for n in rest[:stop] if n in by_tensor]
            of = {r: tuple(by_tensor[n] for n in after if wiring.roles[n] == r)
                  for r in ("gain", "shift", "mean", "variance")}  # fmt: skip
            normed = bool(of["variance"])
            site = Site(
                factor, place, of["gain"] if normed else (), of["shift"], of["mean"][0] if of["mean"] else None,
                of["variance"][0] if normed else None,
            )  # fmt: skip
            found.append((order.index(name), site))
    result = tuple(s for _, s in sorted(found, key=lambda item: item[0]))
    wiring.kept["sites"] = result
    return result


def readers(wiring: Wiring, factor: str) -> tuple[Place, ...]:
    """The weights that are summed over a factor."""
    return tuple(
        p for p in places(wiring).get(factor, ()) if wiring.roles.get(p.tensor) == "weight" and _reads(wiring, p)
    )


def _reads(wiring: Wiring, place: Place) -> bool:
    return wiring.roles.get(place.tensor) == "weight" and wiring.reads.get(place.tensor) in place.dims


def scaled(net: Net, state: Mapping[str, Tensor], place: Place, factor: Tensor) -> State:
    """The state with one tensor multiplied along a factor: ``factor`` is (*over, size)."""
    name = net.twin[place.tensor]
    tensor = state[name]
    return {**state, name: place.put(tensor, place.view(tensor) * factor.unsqueeze(-1).to(tensor))}


def without(net: Net, state: Mapping[str, Tensor], dead: Mapping[str, Tensor]) -> State:
    """The state with elements of factors taken out: ``dead`` is factor -> bool (*over, size).

    Their weights, gains and shifts on both sides become zero, so that nothing comes from them and nothing reaches them.
    """
    out: State = dict(state)
    for factor, gone in dead.items():
        if not bool(gone.any()):
            continue
        for place in places(net.wiring)[factor]:
            if net.wiring.roles.get(place.tensor) not in ("mean", "variance") and place.tensor in net.twin:
                out = scaled(net, out, place, (~gone).float())
    return out


def shape_of(wiring: Wiring, factor: str) -> tuple[int, ...]:
    """(*over, size) of a factor."""
    f = wiring.factors[factor]
    return (*(wiring.factors[o].size for o in f.over), f.size)


__all__ = [
    "Net", "Site", "State", "accuracy", "fit", "logits", "network", "own_labels", "readers", "scaled", "shape_of",
    "sites", "without",
]  # fmt: skip
