"""How alike two architectures are, by the graphs of their wirings: a Weisfeiler-Lehman kernel over cells and blocks.

The graph has a node for every group of neurons that a wiring describes (see ``weightspace.graph.layout``) and an edge
for every block of weights between two of them. A node's first label says whether it may be permuted, whether it is an
input or an output, the nonlinear functions applied to it and the kinds of vectors on it (shifts, gains, statistics); an
edge's says what the tensor does (contraction, lookup) and whether it has a kernel. Labels are refined by those of the
neighbours (Shervashidze et al. 2011, "Weisfeiler-Lehman graph kernels"), with the direction of the edges, so that after
``h`` rounds a label stands for a neighbourhood of radius ``h``. Names and sizes of tensors have no part in it: networks
of one family at other widths have the same labels, at other depths the same ones in other numbers.

What has no weights leaves no trace in that graph: how a graph network gathers its neighbours, how a U-Net is put
together. So the operations that the network runs are counted beside it, those aside that only lay data out anew.
"""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from weightspace.wiring.wiring import Wiring

ROUNDS = 3
VERSION = 3
_LARGE = 20_000_000
"""Weights above which a network is run without values to see what it does."""
_LAYING = frozenset(
    [
        "view", "_unsafe_view", "reshape", "t", "detach", "clone", "expand", "slice", "select", "unsqueeze",
        "squeeze", "copy_", "alias", "lift", "lift_fresh", "as_strided", "unbind", "split", "split_with_sizes",
        "chunk", "permute", "transpose", "contiguous", "narrow", "unfold", "resize_", "set_", "to", "_to_copy",
        "empty", "empty_strided", "empty_like", "zeros", "zeros_like", "ones", "ones_like", "full", "full_like",
        "scalar_tensor", "arange", "new_zeros", "new_empty", "new_full", "new_ones", "fill_", "zero_", "item",
        "_local_scalar_dense", "rand", "randn", "uniform_", "normal_", "bernoulli_", "native_dropout",
    ]
)  # fmt: skip
"""Operations that compute nothing of their input."""
_SAME = {
    **dict.fromkeys(("addmm", "mm", "bmm", "baddbmm", "linear", "mv", "dot", "addmv"), "matmul"),
    **dict.fromkeys(("gt", "lt", "eq", "ge", "le", "ne", "logical_not", "bitwise_and"), "comparison"),
    **dict.fromkeys(
        ("_scaled_dot_product_flash_attention_for_cpu", "_scaled_dot_product_attention_math",
         "_scaled_dot_product_fused_attention_overrideable"), "attention"),
    "_softmax": "softmax", "rsub": "sub",
}  # fmt: skip
Fingerprint = Mapping[str, int]


def fingerprint(wiring: Wiring) -> dict[str, int]:
    """Labels of the graph with their numbers: ``"<round>|<label>"``; those of round 0 can be read.

    With them ``"run|<operation>"`` and how often the network runs it on its example input, where it can be run.
    """
    from weightspace.graph.layout import structure

    found = structure(wiring, list(wiring))
    roles = wiring.roles
    vectors: dict[str, Counter[str]] = {}
    for v in found.vectors:
        role = roles.get(v.tensor, "other")
        kind = f"{role} with a kernel" if v.width > 1 else role
        vectors.setdefault(v.dst, Counter())[kind] += 1
    labels: dict[str, str] = {}
    for name, cell in found.cells.items():
        acts = sorted({a for f in cell.factors for a in wiring.activations.get(f, ())})
        on_it = sorted(vectors.get(name, ()))
        kind = cell.mark or ("free" if cell.movable else "pinned")
        nested = " nested" if cell.movable and len(cell.factors) > 1 else ""
        labels[name] = f"{kind}{nested}" + f" [{', '.join(acts)}]" * bool(acts) + f" ({', '.join(on_it)})" * bool(on_it)
    edges: dict[str, list[tuple[str, str]]] = {name: [] for name in labels}
    counts: Counter[str] = Counter()
    for b in found.blocks:
        role = roles.get(b.tensor, "weight")
        kind = role + (" with a kernel" if b.width > 1 else "") + (" in groups" if b.shared > 1 else "")
        counts[f"0|block: {kind}"] += 1
        edges[b.dst].append((f"<{kind}", b.src))
        edges[b.src].append((f">{kind}", b.dst))
    for link in found.links:
        edges[link.dst].append(("<part", link.src))
        edges[link.src].append((">part", link.dst))
    counts.update(f"0|neurons: {label}" for label in labels.values())
    for step in range(1, ROUNDS + 1):
        labels = {
            name: _digest(label, *sorted(f"{kind} {labels[other]}" for kind, other in edges[name]))
            for name, label in labels.items()
        }
        counts.update(f"{step}|{label}" for label in labels.values())
    counts.update({f"run|{name}": times for name, times in operations(wiring).items()})
    return dict(counts)


def operations(wiring: Wiring) -> dict[str, int]:
    """The operations that a network runs, and how often; empty where it cannot be run."""
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_map

    class Counting(TorchDispatchMode):
        def __init__(self) -> None:
            super().__init__()  # type: ignore[no-untyped-call]

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            name = _operation(func._schema.name.partition("::")[2], args)
            if name:
                counts[name] += 1
            return func(*args, **(kwargs or {}))

    counts: Counter[str] = Counter()
    program = wiring.program
    if program is None:
        return {}
    given = (dict(program.tensors), program.args, dict(program.kwargs))
    if sum(t.numel() for t in program.tensors.values()) > _LARGE:
        given = tree_map(lambda x: x.to("meta") if isinstance(x, torch.Tensor) else x, given)
    try:
        with torch.no_grad(), Counting():
            program.run(given[0], *given[1], **given[2])
    except (RuntimeError, NotImplementedError, ValueError, TypeError, IndexError, KeyError, AttributeError):
        # Some programs cannot run without values; their graphs are compared alone.
        return {}
    return dict(counts)


def _operation(name: str, args: Any) -> str:
    """What an operation is called here; empty for those that only lay data out."""
    if name in _LAYING:
        return ""
    if name == "convolution":
        weight, transposed, groups = args[1], args[6], args[8]
        kind = " transposed" * bool(transposed) + " in groups" * (groups > 1)
        return f"convolution {weight.dim() - 2}d{kind}" + " pointwise" * all(k == 1 for k in weight.shape[2:])
    name = name.removesuffix("_") if not name.startswith("_") else name
    return _SAME.get(name, name)


def alike(one: Fingerprint, other: Fingerprint) -> float:
    """Between 0 and 1, which is for equal graphs: the cosine of the numbers of labels, averaged over rounds.

    The operations that are run count like one round. Numbers count by their logarithm, so that a network and a deeper
    one of its family stay near.
    """
    total = 0.0
    kinds = [str(step) for step in range(ROUNDS + 1)]
    if all(any(k.startswith("run|") for k in x) for x in (one, other)):
        kinds.append("run")
    for kind in kinds:
        a, b = ({k: math.log1p(v) for k, v in x.items() if k.startswith(f"{kind}|")} for x in (one, other))
        norm = math.sqrt(sum(v * v for v in a.values()) * sum(v * v for v in b.values()))
        total += sum(v * b.get(k, 0.0) for k, v in a.items()) / norm if norm else float(a == b)
    return min(total / len(kinds), 1.0)


def because(one: Fingerprint, other: Fingerprint, most: int = 3) -> str:
    """What two graphs have in common and what only one of them has, in words."""
    a, b = ({k[2:]: v for k, v in x.items() if k.startswith("0|")} for x in (one, other))
    if dict(one) == dict(other):
        return "the same graph"
    both = sorted(set(a) & set(b), key=lambda k: -min(a[k], b[k]))
    parts = []
    if both:
        parts.append("in common: " + _listed([f"{k} ({_times(a[k], b[k])})" for k in both], most))
    for title, mine, theirs in (("only in what was asked", a, b), ("only in it", b, a)):
        lone = sorted(set(mine) - set(theirs), key=lambda k: -mine[k])
        if lone:
            parts.append(f"{title}: {_listed(lone, most)}")
    runs = [{k[4:] for k in x if k.startswith("run|")} for x in (one, other)]
    if all(runs):
        for title, ran in (("run only by what was asked", runs[0] - runs[1]), ("only by it", runs[1] - runs[0])):
            if ran:
                parts.append(f"{title}: {_listed(sorted(ran), most)}")
    deep = sum(k in other for k in one if k.startswith(f"{ROUNDS}|"))
    whole = sum(k.startswith(f"{ROUNDS}|") for k in one)
    parts.append(f"{deep} of {whole} surroundings of radius {ROUNDS} occur in it")
    return "; ".join(parts)


def _times(a: int, b: int) -> str:
    return f"{a} and {b} times" if a != b else f"{a} times" if a > 1 else "once"


def _listed(words: list[str], most: int) -> str:
    return ", ".join(words[:most]) + (f" and {len(words) - most} more" if len(words) > most else "")


def _digest(*parts: str) -> str:
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


__all__ = ["ROUNDS", "VERSION", "Fingerprint", "alike", "because", "fingerprint", "operations"]
