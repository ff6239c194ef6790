"""A benchmark on a CPU: every combination has a row, and a row says what it measured or why it did not."""

import json
from types import SimpleNamespace

import pytest
import torch

from lkda.bench import measure, ops, timing
from lkda.bench.op_benchmark import Shape
from lkda.commands.benchmark import benchmark
from lkda.device import device_name
from tests.commands.small import composed

CPU = torch.device("cpu")
SDPA = "softmax attention (SDPA)"


def rows(op="simplified", **changes):
    words = {"dtypes": ["fp32"], "backends": ["chunk"], "peers": [], "modes": ["fwd"], "replays": ["eager"]} | changes
    cases = measure.cases([ops.find(op)], [Shape(1, 70, 2, 32)], **words)
    return list(measure.measure(cases, CPU, copy_speed=10.0, milliseconds=2))


def test_a_row_has_time_share_of_the_lower_bound_and_error():
    (row,) = rows()
    moved = 4 * (4 * 70 * 2 * 32) + 4 * 70 * 2  # q, k, v and o in float32, a decay per head and token
    assert row["lower_bound_ms"] == pytest.approx(moved / 10e9 * 1e3)
    assert row["ms_p20"] <= row["ms_median"] <= row["ms_p80"]
    assert row["fraction_of_lower_bound"] == pytest.approx(row["lower_bound_ms"] / row["ms_median"])
    assert row["gb_per_s"] == pytest.approx(moved / row["ms_median"] / 1e6)
    assert 0 < row["error"] < 1e-5


def test_forward_and_backward_tells_the_error_of_every_gradient():
    (row,) = rows(modes=["fwd+bwd"], backends=["recurrent"])
    assert set(row["errors"]) == {"o", "dq", "dk", "dv", "ddecay"}
    assert row["error"] == max(row["errors"].values())
    assert 0 < row["error"] < 1e-4


def test_kda_is_measured_at_slow_and_fast_gates_beside_softmax():
    found = rows("kda", modes=["fwd", "fwd+bwd"], peers=["sdpa"])
    assert [(row["gate"], row["backend"] or row["peer"], row["mode"]) for row in found] == [
        (gate, name, mode) for gate in ("slow", "fast") for name in ("chunk", SDPA) for mode in ("fwd", "fwd+bwd")
    ]
    assert all(row["ms_median"] for row in found)
    moved = 4 * (5 * 70 * 2 * 32) + 4 * 70 * 2  # q, k, v, o and g in float32, a beta per head and token
    assert found[0]["lower_bound_ms"] == pytest.approx(moved / 10e9 * 1e3)
    for row in found:
        beside = {"dq", "dk", "dv", "dg", "dbeta"} if row["mode"] == "fwd+bwd" else {"final_state"}
        assert set(row["errors"]) == ({"o", *beside} if row["backend"] else set())
        assert row["error"] < 1e-5 if row["backend"] else row["error"] is None


@pytest.mark.parametrize(
    ("op", "backends", "parameters"),
    [
        ("kda_layer", ["chunk"], {"dq_conv", "dk_conv", "dv_conv", "dA_log", "ddt_bias"}),
        ("short_conv", ["torch"], {"dq_conv", "dk_conv", "dv_conv"}),
        ("gated_norm", ["torch"], set()),
        ("kda_gate", ["torch"], {"dA_log", "ddt_bias"}),
    ],
)
def test_the_layer_and_its_pieces_tell_errors_of_inputs_and_parameters(op, backends, parameters):
    found = rows(op, backends=backends, modes=["fwd", "fwd+bwd"])
    assert {row["mode"] for row in found} == {"fwd", "fwd+bwd"}
    for row in found:
        assert row["reason"] is None
        assert row["lower_bound_ms"] > 0
        assert 0 < row["error"] < 1e-4
        assert (parameters <= set(row["errors"])) == (row["mode"] == "fwd+bwd" or not parameters)
        assert "dnorm" not in row["errors"]


def test_a_peer_at_one_shape_and_one_gate_of_two():
    words = {"dtypes": ["fp32"], "backends": ["chunk"], "modes": ["fwd"], "replays": ["eager"]}
    shapes = [Shape(1, 70, 2, 32), Shape(1, 80, 2, 32)]
    found = measure.cases([ops.find("kda")], shapes, **words, peers=["sdpa@1x80x2x32"], gates=["slow"])
    assert [(str(case.shape), case.gate, case.name) for case in found] == [
        ("1x70x2x32", "slow", "chunk"), ("1x80x2x32", "slow", "chunk"), ("1x80x2x32", "slow", SDPA),
    ]  # fmt: skip
    with pytest.raises(ValueError, match="gates: there is no slwo; there are fast, slow"):
        measure.cases([ops.find("kda")], shapes, **words, peers=[], gates=["slwo"])


def test_softmax_is_not_timed_where_it_takes_seconds(monkeypatch):
    monkeypatch.setattr("lkda.bench.ops.kda.LONGEST_SOFTMAX", 64)
    row = rows("kda", backends=[], peers=["sdpa"])[0]
    assert row["ms_median"] is None
    assert "quadratic" in row["reason"]


def test_a_fresh_gate_is_slow():
    drawn = ops.find("kda").inputs(Shape(1, 200, 4, 32), torch.float32, CPU, "slow")
    fast = ops.find("kda").inputs(Shape(1, 200, 4, 32), torch.float32, CPU, "fast")
    assert -0.5 < drawn["g"].median() < 0
    assert fast["g"].median() < -2
    torch.testing.assert_close(drawn["k"].norm(dim=-1), torch.ones(1, 200, 4))


def test_a_wrong_result_shows_as_an_error(monkeypatch):
    benchmark = ops.find("simplified")
    implementation = benchmark.backends["chunk"]
    wrong = type(implementation)(lambda inputs: [1.5 * implementation.run(inputs)[0]])
    monkeypatch.setitem(benchmark.backends, "chunk", wrong)
    (row,) = rows()
    assert row["error"] == pytest.approx(0.5, rel=1e-3)


def test_what_cannot_be_measured_keeps_its_row_and_the_reason():
    found = rows(backends=["cuda", "cuda_baseline", "chunk"], modes=["fwd", "fwd+bwd"], replays=["eager", "graph"])
    reasons = {(row["backend"], row["mode"], row["replay"]): row["reason"] for row in found}
    assert len(reasons) == 12
    assert "not on a CUDA device" in reasons["cuda", "fwd", "eager"]
    assert reasons["cuda_baseline", "fwd+bwd", "eager"] == "no backward"
    assert reasons["chunk", "fwd", "graph"] == "no CUDA graphs on a CPU"
    assert reasons["chunk", "fwd", "eager"] is None


def test_a_peer_that_is_not_installed_keeps_its_row(monkeypatch):
    def missing():
        raise ImportError("No module named 'fla'")

    monkeypatch.setitem(ops.find("simplified").peers, "fla", missing)
    (_, row) = rows(peers=["fla"])
    assert row["peer"] == "fla"
    assert row["ms_median"] is None
    assert "not installed (No module named 'fla')" in row["reason"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"backends": ["chnk"]}, r"backends: there is no chnk; there are chunk, chunk_compiled, cuda"),
        ({"peers": ["flash"]}, r"peers: there is no flash; there are fla"),
        ({"dtypes": ["int8"]}, r"dtypes: there is no int8"),
        ({"modes": ["bwd"]}, r"modes: there is no bwd"),
        ({"replays": ["twice"]}, r"replays: there is no twice"),
    ],
)
def test_an_unknown_word_is_named(changes, message):
    with pytest.raises(ValueError, match=message):
        rows(**changes)


def test_shapes_and_operators_are_read_strictly():
    assert Shape.parse("8x8192x16x64") == Shape(8, 8192, 16, 64)
    for text in ("8x8192x16", "8x8192x16x0", "8,8192,16,64"):
        with pytest.raises(ValueError, match="B x T x H x D"):
            Shape.parse(text)
    with pytest.raises(ValueError, match=r"there is no such benchmark; there are .*simplified"):
        ops.find("convolution")


def test_the_clock_tells_a_slow_call_from_a_quick_one():
    x = torch.randn(400, 400)
    slow = timing.clock(lambda: x @ x @ x @ x, CPU, milliseconds=20)
    quick = timing.clock(lambda: x[0, 0] + 1, CPU, milliseconds=20)
    assert quick.median < slow.median
    assert quick.p20 <= quick.median <= quick.p80


def test_a_slow_call_is_timed_often_enough_to_tell_whether_it_was_disturbed(monkeypatch):
    clock = iter([0.0, *(1.0, 2.0), *(3.0, 8.0), *(9.0, 10.0), 10.0])  # begin, the start and end of each call, end
    monkeypatch.setattr(timing, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
    found = timing.clock(lambda: None, CPU, milliseconds=100)
    assert found.median == pytest.approx(1000)
    assert found.is_noisy


class Timings:
    """A clock that gives these measurements in turn."""

    def __init__(self, *given):
        self.given, self.asked = iter(given), 0

    def __call__(self, call, device, *, milliseconds):
        self.asked += 1
        return next(self.given)


def test_a_noisy_measurement_is_repeated_until_it_is_steady(monkeypatch):
    noisy, steady = timing.Timing(1.0, 0.9, 1.2), timing.Timing(1.0, 0.95, 1.1)
    assert noisy.is_noisy
    assert not steady.is_noisy
    monkeypatch.setattr(timing, "clock", clock := Timings(noisy, noisy, steady, noisy))
    assert timing.steady_clock(lambda: None, CPU) is steady
    assert clock.asked == 3


def test_what_stays_noisy_is_measured_a_few_times_and_marked(monkeypatch):
    quiet, *louder = (timing.Timing(1.0, 0.8, p80) for p80 in (1.3, 2.0, 3.0, 2.0, 4.0))
    monkeypatch.setattr(timing, "clock", clock := Timings(*louder[:2], quiet, *louder[2:]))
    (row,) = rows()
    assert clock.asked == timing.MOST_MEASUREMENTS
    assert (row["ms_median"], row["ms_p20"], row["ms_p80"], row["noisy"]) == (1.0, 0.8, 1.3, True)


def test_a_steady_measurement_is_not_repeated(monkeypatch):
    monkeypatch.setattr(timing, "clock", clock := Timings(timing.Timing(1.0, 1.0, 1.0)))
    (row,) = rows()
    assert clock.asked == 1
    assert row["noisy"] is False


def test_the_command_writes_json_tables_and_plots(tmp_path):
    operators = ("ops=[simplified]", "shapes=[1x64x2x32,1x128x2x32]", "dtypes=[fp32]", "backends=[chunk,cuda]")
    how = ("task=op", "modes=[fwd]", "replays=[eager]", "device=cpu", "milliseconds=2", f"out={tmp_path}")
    benchmark(composed("benchmark", *operators, *how))
    written = json.loads((tmp_path / "benchmark.json").read_text())
    assert written["header"]["device"] == device_name(CPU)
    assert written["header"]["copy_gb_per_s"] > 0
    assert [(row["T"], row["backend"]) for row in written["rows"]] == [
        (64, "chunk"),
        (64, "cuda"),
        (128, "chunk"),
        (128, "cuda"),
    ]
    assert {"benchmark.csv", "table.md", "time_fwd.png"} <= {path.name for path in tmp_path.iterdir()}
