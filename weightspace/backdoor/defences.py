"""Published ways to take a backdoor out, on any proved wiring: what ``ws.excise`` is measured against.

Each is ``defence(wiring, tensors, inputs, labels, *, seed=0, …) -> tensors``: ``inputs (n, …)`` are a few clean
examples (None for those that need none), ``labels (n,)`` their classes (None: the network's own answers), and the
result has the names, dtypes and order of what was given. ``clp_scores`` and ``anp_scores`` rank elements of factors by
the same reasoning: factor -> (*over, size), higher is more suspicious.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torch.nn import functional as F

from weightspace.backdoor.running import (
    EPSILON,
    Net,
    Site,
    State,
    accuracy,
    fit,
    network,
    own_labels,
    readers,
    scaled,
    shape_of,
    sites,
    without,
)
from weightspace.errors import WeightspaceError
from weightspace.wiring.wiring import Wiring

Tensors = Mapping[str, Tensor]
Scores = dict[str, Tensor]


def fine_tuning(
    wiring: Wiring, tensors: Tensors, inputs: Tensor | None, labels: Tensor | None = None, *, epochs: int = 30,
    rate: float = 1e-3, seed: int = 0,
) -> dict[str, Tensor]:  # fmt: skip
    """Further training on the clean inputs alone, by Adam, with norms' statistics as they are."""
    net = network(wiring, tensors)
    x, y = _examples(net, inputs, labels)
    return net.finish(fit(net, net.state, x, y, epochs=epochs, rate=rate, seed=seed))


def fine_pruning(
    wiring: Wiring, tensors: Tensors, inputs: Tensor | None, labels: Tensor | None = None, *, loss: float = 0.02,
    epochs: int = 30, rate: float = 1e-3, seed: int = 0,
) -> dict[str, Tensor]:  # fmt: skip
    """Elements of the last hidden layer that clean inputs leave quiet are pruned, then fine-tuned (Liu et al. 2018).

    The quietest go first, as long as accuracy on the clean inputs falls by no more than ``loss``. The layer is the last
    one with a nonlinearity on a factor of its own.
    """
    net = network(wiring, tensors)
    x, y = _examples(net, inputs, labels)
    pruned = _pruned_quiet(net, x, y, loss)
    return net.finish(fit(net, pruned, x, y, epochs=epochs, rate=rate, seed=seed))


def clp(
    wiring: Wiring, tensors: Tensors, inputs: Tensor | None = None, labels: Tensor | None = None, *, u: float = 3.0,
    seed: int = 0,
) -> dict[str, Tensor]:  # fmt: skip
    """Channel Lipschitz pruning (Zheng et al. 2022), data-free.

    A channel's bound is the largest singular value of its kernel (inputs, positions), times the gain over the running
    deviation of the norm behind it. Channels above mean + ``u`` deviations of their layer are pruned there.
    """
    del inputs, labels, seed
    net = network(wiring, tensors)
    state = net.state
    for site, bound in zip(sites(wiring), _bounds(net), strict=True):
        keep = (bound <= bound.mean() + u * bound.std(correction=0)).float()
        for place in (site.weight, *site.gains, *site.shifts):
            state = scaled(net, state, place, keep)
    return net.finish(state)


def anp(
    wiring: Wiring, tensors: Tensors, inputs: Tensor | None, labels: Tensor | None = None, *, loss: float = 0.02,
    epsilon: float = 0.4, share: float = 0.2, steps: int = 100, rate: float = 0.2, batch: int = 32, seed: int = 0,
) -> dict[str, Tensor]:  # fmt: skip
    """Adversarial neuron pruning (Wu & Wang 2021): elements whose learned mask is small are pruned.

    As many as the clean inputs allow: the highest threshold at which accuracy on them falls by no more than ``loss``.
    See ``anp_masks`` for the other parameters.
    """
    net = network(wiring, tensors)
    x, y = _examples(net, inputs, labels)
    masks = anp_masks(net, x, y, epsilon=epsilon, share=share, steps=steps, rate=rate, batch=batch, seed=seed)
    least = accuracy(net, net.state, x, y) - loss
    for threshold in torch.arange(0.95, 0.0, -0.05).tolist():
        state = net.state
        for site, mask in masks.items():
            state = _masked(net, state, site, (mask > threshold).float())
        if accuracy(net, state, x, y) >= least - 1e-9:
            return net.finish(state)
    return net.finish(net.state)


DEFENCES: Mapping[str, Callable[..., dict[str, Tensor]]] = {
    "fine-tuning": fine_tuning, "fine-pruning": fine_pruning, "clp": clp, "anp": anp,
}  # fmt: skip
"""Name -> defence."""


def defend(
    wiring: Wiring, tensors: Tensors, inputs: Tensor | None = None, labels: Tensor | None = None,
    method: str = "fine-pruning", **options: float,
) -> dict[str, Tensor]:  # fmt: skip
    """A model after one of ``DEFENCES``.

    Raises ``WeightspaceError`` for an unknown one and for one that needs inputs and got none.
    """
    if method not in DEFENCES:
        raise WeightspaceError(f"there is no defence {method!r}; there are {', '.join(DEFENCES)}")
    return DEFENCES[method](wiring, tensors, inputs, labels, **options)


# ------------------------------------------------------------------------------------ rankings


def clp_scores(wiring: Wiring, tensors: Tensors) -> Scores:
    """By how many deviations the Lipschitz bound of each element lies above its layer's mean: factor -> (*over, size).

    Of a factor that several layers write, the largest counts. Weights alone; see ``clp``.
    """
    net = network(wiring, tensors)
    found: Scores = {}
    for site, bound in zip(sites(wiring), _bounds(net), strict=True):
        z = (bound - bound.mean()) / bound.std(correction=0).clamp(min=1e-12)
        found[site.factor] = torch.maximum(found[site.factor], z) if site.factor in found else z
    return found


def anp_scores(
    wiring: Wiring, tensors: Tensors, inputs: Tensor, labels: Tensor | None = None, *, seed: int = 0, **options: float
) -> Scores:
    """1 − mask of each element: factor -> (*over, size); of a factor that several layers write the largest counts."""
    net = network(wiring, tensors)
    x, y = _examples(net, inputs, labels)
    found: Scores = {}
    for site, mask in anp_masks(net, x, y, seed=seed, **options).items():  # type: ignore[arg-type]
        score = 1 - mask
        found[site.factor] = torch.maximum(found[site.factor], score) if site.factor in found else score
    return found


def anp_masks(
    net: Net, x: Tensor, y: Tensor, *, epsilon: float = 0.4, share: float = 0.2, steps: int = 100, rate: float = 0.2,
    batch: int = 32, seed: int = 0,
) -> dict[Site, Tensor]:  # fmt: skip
    """A mask in [0, 1] per element of every layer's output, learned as Wu & Wang (2021) do.

    Minimises ``share`` · L(m ∘ w, b) + (1 − share) · max L((m + δ) ∘ w, (1 + ξ) ∘ b) over m, with |δ|, |ξ| ≤
    ``epsilon`` found by one signed step from a random start. m scales the gains of a norm with running statistics where
    there is one behind the layer, else the layer's weights; b are its shifts. ``steps`` of plain descent with ``rate``.
    """
    generator = torch.Generator().manual_seed(seed)
    layers = sites(net.wiring)
    masks = [torch.ones(shape_of(net.wiring, s.factor)) for s in layers]

    def noisy(m: list[Tensor], delta: list[Tensor], xi: list[Tensor]) -> State:
        state = dict(net.state)
        for site, mask, d, e in zip(layers, m, delta, xi, strict=True):
            state = _masked(net, state, site, mask + d)
            for place in site.shifts:
                state = scaled(net, state, place, 1 + e)
        return state

    zero = [torch.zeros_like(m) for m in masks]
    for _ in range(steps):
        index = torch.randperm(len(x), generator=generator)[:batch]
        part, wanted = x[index], y[index]
        drawn = [(torch.rand(m.shape, generator=generator) * 2 - 1) * epsilon for m in (*masks, *masks)]
        noise = [d.requires_grad_(True) for d in drawn]
        with torch.enable_grad():
            hurt = F.cross_entropy(net.outputs(noisy(masks, noise[: len(layers)], noise[len(layers) :]), part), wanted)
        grads = torch.autograd.grad(hurt, noise, allow_unused=True)
        found = [
            (d.detach() if g is None else epsilon * g.sign()) for d, g in zip(noise, grads, strict=True)
        ]  # fmt: skip
        leaves = [m.requires_grad_(True) for m in masks]
        with torch.enable_grad():
            bad = F.cross_entropy(net.outputs(noisy(leaves, found[: len(layers)], found[len(layers) :]), part), wanted)
            good = F.cross_entropy(net.outputs(noisy(leaves, zero, zero), part), wanted)
            total = share * good + (1 - share) * bad
        grads = torch.autograd.grad(total, leaves, allow_unused=True)
        masks = [
            m.detach() if g is None else (m.detach() - rate * g).clamp(0, 1)
            for m, g in zip(leaves, grads, strict=True)
        ]  # fmt: skip
    return dict(zip(layers, masks, strict=True))


# ------------------------------------------------------------------------------------ parts


def _examples(net: Net, inputs: Tensor | None, labels: Tensor | None) -> tuple[Tensor, Tensor]:
    if inputs is None or len(inputs) == 0:
        raise WeightspaceError("this defence needs clean inputs (n, …) and got none; clp works without")
    x = inputs.to(torch.float32) if inputs.is_floating_point() else inputs
    return x, own_labels(net, x, labels)


def _masked(net: Net, state: Mapping[str, Tensor], site: Site, mask: Tensor) -> State:
    """The layer's output scaled before its shifts: gains of the norm behind it, else its weights."""
    out = dict(state)
    for place in site.gains or (site.weight,):
        out = scaled(net, out, place, mask)
    return out


def _bounds(net: Net) -> list[Tensor]:
    """Per layer, a bound on how much each of its outputs can change with its inputs: (*over, size)."""
    found = []
    for site in sites(net.wiring):
        place, tensor = site.weight, net.state[net.twin[site.name]]
        if tensor.dim() > 2 and len(place.dims) == 1 and len(place.front) == 1:
            # One matrix (inputs, positions) per channel.
            moved = tensor.movedim(place.dims[0], 0)
            dim = net.wiring.reads.get(site.name, 1)
            dim = dim + 1 if dim < place.dims[0] else dim
            bound = torch.linalg.matrix_norm(moved.movedim(dim, 1).flatten(2), ord=2)
            if place.positions[0] is not None:
                bound = bound[place.positions[0]]
        else:
            bound = place.view(tensor).norm(dim=-1)
        if site.variance is not None:
            deviation = (site.variance.view(net.state[net.twin[site.variance.tensor]]).mean(-1) + EPSILON).sqrt()
            for gain in site.gains:
                bound = bound * gain.view(net.state[net.twin[gain.tensor]]).mean(-1).abs()
            bound = bound / deviation
        found.append(bound)
    return found


def _pruned_quiet(net: Net, x: Tensor, y: Tensor, loss: float) -> State:
    from weightspace.wiring.recording import select, values

    layers = [s.factor for s in sites(net.wiring) if readers(net.wiring, s.factor)]
    found = values(net.wiring, net.state, x, only=list(dict.fromkeys(layers))) if layers else {}
    last = next((f for f in reversed(layers) if any(v.stage == "post" for v in found.get(f, ()))), None)
    if last is None:
        return net.state
    activity = torch.stack([v.samples.abs().mean(0) for v in select(found[last], "post")]).mean(0)
    order = activity.flatten().argsort()
    least = accuracy(net, net.state, x, y) - loss
    best = net.state
    for count in range(1, len(order)):
        gone = torch.zeros(activity.numel(), dtype=torch.bool)
        gone[order[:count]] = True
        state = without(net, net.state, {last: gone.view(activity.shape)})
        if accuracy(net, state, x, y) < least - 1e-9:
            break
        best = state
    return best


__all__ = [
    "DEFENCES", "anp", "anp_masks", "anp_scores", "clp", "clp_scores", "defend", "fine_pruning", "fine_tuning",
]  # fmt: skip
