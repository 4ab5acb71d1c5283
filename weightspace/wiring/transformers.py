"""Hugging Face folders and configs: the architecture is rebuilt from the config, never from remote code.

A network of up to ``RUNNABLE`` parameters is traced and proved as it is. A larger one is traced on the meta
device, where its weights take no memory, and proved on a *small twin*: the same classes from the same
configuration with fewer and narrower layers. The twin's wiring must have the same shape as that of the
large network, tensor by tensor; otherwise the result stays unverified.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from weightspace.errors import MissingExtraError, WiringError
from weightspace.wiring.module import program_from_module
from weightspace.wiring.program import Program
from weightspace.wiring.wiring import Wiring

if TYPE_CHECKING:
    from weightspace.checkpoint import Checkpoint

RUNNABLE = 20_000_000


def wiring_from_config(config: Any, *, prove: bool = True, seed: int = 0) -> Wiring:
    """The wiring of the network that a transformers config describes; tensors are named as in its state dict.

    Raises ``WiringError`` where no class fits the config or no inputs make it run.
    """
    return _wire(config, _class_for(config, None), None, prove, seed)


def wiring_from_checkpoint(checkpoint: Checkpoint, *, prove: bool = True, seed: int = 0) -> Wiring:
    """The wiring of a Hugging Face folder: the class that its config names, the tensors that its files hold.

    Raises ``WiringError`` where the config and the tensors disagree, and says which.
    """
    config = config_from(dict(checkpoint.config or {}))
    shapes = {n: tuple(checkpoint.shape(n)) for n in checkpoint}
    return _wire(config, _class_for(config, shapes), checkpoint, prove, seed)


def config_from(settings: Mapping[str, Any]) -> Any:
    """A transformers config from the content of ``config.json``; custom code in it is refused."""
    _require()
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    model_type = str(settings.get("model_type"))
    if settings.get("auto_map") and model_type not in CONFIG_MAPPING:
        raise WiringError(
            f"config.json asks for code of its own (auto_map) for model type {model_type!r}; remote code is never run. "
            "Load the module yourself and pass it: ws.wiring(module, inputs)"
        )
    if model_type not in CONFIG_MAPPING:
        raise WiringError(f"transformers has no model type {model_type!r}; it may need a newer release")
    return CONFIG_MAPPING[model_type].from_dict(dict(settings))


def _require() -> None:
    try:
        import transformers  # noqa: F401
    except ImportError:
        raise MissingExtraError("transformers", "transformers", "wiring a Hugging Face model") from None


def _class_for(config: Any, shapes: Mapping[str, tuple[int, ...]] | None) -> Any:
    """The class that the config names, else the preferred head class of its type that fits the tensors."""
    import transformers

    from weightspace.wiring.small import classes

    for name in getattr(config, "architectures", None) or []:
        if hasattr(transformers, name):
            return getattr(transformers, name)
    candidates = classes(config.model_type)
    if not candidates:
        raise WiringError(f"transformers has no model class for type {config.model_type!r}")
    if shapes is None:
        return candidates[0]

    def fit(cls: Any) -> int:
        try:
            with torch.device("meta"):
                state = cls(config).state_dict()
        except (RuntimeError, ValueError, TypeError, AttributeError):
            return -1
        return sum(shapes.get(n) == tuple(t.shape) for n, t in state.items()) - sum(n not in shapes for n in state)

    return max(candidates, key=fit)


def _wire(config: Any, cls: Any, checkpoint: Checkpoint | None, prove: bool, seed: int) -> Wiring:
    from weightspace.wiring.entry import from_program

    _plain(config)
    with torch.device("meta"):
        large = cls(config).eval()
    count = sum(p.numel() for p in large.parameters())
    origin = f"transformers:{config.model_type}"
    rename = _rename(large, checkpoint)
    if count <= RUNNABLE:
        torch_state = torch.get_rng_state()
        torch.manual_seed(seed)
        module = cls(config).eval()
        torch.set_rng_state(torch_state)
        program = _with_values(_program(module, config, origin, rename), checkpoint)
        return from_program(program, prove=prove, seed=seed)
    found = from_program(_program(large, config, origin, rename), prove=False)
    found = found.with_(
        program=None, notes=(*found.notes, f"{cls.__name__}, {count:,} parameters, traced on the meta device")
    )
    return prove_on_twin(found, config, cls, rename, seed) if prove else found


def _plain(config: Any) -> None:
    for part in (config, *(v for v in vars(config).values() if hasattr(v, "use_cache"))):
        if hasattr(part, "use_cache"):
            part.use_cache = False


def _program(module: nn.Module, config: Any, origin: str, rename: Mapping[str, str]) -> Program:
    from weightspace.wiring.small import SCALES, Primary
    from weightspace.wiring.small_inputs import attempts, settle

    program_module = Primary(module).eval()
    kwargs, reason = None, ""
    if next(module.parameters()).device.type == "meta":
        kwargs = next(attempts(module, SCALES[0]), None)
    else:
        kwargs, reason = settle(module, SCALES[0])
    if kwargs is None:
        raise WiringError(
            f"no example inputs were found for {type(module).__name__} ({reason}); pass the module with inputs"
        )
    prefixed = {f"model.{k}": rename.get(k, k) for k in module.state_dict()}
    return program_from_module(program_module, (), kwargs, origin=origin, rename=prefixed)


def _rename(module: nn.Module, checkpoint: Checkpoint | None) -> dict[str, str]:
    """State-dict key -> checkpoint name: equal, or with the base model's prefix added or missing."""
    if checkpoint is None:
        return {}
    names = set(checkpoint)
    prefix = str(getattr(module, "base_model_prefix", "") or "")
    out: dict[str, str] = {}
    state = module.state_dict()
    wrong = []
    for key, value in state.items():
        options = [key, key.removeprefix(f"{prefix}."), f"{prefix}.{key}"]
        name = next((o for o in options if o in names), None)
        if name is None:
            continue
        if tuple(checkpoint.shape(name)) != tuple(value.shape):
            wrong.append(f"{name} is {tuple(checkpoint.shape(name))}, the config makes it {tuple(value.shape)}")
        elif name != key:
            out[key] = name
    known = {out.get(k, k) for k in state}
    extra = [n for n in checkpoint if n not in known and checkpoint.dtype(n).is_floating_point]
    if wrong:
        raise WiringError(f"the tensors do not fit config.json: {'; '.join(wrong[:3])}")
    if len(extra) > 0.5 * len(names):
        raise WiringError(
            f"{len(extra)} of {len(names)} tensors, first {extra[0]!r}, are not in "
            f"{type(module).__name__}, which config.json names"
        )
    return out


def _with_values(program: Program, checkpoint: Checkpoint | None) -> Program:
    """The file's own values; tied tensors that it stores once come from their twin."""
    if checkpoint is None:
        return program
    first: dict[int, torch.Tensor] = {}
    for name, own in program.tensors.items():
        if name in checkpoint:
            first.setdefault(id(own), checkpoint[name].to(own.dtype))
    lost = [n for n, t in program.tensors.items() if id(t) not in first]
    # A head that the file lacks (a base model's checkpoint) keeps its random values and stays out of the wiring's file.
    tensors = {n: first.get(id(t), t) for n, t in program.tensors.items()}
    notes = (*program.notes, f"not in the file, drawn at random: {', '.join(lost[:4])}") if lost else program.notes
    return replace(program, tensors=tensors, notes=notes)


def prove_on_twin(found: Wiring, config: Any, cls: Any, rename: Mapping[str, str], seed: int) -> Wiring:
    """Prove the wiring of a network too large to run on a small twin of the same configuration."""
    from weightspace.wiring.entry import from_program
    from weightspace.wiring.small import SCALES, Shrinker

    failures = []
    for scale in SCALES:
        try:
            small_config = Shrinker(scale)(config)
            _plain(small_config)
            state = torch.get_rng_state()
            torch.manual_seed(seed)
            module = cls(small_config).eval()
            torch.set_rng_state(state)
            if sum(p.numel() for p in module.parameters()) > 2 * RUNNABLE:
                failures.append(f"width / {scale.width}: still too large")
                continue
            twin = from_program(_program(module, small_config, found.origin, rename), seed=seed)
        except (
            WiringError,
            RuntimeError,
            ValueError,
            TypeError,
            AttributeError,
            IndexError,
            KeyError,
        ) as error:
            failures.append(f"width / {scale.width}: {str(error).splitlines()[0][:100]}")
            continue
        if twin.proof is None or not twin.proof.holds:
            return found.with_(
                status="failed", proof=twin.proof, notes=(*found.notes, "the small twin's outputs changed")
            )
        unlike = _unlike(found, twin)
        if unlike:
            failures.append(f"width / {scale.width}: wired otherwise at {unlike}")
            continue
        proof = replace(twin.proof, on=f"a small twin ({sum(p.numel() for p in module.parameters()):,} parameters)")
        return found.with_(status="proved", proof=proof)
    return found.with_(notes=(*found.notes, f"no small twin could prove it: {'; '.join(failures)}"))


def twin_of(checkpoint: Checkpoint) -> Wiring:
    """The proved wiring, with its program, of a small twin of a Hugging Face model; tensors are named as in the file.

    Raises ``WiringError`` where none of the scales gives a twin that can be run and proved.
    """
    from weightspace.wiring.entry import from_program
    from weightspace.wiring.small import SCALES, Shrinker

    config = config_from(dict(checkpoint.config or {}))
    cls = _class_for(config, {n: tuple(checkpoint.shape(n)) for n in checkpoint})
    _plain(config)
    with torch.device("meta"):
        rename = _rename(cls(config).eval(), checkpoint)
    for scale in SCALES:
        try:
            small_config = Shrinker(scale)(config)
            _plain(small_config)
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                module = cls(small_config).eval()
            twin = from_program(_program(module, small_config, f"transformers:{config.model_type}", rename))
        except (WiringError, RuntimeError, ValueError, TypeError, AttributeError, IndexError, KeyError):
            continue
        if twin.proved:
            return twin
    raise WiringError(f"no small twin of this {config.model_type} model could be run and proved")


def _unlike(large: Wiring, small: Wiring) -> str | None:
    """The first tensor that the two wire differently: in number of segments and factors, pinning or fibres.

    Layers that only the large one has must be wired like the small one's layer of the same name pattern.
    """
    patterns: dict[str, set[Any]] = {}
    for name in small:
        patterns.setdefault(_pattern(name), set()).add(_shape_of(small, name))
    for name in large:
        known = patterns.get(_pattern(name))
        if known is not None and _shape_of(large, name) not in known:
            return name
        if known is None:
            return name
    return None


def _pattern(name: str) -> str:
    return re.sub(r"\d+", "#", name)


def _shape_of(wiring: Wiring, name: str) -> Any:
    """What a tensor's layout looks like when sizes and names are left out."""
    rows = []
    for group in wiring.layouts[name]:
        blocks = sorted(
            tuple(
                tuple((wiring.factors[f].pinned, len(wiring.factors[f].over)) for f in segment.factors)
                for segment in block
            )
            for block in group.blocks
        )
        rows.append((group.dims, tuple(blocks)))
    return tuple(rows)
