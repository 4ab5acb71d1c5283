"""What files say of their own descent, and which models of a zoo that means.

Read are: the record of a network trained here (``parent``); what ``weightspace merge`` and mergekit leave in a merged
file; ``_name_or_path``, ``base_model`` and ``base_model_name_or_path`` of configurations and adapters; GGUF's
``general.base_model.*``; ``base_model`` of a safetensors header. Claims are shown beside what the weights say and never
used for it: a name is easily copied along.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from weightspace.checkpoint import Checkpoint
    from weightspace.lineage.lineage import Edge

_KEYS = ("base_model", "base_model_name_or_path", "_name_or_path", "parent", "parent_model", "finetuned_from")
_GGUF = re.compile(r"general\.base_model\.\d+\.name")
_SUFFIXES = (".safetensors", ".pt", ".pth", ".bin", ".gguf", ".h5", ".hdf5", ".keras", ".npz", ".onnx")
_MOST = 64
_LONGEST = 300


@dataclass(frozen=True)
class Claim:
    """That ``child`` descends from ``said``: the words in the file; ``parent``: the model of the zoo meant, or None."""

    child: str
    said: str
    source: str
    parent: str | None = None

    @property
    def sentence(self) -> str:
        """In words."""
        where = "" if self.parent else ", which is not among these models"
        return f"{self.child} says it comes from {self.said} ({self.source}){where}"


def claims(name: str, model: Checkpoint, record: Mapping[str, Any] | None = None) -> list[Claim]:
    """What one file says; ``record``: of a network trained here, where it is known already."""
    found: list[tuple[str, str]] = []
    if record is None:
        from weightspace.card import record_of

        record = record_of(model.metadata)
    found.extend((text, "its training record") for text in _texts(record.get("parent")))
    merged = model.metadata.get("merge")
    if isinstance(merged, str):
        described = _json(merged)
        if isinstance(described, Mapping):
            found.extend((text, "its merge") for text in _texts(described.get("models")))
    for where, facts in (("its configuration", model.config or {}), ("its header", model.metadata)):
        for key in _KEYS:
            found.extend((text, f"{key} in {where}") for text in _texts(facts.get(key)))
    adapter = model.metadata.get("adapter")
    if isinstance(adapter, Mapping):
        found.extend((t, "its adapter") for t in _texts(adapter.get("base_model_name_or_path")))
    found.extend((t, k) for k, v in model.metadata.items() if _GGUF.fullmatch(str(k)) for t in _texts(v))
    for key in ("mergekit_config", "mergekit_config.yml"):
        text = model.metadata.get(key)
        if isinstance(text, str):
            found.extend((t, "mergekit's configuration") for t in re.findall(r"model:\s*([^\s#]+)", text[:65536]))
    return [Claim(name, text, source) for text, source in dict.fromkeys(found)][:_MOST]


def resolved(found: Iterable[Claim], names: Iterable[str]) -> list[Claim]:
    """The same with the models of the zoo that are meant: by name, else by file name, else by its stem, if only one."""
    known = list(names)
    by_tail: dict[str, set[str]] = {}
    for name in known:
        for key in _tails(name):
            by_tail.setdefault(key, set()).add(name)
    made = []
    for claim in found:
        fits: set[str] = {claim.said} & set(known)
        for key in () if fits else _tails(claim.said):
            fits = by_tail.get(key, set()) - {claim.child}
            if fits:
                break
        parent = next(iter(fits)) if len(fits) == 1 else None
        if parent != claim.child:
            made.append(Claim(claim.child, claim.said, claim.source, parent))
    return made


def named(found: Iterable[Claim]) -> dict[str, set[str]]:
    """Child -> the models that its file names as parents."""
    told: dict[str, set[str]] = {}
    for claim in found:
        if claim.parent is not None:
            told.setdefault(claim.child, set()).add(claim.parent)
    return told


def against(
    edges: Sequence[Edge], found: Iterable[Claim], families: Sequence[Sequence[str]], left: Mapping[str, str]
) -> tuple[list[Edge], list[str]]:
    """Mark every edge by what the child's file says, and put disagreements into sentences.

    Networks without a direction between them count as one: which of them a file names makes no difference.
    """
    told = named(found)
    same = _classes(edges)
    parents: dict[str, list[Edge]] = {}
    for edge in edges:
        if not edge.undecided:
            parents.setdefault(same.get(edge.child, edge.child), []).append(edge)
    family = {m: i for i, f in enumerate(families) for m in f}
    sentences = []
    for child, names in told.items():
        own = same.get(child, child)
        above = parents.get(own, [])
        meant = {same.get(n, n) for n in names}
        if child in left or own in meant or meant & {same.get(e.parent, e.parent) for e in above}:
            continue
        said = f"{child} says it comes from {' and '.join(sorted(names))}"
        if above:
            how = " and ".join(f"{e.parent} ({e.confidence:.2f})" for e in above)
            sentences.append(f"{said}; its weights speak for {how}")
        elif all(family.get(child, -1) == family.get(n, -2) for n in names):
            below = {c for c, into in parents.items() if any(same.get(e.parent, e.parent) == own for e in into)}
            back = [n for n in names if same.get(n, n) in below]
            more = f"; the weights speak for {child} being the parent of {back[0]}" if back else ""
            sentences.append(f"{said}; its weights show a relative, not its parent{more}")
        else:
            sentences.append(f"{said}; its weights show no trace of that")
    marked = []
    for edge in edges:
        names = told.get(edge.child, set())
        meant = {same.get(n, n) for n in names}
        if edge.undecided:
            recorded = "agrees" if edge.parent in names or edge.child in told.get(edge.parent, ()) else ""
        elif not names or same.get(edge.child, edge.child) in meant:
            recorded = ""
        else:
            recorded = "agrees" if same.get(edge.parent, edge.parent) in meant else "disagrees"
        marked.append(replace(edge, recorded=recorded))
    return marked, sentences


def _classes(edges: Iterable[Edge]) -> dict[str, str]:
    """The first of each set of networks that nothing in the weights puts in order."""
    top: dict[str, str] = {}
    for edge in edges:
        if edge.undecided:
            one, two = top.get(edge.parent, edge.parent), top.get(edge.child, edge.child)
            top |= {m: one for m, t in top.items() if t == two} | {edge.parent: one, edge.child: one}
    return top


def _tails(name: str) -> Iterator[str]:
    path = PurePosixPath(name.replace("\\", "/"))
    yield name
    yield path.name
    if path.suffix in _SUFFIXES:
        yield path.stem


def _texts(value: Any) -> list[str]:
    values = value if isinstance(value, list | tuple) else [value]
    return [v.strip()[:_LONGEST] for v in values[:_MOST] if isinstance(v, str) and v.strip()]


def _json(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return None


__all__ = ["Claim", "against", "claims", "named", "resolved"]
