"""Long work in processes of its own, with progress and cancel, each result kept under the hash of what it is of.

A job is a function's name and its arguments. ``Jobs.submit`` with a key that was asked for before gives the same job,
running or done; failed and cancelled ones are begun anew. Processes are kept warm between jobs and killed to cancel.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections import OrderedDict
from dataclasses import dataclass, field
from typing import Any, Literal

from weightspace.explorer.worker import read_message, sentence, write_message

State = Literal["waiting", "running", "done", "failed", "cancelled"]
_KEPT = 256
"""Finished jobs whose results are kept, the latest used."""
_IDLE = 2
"""Processes that wait for work."""


@dataclass(eq=False)
class Job:
    """One piece of work: ``state``, how far it is (``done`` of ``total`` steps of ``step``), and how it ended."""

    key: str
    title: str
    function: str
    arguments: tuple[Any, ...]
    state: State = "waiting"
    step: str = ""
    word: str = ""
    done: int = 0
    total: int = 0
    result: Any = None
    error: str = ""
    started: float = field(default_factory=time.time)
    seconds: float = 0.0
    _ended: threading.Event = field(default_factory=threading.Event, repr=False)
    _process: subprocess.Popen[bytes] | None = field(default=None, repr=False)

    @property
    def over(self) -> bool:
        return self.state in ("done", "failed", "cancelled")

    @property
    def share(self) -> float:
        """How much of the present step is done, 0 to 1."""
        return min(1.0, self.done / self.total) if self.total else 0.0

    def wait(self, seconds: float | None = None) -> bool:
        """Wait for the end, at most so long; whether it has come."""
        return self._ended.wait(seconds)


class Jobs:
    """The jobs of one server. ``slots``: how many run at once (default: one per core, 2 to 4)."""

    def __init__(self, slots: int | None = None) -> None:
        self._jobs: OrderedDict[str, Job] = OrderedDict()
        self._idle: list[subprocess.Popen[bytes]] = []
        self._lock = threading.Lock()
        self._room = threading.Semaphore(slots or min(4, max(2, os.cpu_count() or 1)))
        self._closed = False

    def submit(self, key: str, title: str, function: str, *arguments: Any) -> Job:
        """The job under ``key``, begun now if it is not known or did not end well."""
        with self._lock:
            known = self._jobs.get(key)
            if known is not None and known.state not in ("failed", "cancelled"):
                self._jobs.move_to_end(key)
                return known
            job = self._jobs[key] = Job(key, title, function, arguments)
            self._jobs.move_to_end(key)
            for old in [k for k, j in self._jobs.items() if j.over][: max(0, len(self._jobs) - _KEPT)]:
                del self._jobs[old]
        threading.Thread(target=self._run, args=(job,), daemon=True, name=f"job {title}").start()
        return job

    def known(self, key: str) -> Job | None:
        """The job under a key, whatever became of it."""
        with self._lock:
            return self._jobs.get(key)

    def forget(self, key: str) -> None:
        """Let the next ``submit`` of a key begin anew; a job that runs goes on."""
        with self._lock:
            self._jobs.pop(key, None)

    def running(self) -> list[Job]:
        """Jobs that wait or run, the oldest first."""
        with self._lock:
            return sorted((j for j in self._jobs.values() if not j.over), key=lambda j: j.started)

    def cancel(self, job: Job) -> None:
        """End a job now: its process is killed, with all that it started."""
        with self._lock:
            if job.over:
                return
            job.state = "cancelled"
            process = job._process
        if process is not None:
            _kill(process)
        job._ended.set()

    def warm(self) -> None:
        """Start a process before the first job needs it."""
        if not self._idle:
            self._give_back(_start())

    def close(self) -> None:
        """End every job and every process."""
        self._closed = True
        for job in self.running():
            self.cancel(job)
        with self._lock:
            idle, self._idle = self._idle, []
        for process in idle:
            _kill(process)

    def _run(self, job: Job) -> None:
        with self._room:
            process = self._take()
            with self._lock:
                if job.state != "waiting":
                    self._give_back(process, locked=True)
                    return
                job.state, job._process = "running", process
            started = time.monotonic()
            try:
                event = self._follow(job, process)
            except (EOFError, OSError, ValueError):
                event = ("error", "the process that worked on it died: out of memory, or a crash in native code")
                _kill(process)
            except Exception as error:
                # Whatever else goes wrong between the two processes: a job that never ends would block its page.
                event = ("error", sentence(error))
                _kill(process)
            job.seconds = time.monotonic() - started
            with self._lock:
                job._process = None
                if job.over:  # cancelled in the meantime
                    return
                if event[0] == "result":
                    job.state, job.result = "done", event[1]
                else:
                    job.state, job.error = "failed", event[1]
            job._ended.set()
            if process.poll() is None:
                self._give_back(process)

    def _follow(self, job: Job, process: subprocess.Popen[bytes]) -> tuple[Any, ...]:
        assert process.stdin is not None
        assert process.stdout is not None
        write_message(process.stdin, (job.function, job.arguments))  # type: ignore[arg-type]
        while True:
            event: tuple[Any, ...] = read_message(process.stdout)  # type: ignore[arg-type]
            if event[0] == "progress":
                _, job.step, job.done, job.total, job.word = event
            elif event[0] != "ready":
                return event

    def _take(self) -> subprocess.Popen[bytes]:
        with self._lock:
            while self._idle:
                process = self._idle.pop()
                if process.poll() is None:
                    return process
        return _start()

    def _give_back(self, process: subprocess.Popen[bytes], locked: bool = False) -> None:
        with contextlib.nullcontext() if locked else self._lock:
            if len(self._idle) < _IDLE and not self._closed:
                self._idle.append(process)
                return
        _kill(process)


def key_of(*parts: object) -> str:
    """A key from what decides a result: hashes of contents, names of functions, options."""
    return hashlib.sha256(repr(parts).encode()).hexdigest()


def _start() -> subprocess.Popen[bytes]:
    # A session of its own: it is killed with everything that it started.
    return subprocess.Popen(
        [sys.executable, "-m", "weightspace.explorer.worker"], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        start_new_session=True,
    )  # fmt: skip


def _kill(process: subprocess.Popen[bytes]) -> None:
    try:
        if hasattr(os, "killpg"):
            os.killpg(process.pid, signal.SIGKILL)
        else:
            process.kill()
    except OSError:
        pass
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(5)
    for stream in (process.stdin, process.stdout):
        if stream is not None:
            with contextlib.suppress(OSError):
                stream.close()
