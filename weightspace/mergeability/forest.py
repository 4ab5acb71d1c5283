"""A forest of regression trees as plain tensors, so that it can be kept in a safetensors file and read without code.

Trained as extremely randomised trees (Geurts et al. 2006) by scikit-learn; several outputs share their splits.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from weightspace.errors import MetanetError

Array = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Forest:
    """``feature``, ``threshold``, ``left``, ``right``: ``(nodes,)`` of all trees, a leaf being its own child.

    ``value (nodes, outputs)``; ``roots (trees,)``. What is not above the threshold goes left.
    """

    feature: NDArray[np.int64]
    threshold: NDArray[np.float32]
    left: NDArray[np.int64]
    right: NDArray[np.int64]
    value: NDArray[np.float32]
    roots: NDArray[np.int64]

    @classmethod
    def fit(
        cls, x: Array, y: Array, *, trees: int = 60, leaf: int = 6, share: float = 0.4, seed: int = 0,
        weight: Array | None = None,
    ) -> Forest:  # fmt: skip
        """Of features ``x (n, d)`` and targets ``y (n, outputs)``; ``leaf``: fewest samples in one."""
        from sklearn.ensemble import ExtraTreesRegressor

        # Thresholds are drawn at random: rounded to what a file keeps, they are as good.
        found = ExtraTreesRegressor(trees, min_samples_leaf=leaf, max_features=share, random_state=seed, n_jobs=1)
        found.fit(_rounded(x), y[:, 0] if y.shape[1] == 1 else y, sample_weight=weight)
        names = ("feature", "threshold", "left", "right", "value")
        parts: dict[str, list[NDArray[np.generic]]] = {k: [] for k in names}
        roots, start = [], 0
        for estimator in found.estimators_:
            tree = estimator.tree_
            own = np.arange(tree.node_count)
            leaf_ = tree.children_left < 0
            roots.append(start)
            parts["feature"].append(np.where(leaf_, 0, tree.feature))
            parts["threshold"].append(np.where(leaf_, 0, tree.threshold).astype(np.float16))
            parts["left"].append(np.where(leaf_, own, tree.children_left) + start)
            parts["right"].append(np.where(leaf_, own, tree.children_right) + start)
            parts["value"].append(tree.value.reshape(tree.node_count, -1).astype(np.float32))
            start += tree.node_count
        joined = {k: np.concatenate(v) for k, v in parts.items()}
        return cls(
            joined["feature"].astype(np.int64), joined["threshold"].astype(np.float32), joined["left"].astype(np.int64),
            joined["right"].astype(np.int64), joined["value"].astype(np.float32), np.array(roots, dtype=np.int64),
        )  # fmt: skip

    def __call__(self, x: Array) -> Array:
        """Means over trees, ``(n, outputs)``."""
        values = _rounded(x)
        at = np.broadcast_to(self.roots, (len(x), len(self.roots))).copy()
        rows = np.arange(len(x))[:, None]
        while True:
            goes = values[rows, self.feature[at]] <= self.threshold[at]
            after = np.where(goes, self.left[at], self.right[at])
            if (after == at).all():
                break
            at = after
        found: Array = self.value[at].astype(np.float64).mean(1)
        return found

    def tensors(self) -> dict[str, NDArray[np.generic]]:
        """What ``of`` takes, in small types: children as distances."""
        own = np.arange(len(self.left))
        steps = {"left": self.left - own, "right": self.right - own}
        far = steps["left"].max(initial=0) > 255 or steps["right"].max(initial=0) >= 1 << 16
        if far or self.feature.max(initial=0) >= 1 << 16:
            raise MetanetError("a tree of this forest is too large to be kept; give it larger leaves")
        return {
            "feature": self.feature.astype(np.uint16), "threshold": self.threshold.astype(np.float16),
            "left": steps["left"].astype(np.uint8), "right": steps["right"].astype(np.uint16),
            "value": self.value.astype(np.float16), "roots": self.roots.astype(np.int32),
        }  # fmt: skip

    @classmethod
    def of(cls, tensors: Mapping[str, NDArray[np.generic]]) -> Forest:
        """What ``tensors`` gave."""
        own = np.arange(len(tensors["left"]))
        return cls(
            tensors["feature"].astype(np.int64), tensors["threshold"].astype(np.float32),
            tensors["left"].astype(np.int64) + own, tensors["right"].astype(np.int64) + own,
            tensors["value"].astype(np.float32), tensors["roots"].astype(np.int64),
        )  # fmt: skip


def _rounded(x: Array) -> NDArray[np.float32]:
    return np.asarray(x, dtype=np.float32)
