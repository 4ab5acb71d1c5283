"""Any model type of the transformers library, built small from its own configuration.

`build` looks for the first combination of head class, scale and inputs that runs. Nothing is downloaded
and no remote code is run: a configuration class and random weights are all it takes.
"""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from weightspace.wiring.small_inputs import VOCABULARY, Scale, brief, has, settle

# Head classes in order of preference: those with logits first, the bare model last.
HEADS = (
    "SEQ_TO_SEQ_CAUSAL_LM",
    "SPEECH_SEQ_2_SEQ",
    "MASKED_LM",
    "CAUSAL_LM",
    "IMAGE_CLASSIFICATION",
    "VIDEO_CLASSIFICATION",
    "SEMANTIC_SEGMENTATION",
    "CTC",
    "RNNT",
    "TDT",
    "AUDIO_CLASSIFICATION",
    "IMAGE_TEXT_TO_TEXT",
    "MULTIMODAL_LM",
    "SEQUENCE_CLASSIFICATION",
    "QUESTION_ANSWERING",
    "TOKEN_CLASSIFICATION",
    "DOCUMENT_QUESTION_ANSWERING",
    "VISUAL_QUESTION_ANSWERING",
    "OBJECT_DETECTION",
    "ZERO_SHOT_OBJECT_DETECTION",
    "UNIVERSAL_SEGMENTATION",
    "INSTANCE_SEGMENTATION",
    "IMAGE_SEGMENTATION",
    "DEPTH_ESTIMATION",
    "TEXT_RECOGNITION",
    "TABLE_RECOGNITION",
    "ZERO_SHOT_IMAGE_CLASSIFICATION",
    "TIME_SERIES_CLASSIFICATION",
    "TIME_SERIES_REGRESSION",
    "TIME_SERIES_PREDICTION",
    "IMAGE_TO_IMAGE",
    "POSE_ESTIMATION",
    "IMAGE_MATTING",
    "NORMAL_ESTIMATION",
    "POINTMAP_ESTIMATION",
    "KEYPOINT_DETECTION",
    "KEYPOINT_MATCHING",
    "MASK_GENERATION",
    "TEXT_TO_SPECTROGRAM",
    "TEXT_TO_WAVEFORM",
    "DECISION",
    "RETRIEVAL",
    "TABLE_QUESTION_ANSWERING",
    "MULTIPLE_CHOICE",
    "AUDIO_TOKENIZATION",
    "PRETRAINING",
)

LARGEST = 100_000_000  # parameters


SCALES = (
    Scale(8, 64),
    Scale(4, 64),
    Scale(8, 224),
    Scale(2, 64),
    Scale(1, 64),
    Scale(1, 224),
    Scale(1, 1024, keep_lists=True),
)

WIDTHS = re.compile(
    r"(hidden_size|hidden_dim|d_model|embd|embed_dim|embedding_size|embedding_dim|emb_dim|_width$|^width$|intermediate"
    r"|ffn|d_ff|d_kv|d_inner|inner_dim|n_inner|mlp_dim|head_dim|dim_head|d_head|projection_dim|proj_dim|projection_size"
    r"|lora_rank|hidden_channels|_channels?$|^channels|filters|_units$|^dim$|_dim$|_dims$|hidden_sizes|conv_dim"
    r"|hidden_per|kv_channels|pooler_output_size|adapter_size|per_layer_input$|feature_size|output_size|channel_list"
    r"|upsample_groups|bottleneck_features|dim_feedforward|feedforward_dim|dt_rank|time_step_rank|coordinate_size|shape_size|num_pos_feats|fuser)"
)
LAYERS = re.compile(
    r"^(num_|n_)?((\w+_)?(hidden_)?layers?|(\w+_)?(num_)?(hidden_)?layers|(\w*_)?depth|num_blocks|n_layer)$"
)
TOKENS = re.compile(r"(token_ids?|token_index|_token|_index|mask_index)$")
EXPERTS = re.compile(r"^(num_experts|n_routed_experts|num_local_experts|moe_num_experts|num_routed_experts)$")
PER_TOKEN = re.compile(r"^(num_experts_per_tok(en)?|moe_topk|moe_top_k|moe_k|top_k_experts|num_selected_experts)$")
FIXED: dict[str, Any] = {
    "n_group": 1,
    "topk_group": 1,
    "num_expert_group": 1,
    "first_k_dense_replace": 1,
    "num_dense_layers": 1,
    "max_window_layers": 1,
    "num_kv_shared_layers": 0,
    "num_queries": 6,
    "num_denoising": 0,
    "use_cache": False,
    "mask_time_prob": 0.0,
    "mask_feature_prob": 0.0,
    "layerdrop": 0.0,
    "fullatt_block_indexes": [1],
    "deepstack_visual_indexes": [0, 1],
    "global_attn_indexes": [1],
    "vocab_size_per_layer_input": VOCABULARY,
    "use_timm_backbone": False,
    "use_pretrained_backbone": False,
    "train_num_points": 32,
    "mamba_chunk_size": 4,
    "num_nextn_predict_layers": 0,
    "index_topk": 4,
    "insert_layer_id": 1,
    "max_source_positions": 64,
}


# Settings that a model needs and some configurations leave None.
OPEN: dict[str, Any] = {
    "num_experts_per_tok": 2,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "vocab_size": VOCABULARY,
    "pad_token_id": 0,
    "prediction_length": 4,
    "mask_token_id": 4,
}
SPECIAL: dict[str, dict[str, Any]] = {
    "blip-2": {"image_token_index": 100},
    "blt": {"encoder_hash_byte_group_vocab": 100},
    "chameleon": {"vocabulary_map": {"<image>": 100}},
    "emu3": {"vocabulary_map": {"<image>": 100}},
    "glm5_next_text": {"index_topk": 16},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "longcat_flash": {"zero_expert_num": 2},
    "perceiver": {"d_latents": 64, "num_latents": 8, "num_self_attends_per_block": 2},
    "xmod": {"default_language": "en_XX"},
}
UNTOUCHED = {
    "model_type",
    "transformers_version",
    "per_layer_config",
    "architectures",
    "dtype",
    "stage_names",
    "id2label",
    "label2id",
}
DERIVED = {"out_features", "out_indices", "layer_types", "layers_block_type", "mlp_layer_types", "num_labels"}


def same(a: Any, b: Any) -> bool:
    """Equality that takes tuples and lists for the same."""
    listed = (list(v) if isinstance(v, tuple) else v for v in (a, b))
    return bool(next(listed) == next(listed))


class Shrinker:
    """Makes a small copy of a configuration, equal sizes staying equal and special tokens distinct."""

    def __init__(self, scale: Scale, sections: list[int] | None = None) -> None:
        self.scale, self.sections = scale, sections
        self.tokens: dict[int, int] = {}

    def __call__(self, config: Any) -> Any:
        """The small copy; sub-configurations are shrunk alike."""
        from transformers import PreTrainedConfig

        usual = type(config)()
        changed: dict[str, Any] = {}
        names = [name for name in config.to_dict() if name not in UNTOUCHED and has(config, name)]
        layers = next((getattr(config, n) for n in ("num_hidden_layers", "num_layers") if n in names), None)
        kinds = self.kinds(config)
        for name in names:
            value = getattr(config, name)
            if isinstance(value, PreTrainedConfig):
                changed[name] = self.backbone(value) if "timm" in value.model_type else self(value)
                continue
            small = self.value(name, value, layers, kinds)
            default = getattr(usual, name) if has(usual, name) else None
            if not same(small, value) or (not same(value, default) and name not in DERIVED):
                changed[name] = small
        self.stages(config, kinds, changed)
        self.fill(config, changed)
        self.join(changed)
        changed |= SPECIAL.get(config.model_type, {})
        return type(config)(**changed)

    def backbone(self, config: Any) -> Any:
        """A ResNet in place of a backbone that only the timm library knows."""
        from transformers import ResNetConfig

        wanted = len(getattr(config, "out_indices", None) or [4])
        features = ["stage1", "stage2", "stage3", "stage4"][-wanted:]
        widths = [self.width(w) for w in (256, 512, 1024, 2048)]
        settings: dict[str, Any] = {"depths": [1, 1, 1, 1], "hidden_sizes": widths, "out_features": features}
        return ResNetConfig(embedding_size=16, **settings)

    def stages(self, config: Any, kinds: list[int], changed: dict[str, Any]) -> None:
        """Has a backbone hand out its last stages, as many as before."""
        names = getattr(config, "out_features", None)
        layers = next((n for n in ("num_hidden_layers", "num_layers") if has(config, n)), None)
        if names and layers is None and not same(names, getattr(type(config)(), "out_features", None)):
            changed["out_features"] = list(names)
        if not names or layers is None or f"stage{len(kinds)}" in names or self.scale.keep_lists:
            return
        depth = max(len(kinds), len(names))
        if any(not re.fullmatch(r"stage\d+", name) for name in names) or depth > getattr(config, layers):
            return
        if layers in changed:
            changed[layers] = depth
            changed["out_features"] = [f"stage{depth - len(names) + 1 + i}" for i in range(len(names))]

    def join(self, changed: dict[str, Any]) -> None:
        """Has a vision tower end in the width of the text model, which some defaults do not."""
        text, vision = changed.get("text_config"), changed.get("vision_config")
        if text is not None and vision is not None and has(vision, "spatial_merge_size"):
            for name in ("out_hidden_size", "hidden_size"):
                if has(vision, name) and (name == "out_hidden_size" or has(vision, "embed_dim")):
                    setattr(vision, name, text.hidden_size)
                    break

    def fill(self, config: Any, changed: dict[str, Any]) -> None:
        """Sizes that a configuration leaves open."""
        changed |= {n: v for n, v in OPEN.items() if has(config, n) and getattr(config, n) is None}
        heads = getattr(config, "num_attention_heads", None) if has(config, "num_attention_heads") else None
        width = changed.get("hidden_size")
        if isinstance(heads, int) and isinstance(width, int) and not has(config, "head_dim") and width % heads:
            changed["num_attention_heads"] = math.gcd(width, heads)
        for name in ("num_key_value_heads", "head_dim"):
            if has(config, name) and getattr(config, name) is None and has(config, "num_attention_heads"):
                heads = changed.get("num_attention_heads", config.num_attention_heads)
                width = changed.get("hidden_size", getattr(config, "hidden_size", None))
                if isinstance(heads, int) and isinstance(width, int):
                    changed[name] = heads if name == "num_key_value_heads" else width // heads

    def kinds(self, config: Any) -> list[int]:
        """The layers to keep, so that each kind in a list of layer types is kept once."""
        for name in ("layer_types", "layers_block_type", "mlp_layer_types"):
            types = getattr(config, name, None)
            if isinstance(types, list) and types:
                first = {kind: types.index(kind) for kind in types}
                kept = sorted(first.values())
                while len(kept) < self.scale.layers and len(kept) < len(types):
                    kept.append(next(i for i in range(len(types)) if i not in kept))
                return sorted(kept)
        return list(range(self.scale.layers))

    def value(self, name: str, value: Any, layers: int | None, kinds: list[int]) -> Any:
        if name in FIXED:
            return FIXED[name] if value is not None else value
        if isinstance(value, bool | str):
            return value
        if isinstance(value, dict):
            return self.rope(value) if name.startswith("rope") or name == "rope_parameters" else value
        if TOKENS.search(name) and not PER_TOKEN.match(name) and isinstance(value, int | list):
            return [self.token(v) for v in value] if isinstance(value, list) else self.token(value)
        if isinstance(value, list | tuple):
            return self.series(name, list(value), layers, kinds) if value else value
        if not isinstance(value, int) or value <= 0:
            return value
        if name.endswith("vocab_size"):
            return min(value, VOCABULARY)
        if EXPERTS.match(name):
            return min(value, 4)
        if PER_TOKEN.match(name):
            return min(value, 2)
        if LAYERS.match(name) and "feat_extract" not in name and "adapter" not in name:
            return min(value, len(kinds))
        if name.endswith("image_size") or name in ("input_size", "img_size", "image_resolution"):
            return min(value, self.scale.image)
        if name.endswith("position_embeddings") or name in ("n_positions", "context_length"):
            return min(value, 512)
        return self.width(value) if WIDTHS.search(name) and "input_dim" not in name else value

    def width(self, value: Any) -> Any:
        shrinks = isinstance(value, int) and value >= 4 * self.scale.width and value % self.scale.width == 0
        return value // self.scale.width if shrinks else value

    def token(self, value: int) -> int:
        if not isinstance(value, int) or value < 100:
            return value
        return self.tokens.setdefault(value, 100 + len(self.tokens))

    def rope(self, value: Mapping[str, Any]) -> dict[str, Any]:
        out: dict[str, Any] = {k: self.rope(v) if isinstance(v, Mapping) else v for k, v in value.items()}
        if self.sections and "rope_type" in out:
            out["mrope_section"] = self.sections
        elif isinstance(out.get("mrope_section"), list):
            sections = out["mrope_section"]
            total, small = sum(sections) // self.scale.width, [s // self.scale.width for s in sections]
            out["mrope_section"] = [small[0] + total - sum(small), *small[1:]]
        for factors in ("short_factor", "long_factor"):
            if isinstance(out.get(factors), list):
                out[factors] = out[factors][: len(out[factors]) // self.scale.width]
        return out

    def series(self, name: str, value: list[Any], layers: int | None, kinds: list[int]) -> list[Any]:
        if self.scale.keep_lists:
            return value
        if layers is not None and len(value) == layers and layers > len(kinds):
            return [value[i] for i in kinds]
        if name in ("depths", "num_block_repeats", "layer_repeats", "num_blocks", "stage_num_blocks"):
            return [min(v, 2) if isinstance(v, int) else v for v in value]
        if name.endswith("image_size"):
            return [min(v, self.scale.image) for v in value]
        return [self.width(v) for v in value] if WIDTHS.search(name) else value


class Primary(nn.Module):
    """A model reduced to what it is for: logits where it has any, else all it returns but its memory.

    Hidden states handed out beside the logits would pin the axes that they run along.
    """

    MEMORY = re.compile(r"past_key_values|.*hidden_states|.*attentions|cache.*|states?|rope_deltas|encoder_last.*")

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, **kwargs: Any) -> Any:
        out = self.model(**kwargs)
        if not hasattr(out, "items"):
            return out
        logits = {k: v for k, v in out.items() if "logits" in k}
        plain = {k: v for k, v in out.items() if not self.MEMORY.fullmatch(k)}
        return logits or plain or dict(out)


@dataclass(frozen=True)
class Small:
    """A model that runs: its class, the module, the inputs, the scale at which it was built."""

    name: str
    module: nn.Module
    kwargs: Mapping[str, Any]
    scale: Scale
    failures: tuple[str, ...] = field(default=())


def model_types() -> list[str]:
    """All model types with a configuration."""
    from transformers.models.auto import configuration_auto

    return sorted(vars(configuration_auto)["CONFIG_MAPPING_NAMES"])


def classes(model_type: str) -> list[Any]:
    """The model classes for a type, the preferred one first."""
    import transformers
    from transformers.models.auto import modeling_auto

    names: list[str] = []
    for head in [*(f"MODEL_FOR_{head}_MAPPING_NAMES" for head in HEADS), "MODEL_MAPPING_NAMES"]:
        entry = getattr(modeling_auto, head, {}).get(model_type, ())
        names += [entry] if isinstance(entry, str) else list(entry)
    return [getattr(transformers, name) for name in dict.fromkeys(names) if hasattr(transformers, name)]


def build(model_type: str) -> Small:
    """The first head, scale and inputs that run. Raises RuntimeError that tells what went wrong."""
    candidates = classes(model_type)
    if not candidates:
        raise RuntimeError("no model class is registered for this type")
    failures: list[str] = []
    for model_class in candidates[:5]:
        for scale in scales(model_type, model_class):
            sections, experts = None, None
            for _ in range(3):
                found = attempt(model_type, model_class, scale, sections, experts)
                if isinstance(found, Small):
                    return replace(found, failures=tuple(failures))
                failures.append(f"{model_class.__name__} {scale.width}: {found}")
                split = re.search(r"to sum exactly to (\d+) .*split_sizes=\[(\d+), (\d+), (\d+)\]", found)
                if split and sections is None:
                    third = int(split[1]) // 3
                    sections = [int(split[1]) - 2 * third, third, third]
                elif "multiple of 16 bytes" in found and experts is None:
                    experts = "batched_mm"
                else:
                    break
    raise RuntimeError(" | ".join(failures) or "no scale gave a model")


def scales(model_type: str, model_class: Any) -> tuple[Scale, ...]:
    """The scales to try; models that are large even at an eighth of their width start smaller."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    try:
        count = parameters(model_class, Shrinker(SCALES[0])(CONFIG_MAPPING[model_type]()))
    except Exception:
        return SCALES
    return (Scale(32, 64), Scale(16, 64), *SCALES) if count > 6_000_000 else SCALES


def attempt(
    model_type: str, model_class: Any, scale: Scale, sections: list[int] | None, experts: str | None
) -> Small | str:
    """One class at one scale: the model if it runs, else why not."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    try:
        config = Shrinker(scale, sections)(CONFIG_MAPPING[model_type]())
        if experts:
            config._experts_implementation = experts
        if parameters(model_class, config) > LARGEST:
            return "too large"
        torch.manual_seed(0)
        module = model_class(config).eval()
    except (Exception, SystemExit) as error:
        return brief(error)
    kwargs, reason = settle(module, scale)
    return reason if kwargs is None else Small(model_class.__name__, Primary(module).eval(), kwargs, scale)


def parameters(model_class: Any, config: Any) -> int:
    """How many parameters the model would have, found out without memory for them."""
    with torch.device("meta"):
        return sum(p.numel() for p in model_class(copy.deepcopy(config)).parameters())
