"""What each mistake is answered with: one line on stderr, exit code 2, nothing trained and nothing lost."""

import re
import runpy
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

import lkda
from lkda.commands.train import train
from tests.commands.small import ROOT, composed, small_run

# On the command line a value with commas, spaces or dots in it is quoted as any shell would pass it.
TRAINING = [
    # settings
    ("trainer.max_step=5", r"Could not override 'trainer.max_step'. Did you mean max_steps\? It has .*accelerator"),
    ("modle.d_model=5", r"Could not override 'modle.d_model'.* Did you mean model\?"),
    ("mixer=kdaa", r"Could not find 'mixer/kdaa'.*kda_mla_3to1.*simplified"),
    ("mixer.kda.gates=head", r"Could not override 'mixer.kda.gates'. Did you mean gate\?"),
    ("mixer.kda.gate=heads", r"mixer.kda.gate must be one of channel, head, none, got 'heads'"),
    ("+mixer.kda.colour=red", r"mixer 'kda' has no option colour; it has conv_width, gate, "),
    ("mixer.pattern=[kdaa]", r"unknown mixer 'kdaa'; there are conv, kda, mla, simplified, softmax"),
    ("model.d_model=30 mixer.num_heads=4", r"mixer.num_heads must divide model.d_model = 30, got 4"),
    ("model.num_layers=0", r"model.num_layers must be a positive integer, got 0"),
    ("model.d_model=wide", r"model.d_model must be a positive integer, got 'wide'"),
    ("trainer.max_steps=-5", r"trainer.max_steps must be a whole number of 1 or more, got -5"),
    ("trainer.max_steps=many", r"trainer.max_steps must be a whole number of 1 or more, got 'many'"),
    ("trainer.max_tokens=0", r"trainer.max_tokens must be a whole number of 1 or more, got 0"),
    ("checkpoint.every_n_steps=0", r"checkpoint.every_n_steps must be a whole number of 1 or more, got 0"),
    ("seed=-1", r"seed must be a whole number of 0 or more, got -1"),
    ("optimizer.lr=0", r"optimizer.lr must be greater than 0, got 0"),
    ("optimizer=muon optimizer.momentum=1", r"optimizer.momentum must be in \[0, 1\), got 1"),
    ("scheduler.name=linear", r"scheduler.name must be one of constant, cosine, wsd, got 'linear'"),
    ("backend=cuda", r"kda\(backend='cuda'\): the tensors are on cpu, not on a CUDA device"),
    ("backend=cudda", r"no mixer of kda has a backend 'cudda'; they have auto, .*chunk"),
    ("trainer.limit_val_batches=0", r"trainer.limit_val_batches must be above 0: a run always validates at the end"),
    ("trainer.devices=2", r"trainer.devices must be 1, got 2"),
    ("trainer=gpu", r"a GPU was asked for and torch sees no CUDA device; use trainer=cpu or trainer=auto"),
    # data
    ("+data.colour=red", r"data.colour is not an option of \w+, which takes "),
    ("data.paths=[{tmp}/missing.txt]", r"missing.txt does not exist"),
    ("data.paths=[]", r"data.paths is empty"),
    ("data.paths=[{tmp}/empty.txt]", r"empty.txt is empty"),
    ("data.paths=[{tmp}/latin1.txt]", r"latin1.txt is not UTF-8"),
    ("data.paths=[{tmp}/short.txt]", r"the training text has \d+ tokens, fewer than one context of 32"),
    ("data.context=0", r"data.context must be a positive whole number, got 0"),
    ("data.vocab_size=350", r"the tokenizer has 350 tokens and the model 300 rows: set model.vocab_size to 350"),
    ("data.tokenizer_path={tmp}/short.txt", r"short.txt is not a tokenizer.json"),
    # the sample at the end
    ("sample.temperature=-1", r"sample.temperature must be 0 or more, got -1"),
    ("sample.prompt=null", r"sample.prompt must be text, got None"),
    # directories
    ("hydra.run.dir={tmp}/short.txt/run", r"cannot create the output directory .*short.txt/run: Not a directory"),
    ("hydra.run.dir=/proc/lkda", r"cannot create the output directory /proc/lkda: No such file or directory"),
    ("hydra.run.dir={run}", r"already holds a run. Continue it with resume=true"),
    ("hydra.run.dir={run} resume=true model.d_model=16", r"holds a run with other settings \(model.d_model: 32 there"),
]

CHECKPOINT = [
    ("", r"ckpt is required: give ckpt=..."),
    ("ckpt={tmp}/missing.ckpt", r"there is no checkpoint at .*missing.ckpt"),
    ("ckpt={tmp}/short.txt", r"short.txt is truncated or not a checkpoint"),
    ("ckpt={tmp}/truncated.ckpt", r"truncated.ckpt is truncated or not a checkpoint"),
    ("ckpt={tmp}/foreign.ckpt", r"foreign.ckpt is not a checkpoint of lkda"),
    ("ckpt={tmp}/other.ckpt", r"other.ckpt holds the weights of another model: blocks.0.* is .*, expected "),
    ("ckpt={tmp}", r"there is no checkpoint at .*checkpoints/last.ckpt"),
]

GENERATE = [
    ("ckpt={run} prompt=a temperature=-1", r"temperature must be >= 0 and top_p in \(0, 1\], got -1"),
    ("ckpt={run} prompt=a top_p=0", r"top_p in \(0, 1\], got .* and 0"),
    ("ckpt={run} prompt=a max_new_tokens=-1", r"max_new_tokens must be a whole number >= 0, got -1"),
    ("ckpt={run} prompt=a prompt_file={tmp}/short.txt", r"give either prompt=... or prompt_file=..., not both"),
    ("ckpt={run} prompt_file={tmp}/missing.txt", r"cannot read prompt_file .*missing.txt: No such file"),
    ("ckpt={run} prompt_file={tmp}/latin1.txt", r"the prompt in .*latin1.txt is not UTF-8"),
    ("ckpt={run} prompt=a seed=x", r"seed must be a whole number of 0 or more, got 'x'"),
    ("ckpt={run} prompt=a temperature=warm", r"temperature must be >= 0 and top_p in \(0, 1\], got 'warm'"),
    ("ckpt={run} prompt=a ignore_eos=perhaps", r"ignore_eos must be true or false, got 'perhaps'"),
    ("ckpt={run} prompt=two words", r"'words' is not key=value. A prompt of several words stands in quotes"),
    ("ckpt={run} prompt=\udcff", r"prompt is not UTF-8"),
    ("ckpt={run} prompt=a backend=cuda", r"not on a CUDA device"),
    ("ckpt={run} prompt=a accelerator=gpu", r"a GPU was asked for and torch sees no CUDA device"),
]

EXPORT = [
    ("ckpt={run} out={tmp}/exported format=ggufff", r"format must be one of .*lkda.*, got 'ggufff'"),
    ("ckpt={run} out={tmp}", r"the directory .* is not empty. Choose another, or empty it"),
    ("ckpt={run} out={tmp}/short.txt/x", r"cannot write the directory .*short.txt/x: Not a directory"),
]

EVALUATE = [
    ("ckpt={tmp}/alone.ckpt", r"lies in no run directory that says what data it saw: give data=..."),
    ("ckpt={run} data=files data.paths=[{tmp}/latin1.txt]", r"latin1.txt is not UTF-8"),
]


@dataclass(frozen=True)
class Places:
    tmp: Path
    run: Path


@pytest.fixture(scope="module")
def places(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Places:
    """A run, and next to it every kind of file that is not what it should be."""
    tmp = tmp_path_factory.mktemp("places")
    run = tmp_path_factory.mktemp("runs") / "run"
    train(composed("train", *small_run(corpus)), run)
    (tmp / "empty.txt").write_text("")
    (tmp / "short.txt").write_text("a few words")
    (tmp / "latin1.txt").write_bytes("déjà vu, and more".encode("latin-1"))
    last = run / "checkpoints" / "last.ckpt"
    (tmp / "truncated.ckpt").write_bytes(last.read_bytes()[:5000])
    (tmp / "alone.ckpt").write_bytes(last.read_bytes())
    torch.save({"model": torch.zeros(3)}, tmp / "foreign.ckpt")
    other = torch.load(last, weights_only=True)
    other["lkda"]["model"]["d_model"] = 64
    torch.save(other, tmp / "other.ckpt")
    return Places(tmp, run)


def message(
    script: str, arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> str:
    """The one line that the script ends with, on a machine without a GPU."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", [script, *arguments])
    with pytest.raises(SystemExit) as ending:
        runpy.run_path(str(ROOT / "scripts" / script), run_name="__main__")
    printed = capsys.readouterr().err.strip()
    assert ending.value.code == 2, printed
    assert printed.startswith("error: "), printed
    assert "\n" not in printed
    return printed


@pytest.mark.parametrize(("arguments", "expected"), TRAINING)
def test_train(
    arguments: str,
    expected: str,
    corpus: Path,
    places: Places,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    given = arguments.format(tmp=places.tmp, run=places.run).split()
    if "hydra.run.dir" not in arguments:
        given.append(f"hydra.run.dir={tmp_path}/run")
    before = {path: path.read_bytes() for path in places.run.rglob("*") if path.is_file()}
    printed = message("train.py", [*small_run(corpus), *given], monkeypatch, capsys)
    assert re.search(expected, printed), printed
    assert not (tmp_path / "run" / "metrics.csv").exists()
    assert {path: path.read_bytes() for path in places.run.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("script", ["evaluate.py", "generate.py", "export.py"])
@pytest.mark.parametrize(("arguments", "expected"), CHECKPOINT)
def test_checkpoints(
    script: str,
    arguments: str,
    expected: str,
    places: Places,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    extra = {"generate.py": ["prompt=a"], "export.py": [f"out={tmp_path}/x"], "evaluate.py": []}[script]
    given = arguments.format(tmp=places.tmp, run=places.run).split()
    printed = message(script, [*given, *extra], monkeypatch, capsys)
    assert re.search(expected, printed), printed


@pytest.mark.parametrize(
    ("script", "arguments", "expected"),
    [
        *(("generate.py", *row) for row in GENERATE),
        *(("export.py", *row) for row in EXPORT),
        *(("evaluate.py", *row) for row in EVALUATE),
    ],
)
def test_other_scripts(
    script: str,
    arguments: str,
    expected: str,
    places: Places,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    printed = message(script, arguments.format(tmp=places.tmp, run=places.run).split(), monkeypatch, capsys)
    assert re.search(expected, printed), printed


def test_a_bug_keeps_its_traceback(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # A ValueError inside the package, but none that it raises itself.
    source = "def broken(*args, **kwargs):\n    int('not a number')"
    made: dict[str, object] = {}
    exec(compile(source, str(Path(lkda.__file__).parent / "commands" / "made_up.py"), "exec"), made)
    monkeypatch.setattr("lkda.commands.train.summarize", made["broken"])
    monkeypatch.setattr(sys, "argv", ["train.py", *small_run(corpus), f"hydra.run.dir={tmp_path}/run"])
    with pytest.raises(ValueError, match="invalid literal for int"):
        runpy.run_path(str(ROOT / "scripts" / "train.py"), run_name="__main__")


def test_divergence_stops_the_run(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A learning rate that blows the loss up: the step and the last good checkpoint are named, and that one is good."""
    settings = small_run(corpus, "optimizer.lr=1e30", "trainer.gradient_clip_val=null", "trainer.max_steps=40")
    monkeypatch.setattr(
        sys, "argv", ["train.py", *settings, "scheduler.warmup_steps=30", f"hydra.run.dir={tmp_path}/run"]
    )
    with pytest.raises(SystemExit) as ending:
        runpy.run_path(str(ROOT / "scripts" / "train.py"), run_name="__main__")
    assert ending.value.code == 1
    printed = capsys.readouterr().err
    assert re.search(r"error: .* became NaN or infinite at step \d+\. Last good checkpoint: ", printed), printed
    assert '"status": "diverged"' in (tmp_path / "run" / "summary.json").read_text()
    for path in (tmp_path / "run" / "checkpoints").glob("*.ckpt"):
        weights = torch.load(path, weights_only=True)["state_dict"]
        assert all(tensor.isfinite().all() for tensor in weights.values())
