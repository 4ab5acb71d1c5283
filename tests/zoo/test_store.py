"""The index file: whole after any interruption, rows of embeddings never mixed up."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest

from weightspace.errors import ZooError
from weightspace.zoo.store import FileStamp, ModelRow, Store

STAMP = FileStamp(10, 20, "aa")


def _model(name: str, value: float, path: str | None = None) -> ModelRow:
    return ModelRow(name, path or name, "aa", {"name": name}, np.full(4, value, dtype=np.float32))


def _open(folder: Path, write: bool = True) -> Store:
    return Store(folder, 4, "test-1", write)


def test_what_is_put_comes_back(tmp_path: Path) -> None:
    store = _open(tmp_path)
    store.put("b", STAMP, "models", "", [_model("b!1", 1.0, "b"), _model("b!2", 2.0, "b")])
    store.put("a", STAMP, "models", "", [_model("a", 3.0)])
    store.put("c", STAMP, "failed", "truncated", [])
    store.close()
    store = _open(tmp_path, write=False)
    names, vectors = store.embeddings()
    assert names == ["a", "b!1", "b!2"]
    assert vectors[:, 0].tolist() == [3.0, 1.0, 2.0]
    assert store.outcomes("failed") == [("c", "truncated")]
    assert store.stamps() == {"a": STAMP, "b": STAMP, "c": STAMP}
    assert store.model("b!2") is not None
    assert store.model("b!3") is None


def test_rows_are_reused_and_never_shared(tmp_path: Path) -> None:
    store = _open(tmp_path)
    for i in range(5):
        store.put(f"m{i}", STAMP, "models", "", [_model(f"m{i}", i)])
    store.drop(["m1", "m3"])
    store.put("m2", STAMP, "models", "", [_model("m2", 20.0)])
    store.put("m5", STAMP, "models", "", [_model("m5", 5.0)])
    store.close()
    store = _open(tmp_path)
    store.put("m6", STAMP, "models", "", [_model("m6", 6.0)])
    names, vectors = store.embeddings()
    assert dict(zip(names, vectors[:, 0].tolist(), strict=True)) == {
        "m0": 0.0, "m2": 20.0, "m4": 4.0, "m5": 5.0, "m6": 6.0,
    }  # fmt: skip
    assert (tmp_path / "embeddings.f32").stat().st_size <= 6 * 16


def test_replacing_a_model_does_not_touch_its_committed_row(tmp_path: Path) -> None:
    store = _open(tmp_path)
    store.put("m", STAMP, "models", "", [_model("m", 1.0)])
    with pytest.raises(ZooError):
        store.put("m", STAMP, "models", "", [_model("m", 2.0), _model("m", 3.0)])  # the name is taken
    assert store.embeddings()[1][:, 0].tolist() == [1.0]


def test_an_index_of_other_embeddings_is_refused_to_read_and_emptied_to_write(tmp_path: Path) -> None:
    store = _open(tmp_path)
    store.put("m", STAMP, "models", "", [_model("m", 1.0)])
    store.close()
    with pytest.raises(ZooError, match="another version"):
        Store(tmp_path, 4, "test-2", write=False)
    assert Store(tmp_path, 4, "test-2", write=True).count() == 0


def test_a_damaged_index_is_a_clear_error(tmp_path: Path) -> None:
    (tmp_path / "index.sqlite").write_bytes(b"not a database" * 100)
    with pytest.raises(ZooError, match="delete the folder"):
        _open(tmp_path)
    with pytest.raises(ZooError, match="no index"):
        _open(tmp_path / "elsewhere", write=False)


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs SIGKILL")
def test_killed_while_writing_the_index_is_whole(tmp_path: Path) -> None:
    code = f"""
        import numpy as np
        from pathlib import Path
        from weightspace.zoo.store import FileStamp, ModelRow, Store
        store = Store(Path({str(tmp_path)!r}), 4, "test-1")
        i = 0
        while True:
            vector = np.full(4, i, dtype=np.float32)
            models = [ModelRow(f"m{{i % 50}}", f"m{{i % 50}}", "aa", {{"value": i}}, vector)]
            store.put(f"m{{i % 50}}", FileStamp(1, 1, "aa"), "models", "", models)
            print(i, flush=True)
            i += 1
    """
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    for line in process.stdout:
        if int(line) >= 120:
            break
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    store = _open(tmp_path)
    models = store.models()
    assert len(models) == 50
    for model in models:
        assert model.embedding.tolist() == [float(model.card["value"])] * 4
