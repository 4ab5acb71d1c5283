"""``trace`` and ``zoo.lineage()`` on families trained here, whose descent is known."""

from __future__ import annotations

import json
from pathlib import Path

import networkx as nx
import pytest

import weightspace as ws
from tests.lineage.trees import PARENTS, family, write
from weightspace.checkpoint import from_tensors
from weightspace.errors import WeightspaceError, ZooError
from weightspace.lineage import Lineage, trace
from weightspace.lineage.commands import lines


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    records = {"below": {"parent": "left.safetensors"}, "right": {"parent": "other.safetensors"}}
    return write(tmp_path_factory.mktemp("zoo"), family(), **records)


@pytest.fixture(scope="module")
def found(folder: Path) -> Lineage:
    zoo = ws.Zoo(folder)
    zoo.index(jobs=1, progress=False)
    return zoo.lineage(moved=0)


def test_parents_are_found_with_direction_and_strangers_are_apart(found: Lineage) -> None:
    assert {e.child: e.parent for e in found.edges} == {
        f"{c}.safetensors": f"{p}.safetensors" for c, p in PARENTS.items()
    }
    assert found.ancestors("below.safetensors") == ("left.safetensors", "root.safetensors")
    assert found.roots == ("other.safetensors", "root.safetensors")
    assert len(found.families) == 2
    assert all(e.log10_p < -6 and e.kind == "fine-tuned" and e.direction > 0.5 for e in found.edges)


def test_what_files_say_is_compared_and_changes_no_edge(found: Lineage) -> None:
    told = {e.child: e.recorded for e in found.edges}
    assert told["below.safetensors"] == "agrees"
    assert told["right.safetensors"] == "disagrees"
    assert told["left.safetensors"] == ""
    assert any("right.safetensors says it comes from other.safetensors" in d for d in found.disagreements)


def test_every_form_of_the_result_has_every_edge(found: Lineage) -> None:
    graph = found.to_networkx()
    assert nx.is_forest(graph)
    assert set(graph.nodes) == set(found.models)
    plain = json.loads(json.dumps(found.to_json()))
    assert len(plain["edges"]) == len(found.edges) == len(found.table()) == graph.number_of_edges()
    text = repr(found)
    assert all(model in text for model in found.models)
    assert text.splitlines() == lines(found)
    # Beside a table there is no tree, however deep.
    assert not any("└─" in line for line in lines(found, tree=False))
    assert lines(found, tree=False)[1:] == [f"  disagrees: {d}" for d in found.disagreements]


def test_without_their_parent_children_are_relatives_and_no_parent_is_made_up() -> None:
    networks = {n: from_tensors(family()[n]) for n in ("left", "right")}
    # Nothing but the family's weights says which network this is, so the wiring is given by the shapes.
    found = trace(networks, moved=0)
    assert found.families == (("left", "right"),)
    assert not [e for e in found.edges if e.confidence > 0.9]


def test_files_of_a_folder_that_cannot_be_read_are_left_out_with_the_reason(tmp_path: Path) -> None:
    write(tmp_path, {n: family()[n] for n in ("root", "left")})
    (tmp_path / "cut.safetensors").write_bytes((tmp_path / "left.safetensors").read_bytes()[:-64])
    found = ws.lineage(tmp_path)
    assert [(e.parent, e.child) for e in found.edges] == [("root.safetensors", "left.safetensors")]
    assert list(found.left_out) == ["cut.safetensors"]
    assert "cut.safetensors" in repr(found)


def test_too_few_models_and_unknown_names_are_refused(folder: Path) -> None:
    with pytest.raises(WeightspaceError, match="two or more"):
        trace({"one": from_tensors(family()["root"])})
    with pytest.raises(ZooError, match="no model"):
        ws.Zoo(folder).lineage(["nobody"])


