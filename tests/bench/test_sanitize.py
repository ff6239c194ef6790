"""The command that runs compute-sanitizer: its cases, what it reads of the tools' text, and what it refuses."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

from lkda.bench import sanitize, sanitized_cases
from lkda.bench.sanitize import Checked, command, errors_in, judged
from lkda.ops.gated_norm import cuda as gated_norm
from lkda.ops.kda.cuda import gate, plan, recurrent, step, variants
from lkda.ops.runtime.jit import Kernel
from lkda.ops.short_conv import cuda as short_conv

ARCH = "sm_90a"
CLEAN = {"memcheck": "========= ERROR SUMMARY: 0 errors\n"}
CLEAN["racecheck"] = "========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)\n"
TWO = ["layer-64-bf16", "step-64-bf16"]


def done(*names):
    records = (
        json.dumps({"case": name}) + "\n" + json.dumps({"case": name, "seconds": 1.5, "kernels": []}) for name in names
    )
    return "\n".join(records) + "\n"


@pytest.fixture
def launches_do_nothing(monkeypatch):
    """Every launch is recorded and nothing runs, on the CPU."""
    monkeypatch.setattr(Kernel, "__call__", lambda kernel, grid, block, *arguments, device: None)
    monkeypatch.setattr(plan, "architecture", lambda device: ARCH)
    for module in (plan, step, *(m for m in (gate, gated_norm, short_conv) if hasattr(m, "multiprocessors"))):
        monkeypatch.setattr(module, "multiprocessors", lambda device: 132)
    plan._plan.cache_clear()
    yield
    plan._plan.cache_clear()


@pytest.mark.usefixtures("launches_do_nothing")
def test_the_layer_makes_no_product_in_half_precision():
    """Not in its backward either, which autograd runs; afterwards products are as before."""
    device, a = torch.device("cpu"), torch.randn(3, 40).bfloat16()
    plain = a @ a.mT
    with torch.profiler.profile(record_shapes=True) as profile, sanitized_cases.products_in_float32(device):
        rounded = a @ a.mT
    assert "aten::bmm" in {event.name for event in profile.events()}
    assert rounded.dtype == torch.bfloat16
    assert torch.equal(rounded, (a.float() @ a.float().mT).bfloat16())
    assert torch.equal(a @ a.mT, plain)
    with torch.profiler.profile() as profile:
        sanitized_cases.layer(64, torch.bfloat16, device)
    names = [event.name for event in profile.events()]
    assert names.count("aten::bmm") == names.count("aten::mm") > 0


@pytest.mark.usefixtures("launches_do_nothing")
def test_the_cases_launch_every_kernel():
    """Of heads of 64 and 128, for sm_90a: also each part of a sequence, and both kernels of the intra-chunk forward."""
    launched = set()
    for name, case in sanitized_cases.cases().items():
        kernels = sanitized_cases.launched(case, torch.device("cpu"))
        assert kernels, name
        launched |= set(kernels)
    expected = {
        f"{kernel.entry} {kernel.module.source.name} {' '.join(kernel.module.defines)}"
        for module in (variants, recurrent, step)
        for kernel in module.kernels(ARCH)
        if "HEAD_DIM=32" not in kernel.module.defines
    }
    assert expected - launched == set()
    words = {kernel.split()[0] for kernel in launched}
    assert {kernel.entry for m in (gate, gated_norm, short_conv) for kernel in m.kernels(ARCH)} <= words
    assert all(any(part in word for part in sanitize.KERNELS) for word in words)


def test_summaries_are_counted():
    assert errors_in(CLEAN["memcheck"]) == errors_in("text\n" + CLEAN["racecheck"]) == 0
    assert errors_in("========= ERROR SUMMARY: 2 errors\n========= ERROR SUMMARY: 1 error\n") == 3
    assert errors_in("========= RACECHECK SUMMARY: 1 hazard displayed (1 error, 0 warnings)\n") == 1
    assert errors_in("========= RACECHECK SUMMARY: 8 hazards displayed (0 errors, 8 warnings)\n") == 8
    assert errors_in("========= Error: Target application terminated before first instrumented API call\n") is None


@pytest.mark.parametrize("tool", sanitize.TOOLS)
class TestJudgement:
    def test_of_clean_cases(self, tool):
        assert judged(tool, TWO, 0, done(*TWO) + CLEAN[tool]) == [Checked(name, tool, 0, 1.5) for name in TWO]

    def test_of_errors(self, tool):
        text = CLEAN[tool].replace("0", "3", 1)
        assert [x.errors for x in judged(tool, TWO, sanitize.FOUND, done(*TWO) + text)] == [3, 3]

    def test_of_a_case_that_did_not_end(self, tool):
        """The summary says 0 errors, and the process died of something else."""
        first, second = judged(tool, TWO, 1, done(TWO[0]) + "RuntimeError: no memory\n" + CLEAN[tool])
        assert not first.clean
        assert (second.errors, second.seconds) == (None, None)
        assert second.reason == "exit code 1: RuntimeError: no memory"

    def test_of_a_tool_that_did_not_run(self, tool):
        (found,) = judged(tool, TWO[:1], 255, "========= Error: Failed to start\n")
        assert found.reason == f"exit code 255 without a summary of {tool}: ========= Error: Failed to start"


def test_the_command_of_a_tool():
    words = command(Path("compute-sanitizer"), "memcheck", TWO)
    assert words[:3] == ["compute-sanitizer", "--tool", "memcheck"]
    assert words[words.index("--report-api-errors") + 1] == "no"
    assert words[-4:] == ["-m", "lkda.bench.sanitized_cases", *TWO]
    assert "--padding" not in command(Path("compute-sanitizer"), "racecheck", TWO)


@pytest.fixture
def imitation(tmp_path):
    """A program in place of compute-sanitizer that answers as it would; `errors` maps a case to its errors."""

    def write(errors):
        program = tmp_path / "compute-sanitizer"
        lines = [
            f"#!{sys.executable}",
            "import json, sys",
            "tool, errors = sys.argv[sys.argv.index('--tool') + 1], " + repr(errors),
            "names = sys.argv[sys.argv.index('lkda.bench.sanitized_cases') + 1 :]",
            "for name in names:",
            "    print(json.dumps({'case': name}))",
            "    print(json.dumps({'case': name, 'seconds': 0.5, 'kernels': ['kda_gate']}))",
            "found = sum(errors.get(name, 0) for name in names) if tool != 'none' else 0",
            "both = {'memcheck': f'ERROR SUMMARY: {found} errors', 'racecheck': f'RACECHECK SUMMARY: {found} hazards'}",
            "print('=========', both.get(tool, 'no tool'))",
            f"sys.exit({sanitize.FOUND} if found else 0)",
        ]
        program.write_text("\n".join(lines) + "\n")
        program.chmod(0o755)
        return program

    return write


def test_each_case_runs_alone_where_all_together_are_not_clean(imitation, capsys):
    found, _ = sanitize.check(imitation({TWO[1]: 2}), "racecheck", TWO)
    assert [(x.case, x.errors) for x in found] == [(TWO[0], 0), (TWO[1], 2)]
    assert "racecheck: not all cases are clean; each runs again alone" in capsys.readouterr().out
    assert "layer-64-bf16                        racecheck            0      0.5" in sanitize.table(found)


@pytest.mark.parametrize(("errors", "code"), [({}, 0), ({TWO[0]: 1}, 1)])
def test_the_whole_command(imitation, monkeypatch, tmp_path, capsys, errors, code):
    program, out = imitation(errors | {sanitized_cases.PLANTED_FAULT: 1}), tmp_path / "table.json"
    plain = command

    def with_program_instead_of_the_cases(sanitizer, tool, names):
        words = plain(sanitizer, tool, names)
        return [str(program), "--tool", tool, *words] if tool == sanitize.NO_TOOL else words

    monkeypatch.setattr(sanitize, "command", with_program_instead_of_the_cases)
    monkeypatch.setattr(sanitize, "find_sanitizer", lambda: program)
    monkeypatch.setattr(sanitize, "header", lambda device: {"device": "a GPU", "torch": "2"})
    monkeypatch.setattr(sanitize, "sanitizer_version", lambda sanitizer: "1")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(sys, "argv", ["sanitize", "--out", str(out), "--only", *TWO])
    assert sanitize.main() == code
    written = json.loads(out.read_text())
    found = {(row["case"], row["tool"]): row["errors"] for row in written["rows"]}
    assert found == {(name, tool): errors.get(name, 0) for name in TWO for tool in sanitize.TOOLS}
    assert written["kernels"] == {name: ["kda_gate"] for name in TWO}
    assert "memcheck: it finds the planted fault (1 errors)" in capsys.readouterr().out


def test_a_tool_that_misses_the_planted_fault_is_refused(imitation):
    assert sanitize.find_planted_fault(imitation({sanitized_cases.PLANTED_FAULT: 4}), "memcheck") == 4
    with pytest.raises(SystemExit, match="error: memcheck does not find the planted fault"):
        sanitize.find_planted_fault(imitation({}), "memcheck")


class TestRefusals:
    def test_of_a_machine_without_a_gpu(self, monkeypatch):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        monkeypatch.setattr(sys, "argv", ["sanitize"])
        with pytest.raises(SystemExit, match="error: torch sees no CUDA device"):
            sanitize.main()

    def test_of_a_machine_without_the_sanitizer(self, monkeypatch, tmp_path):
        monkeypatch.setenv("PATH", str(tmp_path))
        monkeypatch.setattr(sanitize.os, "access", lambda *_: False)
        with pytest.raises(SystemExit, match="install it with `pip install nvidia-cuda-sanitizer-api`"):
            sanitize.find_sanitizer()

    def test_of_an_unknown_case(self):
        with pytest.raises(SystemExit, match="error: no case has chunky in its name; there are chunked-64-bf16-whole"):
            sanitize.chosen(["chunky"])
        assert sanitize.chosen(["recurrent-64"]) == [f"recurrent-64-{word}" for word in ("bf16", "fp16", "fp32")]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device: compute-sanitizer has nothing to check")
def test_memcheck_finds_the_planted_fault_and_nothing_in_the_layer():
    try:
        sanitizer = sanitize.find_sanitizer()
    except SystemExit as error:
        pytest.skip(str(error))
    assert sanitize.find_planted_fault(sanitizer, "memcheck") > 0
    found, text = sanitize.check(sanitizer, "memcheck", ["layer-64-bf16"])
    assert found[0].clean, text
