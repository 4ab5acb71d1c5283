"""Finding a wiring by watching a network run.

The program runs once, on its example inputs, under a ``TorchDispatchMode``. Every aten operation that it
performs, after torch's own decompositions, is handed to the rule of that name in ``rules.RULES``; the rule
says which axes of its operands are the same axis, and a ``Ledger`` merges them. Watching real values
instead of an exported graph keeps Python control flow, in-place updates and data-dependent indices
working, and lets constant tensors be judged by their values: a mask that is the same along a dim does
not pin it, a table of rotary frequencies does.

Inputs, outputs, kernel and spatial positions are pinned; so is every axis that an operation without a
rule touches, and the operation is named.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map

from weightspace.errors import WiringError
from weightspace.wiring.activations import ActivationBook
from weightspace.wiring.algebra import Atom, Dim, Irreconcilable, Ledger, size_of
from weightspace.wiring.program import Program
from weightspace.wiring.roles import Role, RoleBook


@dataclass
class Label:
    """What is known of one tensor: a dim per dimension.

    ``const``: computed from neither parameters nor inputs. ``domain``: for an index tensor, the dim
    whose positions its values are (as ``topk`` returns them). ``implied``: for a tensor looked up by
    such an index, what it was looked up in (see ``Implied``). ``source``: for a named tensor or a view
    of one with its dims in another order, the name and which of its dims each dim is.
    """

    dims: list[Dim]
    const: bool = False
    domain: Dim | None = None
    implied: tuple[Implied, ...] = ()
    source: tuple[str, tuple[int, ...]] | None = None


@dataclass(frozen=True)
class Implied:
    """Elements of a tensor belong to positions along ``dim`` that an index tensor with dims ``by`` chose.

    ``token`` tells index tensors apart: two different choices from one dim are not aligned.
    """

    dim: tuple[Atom, ...]
    by: tuple[Atom, ...]
    token: int


@dataclass
class Trace:
    """A finished trace: the ledger, a label per named tensor, and what had no rule."""

    ledger: Ledger
    labels: dict[str, Label]
    missing: Counter[str] = field(default_factory=Counter)
    untouched: tuple[str, ...] = ()
    notes: list[str] = field(default_factory=list)
    # The dim of each weight that its operation sums over (or looks up), as against the one it writes.
    reads: dict[str, int] = field(default_factory=dict)
    # What each named tensor does, in order of first use, and which functions run along which atoms.
    roles: dict[str, Role] = field(default_factory=dict)
    activations: list[tuple[str, list[Atom]]] = field(default_factory=list)
    frequencies: list[tuple[float, list[Atom]]] = field(default_factory=list)


@contextlib.contextmanager
def plain_kernels() -> Iterator[None]:
    """Have torch decompose fused kernels (attention, recurrent cells, encoder fast path)."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    fastpath = torch.backends.mha.get_fastpath_enabled()
    mkldnn = torch._C._get_mkldnn_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    torch._C._set_mkldnn_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch._C._set_mkldnn_enabled(mkldnn)
        torch.backends.mha.set_fastpath_enabled(fastpath)


class Recorder(TorchDispatchMode):
    """First pass: which operations does the output depend on?

    Models compute things that they never use (a slice whose shape alone is read); such an operation must
    not constrain anything.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.steps: list[tuple[list[torch.Tensor], list[torch.Tensor], bool]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        reads = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        out = _call(func, reads, args, kwargs)
        writes = [x for x in tree_leaves(out) if isinstance(x, torch.Tensor)]
        mutated = _mutated(func._schema, args, kwargs)
        self.steps.append((reads, writes + mutated, bool(mutated)))
        return out

    def live(self, outputs: Sequence[torch.Tensor]) -> list[bool]:
        """For every operation in order: can it influence the outputs?"""
        shared = {_storage(x) for _, ws, m in self.steps if m for x in ws if x.layout == torch.strided}

        def key(x: torch.Tensor) -> tuple[str, int]:
            # Where memory is written in place, all its views stand or fall together.
            if x.layout == torch.strided and _storage(x) in shared:
                return ("storage", _storage(x))
            return ("tensor", id(x))

        wanted = {key(x) for x in outputs}
        alive = []
        for reads, writes, _ in reversed(self.steps):
            use = any(key(x) in wanted for x in writes) or not writes
            alive.append(use)
            if use:
                wanted |= {key(x) for x in reads}
        return alive[::-1]


class Tracer(TorchDispatchMode):
    """Runs operations for real and labels their results."""

    def __init__(self, live: Sequence[bool] = ()) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._live = live
        self._step = 0
        self.ledger = Ledger()
        self._labels: dict[int, tuple[torch.Tensor, Label]] = {}
        self.missing: Counter[str] = Counter()
        self.touched: set[int] = set()
        self.op = ""
        self.implied: tuple[Implied, ...] = ()
        # Storages that hold more than constants, and labels in force during one operation only.
        self._written: set[int] = set()
        self._momentary: dict[int, Label] = {}
        self.reads: dict[str, int] = {}
        self.roles = RoleBook()
        self.activations = ActivationBook()
        self._operands: list[tuple[torch.Tensor, Label]] = []
        self._args: Sequence[Any] = ()

    # ---------------------------------------------------------------- labels

    def set(self, tensor: torch.Tensor, label: Label) -> None:
        # The reference keeps the tensor alive, so that its id stays its own.
        self._labels[id(tensor)] = (tensor, label)

    def label(self, tensor: torch.Tensor) -> Label:
        """The label of a tensor; one never seen is a constant, judged by its values."""
        self.touched.add(id(tensor))
        if id(tensor) in self._momentary:
            return self._momentary[id(tensor)]
        found = self._labels.get(id(tensor))
        if found is None:
            label = Label(self.by_value(tensor), const=True)
            self.set(tensor, label)
            return label
        if found[1].const and tensor.layout == torch.strided and _storage(tensor) in self._written:
            found[1].const = False
        return found[1]

    def _renew(self, tensors: Sequence[torch.Tensor], mutated: Sequence[torch.Tensor]) -> None:
        """A constant ties nothing where it does not vary: each operation that reads it sees fresh dims."""
        for x in tensors:
            label = self.label(x)
            if label.const and not any(x is m for m in mutated):
                dims = [
                    [self.ledger.atom(a.size) if a.form is None and not a.pinned else a for a in self.ledger.normal(d)]
                    for d in label.dims
                ]
                self._momentary[id(x)] = Label(dims, True, label.domain)

    def dims(self, tensor: torch.Tensor) -> list[Dim]:
        return [self.ledger.normal(d) for d in self.label(tensor).dims]

    def fresh(self, sizes: Sequence[int], reason: str = "", *, pinned: bool = False) -> list[Dim]:
        return [self.ledger.dim(int(n), pinned=pinned, reason=reason) for n in sizes]

    def by_value(self, tensor: torch.Tensor) -> list[Dim]:
        """A constant may be permuted along a dim only where its values do not vary."""
        dims: list[Dim] = []
        with _quiet():
            for d, n in enumerate(tensor.shape):
                if n <= 1:
                    dims.append([] if n == 1 else self.ledger.dim(0, pinned=True, reason="empty"))
                    continue
                uniform = False
                if tensor.device.type != "meta" and tensor.layout == torch.strided:
                    first = tensor.narrow(d, 0, 1)
                    uniform = bool(((tensor == first) | ((tensor != tensor) & (first != first))).all())
                dims.append(self.ledger.dim(n, pinned=not uniform, reason="constant table"))
        return dims

    def pin(self, dims: Sequence[Dim] | Dim, reason: str) -> None:
        for d in dims:
            self.ledger.pin(d if isinstance(d, list) else [d], reason)

    def unify(self, one: Dim, two: Dim) -> None:
        self.ledger.unify(one, two, self.op)

    def read(self, tensor: torch.Tensor, dim: int) -> None:
        """An operation sums over (or looks up) this dim; where the tensor is a weight, that is its input."""
        source = self.label(tensor).source
        if source is not None:
            self.reads.setdefault(source[0], source[1][dim % tensor.dim()])

    def observe(self, dims: Sequence[Dim]) -> None:
        """Tell the ledger that positions of these dims, and what they imply, occur together."""
        self.ledger.observe(dims, [a for i in self._valid(dims) for a in self.ledger.normal(i.dim)])

    def _valid(self, dims: Sequence[Dim]) -> list[Implied]:
        """What is implied as long as the dims of its index are there."""
        if not self.implied:
            return []
        here = {a for d in dims for a in self.ledger.normal(d)}
        return [i for i in self.implied if set(self.ledger.normal(i.by)) <= here]

    def _gather_implied(self, labels: Sequence[Label]) -> tuple[Implied, ...]:
        """Of all operands; choices from one dim by different index tensors are not aligned and drop out."""
        found = {(tuple(self.ledger.normal(i.dim)), i.token): i for lab in labels for i in lab.implied}
        tokens = Counter(dim for dim, _ in found)
        return tuple(i for (dim, _), i in found.items() if tokens[dim] == 1)

    def pin_unreached(self, labels: Mapping[str, Label]) -> None:
        """Axes that no intermediate tensor has take no part in the function (rows never looked up)."""
        named = {id(lab) for lab in labels.values()}
        reached = {
            a
            for _, lab in self._labels.values()
            if id(lab) not in named
            for d in lab.dims
            for a in self.ledger.leaves(d)
        }
        for lab in labels.values():
            for d in lab.dims:
                for a in self.ledger.leaves(d):
                    if a not in reached:
                        self.ledger.pin([a], "takes no part in the traced run")

    # ---------------------------------------------------------------- running

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        from weightspace.wiring.rules import CREATION, RULES, pointwise, unknown

        kwargs = kwargs or {}
        flat = tree_leaves((args, kwargs))
        tensors = [x for x in flat if isinstance(x, torch.Tensor)]
        out = _call(func, tensors, args, kwargs)
        outputs = [x for x in tree_leaves(out) if isinstance(x, torch.Tensor)]
        step, self._step = self._step, self._step + 1
        if not outputs:
            return out
        if step < len(self._live) and not self._live[step]:
            for o in outputs:
                self.set(o, Label(self.fresh(o.shape, "unused", pinned=True)))
            return out
        name = func.overloadpacket.__name__ if hasattr(func, "overloadpacket") else str(func)
        previous, self.op = self.op, f"aten.{name}"
        try:
            schema = func._schema
            mutated = _mutated(schema, args, kwargs)
            is_view = any(r.alias_info is not None and not r.alias_info.is_write for r in schema.returns)
            if not tensors and name in CREATION:
                for o in outputs:
                    self.set(o, Label(CREATION[name](self, o), const=True))
                return out
            labels = [self.label(x) for x in tensors]
            const = all(lab.const for lab in labels)
            if const and not is_view and not mutated:
                for o in outputs:
                    uniform = name in _UNINITIALISED or name in _UNIFORM
                    dims = self.fresh(o.shape) if uniform else self.by_value(o)
                    self.set(o, Label(dims, const=True))
                return out
            in_place = name.endswith("_") and not name.endswith("__")
            base = name[:-1] if in_place and name[:-1] in RULES and name not in RULES else name
            rule = RULES.get(base)
            if rule is None and (torch.Tag.pointwise in func.tags or name.rstrip("_") in _POINTWISE):
                rule = pointwise
            if not is_view and not const:
                self._renew(tensors, mutated)
            for m in mutated:
                if not const and m.layout == torch.strided:
                    self._written.add(_storage(m))
            self.implied = self._gather_implied(labels)
            self._operands, self._args = list(zip(tensors, labels, strict=True)), args
            if not is_view and rule is not pointwise and base not in _INDEXING:
                # Positions became values: what is done with them depends on their order.
                for label in labels:
                    if label.domain is not None:
                        self.pin(label.domain, f"index arithmetic ({self.op})")
            before = [(m, [list(d) for d in self.label(m).dims]) for m in mutated]
            try:
                result = (rule or unknown)(self, func, args, kwargs, out)
            except Irreconcilable:
                self.missing[f"{self.op} (cut in incompatible ways)"] += 1
                result = unknown(self, func, args, kwargs, out)
            if rule is None:
                self.missing[self.op] += 1
            self._assign(out, outputs, result, const, before)
            if not const:
                plain = name[:-1] if in_place else name
                self._watch(plain, func, args, kwargs, outputs, tensors, labels, rule is pointwise)
        finally:
            self.op = previous
            self._momentary.clear()
        return out

    def _watch(
        self, op: str, func: Any, args: Any, kwargs: Any, outputs: list[torch.Tensor], tensors: list[torch.Tensor],
        labels: list[Label], is_pointwise: bool,
    ) -> None:  # fmt: skip
        """Tell the books of roles and activations what was done with what."""
        data = [not lab.const for lab in labels]
        values = [d and not self.roles.knows(x) for x, d in zip(tensors, data, strict=True)]
        self.roles.watch(op, func, args, kwargs, outputs, tensors, data)
        with _quiet():
            self.activations.watch(op, func, args, kwargs, outputs, tensors, values, self.dims, is_pointwise)

    def _source_of(self, out: torch.Tensor, sources: Sequence[tuple[str, tuple[int, ...]]]) -> Any:
        """A weight stays a weight through a change of dtype, a copy or a transposition."""
        if len(sources) != 1 or len(self._operands) != 1:
            return None
        (tensor, _), (name, dims) = self._operands[0], sources[0]
        op = self.op.removeprefix("aten.")
        order = list(range(len(dims)))
        if op == "t":
            order.reverse()
        elif op == "permute":
            order = list(self._args[1])
        elif op == "transpose":
            i, j = self._args[1], self._args[2]
            order[i], order[j] = order[j], order[i]
        if op in ("t", "transpose", "permute"):
            return name, tuple(dims[k] for k in order)
        return (name, dims) if tensor.shape == out.shape and op in _STAY else None

    def _assign(
        self,
        out: Any,
        outputs: list[torch.Tensor],
        result: Any,
        const: bool,
        before: list[tuple[torch.Tensor, list[Dim]]],
    ) -> None:
        results = [result] if isinstance(result, Label) or _is_dims(result) else list(result)
        if len(results) != len(outputs):
            raise AssertionError(f"{self.op}: rule labelled {len(results)} of {len(outputs)} outputs")
        kept = {id(m): dims for m, dims in before}
        sources = [lab.source for _, lab in self._operands if lab.source is not None]
        self._momentary.clear()
        for tensor, item in zip(outputs, results, strict=True):
            label = item if isinstance(item, Label) else Label([list(d) for d in item])
            if len(label.dims) != tensor.dim() or any(
                size_of(d) != n for d, n in zip(label.dims, tensor.shape, strict=True)
            ):
                sizes = [size_of(d) for d in label.dims]
                raise AssertionError(f"{self.op}: labelled {sizes}, the result is {tuple(tensor.shape)}")
            if id(tensor) in kept and self.op.removeprefix("aten.") not in _RESHAPE_IN_PLACE:
                for mine, new in zip(kept[id(tensor)], label.dims, strict=True):
                    self.unify(mine, new)
                label.dims = kept[id(tensor)]
            label.const = const and label.const
            label.source = self._source_of(tensor, sources)
            label.implied = tuple({*self._valid(label.dims), *label.implied})
            self.implied = label.implied
            self.observe(label.dims)
            self.set(tensor, label)


def _storage(tensor: torch.Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def _is_dims(result: Any) -> bool:
    return isinstance(result, list) and all(isinstance(d, list) and all(hasattr(a, "form") for a in d) for d in result)


def _mutated(schema: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[torch.Tensor]:
    found: list[torch.Tensor] = []
    for i, a in enumerate(schema.arguments):
        if a.alias_info is not None and a.alias_info.is_write:
            value = args[i] if i < len(args) else kwargs.get(a.name)
            found += [x for x in tree_leaves(value) if isinstance(x, torch.Tensor)]
    return found


def _call(func: Any, tensors: Sequence[torch.Tensor], args: Any, kwargs: Any) -> Any:
    """Run an operation; what involves a tensor without data (meta device) has none either.

    A network too large to run is traced on the meta device, while index and mask arithmetic, which starts
    from constants, still runs on real values.
    """
    on_meta = [x.device.type == "meta" for x in tensors]
    if any(on_meta):
        if not all(on_meta):
            args, kwargs = tree_map(_to_meta, (args, kwargs))
        device = kwargs.get("device")
        if device is not None and torch.device(device).type != "meta":
            kwargs = {**kwargs, "device": torch.device("meta")}
    elif "device" in kwargs and kwargs["device"] is not None and torch.device(kwargs["device"]).type == "meta":
        kwargs = {**kwargs, "device": torch.device("cpu")}
    return func(*args, **kwargs)


def _to_meta(x: Any) -> Any:
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="meta") if isinstance(x, torch.Tensor) else x


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    from torch.utils._python_dispatch import _disable_current_modes

    with _disable_current_modes():
        yield


_UNINITIALISED = {"empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided", "empty_permuted"}
_STAY = {"_to_copy", "clone", "detach", "alias", "contiguous", "view", "expand", "mul", "neg"}
# Operations whose rules know that an operand may hold positions along a dim.
_INDEXING = {
    "index", "_unsafe_index", "index_put", "_index_put_impl", "_unsafe_index_put", "gather", "scatter", "scatter_add",
    "scatter_reduce", "index_add", "index_copy", "index_fill", "index_select", "embedding", "_unsafe_view", "reshape",
    "repeat_interleave",
}  # fmt: skip
# These change what the dims of their operand are, not its values.
_RESHAPE_IN_PLACE = {"transpose_", "t_", "squeeze_", "unsqueeze_", "swapaxes_", "swapdims_"}
_UNIFORM = {"zeros_like", "ones_like", "full_like", "new_zeros", "new_ones", "new_full"}
# Pointwise operations that torch does not tag so.
_POINTWISE = {
    "_to_copy", "clone", "detach", "alias", "lift_fresh", "copy", "fill", "zero", "masked_fill", "where",
    "_conj", "_neg_view", "relu", "lerp", "clamp", "nan_to_num", "native_dropout", "dropout", "bernoulli",
    "contiguous", "_prelu_kernel", "_fw_primal", "hardswish", "log_sigmoid_forward", "mse_loss",
    "smooth_l1_loss", "huber_loss", "binary_cross_entropy", "binary_cross_entropy_with_logits", "special_erf",
    "special_i0", "special_expit", "special_log1p", "polar", "complex", "real", "imag", "floor_divide", "rsub",
    "__and__", "__or__", "__xor__", "__lshift__", "__rshift__", "rrelu_with_noise",
    "_conj_physical", "resolve_conj", "to",
}  # fmt: skip


def _liveness(program: Program, tensors: Mapping[str, torch.Tensor]) -> list[bool]:
    previous = -1
    for _ in range(4):
        live = _record(program, tensors)
        # A first run may fill caches and so do more than the next.
        if len(live) == previous:
            return live
        previous = len(live)
    return live


def _record(program: Program, tensors: Mapping[str, torch.Tensor]) -> list[bool]:
    recorder = Recorder()
    with torch.no_grad(), plain_kernels(), recorder:
        state = torch.get_rng_state()
        torch.manual_seed(0)
        out = program.run(tensors, *program.args, **program.kwargs)
        torch.set_rng_state(state)
    return recorder.live([x for x in tree_leaves(out) if isinstance(x, torch.Tensor)])


def trace(program: Program, make: Callable[[Sequence[bool]], Tracer] = Tracer) -> Trace:
    """Run a program once and read off which axes are the same axis.

    ``make`` gives the tracer from which operations the output depends on. Raises whatever the program itself raises.
    """
    tensors = dict(program.tensors)
    tracer = make(_liveness(program, tensors))
    ledger = tracer.ledger
    labels: dict[str, Label] = {}
    aliases: dict[tuple[Any, ...], str] = {}
    key: tuple[Any, ...]
    for name, tensor in tensors.items():
        key = (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype)
        if not tensor.numel() or tensor.device.type == "meta":
            key = (id(tensor),)
        twin = aliases.setdefault(key, name)
        if twin in labels:
            # Tied weights: one tensor under two names.
            labels[name] = labels[twin]
        else:
            labels[name] = Label(tracer.fresh(tensor.shape), source=(name, tuple(range(tensor.dim()))))
            ledger.observe(labels[name].dims)
        tracer.set(tensor, labels[name])
        tracer.roles.name(name, tensor)
    for x in tree_leaves((program.args, dict(program.kwargs))):
        if isinstance(x, torch.Tensor):
            tracer.set(x, Label(tracer.fresh(x.shape, "input", pinned=True)))
    tracer.touched.clear()
    with torch.no_grad(), plain_kernels(), tracer:
        state = torch.get_rng_state()
        torch.manual_seed(0)
        out = program.run(tensors, *program.args, **program.kwargs)
        torch.set_rng_state(state)
    if tracer._step != len(tracer._live):
        raise WiringError(
            f"the network ({program.origin}) performed {len(tracer._live)} operations in one run and {tracer._step} in "
            "the next on the same inputs, so it cannot be traced; make its forward deterministic"
        )
    outputs, _ = tree_flatten(out)
    for x in outputs:
        if isinstance(x, torch.Tensor):
            tracer.pin(tracer.label(x).dims, "output")
    untouched = tuple(n for n, t in tensors.items() if id(t) not in tracer.touched)
    for name in untouched:
        if not any(labels[name] is labels[n] for n in tensors if n != name and n not in untouched):
            tracer.pin(labels[name].dims, "takes no part in the traced run")
    tracer.pin_unreached(labels)
    return Trace(
        ledger, labels, tracer.missing, untouched, list(ledger.conflicts), tracer.reads,
        tracer.roles.roles(list(tensors)), tracer.activations.of(ledger.leaves),
        tracer.activations.frequencies(ledger.leaves),
    )  # fmt: skip
