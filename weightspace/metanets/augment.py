"""Weight-space augmentation: other weights of the same function, or of nearly the same one.

After Shamsian et al. 2024 ("Improved generalization of weight space networks via augmentations"): symmetries
(permutation, rescaling), noise, masks, and mixup after alignment. Each function takes a parameter graph and a
generator and gives a graph of the same structure with other weights; the graph it is given stays as it was.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import TYPE_CHECKING, Any

import torch

from weightspace.errors import MetanetError
from weightspace.graph import ParameterGraph

if TYPE_CHECKING:
    from weightspace.wiring.matching import Matcher
    from weightspace.wiring.wiring import Wiring

Tensors = dict[str, torch.Tensor]


def permute(graph: ParameterGraph, generator: torch.Generator) -> ParameterGraph:
    """A uniformly random permutation of the wiring's symmetry group: the same function, exactly."""
    wiring = _wiring(graph)
    return replace(graph, tensors=wiring.apply(wiring.random(generator), _tensors(graph)))


def rescale(graph: ParameterGraph, generator: torch.Generator) -> ParameterGraph:
    """Random positive rescalings and sign flips where the activations allow them: the same function.

    Raises ``UnprovedWiringError`` where the wiring is not proved.
    """
    from weightspace.wiring.scaling import scaling as find

    scaling = find(_wiring(graph))
    return replace(graph, tensors=scaling.apply(scaling.random(_number(generator)), _tensors(graph)))


def noise(graph: ParameterGraph, generator: torch.Generator, level: float = 0.1) -> ParameterGraph:
    """Gaussian noise with ``level`` times the standard deviation of each tensor.

    Variances of batch norms are multiplied by the exponential of the noise instead: they stay positive.
    """
    positive = _variances(graph)
    out: Tensors = {}
    for name, w in _tensors(graph).items():
        drawn = torch.randn(w.shape, generator=generator, dtype=torch.float32).to(w)
        if name in positive:
            out[name] = w * torch.exp(level * drawn)
        else:
            spread = w.std(correction=0) if w.numel() > 1 else torch.zeros((), dtype=w.dtype, device=w.device)
            out[name] = w + level * spread * drawn
    return replace(graph, tensors=out)


def mask(graph: ParameterGraph, generator: torch.Generator, share: float = 0.1) -> ParameterGraph:
    """A random ``share`` of the weights between neurons set to zero; biases and norms stay."""
    blocks = {block.tensor for block in graph.blocks}
    out = _tensors(graph)
    for name in blocks:
        kept = torch.rand(out[name].shape, generator=generator) >= share
        out[name] = out[name] * kept.to(out[name])
    return replace(graph, tensors=out)


def prune(graph: ParameterGraph, generator: torch.Generator, share: float = 0.1) -> ParameterGraph:
    """The ``share`` of smallest magnitude of every weight between neurons set to zero; nothing is random."""
    blocks = {block.tensor for block in graph.blocks}
    out = _tensors(graph)
    for name in blocks:
        w = out[name]
        count = int(share * w.numel())
        if count:
            border = w.abs().flatten().kthvalue(count).values
            out[name] = w * (w.abs() > border)
    return replace(graph, tensors=out)


def mix(first: ParameterGraph, second: ParameterGraph, share: float, matcher: Matcher | None = None) -> ParameterGraph:
    """``share * first + (1 - share) * second``, after ``second`` was aligned to ``first`` where a matcher is given.

    Both must have one wiring. ``share`` 1 gives the function of ``first``, 0 that of ``second``.
    """
    if first.wiring is None or first.wiring is not second.wiring:
        raise MetanetError("only networks that share one wiring can be mixed; load them with load_samples")
    a, b = _tensors(first), _tensors(second)
    if matcher is not None:
        _, b = matcher.match(a, b)
    return replace(first, tensors={name: torch.lerp(b[name], a[name], share) for name in a})


@dataclass(frozen=True)
class Augmentation:
    """Which of the augmentations are applied, how often and how strongly; 0 leaves one out.

    - ``permute``, ``rescale``: probability of a random symmetry.
    - ``noise``: greatest level (relative to each tensor's standard deviation); ``mask``, ``prune``: greatest
      share of weights. The level is drawn uniformly below it, and each is applied with ``probability``.
    - ``mixup``: parameter of the symmetric Beta distribution that shares are drawn from; only ``mixed`` does it,
      with networks ``aligned`` to each other first.
    """

    permute: float = 0.0
    rescale: float = 0.0
    noise: float = 0.0
    mask: float = 0.0
    prune: float = 0.0
    probability: float = 1.0
    mixup: float = 0.0
    aligned: bool = True

    def __post_init__(self) -> None:
        for name in ("permute", "rescale", "mask", "prune", "probability"):
            if not 0 <= getattr(self, name) <= 1:
                raise MetanetError(f"augmentation: {name} is {getattr(self, name)}, expected between 0 and 1")
        for name in ("noise", "mixup"):
            if getattr(self, name) < 0:
                raise MetanetError(f"augmentation: {name} is {getattr(self, name)}, expected 0 or more")

    @property
    def changes(self) -> bool:
        """Whether it does anything to a network on its own."""
        return any((self.permute, self.rescale, (self.noise or self.mask or self.prune) and self.probability))

    def __call__(self, graph: ParameterGraph, generator: torch.Generator) -> ParameterGraph:
        """One random view of a network."""
        # As many draws whatever happens, so that one option does not change what another one does.
        chances = torch.rand(8, generator=generator).tolist()
        if chances[0] < self.probability and self.prune:
            graph = prune(graph, generator, chances[1] * self.prune)
        if chances[2] < self.probability and self.mask:
            graph = mask(graph, generator, chances[3] * self.mask)
        if chances[4] < self.probability and self.noise:
            graph = noise(graph, generator, chances[5] * self.noise)
        if chances[6] < self.rescale:
            graph = rescale(graph, generator)
        if chances[7] < self.permute:
            graph = permute(graph, generator)
        return graph

    def mixed(
        self, graphs: Sequence[ParameterGraph], generator: torch.Generator
    ) -> tuple[list[ParameterGraph], list[int], list[float]]:
        """Every network mixed with a random one of the same wiring among them.

        Gives the mixed networks, the number of each one's partner, and the share of the network itself
        (at least a half); a network that is alone on its wiring stays as it is.
        """
        from weightspace.wiring.matching import matcher_of

        kinds: dict[int, list[int]] = {}
        for number, graph in enumerate(graphs):
            kinds.setdefault(id(graph.wiring), []).append(number)
        draw = random.Random(_number(generator))
        out, partners, shares = [], [], []
        for number, graph in enumerate(graphs):
            kind = kinds[id(graph.wiring)]
            partner = draw.choice(kind)
            share = draw.betavariate(self.mixup, self.mixup)
            share = max(share, 1 - share)
            if partner == number:
                out.append(graph)
            else:
                out.append(mix(graph, graphs[partner], share, matcher_of(_wiring(graph)) if self.aligned else None))
            partners.append(partner)
            shares.append(share)
        return out, partners, shares

    def to_dict(self) -> dict[str, Any]:
        """The options as JSON can hold them."""
        return asdict(self)

    @classmethod
    def from_dict(cls, options: Mapping[str, Any]) -> Augmentation:
        """What ``to_dict`` gave. Raises ``MetanetError`` for an option that does not exist or is of another type."""
        return cls(**checked(cls, options, "augmentation"))


def checked(cls: type[Any], options: Mapping[str, Any], what: str) -> dict[str, Any]:
    """Options for a dataclass whose fields have defaults; whole numbers will do where others are expected.

    Raises ``MetanetError`` for an option that the class has not, or of another type than its default.
    """
    known = {f.name: f.default for f in fields(cls)}
    out = dict(options)
    for name, value in options.items():
        if name not in known:
            raise MetanetError(f"{what}: no option {name!r}; known: {', '.join(sorted(known))}")
        expected = type(known[name])
        if expected is float and type(value) is int:
            out[name] = float(value)
        elif expected in (int, float, str, bool) and type(value) is not expected:
            raise MetanetError(f"{what}: {name} is {value!r}, expected {_NAMES[expected]}")
    return out


_NAMES = {int: "a whole number", float: "a number", str: "a text", bool: "true or false"}


def _wiring(graph: ParameterGraph) -> Wiring:
    if graph.wiring is None:
        raise MetanetError("this graph has no wiring, so its symmetries are not known; make it with ws.graph")
    return graph.wiring


def _tensors(graph: ParameterGraph) -> Tensors:
    return {name: graph.tensor(name) for name in graph.shapes}


def _number(generator: torch.Generator) -> int:
    return int(torch.randint(2**62, (), generator=generator))


def _variances(graph: ParameterGraph) -> frozenset[str]:
    roles = graph.wiring.roles if graph.wiring is not None else {}
    return frozenset(name for name, role in roles.items() if role == "variance")

