"""Which model already knows a task, by a few labelled rows: every model that can take them is run on them.

How much the outputs tell of the labels is measured so that it does not matter what a model calls its classes, nor how
many it has: each row's label is predicted from the outputs and labels of all *other* rows.

- For labels, the *information* that the outputs have of them, in shares of their entropy: the expected empirical
  prediction of Nguyen et al. (2020, "LEEP: a new measure to evaluate transferability of learned representations"), each
  row left out of the joint distribution that predicts it, smoothed towards the labels' shares; and the *accuracy* of a
  linear probe, ridge regression with each row left out in closed form (Allen 1974).
- For numbers, the share of their variance that the same regression explains.

The question is Know2Vec's ("which model of a zoo suits these data?"); it is answered by running the models, not by an
embedding of them. What cannot be run on such rows is left out, and says why.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils._pytree import tree_leaves

from weightspace.errors import WeightspaceError
from weightspace.wiring.wiring import Wiring

Array = NDArray[np.float64]

_ROWS = 256
_WIDE = 1024
_PROJECTED = 256


@dataclass(frozen=True)
class Knowledge:
    """What a model's outputs tell of the labels of the rows.

    ``score`` ranks models: for labels the mean of ``information`` (share of the labels' entropy, 0 for none) and of
    ``probe`` (accuracy of a linear probe, each row left out) above chance; for numbers the explained variance, which is
    ``probe`` then. ``direct``: accuracy of the largest output taken as the label itself, None where the model has fewer
    outputs than there are labels or the labels are no numbers of classes.
    """

    score: float
    information: float | None
    probe: float
    direct: float | None
    outputs: int


@dataclass(frozen=True, eq=False)
class Labels:
    """Labels as they are used: ``codes (n,)`` and their number, or ``values (n, d)`` of a regression."""

    codes: NDArray[np.int64]
    count: int
    values: Array | None
    classes: NDArray[np.int64] | None

    @property
    def chance(self) -> float:
        """Accuracy of always saying the most frequent label."""
        return float(np.bincount(self.codes, minlength=1).max() / max(len(self.codes), 1)) if self.count else 0.0


def labels_of(y: object, rows: int) -> Labels:
    """Class labels (whole numbers, texts) or numbers (floating), one row each. Raises where they cannot be used."""
    values = y.detach().cpu().numpy() if isinstance(y, Tensor) else np.asarray(y)
    if values.shape[:1] != (rows,):
        raise WeightspaceError(f"found labels of shape {values.shape} for {rows} rows; expected one for each row")
    if values.dtype.kind == "f":
        table = values.reshape(rows, -1).astype(np.float64)
        if not np.isfinite(table).all() or rows < 4 or float(table.std(0).max()) == 0:
            raise WeightspaceError(f"{rows} rows of numbers that are finite and differ are needed, at least 4")
        return Labels(np.zeros(rows, dtype=np.int64), 0, table, None)
    if values.ndim != 1:
        raise WeightspaceError(f"found labels of shape {values.shape}; expected one class for each row")
    known, codes = np.unique(values, return_inverse=True)
    if len(known) < 2 or np.bincount(codes).min() < 2:
        raise WeightspaceError(
            f"found {len(known)} classes, the rarest with {np.bincount(codes).min() if len(known) else 0} rows; give "
            "two or more classes with two rows each, because each row is predicted from the others"
        )
    plain = values.astype(np.int64) if values.dtype.kind in "iub" else None
    return Labels(codes.astype(np.int64), len(known), None, plain)


def outputs_of(wiring: Wiring, tensors: Mapping[str, Tensor], x: Tensor) -> tuple[Array, str]:
    """Outputs ``(n, features)`` of a model on rows ``x (n, ...)``, and a remark; raises what says why it cannot."""
    program = wiring.program
    if program is None:
        raise WeightspaceError("there is nothing to run: its wiring was found without a network")
    if wiring.status != "proved":
        raise WeightspaceError(f"its wiring is {wiring.status}, so that what it computes is not known")
    if len(program.args) != 1 or program.kwargs or not isinstance(program.args[0], Tensor):
        raise WeightspaceError(f"it takes {len(program.args) + len(program.kwargs)} inputs, not one")
    example = program.args[0]
    wanted, given = tuple(example.shape[1:]), tuple(x.shape[1:])
    if example.is_floating_point() != x.is_floating_point():
        kinds = ("numbers", "tokens") if example.is_floating_point() else ("tokens", "numbers")
        given_as = str(x.dtype).removeprefix("torch.")
        raise WeightspaceError(f"it takes {kinds[0]}, these rows are {kinds[1]} ({given_as})")
    remark = ""
    if wanted != given:
        if math.prod(wanted) != math.prod(given):
            raise WeightspaceError(f"it takes rows of shape {list(wanted)}, these are of shape {list(given)}")
        remark = f"rows reshaped from {list(given)} to {list(wanted)}"
    rows = x.reshape(len(x), *wanted).to(example.dtype)
    held = {n: _plain(tensors[n] if n in tensors else program.tensors[n]) for n in program.tensors}
    parts = []
    with torch.no_grad():
        for start in range(0, len(rows), _ROWS):
            batch = rows[start : start + _ROWS]
            leaves = [t for t in tree_leaves(program.run(held, batch)) if isinstance(t, Tensor)]
            leaves = [t for t in leaves if t.is_floating_point() and t.dim() and len(t) == len(batch)]
            if not leaves:
                raise WeightspaceError("it gives no output with a row for each input")
            parts.append(leaves[0].reshape(len(leaves[0]), -1).to(torch.float64))
    found = torch.cat(parts).numpy()
    if not np.isfinite(found).all():
        raise WeightspaceError("its outputs on these rows are not finite")
    return found, remark


def knowledge(outputs: Array, labels: Labels) -> Knowledge:
    """How much outputs ``(n, features)`` tell of the labels."""
    width = outputs.shape[1]
    wide = outputs
    if width > _WIDE:
        rng = np.random.default_rng(0)
        wide = outputs @ rng.standard_normal((width, _PROJECTED)) / math.sqrt(width)
    if labels.values is not None:
        explained = _explained(wide, labels.values)
        return Knowledge(explained, None, explained, None, width)
    probe = _probe(wide, labels)
    told = _information(outputs, labels) if 1 < width <= _WIDE else 0.0
    above = max(probe - labels.chance, 0.0) / max(1 - labels.chance, 1e-9)
    direct = None
    if labels.classes is not None and labels.classes.min() >= 0 and labels.classes.max() < width:
        direct = float((outputs.argmax(1) == labels.classes).mean())
    return Knowledge((max(told, 0.0) + above) / 2, told, probe, direct, width)


def _information(outputs: Array, labels: Labels) -> float:
    """Share of the labels' entropy that the outputs tell; below 0 where they mislead."""
    sums = outputs.sum(1)
    if float(outputs.min()) >= 0 and float(np.abs(sums - 1).max()) < 1e-3:
        z = outputs
    else:
        z = np.exp(outputs - outputs.max(1, keepdims=True))
        z /= z.sum(1, keepdims=True)
    hot = np.eye(labels.count)[labels.codes]
    share = hot.mean(0)
    joint = z.T @ hot
    each = []
    for i, code in enumerate(labels.codes):
        rest = joint - np.outer(z[i], hot[i])
        given = (rest + share) / (rest.sum(1, keepdims=True) + 1)
        each.append(math.log(max(float(z[i] @ given[:, code]), 1e-12)))
    entropy = -float((share * np.log(share)).sum())
    return (float(np.mean(each)) + entropy) / entropy


def _probe(outputs: Array, labels: Labels) -> float:
    """Accuracy of ridge regression to the labels, each row left out."""
    hot = np.eye(labels.count)[labels.codes]
    return float((_left_out(outputs, hot).argmax(1) == labels.codes).mean())


def _explained(outputs: Array, values: Array) -> float:
    rest = float(((values - _left_out(outputs, values)) ** 2).sum())
    return max(1 - rest / float(((values - values.mean(0)) ** 2).sum()), 0.0)


def _left_out(x: Array, y: Array) -> Array:
    """What ridge regression says of each row when it has not seen it."""
    count = len(x)
    deviation = x.std(0)
    x = np.where(deviation > 1e-9, (x - x.mean(0)) / np.maximum(deviation, 1e-9), 0.0)
    mean = y.mean(0)
    # In the dual: as many unknowns as rows, whatever the width.
    kernel = x @ x.T / max(x.shape[1], 1)
    hat = kernel @ np.linalg.inv(kernel + 0.1 * np.eye(count)) + 1 / count
    own = np.clip(np.diag(hat)[:, None], 0, 1 - 1e-6)
    fitted = hat @ (y - mean) + mean
    return np.asarray((fitted - own * y) / (1 - own))


def _plain(t: Tensor) -> Tensor:
    return t.to(torch.float32) if t.is_floating_point() and t.dtype != torch.float32 else t


__all__ = ["Knowledge", "Labels", "knowledge", "labels_of", "outputs_of"]
