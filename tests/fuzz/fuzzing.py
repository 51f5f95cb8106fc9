"""What fuzzing tests share: how many examples, bounds on time and memory of each, and mutations of bytes and trees.

Examples are derandomised: the same run finds the same faults. `ESC_ARCH_LONG=1` runs thousands in place of tens;
`ESC_ARCH_FUZZ_SECONDS=S` new ones, of pytest's `--hypothesis-seed`, for S seconds in each test.
"""

from __future__ import annotations

import os
import resource
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from esc_arch.errors import UserError

LONG = os.environ.get("ESC_ARCH_LONG") == "1"
SECONDS = float(os.environ.get("ESC_ARCH_FUZZ_SECONDS", 0))
#: What one example may take before it counts as hanging, many times what the slowest takes on a busy machine.
HANGS_AFTER = 60
#: Address space that one example may add; a header that lies about sizes asks for more.
MEMORY = 1 << 30

INTERESTING = (0, 1, 2, 7, 8, 16, 127, 128, 255, 256, 32767, 65535, 2**31 - 1, 2**31, 2**32 - 1, 2**63 - 1, 2**64 - 1)
TEXTS = ("", " ", "x", "~", "None", "../..", "a\0b", "é𝕏\u202e", "\ud800", "{}", "{0}", "%s", "a" * 3000, "-1", "1e999")


_end = 0.0  # of the test that runs


class TimeIsOver(BaseException):
    """No further example is to begin. (Hypothesis takes an Exception for a fault.)"""


class Hang(BaseException):
    """An example did not end. (No Exception, as code may swallow those.)"""


def fuzz(short: int, long: int) -> Callable[[Callable[[], None]], Callable[[], None]]:
    """Settings of a test with so many examples, or as many as its seconds allow."""
    chosen = settings(
        max_examples=1_000_000 if SECONDS else long if LONG else short,
        derandomize=not SECONDS,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )

    def decorate(test: Callable[[], None]) -> Callable[[], None]:
        def run() -> None:
            with suppress(TimeIsOver):
                chosen(test)()

        return run

    return decorate


class Tally:
    """What became of the examples of a test; it would be no test if all were refused, or none."""

    def __init__(self) -> None:
        global _end
        _end = time.monotonic() + SECONDS
        self.counts: Counter[str] = Counter()
        self.seconds = 0.0

    @contextmanager
    def example(self) -> Iterator[None]:
        """Runs an example: it may end in a UserError with one message, and in nothing else."""
        start = time.monotonic()
        if SECONDS and start > _end:
            raise TimeIsOver
        try:
            with bounded():
                yield
        except UserError as error:
            assert str(error).strip()
            assert "Traceback (most recent call last)" not in str(error)
            self.counts["refused"] += 1
        else:
            self.counts["accepted"] += 1
        self.seconds = max(self.seconds, time.monotonic() - start)

    def check(self, name: str) -> None:
        """To be called when all are done; `pytest -s` shows it."""
        print(f"\n{name}: {dict(self.counts)}, the slowest {self.seconds:.1f} s")
        assert self.counts["refused"] > 0
        assert self.counts["accepted"] > 0


@contextmanager
def bounded() -> Iterator[None]:
    """No more time and memory than `HANGS_AFTER` and `MEMORY`."""

    def stop(*_: object) -> None:
        raise Hang(f"not done after {HANGS_AFTER} s")

    handler = signal.signal(signal.SIGALRM, stop)
    left, _ = signal.setitimer(signal.ITIMER_REAL, HANGS_AFTER)  # pytest-timeout's
    start = time.monotonic()
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (address_space() + MEMORY, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
        signal.setitimer(signal.ITIMER_REAL, max(left - (time.monotonic() - start), 1) if left else 0)
        signal.signal(signal.SIGALRM, handler)


def address_space() -> int:
    """Bytes of address space that this process has."""
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[0]) * resource.getpagesize()


@st.composite
def mutated(draw: st.DrawFn, sources: list[bytes], most: int = 6) -> bytes:
    """One of the sources with a few bytes changed, put in, taken out or repeated, mostly where headers are; or none."""
    data = bytearray(draw(st.sampled_from(sources)))
    for _ in range(draw(st.integers(0, most))):
        if not data:
            break
        last = len(data) - 1
        at = draw(
            st.one_of(st.integers(0, min(last, 160)), st.integers(max(0, last - 300), last), st.integers(0, last))
        )
        kind = draw(st.sampled_from(("flip", "number", "cut", "repeat", "insert", "end", "zero")))
        if kind == "flip":
            data[at] ^= 1 << draw(st.integers(0, 7))
        elif kind == "number":
            size, order = draw(st.sampled_from((1, 2, 4, 8))), draw(st.sampled_from(("little", "big")))
            number = draw(st.sampled_from(INTERESTING)) % 256**size
            data[at : at + size] = number.to_bytes(size, order)  # type: ignore[arg-type]
        elif kind == "insert":
            data[at:at] = draw(st.binary(min_size=1, max_size=8))
        elif kind == "end":
            del data[at:]
        else:
            length = draw(st.sampled_from((1, 2, 4, 16, 64, 400)))
            part = data[at : at + length]
            data[at : at + length] = {"cut": b"", "repeat": part * 2, "zero": bytes(len(part))}[kind]
    return bytes(data)


def places(tree: Any) -> list[tuple[Any, Any]]:
    """Every (container, key) of a tree of mappings and lists."""
    found: list[tuple[Any, Any]] = []
    waiting, seen = [tree], set()
    while waiting:
        node = waiting.pop()
        if id(node) in seen:  # one list may be in many places, or within itself
            continue
        seen.add(id(node))
        for key in list(node) if isinstance(node, dict) else range(len(node)):
            found.append((node, key))
            if isinstance(node[key], dict | list):
                waiting.append(node[key])
    return found


def mutate_tree(draw: st.DrawFn, tree: Any, values: list[Any], most: int = 3) -> None:
    """Delete, rename, replace, copy or nest a few entries of a tree of mappings and lists, in place; or none."""
    for _ in range(draw(st.integers(0, most))):
        where = places(tree)
        if not where:
            break
        node, key = draw(st.sampled_from(where))
        kind = draw(st.sampled_from(("delete", "rename", "replace", "replace", "replace", "copy", "nest")))
        if kind == "delete":
            del node[key]
        elif kind == "replace":
            node[key] = _copied(draw(st.sampled_from(values)), {})  # later mutations may change it
        elif kind == "copy":
            other, place = draw(st.sampled_from(where))
            if isinstance(other, dict) or place < len(other):
                other[place] = _copied(node[key], {})
        elif kind == "nest":
            node[key] = draw(st.sampled_from(([node[key]], {"type": node[key]}, {str(key): node[key]})))
        elif isinstance(node, dict):
            name = draw(st.sampled_from((f"{key}s", str(key)[:-1], str(key).upper(), draw(st.sampled_from(TEXTS)), 7)))
            node[name] = node.pop(key)


def _copied(value: Any, copies: dict[int, Any]) -> Any:
    """A tree with mappings and lists of its own; one that is in several places is so in the copy."""
    if not isinstance(value, dict | list):
        return value  # not all tensors can be copied
    if id(value) not in copies:
        copies[id(value)] = copy = type(value)()
        if isinstance(value, dict):
            copy.update((key, _copied(entry, copies)) for key, entry in value.items())
        else:
            copy.extend(_copied(entry, copies) for entry in value)
    return copies[id(value)]
