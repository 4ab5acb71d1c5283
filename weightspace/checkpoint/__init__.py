"""Checkpoints: every format opened by content, lazily, executing nothing.

`open` gives a `Checkpoint`; `list_models` says what can be opened in a file or below a folder;
`from_tensors` wraps tensors in memory; `merge_adapter` puts a LoRA adapter on its base. A format is a
module with two functions (`weightspace.checkpoint.contents.Reader`), listed in
`weightspace.checkpoint.readers`.
"""

from __future__ import annotations

from weightspace.checkpoint.checkpoint import Checkpoint, from_tensors, list_models, open
from weightspace.checkpoint.contents import SeveralModelsError
from weightspace.checkpoint.peft import merge_adapter

__all__ = ["Checkpoint", "SeveralModelsError", "from_tensors", "list_models", "merge_adapter", "open"]
