"""Each mistake in the options of scripts/benchmark.py is answered with one line on stderr, exit code 2 and no file."""

import re
from pathlib import Path

import pytest

from tests.commands.error_line import error_line

CASES = [
    ("ops=5", r"ops must be a list, each entry text, got 5"),
    ("ops=[]", r"ops is empty: give some, or leave it out"),
    (
        "shapes=[1x16x1x16] backends=[chunk] peers=[fla@2x16x1x16]",
        r"peers: fla@2x16x1x16 is fla at a shape that is not in shapes, 1x16x1x16",
    ),
    ("shapes=[1x2x3]", r"a shape is B x T x H x D, .*, got 1x2x3"),
    ("gates=[slow]", r"gates: there is no slow; there are none"),
    ("task=stp", r"task must be one of all, op, step, decode, notes, got 'stp'"),
    ("task=all ops=[kda]", r"ops has no effect with task=all, which measures a fixed set"),
    ("minutes=0", r"minutes must be above 0, got 0"),
    ("task=op minutes=9", r"minutes has no effect without task=all"),
    ("mixers=[kda]", r"mixers has no effect with task=op, which measures op"),
    (
        "task=step ops=[kda]",
        r"ops has no effect with task=step, which measures",
    ),
    ("task=step batches=[2]", r"batches has no effect with task=step, which"),
    ("task=decode steps=20", r"steps has no effect with task=decode"),
    ("task=decode shapes=[1x2]", r"shapes has no effect .*: give batches and"),
    ("task=decode contexts=[9]", r"contexts must be a whole number of 256 or"),
    ("task=step mixers=[kd]", r"mixers: there is no kd; with task=step there"),
    (
        "task=step shapes=[8x2x3]",
        r"a shape is B x T, rows x tokens of a row, .*got 8x2x3",
    ),
    ("task=step steps=15", r"steps must be a multiple of 10, got 15"),
    ("task=step time_limit=0", r"time_limit must be above 0, in seconds"),
    ("task=step packed=[]", r"packed is empty: give some, or leave it out"),
    (
        "task=step check={tmp} steps=20",
        r"steps has no effect beside check, which",
    ),
    ("task=step check={tmp}", r"step_benchmark.json cannot be read as JSON"),
    (
        "task=step models=[tiny] overrides=[model.d_modl=3]",
        r"Could not override 'model.d_modl'. Did you mean d_model",
    ),
    ("task=notes", r"task=notes measures CUDA kernels, and .*; on a CPU, task=op"),
    ("task=notes shapes=[1x2]", r"shapes has no effect with task=notes, which"),
    ("task=decode milliseconds=5", r"milliseconds has no effect with task=decode"),
    ("milliseconds=-1", r"milliseconds must be above 0 and .*, got -1"),
    ("milliseconds=1e30", r"above 0 and at most 600000, got 1e\+30"),
    (
        "replays=[graph]",
        r"replays=\[graph\] needs a GPU, because it replays CUDA graphs",
    ),
]


@pytest.mark.sample(4)
@pytest.mark.parametrize(("arguments", "expected"), CASES)
def test_benchmark(
    arguments: str, expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["device=cpu", f"out={tmp_path}/new", *arguments.format(tmp=tmp_path).split()]
    printed = error_line("benchmark.py", given, monkeypatch, capsys)
    assert re.search(expected, printed), printed
    assert not list(tmp_path.iterdir())
