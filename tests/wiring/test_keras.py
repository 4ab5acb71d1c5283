"""Programs from Keras configurations: the answers of Keras itself, in the file's own names and layout."""

# ruff: noqa: E501  (tables keep a case on a line)

from __future__ import annotations

import io
import json
import os
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from weightspace.errors import WiringError
from weightspace.wiring.keras import program_from_keras_config

SHARED = Path(__file__).resolve().parents[2].parent / "shared" / "checkpoints"
WHOLE_FILES = [*sorted(SHARED.glob("mlperf-tiny/*.h5")), *sorted(SHARED.glob("fer-trajectory/*.hdf5"))[:2]]
TOLERANCE = 1e-5


def keras_package() -> Any:
    os.environ.setdefault("KERAS_BACKEND", "torch")
    return pytest.importorskip("keras", reason="keras is not installed: nothing to compare with")


def tensors_of(file: Any) -> dict[str, Tensor]:
    h5py = pytest.importorskip("h5py", reason="the keras extra is not installed")
    found: dict[str, Tensor] = {}

    def keep(name: str, item: Any) -> None:
        if isinstance(item, h5py.Dataset):
            found[name] = torch.as_tensor(item[()])

    file.visititems(keep)
    return found


def read(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Configuration and tensors of a whole Keras file, read plainly."""
    h5py = pytest.importorskip("h5py", reason="the keras extra is not installed")
    if zipfile.is_zipfile(path):
        with (
            zipfile.ZipFile(path) as archive,
            h5py.File(io.BytesIO(archive.read("model.weights.h5"))) as file,
        ):
            return json.loads(archive.read("config.json")), tensors_of(file)
    with h5py.File(path) as file:
        return json.loads(file.attrs["model_config"]), tensors_of(file["model_weights"])


# ---- against Keras -------------------------------------------------------------------------------

CASES: dict[str, Callable[[Any, Any], Any]] = {}


def case(build: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
    CASES[build.__name__] = build
    return build


@case
def mlp(k: Any, m: Any) -> Any:
    return k.Sequential([
        k.Input((7,)), m.Dense(5, "relu"), m.BatchNormalization(), m.LeakyReLU(0.1), m.Dense(4, "gelu"), m.PReLU(),
        m.Dense(3, "hard_sigmoid"), m.ELU(), m.LayerNormalization(), m.Dropout(0.5), m.Dense(3, "softmax"),
    ])  # fmt: skip


@case
def activations(k: Any, m: Any) -> Any:
    names = [
        "relu",
        "sigmoid",
        "tanh",
        "elu",
        "selu",
        "softplus",
        "softsign",
        "silu",
        "gelu",
        "exponential",
        "relu6",
        "mish",
        "hard_silu",
        "softmax",
        "log_softmax",
        "leaky_relu",
        "hard_sigmoid",
        "celu",
        "log_sigmoid",
    ]
    i = k.Input((6,))
    x = m.Dense(6)(i)
    odd = m.ReLU(max_value=1.0, negative_slope=0.1, threshold=0.2)(x)
    return k.Model(i, [*(m.Activation(a)(x) for a in names), odd])


@case
def convolution(k: Any, m: Any) -> Any:
    return k.Sequential([
        k.Input((13, 15, 3)), m.Conv2D(4, 3, strides=2, padding="same", activation="relu"),
        m.Conv2D(6, (2, 3), dilation_rate=2, padding="same", groups=2), m.MaxPooling2D(3, 2, padding="same"),
        m.AveragePooling2D(2, 2, padding="same"), m.Conv2D(5, 2, use_bias=False), m.Flatten(), m.Dense(2),
    ])  # fmt: skip


@case
def separable(k: Any, m: Any) -> Any:
    return k.Sequential([
        k.Input((12, 12, 3)), m.SeparableConv2D(6, 3, padding="same", strides=2, depth_multiplier=2),
        m.DepthwiseConv2D(3, depth_multiplier=2), m.BatchNormalization(), m.GlobalAveragePooling2D(), m.Dense(2),
    ])  # fmt: skip


@case
def transposed(k: Any, m: Any) -> Any:
    return k.Sequential([
        k.Input((5, 5, 3)), m.Conv2DTranspose(4, 3, strides=2, padding="same"),
        m.Conv2DTranspose(3, 4, strides=2, padding="same"), m.Conv2DTranspose(3, 2, strides=2, activation="tanh"),
        m.Conv2DTranspose(2, 5, strides=2), m.UpSampling2D(2), m.UpSampling2D(2, interpolation="bilinear"),
        m.Cropping2D(((1, 2), (3, 0))),
    ])  # fmt: skip


@case
def line(k: Any, m: Any) -> Any:
    return k.Sequential([
        k.Input((20, 3)), m.Conv1D(4, 3, padding="causal", dilation_rate=2, activation="relu"),
        m.Conv1D(4, 4, padding="same", strides=3), m.ZeroPadding1D(2), m.MaxPooling1D(2), m.UpSampling1D(2),
        m.SeparableConv1D(3, 2), m.GlobalMaxPooling1D(), m.Dense(2),
    ])  # fmt: skip


@case
def volume(k: Any, m: Any) -> Any:
    return k.Sequential([
        k.Input((6, 6, 6, 2)), m.Conv3D(3, 3, padding="same"), m.MaxPooling3D(2),
        m.AveragePooling3D(2, padding="same"), m.Flatten(), m.Dense(2),
    ])  # fmt: skip


@case
def channels_first(k: Any, m: Any) -> Any:
    return k.Sequential([
        k.Input((3, 8, 8)), m.Conv2D(4, 3, data_format="channels_first"),
        m.MaxPooling2D(2, data_format="channels_first"), m.BatchNormalization(axis=1),
        m.Flatten(data_format="channels_first"), m.Dense(2),
    ])  # fmt: skip


@case
def any_size(k: Any, m: Any) -> Any:
    return k.Sequential([
        k.Input((None, None, 1)), m.Conv2D(4, 3, strides=2), m.MaxPooling2D(), m.Conv2D(4, 3), m.GlobalMaxPooling2D(),
        m.Dense(2),
    ])  # fmt: skip


@case
def lstm(k: Any, m: Any) -> Any:
    return k.Sequential([
        k.Input((5,)), m.Embedding(20, 6), m.LSTM(4, return_sequences=True),
        m.Bidirectional(m.LSTM(3, return_sequences=True)), m.LSTM(4, go_backwards=True, use_bias=False), m.Dense(2),
    ])  # fmt: skip


@case
def gru(k: Any, m: Any) -> Any:
    return k.Sequential([
        k.Input((None,)), m.Embedding(20, 6), m.GRU(4, return_sequences=True),
        m.Bidirectional(m.GRU(3, reset_after=False), merge_mode="sum"), m.RepeatVector(3),
        m.SimpleRNN(4, return_sequences=True), m.TimeDistributed(m.Dense(3)), m.Permute((2, 1)), m.Reshape((-1,)),
    ])  # fmt: skip


@case
def cell(k: Any, m: Any) -> Any:
    return k.Sequential([
        k.Input((4, 3)), m.RNN(m.LSTMCell(5), return_sequences=True), m.Bidirectional(m.SimpleRNN(2)), m.Dense(1),
    ])  # fmt: skip


@case
def encoder_decoder(k: Any, m: Any) -> Any:
    i, j = k.Input((4, 3)), k.Input((6, 3))
    _, h, c = m.LSTM(5, return_state=True)(i)
    return k.Model([i, j], m.Dense(2)(m.LSTM(5, return_sequences=True)(j, initial_state=[h, c])))


@case
def merges(k: Any, m: Any) -> Any:
    i, j = k.Input((6,)), k.Input((6,))
    a, b = m.Dense(4, "relu")(i), m.Dense(4, "tanh")(j)
    kinds = (m.Add, m.Multiply, m.Average, m.Maximum, m.Minimum, m.Subtract)
    x = m.Concatenate()([kind()([a, b]) for kind in kinds])
    return k.Model([i, j], [m.Dense(2)(x), m.Dot(1)([a, b]), m.Dot(-1, normalize=True)([a, b]), a + b * 2.0])


@case
def nested(k: Any, m: Any) -> Any:
    shared = k.Sequential([k.Input((6,)), m.Dense(4, "relu"), m.Dense(3)])
    i, j, inside = k.Input((6,)), k.Input((6,)), k.Input((3,))
    a, b = shared(i), shared(j)
    u, v = k.Model(inside, [m.Dense(3, name="u")(inside), m.Dense(3, name="v")(inside)])(a)
    return k.Model([i, j], [m.Add()([u, b]), m.Dense(1)(v)])


@case
def attention(k: Any, m: Any) -> Any:
    i = k.Input((5, 6))
    x = m.LayerNormalization(epsilon=1e-6)(m.Add()([m.MultiHeadAttention(2, 3)(i, i), i]))
    x = m.MultiHeadAttention(2, 3, value_dim=4, use_bias=False)(x, i)
    x = m.MultiHeadAttention(3, 2)(x, x, use_causal_mask=True)
    return k.Model(i, m.GlobalAveragePooling1D()(m.Attention()([x, i])) + m.Dense(6)(x[:, 0]))


@case
def over_time(k: Any, m: Any) -> Any:
    inner = k.Sequential([k.Input((108,)), m.Dense(4), m.Dense(3)])
    return k.Sequential([
        k.Input((3, 8, 8, 2)), m.TimeDistributed(m.Conv2D(3, 3)), m.TimeDistributed(m.Flatten()),
        m.TimeDistributed(inner), m.LSTM(2),
    ])  # fmt: skip


@case
def norms(k: Any, m: Any) -> Any:
    i = k.Input((8, 8, 4))
    x = m.ZeroPadding2D(1)(m.GroupNormalization(2)(m.Conv2D(4, 3)(m.Rescaling(0.5, 1.0)(i))))
    x = m.Dense(3)(m.Flatten()(x))
    return k.Model(i, m.UnitNormalization()(m.RMSNormalization()(x)))


@case
def masked(k: Any, m: Any) -> Any:
    i, j = k.Input((5,), dtype="int32"), k.Input((5, 3))
    return k.Model([i, j], [m.LSTM(3)(m.Embedding(9, 4, mask_zero=True)(i)), m.GRU(3)(m.Masking()(j))])


@case
def functions(k: Any, m: Any) -> Any:
    i, o = k.Input((5, 3)), k.ops
    x = m.Dense(3)(i)
    y = x @ o.transpose(x, (0, 2, 1))
    whole = [
        x / 2.0 - 1.0,
        o.relu(x),
        o.concatenate([x, i], -1),
        y,
        o.mean(x, 1),
        o.reshape(x, (-1, 15)),
        o.softmax(x),
    ]
    return k.Model(i, [*whole, x[:, 0], o.gelu(x)])


def saved(name: str, suffix: str, folder: Path) -> tuple[Any, Path]:
    """A model with random weights and statistics, and its file."""
    k = keras_package()
    k.utils.set_random_seed(0)
    model = CASES[name](k, k.layers)
    generator = torch.Generator().manual_seed(1)
    for w in model.weights:
        if w.dtype == "float32":
            spread = torch.rand(tuple(w.shape), generator=generator)
            w.assign(spread + 0.5 if w.path.endswith(("variance", "gamma")) else (spread - 0.5) * 0.8)
    path = folder / f"m{suffix}"
    model.save(path)
    return model, path


@pytest.mark.parametrize("suffix", [".keras", ".h5"])
@pytest.mark.parametrize("name", CASES)
def test_a_model_answers_as_keras_does(name: str, suffix: str, tmp_path: Path) -> None:
    model, path = saved(name, suffix, tmp_path)
    config, tensors = read(path)
    program = program_from_keras_config(config, tensors, keras_version=keras_package().__version__)
    counted = sum(
        w.shape.num_elements() if hasattr(w.shape, "num_elements") else w.numpy().size for w in model.weights
    )
    seeds = sum(w.numpy().size for w in model.weights if w.dtype != "float32")
    assert sum(t.numel() for t in program.tensors.values()) == counted - seeds
    with torch.no_grad():
        expected = model(list(program.args) if len(program.args) > 1 else program.args[0], training=False)
        got = program.run(program.tensors, *program.args)
        wide = program.run({n: t.double() for n, t in program.tensors.items()}, *program.args)
    pairs = zip(*((v if isinstance(v, (list, tuple)) else [v]) for v in (got, expected, wide)), strict=True)
    for g, e, w in pairs:
        assert g.shape == e.shape
        assert w.dtype == torch.float64
        scale = e.abs().max()
        assert (g - e).abs().max() <= TOLERANCE * scale
        assert (g - w).abs().max() <= TOLERANCE * scale


@pytest.mark.parametrize("suffix", [".keras", ".h5"])
@pytest.mark.parametrize("name", ["lstm", "nested", "attention", "over_time", "separable"])
def test_an_opened_file_uses_the_names_of_its_checkpoint(name: str, suffix: str, tmp_path: Path) -> None:
    import weightspace as ws
    from weightspace.wiring.keras import program_from_keras

    model, path = saved(name, suffix, tmp_path)
    checkpoint = ws.open(path)
    program = program_from_keras(checkpoint)
    assert set(program.tensors) <= set(checkpoint)
    with torch.no_grad():
        args = list(program.args)
        expected = model(args if len(args) > 1 else args[0], training=False)
        got = program.run(program.tensors, *args)
    for g, e in zip(*((v if isinstance(v, (list, tuple)) else [v]) for v in (got, expected)), strict=True):
        assert (g - e).abs().max() <= TOLERANCE * e.abs().max()


# ---- configurations by hand, without Keras -----------------------------------------------------------


def dense(name: str, units: int, **more: Any) -> dict[str, Any]:
    return {
        "class_name": "Dense",
        "config": {"name": name, "units": units, "trainable": True, "use_bias": True, **more},
    }


def first_layer(shape: list[int | None]) -> dict[str, Any]:
    return {"class_name": "InputLayer", "config": {"name": "i", "batch_input_shape": shape}}


def sequential(*layers: Mapping[str, Any]) -> dict[str, Any]:
    return {"class_name": "Sequential", "config": {"name": "s", "layers": list(layers)}}


TENSORS = {
    "a/kernel:0": torch.randn(3, 4, generator=torch.Generator().manual_seed(0)), "a/bias:0": torch.ones(4),
    "b/kernel:0": torch.randn(4, 2, generator=torch.Generator().manual_seed(1)), "b/bias:0": torch.ones(2),
}  # fmt: skip


@pytest.mark.parametrize("prefix", ["", "model_weights/"])
def test_names_may_repeat_the_layer_and_carry_another_graph_s_number(prefix: str) -> None:
    config = sequential(first_layer([None, 3]), dense("a", 4, activation="relu"), dense("b", 2))
    numbered = {f"{prefix}{n[0]}/{n[0]}_3{n[1:]}": t for n, t in TENSORS.items()}
    for tensors in (TENSORS, numbered):
        program = program_from_keras_config(config, tensors)
        assert list(program.tensors) == list(tensors)
        a, wa, b, wb = tensors.values()
        (x,) = program.args
        assert x.shape == (2, 3)
        assert torch.allclose(program.run(tensors, x), torch.relu(x @ a + wa) @ b + wb)


def test_the_kernel_stays_in_the_files_layout() -> None:
    conv = {
        "class_name": "Conv2D",
        "config": {"name": "c", "strides": [1, 1], "padding": "same", "trainable": True},
    }
    kernel, bias = torch.randn(3, 3, 2, 5), torch.randn(5)
    program = program_from_keras_config(
        sequential(first_layer([None, 6, 7, 2]), conv), {"c/kernel:0": kernel, "c/bias:0": bias}
    )
    (x,) = program.args
    expected = torch.nn.functional.conv2d(x.permute(0, 3, 1, 2), kernel.permute(3, 2, 0, 1), bias, padding=1)
    assert torch.allclose(program.run(program.tensors, x), expected.permute(0, 2, 3, 1), atol=1e-6)


def test_a_fused_lstm_has_two_biases_in_one_vector() -> None:
    config = {"name": "l", "units": 3, "return_sequences": False, "trainable": True}
    kernel, recurrent, bias = torch.randn(2, 12), torch.randn(3, 12), torch.randn(24)
    tensors = {"l/kernel:0": kernel, "l/recurrent_kernel:0": recurrent, "l/bias:0": bias}
    program = program_from_keras_config(
        sequential(first_layer([None, 4, 2]), {"class_name": "CuDNNLSTM", "config": config}), tensors
    )
    reference = torch.nn.LSTM(2, 3, batch_first=True)
    with torch.no_grad():
        reference.weight_ih_l0.copy_(kernel.t())
        reference.weight_hh_l0.copy_(recurrent.t())
        reference.bias_ih_l0.copy_(bias[:12])
        reference.bias_hh_l0.copy_(bias[12:])
        expected = reference(program.args[0])[0][:, -1]
    assert torch.allclose(program.run(tensors, *program.args), expected, atol=1e-6)


def test_hard_sigmoid_means_what_the_version_says() -> None:
    config = sequential(first_layer([None, 3]), dense("a", 4, activation="hard_sigmoid"))
    tensors = {n: t * 0.1 for n, t in TENSORS.items() if n.startswith("a/")}
    old, new = (program_from_keras_config(config, tensors, keras_version=v) for v in ("2.4.0", "3.1.0"))
    (x,) = old.args
    inside = x @ tensors["a/kernel:0"] + tensors["a/bias:0"]
    assert torch.allclose(old.run(tensors, x), inside * 0.2 + 0.5)
    assert torch.allclose(new.run(tensors, x), inside / 6 + 0.5)


def test_calls_of_an_inner_model_may_be_counted_from_its_creation() -> None:
    inner = {
        **sequential(first_layer([None, 3]), dense("d", 4)),
        "name": "inner",
        "inbound_nodes": [[["x", 0, 0, {}]]],
    }
    layers = [
        {
            "class_name": "InputLayer",
            "name": "x",
            "config": {"name": "x", "batch_input_shape": [None, 3]},
            "inbound_nodes": [],
        },
        {**dense("b", 2), "name": "b", "inbound_nodes": [[["inner", 1, 0, {}]]]},
        inner,
    ]
    config = {
        "class_name": "Functional",
        "config": {
            "name": "m",
            "layers": layers,
            "input_layers": [["x", 0, 0]],
            "output_layers": [["b", 0, 0]],
        },
    }
    tensors = {f"inner/d{n[1:]}" if n.startswith("a") else n: t for n, t in TENSORS.items()}
    program = program_from_keras_config(config, tensors)
    a, wa, b, wb = tensors.values()
    (x,) = program.args
    assert torch.allclose(program.run(tensors, x), (x @ a + wa) @ b + wb)


REFUSED = {
    "Lambda": (sequential(first_layer([None, 3]), {"class_name": "Lambda", "config": {"name": "evil", "function": ["code"]}}), "'evil' is a Lambda"),
    "unknown": (sequential(first_layer([None, 3]), {"class_name": "Strange", "config": {"name": "s"}}), "'s' of class 'Strange'"),
    "subclass": ({"class_name": "MyModel", "config": {}}, "'MyModel'"),
    "missing": (sequential(first_layer([None, 3]), dense("nobody", 4)), "'nobody' .* has no weight"),
    "misfit": (sequential(first_layer([None, 5]), dense("a", 4)), "'a' .Dense. could not run"),
    "empty": (sequential(), "no list of layers"),
    "malformed": (sequential(first_layer([None, 3]), {"class_name": "TimeDistributed", "config": {"name": "t"}}), "malformed"),
    "twice": (sequential(dense("a", 4), dense("a", 4)), "two Keras layers are called 'a'"),
    "activation": (sequential(first_layer([None, 3]), dense("a", 4, activation="zigzag")), "activation 'zigzag'"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_run_is_refused_by_name(name: str) -> None:
    config, message = REFUSED[name]
    with pytest.raises(WiringError, match=message):
        program_from_keras_config(config, TENSORS)


def test_layers_that_wait_for_each_other_are_refused() -> None:
    layers = [
        {"class_name": "InputLayer", "name": "x", "config": {"name": "x", "batch_input_shape": [None, 3]}, "inbound_nodes": []},
        {**dense("a", 4), "name": "a", "inbound_nodes": [[["b", 0, 0, {}]]]},
        {**dense("b", 2), "name": "b", "inbound_nodes": [[["a", 0, 0, {}]]]},
    ]  # fmt: skip
    settings = {"layers": layers, "input_layers": [["x", 0, 0]], "output_layers": [["b", 0, 0]]}
    with pytest.raises(WiringError, match="layers a, b wait"):
        program_from_keras_config({"class_name": "Functional", "config": settings}, TENSORS)


def test_models_nested_without_end_are_refused() -> None:
    config = sequential(first_layer([None, 3]), dense("a", 4))
    for _ in range(40):
        config = sequential(config)
    with pytest.raises(WiringError, match="deeper than"):
        program_from_keras_config(config, TENSORS)


# ---- real files ------------------------------------------------------------------------------------


@pytest.mark.skipif(not WHOLE_FILES, reason="../shared/checkpoints is not there")
@pytest.mark.parametrize("path", WHOLE_FILES, ids=lambda p: p.stem[-20:])
def test_a_real_file_uses_every_weight(path: Path) -> None:
    config, tensors = read(path)
    program = program_from_keras_config(config, tensors)
    assert set(program.tensors) == set(tensors)
    y = program.run(program.tensors, *program.args)
    assert torch.isfinite(y).all()
    for name, tensor in tensors.items():  # each weight changes the answer, so none is read in vain
        uneven = torch.linspace(0.5, 1.5, tensor.numel()).reshape(tensor.shape)  # a softmax hides a shift
        other = program.run({**tensors, name: tensor + uneven}, *program.args)
        assert not torch.equal(other, y), name
