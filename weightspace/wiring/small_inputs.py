"""Example inputs for any model of the transformers library: tried, and mended by what its errors ask for."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

VOCABULARY = 160  # ids from 100 on are special tokens


@dataclass(frozen=True)
class Scale:
    """How much smaller: widths divided by ``width``, images at most ``image`` wide, ``layers`` deep."""

    width: int
    image: int
    layers: int = 2
    keep_lists: bool = False


def has(config: Any, name: str) -> bool:
    """Whether a setting can be read; some raise where they differ from layer to layer."""
    try:
        return hasattr(config, name)
    except Exception:
        return False


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
        case "past_values" | "past_observed_mask" | "past_time_features" | "future_values" | "future_time_features":
            return series(name, config)
        case "flattened_patches":
            return torch.cat([torch.ones(2, 8, 2), torch.randn(2, 8, lookup(config, "patch_embed_hidden_size"))], -1)
        case "grid_thw" | "image_grid_thw":
            return torch.tensor([[1, 4, 4], [1, 4, 4]])
        case "input_features_mask":
            return torch.ones(2, 2 * int(lookup(config, "max_source_positions", default=64)), dtype=torch.long)
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
