"""What the command line does with a lineage."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from weightspace.errors import ZooError
from weightspace.lineage.lineage import Lineage
from weightspace.paths import write_whole


def run(models: Sequence[str], out: Path | None = None, moved: int = 8, progress: bool = False) -> Lineage:
    """Trace the lineage of some models, or of those in one folder; write it to ``out`` (``.json`` or ``.graphml``)."""
    from weightspace.lineage.entry import lineage

    if out is not None and out.suffix not in (".json", ".graphml"):
        raise ZooError(f"a lineage is written as .json or .graphml, not as {out.name}")
    found = lineage(models[0] if len(models) == 1 else models, moved=moved, progress=progress)
    if out is not None:
        write_whole(out, _written(found, out.suffix))
    return found


def lines(found: Lineage, tree: bool = True) -> list[str]:
    """What is printed: the forest in lines (or not), disagreements with what files say, and what was left out."""
    return repr(found).splitlines() if tree else [found.headline, *found.remarks()]


def _written(found: Lineage, suffix: str) -> bytes:
    if suffix == ".json":
        return json.dumps(found.to_json(), indent=2).encode()
    import networkx as nx

    return "\n".join(nx.generate_graphml(found.to_networkx())).encode()


__all__ = ["lines", "run"]
