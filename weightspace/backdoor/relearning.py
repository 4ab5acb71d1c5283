"""Learn the network anew from its own answers: what clean inputs never show is not taken over.

Distillation into a network that was not poisoned leaves a backdoor behind (Yoshida & Fujino 2020), and takes few
examples where the teacher is asked about many mixtures of them (Beyer et al. 2022, "function matching"). The student
here begins at the network's own weights with a share of noise (shrink and perturb, Ash & Adams 2020), which a hundred
inputs then suffice to mend; weights decay, so that what no input needs is forgotten. The teacher is believed only
where its answer is one of the labels that went into the mixture, or its answer to one of the inputs as they are. The
student besides answers randomly changed inputs (``weightspace.backdoor.corruptions``) as those that they were made of.
No class, trigger or place has to be known.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from weightspace.align.repair import reset_statistics
from weightspace.backdoor.corruptions import corrupted
from weightspace.backdoor.running import Net, State, logits

ENTRIES = 2**26
"""Numbers that a pool of views may hold, 256 MiB."""
LEAST = 512
"""Views in a pool, however large each is."""


def relearn(
    net: Net, state: State, x: Tensor, y: Tensor, *, steps: int = 2000, batch: int = 64, rate: float = 5e-3,
    noise: float = 0.5, decay: float = 0.3, steady: float = 0.35, pool: int = 12000, seed: int = 0,
) -> tuple[State, float]:  # fmt: skip
    """The network of ``state`` learned anew from its answers to views of inputs ``x (n, …)`` with labels ``y (n,)``.

    And the share of views on which it was believed.

    Weights begin as sqrt(1 − ``noise``²) of what they were plus ``noise`` times their own deviation at random, and
    running statistics of norms are measured there. ``steps`` of AdamW (``rate`` falls along a cosine, ``decay`` of
    weights alone) take the divergence from the answers to ``batch`` of ``pool`` views, plus ``steady`` times the
    cross-entropy of as many randomly changed ones with the answers before the change. Inputs are numbers, not words.
    Nothing is held out: a tenth of a hundred inputs tells little, and its lack costs accuracy.
    """
    generator = torch.Generator().manual_seed(seed)
    teacher = {n: t.detach() for n, t in state.items()}
    size = min(pool, max(LEAST, ENTRIES // x[0].numel()))
    z, soft, believed = _views(net, teacher, x, y, size, generator)
    odd, right = _changed(net, teacher, x, y, size if steady else 0, generator)
    begun = _begun(net, teacher, z, noise, generator)
    leaves = {n: begun[n].clone().requires_grad_(True) for n in net.learned}
    now: State = {**begun, **leaves}
    roles = net.wiring.roles
    optimiser = torch.optim.AdamW(
        [
            {"params": [t for n, t in leaves.items() if roles.get(n) == "weight"], "weight_decay": decay},
            {"params": [t for n, t in leaves.items() if roles.get(n) != "weight"], "weight_decay": 0.0},
        ],
        lr=rate,
    )
    for step in range(steps):
        for group in optimiser.param_groups:
            group["lr"] = rate * max(0.02, 0.5 * (1 + math.cos(math.pi * step / steps)))
        index = torch.randint(len(z), (min(batch, len(z)),), generator=generator)
        other = torch.randint(len(odd), (len(index),), generator=generator) if len(odd) else torch.empty(0).long()
        with torch.enable_grad():
            out = net.outputs(now, torch.cat([z[index], odd[other]]) if len(other) else z[index])
            loss = F.kl_div(out[: len(index)].log_softmax(1), soft[index], reduction="batchmean")
            if len(other):
                loss = loss + steady * F.cross_entropy(out[len(index) :], right[other])
            optimiser.zero_grad()
            loss.backward()
        optimiser.step()
    final = {n: t.detach() for n, t in now.items()}
    return final, believed


def _begun(net: Net, state: State, z: Tensor, noise: float, generator: torch.Generator) -> State:
    """Where the student begins: shrunk weights with noise, running statistics measured on views."""
    begun: State = dict(state)
    for name in net.learned:
        t = state[name]
        if net.wiring.roles.get(name) == "weight" and t.numel() > 1:
            drawn = torch.randn(t.shape, generator=generator) * t.std()
            begun[name] = (1 - noise**2) ** 0.5 * t + noise * drawn
    if not noise:
        return begun
    # Under the names of the file, which the norms' statistics are looked up by.
    full = {name: begun[twin] for name, twin in net.twin.items()}
    measured = reset_statistics(net.wiring, full, z[:LEAST])
    return {name: measured[name] for name in begun}


def _views(
    net: Net, state: State, x: Tensor, y: Tensor, count: int, generator: torch.Generator
) -> tuple[Tensor, Tensor, float]:  # fmt: skip
    """Views of the inputs on which the network is believed, what it says of them (views, classes), and their share."""
    first = torch.randint(len(x), (count,), generator=generator)
    second = torch.randperm(count, generator=generator)
    share = torch.rand(count, generator=generator)
    v = moved(x[first], generator)
    w = share.view(-1, *[1] * (x.dim() - 1))
    z = (1 - w) * v + w * v[second]
    z = z if x.dim() == 4 else z + 0.1 * x.std() * torch.randn(z.shape, generator=generator)
    soft = logits(net, state, z).softmax(1)
    said, own = soft.argmax(1), logits(net, state, x).argmax(1)
    fits = torch.zeros(count, dtype=torch.bool)
    for right in (y[first], own[first]):
        fits |= (said == right) | ((said == right[second]) & (share > 0.2))
    believed = float(fits.float().mean())
    # A network that believes nothing of itself has nothing to be relearned from: all of it is then taken.
    return (z[fits], soft[fits], believed) if int(fits.sum()) >= 2 else (z, soft, believed)


def _changed(
    net: Net, state: State, x: Tensor, y: Tensor, count: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """So many views changed at random, and what to say of them (count, classes); a part at a time, to hold memory down.

    That is what the network says of the input as it is, and half the label where it is wrong there.
    """
    own = logits(net, state, x).softmax(1)
    label = F.one_hot(y, own.shape[1]).to(own)
    right = torch.where((own.argmax(1) == y)[:, None], own, (own + label) / 2)
    inputs, answers = [x[:0]], [right[:0]]
    for part in torch.randint(len(x), (count,), generator=generator).split(1000) if count else ():
        inputs.append(corrupted(moved(x[part], generator), generator))
        answers.append(right[part])
    return torch.cat(inputs), torch.cat(answers)


def moved(x: Tensor, generator: torch.Generator) -> Tensor:
    """Images (n, channels, rows, columns) turned, scaled, sheared, shifted and pulled a little, each in its own way.

    By up to 7°, 8 %, 10 % and 7 % of the side; pulls along a smooth field, up to 3 %. Other inputs are as they were.
    """
    if x.dim() != 4:
        return x
    parts = []
    for part in x.split(500):
        n = len(part)
        turn, shear, down, along = ((torch.rand(n, generator=generator) * 2 - 1) * m for m in (0.12, 0.1, 0.14, 0.14))
        tall, wide = (torch.exp((torch.rand(n, generator=generator) * 2 - 1) * 0.08) for _ in range(2))
        rows = torch.stack([wide * turn.cos(), shear - wide * turn.sin(), along], 1)
        columns = torch.stack([tall * turn.sin(), tall * turn.cos(), down], 1)
        grid = F.affine_grid(torch.stack([rows, columns], 1), list(part.shape), align_corners=False)
        points = int(torch.randint(3, 7, (), generator=generator))
        field = torch.rand(n, 2, points, points, generator=generator) * 2 - 1
        flow = F.interpolate(field, size=part.shape[2:], mode="bicubic", align_corners=True).permute(0, 2, 3, 1)
        strength = 0.12 * torch.rand(n, 1, 1, 1, generator=generator)
        parts.append(F.grid_sample(part, grid + strength * flow, align_corners=False, padding_mode="border"))
    return torch.cat(parts)


__all__ = ["moved", "relearn"]
