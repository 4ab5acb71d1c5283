"""Preflight: each thing that can be wrong is found and said with what to do, and nothing is said of sound models."""

from __future__ import annotations

import gc
import json
import sys
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from weightspace.checkpoint import from_tensors
from weightspace.checkpoint.checkpoint import from_entries
from weightspace.checkpoint.contents import Entry
from weightspace.errors import WeightspaceError
from weightspace.mergeability.health import effective_rank, examine, outliers
from weightspace.mergeability.preflight import CHECKS, Preflight, preflight
from weightspace.mergeability.protection import protect

sys.path.insert(0, str(Path(__file__).parent))
from networks import child, fresh, wiring

NO_WIRING = [c for c in CHECKS if c not in ("wiring", "ancestry", "protection")]
BASE = fresh("mlp", 1)


def run(*models: Mapping[str, Tensor], base: Any = BASE, **kwargs: Any) -> Preflight:
    named = {f"m{i}": m for i, m in enumerate(models)}
    return preflight(named, base, **{"wiring": wiring("mlp"), **kwargs})


def said(flight: Preflight, check: str) -> str:
    found = flight.of(check=check)
    assert found, f"nothing was found by {check}: {flight}"
    return " | ".join(f"{f.severity}: {f.sentence}" for f in found)


def test_sound_models_are_clean() -> None:
    flight = run(child(BASE, 1), child(BASE, 2))
    assert flight.clean
    assert flight.findings == ()
    assert [a.relation for a in flight.ancestry] == ["same ancestor"] * 2
    assert flight.wiring == "proved"
    assert "can be merged; 0 stops" in repr(flight)


def test_without_a_base_models_are_held_against_the_first() -> None:
    flight = run(child(BASE, 1), child(BASE, 2), base=None)
    assert flight.clean
    assert len(flight.ancestry) == 1


def test_broken_values_stop() -> None:
    bad = child(BASE, 1)
    bad["hidden.1.weight"][0, :3] = torch.tensor([float("nan"), float("inf"), -float("inf")])
    flight = run(bad, child(BASE, 2))
    assert not flight.ok
    assert "m0: 3 values are not finite, in hidden.1.weight" in said(flight, "values")
    assert "ancestry of m0" in flight.skipped
    broken_base = run(child(BASE, 1), base=bad)
    assert "base: 3 values" in said(broken_base, "values")


def test_dead_collapsed_constant_and_scaled_layers_are_named() -> None:
    dead, flat, constant, scaled = (child(BASE, k, 0.05) for k in range(4))
    dead["hidden.0.weight"][:4] = 0
    flat["hidden.1.weight"] = torch.outer(torch.randn(20), torch.randn(24)) * 0.1
    constant["output.weight"] = torch.full((5, 20), 0.1)
    scaled["hidden.1.weight"] = 5 * BASE["hidden.1.weight"]
    flight = run(dead, flat, constant, scaled, checks=NO_WIRING)
    text = said(flight, "values")
    assert "m0: 4 rows or columns are zero, 4 of them in hidden.0.weight" in text
    assert "m1: 1 matrices have lost rank; hidden.1.weight" in text
    assert "m2: 1 tensors hold one value only (output.weight)" in text
    assert "m3: 1 tensors stand out by their norm; hidden.1.weight has 5.00 times" in text
    assert flight.ok


def test_names_and_shapes() -> None:
    missing = {n: t for n, t in child(BASE, 1).items() if n != "output.bias"}
    prefixed = {f"model.{n}": t for n, t in child(BASE, 1).items()}
    head = child(BASE, 1) | {"output.weight": torch.randn(7, 20), "output.bias": torch.randn(7)}
    wide = child(BASE, 1) | {"hidden.0.weight": torch.randn(30, 12), "hidden.0.bias": torch.randn(30)}
    flight = run(missing, prefixed, head, wide)
    text = said(flight, "tensors")
    assert "m0: 1 of 6 tensors of base are absent (output.bias)" in text
    assert "m1: 6 of 6" in text
    assert "the names differ by the prefix 'model.': rename them" in text
    assert "m2: head: output.weight has shape [7, 20], base has [5, 20], and 1 more" in text
    assert "m3: width: hidden.0" in text
    assert not flight.of("warning", "ancestry")


def test_another_vocabulary_is_called_so() -> None:
    base = fresh("gpt", 1)
    more = child(base, 1) | {"token.weight": torch.randn(13, 16)}
    flight = preflight({"m": more}, base, wiring=wiring("gpt"), checks=["tensors"])
    assert "vocabulary: token.weight has shape [13, 16]" in said(flight, "tensors")


def test_equal_models_and_frozen_layers() -> None:
    one = child(BASE, 1)
    frozen = child(BASE, 2) | {"hidden.0.weight": BASE["hidden.0.weight"]}
    text = said(run(one, dict(one), dict(BASE), frozen, checks=NO_WIRING), "equal")
    assert "m0, m1: 2 models have the same weights" in text
    assert "m2: the weights are those of base" in text
    assert "m3: 31% of the parameters are unchanged" in text


def test_element_types_and_quantised_weights() -> None:
    half = {n: t.half() for n, t in child(BASE, 1).items()}
    quantised = {n: (t * 100).to(torch.int8) if t.dim() == 2 else t for n, t in BASE.items()}
    flight = run(half, quantised)
    assert "m0 float16" in said(flight, "dtype")
    assert "stop: m1: quantised weights: int8 in 3 tensors" in said(flight, "quantised")


def test_adapters_are_merged_onto_their_base_or_declined(tmp_path: Path) -> None:
    a, b = torch.randn(2, 12), 0.01 * torch.randn(24, 2)
    tensors = {
        "base_model.model.hidden.0.lora_A.weight": a, "base_model.model.hidden.0.lora_B.weight": b,
    }  # fmt: skip
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "lora_alpha": 2, "r": 2, "base_model_name_or_path": "some/base"}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    alone = preflight([tmp_path], checks=NO_WIRING)
    assert "without the model it changes; expected: the base some/base" in said(alone, "adapters")
    assert not alone.ok
    merged = preflight([tmp_path], BASE, wiring=wiring("mlp"))
    assert merged.ok
    assert [x.relation for x in merged.ancestry] == ["same ancestor"]


def folder(path: Path, config: Mapping[str, Any], vocabulary: Mapping[str, int], seed: int) -> Path:
    path.mkdir()
    save_file(child(BASE, seed), path / "model.safetensors", {"format": "pt"})
    (path / "config.json").write_text(json.dumps(dict(config)))
    (path / "tokenizer.json").write_text(json.dumps({"model": {"vocab": dict(vocabulary)}}))
    return path


def test_configurations_labels_and_tokenisers(tmp_path: Path) -> None:
    config = {"hidden_act": "gelu", "rms_norm_eps": 1e-5, "id2label": {"0": "cat", "1": "dog"}, "use_cache": True}
    words = {"a": 0, "b": 1, "c": 2}
    base = folder(tmp_path / "base", config, words, 0)
    same = folder(tmp_path / "same", config | {"use_cache": False}, words, 1)
    other = folder(
        tmp_path / "other",
        config | {"hidden_act": "relu", "rms_norm_eps": 1e-6, "id2label": {"0": "dog", "1": "cat"}, "x": 1},
        {"a": 0, "c": 1, "b": 2}, 2,
    )  # fmt: skip
    more = folder(tmp_path / "more", config, words | {"d": 3}, 3)
    flight = preflight([same, other, more], base, checks=["configuration", "tokeniser"])
    settings, tokens = said(flight, "configuration"), said(flight, "tokeniser")
    assert "stop: other: hidden_act is relu; expected: gelu as in base" in settings
    assert "warning: other: rms_norm_eps is 1e-06" in settings
    assert 'warning: other: labels ["dog", "cat"]; expected: ["cat", "dog"]' in settings
    assert "note: other: the configuration differs in x (1)" in settings
    assert "stop: other: a vocabulary of 3 tokens: 2 with another number, 0 new, 0 absent" in tokens
    assert "warning: more: a vocabulary of 4 tokens: 0 with another number, 1 new" in tokens
    assert not any("same" in f.models for f in flight.findings)


def test_strangers_and_protected_copies() -> None:
    copy = protect(child(BASE, 1), wiring("mlp"), seed=3)
    flight = run(copy, fresh("mlp", 5), child(BASE, 4))
    assert "stop: m0: moved inside its orbit" in said(flight, "protection")
    assert "warning: m1: base and m1 share no ancestor" in said(flight, "ancestry")
    assert not any("m2" in f.models for f in flight.findings)
    assert [p.protected for p in flight.protection] == [True, False, False]
    told = json.loads(json.dumps(flight.to_json()))
    assert told["ok"] is False
    assert {f["check"] for f in told["findings"]} == {"protection", "ancestry"}


def test_other_networks_of_the_same_names_and_shapes_are_told_apart(tmp_path: Path) -> None:
    from weightspace.zoo.files import save_network

    paths = []
    for i, activation in enumerate(("relu", "tanh")):
        network = {"kind": "mlp", "input": [12], "classes": 5, "widths": [24, 20], "activation": activation}
        paths.append(tmp_path / f"{activation}.safetensors")
        save_network(child(BASE, i), {"network": network}, paths[-1])
    flight = preflight(paths, checks=["wiring"])
    assert "the same names and shapes as relu.safetensors, but another network" in said(flight, "wiring")
    assert "tanh where relu" in said(flight, "wiring")


def test_an_unverified_wiring_is_said_and_nothing_is_undone_with_it() -> None:
    flight = run(child(BASE, 1), wiring=wiring("mlp").with_(status="unverified"))
    assert "a guess from names and shapes" in said(flight, "wiring")
    assert flight.skipped["protection"] == "it needs a proved wiring"
    assert [a.relation for a in flight.ancestry] == ["same ancestor"]


def test_wrong_calls_are_named() -> None:
    with pytest.raises(WeightspaceError, match="no check 'colour'"):
        run(BASE, checks=["colour"])
    with pytest.raises(WeightspaceError, match="no models"):
        preflight([])
    with pytest.raises(WeightspaceError, match="one model; expected a list"):
        preflight(BASE)  # type: ignore[arg-type]


def test_values_are_read_tensor_by_tensor() -> None:
    alive: set[int] = set()
    most = 0

    def load(seed: int) -> Tensor:
        nonlocal most
        made = torch.randn(64, 64, generator=torch.Generator().manual_seed(seed))
        alive.add(id(made))
        weakref.finalize(made, alive.discard, id(made))
        most = max(most, len(alive))
        return made

    def model(seed: int) -> Any:
        entries = {f"w{i}": Entry((64, 64), torch.float32, lambda i=i: load(100 * seed + i)) for i in range(20)}
        return from_entries(entries, "memory", {})

    gc.collect()
    found = examine({"a": model(1), "b": model(2)}, model(3))
    assert set(found.digests) == {"a", "b"}
    assert most <= 3


def test_effective_rank_and_outliers() -> None:
    assert effective_rank(torch.eye(16)) == pytest.approx(16, rel=1e-3)
    assert effective_rank(torch.ones(16, 16)) == pytest.approx(1, rel=1e-2)
    ratios = {f"t{i}": 1 + 0.01 * i for i in range(9)}
    assert outliers(ratios) == {}
    assert set(outliers(ratios | {"odd": 4.0})) == {"odd"}
    # A model that was scaled as a whole has no layer that stands out.
    assert outliers({n: 3 * r for n, r in ratios.items()}) == {}
    assert from_tensors(BASE).num_parameters > 0
