"""``assert_equivariant``: one line that says whether a metanet keeps the symmetries of what it reads."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

import torch

from weightspace.errors import MetanetError
from weightspace.graph.build import of_tensors
from weightspace.metanets.base import Metanet

if TYPE_CHECKING:
    from weightspace.graph import ParameterGraph


def assert_equivariant(
    metanet: Metanet,
    graph: ParameterGraph,
    *,
    scale: bool | None = None,
    draws: int = 3,
    tolerance: float = 1e-6,
    seed: int = 0,
) -> float:
    """Check a metanet on one network under random elements of its symmetry group, in float64.

    The outputs must not change, and the states of axis elements (of metanets that have ``states``) must move
    with their neurons. Permutations are always drawn; ``scale=True`` adds positive rescalings and sign flips,
    which is the default for a metanet whose ``scale`` is true. Errors are relative to the largest output.

    Returns the largest error. Raises ``AssertionError`` with it above ``tolerance``, and ``MetanetError`` for a
    graph without a wiring, one whose group is trivial, or a metanet whose outputs do not depend on the weights
    (which would pass every test).
    """
    wiring = graph.wiring
    if wiring is None or graph.tensors is None:
        raise MetanetError("this graph has no wiring or no weights; make it with ws.graph(checkpoint)")
    if not wiring.free:
        raise MetanetError(f"nothing may be permuted in this network ({wiring.origin}); there is nothing to check")
    exact = copy.deepcopy(metanet).to("cpu", torch.float64).eval()
    tensors = {n: _double(graph.tensor(n)) for n in graph.shapes}
    generator = torch.Generator().manual_seed(seed)
    base = of_tensors(tensors, wiring)
    outputs, states = _read(exact, base)
    other = {
        n: torch.randn(t.shape, generator=generator, dtype=t.dtype) * t.std(correction=0) + t
        for n, t in tensors.items() if t.is_floating_point()
    }  # fmt: skip
    drawn, _ = _read(exact, of_tensors({**tensors, **other}, wiring))
    size = float(outputs.abs().max())
    if float((drawn - outputs).abs().max()) <= 10 * tolerance * max(size, 1e-30):
        raise MetanetError("the outputs do not depend on the weights of this network; equivariance says nothing")
    with_scale = bool(getattr(metanet, "scale", False)) if scale is None else scale
    worst = 0.0
    for k in range(draws):
        permutation = wiring.random(generator)
        moved = wiring.apply(permutation, tensors)
        what = "permutation"
        if with_scale:
            from weightspace.wiring.scaling import scaling

            group = scaling(wiring)
            moved = dict(group.apply(group.random(seed + k), moved))
            what = "permutation and rescaling"
        found, found_states = _read(exact, of_tensors(moved, wiring))
        error = float((found - outputs).abs().max()) / max(size, 1e-30)
        if states is not None and found_states is not None:
            order = base.node_permutation(permutation)
            off = float((found_states - states[order]).abs().max()) / max(float(states.abs().max()), 1e-30)
            error = max(error, off)
        worst = max(worst, error)
        if error > tolerance:
            raise AssertionError(
                f"{type(metanet).__name__} changes by {error:.1e} (relative) under a random {what} of {graph.origin}, "
                f"allowed is {tolerance:.0e}"
            )
    return worst


def _read(metanet: Metanet, graph: ParameterGraph) -> tuple[torch.Tensor, torch.Tensor | None]:
    with torch.no_grad():
        batch = metanet.collate([metanet.prepare(graph)])
        of_nodes = getattr(metanet, "states", None)
        return metanet(batch), None if of_nodes is None else of_nodes(batch)


def _double(x: torch.Tensor) -> torch.Tensor:
    return x.to(torch.float64) if x.is_floating_point() else x
