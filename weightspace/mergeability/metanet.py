"""What a metanet says of a merge: one wiring, with the base, what became of a model, and what became of its partners.

The operator metanet reads three networks on one wiring: channels w_base, τ_A, τ_B, their magnitudes and products of
pairs, among them τ_A·τ_B. A is the model whose tasks are asked about, B the sum of its partners' task vectors. Outputs
are the retained accuracy of A on the link scale, one for each method.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from weightspace.metanets.operator import OperatorMetanet

if TYPE_CHECKING:
    from weightspace.metanets.batch import Item
    from weightspace.wiring.wiring import Wiring

Array = NDArray[np.float64]
_log = logging.getLogger(__name__)

CONFIG: dict[str, Any] = {"width": 20, "rounds": 2, "models": 3, "probes": 0, "embedding": 48, "dropout": 0.05}
_BATCH = 16


@dataclass(frozen=True, eq=False)
class Reader:
    """Networks of one family, as the metanet wants them: ``base`` and ``models`` with their wiring."""

    base: Mapping[str, Tensor]
    models: Sequence[Mapping[str, Tensor]]
    wiring: Wiring

    def item(self, metanet: OperatorMetanet, own: int, partners: Sequence[int]) -> Item:
        """One cell: base, model, and base plus the partners' task vectors."""
        from weightspace.graph.build import of_tensors

        base = {k: v.float() if v.is_floating_point() else v for k, v in self.base.items()}
        other = dict(base)
        for j in partners:
            for name, start in base.items():
                if start.is_floating_point():
                    other[name] = other[name] + (self.models[j][name].float() - start)
        model = {k: v.float() if v.is_floating_point() else v for k, v in self.models[own].items()}
        return metanet.prepare(*(of_tensors(t, self.wiring) for t in (base, model, other)))


def train(
    cells: Sequence[tuple[Reader, int, Sequence[int]]], targets: Array, *, epochs: int = 6, rate: float = 3e-3,
    seed: int = 0, seconds: float = float("inf"),
) -> OperatorMetanet:  # fmt: skip
    """A metanet of cells ``(reader, model, partners)`` and their targets ``(cells, outputs)``, NaN where unknown.

    ``seconds``: the rate falls to 0 by then, however many epochs were done.
    """
    torch.manual_seed(seed)
    metanet = OperatorMetanet(targets.shape[1], **CONFIG)
    centre, unit = np.nanmean(targets, 0), np.nanstd(targets, 0)
    goal = torch.from_numpy((targets - centre) / unit).float()
    items = [reader.item(metanet, own, partners) for reader, own, partners in cells]
    optimiser = torch.optim.AdamW(metanet.parameters(), lr=rate, weight_decay=0.05)
    started, draw = time.monotonic(), np.random.default_rng(seed)
    total, done = epochs * (-(-len(items) // _BATCH)), 0
    metanet.train()
    for epoch in range(epochs):
        losses = []
        # Networks of one shape stand together: their blocks are stacked.
        order = draw.permutation(len(items))
        shape = np.array([id(cells[i][0].wiring) for i in order])
        alike = [order[shape == s] for s in np.unique(shape)]
        batches = [part[k : k + _BATCH] for part in alike for k in range(0, len(part), _BATCH)]
        draw.shuffle(batches)
        for batch in batches:
            progress = max(done / total, (time.monotonic() - started) / seconds)
            if progress >= 1:
                break
            for group in optimiser.param_groups:
                group["lr"] = rate * min(1.0, 20 * progress + 0.05) * 0.5 * (1 + np.cos(np.pi * progress))
            out = metanet(metanet.collate([items[i] for i in batch]))
            y = goal[batch]
            known = torch.isfinite(y)
            loss = torch.nn.functional.smooth_l1_loss(out[known], y[known])
            optimiser.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(metanet.parameters(), 1.0)
            optimiser.step()
            losses.append(float(loss.detach()))
            done += 1
        if losses:
            _log.info("epoch %d: loss %.4f, %.0f s", epoch + 1, np.mean(losses), time.monotonic() - started)
    metanet.eval()
    metanet.config["centre"], metanet.config["unit"] = centre.tolist(), unit.tolist()
    return metanet


def answers(metanet: OperatorMetanet, reader: Reader, merges: Sequence[Sequence[int]]) -> Array:
    """Retained accuracy on the link scale for each model of each merge: ``(cells, outputs)``."""
    centre, unit = (np.asarray(metanet.config[k]) for k in ("centre", "unit"))
    cells = [(i, [j for j in merge if j != i]) for merge in merges for i in merge]
    parts = []
    with torch.no_grad():
        for start in range(0, len(cells), _BATCH):
            items = [reader.item(metanet, i, p) for i, p in cells[start : start + _BATCH]]
            parts.append(metanet(metanet.collate(items)).double().numpy())
    found: Array = np.concatenate(parts) * unit + centre
    return found
