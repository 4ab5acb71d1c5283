"""Samples to train metanetworks on: a population's parameter graphs with their records, and splits of them."""

from __future__ import annotations

import json
import logging
import os
import random
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from weightspace.errors import CheckpointError, MetanetError
from weightspace.graph import ParameterGraph
from weightspace.tagged import facts_in

if TYPE_CHECKING:
    from weightspace.wiring.wiring import Wiring
    from weightspace.zoo import Zoo

_log = logging.getLogger(__name__)

Where = Callable[[Mapping[str, Any]], bool] | Mapping[str, Any]


@dataclass(frozen=True)
class Sample:
    """One network of a population.

    ``record`` is what its training wrote down; no metanet sees it. ``group`` is its training run, which all
    checkpoints of a run share: a split never divides one.
    """

    name: str
    graph: ParameterGraph
    record: Mapping[str, Any]
    group: str

    def __repr__(self) -> str:
        return f"Sample({self.name}, {self.graph.num_parameters:,} parameters, group {self.group!r})"


class Loaded(list[Sample]):
    """The samples of a folder in the order of their names, and what was left out: name -> reason."""

    def __init__(self, samples: Iterable[Sample] = (), left_out: Mapping[str, str] | None = None) -> None:
        super().__init__(samples)
        self.left_out = dict(left_out or {})

    def __repr__(self) -> str:
        kinds = len({id(sample.graph.wiring) for sample in self})
        runs = len({sample.group for sample in self})
        return f"Loaded({len(self)} networks of {runs} runs on {kinds} wirings, {len(self.left_out)} left out)"


def load_samples(source: str | os.PathLike[str] | Zoo, where: Where | None = None, progress: bool = False) -> Loaded:
    """The networks of a population, every safetensors file below a folder (or in a ``Zoo``) whose record fits.

    ``where`` is a function of the record, or fields with the value (or a list of the values) they must have:
    ``{"final": True, "hyper.activation": ["relu", "gelu"]}``. Files without a record have an empty one.

    The wiring is found and proved once per distinct (names, shapes, network description) and shared, so
    ``a.graph.wiring is b.graph.wiring`` tells that two samples are of one kind. Only floating-point tensors are
    read: counters are no weights. Diverged networks (by their record, or with a weight that is no finite number),
    damaged files and networks that cannot be wired are left out; ``left_out`` of the result names each with its
    reason, and a line of the log counts them.

    Raises ``MetanetError`` where nothing is left.
    """
    from weightspace.progress import bar

    folder = Path(source) if isinstance(source, str | os.PathLike) else source.folder
    if not folder.is_dir():
        raise MetanetError(f"{folder} is not a folder; samples are read from a folder of safetensors files")
    found = (path.relative_to(folder) for path in folder.rglob("*.safetensors"))
    files = [folder / path for path in sorted(found) if not any(part.startswith(".") for part in path.parts)]
    fits = _predicate(where)
    kinds = _Kinds()
    samples: list[Sample] = []
    left_out: dict[str, str] = {}
    others = 0
    with bar(f"reading {folder.name}", len(files), progress) as advance:
        for path in files:
            name = path.relative_to(folder).as_posix()
            try:
                tensors, record = read_network(path)
                if not fits(record):
                    others += 1
                elif record.get("diverged") or not _finite(tensors):
                    left_out[name] = "diverged"
                else:
                    graph = kinds.graph(path, tensors, record)
                    samples.append(Sample(name, graph, record, str(record.get("run") or name)))
            except (CheckpointError, _NotWiredError) as error:
                left_out[name] = " ".join(str(error).split())
            advance(name)
    if left_out:
        reasons = list(dict.fromkeys(left_out.values()))
        shown = "; ".join(reasons[:3]) + (f"; and {len(reasons) - 3} other reasons" if len(reasons) > 3 else "")
        _log.warning("%s: %d of %d networks left out (%s)", folder, len(left_out), len(left_out) + len(samples), shown)
    if not samples:
        raise MetanetError(
            f"no network to read in {folder}: {len(files)} safetensors files, {others} of which do not fit the "
            f"condition on the record, {len(left_out)} left out"
            + (f" (the first: {next(iter(left_out.values()))})" if left_out else "")
        )
    return Loaded(samples, left_out)


def split(
    samples: Sequence[Sample],
    fractions: Sequence[float],
    seed: int = 0,
    by: str | Callable[[Sample], str] = "group",
) -> tuple[list[Sample], ...]:
    """Deal samples into parts of about these fractions of all samples, never dividing a group.

    ``by`` says what stays together: ``"group"`` (training runs), ``"lineage"`` (a run with everything that was
    trained or copied from it, and from that), a field of the record, or a function of the sample. Within a part
    the order is kept. The fractions add up to 1 at most; what they leave is in no part. A part gets one group at least.
    The same samples, fractions and seed give the same parts.

    Raises ``MetanetError`` when the fractions make no sense or there are fewer groups than parts.
    """
    if not fractions or any(f <= 0 for f in fractions) or sum(fractions) > 1 + 1e-9:
        raise MetanetError(f"fractions {tuple(fractions)}: each must be above 0, and their sum at most 1")
    keys = _keys(samples, by)
    sizes: dict[str, int] = {}
    for key in keys:
        sizes[key] = sizes.get(key, 0) + 1
    order = sorted(sizes)
    random.Random(seed).shuffle(order)
    # The group that straddles a border goes to the part that its middle lies in.
    part_of: dict[str, int] = {}
    done = 0
    for key in order:
        middle = (done + sizes[key] / 2) / len(samples)
        border = 0.0
        for number, fraction in enumerate(fractions):
            border += fraction
            if middle <= border + 1e-9:
                part_of[key] = number
                break
        done += sizes[key]
    # Of few groups none may fall to a small part: it gets the last one of the part that has most.
    for number in range(len(fractions)):
        held = [[key for key in order if part_of.get(key) == other] for other in range(len(fractions))]
        most = max(held, key=len)
        if not held[number] and len(most) > 1:
            part_of[most[-1]] = number
    parts = tuple(
        [sample for sample, key in zip(samples, keys, strict=True) if part_of.get(key) == number]
        for number in range(len(fractions))
    )
    empty = [number for number, part in enumerate(parts) if not part]
    if empty:
        raise MetanetError(
            f"{len(samples)} networks in {len(sizes)} groups (by {by if isinstance(by, str) else 'a function'}) "
            f"cannot be split into parts of {tuple(fractions)}: part {empty[0]} stays empty. "
            "Train more runs, or split by something finer"
        )
    return parts


def field_of(record: Mapping[str, Any], path: str) -> Any:
    """A field of a record by its dotted path, ``"hyper.activation"``; None where it is not there."""
    found: Any = record
    for part in path.split("."):
        if not isinstance(found, Mapping) or part not in found:
            return None
        found = found[part]
    return found


def read_network(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """The floating-point tensors of a safetensors file, by name in alphabetical order, and the record inside.

    Reads the whole file at once, which for thousands of small files is what takes least. Raises
    ``CheckpointError`` for a damaged one.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load

    try:
        data = path.read_bytes()
        tensors = load(data)
        record = facts_in(data, default="{}")
    except (SafetensorError, OSError, ValueError, KeyError) as error:
        raise CheckpointError(f"{path.name}: not a readable safetensors file ({error})") from error
    if not isinstance(record, dict):
        raise CheckpointError(f"{path.name}: its record is a {type(record).__name__}, expected a JSON object")
    floating = {name: tensors[name] for name in sorted(tensors) if tensors[name].is_floating_point()}
    if not floating:
        raise CheckpointError(f"{path.name}: no floating-point tensor in it")
    return floating, record


# -------------------------------------------------------------------- kinds of networks


class _NotWiredError(Exception):
    """A network without a usable wiring; the text is the reason."""


class _Kinds:
    """One wiring per distinct (names, shapes, network description), one graph structure per wiring and dtypes."""

    def __init__(self) -> None:
        self._wirings: dict[Any, Wiring | _NotWiredError] = {}
        self._templates: dict[Any, ParameterGraph] = {}

    def graph(self, path: Path, tensors: dict[str, torch.Tensor], record: Mapping[str, Any]) -> ParameterGraph:
        form = tuple((name, tuple(t.shape)) for name, t in tensors.items())
        kind = (form, json.dumps(record.get("network"), sort_keys=True))
        dtypes = tuple(t.dtype for t in tensors.values())
        template = self._templates.get((kind, dtypes))
        if template is None:
            from weightspace.graph.build import of_tensors

            template = of_tensors(tensors, self._wiring(kind, path))
            self._templates[kind, dtypes] = template
        return replace(template, tensors=tensors)

    def _wiring(self, kind: Any, path: Path) -> Wiring:
        known = self._wirings.get(kind)
        if known is None:
            self._wirings[kind] = known = _find_wiring(path)
        if isinstance(known, _NotWiredError):
            raise known
        return known


def _find_wiring(path: Path) -> Wiring | _NotWiredError:
    from weightspace import checkpoint
    from weightspace.errors import WiringError
    from weightspace.wiring.entry import wiring

    try:
        found = wiring(checkpoint.open(path))
    except WiringError as error:
        return _NotWiredError(f"no wiring: {error}")
    if found.status == "failed":
        return _NotWiredError(f"the wiring ({found.origin}) failed its proof")
    return found


def _finite(tensors: Mapping[str, torch.Tensor]) -> bool:
    # A sum is finite only if every term is; it may overflow though all are, so a bad one is looked at closely.
    return all(bool(torch.isfinite(t.sum())) or bool(torch.isfinite(t).all()) for t in tensors.values())


def _predicate(where: Where | None) -> Callable[[Mapping[str, Any]], bool]:
    if where is None:
        return lambda _: True
    if callable(where):
        return where
    wanted = dict(where)

    def fits(record: Mapping[str, Any]) -> bool:
        for path, value in wanted.items():
            found = field_of(record, path)
            several = isinstance(value, Collection) and not isinstance(value, str | bytes | Mapping)
            if not (found in value if several else found == value):
                return False
        return True

    return fits


# -------------------------------------------------------------------- groups


def _keys(samples: Sequence[Sample], by: str | Callable[[Sample], str]) -> list[str]:
    if callable(by):
        return [str(by(sample)) for sample in samples]
    if by == "group":
        return [sample.group for sample in samples]
    if by == "lineage":
        return lineages(samples)
    missing = sum(field_of(sample.record, by) is None for sample in samples)
    if missing:
        raise MetanetError(
            f"{missing} of {len(samples)} networks have no field {by!r} in their record to split by; "
            'there are also "group" and "lineage"'
        )
    return [str(field_of(sample.record, by)) for sample in samples]


def lineages(samples: Sequence[Sample]) -> list[str]:
    """Of each sample the first group of all that descend from each other, however many steps apart."""
    root: dict[str, str] = {}

    def find(x: str) -> str:
        while root.setdefault(x, x) != x:
            root[x] = x = root[root[x]]
        return x

    def join(x: str, y: str) -> None:
        # The smaller name leads, so that the order of the samples does not matter.
        first, second = sorted((find(x), find(y)))
        root[second] = first

    for sample in samples:
        # A parent is named by its file or by its run.
        join(f"g:{sample.group}", f"n:{_stem(sample.name)}")
        run = f"n:{_stem(sample.group)}"
        join(f"g:{sample.group}", run)
        parents = sample.record.get("parent") or ()
        for parent in [parents] if isinstance(parents, str) else parents:
            join(f"g:{sample.group}", f"n:{_stem(str(parent))}")
    return [find(f"g:{sample.group}") for sample in samples]


def _stem(name: str) -> str:
    return name.rpartition("/")[2].removesuffix(".safetensors")
