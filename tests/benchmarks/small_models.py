"""Any model type of the transformers library, built small from its own configuration.

`build` looks for the first combination of head class, scale and inputs that runs. Nothing is downloaded
and no remote code is run: a configuration class and random weights are all it takes.
"""

from __future__ import annotations

import copy
import inspect
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

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
VOCABULARY = 160  # ids from 100 on are special tokens


@dataclass(frozen=True)
class Scale:
    """How much smaller: widths divided by ``width``, images at most ``image`` wide, ``layers`` deep."""

    width: int
    image: int
    layers: int = 2
    keep_lists: bool = False


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
PER_TOKEN = re.compile(
    r"^(num_experts_per_tok(en)?|moe_topk|moe_top_k|moe_k|top_k_experts|num_selected_experts)$"
)
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


def has(config: Any, name: str) -> bool:
    """Whether a setting can be read; some raise where they differ from layer to layer."""
    try:
        return hasattr(config, name)
    except Exception:
        return False


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
        return ResNetConfig(
            depths=[1, 1, 1, 1], hidden_sizes=widths, embedding_size=16, out_features=features
        )

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
        if (
            isinstance(heads, int)
            and isinstance(width, int)
            and not has(config, "head_dim")
            and width % heads
        ):
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
        out = {k: self.rope(v) if isinstance(v, Mapping) else v for k, v in value.items()}
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

    MEMORY = re.compile(
        r"past_key_values|.*hidden_states|.*attentions|cache.*|states?|rope_deltas|encoder_last.*"
    )

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
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    return sorted(CONFIG_MAPPING_NAMES)


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


def brief(error: BaseException) -> str:
    """An error in one short line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def settle(module: nn.Module, scale: Scale) -> tuple[dict[str, Any] | None, str]:
    """Inputs on which the module runs, or None and what the last attempt said."""
    reasons: list[str] = []
    for make in attempts(module, scale):
        kwargs = make
        for _ in range(4):  # an error may name the count of tokens, or the input, that it wants
            try:
                with torch.no_grad():
                    module(**kwargs)
                return kwargs, ""
            except Exception as error:
                reasons.append(f"{brief(error)} (inputs {', '.join(kwargs)})")
                better = mend(module, kwargs, str(error), scale)
                if better is None:
                    break
                kwargs = better
    return None, " / ".join(dict.fromkeys([reasons[0], reasons[-1]])) if reasons else "no inputs to try"


def parts(config: Any) -> Iterator[Any]:
    """A configuration and all those inside it."""
    from transformers import PreTrainedConfig

    yield config
    for value in list(vars(config).values()):
        if isinstance(value, PreTrainedConfig):
            yield from parts(value)


def lookup(config: Any, *names: str, default: Any = None) -> Any:
    """The first of these settings that the configuration, or one inside it, has."""
    for name in names:
        for part in parts(config):
            value = getattr(part, name, None) if has(part, name) else None
            if value is not None and not isinstance(value, bool):
                return value
    return default


def square(value: Any, default: int) -> tuple[int, int]:
    """Height and width from a size given as a number, a pair or a mapping."""
    if isinstance(value, Mapping):
        value = value.get("height", default), value.get("width", default)
    if isinstance(value, list | tuple):
        return (int(value[0]), int(value[-1])) if value else (default, default)
    return (int(value), int(value)) if value else (default, default)


def draw(name: str, config: Any, scale: Scale) -> Any:
    """Random values for the input of this name, or None where nothing is known of it."""
    vocabulary = int(lookup(config, "vocab_size", default=VOCABULARY) or VOCABULARY)
    words = torch.randint(min(5, vocabulary - 1), min(vocabulary, 100), (2, 8))
    channels = int(lookup(config, "num_channels", "in_channels", "in_chans", default=3))
    size = square(lookup(config, "image_size", "img_size", "image_resolution"), scale.image)
    frames = int(lookup(config, "num_frames", "frames_per_clip", default=2))
    mel = int(lookup(config, "num_mel_bins", "input_feat_per_channel", "n_mels", "mel_bins", default=80))
    match name:
        case "input_ids" | "decoder_input_ids":
            return words
        case "attention_mask" | "decoder_attention_mask":
            return torch.ones_like(words)
        case "token_type_ids":
            return torch.zeros_like(words)
        case "inputs_embeds" | "encoder_hidden_states" | "hidden_states":
            return torch.randn(2, 8, int(lookup(config, "hidden_size", "d_model", default=32)))
        case "pixel_values":
            return torch.randn(2, channels, *size)
        case "pixel_values_videos":
            return torch.randn(2, frames, channels, *size)
        case "pixel_mask":
            return torch.ones(2, *size, dtype=torch.long)
        case "input_values":
            return torch.randn(2, 4000)
        case "input_features":
            return torch.randn(2, mel, 2 * int(lookup(config, "max_source_positions", default=64)))
        case "bbox":
            corner = torch.randint(0, 50, (2, 8, 2))
            return torch.cat([corner, corner + 10], -1)
        case (
            "past_values"
            | "past_observed_mask"
            | "past_time_features"
            | "future_values"
            | "future_time_features"
        ):
            return series(name, config)
        case "flattened_patches":
            return torch.cat(
                [torch.ones(2, 8, 2), torch.randn(2, 8, lookup(config, "patch_embed_hidden_size"))], -1
            )
        case "grid_thw" | "image_grid_thw":
            return torch.tensor([[1, 4, 4], [1, 4, 4]])
        case "input_features_mask":
            return torch.ones(
                2, 2 * int(lookup(config, "max_source_positions", default=64)), dtype=torch.long
            )
        case "qformer_input_ids":
            return words
        case "spatial_shapes":
            return torch.tensor([[2, 4], [2, 4]])
        case "pixel_attention_mask":
            return torch.ones(2, 8, dtype=torch.long)
        case "timesteps":
            return torch.arange(8).expand(2, -1)
        case "states":
            return torch.randn(2, 8, int(lookup(config, "state_dim", default=4)))
        case "actions":
            return torch.randn(2, 8, int(lookup(config, "act_dim", default=4)))
        case "rewards" | "returns_to_go":
            return torch.randn(2, 8, 1)
        case "query_embeds":
            return torch.randn(2, 4, int(lookup(config, "hidden_size", default=32)))
        case "prompt_pixel_values":
            return torch.randn(2, channels, *size)
        case "prompt_masks":
            return torch.randn(2, channels, *size)
        case _:
            return None


def series(name: str, config: Any) -> Tensor:
    """A time series and its companions, as the probabilistic forecasters want them."""
    lags = max(lookup(config, "lags_sequence", default=[0]) or [0])
    past = int(lookup(config, "context_length", default=32) or 32) + lags
    future = int(lookup(config, "prediction_length", default=4) or 4)
    channels = lookup(config, "num_input_channels", "input_size", default=1)
    length = future if name.startswith("future") else past
    if name.endswith("time_features"):
        return torch.randn(2, length, int(lookup(config, "num_time_features", default=0)))
    shape = (2, length) if channels == 1 else (2, length, int(channels))
    return torch.ones(shape) if name.endswith("mask") else torch.randn(shape)


def patches(config: Any) -> Tensor:
    """Two images of 4 × 4 patches, flattened to a row a patch."""
    vision = next((part for part in parts(config) if has(part, "spatial_merge_size")), config)
    side, _ = square(lookup(vision, "patch_size"), 14)
    channels = int(lookup(vision, "in_channels", "in_chans", "num_channels", default=3))
    frames = int(lookup(vision, "temporal_patch_size", default=1))
    return torch.randn(32, channels * frames * side * side)


def attempts(module: Any, scale: Scale) -> Iterator[dict[str, Any]]:
    """Inputs worth trying, the most natural ones first."""
    config = module.config
    signature = inspect.signature(module.forward).parameters
    required = [
        name
        for name, p in signature.items()
        if p.default is inspect.Parameter.empty and p.kind is p.POSITIONAL_OR_KEYWORD
    ]
    main = getattr(module, "main_input_name", "input_ids")
    wanted = list(dict.fromkeys([*([main] if main in signature else []), *required]))
    if getattr(config, "is_encoder_decoder", False) and "decoder_input_ids" in signature:
        wanted.append("decoder_input_ids")

    def given(names: list[str]) -> dict[str, Any]:
        values = {name: draw(name, config, scale) for name in dict.fromkeys(names)}
        return {name: value for name, value in values.items() if value is not None}

    for grid, pixels in (("image_grid_thw", "pixel_values"), ("grid_thw", wanted[0] if wanted else "")):
        if grid in signature and pixels in signature:
            merge = int(lookup(config, "spatial_merge_size", default=2))
            inputs = {pixels: patches(config), grid: draw(grid, config, scale)}
            if "input_ids" in signature:
                token = int(lookup(config, "image_token_id", "image_token_index", default=0))
                start = int(lookup(config, "vision_start_token_id", default=1))
                row = torch.tensor([start] + [token] * (16 // merge**2))
                ids = torch.cat([row.expand(2, -1), draw("input_ids", config, scale)], 1)
                inputs["input_ids"] = ids
                if "mm_token_type_ids" in signature:
                    inputs["mm_token_type_ids"] = (ids == token).to(torch.int)
            yield inputs
    if "spatial_shapes" in signature:
        side, _ = square(lookup(config, "patch_size"), 16)
        inputs = given([*wanted, "pixel_attention_mask", "spatial_shapes"])
        yield {**inputs, "pixel_values": torch.randn(2, 8, 3 * side * side)}
    if "future_values" in signature:
        yield given([*wanted, "future_values", "future_time_features"])
    if "returns_to_go" in signature:
        yield given(["states", "actions", "rewards", "returns_to_go", "timesteps", "attention_mask"])
    # A picture or a sound beside the words first: without one, half of the model idles.
    for key in ("pixel_values", "input_features", "input_values"):
        if "input_ids" in signature and key in signature:
            inputs = given([*wanted, "input_ids", key])
            yield inputs
            if key == "pixel_values":
                yield {**inputs, key: inputs[key].unsqueeze(1)}
            else:
                for shape in ALTERNATIVES[key]:
                    yield {**inputs, key: alternative(shape, config, scale)}
    yield given(wanted)
    both = [
        name
        for name in ("input_ids", "pixel_values", "bbox", "qformer_input_ids", "decoder_input_ids")
        if name in signature
    ]
    yield given([*wanted, *both])
    for single in ("input_ids", "pixel_values", "input_values", "input_features"):
        if single in signature and [single] != wanted:
            yield given([*required, single])
    for key in ("pixel_values", "input_values", "input_features"):
        base = given(wanted)
        if key not in base:
            continue
        for shape in ALTERNATIVES[key]:
            yield {**base, key: alternative(shape, config, scale)}


# Other shapes that inputs of these names come in: C channels, S pixels a side, F frames, M mel bins.
ALTERNATIVES = {
    "pixel_values": ("2FCSS", "2CFSS", "21CSS"),
    "input_values": ("214000", "2TM"),
    "input_features": ("2TM", "2MT", "21TM"),
}


def alternative(shape: str, config: Any, scale: Scale) -> Tensor:
    """Noise of a shape spelt as above."""
    channels = int(lookup(config, "num_channels", "in_channels", default=3))
    height, width = square(lookup(config, "image_size", "img_size"), scale.image)
    frames = int(lookup(config, "num_frames", "frames_per_clip", default=2))
    mel = int(lookup(config, "num_mel_bins", "input_feat_per_channel", "feature_size", "mel_dim", default=80))
    time = int(lookup(config, "max_length", default=128))
    shapes = {
        "2FCSS": (2, frames, channels, height, width),
        "2CFSS": (2, channels, frames, height, width),
        "21CSS": (2, 1, channels, height, width),
        "214000": (2, 1, 4000),
        "2TM": (2, time, mel),
        "2MT": (2, mel, time),
        "21TM": (2, 1, time, mel),
    }
    return torch.randn(*shapes[shape])


def mend(module: Any, kwargs: Mapping[str, Any], error: str, scale: Scale) -> dict[str, Any] | None:
    """Inputs changed as an error message asks, or None where it asks nothing known."""
    config = module.config
    counts = re.search(r"tokens: (\d+).*?features:? (\d+)", error) or re.search(
        r"tokens: \D*(\d+).*?features\D*(\d+)", error
    )
    if counts and "input_ids" in kwargs:
        token = lookup(config, "image_token_id", "image_token_index", "audio_token_id", "audio_token_index")
        wanted = int(counts.group(2))
        if token is None or int(counts.group(1)) == wanted:
            return None
        row = torch.full((2, (wanted + 1) // 2), int(token))
        return {**kwargs, "input_ids": torch.cat([row, draw("input_ids", config, scale)], 1)}
    named = re.search(r"missing \d+ required positional arguments?: '(\w+)'", error) or re.search(
        r"[Yy]ou (?:have to|must|should|need to) (?:specify|provide|pass) (?:either )?`?(\w+)`?", error
    )
    if named and named.group(1) not in kwargs:
        value = draw(named.group(1), config, scale)
        if value is not None:
            return {**kwargs, named.group(1): value}
    size = re.search(r"size \((\d+)\*(\d+)\) doesn't match model \((\d+)\*(\d+)\)", error)
    if size and "pixel_values" in kwargs:
        old = kwargs["pixel_values"]
        return {**kwargs, "pixel_values": torch.randn(*old.shape[:-2], int(size[3]), int(size[4]))}
    length = re.search(r"mel input features to be of length (\d+)", error)
    if length and "input_features" in kwargs:
        old = kwargs["input_features"]
        return {**kwargs, "input_features": torch.randn(*old.shape[:-1], int(length[1]))}
    return None
