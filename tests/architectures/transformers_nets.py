"""Models of the transformers library, built with random weights from small configurations.

Heads are chosen so that the residual stream is not itself an output. Encoder-decoders and CLIP hand
out hidden states beside their logits; `LogitsOnly` keeps the logits, which are what the model is for.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from .registry import Built, Factor, attention, axes, case, inside, times

WIDTH, LAYERS, HEADS, DIM, HIDDEN, VOCABULARY = 32, 2, 4, 8, 64, 99


class LogitsOnly(nn.Module):
    """A model of which only one field of the output counts."""

    def __init__(self, model: nn.Module, field: str = "logits") -> None:
        super().__init__()
        self.model, self.field = model, field

    def forward(self, **kwargs: Any) -> Tensor:
        return getattr(self.model(**kwargs), self.field)


def words(length: int = 7) -> Tensor:
    """Two random sentences without special tokens."""
    return torch.randint(5, VOCABULARY, (2, length))


def pixels(size: int = 32, channels: int = 3) -> Tensor:
    """Two noise images."""
    return torch.randn(2, channels, size, size)


def model(prefix: str, head: str, **config: Any) -> nn.Module:
    """``prefix`` + ``head`` from transformers, e.g. ``Bert`` + ``ForSequenceClassification``."""
    library = importlib.import_module("transformers")
    net: nn.Module = getattr(library, prefix + head)(getattr(library, prefix + "Config")(**config))
    return net


def hf(
    name: str,
    prefix: str,
    head: str,
    free: Mapping[Factor, int] | None,
    config: Mapping[str, Any],
    inputs: Callable[[], dict[str, Any]] = lambda: {"input_ids": words()},
    *,
    only: str = "",
    why: str = "",
    movable_min: float = 0.95,
    unused: tuple[str, ...] = (),
) -> None:
    """Registers one model; ``only`` names the field of the output that counts where not all do."""

    def build() -> Built:
        net = model(prefix, head, **config)
        if only:
            net = LogitsOnly(net, only)
        return net, (), inputs()

    case(f"hf-{name}", free, group="transformers", why=why, movable_min=movable_min, unused=unused)(build)


def text(**extra: Any) -> dict[str, Any]:
    """The usual names of a small text model's sizes."""
    return {
        "vocab_size": VOCABULARY,
        "hidden_size": WIDTH,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "intermediate_size": HIDDEN,
        "max_position_embeddings": 32,
        **extra,
    }


def decoder(**extra: Any) -> dict[str, Any]:
    """The usual names of a small causal model's sizes, two key heads for four query heads."""
    special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "use_cache": False}
    return text(**special, **{"num_key_value_heads": 2, **extra})


PLAIN = attention(HEADS, DIM) + axes(HIDDEN)  # attention without rotary positions, then an MLP
STREAM = axes(WIDTH)
ROTARY = attention(HEADS, DIM, kv=2, rotary=DIM) + axes(HIDDEN)  # grouped queries, rotary, (gated) MLP
CLASSIFIER = "ForSequenceClassification"
IMAGES = "ForImageClassification"
CAUSAL = "ForCausalLM"

# Encoders. The classifier reads a pooled state through a dense layer as wide as the stream, one more
# free axis.
ENCODER = STREAM + times(LAYERS, PLAIN)
POOLED = ENCODER + axes(WIDTH)
hf("bert", "Bert", CLASSIFIER, POOLED, text())
# Masked language modelling: the transform's output meets the tied embedding, and so is the stream.
hf("bert-mlm", "Bert", "ForMaskedLM", ENCODER, text())
hf("roberta", "Roberta", CLASSIFIER, POOLED, text())
hf(
    "distilbert",
    "DistilBert",
    CLASSIFIER,
    POOLED,
    {
        "vocab_size": VOCABULARY,
        "dim": WIDTH,
        "n_layers": LAYERS,
        "n_heads": HEADS,
        "hidden_dim": HIDDEN,
        "max_position_embeddings": 32,
    },
)
# ALBERT's layers share their tensors, so there is one layer's worth of axes; embeddings are narrower.
hf("albert", "Albert", CLASSIFIER, STREAM + PLAIN + axes(16, WIDTH), text(embedding_size=16))
hf("electra", "Electra", CLASSIFIER, POOLED + axes(16), text(embedding_size=16))
# Relative positions go through the same key and query projections as the words.
hf(
    "deberta-v2",
    "DebertaV2",
    CLASSIFIER,
    POOLED,
    text(
        relative_attention=True,
        pos_att_type=["c2p", "p2c"],
        share_att_key=True,
        norm_rel_ebd="layer_norm",
        position_buckets=8,
        position_biased_input=False,
        type_vocab_size=0,
        max_relative_positions=16,
    ),
)

# Causal models.
GPT = {"n_embd": WIDTH, "n_layer": LAYERS, "n_head": HEADS, "n_positions": 32, "vocab_size": VOCABULARY}
GPT |= {"use_cache": False, "bos_token_id": 1, "eos_token_id": 2}
hf("gpt2", "GPT2", "LMHeadModel", ENCODER, {**GPT, "n_inner": HIDDEN})
hf(
    "gpt-neo",
    "GPTNeo",
    CAUSAL,
    ENCODER,
    {
        "vocab_size": VOCABULARY,
        "hidden_size": WIDTH,
        "num_layers": LAYERS,
        "num_heads": HEADS,
        "attention_types": [[["global", "local"], 1]],
        "window_size": 4,
        "intermediate_size": HIDDEN,
        "max_position_embeddings": 32,
        "use_cache": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
)


# Where rotary positions turn only part of a head, the other channels of queries and keys stay free.
def partial(rotary: int) -> Mapping[Factor, int]:
    return STREAM + times(LAYERS, attention(HEADS, DIM, rotary=rotary) + axes(HIDDEN))


ONE_TO_ONE = {"num_key_value_heads": HEADS}
QUARTER = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.25}}
HALF = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}}
hf("gpt-neox", "GPTNeoX", CAUSAL, partial(2), decoder(**QUARTER))
hf("gptj", "GPTJ", CAUSAL, partial(4), {**GPT, "n_inner": HIDDEN, "rotary_dim": 4})
hf(
    "opt",
    "OPT",
    CAUSAL,
    ENCODER,
    {
        "vocab_size": VOCABULARY,
        "hidden_size": WIDTH,
        "word_embed_proj_dim": WIDTH,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "ffn_dim": HIDDEN,
        "max_position_embeddings": 32,
        "use_cache": False,
    },
)
# ALiBi gives each head a slope of its own, which pins the heads but not the channels inside them.
hf(
    "bloom",
    "Bloom",
    CAUSAL,
    STREAM + times(LAYERS, times(2, inside(DIM, HEADS)) + axes(4 * WIDTH)),
    {"vocab_size": VOCABULARY, "hidden_size": WIDTH, "n_layer": LAYERS, "n_head": HEADS, "use_cache": False},
)
# One key head for all query heads.
hf(
    "falcon",
    "Falcon",
    CAUSAL,
    STREAM + times(LAYERS, attention(HEADS, DIM, kv=1, rotary=DIM) + axes(HIDDEN)),
    {
        "vocab_size": VOCABULARY,
        "hidden_size": WIDTH,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "ffn_hidden_size": HIDDEN,
        "max_position_embeddings": 32,
        "use_cache": False,
    },
)
LLAMA = STREAM + times(LAYERS, ROTARY)
hf("llama", "Llama", CAUSAL, LLAMA, decoder())
hf("mistral", "Mistral", CAUSAL, LLAMA, decoder(sliding_window=4))
hf("qwen2", "Qwen2", CAUSAL, LLAMA, decoder(tie_word_embeddings=True))
hf("qwen3", "Qwen3", CAUSAL, LLAMA, decoder(head_dim=DIM))
hf("gemma", "Gemma", CAUSAL, LLAMA, decoder(head_dim=DIM))
hf("gemma2", "Gemma2", CAUSAL, LLAMA, decoder(head_dim=DIM, sliding_window=4))
hf("phi", "Phi", CAUSAL, partial(4), decoder(**ONE_TO_ONE, **HALF))
hf("phi3", "Phi3", CAUSAL, LLAMA, decoder())
hf("olmo", "Olmo", CAUSAL, LLAMA, decoder())
hf("stablelm", "StableLm", CAUSAL, partial(2), decoder(**ONE_TO_ONE, **QUARTER))
hf("cohere", "Cohere", CAUSAL, LLAMA, decoder())

# Mixtures: experts move as wholes with the router's rows, hidden units inside each expert; a shared
# expert is a plain gated MLP.
GROUPED = attention(HEADS, DIM, kv=2, rotary=DIM)
hf(
    "mixtral",
    "Mixtral",
    CAUSAL,
    STREAM + times(LAYERS, GROUPED + axes(4) + inside(HIDDEN, 4)),
    decoder(num_local_experts=4, num_experts_per_tok=2),
)
hf(
    "qwen2-moe",
    "Qwen2Moe",
    CAUSAL,
    STREAM + times(LAYERS, GROUPED + axes(4, 24) + inside(16, 4)),
    decoder(
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=16,
        shared_expert_intermediate_size=24,
        decoder_sparse_step=1,
    ),
)


# Encoder-decoders. ``shared`` says whether both read one embedding, and so have one stream.
def sequences() -> dict[str, Any]:
    return {"input_ids": words(7), "decoder_input_ids": words(5)}


# T5's table of relative positions has a column a head and serves every layer of its stack: the heads of
# all self-attentions of a stack are one axis. Those of the cross attentions are not biased.
CHANNELS = times(2, inside(DIM, HEADS))
hf(
    "t5",
    "T5",
    "ForConditionalGeneration",
    STREAM
    + axes(HEADS, HEADS)
    + times(2 * LAYERS, CHANNELS + axes(HIDDEN))
    + times(LAYERS, attention(HEADS, DIM)),
    {
        "vocab_size": VOCABULARY,
        "d_model": WIDTH,
        "d_kv": DIM,
        "d_ff": HIDDEN,
        "num_layers": LAYERS,
        "num_decoder_layers": LAYERS,
        "num_heads": HEADS,
        "use_cache": False,
        "decoder_start_token_id": 0,
    },
    sequences,
    only="logits",
)
TWO_STACKS = times(2 * LAYERS, PLAIN) + times(LAYERS, attention(HEADS, DIM))
BART = {
    "vocab_size": VOCABULARY,
    "d_model": WIDTH,
    "encoder_layers": LAYERS,
    "decoder_layers": LAYERS,
    "encoder_attention_heads": HEADS,
    "decoder_attention_heads": HEADS,
    "encoder_ffn_dim": HIDDEN,
    "decoder_ffn_dim": HIDDEN,
    "max_position_embeddings": 32,
    "use_cache": False,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 2,
}
hf("bart", "Bart", "ForConditionalGeneration", STREAM + TWO_STACKS, BART, sequences, only="logits")
# The sinusoidal table is a tensor of the checkpoint like any other, so it moves with the stream.
hf("pegasus", "Pegasus", "ForConditionalGeneration", STREAM + TWO_STACKS, BART, sequences, only="logits")
# The encoder starts from two convolutions over sound and has a stream of its own.
hf(
    "whisper",
    "Whisper",
    "ForConditionalGeneration",
    axes(WIDTH, WIDTH, WIDTH) + TWO_STACKS,
    {
        **{key: value for key, value in BART.items() if key != "max_position_embeddings"},
        "max_source_positions": 8,
        "max_target_positions": 32,
        "num_mel_bins": 10,
        "suppress_tokens": [],
        "begin_suppress_tokens": [],
    },
    lambda: {"input_features": torch.randn(2, 10, 16), "decoder_input_ids": words(5)},
    only="logits",
)

# State space. Mamba: inner channels, rank of the step size, state. Mamba 2: heads, channels inside a
# head, state (one group: common to the heads).
SSM = {"vocab_size": VOCABULARY, "hidden_size": WIDTH, "num_hidden_layers": LAYERS, "use_cache": False}
hf(
    "mamba",
    "Mamba",
    CAUSAL,
    STREAM + times(LAYERS, axes(64, 4, 3)),
    {**SSM, "state_size": 4, "time_step_rank": 3, "expand": 2},
)
hf(
    "mamba2",
    "Mamba2",
    CAUSAL,
    STREAM + times(LAYERS, axes(8, 4) + inside(8, 8)),
    {**SSM, "state_size": 4, "num_heads": 8, "head_dim": 8, "expand": 2, "n_groups": 1, "chunk_size": 4},
)
# Two groups of B and C: groups move, heads in their group, states in their group, channels in their head.
hf(
    "mamba2-groups",
    "Mamba2",
    CAUSAL,
    STREAM + times(LAYERS, axes(2) + inside(4, 2) + inside(4, 2) + inside(8, 2, 4)),
    {**SSM, "state_size": 4, "num_heads": 8, "head_dim": 8, "expand": 2, "n_groups": 2, "chunk_size": 4},
)
# All of RWKV's time mixing works channel by channel: one inner axis for it and one for channel mixing.
hf(
    "rwkv",
    "Rwkv",
    CAUSAL,
    STREAM + times(LAYERS, axes(24, HIDDEN)),
    {
        **SSM,
        "attention_hidden_size": 24,
        "intermediate_size": HIDDEN,
        "context_length": 32,
        "rescale_every": 0,
    },
)

# Images.
VISION = {
    "hidden_size": WIDTH,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "intermediate_size": HIDDEN,
    "image_size": 16,
    "patch_size": 8,
    "num_labels": 5,
}


def small_pixels() -> dict[str, Any]:
    return {"pixel_values": pixels(16)}


def large_pixels() -> dict[str, Any]:
    return {"pixel_values": pixels(32)}


hf("vit", "ViT", IMAGES, ENCODER, VISION, small_pixels)
hf("deit", "DeiT", IMAGES, ENCODER, VISION, small_pixels)
hf("beit", "Beit", IMAGES, ENCODER, {**VISION, "use_relative_position_bias": True}, small_pixels)


# Swin: stages of 16 and 32 channels with 2 and 4 heads of 8 and MLPs twice as wide. A merge puts
# four neighbours' channels side by side: the channel moves, the neighbour does not. The table of
# relative positions belongs to a layer, so heads still move.
def swin_stage(width: int, heads: int) -> Mapping[Factor, int]:
    return axes(width) + times(2, attention(heads, 8) + axes(2 * width))


hf(
    "swin",
    "Swin",
    IMAGES,
    swin_stage(16, 2) + swin_stage(32, 4),
    {
        "image_size": 32,
        "patch_size": 2,
        "embed_dim": 16,
        "depths": [2, 2],
        "num_heads": [2, 4],
        "window_size": 4,
        "mlp_ratio": 2.0,
        "num_labels": 5,
    },
    large_pixels,
)

CLIP_PART = {
    "hidden_size": WIDTH,
    "intermediate_size": HIDDEN,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
}
# Similarity of an image and a text is a dot product: the space they are projected to moves as well.
hf(
    "clip",
    "CLIP",
    "Model",
    times(2, ENCODER) + axes(24),
    {
        "text_config": {
            **CLIP_PART,
            "vocab_size": VOCABULARY,
            "max_position_embeddings": 16,
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
        "vision_config": {**CLIP_PART, "image_size": 16, "patch_size": 8},
        "projection_dim": 24,
    },
    lambda: {"input_ids": words(6), "pixel_values": pixels(16)},
    only="logits_per_image",
)


# ConvNeXt: per stage a stream and, per block, one inner axis four times as wide.
NEXT = {"hidden_sizes": [8, 12, 16, 20], "depths": [1, 2, 1, 1], "num_labels": 5, "image_size": 64}
NEXT_FREE = axes(8, 12, 16, 20) + axes(32, 48, 48, 64, 80)
hf("convnext", "ConvNext", IMAGES, NEXT_FREE, NEXT, lambda: {"pixel_values": pixels(64)})
hf("convnextv2", "ConvNextV2", IMAGES, NEXT_FREE, NEXT, lambda: {"pixel_values": pixels(64)})

# ResNet bottlenecks reduce by four: inner axes of a quarter of the stage's stream.
hf(
    "resnet",
    "ResNet",
    IMAGES,
    axes(8) + axes(16, 32, 40, 48) + times(2, axes(4, 4, 8, 8, 10, 10, 12, 12)),
    {"embedding_size": 8, "hidden_sizes": [16, 32, 40, 48], "depths": [2, 2, 2, 2], "num_labels": 5},
    large_pixels,
)


# RegNet Y: convolutions in groups of four channels, each stage with a stream of its own. The squeeze of a
# block has a quarter of its input's channels.
def regnet_stage(before: int, width: int) -> Mapping[Factor, int]:
    groups = width // 4
    blocks = axes(groups, before // 4) + axes(groups, width // 4) + times(4, inside(4, groups))
    return axes(width) + blocks


hf(
    "regnet",
    "RegNet",
    IMAGES,
    axes(24) + regnet_stage(24, 16) + regnet_stage(16, 20) + regnet_stage(20, 24) + regnet_stage(24, 32),
    {
        "embedding_size": 24,
        "hidden_sizes": [16, 20, 24, 32],
        "depths": [2, 2, 2, 2],
        "groups_width": 4,
        "layer_type": "y",
        "num_labels": 5,
    },
    large_pixels,
)

# Depthwise and pointwise convolutions in turn: one axis a pointwise convolution (32, 64, 128 … channels
# scaled by a tenth, at least 8).
hf(
    "mobilenet-v1",
    "MobileNetV1",
    IMAGES,
    axes(8) + axes(8, 12, 12, 25, 25) + times(6, axes(51)) + times(2, axes(102)),
    {"depth_multiplier": 0.1, "num_labels": 5},
    large_pixels,
)


# A quarter of the usual channels. The stem is a convolution, a depthwise one and a projection.
def mobilenet_v2() -> Mapping[Factor, int]:
    widths = [8] * 6 + [16] * 4 + [24] * 3 + [40] * 3 + [80]
    strided = (0, 2, 5, 12)
    free = axes(8, widths[0], 320)
    for block, (before, after) in enumerate(pairwise(widths)):
        free += axes(6 * before)
        if before != after or block in strided:
            free += axes(after)
    return free


hf(
    "mobilenet-v2",
    "MobileNetV2",
    IMAGES,
    mobilenet_v2(),
    {"depth_multiplier": 0.25, "finegrained_output": False, "num_labels": 5},
    large_pixels,
)


# A MobileViT block: a strided inverted residual gives the stream; a 3×3 convolution, the transformer's
# width, the projection back and the fusion of both are axes of their own.
def mobilevit_block(expanded: int, width: int, hidden: int, layers: int) -> Mapping[Factor, int]:
    free = axes(expanded, width, width, hidden, width, width)
    return free + times(layers, attention(2, hidden // 2) + axes(2 * hidden))


hf(
    "mobilevit",
    "MobileViT",
    IMAGES,
    axes(8, 16, 12)  # stem; expanded and projected axes of the first layer
    + axes(24, 16, 32, 32)  # one block of stride 2, two with a shortcut
    + mobilevit_block(32, 20, 16, 2)
    + mobilevit_block(40, 24, 24, 4)
    + mobilevit_block(48, 28, 32, 3)
    + axes(40),
    {
        "hidden_sizes": [16, 24, 32],
        "neck_hidden_sizes": [8, 12, 16, 20, 24, 28, 40],
        "num_attention_heads": 2,
        "expand_ratio": 2.0,
        "image_size": 128,
        "num_labels": 5,
    },
    lambda: {"pixel_values": pixels(128)},
)
# (expanded, squeeze, stream) of each block; the first does not expand, the third has a shortcut.
hf(
    "efficientnet",
    "EfficientNet",
    IMAGES,
    axes(8) + axes(2, 8) + axes(32, 2, 16) + axes(64, 4) + axes(64, 4, 16) + axes(320),
    {
        "width_coefficient": 0.25,
        "depth_coefficient": 1.0,
        "in_channels": [32, 32, 64],
        "out_channels": [32, 64, 64],
        "kernel_sizes": [3, 3, 5],
        "strides": [1, 2, 1],
        "num_block_repeats": [1, 2, 1],
        "expand_ratios": [1, 4, 4],
        "hidden_dim": 320,
        "num_labels": 5,
    },
    large_pixels,
)
# Keys and values are read from a strided convolution of the stream, with an axis of its own (but for the
# last stage). The decoder concatenates one projection of each stage.
hf(
    "segformer",
    "Segformer",
    "ForSemanticSegmentation",
    axes(8, 16, 24, 32)
    + axes(8, 16, 24)
    + sum((attention(heads, 8) + axes(16 * heads) for heads in (1, 2, 3, 4)), axes())
    + times(5, axes(20)),
    {
        "hidden_sizes": [8, 16, 24, 32],
        "num_attention_heads": [1, 2, 3, 4],
        "depths": [1, 1, 1, 1],
        "mlp_ratios": [2, 2, 2, 2],
        "decoder_hidden_size": 20,
        "num_labels": 5,
    },
    lambda: {"pixel_values": pixels(64)},
)
hf(
    "poolformer",
    "PoolFormer",
    IMAGES,
    axes(8, 12, 16, 20) + axes(16, 24, 32, 40),
    {
        "hidden_sizes": [8, 12, 16, 20],
        "depths": [1, 1, 1, 1],
        "mlp_ratio": 2.0,
        "layer_scale_init_value": 0.5,
        "num_labels": 5,
    },
    lambda: {"pixel_values": pixels(64)},
)

# Sound. Positions come from a convolution of the stream in two groups, added to the stream: groups move
# as wholes, channels inside their group.
SPEECH = {
    **text(),
    "conv_dim": [12, 16, 20],
    "conv_kernel": [10, 3, 2],
    "conv_stride": [5, 2, 2],
    "num_feat_extract_layers": 3,
    "num_conv_pos_embeddings": 4,
    "num_conv_pos_embedding_groups": 2,
    "mask_time_prob": 0.0,
}
SPEECH_FREE = axes(12, 16, 20) + axes(2) + inside(WIDTH // 2, 2) + times(LAYERS, PLAIN)
hf("wav2vec2", "Wav2Vec2", "ForCTC", SPEECH_FREE, SPEECH, lambda: {"input_values": torch.randn(2, 400)})
hf("hubert", "Hubert", "ForCTC", SPEECH_FREE, SPEECH, lambda: {"input_values": torch.randn(2, 400)})
