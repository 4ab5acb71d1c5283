"""Flat baselines: statistics of the tensors of a network, and plain models on them.

What a metanetwork must beat. Statistics come from sorted values, so that networks that differ by a permutation of
neurons get the same features to the last bit. Names, dtypes, counters and unused tensors say nothing here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from weightspace.errors import MetanetError
from weightspace.metanets.data import Sample
from weightspace.metanets.structure import ACTIVATIONS, ROLES

if TYPE_CHECKING:
    from weightspace.graph import ParameterGraph
    from weightspace.wiring.wiring import Wiring

Array: TypeAlias = NDArray[np.float64]
Kind = Literal["stat-nn", "stat-boosting", "ridge", "boosting", "raw"]
KINDS: tuple[Kind, ...] = ("stat-nn", "stat-boosting", "ridge", "boosting", "raw")

QUANTILES = (0.0, 0.25, 0.5, 0.75, 1.0)
STATISTICS = ("mean", "variance", *(f"q{round(100 * q)}" for q in QUANTILES))
_OF_TENSOR = ("mean", "deviation", *STATISTICS[2:], "log rms", "log elements")
_THIRDS = ("first third", "middle third", "last third")
_POOLS = (*(f"{t}, mean" for t in _THIRDS), "all, mean", "all, deviation", "all, min", "all, max")

TENSOR_STATISTICS: tuple[str, ...] = (
    "log parameters",
    *(
        f"{role}: {feature}"
        for role in ROLES
        for feature in ("log tensors", *(f"{s} ({p})" for p in _POOLS for s in _OF_TENSOR))
    ),
)
"""Name of each entry of ``tensor_statistics``, in order."""


def stat_nn_features(graph: ParameterGraph) -> Array:
    """Mean, variance and quantiles (0, 25, 50, 75, 100 %) of every tensor, in order of execution: ``(7 n,)``.

    The features of Unterthiner et al. (2020, "Predicting Neural Network Accuracy from Weights"), for populations
    of one architecture. Raises ``MetanetError`` for a graph without weights or wiring.
    """
    return np.concatenate([_statistics(_sorted(graph, name)) for name in _tensors(graph)])


def tensor_statistics(graph: ParameterGraph) -> Array:
    """The same kind of statistics for any architecture, ``(len(TENSOR_STATISTICS),)``.

    Tensors are taken by role, in order of execution; the statistics of those in the first, middle and last third
    are averaged, and over all of them mean, deviation, minimum and maximum are taken. Zeros where a role has none.
    """
    rows: dict[str, list[Array]] = {role: [] for role in ROLES}
    total = 0
    wiring = _wiring(graph)
    for name in _tensors(graph):
        values = _sorted(graph, name)
        total += len(values)
        found = _statistics(values)
        found[1] = np.sqrt(found[1])
        logs = [np.log10(np.sqrt(np.mean(values * values)) + 1e-6), np.log10(len(values))]
        rows[wiring.roles.get(name, "other")].append(np.array([*found, *logs]))
    out = [np.array([np.log10(total)])]
    for found_rows in rows.values():
        out.append(np.array([np.log10(1 + len(found_rows))]))
        out.append(_by_depth(np.stack(found_rows)) if found_rows else np.zeros(len(_POOLS) * len(_OF_TENSOR)))
    return np.concatenate(out)


def activation_features(graph: ParameterGraph) -> Array:
    """Which nonlinear functions a network applies: the share of its movable axis elements behind each of
    ``ACTIVATIONS``, ``(len(ACTIVATIONS),)``. What a metanetwork sees on its nodes, for a fair comparison."""
    wiring = _wiring(graph)
    out = np.zeros(len(ACTIVATIONS))
    total = 0
    for name, factor in wiring.free.items():
        total += factor.size
        for kind in {a if a in ACTIVATIONS else "other" for a in wiring.activations.get(name, ())}:
            out[ACTIVATIONS.index(kind)] += factor.size
    return out / max(total, 1)


class FlatBaseline:
    """A plain model on flat features, fitted by scikit-learn.

    - ``"stat-nn"``: ``stat_nn_features`` and a small network; ``"stat-boosting"``: the same and boosted trees, both
      after Unterthiner et al. (2020), for populations of one architecture.
    - ``"ridge"``: ``tensor_statistics`` and a linear model whose penalty is chosen by cross-validation (for classes
      a logistic one); ``"boosting"``: the same and boosted trees. For any architectures.
    - ``"raw"``: all weights as they lie in the tensors, their principal components and a linear model; for
      populations of one architecture. **Not** invariant to permutations: what comes of ignoring them.

    ``activation`` adds ``activation_features``, ``answers`` what networks answer (``metanets.answers``).
    ``task``: ``"regression"`` or ``"classification"``.
    """

    def __init__(
        self,
        kind: Kind = "ridge",
        task: Literal["regression", "classification"] = "regression",
        activation: bool = False,
        seed: int = 0,
        answers: bool = False,
    ) -> None:
        if kind not in KINDS:
            raise MetanetError(f"there is no flat baseline {kind!r}; known: {', '.join(KINDS)}")
        if task not in ("regression", "classification"):
            raise MetanetError(f"a flat baseline does 'regression' or 'classification', found {task!r}")
        self.kind = kind
        self.task = task
        self.activation = activation
        self.answers = answers
        self.seed = seed
        self._model: Any = None
        self._shapes: tuple[tuple[int, ...], ...] | None = None

    def features(self, samples: Sequence[Sample | ParameterGraph]) -> Array:
        """Features of samples (or parameter graphs), ``(n, width)``.

        Raises ``MetanetError`` where a baseline for one architecture is given several.
        """
        if not samples:
            raise MetanetError("no networks: a flat baseline needs at least one")
        graphs = [s.graph if isinstance(s, Sample) else s for s in samples]
        if self.kind not in ("ridge", "boosting"):
            expected = self._shapes or _shapes(graphs[0])
            for graph in graphs:
                if _shapes(graph) != expected:
                    raise MetanetError(
                        f"the baseline {self.kind!r} compares networks tensor by tensor and these are of several "
                        f"architectures, of shapes {expected} and {_shapes(graph)}; use 'ridge' or 'boosting'"
                    )
        return np.stack([self._of(graph) for graph in graphs])

    def fit(self, samples: Sequence[Sample | ParameterGraph], y: Sequence[Any] | NDArray[Any]) -> FlatBaseline:
        """Fit to one target (or class) per network; returns itself."""
        if len(y) != len(samples):
            raise MetanetError(f"{len(samples)} networks and {len(y)} targets; expected one for each")
        self._shapes = None
        x = self.features(samples)
        first = samples[0]
        self._shapes = _shapes(first.graph if isinstance(first, Sample) else first)
        self._model = _pipeline(self.kind, self.task, x.shape, np.asarray(y), self.seed)
        self._model.fit(x, np.asarray(y))
        return self

    def predict(self, samples: Sequence[Sample | ParameterGraph]) -> NDArray[Any]:
        """A prediction per network, ``(n,)``."""
        found: NDArray[Any] = self._fitted().predict(self.features(samples))
        return found

    def probabilities(self, samples: Sequence[Sample | ParameterGraph]) -> Array:
        """Probability of each class in the order of ``classes``, ``(n, classes)``."""
        if self.task != "classification":
            raise MetanetError("a regression has no classes; make FlatBaseline(kind, task='classification')")
        found: Array = self._fitted().predict_proba(self.features(samples))
        return found

    @property
    def classes(self) -> NDArray[Any]:
        """The classes that were seen in ``fit``."""
        found: NDArray[Any] = self._fitted().classes_
        return found

    def _of(self, graph: ParameterGraph) -> Array:
        if self.kind == "raw":
            found = np.concatenate([_values(graph, name).numpy() for name in _tensors(graph)])
        else:
            found = stat_nn_features(graph) if self.kind.startswith("stat-") else tensor_statistics(graph)
        if self.answers:
            from weightspace.metanets.answers import answers

            found = np.concatenate((found, answers(graph).numpy()))
        return np.concatenate((found, activation_features(graph))) if self.activation else found

    def _fitted(self) -> Any:
        if self._model is None:
            raise MetanetError("this flat baseline is not fitted; call fit(samples, targets) first")
        return self._model

    def __repr__(self) -> str:
        state = f"{self._model.n_features_in_} features" if self._model is not None else "not fitted"
        return f"FlatBaseline({self.kind!r}, {self.task!r}, activation={self.activation}, {state})"


# -------------------------------------------------------------------- models


def _pipeline(kind: Kind, task: str, shape: tuple[int, ...], y: NDArray[Any], seed: int) -> Any:
    from sklearn.decomposition import PCA
    from sklearn.ensemble import HistGradientBoostingClassifier, HistGradientBoostingRegressor
    from sklearn.linear_model import LogisticRegression, RidgeCV
    from sklearn.model_selection import GridSearchCV, StratifiedKFold
    from sklearn.neural_network import MLPClassifier, MLPRegressor
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import FunctionTransformer, StandardScaler

    classes = task == "classification"
    if kind in ("boosting", "stat-boosting"):
        trees = HistGradientBoostingClassifier if classes else HistGradientBoostingRegressor
        return trees(max_iter=300, learning_rate=0.05, max_leaf_nodes=15, l2_regularization=1.0, random_state=seed)
    # One network with enormous weights must not tilt a linear model.
    scaled = [StandardScaler(), FunctionTransformer(np.clip, kw_args={"a_min": -8.0, "a_max": 8.0})]
    if kind == "stat-nn":
        network = MLPClassifier if classes else MLPRegressor
        # Early stopping needs a validation set worth the name.
        early = shape[0] >= 1000
        return make_pipeline(
            *scaled,
            network(
                hidden_layer_sizes=(128, 128), alpha=1e-3, max_iter=500, early_stopping=early, n_iter_no_change=20,
                random_state=seed,
            ),
        )
    if kind == "raw":
        scaled += [PCA(max(1, min(128, shape[0] // 2 - 1, shape[1])), random_state=seed)]
    if not classes:
        return make_pipeline(*scaled, RidgeCV(np.logspace(-3, 6, 19)))
    linear = make_pipeline(*scaled, LogisticRegression(max_iter=2000))
    fewest = int(np.unique(y, return_counts=True)[1].min())
    if fewest < 2:
        return linear
    folds = StratifiedKFold(min(4, fewest), shuffle=True, random_state=seed)
    grid = {"logisticregression__C": np.logspace(-4, 2, 7)}
    return GridSearchCV(linear, grid, cv=folds, scoring="neg_log_loss")


# -------------------------------------------------------------------- statistics


def _wiring(graph: ParameterGraph) -> Wiring:
    if graph.wiring is None:
        raise MetanetError(
            "this graph has no wiring (it was read back from another format), so the order of its tensors is unknown; "
            "make it with ws.graph(checkpoint)"
        )
    return graph.wiring


def _tensors(graph: ParameterGraph) -> list[str]:
    """Tensors of weights that the network uses, in order of execution."""
    wiring = _wiring(graph)
    unused = set(wiring.untouched)
    order = {name: i for i, name in enumerate(wiring.roles)}
    chosen = [
        name
        for name, dtype in graph.dtypes.items()
        if (dtype.is_floating_point or dtype.is_complex) and name not in unused and all(graph.shapes[name])
    ]
    if not chosen:
        raise MetanetError(f"no weights to describe: none of the {len(graph.shapes)} tensors is used and holds numbers")
    return sorted(chosen, key=lambda name: (order.get(name, len(order)), name))


def _shapes(graph: ParameterGraph) -> tuple[tuple[int, ...], ...]:
    return tuple(graph.shapes[name] for name in _tensors(graph))


def _values(graph: ParameterGraph, name: str) -> Tensor:
    """All elements of a tensor in float64; what is not a number counts as zero."""
    return graph.real(name).reshape(-1).to(torch.float64).nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)


def _sorted(graph: ParameterGraph, name: str) -> Array:
    found: Array = _values(graph, name).sort().values.numpy()
    return found


def _statistics(values: Array) -> Array:
    """``STATISTICS`` of sorted values, ``(7,)``."""
    places = np.array(QUANTILES) * (len(values) - 1)
    below = np.floor(places).astype(np.int64)
    above = np.minimum(below + 1, len(values) - 1)
    quantiles = values[below] + (places - below) * (values[above] - values[below])
    return np.array([values.mean(), values.var(), *quantiles])


def _by_depth(rows: Array) -> Array:
    """Statistics of tensors in order ``(n, S)`` pooled as in ``_POOLS``: ``(len(_POOLS) * S,)``."""
    n = len(rows)
    depth = np.arange(n) / max(n - 1, 1)
    # Fewer than three tensors leave no third empty: each third takes the tensors nearest to its middle.
    middles = [np.abs(depth - (k + 0.5) / 3) for k in range(3)]
    thirds = [rows[m <= max(1 / 6, m.min()) + 1e-9].mean(axis=0) for m in middles]
    return np.concatenate([*thirds, rows.mean(axis=0), rows.std(axis=0), rows.min(axis=0), rows.max(axis=0)])
