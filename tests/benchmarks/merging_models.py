"""Synthetic models for the merging benchmarks: tensors and configuration of a small Llama, and fine-tunes of it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file

SIZES: dict[str, dict[str, int]] = {
    "2M": {"hidden": 128, "inner": 352, "layers": 4, "heads": 4, "vocabulary": 4000},
    "63M": {"hidden": 512, "inner": 1280, "layers": 10, "heads": 8, "vocabulary": 32000},
    "301M": {"hidden": 1024, "inner": 2896, "layers": 18, "heads": 16, "vocabulary": 32000},
}


def config(size: str, dtype: torch.dtype) -> dict[str, object]:
    """A configuration that transformers and mergekit read."""
    s = SIZES[size]
    return {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": s["hidden"],
        "intermediate_size": s["inner"], "num_hidden_layers": s["layers"], "num_attention_heads": s["heads"],
        "num_key_value_heads": s["heads"], "vocab_size": s["vocabulary"], "max_position_embeddings": 512,
        "rms_norm_eps": 1e-5, "tie_word_embeddings": False, "hidden_act": "silu",
        "torch_dtype": str(dtype).removeprefix("torch."),
    }  # fmt: skip


def shapes(size: str) -> dict[str, tuple[int, ...]]:
    """Names and shapes in the order of the architecture."""
    s = SIZES[size]
    hidden, inner, vocabulary = s["hidden"], s["inner"], s["vocabulary"]
    out: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocabulary, hidden)}
    for i in range(s["layers"]):
        layer = f"model.layers.{i}"
        for name in "qkvo":
            out[f"{layer}.self_attn.{name}_proj.weight"] = (hidden, hidden)
        out[f"{layer}.mlp.gate_proj.weight"] = (inner, hidden)
        out[f"{layer}.mlp.up_proj.weight"] = (inner, hidden)
        out[f"{layer}.mlp.down_proj.weight"] = (hidden, inner)
        out[f"{layer}.input_layernorm.weight"] = (hidden,)
        out[f"{layer}.post_attention_layernorm.weight"] = (hidden,)
    return {**out, "model.norm.weight": (hidden,), "lm_head.weight": (vocabulary, hidden)}


def write(folder: Path, size: str, dtype: torch.dtype, models: int, seed: int = 0) -> list[Path]:
    """A base and ``models`` fine-tunes of it, each a Hugging Face folder; the base comes first."""
    generator = torch.Generator().manual_seed(seed)
    base = {name: torch.randn(shape, generator=generator) * 0.02 for name, shape in shapes(size).items()}
    out = []
    for i in range(models + 1):
        tuned: Mapping[str, torch.Tensor] = base
        if i:
            tuned = {name: t + 0.002 * torch.randn(t.shape, generator=generator) for name, t in base.items()}
        place = folder / ("base" if i == 0 else f"model-{i}")
        place.mkdir(parents=True)
        save_file({name: t.to(dtype) for name, t in tuned.items()}, place / "model.safetensors", {"format": "pt"})
        (place / "config.json").write_text(json.dumps(config(size, dtype), indent=2))
        out.append(place)
    return out
