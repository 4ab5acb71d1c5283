"""Evidence of a backdoor that needs no training: numbers of every class, of the network and of its channels."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from weightspace.backdoor.differences import CHANGE_TESTS, change_of, change_of_channels, change_tests
from weightspace.backdoor.margins import MOST, Box, explore
from weightspace.backdoor.null import CHANGES, cauchy, class_p_values, largest_p_value, outlier
from weightspace.backdoor.outputs import ClassAxis, check_finite, class_axis, parts_of
from weightspace.backdoor.pictures import picture_shape
from weightspace.backdoor.responses import responses
from weightspace.backdoor.spectra import by_factor, folded, isolation, leading, lipschitz
from weightspace.backdoor.stamps import STAMP_TESTS, stamp_tests
from weightspace.backdoor.tokens import TOKEN_TESTS, explore_words, vocabulary
from weightspace.backdoor.weights_tests import ROW_TESTS, row_tests
from weightspace.errors import WeightspaceError
from weightspace.wiring.wiring import Wiring

Array = NDArray[np.float64]

INPUT_TESTS = ("noise_mean", "noise_share", "noise_std", "margin", "margin_mean", "universal", "patch")
THOROUGH_TESTS = ("seen_mean", "universal_small", "universal_wide", "sparse")
CLASS_TESTS = (*ROW_TESTS, *INPUT_TESTS, *STAMP_TESTS, *TOKEN_TESTS, *CHANGE_TESTS)
"""Columns of ``Evidence.classes``, before ``THOROUGH_TESTS``; larger is more suspicious in each."""
TELLING = ("universal", "margin", "patch", "noise_mean", "row_sum", "row_positive", "word_rise")
"""Tests that are combined into the p-value of a network without a reference; with a base, ``CHANGES`` as well."""


@dataclass(frozen=True, eq=False)
class Evidence:
    """What stands out in a network.

    ``values (classes, tests)``: the tests ``names`` as they are; ``classes``: how far each class lies above the others,
    in their standard deviations (see ``null.outlier``). Tests in ``missing`` could not be done for this network
    (no images, no tokens); their columns are 0. ``whole``: numbers of the network. ``channels``: name of a score ->
    factor -> ``(*over, size)``, distance from the median channel in median absolute deviations. ``p_values``: of each
    test done; ``p_value`` of the telling ones together (1 for two classes without words: there are no others to compare
    with). ``target``: classes, most suspicious first.
    """

    names: tuple[str, ...]
    values: Array
    classes: Array
    whole: Mapping[str, float]
    channels: Mapping[str, Mapping[str, Tensor]] = field(repr=False)
    p_values: Mapping[str, float]
    p_value: float
    target: tuple[int, ...]
    missing: tuple[str, ...]
    axis: ClassAxis = field(repr=False)
    responses: Array = field(repr=False)

    @property
    def scores(self) -> dict[str, float]:
        """A number per test for a null: the most extreme class of each, and the numbers of the whole network."""
        done = [(i, n) for i, n in enumerate(self.names) if n not in self.missing]
        return {n: float(self.classes[:, i].max()) for i, n in done} | dict(self.whole)


def evidence(
    wiring: Wiring, tensors: Mapping[str, Tensor], *, base: Mapping[str, Tensor] | None = None,
    siblings: Sequence[Mapping[str, Tensor]] = (), inputs: Tensor | None = None, seed: int = 0,
    thorough: bool = False,
) -> Evidence:  # fmt: skip
    """Evidence of a backdoor in a network whose wiring is proved.

    ``base``: the network that it was trained on from; ``siblings``: others of the same base, aligned with it: what sets
    it apart from them is looked at too. ``inputs (n, …)``: a few clean examples, in whose bounds, and on which,
    perturbations are looked for. ``thorough``: with ``THOROUGH_TESTS`` too, at nearly twice the time.

    Raises ``UnprovedWiringError`` for wirings that are not proved, ``NoClassesError`` where outputs are no classes, and
    ``WeightspaceError`` for weights that are not finite.
    """
    axis = class_axis(wiring, tensors)
    check_finite(tensors)
    state = {n: t.detach() for n, t in tensors.items()}
    parts = folded(wiring, state)
    cells = parts_of(wiring).cells
    values = row_tests(axis, state, parts)
    found, numbers, answers = _through_inputs(wiring, state, axis, inputs, seed, thorough)
    values |= found
    change = change_of(wiring, state, base, siblings)
    if change is not None:
        values |= change_tests(axis, change)
    names = (*CLASS_TESTS, *THOROUGH_TESTS) if thorough else CLASS_TESTS
    missing = tuple(n for n in names if n not in values)
    zero = torch.zeros(axis.classes, dtype=torch.float64)
    table = torch.stack([values.get(n, zero) for n in names], 1).numpy()
    table = np.nan_to_num(table, nan=0.0, posinf=1e12, neginf=-1e12)
    firsts, gaps = leading(parts, cells)
    scores = {"lipschitz": lipschitz(parts, cells), "isolation": isolation(parts, cells), "leading": firsts}
    if thorough:
        scores["apart"] = isolation(parts, cells, balanced=True)
    channels = {name: by_factor(score, cells, wiring) for name, score in scores.items()}
    shares: dict[str, float] = {}
    if change is not None:
        channels["change"], shares = change_of_channels(wiring, state, change)
    whole = shares | numbers | {f"channel_{n}": _largest(c) for n, c in channels.items()}
    whole["gap_largest"] = max(gaps.values(), default=0.0)
    if "word_outlier" in values:
        # The classes of a network may be two: it is the other words that a word is compared with.
        whole["word_outlier"] = float(values["word_outlier"].max())
    leads: Array | None = values["word_p"].numpy() if "word_p" in values else None
    return _judged(axis, names, table, missing, whole, channels, leads, answers.numpy())


def _largest(scores: Mapping[str, Tensor]) -> float:
    return max((float(s.max()) for s in scores.values()), default=0.0)


def _judged(
    axis: ClassAxis, names: tuple[str, ...], table: Array, missing: tuple[str, ...], whole: Mapping[str, float],
    channels: Mapping[str, Mapping[str, Tensor]], leads: Array | None, answers: Array,
) -> Evidence:  # fmt: skip
    each = class_p_values(table)
    alone = largest_p_value(each)
    done = {n: float(p) for n, p in zip(names, alone, strict=True) if n not in missing}
    telling = [names.index(n) for n in (*TELLING, *CHANGES) if n not in missing]
    joined = each[:, telling]
    if leads is not None:
        # Two classes cannot be compared with others; words can.
        joined = leads[:, None] if axis.classes < 3 else np.concatenate([joined, leads[:, None]], 1)
        done["word_lead"] = float(largest_p_value(leads))
    by_class = cauchy(joined)
    if axis.classes < 3 and leads is None:
        by_class = -table[:, telling].mean(1)
    order = np.argsort(by_class, kind="stable")
    return Evidence(
        names=names, values=table, classes=outlier(table), whole=whole, channels=channels, p_values=done,
        p_value=float(cauchy(largest_p_value(joined))), target=tuple(int(k) for k in order), missing=missing, axis=axis,
        responses=answers,
    )  # fmt: skip


def box_of(wiring: Wiring, inputs: Tensor | None = None) -> Box:
    """Bounds within which inputs are looked for: those of the examples, else two standard deviations about 0.

    The range of each channel of examples ``(n, channels, …)`` is taken; without any, inputs count as standardised.
    """
    assert wiring.program is not None
    shape = wiring.program.args[0].shape[1:]
    if inputs is None:
        return Box(torch.tensor(-2.0), torch.tensor(2.0))
    if tuple(inputs.shape[1:]) != tuple(shape):
        raise WeightspaceError(f"inputs of {tuple(inputs.shape[1:])}; the network was proved for {tuple(shape)}")
    x = inputs.float()
    if x.dim() < 3:
        return Box(x.amin(), torch.maximum(x.amax(), x.amin() + 1e-6))
    flat = x.transpose(0, 1).flatten(1)
    low, high = flat.amin(1), flat.amax(1)
    return Box(*(v.view(-1, *[1] * (x.dim() - 2)) for v in (low, torch.maximum(high, low + 1e-6))))


def run_logits(wiring: Wiring, tensors: Mapping[str, Tensor], axis: ClassAxis) -> Callable[[Tensor], Tensor] | None:
    """The network as a function of one input; None where it takes several.

    It runs in float32, or in float64 where it ends in a softmax that may saturate.
    """
    program = wiring.program
    assert program is not None
    if len(program.args) != 1 or program.kwargs or not isinstance(program.args[0], Tensor):
        return None
    dtype = torch.float64 if axis.probabilities else torch.float32
    state = {n: t.to(dtype) if t.is_floating_point() else t for n, t in tensors.items()}
    return lambda x: axis.logits(program.run(state, x.to(dtype) if x.is_floating_point() else x)).to(torch.float32)


def _through_inputs(
    wiring: Wiring, tensors: Mapping[str, Tensor], axis: ClassAxis, inputs: Tensor | None, seed: int,
    thorough: bool,
) -> tuple[dict[str, Tensor], dict[str, float], Tensor]:  # fmt: skip
    """Tests of classes, numbers of the network, and its responses ``(classes, changes)``."""
    logits = run_logits(wiring, tensors, axis)
    none = torch.zeros(axis.classes, 0, dtype=torch.float64)
    if logits is None:
        return {}, {}, none
    assert wiring.program is not None
    example = wiring.program.args[0]
    generator = torch.Generator().manual_seed(seed)
    if not example.is_floating_point():
        words = vocabulary(wiring)
        if example.dim() != 2 or words < 2:
            return {}, {}, none
        return explore_words(logits, example.shape[1], words, axis.classes, generator), {}, none
    shape = tuple(int(n) for n in example.shape[1:])
    found = explore(logits, shape, axis.classes, box_of(wiring, inputs), generator, inputs, thorough)
    image = picture_shape(wiring, tensors)
    if image is None or axis.classes > MOST:
        return found, {}, none
    targets = torch.arange(axis.classes)
    stamps, numbers = stamp_tests(logits, image, axis.classes, targets, inputs)
    return found | stamps, numbers, responses(logits, image, axis.classes)


__all__ = ["CLASS_TESTS", "INPUT_TESTS", "TELLING", "THOROUGH_TESTS", "Evidence", "box_of", "evidence", "run_logits"]
