"""Inputs from a file, for recipes and the command line.

Any file of tensors that ``ws.open`` reads (safetensors, npz, npy, pt). Its tensors, in their order, are the network's
positional arguments; those called ``labels`` (or ``y``) and ``outputs`` (the numbers of the task's own outputs) are set
aside: see `MergeData`. Tensors whose names are all names of the network's inputs (``input_ids``, ``attention_mask``)
are passed by name.
"""

from __future__ import annotations

from weightspace.checkpoint import open as open_checkpoint
from weightspace.errors import MergeError
from weightspace.merge.data import MergeData

_LABELS = ("labels", "y")
_NAMED = {"input_ids", "attention_mask", "token_type_ids", "position_ids", "pixel_values", "input_values"}


def load(path: str) -> MergeData:
    """The examples in a file. Raises `CheckpointError` for what is no file of tensors, `MergeError` without inputs."""
    held = open_checkpoint(path)
    tensors = {name: held[name].clone() for name in held}
    labels = next((tensors.pop(name) for name in _LABELS if name in tensors), None)
    outputs = tensors.pop("outputs", None)
    if not tensors:
        raise MergeError(f"{path} holds no inputs, only {', '.join(held)}")
    if outputs is not None and (outputs.is_floating_point() or outputs.dim() != 1):
        raise MergeError(f"{path}: outputs is a list of the numbers of the task's own outputs, found {outputs.dtype}")
    if set(tensors) <= _NAMED:
        return MergeData(tensors, labels, None if outputs is None else outputs.tolist())
    return MergeData(tuple(tensors.values()), labels, None if outputs is None else outputs.tolist())
