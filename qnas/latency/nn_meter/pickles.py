"""Reading pickled random forests of scikit-learn without running anything that a pickle says.

A pickle is a program: Python's own reader imports what it names and calls it. This one is a machine
for the few opcodes that plain data need. A name becomes a stand-in of this file or is refused by
name, so nothing is imported and nothing foreign is called; what is called makes numbers, strings,
arrays from bytes (of plain numbers, with the exact size) and trees. What is read is bounded: bytes,
opcodes, open parts, and the bytes of arrays that are held at once. No value is ever walked through
recursively, so deep or circular values cost what they cost to read.

Forests are read tree by tree: a tree becomes flat arrays as soon as it is complete, and its pickled
bytes are let go, so that a file of gigabytes takes the memory of its flat form.

Which classes: those that `pickle.dump` of a RandomForestRegressor writes with protocol 3 and later,
from scikit-learn 0.22 on, under the names of numpy 1 and 2. Nodes have seven fields, or eight since
scikit-learn 1.3 (`missing_go_to_left`, of no use here: no input is missing).
"""

import re
import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, BinaryIO, NoReturn

import numpy as np
import numpy.typing as npt

from qnas.common.errors import TableError
from qnas.latency.nn_meter.forests import Forest, Tree, flatten_tree


@dataclass(frozen=True)
class Limits:
    """What one pickle may take. Published forests have some 700 trees, 300 opcodes a tree."""

    opcodes: int = 3_000_000
    text_bytes: int = 4096  # one string, or bytes that are no array
    all_text_bytes: int = 64 << 20
    held_bytes: int = 256 << 20  # arrays that no tree was made of yet
    open_parts: int = 100  # parts of values that are begun and not ended
    stack: int = 100_000


class _RefusedError(Exception):
    """What is wrong with the pickle, without its name."""


class _Payload:
    """Bytes too long for anything but an array; they can be taken once, and are then let go."""

    def __init__(self, content: bytes, release: Callable[[int], None]) -> None:
        self._content: bytes | None = content
        self._release = release
        self._size = len(content)

    def __len__(self) -> int:
        return self._size

    def take(self) -> bytes:
        if self._content is None:
            raise _RefusedError("the bytes of an array are used twice")
        content, self._content = self._content, None
        self._release(self._size)
        return content


@dataclass(frozen=True)
class _Global:
    """A name of the pickle, and what is called in its place."""

    name: str
    construct: Callable[[tuple[Any, ...]], object] | None


def _refuse_unless(holds: bool, message: str) -> None:
    if not holds:
        raise _RefusedError(message)


def _is_int(value: object) -> bool:
    return type(value) is int


# numpy

_NUMBERS = re.compile(r"[iu][1248]|f[48]|b1")
_STRUCT = re.compile(r"V([0-9]{1,3})")


class _DType:
    """numpy.dtype of a plain number, or of a struct of them."""

    def __init__(self, args: tuple[Any, ...]) -> None:
        _refuse_unless(len(args) == 3 and isinstance(args[0], str), "a dtype of an unknown form")
        self._code: str = args[0]
        _refuse_unless(
            bool(_NUMBERS.fullmatch(self._code) or _STRUCT.fullmatch(self._code)),
            f"dtype {self._code[:20]!r}, expected plain numbers",
        )
        self._dtype: np.dtype[Any] | None = None

    def build(self, state: object) -> None:
        _refuse_unless(self._dtype is None, "a dtype that is set twice")
        _refuse_unless(isinstance(state, tuple) and len(state) in (8, 9), "a dtype of an unknown form")
        assert isinstance(state, tuple)
        _, order, subtype, names, members = state[:5]
        _refuse_unless(
            order in ("<", ">", "=", "|") and subtype is None and (len(state) == 8 or not state[8]),
            "a dtype of an unknown form",
        )
        struct_size = _STRUCT.fullmatch(self._code)
        if struct_size is None:
            _refuse_unless(names is None and members is None, "a dtype of an unknown form")
            self._dtype = np.dtype(self._code).newbyteorder(order)
        else:
            self._dtype = _struct_dtype(names, members, int(struct_size[1]))

    @property
    def dtype(self) -> "np.dtype[Any]":
        if self._dtype is None:
            raise _RefusedError("a dtype that is used before it is set")
        return self._dtype


def _struct_dtype(names: object, members: object, size: int) -> "np.dtype[Any]":
    _refuse_unless(isinstance(names, tuple) and 1 <= len(names) <= 16, "a struct of an unknown form")
    _refuse_unless(isinstance(members, dict), "a struct of an unknown form")
    assert isinstance(names, tuple)
    assert isinstance(members, dict)
    _refuse_unless(all(isinstance(name, str) and name in members for name in names), "a struct without names")
    _refuse_unless(len(set(names)) == len(names) and all(names), "a struct whose names are no names")
    formats, offsets = [], []
    for name in names:
        member = members[name]
        _refuse_unless(
            isinstance(member, tuple) and len(member) == 2 and isinstance(member[0], _DType), "a bad member"
        )
        dtype, offset = member[0].dtype, member[1]
        _refuse_unless(dtype.names is None and _is_int(offset), "a struct in a struct")
        _refuse_unless(0 <= offset <= size - dtype.itemsize, "a member outside its struct")
        formats.append(dtype)
        offsets.append(offset)
    return np.dtype({"names": list(names), "formats": formats, "offsets": offsets, "itemsize": size})


class _Array:
    """numpy.ndarray from bytes."""

    def __init__(self, args: tuple[Any, ...]) -> None:
        _refuse_unless(
            len(args) == 3 and isinstance(args[0], _Global) and args[0].name == "numpy.ndarray",
            "an array of another class",
        )
        self._built = False

    @classmethod
    def of_buffer(cls, args: tuple[Any, ...]) -> "_Array":
        _refuse_unless(len(args) in (4, 5) and args[3] in ("C", "F"), "an array of an unknown form")
        _refuse_unless(len(args) == 4 or args[4] is None, "an array with its axes exchanged")
        array = cls.__new__(cls)
        array._set(args[2], args[1], args[3], args[0])
        return array

    def build(self, state: object) -> None:
        _refuse_unless(not self._built, "an array that is set twice")
        _refuse_unless(isinstance(state, tuple) and len(state) == 5, "an array of an unknown form")
        assert isinstance(state, tuple)
        _, shape, dtype, fortran, content = state
        self._set(shape, dtype, "F" if fortran is True else "C", content)

    def _set(self, shape: object, dtype: object, order: Any, content: object) -> None:
        _refuse_unless(
            isinstance(shape, tuple)
            and len(shape) <= 4
            and all(_is_int(length) and 0 <= length < 2**40 for length in shape),
            "an array of an unknown shape",
        )
        _refuse_unless(isinstance(dtype, _DType), "an array of an unknown dtype")
        _refuse_unless(isinstance(content, bytes | _Payload), "an array of objects, expected plain numbers")
        assert isinstance(shape, tuple)
        assert isinstance(dtype, _DType)
        assert isinstance(content, bytes | _Payload)
        expected = dtype.dtype.itemsize
        for length in shape:
            expected *= length
        _refuse_unless(
            len(content) == expected, f"an array of {len(content)} bytes, its shape needs {expected}"
        )
        self._shape, self._dtype, self._order, self._content = shape, dtype.dtype, order, content
        self._built = True

    def take(self) -> npt.NDArray[Any]:
        """Return the array, once: its bytes are let go."""
        _refuse_unless(self._built, "an array that is used before it is set")
        content = self._content.take() if isinstance(self._content, _Payload) else self._content
        return np.frombuffer(content, self._dtype).reshape(self._shape, order=self._order)


def _scalar(args: tuple[Any, ...]) -> object:
    _refuse_unless(
        len(args) == 2 and isinstance(args[0], _DType) and isinstance(args[1], bytes), "an unknown number"
    )
    dtype = args[0].dtype
    _refuse_unless(dtype.names is None and len(args[1]) == dtype.itemsize, "a number of another size")
    number: object = np.frombuffer(args[1], dtype)[0].item()
    return number


# scikit-learn


class _Estimator:
    """A RandomForestRegressor or DecisionTreeRegressor: its attributes."""

    def __init__(self, args: tuple[Any, ...]) -> None:
        _refuse_unless(args == (), "an estimator with arguments")
        self.state: dict[str, object] | None = None

    def build(self, state: object) -> None:
        _refuse_unless(self.state is None and isinstance(state, dict), "an estimator that is set twice")
        assert isinstance(state, dict)
        self.state = state


class _ForestEstimator(_Estimator):
    pass


class _TreeEstimator(_Estimator):
    pass


_NODE_FIELDS = ("left_child", "right_child", "feature", "threshold")


class _PickledTree:
    """sklearn.tree._tree.Tree, flat as soon as it is set."""

    def __init__(self, args: tuple[Any, ...]) -> None:
        _refuse_unless(len(args) == 3 and _is_int(args[0]) and args[2] == 1, "a tree with several outputs")
        self.n_features: int = args[0]
        self.tree: Tree | None = None

    def build(self, state: object) -> None:
        _refuse_unless(self.tree is None and isinstance(state, dict), "a tree that is set twice")
        assert isinstance(state, dict)
        nodes, values = state.get("nodes"), state.get("values")
        _refuse_unless(isinstance(nodes, _Array) and isinstance(values, _Array), "a tree without nodes")
        assert isinstance(nodes, _Array)
        assert isinstance(values, _Array)
        table, value = nodes.take(), values.take()
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


def read_forest(stream: BinaryIO, where: str, limits: Limits | None = None) -> Forest:
    """Read a pickled RandomForestRegressor with one output; `where` names it in messages.

    The stream is read to its end. Raises TableError where it is anything else, before anything
    that it names could be imported or called.
    """
    try:
        root = _Machine(stream, limits or Limits()).run()
        _refuse_unless(stream.read(1) == b"", "bytes after its end")
        return _forest(root)
    except _RefusedError as error:
        raise TableError(f"{where}: no random forest that is safe to read: {error}") from error


def _forest(root: object) -> Forest:
    _refuse_unless(isinstance(root, _ForestEstimator), "no RandomForestRegressor")
    assert isinstance(root, _ForestEstimator)
    estimators = (root.state or {}).get("estimators_")
    _refuse_unless(isinstance(estimators, list) and bool(estimators), "a forest without trees")
    assert isinstance(estimators, list)
    trees, counts = [], set()
    for estimator in estimators:
        pickled = (estimator.state or {}).get("tree_") if isinstance(estimator, _TreeEstimator) else None
        if not isinstance(pickled, _PickledTree) or pickled.tree is None:
            raise _RefusedError("a forest of something else than fitted regression trees")
        trees.append(pickled.tree)
        counts.add(pickled.n_features)
    # a memoised tree named a thousand times would make a small file a large forest
    _refuse_unless(len({id(tree) for tree in trees}) == len(trees), "a tree that occurs twice")
    _refuse_unless(len(counts) == 1, "trees with unequal numbers of features")
    try:
        return Forest.of(trees, counts.pop())
    except ValueError as error:
        raise _RefusedError(str(error)) from error


# the machine


class _Machine:
    """A stack, a memo and the opcodes of plain data."""

    def __init__(self, stream: BinaryIO, limits: Limits) -> None:
        self._stream = stream
        self._limits = limits
        self._stack: list[object] = []
        self._opened: list[list[object]] = []  # the stacks below the open parts
        self._memo: dict[int, object] = {}
        self._text_left = limits.all_text_bytes
        self._held = 0

    def run(self) -> object:
        """Return the value of the pickle."""
        for _ in range(self._limits.opcodes):
            code = self._read(1)
            if code == b".":
                _refuse_unless(not self._opened and len(self._stack) == 1, "values left over at its end")
                return self._stack.pop()
            opcode = _OPCODES.get(code)
            if opcode is None:
                self._refuse_opcode(code)
            opcode(self)
            _refuse_unless(len(self._stack) <= self._limits.stack, "too many values")
        raise _RefusedError(f"more than {self._limits.opcodes} opcodes")

    def _refuse_opcode(self, code: bytes) -> NoReturn:
        if code == b"i":  # makes an instance of a named class
            self._find(self._line(), self._line())
        meaning = _REFUSED.get(code, "")
        raise _RefusedError(f"opcode {code!r}{' (' + meaning + ')' if meaning else ''}")

    # what it reads

    def _read(self, size: int) -> bytes:
        content = self._stream.read(size)
        _refuse_unless(len(content) == size, "it ends too soon")
        return content

    def _number(self, form: str) -> int:
        number: int = struct.unpack(form, self._read(struct.calcsize(form)))[0]
        return number

    def _spend(self, size: int) -> int:
        _refuse_unless(0 <= size <= self._limits.text_bytes, f"a text of {size} bytes")
        self._text_left -= size
        _refuse_unless(self._text_left >= 0, f"more than {self._limits.all_text_bytes} bytes of text")
        return size

    def _text(self, size: int) -> str:
        try:
            return self._read(self._spend(size)).decode("utf-8")
        except UnicodeDecodeError:
            raise _RefusedError("a text that is not UTF-8") from None

    def _line(self) -> str:
        content = self._stream.readline(self._limits.text_bytes)
        self._spend(len(content))
        _refuse_unless(content.endswith(b"\n"), "it ends too soon")
        return content[:-1].decode("utf-8", "replace")

    def _bytes(self, size: int) -> bytes | _Payload:
        if size <= self._limits.text_bytes:
            return self._read(self._spend(size))
        _refuse_unless(
            self._held + size <= self._limits.held_bytes,
            f"an array of {size} bytes, with {self._held} held already",
        )
        content = self._read(size)
        self._held += size
        return _Payload(content, self._let_go)

    def _let_go(self, size: int) -> None:
        self._held -= size

    # what it does

    def _pop(self) -> Any:
        _refuse_unless(bool(self._stack), "a value that is missing")
        return self._stack.pop()

    def _top(self) -> Any:
        _refuse_unless(bool(self._stack), "a value that is missing")
        return self._stack[-1]

    def push(self, value: object) -> None:
        self._stack.append(value)

    def open(self) -> None:
        _refuse_unless(len(self._opened) < self._limits.open_parts, "values nested too deeply")
        self._opened.append(self._stack)
        self._stack = []

    def _close(self) -> list[object]:
        _refuse_unless(bool(self._opened), "a part that ends and never began")
        part, self._stack = self._stack, self._opened.pop()
        return part

    def tuple_of(self, count: int) -> None:
        items = [self._pop() for _ in range(count)]
        self.push(tuple(reversed(items)))

    def close_tuple(self) -> None:
        self.push(tuple(self._close()))

    def append(self) -> None:
        self._extend([self._pop()])

    def close_list(self) -> None:
        self._extend(self._close())

    def _extend(self, items: list[object]) -> None:
        target = self._top()
        _refuse_unless(type(target) is list, "items for something else than a list")
        target.extend(items)

    def set_item(self) -> None:
        value = self._pop()
        self._update([self._pop(), value])

    def close_dict(self) -> None:
        self._update(self._close())

    def _update(self, items: list[object]) -> None:
        target = self._top()
        _refuse_unless(type(target) is dict and len(items) % 2 == 0, "items for something else than a dict")
        keys = items[::2]
        # a key is hashed, which for other values could walk through them
        _refuse_unless(all(type(key) is str for key in keys), "a key that is no text")
        target.update(zip(keys, items[1::2], strict=True))

    def get(self, index: int) -> None:
        _refuse_unless(index in self._memo, "a value that was never kept")
        self.push(self._memo[index])

    def put(self, index: int) -> None:
        self._memo[index] = self._top()

    def memoize(self) -> None:
        self.put(len(self._memo))

    def name(self) -> None:
        self._find(self._line(), self._line())

    def stack_name(self) -> None:
        name, module = self._pop(), self._pop()
        _refuse_unless(type(module) is str and type(name) is str, "a name that is no text")
        self._find(module, name)

    def _find(self, module: str, name: str) -> None:
        full = f"{module}.{name}"
        if full not in _GLOBALS:
            raise _RefusedError(f"it names {full[:200]!r}, which a forest does not need")
        self.push(_Global(full, _GLOBALS[full]))

    def call(self) -> None:
        args, called = self._pop(), self._pop()
        if not isinstance(called, _Global) or called.construct is None or type(args) is not tuple:
            raise _RefusedError("a call of something that is no known class")
        self.push(called.construct(args))

    def build(self) -> None:
        state, target = self._pop(), self._top()
        if not isinstance(target, _DType | _Array | _Estimator | _PickledTree):
            raise _RefusedError("a state for something that has none")
        target.build(state)

    def protocol(self) -> None:
        number = self._number("<B")
        _refuse_unless(number <= 5, f"pickle protocol {number}, expected 5 at most")

    def frame(self) -> None:
        self._number("<Q")  # how far one may read ahead: of no use to a buffered stream

    def long(self) -> None:
        size = self._number("<B")
        _refuse_unless(size <= 16, f"a number of {size} bytes")
        self.push(int.from_bytes(self._read(size), "little", signed=True))

    def float(self) -> None:
        self.push(struct.unpack(">d", self._read(8))[0])

    def integer(self, form: str) -> None:
        self.push(self._number(form))

    def text(self, form: str) -> None:
        self.push(self._text(self._number(form)))

    def content(self, form: str) -> None:
        self.push(self._bytes(self._number(form)))

    def get_numbered(self, form: str) -> None:
        self.get(self._number(form))

    def put_numbered(self, form: str) -> None:
        self.put(self._number(form))


_OPCODES: dict[bytes, Callable[[_Machine], None]] = {
    b"\x80": _Machine.protocol,
    b"\x95": _Machine.frame,
    b"(": _Machine.open,
    b"N": lambda m: m.push(None),
    b"\x88": lambda m: m.push(True),
    b"\x89": lambda m: m.push(False),
    b"J": lambda m: m.integer("<i"),
    b"K": lambda m: m.integer("<B"),
    b"M": lambda m: m.integer("<H"),
    b"\x8a": _Machine.long,
    b"G": _Machine.float,
    b"\x8c": lambda m: m.text("<B"),
    b"X": lambda m: m.text("<I"),
    b"\x8d": lambda m: m.text("<Q"),
    b"C": lambda m: m.content("<B"),
    b"B": lambda m: m.content("<I"),
    b"\x8e": lambda m: m.content("<Q"),
    b"\x96": lambda m: m.content("<Q"),  # a bytearray
    b")": lambda m: m.tuple_of(0),
    b"\x85": lambda m: m.tuple_of(1),
    b"\x86": lambda m: m.tuple_of(2),
    b"\x87": lambda m: m.tuple_of(3),
    b"t": _Machine.close_tuple,
    b"]": lambda m: m.push([]),
    b"a": _Machine.append,
    b"e": _Machine.close_list,
    b"}": lambda m: m.push({}),
    b"s": _Machine.set_item,
    b"u": _Machine.close_dict,
    b"h": lambda m: m.get_numbered("<B"),
    b"j": lambda m: m.get_numbered("<I"),
    b"q": lambda m: m.put_numbered("<B"),
    b"r": lambda m: m.put_numbered("<I"),
    b"\x94": _Machine.memoize,
    b"c": _Machine.name,
    b"\x93": _Machine.stack_name,
    b"R": _Machine.call,
    b"\x81": _Machine.call,  # a new object: the class is called all the same
    b"b": _Machine.build,
}

# opcodes that say something of the file where they occur
_REFUSED = {
    b"P": "a persistent id",
    b"Q": "a persistent id",
    b"\x82": "the extension registry",
    b"\x83": "the extension registry",
    b"\x84": "the extension registry",
    b"o": "an instance of a class",
    b"\x92": "a new object with keywords",
    b"\x97": "a buffer outside the file",
    b"\x98": "a buffer outside the file",
    b"S": "protocol 0",
    b"I": "protocol 0",
    b"V": "protocol 0",
    b"L": "protocol 0",
    b"F": "protocol 0",
}
