"""What ``ws.score`` gives: predictions of merges, the terms behind them, and what to measure next."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import combinations
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from weightspace.errors import WeightspaceError
from weightspace.mergeability.backdoors import warnings
from weightspace.mergeability.features import PAIR_TERMS, Comparison
from weightspace.mergeability.measurements import BARRIER, Measurement
from weightspace.mergeability.outcome import Cells, Observed, Outcome, most_informative
from weightspace.mergeability.preflight import Finding, Preflight
from weightspace.pretrained.applicability import Applicability

if TYPE_CHECKING:
    import pandas as pd
    from torch import Tensor

    from weightspace.backdoor.verdict import Verdict

Array = NDArray[np.float64]

TERMS = (
    "cosine", "sign conflict", "subspace overlap", "singular interference", "norm ratio", "axis misalignment",
    "size of the change",
)  # fmt: skip
"""What the weights say of a merge, whether anything is predicted from it or not."""
_BLOCKS = (
    "cosine", "sign conflict", "left subspace", "right subspace", "singular interference", "row overlap",
    "column overlap",
)  # fmt: skip
GROUPED = 0.9
"""Retained accuracy that every pair of a proposed group is expected to reach."""
_SHOWN = 12


@dataclass(frozen=True)
class Prediction:
    """What a merge by one method would retain.

    ``value``: retained accuracy averaged over the models' tasks (for ``"barrier"``: accuracy lost half way), with an
    interval that holds it in ``coverage`` of the cases; ``retained`` by model. ``terms``: by how many points of
    retained accuracy each kind of feature moves the prediction away from the usual merge, and what measured merges add
    (of the first merge of a report). Not numbers where the prior does not apply and nothing was measured;
    ``applicability`` says why.
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

    @property
    def known(self) -> bool:
        """Whether there is a number."""
        return not math.isnan(self.value)

    @property
    def why(self) -> str:
        """The terms that moved it most, in points: negative ones lower what is retained (raise the barrier)."""
        largest = sorted(self.terms.items(), key=lambda kv: -abs(kv[1]))[:3]
        return ", ".join(f"{name} {100 * value:+.1f}" for name, value in largest if abs(value) >= 5e-4)

    def __str__(self) -> str:
        if not self.known:
            return f"no prediction ({self.applicability})"
        if self.measured:
            return f"{self.value:.3f} (measured)"
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"


@dataclass(frozen=True)
class Scored:
    """One merge that was asked about: its models, a prediction per method, and what the weights say (``TERMS``)."""

    models: tuple[str, ...]
    predictions: Mapping[str, Prediction]
    terms: Mapping[str, float] = field(default_factory=dict)

    @property
    def best(self) -> str | None:
        """The method that is expected to retain most; None where nothing is predicted."""
        known = {m: p.value for m, p in self.predictions.items() if m != BARRIER and p.known}
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
        return f"measure {' + '.join(self.models)} by {self.method}: it removes {self.share:.0%} of the uncertainty"


@dataclass(frozen=True, eq=False)
class MergeReport:
    """What can be said of models before they are merged.

    ``models``: those that were scored; ``left`` says why others were not. ``merges``: all of them together first (of
    more than 8, the most promising pair), then every pair. ``predictions`` and ``best`` are of the first.
    ``preflight`` lists what was found in the files, ``undone`` has the tensors of protected models with the
    protection undone, which is what was scored. ``backdoors``: what a scan of each model found
    (``weightspace.mergeability.backdoors``); empty where none was made. ``notes`` says what was left out and why.
    ``verdict`` says it all in one sentence.
    """

    models: tuple[str, ...]
    base: str | None
    preflight: Preflight
    merges: tuple[Scored, ...]
    known: tuple[Measurement, ...]
    notes: tuple[str, ...]
    comparison: Comparison | None = field(repr=False)
    left: Mapping[str, str] = field(default_factory=dict)
    unreadable: Mapping[str, str] = field(default_factory=dict)
    seconds: float = 0.0
    backdoors: Mapping[str, Verdict] = field(default_factory=dict)
    _state: Mapping[str, tuple[Outcome, Observed | None]] = field(default_factory=dict, repr=False)
    _cells: Cells | None = field(default=None, repr=False)
    _sets: tuple[tuple[int, ...], ...] = field(default=(), repr=False)

    # ---------------------------------------------------------------- the first merge

    @property
    def predictions(self) -> Mapping[str, Prediction]:
        """A prediction per method, of merging all models (of the most promising pair where they are more than 8)."""
        return self.merges[0].predictions if self.merges else {}

    @property
    def best(self) -> str | None:
        """The method that is expected to be best for the first merge."""
        return self.merges[0].best if self.merges else None

    @property
    def undone(self) -> Mapping[str, Mapping[str, Tensor]]:
        """Protected models with everything undone: the same function, next to the base; save and merge these."""
        return self.preflight.undone

    @property
    def stops(self) -> tuple[Finding, ...]:
        """Findings that stand in the way of merging the files as they are."""
        return self.preflight.of("stop")

    @property
    def strangers(self) -> tuple[str, ...]:
        """Models that share no ancestor with the base (or the first model): averages of them as they are fail."""
        found = self.preflight.of("warning", "ancestry")
        return tuple(dict.fromkeys(n for f in found for n in f.models if n in self.models))

    @property
    def top(self) -> Scored | None:
        """The merge of all models together; the most promising pair where they are more than 8, or where nothing is
        predicted of all together."""
        if not self.merges:
            return None
        first = self.merges[0]
        return first if first.best else next((m for m in self.ranked(2) if m.best), first)

    @property
    def verdict(self) -> str:
        """The outcome in one sentence."""
        top = self.top
        many = top is not None and len(top.models) < len(self.models)
        stops = {f.check for f in self.stops}
        hidden = [n for n in self.undone if n in self.models]
        if top is None:
            left = next((f"{name}: {why}" for name, why in self.left.items()), "; ".join(self.notes[:1]))
            why = self.stops[0].sentence if self.stops else left
            return f"cannot be merged as they are: {why}"
        begin = ""
        if self.merges and any(f.found.startswith("width: ") for f in self.stops) and not self.left:
            begin = "cannot be averaged, for their widths differ, but merged by optimal transport; "
        elif stops - {"protection"}:
            others = f" {', '.join(self.left)} left out:" if self.left else ""
            begin = f"not all of them can be merged as they are (see the stops below);{others} "
        elif hidden:
            begin = f"can be merged once {', '.join(hidden)} is undone (see below): "
        if self.strangers and not begin:
            who = ", ".join(self.strangers)
            begin = f"can be merged once aligned, for {who} shares no ancestor with {self.base or self.models[0]}; "
        best = top.best
        if best is None:
            shown = next(iter(top.predictions.values())).applicability.reason
            return (
                f"{begin or 'nothing was found that stops a merge; '}how well it would work is not predicted, because "
                f"{shown}"
            )
        found = top.predictions[best]
        pair = f"the best pair is {' + '.join(top.models)}: " if many else ""
        if found.measured:
            told = f"{best} was measured to retain {found.value:.1%} of their accuracy"
        else:
            told = (
                f"{best} is expected to retain {found.value:.1%} of their accuracy "
                f"({found.coverage:.0%} interval {found.low:.1%} to {found.high:.1%})"
            )
        return f"{begin or 'can be merged; '}{pair}{told}"

    def reaches(self, least: float) -> bool:
        """Whether ``top`` is expected to retain so much."""
        return self.top is not None and self.top.value >= least

    # ---------------------------------------------------------------- many models

    def ranked(self, size: int = 2) -> list[Scored]:
        """The merges of so many models, the most promising first."""
        found = [m for m in self.merges if len(m.models) == size]
        return sorted(found, key=lambda m: -m.value if not math.isnan(m.value) else math.inf)

    def groups(self, least: float = GROUPED, *, overlap: bool = False) -> list[tuple[str, ...]]:
        """Groups of models that are expected to merge well pair by pair, largest and best first.

        Cliques of the pairs whose best method is expected to retain at least ``least``. Each model is in one group, the
        largest first; with ``overlap`` all maximal cliques are given, the best 100 of them.
        """
        from itertools import islice

        import networkx as nx

        pairs = {m.models: m.value for m in self.merges if len(m.models) == 2 and not math.isnan(m.value)}
        if not pairs:
            return []
        place = {name: i for i, name in enumerate(self.models)}

        def worth(group: tuple[str, ...]) -> float:
            return min(pairs.get((a, b), pairs.get((b, a), -1.0)) for a, b in combinations(group, 2))

        graph = nx.Graph()
        graph.add_edges_from(p for p, value in pairs.items() if value >= least)
        found: list[tuple[str, ...]] = []
        while graph.number_of_edges():
            # There may be exponentially many of them.
            every = (tuple(sorted(c, key=lambda n: place[n])) for c in islice(nx.find_cliques(graph), 20_000))
            cliques = sorted((c for c in every if len(c) > 1), key=lambda c: (-len(c), -worth(c), c))
            if overlap:
                return cliques[:100]
            found.append(cliques[0])
            graph.remove_nodes_from(cliques[0])
        return found

    def suggest(self, method: str | None = None) -> Suggestion:
        """The pair whose evaluation lowers the expected posterior variance of all others most.

        ``method``: that of the merge to evaluate (default: the one expected best). Raises ``WeightspaceError`` where
        there is no prediction to sharpen or every pair was measured.
        """
        method = method or self.best or (self.ranked(2)[0].best if self.ranked(2) else None)
        if method is None or method not in self._state or self._cells is None:
            known = f"; expected one of {', '.join(self._state)}" if self._state else ""
            raise WeightspaceError(f"there are no predictions by {method} to sharpen{known} (see the report's notes)")
        done = {frozenset(m.models) for m in self.known if m.method == method}
        names = [frozenset(self.models[i] for i in s) for s in self._sets]
        told = {frozenset(m.models) for m in self.merges if method in m.predictions and m.predictions[method].known}
        left = [s for s, n in enumerate(names) if len(n) == 2 and n not in done]
        # Of pairs outside the range little is learned for those inside.
        open_ = {s: self._cells.where(s) for s in [s for s in left if names[s] in told] or left}
        if not open_:
            raise WeightspaceError(f"every pair was measured by {method}: there is nothing left to learn")
        model, observed = self._state[method]
        targets = np.concatenate(list(open_.values()))
        chosen, share = most_informative(model, observed, open_, targets)
        return Suggestion(tuple(self.models[i] for i in self._sets[chosen]), method, min(share, 1.0))

    # ---------------------------------------------------------------- block by block

    def blocks(self, models: Sequence[str] | None = None) -> pd.DataFrame:
        """What the weights say of a merge, block by block: a row per weight matrix, in the order of use.

        ``share`` of the squared change that lies there, then ``cosine``, ``sign conflict`` (0.5: by chance), ``left
        subspace`` and ``right subspace`` (overlap of the leading singular vectors of the changes), ``singular
        interference``, ``row overlap``, ``column overlap``, ``norm ratio`` (the larger change over the smaller) and
        ``axis misalignment`` (what a better matching of the block's neurons would gain; 0: none). Of more than two
        models, means over their pairs. ``models``: names (default: the first merge).

        Raises ``WeightspaceError`` where nothing was compared.
        """
        import pandas as pd

        c = self.comparison
        if c is None:
            raise WeightspaceError(f"no models were compared ({'; '.join(self.notes) or 'see the preflight'})")
        members = self._numbers(self.merges[0].models if models is None and self.merges else models or self.models)
        pairs = list(combinations(members, 2))
        part = np.mean([c.changes[i] / max(c.changes[i].sum(), 1e-30) for i in members], axis=0)
        between = np.mean([c.pairs[i, j] for i, j in pairs], axis=0)
        columns: dict[str, Any] = {"share": part}
        columns |= {name: between[:, PAIR_TERMS.index(name)] for name in _BLOCKS}
        columns["norm ratio"] = np.mean([_ratio(c.changes[i], c.changes[j]) for i, j in pairs], axis=0)
        columns["axis misalignment"] = between[:, PAIR_TERMS.index("misalignment")]
        return pd.DataFrame(columns, index=pd.Index(c.blocks, name="block"))

    def _numbers(self, names: Sequence[str]) -> list[int]:
        assert self.comparison is not None
        unknown = [n for n in names if n not in self.comparison.models]
        if unknown or len(set(names)) < 2:
            wrong = f"{unknown[0]!r} is none of" if unknown else "two or more were expected of"
            raise WeightspaceError(f"{wrong} the models that were compared: {', '.join(self.comparison.models)}")
        return [self.comparison.models.index(n) for n in names]

    # ---------------------------------------------------------------- as JSON, as text

    def to_json(self) -> dict[str, Any]:
        """Everything as values that ``json.dumps`` takes; what is not a number is None."""
        suggestion = None
        if self._state:
            try:
                suggestion = asdict(self.suggest())
            except WeightspaceError:
                suggestion = None
        blocks = {} if self.comparison is None else self.blocks().to_dict("index")
        found: dict[str, Any] = _plain({
            "verdict": self.verdict, "models": list(self.models), "base": self.base, "ok": not self.stops,
            "best": self.best, "preflight": self.preflight.to_json(),
            "merges": [
                {
                    "models": list(m.models), "best": m.best, "expected": m.value, "terms": dict(m.terms),
                    "predictions": {k: asdict(p) for k, p in m.predictions.items()},
                }
                for m in self.merges
            ],
            "groups": [list(g) for g in self.groups()], "suggest": suggestion, "blocks": blocks,
            "known": [m.to_row() for m in self.known], "left": dict(self.left), "unreadable": dict(self.unreadable),
            "backdoors": {name: found.to_json() for name, found in self.backdoors.items()},
            "warnings": warnings(self.backdoors), "notes": list(self.notes), "seconds": self.seconds,
        })  # fmt: skip
        return found

    def rows(self) -> list[tuple[str, str, str, str]]:
        """The table: a row per method of the first merge: its name, the prediction, why, whether it is the best."""
        return [(m, str(p), p.why, "best" if m == self.best else "") for m, p in self.predictions.items()]

    def __repr__(self) -> str:
        base = f"base {self.base}" if self.base else "no base"
        lines = [f"MergeReport({len(self.models)} models, {base}, {self.seconds:.1f} s): {self.verdict}"]
        lines += [f"  {line}" for line in repr(self.preflight).splitlines()]
        if self.merges:
            first = self.merges[0]
            lines.append(f"  {' + '.join(first.models)}: retained accuracy, {_coverage(first)} interval; why (points)")
            rows = self.rows()
            widths = [max(len(row[i]) for row in rows) for i in range(3)]
            lines += ["    " + "  ".join(c.ljust(w) for c, w in zip(row, (*widths, 0), strict=True)).rstrip()
                      for row in rows]  # fmt: skip
            lines.append(f"  the weights: {said(first.terms)}")
            lines.append(f"  prediction: {next(iter(self.predictions.values())).applicability}")
        pairs = self.ranked(2)
        if len(pairs) > 1:
            order = "the most promising first" if pairs[0].best else "in no order"
            lines.append(f"  pairs, {order} ({len(pairs)} in all; .ranked(), .groups(), .suggest()):")
            lines += [
                f"    {' + '.join(m.models)}: {f'{m.best} {m.predictions[m.best]}' if m.best else said(m.terms)}"
                for m in pairs[:_SHOWN]
            ]
        out = [*self.left.items(), *self.unreadable.items()]
        lines += [f"  left out: {name} ({why})" for name, why in out[:_SHOWN]]
        lines += [f"  warning: {warning}" for warning in warnings(self.backdoors)]
        if self.backdoors and not any(v.flagged for v in self.backdoors.values()):
            lines.append(f"  scanned for backdoors: none of {len(self.backdoors)} models is flagged")
        lines += [f"  note: {note}" for note in self.notes]
        return "\n".join(lines)


def terms_of(comparison: Comparison, members: Sequence[int]) -> dict[str, float]:
    """``TERMS`` of a merge: means over its pairs, blocks weighted by how much they change."""
    pairs = list(combinations(members, 2))
    found: dict[str, list[float]] = {name: [] for name in TERMS}
    for i, j in pairs:
        weight = comparison.changes[i] + comparison.changes[j]
        weight = weight / max(float(weight.sum()), 1e-30)
        mean = {t: float((comparison.pairs[i, j, :, k] * weight).sum()) for k, t in enumerate(PAIR_TERMS)}
        found["cosine"].append(float(comparison.whole[i, j]))
        found["sign conflict"].append(mean["sign conflict"])
        found["subspace overlap"].append((mean["left subspace"] + mean["right subspace"]) / 2)
        found["singular interference"].append(mean["singular interference"])
        found["norm ratio"].append(float(np.exp(abs(comparison.scale[i] - comparison.scale[j]))))
        found["axis misalignment"].append(mean["misalignment"])
        found["size of the change"].append(float(np.exp((comparison.scale[i] + comparison.scale[j]) / 2)))
    return {name: float(np.mean(values)) for name, values in found.items()}


def said(terms: Mapping[str, float]) -> str:
    """Terms in a line."""
    return ", ".join(f"{name} {value:.3g}" for name, value in terms.items())


def _coverage(merge: Scored) -> str:
    return f"{next(iter(merge.predictions.values())).coverage:.0%}"


def _ratio(a: Array, b: Array) -> Array:
    low, high = np.minimum(a, b), np.maximum(a, b)
    found: Array = np.sqrt(high / np.maximum(low, 1e-30))
    return np.where(high > 0, np.minimum(found, 1e6), 1.0)


def _plain(x: Any) -> Any:
    if isinstance(x, Mapping):
        return {str(k): _plain(v) for k, v in x.items()}
    if isinstance(x, list | tuple):
        return [_plain(v) for v in x]
    if isinstance(x, float | np.floating):
        return float(x) if math.isfinite(x) else None
    return x


__all__ = ["GROUPED", "TERMS", "MergeReport", "Prediction", "Scored", "Suggestion", "said", "terms_of"]
