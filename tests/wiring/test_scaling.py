"""Scale and sign symmetries: those that theory knows, no others, and a representative that they leave alone."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from itertools import pairwise
from math import exp
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor, nn

import weightspace as ws
from weightspace.errors import UnprovedWiringError, WiringError
from weightspace.wiring.proof import distance, run
from weightspace.wiring.scaling import Rescaling, Scaling, scaling
from weightspace.zoo.description import module_of

MLP_OF_ZOO = {"kind": "mlp", "input": [1, 4, 4], "classes": 3, "widths": [6, 5], "activation": "tanh"}


def group(module: nn.Module, *x: Tensor) -> Scaling:
    return scaling(ws.wiring(module.eval(), *x))


def mlp(activation: nn.Module, bias: bool = True, *sizes: int) -> nn.Sequential:
    torch.manual_seed(0)
    sizes = sizes or (4, 6, 5, 3)
    layers: list[nn.Module] = []
    for a, b in pairwise(sizes):
        layers += [nn.Linear(a, b, bias=bias), activation]
    return nn.Sequential(*layers[:-1])


def tensors_of(found: Scaling, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    assert found.wiring.program is not None
    return {n: t.to(dtype) if t.is_floating_point() else t for n, t in found.wiring.program.tensors.items()}


def far(one: Mapping[str, Tensor], two: Mapping[str, Tensor]) -> float:
    assert list(one) == list(two)
    return max(
        (float((one[n] - two[n]).norm() / one[n].norm().clamp_min(1e-300)) for n in one if one[n].is_floating_point()),
        default=0.0,
    )


def keeps(found: Scaling, moved: Mapping[str, Tensor]) -> float:
    program = found.wiring.program
    assert program is not None
    return distance(run(program, tensors_of(found), torch.float64), run(program, moved, torch.float64))


def check_canonical(found: Scaling, dtype: torch.dtype = torch.float64, tolerance: float = 1e-9) -> None:
    """Invariant, idempotent, and the same function; weights are drawn, so that none are zero or equal."""
    generator = torch.Generator().manual_seed(3)
    tensors = {
        n: (t + 0.1 * torch.rand(t.shape, generator=generator, dtype=torch.float64)).to(dtype)
        if t.is_floating_point()
        else t
        for n, t in tensors_of(found).items()
    }
    program = found.wiring.program
    assert program is not None
    canonical = found.canonical(tensors)
    moved = found.apply(found.random(5), tensors)
    assert far(tensors, moved) > 1e-2
    assert far(canonical, found.canonical(moved)) <= tolerance
    assert far(canonical, found.canonical(canonical)) <= tolerance
    assert all(t.dtype == tensors[n].dtype for n, t in canonical.items())
    assert distance(run(program, tensors, torch.float64), run(program, canonical, torch.float64)) <= tolerance
    assert sum(float(t.double().square().sum()) for t in canonical.values() if t.is_floating_point()) <= sum(
        float(t.double().square().sum()) for t in tensors.values() if t.is_floating_point()
    ) * (1 + 1e-9)


# -------------------------------------------------------------------- what is found


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("activation", [nn.ReLU(), nn.LeakyReLU(0.2)])
def test_rectified_perceptrons_scale(activation: nn.Module, bias: bool) -> None:
    found = group(mlp(activation, bias), torch.randn(2, 4))
    biases = [{"0.bias": 1}, {"2.bias": 1}] if bias else [{}, {}]
    assert found.positive == {
        "0": {"0.weight": 1, **biases[0], "2.weight": -1},
        "2": {"2.weight": 1, **biases[1], "4.weight": -1},
    }
    assert found.signed == {}
    assert found.error <= 1e-12
    assert found.control is not None
    assert found.control > 1e-6
    check_canonical(found)


class Sine(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.sin(30 * x)


@pytest.mark.parametrize("activation", [nn.Tanh(), Sine()])
def test_odd_activations_flip(activation: nn.Module) -> None:
    found = group(mlp(activation), torch.randn(2, 4))
    assert found.generators == ()
    assert found.signed == {"0": ("0.weight", "0.bias", "2.weight"), "2": ("2.weight", "2.bias", "4.weight")}
    check_canonical(found)


class Cosine(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.cos(x)


def test_even_activations_flip_what_they_read() -> None:
    found = group(mlp(Cosine()), torch.randn(2, 4))
    assert found.generators == ()
    assert found.signed == {"0": ("0.weight", "0.bias"), "2": ("2.weight", "2.bias")}
    check_canonical(found)


@pytest.mark.parametrize("activation", [nn.GELU(), nn.SiLU(), nn.Sigmoid(), nn.Softplus(), nn.ELU()])
def test_other_activations_have_neither(activation: nn.Module) -> None:
    found = group(mlp(activation), torch.randn(2, 4))
    assert found.generators == ()
    assert found.flips == ()
    tensors = tensors_of(found)
    assert far(tensors, found.canonical(tensors)) == 0


def test_linear_layers_have_both() -> None:
    found = group(mlp(nn.Identity()), torch.randn(2, 4))
    assert set(found.positive) == set(found.signed) == {"0", "2"}
    check_canonical(found)


def test_a_convolutional_network_with_batch_norm_and_pooling() -> None:
    torch.manual_seed(0)
    module = nn.Sequential(
        nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(6, 8, 3), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3),
    )  # fmt: skip
    found = group(module, torch.randn(2, 3, 12, 12))
    assert [(g.factor, g.exponents) for g in found.generators] == [
        # The variance does not follow: epsilon is added to it.
        ("0", {"0.weight": 1, "0.bias": 1, "1.weight": -1, "1.running_mean": 1}),
        ("0", {"1.weight": 1, "1.bias": 1, "4.weight": -1}),
        ("4", {"4.weight": 1, "4.bias": 1, "8.weight": -1}),
    ]
    assert set(found.positive) == {"4"}
    assert [f.names for f in found.flips] == [("0.weight", "0.bias", "1.weight", "1.running_mean")]
    check_canonical(found)


def test_a_recurrent_network_scales_both_sides_of_a_matrix() -> None:
    found = group(Headed(nn.RNN(4, 6, nonlinearity="relu")), torch.randn(3, 2, 4))
    assert found.positive["cell.weight_ih_l0"] == {
        "cell.weight_ih_l0": 1, "cell.bias_ih_l0": 1, "cell.weight_hh_l0[0:6]": 1, "cell.weight_hh_l0[:, 0:6]": -1,
        "cell.bias_hh_l0": 1, "head.weight": -1,
    }  # fmt: skip
    check_canonical(found)


class Headed(nn.Module):
    def __init__(self, cell: nn.Module) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.cell, self.head = cell, nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.cell(x)[0][-1])


def test_of_the_gates_of_a_memory_cell_one_flips_with_its_state() -> None:
    found = group(Headed(nn.LSTM(4, 6)), torch.randn(3, 2, 4))
    assert found.generators == ()
    (flip,) = found.flips
    # The third gate is the candidate for the cell's state; it and all that reads the hidden state change sign.
    assert set(flip.names) == {
        "cell.weight_ih_l0[12:18]", "cell.weight_hh_l0[12:18]", "cell.bias_ih_l0[12:18]", "cell.bias_hh_l0[12:18]",
        "cell.weight_hh_l0[:, 0:6]", "head.weight",
    }  # fmt: skip
    check_canonical(found)


class Encoder(nn.Module):
    def __init__(self, norm_first: bool = True) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.head = nn.Linear(5, 16), nn.Linear(16, 2)
        self.layer = nn.TransformerEncoderLayer(16, 4, 24, batch_first=True, norm_first=norm_first)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layer(self.embed(x)))


def test_attention_scales_inside_every_head() -> None:
    found = group(Encoder(), torch.randn(2, 3, 5))
    weight, bias = "layer.self_attn.in_proj_weight", "layer.self_attn.in_proj_bias"
    by_tensor = [g.exponents for g in found.generators]
    assert len(by_tensor) == 5
    assert {f"{weight}[0:16]": 1, f"{weight}[16:32]": -1, f"{bias}[0:16]": 1, f"{bias}[16:32]": -1} in by_tensor
    assert {weight: 1, bias: 1, "layer.self_attn.out_proj.weight": -1} in by_tensor
    assert {"layer.norm1.weight": 1, "layer.norm1.bias": 1, weight: -1} in by_tensor
    assert {"layer.linear1.weight": 1, "layer.linear1.bias": 1, "layer.linear2.weight": -1} in by_tensor
    # One scale for every channel of every head, none for heads as such.
    element = found.random(0)
    shapes = {g.factor: tuple(s.shape) for g, s in zip(found.generators, element.scales, strict=True)}
    assert sorted(shapes.values()) == [(4, 4), (4, 4), (16,), (24,)]
    # Between LayerNorm and the residual stream, the rectified layer is the only one that cannot flip.
    assert len(found.flips) == 4
    check_canonical(found)


def test_grouped_attention_with_rotary_positions_and_rms_norm() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2, intermediate_size=48,
        vocab_size=64,
    )  # fmt: skip
    found = scaling(ws.wiring(config))
    short = [{n.split(".")[-2]: e for n, e in g.exponents.items()} for g in found.generators]
    assert short == [
        {"input_layernorm": 1, "q_proj": -1, "k_proj": -1, "v_proj": -1},
        {"post_attention_layernorm": 1, "gate_proj": -1, "up_proj": -1},
        {"norm": 1, "lm_head": -1},
        # Rotations mix channels, so that queries and keys scale by whole groups of heads.
        {"q_proj": 1, "k_proj": -1},
        {"v_proj": 1, "o_proj": -1},
        {"up_proj": 1, "down_proj": -1},
    ]
    # Channels of the stream that RMSNorm normalises may change sign, embedding to head.
    assert found.signed["model.embed_tokens.1"][0] == "model.embed_tokens.weight"
    assert len(found.flips) == 7
    check_canonical(found)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.one, self.two = nn.Conv2d(3, 6, 3), nn.Conv2d(6, 8, 3, padding=1), nn.Conv2d(8, 6, 3, padding=1)
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        x = F.relu(x + self.two(F.relu(self.one(x))))
        return self.head(x.mean((2, 3)))


def test_a_residual_stream_scales_as_one() -> None:
    found = group(Block(), torch.randn(2, 3, 8, 8))
    assert found.positive["stem"] == {
        "stem.weight": 1, "stem.bias": 1, "one.weight": -1, "two.weight": 1, "two.bias": 1, "head.weight": -1,
    }  # fmt: skip
    assert found.positive["one"] == {"one.weight": 1, "one.bias": 1, "two.weight": -1}
    check_canonical(found)


def test_powers_have_exponents_of_their_own() -> None:
    class Squared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.a, self.b = nn.Linear(4, 6), nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(F.relu(self.a(x)).square())

    found = group(Squared(), torch.randn(2, 4))
    assert found.positive == {"a": {"a.weight": 1, "a.bias": 1, "b.weight": -2}}
    check_canonical(found)


def test_tied_tensors_move_together() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.e, self.h = nn.Embedding(11, 8), nn.Linear(8, 11, bias=False)
            self.h.weight, self.m = self.e.weight, nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            return self.h(self.m(self.e(x)).tanh())

    found = scaling(ws.wiring(Tied(), torch.randint(0, 11, (2, 4))))
    moved = found.apply(found.random(1), tensors_of(found))
    assert torch.equal(moved["e.weight"], moved["h.weight"])
    assert keeps(found, moved) <= 1e-12


# -------------------------------------------------------------------- the representative


def test_incoming_and_outgoing_norms_become_equal() -> None:
    found = group(mlp(nn.ReLU(), True, 4, 64, 32, 3), torch.randn(2, 4))
    balanced = found.canonical(tensors_of(found))
    incoming = balanced["2.weight"].square().sum(1) + balanced["2.bias"].square()
    outgoing = balanced["4.weight"].square().sum(0)
    assert torch.allclose(incoming, outgoing, rtol=1e-10)


def test_deep_networks_converge_in_few_steps() -> None:
    found = group(mlp(nn.ReLU(), True, *[4, *[8] * 20, 3]), torch.randn(2, 4))
    tensors = tensors_of(found)
    assert far(found.canonical(tensors, max_sweeps=20), found.canonical(tensors, max_sweeps=200)) <= 1e-10


def test_the_two_ways_to_a_newton_step_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    found = group(Encoder(), torch.randn(2, 3, 5))
    tensors = tensors_of(found)
    direct = found.canonical(tensors)
    monkeypatch.setattr("weightspace.wiring.balance._DENSE", 0)
    assert far(direct, found.canonical(tensors)) <= 1e-9


def test_stacks_are_taken_apart() -> None:
    found = group(mlp(nn.ReLU()), torch.randn(2, 4))
    many = [found.apply(found.random(k), tensors_of(found)) for k in range(3)]
    many[1] = {n: t * (1 + 0.1 * k) for k, (n, t) in enumerate(many[1].items())}
    stacked = found.canonical({n: torch.stack([t[n] for t in many]) for n in many[0]}, batch_dims=1)
    for k, t in enumerate(many):
        assert far(found.canonical(t), {n: x[k] for n, x in stacked.items()}) <= 1e-10
    signed = group(mlp(nn.Tanh()), torch.randn(2, 4))
    many = [signed.apply(signed.random(k), tensors_of(signed)) for k in range(3)]
    stacked = signed.canonical({n: torch.stack([t[n] for t in many]) for n in many[0]}, batch_dims=1)
    assert all(far(signed.canonical(many[0]), {n: x[k] for n, x in stacked.items()}) <= 1e-12 for k in range(3))


def test_dead_neurons_come_to_rest() -> None:
    found = group(mlp(nn.ReLU()), torch.randn(2, 4))
    tensors = tensors_of(found)
    for name in ("0.weight", "0.bias"):
        tensors[name][0] = 0
    tensors["2.weight"][:, 1] = 0
    for name in ("0.weight", "0.bias"):
        tensors[name][2] = 0
    tensors["2.weight"][:, 2] = 0
    canonical = found.canonical(tensors)
    # Only outgoing, only incoming, neither.
    assert float(canonical["2.weight"][:, 0].norm()) == pytest.approx(1)
    assert float((canonical["0.weight"][1].square().sum() + canonical["0.bias"][1].square()).sqrt()) == pytest.approx(1)
    assert float(canonical["2.weight"][:, 2].norm()) == 0
    assert far(canonical, found.canonical(found.apply(found.random(4), tensors))) <= 1e-9
    assert far(canonical, found.canonical(canonical)) <= 1e-9


def test_single_precision_stays_and_is_invariant_to_its_rounding() -> None:
    check_canonical(group(mlp(nn.ReLU()), torch.randn(2, 4)), torch.float32, 1e-5)


def test_signs_can_be_left_alone() -> None:
    found = group(mlp(nn.Tanh()), torch.randn(2, 4))
    moved = found.apply(found.random(2), tensors_of(found))
    assert far(moved, found.canonical(moved, signs=False)) == 0


# -------------------------------------------------------------------- what it says


def test_it_is_found_once_and_shown() -> None:
    wiring = ws.wiring(mlp(nn.ReLU()), torch.randn(2, 4))
    found = scaling(wiring)
    assert scaling(wiring) is found
    assert "0.weight^+1, 0.bias^+1, 2.weight^-1" in repr(found)
    assert repr(found.random()).startswith("Rescaling(11 scales, 0 signs")
    assert found.verify(7) <= 1e-12
    assert scaling(wiring.with_()) is not found


def test_refusals_say_what_to_do() -> None:
    wiring = ws.wiring(mlp(nn.ReLU()), torch.randn(2, 4))
    with pytest.raises(UnprovedWiringError, match="no network to run"):
        scaling(wiring.with_(program=None))
    with pytest.raises(UnprovedWiringError, match="is unverified, not proved"):
        scaling(wiring.with_(status="unverified"))
    found = scaling(wiring)
    with pytest.raises(WiringError, match="draw it with this scaling's random"):
        found.apply(Rescaling((), ()), tensors_of(found))
    tensors = tensors_of(found)
    with pytest.raises(WiringError, match=r"'2.weight' takes part in the scale symmetries and is not among"):
        found.canonical({n: t for n, t in tensors.items() if n != "2.weight"})
    with pytest.raises(WiringError, match=r"has shape \(6, 4\), the wiring expects \(5, 6\)"):
        found.apply(found.random(), {**tensors, "2.weight": tensors["0.weight"]})


def test_a_wrong_symmetry_does_not_survive(monkeypatch: pytest.MonkeyPatch) -> None:
    # Claimed for every factor: what is written times s, what reads it divided by s. True of the first layer only.
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 5), nn.GELU(), nn.Linear(5, 3))
    monkeypatch.setattr("weightspace.wiring.scaling_proof.exponents", lambda matrix: [{0: 1, 1: 1, 2: -1}])
    found = group(module, torch.randn(2, 4))
    assert set(found.positive) == {"0"}
    assert found.refused == ("2: 2.weight^+1, 2.bias^+1, 4.weight^-1 changes the output by more than rounding",)


def test_what_no_run_reached_is_not_scaled() -> None:
    class Routed(nn.Module):
        """Two ways to read the hidden layer; the example inputs take the first whatever the weights are."""

        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.a, self.b, self.c = nn.Linear(4, 6), nn.Linear(6, 3), nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            h = F.relu(self.a(x))
            return torch.where(x[:, :1] > 100, self.c(h), self.b(h))

    found = group(Routed(), torch.randn(2, 4))
    assert found.generators == ()
    assert found.refused == ("a: c.weight had no influence on the outputs in any run",)
    assert found.open
    assert "scaling" not in found.wiring.shared


# -------------------------------------------------------------------- random networks

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu, "leaky": F.leaky_relu, "tanh": torch.tanh, "gelu": F.gelu, "sin": torch.sin, "none": lambda h: h,
    "abs": torch.abs,
}  # fmt: skip
KINDS = ("linear", "residual", "gated", "batchnorm", "layernorm", "concat", "gain")


class Drawn(nn.Module):
    """A network on vectors drawn at random: widths, joins, gates, norms, activations."""

    def __init__(self, plan: list[tuple[str, str, int]], seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.plan = plan
        self.layers, self.more = nn.ModuleList(), nn.ParameterList()
        width = 4
        for kind, _, n in plan:
            match kind:
                case "linear":
                    self.layers.append(nn.Linear(width, n))
                    width = n
                case "residual":
                    self.layers.append(nn.Linear(width, width))
                case "gated":
                    self.layers.append(nn.Linear(width, 2 * n))
                    width = n
                case "batchnorm":
                    self.layers.append(nn.BatchNorm1d(width))
                case "layernorm":
                    self.layers.append(nn.LayerNorm(width))
                case "concat":
                    self.layers.append(nn.Linear(width, n))
                    width += n
                case "gain":
                    self.layers.append(nn.Identity())
            self.more.append(nn.Parameter(torch.rand(width) + 0.5))
        self.head = nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        for (kind, activation, _), layer, more in zip(self.plan, self.layers, self.more, strict=True):
            act = ACTIVATIONS[activation]
            match kind:
                case "residual":
                    x = act(x + layer(x))
                case "gated":
                    a, b = layer(x).chunk(2, -1)
                    x = act(a) * b
                case "concat":
                    x = torch.cat([x, act(layer(x))], -1)
                case "gain":
                    x = act(x) * more
                case _:
                    x = act(layer(x))
        return self.head(x)


@settings(max_examples=25, deadline=None)
@given(
    st.lists(
        st.tuples(st.sampled_from(KINDS), st.sampled_from(sorted(ACTIVATIONS)), st.sampled_from([3, 5, 8])),
        min_size=1,
        max_size=5,
    ),
    st.integers(0, 2**16),
)
def test_random_elements_keep_the_function_of_random_networks(plan: list[tuple[str, str, int]], seed: int) -> None:
    found = group(Drawn([("linear", "none", 6), *plan], seed), torch.randn(3, 4))
    tensors = tensors_of(found)
    moved = found.apply(found.random(seed), tensors)
    assert keeps(found, moved) <= 1e-9
    canonical = found.canonical(moved)
    assert keeps(found, canonical) <= 1e-9
    # Scales alone: weights of untrained norms are ones and zeros, which leave some signs open.
    unsigned = Rescaling(found.random(seed).scales, tuple(torch.ones_like(s) for s in found.random(seed).signs))
    still = found.canonical(tensors, signs=False)
    assert far(still, found.canonical(found.apply(unsigned, tensors), signs=False)) <= 1e-9


def test_scales_are_drawn_around_one() -> None:
    found = group(mlp(nn.ReLU(), True, 4, 400, 3), torch.randn(2, 4))
    (scales,) = found.random(1).scales
    assert 0.4 < float(scales.log().std()) < 0.6
    assert float(scales.min()) > exp(-3)


def test_files_of_one_program_share_their_symmetries(tmp_path: Path) -> None:
    """Those found with the weights of another file are those that a file's own weights show."""
    torch.manual_seed(0)
    records = {"weightspace": json.dumps({"network": MLP_OF_ZOO})}
    paths = []
    for k in range(2):
        module, _ = module_of(MLP_OF_ZOO)
        state = {n: t.clone() for n, t in module.state_dict().items()}
        save_file(state, tmp_path / f"{k}.safetensors", records)
        paths.append(tmp_path / f"{k}.safetensors")
    first, second = (ws.wiring(path) for path in paths)
    assert first is not second
    assert first.shared is second.shared
    found, again = scaling(first), scaling(second)
    assert again.wiring is second
    assert again.verify(3) < 1e-10
    second.kept.clear()
    second.shared = {}
    own = scaling(second)
    assert own is not again
    assert own.positive == found.positive == again.positive
    assert own.signed == again.signed
    kept = first.shared["scaling"]
    assert isinstance(kept, Scaling)
    assert kept.wiring.program is None
