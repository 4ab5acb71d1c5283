"""Programs from Keras files: a model's own configuration interpreted in plain torch, layer by layer.

The configuration is JSON that says which layers there are and how they are connected; nothing in it is
executed, and a layer that holds code (Lambda) or has no interpretation in
:mod:`weightspace.wiring.keras_layers` is refused by name. Parameters stay in the file's layout
(kernels as height, width, in, out) under the names of the checkpoint.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from weightspace.errors import WiringError
from weightspace.wiring import keras_merge, keras_sequence  # noqa: F401  (they fill the table)
from weightspace.wiring.keras_config import (
    MODELS,
    Layer,
    Model,
    Reference,
    all_layers,
    read_model,
    references_in,
)
from weightspace.wiring.keras_layers import LAYERS, Call, roles_of
from weightspace.wiring.program import Program

if TYPE_CHECKING:
    from weightspace.checkpoint import Checkpoint


_FREE_SIZES = (4, 8, 16, 32, 64, 96, 128, 224, 512, 1024)
_FLOATING = frozenset({torch.float16, torch.bfloat16, torch.float32, torch.float64})
_OTHER_NAMES = {
    "depthwise_kernel": ("depthwise_kernel", "kernel"), "kernel": ("kernel", "W"), "bias": ("bias", "b"),
    "moving_mean": ("moving_mean", "running_mean"), "moving_variance": ("moving_variance", "running_std"),
    "embeddings": ("embeddings", "W"), "alpha": ("alpha", "alphas"),
}  # fmt: skip


def program_from_keras(source: str | os.PathLike[str] | Checkpoint, inputs: Sequence[Tensor] | None = None) -> Program:
    """The network of a Keras file (``.h5``, ``.hdf5``, ``.keras``) that holds its configuration.

    Raises:
        WiringError: the file holds weights only, or a layer has no interpretation.
    """
    if isinstance(source, (str, os.PathLike)):
        from weightspace.checkpoint import open as open_checkpoint

        checkpoint = open_checkpoint(os.fspath(source))
    else:
        checkpoint = source
    config = checkpoint.metadata.get("model_config") or checkpoint.config
    if isinstance(config, (str, bytes)):
        try:
            config = json.loads(config)
        except ValueError as error:
            raise WiringError(f"the Keras file's model_config is not JSON: {error}") from error
    if not isinstance(config, Mapping) or "class_name" not in config:
        raise WiringError(
            "the Keras file holds weights without a model_config: wire it through the catalogue, or pass the "
            "configuration to program_from_keras_config"
        )
    version = str(checkpoint.metadata.get("keras_version") or config.get("keras_version") or "")
    return program_from_keras_config(config, checkpoint, keras_version=version, inputs=inputs)


def program_from_keras_config(
    config: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    *,
    keras_version: str = "",
    inputs: Sequence[Tensor] | None = None,
) -> Program:
    """The network that a Keras model configuration describes, on tensors named by their path in the file.

    Args:
        config: ``{"class_name": "Sequential" | "Functional" | "Model", "config": {...}}``, as Keras
            writes it.
        tensors: by path, with or without ``model_weights/`` in front; what belongs to no layer (optimiser
            state) is left out of the program.
        keras_version: of the writer; decides what ``hard_sigmoid`` means.
        inputs: example inputs, where the configuration does not say enough to make them.

    Raises:
        WiringError: a layer without an interpretation, one that holds code, a weight that is missing, or
            no example input that the model runs on.
    """
    kind = str(config.get("class_name"))
    if kind not in MODELS:
        raise WiringError(f"Keras model of class {kind!r}: expected Sequential or Functional (a subclass is code)")
    try:
        model = read_model(kind, config.get("config"), (), "", 0)
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        raise WiringError(f"the Keras configuration is malformed: {type(error).__name__}: {error}") from error
    major = int(keras_version.split(".")[0]) if keras_version[:1].isdigit() else 2
    weights = _bind(model, tensors)
    held = {name: tensors[name] for name in dict.fromkeys(weights.values())}
    if not held:
        raise WiringError("the Keras model has no weights: nothing to wire")
    context = _Context(weights, major)

    def run(values: Mapping[str, Tensor], *args: Tensor) -> Any:
        dtype = next((t.dtype for t in values.values() if t.dtype in _FLOATING), torch.float32)
        cast = [a.to(dtype) if a.dtype in _FLOATING else a for a in args]
        outputs = _run_model(model, {**held, **values}, cast, context)
        return outputs[0] if len(outputs) == 1 else tuple(outputs)

    args = tuple(inputs) if inputs is not None else _example_inputs(model, lambda *a: run(held, *a))
    notes = [f"keras {keras_version}"] if keras_version else []
    if any(layer.config.get("mask_zero") or layer.kind == "Masking" for layer in all_layers(model)):
        notes.append("masks are not modelled: example inputs hold no masked step")
    return Program(held, run, args, origin="keras", notes=tuple(notes))


# ---- binding weights to names ----------------------------------------------------------------------

Weight = tuple[str, str]  # (layer's key, role)


def _key(layer: Layer) -> str:
    return "\0".join(layer.names)


def _bind(model: Model, tensors: Mapping[str, Tensor]) -> dict[Weight, str]:
    """The checkpoint's name of every weight that a layer of the model has."""
    by_place = any("/vars/" in f"/{name}" for name in tensors)
    bound: dict[Weight, str] = {}
    taken: set[str] = set()
    groups: dict[str, list[tuple[str, tuple[str, ...]]]] = {}
    for name in tensors:
        parts = tuple(name.removeprefix("model_weights/").split("/"))
        groups.setdefault(parts[0], []).append((name, parts[1:]))
    for layer in all_layers(model):
        for part, role, index in roles_of(layer.kind, layer.config):
            found = _by_place(layer, part, index, tensors) if by_place else _by_name(layer, part, role, groups)
            if found is None:
                raise WiringError(
                    f"Keras layer {'/'.join(n for n in layer.names if n)!r} ({layer.kind}) has no weight "
                    f"{part + '/' if part else ''}{role} among the {len(tensors)} tensors of the file"
                )
            if found in taken:
                raise WiringError(f"tensor {found!r} fits two weights of the Keras model: its names are ambiguous")
            taken.add(found)
            bound[_key(layer), f"{part}/{role}" if part else role] = found
    return bound


_PARTS = {
    "query": "query_dense",
    "key": "key_dense",
    "value": "value_dense",
    "attention_output": "output_dense",
}


def _by_place(layer: Layer, part: str, index: int, tensors: Mapping[str, Tensor]) -> str | None:
    inside = f"{_PARTS.get(part, part)}/" if part else ""
    for prefix in (layer.place, layer.place.replace("layers/", "_layer_checkpoint_dependencies/", 1)):
        for lead in ("", "model.weights.h5/"):
            for own in ("", "_"):
                if (name := f"{lead}{prefix}{own if inside else ''}{inside}vars/{index}") in tensors:
                    return name
    return None


def _by_name(layer: Layer, part: str, role: str, groups: Mapping[str, list[tuple[str, tuple[str, ...]]]]) -> str | None:
    """The tensor below the outermost layer's group whose path fits the inner names and the role best."""
    roles = _OTHER_NAMES.get(role, (role,))
    inner = [n for n in layer.names[1:] if n] + ([part] if part and part != "cell" else [])
    best: list[tuple[int, int, str]] = []
    for name, parts in groups.get(layer.names[0], []):
        last = (parts[-1] if parts else name).split(":")[0]
        order = next(
            (i for i, r in enumerate(roles) if last == r or (last.endswith(f"_{r}") and r in ("W", "b"))),
            None,
        )
        if order is None and (last.endswith("_" + role) and role in ("gamma", "beta", *roles)):
            order = len(roles)
        if order is None:
            continue
        score = sum(any(p.split(":")[0] == n or p.startswith(n + "_") for p in parts[:-1]) for n in inner)
        exact = sum(n in parts[:-1] for n in inner)
        best.append((score * 100 + exact * 10 - order, -len(best), name))
    return max(best)[2] if best else None


# ---- running ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Context:
    weights: Mapping[Weight, str]
    major: int


def _run_model(model: Model, tensors: Mapping[str, Tensor], args: Sequence[Tensor], context: _Context) -> list[Any]:
    if len(args) != len(model.inputs):
        raise WiringError(f"the Keras model takes {len(model.inputs)} inputs: {len(args)} were given")
    values: dict[Reference, Any] = dict(zip(model.inputs, args, strict=True))
    for step in model.steps:
        results = _run_layer(step.layer, tensors, _filled(step.args, values), _filled(step.kwargs, values), context)
        for i, result in enumerate(results if isinstance(results, (list, tuple)) else [results]):
            values[step.layer.name, step.index, i] = result
    missing = [r for r in model.outputs if r not in values]
    if missing:
        raise WiringError(f"the Keras model returns output {missing[0]}, which no layer made")
    return [values[r] for r in model.outputs]


def _filled(value: Any, values: Mapping[Reference, Any]) -> Any:
    if isinstance(value, tuple) and len(value) == 3 and isinstance(value[0], str):
        if value not in values:
            raise WiringError(f"the Keras model uses output {value[2]} of layer {value[0]!r}, which was not made")
        return values[value]
    if isinstance(value, Mapping):
        return {k: _filled(v, values) for k, v in value.items()}
    return [_filled(v, values) for v in value] if isinstance(value, list) else value


def _run_layer(
    layer: Layer,
    tensors: Mapping[str, Tensor],
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    context: _Context,
) -> Any:
    if layer.inner is not None:
        inputs = args[0] if args and isinstance(args[0], list) else args
        results = _run_model(layer.inner, tensors, list(inputs), context)
        return results[0] if len(results) == 1 else results

    def weight(role: str) -> Tensor | None:
        name = context.weights.get((_key(layer), role))
        return None if name is None else tensors[name]

    def inside(part: str, *inputs: Any, **named: Any) -> Any:
        return _run_layer(layer.wrapped[part], tensors, inputs, named, context)

    wrapped = {k: (v.kind, v.config) for k, v in layer.wrapped.items()}
    kwargs = {k: v for k, v in kwargs.items() if k not in ("mask", "training")}  # nothing is masked: see notes
    call = Call(layer.name, layer.kind, layer.config, weight, inside, wrapped, context.major)
    try:
        return LAYERS[layer.kind](call, *args, **kwargs)
    except WiringError:
        raise
    except Exception as error:
        shapes = ", ".join(str(tuple(a.shape)) if isinstance(a, Tensor) else type(a).__name__ for a in args)
        raise WiringError(f"Keras layer {layer.name!r} ({layer.kind}) could not run on {shapes}: {error}") from error


# ---- example inputs --------------------------------------------------------------------------------


def _example_inputs(model: Model, run: Any) -> tuple[Tensor, ...]:
    declared = [_declared(model, r) for r in model.inputs]
    tokens = [layer for layer in all_layers(model) if layer.kind == "Embedding"]
    top = min((int(layer.config.get("input_dim", 2)) for layer in tokens), default=0)
    low = 1 if any(layer.config.get("mask_zero") for layer in tokens) and top > 1 else 0
    failure: Exception | None = None
    free = any(d is None for shape, _ in declared for d in shape)
    seed = torch.Generator().manual_seed(0)
    for size in _FREE_SIZES if free else (0,):
        args = []
        for shape, whole in declared:
            full = (2, *(size if d is None else int(d) for d in shape))
            if whole:
                args.append(torch.randint(low, max(top, low + 1), full, generator=seed))
            else:
                args.append(torch.randn(full, generator=seed))
        try:
            with torch.no_grad():
                results = run(*args)
        except WiringError as error:
            failure = failure or error
            continue
        if all(r.numel() for r in (results if isinstance(results, tuple) else (results,))):
            return tuple(args)
    raise WiringError(
        f"no example input was found that the Keras model runs on (shapes {[s for s, _ in declared]} beside "
        f"the batch); pass `inputs=`. First failure: {failure or 'an output was empty'}"
    )


def _declared(model: Model, reference: Reference) -> tuple[list[int | None], bool]:
    """An input's shape beside its batch, and whether it holds whole numbers (tokens)."""
    users = [s.layer for s in model.steps if reference in references_in((s.args, s.kwargs))]
    whole = any(_takes_tokens(layer) for layer in users)
    layer = model.layers.get(reference[0]) or next(iter(model.layers.values()))
    config = layer.config
    shape = config.get("batch_input_shape") or config.get("batch_shape")
    if shape is None and layer.inner is not None:
        return _declared(layer.inner, layer.inner.inputs[0])
    if shape is None and (inner := layer.wrapped):
        shape = next(iter(inner.values())).config.get("batch_input_shape")
    if shape is None and "input_dim" in config and layer.kind != "Embedding":
        shape = [None, config["input_dim"]]
    if shape is None and layer.kind == "Embedding":
        shape = [None, config.get("input_length")]
    if not isinstance(shape, (list, tuple)):
        raise WiringError(f"Keras layer {layer.name!r} does not say its input shape: pass `inputs=`")
    return [d if d is None else int(d) for d in shape[1:]], whole


def _takes_tokens(layer: Layer) -> bool:
    if layer.kind == "Embedding":
        return True
    if layer.inner is not None and layer.inner.steps:
        start = layer.inner.inputs
        return any(_takes_tokens(s.layer) for s in layer.inner.steps if set(start) & set(references_in(s.args)))
    return any(_takes_tokens(w) for w in layer.wrapped.values())
