"""Mutants of files: what a loader must refuse in one line, or read.

`byte_mutants` and `document_mutants` make reproducible mutants of a good file. `attack` reads them in a
process of its own, with limits of time and memory, and returns what went wrong. The strategies below draw
the same kinds of mutants for hypothesis.
"""

import copy
import json
import math
import multiprocessing
import resource
import signal
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path
from random import Random
from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from qnas.common.errors import QnasError

SECONDS = 5  # of the processor, for one mutant
PATIENCE_SECONDS = (
    60  # by the clock, where a loader waits for something; other programs may take the processor
)
MEMORY_BYTES = 1_000_000_000  # above what the process has at its start
MESSAGE_CHARACTERS = 300  # its path not counted
MUTANTS = 3_000  # of each loader, in the slow tests

# For hypothesis in the fast tests: the same examples in every run, and few of them.
bounded = settings(
    max_examples=60,
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)

DEEP = 5_000  # nested lists
_TOKENS = (
    *(b"\x00", b"\xff", b"\xe4", b"\n", b"\r\n", b'"', b"'", b",", b";", b"{", b"[", b"]", b"}", b":", b"-"),
    *(b"&a", b"*a", b"0", b"-1", b"1e999", b"nan", b"NaN", b"Infinity", b"0x7f", b"null", b"true", b"~"),
    *(b"9" * 50, b"9" * 5000, b"[" * DEEP, b"{" * DEEP, b"!!python/object:os.system x"),
    *(b"2001-99-99", b"1:99:99", b"\xe2\x80\xa8"),
)


def byte_mutants(content: bytes, count: int, *, seed: int = 0) -> Iterator[bytes]:
    """Yield mutants of a file: bytes flipped, cut out, doubled, moved, or replaced by tokens."""
    rng = Random(seed)
    for _ in range(count):
        yield _mutate(content, rng)


def _mutate(content: bytes, rng: Random) -> bytes:
    changed = bytearray(content)
    for _ in range(rng.choice((1, 1, 1, 2, 4, 16))):
        size = len(changed)
        at, length = rng.randint(0, size), rng.choice((1, 2, 4, 8, 64, 1024))
        match rng.randrange(7):
            case 0 if size:
                changed[at % size] ^= 1 << rng.randrange(8)
            case 1 if size:
                changed[at % size] = rng.choice((0, 1, 0x7F, 0x80, 0xFF))
            case 2:
                del changed[at : at + length]
            case 3:
                changed[at:at] = changed[at : at + length]
            case 4:
                changed[at:at] = rng.choice(_TOKENS)
            case 5:
                changed[at : at + rng.choice((0, 1, 8))] = rng.choice(_TOKENS)
            case _:
                del changed[at if rng.random() < 0.3 else size :]
    return bytes(changed)


_VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 1, 3, 2**40, 10**30, -(10**30), 0.5, -0.0, 1e308, math.inf, math.nan),
    *("", "x", "a" * 5000, "\x00", "\u2028", "\ud800", "1", "../../etc", "digits", "imagefolder:/nowhere"),
    *([], {}, [[]], {"a": 1}, [None], [1, "x"], [0] * 3000),
)


def _places(document: Any) -> Iterator[tuple[Any, Any]]:
    """Yield every (container, key) of a document."""
    open_ = [document]
    while open_:
        inside = open_.pop()
        keys = inside if isinstance(inside, dict) else range(len(inside))
        for key in keys:
            yield inside, key
            if isinstance(inside[key], dict | list):
                open_.append(inside[key])


def document_mutants(document: Any, count: int, *, seed: int = 0) -> Iterator[Any]:
    """Yield mutants of a JSON document: values replaced, taken out, copied or nested, and keys renamed."""
    rng = Random(seed)
    for _ in range(count):
        changed = copy.deepcopy(document)
        with suppress(RecursionError):  # of a copy of what is nested deeply
            for _ in range(rng.choice((1, 1, 1, 2, 3))):
                _change(changed, rng)
        yield changed


def _change(document: Any, rng: Random) -> None:
    places = list(_places(document))
    if not places:
        return
    inside, key = rng.choice(places)
    value: Any
    match rng.randrange(6):
        case 0:
            del inside[key]
        case 1 if isinstance(inside, dict):
            inside[f"{key}x"] = inside.pop(key)
        case 1:
            inside.insert(0, inside[key])
        case 2:
            value = copy.deepcopy(rng.choice(places)[0])
            inside[key] = value
        case 3:
            value = []
            for _ in range(rng.choice((3, 70, 900))):
                value = [value]
            inside[key] = value
        case _:
            inside[key] = copy.deepcopy(rng.choice(_VALUES))  # they may be changed in turn


def json_mutants(document: Any, count: int, *, seed: int = 0) -> Iterator[bytes]:
    """Yield mutants of a JSON file, half of the document and half of its bytes."""
    for changed in document_mutants(document, count - count // 2, seed=seed):
        try:
            yield json.dumps(changed).encode(errors="surrogatepass")
        except RecursionError:  # of what is nested twice
            yield b"[" * DEEP + b"]" * DEEP
    yield from byte_mutants(json.dumps(document, indent=2).encode(), count // 2, seed=seed)


def mutated_bytes(content: bytes) -> st.SearchStrategy[bytes]:
    """Draw mutants of a file for hypothesis."""
    return st.integers(0, 2**32).map(lambda seed: next(byte_mutants(content, 1, seed=seed)))


def mutated_documents(document: Any) -> st.SearchStrategy[Any]:
    """Draw mutants of a JSON document for hypothesis."""
    return st.integers(0, 2**32).map(lambda seed: next(document_mutants(document, 1, seed=seed)))


def check_refusal(error: QnasError, path: Path | str = "") -> None:
    """Assert that a refusal is one printable line of at most 300 characters, its path not counted."""
    text = str(error).replace(str(path), "") if str(path) else str(error)
    assert 0 < len(text) <= MESSAGE_CHARACTERS, (len(text), text)
    assert all(character.isprintable() for character in text), repr(text)


def read_or_refuse(load: Callable[[Path], Any], path: Path, content: bytes) -> None:
    """Write a file and load it. Any exception but a short QnasError is passed on."""
    path.write_bytes(content)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            load(path)
        except QnasError as error:
            check_refusal(error, path)


def attack(load: Callable[[Path], Any], path: Path, contents: Iterable[bytes]) -> list[str]:
    """Load every content from `path`, in a process of its own; return a line for each that went wrong.

    Wrong is any exception but a QnasError of one line of at most 300 characters, more time than `SECONDS` for
    one content, more than `MEMORY_BYTES` above the start, and the end of the process. Warnings are ignored.
    """
    wrong: list[str] = []
    todo = list(contents)
    context = multiprocessing.get_context("fork")
    first = 0
    while first < len(todo):
        ours, theirs = context.Pipe(duplex=False)
        worker = context.Process(target=_work, args=(load, path, todo, first, theirs))
        worker.start()
        theirs.close()
        number = first
        try:
            while True:
                number, problem = ours.recv()
                if problem:
                    wrong.append(f"mutant {number}: {problem}")
        except EOFError:
            worker.join()
        if worker.exitcode == 0:
            break
        wrong.append(f"mutant {number}: the process ended with {worker.exitcode}")
        first = number + 1
    return wrong


def _work(
    load: Callable[[Path], Any], path: Path, contents: list[bytes], first: int, pipe: Connection
) -> None:
    def late(*_: object) -> None:
        raise TimeoutError(f"took more than {SECONDS} s of the processor, or {PATIENCE_SECONDS} s")

    signal.signal(signal.SIGALRM, late)
    signal.signal(signal.SIGPROF, late)
    has_now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (has_now + MEMORY_BYTES, resource.RLIM_INFINITY))
    for number, content in enumerate(contents[first:], first):
        pipe.send((number, ""))
        signal.setitimer(signal.ITIMER_PROF, SECONDS)
        signal.alarm(PATIENCE_SECONDS)
        try:
            read_or_refuse(load, path, content)
        except BaseException as error:  # whatever comes is the finding
            pipe.send((number, f"{type(error).__name__}: {str(error)[:300]!r}"))
        finally:
            signal.setitimer(signal.ITIMER_PROF, 0)
            signal.alarm(0)
    pipe.close()
