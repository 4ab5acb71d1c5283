"""The mapping itself: laziness, isolation, hashes, saving, adapters, speed."""

from __future__ import annotations

import hashlib
import json
import pickle
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import weightspace as ws
from tests.checkpoint import fixtures
from weightspace.checkpoint import from_tensors, list_models, merge_adapter
from weightspace.errors import CheckpointError, UnknownFormatError, UnsafeCheckpointError


@pytest.mark.parametrize("suffix", [".safetensors", ".pt", ".pth"])
def test_saving_keeps_order_types_and_values(tmp_path: Path, suffix: str) -> None:
    values = {
        "z": torch.randn(3, 5).T,
        "a": torch.ones(2, dtype=torch.bfloat16),
        "half": torch.randn(7).half(),
        "eight": torch.randn(4).to(torch.float8_e5m2),
        "flag": torch.tensor([True, False]),
        "empty": torch.zeros(0, 4),
        "scalar": torch.tensor(3, dtype=torch.int64),
        "odd": torch.tensor([1, 2, 3], dtype=torch.uint8),
        "double": torch.randn(2).double(),
        "name/with:signs é": torch.ones(1),
    }
    target = tmp_path / f"model{suffix}"
    original = from_tensors(values, {"epoch": 4})
    assert original.save(target) == target
    assert [p.name for p in tmp_path.iterdir()] == [target.name]
    checkpoint = ws.open(target)
    assert list(checkpoint) == list(values)
    assert {n: checkpoint.dtype(n) for n in checkpoint} == {n: v.dtype for n, v in values.items()}
    assert checkpoint.content_hash() == original.content_hash()
    again = checkpoint.save(tmp_path / f"again{suffix}")
    assert ws.open(again).content_hash() == original.content_hash()


def test_other_programs_read_what_is_saved(tmp_path: Path) -> None:
    from safetensors import safe_open
    from safetensors.torch import load_file

    values = fixtures.tensors()
    checkpoint = from_tensors(values, {"epoch": 4, "note": "hello"})
    loaded = load_file(checkpoint.save(tmp_path / "a.safetensors"))
    assert all(torch.equal(loaded[name], value) for name, value in values.items())
    with safe_open(tmp_path / "a.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt", "epoch": "4", "note": "hello"}
    loaded = torch.load(checkpoint.save(tmp_path / "a.pt"), weights_only=True)
    assert list(loaded) == list(values)
    assert all(torch.equal(loaded[name], value) for name, value in values.items())
    with (tmp_path / "a.safetensors").open("rb") as raw:
        assert int.from_bytes(raw.read(8), "little") % 8 == 0


def test_a_failed_save_leaves_the_old_file(tmp_path: Path) -> None:
    target = tmp_path / "a.safetensors"
    from_tensors({"a": torch.ones(2)}).save(target)
    before = target.read_bytes()
    with pytest.raises(CheckpointError, match="complex128"):
        from_tensors({"a": torch.ones(2), "b": torch.ones(2, dtype=torch.complex128)}).save(target)
    assert target.read_bytes() == before
    assert list(tmp_path.iterdir()) == [target]
    with pytest.raises(CheckpointError, match=r"suffix '\.onnx'"):
        from_tensors({"a": torch.ones(2)}).save(tmp_path / "a.onnx")
    with pytest.raises(CheckpointError, match="folder"):
        from_tensors({"a": torch.ones(2)}).save(tmp_path / "missing" / "a.pt")


@pytest.mark.parametrize("size", [8, 500_000])
def test_writing_to_a_tensor_changes_nothing_else(tmp_path: Path, size: int) -> None:
    path = from_tensors({"a": torch.zeros(size), "b": torch.ones(size)}).save(tmp_path / "a.safetensors")
    before = hashlib.sha256(path.read_bytes()).hexdigest()
    checkpoint = ws.open(path)
    checkpoint["a"].add_(1)
    assert checkpoint["a"].sum() == 0
    assert checkpoint.sha256 == before == hashlib.sha256(path.read_bytes()).hexdigest()
    held = torch.zeros(size)
    from_tensors({"a": held})["a"].add_(1)
    assert held.sum() == 0


def test_a_file_that_changes_is_noticed(tmp_path: Path) -> None:
    path = from_tensors({"a": torch.zeros(8)}).save(tmp_path / "a.safetensors")
    checkpoint = ws.open(path)
    from_tensors({"a": torch.zeros(9)}).save(path)
    with pytest.raises(CheckpointError, match="changed since"):
        checkpoint["a"]


def test_mapping_and_representation(tmp_path: Path) -> None:
    path, _ = fixtures.write("pytorch_zip", tmp_path)
    checkpoint = ws.open(path)
    assert "layer.weight" in checkpoint
    assert "nothing" not in checkpoint
    with pytest.raises(KeyError, match=r"near: layer\.weight"):
        checkpoint["weight"]
    text = repr(checkpoint)
    assert "pytorch-zip, 3 tensors, 17 parameters" in text
    assert "layer.weight  [4, 3]" in text
    assert checkpoint.path == path
    many = from_tensors({f"t{i}": torch.zeros(1) for i in range(100)})
    assert "... 89 more" in repr(many)
    assert len(repr(many).splitlines()) < 20


def test_workers_open_the_file_again(tmp_path: Path) -> None:
    path, _ = fixtures.write("pytorch_zip", tmp_path)
    for checkpoint in (ws.open(path), ws.open(path, key="state_dict"), from_tensors(fixtures.tensors())):
        data = pickle.dumps(checkpoint)
        assert pickle.loads(data).content_hash() == checkpoint.content_hash()


def test_hash_does_not_depend_on_format(tmp_path: Path) -> None:
    hashes = set()
    for name in ("safetensors", "pytorch_zip", "pytorch_legacy", "npz", "pytorch_tar", "numpy_pickle", "sb3"):
        path, _ = fixtures.write(name, tmp_path)
        hashes.add(ws.open(path).content_hash())
    assert len(hashes) == 1
    values = fixtures.tensors()
    values["layer.bias"] = values["layer.bias"].double()
    assert from_tensors(values).content_hash() not in hashes


def test_listing_a_folder(tmp_path: Path) -> None:
    for name in ("safetensors", "pytorch_zip"):
        fixtures.write(name, tmp_path)
    (tmp_path / "deep").mkdir()
    fixtures.write("npz", tmp_path / "deep")
    (tmp_path / "notes.txt").write_text("nothing")
    (tmp_path / "data.json").write_text("{}")
    (tmp_path / "broken.npy").write_bytes(b"\x93NUMPY\x01\x00")
    found = [Path(address).relative_to(tmp_path).as_posix() for address in list_models(tmp_path)]
    assert found == ["a.pt", "a.safetensors", "broken.npy", "deep/a.npz"]
    with pytest.raises(UnknownFormatError, match="text"):
        list_models(tmp_path / "notes.txt")
    with pytest.raises(CheckpointError, match="No such file"):
        ws.open(tmp_path / "absent.pt")


def test_nothing_to_open(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no tensors"):
        from_tensors({})
    torch.save({"epoch": 3}, tmp_path / "a.pt")
    with pytest.raises(CheckpointError, match="no tensors"):
        ws.open(tmp_path / "a.pt")
    with pytest.raises(UnsafeCheckpointError, match="climb"):
        from_tensors({"../../etc/passwd": torch.ones(1)})
    (tmp_path / "empty").write_bytes(b"")
    with pytest.raises(UnknownFormatError, match="empty"):
        ws.open(tmp_path / "empty")
    (tmp_path / "pointer").write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n")
    with pytest.raises(UnknownFormatError, match="git lfs pull"):
        ws.open(tmp_path / "pointer")


def _adapter(folder: Path, config: dict[str, object], values: dict[str, torch.Tensor]) -> ws.Checkpoint:
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", **config}))
    from_tensors(values).save(folder / "adapter_model.safetensors")
    return ws.open(folder)


def test_adapters_merge_onto_their_base(tmp_path: Path) -> None:
    g = torch.Generator().manual_seed(0)
    base = {
        "model.q.weight": torch.randn(6, 5, generator=g),
        "model.conv.weight": torch.randn(4, 3, 3, 3, generator=g),
        "model.emb.weight": torch.randn(10, 5, generator=g),
        "head.weight": torch.randn(2, 6, generator=g).half(),
    }
    root = "base_model.model.model"
    a, b = torch.randn(2, 5, generator=g), torch.randn(6, 2, generator=g)
    ca, cb = torch.randn(2, 3, 3, 3, generator=g), torch.randn(4, 2, 1, 1, generator=g)
    ea, eb = torch.randn(2, 10, generator=g), torch.randn(5, 2, generator=g)
    head = torch.randn(2, 6, generator=g)
    values = {
        f"{root}.q.lora_A.weight": a,
        f"{root}.q.lora_B.weight": b,
        f"{root}.conv.lora_A.weight": ca,
        f"{root}.conv.lora_B.weight": cb,
        f"{root}.emb.lora_embedding_A": ea,
        f"{root}.emb.lora_embedding_B": eb,
        "base_model.model.head.weight": head,
    }
    adapter = _adapter(tmp_path / "lora", {"r": 2, "lora_alpha": 8, "alpha_pattern": {"emb": 2}}, values)
    assert adapter.format == "peft"
    merged = merge_adapter(adapter, from_tensors(base))
    assert list(merged) == list(base)
    torch.testing.assert_close(merged["model.q.weight"], base["model.q.weight"] + 4 * b @ a)
    change = torch.einsum("or,rikl->oikl", cb[:, :, 0, 0], ca)
    torch.testing.assert_close(merged["model.conv.weight"], base["model.conv.weight"] + 4 * change)
    torch.testing.assert_close(merged["model.emb.weight"], base["model.emb.weight"] + (eb @ ea).T)
    torch.testing.assert_close(merged["head.weight"], head.half())
    assert ws.open(merged.save(tmp_path / "merged.safetensors")).content_hash() == merged.content_hash()

    two = {f"{root}.q.lora_A.weight": a, f"{root}.q.lora_B.weight": b, f"{root}.q.lora_magnitude_vector": torch.ones(6)}
    dora = _adapter(tmp_path / "dora", {"r": 2, "lora_alpha": 2, "use_dora": True, "use_rslora": True}, two)
    weight = merge_adapter(dora, from_tensors(base))["model.q.weight"]
    torch.testing.assert_close(weight.norm(dim=1), torch.ones(6))
    plain = base["model.q.weight"] + 2**0.5 * b @ a
    torch.testing.assert_close(weight, plain / plain.norm(dim=1, keepdim=True))
    with pytest.raises(CheckpointError, match="right base"):
        merge_adapter(dora, from_tensors({"other.weight": base["model.q.weight"]}))
    with pytest.raises(CheckpointError, match="do not make a change"):
        merge_adapter(dora, from_tensors({"model.q.weight": torch.ones(5, 6)}))
    with pytest.raises(CheckpointError, match=r"adapter_config\.json"):
        merge_adapter(from_tensors(base), from_tensors(base))


def test_a_gigabyte_opens_in_milliseconds(tmp_path: Path) -> None:
    names = {f"layers.{i}.weight": (1024, 1024) for i in range(256)}
    header, at = {}, 0
    for name, shape in names.items():
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [at, at + (4 << 20)]}
        at += 4 << 20
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path = tmp_path / "big.safetensors"
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + at)  # a sparse file: a gigabyte that takes no disk
    ws.open(path)
    begin = time.perf_counter()
    checkpoint = ws.open(path)
    listed = [(name, checkpoint.shape(name)) for name in checkpoint]
    seconds = time.perf_counter() - begin
    assert len(listed) == 256
    assert checkpoint.nbytes == 1 << 30
    assert seconds < 0.05, f"opening took {seconds * 1e3:.1f} ms"


def test_opening_needs_no_extra() -> None:
    code = (
        "import sys, weightspace as ws; ws.open; from weightspace.checkpoint import list_models;"
        "bad = {'onnx', 'h5py', 'gguf', 'msgpack', 'transformers', 'keras'} & set(sys.modules); assert not bad, bad"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
