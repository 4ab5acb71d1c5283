"""Loading populations: shared wirings, what is left out and said so, splits that divide no group."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.metanets.standin import mlp, population, write
from weightspace.errors import MetanetError
from weightspace.graph import graph
from weightspace.metanets.data import Sample, field_of, load_samples, split
from weightspace.zoo import Zoo


def test_networks_of_one_kind_share_their_wiring(tmp_path: Path) -> None:
    samples = load_samples(population(tmp_path, runs=6))
    assert len(samples) == 12
    assert not samples.left_out
    kinds = {id(sample.graph.wiring) for sample in samples}
    assert len(kinds) == 2
    assert all(sample.graph.proved for sample in samples)
    first, second = samples[0], samples[1]
    assert first.group == second.group == "run-0"
    assert first.graph.blocks is second.graph.blocks
    assert not torch.equal(first.graph.tensor("output.weight"), second.graph.tensor("output.weight"))


def test_the_graph_is_the_one_that_opening_the_file_gives(tmp_path: Path) -> None:
    samples = load_samples(population(tmp_path, runs=1))
    opened = graph(tmp_path / samples[0].name)
    assert {b.tensor: (b.src, b.dst) for b in samples[0].graph.blocks} == {
        b.tensor: (b.src, b.dst) for b in opened.blocks
    }
    assert all(torch.equal(samples[0].graph.tensor(n), opened.tensor(n)) for n in opened.shapes)


def test_a_zoo_is_loaded_like_its_folder(tmp_path: Path) -> None:
    population(tmp_path, runs=2)
    assert [s.name for s in load_samples(Zoo(tmp_path))] == [s.name for s in load_samples(tmp_path)]


def test_networks_with_other_descriptions_have_other_wirings(tmp_path: Path) -> None:
    for name, activation in (("a", "relu"), ("b", "tanh")):
        write(tmp_path / f"{name}.safetensors", mlp([4, 5, 3], 0), {"network": {"activation": activation}})
    one, two = load_samples(tmp_path)
    assert one.graph.wiring is not two.graph.wiring


def test_what_cannot_be_used_is_left_out_and_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    population(tmp_path, runs=2, checkpoints=1)
    broken = mlp([6, 5, 3], 0)
    broken["output.bias"][0] = float("nan")
    write(tmp_path / "nan.safetensors", broken, {})
    write(tmp_path / "said.safetensors", mlp([6, 5, 3], 0), {"diverged": True})
    (tmp_path / "torn.safetensors").write_bytes((tmp_path / "nan.safetensors").read_bytes()[:-7])
    write(tmp_path / "strange.safetensors", {"q": torch.randn(3, 3), "r": torch.randn(7, 2, 5)}, {})
    (tmp_path / ".hidden").mkdir()
    write(tmp_path / ".hidden" / "x.safetensors", mlp([6, 5, 3], 0), {})
    with caplog.at_level(logging.WARNING):
        samples = load_samples(tmp_path)
    assert len(samples) == 2
    assert set(samples.left_out) == {"nan.safetensors", "said.safetensors", "torn.safetensors", "strange.safetensors"}
    assert samples.left_out["nan.safetensors"] == samples.left_out["said.safetensors"] == "diverged"
    assert "not a readable safetensors file" in samples.left_out["torn.safetensors"]
    assert "no wiring" in samples.left_out["strange.safetensors"]
    assert "4 of 6 networks left out" in caplog.text


def test_large_weights_are_not_taken_for_diverged(tmp_path: Path) -> None:
    tensors = mlp([6, 5, 3], 0)
    tensors["output.weight"].fill_(3e38)
    write(tmp_path / "large.safetensors", tensors, {})
    assert len(load_samples(tmp_path)) == 1


def test_conditions_on_the_record(tmp_path: Path) -> None:
    population(tmp_path, runs=6, checkpoints=3)
    assert len(load_samples(tmp_path, {"final": True})) == 6
    assert len(load_samples(tmp_path, {"final": False, "label": [0, 1]})) == 8
    assert len(load_samples(tmp_path, lambda record: record["seed"] == 3)) == 3
    with pytest.raises(MetanetError, match="18 safetensors files, 18 of which do not fit"):
        load_samples(tmp_path, {"hyper.activation": "gelu"})
    with pytest.raises(MetanetError, match="is not a folder"):
        load_samples(tmp_path / "nowhere")


def test_counters_and_the_order_in_the_file_are_not_seen(tmp_path: Path) -> None:
    from weightspace.zoo.networks import Cnn

    state = Cnn([1, 4, 6], 8, 3).state_dict()
    write(tmp_path / "a.safetensors", dict(state), {})
    counted = {k: torch.tensor(977) if k.endswith("num_batches_tracked") else v for k, v in state.items()}
    write(tmp_path / "b.safetensors", dict(reversed(counted.items())), {})
    a, b = load_samples(tmp_path)
    assert list(a.graph.shapes) == list(b.graph.shapes)
    assert not any("num_batches_tracked" in name for name in a.graph.shapes)
    assert all(torch.equal(a.graph.tensor(n), b.graph.tensor(n)) for n in a.graph.shapes)


def test_fields_by_dotted_path() -> None:
    record = {"hyper": {"activation": "relu"}, "a": 1}
    assert field_of(record, "hyper.activation") == "relu"
    assert field_of(record, "a") == 1
    assert field_of(record, "hyper.x") is None
    assert field_of(record, "a.b") is None


# -------------------------------------------------------------------- splits


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Sample:
    return load_samples(population(tmp_path_factory.mktemp("one"), runs=1, checkpoints=1))[0]


def _samples(one: Sample, groups: Sequence[int]) -> list[Sample]:
    return [Sample(f"n{i}", one.graph, {"kind": g % 3}, f"g{g}") for i, g in enumerate(groups)]


@settings(max_examples=50, deadline=None)
@given(sizes=st.lists(st.integers(1, 4), min_size=20, max_size=60), seed=st.integers(0, 1000))
def test_a_split_divides_no_group_and_is_about_right(one: Sample, sizes: list[int], seed: int) -> None:
    samples = _samples(one, [g for g, n in enumerate(sizes) for _ in range(n)])
    parts = split(samples, (0.6, 0.2, 0.2), seed)
    groups = [{s.group for s in part} for part in parts]
    assert sum(map(len, groups)) == len(set.union(*groups)) == len(sizes)
    assert sum(map(len, parts)) == len(samples)
    for part, fraction in zip(parts, (0.6, 0.2, 0.2), strict=True):
        assert abs(len(part) - fraction * len(samples)) <= 4
    # The order of the samples does not decide.
    again = split(samples[::-1], (0.6, 0.2, 0.2), seed)
    assert [{s.name for s in p} for p in again] == [{s.name for s in p} for p in parts]


def test_every_part_gets_a_group_where_there_are_enough(one: Sample) -> None:
    for seed in range(5):
        assert [len(p) for p in split(_samples(one, [0, 0, 1, 1, 2, 2]), (0.7, 0.1, 0.2), seed)] == [2, 2, 2]


def test_seeds_split_differently(one: Sample) -> None:
    samples = _samples(one, range(40))
    names = [{s.name for s in split(samples, (0.5, 0.5), seed)[0]} for seed in range(3)]
    assert names[0] != names[1] != names[2]


def test_split_by_a_field_by_a_function_and_by_lineage(one: Sample) -> None:
    samples = _samples(one, range(12))
    parts = split(samples, (0.67, 0.33), by="kind")
    assert {s.record["kind"] for s in parts[0]}.isdisjoint(s.record["kind"] for s in parts[1])
    halves = split(samples, (0.5, 0.5), by=lambda s: str(int(s.name[1:]) // 2))
    assert {int(s.name[1:]) // 2 for s in halves[0]}.isdisjoint(int(s.name[1:]) // 2 for s in halves[1])
    family = []
    for base in range(10):
        family.append(Sample(f"x/base-{base}.safetensors", one.graph, {"parent": None}, f"run-{base}"))
        parent = f"base-{base}.safetensors"
        family.append(Sample(f"child-{base}.safetensors", one.graph, {"parent": parent}, f"c{base}"))
        family.append(Sample(f"grand-{base}.safetensors", one.graph, {"parent": [f"c{base}"]}, f"grand{base}"))
    parts = split(family, (0.5, 0.5), by="lineage")
    bases = [{s.name.partition(".")[0].rpartition("-")[2] for s in part} for part in parts]
    assert bases[0].isdisjoint(bases[1])
    assert [len(part) for part in parts] == [15, 15]


def test_splits_that_make_no_sense(one: Sample) -> None:
    samples = _samples(one, [0] * 10)
    with pytest.raises(MetanetError, match=r"10 networks in 1 groups .* stays empty"):
        split(samples, (0.5, 0.5))
    with pytest.raises(MetanetError, match="at most 1"):
        split(samples, (0.9, 0.2))
    with pytest.raises(MetanetError, match="no field 'colour'"):
        split(samples, (1.0,), by="colour")
