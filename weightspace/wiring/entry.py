"""``ws.wiring(x)``: the one way in, whatever ``x`` is."""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any

from torch import nn

from weightspace.errors import WiringError
from weightspace.wiring.axis import Factor, Segment
from weightspace.wiring.program import Program
from weightspace.wiring.wiring import DimGroup, Wiring

if TYPE_CHECKING:
    from weightspace.checkpoint import Checkpoint
    from weightspace.wiring.catalogue import Signature, Skeleton


def wiring(x: Any, *args: Any, prove: bool = True, seed: int = 0, **kwargs: Any) -> Wiring:
    """Find the wiring of a network and prove it by running.

    ``x`` is one of:

    - an ``nn.Module``, followed by example inputs as for its ``forward`` (or none, where shapes tell);
    - a path, URL or ``Checkpoint``: ONNX by its own graph, Keras by its own config, a Hugging Face folder by
      its config, a bare state dict through the catalogue in ``graphs/``, and failing all a chain inferred
      from order and shapes;
    - a transformers config;
    - a ``Program``.

    ``status`` of the result says what is known: ``proved``, ``unverified`` (a guess from names and shapes, or
    ``prove=False``), or ``failed``. Axes that did not keep the function in the proof are pinned and named.

    Raises ``WiringError`` where nothing can be wired, with what was tried.
    """
    if isinstance(x, Program):
        return from_program(x, prove=prove, seed=seed)
    if isinstance(x, nn.Module):
        from weightspace.wiring.module import program_from_module

        program = program_from_module(x, args, kwargs)
        try:
            return from_program(program, prove=prove, seed=seed)
        except (TypeError, ValueError, RuntimeError) as error:
            shapes = ", ".join(_shown(a) for a in (*program.args, *program.kwargs.values()))
            error.add_note(
                f"weightspace ran {type(x).__name__} on ({shapes}); example inputs are given as for its forward, one "
                "after the other: ws.wiring(module, x, y)"
            )
            raise
    if isinstance(x, str | os.PathLike):
        from weightspace.checkpoint import open as open_checkpoint

        return from_checkpoint(open_checkpoint(x), prove=prove, seed=seed)
    if _is_config(x):
        from weightspace.wiring.transformers import wiring_from_config

        return wiring_from_config(x, prove=prove, seed=seed)
    if isinstance(x, Mapping):
        from weightspace.checkpoint import Checkpoint, from_tensors

        return from_checkpoint(x if isinstance(x, Checkpoint) else from_tensors(x), prove=prove, seed=seed)
    raise WiringError(
        f"cannot wire a {type(x).__name__}; expected an nn.Module with example inputs, a path, a Checkpoint, "
        "a transformers config, or a Program"
    )


def _shown(x: Any) -> str:
    """An example input in a few words."""
    shape = getattr(x, "shape", None)
    return type(x).__name__ if shape is None else str(tuple(shape))


def from_program(program: Program, *, prove: bool = True, seed: int = 0) -> Wiring:
    """Trace a program, resolve its axes, and prove the result."""
    from weightspace.wiring.proof import prove as run_proof
    from weightspace.wiring.resolve import resolve
    from weightspace.wiring.trace import trace

    found = resolve(trace(program), program)
    return run_proof(found, seed) if prove else found


def from_checkpoint(checkpoint: Checkpoint, *, prove: bool = True, seed: int = 0) -> Wiring:
    """The wiring of an opened file; every tensor of the file is in it."""
    tried: list[str] = []
    source = Path(checkpoint.path) if checkpoint.path is not None else None
    if checkpoint.format == "onnx":
        from weightspace.wiring.onnx import program_from_onnx

        return covering(from_program(program_from_onnx(checkpoint), prove=prove, seed=seed), checkpoint)
    if checkpoint.format.startswith("keras") and checkpoint.metadata.get("model_config"):
        from weightspace.wiring.keras import program_from_keras

        return covering(from_program(program_from_keras(checkpoint), prove=prove, seed=seed), checkpoint)
    config = checkpoint.config
    if isinstance(config, Mapping) and config.get("model_type"):
        from weightspace.wiring.transformers import wiring_from_checkpoint

        try:
            return covering(wiring_from_checkpoint(checkpoint, prove=prove, seed=seed), checkpoint)
        except WiringError as error:
            tried.append(str(error))
    from weightspace.wiring.catalogue import program_from_skeleton, recognise, signature_of

    signature = signature_of(checkpoint)
    recognition = recognise(signature)
    tried += recognition.declined
    if recognition.family is not None and recognition.skeleton is not None:
        skeleton = recognition.skeleton
        program = program_from_skeleton(recognition.family.name, skeleton, checkpoint)
        key = shared_key(recognition.family.path, skeleton, signature) if prove else None
        found = _proved_once(key, program, seed) if key else from_program(program, prove=prove, seed=seed)
        shared = found.shared
        found = covering(found, checkpoint)
        if skeleton.guess and found.status == "proved":
            found = found.with_(status="unverified", notes=(*found.notes, f"a guess: {skeleton.guess}"))
        # Files of one key have one program and the same further tensors.
        found.shared = shared
        return found
    from weightspace.wiring.chain import wiring_from_order

    guess = wiring_from_order(checkpoint)
    if guess is not None:
        return covering(guess.with_(notes=(*guess.notes, *tried)), checkpoint)
    known = f" Tried: {'; '.join(tried)}." if tried else ""
    where = f" ({source.name})" if source else ""
    raise WiringError(
        f"no family of the catalogue accounts for these {len(checkpoint)} tensors{where}, and they do not line up as a "
        f"chain.{known} Pass the module with example inputs, ws.wiring(module, x), or add a family to graphs/"
    )


_PROVED: OrderedDict[str, Wiring] = OrderedDict()
# Wirings kept, without their programs and so without tensors.
_KEPT = 1024
_LOCK = Lock()


def shared_key(family: Path, skeleton: Skeleton, signature: Signature) -> str | None:
    """What decides the program of a catalogue skeleton entirely, or None where its family does not say.

    The family's file, the family's own ``key``, names in their order, shapes and dtypes, and how names are mapped. A
    program is the skeleton's module run on its inputs; with all these equal it is the same function of its tensors.
    """
    if skeleton.key is None:
        return None
    tensors = [(n, tuple(shape), str(signature.dtypes.get(n))) for n, shape in signature.shapes.items()]
    facts = (str(family), skeleton.name, skeleton.key, tensors, sorted(skeleton.rename.items()), skeleton.unused)
    return repr(facts)


def _proved_once(key: str, program: Program, seed: int) -> Wiring:
    """The wiring of a program, found and proved for the first file with a key and reused for the others.

    Sound because a wiring speaks of the program, not of its weights: the trace reads operations and shapes, and the
    proof runs on weights drawn away from the file's own to generic ones, where a change of axes that is no symmetry
    shows itself. What held for them holds for every file of the same program. Only a proof without reservation is
    shared: axes that were pinned because of some weights, or that those weights hid from the run, are looked at file by
    file. The result carries this file's own program, so that ``wiring.verify()`` runs on its weights, and the one
    dictionary ``shared`` for what else is the same for all of them (scale symmetries, the structure metanets read).
    """
    key = f"{seed} {key}"
    with _LOCK:
        known = _PROVED.get(key)
        if known is not None:
            _PROVED.move_to_end(key)
    if known is not None and known.proof is not None:
        again = known.with_(program=program, proof=replace(known.proof, on="a network of the same program"))
        again.shared = known.shared
        return again
    found = from_program(program, prove=True, seed=seed)
    if found.proved and found.proof is not None and not found.proof.demoted and not found.proof.vacuous:
        with _LOCK:
            _PROVED[key] = found.with_(program=None)
            _PROVED[key].shared = found.shared
            if len(_PROVED) > _KEPT:
                _PROVED.popitem(last=False)
    return found


def covering(found: Wiring, checkpoint: Checkpoint) -> Wiring:
    """Tensors of the file that take no part in the function join the wiring, pinned."""
    extra = [n for n in checkpoint if n not in found]
    if not extra:
        return found
    layouts, shapes, factors = dict(found.layouts), dict(found.shapes), dict(found.factors)
    for name in extra:
        shape = tuple(checkpoint.shape(name))
        groups = []
        for d, n in enumerate(shape):
            factor = Factor(f"{name}.{d}" if len(shape) > 1 else name, n, True, (), "takes no part in the function")
            unique, k = factor.name, 2
            while unique in factors:
                unique, k = f"{factor.name}~{k}", k + 1
            if n == 1:
                groups.append(DimGroup((d,), ((Segment(0, (), (), ()),),)))
                continue
            factors[unique] = Factor(unique, n, True, (), factor.reason)
            groups.append(DimGroup((d,), ((Segment(0, (unique,), (1,), (n,)),),)))
        layouts[name] = tuple(groups)
        shapes[name] = shape
    order = {n: layouts[n] for n in [*checkpoint, *(n for n in layouts if n not in checkpoint)]}
    untouched = tuple(dict.fromkeys((*found.untouched, *extra)))
    roles = {**found.roles, **dict.fromkeys(sorted(extra), "other")} if found.roles else {}
    return found.with_(layouts=order, shapes=shapes, factors=factors, untouched=untouched, roles=roles)


def _is_config(x: Any) -> bool:
    return any(c.__name__ in ("PreTrainedConfig", "PretrainedConfig") for c in type(x).__mro__)


__all__ = ["covering", "from_checkpoint", "from_program", "wiring"]
