"""What ``weightspace merge`` does: reads a recipe, or models from the command line, and merges them."""

from __future__ import annotations

import ast
import dataclasses
import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from weightspace.errors import MergeError
from weightspace.merge.recipe import Recipe, Source, read
from weightspace.merge.report import Merged

RECIPES = (".toml", ".yml", ".yaml")


def run(
    inputs: Sequence[str],
    *,
    method: str | None = None,
    base: str | None = None,
    out: Path | None = None,
    weights: Sequence[float] | None = None,
    exclude: Sequence[str] = (),
    dtype: str | None = None,
    max_shard_size: str | None = None,
    seed: int | None = None,
    hyper: Sequence[str] = (),
    align: str | None = None,
    repair: str | None = None,
    data: Sequence[str] = (),
    unverified: bool = False,
    progress: bool = False,
) -> Merged:
    """Merge by a recipe, whose entries the options take the place of, or merge the models that are named.

    ``hyper``: ``name=value`` with Python values. ``data``: files of inputs (`weightspace.merge.inputs`), one for all
    models or one for each. Raises `MergeError`.
    """
    recipe = recipe_of(inputs, method, base, weights)
    changes: dict[str, Any] = {
        "dtype": dtype, "max_shard_size": max_shard_size, "seed": seed, "base": base, "align": align, "repair": repair,
        "unverified": unverified or None,
    }  # fmt: skip
    changes = {key: value for key, value in changes.items() if value is not None}
    if exclude:
        changes["exclude"] = (*recipe.exclude, *exclude)
    if hyper:
        changes["hyper"] = {**recipe.hyper, **dict(_setting(text) for text in hyper)}
    if len(data) == 1:
        changes["data"] = data[0]
    elif data:
        if len(data) != len(recipe.models):
            raise MergeError(f"{len(data)} files of data for {len(recipe.models)} models; give one, or one for each")
        pairs = zip(recipe.models, data, strict=True)
        changes["models"] = tuple(dataclasses.replace(model, data=file) for model, file in pairs)
    recipe = dataclasses.replace(recipe, **changes)
    if out is None and recipe.out is None:
        raise MergeError("nothing says where to write to: give --out merged.safetensors, or a new folder")
    with _terminated():
        return recipe.run(out, progress=progress)


def recipe_of(
    inputs: Sequence[str], method: str | None = None, base: str | None = None, weights: Sequence[float] | None = None
) -> Recipe:
    """The recipe that is named, or one made of models, a method and weights."""
    if len(inputs) == 1 and Path(inputs[0]).suffix in RECIPES:
        if method is not None or weights:
            raise MergeError("the recipe says the method and the weights; change them there")
        return read(inputs[0])
    if any(Path(text).suffix in RECIPES for text in inputs):
        raise MergeError("one recipe, or models; found both, or several recipes")
    if weights and len(weights) != len(inputs):
        raise MergeError(f"{len(weights)} weights for {len(inputs)} models; give one for each, in their order")
    settings = [{"weight": w} for w in weights] if weights else [{} for _ in inputs]
    models = tuple(Source(path, own) for path, own in zip(inputs, settings, strict=True))
    return Recipe(method or "linear", models, base)


def _setting(text: str) -> tuple[str, Any]:
    name, sign, value = text.partition("=")
    if not sign:
        raise MergeError(f"{text!r}: name=value was expected, such as density=0.2")
    try:
        return name, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return name, {"true": True, "false": False}.get(value, value)


@contextmanager
def _terminated() -> Iterator[None]:
    """A polite request to end (SIGTERM) cleans up as an interrupt from the keyboard does."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    try:
        before = signal.signal(signal.SIGTERM, stop)
    except ValueError:  # not the main thread: whoever runs it decides
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
