"""The descriptor on the real checkpoints beside the project; skipped where they are not there."""

from __future__ import annotations

import importlib.util
import shutil
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]
SHARED = ROOT.parent / "shared" / "checkpoints"

pytestmark = pytest.mark.skipif(not SHARED.is_dir(), reason=f"the real checkpoints are not at {SHARED}")


def _benchmark() -> ModuleType:
    path = ROOT / "tests" / "benchmarks" / "retrieval.py"
    spec = importlib.util.spec_from_file_location("retrieval_benchmark", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


bench = _benchmark()


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> object:
    """A zoo of the related families and a few strangers, small enough for a test."""
    folder = tmp_path_factory.mktemp("zoo")
    for name in ("burn-mnist", "textgenrnn", "fer-trajectory", "mnist-mlp", "crepe", "honk"):
        shutil.copytree(SHARED / name, folder / name)
    (folder / "inr-orbit").mkdir()
    for file in sorted((SHARED / "inr-orbit").iterdir())[:24]:
        shutil.copy(file, folder / "inr-orbit" / file.name)
    pytest.importorskip("h5py", reason="the keras extra reads the .hdf5 files")
    return bench.embed(folder, jobs=1)


@pytest.mark.slow
@pytest.mark.parametrize("question", ["burn_pair", "orbit", "children", "trajectory"])
def test_related_models_are_found(zoo: object, question: str) -> None:
    result, holds = getattr(bench, question)(zoo)
    assert holds, result


@pytest.mark.slow
@pytest.mark.parametrize("question", ["permuted_copies", "same_function"])
def test_permuted_copies_are_their_own_nearest(zoo: object, question: str) -> None:
    result, holds = getattr(bench, question)(zoo, orbit_sample=2)
    assert holds, result


@pytest.mark.slow
def test_another_format_of_the_same_net_is_at_distance_zero(zoo: object) -> None:
    result, holds = bench.resaved(zoo, SHARED)
    assert holds, result
