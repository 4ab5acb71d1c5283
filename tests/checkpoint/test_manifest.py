"""Every real file that lies beside the project: what must come out of it. In the manner of netron's manifest.

``manifest.csv`` has a line per model, with the format, the number of tensors and elements, and a line per
file that is no model, with the format ``none``. ``python -m tests.checkpoint.test_manifest`` writes it anew;
look at the difference before you keep it.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import weightspace as ws
from weightspace.checkpoint import list_models
from weightspace.errors import UnknownFormatError

ROOT = Path(__file__).resolve().parents[2].parent / "shared" / "checkpoints"
MANIFEST = Path(__file__).with_name("manifest.csv")
COLUMNS = ("file", "member", "format", "tensors", "parameters", "dtypes", "first")

needs_files = pytest.mark.skipif(not ROOT.is_dir(), reason=f"the real checkpoints are not at {ROOT}")


def rows() -> list[dict[str, str]]:
    """The manifest."""
    if not MANIFEST.exists():
        return []
    with MANIFEST.open(newline="") as file:
        return list(csv.DictReader(file))


def describe(root: Path) -> Iterator[dict[str, str]]:
    """What is below ``root`` as it opens now."""
    for path in sorted(p for p in root.rglob("*") if p.is_file()):
        name = path.relative_to(root).as_posix()
        try:
            addresses = list_models(path)
        except UnknownFormatError:
            yield dict.fromkeys(COLUMNS, "") | {"file": name, "format": "none"}
            continue
        for address in addresses:
            checkpoint = ws.open(address)
            yield {
                "file": name,
                "member": address.removeprefix(str(path)).removeprefix("!"),
                "format": checkpoint.format,
                "tensors": str(len(checkpoint)),
                "parameters": str(checkpoint.num_parameters),
                "dtypes": " ".join(sorted({str(d).removeprefix("torch.") for d in checkpoint.dtypes.values()})),
                "first": next(iter(checkpoint)),
            }


@needs_files
def test_every_file_is_listed() -> None:
    found = {p.relative_to(ROOT).as_posix() for p in ROOT.rglob("*") if p.is_file()}
    assert found == {row["file"] for row in rows()}


@needs_files
@pytest.mark.parametrize("folder", sorted({row["file"].split("/")[0] for row in rows()}))
def test_files_open_as_they_should(folder: str) -> None:
    pytest.importorskip("h5py")
    expected = [row for row in rows() if row["file"].split("/")[0] == folder]
    assert list(describe_below(folder)) == expected
    for row in expected:
        if row["format"] == "none":
            with pytest.raises(UnknownFormatError):
                ws.open(ROOT / row["file"])
            continue
        checkpoint = ws.open(ROOT / row["file"], member=row["member"] or None)
        for name in checkpoint:
            tensor = checkpoint[name]
            assert tuple(tensor.shape) == checkpoint.shape(name)
            # Attention masks hold minus infinity; nothing holds what is no number.
            assert not bool(torch.isnan(tensor).any()), f"{row['file']}: {name} holds NaN"


def describe_below(folder: str) -> Iterator[dict[str, str]]:
    """The rows of one folder of the manifest, as its files open now."""
    for row in describe(ROOT / folder):
        yield {**row, "file": f"{folder}/{row['file']}"}


@needs_files
def test_values_are_those_that_torch_reads() -> None:
    compared = 0
    for row in rows():
        if row["format"] in ("pytorch-zip", "pytorch-legacy") and not row["member"]:
            try:
                value = torch.load(ROOT / row["file"], map_location="cpu", weights_only=True)
            except Exception:  # a whole module, or numpy scalars: what torch itself refuses to load safely
                continue
            checkpoint = ws.open(ROOT / row["file"])
            for key in str(checkpoint.metadata.get("key", "")).split("."):
                value = value[int(key)] if isinstance(value, list) else value[key] if key else value
            wanted = {name.removeprefix("module."): tensor for name, tensor in value.items()}
            assert list(checkpoint) == list(wanted)
            assert all(torch.equal(checkpoint[name], tensor) for name, tensor in wanted.items())
            compared += 1
    assert compared > 250


@needs_files
def test_values_are_those_that_onnx_and_h5py_read() -> None:
    onnx, h5py = pytest.importorskip("onnx"), pytest.importorskip("h5py")
    for row in rows():
        checkpoint = None
        if row["format"] == "onnx":
            checkpoint = ws.open(ROOT / row["file"])
            for tensor in onnx.load(ROOT / row["file"]).graph.initializer:
                wanted = torch.from_numpy(onnx.numpy_helper.to_array(tensor).copy())
                assert torch.equal(checkpoint[tensor.name], wanted)
        elif row["format"] == "keras-h5":
            checkpoint = ws.open(ROOT / row["file"])
            with h5py.File(ROOT / row["file"]) as file:
                weights = file.get("model_weights", file)
                values = []
                for layer in weights.attrs["layer_names"]:
                    values += [weights[layer][name][()] for name in weights[layer].attrs["weight_names"]]
            assert len(values) == len(checkpoint)
            assert all(torch.equal(checkpoint[n], torch.from_numpy(v)) for n, v in zip(checkpoint, values, strict=True))


if __name__ == "__main__":
    with MANIFEST.open("w", newline="") as out:
        writer = csv.DictWriter(out, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(describe(ROOT))
