"""Data sets by name: read from small files made here, found where they should be, refused with what to do."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import torch

from weightspace.errors import ZooError
from weightspace.zoo.data import DataSpec, load_data, read_parquet, text_windows

SHARED = Path(__file__).resolve().parents[2].parent / "shared" / "data"


@pytest.fixture(autouse=True)
def _apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither the cache nor the data of whoever runs the tests, and no network."""
    monkeypatch.setenv("WEIGHTSPACE_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("WEIGHTSPACE_DATA", raising=False)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.chdir(tmp_path)


def _png(pixels: np.ndarray) -> bytes:
    image = pytest.importorskip("PIL.Image")
    buffer = io.BytesIO()
    image.fromarray(pixels).save(buffer, format="PNG")
    return buffer.getvalue()


def _write_parquet(path: Path, images: list[np.ndarray], struct: bool, column: str = "image") -> None:
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    cells = [{"bytes": _png(x), "path": None} if struct else _png(x) for x in images]
    path.parent.mkdir(parents=True, exist_ok=True)
    # Sorted by label, as files often are.
    pq.write_table(pa.table({column: cells, "label": [i * 3 // len(images) for i in range(len(images))]}), path)


def _images(n: int, colours: bool) -> list[np.ndarray]:
    shape = (n, 6, 6, 3) if colours else (n, 6, 6)
    return list(np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8))


@pytest.mark.parametrize("struct", [True, False])
def test_parquet_images_are_decoded_exactly_in_order(tmp_path: Path, struct: bool) -> None:
    images = _images(9, colours=True)
    _write_parquet(tmp_path / "a.parquet", images, struct)
    x, y = read_parquet(tmp_path / "a.parquet", gray=False)
    assert np.array_equal(x, np.stack(images).transpose(0, 3, 1, 2))
    assert y.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    gray, _ = read_parquet(tmp_path / "a.parquet", gray=True)
    luma = np.stack(images) @ np.array([0.299, 0.587, 0.114])
    assert gray.shape == (9, 1, 6, 6)
    assert np.abs(gray[:, 0] - luma).max() <= 1


def test_files_are_found_shuffled_scaled_and_cached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, n in (("train", 60), ("test", 12)):
        _write_parquet(tmp_path / "data" / f"mnist-{name}.parquet", _images(n, colours=False), True)
    data = load_data("mnist")  # from ./data
    assert data.train_x.shape == (60, 1, 6, 6)
    assert data.train_x.dtype == torch.float32
    assert 0 <= float(data.train_x.min()) < 0.1 < 0.9 < float(data.train_x.max()) <= 1
    assert set(data.train_y[:15].tolist()) == {0, 1, 2}
    assert torch.equal(load_data("mnist").train_x, data.train_x)
    assert len(list((tmp_path / "cache" / "data").iterdir())) == 1
    part = load_data(DataSpec("mnist", train=20, test=5))
    assert torch.equal(part.train_x, data.train_x[:20])
    assert len(part.test_y) == 5
    pooled = load_data(DataSpec("mnist", pool=3)).train_x
    assert torch.allclose(pooled[:, 0, 0, 1], data.train_x[:, 0, :3, 3:].mean((1, 2)), atol=1e-6)
    scaled = load_data(DataSpec("mnist", standardise=True))
    assert abs(float(scaled.train_x.mean())) < 1e-5
    assert abs(float(scaled.train_x.std()) - 1) < 1e-5
    # By the environment, by a folder, and by the recipe's path.
    elsewhere = tmp_path / "elsewhere"
    (tmp_path / "data").rename(elsewhere)
    assert torch.equal(load_data("mnist", elsewhere).train_x, data.train_x)
    assert torch.equal(load_data(DataSpec("mnist", path=str(elsewhere))).train_x, data.train_x)
    monkeypatch.setenv("WEIGHTSPACE_DATA", str(elsewhere))
    assert torch.equal(load_data("mnist").train_x, data.train_x)


def test_a_changed_file_is_read_again(tmp_path: Path) -> None:
    for name in ("train", "test"):
        _write_parquet(tmp_path / "data" / f"mnist-{name}.parquet", _images(12, colours=False), True)
    load_data("mnist")
    _write_parquet(tmp_path / "data" / "mnist-train.parquet", _images(30, colours=False), True)
    assert len(load_data("mnist").train_y) == 30


def test_usps(tmp_path: Path) -> None:
    h5py = pytest.importorskip("h5py")
    (tmp_path / "data").mkdir()
    rng = np.random.default_rng(0)
    with h5py.File(tmp_path / "data" / "usps.h5", "w") as stored:
        for part, n in (("train", 20), ("test", 8)):
            stored[f"{part}/data"] = rng.random((n, 256), dtype=np.float32)
            stored[f"{part}/target"] = np.arange(n) % 10
    data = load_data("usps")
    assert data.train_x.shape == (20, 1, 16, 16)
    assert sorted(data.train_y.tolist()) == sorted(i % 10 for i in range(20))
    with h5py.File(tmp_path / "data" / "usps.h5", "w") as stored:
        stored["train"] = np.zeros(3)
    with pytest.raises(ZooError, match="not USPS as expected"):
        load_data("usps")


def test_text_is_windows_of_characters_with_the_next_ones(tmp_path: Path) -> None:
    content = "".join(chr(97 + i * i % 26) for i in range(3000))
    arrays = text_windows(content, window=50)
    assert arrays["train_x"].shape == (54, 50)
    assert arrays["test_x"].shape == (5, 50)
    assert np.array_equal(arrays["train_x"][:, 1:], arrays["train_y"][:, :-1])
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "text.txt").write_text(content)
    data = load_data("text")
    assert data.shape == (64,)
    assert data.classes == len(set(content))
    (tmp_path / "mine.txt").write_text(content)
    assert torch.equal(load_data(DataSpec("text", path=str(tmp_path / "mine.txt"))).train_x, data.train_x)
    with pytest.raises(ZooError, match="characters"):
        text_windows("short")


def test_what_cannot_be_had_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(ZooError, match="there is: digits, mnist"):
        load_data("mars")
    with pytest.raises(ZooError, match=r"mnist-train\.parquet.*WEIGHTSPACE_DATA|WEIGHTSPACE_DATA.*mnist-train"):
        load_data("mnist")
    with pytest.raises(ZooError, match="not at /nowhere"):
        load_data(DataSpec("cifar10", path="/nowhere"))
    _write_parquet(tmp_path / "x.parquet", _images(3, colours=False), True, column="picture")
    with pytest.raises(ZooError, match="expected 'image' and 'label'"):
        read_parquet(tmp_path / "x.parquet", gray=True)
    (tmp_path / "junk.parquet").write_bytes(b"junk")
    with pytest.raises(ZooError, match="not a readable parquet"):
        read_parquet(tmp_path / "junk.parquet", gray=True)


def test_a_part_keeps_the_numbers_of_its_labels() -> None:
    part = load_data("digits").only((3, 7))
    assert set(part.train_y.tolist()) == set(part.test_y.tolist()) == {3, 7}
    assert load_data(DataSpec("digits", train=10)).train_x.shape == (10, 1, 8, 8)


@pytest.mark.skipif(not SHARED.is_dir(), reason=f"the real data sets are not at {SHARED}")
def test_the_real_files() -> None:
    for name, shape, train in (("usps", (1, 16, 16), 7291), ("text", (64,), 15686)):
        data = load_data(name, SHARED)
        assert (data.shape, len(data.train_x)) == (shape, train)
    x, y = read_parquet(SHARED / "mnist-test.parquet", gray=True)
    assert x.shape == (10000, 1, 28, 28)
    assert np.bincount(y).min() > 800
