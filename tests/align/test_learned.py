"""The learned matcher: it moves with what it reads, learns, and refuses what it cannot use."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

import weightspace as ws
from tests.align.small import DESCRIPTIONS, network, noisy
from weightspace.align.learned import (
    ElementEncoder,
    learned,
    load_matcher,
    matched,
    node_numbers,
    save_matcher,
    states_of,
)
from weightspace.align.matcher_training import Member, contrast, population, train_matcher
from weightspace.errors import AlignmentError
from weightspace.wiring.wiring import Permutation, Wiring
from weightspace.zoo.files import save_network


def encoder(seed: int = 0) -> ElementEncoder:
    torch.manual_seed(seed)
    return ElementEncoder(width=16, rounds=2, probes=8, outputs=16).eval()


def right(wiring: Wiring, planted: Permutation, found: Permutation) -> float:
    both = planted.compose(found)
    hits = [both._of(f) == torch.arange(x.size) for f, x in wiring.free.items() if x.size > 1]
    return float(torch.cat([h.flatten() for h in hits]).double().mean())


@pytest.mark.parametrize("name", DESCRIPTIONS)
def test_states_move_with_the_elements(name: str) -> None:
    wiring, tensors, _ = network(name)
    planted = wiring.random(4)
    with torch.no_grad():
        before, after = (states_of(encoder(), [t], wiring)[0] for t in (tensors, wiring.apply(planted, tensors)))
    assert set(before) == {n for n, f in wiring.free.items() if f.size > 1}
    for f, states in before.items():
        front = [*wiring.free[f].over, f]
        assert states.shape == (*(wiring.factors[o].size for o in front), 16)
        torch.testing.assert_close(after[f], states[tuple(planted._grid(front))], atol=1e-3, rtol=1e-3)
    element, costs = matched(before, after, wiring)
    assert planted.compose(element).is_identity
    assert all(c.shape[-1] == wiring.free[f].size for f, c in costs.items())


@pytest.mark.parametrize("name", DESCRIPTIONS)
def test_every_element_has_nodes_of_its_own(name: str) -> None:
    wiring, tensors, _ = network(name)
    structure = encoder().prepare(tensors, wiring).structure
    for f, index in node_numbers(structure, wiring).items():
        rows = index.reshape(wiring.free[f].size if not wiring.free[f].over else -1, index.shape[-1])
        assert len(torch.unique(rows)) == rows.numel()
        assert int(rows.max()) < structure.num_nodes


def members() -> list[Member]:
    out = []
    for name in ("mlp", "cnn"):
        for seed in range(3):
            wiring, tensors, _ = network(name, seed)
            out += [Member(tensors, wiring, f"{name} {seed}"), Member(noisy(tensors, 1, 0.1), wiring, f"{name} {seed}")]
    return out


def test_training_teaches_it_to_see_through_noise() -> None:
    wiring, tensors, _ = network("mlp", 9)
    planted = wiring.random(1)
    moved = wiring.apply(planted, noisy(tensors, 5, 0.6))
    trained = train_matcher(members(), steps=60, batch=6, rate=4e-3, encoder=encoder().train())

    def share(one: ElementEncoder) -> float:
        with torch.no_grad():
            a, b = (states_of(one, [t], wiring)[0] for t in (tensors, moved))
        return right(wiring, planted, matched(a, b, wiring)[0])

    assert share(trained) > share(encoder()) + 0.1
    again = train_matcher(members(), steps=3, batch=2, encoder=encoder().train())
    twice = train_matcher(members(), steps=3, batch=2, encoder=encoder().train())
    assert all(torch.equal(x, y) for x, y in zip(again.state_dict().values(), twice.state_dict().values(), strict=True))


def test_the_loss_knows_which_belong_together() -> None:
    wiring, tensors, _ = network("vit")
    planted = wiring.random(2)
    with torch.no_grad():
        a, b = (states_of(encoder(), [t], wiring)[0] for t in (tensors, wiring.apply(planted, tensors)))
        good = float(contrast(a, b, planted.invert(), wiring, 0.05))
        bad = float(contrast(a, b, wiring.identity(), wiring, 0.05))
    assert good < bad - 0.5


@pytest.mark.parametrize("name", DESCRIPTIONS)
def test_the_shipped_matcher_starts_weight_matching(name: str) -> None:
    wiring, tensors, _ = network(name)
    planted = wiring.random(3)
    b = wiring.apply(planted, noisy(tensors, 2, 0.02))
    found = ws.align(tensors, b, "learned", wiring=wiring)
    assert planted.compose(found.permutations).is_identity
    assert found.diagnostics["found"] <= found.objective + 1e-6
    assert found.diagnostics["reading"] > 0
    raw = learned(tensors, b, wiring, refine=False)
    assert raw.permutations.index.keys() == wiring.free.keys()


def test_what_lies_well_stays() -> None:
    """Refining never ends below refining from b as it is."""
    wiring, tensors, _ = network("mlp")
    near = noisy(tensors, 0, 0.3)
    found = ws.align(tensors, near, "learned", wiring=wiring)
    assert found.objective >= found.before - 1e-6


def test_files(tmp_path: Path) -> None:
    file = tmp_path / "matcher.safetensors"
    save_matcher(encoder(), file, {"steps": 1})
    wiring, tensors, _ = network("mlp")
    with torch.no_grad():
        one, two = (states_of(e, [tensors], wiring)[0] for e in (encoder(), load_matcher(file)))
    assert all(torch.allclose(one[f], two[f], atol=0.05) for f in one)
    assert ws.align(tensors, tensors, "learned", wiring=wiring, matcher=file).permutations.is_identity
    with pytest.raises(AlignmentError, match="is no matcher"):
        load_matcher(tmp_path / "nothing.safetensors")
    (tmp_path / "broken.safetensors").write_bytes(file.read_bytes()[:500])
    with pytest.raises(AlignmentError, match="is no matcher"):
        load_matcher(tmp_path / "broken.safetensors")
    with pytest.raises(AlignmentError, match="no networks"):
        train_matcher([])


def test_populations_are_read_with_their_families(tmp_path: Path) -> None:
    torch.manual_seed(0)
    _, tensors, _ = network("mlp")

    def save(name: str, weights: dict[str, Tensor], **record: object) -> None:
        common = {"network": DESCRIPTIONS["mlp"], "final": True, "population": "p"}
        save_network(weights, {**common, **record}, tmp_path / name)

    save("a.safetensors", tensors)
    save("b.safetensors", noisy(tensors, 1), parent="a.safetensors")
    save("c.safetensors", noisy(tensors, 2), parent="b.safetensors")
    save("d.safetensors", noisy(tensors, 3), diverged=True)
    save("e.safetensors", noisy(tensors, 4), final=False)
    found = population(tmp_path)
    assert len(found) == 3
    assert len({m.root for m in found}) == 1
    assert len(population(tmp_path, most=2)) == 2
