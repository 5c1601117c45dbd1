"""An ONNX file as a message of bounded size, without its weights and its functions.

Weights are skipped while the file is read, so that its size does not matter. What remains is bounded before
anything parses it, because a few kilobytes of it can stand for gigabytes: fields, their sizes and how deep
they nest, and the nodes that the calls of functions become.
"""

import os
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import onnx
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]  # onnx itself needs it
from onnx import inliner

from qnas.common.errors import ArchError, one_line
from qnas.common.reading import open_regular

VALUE_BYTES = 20_000  # of a tensor's data that are kept; larger ones are weights
_FIELDS = 400_000  # limit for all fields; networks have some 10 to a node
_KEPT_BYTES = 32_000_000  # limit for all fields that are kept
_FIELD_BYTES = 1_000_000  # limit for one of them
_NAME_BYTES = 10_000  # limit for a text
_DEPTH = 40  # limit for messages in messages; a graph inside a node of a graph is three deeper
NODES = 20_000  # limit for the nodes of a graph with its functions written out
_CALLS = 64  # limit for functions that call functions
_VERSIONS = 1_000  # limit for the numbers of versions

_WEIGHTS = (
    *("raw_data", "float_data", "int32_data", "int64_data", "double_data", "uint64_data", "string_data"),
)
# Explanations, and what concerns training only.
_UNREAD = ("doc_string", "metadata_props", "quantization_annotation", "training_info")
_SIZES = {1: 8, 5: 4}  # bytes of the kinds of fields of a fixed size
_VARINT, _DELIMITED = 0, 2

_FunctionKey = tuple[str, str, str]


class _DamagedError(Exception):
    """The file is none of messages, or was cut short."""


class _TooLargeError(Exception):
    """The file exceeds a limit. Its text names the limit."""


def read_model(path: Path) -> onnx.ModelProto:
    """Read an ONNX file without its weights, the functions that it defines written out.

    Raises ArchError where it is no ONNX file, exceeds a limit, has no operators, or has branches or loops.
    """
    model = _parse(path)
    for name, version in (
        ("ir_version", model.ir_version),
        *((o.domain or "ai.onnx", o.version) for o in model.opset_import),
    ):
        if not 0 <= version <= _VERSIONS:
            raise ArchError(f"{path}: not a valid ONNX graph: version {version} of {one_line(name, 60)}")
    if not model.graph.node or not model.opset_import:
        raise ArchError(f"{path}: not an ONNX file, or one without operators")
    functions = {_key(f.domain, f.name, f): f for f in model.functions}
    if len(functions) < len(model.functions):
        raise ArchError(f"{path}: not a valid ONNX graph: two functions of one name")
    called = _count_nodes(path, model.graph, functions)
    del model.functions[:]
    if not called:
        return model
    model.functions.extend(functions[key] for key in called)
    try:
        return inliner.inline_local_functions(model)
    except Exception as error:  # of many types, from C++
        raise ArchError(f"{path}: its functions cannot be written out: {one_line(error)}") from error


def _parse(path: Path) -> onnx.ModelProto:
    try:
        with open_regular(path) as file:
            content = _Skimmer(file).read(onnx.ModelProto.DESCRIPTOR, os.fstat(file.fileno()).st_size)
        model = onnx.ModelProto()
        model.ParseFromString(content)
        return model
    except FileNotFoundError:
        raise ArchError(f"{path}: no such file, expected an ONNX file") from None
    except IsADirectoryError:
        raise ArchError(f"{path}: a folder, expected an ONNX file") from None
    except OSError as error:
        raise ArchError(f"{path}: cannot be read: {error.strerror or one_line(error)}") from error
    except _TooLargeError as error:
        raise ArchError(f"{path}: {error}") from error
    except (_DamagedError, DecodeError) as error:
        raise ArchError(f"{path}: not an ONNX file, or a damaged one") from error


class _Skimmer:
    """Reads a message of protobuf field by field and leaves out what is not needed."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._at = 0
        self._fields = self._kept = 0

    def read(self, message: Any, end: int, depth: int = 0) -> bytes:
        """Return the fields of a message, described by its descriptor, that ends at byte `end`."""
        if depth > _DEPTH:
            raise _TooLargeError(f"messages nested more than {_DEPTH} deep, expected an ONNX file")
        parts: list[bytes] = []
        while self._at < end:
            self._fields += 1
            if self._fields > _FIELDS:
                raise _TooLargeError(f"more than {_FIELDS:,} fields, expected a network of images")
            tag, number = self._varint()
            kind, field = number & 7, message.fields_by_number.get(number >> 3)
            if kind == _DELIMITED:
                _, size = self._varint()
                if size > end - self._at:
                    raise _DamagedError
                content = self._content(field, size, depth)
                if content is not None:
                    parts += tag, _as_varint(len(content)), content
            else:
                content = self._varint()[0] if kind == _VARINT else self._bytes(_SIZES.get(kind))
                if field is not None:
                    parts += tag, content
        if self._at != end:
            raise _DamagedError
        return b"".join(parts)

    def _content(self, field: Any, size: int, depth: int) -> bytes | None:
        """Read the content of a field with a length; None for one that is left out."""
        if field is not None and field.name not in _UNREAD:
            if field.message_type is not None:
                return self.read(field.message_type, self._at + size, depth + 1)
            is_weight = field.containing_type.name == "TensorProto" and field.name in _WEIGHTS
            if not is_weight or (size <= VALUE_BYTES and field.name != "string_data"):
                return self._kept_content(field, size)
        self._file.seek(size, 1)
        self._at += size
        return None

    def _kept_content(self, field: Any, size: int) -> bytes:
        is_text = field.type == field.TYPE_STRING
        if size > (_NAME_BYTES if is_text else _FIELD_BYTES):
            raise _TooLargeError(f"`{field.name}` of {size:,} bytes, expected an ONNX file")
        self._kept += size
        if self._kept > _KEPT_BYTES:
            raise _TooLargeError(f"more than {_KEPT_BYTES:,} bytes besides its weights")
        content = self._bytes(size)
        if is_text:
            try:
                content.decode()
            except UnicodeDecodeError as error:
                raise _DamagedError from error
        return content

    def _bytes(self, size: int | None) -> bytes:
        if size is None:
            raise _DamagedError
        content = self._file.read(size)
        if len(content) != size:
            raise _DamagedError
        self._at += size
        return content

    def _varint(self) -> tuple[bytes, int]:
        """Read a number of a variable length of at most ten bytes; return its bytes too."""
        first = self._bytes(1)
        value = first[0] & 0x7F
        if first[0] < 0x80:
            return first, value
        read = bytearray(first)
        while len(read) < 10:
            (byte,) = self._bytes(1)
            read.append(byte)
            value |= (byte & 0x7F) << (7 * (len(read) - 1))
            if byte < 0x80:
                return bytes(read), value
        raise _DamagedError


def _as_varint(number: int) -> bytes:
    encoded = bytearray()
    while number >= 0x80:
        encoded.append(number & 0x7F | 0x80)
        number >>= 7
    encoded.append(number)
    return bytes(encoded)


def _key(domain: str, name: str, owner: onnx.FunctionProto | onnx.NodeProto) -> _FunctionKey:
    # the oldest version of onnx that is supported has no overloads
    return "" if domain == "ai.onnx" else domain, name, getattr(owner, "overload", "")


def _count_nodes(
    path: Path, graph: onnx.GraphProto, functions: Mapping[_FunctionKey, onnx.FunctionProto]
) -> Collection[_FunctionKey]:
    """Return the functions that are called.

    Raises ArchError for branches, and for a graph that is too large once functions are written out.
    """
    known: dict[_FunctionKey, tuple[int, int]] = {}

    def count(nodes: Iterable[onnx.NodeProto], callers: tuple[_FunctionKey, ...]) -> tuple[int, int]:
        """Return the number of nodes and their bytes."""
        total = size = 0
        for node in nodes:
            _check_branches(path, node)
            key = _key(node.domain, node.op_type, node)
            inside, inside_size = 1, node.ByteSize()
            if key in functions:
                if key in callers or len(callers) > _CALLS:
                    raise ArchError(
                        f"{path}: the function {one_line(node.op_type, 60)!r} is not supported: it calls "
                        f"itself, or more than {_CALLS} functions call one another"
                    )
                if key not in known:
                    known[key] = count(functions[key].node, (*callers, key))
                inside, inside_size = known[key]
                # names and attributes of the call can get into each node of the function
                inside_size += functions[key].ByteSize() + inside * node.ByteSize()
            total, size = total + inside, size + inside_size
            if total > NODES or size > _KEPT_BYTES:
                raise ArchError(
                    f"{path}: more than {NODES:,} nodes, or {_KEPT_BYTES:,} bytes of them, with its "
                    "functions written out: expected a network of images"
                )
        return total, size

    count(graph.node, ())
    return known


def _check_branches(path: Path, node: onnx.NodeProto) -> None:
    kinds = onnx.AttributeProto.GRAPH, onnx.AttributeProto.GRAPHS
    if any(attribute.type in kinds or attribute.HasField("g") for attribute in node.attribute):
        raise ArchError(
            f"{path}: {one_line(node.op_type, 60)} {one_line(node.name or 'without a name', 60)!r} is not "
            "supported: expected a network without branches and loops, whose operators always run"
        )
