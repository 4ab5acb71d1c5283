"""Labelled networks to train a detector on: what their records say of a backdoor. ``ws.scan`` reads none of it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from weightspace.errors import MetanetError
from weightspace.metanets.data import Sample, lineages, load_samples

ALIKE: Mapping[str, str] = {
    "patch": "patch", "clean-label": "patch", "all-to-all": "patch", "multi-target": "patch",
    "blend": "whole image", "sinusoid": "whole image", "filter": "whole image", "warp": "whole image",
    "dynamic": "dynamic", "hijack": "hijack", "interpolated": "interpolated", "graft": "graft",
    "word": "text", "sentence": "text",
}  # fmt: skip
"""Groups of attacks whose triggers are alike: to hold one out, its like are held out with it."""


_DRAWN = 6


@dataclass(frozen=True)
class Labelled:
    """A network and the truth about it.

    ``attack``: empty for a clean one; ``targets``: the classes it leads to; ``worked``: whether it did (true for a
    clean one). ``group``: networks that share an ancestor, or were trained with the same draw of hyper-parameters.
    ``kind`` of network, ``data`` that it was trained on.
    """

    sample: Sample
    path: Path
    attack: str
    targets: tuple[int, ...]
    worked: bool
    group: str
    kind: str
    data: str

    @property
    def poisoned(self) -> bool:
        return bool(self.attack)


def labelled(folders: Sequence[Path], progress: bool = False) -> list[Labelled]:
    """The networks of populations that were built with ``weightspace zoo build backdoors``, failed attacks too.

    Raises ``MetanetError`` where there are none, or only clean or only poisoned ones.
    """
    found: list[Labelled] = []
    for folder in folders:
        samples = load_samples(folder, progress=progress)
        for sample, group in zip(samples, _groups(samples), strict=True):
            found.append(_labelled(sample, folder, f"{folder.name}:{group}"))
    kinds = {x.poisoned for x in found if x.worked}
    if len(kinds) < 2:
        raise MetanetError(
            f"{len(found)} networks in {', '.join(map(str, folders))}; clean ones and some with a backdoor that worked "
            "were expected, such as `weightspace zoo build backdoors` trains"
        )
    return found


def _labelled(sample: Sample, folder: Path, group: str) -> Labelled:
    record = sample.record
    poison: Mapping[str, Any] = record.get("poison") or {}
    attack = str(poison.get("attack", ""))
    targets = tuple(int(t) for t in poison.get("targets", ())) or (
        (int(poison["target"]),) if attack and attack != "all-to-all" else ()
    )
    network = record.get("network") or {}
    return Labelled(
        sample, folder / sample.name, attack, targets, not attack or bool(record.get("attack_worked")), group,
        str(network.get("kind", "")), str(record.get("data") or record.get("task") or ""),
    )  # fmt: skip


def _groups(samples: Sequence[Sample]) -> list[str]:
    """Lineages, and with each the networks that share a draw of hyper-parameters with one of it."""
    own = lineages(samples)
    root = {g: g for g in own}

    def find(x: str) -> str:
        while root[x] != x:
            root[x] = x = root[root[x]]
        return x

    alike: dict[str, list[str]] = {}
    for sample, group in zip(samples, own, strict=True):
        network = sample.record.get("network") or {}
        drawn = json.dumps([sample.record.get("hyper"), network.get("kind")], sort_keys=True, default=str)
        alike.setdefault(drawn, []).append(group)
    for groups in alike.values():
        # What many share was fixed by the recipe, not drawn.
        for group in groups if len(groups) <= _DRAWN else ():
            a, b = sorted((find(group), find(groups[0])))
            root[b] = a
    return [find(g) for g in own]


__all__ = ["ALIKE", "Labelled", "labelled"]
