"""Measurements, crossings, the Pareto front, and the answers on the page."""

from __future__ import annotations

import csv
import json
import math
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest

from lkda.checks import InputError
from lkda.report.draw.page import Section
from lkda.report.draw.style import LIGHT
from lkda.report.read.crossings import crossings
from lkda.report.read.groups import group_runs
from lkda.report.read.runs import read_runs
from lkda.report.tradeoff import answers, host_bound, records
from lkda.report.tradeoff.crossings import pairs, rounded
from lkda.report.tradeoff.glossary import glossary
from lkda.report.tradeoff.measurements import find_results, measurements
from lkda.report.tradeoff.repeat import how_to_repeat
from lkda.report.tradeoff.report import Tradeoff
from lkda.report.tradeoff.speed_plot import accuracy_by_speed
from lkda.report.training.comparison import compare
from tests.report.conftest import bench_row, write_run
from tests.report.tradeoff.conftest import decode_row, step_row, write_results


@pytest.fixture(scope="module")
def joined(bench, runs, tmp_path_factory):
    """The directory of a comparison of runs of the model tiny, joined with the benchmarks."""
    home = tmp_path_factory.mktemp("joined")
    tiny = [
        write_run(home / f"{mixer}_{s}", mixer, seed=s, model="tiny") for mixer in ("kda", "softmax") for s in (0, 1)
    ]
    result = compare(tiny, home / "out", title="Joined", benchmarks=[bench])
    return result, home / "out"


@pytest.mark.parametrize(
    ("one", "other", "expected"),
    [
        ([(1, 1), (4, 4)], [(1, 2), (4, 2)], [(2, 2, True)]),
        ([(1, 2), (4, 2)], [(1, 1), (4, 4)], [(2, 2, False)]),
        ([(1, 1), (4, 4)], [(1, 2), (4, 8)], []),
        ([(1, 1), (4, 2), (16, 3)], [(1, 2), (4, 2), (16, 4)], []),  # they touch
        ([(1, 1), (4, 4)], [(2, 2)], []),  # no context in common
        ([(1, 1), (4, 4), (16, 1)], [(1, 2), (4, 2), (16, 2)], [(2, 2, True), (8, 2, False)]),
    ],
)
def test_curves_cross_where_their_logarithms_are_equal(one, other, expected):
    assert [(pytest.approx(x), pytest.approx(y), up) for x, y, up in crossings(one, other)] == expected


def test_each_pair_says_where_one_overtakes(bench):
    found = {pair.stage: pair for pair in pairs(measurements(find_results([bench])))}
    assert set(found) == {"kernel", "training step", "decode"}
    assert found["decode"].context == pytest.approx(8000)
    assert (found["decode"].faster, found["decode"].slower) == ("kda", "softmax")
    assert found["decode"].ratio == pytest.approx(2)
    assert found["decode"].text == "kda is faster from a context of about 7.8K"
    assert found["kernel"].context is None
    assert found["kernel"].text == "simplified is faster from 1K to 2K"
    assert found["training step"].text == "kda is faster from 1K to 4K"


def test_a_tie_at_the_longest_context_has_the_winner_of_the_one_before(tmp_path):
    speeds = {"kda": (1.0, 4.0, 5.0), "softmax": (2.0, 2.0, 5.0)}
    rows = [decode_row(m, T, speed) for m, found in speeds.items() for T, speed in zip((1024, 2048, 4096), found)]
    (pair,) = pairs(measurements(find_results([write_results(tmp_path / "a.json", "decode", rows)])))
    assert (pair.faster, pair.ratio) == ("kda", 1.0)
    assert pair.text == "kda is faster from a context of about 1.4K"


def test_the_summary_says_how_far_its_contexts_reach_and_which_device_is_another(tmp_path):
    rows = [decode_row(m, T, speed, batch=B) for m, speed in (("kda", 2.0), ("softmax", 1.0)) for B, T in _BATCHES]
    rows += [
        decode_row(m, T, speed, implementation="prefill", title=f"{m}, prefill")
        for m, speed in (("kda", 2.0), ("softmax", 1.0))
        for T in (1024, 2048)
    ]
    here = write_results(tmp_path / "a.json", "decode", rows)
    other = [decode_row(m, 1024, speed, batch=4) for m, speed in (("kda", 1.0), ("softmax", 2.0))]
    there = write_results(tmp_path / "b.json", "decode", other, device="another")
    said = answers.summary([], measurements(find_results([here, there])))[-1]
    assert said == (
        "At every compared context, kda is faster than softmax (model tiny, bf16) in prefill (batch 1, 1K to 2K) and "
        "in decode (batch 1 at 1K to 4K; batches of 2, 16 and 1,024 at 1K). At every compared context, softmax is "
        "faster than kda (model tiny, bf16) in decode (batch 4, another, 1K)."
    )


_BATCHES = ((1, 1024), (1, 4096), (2, 1024), (1024, 1024), (16, 1024))


def test_a_reason_does_not_begin_with_the_class_of_an_error(tmp_path):
    reasons = ["ValueError: too long", "InputError: too long", "RuntimeError: no memory", None]
    rows = [bench_row(T=T, ms=None, reason=reason) for T, reason in enumerate(reasons, 1)]
    found = measurements(find_results([write_results(tmp_path / "a.json", "benchmark", rows)]))
    assert [one.reason for one in found] == ["too long", "too long", "RuntimeError: no memory", "not measured"]


@pytest.mark.parametrize(
    ("context", "text"), [(736.162, "740"), (1010.0, "0.99K"), (1529.3, "1.5K"), (65_536.0, "64K"), (131_072.0, "128K")]
)
def test_an_interpolated_context_has_two_digits(context, text):
    assert rounded(context) == text


def test_mixers_of_different_devices_settings_or_batches_are_not_paired(tmp_path):
    rows = [decode_row("kda", 1024, 10.0), decode_row("softmax", 1024, 20.0, batch=2)]
    rows += [decode_row("mla", 1024, 20.0, dtype="fp32"), decode_row("simplified", 1024, 9.0, overrides=["a=1"])]
    here = write_results(tmp_path / "a.json", "decode", rows)
    there = write_results(tmp_path / "b.json", "decode", [decode_row("conv", 1024, 30.0)], device="another")
    assert pairs(measurements(find_results([here, there]))) == []


def test_mixers_of_other_vocabularies_are_not_paired(tmp_path):
    rows = [decode_row("kda", 1024, 10.0), decode_row("softmax", 1024, 20.0, vocab_size=32_000)]
    decode = write_results(tmp_path / "a.json", "decode", rows)
    steps = [step_row("kda", 1, 1024, 1.0), step_row("softmax", 1, 1024, 2.0, compile=False)]
    found = measurements(find_results([decode, write_results(tmp_path / "b.json", "step_benchmark", steps)]))
    assert pairs(found) == []
    assert {one.setting for one in found} == {
        *("tiny, bf16, batch 1, vocabulary 300", "tiny, bf16, batch 1, vocabulary 32,000"),
        *(
            "tiny, bf16-mixed, compile auto, 1K tokens per batch",
            "tiny, bf16-mixed, compile False, 1K tokens per batch",
        ),
    }


def test_steps_are_paired_at_equal_tokens_or_at_equal_rows(tmp_path):
    rows = [step_row(mixer, 1, T, speed) for mixer, speed in (("kda", 1.0), ("softmax", 2.0)) for T in (1024, 4096)]
    (pair,) = pairs(measurements(find_results([write_results(tmp_path / "a.json", "step_benchmark", rows)])))
    assert (pair.shortest, pair.longest, pair.faster) == (1024, 4096, "softmax")
    assert pair.where == "tiny, bf16-mixed, 1 row, a GPU"


def test_the_later_of_two_measurements_is_kept(tmp_path):
    old = write_results(tmp_path / "a.json", "decode", [decode_row("kda", 1024, 10.0)], date="2026-01-02")
    new = write_results(tmp_path / "b.json", "decode", [decode_row("kda", 1024, 30.0)], date="2026-02-01")
    failed = [decode_row("kda", 1024, None, reason="out of memory")]
    newest = write_results(tmp_path / "c.json", "decode", failed, date="2026-03-01")
    (one,) = measurements(find_results([new, old, newest]))
    assert one.tokens_per_s == 30.0


def test_what_depends_on_a_noisy_measurement_says_so(tmp_path):
    rows = [bench_row(op, T=T, ms=ms, gate=None, noisy=op == "kda") for op, ms in _SPEEDS for T in (1024, 2048)]
    found = measurements(find_results([write_results(tmp_path / "a.json", "benchmark", rows)]))
    assert all(answer.why.endswith("(noisy)") for answer in answers.answers([], found))
    joined = Tradeoff([], found)
    assert [cells[4].endswith("(noisy)") for cells in joined.measurement_section().body] == [True, True, False, False]
    assert any(note.startswith("2 of the measurements, marked") for note in joined.crossing_section().notes)
    calm = Tradeoff([], [replace(one, noisy=False) for one in found])
    assert "(noisy)" not in str(calm.sections()) + str(answers.answers([], calm.found))


_SPEEDS = (("kda", 2.0), ("simplified", 1.0))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokens_per_s": float("nan")}, "decode of kda: tokens_per_s is nan"),
        ({"tokens_per_s": float("inf")}, "decode of kda: tokens_per_s is inf"),
        ({"tokens_per_s": -1.0}, "decode of kda: tokens_per_s is -1.0"),
        ({"tokens_per_s": "fast"}, "must be real number, not str"),
        ({"bytes_per_sequence": float("nan")}, "decode of kda: memory is nan"),
        ({"context": 0}, "decode of kda: context is 0"),
    ],
)
def test_a_number_that_cannot_be_drawn_is_refused(tmp_path, changes, message):
    path = write_results(tmp_path / "a.json", "decode", [decode_row("kda", 1024, 1.0) | changes])
    with pytest.raises(ValueError, match=f"a.json is not what scripts/benchmark.py writes .*{message}"):
        find_results([path])


def test_a_directory_of_damaged_results_says_which(tmp_path):
    path = write_results(tmp_path / "a.json", "decode", [decode_row("kda", 1024, 1.0)])
    path.write_text(path.read_text()[:-5])
    (tmp_path / "log.json").write_text("[1]")  # of another program
    with pytest.raises(InputError, match=rf"holds no results of .*: {path} cannot be read as JSON \(") as caught:
        find_results([tmp_path])
    assert "log.json" not in str(caught.value)


def test_notes_of_another_form_are_refused(tmp_path):
    path = write_results(tmp_path / "a.json", "notes", [{"part": "length", "name": "KDA"}])
    with pytest.raises(ValueError, match=r"a.json is not what scripts/benchmark.py writes \(KeyError\('T'\)\)"):
        find_results([path])


def test_the_front_has_what_nothing_beats():
    assert records.on_front([(1, 1), (2, 3), (3, 2), (2, 3), (4, 4)]) == [True, True, False, True, True]


def test_speeds_are_joined_with_the_runs_of_the_same_model_and_mixer(joined):
    result, out = joined
    found = records.by_speed(
        result.groups, result.tradeoff.found, records.quality_of(result.groups), exclusive_device=True
    )
    means = {(one["setting"], one["series"]): one["x"] for one in found if one["run"] == records.MEAN}
    at = "decode at a context of 15.6K: tiny, bf16, batch 1, a GPU"
    assert means[at, "kda"] == 1000
    assert means[at, "softmax"] == 500
    report = (out / "report.md").read_text()
    assert "fastest decode at 15.6K: kda, 1,000 tokens/s, 2.00 times softmax (tiny, bf16, batch 1, a GPU)." in report
    assert (
        "As the context grows, kda overtakes softmax (model tiny, bf16) in decode (batch 1, at about 7.8K). "
        "At every compared context, kda is faster than softmax (model tiny, bf16-mixed) in training steps (8K tokens "
        "per batch, 1K to 4K)."
    ) in report
    assert "Not measured: kda, FLA. Reason: fla is not installed." in report


def test_accuracy_is_drawn_against_the_speed_of_the_training_and_of_each_stage(joined):
    result, out = joined
    given = (result.groups, result.tradeoff.found, records.quality_of(result.groups))

    def panels(*, exclusive_device):
        figure = accuracy_by_speed(*given, exclusive_device=exclusive_device).draw(LIGHT)
        return {one.get_title(loc="left"): {text.get_text(): text.xy[0] for text in one.texts} for one in figure.axes}

    drawn = panels(exclusive_device=True)
    assert drawn["training step, rows of 4K tokens\nbf16-mixed, 8K tokens per batch"] == {"kda": 100, "softmax": 50}
    assert drawn["decode, after 15.6K tokens\nbf16, batch 1"] == {"kda": 1000, "softmax": 500}
    (logged,) = drawn.keys() - panels(exclusive_device=False).keys()
    assert logged.endswith("\nas the runs logged it")
    assert drawn[logged] == {group.label: group.mean("tokens_per_s") for group in result.groups}
    assert accuracy_by_speed(given[0], [], given[2], exclusive_device=True) is None  # no benchmarks
    assert (out / "accuracy_by_speed.png").exists()


@pytest.mark.parametrize(
    ("data", "first"),
    [
        ({"source": "prose"}, "python scripts/prepare_data.py  # once\n"),
        ({"source": "english"}, "python scripts/prepare_data.py mix=english path=NOVELS  # once\n"),
        ({"source": "prose", "directory": "tokens/mine"}, ""),
        ({"source": "sotu"}, ""),
    ],
)
def test_the_command_of_a_mix_of_texts_comes_after_the_one_that_prepares_it(tmp_path, data, first):
    groups = group_runs(read_runs([write_run(tmp_path / "a", "kda", settings={"data": data})])[0])
    command = f"python scripts/train.py mixer=kda model=tiny data={data['source']} seed=0 trainer.max_steps=500"
    assert records.reproduce(groups[0], groups) == first + command


def test_the_command_of_several_seeds_trains_all_of_them(tmp_path):
    def command(*seeds, **summary):
        home = tmp_path / str(len(list(tmp_path.iterdir())))
        runs = [write_run(home / str(n), "kda", seed=n, **(summary | given)) for n, given in enumerate(seeds)]
        groups = group_runs(read_runs(runs)[0])
        return records.reproduce(groups[0], groups)

    recorded = "python scripts/train.py mixer=kda{} model.d_model=64"
    one, two, other = ({records.COMMAND: recorded.format(word)} for word in ("", " seed=2", " seed=3 optimizer.lr=1"))
    assert command({}, {}) == (
        "python scripts/train.py -m mixer=kda model=tiny data=sotu trainer.max_steps=500 seed=0,1"
    )
    assert command(one, two) == "python scripts/train.py -m mixer=kda model.d_model=64 seed=1,2"
    assert command(two) == recorded.format(" seed=2")
    assert command(two, two) == recorded.format(" seed=2")
    assert command(two, other).splitlines() == [recorded.format(" seed=2"), other[records.COMMAND]]
    comment = {name: f"{text}  # settings of another version: a=1" for name, text in two.items()}
    assert command(comment, {records.COMMAND: comment[records.COMMAND].replace("seed=2", "seed=4")}) == (
        "python scripts/train.py -m mixer=kda model.d_model=64 seed=2,4  # settings of another version: a=1"
    )


def test_the_page_says_where_its_commands_run_and_of_which_version_its_results_are():
    said = how_to_repeat([None, "0123456789abcdef", "0123456789abcdef"], ["fedcba9876543210+changes"])
    assert "pip install -e ." in said
    assert said.endswith(
        " The runs are of commit 0123456789ab. The measurements are of commit fedcba987654 with uncommitted changes."
    )
    assert "commit" not in how_to_repeat([None], []).replace("command", "")


def test_the_glossary_has_the_words_that_occur_and_the_files_of_mixers_and_models():
    sections = [Section("Prefill", body=[["fastest decode", "8K", "HF Llama, compiled"]])]
    words = glossary(sections, mixers=["kda", "kda", "kda_softmax_3to1", "mine"], models=["small", "mine"])
    assert [*words] == ["prefill", "decode", "K", "HF Llama", "kda", "kda_softmax_3to1", "small"]
    assert words["kda"].startswith("Kimi Delta Attention. Each head has a D x D state.")
    assert words["kda_softmax_3to1"] == "Three KDA layers, then one layer of softmax attention with rotary positions."
    assert words["small"] == "A model of 8 layers of width 512."


def _prefill(tmp_path, *, speeds, forward):
    """Of KDA and softmax attention at 1K, 8K and 32K tokens."""
    rows = [
        decode_row(mixer, T, speed, implementation="prefill", title=f"{mixer}, prefill", forward_tokens_per_s=forward)
        for mixer, found in speeds.items()
        for T, speed in zip((1024, 8192, 32_768), found, strict=True)
    ]
    return measurements(find_results([write_results(tmp_path / "a.json", "decode", rows)]))


def test_nothing_is_concluded_from_prefill_that_waits_for_the_host(tmp_path):
    """KDA would overtake twice, and be the fastest at 1K."""
    speeds = {"kda": (1e5, 4e5, 2e6), "softmax": (0.9e5, 4.9e5, 5e5)}
    found = _prefill(tmp_path, speeds=speeds, forward=1e6)
    (pair,) = pairs(found)
    assert pair.text == "kda is faster at 32K, the only context that both have"
    assert [(one.question, one.context) for one in answers.answers([], found)] == [("fastest prefill", 32_768)]
    said = (
        "Reading a prompt of 8K tokens or fewer takes 10 to 20 ms with every mixer, which is the time that Python "
        "needs to start the kernels, so nothing is concluded from it."
    )
    joined = Tradeoff([], found)
    first, (crossing, measured) = joined.first_section(), joined.sections()
    assert all(said in section.notes for section in (first, crossing, measured))
    marked = [line[3] for line in measured.body if line[4].endswith(" (host-bound)")]
    assert marked == ["1K", "8K", "1K", "8K"]
    (chart,) = joined.charts()
    assert said in chart.caption
    assert len(chart.spec["data"]["values"]) == 6


@pytest.mark.parametrize("forward", [None, 0.9e6])
def test_prefill_that_keeps_the_device_busy_is_compared(tmp_path, forward):
    speeds = {"kda": (4.6e5, 5e5, 2e5), "softmax": (5e5, 4.6e5, 3e5)}  # less than half at 32K, where it is the device
    found = _prefill(tmp_path, speeds=speeds, forward=forward)
    assert host_bound.note(found) == ""
    assert pairs(found)[0].context is not None
    assert len(answers.answers([], found)) == 3


def test_a_context_at_which_one_mixer_waits_for_the_host_is_left_out_for_all(tmp_path):
    found = _prefill(tmp_path, speeds={"kda": (1e5, 9e5, 2e6), "softmax": (6e5, 8e5, 5e5)}, forward=1e6)
    assert [answer.context for answer in answers.answers([], found)] == [8192, 32_768]
    assert "a prompt of 1K tokens takes 10 ms with kda, which" in host_bound.note(found)


def test_the_chart_of_accuracy_and_speed_says_where_their_models_differ(tmp_path):
    model = {"model": {"name": "tiny", "vocab_size": 500}}
    runs = [write_run(tmp_path / mixer, mixer, settings=model, model="tiny") for mixer in ("kda", "softmax")]
    groups = group_runs(read_runs(runs)[0])
    steps = [step_row(mixer, 1, 1024, 1.0) for mixer in ("kda", "softmax")]
    found = measurements(find_results([write_results(tmp_path / "b.json", "step_benchmark", steps)]))
    said = "The accuracy is of models with a vocabulary of 500, and the benchmarks' speeds are with one of 300."
    charts = {chart.name: chart for chart in Tradeoff(groups, found).charts()}
    assert charts["front_by_speed"].caption.endswith(said)
    assert said not in charts["front_by_state"].caption
    assert records.of_other_models(groups, [replace(one, vocab_size=500) for one in found]) == []


def test_a_course_with_few_validations_is_that_of_training(tmp_path):
    groups = group_runs(read_runs([write_run(tmp_path / "often", "kda"), write_run(tmp_path / "b", "softmax")])[0])
    quality = records.quality_of(groups)
    assert records.course_of(groups, quality) == ("val/bits_per_byte", "validation bits per byte")
    seldom = group_runs(read_runs([write_run(tmp_path / "seldom", "kda", every=500)])[0])
    column, title = records.course_of([*groups, *seldom], quality)
    assert (column, title) == ("train/bits_per_byte", "training bits per byte")
    points = records.curve_records(seldom, x="tokens", y=column)
    assert len(points) > 20
    assert points[-1]["x"] == 500 * 2048
    seldom[0].runs[0].metrics[3]["train/bits_per_byte"] = math.nan  # a step of a run that nearly diverged
    assert all(math.isfinite(one["y"]) for one in records.curve_records(seldom, x="tokens", y=column))
    many = records.curve_records(seldom * 100, x="tokens", y=column)
    assert len(many) <= 2000


def test_the_tables_beside_the_page_hold_the_numbers(joined):
    _, out = joined
    rows = list(csv.DictReader((out / "crossings.csv").open()))
    decode = next(row for row in rows if row["stage"] == "decode")
    assert float(decode["from context"]) == pytest.approx(8000)
    measured = list(csv.DictReader((out / "measurements.csv").open()))
    assert {row["stage"] for row in measured} == {"kernel", "training step", "decode"}
    missing = next(row for row in measured if row["why not"])
    assert (missing["mixer"], missing["tokens/s"], missing["why not"]) == ("kda, FLA", "", "fla is not installed")
    kda = next(row for row in measured if row["mixer"] == "kda" and row["stage"] == "training step")
    assert kda["measure again"] == (
        "python scripts/benchmark.py task=step 'models=[tiny]' 'mixers=[kda]' 'shapes=[8x1024]' vocab_size=300"
    )


def test_every_chart_says_what_it_shows(joined):
    """Axes have titles, captions name the setting, and tooltips name run, seed and configuration."""
    result, _ = joined
    charts = {chart.name: chart for chart in result.tradeoff.charts()}
    runs = {"front_by_speed", "front_by_state", "curves_by_tokens", "curves_by_seconds"}
    contexts = {f"{stage}_{what}" for stage in ("kernel", "training_step", "decode") for what in ("time", "memory")}
    assert set(charts) == runs | contexts
    for chart in charts.values():
        assert chart.caption
        encodings = [layer["encoding"] for layer in chart.spec["layer"]]
        assert all(encoding[axis]["title"] for encoding in encodings for axis in "xy")
        fields = {entry["field"] for encoding in encodings for entry in encoding.get("tooltip", [])}
        assert fields >= ({"run", "seed", "configuration"} if chart.name in runs else {"setting", "file"})


def test_the_committed_crossings_lie_where_the_rows_change_places():
    home = Path(__file__).parents[3] / "docs" / "results"
    found = measurements(find_results([home / "decode_context_h200", home / "kda_by_length_h100"]))
    crossing = [pair for pair in pairs(found) if pair.context is not None]
    assert {pair.stage for pair in crossing} >= {"kernel", "prefill"}
    by_length = json.loads((home / "kda_by_length_h100" / "benchmark.json").read_text())["rows"]
    graph = {
        (row["op"] if not row["peer"] else "softmax", row["T"]): row["ms_median"]
        for replay in ("eager", "graph")  # that of a graph is used where there is one
        for row in by_length
        if row["mode"] == "fwd+bwd" and row["replay"] == replay and row["ms_median"]
    }
    pair = next(pair for pair in crossing if pair.stage == "kernel" and pair.where.startswith("fwd+bwd"))
    lengths = sorted(T for op, T in graph if op == "softmax")
    before, after = next((a, b) for a, b in pairwise(lengths) if a <= (pair.context or 0) <= b)
    assert graph["softmax", before] < graph["kda", before]
    assert graph["softmax", after] > graph["kda", after]
