"""The architecture catalogue: rebuilds a skeleton module for a bare checkpoint from names and shapes.

A family is one Python file in ``graphs/`` with a function ``build(signature) -> Skeleton | None``. Drop one in
to support a new family; folders named in ``WEIGHTSPACE_GRAPHS`` (separated like ``PATH``) are read as well.
A skeleton is accepted only if it accounts for every tensor of the checkpoint, name by name and shape by shape.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from weightspace.errors import WiringError
from weightspace.paths import data_dir
from weightspace.wiring.program import Program

if TYPE_CHECKING:
    from weightspace.checkpoint import Checkpoint


@dataclass(frozen=True)
class Signature:
    """What a family may look at to recognise a checkpoint: names, shapes, dtypes and metadata."""

    shapes: Mapping[str, tuple[int, ...]]
    dtypes: Mapping[str, torch.dtype] = field(default_factory=dict)
    metadata: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Skeleton:
    """A module with the names and shapes of a checkpoint, and inputs to run it on.

    ``rename`` maps a key of the module's state dict to the checkpoint's name where they differ;
    ``unused`` names checkpoint tensors that take no part in the function (counters, optimiser state).
    ``guess`` says why the true network may be wired otherwise (empty: it cannot); the wiring is then
    marked ``unverified`` however well the skeleton runs. ``key`` may name everything that decides the module and its
    inputs besides names, shapes and dtypes of the checkpoint: files with one key then share one proof (see
    ``weightspace.wiring.entry``). A family that sets it promises that equal keys give equal programs.
    """

    module: nn.Module
    inputs: tuple[Any, ...]
    name: str
    rename: Mapping[str, str] = field(default_factory=dict)
    unused: tuple[str, ...] = ()
    guess: str = ""
    key: str | None = None


@dataclass(frozen=True)
class Family:
    """A catalogue file: its name, what it stands for, its rank (lower is asked first) and its builder."""

    name: str
    path: Path
    priority: int
    build: Callable[[Signature], Skeleton | None]


@dataclass(frozen=True)
class Recognition:
    """A family that accounts for a checkpoint, or the reasons why none does."""

    family: Family | None
    skeleton: Skeleton | None
    declined: tuple[str, ...] = ()


def families() -> tuple[Family, ...]:
    """All families, in the order in which they are asked."""
    folders = [
        data_dir("graphs"),
        *map(Path, filter(None, os.environ.get("WEIGHTSPACE_GRAPHS", "").split(os.pathsep))),
    ]
    return _families(tuple(folders))


@cache
def _families(folders: tuple[Path, ...]) -> tuple[Family, ...]:
    found = []
    for folder in folders:
        for path in sorted(folder.glob("*.py")):
            if path.name.startswith("_"):
                continue
            module = _load(path)
            if not hasattr(module, "build"):
                raise WiringError(f"the catalogue file {path} has no function build(signature)")
            name = getattr(module, "FAMILY", path.stem.replace("_", "-"))
            found.append(Family(name, path, int(getattr(module, "PRIORITY", 50)), module.build))
    return tuple(sorted(found, key=lambda f: (f.priority, f.name)))


def _load(path: Path) -> ModuleType:
    # Read by path under a private name: a folder called `graphs` never enters the import namespace.
    name = f"weightspace._catalogue.{path.stem}_{hashlib.sha256(str(path).encode()).hexdigest()[:8]}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise WiringError(f"the catalogue file {path} cannot be read as a Python module")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def signature_of(checkpoint: Checkpoint) -> Signature:
    """Names, shapes, dtypes and metadata of a checkpoint; no data is read."""
    return Signature(
        {n: tuple(checkpoint.shape(n)) for n in checkpoint},
        {n: checkpoint.dtype(n) for n in checkpoint},
        checkpoint.metadata,
    )


def recognise(signature: Signature) -> Recognition:
    """The first family whose skeleton accounts for every tensor of a checkpoint.

    A family that raises ``WiringError`` declines for the reason that the error gives.
    """
    declined: list[str] = []
    for family in families():
        try:
            # Two files of one family get the same example inputs, and the caller's random numbers stay as they were.
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                skeleton = family.build(signature)
        except WiringError as error:
            declined.append(f"{family.name}: {error}")
            continue
        if skeleton is None:
            continue
        reason = mismatch(skeleton, signature)
        if reason is None:
            return Recognition(family, skeleton, tuple(declined))
        declined.append(f"{family.name}: {reason}")
    return Recognition(None, None, tuple(declined))


def mismatch(skeleton: Skeleton, signature: Signature) -> str | None:
    """Why a skeleton does not account for a checkpoint, or None where it does."""
    state = skeleton.module.state_dict()
    covered = set(skeleton.unused)
    for key, value in state.items():
        name = skeleton.rename.get(key, key)
        shape = signature.shapes.get(name)
        if shape is None:
            if key.endswith("num_batches_tracked"):
                continue
            return f"the checkpoint has no tensor {name!r}"
        if tuple(value.shape) != tuple(shape):
            return f"{name!r} is {tuple(shape)} in the checkpoint and {tuple(value.shape)} in the skeleton"
        covered.add(name)
    extra = [n for n in signature.shapes if n not in covered]
    return f"{len(extra)} tensors are not in the skeleton, first {extra[0]!r}" if extra else None


def program_from_skeleton(family: str, skeleton: Skeleton, checkpoint: Checkpoint) -> Program:
    """The skeleton as a program over the checkpoint's own tensors (float32 where they are narrower)."""
    from weightspace.wiring.module import program_from_module

    program = program_from_module(
        skeleton.module, skeleton.inputs, origin=f"catalogue:{family}", rename=skeleton.rename
    )
    tensors = {}
    for name, own in program.tensors.items():
        value = checkpoint.get(name, own)
        tensors[name] = value.to(own.dtype) if value.dtype != own.dtype else value
    notes = (f"recognised as {skeleton.name}",)
    missing = [n for n in tensors if n not in checkpoint]
    return replace(
        program,
        tensors={n: t for n, t in tensors.items() if n not in missing},
        run=_filled(program, missing),
        notes=notes,
    )


def _filled(program: Program, missing: list[str]) -> Callable[..., Any]:
    """Counters that old checkpoints lack are taken from the skeleton."""
    if not missing:
        return program.run
    # A skeleton may have no data (meta device); all that may be missing is a counter.
    extra = {n: torch.zeros(program.tensors[n].shape, dtype=program.tensors[n].dtype) for n in missing}
    return lambda tensors, *a, **k: program.run({**tensors, **extra}, *a, **k)
