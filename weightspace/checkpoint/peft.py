"""LoRA adapters merged onto their base (Hu et al. 2021), with rsLoRA scaling and DoRA (Liu et al. 2024)."""

from __future__ import annotations

import functools
import math
import re
from typing import Any

import torch

from weightspace.checkpoint.checkpoint import Checkpoint, from_entries
from weightspace.checkpoint.contents import Entry
from weightspace.errors import CheckpointError

_ROOT = "base_model.model."


def merge_adapter(adapter: Checkpoint, base: Checkpoint) -> Checkpoint:
    """The base with a PEFT LoRA adapter merged in: ``W + scale * B @ A`` for every adapted weight.

    Names, order and types are the base's; sums are taken in float32, on access. ``adapter`` is an opened
    PEFT folder, ``base`` the model it was trained on. Raises `CheckpointError` for another kind of
    adapter, and where a tensor of the adapter has no place in the base.
    """
    config = adapter.config
    if config is None or "peft_type" not in config:
        raise CheckpointError("the adapter has no adapter_config.json; open the folder that holds it")
    if config["peft_type"] != "LORA":
        raise CheckpointError(f"an adapter of kind {config['peft_type']!r}; only LORA is merged")
    parts: dict[str, dict[str, str]] = {}
    replaced: dict[str, str] = {}
    for name in adapter:
        short = name.removeprefix(_ROOT)
        found = re.fullmatch(
            r"(?P<module>.+)\.(?P<part>lora_A|lora_B|lora_embedding_A|lora_embedding_B|lora_magnitude_vector)"
            r"(\.default)?(\.weight)?",
            short,
        )
        if found:
            parts.setdefault(found["module"], {})[found["part"]] = name
        else:
            plain = (
                short.replace(".modules_to_save.default", "").replace(".modules_to_save", "").replace(".base_layer", "")
            )
            replaced[_place(plain, base)] = name
    merged = {
        name: Entry(base.shape(name), base.dtype(name), functools.partial(base.__getitem__, name)) for name in base
    }
    for target, name in replaced.items():
        if adapter.shape(name) != base.shape(target):
            raise CheckpointError(f"{name} has shape {adapter.shape(name)}, {target} in the base {base.shape(target)}")
        merged[target] = Entry(
            base.shape(target), base.dtype(target), functools.partial(_as, adapter, name, base.dtype(target))
        )
    for module, names in parts.items():
        target = _place(f"{module}.weight", base)
        kind = "lora_embedding_" if "lora_embedding_A" in names else "lora_"
        if not {f"{kind}A", f"{kind}B"} <= names.keys():
            raise CheckpointError(f"the adapter of {module} has {', '.join(names)}; A and B were expected")
        a, b = names[f"{kind}A"], names[f"{kind}B"]
        rank = adapter.shape(a)[0]
        scale = _scale(config, module, rank)
        transpose = bool(config.get("fan_in_fan_out")) or kind == "lora_embedding_"
        _check(adapter, base, a, b, target, transpose)
        load = functools.partial(
            _merged, adapter, base, target, a, b, names.get("lora_magnitude_vector"), scale, transpose
        )
        merged[target] = Entry(base.shape(target), base.dtype(target), load)
    metadata = {**base.metadata, "adapter": dict(config), "merged": len(parts)}
    return from_entries(merged, base.format, metadata, base.config)


def _place(name: str, base: Checkpoint) -> str:
    # A base saved without its head has names that lack the adapter's first parts, or the other way round.
    fits = [n for n in base if n == name] or [n for n in base if name.endswith(f".{n}") or n.endswith(f".{name}")]
    if len(fits) != 1:
        raise CheckpointError(
            f"the adapter changes {name!r}, which the base has {len(fits)} times; is it the right base? "
            f"It begins with {', '.join(list(base)[:3])}"
        )
    return fits[0]


def _scale(config: dict[str, Any], module: str, rank: int) -> float:
    alpha = config.get("lora_alpha", rank)
    patterns = config.get("alpha_pattern") or {}
    for pattern, value in patterns.items() if isinstance(patterns, dict) else ():
        # PEFT matches the end of a module's name; patterns are nearly always plain names.
        if module == pattern or module.endswith(f".{pattern}"):
            alpha = value
            break
    if not isinstance(alpha, int | float) or rank == 0:
        raise CheckpointError(f"the adapter of {module} has alpha {alpha!r} and rank {rank}")
    return float(alpha) / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _check(adapter: Checkpoint, base: Checkpoint, a: str, b: str, target: str, transpose: bool) -> None:
    down, up, full = adapter.shape(a), adapter.shape(b), base.shape(target)
    rows, columns = (up[0], down[1]) if len(up) >= 2 and len(down) >= 2 else (-1, -1)
    wanted = (columns, rows) if transpose else (rows, columns)
    if len(up) < 2 or len(down) < 2 or up[1] != down[0] or len(full) != len(up) or tuple(full[:2]) != wanted:
        raise CheckpointError(f"{a} {down} and {b} {up} do not make a change of {target} {full}")


def _as(adapter: Checkpoint, name: str, dtype: torch.dtype) -> torch.Tensor:
    return adapter[name].to(dtype)


def _merged(
    adapter: Checkpoint,
    base: Checkpoint,
    target: str,
    a: str,
    b: str,
    magnitude: str | None,
    scale: float,
    transpose: bool,
) -> torch.Tensor:
    weight = base[target]
    full = weight.to(torch.float32)
    down, up = adapter[a].to(torch.float32), adapter[b].to(torch.float32)
    if full.ndim == 2:
        change = up @ down
        change = change.T if transpose else change
    else:
        # A convolution: A has the kernel, B is pointwise.
        change = torch.einsum("or,ri...->oi...", up.flatten(2).squeeze(-1) if up.ndim > 2 else up, down)
    full = full + scale * change
    if magnitude is not None:
        length = adapter[magnitude].to(torch.float32).reshape(-1)
        if full.ndim == 2:
            rows = full.T if transpose else full
            rows = rows * (length / rows.norm(dim=1)).unsqueeze(1)
            full = rows.T if transpose else rows
        else:
            form = [-1] + [1] * (full.ndim - 1)
            full = full * (length / full.flatten(1).norm(dim=1)).reshape(form)
    return full.to(weight.dtype).contiguous()
