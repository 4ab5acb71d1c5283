"""Programs from ONNX graphs: the same answers as onnxruntime, in the file's own names and layout."""

# ruff: noqa: E501  (tables keep a case on a line)

from __future__ import annotations

import io
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from weightspace.errors import CheckpointError, WiringError
from weightspace.wiring.onnx import program_from_onnx
from weightspace.wiring.program import Program

onnx = pytest.importorskip("onnx", reason="the onnx extra is not installed")
helper, TensorProto = onnx.helper, onnx.TensorProto

SHARED = Path(__file__).resolve().parents[2].parent / "shared" / "checkpoints"
ONNX_FILES = sorted(SHARED.glob("*/*.onnx"))
TOLERANCE = 1e-5
SMALLEST = 1e-6  # onnxruntime approximates sigmoid near 0


def answers(path: Path, feeds: Sequence[Tensor]) -> list[Tensor]:
    ort = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed: nothing to compare with")
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    names = [i.name for i in session.get_inputs()]
    return [
        torch.as_tensor(r)
        for r in session.run(None, {n: f.numpy() for n, f in zip(names, feeds, strict=True)})
    ]


def worst(got: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """The largest difference relative to the largest magnitude of each output."""
    assert len(got) == len(expected) > 0
    errors = []
    for g, e in zip(got, expected, strict=True):
        assert tuple(g.shape) == tuple(e.shape)
        difference = (g.double() - e.double()).abs().max()
        errors.append(0.0 if difference <= SMALLEST * 0.1 else float(difference / e.double().abs().max()))
    return max(errors)


def check(path: Path, declared: Sequence[Tensor] | None = None) -> Program:
    program = program_from_onnx(path)
    feeds = program.args if declared is None else declared
    got = program.run(program.tensors, *feeds)
    assert worst(got, answers(path, feeds)) <= TOLERANCE
    wide = program.run({n: t.double() for n, t in program.tensors.items()}, *feeds)
    assert all(w.dtype == torch.float64 for g, w in zip(got, wide, strict=True) if g.is_floating_point())
    assert worst(got, wide) <= TOLERANCE
    return program


# ---- single operations ---------------------------------------------------------------------------


def single(
    path: Path,
    op: str,
    shape: Sequence[int],
    extra: Mapping[str, Any] | None = None,
    outputs: int = 1,
    opset: int = 17,
    positive: bool = False,
    skip: Sequence[int] = (),
    **attrs: Any,
) -> Path:
    """A graph ``op(x + w, *extra)``: float extras are initialisers, so are whole ones."""
    generator = torch.Generator().manual_seed(7)
    w = torch.randn(tuple(shape), generator=generator)
    nodes = [helper.make_node("Add", ["x", "w"], ["y"])]
    source = "y"
    if positive:
        nodes += [helper.make_node("Abs", ["y"], ["a"]), helper.make_node("Add", ["a", "one"], ["p"])]
        source = "p"
    tensors = {"w": w, "one": torch.ones(1), **(extra or {})}
    names = [source, *(extra or {})]
    for position in sorted(skip):
        names.insert(position, "")
    nodes.append(helper.make_node(op, names, [f"o{i}" for i in range(outputs)], name="under_test", **attrs))
    results = [helper.make_tensor_value_info(f"o{i}", TensorProto.UNDEFINED, None) for i in range(outputs)]
    for r in results:
        r.ClearField("type")
    graph = helper.make_graph(
        nodes, "g", [helper.make_tensor_value_info("x", TensorProto.FLOAT, list(shape))], results,
        [onnx.numpy_helper.from_array(torch.as_tensor(t).numpy(), n) for n, t in tensors.items()],
    )  # fmt: skip
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)
    model = onnx.shape_inference.infer_shapes(model)
    path.write_bytes(model.SerializeToString())
    return path


def ints(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int64)


def draws(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


IMAGE, LINE, VOLUME = (2, 4, 7, 9), (2, 4, 11), (2, 2, 5, 6, 7)
UNARY = [
    "Relu",
    "Sigmoid",
    "Tanh",
    "Erf",
    "Exp",
    "Neg",
    "Abs",
    "Reciprocal",
    "Sin",
    "Cos",
    "Tan",
    "Atan",
    "Sinh",
    "Asinh",
    "Floor",
    "Ceil",
    "Round",
    "Sign",
    "Softsign",
    "Softplus",
    "HardSwish",
    "HardSigmoid",
    "Elu",
    "Selu",
    "Celu",
    "LeakyRelu",
    "ThresholdedRelu",
    "Identity",
    "Softmax",
    "LogSoftmax",
    "Hardmax",
]
REDUCTIONS = ["Sum", "Mean", "Max", "Min", "L1", "L2", "SumSquare", "LogSumExp", "Prod"]
CASES: dict[str, dict[str, Any]] = {
    **{name: {"op": name, "shape": (2, 3, 4)} for name in UNARY},
    "Mish": {"op": "Mish", "shape": (2, 3), "opset": 18},
    "Gelu": {"op": "Gelu", "shape": (2, 3), "opset": 20},
    "Gelu tanh": {"op": "Gelu", "shape": (2, 3), "opset": 20, "approximate": "tanh"},
    "Shrink": {"op": "Shrink", "shape": (2, 3), "bias": 0.1, "lambd": 0.3},
    "Log": {"op": "Log", "shape": (2, 3), "positive": True},
    "Sqrt": {"op": "Sqrt", "shape": (2, 3), "positive": True},
    "Pow": {"op": "Pow", "shape": (2, 3), "positive": True, "extra": {"e": torch.tensor(2.5)}},
    "Pow integer": {"op": "Pow", "shape": (2, 3), "extra": {"e": torch.tensor(3.0)}},
    "Clip": {"op": "Clip", "shape": (2, 3), "extra": {"lo": torch.tensor(-0.5), "hi": torch.tensor(0.5)}},
    "Clip above": {"op": "Clip", "shape": (2, 3), "extra": {"hi": torch.tensor(0.5)}, "skip": [1]},
    "Clip attributes": {"op": "Clip", "shape": (2, 3), "opset": 9, "min": -0.2, "max": 0.3},
    "PRelu": {"op": "PRelu", "shape": (2, 3, 4), "extra": {"s": draws(3, 1)}},
    "Max": {"op": "Max", "shape": (2, 3), "extra": {"a": draws(3), "b": draws(2, 1)}},
    "Mean": {"op": "Mean", "shape": (2, 3), "extra": {"a": draws(3), "b": draws(2, 1)}},
    "Mod": {"op": "Mod", "shape": (2, 3), "fmod": 1, "extra": {"a": torch.tensor([0.3, 0.7, 1.1])}},
    "Softmax opset 11": {"op": "Softmax", "shape": (2, 3, 4), "opset": 11, "axis": 1},
    "Gemm": {"op": "Gemm", "shape": (2, 3), "alpha": 0.5, "beta": 2.0, "transB": 1, "extra": {"b": draws(5, 3), "c": draws(5)}},
    "Gemm transposed": {"op": "Gemm", "shape": (3, 2), "transA": 1, "extra": {"b": draws(3, 5)}},
    "MatMul": {"op": "MatMul", "shape": (2, 3, 4), "extra": {"b": draws(4, 5)}},
    "Einsum": {"op": "Einsum", "shape": (2, 3, 4), "equation": "bij, jk -> bik", "extra": {"b": draws(4, 5)}},
    **{f"Reduce{r}": {"op": f"Reduce{r}", "shape": (2, 3, 4), "axes": [1], "keepdims": 0} for r in REDUCTIONS if r != "Sum"},
    "ReduceSum": {"op": "ReduceSum", "shape": (2, 3, 4), "extra": {"axes": ints(-1, 1)}},
    "ReduceMean all": {"op": "ReduceMean", "shape": (2, 3, 4)},
    "ArgMax": {"op": "ArgMax", "shape": (2, 3, 4), "axis": 1, "keepdims": 0},
    "ArgMin last": {"op": "ArgMin", "shape": (2, 3, 4), "axis": -1, "select_last_index": 1},
    "TopK": {"op": "TopK", "shape": (2, 6), "extra": {"k": ints(3)}, "outputs": 2, "largest": 0},
    "CumSum": {"op": "CumSum", "shape": (2, 6), "extra": {"axis": torch.tensor(1)}, "exclusive": 1, "reverse": 1},
    "Trilu": {"op": "Trilu", "shape": (4, 4), "extra": {"k": torch.tensor(1)}, "upper": 0},
    "Shape": {"op": "Shape", "shape": (2, 3, 4), "start": 1},
    "Reshape": {"op": "Reshape", "shape": (2, 3, 4), "extra": {"s": ints(0, -1)}},
    "Flatten": {"op": "Flatten", "shape": (2, 3, 4), "axis": 2},
    "Flatten negative": {"op": "Flatten", "shape": (2, 3, 4), "axis": -1},
    "Transpose": {"op": "Transpose", "shape": (2, 3, 4)},
    "Squeeze": {"op": "Squeeze", "shape": (2, 1, 4), "extra": {"a": ints(1)}},
    "Unsqueeze": {"op": "Unsqueeze", "shape": (2, 3), "extra": {"a": ints(-1, 0)}},
    "Expand": {"op": "Expand", "shape": (2, 1, 4), "extra": {"s": ints(3, 1)}},
    "Tile": {"op": "Tile", "shape": (2, 3), "extra": {"n": ints(2, 2)}},
    "Concat": {"op": "Concat", "shape": (2, 3), "extra": {"a": draws(2, 4)}, "axis": 1},
    "Split": {"op": "Split", "shape": (2, 6), "extra": {"s": ints(2, 4)}, "axis": 1, "outputs": 2},
    "Split even": {"op": "Split", "shape": (2, 6), "axis": -1, "outputs": 3},
    "Slice": {"op": "Slice", "shape": (2, 9), "extra": {"b": ints(7), "e": ints(-100), "a": ints(1), "s": ints(-2)}},
    "Slice forward": {"op": "Slice", "shape": (2, 9), "extra": {"b": ints(1), "e": ints(100), "a": ints(-1), "s": ints(3)}},
    "Slice attributes": {"op": "Slice", "shape": (2, 9), "opset": 9, "starts": [2], "ends": [-1], "axes": [1]},
    "Pad": {"op": "Pad", "shape": (2, 3, 4), "extra": {"p": ints(0, 1, 2, 0, 0, -1), "v": torch.tensor(0.5)}},
    "Pad reflect": {"op": "Pad", "shape": (2, 3, 4), "mode": "reflect", "extra": {"p": ints(0, 2, 3, 0, 1, 2)}},
    "Pad edge": {"op": "Pad", "shape": (2, 3, 4), "mode": "edge", "extra": {"p": ints(0, 2, 3, 0, 1, 2)}},
    "Gather": {"op": "Gather", "shape": (5, 3), "extra": {"i": torch.tensor([[0, -1], [2, 2]])}},
    "Gather scalar": {"op": "Gather", "shape": (5, 3), "extra": {"i": torch.tensor(-2)}, "axis": 1},
    "GatherElements": {"op": "GatherElements", "shape": (2, 3), "extra": {"i": torch.tensor([[0, -1], [2, 2]])}, "axis": 1},
    "GatherND": {"op": "GatherND", "shape": (2, 3, 4), "extra": {"i": torch.tensor([[0, 1], [1, -1]])}},
    "GatherND batched": {"op": "GatherND", "shape": (2, 3, 4), "batch_dims": 1, "extra": {"i": torch.tensor([[1], [2]])}},
    "ScatterND": {"op": "ScatterND", "shape": (4, 3), "extra": {"i": torch.tensor([[1], [3]]), "u": draws(2, 3)}},
    "ScatterElements": {
        "op": "ScatterElements", "shape": (2, 3), "axis": 1, "reduction": "add",
        "extra": {"i": torch.tensor([[0], [2]]), "u": draws(2, 1)},
    },
    "DepthToSpace": {"op": "DepthToSpace", "shape": (2, 8, 3, 2), "blocksize": 2},
    "DepthToSpace CRD": {"op": "DepthToSpace", "shape": (2, 8, 3, 2), "blocksize": 2, "mode": "CRD"},
    "SpaceToDepth": {"op": "SpaceToDepth", "shape": (2, 3, 4, 6), "blocksize": 2},
    "LRN": {"op": "LRN", "shape": IMAGE, "size": 3, "alpha": 0.3},
    "GlobalAveragePool": {"op": "GlobalAveragePool", "shape": IMAGE},
    "GlobalMaxPool": {"op": "GlobalMaxPool", "shape": IMAGE},
    "Conv": {
        "op": "Conv", "shape": IMAGE, "extra": {"k": draws(6, 2, 3, 2), "b": draws(6)},
        "group": 2, "pads": [1, 0, 2, 1], "strides": [2, 1], "dilations": [1, 2],
    },
    "Conv same upper": {"op": "Conv", "shape": IMAGE, "extra": {"k": draws(6, 4, 2, 2)}, "auto_pad": "SAME_UPPER", "strides": [2, 2]},
    "Conv same lower": {"op": "Conv", "shape": IMAGE, "extra": {"k": draws(6, 4, 2, 2)}, "auto_pad": "SAME_LOWER"},
    "Conv 1d": {"op": "Conv", "shape": LINE, "extra": {"k": draws(6, 4, 3)}, "pads": [1, 1]},
    "Conv 3d": {"op": "Conv", "shape": VOLUME, "extra": {"k": draws(3, 2, 2, 2, 2), "b": draws(3)}},
    "ConvTranspose": {
        "op": "ConvTranspose", "shape": IMAGE, "extra": {"k": draws(4, 3, 3, 3), "b": draws(6)},
        "group": 2, "pads": [1, 1, 1, 1], "strides": [2, 2], "output_padding": [1, 1],
    },
    "ConvTranspose uneven": {"op": "ConvTranspose", "shape": IMAGE, "extra": {"k": draws(4, 3, 3, 3)}, "pads": [0, 1, 2, 0]},
    "ConvTranspose shape": {
        "op": "ConvTranspose", "shape": IMAGE, "extra": {"k": draws(4, 3, 3, 3)}, "strides": [3, 2], "output_shape": [20, 19],
    },
    "MaxPool": {"op": "MaxPool", "shape": IMAGE, "kernel_shape": [3, 2], "strides": [2, 2], "pads": [1, 0, 1, 1]},
    "MaxPool ceil": {"op": "MaxPool", "shape": IMAGE, "kernel_shape": [3, 3], "strides": [2, 2], "ceil_mode": 1},
    "AveragePool": {"op": "AveragePool", "shape": IMAGE, "kernel_shape": [3, 2], "strides": [2, 2], "pads": [1, 0, 1, 1]},
    "AveragePool counted": {"op": "AveragePool", "shape": IMAGE, "kernel_shape": [3, 3], "pads": [1, 1, 1, 1], "count_include_pad": 1},
    "AveragePool same": {"op": "AveragePool", "shape": IMAGE, "kernel_shape": [2, 2], "auto_pad": "SAME_UPPER", "strides": [2, 2]},
    "BatchNormalization": {
        "op": "BatchNormalization", "shape": IMAGE,
        "extra": {"s": draws(4), "b": draws(4), "m": draws(4), "v": draws(4).abs() + 0.5},
    },
    "InstanceNormalization": {"op": "InstanceNormalization", "shape": IMAGE, "extra": {"s": draws(4), "b": draws(4)}},
    "LayerNormalization": {"op": "LayerNormalization", "shape": IMAGE, "axis": -2, "extra": {"s": draws(7, 9), "b": draws(7, 9)}},
    "GroupNormalization": {"op": "GroupNormalization", "shape": IMAGE, "opset": 21, "num_groups": 2, "extra": {"s": draws(4), "b": draws(4)}},
    "MeanVarianceNormalization": {"op": "MeanVarianceNormalization", "shape": IMAGE},
    "LpNormalization": {"op": "LpNormalization", "shape": (2, 5), "p": 2},
    **{
        f"Resize {mode} {where} {rounding}": {
            "op": "Resize", "shape": IMAGE, "mode": mode, "coordinate_transformation_mode": where,
            "nearest_mode": rounding, "extra": {"s": torch.tensor([1.0, 1.0, 1.7, 0.6])}, "skip": [1],
        }
        for mode in ("nearest", "linear", "cubic")
        for where in ("half_pixel", "align_corners", "asymmetric", "pytorch_half_pixel")
        for rounding in (("round_prefer_floor", "floor", "ceil") if mode == "nearest" else ("round_prefer_floor",))
    },
    "Resize to size": {"op": "Resize", "shape": IMAGE, "mode": "linear", "extra": {"z": ints(2, 4, 10, 5)}, "skip": [1, 2]},
    "Upsample": {"op": "Upsample", "shape": IMAGE, "opset": 9, "extra": {"s": torch.tensor([1.0, 1.0, 2.0, 3.0])}},
}  # fmt: skip


def recurrent(op: str, **more: Any) -> dict[str, Any]:
    gates = {"LSTM": 4, "GRU": 3, "RNN": 1}[op]
    sides = 2 if more.get("direction") == "bidirectional" else 1
    extra: dict[str, Any] = {"W": draws(sides, gates * 5, 3) * 0.5, "R": draws(sides, gates * 5, 5) * 0.5}
    if more.pop("bias", True):
        extra["B"] = draws(sides, 2 * gates * 5)
    for name in ("lengths", "h", "c", "P"):
        if name in more:
            extra[name] = more.pop(name)
    outputs = 3 if op == "LSTM" else 2
    return {"op": op, "shape": (4, 2, 3), "hidden_size": 5, "extra": extra, "outputs": outputs, **more}


LENGTHS = torch.tensor([4, 2], dtype=torch.int32)
CASES |= {
    "LSTM": recurrent("LSTM"),
    "LSTM bare": recurrent("LSTM", bias=False),
    "LSTM reverse": recurrent("LSTM", direction="reverse"),
    "LSTM lengths": recurrent(
        "LSTM", direction="bidirectional", lengths=LENGTHS, h=draws(2, 2, 5), c=draws(2, 2, 5)
    ),
    "LSTM peepholes": recurrent(
        "LSTM",
        lengths=torch.tensor([4, 4], dtype=torch.int32),
        h=draws(1, 2, 5),
        c=draws(1, 2, 5),
        P=draws(1, 15),
    ),
    "LSTM activations": recurrent("LSTM", activations=["Relu", "Tanh", "Sigmoid"]),
    "GRU": recurrent("GRU", direction="bidirectional"),
    "GRU reset after": recurrent("GRU", linear_before_reset=1),
    "RNN": recurrent("RNN", direction="bidirectional", lengths=LENGTHS),
}


@pytest.mark.parametrize("name", CASES)
def test_an_operation_answers_as_onnxruntime_does(name: str, tmp_path: Path) -> None:
    path = single(tmp_path / "op.onnx", **CASES[name])
    program = program_from_onnx(path)
    declared = draws(*CASES[name]["shape"])
    got = program.run(program.tensors, declared)
    assert worst(got, answers(path, [declared])) <= TOLERANCE
    wide = program.run({n: t.double() for n, t in program.tensors.items()}, declared)
    if not name.startswith(("Floor", "Ceil", "Round")):
        assert worst(got, wide) <= TOLERANCE


# ---- whole graphs --------------------------------------------------------------------------------


def written(path: Path, text: str, tensors: Mapping[str, Tensor]) -> Path:
    model = onnx.parser.parse_model(text)
    model.graph.initializer.extend(onnx.numpy_helper.from_array(t.numpy(), n) for n, t in tensors.items())
    path.write_bytes(model.SerializeToString())
    return path


BRANCHES = """
<ir_version: 8, opset_import: ["" : 17]>
g (float[N, 4] x, int64 sr) => (float[N, 3] y) {
    rate = Constant <value_int = 8000> ()
    slow = Equal (sr, rate)
    y = If (slow) <
        then_branch = t () => (float[N, 3] a) { a = MatMul (x, narrow) },
        else_branch = e () => (float[N, 3] b) { h = MatMul (x, wide) r = Relu (h) b = MatMul (r, out) }
    >
}
"""


def test_a_branch_is_taken_by_its_condition_and_the_other_is_named(tmp_path: Path) -> None:
    tensors = {"narrow": draws(4, 3), "wide": draws(4, 6), "out": draws(6, 3)}
    path = written(tmp_path / "if.onnx", BRANCHES, tensors)
    program = check(path)
    assert program.args[1].item() == 16000  # the usual rate, which no comparison excludes
    assert set(program.tensors) == {"wide", "out"}
    assert any("narrow" in note for note in program.notes)
    other = program_from_onnx(path, {"sr": torch.tensor(8000)})
    assert set(other.tensors) == {"narrow"}


LOOP = """
<ir_version: 8, opset_import: ["" : 17]>
g (float[2, 4] x) => (float[2, 4] y, float[S, 2, 4] all) {
    trips = Constant <value_int = 3> ()
    go = Constant <value = bool {1}> ()
    y, all = Loop (trips, go, x) <
        body = b (int64 i, bool c, float[2, 4] h) => (bool d, float[2, 4] k, float[2, 4] s)
            { d = Identity (c) m = MatMul (h, w) k = Tanh (m) s = Identity (k) }
    >
}
"""


def test_a_loop_runs_and_an_endless_one_is_refused(tmp_path: Path) -> None:
    check(written(tmp_path / "loop.onnx", LOOP, {"w": draws(4, 4)}))
    endless = written(
        tmp_path / "endless.onnx", LOOP.replace("value_int = 3", "value_int = 1000000000"), {"w": draws(4, 4)}
    )
    with pytest.raises(WiringError, match="1000000000 iterations"):
        program_from_onnx(endless)


def test_float_constants_are_tensors_and_numbers_of_a_formula_are_not(tmp_path: Path) -> None:
    text = """
    <ir_version: 8, opset_import: ["" : 17]>
    g (float[1, 3] x) => (float[1, 3] y) {
        b = Constant <value = float[3] {1.0, 2.0, 3.0}> ()
        two = Constant <value = float {2.0}> ()
        h = Mul (x, s)
        p = Pow (h, two)
        q = Add (p, b)
        y = Clip (q, low, high)
    }
    """
    limits = {"low": torch.tensor(-9.0), "high": torch.tensor(9.0)}
    program = program_from_onnx(written(tmp_path / "c.onnx", text, {"s": draws(3), **limits}))
    assert set(program.tensors) == {"s", "b"}
    assert program.args[0].shape == (2, 3)  # declared as 1, and taken as a batch


def test_a_shape_that_fixes_the_batch_keeps_it(tmp_path: Path) -> None:
    text = """
    <ir_version: 8, opset_import: ["" : 17]>
    g (float[1, 2, 3] x) => (float[1, 6] y) { h = Mul (x, s) y = Reshape (h, shape) }
    """
    program = program_from_onnx(written(tmp_path / "r.onnx", text, {"s": draws(2, 3), "shape": ints(1, 6)}))
    assert program.args[0].shape == (1, 2, 3)


def test_an_unknown_operation_is_named_with_domain_and_node(tmp_path: Path) -> None:
    node = helper.make_node("Frobnicate", ["x"], ["y"], name="strange", domain="org.example")
    x, y = (helper.make_tensor_value_info(n, TensorProto.FLOAT, [1, 2]) for n in "xy")
    model = helper.make_model(
        helper.make_graph([node], "g", [x], [y]), opset_imports=[helper.make_opsetid("org.example", 3)]
    )
    path = tmp_path / "u.onnx"
    path.write_bytes(model.SerializeToString())
    with pytest.raises(WiringError, match=r"'Frobnicate' \(domain 'org.example', opset 3, node 'strange'\)"):
        program_from_onnx(path)


def test_a_huge_tensor_is_not_made(tmp_path: Path) -> None:
    text = """
    <ir_version: 8, opset_import: ["" : 17]>
    g (float[1, 3] x) => (float[N, 3] y) { h = Mul (x, s) y = Expand (h, shape) }
    """
    path = written(tmp_path / "h.onnx", text, {"s": draws(3), "shape": ints(1 << 40, 3)})
    with pytest.raises(WiringError, match="elements are made"):
        program_from_onnx(path)


def test_what_is_no_model_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "no.onnx"
    path.write_bytes(b"\x00\x01 not a model")
    with pytest.raises(CheckpointError):
        program_from_onnx(path)


def test_an_unknown_input_is_named(tmp_path: Path) -> None:
    path = single(tmp_path / "op.onnx", "Relu", (2, 3))
    with pytest.raises(WiringError, match="no input nope"):
        program_from_onnx(path, {"nope": torch.zeros(1)})


# ---- files and exports -----------------------------------------------------------------------------


@pytest.mark.skipif(not ONNX_FILES, reason=f"no ONNX files under {SHARED.name}")
@pytest.mark.parametrize("path", ONNX_FILES, ids=lambda p: p.stem[-24:])
def test_a_real_file_answers_as_onnxruntime_does(path: Path) -> None:
    program = program_from_onnx(path)
    declared = onnx.load(str(path), load_external_data=False)
    if not declared.opset_import:
        pytest.skip(f"onnxruntime does not load files as old as {path.name}")
    sizes = {i.name: [d.dim_value for d in i.type.tensor_type.shape.dim] for i in declared.graph.input}
    held = {t.name for t in declared.graph.initializer}
    feeds = [
        a[:1] if shape and shape[0] == 1 else a
        for a, shape in zip(program.args, (s for n, s in sizes.items() if n not in held), strict=True)
    ]
    assert worst(program.run(program.tensors, *feeds), answers(path, feeds)) <= TOLERANCE


@pytest.mark.skipif(not (SHARED / "honk").is_dir(), reason="../shared/checkpoints/honk is not there")
def test_a_file_of_the_first_exporter_computes_its_layers() -> None:
    program = program_from_onnx(SHARED / "honk" / "cnn_one_fstride4.onnx")
    t, x = program.tensors, program.args[0]
    h = torch.relu(nn.functional.conv2d(x, t["2"], t["3"], stride=(1, 4)))
    h = nn.functional.max_pool2d(h, (1, h.shape[-1] // (t["4"].shape[1] // t["2"].shape[0]))).flatten(1)
    for weight, bias in (("4", "5"), ("6", "7"), ("8", "9"), ("10", "11")):
        h = h @ t[weight].t() + t[bias]
    assert worst(program.run(t, x), [h]) <= TOLERANCE


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(30, 16)
        self.layer = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True, norm_first=True, dropout=0.0)
        self.head = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layer(self.tokens(x)).mean(1))


class Recurrent(nn.Module):
    def __init__(self, kind: Callable[..., nn.Module]) -> None:
        super().__init__()
        self.recurrent = kind(6, 5, 2, bidirectional=True, batch_first=True)
        self.head = nn.Linear(10, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.recurrent(x)[0][:, -1])


class Decoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.down, self.up = nn.Conv2d(3, 8, 3, 2, 1), nn.ConvTranspose2d(8, 4, 3, 2, 1, 1)
        self.group, self.instance, self.slope = (
            nn.GroupNorm(2, 4),
            nn.InstanceNorm2d(4, affine=True),
            nn.PReLU(4),
        )
        self.join = nn.Conv2d(7, 4, 3, padding=1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.slope(self.instance(self.group(self.up(torch.relu(self.down(x))))))
        y = self.join(torch.cat([y, x], 1))
        first, second = y.chunk(2, 1)
        return nn.functional.pixel_shuffle(y, 2), nn.functional.pad(
            first * torch.sigmoid(second), (1, 2, 0, 1), mode="reflect"
        )


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor]]] = {
    "encoder": (Encoder, lambda: torch.randint(0, 30, (2, 7))),
    "lstm": (lambda: Recurrent(nn.LSTM), lambda: draws(2, 4, 6)),
    "gru": (lambda: Recurrent(nn.GRU), lambda: draws(2, 4, 6)),
    "decoder": (Decoder, lambda: draws(2, 3, 16, 16)),
    "cnn": (
        lambda: nn.Sequential(
            nn.Conv2d(3, 6, 3, padding="same"), nn.BatchNorm2d(6), nn.LeakyReLU(), nn.MaxPool2d(3, 2, 1, ceil_mode=True),
            nn.Conv2d(6, 6, 3, groups=6), nn.Hardswish(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 4),
        ),
        lambda: draws(2, 3, 14, 14),
    ),
}  # fmt: skip


@pytest.mark.parametrize("dynamo", [False, True], ids=["script", "dynamo"])
@pytest.mark.parametrize("name", MODELS)
def test_an_export_from_torch_answers_as_the_module_does(name: str, dynamo: bool, tmp_path: Path) -> None:
    if dynamo:
        pytest.importorskip("onnxscript", reason="onnxscript is not installed: torch cannot export")
    torch.manual_seed(0)
    build, make = MODELS[name]
    module, x, path = build().eval(), make(), tmp_path / "m.onnx"
    with warnings.catch_warnings(), redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        more: dict[str, Any] = {"external_data": False} if dynamo else {"opset_version": 17}
        torch.onnx.export(module, (x,), str(path), dynamo=dynamo, verbose=False, **more)
    program = check(path)
    with torch.no_grad():
        expected = module(x)
    got = program.run(program.tensors, x)
    assert {n for n, _ in module.named_parameters()} & set(program.tensors)
    assert worst(got, expected if isinstance(expected, tuple) else [expected]) <= TOLERANCE


def test_a_zero_state_shared_by_layers_does_not_tie_them(tmp_path: Path) -> None:
    pytest.importorskip("onnxscript", reason="onnxscript is not installed: torch cannot export")
    path = tmp_path / "m.onnx"
    with warnings.catch_warnings(), redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        module = Recurrent(nn.LSTM).eval()
        torch.onnx.export(
            module, (draws(2, 4, 6),), str(path), dynamo=True, external_data=False, verbose=False
        )
    program = program_from_onnx(path)
    assert not any(t.numel() and not t.any() for t in program.tensors.values())
