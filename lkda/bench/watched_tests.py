"""A plugin of pytest that says which tests ran through lkda's backends of flash-linear-attention (FLA).

It counts the calls of FLA's functions that lkda computed, and those that lkda declined, so that FLA's own code ran.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import wraps
from typing import Any
from unittest.mock import patch

# What can become of a test. A test with one declined call counts as declined, whatever its other calls did.
PASSED, DECLINED, UNCALLED, SKIPPED, FAILED = "passed", "declined", "uncalled", "skipped", "failed"


@dataclass
class Watched:
    """A test.

    Attributes:
        test: its name with its parameters.
        result: passed: lkda computed every call of a function that it replaces. declined: the test passed, and lkda
            declined a call. uncalled: the test passed, and calls none of these functions. skipped or failed: as pytest
            says.
        reason: why it was skipped or failed.
        calls: how often lkda computed each function.
        declined: how often lkda declined a function, for each "function: reason".
        seconds: its time.
    """

    test: str
    result: str = ""
    reason: str = ""
    calls: dict[str, int] = field(default_factory=dict)
    declined: dict[str, int] = field(default_factory=dict)
    seconds: float = 0.0


class Watch:
    """The plugin. `results` has the tests that are done; `on_result` is called after each.

    Args:
        backends: the classes that are registered with FLA.
    """

    def __init__(self, backends: Sequence[type], on_result: Callable[[], None]) -> None:
        self.results: list[Watched] = []
        self._backends, self._on_result = backends, on_result
        self._test = Watched("")  # takes what is called outside of tests

    @contextmanager
    def counting(self) -> Iterator[None]:
        """Within it calls are counted. FLA asks `verify` whether a backend takes a call, then for its function."""
        with ExitStack() as stack:
            for backend in self._backends:
                stack.enter_context(patch.object(backend, "verify", self._verify(backend)))
                stack.enter_context(patch.object(backend, "get_implementation", self._implementation(backend)))
            yield

    def _verify(self, backend: Any) -> Callable[..., Any]:
        original = backend.verify

        @wraps(original)
        def verify(backend: Any, function: str, *args: Any, **kwargs: Any) -> tuple[bool, str | None]:
            accepted, reason = original(backend, function, *args, **kwargs)
            if not accepted:
                _add_one(self._test.declined, f"{function}: {reason}")
            return accepted, reason

        return verify

    def _implementation(self, backend: Any) -> Callable[..., Any]:
        original = backend.get_implementation

        @wraps(original)
        def get_implementation(backend: Any, function: str) -> Callable[..., Any] | None:
            run = original(backend, function)
            if run is None:  # for functions that lkda does not replace FLA asks too
                return None

            @wraps(run)
            def counted(*args: Any, **kwargs: Any) -> Any:
                _add_one(self._test.calls, function)
                return run(*args, **kwargs)

            return counted

        return get_implementation

    # The functions below have pytest's names.

    def pytest_collectreport(self, report: Any) -> None:
        """A file that cannot be imported, or is skipped as a whole, counts as a test."""
        if report.outcome != PASSED:
            self._done(Watched(report.nodeid.rpartition("/")[2], report.outcome, _reason(report)))

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self._test = Watched(nodeid.partition("::")[2])

    def pytest_runtest_logreport(self, report: Any) -> None:
        """Comes for the set-up, the test and the tear-down."""
        test = self._test
        test.seconds += report.duration
        if report.outcome != PASSED and test.result != FAILED:
            test.result, test.reason = report.outcome, _reason(report)

    def pytest_runtest_logfinish(self) -> None:
        test, self._test = self._test, Watched("")
        test.result = test.result or (DECLINED if test.declined else PASSED if test.calls else UNCALLED)
        self._done(test)

    def _done(self, test: Watched) -> None:
        self.results.append(test)
        self._on_result()


def _add_one(counts: dict[str, int], name: str) -> None:
    counts[name] = counts.get(name, 0) + 1


def _reason(report: Any) -> str:
    """In one line why a test was skipped or failed."""
    told = report.longrepr
    if getattr(report, "wasxfail", None) is not None:
        return f"expected to fail: {report.wasxfail}"
    if isinstance(told, tuple):  # (file, line, why it was skipped)
        return str(told[2]).removeprefix("Skipped: ")
    crash = getattr(told, "reprcrash", None)
    lines = str(told).splitlines() if crash is None else crash.message.splitlines()[:1]
    return lines[-1].removeprefix("E ").strip() if lines else ""


def counts(results: Sequence[Watched]) -> list[dict[str, Any]]:
    """For each test function how many of its tests have each result, and a last row with the sums.

    Returns: rows of columns `test`, `tests`, `passed`, `declined`, `uncalled`, `skipped` and `failed`.
    """
    functions: dict[str, list[Watched]] = {}
    for test in results:
        functions.setdefault(f"`{test.test.partition('[')[0]}`", []).append(test)
    functions["all"] = list(results)
    names = (PASSED, DECLINED, UNCALLED, SKIPPED, FAILED)
    return [
        {"test": function, "tests": len(tests)} | {name: sum(test.result == name for test in tests) for name in names}
        for function, tests in functions.items()
    ]


def summary(results: Sequence[Watched]) -> str:
    """How many tests have each result, and the names of those that did not run through lkda."""

    def having(result: str) -> list[Watched]:
        return [test for test in results if test.result == result]

    lines = [f"{len(having(PASSED))} passed through lkda"]
    lines.append(f"{len(having(DECLINED))} passed with a call that lkda declined, so that FLA's own code ran")
    lines += [f"  {test.test}: {'; '.join(test.declined)}" for test in having(DECLINED)]
    lines.append(f"{len(having(UNCALLED))} passed without a call of a function that lkda replaces")
    lines += [f"  {test.test}" for test in having(UNCALLED)]
    for result in (SKIPPED, FAILED):
        lines.append(f"{len(having(result))} {result}")
        lines += [f"  {test.test}: {test.reason}{_computed(test)}" for test in having(result)]
    return "\n".join(lines)


def _computed(test: Watched) -> str:
    """For a failed test, whose code ran."""
    if test.result != FAILED:
        return ""
    return f" (lkda computed {sum(test.calls.values())} calls and declined {sum(test.declined.values())})"
