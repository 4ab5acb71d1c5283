"""Checks of what stands beside the weights: configuration, labels, tokeniser, types."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch

from weightspace.checkpoint import Checkpoint
from weightspace.mergeability.flight import Flight, everything, listed, one_line

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
SILENT = {
    "_name_or_path", "transformers_version", "torch_dtype", "dtype", "use_cache", "architectures", "output_attentions",
    "output_hidden_states", "return_dict", "torchscript", "gradient_checkpointing", "_attn_implementation",
    "_commit_hash",
    "finetuning_task", "task_specific_params", "vocab_size", "quantization_config", "pruned_heads", "auto_map",
}  # fmt: skip
_EPSILONS = ("eps", "epsilon")


def configuration(f: Flight) -> None:
    """Entries of the configuration that change the function, the labels, or only the run."""
    against, reference = f.reference
    known = settings_of(reference)
    if not known:
        return
    for name, model in f.others().items():
        given = settings_of(model)
        if name in f.unusable or name in f.foreign or not given or model.format == "peft":
            continue
        differing = [k for k in sorted({*known, *given} - SILENT) if plain(known.get(k)) != plain(given.get(k))]
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
                f"the configuration differs in {listed([f'{k} ({_short(given.get(k))})' for k in rest])}",
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


def plain(x: Any) -> str:
    return json.dumps(x, sort_keys=True, default=str)


def _short(x: Any) -> str:
    text = x if isinstance(x, str) else plain(x)
    return text if len(text) <= 80 else f"{text[:77]}..."


def tokeniser(f: Flight) -> None:
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
        return f"unreadable: {one_line(error)}"
    import hashlib

    for file in _WHOLE:
        if (folder / file).is_file():
            return hashlib.sha256((folder / file).read_bytes()).hexdigest()
    return None


def dtype(f: Flight) -> None:
    kinds = {n: _main_dtype(c) for n, c in everything(f).items() if n not in f.unusable}
    names = {n: str(d).removeprefix("torch.") for n, d in kinds.items() if d is not None}
    if len(set(names.values())) > 1:
        said = ", ".join(f"{n} {d}" for n, d in names.items())
        f.say(
            "note", "dtype", (), f"element types differ: {said}", "one type",
            "merging computes in float32; choose the type of the result (dtype=)",
        )  # fmt: skip
    for name, model in everything(f).items():
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


__all__ = ["SILENT", "configuration", "dtype", "plain", "settings_of", "tokeniser", "vocabulary_of"]
