"""``python -m weightspace.pretrained`` from populations to files and model card, with metanets as small as can be."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from weightspace.errors import MetanetError
from weightspace.metanets.data import load_samples
from weightspace.pretrained import __main__ as command
from weightspace.pretrained.evaluation import mean_recalls
from weightspace.pretrained.model import CARD, Shipped, shipped
from weightspace.pretrained.networks import cleaned
from weightspace.pretrained.recipe import load
from weightspace.zoo.populations import build_sampled
from weightspace.zoo.recipe import parse

POPULATION = {
    "data": {"name": "digits", "train": 200, "test": 200},
    "defaults": {
        "epochs": 2, "checkpoints": [1, 2], "batch": 50,
        "hyper": {"learning_rate": {"log_uniform": [1e-3, 3e-2]}, "initialiser": {"choice": ["default", "he_normal"]}},
    },
    "population": [{"name": "net", "runs": 24, "network": {"kind": "mlp", "widths": [6], "activation": "relu"}}],
}  # fmt: skip
RECIPE = """
fractions = [0.5, 0.15, 0.2, 0.15]
components = 4
mixtures = [[1.0, 0.0], [1.0, 1.0]]
[encoder]
task = "contrastive"
target = ""
metanet = { kind = "operator", width = 4, rounds = 1, probes = 0 }
embedding = 8
epochs = 1
augmentation = { noise = 0.3 }
[accuracy]
task = "regression"
target = "test_accuracy"
metanet = { kind = "operator", width = 4, rounds = 1, probes = 2 }
epochs = 1
[[source]]
recipe = "learned"
[[source]]
recipe = "held"
held_out = true
"""


@pytest.fixture(scope="module")
def zoos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("zoos")
    for name in ("learned", "held"):
        build_sampled(parse({"name": name, **POPULATION}), folder / name, progress=False)
    return folder


def test_the_command_makes_files_that_can_be_read(
    zoos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "recipe.toml").write_text(RECIPE)
    out, options = tmp_path / "out", {"--recipe": tmp_path / "recipe.toml", "--zoos": zoos, "--work": tmp_path / "work"}
    monkeypatch.setattr("sys.argv", ["pretrained", *(f"{k}={v}" for k, v in options.items()), f"--out={out}"])
    threads = torch.get_num_threads()
    try:
        assert command.main() == 0
    finally:
        torch.set_num_threads(threads)
    card = (out / CARD).read_text()
    assert capsys.readouterr().out.strip() == card.strip()
    assert "of 2 pairs the one that found most among validation runs" in " ".join(card.split())
    model = Shipped.load(out)
    assert model.name in card
    sample = cleaned(load_samples(zoos / "held")[0])
    reading = model.read(sample.graph, force=True)
    assert reading.vector is not None
    assert len(reading.vector) == model.dimension


def test_mixtures_differ_in_what_they_find(zoos: Path) -> None:
    samples = [cleaned(s, "held") for s in load_samples(zoos / "held")]
    code, place, both = mean_recalls(shipped(), samples, [(1.0, 0.0), (0.0, 1.0), (1.0, 1.0)])
    assert len({code, place, both}) > 1
    assert 0 <= min(code, place, both) <= max(code, place, both) <= 1
    # A mixture counts up to a factor only.
    assert mean_recalls(shipped(), samples, [(3.0, 3.0)]) == [both]


@pytest.mark.parametrize("wrong", ["[]", "[[0.0, 0.0]]", "[[1.0, -1.0]]", "[1.0, 2.0]", "[[1.0]]"])
def test_mixtures_that_make_no_sense_are_refused(wrong: str, tmp_path: Path) -> None:
    path = tmp_path / "recipe.toml"
    path.write_text(RECIPE.replace("[[1.0, 0.0], [1.0, 1.0]]", wrong))
    with pytest.raises(MetanetError, match=r"mixtures|TypeError|ValueError"):
        load(path)
