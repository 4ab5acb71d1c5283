"""What flows along the free factors of a wiring when its network runs on real inputs.

The network is traced once more, on two of the real examples, with a note of every intermediate value and its axes;
then all examples are sent through it batch by batch, and of every value that carries a free factor the wanted places
are kept as samples of that factor.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from math import prod
from typing import Any, Literal

import torch

from weightspace.errors import WiringError
from weightspace.wiring.algebra import Atom, size_of
from weightspace.wiring.axis import Factor
from weightspace.wiring.contractions import Gram, Grams, contractions
from weightspace.wiring.program import Program
from weightspace.wiring.replay import (
    UNCOUNTED,
    Inputs,
    Watcher,
    as_float32,
    batches,
    name_of,
    prepared,
    program_of,
    replay,
    tensors_in,
)
from weightspace.wiring.resolve import _groups, _names
from weightspace.wiring.trace import Label, Tracer, trace
from weightspace.wiring.wiring import Wiring

Stage = Literal["pre", "post", "linear"]

# Functions whose results are what the next layer reads.
_NONLINEAR = {
    "relu", "relu6", "hardtanh", "clamp", "clamp_min", "clamp_max", "threshold", "leaky_relu", "prelu",
    "_prelu_kernel", "elu", "celu", "selu", "gelu", "silu", "mish", "hardswish", "hardsigmoid", "sigmoid", "tanh",
    "softplus", "softshrink", "hardshrink", "sin", "cos", "erf", "log_sigmoid_forward", "special_expit", "glu",
    "rrelu_with_noise",
}  # fmt: skip
# Results that hold the values of their operand, moved.
_SAME = {
    "view", "_unsafe_view", "reshape", "_reshape_alias", "t", "transpose", "permute", "slice", "select", "split",
    "split_with_sizes", "chunk", "unbind", "squeeze", "unsqueeze", "expand", "clone", "contiguous", "detach", "alias",
    "_to_copy", "cat", "stack", "native_dropout", "dropout", "unflatten", "flatten", "copy", "constant_pad_nd", "pad",
    "repeat", "repeat_interleave", "index", "index_select", "masked_fill", "where",
}  # fmt: skip


@dataclass(frozen=True, eq=False)
class Value:
    """Samples of one factor from one intermediate value: ``samples`` is (samples, *sizes of ``over``, size).

    ``op``: the operation that computed it. ``stage``: ``"pre"`` where a nonlinear function is applied to it,
    ``"post"`` for the result of one (or of a product of two values, as behind a gate), ``"linear"`` for all others:
    sums, norms, attention scores, what a matrix product wrote. ``beside``: other free factors that the value carries.
    Where there are such, a sample is the root mean square over them, which no permutation of theirs changes.
    """

    op: str
    stage: Stage
    samples: torch.Tensor
    beside: tuple[str, ...] = ()

    def __repr__(self) -> str:
        beside = f", over {', '.join(self.beside)}" if self.beside else ""
        return f"Value({self.op}, {self.stage}, {tuple(self.samples.shape)}{beside})"


def values(
    wiring: Wiring, tensors: Mapping[str, torch.Tensor], inputs: Inputs, *, positions: int = 4096,
    batch: int | None = 64, seed: int = 0, only: Sequence[str] | None = None,
) -> dict[str, tuple[Value, ...]]:  # fmt: skip
    """Per free factor, the intermediate values that carry it, in the order in which the network computes them.

    Examples stand along the first dim of the inputs and go in ``batch`` at a time; with ``batch=None`` the inputs go in
    as they are (sequences first, graphs). ``positions`` bounds the samples (examples × places) of each value; they are
    drawn with ``seed`` and are the same for two networks of one wiring given the same inputs. ``only`` names the
    factors wanted.

    Memory: ``positions`` × size float32 for every value, and the activations of one batch.
    Raises ``WiringError`` where the wiring has no program, a tensor is missing, or the network performs other
    operations on these inputs than on two of them.
    """
    program = program_of(wiring)
    given = prepared(wiring, tensors)
    runs = list(batches(inputs, batch))
    if not runs:
        raise WiringError(
            "no inputs were given; pass a tensor, a tuple of the network's arguments, or a list of either"
        )
    plan = _plan(wiring, program, given, runs[0], whole=batch is None)
    wanted = set(wiring.free if only is None else only)
    found: dict[tuple[str, int], list[torch.Tensor]] = {}
    for number, args in enumerate(runs):
        watcher = _Collector(plan, wanted, max(1, -(-positions // len(runs))), seed * 1_000_003 + number * 1009, found)
        replay(program, given, args, watcher)
        if watcher.step + 1 != plan.steps:
            raise WiringError(
                f"the network ({program.origin}) performed {plan.steps} operations on the first two examples and "
                f"{watcher.step + 1} on others, so its values cannot be told apart; pass inputs of one shape"
            )
    out: dict[str, list[Value]] = {n: [] for n in wiring.free if n in wanted}
    for (factor, number), pieces in sorted(found.items(), key=lambda item: item[0][1]):
        source = plan.parts[number]
        out[factor].append(replace(source.value, samples=torch.cat(pieces)))
    return {n: tuple(v) for n, v in out.items() if v}


def record(
    wiring: Wiring, tensors: Mapping[str, torch.Tensor], inputs: Inputs, *, at: Literal["post", "pre", "all"] = "post",
    positions: int = 4096, batch: int | None = 64, seed: int = 0, only: Sequence[str] | None = None,
) -> dict[str, torch.Tensor]:  # fmt: skip
    """Per free factor its activations on real inputs, ``(samples, *sizes of what it is fibred over, size)``.

    ``at="post"`` takes what nonlinear functions return, ``"pre"`` what they are given, ``"all"`` every intermediate
    value; a factor without such a function (a stream of sums, the channels of queries and keys) has all its values.
    Several values of one factor are put one after the other along samples. See ``values`` for the rest.
    """
    out = {}
    for name, found in values(wiring, tensors, inputs, positions=positions, batch=batch, seed=seed, only=only).items():
        chosen = select(found, at)
        out[name] = torch.cat([v.samples for v in chosen])
    return out


def select(found: Sequence[Value], at: Literal["post", "pre", "all"]) -> tuple[Value, ...]:
    """The values of one stage, or all where there is none of it; those that had to be averaged only if no other is."""
    chosen = tuple(v for v in found if v.stage == at) or tuple(found)
    return tuple(v for v in chosen if not v.beside) or tuple(v for v in found if not v.beside) or chosen


# -------------------------------------------------------------------- which values there are


@dataclass(frozen=True)
class _Spread:
    """How a result's dims read as products of factors: per dim, where the part starts and (factor, size) pairs.

    ``None`` for a factor stands for examples and places; a size of 0 for what is found from the actual shape.
    """

    starts: tuple[int, ...]
    dims: tuple[tuple[tuple[str | None, int], ...], ...]
    whole: bool


@dataclass(frozen=True)
class _Source:
    step: int
    output: int
    factor: str
    over: tuple[str, ...]
    spread: _Spread
    value: Value


@dataclass
class _Plan:
    steps: int
    parts: list[_Source]
    by_step: dict[int, list[int]] = field(default_factory=dict)


@dataclass
class _Noted:
    step: int
    op: str
    stage: Stage
    labels: list[Label]
    shapes: list[torch.Size]


class _NotingTracer(Tracer):
    """A tracer that keeps the labels of all results, and tells what nonlinear functions read and write."""

    def __init__(self, live: Sequence[bool] = ()) -> None:
        super().__init__(live)
        self.noted: list[_Noted] = []
        self.counted = 0
        self._made: dict[int, tuple[torch.Tensor, _Noted]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.counted += name_of(func) != UNCOUNTED
        return super().__torch_dispatch__(func, types, args, kwargs)

    def _watch(
        self, op: str, func: Any, args: Any, kwargs: Any, outputs: list[torch.Tensor], tensors: list[torch.Tensor],
        labels: list[Label], is_pointwise: bool,
    ) -> None:  # fmt: skip
        data = [x for x, lab in zip(tensors, labels, strict=True) if not lab.const and not self.roles.knows(x)]
        super()._watch(op, func, args, kwargs, outputs, tensors, labels, is_pointwise)
        if not data:
            return
        made = [self._made[id(x)][1] for x in data if id(x) in self._made]
        if op in _SAME:
            # Moved values are those of what they were moved from, unless they are put together anew.
            for o in outputs:
                if len(made) == 1:
                    self._made[id(o)] = (o, made[0])
            return
        stage: Stage = "linear"
        if op in _NONLINEAR:
            stage = "post"
            for m in made:
                if m.stage == "linear":
                    m.stage = "pre"
        elif op == "mul" and len({id(x) for x in data}) > 1 and all(x.shape == outputs[0].shape for x in data):
            stage = "post"
        note = _Noted(self.counted - 1, op, stage, [self.label(o) for o in outputs], [o.shape for o in outputs])
        self.noted.append(note)
        for o in outputs:
            self._made[id(o)] = (o, note)


def _plan(
    wiring: Wiring, program: Program, given: Mapping[str, torch.Tensor], args: tuple[Any, ...], whole: bool
) -> _Plan:
    """Which results carry which factors; kept on the wiring for inputs of the same shapes."""
    count = next((x.shape[0] for x in args if isinstance(x, torch.Tensor) and x.dim()), 0)
    few = (
        as_float32(args)
        if whole
        else as_float32([x[:2] if isinstance(x, torch.Tensor) and x.dim() and x.shape[0] == count else x for x in args])
    )
    key = f"recording {[(tuple(x.shape), x.dtype) if isinstance(x, torch.Tensor) else x for x in few]}"
    known = wiring.kept.get(key)
    if isinstance(known, _Plan):
        return known
    tracers: list[_NotingTracer] = []

    def make(live: Sequence[bool]) -> Tracer:
        tracers.append(_NotingTracer(live))
        return tracers[-1]

    traced = replace(program, tensors=given, args=few)
    found = trace(traced, make)
    names = _named(wiring, traced, found.labels, found.ledger)
    plan = _Plan(tracers[-1].counted, [])
    for note in tracers[-1].noted:
        for k, (label, shape) in enumerate(zip(note.labels, note.shapes, strict=True)):
            if not prod(shape) or not any(a in names for d in label.dims for a in found.ledger.leaves(d)):
                continue
            for spread in _spreads(found.ledger, label, shape, names):
                for factor, over, beside in _carried(spread, wiring.free):
                    value = Value(note.op, note.stage, torch.empty(0), beside)
                    plan.by_step.setdefault(note.step, []).append(len(plan.parts))
                    plan.parts.append(_Source(note.step, k, factor, over, spread, value))
    wiring.kept[key] = plan
    return plan


def _named(wiring: Wiring, program: Program, labels: Mapping[str, Label], ledger: Any) -> dict[Atom, str]:
    """The wiring's name for every atom of a new trace; raises ``WiringError`` where the two disagree."""
    raw = {name: _groups(ledger, label) for name, label in labels.items()}
    names, _ = _names(raw)
    for tensor, groups in raw.items():
        mine = [
            [[(start, [names[a] for a, _ in items]) for start, items in block] for block in blocks]
            for _, blocks in groups
        ]
        theirs = [
            [[(s.start, list(s.factors)) for s in block] for block in g.blocks] for g in wiring.layouts.get(tensor, ())
        ]
        free = {f for g in wiring.layouts.get(tensor, ()) for b in g.blocks for s in b for f in s.factors}
        if mine != theirs and any(f in wiring.free for f in free):
            raise WiringError(
                f"on these inputs the network ({program.origin}) treats {tensor!r} otherwise than its wiring says; "
                "wire it with inputs of this form"
            )
    return {a: n for a, n in names.items() if n in wiring.factors}


def _spreads(ledger: Any, label: Label, shape: torch.Size, names: Mapping[Atom, str]) -> list[_Spread]:
    """The blocks of a result, each a product of named factors and of examples and places."""
    out = []
    groups = _groups(ledger, label)
    for blocks in product(*(blocks for _, blocks in groups)):
        cursors: dict[int, Any] = {}
        for (dims, _), block in zip(groups, blocks, strict=True):
            cursors.update(zip(dims, block, strict=True))
        rows: list[tuple[tuple[str | None, int], ...]] = []
        starts: list[int] = []
        whole = usable = True
        for d, n in enumerate(shape):
            start, items = cursors.get(d, (0, ()))
            row: list[tuple[str | None, int]] = [(names.get(a), a.size) for a, _ in items]
            covered = size_of(a for a, _ in items) == n
            strides = [s for _, s in items]
            plain = strides == [prod(size for _, size in row[k + 1 :]) for k in range(len(row))]
            usable &= plain or not any(f for f, _ in row)
            whole &= covered
            if not any(f for f, _ in row):
                row = [(None, 0)] if covered else [(None, prod(size for _, size in row))]
            elif covered:
                # Examples may stand in one dim with a factor: their number is what is left.
                unnamed = [k for k, (f, _) in enumerate(row) if f is None]
                if len(unnamed) == 1:
                    row[unnamed[0]] = (None, 0)
            rows.append(tuple(row))
            starts.append(start)
        if usable:
            out.append(_Spread(tuple(starts), tuple(rows), whole))
    return out


def _carried(spread: _Spread, free: Mapping[str, Factor]) -> list[tuple[str, tuple[str, ...], tuple[str, ...]]]:
    """Free factors of a result: what each is fibred over, and which other free ones are beside it."""
    here = [f for row in spread.dims for f, _ in row if f is not None]
    out = []
    for f in dict.fromkeys(here):
        if f not in free or here.count(f) > 1:
            continue
        over = free[f].over
        if any(here.count(o) != 1 for o in over):
            continue
        out.append((f, over, tuple(g for g in here if g in free and g != f and g not in over)))
    return out


# -------------------------------------------------------------------- collecting samples


class _Collector(Watcher):
    def __init__(
        self, plan: _Plan, wanted: set[str], positions: int, seed: int,
        found: dict[tuple[str, int], list[torch.Tensor]],
    ) -> None:  # fmt: skip
        super().__init__()
        self.plan, self.wanted, self.positions, self.seed, self.found = plan, wanted, positions, seed, found

    def seen(self, name: str, func: Any, args: Any, kwargs: Any, out: Any) -> None:
        numbers = self.plan.by_step.get(self.step)
        if not numbers:
            return
        outputs = tensors_in(out)
        for number in numbers:
            source = self.plan.parts[number]
            if source.factor not in self.wanted:
                continue
            value = source.value
            if value.op.rstrip("_") != name.rstrip("_"):
                raise WiringError(
                    f"operation {self.step} of the network is {name} here and was {value.op} on two examples, "
                    "so its values cannot be told apart; pass inputs of one shape"
                )
            samples = _samples(outputs[source.output], source, self._chosen)
            self.found.setdefault((source.factor, number), []).append(samples)

    def _chosen(self, count: int) -> torch.Tensor | None:
        if count <= self.positions:
            return None
        generator = torch.Generator().manual_seed(self.seed + self.step)
        return torch.randperm(count, generator=generator)[: self.positions].sort().values


def _samples(x: torch.Tensor, source: _Source, chosen: Any) -> torch.Tensor:
    """(samples, *over, size) of one result."""
    spread = source.spread
    parts: list[int] = []
    labels: list[str | None] = []
    for d, row in enumerate(spread.dims):
        known = prod(size for _, size in row if size)
        open_ = any(size == 0 for _, size in row)
        width = x.shape[d] if open_ else known
        if width != x.shape[d]:
            x = x.narrow(d, spread.starts[d], width)
        for f, size in row:
            parts.append(size or width // known)
            labels.append(f)
    x = x.reshape(parts)
    last = [*source.over, source.factor]
    beside = [k for k, f in enumerate(labels) if f is not None and f in source.value.beside]
    front = [k for k, f in enumerate(labels) if f not in last and k not in beside]
    x = x.permute(*front, *(labels.index(f) for f in last), *beside)
    lead, own = x.shape[: len(front)], x.shape[len(front) :]
    at = chosen(prod(lead))
    rows = x.reshape(-1, *own) if at is None or not lead else x[torch.unravel_index(at, lead)]
    # Masked scores are minus infinity whatever the weights are.
    rows = torch.nan_to_num(rows.to(torch.float32, copy=True), 0.0, 0.0, 0.0)
    if beside:
        rows = rows.square().mean(tuple(range(1 + len(last), rows.dim()))).sqrt()
    return rows.contiguous()


__all__ = ["Gram", "Grams", "Value", "contractions", "record", "select", "values"]
