"""Zoo: filtering, one selection in table and map, opening folders, uploads that are refused in a sentence."""

from __future__ import annotations

import pickle
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from safetensors.torch import save

pytest.importorskip("streamlit", reason="the explorer needs the extra app")
from streamlit.testing.v1 import AppTest

from weightspace.zoo import listing

sys.path.insert(0, str(Path(__file__).parent))
from explorer_pages import settle, texts

Page = Callable[..., AppTest]


def shown(app: AppTest) -> list[str]:
    return [str(name) for name in app.dataframe[0].value.index]


def test_every_model_is_in_the_table_and_the_map(page: Page) -> None:
    app = page("zoo")
    assert len(shown(app)) == 8
    assert "8 of 8 models" in texts(app)
    assert "PCA of the training-free descriptors" in texts(app)


@pytest.mark.parametrize(
    ("line", "kept"),
    [("cnn", 1), ("parent:mlp", 5), ("parameters>1000 -cnn", 7), ("relation:permuted", 1), ("nothing-like-it", 0)],
)
def test_a_filter_in_the_url_keeps_the_rows_it_names(page: Page, line: str, kept: int) -> None:
    app = page("zoo", q=line)
    assert app.text_input(key="q").value == line
    assert f"{kept} of 8 models" in texts(app)


def test_a_column_that_is_not_there_is_said_with_those_that_are_near(page: Page) -> None:
    app = page("zoo", q="test_acuracy>0.9")
    assert "no column 'test_acuracy'; did you mean test_accuracy" in texts(app)
    assert len(shown(app)) == 8


def test_what_is_selected_is_in_the_url_and_leads_on(page: Page) -> None:
    app = page("zoo", sel=["mlp-0.safetensors", "mlp-1.safetensors"])
    assert "**2 selected**" in texts(app)
    assert app.session_state["table"]["selection"]["rows"] == [
        shown(app).index("mlp-0.safetensors"), shown(app).index("mlp-1.safetensors"),
    ]  # fmt: skip
    next(b for b in app.button if b.label == "Clear").click()
    app.run()
    assert "selected**" not in texts(app)
    assert "sel" not in app.query_params


def test_a_selection_survives_a_filter_that_hides_it(page: Page) -> None:
    app = page("zoo", sel=["mlp-0.safetensors"], q="cnn")
    assert "**1 selected**" in texts(app)
    assert app.session_state["table"]["selection"]["rows"] == []


def test_without_a_zoo_a_newcomer_is_told_what_to_do(page: Page) -> None:
    app = page("zoo", zoo=None)
    assert "Welcome" in app.title[0].value
    assert {"Open", "Train the starter zoo"} <= {b.label for b in app.button} | {"Open"}
    assert [tab.label for tab in app.tabs] == ["Open a folder", "Upload", "Starter zoo"]


def test_a_folder_that_is_none_is_a_sentence(page: Page) -> None:
    app = page("zoo", zoo=None)
    app.text_input[0].set_value("/nowhere/at/all")
    next(b for b in app.button if b.label == "Open").click().run()
    assert "is not a folder on this machine" in app.error[0].value


def test_a_folder_without_an_index_is_indexed_on_demand(page: Page, tmp_path: Path) -> None:
    folder = tmp_path / "new"
    folder.mkdir()
    (folder / "one.safetensors").write_bytes(save({"w": torch.randn(4, 3), "b": torch.randn(4)}))
    (folder / "bad.safetensors").write_bytes(b"\x10\x00\x00\x00\x00\x00\x00\x00{")
    app = page("zoo", zoo=folder)
    assert "has no index yet" in texts(app)
    next(b for b in app.button if b.label == "Index this folder").click().run()
    app = settle(app).run()
    assert shown(app) == ["one.safetensors"]
    assert any("bad.safetensors" in frame.value.index for frame in app.table)


def test_a_server_for_others_opens_no_other_folder(page: Page, tmp_path: Path, tiny: Path) -> None:
    app = page("zoo", zoo=tiny, local=False)
    app.query_params["zoo"] = str(tmp_path)
    app.run()
    assert "shows only the folder that it was started on" in app.error[0].value


class _Evil:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        import os

        return os.system, ("touch /tmp/weightspace-was-here",)


def test_hostile_uploads_are_refused_in_sentences_and_the_good_one_is_taken(page: Page) -> None:
    app = page("zoo")
    good = save({"w": torch.randn(4, 3), "b": torch.randn(4)})
    files = [
        ("../../evil.pt", pickle.dumps(_Evil()), "application/octet-stream"), ("empty.safetensors", b"", ""),
        ("cut.safetensors", good[: len(good) // 2], ""), ("picture.safetensors", b"\x89PNG\r\n\x1a\n" + b"0" * 99, ""),
        ("fine.jpg", good, "image/jpeg"),
    ]  # fmt: skip
    app.file_uploader(key="files").set_value(files)
    app = settle(app.run()).run()
    reasons = next(f.value for f in app.table if "reason" in f.value)["reason"].to_dict()
    assert set(reasons) == {"evil.pt", "empty.safetensors", "cut.safetensors", "picture.safetensors"}
    assert "0 bytes" in reasons["empty.safetensors"]
    assert all(len(reason) > 20 and "Traceback" not in reason for reason in reasons.values())
    assert not any("uploads" in reason for reason in reasons.values())
    assert not Path("/tmp/weightspace-was-here").exists()
    assert "1 of your uploads can be chosen" in texts(app)
    app.switch_page("model.py").run()
    assert "upload/fine.jpg" in app.selectbox(key="model").options


def test_a_map_by_umap_says_what_is_missing_or_is_drawn(page: Page) -> None:
    app = page("zoo", map_of="descriptor, UMAP")
    if find_spec("umap") is None:
        assert "pip install 'weightspace[umap]'" in texts(app)
    else:
        assert "UMAP of the training-free descriptors" in texts(app)
    assert len(shown(app)) == 8


def test_a_map_of_functions_holds_what_was_asked_the_same(page: Page, tiny: Path) -> None:
    app = page("zoo", map_of="function, PCA")
    assert app.selectbox(key="map_of").value == "function, PCA"
    assert "functions of 8 models that were asked the same inputs" in texts(app)
    names, vectors = listing.vectors(tiny, "function")
    assert len(names) == len(vectors) == 8
    copy, own = (vectors[names.index(f"{name}.safetensors")] for name in ("copy-0", "mlp-0"))
    assert abs(copy - own).max() < 1e-6
    assert listing.commonest(["", "images", "noise of 5", "images", ""]) == "images"
    assert listing.commonest(["", ""]) == ""
