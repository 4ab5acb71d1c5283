"""Pictures of a subspace: a column for every axis, its highest elements named, and no weight drawn."""

from __future__ import annotations

import pytest
import torch

import weightspace as ws
from weightspace.backdoor.subspace import Basis, Subspace, rank
from weightspace.errors import WeightspaceError
from weightspace.zoo.description import module_of

VIT = {
    "kind": "vit", "input": [1, 8, 8], "classes": 5, "patch": 4, "dim": 16, "depth": 2, "heads": 4, "hidden": 120,
    "activation": "gelu",
}  # fmt: skip


def made() -> tuple[Subspace, ws.Wiring, dict[str, torch.Tensor]]:
    torch.manual_seed(0)
    module, inputs = module_of(VIT)
    wiring = ws.wiring(module.eval(), *inputs)
    scores = {}
    for name, factor in wiring.free.items():
        scores[name] = 0.5 * torch.rand(*(wiring.factors[o].size for o in factor.over), factor.size)
    longest = max(scores, key=lambda n: scores[n].numel())
    scores[longest][..., 7] = 1.0
    label = next(n for n, r in wiring.roles.items() if r == "weight" and len(wiring.shapes[n]) == 2)
    u, s, v = torch.linalg.svd(module.state_dict()[label], full_matrices=False)
    basis = Basis(label, (1,), 0, 0, len(u), u[:, :2], s[:2], v[:2].T)
    found = Subspace((3, 1, 0, 2, 4), scores, rank(scores), ((longest, 1.0),), {label: basis}, 4, "response", {})
    return found, wiring, dict(module.state_dict())


def test_a_column_for_every_axis_with_its_highest_score() -> None:
    subspace, wiring, tensors = made()
    drawn = subspace.show(wiring, tensors, top=5)
    strips = [t for t in drawn.data if t.type == "heatmap"]
    assert len(strips) == len(subspace.elements)
    highest = sorted(round(float(score.max()), 6) for score in subspace.elements.values())
    assert sorted(round(float(max(t.z)[0]), 6) for t in strips) == highest
    assert max(len(t.z) for t in strips) <= 48, "longer axes are pooled"
    assert len(drawn.layout.annotations) == 5
    labels = {a.text for a in drawn.layout.annotations}
    assert any("7" in text for text in labels)
    assert "class 3" in drawn.layout.title.text
    # Everything drawn is in the file that a browser opens; no array in it is as large as a block of weights.
    assert len(drawn.to_json()) < 400_000


def test_the_same_scores_in_another_order_are_the_same_cells() -> None:
    subspace, wiring, tensors = made()
    strips = {t.x[0]: sorted(float(v[0]) for v in t.z) for t in subspace.show(wiring, tensors).data
              if t.type == "heatmap" and len(t.z) < 48}  # fmt: skip
    turned = {n: s.flip(-1) for n, s in subspace.elements.items()}
    other = Subspace(subspace.targets, turned, rank(turned), subspace.layers, subspace.blocks, 4, "response", {})
    for t in other.show(wiring, tensors).data:
        if t.type == "heatmap" and len(t.z) < 48:
            assert sorted(float(v[0]) for v in t.z) == strips[t.x[0]]


def test_spectra_show_what_is_carried_within_the_block() -> None:
    subspace, _, tensors = made()
    block, carried = subspace.spectra(tensors).data
    assert list(carried.y) == pytest.approx(list(block.y)[:2], rel=1e-4)


def test_another_networks_subspace_is_refused() -> None:
    subspace, _, tensors = made()
    module, inputs = module_of({"kind": "mlp", "input": [4], "classes": 3, "widths": [6], "activation": "relu"})
    with pytest.raises(WeightspaceError, match="another network"):
        subspace.show(ws.wiring(module, *inputs), module.state_dict())
    with pytest.raises(WeightspaceError, match="no tensor"):
        subspace.spectra({})
    bare = Subspace((), {}, (), (), {}, 0, "response", {})
    with pytest.raises(WeightspaceError, match="no blocks"):
        bare.spectra(tensors)
