"""Which nonlinear functions a network applies along which axes.

Found while a trace runs. A function that a network writes out in several operations (``x * sigmoid(x)``, the
``tanh`` form of GELU, ``clamp(x, min=0)``) is recognised by its values: every pointwise result carries the
image of a fixed grid under the operations that led to it from the last value that was not pointwise, and is
compared with the functions that have a name. Normalisations that are written out are recognised by their
moments. Nothing here needs the values of the network, so it works on tensors without data as well.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch.utils._pytree import tree_leaves, tree_map

from weightspace.wiring.algebra import Atom, Dim

# Nonlinear pointwise operations, most of which keep their names.
_OWN = (
    "relu relu6 hardtanh clamp threshold leaky_relu prelu elu celu selu gelu silu mish hardswish hardsigmoid "
    "sigmoid tanh softplus softshrink hardshrink sin cos tan sinc asin acos atan sinh cosh asinh acosh atanh erf "
    "erfc exp exp2 expm1 log log2 log10 log1p sqrt rsqrt reciprocal abs sign pow floor ceil round trunc frac logit "
    "glu maximum minimum atan2 fmod remainder"
)
_NAMES = {name: name for name in _OWN.split()} | {
    "clamp_min": "clamp", "clamp_max": "clamp", "_prelu_kernel": "prelu", "rrelu_with_noise": "leaky_relu",
    "special_expit": "sigmoid", "log_sigmoid_forward": "log_sigmoid", "special_erf": "erf", "special_log1p": "log1p",
    "sgn": "sign", "square": "pow",
}  # fmt: skip
_NORMS = {
    "_softmax": "softmax", "softmax": "softmax", "_safe_softmax": "softmax", "_log_softmax": "log_softmax",
    "log_softmax": "log_softmax", "native_layer_norm": "layer_norm", "_fused_rms_norm": "rms_norm",
    "rms_norm": "rms_norm", "native_group_norm": "group_norm",
}  # fmt: skip
_PRODUCTS = {"mul": "mul", "div": "div"}
_KEEP = {"view", "reshape", "_unsafe_view", "unsqueeze", "squeeze", "expand"}
_GRID = (-8.0, 8.0, 65)


@cache
def _named_functions() -> tuple[tuple[str, torch.Tensor], ...]:
    x = torch.linspace(*_GRID, dtype=torch.float64)
    return (
        ("relu", x.relu()),
        ("relu6", F.relu6(x)),
        ("gelu", F.gelu(x)),
        ("gelu", F.gelu(x, approximate="tanh")),
        ("silu", F.silu(x)),
        ("gelu", x * torch.sigmoid(1.702 * x)),
        ("mish", F.mish(x)),
        ("hardswish", F.hardswish(x)),
        ("hardsigmoid", F.hardsigmoid(x)),
        ("softplus", F.softplus(x)),
        ("pow", x * x),
    )


@dataclass(frozen=True)
class _Point:
    """A pointwise function of ``root``: its values on the grid and the notes made on the way."""

    root: int
    grid: torch.Tensor
    notes: tuple[int, ...] = ()


@dataclass(frozen=True)
class _Moment:
    """A moment of ``root`` along some dims: its mean, its mean square, or one over its size."""

    root: int
    kind: str
    centred: bool
    notes: tuple[int, ...] = ()


@dataclass
class _Note:
    name: str
    dims: list[Dim] = field(default_factory=list)
    # What a sine's argument is multiplied by.
    slope: float | None = None


class ActivationBook:
    """Follows the values of a trace and notes the nonlinear functions on the way."""

    def __init__(self) -> None:
        self._notes: dict[int, _Note] = {}
        self._count = 0
        self._points: dict[int, _Point] = {}
        self._moments: dict[int, _Moment] = {}
        self._centred: dict[int, int] = {}

    def watch(
        self, op: str, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], outputs: Sequence[torch.Tensor],
        tensors: Sequence[torch.Tensor], values: Sequence[bool], dims: Callable[[torch.Tensor], list[Dim]],
        pointwise: bool,
    ) -> None:  # fmt: skip
        """One operation that the output depends on; ``values`` tells what was computed from inputs."""
        given = [x for x, v in zip(tensors, values, strict=True) if v]
        out = outputs[0]
        if not given:
            return
        points = [self._point(x) for x in given]
        for o in outputs:
            self._points.pop(id(o), None)
            self._moments.pop(id(o), None)
        if op in _NORMS or ("batch_norm" in op and _training(func, args)):
            self._add(_NORMS.get(op, "batch_norm"), dims(out))
        elif self._normalised(op, given, points, out, dims) or self._followed(op, args, given, points, out):
            return
        elif pointwise or op in _NAMES:
            self._applied(op, func, args, kwargs, (given, points, tensors), out, dims)

    # ---------------------------------------------------------------- pointwise functions

    def _applied(
        self, op: str, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any],
        operands: tuple[list[torch.Tensor], list[_Point], Sequence[torch.Tensor]], out: torch.Tensor,
        dims: Callable[[torch.Tensor], list[Dim]],
    ) -> None:  # fmt: skip
        given, points, tensors = operands
        one = len({p.root for p in points}) == 1
        notes = tuple(sorted({n for p in points for n in p.notes}))
        grid = self._image(func, args, kwargs, given, points, tensors) if one else None
        if grid is not None:
            known = _known(grid)
            if known is not None:
                for n in notes:
                    self._notes.pop(n, None)
                self._points[id(out)] = _Point(points[0].root, grid, self._add(known, dims(out)))
                return
        name = _NAMES.get(op) if out.is_floating_point() else None
        if name is None and op in _PRODUCTS and len(given) > 1 and (grid is None or not one):
            name = _PRODUCTS[op]
        if name in ("maximum", "minimum") and len(given) < 2:
            name = "clamp"
        made = self._add(name, dims(out), _slope(points[0].grid) if name == "sin" and one else None) if name else ()
        if grid is not None:
            self._points[id(out)] = _Point(points[0].root, grid, (*notes, *made))

    def _point(self, tensor: torch.Tensor) -> _Point:
        found = self._points.get(id(tensor))
        return found or _Point(id(tensor), torch.linspace(*_GRID, dtype=torch.float64))

    def _image(
        self, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], given: list[torch.Tensor],
        points: list[_Point], tensors: Sequence[torch.Tensor],
    ) -> torch.Tensor | None:  # fmt: skip
        """The operation carried out on the grid; None where it has operands other than scalars."""
        grids = {id(x): p.grid for x, p in zip(given, points, strict=True)}
        others = [x for x in tensors if id(x) not in grids]
        if any(x.numel() != 1 or x.device.type == "meta" for x in others):
            return None

        def stand_in(x: Any) -> Any:
            if not isinstance(x, torch.Tensor):
                return x
            found = grids.get(id(x))
            if found is not None:
                return found.clone()
            return x.reshape(()).to(torch.float64) if x.is_floating_point() else x.reshape(())

        keywords = {k: v for k, v in kwargs.items() if k not in ("dtype", "device", "layout", "pin_memory")}
        try:
            made = func(*tree_map(stand_in, tuple(args)), **tree_map(stand_in, keywords))
        except (RuntimeError, TypeError, ValueError, NotImplementedError):
            return None
        first = next((x for x in tree_leaves(made) if isinstance(x, torch.Tensor)), None)
        return first if first is not None and first.dim() == 1 else None

    # ---------------------------------------------------------------- norms that are written out

    def _followed(
        self, op: str, args: Sequence[Any], given: list[torch.Tensor], points: list[_Point], out: torch.Tensor
    ) -> bool:
        """Moments, and what leads from one to the next."""
        x, p = given[0], points[0]
        moment = self._moments.get(id(x))
        if op in ("mean", "var", "var_mean", "std") and out.numel() < x.numel():
            if op != "mean":
                self._moments[id(out)] = _Moment(p.root, "variance" if "var" in op else "deviation", True, p.notes)
            elif _is(p.grid, lambda g: g):
                self._moments[id(out)] = _Moment(p.root, "mean", False)
            elif _is(p.grid, lambda g: g * g):
                centred = p.root in self._centred
                self._moments[id(out)] = _Moment(self._centred.get(p.root, p.root), "square", centred, p.notes)
            return True
        if moment is None or len(given) != 1:
            return False
        if op in ("add", "clamp", "clamp_min", "maximum", "_to_copy", "clone", "detach", "alias") or op in _KEEP:
            self._moments[id(out)] = moment
            return True
        if op in ("sqrt", "rsqrt") or (op == "pow" and args[1:] and args[1] in (0.5, -0.5)):
            self._moments[id(out)] = replace(moment, kind="deviation")
            return True
        return False

    def _normalised(
        self, op: str, given: list[torch.Tensor], points: list[_Point], out: torch.Tensor,
        dims: Callable[[torch.Tensor], list[Dim]],
    ) -> bool:  # fmt: skip
        """``x - mean(x)`` and ``x / deviation(x)``."""
        if len(given) != 2 or op not in ("sub", "mul", "div"):
            return False
        for i, j in ((0, 1), (1, 0)):
            moment, p = self._moments.get(id(given[j])), points[i]
            if moment is None or not _is(p.grid, lambda g: g):
                continue
            if op == "sub" and moment.kind == "mean" and moment.root == p.root:
                self._centred[id(out)] = p.root
                return True
            if op != "sub" and moment.kind == "deviation" and moment.root in (p.root, self._centred.get(p.root)):
                for n in moment.notes:
                    self._notes.pop(n, None)
                self._add("layer_norm" if moment.centred else "rms_norm", dims(out))
                return True
        return False

    # ---------------------------------------------------------------- the result

    def _add(self, name: str, dims: list[Dim], slope: float | None = None) -> tuple[int, ...]:
        self._count += 1
        self._notes[self._count] = _Note(name, [list(d) for d in dims], slope)
        return (self._count,)

    def frequencies(self, atoms: Callable[[Dim], list[Atom]]) -> list[tuple[float, list[Atom]]]:
        """What the arguments of sines are multiplied by, in order, with the atoms that these are applied along."""
        notes = [note for _, note in sorted(self._notes.items()) if note.slope is not None]
        return [(n.slope or 0.0, list(dict.fromkeys(a for d in n.dims for a in atoms(d)))) for n in notes]

    def of(self, atoms: Callable[[Dim], list[Atom]]) -> list[tuple[str, list[Atom]]]:
        """What was applied in order, with the primitive atoms that it was applied along."""
        seen: set[tuple[str, tuple[Atom, ...]]] = set()
        out = []
        for _, note in sorted(self._notes.items()):
            found = tuple(dict.fromkeys(a for d in note.dims for a in atoms(d)))
            if (note.name, found) not in seen:
                seen.add((note.name, found))
                out.append((note.name, list(found)))
        return out


def _known(grid: torch.Tensor) -> str | None:
    if not grid.is_floating_point():
        return None
    return next((name for name, y in _named_functions() if torch.allclose(grid, y, rtol=1e-6, atol=1e-6)), None)


def _slope(grid: torch.Tensor) -> float | None:
    """The slope of a function that is linear on the grid."""
    low, high, _ = _GRID
    slope = float(grid[-1] - grid[0]) / (high - low)
    line = grid[0] + slope * (torch.linspace(*_GRID, dtype=torch.float64) - low)
    return slope if torch.allclose(grid.to(torch.float64), line, rtol=1e-6, atol=1e-6) else None


def _is(grid: torch.Tensor, function: Callable[[torch.Tensor], torch.Tensor]) -> bool:
    return torch.equal(grid, function(torch.linspace(*_GRID, dtype=torch.float64)))


def _training(func: Any, args: Sequence[Any]) -> bool:
    names = [a.name for a in func._schema.arguments]
    return "training" in names and names.index("training") < len(args) and bool(args[names.index("training")])
