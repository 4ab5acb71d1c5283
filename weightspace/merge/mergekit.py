"""mergekit's YAML, read and written, for the methods that both programs have. What has no counterpart is refused.

Written against the recipes that mergekit 0.1.5 takes (https://github.com/arcee-ai/mergekit), and computed as it does:
in the type that ``dtype`` says (the files' without one) where the method's result depends on it, with the masks of its
seed, and with exactly as many elements kept by TIES as it keeps, of equal ones those that torch happens to sort first.
That sorts whole tensors where there are equal ones at the threshold, as there always are in bfloat16; ``equal = "all"``
(on the command line ``--set equal=all``) keeps them all instead, in a fifth of the time.
Breadcrumbs and DELLA keep other ones of equal magnitudes. `tests/benchmarks/mergekit_agreement.py` compares the two.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from weightspace.errors import MergeError, MissingExtraError
from weightspace.merge.recipe import Recipe, Source
from weightspace.merge.settings import Setting, is_constant

# mergekit's name -> (ours, hyper-parameters that say the form, its parameters and ours with mergekit's defaults)
_SPARSE = {"lambda": ("scale", 1.0)}
_METHODS: dict[str, tuple[str, dict[str, Any], dict[str, tuple[str, Any]]]] = {
    "linear": ("linear", {}, {"normalize": ("normalize", True)}),
    "slerp": ("slerp", {}, {"t": ("t", None)}),
    "task_arithmetic": ("task-arithmetic", {}, {**_SPARSE, "normalize": ("normalize", False)}),
    "ties": ("ties", {"equal": "sorted"}, {**_SPARSE, "normalize": ("normalize", True), "density": ("density", 1.0)}),
    "dare_linear": (
        "dare", {"electing": False},
        {**_SPARSE, "normalize": ("normalize", False), "density": ("density", 1.0), "rescale": ("rescale", True)},
    ),
    "dare_ties": (
        "dare", {"electing": True},
        {**_SPARSE, "normalize": ("normalize", False), "density": ("density", 1.0), "rescale": ("rescale", True)},
    ),
    "breadcrumbs": (
        "breadcrumbs", {"electing": False},
        {**_SPARSE, "normalize": ("normalize", False), "density": ("density", 1.0), "gamma": ("gamma", 0.01)},
    ),
    "breadcrumbs_ties": (
        "breadcrumbs", {"electing": True},
        {**_SPARSE, "normalize": ("normalize", False), "density": ("density", 1.0), "gamma": ("gamma", 0.01)},
    ),
    "della": (
        "della", {"electing": True},
        {**_SPARSE, "normalize": ("normalize", True), "density": ("density", 1.0), "epsilon": ("epsilon", 0.15),
         "rescale": ("rescale", True)},
    ),
    "della_linear": (
        "della", {"electing": False},
        {**_SPARSE, "normalize": ("normalize", False), "density": ("density", 1.0), "epsilon": ("epsilon", 0.15),
         "rescale": ("rescale", True)},
    ),
    "model_stock": ("model-stock", {}, {}),
}  # fmt: skip
_PER_MODEL = {"weight", "density", "gamma", "epsilon"}
_KEYS = {"merge_method", "base_model", "models", "slices", "dtype", "out_dtype", "parameters", "tokenizer_source"}
# Settings of mergekit that change how, not what, it computes; the values are those that may be passed over.
_WITHOUT_EFFECT = {"int8_mask": (True, False), "rescale": (False,), "filter_wise": (False,)}


def parse(text: str, seed: int = 0) -> Recipe:
    """A recipe from mergekit's YAML. ``seed``: what ``--random-seed`` would be; the same masks are drawn.

    Raises `MergeError` with a sentence for keys and methods that have no counterpart here.
    """
    table = _load(text)
    for key in table:
        if key not in _KEYS:
            raise MergeError(
                f"mergekit's {key!r} is not read here; remove it, or merge with mergekit. "
                f"Known: {', '.join(sorted(_KEYS))}"
            )
    method = table.get("merge_method")
    if method not in _METHODS:
        raise MergeError(f"mergekit's method {method!r} is not one of those that both have: {', '.join(_METHODS)}")
    if table.get("tokenizer_source") not in (None, "base"):
        raise MergeError("tokenizer_source: only 'base' is read here; bring the models to one tokeniser first")
    name, form, known = _METHODS[method]
    base = _model(table["base_model"]) if table.get("base_model") is not None else None
    everywhere = _parameters(table.get("parameters"), known, method, "parameters")
    sources, more = _sources(table)
    everywhere = {**everywhere, **_parameters(more, known, method, "slices")}
    models = [
        Source(_model(entry.get("model")), _parameters(entry.get("parameters"), known, method, str(entry.get("model"))))
        for entry in sources
    ]
    dtype = table.get("out_dtype") or table.get("dtype")
    if method == "slerp":
        others = [m for m in models if m.path != base]
        if base is None or len(others) != 1:
            raise MergeError("slerp takes the base_model and one other model")
        models = [Source(base), Source(others[0].path)]
        if "t" not in everywhere:
            raise MergeError("slerp needs t: how far from base_model to the other model")
    elif method == "linear":
        if base is not None and base not in {m.path for m in models}:
            models.append(Source(base))
        if any("weight" not in {**everywhere, **m.settings} for m in models):
            raise MergeError("mergekit's linear needs a weight for every model (the base_model counts as one)")
    else:
        if base is None:
            raise MergeError(f"{method} needs a base_model")
        models = [m for m in models if m.path != base]
        if method != "model_stock" and any("weight" not in {**everywhere, **m.settings} for m in models):
            raise MergeError(f"mergekit's {method} needs a weight for every model")
    hyper: dict[str, Setting] = {ours: default for ours, default in known.values() if default is not None}
    hyper.update(form)
    hyper.update({known[key][0] if key in known else key: value for key, value in everywhere.items()})
    if "rescale" in hyper and "rescale" in known:
        if not isinstance(hyper["rescale"], bool):
            raise MergeError(f"rescale is {hyper['rescale']!r}; true or false was expected")
        hyper["rescale"] = "norm" if hyper["rescale"] else "none"
    return Recipe(name, tuple(models), base, None, hyper, dtype, seed=seed, mergekit=table.get("dtype") or "")


def write(recipe: Recipe) -> str:
    """Mergekit's YAML of a recipe. Raises `MergeError` for what it has no word for."""
    import yaml  # type: ignore[import-untyped]

    electing = bool(recipe.hyper.get("electing", recipe.method == "della"))
    found = [(m, form, known) for m, (ours, form, known) in _METHODS.items() if ours == recipe.method
             and form.get("electing", electing) == electing]  # fmt: skip
    if not found:
        shared = sorted({ours for ours, _, _ in _METHODS.values()})
        raise MergeError(f"mergekit has no {recipe.method}; it shares {', '.join(shared)}")
    method, _, known = found[0]
    for what, value in (("exclude", recipe.exclude), ("align", recipe.align), ("repair", recipe.repair)):
        if value:
            raise MergeError(f"mergekit cannot {what} tensors; take it out of the recipe")
    from weightspace.merge.method import hyper_parameters
    from weightspace.merge.methods import make

    defaults = hyper_parameters(make(recipe.method))
    words = {ours: theirs for theirs, (ours, _) in known.items()}
    parameters: dict[str, Setting] = {}
    for ours, default in {**defaults, **recipe.hyper}.items():
        value = recipe.hyper.get(ours, default)
        if ours in ("electing", "masks", "seed", "equal"):
            continue
        if ours == "rescale":
            if value == "inverse":
                raise MergeError("mergekit rescales by the L1 norm, not by 1/density; say rescale = 'norm' to do so")
            value = value == "norm"
        if ours == "scope":
            if value != "tensor":
                raise MergeError("mergekit works tensor by tensor; scope = 'model' has no word there")
            continue
        if ours not in words and ours != "weight":
            raise MergeError(f"mergekit's {method} has no {ours}")
        if value is not None:
            parameters[words.get(ours, ours)] = _plain(value)
    models = []
    for i, model in enumerate(recipe.models):
        own = {words.get(key, key): _plain(value) for key, value in model.settings.items()}
        if method != "slerp" and method != "model_stock" and "weight" not in {**own, **parameters}:
            own["weight"] = 1.0
        for key in _PER_MODEL & parameters.keys():
            if isinstance(recipe.hyper.get(key), tuple):
                own.setdefault(key, recipe.hyper[key][i])
        models.append({"model": model.path, **({"parameters": own} if own else {})})
    for key in _PER_MODEL & parameters.keys():
        if isinstance(recipe.hyper.get(key), tuple):
            del parameters[key]
    base = recipe.models[0].path if method == "slerp" else recipe.base
    if method == "slerp" and recipe.hyper.get("t") is None:
        parameters["t"] = 0.5
    if method == "linear" and base not in {m.path for m in recipe.models}:
        base = None  # it would be averaged with the others
    table = {
        "merge_method": method, "base_model": base, "models": models, "parameters": parameters, "dtype": recipe.dtype,
    }  # fmt: skip
    return str(yaml.safe_dump({k: v for k, v in table.items() if v not in (None, {})}, sort_keys=False))


def _load(text: str) -> dict[str, Any]:
    try:
        import yaml
    except ImportError as error:
        raise MissingExtraError("PyYAML", "transformers", "reading mergekit's YAML") from error
    try:
        table = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise MergeError(f"the recipe is no YAML: {error}") from error
    if not isinstance(table, dict):
        raise MergeError(f"a table with merge_method was expected, found {type(table).__name__}")
    return table


def _sources(table: Mapping[str, Any]) -> tuple[list[Mapping[str, Any]], Any]:
    """The models of a recipe, whether under ``models`` or in one slice over all layers, and the slice's parameters."""
    if ("models" in table) == ("slices" in table):
        raise MergeError("a recipe has either models or slices")
    more = None
    if "models" in table:
        entries, keys = table["models"], {"model", "parameters"}
    else:
        slices = table["slices"]
        if not isinstance(slices, list) or len(slices) != 1 or not isinstance(slices[0], Mapping):
            raise MergeError("only one slice over all layers is read here; several make another architecture")
        if slices[0].keys() - {"sources", "parameters"}:
            raise MergeError(f"a slice has sources and parameters, found {', '.join(map(str, slices[0]))}")
        entries, more = slices[0].get("sources"), slices[0].get("parameters")
        keys = {"model", "parameters", "layer_range"}
        ranges = {str(e.get("layer_range")) for e in entries or [] if isinstance(e, Mapping)}
        first = [e.get("layer_range") for e in entries or [] if isinstance(e, Mapping)][:1]
        if len(ranges) != 1 or not isinstance(first[0], list) or len(first[0]) != 2 or first[0][0] != 0:
            raise MergeError(f"layer_range should be [0, number of layers] for all; found {', '.join(ranges)}")
    if not isinstance(entries, list) or not entries:
        raise MergeError("the recipe names no models")
    for entry in entries:
        if not isinstance(entry, Mapping) or entry.keys() - keys or "model" not in entry:
            raise MergeError(f"a model is given as model and parameters; found {entry!r}")
    return entries, more


def _model(value: Any) -> str:
    if not isinstance(value, str):
        raise MergeError(f"a model is given by its path here, found {value!r}")
    if "+" in value:
        raise MergeError(f"{value}: an adapter is not merged into its base on the way; do that first")
    return value


def _parameters(
    value: Any, known: Mapping[str, tuple[str, Any]], method: str, where: str
) -> dict[str, Setting]:
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise MergeError(f"{where}: parameters are a table, found {value!r}")
    out: dict[str, Setting] = {}
    for key, setting in value.items():
        if key in known or (key == "weight" and method not in ("slerp", "model_stock")):
            out[key] = _numbers(setting)
        elif key in _WITHOUT_EFFECT and setting in _WITHOUT_EFFECT[key]:
            continue
        else:
            raise MergeError(f"{where}: {key} = {setting!r} is not a parameter of {method} that is read here")
    return out


def _numbers(setting: Any) -> Setting:
    """YAML reads 1e-5 as text."""
    if isinstance(setting, str):
        try:
            return float(setting)
        except ValueError:
            return setting
    if isinstance(setting, Mapping):
        return {key: _numbers(value) if key == "value" else value for key, value in setting.items()}
    return [_numbers(e) for e in setting] if isinstance(setting, list) else setting


def _plain(value: Any) -> Any:
    if isinstance(value, tuple):
        return list(value)
    return value if is_constant(value) else [dict(e) if isinstance(e, Mapping) else e for e in value]
