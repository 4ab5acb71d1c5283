"""``ws.score``: whether models can be merged and what each would retain, before anything is merged."""

from __future__ import annotations

import math
import os
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from weightspace.errors import WeightspaceError
from weightspace.mergeability.backdoors import inherited
from weightspace.mergeability.features import Comparison, compare
from weightspace.mergeability.measurements import BARRIER, LETTERS, Known, Measurement, latest, read_measurements
from weightspace.mergeability.outcome import (
    CEILING,
    Cells,
    Observed,
    Outcome,
    effect_terms,
    link,
    outcome_interval,
    retained,
    unlink,
)
from weightspace.mergeability.preflight import CHECKS, Flight, Model, fly, named, opened, settings_of
from weightspace.mergeability.report import MergeReport, Prediction, Scored, terms_of
from weightspace.pretrained.applicability import Applicability
from weightspace.progress import bar

if TYPE_CHECKING:
    import pandas as pd

    from weightspace.backdoor.verdict import Verdict
    from weightspace.checkpoint import Checkpoint
    from weightspace.mergeability.prior import Prior
    from weightspace.wiring.wiring import Wiring
    from weightspace.zoo import Zoo

Array = NDArray[np.float64]
Explain = Callable[[int], Mapping[str, float]]
"""What moved the prediction of a merge, by its number."""
State = tuple[Outcome, Observed | None]
"""The effects of one method and what was observed of them."""

JOINT = 64
"""Models whose pairs have a common posterior, so that measured merges of some tell of the others."""
MOST = 512
"""Models of one report."""
_COVERAGE = 0.9
_READ = 2_000_000
_CELLS = 256
"""The metanet is asked for networks of at most so many parameters, and so many cells; above, the forest alone."""
_MATCHED = 300_000_000
_WORK = 4_000_000_000
"""Weights that are merged and run where inputs are given: more than these, and only the first merge is."""
_ALIGNED, _ALIGNING = 28, 10_000_000
"""Pairs without a common base that are aligned for one report: so many, or more with so few parameters in all."""
_WIDTHS = ("ot-fusion",)
"""Methods that merge models of different widths."""
_HEADERS = ("adapters", "quantised", "tensors")
"""What is looked at in any case: without it nothing can be compared."""


def score(
    models: Sequence[Model] | Mapping[str, Model] | str | os.PathLike[str] | Zoo,
    base: Model | None = None,
    methods: Sequence[str] | None = None,
    known: Known | pd.DataFrame | Zoo | None = None,
    inputs: Mapping[str, Any] | None = None,
    *,
    wiring: Wiring | None = None,
    checks: bool = True,
    scan: bool = True,
    prior: Prior | str | os.PathLike[str] | None = None,
    progress: bool = False,
) -> MergeReport:
    """Whether models can be merged, how well by each method, and why: from the files alone.

    ``models``: two or more paths, checkpoints or mappings of tensors, or a mapping of names to such; or a folder of
    models (a ``Zoo``), of which those that fit the base are taken and whose recorded merges count as ``known``; or one
    file that holds several.
    ``base``: what they were fine-tuned from; without it nothing is predicted unless merges were measured. ``methods``:
    those to predict (default: all that were learned). ``known``: measured merges of these models (a table with
    ``a, b, method, outcome``; see ``measurements``), which sharpen all else. ``inputs``: a few unlabelled inputs by
    model name, of that model's task: models are merged in memory, and how often the merged one answers as the single
    one does counts as an uncertain measurement. ``checks``: do the preflight; without, only names and shapes are looked
    at. ``scan``: look whether models carry backdoors that a merge would inherit (``ws.scan``; not of more than 8
    models, or of large ones). ``prior``: another merge-ability model than that which comes with weightspace, or the
    folder that ``weightspace train merge`` wrote it to. ``progress``: show bars on the terminal.

    Protected models are scored as they are once undone (``report.undone``); models that do not fit are left out and
    named. Of more than 64 models all pairs are ranked, but measured merges cannot be taken into account.

    Raises ``WeightspaceError`` for fewer than two models, more than 512, unknown methods, measurements that make no
    sense, and files that cannot be read.
    """
    started = time.perf_counter()
    using = _prior(prior, base is not None, methods)
    methods = [m for m in using.methods if m != BARRIER] if methods is None else list(methods)
    unknown = [m for m in methods if m not in using.methods]
    if unknown or not methods:
        found = repr(unknown[0]) if unknown else "no method"
        raise WeightspaceError(f"nothing was learned about {found}; expected some of {', '.join(using.methods)}")
    origin = None if base is None else opened(base)
    folder = _population(models)
    left: dict[str, str] = {}
    unreadable: Mapping[str, str] = {}
    measured = list(read_measurements(known))
    if folder is not None:
        from weightspace.mergeability.candidates import candidates
        from weightspace.zoo import Zoo

        if wiring is None and origin is not None:
            wiring, _ = _wiring(None, origin)
        with bar("choosing", 0, progress) as step:
            chosen = candidates(folder, origin, wiring, step)
        left, unreadable = dict(chosen.left), chosen.unreadable
        measured = [*Zoo(folder).merges(), *measured]
        given: dict[str, Model] = dict(chosen.models)
        if len(given) < 2:
            raise WeightspaceError(
                f"{len(given)} models of {folder} can be candidates, two or more were expected; "
                + _reasons({**left, **unreadable})
            )
    else:
        given = _members(models) or named(models)  # type: ignore[arg-type]
    _count(len(given), bool(measured))
    origin_name = base if base is not None and origin is not None and origin.path is not None else origin
    with bar("looking", 2 * len(given) if checks else 0, progress) as step:
        flight = fly(given, origin_name, wiring=wiring, checks=CHECKS if checks else _HEADERS, step=step)
    scoring = _Scoring(flight, using, tuple(methods), tuple(latest(measured)), inputs, left, unreadable, started)
    scoring.progress, scoring.scan = progress, scan
    return scoring.report()


def _prior(prior: Prior | str | os.PathLike[str] | None, base: bool, methods: Sequence[str] | None) -> Prior:
    """The one that was given, or that which comes along; without a base, that of models without one if it has it."""
    from weightspace.mergeability.prior import FILES, STRANGERS, Prior, shipped, shipped_strangers

    if isinstance(prior, Prior):
        return prior
    folder = FILES if prior is None else Path(prior)
    if not base and (folder / STRANGERS).is_file():
        strange = shipped_strangers() if prior is None else Prior.load(folder, STRANGERS)
        if methods is None or set(methods) <= set(strange.methods):
            return strange
    return shipped() if prior is None else Prior.load(folder)


def _population(models: Any) -> Path | None:
    """The folder of models that was given, if it is one."""
    from weightspace.mergeability.candidates import is_population

    folder = getattr(models, "folder", None)
    if isinstance(folder, Path):
        return folder
    if isinstance(models, str | os.PathLike) and is_population(Path(models)):
        return Path(models)
    return None


def _members(models: Any) -> dict[str, Model]:
    """The models in one file that holds several; none otherwise."""
    from weightspace.checkpoint import list_models

    if not isinstance(models, str | os.PathLike) or not Path(models).is_file():
        return {}
    found = list_models(models)
    return {m.rpartition("!")[2]: opened(m) for m in found} if len(found) > 1 else {}


def _count(count: int, measured: bool) -> None:
    if count < 2:
        raise WeightspaceError(f"{count} models were given, two or more were expected (or a folder of them)")
    if count > MOST:
        raise WeightspaceError(
            f"{count} models were given, at most {MOST} are scored at once; choose by task or by date, or score parts "
            "of them and then the best of each"
        )
    if measured and count > JOINT:
        raise WeightspaceError(
            f"{count} models were given with measured merges, which can be taken into account for at most {JOINT} "
            "models at once: rank them without first (known=None), and score the most promising with them"
        )


def _reasons(left: Mapping[str, str], most: int = 5) -> str:
    often = Counter(left.values())
    told = [f"{why} ({n} models)" if n > 1 else f"{next(k for k, v in left.items() if v == why)}: {why}"
            for why, n in often.most_common(most)]  # fmt: skip
    return "; ".join(told) or "it holds no other models"


class _Scoring:
    """What is worked out for one report."""

    def __init__(
        self, flight: Flight, prior: Prior, methods: tuple[str, ...], measured: tuple[Measurement, ...],
        inputs: Mapping[str, Any] | None, left: dict[str, str], unreadable: Mapping[str, str], started: float,
    ) -> None:  # fmt: skip
        self.flight, self.prior, self.methods, self.inputs = flight, prior, methods, inputs
        self.left, self.unreadable, self.started = left, unreadable, started
        self.notes: list[str] = []
        self.models: dict[str, Checkpoint] = {}
        self.wide = self.progress = False
        self.scan = True
        self._choose()
        self.names = tuple(self.models)
        self.measured, notes = _about(measured, self.names, {*prior.methods})
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
        if len(self.models) < 2:
            return self._empty("fewer than two models can be compared")
        if self.wiring is None:
            self.wiring, why = _wiring(self.flight.given_wiring, self.flight.reference[1])
        else:
            why = "" if self.wiring.proved else f"the wiring is {self.wiring.status}, not proved"
        proved = self.wiring is not None and self.wiring.proved
        try:
            comparison = self._across() if self.wide else self._compare()
        except (WeightspaceError, torch.linalg.LinAlgError) as error:  # type: ignore[attr-defined]
            said = str(error) if isinstance(error, WeightspaceError) else "there are values that are not finite"
            return self._empty(f"nothing can be compared: {said}")
        if why:
            self.notes.append(why)
        self.comparison = comparison
        sets = _sets(len(self.names), self.measured, self.names)
        cells = Cells.of(sets, len(self.names))
        if self.prior.base or self.base is not None:
            self.seen_as = {members: (comparison, members) for members in sets}
            means = self._means(sets, proved)
        else:
            means = self._carried(sets, proved)
        inside = [self._applicable(members, proved) for members in sets]
        wanted = list(self.methods)
        if BARRIER in self.prior.methods and BARRIER not in wanted:
            wanted.append(BARRIER)
        found: dict[str, list[Prediction]] = {}
        state: dict[str, State] = {}
        explain: dict[str, Explain] = {}
        for method in wanted:
            expected = means[:, self.prior.methods.index(method)]
            found[method], explain[method], kept = self._method(method, expected, sets, cells, inside)
            if kept is not None:
                state[method] = kept

        def scored(s: int) -> Scored:
            mine = {m: found[m][s] for m in wanted if m != BARRIER or len(sets[s]) == 2}
            return Scored(tuple(self.names[i] for i in sets[s]), mine, self._terms(sets[s]))

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
        found = np.full((sum(map(len, sets)), len(self.prior.methods)), float(link(np.array([0.8]))[0]))
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
            found, why = _wiring(None, b)
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

    def _terms(self, members: tuple[int, ...]) -> dict[str, float]:
        assert self.comparison is not None
        terms = terms_of(self.comparison, members)
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

    def _method(
        self, method: str, expected: Array, sets: Sequence[tuple[int, ...]], cells: Cells,
        inside: Sequence[Applicability],
    ) -> tuple[list[Prediction], Explain, State | None]:  # fmt: skip
        """Predictions of all merges by one method, what moved one of them, and the effects they came from."""
        if len(self.names) > JOINT:
            every = [
                replace(self._expected(method, expected[cells.where(s)], 1.0, members), applicability=inside[s])
                if inside[s].inside
                else _nothing(method, inside[s])
                for s, members in enumerate(sets)
            ]  # fmt: skip

            def alone(s: int) -> Mapping[str, float]:
                return self._moved(method, expected[cells.where(s)], expected[cells.where(s)], sets[s])

            return every, alone, None
        seen = [m for m in self.measured if m.method == method]
        observed = _observed(method, seen, expected, sets, cells, self.names)
        if self.inputs:
            observed = self._agreements(method, sets, cells, observed)
        outside = not any(a.inside for a in inside)
        if outside and observed is not None:
            # What was learned says nothing here: only what was measured counts, with effects of its own.
            expected = np.full(len(cells), float(link(np.array([0.8]))[0]))
            observed = _observed(method, seen, expected, sets, cells, self.names)
            if self.inputs:
                observed = self._agreements(method, sets, cells, observed)
            assert observed is not None
            model = _flat(cells, expected, observed)
        else:
            variances = dict(self.prior.variances[method])
            # What a base and its tasks have in common: learned within families, so at least as a model's own effect.
            variances.setdefault("level", variances.get("vulnerability", 0.05))
            model = Outcome(tuple(t for t in effect_terms(cells) if t.name in variances), variances, expected)
        before, after = model.posterior(), model.posterior(observed)
        variance = np.diag(after.covariance), np.maximum(np.diag(before.covariance), 1e-12)
        done = {frozenset(m.models): m for m in seen}
        found = []
        for s, members in enumerate(sets):
            at = cells.where(s)
            exact = done.get(frozenset(self.names[i] for i in members))
            if exact is not None:
                by_model = dict(zip(exact.models, exact.retained, strict=False))
                value = exact.outcome
                p = Prediction(method, value, value, value, _COVERAGE, by_model, {}, inside[s], True)
            elif not inside[s].inside and observed is None:
                p = _nothing(method, inside[s])
            elif outside:
                value, reach = retained(after, at), outcome_interval(after, at, _COVERAGE)
                p = self._prediction(method, value, *reach, unlink(after.mean[at]), members)
            else:
                left = math.sqrt(max(float(variance[0][at].sum() / variance[1][at].sum()), 0.0))
                p = self._expected(method, after.mean[at], left, members)
            found.append(replace(p, applicability=inside[s]))

        def explain(s: int) -> Mapping[str, float]:
            at = cells.where(s)
            if outside:
                change = retained(after, at) - retained(before, at)
                return {"measured merges": -change if method == BARRIER else change}
            return self._moved(method, after.mean[at], before.mean[at], sets[s])

        return found, explain, (model, observed) if observed is not None or any(a.inside for a in inside) else None

    def _expected(self, method: str, mean: Array, left: float, members: tuple[int, ...]) -> Prediction:
        """A prediction with a conformal interval, of which ``left`` is left after measurements."""
        value = float(unlink(mean).mean())
        reach = float(self.prior.spreads[method].reach(np.array([value]), _COVERAGE)[0]) * left
        low, high = max(value - reach, 0.0), min(value + reach, CEILING)
        return self._prediction(method, value, low, high, unlink(mean), members)

    def _moved(self, method: str, mean: Array, before: Array, members: tuple[int, ...]) -> dict[str, float]:
        """By how much each kind of feature, and measured merges, moved a prediction: in what is retained (or lost)."""
        value = float(unlink(before).mean())
        moved = {
            name: value - float(unlink(before - t).mean())
            for name, t in self.prior.terms(*self.seen_as[members], method).items()
        }
        moved["measured merges"] = float(unlink(mean).mean()) - value
        return {name: -t for name, t in moved.items()} if method == BARRIER else moved

    def _prediction(
        self, method: str, value: float, low: float, high: float, by_model: Array, members: tuple[int, ...]
    ) -> Prediction:
        yes = Applicability(True, 1.0)
        if method == BARRIER:
            return Prediction(method, 1 - value, 1 - high, 1 - low, _COVERAGE, {}, {}, yes)
        kept = {self.names[i]: float(v) for i, v in zip(members, by_model, strict=True)}
        return Prediction(method, value, low, high, _COVERAGE, kept, {}, yes)

    def _agreements(
        self, method: str, sets: Sequence[tuple[int, ...]], cells: Cells, observed: Observed | None
    ) -> Observed | None:
        """How often merged networks answer as single ones do, as uncertain measurements of the cells."""
        from weightspace.merge import merge

        inputs = self.inputs
        if method == BARRIER or not inputs:
            return observed
        wiring = self.wiring
        if wiring is None or wiring.program is None or not wiring.proved:
            raise WeightspaceError(
                "inputs are of use where the network can be run: its wiring must be found and proved (give wiring= of "
                "the module with example inputs)"
            )
        unknown = sorted(set(inputs) - set(self.names))
        if unknown:
            raise WeightspaceError(
                f"inputs are given for {unknown[0]!r}, which is none of the models: {', '.join(self.names)}"
            )
        asked_of = [(s, members) for s, members in enumerate(sets) if any(self.names[i] in inputs for i in members)]
        size = wiring.program.tensors
        work = len(asked_of) * sum(math.prod(t.shape) for t in size.values())
        if work > _WORK:
            asked_of = asked_of[:1]
            self._note("inputs were used for the first merge alone: to merge and run all would take long")
        alone: dict[int, torch.Tensor] = {}
        for s, members in asked_of:
            merged = merge([self.models[self.names[i]] for i in members], method, base=self.base).tensors
            assert merged is not None
            for i in members:
                name = self.names[i]
                if name not in inputs:
                    continue
                if i not in alone:
                    alone[i] = _answers(wiring, self.models[name], inputs[name], name)
                same = (_answers(wiring, merged, inputs[name], name) == alone[i]).double()
                count = same.numel()
                share = (float(same.sum()) + 1) / (count + 2)
                at = next(int(c) for c in cells.where(s) if cells.own[c] == i)
                # A share of n answers, seen through the link; and agreement is not quite accuracy retained.
                slope = 1 / max(CEILING - share, 0.02)
                row = Observed.cells([at], np.array([share]), len(cells))
                row = Observed(row.design, row.values, np.array([slope**2 * share * (1 - share) / count + 0.1]))
                observed = row if observed is None else observed.and_(row)
        return observed

    def _note(self, note: str) -> None:
        if note not in self.notes:
            self.notes.append(note)


# -------------------------------------------------------------------- parts


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


def _nothing(method: str, inside: Applicability) -> Prediction:
    nan = float("nan")
    return Prediction(method, nan, nan, nan, _COVERAGE, {}, {}, inside)


def _about(
    measured: Sequence[Measurement], names: Sequence[str], methods: set[str]
) -> tuple[tuple[Measurement, ...], list[str]]:
    """Measurements about these models, under their names here; what was left out as notes."""
    short: dict[str, set[str]] = {}
    for name in names:
        for text in (Path(name).name, name.rsplit(".", 1)[0], Path(name).name.rsplit(".", 1)[0]):
            short.setdefault(text, set()).add(name)

    def here_of(text: str) -> str | None:
        """A model by its name, its path or its file's name without the ending, where that is one model's alone."""
        if text in names:
            return text
        found = next((short[t] for t in (text, Path(text).name) if t in short), set())
        return next(iter(found)) if len(found) == 1 else None

    kept, others, foreign = [], 0, set()
    for m in measured:
        here = [here_of(x) for x in m.models]
        if any(h is None for h in here) or len(set(here)) < len(here):
            others += 1
        elif m.method not in methods:
            foreign.add(m.method)
        else:
            kept.append(replace(m, models=tuple(str(h) for h in here)))
    notes = []
    if others:
        notes.append(f"{others} measured merges are about models that were not given and do not count")
    if foreign:
        notes.append(f"nothing was learned about {', '.join(sorted(foreign))}: their measured merges do not count")
    return tuple(kept), notes


def _wiring(wiring: Wiring | None, model: Checkpoint) -> tuple[Wiring | None, str]:
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


def _observed(
    method: str, measured: Sequence[Measurement], expected: Array, sets: Sequence[tuple[int, ...]], cells: Cells,
    names: Sequence[str],
) -> Observed | None:  # fmt: skip
    """What was measured by one method, on the link scale."""
    observed: Observed | None = None
    for m in measured:
        order = [names.index(x) for x in m.models]
        at = cells.where(sets.index(tuple(sorted(order))))
        if m.retained and method != BARRIER:
            which = np.array([int(at[[cells.own[c] for c in at].index(i)]) for i in order])
            row = Observed.cells(which, np.array(m.retained), len(cells))
        else:
            row = _averaged(at, 1 - m.outcome if method == BARRIER else m.outcome, expected, len(cells))
        observed = row if observed is None else observed.and_(row)
    return observed


def _flat(cells: Cells, expected: Array, observed: Observed) -> Outcome:
    """Effects of models and merges that nothing is known of but what was measured."""
    model = Outcome.start(effect_terms(cells), expected)
    if len(observed.values) >= 3:
        return model.fit(observed)
    unit = 0.36
    return replace(model, variances={name: unit * v for name, v in model.variances.items()})


def _averaged(at: NDArray[np.int64], outcome: float, expected: Array, total: int) -> Observed:
    """A mean over cells, made linear where it is expected to be; shifted so that the expectation has its value."""
    level = unlink(expected[at]).mean()
    shifted = unlink(expected[at]) + outcome - level
    t = link(shifted)
    slope = np.maximum(CEILING - shifted, 0.02)
    weight = slope / slope.sum()
    design = np.zeros((1, total))
    design[0, at] = weight
    return Observed(design, np.array([float(weight @ t)]), np.array([1e-3]))


def _whole(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensors[name] for name in tensors}


def _answers(wiring: Wiring, tensors: Mapping[str, torch.Tensor], given: Any, name: str) -> torch.Tensor:
    """The classes (or next tokens) that a network names for its inputs."""
    assert wiring.program is not None
    arguments = given if isinstance(given, tuple) else (given,)
    plain = {n: t.float() if t.is_floating_point() else t for n, t in _whole(tensors).items()}
    try:
        with torch.no_grad():
            out = wiring.program.run(plain, *arguments)
    except (RuntimeError, TypeError, ValueError, IndexError, WeightspaceError) as error:
        reason = " ".join(str(error).split())[:200]
        raise WeightspaceError(
            f"the inputs of {name} do not fit the network ({reason}); expected a tensor, or a tuple of tensors, as the "
            "module takes them"
        ) from error
    first = next(x for x in torch.utils._pytree.tree_leaves(out) if isinstance(x, torch.Tensor))
    found: torch.Tensor = first.argmax(-1)
    return found


__all__ = ["JOINT", "MOST", "score"]
