"""Spoils files in every way that a fuzzer thinks of, and judges what a loader does with them."""

from __future__ import annotations

import copy
import json
import resource
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from lkda.checks import InputError

SECONDS = 10  # a loader of these small files that takes longer hangs
MEMORY = 2**30  # bytes that it may take
# Python's own names of what only code from a file would do.
RUNS_CODE = {"os.system", "os.exec", "os.posix_spawn", "os.fork", "os.remove", "os.rename", "subprocess.Popen"}
_forbidden: list[str] | None = None


def _witness(event: str, arguments: tuple[Any, ...]) -> None:
    if _forbidden is not None and event in RUNS_CODE:
        _forbidden.append(f"{event} {arguments}")


sys.addaudithook(_witness)


def cases(count: int) -> settings:
    """The same cases in every run. A failing case is found again by its `@example`, not by a database of files."""
    quiet = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large]
    return settings(
        max_examples=count,
        deadline=None,
        database=None,
        derandomize=True,
        suppress_health_check=quiet,
        print_blob=False,
    )


@contextmanager
def _limited() -> Iterator[None]:
    """Ends what hangs with an error, and what takes too much memory with a MemoryError."""

    def hangs(signum: int, frame: FrameType | None) -> None:
        raise AssertionError(f"it hangs: more than {SECONDS} seconds")

    with open("/proc/self/statm") as file:
        size = int(file.read().split()[0]) * resource.getpagesize()
    before, handler = resource.getrlimit(resource.RLIMIT_AS), signal.signal(signal.SIGALRM, hangs)
    resource.setrlimit(resource.RLIMIT_AS, (size + MEMORY, before[1]))
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, handler)
        resource.setrlimit(resource.RLIMIT_AS, before)


def loads_or_refuses(load: Callable[[], Any]) -> None:
    """Fails unless `load` returns, or raises an InputError, in time, in little memory, and runs no code."""
    global _forbidden
    _forbidden, message = [], "none"
    try:
        with _limited():
            load()
    except InputError as error:
        message = str(error)
    finally:
        found, _forbidden = _forbidden, None
    assert found == []
    assert message.strip()


# Values that a program did not expect where they stand.
ODD = st.one_of(
    st.none(),
    st.booleans(),
    st.sampled_from([0, -1, 1, 2, 7, 2**31, 2**63, 10**30, -(10**30)]),
    st.integers(-5, 100),
    st.floats(),
    st.sampled_from(["", "kda", "softmax", "../x", "/etc/passwd", "\x00", "é" * 50, "[UNK]", "1e9", "nan"]),
    st.text(max_size=8),
    st.just([]),
    st.just({}),
    st.lists(st.integers(-2, 5), max_size=3),
    st.dictionaries(st.text(max_size=3), st.integers(-2, 5), max_size=3),
)


def _places(value: Any, where: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The places of all values within nested dicts and lists; the first ten of a long list."""
    entries: Any = ()
    if isinstance(value, dict):
        entries = value.items()
    elif isinstance(value, list):
        entries = list(enumerate(value))[:10]
    for key, entry in entries:
        yield (*where, key)
        yield from _places(entry, (*where, key))


@st.composite
def spoilt(draw: st.DrawFn, value: Any, *, odd: st.SearchStrategy[Any] = ODD) -> Any:
    """A nested dict with one to three of its values replaced, removed or added."""
    found = copy.deepcopy(value)
    for _ in range(draw(st.integers(1, 3))):
        places = sorted(_places(found), key=len)
        if not places:
            return found
        *path, last = draw(st.sampled_from(places))
        holder = found
        for key in path:
            holder = holder[key]
        match draw(st.sampled_from(["replace", "remove", "add"])):
            case "remove":
                del holder[last]
            case "add" if isinstance(holder, dict):
                holder[draw(st.text(max_size=5))] = draw(odd)
            case _:
                holder[last] = draw(odd)
    return found


def spoilt_json(text: str) -> st.SearchStrategy[bytes]:
    """JSON with odd values, or with odd bytes."""
    values = spoilt(json.loads(text)).map(lambda value: json.dumps(value, ensure_ascii=False))
    return st.one_of(values.map(lambda made: made.encode("utf-8", "surrogatepass")), spoilt_bytes(text.encode()))


@st.composite
def spoilt_bytes(draw: st.DrawFn, whole: bytes) -> bytes:
    """Bytes that are cut short, or in which some are flipped, removed, repeated or added."""
    found = bytearray(whole)
    for _ in range(draw(st.integers(1, 3))):
        begin = draw(st.integers(0, max(0, len(found) - 1)))
        end = min(len(found), begin + draw(st.sampled_from([1, 2, 8, 100])))
        match draw(st.sampled_from(["flip", "set", "cut", "remove", "repeat", "add"])):
            case "flip" if found:
                found[begin] ^= 1 << draw(st.integers(0, 7))
            case "set":
                found[begin:end] = bytes([draw(st.sampled_from([0, 255, 128, 34, 44, 10]))]) * (end - begin)
            case "cut":
                del found[begin:]
            case "remove":
                del found[begin:end]
            case "repeat":
                found[begin:begin] = found[begin:end] * draw(st.integers(1, 20))
            case _:
                found[begin:begin] = draw(st.binary(max_size=10))
    return bytes(found)
