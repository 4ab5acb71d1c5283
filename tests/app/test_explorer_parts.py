"""The explorer's plain functions: uploads, filters, maps, the picture of a graph, the command."""

from __future__ import annotations

import contextlib
import io
import stat
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import weightspace as ws
from weightspace.errors import ZooError
from weightspace.explorer import anatomy, backdoors, descent, launch, maps, network, neurons, style, tables, uploads
from weightspace.explorer.anatomy import Anatomy, Channels, singular_values, squares_of

# ------------------------------------------------------------------------------------ uploads


@given(st.text(max_size=300))
@settings(max_examples=200, deadline=None)
def test_a_harmless_name_stays_in_its_folder_whatever_was_uploaded(name: str) -> None:
    found = uploads.harmless(name)
    assert found == Path(found).name
    assert found not in ("", ".", "..")
    assert not found.startswith((".", "-"))
    assert len(found) <= 120
    assert found.isascii()


def test_names_keep_what_matters() -> None:
    assert uploads.harmless("../../etc/pass wd.safetensors") == "pass_wd.safetensors"
    assert uploads.harmless("C:\\temp\\model.pt") == "model.pt"


def test_uploads_are_private_and_the_same_bytes_are_kept_once(tmp_path: Path) -> None:
    private = uploads.private_folder()
    assert stat.S_IMODE(private.stat().st_mode) == 0o700
    token = uploads.new_token()
    folder = uploads.folder_of(private, token, make=True)
    assert folder is not None
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    one = uploads.keep(folder, "a.pt", io.BytesIO(b"12"))
    assert stat.S_IMODE(one.stat().st_mode) == 0o600
    kept = one.stat()
    assert uploads.keep(folder, "a.pt", io.BytesIO(b"12")) == one
    assert (one.stat().st_ino, one.stat().st_mtime_ns) == (kept.st_ino, kept.st_mtime_ns)
    assert uploads.keep(folder, "a.pt", io.BytesIO(b"34")).name == "a-2.pt"
    assert sorted(f.name for f in folder.iterdir()) == ["a-2.pt", "a.pt"]


@pytest.mark.parametrize("token", ["", "..", "../../../etc", "x" * 15, "a" * 15 + "/", "A" * 16])
def test_a_token_that_nobody_was_given_opens_nothing(tmp_path: Path, token: str) -> None:
    assert uploads.folder_of(tmp_path, token) is None


def test_limits_leave_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ZooError, match="0 bytes"):
        uploads.keep(tmp_path, "empty.pt", io.BytesIO())
    monkeypatch.setattr(uploads, "MOST_FILES", 1)
    uploads.keep(tmp_path, "a.pt", io.BytesIO(b"1"))
    with pytest.raises(ZooError, match="full"):
        uploads.keep(tmp_path, "b.pt", io.BytesIO(b"2"))
    assert [f.name for f in tmp_path.iterdir()] == ["a.pt"]


def test_words_of_a_file_draw_nothing() -> None:
    ui = pytest.importorskip("weightspace.explorer.ui", reason="the explorer needs the extra app")
    assert ui.plain("![x](http://far/away.png) **b** `c`") == r"!\[x\](http://far/away.png) \*\*b\*\* \`c\`"
    assert ui.plain("two\nlines") == "two lines"


# ------------------------------------------------------------------------------------ filters and maps

FRAME = pd.DataFrame(
    {
        "architecture": ["MLP", "CNN", "CNN"], "parameters": [100, 20_000, 3_000_000],
        "test_accuracy": [0.5, 0.9, None], "population": ["low", "high", "high"],
    }, index=pd.Index(["a.pt", "b.pt", "c-permuted.pt"], name="name"),
)  # fmt: skip


@pytest.mark.parametrize(
    ("line", "kept"),
    [("", "abc"), ("cnn", "bc"), ("cnn -permuted", "b"), ("parameters>1k", "bc"), ("parameters>=3M", "c"),
     ("test_accuracy>50%", "b"), ("-test_accuracy>50%", "ac"), ("name:c-", "c"), ("population=high cnn", "bc"),
     ("architecture!=cnn", "a"), ('"c-permuted"', "c"), ("unclosed 'quote", "")],
)  # fmt: skip
def test_a_line_of_words_keeps_rows(line: str, kept: str) -> None:
    mask = tables.matching(FRAME, line)
    assert "".join(str(name)[0] for name in FRAME.index[mask]) == kept


@pytest.mark.parametrize(("line", "words"), [("acuracy>1", "no column"), ("parameters>many", "a number was expected")])
def test_a_line_that_makes_no_sense_is_said(line: str, words: str) -> None:
    with pytest.raises(ZooError, match=words):
        tables.matching(FRAME, line)


@given(st.text(max_size=60))
@settings(max_examples=150, deadline=None)
def test_no_line_breaks_the_filter(line: str) -> None:
    with contextlib.suppress(ZooError):
        assert len(tables.matching(FRAME, line)) == 3


def test_principal_components_are_those_of_the_covariance() -> None:
    x = np.random.default_rng(0).normal(size=(40, 6)) * np.array([9, 4, 1, 1, 1, 1.0])
    places, share = maps.pca(x)
    wide, _ = maps.pca(x[:5])
    values = np.linalg.eigvalsh(np.cov(x.T))[::-1]
    assert share == pytest.approx(values[:2].sum() / values.sum())
    assert np.var(places[:, 0], ddof=1) == pytest.approx(values[0])
    assert wide.shape == (5, 2)


def test_the_map_has_every_model_once_and_rings_the_selected() -> None:
    figure = maps.draw(list("abc"), np.eye(3)[:, :2], FRAME.set_axis(list("abc")), "architecture", [True, True, False],
                       ["b"])  # fmt: skip
    held = [str(n) for trace in figure.data if trace.name != "selected" for n in trace.customdata]
    assert sorted(held) == ["a", "b", "c"]
    assert list(next(t for t in figure.data if t.name == "selected").customdata) == ["b"]


def test_many_classes_end_in_others() -> None:
    classes, colours = style.colours_of([str(i) for i in range(40)] + ["0"] * 5 + [None])
    assert len(colours) <= 11
    assert classes[0] == "0"
    assert classes[-2] == "0"
    assert "others" in colours


# ------------------------------------------------------------------------------------ one network


class Stream(nn.Module):
    """A residual stream with equal blocks on it."""

    def __init__(self, depth: int = 6) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(5, 8), nn.Linear(8, 3)
        self.into = nn.ModuleList(nn.Linear(8, 16) for _ in range(depth))
        self.back = nn.ModuleList(nn.Linear(16, 8) for _ in range(depth))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        for a, b in zip(self.into, self.back, strict=True):
            x = x + b(torch.relu(a(x)))
        return self.last(x)


def test_equal_parts_are_drawn_once_and_opened_one_by_one() -> None:
    module = Stream()
    graph = ws.graph(dict(module.state_dict()), ws.wiring(module, torch.zeros(2, 5)))
    drawing = network.arrange(graph)
    assert list(drawing.parts.values()) == [6]
    assert len(drawing.nodes) == 4
    assert sum(len(node.cells) for node in drawing.nodes.values()) == len(graph.cells)
    opened = network.arrange(graph, opened=["all"])
    assert len(opened.nodes) == 4 + 5
    for one in (drawing, opened):
        assert sum(edge.weights for edge in one.edges) == graph.num_edges
        places = [(node.x, node.y) for node in one.nodes.values()]
        assert len(set(places)) == len(places)
    assert network.draw(drawing).data


def test_unequal_parts_stay_apart() -> None:
    module = Stream()
    module.into[2], module.back[2] = nn.Linear(8, 7), nn.Linear(7, 8)
    graph = ws.graph(dict(module.state_dict()), ws.wiring(module, torch.zeros(2, 5)))
    assert list(network.arrange(graph).parts.values()) == [5]


def test_the_neurons_of_an_axis_are_its_weights(tmp_path: Path) -> None:
    weight = torch.randn(6, 4)
    bundle = neurons._dense(weight[None, :, :, None], torch.arange(6)[None], torch.arange(4)[None],
                            torch.arange(2, 5), True)  # fmt: skip
    assert torch.equal(bundle, weight[2:5])
    other = neurons._dense(weight[None, :, :, None], torch.arange(6)[None], torch.arange(4)[None],
                           torch.arange(4), False)  # fmt: skip
    assert torch.equal(other, weight.T)


def test_broken_weights_are_not_drawn_and_hide_no_other() -> None:
    matrix = np.array([[float("nan"), 2.0], [float("inf"), -1.0]], dtype=np.float32)
    bundle = neurons.Bundle("w", "inputs", True, np.arange(2), np.arange(2), matrix, (2, 2))
    lines = [t for t in neurons.draw_axis("hidden", [bundle]).data if t.mode == "lines"]
    assert sum(x is None for t in lines for x in t.x) == 2


def test_dead_and_odd_channels_are_named() -> None:
    into, out = np.full(20, 1.0) + np.linspace(0, 0.1, 20), np.full(20, 2.0)
    into[3], out[7] = 0.0, 90.0
    found = dict(Channels("axis", "movable", into, out).odd())
    assert found[3].startswith("dead")
    assert found[7].startswith("odd")
    assert set(found) == {3, 7}


def test_sums_of_squares_do_not_depend_on_the_piece(monkeypatch: pytest.MonkeyPatch) -> None:
    matrix = torch.randn(2, 7, 5, 3)
    whole = squares_of(matrix)
    monkeypatch.setattr("weightspace.explorer.anatomy._PIECE", 31)
    for a, b in zip(whole, squares_of(matrix), strict=True):
        assert np.allclose(a, b)
    assert np.allclose(whole[0], matrix.square().sum((2, 3)))


def test_statistics_are_of_all_elements_however_few_the_distribution_is_of(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(anatomy, "_SAMPLE", 100)
    torch.manual_seed(0)
    x = 5 + torch.randn(40, 60)
    x[3, 7], x[11, 2], x[20:22], x[30, 1] = 1000.0, -50.0, 0.0, float("inf")
    found, finite = anatomy.layer("w", x, "mean", (), None), x[x.isfinite()].double()
    assert (found.low, found.high, found.broken) == (-50.0, 1000.0, 1)
    assert found.mean == pytest.approx(float(finite.mean()), rel=1e-5)
    assert found.std == pytest.approx(float(finite.std(correction=0)), rel=1e-5)
    assert found.norm == pytest.approx(float(finite.norm()), rel=1e-5)
    assert found.zeros == pytest.approx(120 / 2399)
    assert found.counts.sum() <= 104


@pytest.mark.parametrize(
    "tensor",
    [torch.zeros(0, 5), torch.zeros(3, 0, 2), torch.tensor(3.0), torch.full((3, 3), float("nan")),
     torch.zeros(4, 4, dtype=torch.bool), torch.randn(3, 4, dtype=torch.complex64),
     torch.full((9,), 1e300, dtype=torch.double), torch.tensor([-1e308, 1e308] * 40, dtype=torch.double)],
)  # fmt: skip
def test_every_tensor_has_a_layer(tensor: torch.Tensor) -> None:
    found = anatomy.layer("w", tensor, "", (), None)
    table = Anatomy((found,), ()).layer_table()
    assert table.loc[0, "elements"] == tensor.numel()
    assert len(found.edges) in (0, len(found.counts) + 1)


def test_all_odd_channels_are_in_the_table() -> None:
    many = Channels("hidden", "movable", np.concatenate([np.zeros(900), np.ones(2000)]), np.ones(2900))
    assert len(Anatomy((), (many,)).odd_table()) == 900


def test_an_axis_of_nothing_but_zeros_is_dead() -> None:
    found = Channels("hidden", "movable", np.zeros(5), np.full(5, np.nan)).odd()
    assert [i for i, why in found if why.startswith("dead")] == [0, 1, 2, 3, 4]


def test_a_merge_stands_below_its_largest_parent() -> None:
    def edge(parent: str, child: str, share: float) -> dict[str, object]:
        return {"parent": parent, "child": child, "share": share}

    edges = [edge("a", "m", 0.2), edge("b", "c", 1.0), edge("c", "m", 0.8)]
    found = descent.places({"edges": edges, "roots": ["a", "b"], "families": [["a", "b", "c", "m"]]})
    assert found["m"] == (2.0, found["c"][1])
    assert found["a"][0] == found["b"][0] == 0.0


def test_estimated_singular_values_are_the_leading_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    matrix = torch.randn(90, 80) @ torch.diag(torch.logspace(0, -3, 80))
    exact, all_of_them = singular_values(matrix)
    monkeypatch.setattr("weightspace.explorer.anatomy._EXACT", 0)
    some, not_all = singular_values(matrix)
    assert all_of_them
    assert not not_all
    assert np.allclose(some[:20], exact[:20], rtol=0.02)


# ------------------------------------------------------------------------------------ the command


def test_the_server_is_for_this_machine_and_tells_nobody() -> None:
    line = " ".join(launch.command(8501, "127.0.0.1", True))
    assert "--server.address 127.0.0.1" in line
    assert "--browser.gatherUsageStats false" in line
    assert "--client.showErrorDetails none" in line
    assert launch.is_local("::1")
    assert not launch.is_local("0.0.0.0")
    assert not launch.is_local("example.org")


def test_a_port_that_is_taken_is_said() -> None:
    import socket

    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        held.listen()
        port = held.getsockname()[1]
        with pytest.raises(ZooError, match=f"port {port}"):
            launch.free_port("127.0.0.1", port)


def test_a_folder_that_is_none_is_said(tmp_path: Path) -> None:
    pytest.importorskip("streamlit", reason="the explorer needs the extra app")
    with pytest.raises(ZooError, match="is not a folder"):
        launch.launch(tmp_path / "nowhere")


def test_a_sketch_has_the_colours_and_the_places_of_the_map() -> None:
    rng = np.random.default_rng(0)
    places = rng.normal(size=(300, 2))
    frame = pd.DataFrame({"architecture": ["CNN", "MLP"] * 150, "test_accuracy": rng.uniform(size=300)})
    kept = [True] * 200 + [False] * 100
    drawn = maps.draw([str(i) for i in range(300)], places, frame, "architecture", kept, [])
    for colour in ("architecture", "test_accuracy", None):
        svg = ElementTree.fromstring(maps.sketch(places, frame, colour, kept))
        paths = [one for one in svg if one.tag.endswith("path")]
        assert sum(str(one.get("d")).count("M") for one in paths) == pytest.approx(300, abs=5)
    shades = {trace.marker.color for trace in drawn.data}
    svg = ElementTree.fromstring(maps.sketch(places, frame, "architecture", kept))
    assert {one.get("stroke") for one in svg if one.tag.endswith("path")} == shades
    wide = drawn.layout.xaxis.range
    at = (places[0, 0] - wide[0]) / (wide[1] - wide[0]) * 1000
    assert any(f"M{round(at)} " in str(one.get("d")) for one in svg)


def test_a_sketch_of_one_place_is_drawn() -> None:
    svg = maps.sketch(np.zeros((3, 2)), pd.DataFrame({"bytes": [1, 2, 0]}), "bytes", [True] * 3)
    assert "M500 500h0" in svg


def test_a_backdoor_figure_stands_on_the_dark_page() -> None:
    figure = go.Figure([
        go.Heatmap(z=[[0.0, 1.0]], colorscale=[[0, "#f3f4f6"], [1, "#7f1d1d"]]),
        go.Scatter(x=[0], y=[0], line={"color": "#b91c1c"}, marker={"color": ["#d1d5db", "#b91c1c"]}),
    ])  # fmt: skip
    figure.update_layout(title="said beside it", width=900, paper_bgcolor="white", plot_bgcolor="white")
    figure.add_annotation(text="7", font={"color": "#b91c1c"}, bgcolor="rgba(255,255,255,0.75)")
    drawn = backdoors.restyled(figure, True)
    assert drawn.layout.paper_bgcolor == drawn.layout.plot_bgcolor == "rgba(0,0,0,0)"
    assert drawn.layout.title.text is None
    assert drawn.layout.width is None
    assert drawn.layout.font.color == style.ink(True)
    assert "#b91c1c" not in drawn.to_json()
    assert "#b91c1c" in backdoors.restyled(figure, False).to_json()
    assert figure.layout.paper_bgcolor == "white"
