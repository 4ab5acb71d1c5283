from __future__ import annotations

from pathlib import Path

import pytest

from weightspace.errors import WeightspaceError
from weightspace.paths import cache_dir, data_dir


def test_catalogues_are_found() -> None:
    assert (data_dir("zoo") / "starter.toml").is_file()
    assert list(data_dir("graphs").glob("*.py"))


def test_a_folder_that_is_not_there_is_an_error() -> None:
    with pytest.raises(WeightspaceError, match="nowhere"):
        data_dir("nowhere")


def test_the_cache_can_be_moved(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("WEIGHTSPACE_CACHE", str(tmp_path / "cache"))
    assert cache_dir() == (tmp_path / "cache").resolve()
    assert not cache_dir().exists()
