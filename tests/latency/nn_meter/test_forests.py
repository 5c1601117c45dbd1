from typing import Any

import numpy as np
import pytest
from helpers.pickled_forests import train_forest
from sklearn.ensemble import RandomForestRegressor

from qnas.latency.nn_meter.forests import Forest, flatten_tree, float32_below


def flat(forest: RandomForestRegressor) -> Forest:
    trees = [
        flatten_tree(
            left=tree.children_left,
            right=tree.children_right,
            feature=tree.feature,
            threshold=tree.threshold,
            value=tree.value.ravel(),
            n_features=tree.n_features,
        )
        for tree in (estimator.tree_ for estimator in forest.estimators_)
    ]
    return Forest.join(trees)


def at_the_thresholds(forest: RandomForestRegressor, x: Any) -> Any:
    """Return rows that hit thresholds, and the float32 on either side of them."""
    rows = [x[0]]  # a tree of one node has no threshold
    for tree in (estimator.tree_ for estimator in forest.estimators_):
        for node in np.flatnonzero(tree.children_left >= 0):
            near = np.float32(tree.threshold[node])
            for value in (near, np.nextafter(near, np.float32(-1e9)), np.nextafter(near, np.float32(1e9))):
                row = x[node % len(x)].copy()
                row[tree.feature[node]] = value
                rows.append(row)
    return np.array(rows)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"max_leaf_nodes": 7},  # nodes best first, not depth first
        {"min_samples_leaf": 5},
        {"trees": 1},
        {"n_features": 1},
        {"max_depth": 1},
        {"rows": 1},  # trees of one node
    ],
)
def test_a_forest_predicts_what_scikit_learn_predicts(options: dict[str, Any]) -> None:
    forest, x = train_forest(**options)
    rows = np.concatenate([x, x * 1.01, at_the_thresholds(forest, x)])
    np.testing.assert_allclose(flat(forest).predict(rows), forest.predict(rows), rtol=1e-12)


def test_a_forest_predicts_values_of_either_sign() -> None:
    rng = np.random.default_rng(1)
    x = rng.standard_normal((50, 3))
    forest = RandomForestRegressor(20, random_state=1).fit(x, rng.standard_normal(50))
    np.testing.assert_allclose(flat(forest).predict(x), forest.predict(x), rtol=1e-9)


def test_many_rows_are_walked_in_parts_without_a_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    forest, x = train_forest(trees=5, rows=60)
    whole = flat(forest).predict(x)
    for walks in (1, 35, 5 * 59, 5 * 60):
        monkeypatch.setattr("qnas.latency.nn_meter.forests._WALKS", walks)
        np.testing.assert_array_equal(flat(forest).predict(x), whole)
    assert flat(forest).predict(np.zeros((0, 7))).shape == (0,)


def test_the_float32_below_is_the_largest_one_at_or_below() -> None:
    rng = np.random.default_rng(0)
    values = np.concatenate(
        [rng.standard_normal(2000) * 10.0 ** rng.integers(-44, 38, 2000), [0.0, -0.0, 1e-60, -1e-60, 0.5]]
    )
    below = float32_below(values)
    assert below.dtype == np.float32
    assert np.all(below.astype(np.float64) <= values)
    assert np.all(np.nextafter(below, np.float32(np.inf)).astype(np.float64) > values)
    biggest = np.finfo(np.float32).max
    assert float32_below(np.array([1e300]))[0] == biggest
    assert float32_below(np.array([-1e300]))[0] == -np.inf


def test_a_float32_compares_with_the_float32_below_as_with_the_threshold() -> None:
    rng = np.random.default_rng(0)
    thresholds = rng.standard_normal(5000)
    near = thresholds.astype(np.float32)
    for x in (near, np.nextafter(near, np.float32(9)), np.nextafter(near, np.float32(-9))):
        np.testing.assert_array_equal(x <= float32_below(thresholds), x.astype(np.float64) <= thresholds)


def test_arrays_make_an_equal_forest() -> None:
    forest, x = train_forest()
    first = flat(forest)
    second = Forest.from_arrays(first.arrays())
    np.testing.assert_array_equal(second.predict(x), first.predict(x))
    assert second.n_features == 7


def test_a_node_takes_at_most_11_bytes() -> None:
    forest = flat(train_forest(rows=500)[0])
    size = sum(array.nbytes for array in forest.arrays().values())
    assert size <= 11 * forest.n_nodes


TREE: dict[str, Any] = {
    "left": np.array([1, -1, -1]),
    "right": np.array([2, -1, -1]),
    "feature": np.array([0, -2, -2]),
    "threshold": np.array([0.5, -2.0, -2.0]),
    "value": np.array([1.5, 1.0, 2.0]),
    "n_features": 2,
}


def test_a_tree_by_hand() -> None:
    forest = Forest.join([flatten_tree(**TREE)])
    np.testing.assert_array_equal(forest.predict([[0.5, 9], [0.6, 9]]), [1.0, 2.0])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"left": np.array([0, -1, -1])}, "does not come after its parent"),  # a circle
        ({"right": np.array([3, -1, -1])}, "child that is missing"),
        ({"right": np.array([-2, -1, -1])}, "child that is missing"),
        ({"right": np.array([-1, -1, -1])}, "one child"),
        ({"right": np.array([1, -1, -1])}, "not the child of one other"),  # and node 2 of none
        ({"feature": np.array([2, -2, -2])}, "feature beyond"),
        ({"feature": np.array([-1, -2, -2])}, "feature beyond"),
        ({"threshold": np.array([np.nan, 0, 0])}, "not finite"),
        ({"value": np.array([1, np.inf, 2])}, "not finite"),
        ({"value": np.array([1.0])}, "other lengths"),
        ({"n_features": 0}, "expected 1 to 256"),
        ({"n_features": 257}, "expected 1 to 256"),
        ({name: np.zeros(0) for name in ("left", "right", "feature", "threshold", "value")}, "0 nodes"),
    ],
)
def test_columns_that_are_no_tree_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        flatten_tree(**{**TREE, **change})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"children": np.array([[0, 5]], np.int32)}, "child that is missing"),
        ({"children": np.array([[-9, -1]], np.int32)}, "child that is missing"),
        ({"roots": np.array([7], np.int32)}, "child that is missing"),
        ({"roots": np.zeros(0, np.int32)}, "lengths"),
        ({"threshold": np.zeros(0, np.float32)}, "lengths"),
        ({"children": np.array([[0, -1]], np.int32)}, "not the child of one other"),
        ({"children": np.array([[-1, -1]], np.int32)}, "not the child of one other"),
        ({"roots": np.array([0, 0], np.int32)}, "not the child of one other"),
        ({"feature": np.array([2], np.uint8)}, "2 features, of 1 to 256, and all that the trees use"),
        ({"n_features": np.array(-1)}, "-1 features"),
        ({"n_features": np.array(2**40)}, "features, of 1 to 256"),
        ({"value": np.array([np.nan, 1.0])}, "no number or out of range"),
        ({"value": np.array([1.0, 1e300])}, "no number or out of range"),
        ({"threshold": np.array([np.nan], np.float32)}, "no number or out of range"),
        ({"roots": np.zeros(1, np.int64)}, "roots: int64 in 1 dimensions"),
        ({"roots": np.zeros((1, 1), np.int32)}, "roots: int32 in 2 dimensions"),
        ({"feature": np.zeros(1, np.float32)}, "feature: float32"),
    ],
)
def test_arrays_that_are_no_forest_are_refused(change: dict[str, Any], message: str) -> None:
    arrays = Forest.join([flatten_tree(**TREE)]).arrays()
    with pytest.raises(ValueError, match=message):
        Forest.from_arrays({**arrays, **change})


def chain(levels: int) -> dict[str, Any]:
    """The arrays of a tree in which every inner node has a leaf and an inner node, but for the last."""
    below = np.arange(1, levels + 1, dtype=np.int32)
    below[-1] = -levels - 1
    return {
        "n_features": np.array(1),
        "roots": np.zeros(1, np.int32),
        "feature": np.zeros(levels, np.uint8),
        "threshold": np.zeros(levels, np.float32),
        "children": np.stack([-np.arange(1, levels + 1, dtype=np.int32), below], axis=1),
        "value": np.ones(levels + 1),
    }


def test_the_levels_of_a_tree_are_bounded() -> None:
    assert Forest.from_arrays(chain(1000)).predict([[1.0]]) == [1.0]
    with pytest.raises(ValueError, match="more than 1000 levels"):
        Forest.from_arrays(chain(1001))


def test_nodes_that_form_a_circle_are_refused() -> None:
    arrays = chain(4)
    arrays["children"][0, 1] = -5  # nodes 1 to 3 are the children of each other, and of no root
    arrays["children"][3, 1] = 1
    with pytest.raises(ValueError, match="form a circle"):
        Forest.from_arrays(arrays)


def test_a_forest_needs_trees() -> None:
    with pytest.raises(ValueError, match="no trees"):
        Forest.join([])
