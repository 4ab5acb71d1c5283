"""Preflight: do the files hold networks of one architecture? Adapters, quantisation, names, shapes and wiring."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch

from weightspace.checkpoint import Checkpoint
from weightspace.errors import CheckpointError, WeightspaceError
from weightspace.mergeability.configuration import SILENT, plain
from weightspace.mergeability.flight import Flight, everything, listed, one_line

if TYPE_CHECKING:
    from weightspace.wiring.wiring import Wiring


def adapters(f: Flight) -> None:
    """LoRA adapters stand for their base with a change; without the base nothing can be said of them."""
    from weightspace.checkpoint.peft import merge_adapter

    for name, model in list(f.models.items()):
        if not any(".lora_A" in t or ".lora_B" in t or "lora_embedding_" in t for t in model):
            continue
        wanted = (model.config or {}).get("base_model_name_or_path")
        if f.base is None:
            f.unusable.add(name)
            f.say(
                "stop", "adapters", name, f"a LoRA adapter of {len(model)} tensors, without the model it changes",
                f"the base{f' {wanted}' if wanted else ''}", "give it as base, or merge the adapter into it first",
            )  # fmt: skip
            continue
        try:
            f.models[name] = merge_adapter(model, f.base)
        except CheckpointError as error:
            f.unusable.add(name)
            f.say(
                "stop", "adapters", name, f"a LoRA adapter that does not fit the base ({one_line(error)})",
                "an adapter of this base", "give the base that it was trained on",
            )  # fmt: skip
        else:
            f.say(
                "note", "adapters", name, "a LoRA adapter, looked at as merged into the base",
                "a full model or an adapter", "methods for adapters (KnOTS) merge it as it is",
            )  # fmt: skip


_QUANTISED = (torch.int8, torch.uint8, torch.qint8, torch.quint8, torch.qint32, torch.int32)
_MARKS = (".qweight", ".qzeros", ".SCB", ".absmax", ".quant_map", ".quant_state", ".g_idx", "weight_scale_inv")


def quantised(f: Flight) -> None:
    """Files whose numbers are codes of a quantisation cannot be averaged."""
    for name, model in everything(f).items():
        says = (model.config or {}).get("quantization_config")
        types = model.metadata.get("tensor_types") if model.format == "gguf" else None
        plain = ("F32", "F16", "BF16", "F64")
        given = types.values() if isinstance(types, Mapping) else ()
        gguf = sorted({str(t) for t in given if str(t).upper() not in plain})
        whole = [
            t
            for t, d in model.dtypes.items()
            if (d in _QUANTISED and len(model.shape(t)) >= 2) or str(d).startswith("torch.float8")
        ]
        marked = [t for t in model if t.endswith(_MARKS) or any(f"{m}." in t for m in _MARKS)]
        if not (says or whole or marked or gguf):
            continue
        kinds = sorted({str(model.dtype(t)).removeprefix("torch.") for t in whole}) or gguf or ["a configuration"]
        method = f" ({says.get('quant_method')})" if isinstance(says, Mapping) and says.get("quant_method") else ""
        f.say(
            "warning" if gguf and not whole else "stop", "quantised", name,
            f"quantised weights{method}: {listed(kinds)} in {len(whole) or len(types or ()) or 'some'} tensors",
            "weights in float32, float16 or bfloat16", "dequantise it, or take the model that was quantised",
            (*whole, *marked),
        )  # fmt: skip
        if not gguf:
            f.unusable.add(name)


def tensors(f: Flight) -> None:
    """The same names and shapes; what differs is told apart by what it does in the network."""
    against, reference = f.reference
    for name, model in f.others().items():
        if name in f.unusable:
            continue
        missing = [t for t in reference if t not in model and not _counter(reference, t)]
        extra = [t for t in model if t not in reference and not _counter(model, t)]
        if missing or extra:
            f.unlike.add(name)
            share = len(missing) / len(reference)
            if share > 0.5:
                f.foreign.add(name)
            also = f", and {len(extra)} that {against} has not ({listed(extra)})" if extra else ""
            prefix = _prefix(reference, model)
            remedy = (
                f"the names differ by the prefix {prefix!r}: rename them"
                if prefix
                else "merge models of one architecture, or rename the tensors"
            )
            deeper = sum(math.prod(model.shape(t)) for t in extra) > 0.2 * max(reference.num_parameters, 1)
            if not missing and not deeper:
                remedy = "drop what is additional, or merge only what both have"
            f.say(
                "stop" if share > 0 or deeper else "warning", "tensors", name,
                f"{len(missing)} of {len(reference)} tensors of {against} are absent ({listed(missing)}){also}"
                if missing else f"{len(extra)} tensors that {against} has not ({listed(extra)})",
                f"the names of {against}", remedy, (*missing, *extra),
            )  # fmt: skip
        differing = [t for t in reference if t in model and model.shape(t) != reference.shape(t)]
        # Of another architecture, what a few names have in common says nothing.
        if differing and 2 * len(missing) < len(reference):
            f.unlike.add(name)
            _shapes(f, name, model, against, reference, differing)


def _counter(model: Checkpoint, tensor: str) -> bool:
    """A single whole number, such as the batches that a norm has seen."""
    return not model.shape(tensor) and not model.dtype(tensor).is_floating_point


def _prefix(reference: Checkpoint, model: Checkpoint) -> str:
    """The text that stands before every name in one of the two, or nothing."""
    longer, shorter = model, reference
    if len(min(model, key=len)) <= len(min(reference, key=len)):
        longer, shorter = reference, model
    first = next(iter(shorter))
    for candidate in longer:
        if candidate.endswith(first) and candidate != first:
            prefix = candidate.removesuffix(first)
            if all(f"{prefix}{n}" in longer for n in shorter):
                return prefix
    return ""


def _shapes(
    f: Flight, name: str, model: Checkpoint, against: str, reference: Checkpoint, differing: list[str]
) -> None:
    groups: dict[str, list[str]] = {}
    for t in differing:
        groups.setdefault(_part(f, t, reference.shape(t), model.shape(t), reference, model), []).append(t)
    advice = {
        "vocabulary": ("the same vocabulary", "bring the embeddings to one vocabulary (the common tokens) first"),
        "head": (
            "output layers of one size",
            "merge everything but the head and keep a head for each task, or train one on the same labels",
        ),
        "rank": ("tensors with as many dims", "these are different layers: merge models of one architecture"),
        "width": (
            "the same shapes",
            "different widths cannot be averaged: align with optimal transport or partial matching, or choose models "
            "of one architecture",
        ),
    }
    for part, tensors in groups.items():
        t = tensors[0]
        expected, remedy = advice[part]
        f.say(
            "stop", "tensors", name,
            f"{part}: {t} has shape {list(model.shape(t))}, {against} has {list(reference.shape(t))}"
            + (f", and {len(tensors) - 1} more tensors differ" if len(tensors) > 1 else ""),
            expected, remedy, tensors,
        )  # fmt: skip


def _part(
    f: Flight, tensor: str, a: tuple[int, ...], b: tuple[int, ...], reference: Checkpoint, model: Checkpoint
) -> str:
    """What a tensor whose shapes differ belongs to: "vocabulary", "head", "rank" or "width"."""
    if len(a) != len(b):
        return "rank"
    dims = [d for d in range(len(a)) if a[d] != b[d]]
    vocabularies = [(c.config or {}).get("vocab_size") for c in (reference, model)]
    if len(dims) == 1 and vocabularies[0] and a[dims[0]] == vocabularies[0] and b[dims[0]] == vocabularies[1]:
        return "vocabulary"
    wiring = f.find_wiring()
    if wiring is None or not wiring.roles or tensor not in wiring.roles:
        return "width"
    if len(dims) == 1 and wiring.roles[tensor] == "lookup":
        return "vocabulary"
    # The roles are in the order of first use: the head is what nothing comes after, and its outer axis may not move.
    weights = [n for n, r in wiring.roles.items() if r == "weight"]
    last = weights[-1] if weights else None
    if len(dims) == 1 and last is not None:
        outer = {x.name for d, x in enumerate(wiring[last]) if x.kind == "pinned" and wiring.reads.get(last) != d}
        if wiring[tensor][dims[0]].name in outer:
            looked_up = any(
                r == "lookup" and wiring[n][0].name in outer for n, r in wiring.roles.items() if len(wiring[n])
            )
            return "vocabulary" if looked_up else "head"
    return "width"


def wirings(f: Flight) -> None:
    """Whether the models are wired alike, and whether that is proved."""
    wiring = f.find_wiring()
    against, _ = f.reference
    if wiring is None:
        f.say(
            "warning", "wiring", against, f"no wiring was found ({f.skipped.pop('wiring', '')})",
            "a network that can be wired", "methods that need only names and shapes can be used; alignment cannot",
        )  # fmt: skip
        return
    if wiring.status == "unverified":
        f.say(
            "warning", "wiring", against, "the wiring is a guess from names and shapes", "a wiring proved by running",
            "wire the module with example inputs; alignment and merging with data decline a guess",
        )  # fmt: skip
    elif wiring.status == "failed":
        f.say(
            "warning", "wiring", against, "the wiring did not hold when the network was run",
            "a wiring proved by running", "wire the module with example inputs",
        )  # fmt: skip
    if f.given_wiring is not None:
        return
    from weightspace.wiring import wiring as find

    for name, model in f.others().items():
        if name in f.unlike or name in f.unusable or model.path is None:
            # Tensors in memory say nothing beyond the names and shapes that were compared already.
            continue
        if _one_network(f.reference[1], model):
            continue
        try:
            other = find(model)
        except WeightspaceError as error:
            f.skipped[f"wiring of {name}"] = one_line(error)
            continue
        apart = _apart(wiring, other)
        if apart:
            f.say(
                "stop", "wiring", name, f"the same names and shapes as {against}, but another network: {apart}",
                f"the wiring of {against}", "merge models of one architecture",
            )  # fmt: skip


def _one_network(one: Checkpoint, two: Checkpoint) -> bool:
    """Do the files describe their networks themselves, and in the same words? Their wiring is one then."""
    told = [c.metadata.get("model_config") for c in (one, two)]
    if told[0] is not None:
        return bool(told[0] == told[1])
    silent = SILENT - {"architectures", "pruned_heads", "vocab_size"}
    known = [{k: v for k, v in (c.config or {}).items() if k not in silent} for c in (one, two)]
    return bool(known[0].get("model_type")) and plain(known[0]) == plain(known[1])


def _apart(one: Wiring, two: Wiring) -> str:
    """In what two wirings of the same names and shapes differ, or nothing."""
    free = [Counter((x.size, tuple(w.factors[o].size for o in x.over)) for x in w.free.values()) for w in (one, two)]
    if one.activations and two.activations:
        used = [Counter(a for names in w.activations.values() for a in names) for w in (one, two)]
        if used[0] != used[1]:
            names = [", ".join(dict(u)) or "none" for u in used]
            return f"nonlinear functions {names[1]} where {names[0]} were expected"
    if one.frequencies != two.frequencies:
        return f"frequencies {sorted(set(two.frequencies.values()))}, expected {sorted(set(one.frequencies.values()))}"
    if one.roles and two.roles and dict(one.roles) != dict(two.roles):
        other = [n for n in one.roles if two.roles.get(n) != one.roles[n]]
        return f"{other[0]} is a {two.roles.get(other[0])}, expected a {one.roles[other[0]]}"
    if free[0] != free[1]:
        return f"movable factors {dict(free[1] - free[0])} where {dict(free[0] - free[1])} were expected"
    return ""


__all__ = ["adapters", "quantised", "tensors", "wirings"]
