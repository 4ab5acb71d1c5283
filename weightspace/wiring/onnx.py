"""Programs from ONNX files: a graph's nodes interpreted in plain torch, one function per operation.

The file is parsed with the onnx package and nothing in it is executed: nodes are looked up in the table
of :mod:`weightspace.wiring.onnx_ops`, and one that is missing there is refused by name. Float
initialisers and float constants are the program's tensors, named as in the checkpoint; integers (shapes,
indices, axes) stay constants.
"""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from weightspace.errors import WiringError
from weightspace.wiring import onnx_layers, onnx_shapes  # noqa: F401  (they fill the table)
from weightspace.wiring.onnx_ops import OPS, Node, State, floating, numbers
from weightspace.wiring.onnx_read import Graph, Input, load_model, read_graph
from weightspace.wiring.program import Program

if TYPE_CHECKING:
    from weightspace.checkpoint import Checkpoint

MAX_TRIPS = 4096  # iterations of one Loop or Scan

_CONTROL_FLOW = frozenset({"If", "Loop", "Scan", "Constant"})
_FREE_SIZES = (8, 16, 32, 64, 128, 224, 256, 512, 576, 1024, 4096, 16000)


@dataclass
class _Values:
    """Values of one scope; ``fixed`` names those that no weight and no float input reaches."""

    of: dict[str, Any] = field(default_factory=dict)
    fixed: set[str] = field(default_factory=set)

    def child(self) -> _Values:
        return _Values(dict(self.of), set(self.fixed))


def program_from_onnx(
    source: str | os.PathLike[str] | Checkpoint, inputs: Mapping[str, Tensor] | None = None
) -> Program:
    """The network of an ONNX file as a pure torch function of its named tensors.

    Args:
        source: the file, or its opened checkpoint.
        inputs: example inputs by name, where the declared shapes are not enough to make them.

    Example inputs follow the declared shapes: a batch of 2 wherever the graph takes one, the declared
    batch elsewhere; free lengths are the smallest that the graph runs on. Tensors that the example does
    not reach (a branch not taken) are left out of ``program.tensors`` and named in ``program.notes``.

    Raises:
        WiringError: an operation without an interpretation (named with its domain and node), or no
            example input that the graph runs on.
        CheckpointError: the file does not parse.
        MissingExtraError: the onnx package is not installed.
    """
    model, stored = load_model(source)
    graph, weights, declared = read_graph(model, stored)
    _refuse_unsupported(graph)

    def run(tensors: Mapping[str, Tensor], *args: Tensor) -> tuple[Any, ...]:
        return evaluate(graph, {**weights, **tensors}, dict(zip(graph.inputs, args, strict=True)))[0]

    args = _example_inputs(graph, weights, declared, dict(inputs or {}))
    used = evaluate(graph, weights, dict(zip(graph.inputs, args, strict=True)))[1]
    notes = [f"opset {max((o.version for o in model.opset_import if o.domain in ('', 'ai.onnx')), default=1)}"]
    if idle := [name for name in weights if name not in used]:
        notes.append(f"tensors that the example inputs do not reach: {', '.join(idle)}")
    tensors = {name: tensor for name, tensor in weights.items() if name in used}
    if not tensors:
        raise WiringError("the ONNX graph holds no float tensor that its outputs depend on: nothing to wire")
    return Program(tensors, run, args, origin="onnx", notes=tuple(notes))


def _refuse_unsupported(graph: Graph) -> None:
    """Raises for operations that will certainly run; those inside branches are refused when reached."""
    for node in graph.nodes:
        _lookup(node)


def _lookup(node: Node) -> Any:
    if node.domain == "" and node.op in _CONTROL_FLOW:
        return None
    function = OPS.get((node.domain, node.op))
    if function is None:
        raise WiringError(
            f"ONNX operation {node.op!r} (domain {node.domain or 'ai.onnx'!r}, opset {node.version}, node "
            f"{node.name or ', '.join(node.outputs)!r}) has no interpretation: add one to "
            "weightspace/wiring/onnx_ops.py"
        )
    return function


# ---- running -------------------------------------------------------------------------------------


def evaluate(
    graph: Graph, weights: Mapping[str, Tensor], inputs: Mapping[str, Tensor]
) -> tuple[tuple[Any, ...], set[str]]:
    """Runs the main graph: its outputs in order, and the names of the weights that were reached."""
    used: set[str] = set()
    state = State(wide=any(t.dtype == torch.float64 for t in weights.values()))
    values = _Values()
    for name, value in inputs.items():
        if not isinstance(value, Tensor):
            raise WiringError(f"input {name!r} is {type(value).__name__}: expected a tensor")
        values.of[name] = value.to(torch.float64) if state.wide and value.dtype in floating else value
        if value.ndim == 0 and value.dtype not in floating:  # a setting such as a sampling rate
            values.fixed.add(name)
    _evaluate(graph, values, weights, used, state)
    return tuple(_fetch(name, graph, values, weights, used) for name in graph.outputs), used


def _fetch(name: str, graph: Graph, values: _Values, weights: Mapping[str, Tensor], used: set[str]) -> Any:
    if name in values.of:
        return values.of[name]
    if name in graph.weights:
        full = graph.weights[name]
        used.add(full)
        return weights[full]
    raise WiringError(f"the ONNX graph {graph.name!r} uses {name!r}, which no node, input or initialiser defines")


def _evaluate(graph: Graph, values: _Values, weights: Mapping[str, Tensor], used: set[str], state: State) -> None:
    for name, constant in graph.constants.items():
        values.of[name] = constant.double() if state.wide and constant.dtype in floating else constant
        values.fixed.add(name)
    for node in graph.nodes:
        function = _lookup(node)
        args = [_fetch(name, graph, values, weights, used) if name else None for name in node.inputs]
        fixed = all(not name or name in values.fixed for name in node.inputs)
        results: Any
        if function is None:
            results = _control_flow(node, args, values, weights, used, state)
        else:
            # Arithmetic on shapes is no part of the network: a tracer need not see it.
            whole = all(not isinstance(a, Tensor) or a.dtype not in floating for a in args)
            shape = node.op in ("Shape", "Size")
            quiet: AbstractContextManager[Any] = nullcontext()
            if shape or (fixed and whole and node.op != "ConstantOfShape"):
                quiet = _disable_current_modes()
            try:
                with quiet:
                    results = function(node, args, state)
            except WiringError:
                raise
            except Exception as error:
                raise _failure(node, args, error) from error
            fixed = fixed or shape
        if not isinstance(results, tuple):
            results = (results,)
        for name, value in zip(node.outputs, results, strict=False):
            if name:
                values.of[name] = value
                if fixed:
                    values.fixed.add(name)


def _failure(node: Node, args: Sequence[Any], error: Exception) -> WiringError:
    shapes = ", ".join(str(tuple(a.shape)) if isinstance(a, Tensor) else str(a) for a in args)
    return WiringError(
        f"ONNX node {node.name or node.outputs[0]!r} ({node.op}) could not run on shapes {shapes}: {error}"
    )


def _control_flow(
    node: Node, args: list[Any], values: _Values, weights: Mapping[str, Tensor], used: set[str], state: State
) -> tuple[Any, ...]:
    def call(body: Graph, arguments: Sequence[Any], fixed: Sequence[bool]) -> list[Any]:
        inner = values.child()
        for name, value, is_fixed in zip(body.inputs, arguments, fixed, strict=True):
            inner.of[name] = value
            (inner.fixed.add if is_fixed else inner.fixed.discard)(name)
        _evaluate(body, inner, weights, used, state)
        return [_fetch(name, body, inner, weights, used) for name in body.outputs]

    if node.op == "If":
        branch = "then_branch" if numbers(args[0].reshape(-1))[0] else "else_branch"
        return tuple(call(node.attrs[branch], (), ()))
    if node.op == "Scan":
        return _scan(node, args, call)
    body = node.attrs["body"]
    trips = MAX_TRIPS + 1 if args[0] is None else int(numbers(args[0].reshape(-1))[0])
    if args[0] is not None and trips > MAX_TRIPS:
        raise WiringError(f"ONNX Loop {node.name!r} asks for {trips} iterations: at most {MAX_TRIPS} are run")
    go = torch.tensor(True) if args[1] is None else args[1]
    carried = args[2:]
    scanned: list[list[Any]] = [[] for _ in body.outputs[1 + len(carried) :]]
    for trip in range(trips):
        if not numbers(go.reshape(-1))[0]:
            break
        if trip == MAX_TRIPS:
            raise WiringError(f"ONNX Loop {node.name!r} did not end within {MAX_TRIPS} iterations")
        fixed = [True, True] + [False] * len(carried)
        go, *rest = call(body, [torch.tensor(trip), go, *carried], fixed)
        carried = rest[: len(carried)]
        for column, value in zip(scanned, rest[len(carried) :], strict=True):
            column.append(value)
    if any(not column for column in scanned):
        raise WiringError(f"ONNX Loop {node.name!r} ran no iteration, so its outputs have no shape")
    return (*carried, *(torch.stack(column) for column in scanned))


def _scan(node: Node, args: list[Any], call: Any) -> tuple[Any, ...]:
    body, scans = node.attrs["body"], int(node.attrs["num_scan_inputs"])
    kept = len(args) - scans
    for setting in ("scan_input_axes", "scan_input_directions", "scan_output_axes", "scan_output_directions"):
        if any(node.attrs.get(setting, [])):
            raise WiringError(f"ONNX Scan {node.name!r} sets {setting}: only forward scans of axis 0 are supported")
    carried, sequences = args[:kept], args[kept:]
    if sequences[0].shape[0] > MAX_TRIPS:
        raise WiringError(f"ONNX Scan {node.name!r} runs over {sequences[0].shape[0]} steps: at most {MAX_TRIPS}")
    columns: list[list[Any]] = [[] for _ in body.outputs[kept:]]
    for items in zip(*(s.unbind(0) for s in sequences), strict=True):
        results = call(body, [*carried, *items], [False] * len(args))
        carried = results[:kept]
        for column, value in zip(columns, results[kept:], strict=True):
            column.append(value)
    return (*carried, *(torch.stack(column) for column in columns))


# ---- example inputs --------------------------------------------------------------------------------


def _example_inputs(
    graph: Graph, weights: Mapping[str, Tensor], declared: Sequence[Input], given: Mapping[str, Tensor]
) -> tuple[Tensor, ...]:
    """The first example, in order of preference, that the graph runs on and answers with finite numbers."""
    if unknown := set(given) - {i.name for i in declared}:
        raise WiringError(
            f"the ONNX graph has no input {', '.join(sorted(unknown))}: its inputs are "
            f"{', '.join(i.name for i in declared)}"
        )
    first: dict[bool, Exception] = {}  # by whether the batch was other than declared
    for sizes, batched in _sizes(declared):
        for tokens in _token_ranges(declared):
            for switches in _switches(graph, declared):
                args = tuple(
                    given[i.name] if i.name in given else _draw(i, s, tokens, switches.get(i.name))
                    for i, s in zip(declared, sizes, strict=True)
                )
                try:
                    if _runs(graph, weights, args, batched):
                        return args
                except WiringError as error:
                    if "has no interpretation" in str(error):
                        raise
                    first.setdefault(batched, error)
    shapes = ", ".join(f"{i.name}: {list(i.dims)}" for i in declared)
    raise WiringError(
        f"no example input was found that the ONNX graph runs on (declared {shapes}); pass `inputs=` by "
        f"name. First failure: {first.get(False) or first.get(True) or 'outputs were empty or not finite'}"
    )


def _sizes(declared: Sequence[Input]) -> Iterator[tuple[list[tuple[int, ...]], bool]]:
    """Shapes to try, and whether the leading dimension was declared otherwise than it is tried."""
    batch: set[Any] = {"batch", "batch_size", "N", "n"} | {i.dims[0] for i in declared if i.dims and i.dims[0]}
    batch = {b for b in batch if isinstance(b, str)}
    free = any(
        not isinstance(d, int) and d not in batch and (d is not None or p)
        for i in declared
        for p, d in enumerate(i.dims)
    )
    leading = [i for i in declared if i.dtype in floating and len(i.dims) > 1 and isinstance(i.dims[0], int)]
    for other in _FREE_SIZES if free else (0,):
        shapes = [
            tuple(
                d if isinstance(d, int) else 2 if d in batch or (d is None and p == 0) else other
                for p, d in enumerate(i.dims)
            )
            for i in declared
        ]
        if leading and any(i.dims[0] != 2 for i in leading):
            yield [(2, *s[1:]) if i in leading else s for i, s in zip(declared, shapes, strict=True)], True
        yield shapes, False


def _token_ranges(declared: Sequence[Input]) -> tuple[int, ...]:
    return (64, 8, 2, 1) if any(i.dtype not in floating and i.dims for i in declared) else (1,)


def _switches(graph: Graph, declared: Sequence[Input]) -> Iterator[dict[str, int]]:
    """Values for whole-number scalars: those the graph compares them with, then a sampling rate, then one."""
    choices = []
    for i in declared:
        if i.dtype in floating or i.dims:
            continue
        same, values = {i.name}, []
        for node in graph.nodes:
            if node.op in ("Cast", "Identity") and node.inputs[0] in same:
                same.add(node.outputs[0])
            elif node.op in ("Equal", "Greater", "Less") and same & set(node.inputs):
                other = next((n for n in node.inputs if n not in same), "")
                if other in graph.constants:
                    values += [int(v) for v in numbers(graph.constants[other].reshape(-1))[:4]]
        preferred = [16000] if i.name in ("sr", "sample_rate", "sampling_rate") else []
        choices.append([(i.name, v) for v in dict.fromkeys([*preferred, *values, 1])])
    for combination in itertools.islice(itertools.product(*choices), 32):
        yield dict(combination)


def _draw(declared: Input, shape: tuple[int, ...], tokens: int, switch: int | None) -> Tensor:
    if math.prod(shape) > 1 << 26:
        raise WiringError(f"input {declared.name!r} of shape {shape} is too large for an example")
    seed = torch.Generator().manual_seed(len(declared.name) + sum(map(ord, declared.name)))
    if declared.dtype in floating:
        return torch.randn(shape, generator=seed).to(declared.dtype)
    if declared.dtype == torch.bool or "mask" in declared.name.lower():
        return torch.ones(shape, dtype=declared.dtype)
    if not shape:
        return torch.tensor(1 if switch is None else switch, dtype=declared.dtype)
    if "position" in declared.name.lower():
        return torch.arange(shape[-1]).expand(shape).to(declared.dtype)
    top = min(tokens, 2) if "type" in declared.name.lower() else tokens
    return torch.randint(0, top, shape, generator=seed).to(declared.dtype)


def _runs(graph: Graph, weights: Mapping[str, Tensor], args: tuple[Tensor, ...], batched: bool) -> bool:
    """Whether the graph answers with finite numbers, and treats a batch it did not declare as a batch."""

    def outputs(arguments: Sequence[Tensor]) -> list[Tensor]:
        results = evaluate(graph, weights, dict(zip(graph.inputs, arguments, strict=True)))[0]
        return [r for r in results if isinstance(r, Tensor)]

    with torch.no_grad():
        answers = outputs(args)
        if not answers or any(a.numel() == 0 or not bool(torch.isfinite(a.double()).all()) for a in answers):
            return False
        if not batched:
            return True
        one = [a[:1] if a.ndim > 1 and a.dtype in floating else a for a in args]
        for whole, single in zip(answers, outputs(one), strict=True):
            if whole.ndim == 0 or whole.shape[0] != 2 or single.shape != whole[:1].shape:
                return False
            if not torch.allclose(whole[:1].double(), single.double(), rtol=1e-3, atol=1e-5):
                return False
    return True
