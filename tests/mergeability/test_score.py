"""``ws.score``: what it says, what it declines, and how measured merges change it."""

from __future__ import annotations

import json
import math
import os
import sys
import zipfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import weightspace as ws
from weightspace.errors import WeightspaceError
from weightspace.mergeability import protection
from weightspace.mergeability.measurements import (
    BARRIER,
)
from weightspace.mergeability.report import TERMS, MergeReport
from weightspace.wiring.proof import distance, run

sys.path.insert(0, str(Path(__file__).parent))
import small
from networks import child, fresh, wiring
from scored import NEW, score

# ------------------------------------------------------------------------------------ what it says


def test_every_pair_has_a_prediction_with_an_interval_and_the_terms_behind_it(plain: MergeReport) -> None:
    assert plain.models == tuple(f"m{k}" for k in range(small.CHILDREN))
    assert plain.preflight.ok
    assert len(plain.ranked(2)) == math.comb(small.CHILDREN, 2)
    assert len(plain.merges[0].models) == small.CHILDREN
    for merge in plain.ranked(2):
        assert set(merge.terms) == set(TERMS)
        assert set(merge.predictions) == {*small.METHODS, BARRIER}
        for method, p in merge.predictions.items():
            if p.known:
                assert p.low <= p.value <= p.high
                assert p.coverage == 0.9
                if method != BARRIER:
                    assert set(p.retained) == set(merge.models)
                    assert p.value == pytest.approx(np.mean(list(p.retained.values())))
    known = [m for m in plain.ranked(2) if m.best]
    assert len(known) > 8
    assert [m.value for m in known] == sorted((m.value for m in known), reverse=True)
    best = known[0]
    assert best.best is not None
    assert best.predictions[best.best].value == max(p.value for m, p in best.predictions.items() if m != BARRIER)


def test_predictions_of_a_family_that_was_not_learned_from_follow_what_is_measured(plain: MergeReport) -> None:
    truth = {(m.models, m.method): m.outcome for m in small.measured(NEW)}
    pairs = [m for m in plain.ranked(2) if m.best]
    said = np.array([m.predictions["ties"].value for m in pairs])
    true = np.array([truth[m.models, "ties"] for m in pairs])
    assert np.corrcoef(said, true)[0, 1] > 0.5
    held = [m.predictions["ties"].low <= y <= m.predictions["ties"].high for m, y in zip(pairs, true, strict=True)]
    assert np.mean(held) > 0.6


def test_terms_move_the_score_and_are_named(models: Mapping[str, Any], base: Any) -> None:
    report = score({k: models[k] for k in ("m1", "m2")}, base)
    p = report.predictions["ties"]
    assert p.known
    assert {"cosine", "sign conflict", "norm ratio", "subspace overlap", "measured merges"} <= set(p.terms)
    assert p.terms["measured merges"] == 0
    assert any(abs(v) > 1e-4 for v in p.terms.values())
    assert all(abs(v) < 2 for v in p.terms.values())


def test_blocks_show_the_terms_block_by_block(plain: MergeReport, models: Mapping[str, Any], base: Any) -> None:
    frame = plain.blocks(["m0", "m5"])
    assert list(frame.index) == ["hidden.0.weight", "hidden.1.weight", "output.weight"]
    assert frame["share"].sum() == pytest.approx(1)
    name = "hidden.1.weight"
    a, b = (models[m][name] - base[name] for m in ("m0", "m5"))
    assert frame.loc[name, "cosine"] == pytest.approx(float((a * b).sum() / a.norm() / b.norm()), abs=1e-4)
    ratio = float(a.norm() / b.norm())
    assert frame.loc[name, "norm ratio"] == pytest.approx(max(ratio, 1 / ratio), rel=1e-4)
    moved = wiring("mlp").apply(wiring("mlp").random(3), models["m5"])
    apart = score({"m0": models["m0"], "moved": moved}, base)
    assert apart.blocks()["axis misalignment"].max() > 0.1 > frame["axis misalignment"].max()
    with pytest.raises(WeightspaceError, match="'m9' is none of the models"):
        plain.blocks(["m0", "m9"])


def test_the_verdict_comes_first_and_json_holds_everything(plain: MergeReport) -> None:
    assert plain.verdict.startswith("can be merged; ")
    assert "% interval" in plain.verdict
    text = repr(plain)
    assert text.index(plain.verdict) < text.index("Preflight(") < text.index("pairs, the most promising first")
    told = json.loads(json.dumps(plain.to_json(), allow_nan=False))
    assert told["verdict"] == plain.verdict
    assert len(told["merges"]) == 1 + math.comb(small.CHILDREN, 2)
    assert told["suggest"]["models"]
    assert set(told["blocks"]) == {"hidden.0.weight", "hidden.1.weight", "output.weight"}


def test_groups_hold_pairs_that_all_are_good(plain: MergeReport) -> None:
    value = {frozenset(m.models): m.value for m in plain.ranked(2)}
    least = float(np.nanmedian(list(value.values())))
    groups = plain.groups(least)
    assert groups
    assert len({m for g in groups for m in g}) == sum(map(len, groups))
    for group in groups:
        assert all(value[frozenset((a, b))] >= least for a in group for b in group if a != b)
    assert len(plain.groups(least, overlap=True)) >= len(groups)
    assert plain.groups(2.0) == []


def test_order_and_names_do_not_matter(models: Mapping[str, Any], base: Any) -> None:
    one = score({"a": models["m1"], "b": models["m4"]}, base)
    two = score({"y": models["m4"], "x": models["m1"]}, base)
    for method, p in one.predictions.items():
        assert p.value == pytest.approx(two.predictions[method].value, abs=1e-9, nan_ok=True)


# ------------------------------------------------------------------------------------ out of range


def test_outside_its_range_it_gives_no_number_but_terms_and_why(models: Mapping[str, Any]) -> None:
    three = {n: models[n] for n in ("m0", "m1", "m2")}
    report = score(three)
    assert all(not p.known for m in report.merges for p in m.predictions.values())
    assert "not predicted, because no base was given" in report.verdict
    assert report.best is None
    assert set(report.merges[0].terms) == set(TERMS)
    assert report.merges[0].terms["cosine"] > 0.5
    with pytest.raises(WeightspaceError, match="no predictions"):
        report.suggest()
    json.dumps(report.to_json(), allow_nan=False)
    far = {n: {k: 40 * torch.randn_like(t) for k, t in m.items()} for n, m in three.items()}
    strange = score(far, models["m0"])
    assert "times as far from the merges learned from" in strange.verdict
    assert math.isnan(strange.merges[0].value)


def test_a_wider_model_is_carried_onto_the_first(tmp_path: Path) -> None:
    from weightspace.zoo.architectures import Perceptron
    from weightspace.zoo.files import save_network

    torch.manual_seed(3)
    network = {"kind": "mlp", "input": [12], "classes": 5, "widths": [24, 20], "activation": "relu"}
    save_network(small.family(0)[1]["m1"], {"network": network}, tmp_path / "a.safetensors")
    wide = Perceptron([12, 32, 28, 5], "relu").state_dict()
    save_network(wide, {"network": {**network, "widths": [32, 28]}}, tmp_path / "wide.safetensors")
    files = [tmp_path / "a.safetensors", tmp_path / "wide.safetensors"]
    prior = replace(small.strangers(), methods=("ot-fusion",), variances={"ot-fusion": {"vulnerability": 0.1}},
                    spreads={"ot-fusion": small.strangers().spreads["linear"]})  # fmt: skip
    report = score(files, prior=prior, wiring=None, checks=True)
    assert report.predictions["ot-fusion"].known
    assert report.verdict.startswith("cannot be averaged, for their widths differ, but merged by optimal transport; ")
    assert report.stops
    assert score(files, wiring=None).merges == ()


def test_strangers_are_said_to_need_alignment(models: Mapping[str, Any]) -> None:
    report = score({"m1": models["m1"], "other": small.family(1)[1]["m1"]}, checks=True)
    assert report.strangers == ("other",)
    assert report.verdict.startswith("can be merged once aligned, for other shares no ancestor with m1; ")


def test_a_file_of_several_models_is_taken_as_a_folder_is(models: Mapping[str, Any], tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "models.zip", "w") as archive:
        for name in ("m1", "m2"):
            save_file(models[name], tmp_path / f"{name}.safetensors")
            archive.write(tmp_path / f"{name}.safetensors", f"{name}.safetensors")
    report = score(tmp_path / "models.zip")
    assert report.models == ("m1.safetensors", "m2.safetensors")
    assert report.merges


def test_models_without_a_base_have_a_prior_of_their_own() -> None:
    one, two, three = (small.family(n)[1]["m1"] for n in (0, 1, 3))
    report = score({"one": one, "two": two, "three": three}, prior=small.strangers())
    assert [p.known for p in report.predictions.values()] == [False]
    assert "only pairs were learned from" in report.predictions["linear"].applicability.reason
    pairs = report.ranked(2)
    assert len(pairs) == 3
    assert all(0.3 < m.value < 0.8 for m in pairs)
    moved = wiring("mlp").apply(wiring("mlp").random(5), two)
    again = score({"one": one, "two": moved}, prior=small.strangers())
    was = next(m for m in pairs if set(m.models) == {"one", "two"})
    # Carried onto the first, a permuted copy is what it was.
    assert again.merges[0].value == pytest.approx(was.value, abs=1e-6)
    assert again.merges[0].terms["axis misalignment"] > 0.1


# ------------------------------------------------------------------------------------ protected models


def test_protected_models_are_scored_as_undone(models: Mapping[str, Any], base: Any) -> None:
    pair = {n: models[n] for n in ("m1", "m2")}
    hidden = pair | {"m2": protection.protect(pair["m2"], wiring("mlp"), seed=4)}
    plain, report = score(pair, base, checks=True), score(hidden, base, checks=True)
    assert set(report.undone) == {"m2"}
    assert [f.check for f in report.stops] == ["protection"]
    assert "can be merged once m2 is undone" in report.verdict
    assert any("m2 was moved inside its orbit" in n for n in report.notes)
    for method, p in plain.predictions.items():
        assert report.predictions[method].value == pytest.approx(p.value, abs=0.02)
    program = wiring("mlp").program
    assert program is not None
    double = [{n: t.double() for n, t in x.items()} for x in (hidden["m2"], dict(report.undone["m2"]))]
    assert distance(*(run(program, x, torch.float64) for x in double)) < 1e-5
    assert report.to_json()["ok"] is False


# ------------------------------------------------------------------------------------ what goes wrong


def test_one_model_equal_to_the_base_and_identical_models(models: Mapping[str, Any], base: Any) -> None:
    report = score({"same": dict(base), "m1": models["m1"], "again": dict(models["m1"])}, base, checks=True)
    said = repr(report.preflight)
    assert "the weights are those of base" in said
    assert "2 models have the same weights" in said
    for merge in report.merges:
        assert all(math.isfinite(v) for v in merge.terms.values())
    json.dumps(report.to_json(), allow_nan=False)


@pytest.mark.parametrize("checks", [True, False])
def test_broken_models_are_left_out_and_named(models: Mapping[str, Any], base: Any, checks: bool) -> None:
    bad = {n: t.clone() for n, t in models["m0"].items()}
    bad["hidden.1.weight"][0, 0] = float("nan")
    three = {"bad": bad, "m1": models["m1"], "m2": models["m2"]}
    if checks:
        report = score(three, base, checks=True)
        assert report.models == ("m1", "m2")
        assert "not finite" in report.left["bad"]
        assert report.predictions["ties"].known
        assert report.verdict.startswith("not all of them can be merged")
    pair = score({"bad": bad, "m1": models["m1"]}, base, checks=checks)
    assert pair.merges == ()
    assert "cannot be merged" in pair.verdict
    assert "not finite" in " ".join([*pair.notes, *pair.left.values()])
    huge = {"m1": models["m1"], "huge": {n: t * 1e30 for n, t in models["m2"].items()}}
    assert score(huge, base, checks=checks).merges == ()
    broken_base = score({n: models[n] for n in ("m1", "m2")}, bad, checks=checks)
    assert broken_base.merges == ()


def test_other_shapes_heads_and_architectures_are_findings(models: Mapping[str, Any], base: Any) -> None:
    head = dict(models["m2"]) | {"output.weight": torch.randn(7, 20), "output.bias": torch.randn(7)}
    report = score({"m1": models["m1"], "head": head}, base, checks=True)
    assert report.merges == ()
    assert "head: output.weight has shape [7, 20]" in report.verdict
    other = score({"m1": models["m1"], "m2": models["m2"], "cnn": fresh("cnn", 1)}, base, checks=True)
    assert other.models == ("m1", "m2")
    assert "absent" in other.left["cnn"]
    words = fresh("gpt", 1)
    more = child(words, 2) | {"token.weight": torch.randn(13, 16)}
    text = ws.score({"a": child(words, 1), "more": more}, words, prior=small.prior(), wiring=wiring("gpt"))
    assert "vocabulary: token.weight" in text.verdict
    named = score({"m1": models["m1"], "x": {f"model.{n}": t for n, t in models["m2"].items()}}, base, checks=True)
    assert "prefix 'model.'" in named.verdict


def test_counters_integers_and_tied_tensors_do_not_count(models: Mapping[str, Any], base: Any) -> None:
    def more(m: Mapping[str, Tensor], k: int) -> dict[str, Tensor]:
        return {**m, "seen": torch.tensor(k), "ids": torch.arange(5)}

    plain = score({n: models[n] for n in ("m1", "m2")}, base, checks=True)
    counted = score({n: more(models[n], int(n[1:])) for n in ("m1", "m2")}, more(base, 9), checks=True)
    for method, p in plain.predictions.items():
        assert counted.predictions[method].value == pytest.approx(p.value, abs=1e-12)
    tied = {n: {**models[n], "tied.weight": models[n]["output.weight"]} for n in ("m1", "m2")}
    assert score(tied, {**base, "tied.weight": base["output.weight"]}, checks=True).merges


def test_half_precision_is_scored_as_single_is(models: Mapping[str, Any], base: Any) -> None:
    half = {n: {k: t.bfloat16() for k, t in models[n].items()} for n in ("m1", "m2")}
    whole = {n: {k: t.bfloat16().float() for k, t in models[n].items()} for n in ("m1", "m2")}
    one, two = score(half, base), score(whole, base)
    for method, p in one.predictions.items():
        assert p.value == pytest.approx(two.predictions[method].value, abs=1e-9, nan_ok=True)


def test_adapters_are_scored_on_their_base(tmp_path: Path, base: Any) -> None:
    paths = []
    for k in range(2):
        torch.manual_seed(k)
        folder = tmp_path / f"adapter-{k}"
        folder.mkdir()
        lora = {f"base_model.model.hidden.1.lora_{s}.weight": 0.2 * torch.randn(*shape)
                for s, shape in (("A", (2, 24)), ("B", (20, 2)))}  # fmt: skip
        save_file(lora, folder / "adapter_model.safetensors")
        (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "lora_alpha": 2, "r": 2}))
        paths.append(folder)
    report = score(paths, base, checks=True)
    assert report.models == ("adapter-0", "adapter-1")
    assert report.merges
    assert report.blocks().loc["hidden.1.weight", "share"] == pytest.approx(1)
    alone = score(paths, checks=True)
    assert alone.merges == ()
    assert "a LoRA adapter" in alone.verdict


def test_wrong_calls_are_named(models: Mapping[str, Any], base: Any, tmp_path: Path) -> None:
    with pytest.raises(WeightspaceError, match=r"1 model was given, two or more"):
        score({"m1": models["m1"]}, base)
    with pytest.raises(WeightspaceError, match=r"nothing was learned about 'moe'; expected some of linear"):
        score(models, base, methods=["moe"])
    with pytest.raises(WeightspaceError, match=r"one model; expected a list"):
        score(models["m1"], base)
    with pytest.raises(WeightspaceError, match=r"found int as a model"):
        score({"a": 3, "b": models["m1"]}, base)
    with pytest.raises(WeightspaceError):
        score([tmp_path / "absent.safetensors", tmp_path / "b.safetensors"], base)
    many = {f"n{k}": models["m1"] for k in range(65)}
    with pytest.raises(WeightspaceError, match=r"at most 64 models at once: rank them without first"):
        score(many, base, known=[{"a": "n0", "b": "n1", "method": "ties", "outcome": 0.9}])
    with pytest.raises(WeightspaceError, match=r"at most 512 are scored at once"):
        score({f"n{k}": models["m1"] for k in range(513)}, base)


# ------------------------------------------------------------------------------------ folders and zoos


@pytest.fixture(scope="module")
def folder(models: Mapping[str, Any], base: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("models")
    save_file(base, root / "base.safetensors")
    for name, tensors in models.items():
        save_file(tensors, root / f"{name}.safetensors")
    save_file(protection.protect(models["m1"], wiring("mlp"), seed=2), root / "hidden.safetensors")
    save_file(fresh("mlp", 77), root / "stranger.safetensors")
    save_file(fresh("cnn", 1), root / "cnn.safetensors")
    (root / "torn.safetensors").write_bytes((root / "m0.safetensors").read_bytes()[:500])
    (root / "readme.md").write_text("nothing\n")
    return root


def test_a_folder_is_reduced_to_what_fits_the_base(folder: Path) -> None:
    report = score(folder, folder / "base.safetensors", checks=True)
    assert set(report.models) == {f"m{k}.safetensors" for k in range(small.CHILDREN)} | {"hidden.safetensors"}
    assert "another architecture" in report.left["cnn.safetensors"]
    assert "no trace of the base" in report.left["stranger.safetensors"]
    assert set(report.unreadable) == {"torn.safetensors"}
    assert set(report.undone) == {"hidden.safetensors"}
    same = next(m for m in report.ranked(2) if set(m.models) == {"m1.safetensors", "hidden.safetensors"})
    assert same.terms["cosine"] > 0.95


def test_merges_are_kept_in_the_zoo_and_sharpen_the_report(folder: Path) -> None:
    zoo = ws.Zoo(folder)
    base = folder / "base.safetensors"
    before = score(folder, base)
    kept = zoo.record_merge([folder / "m0.safetensors", "m5.safetensors"], "ties", merged=[0.4, 0.45], alone=[0.8, 0.9],
                            base="base.safetensors")  # fmt: skip
    assert kept.outcome == pytest.approx(0.5)
    zoo.record_merge(["m0.safetensors", "m1.safetensors"], BARRIER, 0.01)
    for again in (score(folder, base), score(zoo, base), score(sorted(folder.glob("m?.safetensors")), base, known=zoo)):
        assert {m.method for m in again.known} == {"ties", BARRIER}
        now, then = (
            next(m.predictions["ties"] for m in r.ranked(2) if set(m.models) == {"m0.safetensors", "m4.safetensors"})
            for r in (again, before)
        )
        assert now.value < then.value
    zoo.record_merge(["m0.safetensors", "m5.safetensors"], "ties", 0.9)
    assert {m.method: m.outcome for m in zoo.merges()} == {"ties": 0.9, BARRIER: 0.01}
    path = zoo.index_folder / "merges.jsonl"
    assert len(path.read_text().splitlines()) == 3
    with path.open("a") as stream:
        stream.write('{"models": ["m0.safe')
    assert len(zoo.merges()) == 2
    zoo.record_merge(["m2.safetensors", "m5.safetensors"], "ties", 0.7)
    assert len(zoo.merges()) == 3
    with pytest.raises(WeightspaceError, match=r"if it is percent, write 0.873"):
        zoo.record_merge(["m0.safetensors", "m5.safetensors"], "ties", 87.3)
    with pytest.raises(WeightspaceError, match=r"there is no model x.safetensors in"):
        zoo.record_merge(["m0.safetensors", "x.safetensors"], "ties", 0.9)
    with pytest.raises(WeightspaceError, match=r"one above 0 of each"):
        zoo.record_merge(["m0.safetensors", "m5.safetensors"], "ties", merged=[0.9], alone=[0.9])
    assert len(zoo.merges()) == 3
    # Trained anew under its old name: what was measured of the old one does not count.
    m2 = (folder / "m2.safetensors").read_bytes()
    os.utime(folder / "m5.safetensors", ns=(1, 1))
    assert len(zoo.merges()) == 3
    save_file(small.family(1)[1]["m2"], folder / "m2.safetensors")
    assert {frozenset(m.models) for m in zoo.merges() if m.method == "ties"} == {
        frozenset(("m0.safetensors", "m5.safetensors"))
    }
    (folder / "m2.safetensors").write_bytes(m2)
    path.write_text("nonsense\n")
    with pytest.raises(WeightspaceError, match=r"line 1 of .* is damaged"):
        zoo.merges()
    path.unlink()


def test_files_of_one_name_are_told_apart(models: Mapping[str, Any], base: Any, tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        save_file(models["m1" if name == "one" else "m2"], tmp_path / name / "model.safetensors")
    report = score([tmp_path / n / "model.safetensors" for n in ("one", "two")], base)
    assert report.models == ("one/model.safetensors", "two/model.safetensors")


def test_the_prior_comes_from_a_folder_too(models: Mapping[str, Any], base: Any, tmp_path: Path) -> None:
    small.prior().save(tmp_path)
    pair = {n: models[n] for n in ("m1", "m2")}
    one, two = score(pair, base), score(pair, base, prior=tmp_path)
    for method, p in one.predictions.items():
        assert two.predictions[method].value == pytest.approx(p.value, abs=0.02)
    (tmp_path / "merge.safetensors").write_bytes(b"nothing")
    with pytest.raises(WeightspaceError, match=r"cannot be used"):
        score(pair, base, prior=tmp_path)
