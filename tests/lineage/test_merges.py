"""Merges, adapters, rounded and moved copies among a family: recognised, with their parents and proportions."""

from __future__ import annotations

import json
from collections.abc import Mapping

import pytest
import torch
from torch import Tensor

import weightspace as ws
from tests.lineage.trees import NETWORK, family
from weightspace.checkpoint import Checkpoint, from_tensors
from weightspace.lineage import Edge, trace
from weightspace.tagged import KEY
from weightspace.zoo.description import module_of


def model(tensors: Mapping[str, Tensor]) -> Checkpoint:
    """A network in memory that says how it is built, and nothing of where it comes from."""
    return from_tensors(dict(tensors), {KEY: json.dumps({"network": NETWORK})})


def edges_into(name: str, tensors: Mapping[str, Tensor], moved: int = 0) -> dict[str, Edge]:
    """Put a network among the family and see what leads to it."""
    models = {n: model(t) for n, t in family().items()} | {name: model(tensors)}
    return {e.parent: e for e in trace(models, moved=moved).parents(name)}


def test_a_linear_merge_shows_its_parents_and_their_shares() -> None:
    nets = family()
    shares = {"left": 0.55, "right": 0.25, "below": 0.2}
    merged = {n: sum((s * nets[m][n] for m, s in shares.items()), torch.zeros(())) for n in nets["root"]}
    found = edges_into("z", merged)
    assert {p: e.share for p, e in found.items()} == pytest.approx(shares, abs=1e-3)
    assert all(e.kind == "merge" and "linear" in e.detail for e in found.values())


@pytest.mark.parametrize("scales", [(0.8, 0.8), (0.3, 0.6)])
def test_task_arithmetic_shows_its_parents_and_its_base(scales: tuple[float, float]) -> None:
    nets = family()
    root, a, b = (nets[n] for n in ("root", "left", "right"))
    merged = {n: root[n] + scales[0] * (a[n] - root[n]) + scales[1] * (b[n] - root[n]) for n in root}
    found = edges_into("z", merged)
    total = sum(scales)
    assert {p: e.share for p, e in found.items()} == pytest.approx(
        {"left": scales[0] / total, "right": scales[1] / total}, abs=1e-3
    )
    assert all("on root" in e.detail for e in found.values())


@pytest.mark.parametrize("method", ["ties", "dare"])
def test_merges_that_choose_among_weights_are_recognised(method: str) -> None:
    nets = family()
    merged = ws.merge([nets["left"], nets["right"]], method, base=nets["root"]).tensors
    assert merged is not None
    found = edges_into("z", merged)
    assert set(found) == {"left", "right"}
    assert all(e.kind == "merge" and e.share == pytest.approx(0.5, abs=0.02) for e in found.values())


def test_a_merged_adapter_is_a_difference_of_low_rank() -> None:
    base = family()["left"]
    generator = torch.Generator().manual_seed(0)
    adapted = dict(base)
    for n in ("hidden.0.weight", "hidden.1.weight"):
        rows, columns = base[n].shape
        step = torch.randn(rows, 2, generator=generator) @ torch.randn(2, columns, generator=generator)
        adapted[n] = base[n] + 0.2 * step * base[n].norm() / step.norm()
    found = edges_into("z", adapted)
    assert set(found) == {"left"}
    assert found["left"].kind == "low rank"
    assert "rank 2" in found["left"].detail


@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("stored", [True, False])
def test_rounded_copies_are_children_of_the_finer_ones(half: torch.dtype, stored: bool) -> None:
    base = family()["left"]
    rounded = {n: t.to(half) if stored else t.to(half).float() for n, t in base.items()}
    found = edges_into("a", rounded)
    assert {p: e.kind for p, e in found.items()} == {"left": "converted"}
    assert found["left"].direction > 0.9


@pytest.mark.parametrize("levels", [127, 7])
def test_quantised_copies_are_recognised(levels: int) -> None:
    def lattice(t: Tensor) -> Tensor:
        unit = t.abs().amax(-1, keepdim=True) / levels
        return (t / unit).round() * unit if t.dim() > 1 else t

    found = edges_into("a", {n: lattice(t) for n, t in family()["left"].items()})
    assert {p: e.kind for p, e in found.items()} == {"left": "quantised"}


def test_equal_networks_are_copies_whose_direction_is_not_claimed() -> None:
    found = edges_into("z", dict(family()["right"]))
    assert {p: (e.kind, e.direction, e.undecided) for p, e in found.items()} == {"right": ("copy", 0.5, True)}


@pytest.mark.parametrize("permuted", [False, True])
@pytest.mark.parametrize(("said", "parent", "child"), [(None, "a", "right"), ("right", "right", "a")])
def test_equal_networks_stand_in_the_order_of_their_records(
    permuted: bool, said: str | None, parent: str, child: str
) -> None:
    nets = family()
    copy = dict(nets["right"])
    if permuted:
        module, inputs = module_of(NETWORK)
        wiring = ws.wiring(module, *inputs)
        copy = dict(wiring.apply(wiring.random(3), copy))
    models = {"a": model(copy)} | {n: model(t) for n, t in nets.items()}
    # The permuted copy comes first, and another file takes it for its parent: neither is held against anybody.
    records = {"right": {"parent": "root"}, "below": {"parent": "left"}, "a": {} if said is None else {"parent": said}}
    found = trace(models, moved=4 if permuted else 0, records=records)
    (edge,) = [e for e in found.edges if {e.parent, e.child} == {"a", "right"}]
    assert (edge.parent, edge.child, edge.undecided, edge.direction) == (parent, child, True, 0.5)
    assert edge.kind == ("moved copy" if permuted else "copy")
    assert edge.recorded == ("" if said is None else "agrees")
    assert found.disagreements == ()
    assert "direction undecided" in found.tree()


def test_a_file_that_names_a_copy_of_its_parent_does_not_disagree() -> None:
    nets = family()
    models = {n: model(t) for n, t in nets.items()} | {"z": model(nets["left"])}
    found = trace(models, moved=0, records={"below": {"parent": "z"}, "right": {"parent": "left"}})
    assert [(e.parent, e.recorded) for e in found.parents("below")] == [("left", "agrees")]
    assert [d.split(" says")[0] for d in found.disagreements] == ["right"]


def test_what_symmetries_leave_in_the_last_digits_is_no_difference() -> None:
    nets = family()
    scale = torch.linspace(0.1, 7, 48)
    scaled = dict(nets["left"])
    for n in ("hidden.0.weight", "hidden.0.bias"):
        t = scaled[n]
        s = scale.reshape(-1, *[1] * (t.dim() - 1))
        scaled[n] = (t * s) / s
    assert not torch.equal(scaled["hidden.0.weight"], nets["left"]["hidden.0.weight"])
    found = edges_into("z", scaled)
    assert {p: (e.kind, e.undecided) for p, e in found.items()} == {"left": ("copy", True)}


def test_float32_of_a_finer_network_is_its_child() -> None:
    fine = {n: t.double() * (1 + 1e-9 * torch.randn(t.shape, dtype=torch.float64)) for n, t in family()["left"].items()}
    models = {"a": model({n: t.float() for n, t in fine.items()}), "b": model(fine), "root": model(family()["root"])}
    (edge,) = trace(models, moved=0).parents("a")
    assert (edge.parent, edge.kind, edge.undecided) == ("b", "converted", False)


def test_equal_copies_that_were_rounded_all_come_from_the_finer_network() -> None:
    short = {n: t.bfloat16() for n, t in family()["left"].items()}
    models = {n: model(t) for n, t in family().items()} | {"a": model(short)}
    models["b"] = model({n: t.float() for n, t in short.items()})
    found = trace(models, moved=0)
    assert [[(e.parent, e.kind, e.undecided) for e in found.parents(n)] for n in "ab"] == [
        [("left", "converted", False)]
    ] * 2


def test_a_copy_under_other_names_is_found() -> None:
    renamed = {f"layer-{i}": t for i, t in enumerate(family()["right"].values())}
    models = {n: model(t) for n, t in family().items()} | {"z": from_tensors(renamed)}
    found = trace(models, moved=0)
    assert [(e.parent, e.kind) for e in found.parents("z")] == [("right", "copy")]
    assert "z" in found.family("root")


def test_a_permuted_copy_is_brought_back() -> None:
    module, inputs = module_of(NETWORK)
    wiring = ws.wiring(module, *inputs)
    moved = wiring.apply(wiring.random(3), family()["below"])
    found = edges_into("z", moved, moved=4)
    assert set(found) == {"below"}
    assert found["below"].kind == "moved copy"
    assert edges_into("z", moved, moved=0) == {}


def test_a_network_with_broken_weights_is_left_out_and_said_so() -> None:
    broken = {n: torch.full_like(t, float("nan")) for n, t in family()["left"].items()}
    models = {n: model(t) for n, t in family().items()} | {"z": model(broken)}
    found = trace(models, moved=0)
    assert "not finite" in found.left_out["z"]
    assert not found.parents("z")


def test_one_broken_weight_is_seen_wherever_it_is_and_disturbs_no_other_network() -> None:
    generator = torch.Generator().manual_seed(0)
    shapes = {"a.weight": (300, 400), "b.weight": (10, 300)}
    base = {n: torch.randn(s, generator=generator) for n, s in shapes.items()}
    child = {n: t + 0.1 * torch.randn(t.shape, generator=generator) for n, t in base.items()}
    # More weights than are sampled: that the samples are finite says little.
    for at in range(5):
        broken = {n: t.clone() for n, t in child.items()}
        broken["a.weight"].view(-1)[at] = float("inf")
        found = trace({n: from_tensors(t) for n, t in (("base", base), ("child", child), ("z", broken))}, moved=2)
        assert list(found.left_out) == ["z"]
        assert found.family("base") == ("base", "child")
