"""Subpackages that are verbs as well: ``ws.wiring(x)`` beside ``weightspace.wiring.proof``."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any


def make_callable(module: str, verb: Callable[..., Any]) -> None:
    """Calling the module calls the verb; everything else of the module stays as it is."""

    class CallableModule(ModuleType):
        __call__ = staticmethod(verb)

    CallableModule.__doc__ = verb.__doc__
    sys.modules[module].__class__ = CallableModule
