"""Evaluating token by token, with KDA's states in each dtype."""

import json
from pathlib import Path

import pytest
import yaml

from lkda.commands.evaluate import evaluate
from lkda.commands.train import train
from lkda.report.studies.state_dtypes import main
from tests.commands.small import composed, small_run

SUBSETS = "data.validation=[{length: 32, pairs: 2, examples: 10}, {length: 64, pairs: 8, examples: 6}]"


@pytest.fixture(scope="module")
def run(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A hybrid that has learnt a little."""
    directory = tmp_path_factory.mktemp("runs") / "run"
    changes = ("mixer=kda_softmax_1to1", "model.num_layers=2", "trainer.max_steps=60", "sample.max_new_tokens=0")
    train(composed("train", *small_run(corpus, *changes)), directory)
    return directory


def measured(run: Path, *overrides: str) -> dict[str, float]:
    return evaluate(composed("evaluate", f"ckpt={run}", "accelerator=cpu", "max_batches=3", *overrides))


@pytest.mark.slow
def test_in_float32_it_agrees_with_the_usual_evaluation(run: Path) -> None:
    usual, stepwise = measured(run), measured(run, "stepwise=true", "state_dtype=float32")
    assert usual["loss"] < usual["unigram_entropy"] - 0.1, "the model has learnt nothing to be measured by"
    assert stepwise == pytest.approx(usual, rel=1e-5)


def test_max_batches_measures_the_first_of_them(run: Path) -> None:
    counts = [measured(run, f"max_batches={n}")["tokens"] for n in (1, 2)]
    assert counts[1] == 2 * counts[0] < measured(run)["tokens"]


def test_a_training_that_validates_on_a_part_has_its_bits_per_byte(run: Path) -> None:
    summary = json.loads((run / "summary.json").read_text())
    config = yaml.safe_load((run / "config.yaml").read_text())
    part = measured(run, f"max_batches={config['trainer']['limit_val_batches']}")
    assert part["tokens"] < measured(run, "max_batches=null")["tokens"]
    for name in ("bits_per_byte", "unigram_entropy"):
        assert summary.get(f"val/{name}", summary.get(name)) == pytest.approx(part[name], rel=1e-4)


@pytest.mark.sample(2)
@pytest.mark.parametrize(("dtype", "most"), [("bfloat16", 0.003), ("int8", 0.01)])
def test_a_narrower_state_costs_little(run: Path, dtype: str, most: float) -> None:
    usual, narrow = measured(run), measured(run, "stepwise=true", f"state_dtype={dtype}")
    assert 1e-6 < abs(narrow["bits_per_byte"] / usual["bits_per_byte"] - 1) < most


@pytest.mark.slow
def test_the_dtype_is_written_down_and_drawn(run: Path, tmp_path: Path) -> None:
    found = {}
    for dtype in ("float32", "int8"):
        out = tmp_path / f"state_{dtype}.json"
        found[dtype] = measured(run, "stepwise=true", f"state_dtype={dtype}", f"out={out}")["bits_per_byte"]
        record = json.loads(out.read_text())
        assert (record["stepwise"], record["state_dtype"]) == (True, dtype)
    measured(run, f"out={tmp_path}/state_usual.json")
    assert json.loads((tmp_path / "state_usual.json").read_text())["state_dtype"] is None
    main([f"{tmp_path}/state_*.json", str(tmp_path / "drawn")])
    (row,) = json.loads((tmp_path / "drawn" / "table.json").read_text())["rows"]
    assert row == {
        **{
            "mixer": "kda_softmax_1to1",
            "data": "files 32",
            "measured": "bits per byte",
            "float32": f"{found['float32']:.4f}",
        },
        "int8": f"{found['int8']:.4f} ({found['int8'] - found['float32']:+.4f})",
    }


def test_the_models_own_dtype_is_kept_where_none_is_given(corpus: Path, tmp_path: Path) -> None:
    changes = ("mixer.kda.state_dtype=int8", "trainer.max_steps=1", "sample.max_new_tokens=0")
    train(composed("train", *small_run(corpus, *changes)), tmp_path / "run")
    measured(tmp_path / "run", "stepwise=true", f"out={tmp_path}/out.json")
    assert json.loads((tmp_path / "out.json").read_text())["state_dtype"] == "int8"


def test_precision_of_whole_sequences(run: Path, tmp_path: Path) -> None:
    usual = measured(run)
    rounded = measured(run, "precision=bf16-mixed", f"out={tmp_path}/out.json")
    assert 0 < abs(rounded["loss"] - usual["loss"]) < 0.01
    assert json.loads((tmp_path / "out.json").read_text())["precision"] == "bfloat16"


@pytest.mark.slow
def test_recall_is_measured_so_too(tmp_path: Path) -> None:
    tiny = ("trainer=cpu", "callbacks=none", "model=recall", "mixer=conv_kda", "model.d_model=32", "data=mqar")
    shapes = ("data.vocab_size=64", "data.batch_size=4", "data.train=[{length: 32, pairs: 2, examples: 16}]", SUBSETS)
    train(composed("train", *tiny, *shapes, "trainer.max_steps=2"), tmp_path / "run")
    usual, stepwise = (measured(tmp_path / "run", "max_batches=null", *how) for how in ((), ("stepwise=true",)))
    names = []
    for here, there in zip(stepwise.pop("val_subsets"), usual.pop("val_subsets"), strict=True):
        assert here.pop("subset") == there.pop("subset")
        names.append((here.pop("name"), there.pop("name")))
        assert here == pytest.approx(there, rel=1e-5)
    assert names == [(name, name) for name in ("length_32_pairs_2", "length_64_pairs_8")]
    assert stepwise == pytest.approx(usual, rel=1e-5)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            ["stepwise=true", "state_dtype=float16"],
            "must be one of float32, bfloat16, int8, got 'float16'; leave it out",
        ),
        (
            ["state_dtype=int8"],
            "state_dtype=int8 has an effect only when the model reads one token at a time: add stepwise=true",
        ),
        (["stepwise=maybe"], "stepwise must be true or false, got 'maybe'"),
        (["max_batches=0"], "max_batches must be a whole number of 1 or more, got 0"),
        (["stepwise=true", "tasks=[sotu_word_order]"], "leave out one of the two"),
        (["precision=16-mixed"], "precision must be 32-true or bf16-mixed, got '16-mixed'"),
        (["precision=bf16-mixed", "stepwise=true"], "reads one token at a time in 32-true: leave out one of the two"),
        (["precision=bf16-mixed", "tasks=[sotu_word_order]"], "precision has no effect with tasks"),
    ],
)
def test_what_makes_no_sense_is_refused(run: Path, given: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        measured(run, *(given if "max_batches=0" in given else [*given, "max_batches=null"]))


def test_dtypes_of_different_runs_are_not_laid_side_by_side(tmp_path: Path) -> None:
    for ckpt, dtype in (("a", "float32"), ("b", "int8")):
        record = {
            "kind": "evaluation",
            "ckpt": ckpt,
            "run": {"mixer": "kda"},
            "data": {"source": "prose"},
            "state_dtype": dtype,
            "result": {"accuracy": 0.5},
        }
        (tmp_path / f"{ckpt}.json").write_text(json.dumps(record))
    with pytest.raises(
        SystemExit,
        match=r"kda on prose was .* different checkpoints \(1 in float32, 1 in int8\): give each in every dtype",
    ):
        main([f"{tmp_path}/*.json", str(tmp_path / "out")])
