"""Recipes, mergekit's YAML there and back, and the command line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import weightspace as ws
from weightspace.cli import app
from weightspace.errors import MergeError, WeightspaceError
from weightspace.merge.mergekit import parse
from weightspace.merge.recipe import Recipe, Source, from_table, read
from weightspace.merge.settings import Depth, value_of


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    g = torch.Generator().manual_seed(0)
    shapes = {"embed.weight": (9, 4), **{f"layers.{i}.{n}.weight": (4, 4) for i in range(3) for n in ("mlp", "att")}}
    base = {k: torch.randn(s, generator=g) for k, s in shapes.items()}
    out = []
    for name in ("base", "a", "b"):
        tuned = base if name == "base" else {k: t + 0.1 * torch.randn(t.shape, generator=g) for k, t in base.items()}
        out.append(tmp_path / f"{name}.safetensors")
        save_file(tuned, out[-1])
    return out


TOML = """
method = "ties"
base = "base.safetensors"
out = "merged.safetensors"
seed = 3
[hyper]
density = 0.5
scale = [1.0, 0.0]
[[models]]
path = "a.safetensors"
weight = [{ filter = "mlp", value = 0.5 }, { value = 2.0 }]
[[models]]
path = "b.safetensors"
density = 0.25
"""


def same(a: Any, b: Any) -> bool:
    return set(a) == set(b) and all(torch.equal(a[k], b[k]) for k in a)


def test_a_toml_recipe(files: list[Path]) -> None:
    folder = files[0].parent
    (folder / "r.toml").write_text(TOML)
    merged = read(folder / "r.toml").run()
    assert merged.path == folder / "merged.safetensors"
    got, (base, a, b) = load_file(merged.path), [load_file(f) for f in files]
    for name in base:
        scale = {"0": 1.0, "1": 0.5, "2": 0.0}.get(name.split(".")[1], 1.0)
        weights = [0.5 if "mlp" in name else 2.0, 1.0]
        one = ws.merge([{name: a[name]}, {name: b[name]}], "ties", base={name: base[name]}, density=(0.5, 0.25),
                       scale=scale, weights=weights).tensors  # fmt: skip
        assert one is not None
        assert torch.equal(one[name], got[name]), name


def test_settings_are_mergekits() -> None:
    """A gradient runs from the first layer to the last; the first filter that fits decides; else the next scope."""
    depth = Depth(5)
    assert [value_of([0, 1], f"m.layers.{i}.w", depth) for i in range(5)] == [0, 0.25, 0.5, 0.75, 1]
    assert value_of([0, 1, 0], "layers.1.w", depth) == 0.5
    assert value_of([0.3, 1], "embed", depth) == 0.3
    assert value_of([0.3, 1], "layers.0.w", Depth(1)) == 1
    filters = [{"filter": "mlp", "value": [0, 1]}, {"filter": "*", "value": 7}]
    assert value_of(filters, "layers.4.mlp.w", depth) == 1
    assert value_of(filters, "layers.4.att.w", depth) == 7
    assert value_of(filters[:1], "layers.4.att.w", depth) is None


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"methd": 1}, "has no key 'methd'; it has align, base, data"),
        ({"method": "tise"}, "did you mean ties"),
        ({"method": None}, "says no method"),
        ({"models": []}, "names no models"),
        ({"models": [{"weight": 1.0}]}, "has no path"),
        ({"models": [{"path": "a", "wieght": 1.0}]}, "'wieght' is no setting of one model; ties has density, weight"),
        ({"models": [{"path": "a", "scale": 1.0}]}, "'scale' is no setting of one model"),
        ({"models": [{"path": "a", "weight": []}]}, "a number, a list of numbers"),
        ({"models": [{"path": "a", "weight": [{"filter": "x"}]}]}, "should have a value"),
        ({"hyper": {"dense": 1.0}}, "no hyper-parameter 'dense'"),
        ({"exclude": "a"}, "exclude is a list"),
        ({"seed": "x"}, "int was expected"),
    ],
)
def test_recipes_with_mistakes(change: dict[str, Any], said: str) -> None:
    table = {"method": "ties", "base": "base", "models": [{"path": "a"}, {"path": "b"}], **change}
    with pytest.raises(MergeError, match=said):
        from_table(table)


YAML = """
merge_method: dare_ties
base_model: base.safetensors
dtype: float32
models:
  - model: base.safetensors
  - model: a.safetensors
    parameters: {weight: 0.5, density: [{filter: mlp, value: [0.2, 0.9]}, {value: 0.5}]}
  - model: b.safetensors
    parameters: {weight: 0.3}
parameters: {density: 0.7, lambda: 0.9, int8_mask: true}
"""


def test_mergekits_yaml(files: list[Path]) -> None:
    folder = files[0].parent
    (folder / "r.yml").write_text(YAML)
    recipe = read(folder / "r.yml")
    assert recipe.method == "dare"
    assert [m.path for m in recipe.models] == ["a.safetensors", "b.safetensors"]
    assert recipe.hyper == {"scale": 0.9, "normalize": False, "density": 0.7, "rescale": "norm", "electing": True}
    merged = recipe.run(folder / "o.safetensors")
    assert set(merged.open()) == set(load_file(files[0]))
    assert not same(load_file(files[0]), merged.open())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_mergekits_arithmetic_in_narrow_types(files: list[Path], dtype: torch.dtype) -> None:
    """What ``dtype: bfloat16`` says: every step is rounded, as a plain program in that type would do it."""
    folder, kind = files[0].parent, str(dtype).removeprefix("torch.")
    (folder / "r.yml").write_text(
        f"merge_method: ties\nbase_model: base.safetensors\ndtype: {kind}\nparameters: {{lambda: 0.7}}\nmodels:\n"
        "  - {model: a.safetensors, parameters: {weight: 0.6, density: 0.4}}\n"
        "  - {model: b.safetensors, parameters: {weight: 0.3, density: 0.4}}\n"
    )
    got = read(folder / "r.yml").run().open()
    base, *tuned = ({k: t.to(dtype) for k, t in load_file(f).items()} for f in files)
    for name, origin in base.items():
        weights = torch.tensor([0.6, 0.3], dtype=dtype)
        deltas = torch.zeros(2, *origin.shape, dtype=dtype)
        for i, model in enumerate(tuned):
            delta = (model[name] - origin).flatten()
            kept = delta.abs().float().argsort(descending=True)[: int(0.4 * len(delta))]
            deltas[i].view(-1)[kept] = delta[kept]
        deltas *= weights.view(2, 1, 1)
        agrees = deltas.sign() == torch.where(deltas.sum(0) >= 0, 1, -1)
        shares = (weights.view(2, 1, 1) * agrees).sum(0)
        mixed = (deltas * agrees).sum(0) / torch.where(shares == 0, 1, shares)
        assert torch.equal(got[name], (origin + mixed * 0.7).to(dtype))


def test_only_some_methods_compute_in_narrow_types(files: list[Path]) -> None:
    with pytest.raises(MergeError, match=r"tsv-m does not compute in torch.bfloat16"):
        ws.merge(files[1:], "tsv-m", base=files[0], compute="bfloat16")


SHARED: list[tuple[str, str, dict[str, Any]]] = [
    ("linear", "linear", {}),
    ("linear", "linear", {"normalize": False}),
    ("slerp", "slerp", {"t": [0.0, 0.5, 1.0]}),
    ("task-arithmetic", "task_arithmetic", {"scale": 0.3}),
    ("ties", "ties", {"density": (0.1, 0.3), "scale": 0.5}),
    ("ties", "ties", {"density": [{"filter": "mlp", "value": 0.1}, {"value": 0.5}]}),
    ("dare", "dare_linear", {"rescale": "norm"}),
    ("dare", "dare_ties", {"rescale": "none", "electing": True}),
    ("breadcrumbs", "breadcrumbs", {"gamma": 0.1}),
    ("breadcrumbs", "breadcrumbs_ties", {"electing": True}),
    ("della", "della", {"rescale": "norm"}),
    ("della", "della_linear", {"rescale": "norm", "electing": False}),
    ("model-stock", "model_stock", {}),
]


@pytest.mark.parametrize(("method", "theirs", "hyper"), SHARED)
def test_there_and_back(files: list[Path], method: str, theirs: str, hyper: dict[str, Any]) -> None:
    """What is written for mergekit and read again merges to the same; random masks aside, which become mergekit's."""
    base, a, b = map(str, files)
    pair = (Source(base), Source(a)) if method == "slerp" else (Source(a, {"weight": 0.7}), Source(b, {"weight": 0.4}))
    if method == "model-stock":
        pair = (Source(a), Source(b))
    recipe = Recipe(method, pair, None if method in ("linear", "slerp") else base, hyper=hyper, dtype="float32")
    again = parse(recipe.to_mergekit())
    assert f"merge_method: {theirs}\n" in recipe.to_mergekit()
    assert parse(again.to_mergekit()) == again
    if method not in ("dare", "della"):
        one, two = recipe.run(), again.run()
        assert one.tensors is not None
        assert two.tensors is not None
        assert same(one.tensors, two.tensors)


@pytest.mark.parametrize(
    ("recipe", "said"),
    [
        (Recipe("tsv-m", (Source("a"),), "b"), "mergekit has no tsv-m"),
        (Recipe("ties", (Source("a"),), "b", hyper={"scope": "model"}), "tensor by tensor"),
        (Recipe("dare", (Source("a"),), "b"), "say rescale = 'norm'"),
        (Recipe("ties", (Source("a"),), "b", exclude=("x",)), "cannot exclude"),
    ],
)
def test_what_mergekit_has_no_word_for(recipe: Recipe, said: str) -> None:
    with pytest.raises(MergeError, match=said):
        recipe.to_mergekit()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("merge_method: passthrough\nmodels: []", "'passthrough' is not one of those that both have: linear"),
        ("merge_method: ties\nmodules: {}", "'modules' is not read here"),
        ("merge_method: ties\nmodels: [{model: a}]", "needs a base_model"),
        ("merge_method: ties\nbase_model: b\nmodels: [{model: a}]", "needs a weight for every model"),
        ("merge_method: ties\nbase_model: b\nmodels: [{model: a, parameters: {weight: 1, foo: 2}}]", "foo = 2 is not"),
        ("merge_method: ties\nbase_model: b\nparameters: {rescale: true}\nmodels: [{model: a}]", "rescale = True"),
        ("merge_method: ties\nbase_model: b\nmodels: [{model: a+lora}]", "an adapter is not merged"),
        ("merge_method: linear\nmodels: [{model: a}]\nslices: []", "either models or slices"),
        ("merge_method: linear\ntokenizer_source: union\nmodels: [{model: a}]", "only 'base'"),
        ("merge_method: slerp\nbase_model: a\nmodels: [{model: a}, {model: b}]", "slerp needs t"),
        ("merge_method: slerp\nbase_model: a\nparameters: {t: 0.5}\nmodels: [{model: b}, {model: c}]", "one other"),
        ("merge_method: linear\nslices: [{sources: [{model: a, layer_range: [0, 4]}]}, {sources: []}]", "one slice"),
        ("merge_method: linear\nslices: [{sources: [{model: a, layer_range: [2, 4]}]}]", "layer_range"),
        ("a: [", "no YAML"),
        ("- 1", "a table with merge_method"),
        ("!!python/object/apply:os.system ['true']", "no YAML"),
    ],
)
def test_yaml_that_is_not_read(text: str, said: str) -> None:
    with pytest.raises(MergeError, match=said):
        parse(text)


def test_one_slice_is_all_layers(files: list[Path]) -> None:
    listed = "merge_method: linear\nparameters: {weight: [0.2, 0.8]}\nmodels: [{model: %s}, {model: %s}]"
    sliced = (
        "merge_method: linear\nslices: [{parameters: {weight: [0.2, 0.8]}, sources: [{model: %s, layer_range: [0, 3]}, "
        "{model: %s, layer_range: [0, 3]}]}]"
    )
    one = parse(listed % (files[1], files[2])).run().tensors
    two = parse(sliced % (files[1], files[2])).run().tensors
    assert one is not None
    assert two is not None
    assert same(one, two)


# The command line


def command(*words: Any) -> Any:
    return CliRunner().invoke(app, ["merge", *map(str, words)], catch_exceptions=True)


def test_the_command_with_models(files: list[Path]) -> None:
    base, a, b = files
    out = base.parent / "o.safetensors"
    done = command(a, b, "-m", "ties", "-b", base, "-o", out, "-w", 1, "-w", 0.5, "--set", "density=0.5")
    assert done.exit_code == 0, done.output
    assert "7 merged" in done.output
    expected = ws.merge([a, b], "ties", base=base, weights=[1, 0.5], density=0.5).tensors
    assert expected is not None
    assert same(load_file(out), expected)
    done = command(a, b, "-o", out, "--verbose")
    assert all(f"{name}: merged" in done.output for name in expected)


def test_the_command_with_a_recipe(files: list[Path]) -> None:
    folder = files[0].parent
    (folder / "r.toml").write_text(TOML)
    done = command(folder / "r.toml", "--out", folder / "x", "--json", "--exclude", "embed.*")
    assert done.exit_code == 0, done.output
    table = json.loads(done.stdout)
    assert table["path"] == str(folder / "x")
    assert {row["outcome"] for row in table["tensors"]} == {"merged", "copied"}
    assert not (folder / "merged.safetensors").exists()
    (folder / "r.yaml").write_text(YAML)
    one, two = folder / "1.safetensors", folder / "2.safetensors"
    for out, seed in ((one, 1), (two, 2)):
        done = command(folder / "r.yaml", "-o", out, "--seed", seed)
        assert done.exit_code == 0, done.output
    assert not same(load_file(one), load_file(two))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["a.safetensors", "b.safetensors"], "nothing says where"),
        (["r.toml", "-m", "ties"], "the recipe says the method"),
        (["r.toml", "a.safetensors", "-o", "x.safetensors"], "one recipe, or models"),
        (["none.toml", "-o", "x.safetensors"], "Check the path"),
        (["a.safetensors", "-w", "1", "-w", "2", "-o", "x.safetensors"], "2 weights for 1 models"),
        (["a.safetensors", "--set", "x", "-o", "x.safetensors"], "name=value was expected"),
    ],
)
def test_the_command_with_mistakes(words: list[str], said: str) -> None:
    done = command(*words)
    assert done.exit_code != 0
    assert isinstance(done.exception, WeightspaceError)
    assert said in str(done.exception)


