"""The command that runs FLA's own tests: what it counts, writes and refuses. Neither FLA nor a GPU is needed here."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from types import SimpleNamespace

import pytest

from lkda.bench import fla_tests
from lkda.bench.fla_tests import check_source, fetch, run
from lkda.integrations import fla

# The stand-in for FLA's tests. `stand_in_of_fla.attend(x)` calls a backend as FLA's registry does.
TESTS = """
import pytest
from stand_in_of_fla import attend

@pytest.fixture
def broken():
    yield
    raise RuntimeError("of the tear-down")

@pytest.mark.parametrize("x", [1, 2])
def test_computed(x):
    assert attend(x) == attend(x) == 10 * x

def test_declined():
    assert attend(3) == 30
    assert attend(-1) == attend(-2) == "FLA"

def test_naive():
    pass

def test_of_another_function():
    assert attend(1, "gate") == "FLA"

@pytest.mark.skip(reason="needs an NPU")
def test_skipped():
    pass

@pytest.mark.xfail(reason="known")
def test_expected():
    raise ValueError

def test_wrong():
    assert attend(1) == 2, "ratio: 0.7"

def test_wrong_in_flas_code():
    assert attend(-1) == 2

def test_torn_down(broken):
    attend(1)
"""


class Backend:
    """As a backend of FLA: takes positive numbers, and replaces the function `attend` alone."""

    def verify(self, function, x):
        return (x > 0, None if x > 0 else "lkda takes positive numbers")

    def get_implementation(self, function):
        return {"attend": lambda x: 10 * x}.get(function)


def attend(x, function="attend"):
    backend = Backend()
    accepted, _ = backend.verify(function, x)
    implementation = backend.get_implementation(function) if accepted else None
    return "FLA" if implementation is None else implementation(x)


@pytest.fixture
def source(tmp_path, monkeypatch):
    """A checkout of FLA 0.6.0, whose tests are those above."""
    monkeypatch.setitem(sys.modules, "stand_in_of_fla", SimpleNamespace(attend=attend))
    folder = tmp_path / "flash-linear-attention"
    (folder / "tests" / "ops").mkdir(parents=True)
    (folder / "tests" / "ops" / "test_kda.py").write_text(TESTS)
    (folder / "fla").mkdir()
    (folder / "fla" / "__init__.py").write_text('__version__ = "0.6.0"\n')
    # It would find fla in the checkout, and none is there.
    (folder / "pyproject.toml").write_text('[tool.pytest.ini_options]\naddopts = "--no-such-option"\n')
    yield folder
    for name in [name for name in sys.modules if name.startswith(folder.name)]:
        del sys.modules[name]


@pytest.fixture
def call(source, tmp_path, monkeypatch, capsys):
    """Calls the command as on a GPU. Returns its exit status, what it printed at the end, and its file."""
    out = tmp_path / "made" / "fla.json"
    monkeypatch.setattr(fla_tests.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(fla_tests.torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(
        fla_tests,
        "header",
        lambda device: {"device": "a GPU", "torch": "2.11", "date": "2026-11-30T09:00", "versions": {}},
    )
    monkeypatch.setattr(fla_tests, "registered_backends", lambda: [Backend])
    monkeypatch.setitem(sys.modules, "fla", SimpleNamespace(__version__="0.6.0"))

    def call(*words, source=source):
        monkeypatch.setattr(
            sys, "argv", ["", "--out", str(out), *(["--source", str(source)] if source else []), *words]
        )
        status = fla_tests.main()
        _, _, told = capsys.readouterr().out.partition("FLA 0.6.0, tests of ")
        return status, told, json.loads(out.read_text())

    return call


def test_every_test_is_told_by_name_and_the_file_has_all_of_it(call, monkeypatch):
    monkeypatch.setenv("FLA_CI_ENV", "0")
    status, told, found = call()
    assert status == 1
    assert told == (
        "0.6.0, a GPU:\n"
        "2 passed through lkda\n"
        "1 passed with a call that lkda declined, so that FLA's own code ran\n"
        "  test_declined: attend: lkda takes positive numbers\n"
        "2 passed without a call of a function that lkda replaces\n"
        "  test_naive\n"
        "  test_of_another_function\n"
        "2 skipped\n"
        "  test_skipped: needs an NPU\n"
        "  test_expected: expected to fail: known\n"
        "3 failed\n"
        "  test_wrong: AssertionError: ratio: 0.7 (lkda computed 1 calls and declined 0)\n"
        "  test_wrong_in_flas_code: AssertionError: assert 'FLA' == 2 (lkda computed 0 calls and declined 1)\n"
        "  test_torn_down: RuntimeError: of the tear-down (lkda computed 1 calls and declined 0)\n"
    )
    rows = {row["test"]: row for row in found["results"]}
    assert rows["test_computed[2]"]["calls"] == {"attend": 2}
    assert rows["test_declined"]["calls"] == {"attend": 1}
    assert rows["test_declined"]["declined"] == {"attend: lkda takes positive numbers": 2}
    assert len(rows) == 10
    kinds = {"tests": 2, "passed": 2, "declined": 0, "uncalled": 0, "skipped": 0, "failed": 0}
    assert found["rows"][0] == {"test": "`test_computed`"} | kinds
    assert found["rows"][-1] == {"test": "all", "tests": 10} | {
        "passed": 2,
        "declined": 1,
        "uncalled": 2,
        "skipped": 2,
        "failed": 3,
    }
    assert found["note"] == "FLA 0.6.0, tests of version 0.6.0, a GPU, torch 2.11, 2026-11-30."
    assert (found["finished"], found["header"]["device"]) == (True, "a GPU")
    assert (found["tests"]["version"], found["tests"]["installed"]) == ("0.6.0", "0.6.0")
    assert found["tests"]["sha256"] == hashlib.sha256(TESTS.encode()).hexdigest()
    assert found["environment"]["FLA_CI_ENV"] == "0"
    assert set(found["header"]["versions"]) == {"flash-linear-attention", "pytest"}


@pytest.mark.parametrize(("select", "status"), [("computed or naive or skipped", 0), ("naive or test_declined", 1)])
def test_the_status_is_0_where_some_passed_through_lkda_and_none_failed(select, status, call):
    found = call("-k", select)
    assert found[0] == status
    assert "0 failed\n" in found[1]
    assert found[2]["tests"]["select"] == select


def test_backends_are_as_before(source):
    before = vars(Backend).copy()
    run(source, [Backend], lambda results: None, select="computed")
    assert vars(Backend) == before


def test_the_file_is_written_after_each_test(source):
    lengths = []
    run(source, [Backend], lambda results: lengths.append(len(results)), select="computed or naive")
    assert lengths == [1, 2, 3]


def test_no_test_is_said(call):
    status, told, found = call("-k", "no_such")
    assert (status, found["finished"], found["results"], found["rows"][0]["tests"]) == (1, False, [], 0)
    assert found["note"].endswith(" The command was stopped before the last test.")
    assert told.endswith("pytest ended with the status 5, so that not all tests ran.\n")


def test_a_file_that_cannot_be_imported_is_a_failure(call, source):
    (source / fla_tests.TESTS).write_text("import no_such_package\n")
    status, told, _ = call()
    assert status == 1
    assert "1 failed\n  test_kda.py: ModuleNotFoundError: No module named 'no_such_package'" in told


class TestRefused:
    @staticmethod
    def error(call, *words, **options):
        with pytest.raises(SystemExit) as caught:
            call(*words, **options)
        message = str(caught.value)
        assert message.startswith("error: ")
        assert "\n" not in message
        return message

    def test_no_gpu(self, call, monkeypatch):
        monkeypatch.setattr(fla_tests.torch.cuda, "is_available", lambda: False)
        assert "need a GPU, and torch sees no CUDA device." in self.error(call)

    def test_no_fla(self, call, monkeypatch):
        monkeypatch.setattr(fla_tests, "registered_backends", fla.register)
        monkeypatch.setitem(sys.modules, "fla.backends", None)
        assert "needs flash-linear-attention 0.6 or later" in self.error(call)

    def test_no_pytest(self, call, monkeypatch):
        monkeypatch.setitem(sys.modules, "pytest", None)
        assert "need pytest, which could not be imported" in self.error(call)

    def test_no_source(self, call, tmp_path):
        assert f"--source={tmp_path} has no tests/ops/test_kda.py; give" in self.error(call, source=tmp_path)

    def test_a_source_without_a_version(self, call, source):
        (source / "fla" / "__init__.py").unlink()
        assert "has no fla/__init__.py; give a checkout" in self.error(call)

    def test_another_version(self, call, monkeypatch):
        monkeypatch.setitem(sys.modules, "fla", SimpleNamespace(__version__="0.6.1"))
        assert "is FLA 0.6.0, and FLA 0.6.1 is installed; give the source" in self.error(call)

    def test_a_file_that_cannot_be_written(self, call, tmp_path):
        assert f"--out={tmp_path} is a directory" in self.error(call, "--out", str(tmp_path))


def test_another_version_on_request(call, source):
    (source / "fla" / "__init__.py").write_text("__version__ = '0.5.2'\n")
    assert check_source(source, "0.6.0", any_version=True) == "0.5.2"
    status, told, found = call("--any-version", "-k", "computed")
    assert (status, found["tests"]["version"], found["tests"]["installed"]) == (0, "0.5.2", "0.6.0")
    assert told.startswith("0.5.2, a GPU:\n2 passed through lkda")


class TestFetch:
    @pytest.fixture
    def repository(self, source, monkeypatch):
        """The checkout as a git repository with the tag v0.6.0."""
        for words in (
            ("init", "--quiet"),
            ("add", "."),
            ("-c", "user.name=a", "-c", "user.email=a@b", "commit", "--quiet", "-m", "a"),
            ("tag", "v0.6.0"),
        ):
            subprocess.run(["git", *words], cwd=source, check=True)
        monkeypatch.setattr(fla_tests, "REPOSITORY", source.as_uri())

    @pytest.mark.usefixtures("repository")
    def test_the_tag_of_the_installed_version_is_fetched(self, call):
        status, told, _ = call("-k", "computed", source=None)
        assert (status, told.startswith("0.6.0, a GPU:\n2 passed through lkda")) == (0, True)

    @pytest.mark.usefixtures("repository")
    def test_a_tag_that_is_not_there(self, tmp_path):
        with pytest.raises(ValueError, match=r"could not be fetched from .*, tag v9 \(.*v9.*\); give a checkout"):
            fetch("9", tmp_path / "new")

    def test_no_git(self, tmp_path, monkeypatch):
        monkeypatch.setenv("PATH", str(tmp_path))
        with pytest.raises(ValueError, match=r"\(git is not installed\)"):
            fetch("0.6.0", tmp_path / "new")

    def test_a_slow_line(self, tmp_path, monkeypatch):
        def slow(command, **options):
            raise subprocess.TimeoutExpired(command, options["timeout"])

        monkeypatch.setattr(fla_tests.subprocess, "run", slow)
        with pytest.raises(ValueError, match=r"\(not done after 600 s\)"):
            fetch("0.6.0", tmp_path / "new")
