"""Finding models: by an example, by a task, by an architecture. For workers: each gives a table."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, cast

from weightspace.zoo.zoo import Zoo

if TYPE_CHECKING:
    import pandas as pd

By = Literal["auto", "both", "encoder", "descriptor"]


def similar(folder: str, address: str, k: int, by: str) -> pd.DataFrame:
    """The models of a zoo nearest to a file, a row each: model, distance, whose distance it is, and facts.

    Raises ``ZooError`` as ``Zoo.similar`` does.
    """
    import pandas as pd

    found = Zoo(folder).similar(address, k, cast(By, by))
    rows = []
    for one in found:
        record = one.card.get("record") or {}
        relation = str(record.get("relation") or "")
        if record.get("parent"):
            relation += f", {record['parent']}"
        rows.append((one.name, one.distance, one.measure, one.card["architecture"], one.card["parameters"],
                     one.card["wiring"], relation))  # fmt: skip
    columns = ["model", "distance", "by", "architecture", "parameters", "wiring", "record says"]
    return pd.DataFrame(rows, columns=columns)




__all__ = ["By", "similar"]
