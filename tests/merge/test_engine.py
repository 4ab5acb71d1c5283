"""From files to a file: pieces, types, shards, refusals, interruptions, reports."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import weightspace as ws
from weightspace.errors import CheckpointError, MergeError
from weightspace.merge import engine
from weightspace.merge.method import Elementwise, Models, PerTensor, Prepared, Reshaped
from weightspace.merge.methods import make
from weightspace.merge.sources import Model, plan
from weightspace.merge.writer import MemorySink

Tensors = dict[str, Tensor]
nameless = pytest.mark.skipif(not hasattr(os, "O_TMPFILE"), reason="files without a name are Linux's")


def drawn(seed: int = 0, count: int = 3, rows: int = 50) -> tuple[Tensors, list[Tensors]]:
    g = torch.Generator().manual_seed(seed)
    base = {
        "embed.weight": torch.randn(rows, 20, generator=g),
        "fc.weight": torch.randn(30, 40, generator=g),
        "fc.bias": torch.randn(30, generator=g),
        "bn.num_batches_tracked": torch.tensor(7),
        "positions": torch.arange(6),
    }
    return base, [
        {k: t + 0.1 * torch.randn(t.shape, generator=g) if t.is_floating_point() else t for k, t in base.items()}
        for _ in range(count)
    ]


def written(folder: Path, base: Tensors, models: list[Tensors], dtype: torch.dtype = torch.float32) -> list[Path]:
    folder.mkdir(parents=True, exist_ok=True)
    files = []
    for i, model in enumerate((base, *models)):
        files.append(folder / f"{i}.safetensors")
        save_file({k: t.to(dtype) if t.is_floating_point() else t for k, t in model.items()}, files[-1])
    return files


def listing(folder: Path) -> set[str]:
    return {p.name for p in folder.iterdir()}


METHODS = ["linear", "slerp", "ties", "dare", "della", "model-stock", "pcb", "tsv-m"]


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("chunk", [7, 100, 1 << 18])
@pytest.mark.parametrize("threads", [1, 3])
def test_pieces_and_threads_change_nothing(name: str, chunk: int, threads: int) -> None:
    base, models = drawn()
    models = models[: 2 if name == "slerp" else 3]
    method = make(name)
    sources, origin = [Model(m) for m in models], Model(base)
    whole = ws.merge(models, name, base=base, threads=1).tensors
    planned = plan(sources, origin, needs_base=method.needs_base)
    sink = MemorySink([(a.name, a.shape, a.dtype) for a in planned.actions])
    used = origin if method.needs_base else None
    run = engine.Run(planned, used, sources, lambda _: (method, (1.0,) * len(models)), sink, chunk=chunk,
                     threads=threads)  # fmt: skip
    run.go(method)
    assert whole is not None
    for key, tensor in whole.items():
        torch.testing.assert_close(sink.tensors[key], tensor, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_files_and_memory_agree(tmp_path: Path, name: str, dtype: torch.dtype) -> None:
    base, models = drawn()
    base_file, *files = written(tmp_path, base, models[: 2 if name == "slerp" else 3], dtype)
    out = tmp_path / "out.safetensors"
    merged = ws.merge(files, name, base=base_file, out=out)
    inside = ws.merge([load_file(f) for f in files], name, base=load_file(base_file)).tensors
    got = load_file(out)
    assert merged.path == out
    assert inside is not None
    assert list(ws.open(out)) == list(ws.open(base_file))
    for key, tensor in inside.items():
        assert tensor.dtype == load_file(base_file)[key].dtype
        assert torch.equal(got[key], tensor)


def test_large_tensors_are_read_in_pieces(tmp_path: Path) -> None:
    """Mapped windows, sampling and checks over several pieces, against the plain formula."""
    base, models = drawn(rows=60_000)
    files = written(tmp_path, base, models)
    got = ws.merge(files[1:], "ties", base=files[0], density=0.1).tensors
    assert got is not None
    delta = torch.stack([m["embed.weight"] - base["embed.weight"] for m in models])
    flat = delta.abs().flatten(1)
    cut = flat.sort(1, descending=True).values[:, int(0.1 * flat.shape[1]) - 1]
    kept = delta * (delta.abs() >= cut[:, None, None])
    sign = torch.where(kept.sum(0) >= 0, 1, -1)
    agrees = kept.sign() == sign
    expected = base["embed.weight"] + (kept * agrees).sum(0) / agrees.sum(0).clamp(min=1)
    torch.testing.assert_close(got["embed.weight"], expected, rtol=1e-6, atol=1e-6)


def test_arithmetic_is_in_float32_and_the_type_can_be_chosen(tmp_path: Path) -> None:
    base, models = drawn()
    _, *files = written(tmp_path, base, models, torch.bfloat16)
    wide = ws.merge(files, "linear", dtype="float32").tensors
    narrow = ws.merge(files, "linear").tensors
    assert wide is not None
    assert narrow is not None
    expected = torch.stack([load_file(f)["fc.weight"].float() for f in files]).mean(0)
    torch.testing.assert_close(wide["fc.weight"], expected, rtol=1e-6, atol=1e-6)
    assert torch.equal(narrow["fc.weight"], wide["fc.weight"].bfloat16())
    assert wide["positions"].dtype == torch.int64
    mixed = ws.merge([base, load_file(files[0])], "linear")
    assert mixed.report["fc.weight"].dtype == "float32"
    assert "types differ: float32, bfloat16" in mixed.report["fc.weight"].reason
    double = ws.merge([{"a": torch.tensor([1.0, 2.0], dtype=torch.float64) + 1e-12}] * 2, "linear").tensors
    assert double is not None
    assert double["a"][0].item() == 1.0 + 1e-12


def test_the_report_is_complete(tmp_path: Path) -> None:
    base, models = drawn()
    models[1]["bn.num_batches_tracked"] = torch.tensor(9)
    merged = ws.merge(models, "ties", base=base, exclude=["fc.b*"])
    outcomes = {row.name: row.outcome for row in merged.report}
    assert outcomes == {
        "embed.weight": "merged", "fc.weight": "merged", "fc.bias": "copied", "bn.num_batches_tracked": "copied",
        "positions": "copied",
    }  # fmt: skip
    assert "counter" in merged.report["bn.num_batches_tracked"].reason
    assert "the same in all models" in merged.report["positions"].reason
    assert merged.report["fc.bias"].reason == "excluded"
    assert merged.tensors is not None
    assert torch.equal(merged.tensors["fc.bias"], base["fc.bias"])
    table = json.loads(merged.report.to_json())
    assert [row["name"] for row in table["tensors"]] == list(base)
    assert table["settings"]["hyper_parameters"]["density"] == 0.2
    assert "2 merged, 3 copied" in str(merged.report)


def test_shards_and_their_index(tmp_path: Path) -> None:
    _, models = drawn()
    out = tmp_path / "merged.safetensors"
    merged = ws.merge(models, "linear", out=out, max_shard_size="4kB")
    assert merged.path == tmp_path / "merged.safetensors.index.json"
    assert len(list(tmp_path.glob("merged-*-of-*.safetensors"))) > 1
    inside = ws.merge(models, "linear").tensors
    assert inside is not None
    again = ws.open(merged.path)
    assert set(again) == set(inside)
    assert all(torch.equal(again[key], tensor) for key, tensor in inside.items())
    assert not any(name.startswith(".") for name in listing(tmp_path))
    assert ws.merge([merged.path, merged.path], "linear").report.of("merged")


def test_a_hugging_face_folder_gives_one(tmp_path: Path) -> None:
    base, models = drawn()
    folders = []
    for i, model in enumerate((base, *models)):
        folder = tmp_path / f"m{i}"
        folder.mkdir()
        save_file(model, folder / "model.safetensors")
        (folder / "config.json").write_text(json.dumps({"model_type": "none", "torch_dtype": "float32", "who": i}))
        (folder / "tokenizer.json").write_text(f'{{"i": {i}}}')
        (folder / "modeling.py").write_text("raise SystemExit")
        (folder / "README.md").write_text("card")
        folders.append(folder)
    merged = ws.merge(folders[1:], "ties", base=folders[0], out=tmp_path / "out", dtype="bfloat16")
    assert listing(tmp_path / "out") == {"model.safetensors", "config.json", "tokenizer.json"}
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config == {"model_type": "none", "torch_dtype": "bfloat16", "who": 0}
    assert any("modeling.py" in note and "not copied" in note for note in merged.report.notes)
    assert ws.open(tmp_path / "out").format == "hf-folder"
    with pytest.raises(MergeError, match="folder with files in it"):
        ws.merge(folders[1:], "ties", base=folders[0], out=tmp_path / "out")
    with pytest.raises(MergeError, match="would lie among the weights of the input"):
        ws.merge(folders[1:], "ties", base=folders[0], out=folders[1] / "merged.safetensors")


def test_tied_weights_are_merged_once_and_written_twice() -> None:
    base, models = drawn()
    everyone = [{**m, "head.weight": m["embed.weight"].clone()} for m in (base, *models)]
    merged = ws.merge(everyone[1:], "dare", base=everyone[0])
    assert merged.tensors is not None
    assert torch.equal(merged.tensors["head.weight"], merged.tensors["embed.weight"])
    assert "tied" in merged.report["head.weight"].reason
    everyone[2]["head.weight"] = everyone[2]["head.weight"] + 1
    assert not ws.merge(everyone[1:], "dare", base=everyone[0]).report["head.weight"].reason


def test_modules_checkpoints_and_names_are_models() -> None:
    a, b = nn.Linear(3, 2), nn.Linear(3, 2)
    merged = ws.merge({"one": a, "two": b.state_dict()}, "linear")
    assert merged.tensors is not None
    torch.testing.assert_close(merged.tensors["weight"], (a.weight + b.weight) / 2)
    assert merged.report.settings["models"] == ["one", "two"]


def test_inputs_are_never_written_to() -> None:
    base, models = drawn()
    before = [{k: t.clone() for k, t in m.items()} for m in (base, *models)]
    for name in METHODS:
        ws.merge(models[: 2 if name == "slerp" else 3], name, base=base)
    for old, new in zip(before, (base, *models), strict=True):
        assert all(torch.equal(old[k], new[k]) for k in old)


# Refusals


def broken(kind: str) -> tuple[Any, list[Any], dict[str, Any]]:
    base, models = drawn()
    options: dict[str, Any] = {}
    if kind == "vocabulary":
        models[1]["embed.weight"] = torch.randn(1200, 20)
        models[0]["embed.weight"] = base["embed.weight"] = models[2]["embed.weight"] = torch.randn(1000, 20)
    elif kind == "head":
        models[1]["fc.weight"] = torch.randn(10, 40)
    elif kind == "width":
        models[1]["fc.weight"] = torch.randn(30, 41)
    elif kind == "missing":
        del models[2]["fc.bias"]
    elif kind == "missing in base":
        del base["fc.bias"]
    elif kind == "extra":
        models[0]["adapter"] = torch.randn(3)
    elif kind == "nan":
        models[1]["fc.weight"][3, 4] = float("nan")
    elif kind == "infinite":
        base["fc.bias"][0] = float("inf")
    elif kind == "whole numbers":
        models[1]["positions"] = models[1]["positions"] + 1
    elif kind == "float8":
        for m in (base, *models):
            m["fc.weight"] = m["fc.weight"].to(torch.float8_e4m3fn)
    elif kind == "complex":
        for m in (base, *models):
            m["fc.weight"] = m["fc.weight"].to(torch.complex64)
    elif kind == "overflow":
        for m in models:
            m["fc.weight"] = m["fc.weight"] * 1e6
        options["dtype"] = "float16"
    elif kind == "glob":
        options["exclude"] = ["nothing*"]
    elif kind == "all":
        options["exclude"] = ["*"]
    elif kind == "dtype":
        options["dtype"] = "float23"
    elif kind == "weights":
        options["weights"] = [1.0]
    elif kind == "shard":
        options["max_shard_size"] = "many"
    return base, models, options


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("vocabulary", r"embed.weight: shapes differ, \[1000, 20\] in .*\[1200, 20\] in model 2. The vocabularies"),
        ("head", r"fc.weight: shapes differ.*Heads for other tasks\? Keep"),
        ("width", r"fc.weight: shapes differ.*The architectures differ"),
        ("missing", r"fc.bias: missing in model 3.*exclude=\['fc.bias'\]"),
        ("missing in base", r"fc.bias: missing in the base"),
        ("extra", r"adapter: missing in the base, model 2, model 3.*leave it out"),
        ("nan", r"fc.weight: 1 elements of model 2 are NaN or infinite; nothing was written"),
        ("infinite", r"fc.bias: 1 elements of the base are NaN"),
        ("whole numbers", r"positions: int64 of shape \(6,\) differs among the models"),
        ("float8", r"float8_e4m3fn cannot be averaged"),
        ("complex", r"complex64"),
        ("overflow", r"which float16 cannot hold"),
        ("glob", r"exclude='nothing\*' is the name of no tensor"),
        ("all", r"no tensor is left to merge"),
        ("dtype", r"one of float32, bfloat16"),
        ("weights", r"1 weights for 3 models"),
        ("shard", r"max_shard_size is 'many'"),
    ],
)
def test_what_does_not_fit_is_refused_and_nothing_is_written(tmp_path: Path, kind: str, said: str) -> None:
    base, models, options = broken(kind)
    with pytest.raises(MergeError, match=said):
        ws.merge(models, "task-arithmetic", base=base, out=tmp_path / "out.safetensors", **options)
    assert listing(tmp_path) == set()
    if kind in ("vocabulary", "head", "width", "missing", "nan", "whole numbers", "float8"):
        name = {"vocabulary": "embed*", "missing": "fc.bias", "whole numbers": "positions"}.get(kind, "fc.weight")
        merged = ws.merge(models, "task-arithmetic", base=base, out=tmp_path / "out.safetensors", exclude=[name])
        assert merged.report.of("copied")


def test_excluded_extras_are_left_out_and_said() -> None:
    base, models, _ = broken("extra")
    merged = ws.merge(models, "task-arithmetic", base=base, exclude=["adapter"])
    assert merged.report["adapter"].outcome == "left out"
    assert merged.tensors is not None
    assert "adapter" not in merged.tensors


def test_all_that_is_refused_is_named_at_once() -> None:
    base, models, _ = broken("width")
    del models[0]["fc.bias"]
    with pytest.raises(MergeError, match=r"2 of 5 tensors cannot be merged(.|\n)*fc.weight(.|\n)*fc.bias"):
        ws.merge(models, "ties", base=base)


def test_different_networks_are_called_so() -> None:
    torch.manual_seed(0)
    one = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)).state_dict()
    other = {f"body.{name}": value for name, value in one.items()}
    with pytest.raises(MergeError, match=r"different networks\. 8 of 8 tensors cannot be merged"):
        ws.merge([one, other], "linear")
    with pytest.raises(MergeError, match=r"^1 of 4 tensors"):
        ws.merge([one, {n: v for n, v in one.items() if n != "0.bias"}], "linear")


def test_a_missing_base_and_other_mistakes(tmp_path: Path) -> None:
    _, models = drawn()
    with pytest.raises(MergeError, match="give the model that all"):
        ws.merge(models, "ties")
    with pytest.raises(MergeError, match="found int"):
        ws.merge([1, 2], "linear")
    with pytest.raises(MergeError, match=r"new folder, not \.pt"):
        ws.merge(models, "linear", out=tmp_path / "out.pt")
    with pytest.raises(MergeError, match="is not there; make it first"):
        ws.merge(models, "linear", out=tmp_path / "no" / "out.safetensors")
    with pytest.raises(MergeError, match="sum to zero"):
        ws.merge(models, "linear", weights=[1, -1, 0])
    with pytest.raises(MergeError, match="holds no tensors"):
        ws.merge([{}, {}], "linear")
    with pytest.raises(MergeError, match="1 or more"):
        ws.merge([], "linear")


@pytest.mark.parametrize("as_link", [False, True])
def test_an_input_is_never_overwritten(tmp_path: Path, as_link: bool) -> None:
    base, models = drawn()
    files = written(tmp_path, base, models)
    out = files[2]
    if as_link:
        out = tmp_path / "link.safetensors"
        out.symlink_to(files[2])
    before = files[2].read_bytes()
    with pytest.raises(MergeError, match="is the input"):
        ws.merge(files[1:], "ties", base=files[0], out=out)
    with pytest.raises(MergeError, match="is the input"):
        ws.merge(files[1:], "linear", base=files[0], out=files[0])
    assert files[2].read_bytes() == before


def test_a_full_disk_is_said_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, models = drawn()
    free = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr("shutil.disk_usage", lambda _: free)
    with pytest.raises(MergeError, match="are free there"):
        ws.merge(models, "linear", out=tmp_path / "out.safetensors")
    assert listing(tmp_path) == set()


def test_damaged_inputs(tmp_path: Path) -> None:
    base, models = drawn()
    files = written(tmp_path, base, models)
    files[1].write_bytes(files[1].read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="truncated"):
        ws.merge(files[1:], "linear", out=tmp_path / "out.safetensors")
    files = written(tmp_path, base, models)
    opened = [ws.open(f) for f in files]
    os.utime(files[2], ns=(1, 1))
    with pytest.raises(CheckpointError, match="changed since it was opened"):
        ws.merge(opened[1:], "linear", out=tmp_path / "out.safetensors")
    assert listing(tmp_path) == {f.name for f in files}


@dataclass(frozen=True)
class Failing(Elementwise):
    """Fails, or is interrupted, in the middle."""

    error: type[BaseException] = RuntimeError

    name: ClassVar[str] = "failing"
    paper: ClassVar[str] = "Nobody (2026)"

    def merge(self, name: str, base: Tensor | None, models: Any, weights: Any) -> Tensor:
        if name == "fc.bias":
            raise self.error("stop")
        time.sleep(0.01)
        return models[0].clone()


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, MemoryError])
@pytest.mark.parametrize("out", ["out.safetensors", "folder"])
@pytest.mark.parametrize("threads", [1, 2])
def test_an_interrupted_run_leaves_nothing(
    tmp_path: Path, error: type[BaseException], out: str, threads: int
) -> None:
    _, models = drawn()
    (tmp_path / "out.safetensors").write_bytes(b"what was there before")
    with pytest.raises(error, match="stop"):
        ws.merge(models, Failing(error), out=tmp_path / out, threads=threads, max_shard_size="3kB")
    assert listing(tmp_path) == {"out.safetensors"}
    assert (tmp_path / "out.safetensors").read_bytes() == b"what was there before"


@pytest.mark.parametrize(
    ("number", "named"), [(signal.SIGTERM, True), pytest.param(signal.SIGKILL, False, marks=nameless)]
)
def test_a_terminated_command_leaves_nothing(tmp_path: Path, number: signal.Signals, named: bool) -> None:
    """Killed without a chance to clean up as well: files have no name until they are whole."""
    base, models = drawn(rows=100_000, count=2)
    files = written(tmp_path, base, models)
    before = (tmp_path / "out.safetensors").write_bytes(b"what was there before")
    code = ("import os; del os.O_TMPFILE\n" if named and hasattr(os, "O_TMPFILE") else "") + (
        "import sys, time; from weightspace.merge.methods import ties; real = ties.elect\n"
        "def slow(*a):\n    print('going', flush=True); time.sleep(0.3); return real(*a)\n"
        "ties.elect = slow; from weightspace.cli import app; app(sys.argv[1:])"
    )
    command = [sys.executable, "-c", code, "merge", *map(str, files[1:]), "-b", str(files[0]), "-m", "ties", "-o",
               str(tmp_path / "out.safetensors")]  # fmt: skip
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "going\n"
    assert len(listing(tmp_path)) == 4 + named  # the temporary file, where it has a name
    process.send_signal(number)
    assert process.wait(60) != 0
    process.stdout.close()
    assert listing(tmp_path) == {"out.safetensors", *(f.name for f in files)}
    assert (tmp_path / "out.safetensors").stat().st_size == before


def test_files_without_and_with_temporary_names_are_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, models = drawn()
    for folder in ("a", "b"):
        for out in ("x.safetensors", "folder"):
            (tmp_path / folder).mkdir(exist_ok=True)
            ws.merge(models, "linear", out=tmp_path / folder / out, max_shard_size="4kB")
        monkeypatch.delattr(os, "O_TMPFILE", raising=False)
    contents = [
        {str(f.relative_to(tmp_path / folder)): f.read_bytes() for f in (tmp_path / folder).rglob("*") if f.is_file()}
        for folder in ("a", "b")
    ]
    assert contents[0] == contents[1]
    assert len(contents[0]) == 2 * len(listing(tmp_path / "a" / "folder"))
    modes = {f.stat().st_mode & 0o777 for f in tmp_path.rglob("*.safetensors")}
    assert len(modes) == 1


@pytest.mark.parametrize("kind", ["pytorch", "npz", "onnx", "gguf", "hdf5"])
def test_models_in_any_format(tmp_path: Path, kind: str) -> None:
    """A float32 network in several formats merges with its safetensors twin, to the twin's own weights."""
    g = torch.Generator().manual_seed(0)
    tensors = {"fc.weight": torch.randn(32, 64, generator=g), "fc.bias": torch.randn(32, generator=g)}
    twin, file = tmp_path / "twin.safetensors", tmp_path / {"pytorch": "a.pt", "hdf5": "a.h5"}.get(kind, f"a.{kind}")
    save_file(tensors, twin)
    if kind == "pytorch":
        torch.save(tensors, file)
    elif kind == "npz":
        np.savez(file, **{n: t.numpy() for n, t in tensors.items()})
    elif kind == "hdf5":
        h5py = pytest.importorskip("h5py")
        with h5py.File(file, "w") as opened:
            for name, tensor in tensors.items():
                opened[name] = tensor.numpy()
    elif kind == "gguf":
        gguf = pytest.importorskip("gguf")
        writer = gguf.GGUFWriter(str(file), "llama")
        for name, tensor in tensors.items():
            writer.add_tensor(name, tensor.numpy())
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    else:
        onnx = pytest.importorskip("onnx")
        held = [onnx.numpy_helper.from_array(t.numpy(), n) for n, t in tensors.items()]
        info = onnx.helper.make_tensor_value_info
        node = onnx.helper.make_node("Gemm", ["x", "fc.weight", "fc.bias"], ["y"], transB=1)
        ends = [info("x", 1, ["n", 64])], [info("y", 1, ["n", 32])]
        onnx.save(onnx.helper.make_model(onnx.helper.make_graph([node], "g", *ends, held)), file)
    merged = ws.merge([twin, file], "linear", out=tmp_path / "o.safetensors")
    got = load_file(tmp_path / "o.safetensors")
    assert all(torch.allclose(got[n], tensors[n]) for n in tensors)
    assert len(merged.report.of("merged")) == 2


def test_pickles_that_run_code_are_not_merged(tmp_path: Path) -> None:
    class Harm:
        def __reduce__(self) -> Any:
            return os.mkdir, (str(tmp_path / "harm"),)

    torch.save({"fc.weight": torch.ones(3), "other": Harm()}, tmp_path / "a.pt")
    with contextlib.suppress(CheckpointError):
        ws.merge([tmp_path / "a.pt", tmp_path / "a.pt"], "linear", out=tmp_path / "o.safetensors")
    assert not (tmp_path / "harm").exists()


def test_masks_and_flags_are_copied_where_they_agree() -> None:
    mask = torch.ones(4, 4).tril().bool()
    models = [{"w": torch.randn(2), "mask": mask.clone()} for _ in range(2)]
    merged = ws.merge(models, "linear")
    assert merged.report["mask"].outcome == "copied"
    assert torch.equal(merged.open()["mask"], mask)
    models[1]["mask"] = ~mask
    with pytest.raises(MergeError, match=r"mask: bool of shape \(4, 4\) differs among the models"):
        ws.merge(models, "linear")


# What methods may do


@dataclass(frozen=True)
class WrongShape(PerTensor):
    """Gives something of another shape."""

    name: ClassVar[str] = "wrong"
    paper: ClassVar[str] = "Nobody (2026)"

    def merge(self, name: str, base: Tensor | None, models: Any, weights: Any) -> Tensor:
        return models[0].flatten()[:1]


@dataclass(frozen=True)
class Stacked(Prepared):
    """Puts the models on top of each other: other shapes than the inputs."""

    name: ClassVar[str] = "stacked"
    paper: ClassVar[str] = "Nobody (2026)"
    any_shape: ClassVar[bool] = True

    def prepare(self, models: Models) -> Reshaped:
        shapes = {n: (sum(len(m[n]) for m in models.models), *models.models[0][n].shape[1:]) for n in models.names}
        models.notes["fc.bias"] = "longer now"
        return Reshaped(lambda name, base, tensors, weights: torch.cat(list(tensors)), shapes)


def test_a_method_that_gives_another_shape_by_mistake_is_caught(tmp_path: Path) -> None:
    _, models = drawn()
    with pytest.raises(MergeError, match="wrong gave the shape"):
        ws.merge(models, WrongShape(), out=tmp_path / "o.safetensors")
    assert listing(tmp_path) == set()


def test_a_prepared_method_may_give_other_shapes(tmp_path: Path) -> None:
    _, models = drawn()
    models[1]["fc.bias"] = torch.randn(4)
    merged = ws.merge(models[:2], Stacked(), out=tmp_path / "o.safetensors")
    got = load_file(tmp_path / "o.safetensors")
    assert got["fc.weight"].shape == (60, 40)
    assert torch.equal(got["fc.bias"], torch.cat([models[0]["fc.bias"], models[1]["fc.bias"]]))
    assert "longer now" in merged.report["fc.bias"].reason
