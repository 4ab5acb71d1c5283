"""`import weightspace` is light: torch, and none of the packages that are imported on use."""

from __future__ import annotations

import json
import subprocess
import sys

import weightspace as ws

ON_USE = {
    "datasets", "filelock", "gguf", "h5py", "joblib", "keras", "lightning", "msgpack", "networkx", "onnx",
    "onnxruntime", "pandas", "plotly", "rich", "scipy", "sklearn", "streamlit", "torch_geometric",
    "transformers", "typer",
}  # fmt: skip


def _loaded_by(statement: str) -> set[str]:
    names = "sorted({m.partition('.')[0] for m in sys.modules})"
    code = f"import json, sys; {statement}; print(json.dumps({names}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(json.loads(done.stdout.splitlines()[-1]))


def test_import_loads_nothing_that_is_imported_on_use() -> None:
    beyond_torch = _loaded_by("import weightspace") - _loaded_by("import torch")
    assert not beyond_torch & ON_USE


def test_help_loads_neither_torch_nor_the_readers() -> None:
    loaded = _loaded_by("import weightspace.cli")
    assert not loaded & ({"torch", *ON_USE} - {"typer", "rich"})


def test_every_exported_name_resolves() -> None:
    for name in ws.__all__:
        assert getattr(ws, name) is not None
