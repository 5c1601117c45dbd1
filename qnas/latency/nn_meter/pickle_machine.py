"""A reader of the pickle opcodes that plain data need, which imports and calls nothing that a pickle names.

A pickle is a program: Python's own reader imports what it names and calls it. Here a name is looked up in a
table of constructors, or refused. What is read is bounded: bytes, opcodes, nested values, and the bytes of
arrays that are held at once, which the standard library's Unpickler does not bound. No value is ever walked
through recursively, so deep or circular values cost what they cost to read.
"""

import struct
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, BinaryIO, NoReturn


@dataclass(frozen=True)
class PickleBounds:
    """The most that one pickle may take. Published forests have some 700 trees, 300 opcodes a tree."""

    opcodes: int = 3_000_000
    text_bytes: int = 4096  # one string, or bytes that are no array
    all_text_bytes: int = 64 << 20
    held_bytes: int = 256 << 20  # arrays that no tree was made of yet
    open_parts: int = 100  # parts of values that are begun and not ended
    stack: int = 100_000


class RefusedError(Exception):
    """A problem of the pickle, without the name of its file."""


class Payload:
    """Bytes too long for anything but an array; they can be taken once, and are then let go."""

    def __init__(self, content: bytes, release: Callable[[int], None]) -> None:
        self._content: bytes | None = content
        self._release = release
        self._size = len(content)

    def __len__(self) -> int:
        return self._size

    def take(self) -> bytes:
        """Return the bytes, once."""
        if self._content is None:
            raise RefusedError("the bytes of an array are used twice")
        content, self._content = self._content, None
        self._release(self._size)
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


def is_int(value: object) -> bool:
    """Whether a value is an int, and no bool."""
    return type(value) is int


class Stateful(ABC):
    """An object that a pickle sets the state of after it was made."""

    @abstractmethod
    def build(self, state: object) -> None:
        """Set the state. Raises RefusedError where it is not one of this object."""


# name in a pickle -> what is called in its place; None: nothing may be called
Constructors = Mapping[str, Callable[[tuple[Any, ...]], object] | None]


def read_pickle(stream: BinaryIO, constructors: Constructors, bounds: PickleBounds) -> object:
    """Return the value of a pickle. Raises RefusedError where it needs more than `constructors`."""
    return _Machine(stream, constructors, bounds).run()


class _Machine:
    """A stack, a memo and the opcodes of plain data."""

    def __init__(self, stream: BinaryIO, constructors: Constructors, limits: PickleBounds) -> None:
        self._constructors = constructors
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
                refuse_unless(not self._opened and len(self._stack) == 1, "values left over at its end")
                return self._stack.pop()
            opcode = _OPCODES.get(code)
            if opcode is None:
                self._refuse_opcode(code)
            opcode(self)
            refuse_unless(len(self._stack) <= self._limits.stack, "too many values")
        raise RefusedError(f"more than {self._limits.opcodes} opcodes")

    def _refuse_opcode(self, code: bytes) -> NoReturn:
        if code == b"i":  # makes an instance of a named class
            self._find(self._line(), self._line())
        meaning = _REFUSED.get(code, "")
        raise RefusedError(f"opcode {code!r}{' (' + meaning + ')' if meaning else ''}")

    # what it reads

    def _read(self, size: int) -> bytes:
        content = self._stream.read(size)
        refuse_unless(len(content) == size, "it ends too soon")
        return content

    def _number(self, form: str) -> int:
        number: int = struct.unpack(form, self._read(struct.calcsize(form)))[0]
        return number

    def _spend(self, size: int) -> int:
        refuse_unless(0 <= size <= self._limits.text_bytes, f"a text of {size} bytes")
        self._text_left -= size
        refuse_unless(self._text_left >= 0, f"more than {self._limits.all_text_bytes} bytes of text")
        return size

    def _text(self, size: int) -> str:
        try:
            return self._read(self._spend(size)).decode("utf-8")
        except UnicodeDecodeError:
            raise RefusedError("a text that is not UTF-8") from None

    def _line(self) -> str:
        content = self._stream.readline(self._limits.text_bytes)
        self._spend(len(content))
        refuse_unless(content.endswith(b"\n"), "it ends too soon")
        return content[:-1].decode("utf-8", "replace")

    def _bytes(self, size: int) -> bytes | Payload:
        if size <= self._limits.text_bytes:
            return self._read(self._spend(size))
        refuse_unless(
            self._held + size <= self._limits.held_bytes,
            f"an array of {size} bytes, with {self._held} held already",
        )
        content = self._read(size)
        self._held += size
        return Payload(content, self._let_go)

    def _let_go(self, size: int) -> None:
        self._held -= size

    # what it does

    def _pop(self) -> Any:
        refuse_unless(bool(self._stack), "a value that is missing")
        return self._stack.pop()

    def _top(self) -> Any:
        refuse_unless(bool(self._stack), "a value that is missing")
        return self._stack[-1]

    def push(self, value: object) -> None:
        self._stack.append(value)

    def open(self) -> None:
        refuse_unless(len(self._opened) < self._limits.open_parts, "values nested too deeply")
        self._opened.append(self._stack)
        self._stack = []

    def _close(self) -> list[object]:
        refuse_unless(bool(self._opened), "a part that ends and never began")
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
        refuse_unless(type(target) is list, "items for something else than a list")
        target.extend(items)

    def set_item(self) -> None:
        value = self._pop()
        self._update([self._pop(), value])

    def close_dict(self) -> None:
        self._update(self._close())

    def _update(self, items: list[object]) -> None:
        target = self._top()
        refuse_unless(type(target) is dict and len(items) % 2 == 0, "items for something else than a dict")
        keys = items[::2]
        # a key is hashed, which for other values could walk through them
        refuse_unless(all(type(key) is str for key in keys), "a key that is no text")
        target.update(zip(keys, items[1::2], strict=True))

    def get(self, index: int) -> None:
        refuse_unless(index in self._memo, "a value that was never kept")
        self.push(self._memo[index])

    def put(self, index: int) -> None:
        self._memo[index] = self._top()

    def memoize(self) -> None:
        self.put(len(self._memo))

    def name(self) -> None:
        self._find(self._line(), self._line())

    def stack_name(self) -> None:
        name, module = self._pop(), self._pop()
        refuse_unless(type(module) is str and type(name) is str, "a name that is no text")
        self._find(module, name)

    def _find(self, module: str, name: str) -> None:
        full = f"{module}.{name}"
        if full not in self._constructors:
            raise RefusedError(f"it names {full[:200]!r}, which a forest does not need")
        self.push(GlobalName(full, self._constructors[full]))

    def call(self) -> None:
        args, called = self._pop(), self._pop()
        if not isinstance(called, GlobalName) or called.construct is None or type(args) is not tuple:
            raise RefusedError("a call of something that is no known class")
        self.push(called.construct(args))

    def build(self) -> None:
        state, target = self._pop(), self._top()
        if not isinstance(target, Stateful):
            raise RefusedError("a state for something that has none")
        target.build(state)

    def protocol(self) -> None:
        number = self._number("<B")
        refuse_unless(number <= 5, f"pickle protocol {number}, expected 5 at most")

    def frame(self) -> None:
        self._number("<Q")  # how far one may read ahead: of no use to a buffered stream

    def long(self) -> None:
        size = self._number("<B")
        refuse_unless(size <= 16, f"a number of {size} bytes")
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
