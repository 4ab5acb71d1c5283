"""Can these models be merged at all? What can be said from the files alone, before anything is merged.

``preflight(models, base)`` reads the models once, tensor by tensor, and lists findings: what was found, what was
expected, what to do. A *stop* makes merging these files wrong or impossible as they are; a *warning* makes it likely
to disappoint; a *note* is good to know.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from weightspace.checkpoint import Checkpoint
from weightspace.errors import CheckpointError, WeightspaceError
from weightspace.mergeability import health as vitals
from weightspace.mergeability.configuration import (
    SILENT,
    configuration,
    dtype,
    plain,
    settings_of,
    tokeniser,
    vocabulary_of,
)
from weightspace.mergeability.flight import (
    CHECKS,
    Finding,
    Flight,
    Model,
    Preflight,
    Severity,
    everything,
    listed,
    name_of,
    named,
    one_line,
    opened,
)

if TYPE_CHECKING:
    from weightspace.mergeability.protection import Protection
    from weightspace.wiring.wiring import Wiring


def preflight(
    models: Sequence[Model] | Mapping[str, Model],
    base: Model | None = None,
    *,
    wiring: Wiring | None = None,
    checks: Collection[str] = CHECKS,
    seed: int = 0,
) -> Preflight:
    """Look at models, and the base they come from, before they are merged.

    ``models``: paths, checkpoints or mappings of tensors, or a mapping of names to such. Each is held against the base,
    or against the first model where there is none. ``wiring``: the models' wiring where it is known; otherwise it is
    found from the reference. ``checks``: some of ``CHECKS``. ``seed`` draws the null distribution of the ancestry test.

    Tensors are read one at a time for everything but the search for permuted or protected copies, which holds two
    models. Raises ``WeightspaceError`` for an unknown check or a file that cannot be opened; whatever else is wrong
    with the models is a finding.
    """
    return fly(models, base, wiring=wiring, checks=checks, seed=seed).report()


def fly(
    models: Sequence[Model] | Mapping[str, Model], base: Model | None = None, *, wiring: Wiring | None = None,
    checks: Collection[str] = CHECKS, seed: int = 0, step: Callable[[str], object] | None = None,
) -> Flight:  # fmt: skip
    """``preflight`` with what it worked with: models as they were opened, adapters merged into their base, the wiring.

    ``step`` is called with a word before each model that takes time.
    """
    unknown = sorted(set(checks) - set(CHECKS))
    if unknown:
        raise WeightspaceError(f"there is no check {unknown[0]!r}; expected some of {', '.join(CHECKS)}")
    given = named(models)
    if not given:
        raise WeightspaceError("no models were given; expected one or more paths, checkpoints or mappings of tensors")
    flight = Flight({n: opened(m) for n, m in given.items()}, None if base is None else opened(base), seed)
    flight.base_name = None if base is None else name_of(base, "base")
    flight.given_wiring = wiring
    flight.step = step or (lambda _: None)
    for check in CHECKS:
        if check in checks:
            _STEPS[check](flight)
    return flight


# ------------------------------------------------------------------------------------ adapters, quantisation


def _adapters(f: Flight) -> None:
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


def _quantised(f: Flight) -> None:
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


# ------------------------------------------------------------------------------------ names, shapes, wiring


def _tensors(f: Flight) -> None:
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


def _wiring(f: Flight) -> None:
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


# ------------------------------------------------------------------------------------ values


def _values(f: Flight) -> None:
    found = _health(f)
    against = f.reference[0] if f.base is not None else "the other models"
    for name, broken in found.broken.items():
        who = (f.base_name or "base") if name == vitals.BASE and f.base is not None else name
        if broken:
            f.broken.add(who)
            f.say(
                "stop", "values", who, f"{sum(broken.values()):,} values are not finite, in {listed(list(broken))}",
                "finite weights", "take an earlier checkpoint: every method would spread them", list(broken),
            )  # fmt: skip
    for name in f.models:
        if found.constant.get(name):
            tensors = found.constant[name]
            f.say(
                "warning", "values", name, f"{len(tensors)} tensors hold one value only ({listed(tensors)})",
                f"trained values, as in {against}", "check that the file is whole; leave these tensors out", tensors,
            )  # fmt: skip
        if found.dead.get(name):
            dead = found.dead[name]
            worst = max(dead, key=lambda t: dead[t])
            f.say(
                "warning", "values", name,
                f"{sum(dead.values()):,} rows or columns are zero, {dead[worst]} of them in {worst}",
                f"none beyond those of {against}",
                "pruned or dead units: merging halves what the other model does there",
                list(dead),
            )  # fmt: skip
        if found.collapsed.get(name):
            low = found.collapsed[name]
            worst = min(low, key=lambda t: low[t][0] / low[t][1])
            f.say(
                "warning", "values", name,
                f"{len(low)} matrices have lost rank; {worst} has an effective rank of {low[worst][0]:.1f}",
                f"about {low[worst][1]:.1f} as in {against}", "the layer has collapsed: leave it out, or this model",
                list(low),
            )  # fmt: skip
        if found.scaled.get(name):
            scaled = found.scaled[name]
            worst = max(scaled, key=lambda t: abs(math.log(scaled[t][0] / scaled[t][1])))
            f.say(
                "warning", "values", name,
                f"{len(scaled)} tensors stand out by their norm; {worst} has {scaled[worst][0]:.2f} times the norm in "
                f"{against}",
                f"about {scaled[worst][1]:.2f} times, as the model's other tensors",
                "a scaled layer (or one trained at another rate): rescale it, or use a method that normalises task "
                "vectors", list(scaled),
            )  # fmt: skip


def _health(f: Flight) -> vitals.Health:
    if f.seen is None:
        f.seen = vitals.examine({n: c for n, c in f.models.items() if n not in f.unusable}, f.base)
    return f.seen


def _equal(f: Flight) -> None:
    found = _health(f)
    groups: dict[str, list[str]] = {}
    for name, digest in found.digests.items():
        if name not in f.unusable:
            groups.setdefault(digest, []).append(name)
    for same in groups.values():
        if len(same) > 1:
            f.say(
                "warning", "equal", same, f"{len(same)} models have the same weights", "different models",
                "give each once, and its weight in the merge instead",
            )  # fmt: skip
    for name, share in found.shared.items():
        if f.base is None or not share:
            continue
        if share == 1.0:
            f.say(
                "warning", "equal", name, f"the weights are those of {f.base_name}", "a fine-tuned model",
                "leave it out",
            )  # fmt: skip
        else:
            f.say(
                "note", "equal", name, f"{share:.0%} of the parameters are unchanged from {f.base_name}",
                "any share", "frozen layers: they stay as they are in the merge",
            )  # fmt: skip


# ------------------------------------------------------------------------------------ ancestry, protection


def _pairs(f: Flight, check: str) -> dict[str, Checkpoint]:
    """Models that can be held against the reference weight by weight; why not, where they cannot."""
    found = {}
    for name, model in f.others().items():
        if name in f.unlike or name in f.unusable:
            continue
        if name in f.broken or f.reference[0] in f.broken:
            f.skipped[f"{check} of {name}"] = "there are values that are not finite"
        elif f.seen is not None and f.base is not None and f.seen.shared.get(name) == 1.0:
            # The same weights: nothing to test.
            continue
        else:
            found[name] = model
    return found


def _ancestry(f: Flight) -> None:
    """Each model against the reference, with its null distribution."""
    from weightspace.mergeability.ancestry import ancestry

    models = _pairs(f, "ancestry")
    wiring = f.find_wiring() if models else None
    against, reference = f.reference
    for name, model in models.items():
        f.step(f"ancestry of {name}")
        if wiring is None or wiring.status == "failed":
            f.skipped["ancestry"] = "it needs a wiring"
            return
        found = ancestry(
            reference, model, wiring, align=wiring.proved and _fits(f, reference), seed=f.seed, names=(against, name)
        )
        f.related[name] = found
        f.ancestry.append(found if found.aligned is None else replace(found, aligned=_light(found.aligned)))
        if found.relation == "unrelated":
            f.say(
                "warning", "ancestry", name, found.statement, f"an ancestor in common with {against}",
                "averages of unrelated networks fail: align them first, or choose models of one base",
            )  # fmt: skip
        elif found.relation == "unknown":
            f.skipped[f"ancestry of {name}"] = found.note
        elif found.relation == "same ancestor" and found.lost:
            f.say(
                "note", "ancestry", name,
                f"{len(found.lost)} tensors show no trace of {against} ({listed(found.lost)})",
                "correspondence in every layer", "layers made anew, such as a head, or moved ones: merge without them",
                found.lost,
            )  # fmt: skip


_MOST = 100_000_000
"""Models of up to as many values are brought near each other, which holds both in memory in float64."""


def _fits(f: Flight, reference: Checkpoint) -> bool:
    return reference.num_parameters <= _MOST


def _light(found: Any) -> Any:
    """Without the tensors of a model that was not protected, which the caller has."""
    return found if found.protected else replace(found, tensors={})


def _protection(f: Flight) -> None:
    """Copies moved inside their orbit, found against the reference, and what is left once that is undone."""
    from weightspace.errors import UnprovedWiringError
    from weightspace.mergeability.protection import Reference, examine

    models = _pairs(f, "protection")
    wiring = f.find_wiring() if models else None
    reference = f.reference[1]
    held: Reference | None = None
    for name, model in models.items():
        f.step(f"protection of {name}")
        if wiring is None or not wiring.proved:
            f.skipped["protection"] = "it needs a proved wiring"
            return
        if wiring.program is None and wiring.origin.startswith("transformers:"):
            _large(f, models, wiring)
            return
        if not _fits(f, reference):
            f.skipped["protection"] = (
                f"{reference.num_parameters:,} values, more than {_MOST:,}: call "
                "weightspace.mergeability.protection.examine where memory allows"
            )
            return
        known = f.related.get(name)
        if known is not None and known.relation == "unrelated" and known.aligned is not None:
            found = known.aligned
        else:
            try:
                found = known.aligned if known is not None and known.aligned is not None else None
                if found is None:
                    held = held or Reference(reference, wiring)
                    found = examine(model, held, wiring)
            except UnprovedWiringError as error:
                f.skipped["protection"] = one_line(error)
                return
        _found(f, name, found)


def _large(f: Flight, models: Mapping[str, Checkpoint], wiring: Wiring) -> None:
    """Networks that were proved on a small twin: maps inside heads, layer by layer."""
    from weightspace.mergeability.large import examine_large, kinds_of

    try:
        kinds = kinds_of(f.reference[1])
    except WeightspaceError as error:
        f.skipped["protection"] = one_line(error)
        return
    for name, model in models.items():
        f.step(f"protection of {name}")
        _found(f, name, examine_large(model, f.reference[1], wiring, kinds))
    f.skipped["protection by permutations and scales"] = (
        f"the network is too large to be run ({f.reference[1].num_parameters:,} values); maps inside heads were sought"
    )


def _found(f: Flight, name: str, found: Protection) -> None:
    """Keep what was found of a model, and say it where it is protected."""
    against = f.reference[0]
    f.protection.append(_light(found))
    if not found.protected:
        return
    # Layers that lost their correspondence are accounted for.
    f.findings = [x for x in f.findings if x.check != "ancestry" or x.models != (name,)]
    f.undone[name] = found.tensors
    moved = list(dict.fromkeys(f"{e.kind} ({e.factor})" for e in found.evidence))
    f.say(
        "stop", "protection", name,
        f"moved inside its orbit, so that it computes the same and cannot be averaged: {listed(moved)}; "
        f"distance to {against} {found.before:.2f}, and {found.after:.2f} once that is undone",
        "neurons, heads and scales as in the base",
        "merge the undone copy, which computes the same (`.undone` of this report; on the command line "
        "`weightspace score … --undone FOLDER` writes it)",
    )  # fmt: skip


_STEPS = {
    "adapters": _adapters, "quantised": _quantised, "tensors": _tensors, "wiring": _wiring,
    "configuration": configuration, "tokeniser": tokeniser, "dtype": dtype, "values": _values, "equal": _equal,
    "ancestry": _ancestry, "protection": _protection,
}  # fmt: skip

__all__ = [
    "CHECKS", "Finding", "Flight", "Model", "Preflight", "Severity", "fly", "named", "opened", "preflight",
    "settings_of", "vocabulary_of",
]  # fmt: skip
