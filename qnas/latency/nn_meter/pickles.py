"""Pickled random forests of scikit-learn, read without running anything that a pickle says.

`pickle_machine` reads the opcodes. What is called makes numbers, strings, arrays from bytes (of plain
numbers, with the exact size) and trees, all of this file.

Forests are read tree by tree: a tree becomes flat arrays as soon as it is complete, and its pickled
bytes are let go, so that a file of gigabytes takes the memory of its flat form.

Which classes: those that `pickle.dump` of a RandomForestRegressor writes with protocol 3 and later,
from scikit-learn 0.22 on, under the names of numpy 1 and 2. Nodes have seven fields, or eight since
scikit-learn 1.3 (`missing_go_to_left`, of no use here: no input is missing).
"""

import math
import re
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from qnas.common.errors import TableError
from qnas.latency.nn_meter.forests import Forest, flatten_tree
from qnas.latency.nn_meter.pickle_machine import (
    Constructors,
    GlobalName,
    Payload,
    PickleBounds,
    RefusedError,
    Stateful,
    read_pickle,
    refuse_unless,
    require,
)

# numpy

_NUMBERS = re.compile(r"[iu][1248]|f[48]|b1")
_STRUCT = re.compile(r"V([0-9]{1,3})")


class _DType(Stateful):
    """numpy.dtype of a plain number, or of a struct of them."""

    title = "a dtype"

    def __init__(self, args: tuple[Any, ...]) -> None:
        refuse_unless(len(args) == 3 and isinstance(args[0], str), "a dtype of an unknown form")
        self._code: str = args[0]
        refuse_unless(
            bool(_NUMBERS.fullmatch(self._code) or _STRUCT.fullmatch(self._code)),
            f"dtype {self._code[:20]!r}, expected plain numbers",
        )

    def build(self, state: object) -> None:
        form = "a dtype of an unknown form"
        state = require(state, tuple, form)
        refuse_unless(len(state) in (8, 9), form)
        _, order, subtype, names, members = state[:5]
        refuse_unless(order in ("<", ">", "=", "|") and subtype is None and not any(state[8:]), form)
        struct_size = _STRUCT.fullmatch(self._code)
        if struct_size is None:
            refuse_unless(names is None and members is None, form)
            self._dtype: np.dtype[Any] = np.dtype(self._code).newbyteorder(order)
        else:
            self._dtype = _struct_dtype(names, members, int(struct_size[1]))

    @property
    def dtype(self) -> "np.dtype[Any]":
        refuse_unless(self.is_set, "a dtype that is used before it is set")
        return self._dtype


def _struct_dtype(names: object, members: object, size: int) -> "np.dtype[Any]":
    names = require(names, tuple, "a struct of an unknown form")
    members = require(members, dict, "a struct of an unknown form")
    refuse_unless(1 <= len(names) <= 16, "a struct of an unknown form")
    refuse_unless(all(isinstance(name, str) and name in members for name in names), "a struct without names")
    refuse_unless(len(set(names)) == len(names) and all(names), "a struct whose names are no names")
    formats, offsets = [], []
    for name in names:
        member = require(members[name], tuple, "a bad member")
        refuse_unless(len(member) == 2, "a bad member")
        dtype = require(member[0], _DType, "a bad member").dtype
        offset = require(member[1], int, "a bad member")
        refuse_unless(dtype.names is None, "a struct in a struct")
        refuse_unless(0 <= offset <= size - dtype.itemsize, "a member outside its struct")
        formats.append(dtype)
        offsets.append(offset)
    return np.dtype({"names": list(names), "formats": formats, "offsets": offsets, "itemsize": size})


class _Array(Stateful):
    """numpy.ndarray from bytes."""

    title = "an array"

    def __init__(self, args: tuple[Any, ...]) -> None:
        refuse_unless(
            len(args) == 3 and isinstance(args[0], GlobalName) and args[0].name == "numpy.ndarray",
            "an array of another class",
        )

    @classmethod
    def of_buffer(cls, args: tuple[Any, ...]) -> "_Array":
        refuse_unless(len(args) in (4, 5) and args[3] in ("C", "F"), "an array of an unknown form")
        refuse_unless(len(args) == 4 or args[4] is None, "an array with its axes exchanged")
        array = cls.__new__(cls)
        array.is_set = True
        array._set(args[2], args[1], args[3], args[0])
        return array

    def build(self, state: object) -> None:
        state = require(state, tuple, "an array of an unknown form")
        refuse_unless(len(state) == 5, "an array of an unknown form")
        _, shape, dtype, fortran, content = state
        self._set(shape, dtype, "F" if fortran is True else "C", content)

    def _set(self, shape: object, dtype: object, order: Any, content: object) -> None:
        unknown = "an array of an unknown shape"
        shape = require(shape, tuple, unknown)
        lengths = [require(length, int, unknown) for length in shape]
        refuse_unless(len(shape) <= 4 and all(0 <= length < 2**40 for length in lengths), unknown)
        dtype = require(dtype, _DType, "an array of an unknown dtype")
        if not isinstance(content, bytes | Payload):
            raise RefusedError("an array of objects, expected plain numbers")
        expected = dtype.dtype.itemsize * math.prod(lengths)
        refuse_unless(
            len(content) == expected, f"an array of {len(content)} bytes, its shape needs {expected}"
        )
        self._shape, self._dtype, self._order, self._content = shape, dtype.dtype, order, content

    def take(self) -> npt.NDArray[Any]:
        """Return the array, once: its bytes are let go."""
        refuse_unless(self.is_set, "an array that is used before it is set")
        content = self._content.take() if isinstance(self._content, Payload) else self._content
        return np.frombuffer(content, self._dtype).reshape(self._shape, order=self._order)


def _scalar(args: tuple[Any, ...]) -> object:
    refuse_unless(len(args) == 2, "an unknown number")
    dtype = require(args[0], _DType, "an unknown number").dtype
    content = require(args[1], bytes, "an unknown number")
    refuse_unless(dtype.names is None and len(content) == dtype.itemsize, "a number of another size")
    number: object = np.frombuffer(content, dtype)[0].item()
    return number


# scikit-learn


class _Estimator(Stateful):
    """A RandomForestRegressor or DecisionTreeRegressor: its attributes."""

    title = "an estimator"

    def __init__(self, args: tuple[Any, ...]) -> None:
        refuse_unless(args == (), "an estimator with arguments")
        self.state: dict[str, object] = {}

    def build(self, state: object) -> None:
        self.state = require(state, dict, "an estimator of an unknown form")


class _ForestEstimator(_Estimator):
    pass


class _TreeEstimator(_Estimator):
    pass


_NODE_FIELDS = ("left_child", "right_child", "feature", "threshold")


class _PickledTree(Stateful):
    """sklearn.tree._tree.Tree, flat as soon as it is set."""

    title = "a tree"

    def __init__(self, args: tuple[Any, ...]) -> None:
        refuse_unless(len(args) == 3 and args[2] == 1, "a tree with several outputs")
        self.n_features = require(args[0], int, "a tree with several outputs")

    def build(self, state: object) -> None:
        state = require(state, dict, "a tree without nodes")
        arrays = (require(state.get(name), _Array, "a tree without nodes") for name in ("nodes", "values"))
        table, value = (array.take() for array in arrays)
        refuse_unless(
            table.ndim == 1 and set(_NODE_FIELDS) <= set(table.dtype.names or ()), "nodes without children"
        )
        refuse_unless(
            value.dtype.kind == "f" and value.size == len(table), f"{value.size} values at {len(table)} nodes"
        )
        kinds = [table.dtype[name].kind for name in _NODE_FIELDS]
        refuse_unless(kinds == ["i", "i", "i", "f"], "nodes of unknown numbers")
        try:
            self.tree = flatten_tree(
                left=table["left_child"],
                right=table["right_child"],
                feature=table["feature"],
                threshold=table["threshold"],
                value=value.ravel(),
                n_features=self.n_features,
            )
        except ValueError as error:
            raise RefusedError(str(error)) from error


_GLOBALS: Constructors = {
    "sklearn.ensemble._forest.RandomForestRegressor": _ForestEstimator,
    "sklearn.tree._classes.DecisionTreeRegressor": _TreeEstimator,
    "sklearn.tree._tree.Tree": _PickledTree,
    "numpy.ndarray": None,
    "numpy.dtype": _DType,
    "numpy.core.multiarray._reconstruct": _Array,
    "numpy._core.multiarray._reconstruct": _Array,
    "numpy.core.multiarray.scalar": _scalar,
    "numpy._core.multiarray.scalar": _scalar,
    "numpy.core.numeric._frombuffer": _Array.of_buffer,
    "numpy._core.numeric._frombuffer": _Array.of_buffer,
}


def read_forest(stream: BinaryIO, where: str, limits: PickleBounds | None = None) -> Forest:
    """Read a pickled RandomForestRegressor with one output; `where` names it in messages.

    The stream is read to its end. Raises TableError where it is anything else, before anything
    that it names could be imported or called.
    """
    try:
        root = read_pickle(stream, _GLOBALS, limits or PickleBounds())
        refuse_unless(stream.read(1) == b"", "bytes after its end")
        return _forest(root)
    except (RefusedError, ValueError) as error:
        raise TableError(f"{where}: no random forest that is safe to read: {error}") from error


def _forest(root: object) -> Forest:
    state = require(root, _ForestEstimator, "no RandomForestRegressor").state
    estimators = require(state.get("estimators_"), list, "a forest without trees")
    trees = []
    for estimator in estimators:
        pickled = estimator.state.get("tree_") if isinstance(estimator, _TreeEstimator) else None
        if not isinstance(pickled, _PickledTree) or not pickled.is_set:
            raise RefusedError("a forest of something else than fitted regression trees")
        trees.append(pickled.tree)
    # a memoised tree named a thousand times would make a small file a large forest
    refuse_unless(len({id(tree) for tree in trees}) == len(trees), "a tree that occurs twice")
    return Forest.join(trees)
