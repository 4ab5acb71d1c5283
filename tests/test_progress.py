"""Bars: names of files are drawn as they are, whatever is in them."""

from __future__ import annotations

import pytest

from weightspace.progress import bar


def test_names_are_no_markup_and_no_control_characters(capfd: pytest.CaptureFixture[str]) -> None:
    with bar("reading [/b]\x1b[2J", 2) as step:
        step("[/red]\x1b]0;owned\x07.safetensors")
        step("[bold")
    assert "owned\x07" not in capfd.readouterr().err
