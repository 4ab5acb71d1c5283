"""What each Keras layer computes, in torch. To support one more, add a function with ``@layer("Name")``.

A function takes the call (configuration and weights) and the layer's inputs, and returns its output.
Activations keep the layout of the file, channels last unless it says otherwise; so do the weights.
Layers that merge are in ``keras_merge.py``, recurrent and attention layers in ``keras_sequence.py``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from weightspace.errors import WiringError


@dataclass(frozen=True)
class Call:
    """A layer being called: its configuration, its weights by role, and the layers it wraps."""

    name: str
    kind: str
    config: Mapping[str, Any]
    weight: Callable[[str], Tensor | None]
    inside: Callable[..., Any]
    wrapped: Mapping[str, tuple[str, Mapping[str, Any]]]
    major: int

    def need(self, role: str) -> Tensor:
        """A weight that the layer cannot do without."""
        found = self.weight(role)
        if found is None:
            raise WiringError(f"Keras layer {self.name!r} ({self.kind}) has no weight {role!r}")
        return found

    def refuse(self, what: str) -> WiringError:
        """The error for a setting that is not modelled."""
        return WiringError(f"Keras layer {self.name!r} ({self.kind}): {what} is not supported")

    def get(self, *names: str, default: Any = None) -> Any:
        """The first of several names of a setting (they changed between versions)."""
        return next((self.config[n] for n in names if self.config.get(n) is not None), default)


LAYERS: dict[str, Callable[..., Any]] = {}


def layer(*names: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Registers the interpretation of layer classes."""

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        for name in names:
            LAYERS[name] = function
        return function

    return register


def roles_of(kind: str, config: Mapping[str, Any]) -> list[tuple[str, str, int]]:
    """The weights of a layer in the order of creation: (part, role, position within the part)."""
    if kind == "MultiHeadAttention":
        each = ["kernel", "bias"] if config.get("use_bias", True) else ["kernel"]
        return [(p, r, i) for p in ("query", "key", "value", "attention_output") for i, r in enumerate(each)]
    has_bias = bool(config.get("use_bias", config.get("bias", True)))
    if kind in _ROLES:
        roles = [r for r in _ROLES[kind] if r != "bias" or has_bias]
    elif kind in ("BatchNormalization", "LayerNormalization", "GroupNormalization"):
        roles = ["gamma"] if config.get("scale", True) else []
        roles += ["beta"] if config.get("center", True) else []
        roles += ["moving_mean", "moving_variance"] if kind == "BatchNormalization" else []
    else:
        roles = []
    part = "cell" if kind in ("LSTM", "GRU", "SimpleRNN") else ""
    return [(part, r, i) for i, r in enumerate(roles)]


_KERNEL, _RECURRENT = ("kernel", "bias"), ("kernel", "recurrent_kernel", "bias")
_ROLES: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("Dense", "Conv1D", "Conv2D", "Conv3D", "Convolution1D", "Convolution2D"), _KERNEL),
    **dict.fromkeys(("Conv1DTranspose", "Conv2DTranspose", "Conv3DTranspose", "EinsumDense"), _KERNEL),
    **dict.fromkeys(("DepthwiseConv1D", "DepthwiseConv2D"), ("depthwise_kernel", "bias")),
    **dict.fromkeys(("SeparableConv1D", "SeparableConv2D"), ("depthwise_kernel", "pointwise_kernel", "bias")),
    **dict.fromkeys(("LSTM", "GRU", "SimpleRNN", "LSTMCell", "GRUCell", "SimpleRNNCell"), _RECURRENT),
    **dict.fromkeys(("CuDNNLSTM", "CuDNNGRU"), _RECURRENT),
    "Embedding": ("embeddings",), "PReLU": ("alpha",), "Normalization": ("mean", "variance"),
    "UnitNormalization": (), "RMSNormalization": ("scale",),
}  # fmt: skip


# ---- activations -------------------------------------------------------------------------------------

_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "linear": lambda x: x, "relu": torch.relu, "sigmoid": torch.sigmoid, "tanh": torch.tanh, "elu": F.elu,
    "selu": F.selu, "softplus": lambda x: torch.logaddexp(x, torch.zeros_like(x)), "softsign": F.softsign,
    "swish": F.silu, "silu": F.silu, "gelu": F.gelu, "exponential": torch.exp, "relu6": F.relu6,
    "mish": F.mish,
    "hard_swish": F.hardswish, "hard_silu": F.hardswish, "softmax": lambda x: torch.softmax(x, -1),
    "log_softmax": lambda x: torch.log_softmax(x, -1), "celu": F.celu, "log_sigmoid": F.logsigmoid,
}  # fmt: skip


def activate(call: Call, x: Tensor, setting: Any) -> Tensor:
    """An activation given by name, or by the configuration of a layer or function."""
    if setting is None:
        return x
    if isinstance(setting, Mapping):
        kind, config = str(setting.get("class_name")), setting.get("config")
        if kind == "function":
            return activate(call, x, config)
        if kind in ("ReLU", "LeakyReLU", "ELU", "Softmax"):
            inner = Call(call.name, kind, config or {}, call.weight, call.inside, {}, call.major)
            return LAYERS[kind](inner, x)  # type: ignore[no-any-return]
        raise call.refuse(f"the activation {kind!r}")
    name = str(setting).lower().rsplit(">", 1)[-1]
    if name == "hard_sigmoid":  # a slope of 1/5 before Keras 3, 1/6 since
        return torch.clamp(x / 6 + 0.5 if call.major >= 3 else x * 0.2 + 0.5, 0, 1)
    if name == "leaky_relu":
        return F.leaky_relu(x, 0.2)
    if name not in _ACTIVATIONS:
        raise call.refuse(f"the activation {setting!r}")
    return _ACTIVATIONS[name](x)


def number(setting: Any) -> float | None:
    """A number that some versions wrap in a list or a small dictionary."""
    if isinstance(setting, Mapping):
        setting = setting.get("value")
    if isinstance(setting, (list, tuple)):
        setting = setting[0]
    return None if setting is None else float(setting)


@layer("Activation")
def _activation(call: Call, x: Tensor) -> Tensor:
    return activate(call, x, call.config["activation"])


@layer("ReLU")
def _relu(call: Call, x: Tensor) -> Tensor:
    top, slope = number(call.config.get("max_value")), number(call.config.get("negative_slope")) or 0.0
    edge = number(call.config.get("threshold")) or 0.0
    y = torch.relu(x) if not edge and not slope else torch.where(x >= edge, x, slope * (x - edge))
    return y if top is None else torch.clamp(y, max=top)


@layer("LeakyReLU")
def _leaky_relu(call: Call, x: Tensor) -> Tensor:
    return F.leaky_relu(x, number(call.get("negative_slope", "alpha", default=0.3)) or 0.0)


@layer("ELU")
def _elu(call: Call, x: Tensor) -> Tensor:
    return F.elu(x, number(call.get("alpha", default=1.0)) or 0.0)


@layer("ThresholdedReLU")
def _thresholded_relu(call: Call, x: Tensor) -> Tensor:
    return torch.where(x > (number(call.get("theta", default=1.0)) or 0.0), x, torch.zeros_like(x))


@layer("PReLU")
def _prelu(call: Call, x: Tensor) -> Tensor:
    return torch.where(x > 0, x, x * call.need("alpha"))


@layer("Softmax")
def _softmax(call: Call, x: Tensor) -> Tensor:
    return torch.softmax(x, call.get("axis", default=-1))


@layer(
    "InputLayer", "Dropout", "SpatialDropout1D", "SpatialDropout2D", "SpatialDropout3D", "GaussianNoise",
    "GaussianDropout", "AlphaDropout", "ActivityRegularization", "Masking", "RandomFlip", "RandomRotation",
    "RandomZoom", "RandomTranslation", "RandomContrast", "RandomBrightness", "Identity",
)  # fmt: skip
def _identity(call: Call, x: Tensor, **unused: Any) -> Tensor:
    return x


# ---- dense and convolution -----------------------------------------------------------------------------


@layer("Dense")
def _dense(call: Call, x: Tensor) -> Tensor:
    bias = call.weight("bias")
    y = x @ call.need("kernel")
    return activate(call, y if bias is None else y + bias, call.config.get("activation"))


@layer("EinsumDense")
def _einsum_dense(call: Call, x: Tensor) -> Tensor:
    bias = call.weight("bias") if call.config.get("bias_axes") else None
    equation = str(call.config["equation"])
    y = torch.einsum(equation, x, call.need("kernel"))
    return activate(call, y if bias is None else y + bias, call.config.get("activation"))


def channels_first(call: Call) -> bool:
    """Whether the layer's activations are (batch, channels, ...)."""
    return call.get("data_format", "dim_ordering", default="channels_last") in ("channels_first", "th")


def sizes(setting: Any, rank: int, default: int = 1) -> list[int]:
    """A size per spatial axis."""
    if setting is None:
        return [default] * rank
    return [int(setting)] * rank if isinstance(setting, (int, float)) else [int(s) for s in setting]


def same_pads(size: int, kernel: int, stride: int, dilation: int = 1) -> tuple[int, int]:
    """Padding before and after that makes the output ceil(size / stride) long; the odd one goes after."""
    total = max(0, (math.ceil(size / stride) - 1) * stride + (kernel - 1) * dilation + 1 - size)
    return total // 2, total - total // 2


def _pad(x: Tensor, pads: Sequence[tuple[int, int]], value: float = 0.0) -> Tensor:
    flat = [n for before, after in reversed(pads) for n in (before, after)]
    return F.pad(x, flat, value=value) if any(flat) else x


_CONV: tuple[Callable[..., Tensor], ...] = (F.conv1d, F.conv2d, F.conv3d)
_CONV_TRANSPOSE: tuple[Callable[..., Tensor], ...] = (
    F.conv_transpose1d,
    F.conv_transpose2d,
    F.conv_transpose3d,
)
_MAX: tuple[Callable[..., Tensor], ...] = (F.max_pool1d, F.max_pool2d, F.max_pool3d)
_AVERAGE: tuple[Callable[..., Tensor], ...] = (F.avg_pool1d, F.avg_pool2d, F.avg_pool3d)


def _padding(call: Call, x: Tensor, kernel: Sequence[int], strides: Sequence[int], dilations: Sequence[int]) -> Any:
    """Padding per spatial axis; ``x`` is (batch, channels, ...)."""
    mode = call.get("padding", "border_mode", default="valid")
    shape = x.shape[2:]
    if mode == "same":
        return [same_pads(s, k, t, d) for s, k, t, d in zip(shape, kernel, strides, dilations, strict=True)]
    if mode == "causal":
        return [((k - 1) * d, 0) for k, d in zip(kernel, dilations, strict=True)]
    if mode == "valid":
        return [(0, 0)] * len(kernel)
    raise call.refuse(f"padding {mode!r}")


def _convolve(call: Call, x: Tensor, weight: Tensor, bias: Tensor | None, groups: int) -> Tensor:
    """``x``: (batch, channels, ...), ``weight``: (out, in / groups, ...)."""
    rank = weight.ndim - 2
    strides = sizes(call.get("strides", "subsample", "subsample_length"), rank)
    dilations = sizes(call.get("dilation_rate", "atrous_rate"), rank)
    pads = _padding(call, x, weight.shape[2:], strides, dilations)
    if all(before == after for before, after in pads):
        return _CONV[rank - 1](x, weight, bias, strides, [p[0] for p in pads], dilations, groups)
    return _CONV[rank - 1](_pad(x, pads), weight, bias, strides, 0, dilations, groups)


def _kernel_first(kernel: Tensor) -> Tensor:
    """(..., in, out) to (out, in, ...)."""
    return kernel.permute(kernel.ndim - 1, kernel.ndim - 2, *range(kernel.ndim - 2))


def _to_first(call: Call, x: Tensor) -> Tensor:
    return x if channels_first(call) else x.movedim(-1, 1)


def _back(call: Call, y: Tensor) -> Tensor:
    y = y if channels_first(call) else y.movedim(1, -1)
    return activate(call, y, call.config.get("activation"))


@layer("Conv1D", "Conv2D", "Conv3D", "Convolution1D", "Convolution2D")
def _conv(call: Call, x: Tensor) -> Tensor:
    kernel = call.need("kernel")
    if call.kind == "Convolution1D" and kernel.ndim == 4:  # Keras 1 keeps an axis of one
        kernel = kernel.squeeze(1)
    if call.kind.startswith("Convolution") and channels_first(call):
        raise call.refuse("Keras 1 with channels first")
    y = _convolve(call, _to_first(call, x), _kernel_first(kernel), call.weight("bias"), call.get("groups", default=1))
    return _back(call, y)


def _depthwise(kernel: Tensor) -> Tensor:
    """(..., channels, multiplier) to (channels x multiplier, 1, ...)."""
    moved = kernel.permute(kernel.ndim - 2, kernel.ndim - 1, *range(kernel.ndim - 2))
    return moved.flatten(0, 1).unsqueeze(1)


@layer("DepthwiseConv1D", "DepthwiseConv2D")
def _depthwise_conv(call: Call, x: Tensor) -> Tensor:
    kernel = call.need("depthwise_kernel")
    y = _convolve(call, _to_first(call, x), _depthwise(kernel), call.weight("bias"), kernel.shape[-2])
    return _back(call, y)


@layer("SeparableConv1D", "SeparableConv2D")
def _separable_conv(call: Call, x: Tensor) -> Tensor:
    depthwise, pointwise = call.need("depthwise_kernel"), call.need("pointwise_kernel")
    y = _convolve(call, _to_first(call, x), _depthwise(depthwise), None, depthwise.shape[-2])
    return _back(call, _CONV[depthwise.ndim - 3](y, _kernel_first(pointwise), call.weight("bias")))


@layer("Conv1DTranspose", "Conv2DTranspose", "Conv3DTranspose")
def _conv_transpose(call: Call, x: Tensor) -> Tensor:
    kernel, bias = _kernel_first(call.need("kernel")), call.weight("bias")  # (in, out, ...)
    rank, x = kernel.ndim - 2, _to_first(call, x)
    strides, dilations = sizes(call.get("strides"), rank), sizes(call.get("dilation_rate"), rank)
    extra, same = call.config.get("output_padding"), call.config.get("padding") == "same"
    y = _CONV_TRANSPOSE[rank - 1](x, kernel, None, strides, 0, 0, 1, dilations)
    pads = []
    for i in range(rank):
        size, stride, span = x.shape[2 + i], strides[i], (kernel.shape[2 + i] - 1) * dilations[i] + 1
        full = (size - 1) * stride + span
        if extra is not None:
            more = sizes(extra, rank)[i]
            wanted = full + more - (2 * (span // 2) if same else 0)
        else:
            wanted = size * stride if same else size * stride + max(span - stride, 0)
        before = max(0, full - wanted) // 2
        pads.append((-before, wanted - full + before))
    y = _pad(y, pads)
    return _back(call, y if bias is None else y + bias.reshape(-1, *[1] * rank))


# ---- pooling, padding, resizing --------------------------------------------------------------------------


@layer("MaxPooling1D", "MaxPooling2D", "MaxPooling3D", "AveragePooling1D", "AveragePooling2D", "AveragePooling3D")
def _pool(call: Call, x: Tensor) -> Tensor:
    rank, x = int(call.kind[-2]), _to_first(call, x)
    kernel = sizes(call.get("pool_size", "pool_length", default=2), rank)
    strides = sizes(call.get("strides", "stride", default=kernel), rank)
    pads = _padding(call, x, kernel, strides, [1] * rank)
    if call.kind.startswith("Max"):
        return _back(call, _MAX[rank - 1](_pad(x, pads, -math.inf), kernel, strides))
    mean = _AVERAGE[rank - 1](_pad(x, pads), kernel, strides)
    if any(before or after for before, after in pads):  # padding does not count
        there = _pad(torch.ones((1, 1, *x.shape[2:]), dtype=x.dtype), pads)
        mean = mean / _AVERAGE[rank - 1](there, kernel, strides)
    return _back(call, mean)


@layer(*(f"Global{kind}Pooling{rank}D" for kind in ("Average", "Max") for rank in (1, 2, 3)))
def _global_pool(call: Call, x: Tensor) -> Tensor:
    dims = tuple(range(2, x.ndim)) if channels_first(call) else tuple(range(1, x.ndim - 1))
    keep = bool(call.config.get("keepdims"))
    return x.amax(dims, keepdim=keep) if "Max" in call.kind else x.mean(dims, keepdim=keep)


def _edges(setting: Any, rank: int) -> list[tuple[int, int]]:
    each = [setting] * rank if isinstance(setting, int) else list(setting)
    if rank == 1 and len(each) == 2:
        each = [each]
    return [(int(e), int(e)) if isinstance(e, int) else (int(e[0]), int(e[1])) for e in each]


@layer("ZeroPadding1D", "ZeroPadding2D", "ZeroPadding3D", "Cropping1D", "Cropping2D", "Cropping3D")
def _pad_or_crop(call: Call, x: Tensor) -> Tensor:
    cropping = call.kind.startswith("Cropping")
    edges = _edges(call.config["cropping" if cropping else "padding"], int(call.kind[-2]))
    if cropping:
        edges = [(-before, -after) for before, after in edges]
    return _back(call, _pad(_to_first(call, x), edges))


@layer("UpSampling1D", "UpSampling2D", "UpSampling3D")
def _up_sampling(call: Call, x: Tensor) -> Tensor:
    rank, x = int(call.kind[-2]), _to_first(call, x)
    factors, mode = (
        sizes(call.get("size", "length", default=2), rank),
        call.get("interpolation", default="nearest"),
    )
    if mode == "bilinear":
        target = [s * f for s, f in zip(x.shape[2:], factors, strict=True)]
        return _back(call, F.interpolate(x, target, mode="bilinear", align_corners=False))
    if mode != "nearest":
        raise call.refuse(f"interpolation {mode!r}")
    for i, factor in enumerate(factors):
        x = x.repeat_interleave(factor, 2 + i)
    return _back(call, x)


# ---- shapes ------------------------------------------------------------------------------------------


@layer("Flatten")
def _flatten(call: Call, x: Tensor) -> Tensor:
    x = x.movedim(1, -1) if channels_first(call) and x.ndim > 2 else x
    return x.flatten(1) if x.ndim > 1 else x.unsqueeze(1)


@layer("Reshape")
def _reshape(call: Call, x: Tensor) -> Tensor:
    return x.reshape(x.shape[0], *(int(s) for s in call.config["target_shape"]))


@layer("Permute")
def _permute(call: Call, x: Tensor) -> Tensor:
    return x.permute(0, *(int(d) for d in call.config["dims"]))


@layer("RepeatVector")
def _repeat_vector(call: Call, x: Tensor) -> Tensor:
    return x.unsqueeze(1).expand(-1, int(call.config["n"]), -1)


# ---- normalisation and embedding -----------------------------------------------------------------------


@layer("BatchNormalization")
def _batch_norm(call: Call, x: Tensor, **unused: Any) -> Tensor:
    axis = call.get("axis", default=-1)
    axis = int(axis[0] if isinstance(axis, (list, tuple)) else axis)
    if call.config.get("renorm") or call.get("mode", default=0) != 0:
        raise call.refuse("renorm or mode")
    y = F.batch_norm(
        x.movedim(axis, 1) if x.ndim > 2 else x, call.need("moving_mean"), call.need("moving_variance"),
        call.weight("gamma"), call.weight("beta"), False, 0.0, call.get("epsilon", default=1e-3),
    )  # fmt: skip
    return y.movedim(1, axis) if x.ndim > 2 else y


@layer("LayerNormalization")
def _layer_norm(call: Call, x: Tensor) -> Tensor:
    axis = call.get("axis", default=-1)
    axes = sorted(int(a) % x.ndim for a in (axis if isinstance(axis, (list, tuple)) else [axis]))
    if axes != list(range(axes[0], x.ndim)) or call.config.get("rms_scaling"):
        raise call.refuse(f"axis {axis} or rms_scaling")
    return F.layer_norm(
        x, x.shape[axes[0] :], call.weight("gamma"), call.weight("beta"), call.get("epsilon", default=1e-3)
    )


@layer("GroupNormalization")
def _group_norm(call: Call, x: Tensor) -> Tensor:
    axis, groups = int(call.get("axis", default=-1)), int(call.get("groups", default=32))
    y = x.movedim(axis, 1)
    y = F.group_norm(
        y,
        groups if groups > 0 else y.shape[1],
        call.weight("gamma"),
        call.weight("beta"),
        call.get("epsilon", default=1e-3),
    )
    return y.movedim(1, axis)


@layer("RMSNormalization")
def _rms_norm(call: Call, x: Tensor) -> Tensor:
    if call.get("axis", default=-1) not in (-1, [-1], x.ndim - 1):
        raise call.refuse("an axis other than the last")
    return x * torch.rsqrt((x * x).mean(-1, keepdim=True) + call.get("epsilon", default=1e-6)) * call.need("scale")


@layer("UnitNormalization")
def _unit_norm(call: Call, x: Tensor) -> Tensor:
    axis = call.get("axis", default=-1)
    total = (x * x).sum(axis, keepdim=True)
    return x * torch.rsqrt(torch.clamp(total, min=1e-12))


@layer("Normalization")
def _normalization(call: Call, x: Tensor) -> Tensor:
    if call.get("axis", default=-1) not in (-1, [-1]) or call.config.get("invert"):
        raise call.refuse("an axis other than the last")
    return (x - call.need("mean")) / torch.clamp(call.need("variance").sqrt(), min=1e-7)


@layer("Rescaling")
def _rescaling(call: Call, x: Tensor) -> Tensor:
    scale, offset = call.get("scale", default=1.0), call.get("offset", default=0.0)
    return x * torch.as_tensor(scale, dtype=x.dtype) + torch.as_tensor(offset, dtype=x.dtype)


@layer("Embedding")
def _embedding(call: Call, x: Tensor) -> Tensor:
    return F.embedding(x.long(), call.need("embeddings"))
