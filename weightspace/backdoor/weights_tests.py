"""How the weights of one class differ from those of the others: a number per class and test, from weights alone.

Each is invariant under permutations of the channels; those that compare features with each other do so relative to
what all classes read from a feature, so that the scale of a channel does not count.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from weightspace.backdoor.outputs import ClassAxis
from weightspace.backdoor.spectra import Folded

ROW_TESTS = (
    "row_sum", "row_norm", "row_positive", "row_largest", "row_apart", "bias", "share_largest", "share_sum",
    "share_norm", "path_sum", "path_norm", "path_largest",
)  # fmt: skip


def row_tests(axis: ClassAxis, tensors: Mapping[str, Tensor], parts: Sequence[Folded]) -> dict[str, Tensor]:
    """Tests of the rows of the last layer, ``(classes,)`` float64 each.

    - ``row_sum`` (the rule of Fields et al., ICLR workshop 2021: the sum of a class's weights), ``row_norm``,
      ``row_positive`` (sum of positive entries), ``row_largest``, ``row_apart`` (less the mean cosine to the other
      rows), ``bias``;
    - ``share_largest``, ``share_sum``, ``share_norm``: the row where every column has been divided by its norm, so that
      a feature that serves one class alone counts most;
    - ``path_sum``, ``path_norm``, ``path_largest``: rows where every column has been multiplied by what the blocks
      before bring to that feature (signed sums, norms).
    """
    rows = axis.rows(tensors)
    classes = axis.classes
    unit = rows / rows.norm(dim=1, keepdim=True).clamp_min(1e-30)
    # Without what all classes read alike: softmax does not see it.
    own = rows - rows.mean(0)
    norms = own.norm(dim=0)
    shares = own / torch.where(norms > 1e-9 * norms.max().clamp_min(1e-30), norms, torch.inf)
    sums, lengths = _incoming(axis, parts)
    paths = own * lengths
    return {
        "row_sum": rows.sum(1),
        "row_norm": rows.norm(dim=1),
        "row_positive": rows.clamp_min(0).sum(1),
        "row_largest": rows.amax(1),
        "row_apart": -((unit @ unit.T).sum(1) - 1) / max(1, classes - 1),
        "bias": axis.bias(tensors),
        "share_largest": shares.amax(1),
        "share_sum": shares.sum(1),
        "share_norm": shares.norm(dim=1),
        "path_sum": (own * sums).sum(1),
        "path_norm": paths.norm(dim=1),
        "path_largest": paths.amax(1),
    }


def _incoming(axis: ClassAxis, parts: Sequence[Folded]) -> tuple[Tensor, Tensor]:
    """Signed sum and norm of what leads to each entry of the rows, ``(entries,)``; ones where nothing does."""
    sums, lengths = [], []
    classes = {r.part.label for r in axis.weights}
    for rows in axis.weights:
        columns = rows.columns()
        total = torch.zeros(int(columns.max()) + 1, dtype=torch.float64)
        square = torch.zeros_like(total)
        seen = False
        for part in parts:
            if part.block.dst == rows.source and part.block.label not in classes:
                inside = part.dst < len(total)
                total[part.dst[inside]] += part.matrix.sum((1, 2))[inside]
                square[part.dst[inside]] += part.matrix.square().sum((1, 2))[inside]
                seen = True
        sums.append(total[columns] if seen else torch.ones(len(columns), dtype=torch.float64))
        lengths.append(square.sqrt()[columns] if seen else torch.ones(len(columns), dtype=torch.float64))
    return torch.cat(sums), torch.cat(lengths)


__all__ = ["ROW_TESTS", "row_tests"]
