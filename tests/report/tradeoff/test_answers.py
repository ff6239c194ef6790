"""What the page answers and advises."""

from __future__ import annotations

from pathlib import Path

from lkda.report.read.groups import Group, group_runs
from lkda.report.read.runs import read_runs
from lkda.report.tradeoff import answers, records
from lkda.report.tradeoff.measurements import find_results, measurements
from tests.report.conftest import write_run
from tests.report.tradeoff.conftest import decode_row, write_results


def groups_of(home: Path, bits: dict[str, tuple[float, ...]]) -> list[Group]:
    """The groups of runs with these bits per byte of the validation: a run for each seed of each mixer."""
    paths = [
        write_run(home / f"{mixer}{n}", mixer, seed=n, **{"val/bits_per_byte": value})
        for mixer, values in bits.items()
        for n, value in enumerate(values)
    ]
    return group_runs(read_runs(paths)[0])


def test_an_answer_says_of_how_many_mixers_it_is(tmp_path):
    """A single mixer beside models of other packages is no answer."""
    rows = [decode_row(mixer, 1024, speed) for mixer, speed in (("kda", 3.0), ("softmax", 2.0), ("mla", 1.0))]
    rows += [decode_row(mixer, 1024, speed, batch=4) for mixer, speed in (("kda", 30.0), ("softmax", 20.0))]
    rows += [decode_row("kda", 4096, 3.0), decode_row("softmax", 4096, 1.0, implementation="fla", title="Llama")]
    found = measurements(find_results([write_results(tmp_path / "a.json", "decode", rows)]))
    said = {(one.question, one.of, one.context): one.why for one in answers.answers([], found)}
    one, four = "tiny, bf16, batch 1, a GPU", "tiny, bf16, batch 4, a GPU"
    assert said == {
        ("fastest decode", one, 1024): "3 tokens/s, 1.50 times softmax",
        ("least state of one sequence", one, 1024): "1.98 KiB",
        ("fastest decode", four, 1024): "30 tokens/s, 1.50 times softmax; only 2 of 3 mixers were measured",
        ("least state of one sequence", four, 1024): "1.98 KiB; only 2 of 3 mixers were measured",
    }
    groups = group_runs(read_runs([write_run(tmp_path / "run", "simplified")])[0])
    joined = answers.answers(groups, found)
    assert [one.why for one in joined if one.question == "fastest decode"] == [
        "3 tokens/s, 1.50 times softmax; only 3 of 4 mixers were measured",
        "30 tokens/s, 1.50 times softmax; only 2 of 4 mixers were measured",
    ]


def test_a_small_difference_is_within_the_spread(tmp_path):
    bits = {"kda": (1.0, 1.2), "softmax": (1.05, 1.35), "simplified": (1.5, 1.52)}
    groups = {group.mixer: group for group in groups_of(tmp_path, bits)}
    quality = records.quality_of(list(groups.values()))
    assert records.best_of(list(groups.values()), quality) is groups["kda"]
    assert records.within_spread(groups["softmax"], groups["kda"], quality) is True
    assert records.within_spread(groups["simplified"], groups["kda"], quality) is False
    found = answers.answers(list(groups.values()), [])
    assert found[0].mixer == "kda"
    assert "within the spread over seeds: softmax" in found[0].why
    assert found[1].mixer == "simplified"  # worse, with less state
    (said,) = answers.summary(list(groups.values()), [])
    assert "one seed" not in said
    assert said.startswith("With 1.02M training tokens, choose kda: it has the best validation bits per byte (1.100")
    assert "If memory is short, choose simplified (1.510 ± 0.014, 22 KiB of state per sequence). The least" in said
    without = [group for name, group in groups.items() if name != "softmax"]
    least = answers.answers(without, [])[-1]
    assert (least.mixer, least.why) == ("kda", "146 KiB; no other is as good within the spread over seeds")


def test_of_two_mixers_within_the_spread_the_one_with_less_state_is_advised(tmp_path):
    bits = {"softmax": (1.0, 1.01), "kda": (1.1, 1.2), "simplified": (1.16, 1.18)}
    groups = groups_of(tmp_path, bits)
    (said,) = answers.summary(groups, [])
    assert "choose softmax: it has the best" in said
    assert "If memory is short, choose simplified (1.170 ± 0.014, 22 KiB of state per sequence)." in said
    (of_kda,) = [one for one in answers.answers(groups, []) if "with at most 146 KiB" in one.question]
    assert of_kda.mixer == "kda"
    assert of_kda.why.endswith("; within the spread over seeds, with less state: simplified")


def test_a_mixer_that_another_beats_with_less_state_has_an_answer(tmp_path):
    bits = {"kda": (1.0,), "softmax": (1.1,), "simplified": (1.2,)}
    groups = groups_of(tmp_path, bits)
    found = {one.question: one for one in answers.answers(groups, [])}
    answer = found.pop("least state at validation bits per byte of softmax or better")
    assert answer.mixer == "kda"
    assert answer.why == "1.000, 146 KiB of state per sequence; softmax has 1.100, 1 MiB of state per sequence"
    assert not [question for question in found if " or better" in question]  # the others are on the front
    (said,) = answers.summary(groups, [])
    assert "Models with one seed have no spread over seeds, so small differences from them may be chance." in said


def test_an_answer_about_accuracy_has_the_context_of_the_training(tmp_path):
    runs = [write_run(tmp_path / mixer, mixer, context=256) for mixer in ("kda", "simplified")]
    found = answers.answers(group_runs(read_runs(runs)[0]), [])
    assert {one.context for one in found} == {256}
    assert any(
        one.question == "best validation bits per byte with at most 22 KiB of state per sequence" for one in found
    )
