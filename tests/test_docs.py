"""What the documents point to is there."""

from __future__ import annotations

import importlib.util
import re
import shlex
import sys
from pathlib import Path
from typing import Any

import pytest

import weightspace as ws

ROOT = Path(__file__).parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])


def anchors(page: Path) -> set[str]:
    """Anchors of a page's headings, as GitHub makes them."""
    heads = re.findall(r"(?m)^#+ (.+)$", page.read_text(encoding="utf-8"))
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if re.match(r"https?:", target):
            continue
        file, _, anchor = target.partition("#")
        found = (page.parent / file).resolve() if file else page
        assert found.exists(), f"{page.name} points to {target}"
        assert not anchor or anchor in anchors(found), f"{page.name} points to {target}; there are {anchors(found)}"


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_commands_are_there(page: Path) -> None:
    from typer.main import get_command

    from weightspace.cli import app

    text = page.read_text(encoding="utf-8")
    for script in re.findall(r"python ((?:tests|docs)/[\w/]+\.py)", text):
        assert (ROOT / script).is_file(), f"{page.name} names {script}"
    for block in re.findall(r"(?ms)^```(?:sh|bash|console)\n(.*?)^```", text):
        for line in re.findall(r"(?m)^(?:\$ )?weightspace (.+)$", block):
            words = shlex.split(line, comments=True)
            command: Any = get_command(app)
            while hasattr(command, "commands"):
                assert words[0] in command.commands, f"{page.name}: weightspace {line}"
                command = command.commands[words.pop(0)]
            options = {option for found in command.params for option in (*found.opts, *found.secondary_opts)}
            named = {word.partition("=")[0] for word in words if re.match(r"--?[a-z]", word)}
            assert named <= options | {"--help"}, f"{page.name}: weightspace {line} has no {named - options}"


def test_public_names_say_what_they_are() -> None:
    for name in ws.__all__:
        assert name.startswith("__") or (getattr(ws, name).__doc__ or "").strip(), name


def test_the_reference_covers_the_public_modules() -> None:
    spec = importlib.util.spec_from_file_location("reference", ROOT / "docs/reference.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    found = module.public_modules()
    assert "weightspace" in found
    assert "weightspace.metanets" in found
    assert "OperatorMetanet" in vars(sys.modules["weightspace.metanets"])
