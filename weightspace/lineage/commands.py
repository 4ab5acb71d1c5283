"""What the command line does with a lineage."""

from __future__ import annotations

import json
from pathlib import Path

from weightspace.errors import ZooError
from weightspace.lineage.lineage import Lineage
from weightspace.paths import write_whole


def run(folder: Path, out: Path | None = None, moved: int = 8, progress: bool = False) -> Lineage:
    """Index a folder, trace the lineage of its models, and write it to ``out`` (``.json`` or ``.graphml``)."""
    from weightspace.zoo import Zoo

    if out is not None and out.suffix not in (".json", ".graphml"):
        raise ZooError(f"a lineage is written as .json or .graphml, not as {out.name}")
    zoo = Zoo(folder)
    zoo.index(progress=progress)
    found = zoo.lineage(moved=moved, progress=progress)
    if out is not None:
        write_whole(out, _written(found, out.suffix))
    return found


def lines(found: Lineage, tree: bool = True) -> list[str]:
    """What is printed: the forest in lines, disagreements with what files say, and what was left out."""
    said = repr(found).splitlines()
    return said if tree else [said[0], *(line for line in said if line.startswith("  "))]


def _written(found: Lineage, suffix: str) -> bytes:
    if suffix == ".json":
        return json.dumps(found.to_json(), indent=2).encode()
    import networkx as nx

    return "\n".join(nx.generate_graphml(found.to_networkx())).encode()


__all__ = ["lines", "run"]
