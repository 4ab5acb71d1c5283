"""Partial matching and least squares."""

from __future__ import annotations

import pytest
import torch

from tests.align.small import DESCRIPTIONS, network, noisy
from weightspace.align.barrier import interpolate
from weightspace.align.pleas import merge_matched, pleas
from weightspace.align.repair import reset_statistics
from weightspace.errors import AlignmentError


@pytest.mark.parametrize("name", DESCRIPTIONS)
def test_two_copies_merge_into_one(name: str) -> None:
    wiring, a, x = network(name)
    a = reset_statistics(wiring, a, x)
    planted = wiring.random(0)
    found = pleas(a, wiring.apply(planted, a), wiring, inputs=x)
    merged = found.diagnostics["merged"]
    assert not merged.kept
    for n, t in merged.tensors.items():
        assert torch.allclose(t.double(), a[n].double(), atol=2e-2), n
    run = wiring.program.run
    assert torch.allclose(run(merged.tensors, x), run(a, x), atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("name", ["mlp", "vgg", "cnn"])
def test_nothing_matched_is_the_mean_of_both_outputs(name: str) -> None:
    """At ratio 0 the networks stand side by side: the outputs are the mean of theirs."""
    wiring, a, x = network(name, 0)
    _, b, _ = network(name, 1)
    a, b = (reset_statistics(wiring, t, x) for t in (a, b))
    merged = merge_matched(a, b, wiring, x, ratio=0.0)
    run = wiring.program.run
    assert torch.allclose(run(merged.tensors, x), (run(a, x) + run(b, x)) / 2, atol=2e-3)
    for name_, factor in wiring.free.items():
        assert merged.matched[name_] == 0, factor


def test_least_squares_beats_the_average() -> None:
    wiring, a, x = network("mlp", 0)
    _, other, _ = network("mlp", 1)
    b = {n: 0.7 * a[n] + 0.3 * other[n] for n in a}
    run = wiring.program.run
    wanted = (run(a, x) + run(b, x)) / 2
    merged = merge_matched(a, b, wiring, x)
    error = float((run(merged.tensors, x) - wanted).square().mean())
    plain = float((run(interpolate(a, b, 0.5), x) - wanted).square().mean())
    assert error < 0.5 * plain
    wider = merge_matched(a, b, wiring, x, ratio=0.5)
    assert {n: t.shape[0] for n, t in wider.tensors.items() if n.startswith("hidden.0")} == {
        "hidden.0.weight": 24, "hidden.0.bias": 24,
    }  # fmt: skip
    assert float((run(wider.tensors, x) - wanted).square().mean()) < error


def test_streams_and_heads_keep_their_width() -> None:
    wiring, a, x = network("vit")
    merged = merge_matched(a, noisy(a, 0), wiring, x, ratio=0.5)
    grown = {n for n, k in merged.matched.items() if k < wiring.free[n].size}
    assert grown == {n for n in wiring.free if n.endswith("up")}
    assert wiring.program.run(merged.tensors, x).shape == (64, 3)


def test_shares_are_shares() -> None:
    wiring, a, x = network("mlp")
    with pytest.raises(AlignmentError, match="from 0 to 1"):
        merge_matched(a, a, wiring, x, ratio=1.5)
