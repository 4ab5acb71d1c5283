"""Indexing a folder: what is found, skipped, dropped, refused, and what survives a kill."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import weightspace as ws
from weightspace.errors import ZooError


def _mlp(seed: int, hidden: int = 8) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, hidden), nn.ReLU(), nn.Linear(hidden, 3))


def _permuted(state: dict[str, torch.Tensor], seed: int) -> dict[str, torch.Tensor]:
    p = torch.randperm(state["0.bias"].numel(), generator=torch.Generator().manual_seed(seed))
    return {
        "0.weight": state["0.weight"][p].contiguous(),
        "0.bias": state["0.bias"][p].contiguous(),
        "2.weight": state["2.weight"][:, p].contiguous(),
        "2.bias": state["2.bias"],
    }


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    root = tmp_path / "models"
    (root / "deep" / "er").mkdir(parents=True)
    for seed in range(3):
        save_file(_mlp(seed).state_dict(), root / f"net-{seed}.safetensors")
    torch.save({"state_dict": _mlp(0).state_dict(), "epoch": 3}, root / "deep" / "same-as-0.pth")
    save_file(_permuted(_mlp(1).state_dict(), 5), root / "deep" / "er" / "permuted-1.bin")
    (root / "notes.txt").write_text("no checkpoint\n")
    (root / "broken.safetensors").write_bytes((root / "net-0.safetensors").read_bytes()[:200])
    return root


def test_every_model_is_found_by_its_content(folder: Path) -> None:
    zoo = ws.Zoo(folder)
    report = zoo.index(jobs=1, progress=False)
    assert (report.models, report.described) == (5, 5)
    assert [path for path, _ in report.failures] == ["broken.safetensors"]
    assert [path for path, _ in report.ignored] == ["notes.txt"]
    assert zoo.failures() == list(report.failures)
    assert report.index == folder / ".weightspace"
    table = zoo.table()
    assert sorted(table.index) == [
        "deep/er/permuted-1.bin", "deep/same-as-0.pth", "net-0.safetensors", "net-1.safetensors",
        "net-2.safetensors",
    ]  # fmt: skip
    assert set(table["parameters"]) == {83}


def test_copies_are_at_distance_zero_and_others_are_not(folder: Path) -> None:
    zoo = ws.Zoo(folder)
    zoo.index(jobs=1, progress=False)
    for query, copy in (
        ("net-0.safetensors", "deep/same-as-0.pth"),
        ("net-1.safetensors", "deep/er/permuted-1.bin"),
    ):
        nearest, second = zoo.similar(folder / query, k=2)
        assert nearest.name == copy
        assert nearest.distance < 1e-5 < 1e-2 < second.distance
        assert zoo.similar(query, k=2) == [nearest, second]
    from_memory = zoo.similar(_permuted(_mlp(2).state_dict(), 1), k=1)[0]
    assert (from_memory.name, from_memory.distance < 1e-5) == ("net-2.safetensors", True)
    assert from_memory.path.is_file()


def test_a_model_from_elsewhere_can_be_asked_about(folder: Path, tmp_path: Path) -> None:
    zoo = ws.Zoo(folder)
    zoo.index(jobs=1, progress=False)
    outside = tmp_path / "outside.pt"
    torch.save(_mlp(2).state_dict(), outside)
    assert zoo.similar(outside, k=1)[0].name == "net-2.safetensors"
    with pytest.raises(ZooError, match="neither a file nor the name"):
        zoo.similar("nothing-here")


def test_unchanged_files_are_skipped_changed_ones_described_and_lost_ones_dropped(folder: Path) -> None:
    zoo = ws.Zoo(folder)
    zoo.index(jobs=1, progress=False)
    again = zoo.index(jobs=1, progress=False)
    assert (again.described, again.unchanged, again.models) == (0, 7, 5)

    os.utime(folder / "net-0.safetensors", ns=(1, 1))  # a new time, the same content: the hash decides
    touched = zoo.index(jobs=1, progress=False)
    assert (touched.described, touched.unchanged) == (0, 6)
    assert zoo.index(jobs=1, progress=False).unchanged == 7

    save_file(_mlp(9).state_dict(), folder / "net-0.safetensors")
    (folder / "net-2.safetensors").unlink()
    shutil.copy(folder / "net-1.safetensors", folder / "broken.safetensors")
    changed = zoo.index(jobs=1, progress=False)
    assert (changed.described, changed.removed, changed.models, changed.failures) == (2, 1, 5, ())
    assert zoo.similar("net-1.safetensors", k=1)[0].distance < 1e-5
    assert zoo.similar("deep/same-as-0.pth", k=1)[0].distance > 1e-2


def test_force_describes_everything_anew(folder: Path) -> None:
    zoo = ws.Zoo(folder)
    zoo.index(jobs=1, progress=False)
    assert zoo.index(jobs=1, progress=False, force=True).described == 5


def test_worker_processes_give_the_same_index(folder: Path, tmp_path: Path) -> None:
    one, two = ws.Zoo(folder, index=tmp_path / "one"), ws.Zoo(folder, index=tmp_path / "two")
    one.index(jobs=1, progress=False)
    two.index(jobs=2, progress=False)
    names, vectors = one.embeddings()
    assert names == two.embeddings()[0]
    assert (vectors == two.embeddings()[1]).all()


def test_a_link_out_of_the_zoo_is_not_followed(folder: Path, tmp_path: Path) -> None:
    outside = tmp_path / "secret.safetensors"
    save_file(_mlp(7).state_dict(), outside)
    (folder / "link.safetensors").symlink_to(outside)
    report = ws.Zoo(folder).index(jobs=1, progress=False)
    assert report.models == 5


def test_a_folder_that_cannot_be_written_to_is_indexed_in_the_cache(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WEIGHTSPACE_CACHE", str(tmp_path / "cache"))
    folder.chmod(0o555)
    zoo = ws.Zoo(folder)
    report = zoo.index(jobs=1, progress=False)
    assert report.index.is_relative_to(tmp_path / "cache")
    assert not (folder / ".weightspace").exists()
    assert ws.Zoo(folder).similar("net-1.safetensors", k=1)[0].distance < 1e-5
    folder.chmod(0o755)


def test_an_index_that_came_along_with_a_read_only_folder_can_be_asked(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WEIGHTSPACE_CACHE", str(tmp_path / "cache"))
    ws.Zoo(folder).index(jobs=1, progress=False)
    folder.chmod(0o555)
    zoo = ws.Zoo(folder)
    assert zoo.index_folder == folder / ".weightspace"
    assert zoo.similar("net-1.safetensors", k=1)[0].distance < 1e-5
    assert zoo.index(jobs=1, progress=False).index.is_relative_to(tmp_path / "cache")
    folder.chmod(0o755)


def test_two_at_once_are_told_apart(folder: Path) -> None:
    from filelock import FileLock

    zoo = ws.Zoo(folder)
    zoo.index_folder.mkdir()
    with FileLock(zoo.index_folder / "lock"), pytest.raises(ZooError, match="another process"):
        zoo.index(jobs=1, progress=False)


def test_questions_without_an_index_say_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(ZooError, match="weightspace index"):
        ws.Zoo(tmp_path).table()
    with pytest.raises(ZooError, match="not a folder"):
        ws.Zoo(tmp_path / "missing")


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs SIGKILL")
def test_killed_and_started_again_it_goes_on(tmp_path: Path) -> None:
    root = tmp_path / "many"
    root.mkdir()
    for seed in range(120):
        save_file(_mlp(seed, hidden=16).state_dict(), root / f"net-{seed:03d}.safetensors")
    code = f"import weightspace as ws; ws.Zoo({str(root)!r}).index(jobs=1, progress=False)"
    process = subprocess.Popen([sys.executable, "-c", code])
    index = root / ".weightspace" / "embeddings.f32"
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and (not index.exists() or index.stat().st_size < 5 * 4 * 100):
        assert process.poll() is None, "the index was done before it could be killed"
        time.sleep(0.005)
    process.kill()
    process.wait()
    zoo = ws.Zoo(root)
    before = len(zoo.embeddings()[0])
    assert 0 < before < 120
    report = zoo.index(jobs=1, progress=False)
    assert (report.unchanged, report.described, report.models) == (before, 120 - before, 120)
