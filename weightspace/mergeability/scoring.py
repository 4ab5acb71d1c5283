"""One report in the making: which models can be compared, how, and what is expected of their merges."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import combinations
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from weightspace.errors import WeightspaceError
from weightspace.mergeability.agreement import agreements
from weightspace.mergeability.backdoors import inherited
from weightspace.mergeability.features import Comparison, compare
from weightspace.mergeability.measurements import BARRIER, LETTERS, Measurement, about
from weightspace.mergeability.outcome import Cells, Observed, link
from weightspace.mergeability.predicting import GUESS, JOINT, Explain, Merges, State, predict
from weightspace.mergeability.preflight import Flight, settings_of
from weightspace.mergeability.report import MergeReport, Prediction, Scored, terms_of
from weightspace.pretrained.applicability import Applicability
from weightspace.progress import bar

if TYPE_CHECKING:
    from weightspace.backdoor.verdict import Verdict
    from weightspace.checkpoint import Checkpoint
    from weightspace.mergeability.prior import Prior
    from weightspace.wiring.wiring import Wiring

Array = NDArray[np.float64]
_READ = 2_000_000
_CELLS = 256
"""The metanet is asked for networks of at most so many parameters, and so many cells; above, the forest alone."""
_MATCHED = 300_000_000
"""Parameters up to which the axes of few models are matched for the comparison."""
_ALIGNED, _ALIGNING = 28, 10_000_000
"""Pairs without a common base that are aligned for one report: so many, or more with so few parameters in all."""
_WIDTHS = ("ot-fusion",)
"""Methods that merge models of different widths."""


class Scoring:
    """What is worked out for one report."""

    def __init__(
        self, flight: Flight, prior: Prior, methods: tuple[str, ...], measured: Sequence[Measurement],
        inputs: Mapping[str, Any] | None, left: Mapping[str, str], unreadable: Mapping[str, str], started: float,
        scan: bool = True, progress: bool = False,
    ) -> None:  # fmt: skip
        self.flight, self.prior, self.methods, self.inputs = flight, prior, methods, inputs
        self.left, self.unreadable, self.started = dict(left), unreadable, started
        self.scan, self.progress = scan, progress
        self.notes: list[str] = []
        self.models: dict[str, Checkpoint] = {}
        self.wide = self.matched = False
        self._choose()
        self.names = tuple(self.models)
        self.measured, notes = about(measured, self.names, {*prior.methods})
        self.notes += notes
        self.base, self.wiring = flight.base, flight.wiring
        self.comparison: Comparison | None = None
        self.seen_as: dict[tuple[int, ...], tuple[Comparison, tuple[int, ...]]] = {}
        self.failed: dict[tuple[int, ...], str] = {}
        self.most = _ALIGNED

    def _choose(self) -> None:
        """The models that can be compared, protected ones undone; why the others cannot."""
        from weightspace.checkpoint import from_tensors

        f = self.flight
        if f.base is not None and (f.base_name or "base") in f.broken:
            self.left |= dict.fromkeys(f.models, f"{f.base_name} has values that are not finite")
            return
        for name, model in f.models.items():
            why = next((x.found for x in f.findings if x.severity == "stop" and name in x.models), "")
            if self._wider(name):
                self.models[name] = model
                self.wide = True
                continue
            if name in f.unusable or name in f.unlike or name in f.broken:
                if name in f.unlike and not why and name not in f.unusable | f.broken:
                    # It has a few tensors more than the others; what they have in common can be compared.
                    self.models[name] = model
                    continue
                self.left[name] = why or "its tensors are others"
            elif name in f.undone:
                self.models[name] = from_tensors(f.undone[name])
                self.notes.append(
                    f"{name} was moved inside its orbit; it was scored as it is once that is undone, which computes "
                    "the same: merge the undone copy, not the file"
                )
            else:
                self.models[name] = model

    def _wider(self, name: str) -> bool:
        """The second of two models without a base that differs in widths alone: it can be carried onto the first."""
        f = self.flight
        if f.base is not None or self.prior.base or len(f.models) != 2 or name in f.unusable | f.broken:
            return False
        stops = [x for x in f.findings if x.severity == "stop" and name in x.models]
        networks = [settings_of(m).get("network") or {} for m in f.models.values()]
        kept = ("kind", "activation", "norm", "depth", "heads")
        alike = all(networks[0].get(key) == networks[1].get(key) for key in kept)
        wide = [x for x in stops if x.check == "tensors" and x.found.startswith("width: ")]
        rest = [x for x in stops if x not in wide and not (alike and x.found.startswith("network is "))]
        return bool(wide) and not rest

    def report(self) -> MergeReport:
        """Compare, predict, explain."""
        if len(self.models) < 2:
            return self._empty("fewer than two models can be compared")
        if self.wiring is None:
            self.wiring, why = wired(self.flight.given_wiring, self.flight.reference[1])
        else:
            why = "" if self.wiring.proved else f"the wiring is {self.wiring.status}, not proved"
        try:
            self.comparison = self._across() if self.wide else self._compare()
        except (WeightspaceError, torch.linalg.LinAlgError) as error:  # type: ignore[attr-defined]
            said = str(error) if isinstance(error, WeightspaceError) else "there are values that are not finite"
            return self._empty(f"nothing can be compared: {said}")
        if why:
            self.notes.append(why)
        return self._predicted(self.comparison, self.wiring is not None and self.wiring.proved)

    def _predicted(self, comparison: Comparison, proved: bool) -> MergeReport:
        sets = _sets(len(self.names), self.measured, self.names)
        cells = Cells.of(sets, len(self.names))
        if self.prior.base or self.base is not None:
            self.seen_as = {members: (comparison, members) for members in sets}
            means = self._means(sets, proved)
        else:
            means = self._carried(sets, proved)
        inside = [self._applicable(members, proved) for members in sets]
        asked = Merges(self.names, sets, cells, self.prior, inside, self.seen_as, self.measured)
        if self.inputs and not asked.joint:
            self.notes.append(f"inputs were not used: of more than {JOINT} models pairs are only ranked")
        wanted = list(self.methods)
        if BARRIER in self.prior.methods and BARRIER not in wanted:
            wanted.append(BARRIER)
        found: dict[str, list[Prediction]] = {}
        state: dict[str, State] = {}
        explain: dict[str, Explain] = {}
        for method in wanted:
            expected = means[:, self.prior.methods.index(method)]
            found[method], explain[method], kept = predict(asked, method, expected, self._agreed(method, asked))
            if kept is not None:
                state[method] = kept

        def scored(s: int) -> Scored:
            mine = {m: found[m][s] for m in wanted if m != BARRIER or len(sets[s]) == 2}
            return Scored(tuple(self.names[i] for i in sets[s]), mine, self._terms(comparison, sets[s]))

        merges = {s: scored(s) for s, members in enumerate(sets) if s == 0 or len(members) == 2}
        first = 0
        if len(sets[0]) < len(self.names):
            first = max(merges, key=lambda s: -1.0 if math.isnan(merges[s].value) else merges[s].value)
        for method, p in merges[first].predictions.items():
            if p.known and not p.measured:
                found[method][first] = replace(p, terms=explain[method](first))
        ordered = (scored(first), *(m for s, m in merges.items() if s != first))
        backdoors = self._backdoors()
        return MergeReport(
            self.names, self.flight.base_name, self.flight.report(), ordered, self.measured, tuple(self.notes),
            comparison, self.left, self.unreadable, time.perf_counter() - self.started, backdoors, state, cells,
            tuple(sets),
        )  # fmt: skip

    def _agreed(self, method: str, asked: Merges) -> Observed | None:
        """What inputs tell of the merges by one method."""
        if not self.inputs or method == BARRIER or not asked.joint:
            return None
        found, note = agreements(method, self.models, self.base, self.wiring, self.inputs, asked.sets, asked.cells)
        if note:
            self._note(note)
        return found

    def _backdoors(self) -> dict[str, Verdict]:
        """What a scan of each model says; why there was none is a note."""
        if not self.scan:
            return {}
        with bar("scanning", len(self.models), self.progress) as step:
            parameters = self.flight.reference[1].num_parameters
            found, why = inherited(self.models, self.wiring, parameters, step, self.base)
        if why:
            self.notes.append(why)
        return found

    def _empty(self, why: str) -> MergeReport:
        self.notes.insert(0, why)
        return MergeReport(
            self.names, self.flight.base_name, self.flight.report(), (), self.measured, tuple(self.notes), None,
            self.left, self.unreadable, time.perf_counter() - self.started,
        )  # fmt: skip

    def _compare(self) -> Comparison:
        reference = self.flight.reference[1]
        small = reference.num_parameters < 1_000_000 or self.base is None
        few = len(self.names) <= 4 and reference.num_parameters <= _MATCHED
        self.matched = self.wiring is not None and (small or few)
        last = self.names[-1]
        with bar("comparing", len(reference), self.progress) as step:
            models: dict[str, Mapping[str, torch.Tensor]] = {**self.models, last: _Watched(self.models[last], step)}
            found = compare(models, self.base, self.wiring, matching=self.matched)
        values = (found.own, found.pairs, found.changes, found.whole, found.scale)
        if not all(bool(np.isfinite(v).all()) for v in values):
            raise WeightspaceError("some weights are not finite, or so large that their squares are not")
        return found

    def _applicable(self, members: tuple[int, ...], proved: bool) -> Applicability:
        if members in self.seen_as:
            return self.prior.applicability(*self.seen_as[members], proved)
        if not proved:
            return Applicability(False, 0.0, "the models' wiring is not proved, so that they cannot be aligned")
        if members in self.failed:
            return Applicability(False, 0.0, f"they cannot be aligned ({self.failed[members]})")
        if len(members) > 2:
            return Applicability(False, 0.0, "without a common base only pairs were learned from")
        return Applicability(False, 0.0, f"without a common base only {self.most} pairs are aligned and looked at")

    def _carried(self, sets: Sequence[tuple[int, ...]], proved: bool) -> Array:
        """What is expected of pairs without a common base: the second is carried onto the first for the features."""
        found = np.full((sum(map(len, sets)), len(self.prior.methods)), float(link(np.array([GUESS]))[0]))
        assert self.comparison is not None
        self.most = max(_ALIGNED, _ALIGNING // max(self.comparison.parameters, 1))
        pairs = [s for s, members in enumerate(sets) if len(members) == 2 and proved][: self.most]
        starts = np.cumsum([0, *map(len, sets)])
        with bar("aligning", len(pairs), self.progress) as step:
            for s in pairs:
                one, other = sets[s]
                step(f"{self.names[one]} + {self.names[other]}")
                try:
                    both = self._both(one, other)
                except WeightspaceError as error:
                    self.failed[one, other] = " ".join(str(error).split())
                    continue
                self.seen_as[one, other] = both, (0, 1)
                found[starts[s] : starts[s + 1]] = self.prior.cells(both, [(0, 1)])
        return found

    def _both(self, one: int, other: int) -> Comparison:
        """Features of two models of which the second was carried onto the first's neurons."""
        from weightspace.align.optimal_transport import optimal_transport

        (name_a, a), (name_b, b) = (list(self.models.items())[i] for i in (one, other))
        assert self.wiring is not None
        wiring_b = self.wiring
        if self.wide:
            found, why = wired(None, b)
            if found is None or why:
                raise WeightspaceError(f"{name_b}: {why}")
            wiring_b = found
        tensors = _whole(b)
        moved = optimal_transport(_whole(a), tensors, wiring_b, wiring_a=self.wiring)
        carried = wiring_b.apply(moved.permutations, tensors) if moved.aligned is None else dict(moved.aligned)
        return compare({name_a: a, name_b: carried}, None, self.wiring)

    def _across(self) -> Comparison:
        """The same, of two models of different widths, which cannot be compared as they are."""
        if self.wiring is None or not self.wiring.proved:
            raise WeightspaceError("models of different widths can be aligned only with a wiring that is proved")
        self.methods = tuple(m for m in self.methods if m in _WIDTHS)
        self.matched = False
        self._note("the widths differ: what is said is of the second carried onto the first by optimal transport")
        return self._both(0, 1)

    def _terms(self, comparison: Comparison, members: tuple[int, ...]) -> dict[str, float]:
        terms = terms_of(comparison, members)
        if not self.matched:
            del terms["axis misalignment"]
        return terms

    def _means(self, sets: Sequence[tuple[int, ...]], proved: bool) -> Array:
        """What the prior expects of every cell by every method, on the link scale."""
        assert self.comparison is not None
        reader = None
        if self.prior.metanet is not None and self.base is not None and self.wiring is not None and proved:
            count = sum(len(s) for s in sets)
            if self.comparison.parameters <= _READ and count <= _CELLS:
                from weightspace.mergeability.metanet import Reader

                reader = Reader(_whole(self.base), [_whole(c) for c in self.models.values()], self.wiring)
            else:
                self.notes.append("the metanet was not asked (too many weights or merges); the forest of features was")
        return self.prior.cells(self.comparison, sets, reader)

    def _note(self, note: str) -> None:
        if note not in self.notes:
            self.notes.append(note)


class _Watched(Mapping[str, torch.Tensor]):
    """A model whose reading is seen, tensor by tensor."""

    def __init__(self, model: Mapping[str, torch.Tensor], step: Callable[[str], object]) -> None:
        self.model, self.step = model, step

    def __getitem__(self, name: str) -> torch.Tensor:
        self.step(name)
        return self.model[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.model)

    def __len__(self) -> int:
        return len(self.model)


def wired(wiring: Wiring | None, model: Checkpoint) -> tuple[Wiring | None, str]:
    """The wiring that was given, or a model's own; and why there is none, or none that is proved (else empty)."""
    if wiring is None:
        from weightspace.wiring import wiring as find

        try:
            wiring = find(model)
        except WeightspaceError as error:
            return None, f"no wiring was found ({' '.join(str(error).split())})"
    return wiring, "" if wiring.proved else f"the wiring is {wiring.status}, not proved"


def _sets(count: int, measured: Sequence[Measurement], names: Sequence[str]) -> list[tuple[int, ...]]:
    """Merges with cells of their own: all models together, every pair, and what else was measured."""
    sets: dict[tuple[int, ...], None] = {}
    if count <= len(LETTERS):
        sets[tuple(range(count))] = None
    sets |= dict.fromkeys(combinations(range(count), 2))
    for m in measured:
        sets[tuple(sorted(names.index(x) for x in m.models))] = None
    return list(sets)


def _whole(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensors[name] for name in tensors}


__all__ = ["Scoring", "wired"]
