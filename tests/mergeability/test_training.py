"""Training from nothing: a small population is built, merges are measured, the model learns from them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from weightspace.cli import app
from weightspace.errors import WeightspaceError
from weightspace.mergeability.measure import STRANGERS, families, measure_population, read_rows
from weightspace.mergeability.prior import STRANGERS as STRANGE
from weightspace.mergeability.prior import Prior
from weightspace.mergeability.training import (
    FOLDS,
    GROUPS,
    PLAN,
    Measured,
    coverage,
    gather,
    gather_strangers,
    held_out,
    make,
    rounds,
    splits,
)

RECIPE = """
name = "tiny-merging"
[data]
name = "tasks"
side = 8
train = 200
test = 60
tasks = ["digits", "digits+rot90", "digits+flip", "digits+invert"]
[defaults]
runs = 2
epochs = 2
batch = 32
hyper = { optimiser = "adam", learning_rate = 2e-3 }
[[population]]
name = "mlp"
network = { kind = "mlp", widths = [12], activation = "relu" }
[[population]]
name = "mlp-task"
parent = "mlp"
runs = 12
epochs = 1
tasks = [["0"], ["1"], ["2"], ["3"], ["2"], ["3~1"]]
"""
SMALL = {"trees": 5, "least": 4, "pairs": 30, "triples": 6, "strangers": 16}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Prior, list[dict[str, object]]]:
    from weightspace.zoo.recipe import load
    from weightspace.zoo.train import build_zoo

    folder = tmp_path_factory.mktemp("merge")
    recipe = folder / "tiny.toml"
    recipe.write_text(RECIPE)
    build_zoo(load(recipe), folder / "zoo", progress=False)
    prior, table = make(folder / "zoo", folder / "zoo" / "merges.jsonl", folder / "out", plan=SMALL)
    return folder / "zoo", folder / "out", prior, table


def test_a_model_and_its_card_come_out(made: tuple[Path, Path, Prior, list[dict[str, object]]]) -> None:
    _, out, prior, table = made
    assert {p.name for p in out.iterdir()} == {"merge.safetensors", STRANGE, "MODEL_CARD.md"}
    assert prior.methods == ("linear", "task-arithmetic", "ties", "barrier")
    assert Prior.load(out, STRANGE).methods == STRANGERS
    card = (out / "MODEL_CARD.md").read_text()
    assert "36 merges (6 of three models) of 12 networks" in card
    assert "And 16 pairs of different bases" in " ".join(card.split())
    assert all(np.isfinite(float(str(row["error"]))) for row in table)


def test_measuring_goes_on_where_it_stopped(
    made: tuple[Path, Path, Prior, list[dict[str, object]]], tmp_path: Path
) -> None:
    zoo, _, _, _ = made
    whole = (zoo / "merges.jsonl").read_text().splitlines()
    lines = [json.loads(line) for line in whole]
    path = tmp_path / "rows.jsonl"
    # As if it had been killed within a line: what is whole stays, what is missing is measured, nothing twice.
    path.write_text("\n".join(whole[: len(whole) // 2]) + "\n" + whole[-1][:30])
    counts = {k: SMALL[k] for k in ("pairs", "triples", "strangers")}
    new = measure_population(zoo, path, **counts)
    found = read_rows(path)

    def key(row: dict[str, object]) -> str:
        return json.dumps([row["models"], row["method"], row["outcome"]])

    assert sorted(map(key, found)) == sorted(map(key, lines))
    assert new == len(lines) - len(whole) // 2
    assert measure_population(zoo, path, **counts) == 0


def test_what_is_held_out_shares_no_task_with_what_is_learned_from(
    made: tuple[Path, Path, Prior, list[dict[str, object]]],
) -> None:
    zoo, _, _, _ = made
    measured = gather(zoo, read_rows(zoo / "merges.jsonl"))
    count = 0
    for train, test in (*rounds(measured, 4), *splits(measured)):
        seen = {t for i in train for t in measured.slots[i]}
        asked = {t for i in test for t in measured.slots[i]}
        assert not seen & asked
        count += len(test)
    assert count > 0
    tested = [i for _, test in rounds(measured, 1) for i in test]
    assert len(tested) == len(set(tested))
    assert sorted(t for g in GROUPS for t in g) == sorted(t for f in FOLDS for t in f) == list(range(16))


def test_held_out_merges_have_no_part_in_their_predictions(
    made: tuple[Path, Path, Prior, list[dict[str, object]]],
) -> None:
    """Outcomes of merges of some tasks may be anything: predictions of merges of these tasks do not move."""
    zoo, _, _, _ = made
    measured = gather(zoo, read_rows(zoo / "merges.jsonl"))
    plan = {**PLAN, **SMALL}
    before = held_out(measured, plan)
    held = measured.groups[int(np.flatnonzero(np.isfinite(measured.means(before)[:, 0]))[0])]
    touched = np.array([bool(g & held) for g in measured.groups])
    changed = measured.y.copy()
    changed[touched[measured.sets]] = 0.123
    after = held_out(Measured(**{**{f: getattr(measured, f) for f in measured.__dataclass_fields__}, "y": changed}),
                     plan)  # fmt: skip
    same = np.array([g == held for g in measured.groups])[measured.sets] & np.isfinite(before[:, 0])
    assert same.any()
    assert after[same] == pytest.approx(before[same])
    others = ~touched[measured.sets] & np.isfinite(before[:, 0])
    assert not others.any() or not np.allclose(after[others], before[others])


def test_pairs_without_a_common_base_are_told_apart(made: tuple[Path, Path, Prior, list[dict[str, object]]]) -> None:
    zoo, _, _, _ = made
    rows = read_rows(zoo / "merges.jsonl")
    strange = gather_strangers(zoo, rows)
    assert len(strange.merges) == SMALL["strangers"]
    bases = {f.name for f in families(zoo)}
    assert {part for name, _ in strange.merges for part in name.split(" | ")} == bases
    assert np.isfinite(strange.x).all()
    assert np.isfinite(strange.y).all()
    assert not {name for name, _ in gather(zoo, rows).merges} - bases


def test_intervals_are_of_other_tasks_alone() -> None:
    """On outcomes that are predicted but for noise, intervals hold nine times in ten."""
    rng = np.random.default_rng(0)
    slots = [frozenset(int(x) for x in rng.choice(16, 2, replace=False)) for _ in range(1500)]
    predicted = rng.uniform(0.5, 0.95, 1500)
    truth = np.minimum(predicted + 0.05 * rng.standard_normal(1500), 1.05)
    from weightspace.mergeability.outcome import link

    measured = Measured(
        {}, {}, tuple(("f", (0, 1)) for _ in slots), tuple(slots), ("linear",), np.zeros((1500, 1)),
        truth[:, None], np.arange(1500), truth[:, None],
    )  # fmt: skip
    assert np.nanmean(coverage(measured, link(predicted)[:, None], 0)) == pytest.approx(0.9, abs=0.03)


def test_a_plan_that_makes_no_sense_is_refused(
    made: tuple[Path, Path, Prior, list[dict[str, object]]], tmp_path: Path
) -> None:
    zoo, _, _, _ = made
    with pytest.raises(WeightspaceError, match="no entry 'leafs'"):
        make(zoo, zoo / "merges.jsonl", tmp_path, plan={"leafs": 3})
    with pytest.raises(WeightspaceError, match="lower `least`"):
        make(zoo, zoo / "merges.jsonl", tmp_path, plan={**SMALL, "least": 1000}, measure_more=False)
    assert not list(tmp_path.iterdir())


def test_the_command_makes_the_model_from_what_is_there(
    made: tuple[Path, Path, Prior, list[dict[str, object]]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    zoo, _, _, table = made
    shutil.copytree(zoo, tmp_path / "models" / "merging")
    monkeypatch.chdir(tmp_path)
    given = [part for name, value in SMALL.items() for part in ("--set", f"{name}={value}")]
    found = CliRunner().invoke(app, ["train", "merge", *given, "--json"])
    assert found.exit_code == 0, found.output
    figures = json.loads(found.stdout)["figures"]
    assert [r["method"] for r in figures] == [r["method"] for r in table]
    assert figures[0]["error"] == pytest.approx(float(str(table[0]["error"])))
    assert Prior.load(tmp_path / "runs" / "merge").methods == made[2].methods
