"""A live ``nn.Module`` as a program, with example inputs guessed from its shapes where none are given."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from weightspace.errors import WiringError
from weightspace.wiring.program import Program


def program_from_module(
    module: nn.Module,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    origin: str = "module",
    rename: Mapping[str, str] | None = None,
) -> Program:
    """A module in eval mode as a pure function of its state dict.

    ``rename`` maps state-dict keys to other tensor names (a catalogue skeleton's to the checkpoint's).
    Without example inputs some are guessed from the first layers; ``WiringError`` says when none fits.
    """
    rename = dict(rename or {})
    state = {k: v for k, v in module.state_dict(keep_vars=True).items() if isinstance(v, torch.Tensor)}
    # A state dict drops buffers that are not persistent and lists tied weights twice; a call needs the former.
    extra = {k: v for k, v in module.named_buffers() if k not in state}
    back = {rename.get(k, k): k for k in state}

    def run(tensors: Mapping[str, torch.Tensor], *a: Any, **k: Any) -> Any:
        dtype = next((t.dtype for t in tensors.values() if t.is_floating_point()), torch.float32)
        given = {key: tensors[name] for name, key in back.items()}
        for key, value in extra.items():
            given[key] = value.to(dtype) if value.is_floating_point() and value.dtype != dtype else value
        with evaluating(module):
            return torch.func.functional_call(module, given, a, k, tie_weights=False, strict=False)

    tensors = {name: state[key].detach() for name, key in back.items()}
    _share(state, tensors, back)
    if not args and not kwargs:
        args, kwargs = _guess(module)
    return Program(tensors, run, tuple(args), dict(kwargs or {}), origin)


def _share(state: Mapping[str, torch.Tensor], tensors: dict[str, torch.Tensor], back: Mapping[str, str]) -> None:
    """Tied weights stay one object, so that the trace sees one tensor under two names."""
    first: dict[int, torch.Tensor] = {}
    for name, key in back.items():
        tensors[name] = first.setdefault(id(state[key]), tensors[name])


@contextlib.contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """The module and its children in eval mode, put back afterwards.

    Where transformers offers several implementations of a layer of experts, the one that looks up each
    token's expert is used: the sorted ones hide which expert a row belongs to.
    """
    training = [m for m in module.modules() if m.training]
    found: list[Any] = [getattr(m, "config", None) for m in module.modules()]
    configs = {id(c): c for c in found if hasattr(c, "_experts_implementation")}
    previous = {k: c._experts_implementation for k, c in configs.items()}
    for m in training:
        m.training = False
    for c in configs.values():
        c._experts_implementation = "batched_mm"
    try:
        yield
    finally:
        for m in training:
            m.training = True
        for k, c in configs.items():
            c._experts_implementation = previous[k]


def _guess(module: nn.Module) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Example inputs for the first layer with weights, tried until the module runs."""
    dummy = getattr(module, "dummy_inputs", None)
    candidates: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
    if isinstance(dummy, dict):
        candidates.append(((), {k: v for k, v in dummy.items() if isinstance(v, torch.Tensor)}))
    candidates += [((x,), {}) for x in _shapes_for(module)]
    errors: list[str] = []
    with evaluating(module), torch.no_grad():
        for args, kwargs in candidates:
            try:
                module(*args, **kwargs)
                return args, kwargs
            except (RuntimeError, ValueError, TypeError, IndexError) as error:
                errors.append(str(error).splitlines()[0] if str(error) else type(error).__name__)
    signature = str(inspect.signature(module.forward))
    last = f" (last error: {errors[-1]})" if errors else ""
    raise WiringError(
        f"no example input for {type(module).__name__} could be guessed{last}; its forward takes {signature}. "
        "Pass example inputs: ws.wiring(module, x)"
    )


def _shapes_for(module: nn.Module) -> Iterator[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    dtype = next((p.dtype for p in module.parameters() if p.is_floating_point()), torch.float32)
    for layer in module.modules():
        if isinstance(layer, nn.Conv2d | nn.ConvTranspose2d):
            for side in (32, 28, 64, 96, 224, 16, 8, 299):
                yield randn(2, layer.in_channels, side, side).to(dtype)
            return
        if isinstance(layer, nn.Conv1d | nn.ConvTranspose1d):
            for length in (64, 128, 256, 1024, 4096, 16000):
                yield randn(2, layer.in_channels, length).to(dtype)
            return
        if isinstance(layer, nn.Conv3d | nn.ConvTranspose3d):
            for side in (16, 32, 64):
                yield randn(2, layer.in_channels, side, side, side).to(dtype)
            return
        if isinstance(layer, nn.Embedding):
            yield torch.randint(0, layer.num_embeddings, (2, 8), generator=generator)
            return
        if isinstance(layer, nn.RNNBase):
            yield randn(2, 5, layer.input_size).to(dtype)
            return
        if isinstance(layer, nn.Linear):
            yield randn(2, layer.in_features).to(dtype)
            yield randn(2, 5, layer.in_features).to(dtype)
            for side in range(1, 257):
                if layer.in_features % (side * side) == 0 and layer.in_features // (side * side) in (1, 3):
                    yield randn(2, layer.in_features // (side * side), side, side).to(dtype)
            return
