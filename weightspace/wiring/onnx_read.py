"""Reading ONNX models: graphs, their constants, and which of their tensors are weights."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from weightspace.errors import CheckpointError, MissingExtraError, WiringError
from weightspace.wiring.onnx_ops import Node, State, floating

if TYPE_CHECKING:
    from weightspace.checkpoint import Checkpoint

MAX_DEPTH = 16  # subgraphs inside subgraphs

# Inputs that set how an operation works rather than what the network learned: never weights.
_SETTINGS = {
    ("Clip", 1), ("Clip", 2), ("Pow", 1), ("Pad", 2), ("Dropout", 1), ("OneHot", 2), ("Upsample", 1),
    ("Resize", 1), ("Resize", 2), ("Range", 0), ("Range", 1), ("Range", 2), ("Mod", 1),
    ("QuantizeLinear", 1), ("DequantizeLinear", 1),
}  # fmt: skip


@dataclass(frozen=True)
class Graph:
    """A graph or subgraph: nodes in order, constants of its own, and which of them are weights."""

    nodes: tuple[Node, ...]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    constants: Mapping[str, Tensor]
    weights: Mapping[str, str]  # names in scope, and the checkpoint's names for them
    name: str = ""


@dataclass(frozen=True)
class Input:
    """A declared input: element type and dimensions (a size, a symbol, or None where nothing is said)."""

    name: str
    dtype: torch.dtype
    dims: tuple[int | str | None, ...]


def load_model(source: str | os.PathLike[str] | Checkpoint) -> tuple[Any, Mapping[str, Tensor]]:
    """The parsed model without its external data, and the checkpoint that holds the tensors."""
    try:
        import onnx
        import onnx.inliner
    except ImportError as error:
        raise MissingExtraError("onnx", "onnx", "reading an ONNX graph") from error
    stored: Mapping[str, Tensor] = {}
    if isinstance(source, (str, os.PathLike)):
        path = Path(source)
    else:
        stored = source
        if source.path is None:
            raise WiringError("the checkpoint has no file: an ONNX graph is read from its .onnx file")
        path = Path(source.path)
    try:
        model = onnx.load(str(path), load_external_data=False)
        complete = not model.functions and _self_contained(model.graph)
        if model.functions:
            model = onnx.inliner.inline_local_functions(model)
    except Exception as error:  # protobuf raises several unrelated types
        raise CheckpointError(f"{path.name} does not parse as an ONNX model: {error}") from error
    if not model.graph.node:
        raise CheckpointError(f"{path.name} holds no ONNX graph: expected a model with nodes")
    if not stored and not complete:
        from weightspace.checkpoint import open as open_checkpoint

        stored = open_checkpoint(path)
    return model, stored


def _subgraphs(graph: Any) -> Iterator[tuple[Any, str]]:
    """The graphs that nodes hold, each with the place that the checkpoint's names give it."""
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.HasField("g"):
                yield attribute.g, f"{node.name or node.output[0] or node.op_type}/{attribute.name}"


def _self_contained(graph: Any) -> bool:
    """Whether every tensor lies in the file, dense."""
    import onnx

    held = [*graph.initializer, *(a.t for n in graph.node for a in n.attribute if a.HasField("t"))]
    if graph.sparse_initializer or any(onnx.external_data_helper.uses_external_data(t) for t in held):
        return False
    return all(_self_contained(inner) for inner, _ in _subgraphs(graph))


def read_graph(model: Any, stored: Mapping[str, Tensor]) -> tuple[Graph, dict[str, Tensor], tuple[Input, ...]]:
    """The main graph, its weights by name (those of subgraphs too), and its declared inputs."""
    version = {("" if o.domain == "ai.onnx" else o.domain): int(o.version) for o in model.opset_import}
    version.setdefault("", 1)
    held = _held(model.graph, "")
    counts = Counter(name for name, _ in held)
    reader = _Reader(version, stored, {}, _setting_names(model.graph), {n for n, c in counts.items() if c > 1})
    graph = reader.graph(model.graph, {}, "", 0)
    own = {name for name, place in held if not place}
    declared = tuple(_read_input(i) for i in model.graph.input if i.name not in own)
    return graph, reader.weights, declared


def _held(graph: Any, place: str) -> list[tuple[str, str]]:
    """Every initialiser and constant of a graph and its subgraphs, with its place."""
    found = [(t.name, place) for t in graph.initializer]
    found += [(t.values.name, place) for t in graph.sparse_initializer]
    found += [(n.output[0], place) for n in graph.node if n.op_type == "Constant" and n.domain in ("", "ai.onnx")]
    for inner, where in _subgraphs(graph):
        found += _held(inner, f"{place}/{where}" if place else where)
    return found


def _setting_names(graph: Any) -> set[str]:
    """Names that are only ever used as settings of operations (limits of a clip, scales of a resize)."""
    setting: set[str] = set()
    learned: set[str] = set()

    def visit(g: Any) -> None:
        for node in g.node:
            for position, name in enumerate(node.input):
                (setting if (node.op_type, position) in _SETTINGS else learned).add(name)
        for inner, _ in _subgraphs(g):
            visit(inner)

    visit(graph)
    return setting - learned


@dataclass(frozen=True)
class _Reader:
    """Reads graphs; ``repeated`` are tensor names that several subgraphs use, told apart by their place."""

    version: Mapping[str, int]
    stored: Mapping[str, Tensor]
    weights: dict[str, Tensor]
    settings: set[str]
    repeated: set[str]

    def is_zero(self, name: str, constants: Mapping[str, Tensor], names: Mapping[str, str]) -> bool:
        tensor = constants.get(name, self.weights.get(names.get(name, "")))
        return tensor is not None and not bool(tensor.any())

    def graph(self, proto: Any, outer: Mapping[str, str], place: str, depth: int) -> Graph:
        if depth > MAX_DEPTH:
            raise WiringError(f"the ONNX graph nests subgraphs deeper than {MAX_DEPTH}: refused")
        constants: dict[str, Tensor] = {}
        names = dict(outer)

        def keep(name: str, read: Callable[[str], Tensor], is_weight: Callable[[Tensor], bool]) -> None:
            full = f"{place}/{name}" if place and name in self.repeated else name
            tensor = read(full)
            known = not self.stored or full in self.stored
            names.pop(name, None)
            if known and name not in self.settings and tensor.dtype in floating and is_weight(tensor):
                self.weights[full] = tensor
                names[name] = full
            else:
                constants[name] = tensor

        for initialiser in proto.initializer:
            keep(
                initialiser.name,
                partial(_read_tensor, initialiser, stored=self.stored),
                lambda t: True,
            )
        for sparse in proto.sparse_initializer:
            keep(sparse.values.name, lambda full: self.stored[full], lambda t: True)
        nodes = []
        for n in proto.node:
            domain = "" if n.domain == "ai.onnx" else n.domain
            if n.op_type == "Constant" and not domain:  # a scalar constant is part of a formula
                keep(
                    n.output[0],
                    partial(_read_constant, n, stored=self.stored),
                    lambda t: t.ndim > 0,
                )
                continue
            attributes: dict[str, Any] = {}
            for a in n.attribute:
                if a.HasField("g"):
                    where = f"{n.name or n.output[0] or n.op_type}/{a.name}"
                    attributes[a.name] = self.graph(a.g, names, f"{place}/{where}" if place else where, depth + 1)
                else:
                    attributes[a.name] = _read_attribute(a)
            version = self.version.get(domain, 1)
            taken = list(n.input)
            if n.op_type in ("LSTM", "GRU", "RNN"):
                for i in range(5, min(7, len(taken))):
                    if self.is_zero(taken[i], constants, names):  # the default; a shared one would tie layers
                        taken[i] = ""
            nodes.append(Node(n.op_type, domain, n.name, tuple(taken), tuple(n.output), attributes, version))
        held = {t.name for t in proto.initializer}
        inputs = tuple(i.name for i in proto.input if i.name not in held)
        return Graph(tuple(nodes), inputs, tuple(o.name for o in proto.output), constants, names, proto.name)


def _read_tensor(proto: Any, name: str, stored: Mapping[str, Tensor]) -> Tensor:
    import onnx

    if name in stored:
        return stored[name].detach()
    if onnx.external_data_helper.uses_external_data(proto):
        raise WiringError(
            f"tensor {name!r} lies in an external file: open the checkpoint with weightspace.open and pass that"
        )
    kind = proto.data_type
    if kind in (onnx.TensorProto.STRING, onnx.TensorProto.UNDEFINED):
        raise WiringError(f"tensor {name!r} of the ONNX graph has no numeric type")
    array = onnx.numpy_helper.to_array(proto)
    if kind == onnx.TensorProto.BFLOAT16:
        return torch.from_numpy(array.astype("float32").copy()).to(torch.bfloat16)
    return torch.from_numpy(array.copy())


def _read_constant(node: Any, name: str, stored: Mapping[str, Tensor]) -> Tensor:
    value = node.attribute[0]
    if value.name == "value":
        return _read_tensor(value.t, name, stored)
    if value.name in ("value_float", "value_floats"):
        return torch.tensor(_read_attribute(value), dtype=torch.float32)
    if value.name in ("value_int", "value_ints"):
        return torch.tensor(_read_attribute(value), dtype=torch.int64)
    raise WiringError(f"Constant node {node.name or node.output[0]!r} holds {value.name!r}: only numbers are supported")


def _read_attribute(attribute: Any) -> Any:
    import onnx

    kind = attribute.type
    if kind == onnx.AttributeProto.TENSOR:
        return _read_tensor(attribute.t, "", {})
    if kind in (onnx.AttributeProto.SPARSE_TENSOR, onnx.AttributeProto.TYPE_PROTO):
        return None
    if kind == onnx.AttributeProto.UNDEFINED:  # the first files did not say which field they use
        value = next((getattr(attribute, f) for f in ("i", "f", "s") if attribute.HasField(f)), None)
        if value is None:
            value = next((v for v in (attribute.ints, attribute.floats, attribute.strings) if v), ())
    else:
        value = onnx.helper.get_attribute_value(attribute)
    if isinstance(value, bytes):
        return value.decode("utf-8", "replace")
    if isinstance(value, (int, float)):
        return value
    return [v.decode("utf-8", "replace") if isinstance(v, bytes) else v for v in value]


def _read_input(proto: Any) -> Input:
    if not proto.type.HasField("tensor_type"):
        raise WiringError(f"input {proto.name!r} of the ONNX graph is not a tensor: pass example inputs by name")
    kind = proto.type.tensor_type
    dtype = State.dtypes().get(kind.elem_type)
    if dtype is None:
        raise WiringError(f"input {proto.name!r} has ONNX element type {kind.elem_type}: only numbers are supported")
    dims: list[int | str | None] = [
        int(d.dim_value) if d.HasField("dim_value") and d.dim_value > 0 else (d.dim_param or None)
        for d in kind.shape.dim
    ]
    return Input(proto.name, dtype, tuple(dims))
