"""``weightspace app``: start the explorer's server and wait for it to end."""

from __future__ import annotations

import ipaddress
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

from weightspace.errors import MissingExtraError, ZooError
from weightspace.explorer.server import VARIABLE
from weightspace.explorer.uploads import LARGEST, private_folder
from weightspace.paths import data_dir

_THEME = {
    "theme.light.primaryColor": "#2F6DB5", "theme.dark.primaryColor": "#4A84C4", "theme.baseRadius": "small",
    "theme.light.backgroundColor": "#FFFFFF", "theme.light.secondaryBackgroundColor": "#F4F6F8",
    "theme.dark.backgroundColor": "#14171B", "theme.dark.secondaryBackgroundColor": "#1E2329",
    "theme.light.textColor": "#24292F", "theme.dark.textColor": "#E6E9ED",
    "theme.headingFontSizes": '["1.75rem","1.35rem","1.15rem"]', "theme.headingFontWeights": "600",
}  # fmt: skip


def nearby() -> Path | None:
    """The present folder or ``models/starter`` in it, if it is indexed: what to open where nothing is named."""
    from weightspace.zoo import Zoo

    for folder in (Path(), Path("models/starter")):
        if folder.is_dir() and (Zoo(folder).index_folder / "index.sqlite").is_file():
            return folder.resolve()
    return None


def is_local(host: str) -> bool:
    """Whether an address is this machine's own, which nobody else can reach."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def free_port(host: str, wanted: int | None) -> int:
    """The port that was asked for, or the first free one from 8501. Raises ``ZooError`` for one that is taken."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    for port in [wanted] if wanted is not None else range(8501, 8601):
        with socket.socket(family, socket.SOCK_STREAM) as one:
            one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                one.bind((host, port))
                return port
            except OSError as error:
                if wanted is not None:
                    raise ZooError(f"port {wanted} of {host} cannot be used ({error.strerror}); name another") from None
    raise ZooError(f"no port from 8501 to 8600 of {host} is free; name one with --port")


def command(port: int, host: str, headless: bool) -> list[str]:
    """The command that runs the server."""
    options = {
        "server.port": str(port), "server.address": host, "server.headless": str(headless).lower(),
        "server.maxUploadSize": str(LARGEST), "server.fileWatcherType": "none", "browser.gatherUsageStats": "false",
        "client.showErrorDetails": "none", "client.showErrorLinks": "false", "client.toolbarMode": "viewer",
        "server.showEmailPrompt": "false", "runner.magicEnabled": "false",
        "browser.serverAddress": "localhost" if is_local(host) else host, **_THEME,
    }  # fmt: skip
    flags = [part for name, value in options.items() for part in (f"--{name}", value)]
    return [sys.executable, "-m", "streamlit", "run", str(data_dir("app") / "serve.py"), *flags]


def launch(zoo: Path | None, port: int | None = None, host: str = "127.0.0.1", headless: bool = False) -> int:
    """Serve the explorer on a folder until it is stopped; the exit code of the server.

    Raises ``MissingExtraError`` without Streamlit and ``ZooError`` for a folder or a port that cannot be used.
    """
    if find_spec("streamlit") is None:
        raise MissingExtraError("streamlit", "app", "the explorer")
    if zoo is not None and not zoo.is_dir():
        raise ZooError(f"{zoo} is not a folder; the explorer opens a folder of model files, or none")
    chosen = free_port(host, port)
    private = private_folder()
    told = {"zoo": None if zoo is None else str(zoo.resolve()), "private": str(private), "local": is_local(host)}
    shown = f"[{host}]" if ":" in host else host
    print(f"weightspace explorer on http://{shown}:{chosen} (Ctrl+C ends it)", flush=True)
    if not is_local(host):
        print("other machines can reach it: whoever can, sees the models of this zoo", file=sys.stderr, flush=True)
    process = subprocess.Popen(command(chosen, host, headless), env={**os.environ, VARIABLE: json.dumps(told)})
    # Ended by a service manager it cleans up as it does after Ctrl+C.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        return process.wait()
    except KeyboardInterrupt:
        process.terminate()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
        return 0
    finally:
        if process.poll() is None:
            process.terminate()
            try:
                process.wait(5)
            except subprocess.TimeoutExpired:
                process.kill()
        shutil.rmtree(private, ignore_errors=True)


__all__ = ["command", "free_port", "is_local", "launch", "nearby"]
