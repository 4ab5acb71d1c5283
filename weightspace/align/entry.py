"""``ws.align(a, b)``: the one way in, whatever the two networks come as."""

from __future__ import annotations

import inspect
import os
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from weightspace.align.alignment import Alignment, Found, moved_shares
from weightspace.align.methods import Method, method_of
from weightspace.errors import AlignmentError, UnprovedWiringError
from weightspace.wiring.entry import wiring as find_wiring
from weightspace.wiring.matching import dot, float32, tensor_weights
from weightspace.wiring.wiring import Wiring

if TYPE_CHECKING:
    from weightspace.checkpoint import Checkpoint

Model = str | os.PathLike[str] | Mapping[str, Tensor]


def align(
    a: Model, b: Model, method: str = "weight-matching", *, wiring: Wiring | None = None, inputs: Any = None,
    seed: int = 0, unverified: bool = False, **options: Any,
) -> Alignment:  # fmt: skip
    """Move network ``b`` onto network ``a`` by symmetries of their wiring: b keeps its function.

    ``a``, ``b``: paths, ``Checkpoint``s or mappings of tensors, of one architecture (some methods take others).
    ``wiring``: found from ``a`` where it is not given; pass ``ws.wiring(module, x)`` for networks that no catalogue
    knows. ``inputs``: example inputs, a tensor or a tuple of them, for the methods that compare activations.
    ``options`` go to the method; ``weightspace.align.METHODS`` lists them with their papers.

    Raises ``AlignmentError`` where the networks cannot be matched (names or shapes that differ, numbers that are not
    finite, an unknown method), ``UnprovedWiringError`` for a wiring that is not proved unless ``unverified``.
    """
    how = method_of(method)
    first, second = opened(a), opened(b)
    _check_options(how, method, options)
    if how.needs_inputs and inputs is None:
        raise AlignmentError(f"{method} compares activations and needs inputs; pass inputs= (a batch for the network)")
    if inputs is not None and not (how.needs_inputs or how.takes_inputs):
        raise AlignmentError(f"{method} looks at weights alone and takes no inputs; leave inputs= out")
    extra: dict[str, Any] = {} if inputs is None else {"inputs": inputs}
    of_a, of_b = _wirings(first, second, how, method, wiring)
    for one in (of_a, of_b):
        check_proved(one, unverified, "aligned")
    x, y = read(first, "a"), read(second, "b")
    if not how.one_wiring:
        extra["wiring_a"] = of_a
    started = time.perf_counter()
    result = how.function(x, y, of_b, seed=seed, **extra, **options)
    found = result if isinstance(result, Found) else Found(result)
    aligned = of_b.apply(found.permutations, y) if found.aligned is None else dict(found.aligned)
    seconds = time.perf_counter() - started
    before, after = cosine(x, y, of_b), cosine(x, aligned, of_b)
    diagnostics = {"seconds": seconds, "moved": moved_shares(found.permutations, of_b), **found.diagnostics}
    made = as_checkpoint(aligned, second)
    return Alignment(method, of_b, found.permutations, after, before, found.costs, diagnostics, found.maps, made)


def _check_options(how: Method, method: str, options: Mapping[str, Any]) -> None:
    known = inspect.signature(how.function).parameters
    if any(p.kind is p.VAR_KEYWORD for p in known.values()):
        return
    unknown = [n for n in options if n not in known or n in ("a", "b", "wiring", "wiring_a")]
    if unknown:
        own = [n for n, p in known.items() if p.kind is p.KEYWORD_ONLY and n not in ("seed", "inputs", "wiring_a")]
        raise AlignmentError(f"{method} has no option {unknown[0]!r}; it has {', '.join(own) or 'none'}")


def opened(model: Model) -> Mapping[str, Tensor]:
    """A path opened as a checkpoint; mappings as they are."""
    if isinstance(model, str | os.PathLike):
        from weightspace.checkpoint import open as open_checkpoint

        return open_checkpoint(model)
    if isinstance(model, Mapping):
        return model
    raise AlignmentError(
        f"cannot align a {type(model).__name__}; expected a path, a Checkpoint or a mapping of tensors "
        "(module.state_dict(), with wiring=ws.wiring(module, x))"
    )


def check_proved(wiring: Wiring, unverified: bool, what: str) -> None:
    """Raises ``UnprovedWiringError`` for a wiring that is not proved; ``unverified`` lets a guess pass, never a failed
    proof."""
    if wiring.proved:
        return
    if wiring.status == "failed":
        raise UnprovedWiringError(
            f"the wiring ({wiring.origin}) failed its proof: moving along it changes the function, so nothing is {what}"
        )
    if not unverified:
        raise UnprovedWiringError(
            f"the wiring ({wiring.origin}) is a guess that no run has proved, so nothing is {what} by it; pass the "
            "module's wiring, wiring=ws.wiring(module, x), or unverified=True to trust the guess"
        )


def shapes_of(model: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    """Shapes of all tensors, without loading them where they lie in a file."""
    shapes = getattr(model, "shapes", None)
    return dict(shapes) if isinstance(shapes, Mapping) else {n: tuple(t.shape) for n, t in model.items()}


def check_same(
    mine: Mapping[str, tuple[int, ...]], other: Mapping[str, tuple[int, ...]], who: tuple[str, str], hint: str
) -> None:
    """Raises ``AlignmentError`` naming what differs in names or shapes."""
    lacking = [n for n in mine if n not in other]
    surplus = [n for n in other if n not in mine]
    differing = [n for n in mine if n in other and tuple(mine[n]) != tuple(other[n])]
    if not (lacking or surplus or differing):
        return
    parts = []
    if differing:
        rows = [f"{n} {tuple(mine[n])} against {tuple(other[n])}" for n in differing]
        parts.append(f"shapes differ: {_few(rows)}")
    if lacking:
        parts.append(f"only {who[0]} has {_few(lacking)}")
    if surplus:
        parts.append(f"only {who[1]} has {_few(surplus)}")
    raise AlignmentError(f"{who[0]} and {who[1]} are not one architecture: {'; '.join(parts)}. {hint}")


def _few(rows: list[str], most: int = 3) -> str:
    return ", ".join(rows[:most]) + (f" and {len(rows) - most} more" if len(rows) > most else "")


def _wirings(
    a: Mapping[str, Tensor], b: Mapping[str, Tensor], how: Method, method: str, given: Wiring | None
) -> tuple[Wiring, Wiring]:
    shapes_a, shapes_b = shapes_of(a), shapes_of(b)
    if how.one_wiring:
        loose = ", ".join(_loose())
        other = f"align by a method for other widths or depths ({loose})" if loose else "train them alike"
        check_same(shapes_a, shapes_b, ("a", "b"), f"Drop what is no part of the network, or {other}")
    elif shapes_a != shapes_b:
        if given is not None:
            check_same(given.shapes, shapes_b, ("the wiring", "b"), "Pass the wiring of b")
        return find_wiring(a), given or find_wiring(b)
    wiring = given or find_wiring(a)
    check_same(wiring.shapes, shapes_a, ("the wiring", "the networks"), "Pass the wiring of these networks")
    return wiring, wiring


def _loose() -> list[str]:
    from weightspace.align.methods import METHODS

    return [name for name, m in METHODS.items() if not m.one_wiring]


def read(model: Mapping[str, Tensor], who: str) -> dict[str, Tensor]:
    """All tensors; raises ``AlignmentError`` where one holds numbers that are not finite."""
    found = {}
    for name in model:
        t = model[name].detach()
        if (t.is_floating_point() or t.is_complex()) and not bool(torch.isfinite(t).all()):
            count = int((~torch.isfinite(t)).sum())
            raise AlignmentError(
                f"{name!r} of {who} holds {count} numbers that are infinite or no numbers (a diverged training?); "
                "there is no nearest match of such weights, repair or replace the file"
            )
        found[name] = t
    return found


def cosine(a: Mapping[str, Tensor], b: Mapping[str, Tensor], wiring: Wiring) -> float:
    """The total weight cosine of two networks of one wiring (see ``Alignment``); NaN where shapes differ."""
    if any(n not in a or n not in b or a[n].shape != b[n].shape for n in wiring):
        return float("nan")
    x, y = float32(a), float32(b)
    counted = tensor_weights(wiring, x, y)
    if not counted:
        counted = dict.fromkeys((n for n in x if n in y), 1.0)
    aa, bb, ab = (sum(dot(p[n], q[n]) for n in counted) for p, q in ((x, x), (y, y), (x, y)))
    norm = (aa * bb) ** 0.5
    return min(1.0, max(-1.0, ab / norm)) if norm else float("nan")


def as_checkpoint(tensors: Mapping[str, Tensor], like: Mapping[str, Tensor]) -> Checkpoint:
    """Tensors in memory as a checkpoint, with what the file that they come from says beside its tensors."""
    from weightspace.checkpoint import from_tensors

    metadata = getattr(like, "metadata", None)
    made = from_tensors({n: tensors[n] for n in tensors}, dict(metadata) if isinstance(metadata, Mapping) else None)
    made.config = getattr(like, "config", None)
    return made


__all__ = ["Model", "align", "as_checkpoint", "check_proved", "check_same", "cosine", "opened", "read", "shapes_of"]
