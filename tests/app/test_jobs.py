"""Jobs: results, errors as sentences, progress, cancel that kills, one job per key."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from weightspace.errors import ZooError
from weightspace.explorer.jobs import Jobs, key_of
from weightspace.explorer.worker import sentence
from weightspace.progress import bar, listening


@pytest.fixture(scope="module")
def jobs() -> Iterator[Jobs]:
    made = Jobs(1)
    yield made
    made.close()


def test_a_result_comes_back_and_is_kept_under_its_key(jobs: Jobs) -> None:
    one = jobs.submit("k", "join", "posixpath:join", "a", "b")
    assert one.wait(60)
    assert (one.state, one.result) == ("done", "a/b")
    assert jobs.submit("k", "join", "posixpath:join", "other", "arguments") is one


def test_an_error_of_ours_is_its_sentence_and_another_one_has_no_traceback(jobs: Jobs, tmp_path: Path) -> None:
    ours = jobs.submit("ours", "index", "weightspace.explorer.models:index", str(tmp_path / "nowhere"))
    other = jobs.submit("other", "divide", "operator:truediv", 1, 0)
    assert ours.wait(60)
    assert other.wait(60)
    assert ours.error.endswith("is not a folder; a zoo is a folder of model files")
    assert "ZeroDivisionError" in other.error
    assert "\n" not in other.error


def test_what_did_not_end_well_is_begun_anew(jobs: Jobs) -> None:
    failed = jobs.submit("again", "divide", "operator:truediv", 1, 0)
    assert failed.wait(60)
    fine = jobs.submit("again", "divide", "operator:truediv", 6, 3)
    assert fine.wait(60)
    assert fine.result == 2


def test_cancel_kills_the_process_and_the_next_job_runs(jobs: Jobs) -> None:
    long = jobs.submit("long", "sleep", "time:sleep", 600)
    while long.state == "waiting":
        time.sleep(0.01)
    process = long._process
    assert process is not None
    jobs.cancel(long)
    assert long.wait(5)
    assert long.state == "cancelled"
    assert process.wait(10) != 0
    after = jobs.submit("after", "add", "operator:add", 1, 2)
    assert after.wait(60)
    assert after.result == 3


def test_a_process_that_dies_is_a_sentence(jobs: Jobs) -> None:
    dead = jobs.submit("dead", "abort", "os:abort")
    assert dead.wait(60)
    assert "died" in dead.error


def test_what_cannot_be_sent_to_a_process_is_a_sentence_and_ends_the_job(jobs: Jobs) -> None:
    stuck = jobs.submit("lock", "send a lock", "builtins:str", threading.Lock())
    assert stuck.wait(60)
    assert stuck.state == "failed"
    assert "pickle" in stuck.error
    after = jobs.submit("after a lock", "add", "operator:add", 1, 2)
    assert after.wait(60)
    assert after.result == 3


def test_the_library_tells_its_progress_to_a_listener_and_draws_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    heard = []
    with listening(lambda *told: heard.append(told)), bar("work", 2, show=True) as step:
        step("one")
        step("two")
    assert heard == [("work", 0, 2, ""), ("work", 1, 2, "one"), ("work", 2, 2, "two")]
    assert capfd.readouterr() == ("", "")


def test_sentences() -> None:
    assert sentence(ZooError("a  b\nc")) == "a b c"
    assert "memory" in sentence(MemoryError())
    assert "No such file" in sentence(FileNotFoundError(2, os.strerror(2), "x"))


def test_keys_tell_contents_and_options_apart() -> None:
    assert key_of("f", "hash", 1) == key_of("f", "hash", 1)
    assert len({key_of("f", "hash", 1), key_of("f", "hash", 2), key_of("g", "hash", 1), key_of("f", "other", 1)}) == 4
