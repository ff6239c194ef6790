"""Files are written whole or not at all, whatever goes wrong meanwhile."""

import errno
import os
from pathlib import Path

import pytest

from lkda.io import check_output_file, replacing, write_atomically


def full(*_: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_full_disk_leaves_the_old_file_alone_and_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "result.json"
    write_atomically(path, "old")
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left on device") as caught:
        write_atomically(path, "new")
    assert caught.value.filename == str(path)
    assert [(file.name, file.read_text()) for file in tmp_path.iterdir()] == [("result.json", "old")]


def test_an_error_of_the_writer_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(TypeError), replacing(tmp_path / "result.json") as file:
        file.write("text, where bytes belong")  # type: ignore[arg-type]
    assert not list(tmp_path.iterdir())


def test_where_a_result_can_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    check_output_file(tmp_path / "new" / "folder" / "result.json", option="out")
    for place, reason in ((tmp_path, "is a directory"), (tmp_path / "file" / "result.json", "Not a directory")):
        with pytest.raises(ValueError, match=f"out={place} .*{reason}"):
            check_output_file(place, option="out")
    with pytest.raises(ValueError, match="cannot be written"):
        check_output_file(Path("/proc/result.json"), option="out")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
