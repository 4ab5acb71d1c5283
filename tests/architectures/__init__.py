"""Small architectures, each with its symmetries known from theory."""

from __future__ import annotations

from . import attention_nets, torch_nets, transformers_nets
from .registry import CASES, Case, Theory

__all__ = ["CASES", "Case", "Theory", "attention_nets", "torch_nets", "transformers_nets"]
