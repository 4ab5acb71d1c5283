"""``ws.merge(models, method, …)``: opens, plans, runs, reports."""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from weightspace.card import RECORD_KEY, record_of
from weightspace.checkpoint import Checkpoint
from weightspace.errors import MergeError, WiringError
from weightspace.merge import aligned, engine
from weightspace.merge.method import Method, Prepared, Settings, WithData, hyper_parameters
from weightspace.merge.methods import make
from weightspace.merge.report import Merged, Report
from weightspace.merge.sources import FLOATS, Model, Plan, plan, tie
from weightspace.merge.writer import FileSink, MemorySink

if TYPE_CHECKING:
    from weightspace.wiring.wiring import Wiring

# Beside the weights of a Hugging Face model: what a merged one needs as well. Code (.py) is not among it.
_COPIED = (".json", ".model", ".txt", ".jinja", ".tiktoken")
_LARGEST_COPY = 256 << 20
_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "ki": 2**10, "mi": 2**20, "gi": 2**30}


def merge(
    models: Sequence[Any] | Mapping[str, Any],
    method: str | Method = "linear",
    base: Any = None,
    out: str | os.PathLike[str] | None = None,
    *,
    weights: Sequence[float] | None = None,
    data: Any = None,
    wiring: Wiring | None = None,
    align: str | None = None,
    align_options: Mapping[str, Any] | None = None,
    repair: str | None = None,
    exclude: Sequence[str] = (),
    dtype: str | torch.dtype | None = None,
    compute: str | torch.dtype | None = None,
    max_shard_size: int | str | None = None,
    seed: int = 0,
    unverified: bool = False,
    threads: int | None = None,
    progress: bool = False,
    settings: Settings | None = None,
    **hyper: Any,
) -> Merged:
    """Merge models into one.

    ``models``: paths, URLs, Checkpoints, mappings of tensors or modules, at least one; a mapping names them. LoRA
    adapters in PEFT's layout are put into the base first, in float32, so that their changes keep their rank.
    ``method``: a name of ``METHODS`` with hyper-parameters as further keywords, or a `Method`. ``base``: the model
    that they were fine-tuned from, where the method works on task vectors; without need of one it only gives what is
    copied. ``out``: a ``.safetensors`` file or a new folder; None gives the tensors in memory. ``weights``: a number
    per model. ``data``, ``wiring``, ``unverified``: for methods that run the network (see `WithData`).

    ``align``: an alignment method of ``ws.align`` by which the models are moved onto the base, or onto the first of
    them, before they are merged, with its ``align_options``; more than two without a base meet in a common frame
    (``"weight-matching"``, ``"universe"``). ``"optimal-transport"`` brings other widths to the first one's.
    ``repair``: what is done to the result: ``"data"``, ``"statistics"`` or ``"weights"``
    (`weightspace.merge.aligned.repaired`). Both need a proved wiring; a repair holds the result and the models in
    memory.

    ``exclude``: names of tensors, with ``*``, that are copied from the base (or the first model) instead.
    ``dtype``: element type of the result (default: the base's or the first model's, tensor by tensor); arithmetic is
    in float32 (float64 where a model is); ``compute`` says another type, for the methods that can, to have another
    program's rounding. ``max_shard_size``: most bytes in a file, such as ``"5GB"``. ``threads``: default 2.
    ``settings`` gives method and weights by tensor name, for recipes.

    The result holds the base's (or first model's) tensors in its order; its report says of each what became of it.
    Integer tensors are copied; they must agree, counters (one element) excepted. Tied weights are merged once. A
    Hugging Face folder's configuration and tokeniser are copied to the new folder.

    Raises `MergeError`, before anything is written, for tensors that are missing somewhere or have other shapes, NaN
    or infinite values, a missing base, a full disk, or an ``out`` that is one of the inputs. Whatever stops a merge,
    nothing is left behind.
    """
    started = time.perf_counter()
    aligned.check(align, repair, data)
    labels = list(models) if isinstance(models, Mapping) else [None] * len(models)
    given = list(models.values()) if isinstance(models, Mapping) else list(models)
    sources = [Model(model, name, f"model {i + 1}") for i, (model, name) in enumerate(zip(given, labels, strict=True))]
    origin = None if base is None else Model(base, None, "the base")
    chosen = _method(method, seed, hyper)
    fewest, most = chosen.count
    if len(sources) < fewest or (most is not None and len(sources) > most):
        wanted = f"{fewest}" if most == fewest else f"{fewest} or more" if most is None else f"{fewest} to {most}"
        raise MergeError(f"{chosen.name} merges {wanted} models, {len(sources)} were given")
    if chosen.needs_base and origin is None:
        raise MergeError(
            f"{chosen.name} works on what fine-tuning changed: give the model that all were fine-tuned from as base=; "
            "without one, method='linear' takes the mean"
        )
    chosen.check(len(sources))
    shares = _weights(weights, len(sources), chosen)
    kind, arithmetic = _dtype(dtype), _dtype(compute) or torch.float32
    if arithmetic.itemsize < 4 and not chosen.narrow:
        raise MergeError(f"{chosen.name} does not compute in {arithmetic}; leave compute out, or say float32")
    target = None if out is None else _target(Path(out), [*sources, *([origin] if origin else [])])
    given_models = sources
    sources = [_with_adapter(m, origin) for m in sources]
    remarks: list[str] = []
    if align is not None:
        sources, remarks = aligned.bring(
            sources, origin, align, wiring=wiring, data=data, seed=seed, unverified=unverified, options=align_options
        )
    planned = plan(
        sources, origin, exclude=exclude, dtype=kind, any_shape=chosen.any_shape, needs_base=chosen.needs_base
    )
    everyone = [*([origin] if origin and chosen.needs_base else []), *sources]
    if not (chosen.any_shape or chosen.in_order):
        planned = tie(planned, everyone)
    used = origin if chosen.needs_base else None
    notes: dict[str, str] = {}
    prepared = None
    if isinstance(chosen, Prepared):
        if isinstance(chosen, WithData) and data is None:
            raise MergeError(f"{chosen.name} learns from inputs of the models' tasks: give them as data=")
        prepared, planned, notes = engine.prepare(
            chosen, origin, sources, planned, shares, data=data, seed=seed, unverified=unverified, progress=progress,
            wiring=_wiring(wiring, chosen, everyone[0]),
        )  # fmt: skip
        used = origin
    described = {
        "method": chosen.name, "hyper_parameters": hyper_parameters(chosen), "weights": list(shares), "seed": seed,
        "models": [m.label for m in sources], "base": origin.label if origin else None, "exclude": list(exclude),
        **({"align": align} if align else {}), **({"repair": repair} if repair else {}),
    }  # fmt: skip
    layout = [(a.name, a.shape, a.dtype) for a in planned.actions]
    by_tensor = settings or (lambda _: (chosen, shares))

    def go(sink: engine.Sink) -> None:
        from weightspace.progress import bar

        with bar(chosen.name, len(planned.actions), progress) as step:
            engine.Run(planned, used, sources, by_tensor, sink, threads=threads, compute=arithmetic, step=step).go(
                chosen, prepared
            )

    tensors, path = None, None
    if target is None or repair is not None:
        memory = MemorySink(layout)
        go(memory)
        tensors = memory.tensors
    if repair is not None:
        assert tensors is not None
        known = _repairable(wiring, everyone[0], unverified)
        tensors, remark = aligned.repaired(tensors, sources, repair, wiring=known, data=data, weights=shares)
        remarks.append(remark)
    if target is not None:
        extra, more = _companions(origin or given_models[0], kind) if target.suffix != ".safetensors" else ({}, [])
        metadata = {"format": "pt", "merge": json.dumps(described, default=repr)}
        metadata |= _network(origin or given_models[0], planned)
        with FileSink(target, layout, metadata=metadata, max_shard_size=_size(max_shard_size), extra=extra) as file:
            if tensors is None:
                go(file)
            else:
                for name, tensor in tensors.items():
                    file.write(name, 0, tensor.reshape(-1))
        path, tensors = file.result, None
        remarks += more
    rows = [a.row(notes.get(a.name, "")) for a in planned.actions] + planned.left_out
    remarks += [note for name, note in notes.items() if name not in {a.name for a in planned.actions}]
    report = Report(tuple(rows), described, time.perf_counter() - started, tuple(remarks))
    return Merged(report, tensors, path)


def _method(method: str | Method, seed: int, hyper: Mapping[str, Any]) -> Method:
    if isinstance(method, Method):
        if hyper:
            raise MergeError(f"{', '.join(hyper)} given beside a Method, which has its own hyper-parameters")
        return method
    from weightspace.merge.methods import method_class

    if "seed" in method_class(method).__dataclass_fields__:
        hyper = {"seed": seed, **hyper}
    return make(method, **hyper)


def _weights(weights: Sequence[float] | None, count: int, method: Method) -> tuple[float, ...]:
    if weights is None:
        return (method.default_weight,) * count
    if len(weights) != count:
        raise MergeError(f"{len(weights)} weights for {count} models; one per model was expected, in their order")
    return tuple(float(w) for w in weights)


def _dtype(dtype: str | torch.dtype | None) -> torch.dtype | None:
    found = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if dtype is not None and found not in FLOATS:
        names = ", ".join(str(f).removeprefix("torch.") for f in FLOATS)
        raise MergeError(f"dtype is {dtype!r}; one of {names} was expected")
    return found


def _size(text: int | str | None) -> int | None:
    if text is None or isinstance(text, int):
        value = text
    else:
        found = re.fullmatch(r"\s*([\d.]+)\s*([kmg]i?)?b?\s*", text.lower())
        if not found:
            raise MergeError(f"max_shard_size is {text!r}; bytes as a number, or such as '5GB', '500MiB' was expected")
        value = int(float(found[1]) * _UNITS[found[2] or ""])
    if value is not None and value <= 0:
        raise MergeError(f"max_shard_size is {text!r}; more than 0 bytes was expected")
    return value


def _target(path: Path, inputs: Sequence[Model]) -> Path:
    if path.suffix != ".safetensors" and path.suffix in (".pt", ".pth", ".bin", ".ckpt", ".gguf", ".onnx", ".h5"):
        raise MergeError(f"{path}: results are NAME.safetensors or a new folder, not {path.suffix}")
    place = path.resolve()
    for model in inputs:
        if place in model.files:
            raise MergeError(f"{path} is the input {model.label}; choose another name")
        if model.folder is not None and place.parent == model.folder.resolve() and place.suffix == ".safetensors":
            raise MergeError(f"{path} would lie among the weights of the input {model.label}; choose a place outside")
    return path


def _wiring(wiring: Wiring | None, method: Method, model: Model) -> Wiring | None:
    if wiring is not None or not method.needs_wiring:
        return wiring
    from weightspace.wiring.entry import wiring as find

    try:
        return find(model.tensors)
    except WiringError as error:
        raise MergeError(
            f"{method.name} needs to know how the network is wired, and none of {model.label} was found ({error}); "
            "give one: wiring=ws.wiring(module, inputs)"
        ) from error


def _with_adapter(model: Model, base: Model | None) -> Model:
    """The model itself; for a LoRA adapter, the base with it."""
    if not (isinstance(model.tensors, Checkpoint) and model.tensors.format == "peft"):
        return model
    if base is None:
        raise MergeError(f"{model.label} is an adapter: give the model that it was trained on as base=")
    from weightspace.merge.methods.knots import adapted

    return Model(adapted([model.tensors], base.tensors)[0], model.label)


def _repairable(wiring: Wiring | None, model: Model, unverified: bool) -> Wiring:
    """The wiring that the result is repaired by. Raises `MergeError` where none is found, or none is proved."""
    from weightspace.align.entry import check_proved
    from weightspace.wiring.entry import wiring as find

    try:
        found = wiring if wiring is not None else find(model.tensors)
    except WiringError as error:
        raise MergeError(
            f"repair needs to know how the network is wired, and none of {model.label} was found ({error}); "
            "give one: wiring=ws.wiring(module, inputs)"
        ) from error
    check_proved(found, unverified, "repaired")
    return found


def _network(model: Model, planned: Plan) -> dict[str, str]:
    """What a network trained here says of its architecture, for the result, which has the same."""
    if not isinstance(model.tensors, Checkpoint) or any(a.shape != model.shapes.get(a.name) for a in planned.actions):
        return {}
    described = record_of(model.tensors.metadata).get("network")
    return {RECORD_KEY: json.dumps({"network": described})} if described is not None else {}


def _companions(model: Model, dtype: torch.dtype | None) -> tuple[dict[str, bytes | Path], list[str]]:
    """Files to lie beside merged weights, and remarks."""
    folder = model.folder
    if folder is None:
        return {}, []
    found: dict[str, bytes | Path] = {}
    notes = []
    for file in sorted(folder.iterdir()):
        if not file.is_file() or file.name.startswith(".") or file.name.endswith(".index.json"):
            continue
        if file.suffix in _COPIED and file.stat().st_size <= _LARGEST_COPY:
            found[file.name] = file
        elif file.suffix == ".py":
            notes.append(f"{file.name} of {model.label} is code and was not copied")
    if dtype is not None and "config.json" in found:
        config = json.loads((folder / "config.json").read_text())
        for key in ("torch_dtype", "dtype"):
            if isinstance(config, dict) and key in config:
                config[key] = str(dtype).removeprefix("torch.")
        found["config.json"] = json.dumps(config, indent=2).encode()
    notes.append(f"{', '.join(found)} copied from {model.label}" if found else "nothing to copy beside the weights")
    return found, notes
