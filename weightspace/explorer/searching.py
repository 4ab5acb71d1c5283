"""Finding models: by an example, by rows of a task, by an architecture. For workers: each gives a table."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

from weightspace.errors import ZooError
from weightspace.zoo.zoo import By, Zoo

if TYPE_CHECKING:
    import pandas as pd
    from torch import Tensor

    from weightspace.zoo.search import Search

SETS = ("digits", "mnist", "usps", "cifar10-gray", "cifar10")
"""Data sets whose rows can be asked about."""


def similar(folder: str, address: str, k: int, by: str) -> pd.DataFrame:
    """The models of a zoo nearest to a file, a row each: model, distance, whose distance it is, and facts.

    Raises ``ZooError`` as ``Zoo.similar`` does.
    """
    import pandas as pd

    rows = []
    for one in Zoo(folder).similar(address, k, cast(By, by)):
        record = one.card.get("record") or {}
        relation = str(record.get("relation") or "")
        if record.get("parent"):
            relation += f", {record['parent']}"
        rows.append((one.name, one.distance, one.measure, one.card["architecture"], one.card["parameters"],
                     one.card["wiring"], relation))  # fmt: skip
    columns = ["model", "distance", "by", "architecture", "parameters", "wiring", "record says"]
    return pd.DataFrame(rows, columns=columns)


def architecture(folder: str, address: str, k: int) -> dict[str, Any]:
    """The models whose computation is most like that of a file: ``table``, ``left_out`` and ``asked``."""
    return _plain(Zoo(folder).search_architecture(address, k=k, progress=True))


def task(folder: str, x: Tensor, y: Tensor, k: int) -> dict[str, Any]:
    """The models that know most of the task that labelled rows are of: ``table``, ``left_out`` and ``asked``."""
    return _plain(Zoo(folder).search_task(x, y, k, progress=True))


def task_of_set(folder: str, name: str, classes: list[int], rows: int, k: int) -> dict[str, Any]:
    """The same for rows of a data set. Raises ``ZooError`` where it is not here."""
    from weightspace.zoo.data import load_data

    part = load_data(name).only(classes)
    return task(folder, part.test_x[:rows], part.test_y[:rows], k)


def task_of_file(folder: str, path: str, k: int) -> dict[str, Any]:
    """The same for a file of inputs and labels (any file of tensors, one of them called ``labels``)."""
    from weightspace.merge.inputs import load

    held = load(path)
    if held.y is None or len(held.args) != 1:
        raise ZooError(
            f"a file with one tensor of rows and one called labels was expected, found {len(held.args)} of rows and "
            f"{'no labels' if held.y is None else 'labels'}"
        )
    return task(folder, held.args[0], held.y, k)


def _plain(found: Search) -> dict[str, Any]:
    import pandas as pd

    rows = [(h.name, h.score, h.why, h.card["architecture"], h.card["parameters"]) for h in found]
    table = pd.DataFrame(rows, columns=["model", "score", "why", "architecture", "parameters"])
    return {"table": table, "left_out": dict(found.left_out), "asked": found.asked, "seconds": found.seconds}


__all__ = ["SETS", "By", "architecture", "similar", "task", "task_of_file", "task_of_set"]
