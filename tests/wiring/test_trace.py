"""Rules and tracing on networks made for one question each."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import weightspace as ws
from weightspace.errors import WiringError


class Lambda(nn.Module):
    """Linear(in -> width), a function, Linear(out_width -> 3)."""

    def __init__(self, fn, width: int, out_width: int | None = None) -> None:  # type: ignore[no-untyped-def]
        super().__init__()
        torch.manual_seed(0)
        self.a, self.fn, self.b = nn.Linear(5, width), fn, nn.Linear(out_width or width, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.fn(self.a(x)))


def free_sizes(wiring: ws.Wiring) -> list[int]:
    assert wiring.status == "proved", wiring.proof
    assert wiring.proof is not None
    assert not wiring.proof.demoted
    return sorted(f.size for f in wiring.free.values())


@pytest.mark.parametrize(
    ("fn", "out", "expected"),
    [
        (torch.relu, 8, [8]),
        (lambda h: h.flip(-1), 8, []),
        (lambda h: h.cumsum(-1), 8, []),
        (lambda h: h.roll(1, -1), 8, []),
        (lambda h: h.sort(-1).values, 8, [8]),
        (lambda h: h.softmax(-1), 8, [8]),
        (lambda h: h[:, :4] * h[:, 4:], 4, [4]),
        (lambda h: torch.cat([h[:, :4], h[:, 4:].relu()], -1), 8, [4, 4]),
        (lambda h: h.view(-1, 2, 4).sum(1), 4, [2, 4]),
        (lambda h: h.view(-1, 2, 4).transpose(1, 2).reshape(-1, 8), 8, [2, 4]),
        (lambda h: torch.stack(h.chunk(2, -1), -1).flatten(1), 8, [4, 4]),
        (lambda h: h[:, ::2] + h[:, 1::2], 4, [4]),
        (lambda h: F.pad(h, (1, 1)), 10, [8]),
        (lambda h: h[:, [3, 1, 0, 2, 4, 5, 6, 7]], 8, []),
        (lambda h: h * torch.arange(8), 8, []),
        (lambda h: h * torch.ones(8), 8, [8]),
        (lambda h: F.layer_norm(h, (8,)), 8, [8]),
        (lambda h: F.glu(h, -1), 4, [4]),
        (lambda h: torch.einsum("bi,bi->b", h, h)[:, None].expand(-1, 8), 8, [8, 8]),
    ],
)
def test_one_function_between_two_layers(fn, out, expected) -> None:  # type: ignore[no-untyped-def]
    assert free_sizes(ws.wiring(Lambda(fn, 8, out), torch.randn(4, 5))) == expected


def test_what_is_computed_and_never_used_binds_nothing() -> None:
    def fn(h: Tensor) -> Tensor:
        _ = h[:, 3] + h.cumsum(-1)[:, 0]
        return h.relu()

    assert free_sizes(ws.wiring(Lambda(fn, 8), torch.randn(4, 5))) == [8]


def test_writing_into_a_buffer_binds_what_is_written() -> None:
    def fn(h: Tensor) -> Tensor:
        out = torch.zeros(h.shape[0], 10)
        out[:, :8] = h
        out[:, 8:] = h[:, :2]
        return out

    # The first two channels are copied; the others are free.
    assert free_sizes(ws.wiring(Lambda(fn, 8, 10), torch.randn(4, 5))) == [2, 6]


def test_constants_shared_by_two_layers_tie_nothing() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(5, 8), nn.Linear(8, 8), nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            zero = torch.zeros(1, 8)
            return self.c((self.b((self.a(x) + zero).relu()) + zero).relu())

    assert free_sizes(ws.wiring(Net(), torch.randn(4, 5))) == [8, 8]


@torch.library.custom_op("weightspace_tests::odd", mutates_args=())
def odd(x: Tensor) -> Tensor:
    return x.cumsum(-1)


@odd.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


def test_an_operation_without_a_rule_pins_its_axes_and_is_named() -> None:
    wiring = ws.wiring(Lambda(lambda h: odd(h).contiguous(), 8), torch.randn(4, 5))
    assert free_sizes(wiring) == []
    assert any("odd" in op for op in wiring.missing)
    assert "without a rule" in wiring.factors["a"].reason


def test_unused_parameters_are_named_and_pinned() -> None:
    class Net(Lambda):
        def __init__(self) -> None:
            super().__init__(torch.relu, 8)
            self.spare = nn.Linear(4, 4)

    wiring = ws.wiring(Net(), torch.randn(4, 5))
    assert set(wiring.untouched) == {"spare.weight", "spare.bias"}
    assert all(a.kind == "pinned" for a in wiring["spare.weight"])


def test_tied_weights_share_their_axes() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.e, self.h = nn.Embedding(11, 8), nn.Linear(8, 11, bias=False)
            self.h.weight = self.e.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.h(self.e(x).relu())

    wiring = ws.wiring(Tied(), torch.randint(0, 11, (2, 4)))
    assert wiring["e.weight"] == wiring["h.weight"]
    assert free_sizes(wiring) == [8]


def test_random_forward_passes_are_refused() -> None:
    class Growing(Lambda):
        count = 0

        def forward(self, x: Tensor) -> Tensor:
            self.count += 1
            for _ in range(self.count):
                x = x + 1
            return super().forward(x)

    with pytest.raises(WiringError, match="deterministic"):
        ws.wiring(Growing(torch.relu, 8), torch.randn(4, 5))


def test_training_mode_is_put_back() -> None:
    module = nn.Sequential(nn.Linear(5, 8), nn.Dropout(0.9), nn.Linear(8, 3)).train()
    wiring = ws.wiring(module, torch.randn(2, 5))
    assert module.training
    assert module[1].training
    assert free_sizes(wiring) == [8]


def test_inputs_are_guessed_where_shapes_tell() -> None:
    conv = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4))
    assert free_sizes(ws.wiring(conv)) == [8]

    class Two(nn.Module):
        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return x + y

    with pytest.raises(WiringError, match=r"Pass example inputs: ws\.wiring\(module, x\)"):
        ws.wiring(Two())


def test_other_things_are_refused_by_name() -> None:
    with pytest.raises(WiringError, match="cannot wire a int"):
        ws.wiring(3)


def test_applying_to_other_tensors_says_what_is_wrong() -> None:
    wiring = ws.wiring(Lambda(torch.relu, 8), torch.randn(4, 5))
    assert wiring.program is not None
    tensors = dict(wiring.program.tensors)
    with pytest.raises(WiringError, match=r"'a\.weight' has shape \(5, 8\), the wiring expects \(8, 5\)"):
        wiring.apply(wiring.random(), {**tensors, "a.weight": tensors["a.weight"].T})
    with pytest.raises(WiringError, match="'extra' is not in the wiring"):
        wiring.apply(wiring.random(), {**tensors, "extra": torch.zeros(2)})


# -------------------------------------------------------------------- random networks


class Drawn(nn.Module):
    """A convolutional network drawn at random: widths, groups, norms, joins and flattening."""

    def __init__(self, plan: list[tuple[str, int]], flatten: bool, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.plan, self.flatten = plan, flatten
        self.stem = nn.Conv2d(3, 12, 3, padding=1)
        self.layers = nn.ModuleList()
        width = 12
        for kind, n in plan:
            match kind:
                case "conv":
                    self.layers.append(nn.Conv2d(width, n, 3, padding=1))
                    width = n
                case "grouped":
                    self.layers.append(nn.Conv2d(width, width, 3, padding=1, groups=3))
                case "depthwise":
                    self.layers.append(nn.Conv2d(width, width, 3, padding=1, groups=width))
                case "batchnorm":
                    self.layers.append(nn.BatchNorm2d(width))
                case "groupnorm":
                    self.layers.append(nn.GroupNorm(3, width))
                case "residual":
                    self.layers.append(nn.Conv2d(width, width, 1))
                case "concat":
                    self.layers.append(nn.Conv2d(width, n, 1))
                    width += n
                case "shuffle":
                    self.layers.append(nn.ChannelShuffle(3))
                case "split":
                    self.layers.append(nn.Conv2d(width // 2, width // 2, 1))
        self.head = nn.Linear(width * (4 if flatten else 1), 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for (kind, _), layer in zip(self.plan, self.layers, strict=True):
            match kind:
                case "residual":
                    x = x + layer(F.relu(x))
                case "concat":
                    x = torch.cat([x, layer(F.relu(x))], 1)
                case "split":
                    a, b = x.chunk(2, 1)
                    x = torch.cat([a, layer(b)], 1)
                case _:
                    x = F.gelu(layer(x))
        x = F.adaptive_avg_pool2d(x, 2 if self.flatten else 1)
        return self.head(x.flatten(1))


KINDS = ("conv", "grouped", "depthwise", "batchnorm", "groupnorm", "residual", "concat", "shuffle", "split")


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from(KINDS), st.sampled_from([6, 12, 24])), min_size=1, max_size=7),
    st.booleans(),
    st.integers(0, 2**16),
)
def test_no_random_network_is_wired_wrongly(plan: list[tuple[str, int]], flatten: bool, seed: int) -> None:
    module = Drawn(plan, flatten, seed).eval()
    wiring = ws.wiring(module, torch.randn(2, 3, 6, 6), seed=seed)
    assert wiring.status == "proved", (plan, wiring.proof)
    assert wiring.proof is not None
    assert not wiring.proof.demoted, plan
    assert wiring.proof.error32 <= 1e-5 or (wiring.proof.error64 or 1) <= 1e-10
    p, q = wiring.random(seed), wiring.random(seed + 1)
    tensors = dict(module.state_dict())
    once, twice = wiring.apply(p, tensors), wiring.apply(q, wiring.apply(p, tensors))
    composed, back = wiring.apply(p.compose(q), tensors), wiring.apply(p.invert(), once)
    for name in tensors:
        assert torch.equal(twice[name], composed[name])
        assert torch.equal(back[name], tensors[name])


def test_a_branch_that_got_no_rows_is_tied_like_the_others() -> None:
    class Routed(nn.Module):
        """Two experts of one shape; the example sends every row to the first."""

        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.w, self.head = nn.Parameter(torch.randn(2, 8, 5)), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            parts = x.split([x.shape[0], 0])
            h = torch.cat([F.linear(p, self.w[i]) for i, p in enumerate(parts)])
            return self.head(F.glu(h, -1))

    wiring = ws.wiring(Routed(), torch.randn(4, 5))
    # The halves of the gate are one axis in both experts, seen or not.
    assert free_sizes(wiring) == [4]
    assert [len(b[1].factors) for g in wiring.layouts["w"] for b in g.blocks if len(b) == 2] in ([], [1, 1, 1, 1])
