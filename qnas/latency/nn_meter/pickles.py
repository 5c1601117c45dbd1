"""Pickled random forests of scikit-learn, read without running any code that a pickle names.

A pickle is a program: Python's own reader imports what it names and calls it. Here, the standard library's
unpickler (the one in Python, which joblib extends too) is reduced to the opcodes of plain data. A name must
be in `_GLOBALS`, or it is refused. The functions there are all of this file; they make numbers, strings,
arrays from bytes (of plain numbers, with the exact size) and trees. Bytes, opcodes, nested values, and the
bytes of arrays held at once are bounded, unlike in the standard library. No value is traversed recursively,
so deep or circular values cost no more than other values of their size.

Forests are read tree by tree: a tree becomes flat arrays as soon as it is complete, and its pickled
bytes are freed, so a file of gigabytes takes only the memory of its flat form.

The classes are those that `pickle.dump` of a RandomForestRegressor writes with protocol 3 and later,
from scikit-learn 0.22 on, under the names of numpy 1 and 2. Nodes have seven fields, or eight since
scikit-learn 1.3 (`missing_go_to_left`, which is not needed, since no input is missing).
"""

import math
import pickle
import re
import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, BinaryIO, ClassVar, TypeVar

import numpy as np
import numpy.typing as npt

from qnas.common.errors import TableError, one_line
from qnas.latency.nn_meter.forests import Forest, flatten_tree

_T = TypeVar("_T")


@dataclass(frozen=True)
class PickleBounds:
    """The bounds on one pickle. Published forests have about 700 trees of 300 opcodes each."""

    opcodes: int = 3_000_000
    text_bytes: int = 4096  # one string, or bytes that are not an array
    all_text_bytes: int = 64 << 20  # of opcodes, numbers and texts together
    held_bytes: int = 256 << 20  # arrays that are not part of a tree yet
    open_parts: int = 100  # parts of values that are begun but not ended
    stack: int = 100_000


class _RefusedError(Exception):
    """A problem of the pickle, without the name of its file."""


class _Payload:
    """Bytes too long for anything but an array; they can be taken once and are then freed."""

    def __init__(self, content: bytes, unpickler: "_Unpickler") -> None:
        self._content: bytes | None = content
        self._unpickler, self._size = unpickler, len(content)
        unpickler.held += self._size

    def __len__(self) -> int:
        return self._size

    def take(self) -> bytes:
        if self._content is None:
            raise _RefusedError("the bytes of an array are used twice")
        content, self._content = self._content, None
        self._unpickler.held -= self._size
        return content


class _GlobalName(str):
    """A name in the pickle; `_GLOBALS` has the function to call in its place."""


def _refuse_unless(holds: bool, message: str) -> None:
    if not holds:
        raise _RefusedError(message)


def _require(value: object, kind: type[_T], message: str) -> _T:
    """Return a value of this type. Raises _RefusedError with the message otherwise; a bool is no int."""
    if not isinstance(value, kind) or (kind is int and type(value) is bool):
        raise _RefusedError(message)
    return value


class _Stateful:
    """An object whose state a pickle sets once after it was made."""

    title: ClassVar[str]  # in messages
    is_set = False

    def build(self, state: object) -> None:
        """Set the state. Raises _RefusedError where it does not fit this object."""
        raise NotImplementedError


# The opcodes of plain data. None of these imports or calls anything, and none reads past `_Unpickler.read`.
_PLAIN = (
    *(pickle.PROTO, pickle.NONE, pickle.NEWTRUE, pickle.NEWFALSE),
    *(pickle.BININT, pickle.BININT1, pickle.BININT2, pickle.LONG1, pickle.BINFLOAT),
    *(pickle.SHORT_BINUNICODE, pickle.BINUNICODE, pickle.BINUNICODE8, pickle.SHORT_BINBYTES),
    *(pickle.EMPTY_TUPLE, pickle.TUPLE1, pickle.TUPLE2, pickle.TUPLE3, pickle.TUPLE),
    *(pickle.EMPTY_LIST, pickle.APPEND, pickle.APPENDS, pickle.EMPTY_DICT),
    *(pickle.BINGET, pickle.LONG_BINGET, pickle.BINPUT, pickle.LONG_BINPUT, pickle.MEMOIZE),
    *(pickle.GLOBAL, pickle.STACK_GLOBAL),  # by `find_class`
)


class _Unpickler(pickle._Unpickler):
    """The standard library's unpickler with the opcodes of plain data, bounded."""

    def __init__(self, stream: BinaryIO, bounds: PickleBounds) -> None:
        super().__init__(stream)
        self._stream, self._bounds = stream, bounds
        self._text_left, self.held = bounds.all_text_bytes, 0
        self.metastack: list[list[Any]] = []
        self.stack: list[Any] = []
        self.append = self.stack.append

    def load(self) -> object:
        """Return the value of the pickle. Raises _RefusedError where it needs more than `_GLOBALS`."""
        try:
            for _ in range(self._bounds.opcodes):
                code = self.read(1)
                if code == pickle.STOP:
                    _refuse_unless(not self.metastack and len(self.stack) == 1, "values left over at its end")
                    return self.stack.pop()
                _refuse_unless(code[0] in self.dispatch, f"opcode {code!r}, which plain data do not need")
                self.dispatch[code[0]](self)
                _refuse_unless(len(self.stack) <= self._bounds.stack, "too many values")
        except (AttributeError, IndexError, KeyError, TypeError, ValueError, pickle.UnpicklingError) as error:
            raise _RefusedError(f"no valid pickle: {error}") from error
        raise _RefusedError(f"more than {self._bounds.opcodes} opcodes")

    def read(self, size: int) -> bytes:
        """Return `size` bytes, of an opcode, number or text."""
        self._spend(size)
        return self._whole(size)

    def readline(self) -> bytes:
        content = self._stream.readline(self._bounds.text_bytes)
        _refuse_unless(content.endswith(b"\n"), "it ends too soon")
        self._spend(len(content))
        return content

    def _whole(self, size: int) -> bytes:
        content = self._stream.read(size)
        _refuse_unless(len(content) == size, "it ends too soon")
        return content

    def _spend(self, size: int) -> None:
        _refuse_unless(size <= self._bounds.text_bytes, f"a text of {size} bytes")
        self._text_left -= size
        _refuse_unless(self._text_left >= 0, f"more than {self._bounds.all_text_bytes} bytes of text")

    def find_class(self, module: str, name: str) -> _GlobalName:
        full = f"{module}.{name}"
        _refuse_unless(full in _GLOBALS, f"it names {full[:200]!r}, which a forest does not need")
        return _GlobalName(full)

    def _bytes(self, form: str) -> None:
        (size,) = struct.unpack(form, self.read(struct.calcsize(form)))
        if size <= self._bounds.text_bytes:
            self.append(self.read(size))
            return
        _refuse_unless(
            self.held + size <= self._bounds.held_bytes,
            f"an array of {size} bytes, with {self.held} held already",
        )
        self.append(_Payload(self._whole(size), self))

    def _mark(self) -> None:
        _refuse_unless(len(self.metastack) < self._bounds.open_parts, "values nested too deeply")
        self.load_mark()  # type: ignore[attr-defined]  # typeshed names few of its methods

    def _update(self, items: list[Any]) -> None:
        target = _require(self.stack[-1], dict, "items for something else than a dict")
        # a key is hashed, and hashing other values could traverse them
        _refuse_unless(all(type(key) is str for key in items[::2]), "a key that is no text")
        target.update(zip(items[::2], items[1::2], strict=True))

    def _set_item(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self._update([key, value])

    def _call(self) -> None:
        args, called = self.stack.pop(), self.stack.pop()
        construct = _GLOBALS[called] if type(called) is _GlobalName else None
        if construct is None or type(args) is not tuple:
            raise _RefusedError("a call of something that is no known class")
        self.append(construct(args))

    def _build(self) -> None:
        state = self.stack.pop()
        target = _require(self.stack[-1], _Stateful, "a state for something that has none")
        _refuse_unless(not target.is_set, f"{target.title} that is set twice")
        target.build(state)
        target.is_set = True

    dispatch: ClassVar[dict[int, Callable[[Any], Any]]] = {
        **{code[0]: pickle._Unpickler.dispatch[code[0]] for code in _PLAIN},
        pickle.FRAME[0]: lambda self: self.read(8),  # the size to read ahead, which nothing here does
        pickle.BINBYTES[0]: lambda self: self._bytes("<I"),
        pickle.BINBYTES8[0]: lambda self: self._bytes("<Q"),
        pickle.BYTEARRAY8[0]: lambda self: self._bytes("<Q"),
        pickle.MARK[0]: _mark,
        pickle.SETITEM[0]: _set_item,
        pickle.SETITEMS[0]: lambda self: self._update(self.pop_mark()),
        pickle.REDUCE[0]: _call,
        pickle.NEWOBJ[0]: _call,  # calls the class as well
        pickle.BUILD[0]: _build,
    }


# numpy

_NUMBERS = re.compile(r"[iu][1248]|f[48]|b1")
_STRUCT = re.compile(r"V([0-9]{1,3})")


class _DType(_Stateful):
    """numpy.dtype of a plain number, or of a struct of them."""

    title = "a dtype"

    def __init__(self, args: tuple[Any, ...]) -> None:
        _refuse_unless(len(args) == 3 and isinstance(args[0], str), "a dtype of an unknown form")
        self._code: str = args[0]
        _refuse_unless(
            bool(_NUMBERS.fullmatch(self._code) or _STRUCT.fullmatch(self._code)),
            f"dtype {self._code[:20]!r}, expected plain numbers",
        )

    def build(self, state: object) -> None:
        form = "a dtype of an unknown form"
        state = _require(state, tuple, form)
        _refuse_unless(len(state) in (8, 9), form)
        _, order, subtype, names, members = state[:5]
        _refuse_unless(order in ("<", ">", "=", "|") and subtype is None and not any(state[8:]), form)
        struct_size = _STRUCT.fullmatch(self._code)
        if struct_size is None:
            _refuse_unless(names is None and members is None, form)
            self._dtype: np.dtype[Any] = np.dtype(self._code).newbyteorder(order)
        else:
            self._dtype = _struct_dtype(names, members, int(struct_size[1]))

    @property
    def dtype(self) -> "np.dtype[Any]":
        _refuse_unless(self.is_set, "a dtype that is used before it is set")
        return self._dtype


def _struct_dtype(names: object, members: object, size: int) -> "np.dtype[Any]":
    form = "a struct of an unknown form"
    names, members = _require(names, tuple, form), _require(members, dict, form)
    _refuse_unless(1 <= len(names) <= 16, form)
    _refuse_unless(all(isinstance(name, str) and name in members for name in names), "a struct without names")
    _refuse_unless(len(set(names)) == len(names) and all(names), "a struct whose names are no names")
    formats, offsets = [], []
    for name in names:
        member = _require(members[name], tuple, "a bad member")
        _refuse_unless(len(member) == 2, "a bad member")
        dtype = _require(member[0], _DType, "a bad member").dtype
        offset = _require(member[1], int, "a bad member")
        _refuse_unless(dtype.names is None, "a struct in a struct")
        _refuse_unless(0 <= offset <= size - dtype.itemsize, "a member outside its struct")
        formats.append(dtype)
        offsets.append(offset)
    return np.dtype({"names": list(names), "formats": formats, "offsets": offsets, "itemsize": size})


class _Array(_Stateful):
    """numpy.ndarray from bytes."""

    title = "an array"

    def __init__(self, args: tuple[Any, ...]) -> None:
        _refuse_unless(
            len(args) == 3 and type(args[0]) is _GlobalName and args[0] == "numpy.ndarray",
            "an array of another class",
        )

    @classmethod
    def of_buffer(cls, args: tuple[Any, ...]) -> "_Array":
        _refuse_unless(len(args) in (4, 5) and args[3] in ("C", "F"), "an array of an unknown form")
        _refuse_unless(len(args) == 4 or args[4] is None, "an array with its axes exchanged")
        array = cls.__new__(cls)
        array.is_set = True
        array._set(args[2], args[1], args[3], args[0])
        return array

    def build(self, state: object) -> None:
        state = _require(state, tuple, "an array of an unknown form")
        _refuse_unless(len(state) == 5, "an array of an unknown form")
        _, shape, dtype, fortran, content = state
        self._set(shape, dtype, "F" if fortran is True else "C", content)

    def _set(self, shape: object, dtype: object, order: Any, content: object) -> None:
        unknown = "an array of an unknown shape"
        shape = _require(shape, tuple, unknown)
        lengths = [_require(length, int, unknown) for length in shape]
        _refuse_unless(len(shape) <= 4 and all(0 <= length < 2**40 for length in lengths), unknown)
        dtype = _require(dtype, _DType, "an array of an unknown dtype")
        if not isinstance(content, bytes | _Payload):
            raise _RefusedError("an array of objects, expected plain numbers")
        expected = dtype.dtype.itemsize * math.prod(lengths)
        _refuse_unless(
            len(content) == expected, f"an array of {len(content)} bytes, its shape needs {expected}"
        )
        self._shape, self._dtype, self._order, self._content = shape, dtype.dtype, order, content

    def take(self) -> npt.NDArray[Any]:
        """Return the array. Works only once, since its bytes are freed."""
        _refuse_unless(self.is_set, "an array that is used before it is set")
        content = self._content.take() if isinstance(self._content, _Payload) else self._content
        return np.frombuffer(content, self._dtype).reshape(self._shape, order=self._order)


def _scalar(args: tuple[Any, ...]) -> object:
    _refuse_unless(len(args) == 2, "an unknown number")
    dtype = _require(args[0], _DType, "an unknown number").dtype
    content = _require(args[1], bytes, "an unknown number")
    _refuse_unless(dtype.names is None and len(content) == dtype.itemsize, "a number of another size")
    number: object = np.frombuffer(content, dtype)[0].item()
    return number


# scikit-learn


class _Estimator(_Stateful):
    """A RandomForestRegressor or DecisionTreeRegressor: its attributes."""

    title = "an estimator"

    def __init__(self, args: tuple[Any, ...]) -> None:
        _refuse_unless(args == (), "an estimator with arguments")
        self.state: dict[str, object] = {}

    def build(self, state: object) -> None:
        self.state = _require(state, dict, "an estimator of an unknown form")


class _ForestEstimator(_Estimator):
    pass


class _TreeEstimator(_Estimator):
    pass


_NODE_FIELDS = ("left_child", "right_child", "feature", "threshold")


class _PickledTree(_Stateful):
    """sklearn.tree._tree.Tree, flat as soon as it is set."""

    title = "a tree"

    def __init__(self, args: tuple[Any, ...]) -> None:
        _refuse_unless(len(args) == 3 and args[2] == 1, "a tree with several outputs")
        self.n_features = _require(args[0], int, "a tree with several outputs")

    def build(self, state: object) -> None:
        state = _require(state, dict, "a tree without nodes")
        arrays = (_require(state.get(name), _Array, "a tree without nodes") for name in ("nodes", "values"))
        table, value = (array.take() for array in arrays)
        _refuse_unless(
            table.ndim == 1 and set(_NODE_FIELDS) <= set(table.dtype.names or ()), "nodes without children"
        )
        _refuse_unless(
            value.dtype.kind == "f" and value.size == len(table), f"{value.size} values at {len(table)} nodes"
        )
        kinds = [table.dtype[name].kind for name in _NODE_FIELDS]
        _refuse_unless(kinds == ["i", "i", "i", "f"], "nodes of unknown numbers")
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
            raise _RefusedError(str(error)) from error


# name in a pickle -> the function to call in its place; None: must not be called
_GLOBALS: dict[str, Callable[[tuple[Any, ...]], object] | None] = {
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
        root = _Unpickler(stream, limits or PickleBounds()).load()
        _refuse_unless(stream.read(1) == b"", "bytes after its end")
        return _forest(root)
    except (_RefusedError, ValueError) as error:
        raise TableError(f"{where}: no random forest that is safe to read: {one_line(error)}") from error


def _forest(root: object) -> Forest:
    state = _require(root, _ForestEstimator, "no RandomForestRegressor").state
    estimators = _require(state.get("estimators_"), list, "a forest without trees")
    trees = []
    for estimator in estimators:
        pickled = estimator.state.get("tree_") if isinstance(estimator, _TreeEstimator) else None
        if not isinstance(pickled, _PickledTree) or not pickled.is_set:
            raise _RefusedError("a forest of something else than fitted regression trees")
        trees.append(pickled.tree)
    # a memoised tree named a thousand times would make a small file a large forest
    _refuse_unless(len({id(tree) for tree in trees}) == len(trees), "a tree that occurs twice")
    return Forest.join(trees)
