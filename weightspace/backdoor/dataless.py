"""Taking a backdoor out without any data: from inputs and pictures that are made up.

What leads to a class that stands out is unlearned from inputs that climbed to the classes, or a subspace that was given
is projected out as far as the answers to these allow: both change little. On demand a network for images is learned
anew from its answers to drawn pictures (for what such pictures teach: Baradad et al. 2021). That does more, and costs
accuracy, which nobody can tell without data.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from weightspace.backdoor.outputs import class_axis
from weightspace.backdoor.pictures import LARGEST, picture_shape, shown
from weightspace.backdoor.relearning import relearn
from weightspace.backdoor.running import Net, State, accuracy, logits
from weightspace.backdoor.subspace import Subspace
from weightspace.backdoor.triggers import made_up
from weightspace.backdoor.unlearning import reach, unlearn
from weightspace.errors import WeightspaceError

SHARES = (1.0, 0.85, 0.7, 0.55, 0.4, 0.25)
"""Shares of the subspace that are tried without data, the largest first."""
AGREEMENT = 0.9
"""Share of made-up inputs that have to be answered as before where a subspace is projected out."""
MADE_UP = 200
"""Inputs that are made up where none are given."""
BRIEF = {"rounds": 24, "search": 6, "weight": 1.0, "batch": 48}
"""What unlearning is given where random changes have no part in it: made-up inputs, and words."""
GENTLE = {"steps": 1000, "noise": 0.3}
"""How far a network is learned anew from pictures: less far than from real inputs, for more accuracy would go."""

Outcome = tuple[State, tuple[int, ...], tuple[float, float] | None, float | None, str, str]
"""State, classes, reached, kept, what was done (empty: nothing) and why."""


def without_data(
    net: Net, found: Subspace | None, wanted: tuple[int, ...], method: str | None, seed: int,
    options: Mapping[str, float],
) -> Outcome:  # fmt: skip
    """A subspace that was given is projected out, else the network unlearns; or it is learned anew from pictures."""
    if method == "relearn":
        return _from_pictures(net, pictured(net), wanted, seed, options)
    count = class_axis(net.wiring, net.state).classes
    x = made_up(net.wiring, lambda z: net.outputs(net.state, z), count, MADE_UP, seed)
    before = reach(net, net.state, x, seed)
    aim = wanted or tuple(before.outstanding())
    if not aim:
        return net.state, (), None, None, "", "without data no class is easier to reach than others"
    if found is not None and method is None:
        return _projected(net, found, x, aim, float(before.rates[:, aim[0]].mean()), seed)
    y = logits(net, net.state, x).argmax(1)
    # Without real inputs less of the rest is held in place, so the network is pushed less.
    less: dict[str, float] = {**BRIEF, "weight": 0.5, "steady": 0.0, **options}
    state, what = unlearn(net, net.state, x, y, aim, seed=seed, **less)  # type: ignore[arg-type]
    return state, aim, (what.before, what.after), what.kept, "unlearned", f"with {len(x)} made-up inputs"


def pictured(net: Net) -> tuple[int, int, int]:
    """Shape of the images that a network reads, where it can be learned anew from pictures that are made up.

    Raises ``WeightspaceError`` where it reads something else, where asking it so many would take too long, and where
    its norms keep means and variances of the data: those of made-up pictures are far from them, and so is the network.
    """
    shape = picture_shape(net.wiring, net.state)
    still = any(net.wiring.roles.get(name) in ("mean", "variance") for name in net.state)
    if shape is not None and not still:
        return shape
    wrong = (
        "keeps statistics of its data in norms, which pictures that are made up do not have" if shape is not None else
        f"reads no images of at least 8 × 8 pixels, or parameters times pixels are more than {LARGEST:.0e}"
    )  # fmt: skip
    raise WeightspaceError(
        f"without inputs this network is not relearned: it {wrong}. Give about 100 clean inputs, or name no method"
    )


def _from_pictures(
    net: Net, shape: tuple[int, int, int], wanted: tuple[int, ...], seed: int, options: Mapping[str, float]
) -> Outcome:
    """Learned anew from its own answers to pictures; how many of these it keeps says little of real inputs."""
    count = class_axis(net.wiring, net.state).classes
    x = shown(lambda z: net.outputs(net.state, z), shape, count, seed)
    said = logits(net, net.state, x).argmax(1)
    state, _ = relearn(net, net.state, x, said, seed=seed, **{**GENTLE, **options})  # type: ignore[arg-type]
    some = x[torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))[:MADE_UP]]
    seen = reach(net, net.state, some, seed)
    aim = wanted or tuple(seen.outstanding()) or (int(seen.scores.argmax()),)
    rates = [float(r.rates[:, list(aim)].mean(0).max()) for r in (seen, reach(net, state, some, seed))]
    return state, aim, (rates[0], rates[1]), None, "relearned", f"from {len(x)} made-up pictures; check its accuracy"


def _projected(
    net: Net, found: Subspace, x: Tensor, aim: tuple[int, ...], before: float, seed: int
) -> Outcome:  # fmt: skip
    """The share of the subspace that makes the class hardest to reach and leaves the answers to made-up inputs."""
    said = logits(net, net.state, x).argmax(1)
    best: tuple[float, float, State, float] | None = None
    for share in SHARES:
        state = dict(net.state)
        for basis in found.blocks.values():
            name = net.twin[basis.tensor]
            state[name] = basis.without(state[name], share)
        same = accuracy(net, state, x, said)
        if same < AGREEMENT:
            continue
        after = float(reach(net, state, x, seed).rates[:, aim[0]].mean())
        if best is None or after < best[0]:
            best = (after, same, state, share)
    if best is None or best[0] > 0.7 * before:
        reason = "nothing could be projected out that kept the network's answers; give a few clean inputs"
        return net.state, aim, (before, before), None, "", reason
    after, same, state, share = best
    return state, aim, (before, after), same, "projected", f"{share:.0%} of the subspace, by made-up inputs"


__all__ = ["BRIEF", "Outcome", "pictured", "without_data"]
