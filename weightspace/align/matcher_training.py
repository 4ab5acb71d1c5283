"""Training the matcher of ``weightspace.align.learned`` on populations.

    python -m weightspace.align.matcher_training zoos/families zoos/mixed zoos/merging --out matcher.safetensors

Pairs whose elements are known to belong together: two noisy copies of one network, networks fine-tuned from one parent,
and, with weight matching as the teacher, networks trained from other initialisations. The metanet is equivariant, so
nothing has to be permuted: the states of the two are compared in the order in which they belong together, and each
element has to be more like its partner than all others of its factor (InfoNCE, van den Oord et al. 2018).
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from weightspace.align.learned import ElementEncoder, States, gathered, save_matcher, similarity
from weightspace.align.weight_matching import weight_matching
from weightspace.errors import AlignmentError
from weightspace.wiring.wiring import Permutation, Wiring

Tensors = Mapping[str, Tensor]


@dataclass(frozen=True, eq=False)
class Member:
    """A network of a population; those of one ``root`` descend from one training."""

    tensors: Tensors
    wiring: Wiring
    root: str


def train_matcher(
    members: Sequence[Member], *, steps: int = 2000, batch: int = 12, rate: float = 2e-3, noise: float = 1.0,
    temperature: float = 0.1, strangers: float = 0.3, relatives: float = 0.3, seed: int = 0, log: int = 0,
    encoder: ElementEncoder | None = None,
) -> ElementEncoder:  # fmt: skip
    """An encoder trained on ``batch`` pairs a step; AdamW with peak ``rate``, warm-up and cosine decay.

    ``strangers`` and ``relatives``: shares of pairs of other and of the same root, where a network has any; the rest
    are copies of one. All get noise of up to ``noise`` times each tensor's deviation. ``log``: print the loss every so
    many steps. Raises ``AlignmentError`` without members.
    """
    if not members:
        raise AlignmentError("there are no networks to learn from; give folders of populations")
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    encoder = encoder or ElementEncoder()
    groups: dict[tuple[tuple[str, tuple[int, ...]], ...], list[int]] = {}
    for k, m in enumerate(members):
        groups.setdefault(tuple((n, tuple(t.shape)) for n, t in m.tensors.items()), []).append(k)
    fellows = {k: own for own in groups.values() for k in own}
    taught: dict[tuple[int, int], Permutation] = {}

    def pick(choices: Sequence[int]) -> int:
        return choices[int(torch.randint(len(choices), (1,), generator=generator))]

    def pair() -> tuple[int, int, Permutation]:
        k = pick(range(len(members)))
        draw = float(torch.rand((), generator=generator))
        same = [j for j in fellows[k] if j != k and members[j].root == members[k].root]
        other = [j for j in fellows[k] if members[j].root != members[k].root]
        wiring = members[k].wiring
        if draw < strangers and other:
            j = pick(other)
            if (k, j) not in taught:
                taught[k, j] = weight_matching(members[k].tensors, members[j].tensors, wiring, kicks=0).permutations
            return k, j, taught[k, j]
        if draw > 1 - relatives and same:
            return k, pick(same), wiring.identity()
        return k, k, wiring.identity()

    optimiser = torch.optim.AdamW(encoder.parameters(), lr=rate, weight_decay=1e-2)
    warm = max(1, steps // 20)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimiser,
        lambda s: min((s + 1) / warm, 0.5 * (1 + float(torch.cos(torch.tensor(torch.pi * s / max(steps, 1)))))),
    )
    encoder.train()
    total, started = 0.0, time.perf_counter()
    for step in range(steps):
        drawn = [pair() for _ in range(batch)]
        wirings = [members[k].wiring for k, _, _ in drawn]
        items = []
        for side in (0, 1):
            for d, wiring in zip(drawn, wirings, strict=True):
                level = noise * float(torch.rand((), generator=generator)) ** 2
                member = members[d[0] if side == 0 else d[1]]
                items.append(encoder.prepare(shaken(member.tensors, wiring, level, generator), wiring))
        states = gathered(encoder(encoder.metanet.collate(items)), items, wirings * 2)
        losses = [
            contrast(x, y, element, wiring, temperature)
            for x, y, (_, _, element), wiring in zip(states[:batch], states[batch:], drawn, wirings, strict=True)
        ]
        loss = torch.stack(losses).mean()
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(encoder.parameters(), 1.0)
        optimiser.step()
        schedule.step()
        total += float(loss.detach())
        if log and step % log == log - 1:
            seconds = time.perf_counter() - started
            print(f"step {step + 1}: loss {total / log:.4f}, {seconds / (step + 1):.2f} s a step", flush=True)
            total = 0.0
    return encoder.eval()


def contrast(one: States, two: States, element: Permutation, wiring: Wiring, temperature: float) -> Tensor:
    """How hard the partners of one network's elements are to tell among the other's, over all factors, in nats.

    ``element`` moves the second network onto the first.
    """
    losses = []
    for name, x in one.items():
        y = two[name]
        front = [*wiring.free[name].over, name]
        y = y[tuple(element._grid(front))]
        n = x.shape[-2]
        alike = similarity(x, y).reshape(-1, n, n) / temperature
        wanted = torch.arange(n).expand(len(alike), n)
        losses += [F.cross_entropy(alike, wanted), F.cross_entropy(alike.transpose(-1, -2), wanted)]
    return torch.stack(losses).mean() if losses else torch.zeros(())


def shaken(tensors: Tensors, wiring: Wiring, level: float, generator: torch.Generator) -> dict[str, Tensor]:
    """Tensors with normal noise of a share of each one's deviation; variances stay positive."""
    out = {}
    for n, t in tensors.items():
        if t.is_floating_point() and t.numel() > 1:
            moved = t + level * t.std() * torch.randn(t.shape, generator=generator)
            t = moved.abs() if wiring.roles.get(n) == "variance" else moved
        out[n] = t
    return out


def population(folder: Path, most: int = 0) -> list[Member]:
    """The finished networks of a built recipe that did not diverge; ``most``: of every population, so many."""
    import weightspace as ws
    from weightspace.zoo.files import read_record

    files = sorted(folder.glob("*.safetensors"))
    records = {f.name: read_record(f) for f in files}
    found, counts = [], dict[str, int]()
    for file in files:
        record = records[file.name]
        if not record.get("final") or record.get("diverged"):
            continue
        group = str(record.get("population"))
        counts[group] = counts.get(group, 0) + 1
        if most and counts[group] > most:
            continue
        root = file.name
        while records.get(root, {}).get("parent") in records:
            root = records[root]["parent"]
        wiring = ws.wiring(file)
        if wiring.proved and wiring.free:
            found.append(Member(dict(ws.open(file).items()), wiring, f"{folder.name}/{root}"))
    return found


def main() -> None:
    """Train a matcher on folders of populations and write it."""
    from weightspace.align.learned import FILE

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("zoos", type=Path, nargs="+", help="folders of built recipes")
    parser.add_argument("--out", type=Path, default=FILE)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--batch", type=int, default=12, help="pairs a step")
    parser.add_argument("--most", type=int, default=40, help="networks of a population at most")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    members = [m for folder in args.zoos for m in population(folder, args.most)]
    print(f"{len(members)} networks of {len({m.root for m in members})} trainings", flush=True)
    encoder = train_matcher(members, steps=args.steps, batch=args.batch, seed=args.seed, log=50)
    facts = {"zoos": [z.name for z in args.zoos], "networks": len(members), "steps": args.steps, "batch": args.batch,
             "seed": args.seed}  # fmt: skip
    save_matcher(encoder, args.out, facts)
    print(json.dumps({"out": str(args.out), **facts}))


if __name__ == "__main__":
    main()
