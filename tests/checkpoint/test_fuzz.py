"""Damaged files of every format: only a `WeightspaceError` may come out, soon; and the damage found so far."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.checkpoint import fixtures
from tests.checkpoint.mutate import mutate, survive

CORPUS = Path(__file__).parent.parent / "corpus"
SECONDS = 2.0


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("originals")
    for name in fixtures.available():
        fixtures.write(name, folder)[0].rename(folder / name)
    return folder


@pytest.mark.parametrize("name", fixtures.FORMATS)
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 2**40))
def test_damaged_files(name: str, seed: int, originals: Path, tmp_path: Path) -> None:
    if not (originals / name).exists():
        pytest.skip(f"the package {fixtures.FORMATS[name][3]} is not installed")
    path = tmp_path / "damaged"
    path.write_bytes(mutate((originals / name).read_bytes(), seed))
    begin = time.process_time()
    survive(path)
    assert time.process_time() - begin < SECONDS


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    start=st.sampled_from(
        [
            b"",
            b"PK\x03\x04",
            b"\x80\x02",
            b"\x80\x04",
            b"GGUF\x03\0\0\0",
            b"\x93NUMPY\x01\0",
            b"\x08\x08\x3a",
            b"\x81\xa1a",
        ]
    ),
    body=st.binary(max_size=300),
)
def test_arbitrary_bytes(start: bytes, body: bytes, tmp_path: Path) -> None:
    path = tmp_path / "bytes"
    path.write_bytes(start + body)
    survive(path)


@pytest.mark.parametrize("path", sorted(p for p in CORPUS.glob("*") if p.suffix != ".md"), ids=lambda p: p.name)
def test_corpus(path: Path) -> None:
    begin = time.process_time()
    survive(path)
    assert time.process_time() - begin < SECONDS
