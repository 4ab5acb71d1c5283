"""Data sets by name, read from parquet, HDF5 or text files, or from Hugging Face where it can be reached.

``digits`` comes with scikit-learn. Of the others the files are looked for at the path that the recipe or the
caller gives, then below ``$WEIGHTSPACE_DATA``, then below ``./data``; failing all, the ``datasets`` package
downloads them. Decoded arrays are kept as ``.npy`` in the cache (``weightspace.paths.cache_dir``) and mapped.
"""

from __future__ import annotations

import hashlib
import io
import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from weightspace.errors import MissingExtraError, ZooError
from weightspace.paths import cache_dir, whole

Arrays = dict[str, NDArray[Any]]


@dataclass(frozen=True)
class Data:
    """Images (n, channels, side, side) in [0, 1], float32, and labels (n,), int64; train and test.

    For text, ``x`` are windows of tokens (n, length), int64, and ``y`` the token after each: (n, length), or of
    sentences their class (n,). Of several
    ``tasks`` each has labels of its own (see ``weightspace.zoo.tasks``).
    """

    train_x: Tensor
    train_y: Tensor
    test_x: Tensor
    test_y: Tensor
    tasks: int = 1

    @property
    def classes(self) -> int:
        """Number of classes, or of tokens of a text."""
        if self.tasks > 1:
            from weightspace.zoo.tasks import CLASSES

            return self.tasks * CLASSES
        return int(max(self.train_y.max(), self.test_y.max())) + 1

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of one example: (channels, side, side) of an image, (length,) of a text."""
        return tuple(self.train_x.shape[1:])

    def only(self, classes: Sequence[int]) -> Data:
        """The part with these labels; everything when ``classes`` is empty. Labels keep their numbers."""
        if not classes:
            return self
        chosen = torch.tensor(list(classes))
        train, test = torch.isin(self.train_y, chosen), torch.isin(self.test_y, chosen)
        return self._with(self.train_x[train], self.train_y[train], self.test_x[test], self.test_y[test])

    def first(self, train: int = 0, test: int = 0) -> Data:
        """The first ``train`` and ``test`` examples, all of them for 0. Examples are in a random order."""
        a, b = train or len(self.train_x), test or len(self.test_x)
        return self._with(self.train_x[:a], self.train_y[:a], self.test_x[:b], self.test_y[:b])

    def to(self, device: str | torch.device) -> Data:
        """The same on another device."""
        return self._with(*(t.to(device) for t in (self.train_x, self.train_y, self.test_x, self.test_y)))

    def _with(self, train_x: Tensor, train_y: Tensor, test_x: Tensor, test_y: Tensor) -> Data:
        return replace(self, train_x=train_x, train_y=train_y, test_x=test_x, test_y=test_y)


@dataclass(frozen=True)
class DataSpec:
    """Which data a recipe asks for: a name, perhaps a path, and how much of it (0: everything).

    ``pool`` averages images over squares of so many pixels; ``standardise`` shifts and scales them to mean 0 and
    deviation 1 over the training set. The name ``tasks`` stands for the data sets listed in ``tasks``, side by side
    as grey images of ``side`` pixels; ``train`` and ``test`` then bound each of them.
    """

    name: str
    path: str = ""
    train: int = 0
    test: int = 0
    pool: int = 1
    standardise: bool = False
    tasks: tuple[str, ...] = ()
    side: int = 0


def load_data(spec: str | DataSpec, folder: str | os.PathLike[str] | None = None) -> Data:
    """A data set by name, in a shuffled order that is the same everywhere.

    ``digits``: scikit-learn's 1,797 images of 8 × 8, every fifth for testing (the same writers on both sides),
    in their own order. ``mnist``, ``cifar10`` (three colours), ``cifar10-gray`` (one), ``usps``: images in
    [0, 1] with their own test sets. ``tasks``: several of these in one (see ``weightspace.zoo.tasks``).
    ``text``: a text file in windows of 64 characters, the last tenth for testing. ``reviews``: sentences of film
    reviews as ``WORDS`` words each, against and for (Pang & Lee 2005), a tenth for testing. ``folder`` is looked into
    first; ``spec.path`` may name the folder or a file (of text).

    Raises ``ZooError`` naming the places that were looked into, and ``MissingExtraError`` where a reader is
    not installed.
    """
    spec = DataSpec(spec) if isinstance(spec, str) else spec
    if spec.name == "digits":
        return _scaled(_digits().first(spec.train, spec.test), spec)
    if spec.name == "tasks":
        from weightspace.zoo.tasks import mixture

        if not spec.tasks:
            raise ZooError('the data "tasks" need a list of data sets, tasks = ["mnist", "usps+rot90"]')
        return mixture(spec, folder)
    if spec.name not in _SOURCES:
        known = ", ".join(["digits", *_SOURCES, "tasks"])
        raise ZooError(f"the recipe asks for the data {spec.name!r}; there is: {known}")
    source = _SOURCES[spec.name]
    files = _find(spec, source, folder)
    arrays = _cached(spec.name, files, source) if files else _from_hub(spec.name, source)
    return _scaled(_tensors(arrays, spec), spec)


@dataclass(frozen=True)
class _Source:
    files: tuple[tuple[str, ...], ...]
    """Alternatives, each a list of patterns that must all be found below one folder."""
    read: Callable[[Sequence[Path]], Arrays]
    hub: str = ""


def _digits() -> Data:
    from sklearn.datasets import load_digits

    bunch = load_digits()
    x = torch.from_numpy(bunch.images).to(torch.float32).div_(16).unsqueeze(1)
    y = torch.from_numpy(bunch.target).to(torch.int64)
    test = torch.arange(len(y)) % 5 == 4
    return Data(x[~test], y[~test], x[test], y[test])


def _folders(spec: DataSpec, folder: str | os.PathLike[str] | None) -> list[Path]:
    named = [spec.path, os.fspath(folder) if folder is not None else "", os.environ.get("WEIGHTSPACE_DATA", "")]
    return [Path(place).expanduser() for place in named if place] + [Path("data")]


def _find(spec: DataSpec, source: _Source, folder: str | os.PathLike[str] | None) -> list[Path]:
    for place in _folders(spec, folder):
        if place.is_file() and all(len(patterns) == 1 for patterns in source.files):
            return [place]
        for patterns in source.files:
            found = [next(iter(sorted(place.glob(pattern))), None) for pattern in patterns]
            if all(path is not None for path in found):
                return [path for path in found if path is not None]
    if spec.path:
        wanted = " or ".join(" and ".join(patterns) for patterns in source.files)
        raise ZooError(f"the data {spec.name!r} is not at {spec.path}; expected there: {wanted}")
    return []


def _cached(name: str, files: Sequence[Path], source: _Source) -> Arrays:
    """The arrays of some files, decoded once: whole folders of ``.npy`` appear by one rename."""
    stamp = "|".join(f"{f.resolve()}:{f.stat().st_size}:{f.stat().st_mtime_ns}" for f in files)
    place = cache_dir() / "data" / f"{name}-{hashlib.sha256(f'1|{stamp}'.encode()).hexdigest()[:16]}"
    keys = ("train_x", "train_y", "test_x", "test_y")
    if not place.is_dir():
        arrays = source.read(files)
        place.parent.mkdir(parents=True, exist_ok=True)
        with whole(place) as temporary:
            temporary.mkdir()
            for key in keys:
                np.save(temporary / f"{key}.npy", arrays[key])
    return {key: np.load(place / f"{key}.npy", mmap_mode="r") for key in keys}


def _scaled(data: Data, spec: DataSpec) -> Data:
    if not data.train_x.is_floating_point():
        return data
    if spec.pool > 1:
        train, test = (torch.nn.functional.avg_pool2d(x, spec.pool) for x in (data.train_x, data.test_x))
        data = Data(train, data.train_y, test, data.test_y)
    if not spec.standardise:
        return data
    deviation, mean = torch.std_mean(data.train_x)
    return Data((data.train_x - mean) / deviation, data.train_y, (data.test_x - mean) / deviation, data.test_y)


def _tensors(arrays: Arrays, spec: DataSpec) -> Data:
    ends = {"train": spec.train or None, "test": spec.test or None}
    # Cut before anything is widened: a mapped file is read only where it is used.
    arrays = {key: value[: ends[key.partition("_")[0]]] for key, value in arrays.items()}

    def images(x: NDArray[Any]) -> Tensor:
        if x.dtype == np.uint8:
            return torch.from_numpy(np.asarray(x, dtype=np.float32) / 255)
        return torch.from_numpy(np.array(x, dtype=np.float32 if x.dtype.kind == "f" else np.int64))

    def labels(y: NDArray[Any]) -> Tensor:
        return torch.from_numpy(np.array(y, dtype=np.int64))

    return Data(
        images(arrays["train_x"]), labels(arrays["train_y"]), images(arrays["test_x"]), labels(arrays["test_y"])
    )


def _shuffled(x: NDArray[Any], y: NDArray[Any]) -> tuple[NDArray[Any], NDArray[Any]]:
    order = np.random.default_rng(0).permutation(len(y))
    return x[order], y[order]


# ------------------------------------------------------------------------------------ readers


def read_parquet(path: Path, gray: bool) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Images (n, channels, height, width) and labels of a parquet file, in the file's order.

    The column ``image`` (or ``img``) holds encoded pictures, as bytes or as a struct with ``bytes``; ``label``
    the class. ``gray`` makes one channel of the colours (ITU-R 601 luma), otherwise they stay as they are.
    """
    try:
        import pyarrow.parquet as parquet
    except ImportError as error:
        raise MissingExtraError("pyarrow", "data", f"reading {path.name}") from error
    try:
        table = parquet.read_table(path)
    except Exception as error:
        raise ZooError(f"{path} is not a readable parquet file: {error}") from error
    columns = set(table.column_names)
    image = next((c for c in ("image", "img") if c in columns), None)
    label = next((c for c in ("label", "fine_label") if c in columns), None)
    if image is None or label is None:
        raise ZooError(f"{path} has the columns {sorted(columns)}; expected 'image' and 'label'")
    pictures = (_decoded(cell, gray, path) for cell in table[image].to_pylist())
    return np.stack(list(pictures)), np.asarray(table[label].to_pylist(), dtype=np.int64)


def _decoded(cell: Any, gray: bool, path: Path) -> NDArray[np.uint8]:
    try:
        from PIL import Image, UnidentifiedImageError
    except ImportError as error:
        raise MissingExtraError("pillow", "data", f"decoding the images of {path.name}") from error
    content = cell.get("bytes") if isinstance(cell, Mapping) else cell
    if isinstance(cell, Image.Image):
        picture = cell
    elif isinstance(content, bytes):
        try:
            picture = Image.open(io.BytesIO(content))
        except UnidentifiedImageError as error:
            raise ZooError(f"{path} holds an image that cannot be decoded: {error}") from error
    else:
        raise ZooError(f"{path}: an image is a {type(cell).__name__}; expected encoded bytes")
    if gray or picture.mode not in ("L", "RGB"):
        picture = picture.convert("L" if gray else "RGB")
    pixels = np.asarray(picture, dtype=np.uint8)
    return pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)


def _read_pair(gray: bool) -> Callable[[Sequence[Path]], Arrays]:
    def read(files: Sequence[Path]) -> Arrays:
        (train_x, train_y), (test_x, test_y) = (_shuffled(*read_parquet(path, gray)) for path in files)
        return {"train_x": train_x, "train_y": train_y, "test_x": test_x, "test_y": test_y}

    return read


def _read_usps(files: Sequence[Path]) -> Arrays:
    try:
        import h5py
    except ImportError as error:
        raise MissingExtraError("h5py", "data", f"reading {files[0].name}") from error
    arrays: Arrays = {}
    try:
        with h5py.File(files[0]) as stored:
            for part in ("train", "test"):
                x = np.asarray(stored[f"{part}/data"], dtype=np.float32).reshape(-1, 1, 16, 16)
                y = np.asarray(stored[f"{part}/target"], dtype=np.int64)
                arrays[f"{part}_x"], arrays[f"{part}_y"] = _shuffled(x, y)
    except (OSError, KeyError, ValueError) as error:
        raise ZooError(
            f"{files[0]} is not USPS as expected (train/data and test/data of 256 pixels, train/target and "
            f"test/target): {error}"
        ) from error
    return arrays


WINDOW = 64
"""Characters in one window of a text."""


def _read_text(files: Sequence[Path]) -> Arrays:
    content = files[0].read_text(encoding="utf-8", errors="replace")
    return text_windows(content, str(files[0]))


def text_windows(content: str, source: str = "text", window: int = WINDOW) -> Arrays:
    """A text as tokens (its characters in order of their code) in windows that do not overlap.

    The last tenth of the windows is for testing; those before are shuffled.
    """
    if len(content) < 20 * window:
        raise ZooError(f"{source} has {len(content)} characters; expected {20 * window} at least")
    points = np.frombuffer(content.encode("utf-32-le"), dtype=np.uint32)
    alphabet, tokens = np.unique(points, return_inverse=True)
    if len(alphabet) > 1024:
        raise ZooError(f"{source} has {len(alphabet)} different characters; a character model takes up to 1,024")
    count = (len(tokens) - 1) // window
    x = tokens[: count * window].reshape(count, window).astype(np.int64)
    y = tokens[1 : count * window + 1].reshape(count, window).astype(np.int64)
    train = count - count // 10
    order = np.random.default_rng(0).permutation(train)
    return {"train_x": x[:train][order], "train_y": y[:train][order], "test_x": x[train:], "test_y": y[train:]}


WORDS, VOCABULARY = 32, 2000
"""Words of a sentence, and tokens that there are: 0 is no word, 1 a rare one, the others by how often they occur."""


def _read_reviews(files: Sequence[Path]) -> Arrays:
    lines = [path.read_text(encoding="utf-8", errors="replace").splitlines() for path in files]
    sentences = [(line.lower().split(), label) for label, part in enumerate(lines) for line in part if line.strip()]
    if min(map(len, lines)) < 100:
        raise ZooError(f"{files[0].parent} has {[len(p) for p in lines]} sentences against and for; expected 100 each")
    order = np.random.default_rng(0).permutation(len(sentences))
    parts = {"train": [sentences[i] for i in order if i % 10], "test": [sentences[i] for i in order if i % 10 == 0]}
    counts = Counter(word for words, _ in parts["train"] for word in words)
    common = sorted(counts, key=lambda word: (-counts[word], word))[: VOCABULARY - 2]
    number = {word: i + 2 for i, word in enumerate(common)}
    arrays: Arrays = {}
    for part, found in parts.items():
        x = np.zeros((len(found), WORDS), dtype=np.int64)
        for row, (words, _) in zip(x, found, strict=True):
            tokens = [number.get(word, 1) for word in words[:WORDS]]
            row[: len(tokens)] = tokens
        arrays[f"{part}_x"] = x
        arrays[f"{part}_y"] = np.array([label for _, label in found], dtype=np.int64)
    return arrays


def _pairs(name: str) -> tuple[tuple[str, ...], ...]:
    tails = (f"{name}-{{}}.parquet", f"{name}/{{}}-*.parquet", f"{name}/{{}}.parquet")
    return tuple((tail.format("train"), tail.format("test")) for tail in tails)


_SOURCES: Mapping[str, _Source] = {
    "mnist": _Source(_pairs("mnist"), _read_pair(True), "ylecun/mnist"),
    "cifar10": _Source(_pairs("cifar10"), _read_pair(False), "uoft-cs/cifar10"),
    "cifar10-gray": _Source(_pairs("cifar10"), _read_pair(True), "uoft-cs/cifar10"),
    "usps": _Source((("usps.h5",), ("usps/*.h5",)), _read_usps),
    "reviews": _Source(
        (
            ("text/*rt-polarity.neg", "text/*rt-polarity.pos"), ("*rt-polarity.neg", "*rt-polarity.pos"),
            ("rt-polaritydata/*.neg", "rt-polaritydata/*.pos"),
        ), _read_reviews,
    ),
    "text": _Source((("text.txt",), ("text/*.txt",), ("tinyshakespeare.txt",)), _read_text),
}


# ------------------------------------------------------------------------------------ Hugging Face


def _from_hub(name: str, source: _Source) -> Arrays:
    missing = (
        f"the data {name!r} was found neither below $WEIGHTSPACE_DATA nor below ./data (looked for "
        f"{' or '.join(' and '.join(p) for p in source.files)}). Put the files there, name their folder with --data, "
        "or set data = { name = ..., path = ... } in the recipe"
    )
    if not source.hub:
        raise ZooError(missing)
    try:
        import datasets
    except ImportError as error:
        raise ZooError(f"{missing}; or install pip install 'weightspace[data]' to download it") from error
    try:
        stored = datasets.load_dataset(source.hub)
        gray = not name.endswith("10")
        parts = {part: _shuffled(*_columns(stored[part], gray, name)) for part in ("train", "test")}
    except ZooError:
        raise
    except Exception as error:  # offline, or a mirror's own kind of failure
        raise ZooError(f"{missing}. Downloading {source.hub} failed as well: {_first_line(error)}") from error
    return {f"{part}_{axis}": pair[i] for part, pair in parts.items() for i, axis in enumerate("xy")}


def _columns(rows: Any, gray: bool, name: str) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    def cells() -> Iterator[tuple[NDArray[np.uint8], int]]:
        for row in rows:
            picture = row.get("image", row.get("img"))
            yield _decoded(picture, gray, Path(name)), int(row["label"])

    pairs = list(cells())
    return np.stack([x for x, _ in pairs]), np.asarray([y for _, y in pairs], dtype=np.int64)


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]


__all__ = ["WINDOW", "Data", "DataSpec", "load_data", "read_parquet", "text_windows"]
