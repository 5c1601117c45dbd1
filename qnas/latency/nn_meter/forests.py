"""Random forests for regression as flat arrays, and their evaluation with numpy alone.

A pickled forest takes 64 bytes per node and loads only with the scikit-learn that wrote it. Here, an
inner node takes 13 bytes and a leaf 8, independent of the version, and a prediction walks all trees
for all rows at once.

Thresholds are stored as float32 without loss. scikit-learn rounds its inputs to float32 and then compares
`x <= t` with a float64 t. Let r be the largest float32 at or below t. Where x <= t, x is a float32
at or below t and so at most r; where x <= r, x <= r <= t. `x <= r` is therefore the same test. Leaves stay
float64: a prediction differs from scikit-learn's by the order of a sum only.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from qnas.common.units import MOST_MS

_LEAF = -1  # scikit-learn's mark for the children of a leaf
_MAX_NODES = 2**30  # so that a child's number and the index 2 * number + 1 fit into int32
# the numbers of the stored arrays, and their dimensions
STORED: Mapping[str, tuple[npt.DTypeLike, int]] = {
    "n_features": (np.int64, 0),
    "roots": (np.int32, 1),
    "feature": (np.uint8, 1),
    "threshold": (np.float32, 1),
    "children": (np.int32, 2),
    "value": (np.float64, 1),
}
_MAX_DEPTH = 1_000  # of a tree: a prediction takes a step for each level
_WALKS = 1 << 18  # trees times rows walked at once: a few MB


def flatten_tree(
    *,
    left: npt.NDArray[Any],
    right: npt.NDArray[Any],
    feature: npt.NDArray[Any],
    threshold: npt.NDArray[Any],
    value: npt.NDArray[Any],
    n_features: int,
) -> "Forest":
    """Return the forest of one tree from scikit-learn's columns, one entry per node, the root first.

    Raises ValueError where they are no tree: a child that is missing or does not come after its
    parent (which also means that every walk ends), an unknown feature, a value that is no number.
    """
    n = len(left)
    if not 1 <= n <= _MAX_NODES or any(len(column) != n for column in (right, feature, threshold, value)):
        raise ValueError(f"a tree of {n} nodes, with columns of other lengths or too many")
    if not 1 <= n_features <= 256:
        raise ValueError(f"{n_features} features, expected 1 to 256")
    leaf = left == _LEAF
    inner = ~leaf
    if not np.array_equal(leaf, right == _LEAF):
        raise ValueError("a node with one child")
    here = np.flatnonzero(inner)
    for child in (left[inner], right[inner]):
        if not np.all((child > here) & (child < n)):
            raise ValueError("a child that is missing or does not come after its parent")
    # unreachable nodes would make a small file a large forest
    parents = np.bincount(np.concatenate([left[inner], right[inner]]).astype(np.int64), minlength=n)
    if np.any(parents[1:] != 1):
        raise ValueError("a node that is not the child of one other")
    if not np.all((feature[inner] >= 0) & (feature[inner] < n_features)):
        raise ValueError(f"a feature beyond the {n_features} that the tree has")
    if not np.all(np.isfinite(threshold[inner])) or not np.all(np.isfinite(value[leaf])):
        raise ValueError("a threshold or value that is not finite")
    number = np.where(leaf, -np.cumsum(leaf), np.cumsum(inner) - 1)  # ~(i - 1) == -i
    children = np.stack([number[left[inner]], number[right[inner]]], axis=1)
    return Forest(
        n_features,
        number[:1].astype(np.int32),
        feature[inner].astype(np.uint8),
        float32_below(threshold[inner].astype(np.float64)),
        children.astype(np.int32),
        value[leaf].astype(np.float64),
    )


def float32_below(values: npt.NDArray[np.float64]) -> npt.NDArray[np.float32]:
    """Return the largest float32 at or below each value; minus infinity where there is none.

    >>> float32_below(np.array([0.5, 0.1])) <= [0.5, 0.1]
    array([ True,  True])
    """
    with np.errstate(over="ignore", under="ignore"):
        rounded = values.astype(np.float32)
        below = np.nextafter(rounded, np.float32(-np.inf))
    return np.where(rounded.astype(np.float64) > values, below, rounded)


@dataclass(frozen=True)
class Forest:
    """The mean of regression trees, with the inner nodes and the leaves of all trees in two lists.

    A child or root at or above 0 is the number of an inner node; below 0 it is the leaf ~child.
    """

    n_features: int
    roots: npt.NDArray[np.int32]  # (trees,)
    feature: npt.NDArray[np.uint8]  # (inner,)
    threshold: npt.NDArray[np.float32]  # (inner,): the left child where the feature is at most this
    children: npt.NDArray[np.int32]  # (inner, 2): left, right
    value: npt.NDArray[np.float64]  # (leaves,)

    @classmethod
    def join(cls, trees: Sequence["Forest"]) -> Self:
        """Join forests. Raises ValueError unless they have the same features, or for too many nodes."""
        if len({tree.n_features for tree in trees}) != 1:
            raise ValueError("no trees, or trees with unequal numbers of features")
        inner = np.cumsum([0, *(len(tree.feature) for tree in trees)])
        leaves = np.cumsum([0, *(len(tree.value) for tree in trees)])
        if max(inner[-1], leaves[-1]) > _MAX_NODES:
            raise ValueError(f"{inner[-1] + leaves[-1]} nodes, expected at most {_MAX_NODES}")

        def shift(number: npt.NDArray[np.int32], i: int) -> npt.NDArray[np.int32]:
            shifted = np.where(number >= 0, number + inner[i], number - leaves[i])
            return np.asarray(shifted, np.int32)

        forest = cls(
            trees[0].n_features,
            np.concatenate([shift(tree.roots, i) for i, tree in enumerate(trees)]),
            np.concatenate([tree.feature for tree in trees]),
            np.concatenate([tree.threshold for tree in trees]),
            np.concatenate([shift(tree.children, i) for i, tree in enumerate(trees)]),
            np.concatenate([tree.value for tree in trees]),
        )
        forest._check()
        return forest

    @property
    def n_nodes(self) -> int:
        """Inner nodes and leaves of all trees."""
        return len(self.feature) + len(self.value)

    def predict(self, rows: npt.ArrayLike) -> npt.NDArray[np.float64]:
        """Return the mean of the trees for each row, (n, n_features) -> (n,)."""
        x = np.asarray(rows, dtype=np.float32)
        assert x.ndim == 2, x.shape
        assert x.shape[1] == self.n_features, (x.shape, self.n_features)
        assert np.all(np.isfinite(x)), "a feature that is not finite"
        step = max(1, _WALKS // len(self.roots))
        parts = [self._walk(x[i : i + step]) for i in range(0, len(x), step)]
        return np.concatenate(parts) if parts else np.zeros(0)

    def _walk(self, x: npt.NDArray[np.float32]) -> npt.NDArray[np.float64]:
        trees, n = len(self.roots), len(x)
        at = np.repeat(self.roots.astype(np.intp), n)  # (trees * n,): where each walk is
        first = np.tile(np.arange(n) * self.n_features, trees)  # where its row begins
        flat, children = x.ravel(), self.children.ravel()
        going = np.flatnonzero(at >= 0)
        while going.size:
            node = at[going]
            to_right = flat[first[going] + self.feature[node]] > self.threshold[node]
            node = children[2 * node + to_right]
            at[going] = node
            going = going[node >= 0]
        leaves = self.value[~at].reshape(trees, n)
        return np.asarray(leaves.sum(axis=0) / trees)

    def arrays(self) -> dict[str, npt.NDArray[Any]]:
        """Return the arrays from which `from_arrays` makes an equal forest."""
        return {f.name: np.asarray(getattr(self, f.name)) for f in fields(self)}

    def _check(self) -> None:
        """Raise ValueError unless every walk from a root ends at a leaf, within `_MAX_DEPTH` steps.

        Each node is the child of one node before it, or a root; levels are followed from the roots down.
        """
        inner, leaves = len(self.feature), len(self.value)
        if not 1 <= self.n_features <= 256 or self.n_features <= int(self.feature.max(initial=0)):
            raise ValueError(f"{self.n_features} features, of 1 to 256, and all that the trees use")
        least, most = self.value.min(initial=0.0), self.value.max(initial=0.0)  # NaN where one is
        if np.any(np.isnan(self.threshold)) or not -MOST_MS <= least <= most <= MOST_MS:
            raise ValueError("a threshold or latency that is no number or out of range")
        reached = np.zeros(inner + leaves, np.bool_)  # the leaves in reverse order, then the inner nodes
        for numbers in (self.roots, self.children):
            if numbers.size and not -leaves <= numbers.min() <= numbers.max() < inner:
                raise ValueError("a child that is missing")
            reached[numbers.ravel() + leaves] = True
        if len(self.roots) + 2 * inner != len(reached) or not reached.all():
            raise ValueError("a node that is not the child of one other")
        level, passed = self.roots[self.roots >= 0], 0
        for _ in range(_MAX_DEPTH):
            if not level.size:
                break
            passed += level.size
            below = self.children[level].ravel()
            level = below[below >= 0]
        if level.size:
            raise ValueError(f"a tree of more than {_MAX_DEPTH} levels")
        if passed != inner:
            raise ValueError("nodes that form a circle")

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, npt.NDArray[Any]]) -> Self:
        """Return the forest of these arrays. Raises KeyError or ValueError where they are none."""
        for name, (dtype, dimensions) in STORED.items():
            if arrays[name].dtype != dtype or arrays[name].ndim != dimensions:
                raise ValueError(f"{name}: {arrays[name].dtype} in {arrays[name].ndim} dimensions")
        roots, feature, threshold = arrays["roots"], arrays["feature"], arrays["threshold"]
        children, value = arrays["children"], arrays["value"]
        inner, leaves = len(feature), len(value)
        if threshold.shape != (inner,) or children.shape != (inner, 2) or not roots.size or not leaves:
            raise ValueError("arrays of lengths that do not belong together")
        forest = cls(int(arrays["n_features"]), roots, feature, threshold, children, value)
        forest._check()
        return forest
