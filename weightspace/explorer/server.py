"""What all pages of one server share: its jobs, its private folder, and what it was started with."""

from __future__ import annotations

import atexit
import json
import os
import shutil
import threading
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from weightspace.explorer.jobs import Jobs
from weightspace.explorer.uploads import private_folder

VARIABLE = "WEIGHTSPACE_EXPLORER"
"""Environment variable by which ``launch`` tells the server what it was started with, as JSON."""


@dataclass(frozen=True, eq=False)
class Server:
    """``zoo``: the folder it was started on, if any. ``private``: where uploads and results lie. ``local``: whether
    only this machine can reach it, so that any folder of the user's may be opened from a page."""

    jobs: Jobs
    private: Path
    zoo: Path | None
    local: bool


@lru_cache(maxsize=1)
def server() -> Server:
    """The one server of this process, made when it is first asked for."""
    told = json.loads(os.environ.get(VARIABLE) or "{}")
    jobs = Jobs()
    given = told.get("private")
    private = Path(given) if given else private_folder()
    if not given:
        atexit.register(shutil.rmtree, private, ignore_errors=True)
    atexit.register(jobs.close)
    threading.Thread(target=jobs.warm, daemon=True, name="warming").start()
    zoo = Path(told["zoo"]) if told.get("zoo") else None
    return Server(jobs, private, zoo, bool(told.get("local", True)))


__all__ = ["VARIABLE", "Server", "server"]
