"""Do two networks of one wiring share an ancestor? A test on the weights, with its null distribution.

Fine-tuning moves weights a little and leaves neurons where they are, so that relatives correspond index by index:
their weights correlate. Independent networks do not: initialisation and training treat the neurons of a layer alike, so
that a network trained on its own is as likely as any network of its orbit. Hence the null distribution is drawn with
the symmetry group itself: under "b was trained independently of a" the pair ``(a, b)`` has the distribution of ``(a, g
b)`` for every group element ``g``, and the rank of the statistic among random ``g`` is an exact permutation test
(Lehmann & Romano 2005, §15.2), whatever the architecture, the data and the distribution of weights. Beyond the number
of draws the tail is that of Student's t, because the statistic is a sum over many weights.

A copy that was moved inside its orbit fails this test. It is first brought back (``weightspace.mergeability.
protection``: permutations, scales, signs and maps inside heads) and then held against surrogates: the same tensors with
their entries shuffled, which aligned with the same effort show what alignment alone achieves. Independent networks that
learnt the same task align somewhat better than surrogates, so a relative also has to come nearer than
``protection.NEAR``: aligned independent networks of the recipe ``families`` lie at 0.70 and above, permuted fine-tuned
copies at 0.52 and below.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from weightspace.errors import UnprovedWiringError, WiringError
from weightspace.mergeability.protection import NEAR, Protection, examine, nearest
from weightspace.wiring.wiring import Permutation, Wiring, _act, _addresses, _joint

Relation = Literal["same ancestor", "moved copy", "unrelated", "unknown"]

ALPHA = 1e-6
"""The index-by-index test has to be as improbable as this under the null."""
ALPHA_ALIGNED = 1e-2
"""The same for aligned networks, whose null has few draws; they must come near as well."""
_ELEMENTS = 1 << 17
_LEAST = 1 << 10
# Origins of the null's draws are kept on the wiring up to this many entries.
_KEPT = 1 << 23
# Smaller tensors may lose their correspondence in training.
_MATRIX = 256
# A tensor whose factor lies across several dims is looked at whole up to this size.
_JOINT = 1 << 26


@dataclass(frozen=True)
class Block:
    """One tensor: its correlation with the other network's, and how many standard deviations above the null."""

    tensor: str
    correlation: float
    z: float
    size: int = 0


@dataclass(frozen=True, eq=False)
class Ancestry:
    """What the test says of two networks; ``statement`` in a sentence.

    ``correlation`` is the mean over weights of the product of the standardised weights, index by index; ``null_mean``
    and ``null_deviation`` are those of ``draws`` random group elements; ``z`` and ``log10_p`` follow (Student's t), and
    ``rank_p`` is the exact p-value of the permutation test, at best ``1 / (draws + 1)``. ``blocks`` has every tensor.
    ``aligned`` is what was found when the second network was brought near the first, None where that was not needed;
    ``aligned_log10_p`` its p-value against the surrogates (None where it did not come near).
    """

    relation: Relation
    correlation: float
    null_mean: float
    null_deviation: float
    draws: int
    z: float
    log10_p: float
    rank_p: float
    blocks: tuple[Block, ...] = field(repr=False)
    aligned: Protection | None = field(default=None, repr=False)
    aligned_log10_p: float | None = None
    names: tuple[str, str] = ("a", "b")
    note: str = ""
    seconds: float = 0.0

    @property
    def lost(self) -> tuple[str, ...]:
        """Matrices without correspondence although the networks share an ancestor: layers made anew, or moved."""
        if self.relation != "same ancestor":
            return ()
        return tuple(
            b.tensor for b in self.blocks if b.size >= _MATRIX and b.z < 3 and b.correlation < 0.2 * self.correlation
        )

    @property
    def statement(self) -> str:
        """The outcome in a sentence."""
        a, b = self.names
        test = f"correlation {self.correlation:.3f}, {self.z:.1f} standard deviations above unrelated, p {self.p_text}"
        if self.relation == "same ancestor":
            lost = f"; no correspondence in {', '.join(self.lost[:4])}" if self.lost else ""
            return f"{a} and {b} share an ancestor, neuron by neuron ({test}){lost}"
        if self.relation == "moved copy":
            assert self.aligned is not None
            kinds = ", ".join(self.aligned.kinds) or "alignment"
            return (
                f"{a} and {b} share an ancestor, but one was moved inside its orbit ({kinds} undone: distance "
                f"{self.aligned.before:.2f} → {self.aligned.nearest:.2f}; as they are: {test})"
            )
        if self.relation == "unrelated":
            near = "" if self.aligned is None else f"; aligned they stay {self.aligned.nearest:.2f} apart"
            return f"{a} and {b} share no ancestor that the weights still show ({test}{near})"
        return f"whether {a} and {b} share an ancestor cannot be told: {self.note}"

    @property
    def p_text(self) -> str:
        """The p-value, readable at any size."""
        return f"{10**self.log10_p:.2g}" if self.log10_p > -300 else f"1e{self.log10_p:.0f}"

    def to_json(self) -> dict[str, Any]:
        """Everything as plain values; the aligned network's tensors left out."""
        return {
            "names": list(self.names),
            "relation": self.relation,
            "statement": self.statement,
            "correlation": self.correlation,
            "null_mean": self.null_mean,
            "null_deviation": self.null_deviation,
            "draws": self.draws,
            "z": self.z,
            "log10_p": self.log10_p,
            "rank_p": self.rank_p,
            "lost": list(self.lost),
            "blocks": {b.tensor: {"correlation": b.correlation, "z": b.z} for b in self.blocks},
            "aligned": None if self.aligned is None else self.aligned.to_json(),
            "aligned_log10_p": self.aligned_log10_p,
            "note": self.note,
            "seconds": self.seconds,
        }

    def __repr__(self) -> str:
        return f"Ancestry({self.relation}: {self.statement}; {self.seconds:.1f} s)"


def ancestry(
    a: Mapping[str, Tensor],
    b: Mapping[str, Tensor],
    wiring: Wiring,
    *,
    draws: int = 63,
    surrogates: int = 5,
    align: bool = True,
    seed: int = 0,
    names: tuple[str, str] = ("a", "b"),
) -> Ancestry:
    """Test whether two networks share an ancestor.

    ``a`` and ``b`` have the wiring's names and shapes; they are read tensor by tensor, and of large ones an even sample
    of about 130,000 weights in all is looked at (which leaves the test exact). Where they do not correspond as they
    are, and ``align``, ``b`` is brought near ``a``, which holds both in memory and needs a proved wiring;
    ``surrogates`` draw that null. Without any factor that may move there is no null, and the relation is "unknown".

    Raises ``WiringError`` where a tensor's shape is not the wiring's.
    """
    started = time.perf_counter()
    samples = _samples(a, b, wiring, seed)
    if not samples:
        return Ancestry(
            "unknown", 0.0, 0.0, 0.0, 0, 0.0, 0.0, 1.0, (), names=names, seconds=time.perf_counter() - started,
            note="no tensor that both have carries a factor that may be permuted",
        )  # fmt: skip
    found, drawn, weights = _correlations(samples, wiring, draws, seed)
    share = weights / weights.sum()
    value, null = float(found @ share), drawn @ share
    z, log10_p, rank_p = _tail(value, null)
    deviations = drawn.std(0).clamp_min(1e-12)
    blocks = tuple(
        Block(s.tensor, float(found[i]), float((found[i] - drawn[:, i].mean()) / deviations[i]), len(s.positions))
        for i, s in enumerate(samples)
    )
    relation: Relation = "same ancestor" if log10_p < math.log10(ALPHA) and value > float(null.max()) else "unrelated"
    aligned, aligned_p, note = None, None, ""
    if relation == "unrelated" and align:
        try:
            aligned = examine(b, a, wiring)
        except UnprovedWiringError as error:
            note = f"not aligned: {error}"
        else:
            if aligned.related:
                aligned_p = _aligned_tail(aligned, a, b, wiring, surrogates, seed)
                if aligned_p < math.log10(ALPHA_ALIGNED):
                    relation = "moved copy"
    return Ancestry(
        relation, value, float(null.mean()), float(null.std()), draws, z, log10_p, rank_p, blocks, aligned, aligned_p,
        names, note, time.perf_counter() - started,
    )  # fmt: skip


# ------------------------------------------------------------------------------------ index by index


@dataclass(frozen=True)
class _Sample:
    """Weights of one tensor: where they lie, those of a there (standardised), and all of b (standardised alike)."""

    tensor: str
    positions: Tensor
    ours: Tensor
    theirs: Tensor


def _samples(a: Mapping[str, Tensor], b: Mapping[str, Tensor], wiring: Wiring, seed: int) -> list[_Sample]:
    free = {n for n, f in wiring.free.items() if f.size > 1}
    wanted = [
        n
        for n, layout in wiring.layouts.items()
        if n in a and n in b and any(f in free for g in layout for block in g.blocks for s in block for f in s.factors)
    ]
    most = max(_LEAST, _ELEMENTS // max(len(wanted), 1))
    generator = torch.Generator().manual_seed(seed)
    found = []
    for name in wanted:
        x, y = a[name], b[name]
        for t in (x, y):
            if tuple(t.shape) != wiring.shapes[name]:
                raise WiringError(
                    f"tensor {name!r} has shape {tuple(t.shape)}, the wiring expects {wiring.shapes[name]}; test "
                    "networks of one wiring"
                )
        joint = any(len(dims) > 1 for dims, _ in _joint(wiring.layouts[name], wiring.factors))
        if not x.is_floating_point() or x.numel() < 2 or (joint and x.numel() > _JOINT):
            continue
        count = x.numel()
        positions = torch.arange(count) if count <= most else torch.randint(count, (most,), generator=generator)
        ours, theirs = x.reshape(-1)[positions].to(torch.float32), y.reshape(-1).to(torch.float32)
        ours, mean, deviation = _standard(ours), float(theirs.mean()), float(theirs.std())
        usable = math.isfinite(deviation) and deviation > 1e-12 and bool(ours.isfinite().all()) and bool(ours.any())
        if not usable:
            continue
        found.append(_Sample(name, positions, ours, (theirs - mean) / deviation))
    return found


def _standard(x: Tensor) -> Tensor:
    x = x - x.mean()
    deviation = float(x.square().mean().sqrt())
    return x / deviation if deviation > 1e-12 else torch.zeros_like(x)


def _correlations(samples: list[_Sample], wiring: Wiring, draws: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Correlation of every tensor, the same under every draw ``(draws, tensors)``, and how many weights each has."""
    found = torch.tensor([float((s.ours * s.theirs[s.positions]).mean()) for s in samples], dtype=torch.float64)
    drawn = torch.zeros(draws, len(samples), dtype=torch.float64)
    for k, origins in enumerate(_draws(samples, wiring, draws, seed)):
        for i, (s, at) in enumerate(zip(samples, origins, strict=True)):
            drawn[k, i] = torch.dot(s.ours, s.theirs[at])
    counts = torch.tensor([len(s.positions) for s in samples], dtype=torch.float64)
    return found, drawn / counts, counts


def _draws(samples: list[_Sample], wiring: Wiring, draws: int, seed: int) -> Iterator[list[Tensor]]:
    """For every draw, where each sample is read from. Kept on the wiring, for the next pair."""
    key = (draws, seed, tuple((s.tensor, len(s.positions)) for s in samples))
    known = wiring.kept.get("ancestry")
    if isinstance(known, tuple) and known[0] == key:
        yield from known[1]
        return
    generator = torch.Generator().manual_seed(seed + 1)
    small = draws * sum(len(s.positions) for s in samples) <= _KEPT
    kept = []
    for _ in range(draws):
        moved = wiring.random(generator)
        origins = [_origins(wiring, s.tensor, s.positions, moved).to(torch.int32) for s in samples]
        if small:
            kept.append(origins)
        yield origins
    if small:
        wiring.kept["ancestry"] = (key, kept)


def _origins(wiring: Wiring, tensor: str, positions: Tensor, moved: Permutation) -> Tensor:
    """The flat positions that the group element reads for these positions."""
    shape = wiring.shapes[tensor]
    groups = _joint(wiring.layouts[tensor], wiring.factors)
    if any(len(dims) > 1 for dims, _ in groups):
        numbers = torch.arange(math.prod(shape)).reshape(shape)
        return _act(numbers, wiring.layouts[tensor], moved).reshape(-1)[positions]
    coordinates = list(torch.unravel_index(positions, shape))
    for (dim,), blocks in groups:
        source = torch.arange(shape[dim])
        for block in blocks:
            (target,), (origin,) = _addresses(block, moved)
            source[target.reshape(-1)] = origin.reshape(-1)
        coordinates[dim] = source[coordinates[dim]]
    flat = torch.zeros_like(positions)
    for size, c in zip(shape, coordinates, strict=True):
        flat = flat * size + c
    return flat


def _tail(value: float, null: Tensor) -> tuple[float, float, float]:
    """Standard deviations above the null, log10 of the p-value (Student's t), and the exact rank p-value."""
    from scipy.stats import t as student

    draws = len(null)
    deviation = float(null.std()) * math.sqrt(1 + 1 / draws)
    rank = (1 + int((null >= value).sum())) / (draws + 1)
    if deviation <= 0:
        return 0.0, math.log10(rank), rank
    z = (value - float(null.mean())) / deviation
    log10_p = float(student.logsf(z, draws - 1)) / math.log(10)
    return z, log10_p if math.isfinite(log10_p) else -1e4, rank


# ------------------------------------------------------------------------------------ aligned


def _aligned_tail(
    aligned: Protection, a: Mapping[str, Tensor], b: Mapping[str, Tensor], wiring: Wiring, surrogates: int, seed: int
) -> float:
    """log10 p of how near it came, against surrogates: the same tensors with their entries shuffled."""
    generator = torch.Generator().manual_seed(seed + 2)
    near = []
    for _ in range(max(surrogates, 2)):
        apart = {
            n: t.reshape(-1)[torch.randperm(t.numel(), generator=generator)].reshape(t.shape)
            for n, t in ((n, b[n]) for n in b)
        }
        near.append(nearest(apart, a, wiring))
    return _tail(-aligned.nearest, -torch.tensor(near, dtype=torch.float64))[1]


__all__ = ["ALPHA", "ALPHA_ALIGNED", "NEAR", "Ancestry", "Block", "Relation", "ancestry"]
