"""What each ONNX operation computes, in torch. To support one more, add a function with ``@op("Name")``.

A function takes the node, its arguments (``None`` where an optional one is left out) and the state of the
run, and returns a tensor or a tuple of tensors. Where the standard changed over its versions,
``node.version`` decides. Here: the table, elementwise operations and products; shapes, indices and
reductions are in ``onnx_shapes.py``, convolutions, pooling, normalisation and recurrent cells in
``onnx_layers.py``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from weightspace.errors import WiringError

MAX_ELEMENTS = 1 << 28  # of a tensor whose size comes from the file rather than from data

floating = frozenset({torch.float16, torch.bfloat16, torch.float32, torch.float64})


@dataclass(frozen=True)
class Node:
    """One operation: attributes hold numbers, strings, lists, tensors, or graphs."""

    op: str
    domain: str
    name: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    attrs: Mapping[str, Any]
    version: int


@dataclass(frozen=True)
class State:
    """How a run is done: ``wide`` computes in float64 throughout, casts to float32 included."""

    wide: bool = False

    @staticmethod
    def dtypes() -> dict[int, torch.dtype]:
        """ONNX element types that torch has."""
        return {
            1: torch.float32, 2: torch.uint8, 3: torch.int8, 4: torch.uint16, 5: torch.int16, 6: torch.int32,
            7: torch.int64, 9: torch.bool, 10: torch.float16, 11: torch.float64, 12: torch.uint32,
            13: torch.uint64, 16: torch.bfloat16,
        }  # fmt: skip

    def dtype(self, code: int, node: Node) -> torch.dtype:
        """The torch type of an ONNX element type, widened where the run is wide."""
        found = self.dtypes().get(int(code))
        if found is None:
            raise WiringError(f"ONNX node {node.name!r} ({node.op}) asks for element type {code}: not a torch type")
        return torch.float64 if self.wide and found in floating else found


Args = Sequence[Tensor]  # an optional one that is left out is None: ask with optional()
Function = Callable[[Node, Args, State], Any]
OPS: dict[tuple[str, str], Function] = {}


def op(*names: str, domain: str = "") -> Callable[[Function], Function]:
    """Registers the interpretation of operations."""

    def register(function: Function) -> Function:
        for name in names:
            OPS[domain, name] = function
        return function

    return register


def numbers(tensor: Tensor) -> list[Any]:
    """The entries of a one-dimensional setting (a shape, axes, scales), unseen by a tracer."""
    with _disable_current_modes():
        return list(tensor.detach().reshape(-1).tolist())


def optional(args: Sequence[Any], position: int) -> Any:
    """An argument that may be left out."""
    return args[position] if position < len(args) else None


def setting(node: Node, args: Sequence[Any], name: str, position: int) -> list[Any] | None:
    """A list that older versions give as an attribute and newer ones as an input."""
    if (given := optional(args, position)) is not None:
        return numbers(given)
    value = node.attrs.get(name)
    return None if value is None else list(value)


def bounded(shape: Sequence[int], node: Node) -> list[int]:
    """``shape``, refused if a file asks for absurdly much."""
    if any(s < 0 for s in shape) or math.prod(shape) > MAX_ELEMENTS:
        raise WiringError(
            f"ONNX node {node.name!r} ({node.op}) asks for a tensor of shape {list(shape)}: "
            f"at most {MAX_ELEMENTS:,} elements are made"
        )
    return [int(s) for s in shape]


# ---- elementwise -----------------------------------------------------------------------------------

_UNARY: dict[str, Callable[[Tensor], Tensor]] = {
    "Relu": torch.relu, "Sigmoid": torch.sigmoid, "Tanh": torch.tanh, "Erf": torch.erf, "Sqrt": torch.sqrt,
    "Exp": torch.exp, "Log": torch.log, "Neg": torch.neg, "Abs": torch.abs, "Reciprocal": torch.reciprocal,
    "Sin": torch.sin, "Cos": torch.cos, "Tan": torch.tan, "Asin": torch.asin, "Acos": torch.acos,
    "Atan": torch.atan, "Sinh": torch.sinh, "Cosh": torch.cosh, "Asinh": torch.asinh, "Acosh": torch.acosh,
    "Atanh": torch.atanh, "Floor": torch.floor, "Ceil": torch.ceil, "Round": torch.round, "Sign": torch.sign,
    "Not": torch.logical_not, "IsNaN": torch.isnan, "Softsign": F.softsign, "Mish": F.mish,
    "HardSwish": F.hardswish, "BitwiseNot": torch.bitwise_not,
}  # fmt: skip

_BINARY: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "Add": torch.add, "Sub": torch.sub, "Mul": torch.mul, "Equal": torch.eq, "Greater": torch.gt,
    "Less": torch.lt, "GreaterOrEqual": torch.ge, "LessOrEqual": torch.le, "And": torch.logical_and,
    "Or": torch.logical_or, "Xor": torch.logical_xor, "BitwiseAnd": torch.bitwise_and,
    "BitwiseOr": torch.bitwise_or, "BitwiseXor": torch.bitwise_xor, "MatMul": torch.matmul,
}  # fmt: skip


@op(*_UNARY)
def _unary(node: Node, args: Args, state: State) -> Tensor:
    return _UNARY[node.op](args[0])


@op(*_BINARY)
def _binary(node: Node, args: Args, state: State) -> Tensor:
    a, b = args
    if node.version < 7 and node.attrs.get("broadcast") and b.ndim:
        b = _aligned(b, a, node.attrs.get("axis"))
    return _BINARY[node.op](a, b)


def _aligned(b: Tensor, a: Tensor, axis: int | None) -> Tensor:
    """Broadcasting before opset 7: ``b`` lines up with the axes of ``a`` from ``axis`` on."""
    start = a.ndim - b.ndim if axis is None else axis % a.ndim
    return b.reshape(*b.shape, *[1] * (a.ndim - b.ndim - start))


@op("Div")
def _div(node: Node, args: Args, state: State) -> Tensor:
    a, b = args
    if node.version < 7 and node.attrs.get("broadcast") and b.ndim:
        b = _aligned(b, a, node.attrs.get("axis"))
    whole = a.dtype not in floating and b.dtype not in floating
    return torch.div(a, b, rounding_mode="trunc") if whole else torch.div(a, b)


@op("Pow")
def _pow(node: Node, args: Args, state: State) -> Tensor:
    base, exponent = args
    if exponent.numel() == 1:  # a plain number: what the exponent says stays visible
        value = numbers(exponent)[0]
        return torch.pow(base, int(value) if float(value).is_integer() else value).to(base.dtype)
    return torch.pow(base, exponent).to(base.dtype)


@op("Mod")
def _mod(node: Node, args: Args, state: State) -> Tensor:
    return torch.fmod(args[0], args[1]) if node.attrs.get("fmod") else torch.remainder(args[0], args[1])


@op("Min", "Max", "Sum", "Mean")
def _variadic(node: Node, args: Args, state: State) -> Tensor:
    total = args[0]
    for other in args[1:]:
        if node.op == "Min":
            total = torch.minimum(total, other)
        elif node.op == "Max":
            total = torch.maximum(total, other)
        else:
            total = total + other
    return total / len(args) if node.op == "Mean" and len(args) > 1 else total


@op("LeakyRelu")
def _leaky_relu(node: Node, args: Args, state: State) -> Tensor:
    return F.leaky_relu(args[0], node.attrs.get("alpha", 0.01))


@op("PRelu")
def _prelu(node: Node, args: Args, state: State) -> Tensor:
    x, slope = args
    if node.version < 7 and slope.ndim == 1 and slope.numel() > 1:
        slope = _aligned(slope, x, 1)
    return torch.where(x > 0, x, x * slope)


@op("Elu")
def _elu(node: Node, args: Args, state: State) -> Tensor:
    return F.elu(args[0], node.attrs.get("alpha", 1.0))


@op("Celu")
def _celu(node: Node, args: Args, state: State) -> Tensor:
    return F.celu(args[0], node.attrs.get("alpha", 1.0))


@op("Selu")
def _selu(node: Node, args: Args, state: State) -> Tensor:
    alpha, gamma = (
        node.attrs.get("alpha", 1.67326319217681884765625),
        node.attrs.get("gamma", 1.05070102214813232421875),
    )
    return gamma * F.elu(args[0], alpha)


@op("Gelu")
def _gelu(node: Node, args: Args, state: State) -> Tensor:
    return F.gelu(args[0], approximate=node.attrs.get("approximate", "none"))


OPS["com.microsoft", "Gelu"] = _gelu


@op("FastGelu", domain="com.microsoft")
def _fast_gelu(node: Node, args: Args, state: State) -> Tensor:
    x = args[0] if optional(args, 1) is None else args[0] + args[1]
    return F.gelu(x, approximate="tanh")


@op("QuickGelu", domain="com.microsoft")
def _quick_gelu(node: Node, args: Args, state: State) -> Tensor:
    return args[0] * torch.sigmoid(args[0] * node.attrs.get("alpha", 1.702))


@op("Swish")
def _swish(node: Node, args: Args, state: State) -> Tensor:
    return args[0] * torch.sigmoid(args[0] * node.attrs.get("alpha", 1.0))


@op("HardSigmoid")
def _hard_sigmoid(node: Node, args: Args, state: State) -> Tensor:
    return torch.clamp(args[0] * node.attrs.get("alpha", 0.2) + node.attrs.get("beta", 0.5), 0, 1)


@op("Softplus")
def _softplus(node: Node, args: Args, state: State) -> Tensor:
    return torch.logaddexp(args[0], torch.zeros_like(args[0]))


@op("ThresholdedRelu")
def _thresholded_relu(node: Node, args: Args, state: State) -> Tensor:
    return torch.where(args[0] > node.attrs.get("alpha", 1.0), args[0], torch.zeros_like(args[0]))


@op("Shrink")
def _shrink(node: Node, args: Args, state: State) -> Tensor:
    x, bias, edge = args[0], node.attrs.get("bias", 0.0), node.attrs.get("lambd", 0.5)
    zero = torch.zeros_like(x)
    return torch.where(x < -edge, x + bias, torch.where(x > edge, x - bias, zero))


@op("Clip")
def _clip(node: Node, args: Args, state: State) -> Tensor:
    low, high = optional(args, 1), optional(args, 2)
    least = node.attrs.get("min") if low is None else numbers(low)[0]
    most = node.attrs.get("max") if high is None else numbers(high)[0]
    return args[0] if least is None and most is None else torch.clamp(args[0], least, most)


@op("Where")
def _where(node: Node, args: Args, state: State) -> Tensor:
    return torch.where(args[0], args[1], args[2])


@op("Cast", "CastLike")
def _cast(node: Node, args: Args, state: State) -> Tensor:
    dtype = args[1].dtype if node.op == "CastLike" else state.dtype(node.attrs["to"], node)
    return args[0].to(dtype)


@op("Identity")
def _identity(node: Node, args: Args, state: State) -> Any:
    return args[0]


@op("Dropout")
def _dropout(node: Node, args: Args, state: State) -> tuple[Any, ...]:
    training = optional(args, 2)
    if training is not None and numbers(training)[0]:
        raise WiringError(
            f"ONNX node {node.name!r} drops values at random (training_mode): export the model in eval mode"
        )
    return args[0], torch.ones_like(args[0], dtype=torch.bool)


@op("DequantizeLinear")
def _dequantize(node: Node, args: Args, state: State) -> Tensor:
    x, scale, zero = args[0], args[1], optional(args, 2)
    if scale.ndim == 1 and scale.numel() > 1:
        axis = node.attrs.get("axis", 1) % x.ndim
        trailing = [1] * (x.ndim - axis - 1)
        scale, zero = scale.reshape(-1, *trailing), None if zero is None else zero.reshape(-1, *trailing)
    return x.to(scale.dtype) * scale if zero is None else (x.to(scale.dtype) - zero.to(scale.dtype)) * scale


# ---- linear algebra ----------------------------------------------------------------------------------


@op("Gemm")
def _gemm(node: Node, args: Args, state: State) -> Tensor:
    a = args[0].t() if node.attrs.get("transA") else args[0]
    if node.version < 7 and a.ndim > 2:
        a = a.reshape(a.shape[0], -1)
    product = a @ (args[1].t() if node.attrs.get("transB") else args[1])
    if (alpha := node.attrs.get("alpha", 1.0)) != 1:
        product = product * alpha
    bias = optional(args, 2)
    if bias is None:
        return product
    return product + (bias if (beta := node.attrs.get("beta", 1.0)) == 1 else bias * beta)


@op("Einsum")
def _einsum(node: Node, args: Args, state: State) -> Tensor:
    return torch.einsum(node.attrs["equation"].replace(" ", ""), *args)


@op("Det")
def _det(node: Node, args: Args, state: State) -> Tensor:
    return torch.linalg.det(args[0])
