"""``ws.score``: whether models can be merged and what each would retain, before anything is merged."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from weightspace.errors import WeightspaceError
from weightspace.mergeability.features import Comparison, compare
from weightspace.mergeability.measurements import LETTERS, Known, Measurement, read_measurements
from weightspace.mergeability.outcome import (
    CEILING,
    Cells,
    Observed,
    Outcome,
    Posterior,
    effect_terms,
    link,
    most_informative,
    retained,
    unlink,
)
from weightspace.mergeability.preflight import Model, Preflight, preflight
from weightspace.pretrained.applicability import Applicability

if TYPE_CHECKING:
    import pandas as pd

    from weightspace.checkpoint import Checkpoint
    from weightspace.mergeability.prior import Prior
    from weightspace.wiring.wiring import Wiring

Array = NDArray[np.float64]

BARRIER = "barrier"
METHODS = ("linear", "task-arithmetic", "ties")
"""Methods that are predicted where nothing else is said."""
_MOST = 64
"""Models of one report: all their pairs have a common posterior."""
_READ = 2_000_000
_CELLS = 256
"""The metanet is asked for networks of at most so many parameters, and so many cells; above, the forest alone."""


@dataclass(frozen=True)
class Prediction:
    """What a merge by one method would retain.

    ``value``: retained accuracy averaged over the models' tasks (for ``"barrier"``: accuracy lost half way), with an
    interval that holds it in ``coverage`` of the cases; ``retained`` by model. ``terms``: by how many points of
    retained accuracy each kind of feature moves the prediction away from the usual merge, and what measured merges add.
    Not numbers where the prior does not apply and nothing was measured; ``applicability`` says why.
    """

    method: str
    value: float
    low: float
    high: float
    coverage: float
    retained: Mapping[str, float]
    terms: Mapping[str, float]
    applicability: Applicability
    measured: bool = False

    def __str__(self) -> str:
        if math.isnan(self.value):
            return f"no prediction ({self.applicability})"
        if self.measured:
            return f"{self.value:.3f} (measured)"
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"


@dataclass(frozen=True)
class Scored:
    """One merge that was asked about: its models and a prediction per method."""

    models: tuple[str, ...]
    predictions: Mapping[str, Prediction]

    @property
    def best(self) -> str | None:
        """The method that is expected to retain most; None where nothing is predicted."""
        known = {m: p.value for m, p in self.predictions.items() if m != BARRIER and not math.isnan(p.value)}
        return max(known, key=lambda m: known[m]) if known else None

    @property
    def value(self) -> float:
        """What the best method is expected to retain."""
        best = self.best
        return self.predictions[best].value if best else float("nan")


@dataclass(frozen=True)
class Suggestion:
    """The merge whose evaluation would teach most: it removes ``share`` of the variance of all that is not measured."""

    models: tuple[str, ...]
    method: str
    share: float

    def __str__(self) -> str:
        return f"measure {' + '.join(self.models)} by {self.method}: it removes {self.share:.0%} of the variance"


@dataclass(frozen=True, eq=False)
class MergeReport:
    """What can be said of models before they are merged.

    ``merges``: all of them together first (where that is a merge of at most 8), then every pair. ``predictions`` and
    ``best`` are of the first. ``notes`` says what was left out and why. ``comparison`` holds the terms block by block.
    """

    models: tuple[str, ...]
    base: str | None
    preflight: Preflight | None
    merges: tuple[Scored, ...]
    known: tuple[Measurement, ...]
    notes: tuple[str, ...]
    comparison: Comparison | None = field(repr=False)
    seconds: float = 0.0
    _state: Mapping[str, tuple[Outcome, Observed | None]] = field(default_factory=dict, repr=False)
    _cells: Cells | None = field(default=None, repr=False)
    _sets: tuple[tuple[int, ...], ...] = field(default=(), repr=False)

    @property
    def predictions(self) -> Mapping[str, Prediction]:
        """A prediction per method, of merging all models (the first pair's where they are more than 8)."""
        return self.merges[0].predictions if self.merges else {}

    @property
    def best(self) -> str | None:
        """The method that is expected to be best for merging all models."""
        return self.merges[0].best if self.merges else None

    def ranked(self, size: int = 2) -> list[Scored]:
        """The merges of so many models, the most promising first."""
        found = [m for m in self.merges if len(m.models) == size]
        return sorted(found, key=lambda m: -m.value if not math.isnan(m.value) else math.inf)

    def groups(self, least: float | None = None) -> list[tuple[str, ...]]:
        """Groups of models that are expected to merge well with each other, largest and best first.

        Maximal cliques of the pairs whose best method is expected to retain at least ``least`` (default: the better
        third of all pairs, but at least 0.8).
        """
        import networkx as nx

        pairs = {m.models: m.value for m in self.ranked(2) if not math.isnan(m.value)}
        if not pairs:
            return []
        if least is None:
            least = max(0.8, float(np.quantile(list(pairs.values()), 2 / 3)))
        graph = nx.Graph()
        graph.add_edges_from(p for p, value in pairs.items() if value >= least)
        cliques = [tuple(sorted(c, key=self.models.index)) for c in nx.find_cliques(graph)]

        def worth(group: tuple[str, ...]) -> float:
            return min(pairs.get((a, b), pairs.get((b, a), -1.0)) for a, b in combinations(group, 2))

        return sorted((c for c in cliques if len(c) > 1), key=lambda c: (-len(c), -worth(c)))

    def suggest(self, method: str | None = None) -> Suggestion:
        """The pair whose evaluation lowers the expected posterior variance of all others most.

        Raises ``WeightspaceError`` where there is no prediction to sharpen or every pair was measured.
        """
        method = method or self.best
        if method is None or method not in self._state or self._cells is None:
            raise WeightspaceError("there are no predictions to sharpen; see the report's preflight and notes")
        done = {frozenset(m.models) for m in self.known if m.method == method}
        names = [frozenset(self.models[i] for i in s) for s in self._sets]
        open_ = {s: self._cells.where(s) for s, n in enumerate(names) if len(n) == 2 and n not in done}
        if not open_:
            raise WeightspaceError(f"every pair was measured by {method}: there is nothing left to learn")
        model, observed = self._state[method]
        targets = np.concatenate(list(open_.values()))
        chosen, share = most_informative(model, observed, open_, targets)
        return Suggestion(tuple(self.models[i] for i in self._sets[chosen]), method, share)

    def to_json(self) -> dict[str, Any]:
        """Everything as values that ``json.dumps`` takes; what is not a number is None."""
        suggestion = None
        if self._state:
            try:
                suggestion = asdict(self.suggest())
            except WeightspaceError:
                suggestion = None
        found: dict[str, Any] = _plain({
            "models": list(self.models), "base": self.base,
            "preflight": None if self.preflight is None else self.preflight.to_json(), "best": self.best,
            "merges": [
                {
                    "models": list(m.models), "best": m.best,
                    "predictions": {k: asdict(p) for k, p in m.predictions.items()},
                }
                for m in self.merges
            ],
            "groups": [list(g) for g in self.groups()], "suggest": suggestion,
            "known": [m.to_row() for m in self.known], "notes": list(self.notes), "seconds": self.seconds,
        })  # fmt: skip
        return found

    def rows(self) -> list[tuple[str, str, str, str]]:
        """The table: a row per method of the first merge."""
        found = []
        for method, p in self.predictions.items():
            terms = sorted(p.terms.items(), key=lambda kv: -abs(kv[1]))[:3]
            why = ", ".join(f"{name} {100 * value:+.1f}" for name, value in terms if abs(value) >= 5e-4)
            mark = "best" if method == self.best else ""
            found.append((method, str(p), why, mark))
        return found

    def __repr__(self) -> str:
        base = f"base {self.base}" if self.base else "no base"
        lines = [f"MergeReport({len(self.models)} models, {base}, {self.seconds:.1f} s)"]
        if self.preflight is not None:
            lines += [f"  {line}" for line in repr(self.preflight).splitlines()]
        if self.merges:
            lines.append(f"  retained accuracy of {' + '.join(self.merges[0].models)}, 90 % interval; why (points)")
            rows = self.rows()
            widths = [max(len(row[i]) for row in rows) for i in range(3)]
            lines += ["    " + "  ".join(c.ljust(w) for c, w in zip(row, (*widths, 0), strict=True)).rstrip()
                      for row in rows]  # fmt: skip
            lines.append(f"    {next(iter(self.predictions.values())).applicability}")
        lines += [f"  note: {note}" for note in self.notes]
        return "\n".join(lines)


def score(
    models: Sequence[Model] | Mapping[str, Model],
    base: Model | None = None,
    methods: Sequence[str] = METHODS,
    known: Known | pd.DataFrame | None = None,
    inputs: Mapping[str, Any] | None = None,
    *,
    wiring: Wiring | None = None,
    checks: bool = True,
    prior: Prior | None = None,
) -> MergeReport:
    """Whether models can be merged, how well by each method, and why: from the files alone.

    ``models``: paths, checkpoints or mappings of tensors, or a mapping of names to such; two or more. ``base``: what
    they were fine-tuned from; without it nothing is predicted unless ``known`` has measured merges. ``known``: measured
    merges of these models (a table with ``a, b, method, outcome``; see ``measurements``), which sharpen all else.
    ``inputs``: a few unlabelled inputs by model name, of that model's task: models are merged in memory, and how often
    the merged one answers as the single one does counts as an uncertain measurement. ``checks``: do the preflight.

    Raises ``WeightspaceError`` for fewer than two models, more than 64, unknown methods, and files that cannot be read.
    """
    from weightspace.mergeability.prior import COVERAGE, shipped

    started = time.perf_counter()
    from weightspace.mergeability.preflight import _name, _named, _opened

    named = {n: _opened(m) for n, m in _named(models).items()}
    names = tuple(named)
    if len(names) < 2:
        raise WeightspaceError(f"{len(names)} models were given, two or more were expected")
    if len(names) > _MOST:
        raise WeightspaceError(f"{len(names)} models were given; at most {_MOST} are scored at once: choose some")
    origin = None if base is None else _opened(base)
    base_name = None if base is None else _name(base, "base")
    prior = prior or shipped()
    unknown = [m for m in methods if m not in prior.methods]
    if unknown:
        raise WeightspaceError(f"nothing was learned about {unknown[0]!r}; expected some of {', '.join(prior.methods)}")
    flight = None
    if checks:
        flight = preflight(named, origin if origin is None else base, wiring=wiring)
    measured, notes = _about(read_measurements(known), names, set(prior.methods))
    wiring, why = _wiring(wiring, named[names[0]] if origin is None else origin)
    try:
        comparison = compare(named, origin, wiring)
    except WeightspaceError as error:
        notes.append(f"nothing is predicted: {error}")
        return MergeReport(names, base_name, flight, (), measured, tuple(notes), None, time.perf_counter() - started)
    if why:
        notes.append(why)
    sets = _sets(len(names), measured, names)
    cells = Cells.of(sets, len(names))
    proved = wiring is not None and wiring.proved
    inside = [prior.applicability(comparison, s, proved) for s in sets]
    means = _means(prior, comparison, sets, named, origin, wiring if proved else None, notes)
    wanted = list(methods) + ([BARRIER] if BARRIER in prior.methods and BARRIER not in methods else [])
    found: dict[str, list[Prediction]] = {}
    state = {}
    for method in wanted:
        expected = means[:, prior.methods.index(method)]
        model, observed = _effects(prior, method, cells, expected, measured, sets, names)
        if inputs:
            observed = _agreements(method, inputs, named, origin, wiring, sets, cells, observed, notes)
        posterior = model.posterior(observed)
        before = model.posterior()
        state[method] = (model, observed)
        done = {m.models: m for m in measured if m.method == method}
        helped = bool(done)
        found[method] = [
            _prediction(
                prior, comparison, method, cells.where(s), members, names, posterior, before, inside[s], done, helped,
                COVERAGE, explain=s == 0,
            )
            for s, members in enumerate(sets)
        ]  # fmt: skip
    shown = [s for s, members in enumerate(sets) if s == 0 or len(members) == 2]
    merges = tuple(
        Scored(tuple(names[i] for i in sets[s]), {m: found[m][s] for m in wanted if m != BARRIER or len(sets[s]) == 2})
        for s in shown
    )
    return MergeReport(
        names, base_name, flight, merges, measured, tuple(notes), comparison, time.perf_counter() - started, state,
        cells, tuple(sets),
    )  # fmt: skip


# -------------------------------------------------------------------- parts


def _about(
    measured: Sequence[Measurement], names: Sequence[str], methods: set[str]
) -> tuple[tuple[Measurement, ...], list[str]]:
    """Measurements about these models, under their names here; what was left out as notes."""
    stems = {n: n for n in names}
    for name in names:
        stem = name.rsplit(".", 1)[0]
        stems.setdefault(stem, name)
    kept, others, foreign = [], 0, set()
    for m in measured:
        here = [stems.get(x) or stems.get(Path(x).name) for x in m.models]
        if any(h is None for h in here):
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


def _means(
    prior: Prior, comparison: Comparison, sets: Sequence[tuple[int, ...]], named: Mapping[str, Checkpoint],
    base: Checkpoint | None, wiring: Wiring | None, notes: list[str],
) -> Array:  # fmt: skip
    reader = None
    if prior.metanet is not None and base is not None and wiring is not None:
        count = sum(len(s) for s in sets)
        if comparison.parameters <= _READ and count <= _CELLS:
            from weightspace.mergeability.metanet import Reader

            reader = Reader(_whole(base), [_whole(c) for c in named.values()], wiring)
        else:
            notes.append("the metanet was not asked (too many weights or merges); the forest of features was")
    return prior.cells(comparison, sets, reader)


def _whole(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensors[name] for name in tensors}


def _effects(
    prior: Prior, method: str, cells: Cells, expected: Array, measured: Sequence[Measurement],
    sets: Sequence[tuple[int, ...]], names: Sequence[str],
) -> tuple[Outcome, Observed | None]:  # fmt: skip
    """The effects model of one method around what is expected, and what was observed."""
    terms = [t for t in effect_terms(cells) if t.name in prior.variances[method]]
    model = Outcome(tuple(terms), dict(prior.variances[method]), expected)
    observed: Observed | None = None
    for m in measured:
        if m.method != method:
            continue
        order = [names.index(x) for x in m.models]
        at = cells.where(sets.index(tuple(sorted(order))))
        if m.retained and method != BARRIER:
            which = np.array([int(at[[cells.own[c] for c in at].index(i)]) for i in order])
            row = Observed.cells(which, np.array(m.retained), len(cells))
        else:
            row = _averaged(at, 1 - m.outcome if method == BARRIER else m.outcome, expected, len(cells))
        observed = row if observed is None else observed.and_(row)
    return model, observed


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


def _agreements(
    method: str, inputs: Mapping[str, Any], named: Mapping[str, Checkpoint], base: Checkpoint | None,
    wiring: Wiring | None, sets: Sequence[tuple[int, ...]], cells: Cells, observed: Observed | None, notes: list[str],
) -> Observed | None:  # fmt: skip
    """How often merged networks answer as single ones do, as uncertain measurements of the cells."""
    from weightspace.merge import merge

    if method == BARRIER:
        return observed
    if wiring is None or wiring.program is None or not wiring.proved:
        raise WeightspaceError("inputs are of use where the network can be run: its wiring must be found and proved")
    names = tuple(named)
    unknown = sorted(set(inputs) - set(names))
    if unknown:
        raise WeightspaceError(f"inputs are given for {unknown[0]!r}, which is none of the models: {', '.join(names)}")
    program = wiring.program
    alone: dict[int, torch.Tensor] = {}
    for members in sets:
        asked = [i for i in members if names[i] in inputs]
        if not asked:
            continue
        merged = merge([named[names[i]] for i in members], method, base=base).tensors
        assert merged is not None
        for i in asked:
            given = inputs[names[i]]
            arguments = given if isinstance(given, tuple) else (given,)
            with torch.no_grad():
                if i not in alone:
                    alone[i] = _answer(program.run(_whole(named[names[i]]), *arguments))
                same = (_answer(program.run(merged, *arguments)) == alone[i]).double()
            count = same.numel()
            share = (float(same.sum()) + 1) / (count + 2)
            at = next(int(c) for c in cells.where(sets.index(members)) if cells.own[c] == i)
            # A share of n answers, seen through the link; and agreement is not quite accuracy retained.
            slope = 1 / max(CEILING - share, 0.02)
            row = Observed.cells([at], np.array([share]), len(cells))
            row = Observed(row.design, row.values, np.array([slope**2 * share * (1 - share) / count + 0.1]))
            observed = row if observed is None else observed.and_(row)
    return observed


def _answer(out: Any) -> torch.Tensor:
    first = out if isinstance(out, torch.Tensor) else next(x for x in torch.utils._pytree.tree_leaves(out))
    found: torch.Tensor = first.argmax(-1)
    return found


def _prediction(
    prior: Prior, comparison: Comparison, method: str, at: NDArray[np.int64], members: tuple[int, ...],
    names: Sequence[str], posterior: Posterior, before: Posterior, inside: Applicability,
    done: Mapping[tuple[str, ...], Measurement], helped: bool, coverage: float, explain: bool,
) -> Prediction:  # fmt: skip
    who = tuple(names[i] for i in members)
    exact = next((m for k, m in done.items() if set(k) == set(who)), None)
    barrier = method == BARRIER
    if exact is not None:
        by_model = dict(zip(exact.models, exact.retained, strict=False))
        return Prediction(method, exact.outcome, exact.outcome, exact.outcome, coverage, by_model, {}, inside, True)
    if not inside.inside and not helped:
        nan = float("nan")
        return Prediction(method, nan, nan, nan, coverage, {}, {}, inside)
    value, expected = retained(posterior, at), retained(before, at)
    left = float(np.sqrt(np.diag(posterior.covariance)[at].sum() / np.diag(before.covariance)[at].sum()))
    reach = float(prior.spreads[method].reach(np.array([value]), coverage)[0]) * left
    low, high = max(value - reach, 0.0), min(value + reach, CEILING)
    terms = {}
    if explain:
        slope = float((CEILING - unlink(posterior.mean[at])).mean())
        terms = {name: slope * t for name, t in prior.terms(comparison, members, method).items()}
        terms["measured merges"] = value - expected
    if barrier:
        value, low, high = 1 - value, 1 - high, 1 - low
        terms = {name: -t for name, t in terms.items()}
    by_model = {} if barrier else {n: float(v) for n, v in zip(who, unlink(posterior.mean[at]), strict=True)}
    return Prediction(method, value, low, high, coverage, by_model, terms, inside)


def _plain(x: Any) -> Any:
    if isinstance(x, Mapping):
        return {str(k): _plain(v) for k, v in x.items()}
    if isinstance(x, list | tuple):
        return [_plain(v) for v in x]
    if isinstance(x, float | np.floating):
        return float(x) if math.isfinite(x) else None
    return x


__all__ = ["METHODS", "MergeReport", "Prediction", "Scored", "Suggestion", "score"]
