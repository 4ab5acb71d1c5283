"""A process that does long work for the explorer: ``python -m weightspace.explorer.worker``.

It reads tasks from standard input and writes events to standard output, each a pickle behind its length in eight bytes.
A task is ``(name of a function, positional arguments)``; events are ``("progress", title, done, total, word)``, and at
the end ``("result", value)`` or ``("error", sentence)``. When standard input closes, the process and all that it
started end: the explorer cancels by killing it, and cannot leave it behind.
"""

from __future__ import annotations

import contextlib
import logging
import os
import pickle
import queue
import signal
import struct
import sys
import threading
import time
from importlib import import_module
from typing import Any, BinaryIO

from weightspace.errors import WeightspaceError
from weightspace.progress import listening

_log = logging.getLogger(__name__)
_SELDOM = 0.05
"""Seconds between two words about progress."""


def write_message(stream: BinaryIO, message: Any) -> None:
    """A pickle behind its length."""
    data = pickle.dumps(message, protocol=pickle.HIGHEST_PROTOCOL)
    stream.write(struct.pack(">Q", len(data)) + data)
    stream.flush()


def read_message(stream: BinaryIO) -> Any:
    """The next message; raises ``EOFError`` where there is none."""
    head = _exactly(stream, 8)
    return pickle.loads(_exactly(stream, struct.unpack(">Q", head)[0]))


def _exactly(stream: BinaryIO, count: int) -> bytes:
    parts = []
    while count:
        part = stream.read(count)
        if not part:
            raise EOFError
        parts.append(part)
        count -= len(part)
    return b"".join(parts)


def resolve(name: str) -> Any:
    """The function called ``"package.module:function"``."""
    module, _, attribute = name.partition(":")
    return getattr(import_module(module), attribute)


def sentence(error: BaseException) -> str:
    """What went wrong in words for a user; an error of our own already is a sentence."""
    text = " ".join(str(error).split())
    if isinstance(error, WeightspaceError):
        return text
    if isinstance(error, MemoryError):
        return "there was not enough memory for this; close other programs, or choose a smaller model"
    if isinstance(error, OSError):
        return f"a file could not be read or written: {text}"
    return f"this failed unexpectedly ({type(error).__name__}: {text[:300] or 'no details'}); the server's log has more"


def do(name: str, arguments: tuple[Any, ...], out: BinaryIO) -> None:
    """Call a function and tell of its progress and its end."""
    last = 0.0

    def tell(title: str, done: int, total: int, word: str) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last > _SELDOM or done in (0, total):
            last = now
            write_message(out, ("progress", title, done, total, word))

    try:
        with listening(tell):
            event = ("result", resolve(name)(*arguments))
    except Exception as error:
        if not isinstance(error, WeightspaceError):
            _log.exception("%s failed", name)
        event = ("error", sentence(error))
    try:
        write_message(out, event)
    except (pickle.PicklingError, TypeError, AttributeError) as error:
        write_message(out, ("error", sentence(error)))


def _end_everything() -> None:
    """This process and those it started (they are one group: see ``jobs``)."""
    if hasattr(os, "killpg") and os.getpgrp() == os.getpid():
        with contextlib.suppress(OSError):
            os.killpg(os.getpgrp(), signal.SIGKILL)
    os._exit(1)


def main() -> None:
    """Read tasks and do them, one after the other."""
    logging.basicConfig(stream=sys.stderr, format="%(asctime)s %(name)s: %(message)s")
    # What libraries print must not come between the messages.
    out = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    source = os.fdopen(os.dup(0), "rb")
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    tasks: queue.SimpleQueue[Any] = queue.SimpleQueue()

    def listen() -> None:
        try:
            while True:
                tasks.put(read_message(source))
        except (EOFError, OSError):
            _end_everything()

    threading.Thread(target=listen, daemon=True).start()
    write_message(out, ("ready",))
    # What nearly every task needs is there before the first one comes.
    for module in ("torch", "weightspace.card", "weightspace.wiring.entry", "weightspace.graph"):
        import_module(module)
    while True:
        name, arguments = tasks.get()
        do(name, arguments, out)


if __name__ == "__main__":
    main()
