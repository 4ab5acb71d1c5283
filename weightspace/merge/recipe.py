"""Recipes: a merge written down. TOML, or mergekit's YAML for the methods that both have.

```toml
method = "ties"                     # a name of weightspace.merge.METHODS
base = "base.safetensors"           # paths are relative to the recipe
out = "merged.safetensors"          # or a new folder
dtype = "bfloat16"                  # optional, as are exclude, max_shard_size, seed
exclude = ["lm_head.*"]
align = "weight-matching"           # optional: models are first moved onto the base, or the first of them
repair = "weights"                  # optional: "weights", or "data" and "statistics", which need data
data = "inputs.safetensors"         # optional: for methods that run the network, see weightspace.merge.inputs

[hyper]                             # hyper-parameters of the method
density = 0.2
scale = [1.0, 0.5]                  # a gradient from the first layer to the last

[[models]]
path = "maths.safetensors"
weight = 1.0

[[models]]
path = "code.safetensors"
weight = [{ filter = "mlp", value = 0.5 }, { value = 1.0 }]   # the first filter that is part of the name counts
density = 0.3                       # a hyper-parameter of this model alone
data = "code-inputs.safetensors"    # its own data
```
"""

from __future__ import annotations

import dataclasses
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

from weightspace.errors import MergeError
from weightspace.merge.method import Method, Settings
from weightspace.merge.methods import make, method_class
from weightspace.merge.report import Merged
from weightspace.merge.settings import Depth, Setting, check, depth_of, is_constant, value_of

_KEYS = {
    "method", "base", "out", "dtype", "exclude", "max_shard_size", "seed", "hyper", "models", "align", "repair", "data",
    "unverified",
}  # fmt: skip


@dataclass(frozen=True)
class Source:
    """A model of a recipe: its path, settings of its own (``weight``, per-model hyper-parameters), and data."""

    path: str
    settings: Mapping[str, Setting] = field(default_factory=dict)
    data: str | None = None


@dataclass(frozen=True)
class Recipe:
    """A merge written down: see this module's head. ``folder``: what paths are relative to."""

    method: str
    models: tuple[Source, ...]
    base: str | None = None
    out: str | None = None
    hyper: Mapping[str, Setting] = field(default_factory=dict)
    dtype: str | None = None
    exclude: tuple[str, ...] = ()
    max_shard_size: str | int | None = None
    seed: int = 0
    align: str | None = None
    repair: str | None = None
    data: str | None = None
    unverified: bool = False
    folder: Path | None = None
    mergekit: str | None = None
    """Random masks are those of mergekit with ``--random-seed`` ``seed``, computing in this type ("": the files')."""

    def __post_init__(self) -> None:
        cls = method_class(self.method)
        if not self.models:
            raise MergeError("the recipe names no models; add [[models]] with path = …")
        fields = {f.name: f for f in dataclasses.fields(cls)}
        own = {name for name, f in fields.items() if f.type == "PerModel"}
        for name, setting in self.hyper.items():
            if name not in fields and name != "weight":
                raise MergeError(f"{cls.name} has no hyper-parameter {name!r}; it has {', '.join(fields) or 'none'}")
            check(setting, name)
        for model in self.models:
            for name, setting in model.settings.items():
                if name not in {*own, "weight"}:
                    known = ", ".join(sorted({*own, "weight"}))
                    raise MergeError(f"{model.path}: {name!r} is no setting of one model; {cls.name} has {known}")
                check(setting, f"{model.path}: {name}")

    def run(self, out: str | Path | None = None, *, progress: bool = False, **options: Any) -> Merged:
        """Do the merge; ``out`` and ``options`` (of ``ws.merge``) take the place of what the recipe says."""
        from weightspace.checkpoint import open as open_checkpoint
        from weightspace.merge.entry import merge

        target = out if out is not None else self._path(self.out) if self.out else None
        paths = [self._path(model.path) for model in self.models]
        first = open_checkpoint(self._path(self.base) if self.base else paths[0])
        kinds = (str(d).removeprefix("torch.") for d in first.dtypes.values() if d.is_floating_point)
        kind = self.mergekit or next(kinds, "float32")
        cls = method_class(self.method)
        settings = self.settings(depth_of(list(first), first.config), kind)
        method, weights = settings("")
        given: dict[str, Any] = {"compute": _arithmetic(cls, kind) if self.mergekit is not None else None}
        given |= {"align": self.align, "repair": self.repair, "unverified": self.unverified, "data": self._data()}
        given |= {"dtype": self.dtype, "exclude": self.exclude, "max_shard_size": self.max_shard_size}
        return merge(
            paths, method, base=self._path(self.base) if self.base else None, out=target, weights=weights,
            seed=self.seed, progress=progress, settings=None if self._constant else settings, **{**given, **options},
        )  # fmt: skip

    def settings(self, depth: Depth, kind: str = "float32") -> Settings:
        """Method and weights for each tensor. ``kind``: the type that mergekit would compute in."""
        fields = {f.name: f for f in dataclasses.fields(method_class(self.method))}
        shared: dict[str, Any] = {"seed": self.seed} if "seed" in fields else {}
        narrow = _arithmetic(method_class(self.method), kind) if self.mergekit is not None else None
        if self.mergekit is not None and "masks" in fields:
            import torch

            from weightspace.merge.draws import TorchMasks

            # On the CPU mergekit draws in bfloat16 where it computes in it, else in float32.
            shared["masks"] = TorchMasks(self.seed, torch.bfloat16 if kind == "bfloat16" else torch.float32)

        @lru_cache(maxsize=4096)
        def of(name: str) -> tuple[Method, tuple[float, ...]]:
            hyper = dict(shared)
            for key, setting in self.hyper.items():
                value = value_of(setting, name, depth)
                if value is not None and key != "weight":
                    hyper[key] = value
            for key in {key for model in self.models for key in model.settings} - {"weight"}:
                otherwise = hyper.get(key, fields[key].default)
                hyper[key] = tuple(
                    self._of(model, key, name, depth, otherwise[i] if isinstance(otherwise, tuple) else otherwise)
                    for i, model in enumerate(self.models)
                )
            method = make(self.method, **hyper)
            method.check(len(self.models))
            weights = (float(self._of(model, "weight", name, depth, method.default_weight)) for model in self.models)
            return method, tuple(rounded(w, narrow) for w in weights)

        return of

    def _data(self) -> Any:
        from weightspace.merge.inputs import load

        own = [model.data for model in self.models]
        if not any(own):
            return load(self._path(self.data)) if self.data else None
        files = [one or self.data for one in own]
        if None in files:
            lacking = next(m.path for m, f in zip(self.models, files, strict=True) if f is None)
            raise MergeError(f"{lacking} has no data, others do; give each its own, or data for all at the top")
        return [load(self._path(str(file))) for file in files]

    @property
    def _constant(self) -> bool:
        everything = [*self.hyper.values(), *(s for model in self.models for s in model.settings.values())]
        return all(is_constant(setting) for setting in everything)

    def _of(self, model: Source, key: str, name: str, depth: Depth, otherwise: Any) -> Any:
        for settings in (model.settings, self.hyper):
            if key in settings:
                value = value_of(settings[key], name, depth)
                if value is not None:
                    return value
        return otherwise

    def _path(self, text: str) -> str:
        # A recipe moves with its models; one that is written for the folder it is run in works as well.
        if self.folder is not None and "://" not in text and not Path(text).expanduser().is_absolute():
            beside = self.folder / text
            if beside.exists() or not Path(text).exists():
                return str(beside)
        return text

    def to_mergekit(self) -> str:
        """The same merge as YAML for mergekit. Raises `MergeError` for what mergekit has no word for."""
        from weightspace.merge.mergekit import write

        return write(self)


def _arithmetic(cls: type[Method], kind: str) -> str | None:
    """The type that mergekit computes in, where that is less than float32 and the method's results depend on it."""
    return kind if kind in ("bfloat16", "float16") and cls.narrow else None


def rounded(value: float, kind: str | None) -> float:
    """A number as it is in a type."""
    if kind is None:
        return value
    import torch

    return float(torch.tensor(value, dtype=getattr(torch, kind)))


def read(path: str | Path) -> Recipe:
    """A recipe from a ``.toml`` file, or from a ``.yml`` or ``.yaml`` file of mergekit's.

    Raises `MergeError` for keys that are not known; nothing of a recipe is passed over.
    """
    place = Path(path)
    try:
        text = place.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise MergeError(f"{path}: {error}. Check the path of the recipe") from error
    if place.suffix in (".yml", ".yaml"):
        from weightspace.merge.mergekit import parse

        return dataclasses.replace(parse(text), folder=place.parent)
    if place.suffix != ".toml":
        raise MergeError(f"{path}: a recipe is a .toml file, or a .yml file of mergekit's; found {place.suffix!r}")
    try:
        table = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise MergeError(f"{path} is no TOML: {error}") from error
    return dataclasses.replace(from_table(table), folder=place.parent)


def from_table(table: Mapping[str, Any]) -> Recipe:
    """A recipe from what TOML gives."""
    unknown = table.keys() - _KEYS
    if unknown:
        raise MergeError(f"a recipe has no key {sorted(unknown)[0]!r}; it has {', '.join(sorted(_KEYS))}")
    if not isinstance(table.get("method"), str):
        raise MergeError('the recipe says no method; add method = "ties" or another')
    models = []
    entries = table.get("models", [])
    if not isinstance(entries, list):
        raise MergeError("models is a list of tables with a path each: [[models]]")
    for entry in entries:
        given = {"path": entry} if isinstance(entry, str) else dict(entry) if isinstance(entry, Mapping) else {}
        if not isinstance(given.get("path"), str):
            raise MergeError(f"a model of the recipe has no path: {entry!r}")
        data = given.pop("data", None)
        if not isinstance(data, str | None):
            raise MergeError(f"{given['path']}: data is {data!r}; the path of a file with inputs was expected")
        models.append(Source(given.pop("path"), given, data))
    hyper = table.get("hyper", {})
    if not isinstance(hyper, Mapping):
        raise MergeError(f"hyper is a table of hyper-parameters, found {hyper!r}")
    exclude = table.get("exclude", [])
    if not isinstance(exclude, list) or not all(isinstance(e, str) for e in exclude):
        raise MergeError(f"exclude is a list of tensor names, found {exclude!r}")
    words = ("base", "out", "dtype", "align", "repair", "data")
    for key, kind in (*((word, str) for word in words), ("seed", int), ("unverified", bool)):
        if key in table and not isinstance(table[key], kind):
            raise MergeError(f"{key} is {table[key]!r}; {kind.__name__} was expected")
    return Recipe(
        table["method"].lower().replace("_", "-"), tuple(models), table.get("base"), table.get("out"), dict(hyper),
        table.get("dtype"), tuple(exclude), table.get("max_shard_size"), table.get("seed", 0), table.get("align"),
        table.get("repair"), table.get("data"), table.get("unverified", False),
    )  # fmt: skip
