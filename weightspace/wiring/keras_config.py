"""Reading Keras model configurations: layers, and their calls in an order that can be run."""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from weightspace.errors import WiringError
from weightspace.wiring.keras_layers import LAYERS

MODELS = frozenset({"Sequential", "Functional", "Model"})
MAX_CALLS = 100_000  # of layers, in one model
MAX_DEPTH = 16  # models inside models

Reference = tuple[str, int, int]  # the tensor: layer, which of its calls, which of its outputs


@dataclass(frozen=True)
class Layer:
    """A layer of the configuration; ``inner`` is its model if it is one, or the layers it wraps.

    ``names`` are the layer names from the outermost model inwards, ``place`` the path that the Keras 3
    format (``.keras``) gives it.
    """

    name: str
    kind: str
    config: Mapping[str, Any]
    names: tuple[str, ...]
    place: str
    inner: Model | None = None
    wrapped: Mapping[str, Layer] = field(default_factory=dict)


@dataclass(frozen=True)
class Step:
    """One call of a layer: positional and keyword arguments hold references or constants."""

    layer: Layer
    index: int
    args: Any
    kwargs: Mapping[str, Any]


@dataclass(frozen=True)
class Model:
    """Calls in an order in which each finds its arguments, with the model's inputs and outputs."""

    steps: tuple[Step, ...]
    inputs: tuple[Reference, ...]
    outputs: tuple[Reference, ...]
    layers: Mapping[str, Layer]


def read_model(kind: str, config: Any, names: tuple[str, ...], place: str, depth: int) -> Model:
    """A Sequential or Functional configuration as calls in order."""
    if depth > MAX_DEPTH:
        raise WiringError(f"the Keras model nests models deeper than {MAX_DEPTH}: refused")
    listed = config.get("layers") if isinstance(config, Mapping) else config
    if not isinstance(listed, Sequence) or not listed or not all(isinstance(item, Mapping) for item in listed):
        raise WiringError("the Keras configuration has no list of layers")
    counts: dict[str, int] = {}
    layers: dict[str, Layer] = {}
    for item in listed:
        layer = _read_layer(item, names, place, counts, depth)
        if layer.name in layers:
            raise WiringError(f"two Keras layers are called {layer.name!r}: names must differ")
        layers[layer.name] = layer
    if kind == "Sequential" or not any("inbound_nodes" in item for item in listed):
        return _sequential(layers)
    inbound = {str(i["name"]): list(i.get("inbound_nodes") or []) for i in listed}
    return _functional(config, layers, inbound)


def _read_layer(
    item: Mapping[str, Any], names: tuple[str, ...], place: str, counts: dict[str, int], depth: int
) -> Layer:
    if depth > MAX_DEPTH:
        raise WiringError(f"the Keras model nests layers deeper than {MAX_DEPTH}: refused")
    kind, config = str(item.get("class_name")), item.get("config")
    settings: Mapping[str, Any] = config if isinstance(config, Mapping) else {}
    name = str(item.get("name") or settings.get("name") or kind.lower())
    is_operation = str(item.get("module") or "").startswith(("keras.src.ops", "keras.ops"))
    # The HDF5 format leaves out the module: what has no layer's settings is a function.
    bare = "trainable" not in settings and "module" not in item
    is_operation = is_operation or ("ops." + kind in LAYERS and (kind not in LAYERS or bare))
    key = "ops." + kind if is_operation else kind
    if kind == "Lambda":
        raise WiringError(f"Keras layer {name!r} is a Lambda: it holds code, which is never executed")
    if kind not in MODELS and key not in LAYERS:
        raise WiringError(
            f"Keras layer {name!r} of class {kind!r} has no interpretation: add one to "
            "weightspace/wiring/keras_layers.py"
        )
    here = place
    if not is_operation:
        snake = re.sub(r"([a-z])([A-Z])", r"\1_\2", re.sub(r"(.)([A-Z][a-z0-9]+)", r"\1_\2", re.sub(r"\W+", "", kind)))
        snake = snake.lower()
        count = counts.get(snake, 0)
        counts[snake] = count + 1
        here = f"{place}layers/{snake}{f'_{count}' if count else ''}/"
    path = (*names, name)
    if kind in MODELS:
        return Layer(name, kind, settings, path, here, read_model(kind, config, path, here, depth + 1), {})
    wrapped: dict[str, Layer] = {}
    if kind in ("Bidirectional", "TimeDistributed") or (kind == "RNN" and "cell" in settings):
        wrapped = _read_wrapped(kind, settings, path, here, depth)
    return Layer(name, key, settings, path, here, None, wrapped)


def _read_wrapped(
    kind: str, settings: Mapping[str, Any], path: tuple[str, ...], place: str, depth: int
) -> dict[str, Layer]:
    def inside(item: Mapping[str, Any], at: str, prefix: str = "") -> Layer:
        layer = _read_layer(item, (*path, prefix), place, {}, depth + 1)
        inner = layer.inner
        if inner is not None:  # a model inside TimeDistributed: its layers lie below `layer/`
            inner = read_model(layer.kind, item.get("config"), layer.names, at, depth + 1)
        return Layer(layer.name, layer.kind, layer.config, layer.names, at, inner, layer.wrapped)

    if kind == "RNN":
        return {"cell": inside(settings["cell"], place + "cell/")}
    if kind == "TimeDistributed":
        return {"layer": inside(settings["layer"], place + "layer/")}
    backward = settings.get("backward_layer") or settings["layer"]
    return {
        "forward": inside(settings["layer"], place + "forward_layer/", "forward"),
        "backward": inside(backward, place + "backward_layer/", "backward"),
    }


def _sequential(layers: Mapping[str, Layer]) -> Model:
    steps: list[Step] = []
    previous: Reference | None = None
    for layer in layers.values():
        if layer.kind == "InputLayer":
            previous = (layer.name, 0, 0)
            continue
        if previous is None:
            previous = ("", 0, 0)  # the input of a model that starts with a computing layer
        steps.append(Step(layer, 0, [previous], {}))
        previous = (layer.name, 0, 0)
    first = next(iter(layers.values()))
    start = (first.name, 0, 0) if first.kind == "InputLayer" else ("", 0, 0)
    if previous is None:
        raise WiringError("the Keras model has no layer that computes")
    return Model(tuple(steps), (start,), (previous,), layers)


def _functional(config: Mapping[str, Any], layers: Mapping[str, Layer], inbound: Mapping[str, list[Any]]) -> Model:
    shift = {  # some writers count the creation of an inner model as its first call
        name: 1
        for name, layer in layers.items()
        if layer.inner is not None and _highest(inbound, config, name) >= len(inbound[name]) > 0
    }
    pending: list[Step] = []
    for name, layer in layers.items():
        for index, node in enumerate(inbound[name]):
            if isinstance(node, Mapping):
                args, kwargs = (
                    _references(node.get("args", []), shift),
                    _references(node.get("kwargs", {}), shift),
                )
            else:
                args, kwargs = _legacy_node(node, shift)
            pending.append(Step(layer, index, args, kwargs))
    if len(pending) > MAX_CALLS:
        raise WiringError(f"the Keras model makes {len(pending):,} calls of layers: at most {MAX_CALLS:,} are run")
    steps = _in_order(pending, {(name, 0) for name, nodes in inbound.items() if not nodes})
    inputs = references_in(_references(config.get("input_layers", []), shift))
    outputs = references_in(_references(config.get("output_layers", []), shift))
    if not inputs or not outputs:
        raise WiringError("the Keras configuration names no input_layers or no output_layers")
    return Model(tuple(steps), tuple(inputs), tuple(outputs), layers)


def _in_order(pending: Sequence[Step], ready: set[tuple[str, int]]) -> list[Step]:
    """Calls sorted so that each comes after those whose outputs it takes."""
    missing = [{r[:2] for r in references_in((s.args, s.kwargs))} - ready for s in pending]
    users: dict[tuple[str, int], list[int]] = {}
    for i, needs in enumerate(missing):
        for need in needs:
            users.setdefault(need, []).append(i)
    queue = deque(i for i, needs in enumerate(missing) if not needs)
    steps: list[Step] = []
    while queue:
        step = pending[queue.popleft()]
        steps.append(step)
        for i in users.pop((step.layer.name, step.index), []):
            missing[i].discard((step.layer.name, step.index))
            if not missing[i]:
                queue.append(i)
    if len(steps) < len(pending):
        stuck = sorted({s.layer.name for s, needs in zip(pending, missing, strict=True) if needs})
        raise WiringError(f"the Keras layers {', '.join(stuck[:5])} wait for tensors that no layer makes")
    return steps


def _is_reference(value: Any) -> bool:
    return (
        isinstance(value, (list, tuple))
        and len(value) in (3, 4)
        and isinstance(value[0], str)
        and all(isinstance(v, int) and not isinstance(v, bool) for v in value[1:3])
        and (len(value) == 3 or isinstance(value[3], Mapping))
    )


def _references(value: Any, shift: Mapping[str, int]) -> Any:
    """A configured argument with every tensor in it as a reference."""
    if isinstance(value, Mapping):
        if value.get("class_name") == "__keras_tensor__":
            return _references(value["config"]["keras_history"], shift)
        return {k: _references(v, shift) for k, v in value.items()}
    if _is_reference(value):
        return (value[0], int(value[1]) - shift.get(value[0], 0), int(value[2]))
    if isinstance(value, (list, tuple)):
        return [_references(v, shift) for v in value]
    return value


def _legacy_node(node: Any, shift: Mapping[str, int]) -> tuple[list[Any], dict[str, Any]]:
    """Keras 1 and 2: a list of [layer, call, output, keyword arguments]."""
    entries = [node] if _is_reference(node) else list(node)
    if not all(_is_reference(e) for e in entries):
        raise WiringError(f"Keras inbound node {str(node)[:120]} is not a list of tensors: not supported")
    kwargs: dict[str, Any] = {}
    for entry in entries:
        if len(entry) == 4:
            kwargs |= _references(entry[3], shift)
    tensors = [_references(entry[:3], shift) for entry in entries]
    return [tensors if len(tensors) > 1 else tensors[0]], kwargs


def references_in(value: Any) -> list[Reference]:
    if isinstance(value, tuple) and len(value) == 3 and isinstance(value[0], str):
        return [value]
    if isinstance(value, Mapping):
        value = list(value.values())
    return [r for v in value for r in references_in(v)] if isinstance(value, (list, tuple)) else []


def _highest(inbound: Mapping[str, list[Any]], config: Mapping[str, Any], name: str) -> int:
    used = references_in(_references([list(inbound.values()), config.get("output_layers", [])], {}))
    return max((r[1] for r in used if r[0] == name), default=-1)


def all_layers(model: Model) -> Iterator[Layer]:
    for layer in model.layers.values():
        yield from _with_wrapped(layer)


def _with_wrapped(layer: Layer) -> Iterator[Layer]:
    yield layer
    if layer.inner is not None:
        yield from all_layers(layer.inner)
    for wrapped in layer.wrapped.values():
        yield from _with_wrapped(wrapped)
