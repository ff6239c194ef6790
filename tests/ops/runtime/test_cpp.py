"""C++ for the CPU: compiled once, kept on disk, and a reason where it cannot be."""

from __future__ import annotations

import ctypes
import warnings
from pathlib import Path

import pytest
import torch

from lkda.ops.runtime import cpp

SOURCE = """
#include <cstdint>
extern "C" int64_t twice(int64_t n) { return 2 * n; }
extern "C" void add(float* x, int64_t count, double value) { for (int64_t i = 0; i < count; i++) x[i] += value; }
extern "C" int64_t is_null(const float* x) { return x == nullptr; }
"""

needs_compiler = pytest.mark.skipif(cpp.compiler() is None, reason="no C++ compiler")


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LKDA_CACHE", str(tmp_path / "cache"))
    (tmp_path / "small.cpp").write_text(SOURCE)
    return tmp_path / "small.cpp"


def compilations(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    found: list[Path] = []
    compile_ = cpp.Library._compile

    def counted(self: cpp.Library, executable: str, result: Path) -> None:
        found.append(result)
        compile_(self, executable, result)

    monkeypatch.setattr(cpp.Library, "_compile", counted)
    return found


@needs_compiler
def test_it_is_compiled_once_and_called(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = compilations(monkeypatch)
    for _ in range(2):
        library = cpp.Library(source)
        assert library.call("twice", 2**40) == 2**41
        x = torch.ones(3)
        library.call("add", x, 3, 0.5)
        assert x.tolist() == [1.5, 1.5, 1.5]
        assert (library.call("is_null", None), library.call("is_null", x)) == (1, 0)
    assert len(found) == 1
    source.write_text(SOURCE.replace("2 * n", "3 * n"))
    assert cpp.Library(source).call("twice", 2) == 6
    assert len(found) == 2


@needs_compiler
def test_a_damaged_file_is_compiled_again(source: Path, tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cpp.Library, "_compile", lambda _, __, result: result.write_bytes(b"half a file"))
        patch.setattr(cpp.cubin_cache, "warn", lambda error: None)
        assert cpp.Library(source).reason_cannot_run() is not None
    (kept,) = (tmp_path / "cache" / "kernels").glob("*.so")
    assert kept.read_bytes() == b"half a file"
    with pytest.warns(RuntimeWarning, match="cannot be loaded and is compiled again"):
        assert cpp.Library(source).call("twice", 4) == 8
    assert ctypes.CDLL(str(kept))


@needs_compiler
def test_without_a_cache_it_is_compiled_in_every_process(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("LKDA_CACHE", str(tmp_path / "file"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # given once in a process
        assert cpp.Library(source).call("twice", 4) == 8


@needs_compiler
def test_what_does_not_compile_is_a_reason(source: Path) -> None:
    source.write_text("int broken(")
    library = cpp.Library(source)
    assert "small.cpp" in str(library.reason_cannot_run())
    with pytest.raises(RuntimeError, match=r"small\.cpp"):
        library.call("twice", 1)


def test_a_message_in_another_encoding_is_a_reason(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = tmp_path / "broken"
    broken.write_text("#!/bin/sh\nprintf 'no room \\200' >&2\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setattr(cpp, "compiler", lambda: str(broken))
    monkeypatch.setattr(cpp, "_target", cpp._target.__wrapped__)
    assert "no room" in str(cpp.Library(source).reason_cannot_run())


def test_a_missing_compiler_is_a_reason(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpp, "compiler", lambda: None)
    library = cpp.Library(source)
    assert "there is no C++ compiler" in str(library.reason_cannot_run())
    reason = cpp.cpu_only(library, otherwise="chunk")
    assert "use backend='chunk'" in str(reason(torch.device("cpu"), 64, torch.float32))
    assert "are on meta, not on a CPU" in str(reason(torch.device("meta"), 64, torch.float32))
