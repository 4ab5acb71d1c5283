"""Can these models be merged at all? What can be said from the files alone, before anything is merged.

``preflight(models, base)`` reads the models once, tensor by tensor, and lists findings: what was found, what was
expected, what to do. A *stop* makes merging these files wrong or impossible as they are; a *warning* makes it likely
to disappoint; a *note* is good to know.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from weightspace.checkpoint import Checkpoint
from weightspace.errors import CheckpointError, WeightspaceError
from weightspace.mergeability import health as vitals

if TYPE_CHECKING:
    from weightspace.mergeability.protection import Protection
    from weightspace.wiring.wiring import Wiring

Severity = Literal["stop", "warning", "note"]
Model = str | os.PathLike[str] | Checkpoint | Mapping[str, torch.Tensor]

CHECKS = (
    "adapters", "quantised", "tensors", "wiring", "configuration", "tokeniser", "dtype", "values", "equal", "ancestry",
    "protection",
)  # fmt: skip
"""What ``preflight`` looks at, in this order."""


@dataclass(frozen=True)
class Finding:
    """One thing that was found. ``models`` are the names of those it speaks of, ``tensors`` where it lies."""

    severity: Severity
    check: str
    models: tuple[str, ...]
    found: str
    expected: str
    remedy: str
    tensors: tuple[str, ...] = ()

    def __repr__(self) -> str:
        return f"{self.severity}: {self.sentence}"

    @property
    def sentence(self) -> str:
        """All three in one line."""
        who = f"{', '.join(self.models)}: " if self.models else ""
        return f"{who}{self.found}; expected: {self.expected}; {self.remedy}"


@dataclass(frozen=True)
class Preflight:
    """What was found before a merge. ``ok`` unless something stops it.

    ``models`` and ``base`` are names; ``wiring`` is "proved", "unverified", "failed" or "none"; ``ancestry`` and
    ``protection`` hold what those two checks measured, model by model; ``skipped`` says which checks could not be made,
    and why. ``undone``: tensors of protected models without the protection, which compute the same.
    """

    models: tuple[str, ...]
    base: str | None
    wiring: str
    findings: tuple[Finding, ...]
    ancestry: tuple[Any, ...] = ()
    protection: tuple[Any, ...] = ()
    skipped: Mapping[str, str] = field(default_factory=dict)
    seconds: float = 0.0
    undone: Mapping[str, Mapping[str, torch.Tensor]] = field(default_factory=dict, repr=False)

    @property
    def ok(self) -> bool:
        """True when nothing was found that stops the merge."""
        return not self.of("stop")

    @property
    def clean(self) -> bool:
        """True when there is neither a stop nor a warning."""
        return not self.of("stop") and not self.of("warning")

    def of(self, severity: str | None = None, check: str | None = None) -> tuple[Finding, ...]:
        """The findings of one severity, of one check, or both."""
        return tuple(
            f
            for f in self.findings
            if (severity is None or f.severity == severity) and (check is None or f.check == check)
        )

    def to_json(self) -> dict[str, Any]:
        """Everything as values that ``json.dumps`` takes."""
        return {
            "models": list(self.models),
            "base": self.base,
            "ok": self.ok,
            "wiring": self.wiring,
            "findings": [asdict(f) for f in self.findings],
            "ancestry": [a.to_json() for a in self.ancestry],
            "protection": [p.to_json() for p in self.protection],
            "skipped": dict(self.skipped),
            "seconds": self.seconds,
        }

    def __repr__(self) -> str:
        counts = Counter(f.severity for f in self.findings)
        base = "no base" if self.base is None else f"base {self.base}"
        said = ", ".join(f"{counts[s]} {s}{'s' if counts[s] != 1 else ''}" for s in ("stop", "warning", "note"))
        verdict = "can be merged" if self.ok else "cannot be merged as they are"
        lines = [
            f"Preflight({len(self.models)} models, {base}: {verdict}; {said}; "
            f"wiring {self.wiring}, {self.seconds:.1f} s)"
        ]
        for severity in ("stop", "warning", "note"):
            lines += [f"  {severity:<8}{f.check}: {f.sentence}" for f in self.of(severity)]
        lines += [f"  not made {check}: {why}" for check, why in self.skipped.items()]
        return "\n".join(lines)


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
    flight.base_name = None if base is None else _name(base, "base")
    flight.given_wiring = wiring
    flight.step = step or (lambda _: None)
    for check in CHECKS:
        if check in checks:
            _STEPS[check](flight)
    return flight


# ------------------------------------------------------------------------------------ what the checks share


@dataclass
class Flight:
    """Models under examination, and what is known of them so far.

    ``unlike``: models whose tensors are others than the reference's; ``broken``: with values that are not finite;
    ``unusable``: that cannot be read as weights. None of these can be scored.
    """

    models: dict[str, Checkpoint]
    base: Checkpoint | None
    seed: int
    base_name: str | None = None
    given_wiring: Wiring | None = None
    wiring: Wiring | None = None
    wiring_sought: bool = False
    findings: list[Finding] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)
    ancestry: list[Any] = field(default_factory=list)
    protection: list[Any] = field(default_factory=list)
    related: dict[str, Any] = field(default_factory=dict)
    seen: vitals.Health | None = None
    # Of another architecture: nothing else need be said of their settings.
    foreign: set[str] = field(default_factory=set)
    unlike: set[str] = field(default_factory=set)
    broken: set[str] = field(default_factory=set)
    unusable: set[str] = field(default_factory=set)
    undone: dict[str, Mapping[str, torch.Tensor]] = field(default_factory=dict)
    step: Callable[[str], object] = field(default=lambda _: None, repr=False)
    started: float = field(default_factory=time.perf_counter)

    def report(self) -> Preflight:
        """What was found, the gravest first."""
        order = {"stop": 0, "warning": 1, "note": 2}
        return Preflight(
            tuple(self.models), self.base_name, "none" if self.wiring is None else self.wiring.status,
            tuple(sorted(self.findings, key=lambda f: order[f.severity])), tuple(self.ancestry), tuple(self.protection),
            self.skipped, time.perf_counter() - self.started, self.undone,
        )  # fmt: skip

    def say(
        self, severity: Severity, check: str, models: Sequence[str] | str, found: str, expected: str, remedy: str,
        tensors: Sequence[str] = (),
    ) -> None:  # fmt: skip
        who = (models,) if isinstance(models, str) else tuple(models)
        self.findings.append(Finding(severity, check, who, found, expected, remedy, tuple(tensors)))

    @property
    def reference(self) -> tuple[str, Checkpoint]:
        """What each model is held against: the base, or the first model that can be read as one."""
        if self.base is not None:
            return self.base_name or "base", self.base
        name = next((n for n in self.models if n not in self.unusable), next(iter(self.models)))
        return name, self.models[name]

    def others(self) -> dict[str, Checkpoint]:
        """The models but the reference."""
        reference = self.reference[1]
        return {n: c for n, c in self.models.items() if c is not reference}

    def find_wiring(self) -> Wiring | None:
        """The reference's wiring, sought once."""
        if not self.wiring_sought:
            self.wiring_sought = True
            self.wiring = self.given_wiring
            if self.wiring is None:
                from weightspace.wiring import wiring as find

                try:
                    self.wiring = find(self.reference[1])
                except WeightspaceError as error:
                    self.skipped["wiring"] = _one_line(error)
        return self.wiring


def named(models: Sequence[Model] | Mapping[str, Model]) -> dict[str, Model]:
    """Models by name: that of the file or folder, with as many of the folders above as tell them apart."""
    if isinstance(models, str | os.PathLike | Checkpoint):
        models = [models]
    if isinstance(models, Mapping):
        if models and all(isinstance(v, torch.Tensor) for v in models.values()):
            raise WeightspaceError(
                "the models are a mapping of tensors, which is one model; expected a list of models, or a mapping of "
                "names to models"
            )
        return {str(n): m for n, m in models.items()}
    listed = list(models)
    names = [_name(model, f"model {i}") for i, model in enumerate(listed)]
    for parts in (2, 3, 4):
        often = Counter(names)
        names = [_name(m, n, parts) if often[n] > 1 else n for n, m in zip(names, listed, strict=True)]
    found: dict[str, Model] = {}
    for name, model in zip(names, listed, strict=True):
        unique, k = name, 2
        while unique in found:
            unique, k = f"{name} ({k})", k + 1
        found[unique] = model
    return found


def _name(model: Model, otherwise: str, parts: int = 1) -> str:
    path = model.path if isinstance(model, Checkpoint) else model if isinstance(model, str | os.PathLike) else None
    if path is None:
        return otherwise
    return "/".join(Path(path).absolute().parts[-parts:])


def opened(model: Model) -> Checkpoint:
    """A model as a checkpoint: a file or folder (also ``file!member``), a checkpoint, or a mapping of tensors."""
    from weightspace.checkpoint import from_tensors
    from weightspace.checkpoint import open as open_checkpoint

    if isinstance(model, Checkpoint):
        return model
    if not isinstance(model, str | os.PathLike):
        if not isinstance(model, Mapping) or not all(isinstance(v, torch.Tensor) for v in model.values()):
            raise WeightspaceError(
                f"found {type(model).__name__} as a model, expected a path, a checkpoint or a mapping of tensors"
            )
        return from_tensors(model)
    text = os.fspath(model)
    if "!" in text and not Path(text).exists():
        path, _, member = text.partition("!")
        return open_checkpoint(path, member=member)
    return open_checkpoint(model)


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _listed(names: Sequence[str], most: int = 4) -> str:
    shown = ", ".join(map(str, names[:most]))
    return shown if len(names) <= most else f"{shown} and {len(names) - most} more"


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
                "stop", "adapters", name, f"a LoRA adapter that does not fit the base ({_one_line(error)})",
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
    for name, model in _all(f).items():
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
            f"quantised weights{method}: {_listed(kinds)} in {len(whole) or len(types or ()) or 'some'} tensors",
            "weights in float32, float16 or bfloat16", "dequantise it, or take the model that was quantised",
            (*whole, *marked),
        )  # fmt: skip
        if not gguf:
            f.unusable.add(name)


def _all(f: Flight) -> dict[str, Checkpoint]:
    return {**({f.base_name or "base": f.base} if f.base is not None else {}), **f.models}


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
            also = f", and {len(extra)} that {against} has not ({_listed(extra)})" if extra else ""
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
                f"{len(missing)} of {len(reference)} tensors of {against} are absent ({_listed(missing)}){also}"
                if missing else f"{len(extra)} tensors that {against} has not ({_listed(extra)})",
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
            f.skipped[f"wiring of {name}"] = _one_line(error)
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
    silent = _SILENT - {"architectures", "pruned_heads", "vocab_size"}
    known = [{k: v for k, v in (c.config or {}).items() if k not in silent} for c in (one, two)]
    return bool(known[0].get("model_type")) and _plain(known[0]) == _plain(known[1])


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


# ------------------------------------------------------------------------------------ configuration, tokeniser, dtype

_STOPS = {
    "model_type", "hidden_act", "hidden_activation", "activation_function", "activation", "hidden_size", "n_embd",
    "num_attention_heads", "n_head", "num_key_value_heads", "num_hidden_layers", "n_layer", "head_dim", "rope_theta",
    "rope_scaling", "rope_parameters", "position_embedding_type", "intermediate_size", "patch_size",
    "tie_word_embeddings",
    "layer_norm_eps", "layer_norm_epsilon", "rms_norm_eps", "norm_eps", "sliding_window", "partial_rotary_factor",
    "image_size", "num_channels", "scale_attn_weights", "final_logit_softcapping", "attn_logit_softcapping",
    "n_inner", "num_experts_per_tok", "num_local_experts", "network",
}  # fmt: skip
_LABELS = {"id2label", "label2id", "num_labels", "problem_type"}
_SILENT = {
    "_name_or_path", "transformers_version", "torch_dtype", "dtype", "use_cache", "architectures", "output_attentions",
    "output_hidden_states", "return_dict", "torchscript", "gradient_checkpointing", "_attn_implementation",
    "_commit_hash",
    "finetuning_task", "task_specific_params", "vocab_size", "quantization_config", "pruned_heads", "auto_map",
}  # fmt: skip
_EPSILONS = ("eps", "epsilon")


def _configuration(f: Flight) -> None:
    """Entries of the configuration that change the function, the labels, or only the run."""
    against, reference = f.reference
    known = settings_of(reference)
    if not known:
        return
    for name, model in f.others().items():
        given = settings_of(model)
        if name in f.unusable or name in f.foreign or not given or model.format == "peft":
            continue
        differing = [k for k in sorted({*known, *given} - _SILENT) if _plain(known.get(k)) != _plain(given.get(k))]
        for key in (k for k in differing if k in _STOPS):
            eps = key.endswith(_EPSILONS)
            f.say(
                "warning" if eps or key == "tie_word_embeddings" else "stop", "configuration", name,
                f"{key} is {_short(given.get(key))}", f"{_short(known.get(key))} as in {against}",
                "the tensors mean different functions under these settings: merge models of one configuration, or say "
                "which one the merged model takes" if not eps else "say which one the merged model takes",
            )  # fmt: skip
        labels = [k for k in differing if k in _LABELS]
        if labels:
            theirs, ours = (_labels(x) for x in (given, known))
            f.say(
                "warning", "configuration", name,
                f"labels {_short(theirs)}", f"{_short(ours)} as in {against}",
                "the outputs mean different classes: keep a head for each, or bring the labels into one order",
            )  # fmt: skip
        rest = [k for k in differing if k not in _STOPS and k not in _LABELS]
        if rest:
            f.say(
                "note", "configuration", name,
                f"the configuration differs in {_listed([f'{k} ({_short(given.get(k))})' for k in rest])}",
                f"that of {against}", "say which one the merged model takes",
            )  # fmt: skip


def settings_of(model: Checkpoint) -> dict[str, Any]:
    """The configuration, with the network that a record of the zoo describes."""
    found = dict(model.config or {})
    record = model.metadata.get("weightspace")
    if isinstance(record, str):
        try:
            record = json.loads(record)
        except ValueError:
            record = None
    if isinstance(record, Mapping) and isinstance(record.get("network"), Mapping):
        found["network"] = dict(record["network"])
    return found


def _labels(config: Mapping[str, Any]) -> Any:
    named = config.get("id2label")
    if isinstance(named, Mapping):
        return [str(named[k]) for k in sorted(named, key=lambda k: int(k) if str(k).isdigit() else 0)]
    return config.get("num_labels")


def _plain(x: Any) -> str:
    return json.dumps(x, sort_keys=True, default=str)


def _short(x: Any) -> str:
    text = x if isinstance(x, str) else _plain(x)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _tokeniser(f: Flight) -> None:
    """The vocabularies that lie beside the weights, compared as mappings of tokens to numbers."""
    against, reference = f.reference
    known = vocabulary_of(reference)
    for name, model in f.others().items():
        given = vocabulary_of(model)
        if known is None or given is None or known == given:
            continue
        if not isinstance(known, dict) or not isinstance(given, dict):
            f.say(
                "warning", "tokeniser", name, "the tokeniser's files are others", f"those of {against}",
                "check that both were made with one vocabulary",
            )  # fmt: skip
            continue
        moved = sum(1 for t, i in known.items() if t in given and given[t] != i)
        added, gone = len(given.keys() - known.keys()), len(known.keys() - given.keys())
        only_more = not moved and not gone
        f.say(
            "warning" if only_more else "stop", "tokeniser", name,
            f"a vocabulary of {len(given):,} tokens: {moved:,} with another number, {added:,} new, {gone:,} absent",
            f"the {len(known):,} of {against}",
            "take the rows of the common tokens, and decide about the new ones" if only_more
            else "bring both embeddings into one order of tokens before merging",
        )  # fmt: skip


_WHOLE = ("vocab.txt", "spiece.model", "tokenizer.model", "sentencepiece.bpe.model")


def vocabulary_of(model: Checkpoint) -> dict[str, int] | str | None:
    """Tokens and their numbers from the files beside a model; a hash where the file is binary; None without files.

    Looks at tokenizer.json, vocab.json (with added_tokens.json), vocab.txt and sentencepiece models of a local folder.
    """
    if model.path is None:
        return None
    folder = model.path if model.path.is_dir() else model.path.parent
    if model.format not in ("hf-folder", "peft") and not (folder / "config.json").is_file():
        return None
    tokens: dict[str, int] = {}
    try:
        if (folder / "tokenizer.json").is_file():
            told = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
            vocab = told.get("model", {}).get("vocab", {})
            if isinstance(vocab, list):
                tokens = {str(entry[0]): i for i, entry in enumerate(vocab)}
            elif isinstance(vocab, dict):
                tokens = {str(t): int(i) for t, i in vocab.items()}
            tokens |= {str(t["content"]): int(t["id"]) for t in told.get("added_tokens", ()) if "content" in t}
            return tokens or None
        if (folder / "vocab.json").is_file():
            for file in ("vocab.json", "added_tokens.json"):
                if (folder / file).is_file():
                    told = json.loads((folder / file).read_text(encoding="utf-8"))
                    tokens |= {str(t): int(i) for t, i in told.items()}
            return tokens
        if (folder / "vocab.txt").is_file():
            lines = (folder / "vocab.txt").read_text(encoding="utf-8").splitlines()
            return {t: i for i, t in enumerate(lines)}
    except (ValueError, TypeError, KeyError, AttributeError, IndexError, OSError) as error:
        return f"unreadable: {_one_line(error)}"
    import hashlib

    for file in _WHOLE:
        if (folder / file).is_file():
            return hashlib.sha256((folder / file).read_bytes()).hexdigest()
    return None


def _dtype(f: Flight) -> None:
    kinds = {n: _main_dtype(c) for n, c in _all(f).items() if n not in f.unusable}
    names = {n: str(d).removeprefix("torch.") for n, d in kinds.items() if d is not None}
    if len(set(names.values())) > 1:
        said = ", ".join(f"{n} {d}" for n, d in names.items())
        f.say(
            "note", "dtype", (), f"element types differ: {said}", "one type",
            "merging computes in float32; choose the type of the result (dtype=)",
        )  # fmt: skip
    for name, model in _all(f).items():
        mixed = Counter(
            str(d).removeprefix("torch.") for d in model.dtypes.values() if d.is_floating_point and d.itemsize >= 2
        )
        if len(mixed) > 1:
            said = ", ".join(f"{d} × {n}" for d, n in mixed.most_common())
            f.say("note", "dtype", name, f"several element types: {said}", "one type", "each tensor keeps its own")


def _main_dtype(model: Checkpoint) -> torch.dtype | None:
    counts: Counter[torch.dtype] = Counter()
    for t, d in model.dtypes.items():
        if d.is_floating_point:
            counts[d] += math.prod(model.shape(t))
    return counts.most_common(1)[0][0] if counts else None


# ------------------------------------------------------------------------------------ values


def _values(f: Flight) -> None:
    found = _health(f)
    against = f.reference[0] if f.base is not None else "the other models"
    for name, broken in found.broken.items():
        who = (f.base_name or "base") if name == vitals.BASE and f.base is not None else name
        if broken:
            f.broken.add(who)
            f.say(
                "stop", "values", who, f"{sum(broken.values()):,} values are not finite, in {_listed(list(broken))}",
                "finite weights", "take an earlier checkpoint: every method would spread them", list(broken),
            )  # fmt: skip
    for name in f.models:
        if found.constant.get(name):
            tensors = found.constant[name]
            f.say(
                "warning", "values", name, f"{len(tensors)} tensors hold one value only ({_listed(tensors)})",
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
                f"{len(found.lost)} tensors show no trace of {against} ({_listed(found.lost)})",
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
                f.skipped["protection"] = _one_line(error)
                return
        _found(f, name, found)


def _large(f: Flight, models: Mapping[str, Checkpoint], wiring: Wiring) -> None:
    """Networks that were proved on a small twin: maps inside heads, layer by layer."""
    from weightspace.mergeability.large import examine_large, kinds_of

    try:
        kinds = kinds_of(f.reference[1])
    except WeightspaceError as error:
        f.skipped["protection"] = _one_line(error)
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
        f"moved inside its orbit, so that it computes the same and cannot be averaged: {_listed(moved)}; "
        f"distance to {against} {found.before:.2f}, and {found.after:.2f} once that is undone",
        "neurons, heads and scales as in the base",
        "merge the undone copy, which computes the same (`.undone` of this report; on the command line "
        "`weightspace score … --undone FOLDER` writes it)",
    )  # fmt: skip


_STEPS = {
    "adapters": _adapters, "quantised": _quantised, "tensors": _tensors, "wiring": _wiring,
    "configuration": _configuration, "tokeniser": _tokeniser, "dtype": _dtype, "values": _values, "equal": _equal,
    "ancestry": _ancestry, "protection": _protection,
}  # fmt: skip

__all__ = [
    "CHECKS", "Finding", "Flight", "Model", "Preflight", "Severity", "fly", "named", "opened", "preflight",
    "settings_of", "vocabulary_of",
]  # fmt: skip
