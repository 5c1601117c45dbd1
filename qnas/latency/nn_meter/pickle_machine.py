"""A restricted unpickler: it imports and calls nothing that a pickle names, and bounds what it reads.

A pickle is a program: Python's own reader imports what it names and calls it. Here the standard library's
unpickler (the one written in Python, as joblib extends it) is left with the opcodes of plain data. A name
is looked up in a table of constructors, or refused. Bytes, opcodes, nested values, and the bytes of arrays
that are held at once are bounded, which they are not in the standard library. No value is walked through
recursively, so deep or circular values cost what they cost to read.
"""

import pickle
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, BinaryIO, ClassVar, TypeVar

T = TypeVar("T")


@dataclass(frozen=True)
class PickleBounds:
    """The most that one pickle may take. Published forests have some 700 trees, 300 opcodes a tree."""

    opcodes: int = 3_000_000
    text_bytes: int = 4096  # one string, or bytes that are no array
    all_text_bytes: int = 64 << 20  # of opcodes, numbers and texts together
    held_bytes: int = 256 << 20  # arrays that no tree was made of yet
    open_parts: int = 100  # parts of values that are begun and not ended
    stack: int = 100_000


class RefusedError(Exception):
    """A problem of the pickle, without the name of its file."""


class Payload:
    """Bytes too long for anything but an array; they can be taken once, and are then let go."""

    def __init__(self, content: bytes, unpickler: "_Unpickler") -> None:
        self._content: bytes | None = content
        self._unpickler, self._size = unpickler, len(content)
        unpickler.held += self._size

    def __len__(self) -> int:
        return self._size

    def take(self) -> bytes:
        """Return the bytes, once."""
        if self._content is None:
            raise RefusedError("the bytes of an array are used twice")
        content, self._content = self._content, None
        self._unpickler.held -= self._size
        return content


@dataclass(frozen=True)
class GlobalName:
    """A name of the pickle, and what is called in its place."""

    name: str
    construct: Callable[[tuple[Any, ...]], object] | None


def refuse_unless(holds: bool, message: str) -> None:
    """Raise RefusedError with the message unless something holds."""
    if not holds:
        raise RefusedError(message)


def require(value: object, kind: type[T], message: str) -> T:
    """Return a value of this type. Raises RefusedError with the message for another; a bool is no int."""
    if not isinstance(value, kind) or (kind is int and type(value) is bool):
        raise RefusedError(message)
    return value


class Stateful:
    """An object that a pickle sets the state of after it was made, once."""

    title: ClassVar[str]  # in messages
    is_set = False

    def build(self, state: object) -> None:
        """Set the state. Raises RefusedError where it is not one of this object."""
        raise NotImplementedError


# name in a pickle -> what is called in its place; None: nothing may be called
Constructors = Mapping[str, Callable[[tuple[Any, ...]], object] | None]


def read_pickle(stream: BinaryIO, constructors: Constructors, bounds: PickleBounds) -> object:
    """Return the value of a pickle. Raises RefusedError where it needs more than `constructors`."""
    try:
        return _Unpickler(stream, constructors, bounds).load()
    except (AttributeError, IndexError, KeyError, TypeError, ValueError, pickle.UnpicklingError) as error:
        raise RefusedError(f"no valid pickle: {error}") from error


# What plain data need. None of these imports or calls anything, and none reads past `_Unpickler.read`.
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

    def __init__(self, stream: BinaryIO, constructors: Constructors, bounds: PickleBounds) -> None:
        super().__init__(stream)
        self._stream, self._constructors, self._bounds = stream, constructors, bounds
        self._text_left, self.held = bounds.all_text_bytes, 0
        self.metastack: list[list[Any]] = []
        self.stack: list[Any] = []
        self.append = self.stack.append

    def load(self) -> object:
        """Return the value of the pickle."""
        for _ in range(self._bounds.opcodes):
            code = self.read(1)
            if code == pickle.STOP:
                refuse_unless(not self.metastack and len(self.stack) == 1, "values left over at its end")
                return self.stack.pop()
            refuse_unless(code[0] in self.dispatch, f"opcode {code!r}, which plain data do not need")
            self.dispatch[code[0]](self)
            refuse_unless(len(self.stack) <= self._bounds.stack, "too many values")
        raise RefusedError(f"more than {self._bounds.opcodes} opcodes")

    def read(self, size: int) -> bytes:
        """Return so many bytes, of an opcode, number or text."""
        self._spend(size)
        return self._whole(size)

    def readline(self) -> bytes:
        """Return a line with its end."""
        content = self._stream.readline(self._bounds.text_bytes)
        refuse_unless(content.endswith(b"\n"), "it ends too soon")
        self._spend(len(content))
        return content

    def _whole(self, size: int) -> bytes:
        content = self._stream.read(size)
        refuse_unless(len(content) == size, "it ends too soon")
        return content

    def _spend(self, size: int) -> None:
        refuse_unless(size <= self._bounds.text_bytes, f"a text of {size} bytes")
        self._text_left -= size
        refuse_unless(self._text_left >= 0, f"more than {self._bounds.all_text_bytes} bytes of text")

    def find_class(self, module: str, name: str) -> GlobalName:
        """Return what stands for a name, which is not imported."""
        full = f"{module}.{name}"
        refuse_unless(full in self._constructors, f"it names {full[:200]!r}, which a forest does not need")
        return GlobalName(full, self._constructors[full])

    def _bytes(self, form: str) -> None:
        (size,) = struct.unpack(form, self.read(struct.calcsize(form)))
        if size <= self._bounds.text_bytes:
            self.append(self.read(size))
            return
        refuse_unless(
            self.held + size <= self._bounds.held_bytes,
            f"an array of {size} bytes, with {self.held} held already",
        )
        self.append(Payload(self._whole(size), self))

    def _mark(self) -> None:
        refuse_unless(len(self.metastack) < self._bounds.open_parts, "values nested too deeply")
        self.load_mark()  # type: ignore[attr-defined]  # typeshed names few of its methods

    def _update(self, items: list[Any]) -> None:
        target = require(self.stack[-1], dict, "items for something else than a dict")
        # a key is hashed, which for other values could walk through them
        refuse_unless(all(type(key) is str for key in items[::2]), "a key that is no text")
        target.update(zip(items[::2], items[1::2], strict=True))

    def _set_item(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self._update([key, value])

    def _call(self) -> None:
        args, called = self.stack.pop(), self.stack.pop()
        if not isinstance(called, GlobalName) or called.construct is None or type(args) is not tuple:
            raise RefusedError("a call of something that is no known class")
        self.append(called.construct(args))

    def _build(self) -> None:
        state = self.stack.pop()
        target = require(self.stack[-1], Stateful, "a state for something that has none")
        refuse_unless(not target.is_set, f"{target.title} that is set twice")
        target.build(state)
        target.is_set = True

    dispatch: ClassVar[dict[int, Callable[[Any], Any]]] = {
        **{code[0]: pickle._Unpickler.dispatch[code[0]] for code in _PLAIN},
        pickle.FRAME[0]: lambda self: self.read(8),  # how far one may read ahead, which nothing here does
        pickle.BINBYTES[0]: lambda self: self._bytes("<I"),
        pickle.BINBYTES8[0]: lambda self: self._bytes("<Q"),
        pickle.BYTEARRAY8[0]: lambda self: self._bytes("<Q"),
        pickle.MARK[0]: _mark,
        pickle.SETITEM[0]: _set_item,
        pickle.SETITEMS[0]: lambda self: self._update(self.pop_mark()),
        pickle.REDUCE[0]: _call,
        pickle.NEWOBJ[0]: _call,  # the class is called all the same
        pickle.BUILD[0]: _build,
    }
