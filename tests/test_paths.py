from __future__ import annotations

from pathlib import Path
from typing import BinaryIO

import pytest

from weightspace.errors import WeightspaceError
from weightspace.paths import cache_dir, data_dir, whole, write_whole


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


def test_a_file_is_replaced_whole(tmp_path: Path) -> None:
    target = tmp_path / "file"
    assert write_whole(target, b"first") == target
    write_whole(str(target), lambda stream: stream.write(b"second"))
    assert target.read_bytes() == b"second"
    (tmp_path / "plain").write_bytes(b"")
    assert target.stat().st_mode == (tmp_path / "plain").stat().st_mode
    assert {path.name for path in tmp_path.iterdir()} == {"file", "plain"}


def test_a_writing_that_fails_leaves_what_was_there(tmp_path: Path) -> None:
    target = tmp_path / "file"
    write_whole(target, b"first")

    def stopped(stream: BinaryIO) -> None:
        stream.write(b"half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_whole(target, stopped)
    assert target.read_bytes() == b"first"
    assert list(tmp_path.iterdir()) == [target]


def test_a_folder_appears_at_once_and_the_first_stays(tmp_path: Path) -> None:
    target = tmp_path / "folder"
    for text in ("first", "second"):
        with whole(target) as temporary:
            temporary.mkdir()
            (temporary / "file").write_text(text)
    assert (target / "file").read_text() == "first"
    assert list(tmp_path.iterdir()) == [target]


def test_a_folder_that_fails_leaves_nothing(tmp_path: Path) -> None:
    def made(target: Path) -> None:
        with whole(target) as temporary:
            temporary.mkdir()
            (temporary / "file").write_text("half")
            raise ValueError("half")

    with pytest.raises(ValueError, match="half"):
        made(tmp_path / "other")
    assert not list(tmp_path.iterdir())
