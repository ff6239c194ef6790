"""Runs of synthetic tasks: tables, lines and pictures of their accuracies."""

from __future__ import annotations

import json

import matplotlib.image
import pytest

from lkda.checks import InputError
from lkda.report.read.runs import read_run, read_runs
from lkda.report.readme import fill
from lkda.report.training import accuracy
from lkda.report.training.comparison import Comparison, compare
from tests.report.conftest import write_run

SCORES = {("kda", 64, 3e-3): 0.5, ("kda", 64, 1e-2): 0.9, ("kda", 128, 3e-3): 1.0, ("softmax", 64, 3e-3): 0.8}


def measured(*, length, pairs=None, **values):
    """An entry of a summary's "val_subsets"."""
    subset = {"length": length} if pairs is None else {"length": length, "pairs": pairs}
    return {"name": "_".join(f"{name}_{x}" for name, x in subset.items()), "subset": subset, **values}


def task_run(directory, mixer, width, rate, score, *, seed=0, data="mqar", context=256, subsets=None):
    subsets = subsets or [
        measured(length=64, pairs=4, accuracy=score, sequence_accuracy=score / 2, state_bytes=100 * width),
        measured(length=256, pairs=64, accuracy=score / 4, sequence_accuracy=0.0, state_bytes=400 * width),
    ]
    settings = {"model": {"name": "recall", "d_model": width}, "data": {}, "optimizer": {"name": "adamw", "lr": rate}}
    summary = {
        **{"val/bits_per_byte": None, "unigram_entropy": None, "val/perplexity": None, "data": data},
        **{"context": context, "learning_rate": rate, "val_subsets": subsets, "state_bytes": 400 * width},
        **{"val/accuracy": score, "val/sequence_accuracy": score / 2},
    }
    return write_run(directory, mixer, seed=seed, settings=settings, **summary)


@pytest.fixture
def sweep(tmp_path):
    return [task_run(tmp_path / str(n), *what, score) for n, (what, score) in enumerate(SCORES.items())]


def test_each_model_counts_by_its_better_rate(sweep):
    lines = {line.label: line for line in accuracy.lines(read_runs(sweep)[0])}
    assert set(lines) == {"kda", "softmax"}
    found = {(point.width, dict(point.subset)["pairs"]): point for point in lines["kda"].points}
    assert {key: point.accuracy for key, point in found.items()} == {
        (64, 4): 0.9,
        (64, 64): 0.225,
        (128, 4): 1.0,
        (128, 64): 0.25,
    }
    assert found[64, 4].learning_rate == 1e-2
    assert found[128, 64].state_bytes == 51_200


def test_seeds_are_one_point(tmp_path):
    runs = [task_run(tmp_path / str(s), "kda", 64, 1e-2, 0.8 + s / 10, seed=s) for s in (0, 1)]
    (line,) = accuracy.lines(read_runs(runs)[0])
    point = line.points[0]
    assert (point.accuracy, point.low, point.high, point.seeds) == (pytest.approx(0.85), 0.8, 0.9, 2)


def test_variants_of_a_mixer_are_lines_of_their_own(tmp_path):
    runs = [task_run(tmp_path / str(n), "kda", 64, 1e-2, 0.8) for n in range(2)]
    config = runs[1] / "config.yaml"
    config.write_text(config.read_text().replace("name: kda", "name: kda\n  kda: {gate: head}"))
    assert {line.label for line in accuracy.lines(read_runs(runs)[0])} == {"kda", "kda · gate head"}


def test_table_pictures_and_page(sweep, tmp_path):
    out = tmp_path / "out"
    result = compare(sweep, out, title="Recall")
    assert [row["val/accuracy"] for row in result.rows]
    assert all("val/bits_per_byte" not in row for row in result.rows)
    charts = {"front_by_speed.png", "front_by_state.png", "recall_by_state.png"}
    assert {path.name for path in out.glob("*.png")} == {"accuracy_by_state.png"} | charts
    pixels = matplotlib.image.imread(out / "accuracy_by_state.png")[..., :3]
    assert 0.001 < (pixels.max(-1) - pixels.min(-1) > 0.3).mean() < 0.2
    page = (out / "report.html").read_text()
    assert "4 pairs in 64" in page
    assert "90.0%" in page
    filled = fill("<!-- accuracy:out -->\n<!-- /accuracy:out -->", tmp_path)
    assert "| kda | 64 | 0.01 | 6.25 KiB to 25 KiB | 90.0% | 22.5% |" in filled


def test_by_length_each_model_is_read_at_the_length_it_was_trained_at(tmp_path):
    runs = []
    for n, context in enumerate((256, 512)):
        subsets = [
            measured(length=at, accuracy=1.0 if at == context else 0.1, sequence_accuracy=0.0, state_bytes=9)
            for at in (256, 512)
        ]
        runs.append(task_run(tmp_path / str(n), "kda", 64, 1e-3, 0.5, data="stack", context=context, subsets=subsets))
    head, body = accuracy.table(read_runs(runs)[0])
    assert head[-2:] == ["256 tokens", "512 tokens"]
    assert body == [["kda", "64", "0.001", "9 B", "100.0%", "100.0%"]]
    compare(runs, tmp_path / "out", title="Stack")
    assert {path.name for path in (tmp_path / "out").glob("accuracy*.png")} == {"accuracy_by_length.png"}
    shown = (tmp_path / "out" / "report.md").read_text()
    assert "## Accuracy against length\n\n![Accuracy against length](accuracy_by_length.png)" in shown
    assert "accuracy_by_state.png" not in shown  # an interactive chart takes its place


def test_a_run_without_its_width_is_left_out(sweep, tmp_path):
    """As when the file was cut off, and what is left can be read."""
    path = sweep[0] / "config.yaml"
    text = path.read_text()
    path.write_text(text.replace(", d_model: 64", "") if ", d_model: 64" in text else text.replace("d_model: 64", ""))
    result = compare(sweep, tmp_path / "out", title="Recall")
    assert result.skipped == [(str(sweep[0]), "config.yaml lacks model.d_model")]
    assert len(result.runs) == len(sweep) - 1


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"learning_rate": None}, "summary.json lacks learning_rate"),
        ({"context": "long"}, "context = 'long', and a number"),
        ({"val_subsets": [{"subset": {"pairs": 4}}]}, r"val_subsets of summary.json .*length"),
        ({"val_subsets": [measured(length=64, accuracy=None, sequence_accuracy=0.0, state_bytes=1)]}, "without number"),
    ],
)
def test_a_run_whose_subsets_cannot_be_shown_is_left_out(tmp_path, change, reason):
    run = task_run(tmp_path / "a", "kda", 64, 1e-3, 0.5)
    summary = json.loads((run / "summary.json").read_text())
    (run / "summary.json").write_text(json.dumps(summary | change))
    with pytest.raises(InputError, match=reason):
        read_run(run)


@pytest.mark.parametrize("score", [0.0, 1.0])
def test_none_of_equal_models_is_called_the_best(tmp_path, score):
    runs = [task_run(tmp_path / str(width), "kda", width, 1e-3, score) for width in (128, 64)]
    result = Comparison("Equal", *read_runs(runs), [])
    shown = result.tradeoff.summary
    assert f"both models have the same validation accuracy, {score:.1%}, so it does not say which to choose" in shown
    assert "The least state: kda · d_model 64, 25 KiB per sequence." in shown
    assert [line[1] for line in result.tables()["runs"].body] == ["no, several share the best value"] * 2


def test_the_best_of_equal_models_has_the_least_state(tmp_path):
    scores = {32: 0.5, 64: 1.0, 128: 1.0}
    runs = [task_run(tmp_path / str(width), "kda", width, 1e-3, scores[width]) for width in reversed(scores)]
    result = Comparison("Equal", *read_runs(runs), [])
    best = result.tradeoff.first_section().body[0]
    assert best[2].endswith("d_model 64")
    assert "; the same, with no less state: kda · d_model 128" in best[3]
    said = {line[0].rpartition(" ")[2]: line[1] for line in result.tables()["runs"].body}
    shared = "no, several share the best value"
    assert said == {"32": "unknown, one seed", "64": shared, "128": shared}


def test_a_task_beside_text_is_compared_by_its_accuracy(sweep, tmp_path):
    """Each data set has its own measure, and the recall is drawn."""
    tested = {"test/loss": 4.0, "test/perplexity": 54.6}
    bits = {"kda": 1.6, "softmax": 1.7}
    texts = [write_run(tmp_path / mixer, mixer, **tested, **{"test/bits_per_byte": bits[mixer]}) for mixer in bits]
    found, skipped = read_runs([*sweep, *texts])
    both = Comparison("Both", found, skipped, [])
    said = both.tradeoff.summary
    assert "on mqar, choose kda · recall · d_model 128 · lr 0.003: it has the best validation accuracy (100.0%" in said
    assert "on sotu, choose " in said
    assert "it has the best test bits per byte (1.600" in said
    charts = {chart.name: chart for chart in both.tradeoff.charts()}
    assert set(charts) == {
        *(f"{name}{of}" for name in ("front_by_speed", "front_by_state") for of in ("", "_val_accuracy")),
        *("curves_by_tokens", "curves_by_seconds", "recall_by_state"),
    }
    shown = {record["series"] for record in charts["front_by_state_val_accuracy"].spec["data"]["values"]}
    assert shown == {group.label for group in both.groups if "val_subsets" in group.runs[0].summary}
    runs = both.tables()["runs"]
    assert runs.head[1] == "differs from the best in test bits per byte or validation accuracy"
    assert [line[1] for line in runs.body].count("this is the best") == 2


def test_runs_that_ended_early_have_one_column_of_their_tokens(sweep):
    """Though the number of tokens is also a setting that differs between the mixers."""
    path = sweep[-1] / "summary.json"  # the only one of softmax
    path.write_text(json.dumps(json.loads(path.read_text()) | {"tokens": 64_000}))
    runs = Comparison("Early", *read_runs(sweep), []).tables()["runs"]
    assert runs.head.count("tokens") == 1


@pytest.mark.slow
def test_the_pictures_of_a_task_stand_beside_those_of_text(sweep, tmp_path):
    compare([*sweep, write_run(tmp_path / "text", "kda")], tmp_path / "out", title="Both")
    names = {path.name for path in (tmp_path / "out").glob("*.png")}
    assert {"loss_by_tokens.png", "accuracy_by_state.png", "recall_by_state.png", "curves_by_tokens.png"} <= names
    assert "4 pairs in 64" in (tmp_path / "out" / "report.html").read_text()
    compare(sweep, tmp_path / "out", title="One")
    assert not {"loss_by_tokens.png", "front_by_state_val_accuracy.png"} & {
        path.name for path in (tmp_path / "out").glob("*.png")
    }


def test_a_run_that_measured_nothing_is_left_out(tmp_path):
    run = task_run(tmp_path / "a", "kda", 64, 1e-3, 0.5)
    summary = json.loads((run / "summary.json").read_text())
    (run / "summary.json").write_text(json.dumps(summary | {"val/accuracy": None}))
    with pytest.raises(ValueError, match="lacks val/bits_per_byte"):
        read_run(run)


def test_runs_are_read_at_a_step_that_they_all_reached(tmp_path):
    """However they went on; what is read is the validation of that step, and the notes say so."""
    runs = [task_run(tmp_path / str(n), "kda", 64, rate, 0.5) for n, rate in enumerate((1e-3, 1e-2))]
    for run, score in zip(runs, (0.25, 0.75)):
        summary = json.loads((run / "summary.json").read_text())
        (run / "summary.json").write_text(json.dumps(summary | {"status": "interrupted"}))
        names = [f"val/accuracy{name}" for name in ("", "/length_64_pairs_4", "/length_256_pairs_64")]
        head, *lines = (run / "metrics.csv").read_text().splitlines()
        lines = [f"{line},{score},{score},{score}" if line.startswith("300,") else f"{line},,," for line in lines]
        (run / "metrics.csv").write_text("\n".join([",".join([head, *names]), *lines]) + "\n")
        config = (run / "config.yaml").read_text()
        assert "max_steps: 500" in config
    with pytest.raises(ValueError, match="interrupted, not finished"):
        compare(runs, tmp_path / "out", title="Recall")
    with pytest.raises(
        ValueError, match=r"none of the runs has a validation at step 350 \(.*: there are 100, 200, 300, 400, 500; "
    ):
        compare(runs, tmp_path / "out", title="Recall", step=350)
    result = compare(runs, tmp_path / "out", title="Recall", step=300)
    assert [row["val/accuracy"] for row in result.rows] == [0.25, 0.75]
    assert [row["tokens"] for row in result.rows] == [300 * 2048] * 2
    assert "Read at the validation of step 300 of 500; none of the runs finished." in result.notes
    (line,) = accuracy.lines(result.runs)
    assert [(point.accuracy, point.learning_rate) for point in line.points] == [(0.75, 1e-2)] * 2
    assert max(row["step"] for run in result.runs for row in run.metrics) == 300


def test_tasks_of_different_names_are_not_text_of_different_tokenizers(tmp_path):
    runs = [task_run(tmp_path / task, "kda", 64, 1e-3, 0.5, data=task) for task in ("stack", "palindrome")]
    result = compare(runs, tmp_path / "out", title="Tasks")
    assert {row["mixer"] for row in result.rows} == {"kda · stack", "kda · palindrome"}
    assert not any("bits per byte" in note for note in result.notes)
    head, body = accuracy.table(result.runs)
    assert head[:2] == ["task", "mixer"]
    assert [line[0] for line in body] == ["palindrome", "stack"]
