"""How mistakes in the settings of a training are answered: one line on stderr, exit code 2, nothing trained."""

import re
import runpy
import sys
from pathlib import Path

import pytest

from tests.commands.bad_places import Places
from tests.commands.error_line import error_line
from tests.commands.small import ROOT, small_run

LEARNT = "lkda.training.callbacks.StopWhenLearnt"
# On the command line a value with commas, spaces or dots in it is quoted as any shell would pass it.
TRAINING = [
    # settings
    ("trainer.max_step=5", r"Could not override 'trainer.max_step'. Did you mean max_steps\? It has .*accelerator"),
    ("+colour=red", r"train has no option colour; it has seed, backend, .*, model, mixer, data"),
    ("~resume", r"train needs its option resume: leave ~resume out"),
    ("~seed", r"train needs its option seed: leave ~seed out"),
    ("modle.d_model=5", r"Could not override 'modle.d_model'.* Did you mean model\?"),
    ("mixer=kdaa", r"mixer=kdaa: there is no such mixer; there are .*kda_mla_3to1.*softmax_conv; did you mean kda\?$"),
    ("model=tinny", r"model=tinny: there is no such model; there are .*; did you mean tiny\?$"),
    ("data=texts", r"data=texts: there is no such data set; there are .*, files, [^?]*\.$"),
    ("experiment=ablation", r"experiment=ablation: there is no such experiment; .* did you mean ablations\?$"),
    ("hydra/launcher=jobli", r"hydra/launcher=jobli: there is no such launcher; .* did you mean joblib\?$"),
    ("optimizer.learning_rate=1", r"Could not override 'optimizer.learning_rate'. Did you mean lr\? It has name, lr"),
    ("mixer.kda.gates=head", r"Could not override 'mixer.kda.gates'. Did you mean gate\?"),
    ("mixer.kda.gate=heads", r"mixer.kda.gate must be one of channel, head, none, got 'heads'"),
    ("+mixer.kda.colour=red", r"mixer 'kda' has no option colour; it has conv_width, conv_std, activation, gate, "),
    ("mixer.pattern=[kdaa]", r"unknown mixer 'kdaa'; there are conv, kda, mla, simplified, softmax"),
    ("model.d_model=30 mixer.num_heads=4", r"mixer.num_heads must divide model.d_model = 30, got 4"),
    ("model.num_layers=0", r"model.num_layers must be a whole number of 1 or more, got 0"),
    ("model.d_model=wide", r"model.d_model must be a whole number of 1 or more, got 'wide'"),
    ("trainer.max_steps=-5", r"trainer.max_steps must be a whole number of 1 or more, got -5"),
    ("trainer.max_steps=many", r"trainer.max_steps must be a whole number of 1 or more, got 'many'"),
    ("trainer.max_tokens=0", r"trainer.max_tokens must be a whole number of 1 or more, got 0"),
    ("checkpoint.every_n_steps=0", r"checkpoint.every_n_steps must be a whole number of 1 or more, got 0"),
    ("trainer.accumulate_grad_batches=1000000000", r"trainer.accumulate_grad_batches must be at most 65536, got 10000"),
    (
        "data.batch_size=100000000",
        r"one batch of 3,200,000,000 tokens needs more than \d+.*the machine has .*batch_size",
    ),
    (
        "model.d_model=400000 model.mlp_hidden=400000",
        r"a model of [\d,]+ parameters needs more than [\d,]+ GiB of memory to train, and the machine has",
    ),
    (
        "model.d_model=400000 model.mlp_hidden=400000 trainer=ddp trainer.accelerator=cpu trainer.devices=2",
        r"needs more than [\d,]+ GiB of memory to train in 2 processes, and the machine",
    ),
    ("data=mqar data.power=1e30", r"data.power must be from -20 to 20, got 1e\+30"),
    ("seed=-1", r"seed must be a whole number of 0 or more, got -1"),
    ("optimizer.lr=0", r"optimizer.lr must be greater than 0, got 0"),
    ("optimizer=muon optimizer.momentum=1", r"optimizer.momentum must be in \[0, 1\), got 1"),
    ("scheduler.name=linear", r"scheduler.name must be one of constant, cosine, wsd, got 'linear'"),
    ("backend=cuda", r"kda\(backend='cuda'\): the tensors are on cpu, .*; use backend='auto' or backend='chunk', or"),
    ("backend=cudda", r"no mixer of kda has a backend 'cudda'; they have auto, .*chunk"),
    ("trainer.limit_val_batches=0", r"trainer.limit_val_batches must be above 0: a run always validates at the end"),
    ("trainer.devices=2", r"trainer.devices=2 needs several devices: choose trainer=ddp, or trainer=fsdp"),
    (
        "trainer=ddp trainer.accelerator=cpu trainer.devices=3",
        r"data.batch_size=2 sequences cannot be divided among 3 devices: give a multiple of 3, or trainer.global_batch",
    ),
    (
        "trainer=ddp trainer.accelerator=cpu trainer.devices=2 trainer.global_batch=false data.batch_size=-2",
        r"data.batch_size must be a whole number of 1 or more, got -2",
    ),
    (
        "trainer=ddp trainer.accelerator=cpu trainer.devices=100000 trainer.global_batch=false",
        r"trainer.devices=100000 would start 100000 processes on the CPU: use at most \d+",
    ),
    (
        "trainer=ddp trainer.accelerator=cpu trainer.devices=2 trainer.context_parallel=4",
        r"trainer.context_parallel=4 must divide the number of devices, which is 2",
    ),
    ("trainer=gpu", r"a GPU was asked for and torch sees no CUDA device; use trainer=cpu or trainer=auto"),
    ("model.d_model=99999999999999999999", r"model.d_model must be at most 1048576, got 99999999999999999999"),
    ("model.num_layers=99999999", r"model.num_layers must be at most 16384, got 99999999"),
    ("model.norm_eps=nan", r"model.norm_eps must be a number above 0, got nan"),
    ("model.tie_embeddings=maybe", r"model.tie_embeddings must be true or false, got 'maybe'"),
    ("mixer.num_heads=two", r"mixer.num_heads must divide model.d_model = 32, got 'two'"),
    ("mixer.kda=5", r"mixer.kda must hold the options of that mixer by name, got 5"),
    ("mixer.kda.conv_width=wide", r"mixer.kda.conv_width must be a whole number .*, got 'wide'"),
    ("mixer.kda.output_gate=5", r"mixer.kda.output_gate must be true or false, got 5"),
    ("model.vocab_size=10", r"model.vocab_size must be at least 257 \(256 bytes and <.endoftext.>\), got 10"),
    ("data.vocab_size=10", r"data.vocab_size must be at least 257 "),
    ("model.vocab_size=large", r"model.vocab_size must be a whole number of 1 or more, got 'large'"),
    ("model.vocab_size=-1", r"model.vocab_size must be a whole number of 1 or more, got -1"),
    ("model.init=null", r"model.init must hold embedding_std, .*, got None"),
    ("model.embed_norm=5", r"model.embed_norm must be true or false, got 5"),
    ("model.embed_scale=nan", r"model.embed_scale must be a number above 0, got nan"),
    (
        "callbacks=default callbacks.progress._target_=builtins.dict",
        r"callbacks.progress._target_=builtins.dict makes a dict, which is not a Lightning callback",
    ),
    (
        "callbacks=default callbacks.progress._target_=lkda.training.nothing.Bar",
        r"callbacks.progress._target_=lkda.training.nothing.Bar cannot be imported: there is no class or function of",
    ),
    (
        "callbacks=default callbacks.progress._target_=lkda.training.callbacks",
        r"callbacks is not a class or a function",
    ),
    (
        "callbacks=default +callbacks.progress.colour=red",
        r"colour is not an option of TrainingProgress, which takes none",
    ),
    (
        "callbacks=default +callbacks.learnt.accuracy=0.9",
        r"callbacks.learnt is not a callback, .* _target_: add \+callbacks.learnt._target_=CLASS, for example lkda.",
    ),
    ("+callbacks.progress.colour=red", r"callbacks.progress is not a callback, .*: choose callbacks=default first"),
    (
        f"+callbacks.learnt._target_={LEARNT}",
        r"callbacks.learnt.accuracy is missing, which StopWhenLearnt needs: add \+callbacks.learnt.accuracy=VALUE\.",
    ),
    (
        f"data=palindrome +callbacks.learnt={{{{_target_:{LEARNT},accuracy:high}}}}",
        r"callbacks.learnt.accuracy must be a finite number, got 'high'",
    ),
    (
        f"data=palindrome +callbacks.learnt={{{{_target_:{LEARNT},accuracy:2}}}}",
        r"the accuracy of StopWhenLearnt must be above 0 and at most 1, got 2",
    ),
    (
        f"data.paths=[{{tmp}}/latin1.txt] +callbacks.learnt={{{{_target_:{LEARNT},accuracy:0.9}}}}",
        r"StopWhenLearnt needs data with an accuracy, such as data=mqar: leave it out for text",
    ),
    ("hydra.run.dir=''", r"hydra.run.dir is empty: give a directory, or leave it out"),
    ("mixer=mla mixer.mla.qk_nope_head_dim=-1", r"mixer.mla.qk_nope_head_dim must be a whole number of 1 or more"),
    ("mixer=mla mixer.mla.kv_lora_rank=0", r"mixer.mla.kv_lora_rank must be a whole number of 1 or more, got 0"),
    ("mixer=mla mixer.mla.qk_rope_head_dim=7", r"mla.qk_rope_head_dim must be even, got 7: choose an even number, or"),
    (
        "mixer=softmax mixer.softmax.rope_base=0",
        r"mixer.softmax.rope_base must be a number above 0, got 0.* or rope_base=null",
    ),
    ("mixer=mla mixer.mla.rope_base=0", r"mixer.mla.rope_base must be a number above 0, got 0.* or rope_base=null"),
    ("mixer.pattern=-1", r"mixer must hold `pattern`, a list of mixer names, and `num_heads`; got pattern -1 "),
    ("mixer.pattern=[null]", r"unknown mixer None; there are conv, "),
    ("model.name=null", r"model.name must be text, got None"),
    ("mixer.name=null", r"mixer.name must be text, got None"),
    ("init_from=nowhere", r"init_from: nowhere does not exist: give a directory that .* has written with format=lkda"),
    ("~model.learning_rate init_from=nowhere", r"init_from: nowhere does not exist"),
    ("init_from={tmp}/short.txt", r"init_from: .*short.txt is a file: give a directory that"),
    ("init_from={tmp}/folder", r"init_from: .*folder is no exported model: it has no config.json"),
    ("init_from={run}", r"init_from needs an exported directory, but .*run is a run directory: export it first with"),
    ("init_from={tmp}/gguf", r"init_from: .*gguf holds a GGUF file, which is for llama.cpp .*export .* format=lkda or"),
    ("init_from=''", r"init_from must be the path of an exported directory, got ''"),
    (
        "rope_base=500000",
        r"rope_base=500000 changes the model of init_from, which is null: give init_from, or leave",
    ),
    ("init_from=5 rope_base=0", r"rope_base must be a number above 0, got 0"),
    ("init_from=5 rope_base=far", r"rope_base must be a finite number or null, got 'far'"),
    # data
    (
        "data.paths=[2012]",
        r"""data.paths must be a path, got 2012: a name that looks like a number needs quotes, '"2012"'""",
    ),
    ("data.val_paths=null", r"data.val_paths must be a list, each entry text, got None"),
    ("data.val_fraction=much", r"data.val_fraction must be a finite number, got 'much'"),
    ("data.val_fraction=0.1 data.val_from_year=2012", r"data.val_fraction has no effect beside data.val_from_year"),
    ("data.vocab_size=300 data.tokenizer_path={run}/tokenizer.json", r"data.vocab_size has no effect beside data.tok"),
    ("data.text_column=body", r"data.text_column is for .jsonl, .json and .parquet files, but these are text"),
    ("data.num_workers=99999", r"data.num_workers must be at most 256, got 99999: each is a process"),
    ("data.pin_memory=maybe", r"data.pin_memory must be true or false or null, got 'maybe'"),
    ("data._target_=lkda.data.text.datamodule.Nothing", r"datamodule.Nothing cannot be imported: there is no class"),
    (
        "data._target_=builtins.dict",
        r"data._target_=builtins.dict is not a data module of lkda: choose one of the data=",
    ),
    ("data.paths=[{tmp}/mixed.jsonl]", r"column 'text' of .*mixed.jsonl holds a number, not text, in row 2"),
    ("data.paths=['~nobody_of_this_name/a.txt']", r"the home directory in ~nobody_of_this_name/a.txt is not known"),
    ("+data.colour=red", r"data.colour is not an option of \w+, which takes "),
    (
        "data.paths=[{tmp}/missing.txt]",
        r"missing.txt does not exist: give the path of a file or a directory, or a glob",
    ),
    ("data.paths=[{tmp}/*.none]", r"data path .*/\*.none matches no file: give a glob that matches some, or the path"),
    ("data=tokens data.paths=[{tmp}/*.bin]", r"data.paths: .*/\*.bin matches no file: give a glob that matches some"),
    ("data.paths=[]", r"data.paths is empty"),
    ("data.paths=[{tmp}/loop.txt]", r"data path .*loop.txt is a link to nothing"),
    ("data.paths=[{tmp}/folder]", r"folder holds no file of a known kind: .txt"),
    ("data.paths=[{tmp}/empty.txt]", r"empty.txt is empty: leave it out, or give a file with text"),
    ("data.paths=[{tmp}/blank.txt]", r"blank.txt holds only white space: leave it out, or give a file with text"),
    ("data.paths=[{tmp}/latin1.txt]", r"latin1.txt is not UTF-8"),
    ("data.paths=[{tmp}/short.txt]", r"the training text must have at least 33 tokens"),
    ("data.context=0", r"data.context must be a whole number of 1 or more, got 0"),
    (
        "data.vocab_size=350",
        r"the tokenizer has 350 tokens, but the model has only 300 rows: set model.vocab_size to 350 or more, or data.",
    ),
    (
        "data=tokens data.paths=[{tmp}/tokens] model.vocab_size=3",
        r"has 300 tokens, but the model has only 3 rows: set model.vocab_size to 300 or more\.$",
    ),
    (
        "data.tokenizer_path={tmp}/one_word.json",
        r"the tokenizer of data.tokenizer_path cannot encode the text \(.*UNK.*\); give one that knows every byte",
    ),
    ("data.tokenizer_path={tmp}/no.json", r"no tokenizer at .*/no.json, which does not exist: give the path of a tok"),
    ("data.tokenizer_path={run}", r"no tokenizer at .*run, which is a directory: give .*/run/tokenizer.json\.$"),
    ("data.tokenizer_path={tmp}/short.txt", r"short.txt is not a tokenizer.json"),
    # lists of the configuration
    (
        "data=mqar data.train=[{{length:32,examples:16}}]",
        r"data.train must have the entries length, pairs, examples; pairs is missing in {'length': 32, 'examples': 16}",
    ),
    (
        "data=mqar data.train={{length:32,pairs:2,examples:16}}",
        r"data.train must be a list, got {length:32,pairs:2,examples:16}: put it into brackets, data.train='\[{length",
    ),
    (
        "data=mqar data.train[0].pairs=5",
        r"data.train\[0\].pairs is not a setting: an entry of a list is named with dots, as in data.train.0.pairs=5$",
    ),
    ("data=mqar data.train.9.pairs=5", r"there is no data.train\[9\]: the list has 1, numbered from 0"),
    ("data=mqar data.train.x.pairs=5", r"'x' is not the number of an entry of a list: entries are numbered from 0"),
    ("data=mqar data.train.pairs=5", r"'pairs' is not the number of an entry of a list: .* data.train.0.pairs=5 for"),
    ("mixer.kda=[1]", r"mixer.kda must hold names with values as in {name: value}, got \[1\]"),
    (
        "data=mqar data.validation=[{{length:32,pairs:2,examples:4}},{{length:32,pairs:2,examples:9}}]",
        r"data.validation has a subset of length 32, pairs 2 twice: leave one of them out",
    ),
    ("data=palindrome data.val_lengths=[64,64]", r"data.val_lengths has 64 twice: leave one of them out"),
    (
        "data=palindrome data.val_lengths=[2000000000] data.val_examples=4096 data.batch_size=4096",
        r"of 2,000,000,000 tokens, 4096 at a time, need more than [\d,]+ GiB of memory, .*: lower data.val_lengths or",
    ),
    # options that another one leaves without effect
    ("mixer.kda.lower_bound=-4", r"mixer.kda.lower_bound has no effect without mixer.kda.gate_form=bounded; leave it"),
    ("mixer.kda.gate=none mixer.kda.gate_form=bounded", r"mixer.kda.gate_form has no effect beside mixer.kda.gate"),
    ("mixer.kda={{gate:none,lower_bound:-4}}", r"mixer.kda.lower_bound has no effect beside mixer.kda.gate"),
    ("mixer.pattern=[softmax] mixer.kda.gate=head", r"mixer.kda.gate has no effect in a model without a kda layer"),
    ("+mixer.softmax.rope_base=5000", r"mixer.softmax.rope_base has no effect in a model without a softmax layer"),
    ("mixer=kda_softmax_3to1 mixer.softmax.qk_norm=false", r"softmax.qk_norm has no effect in a model without a"),
    ("mixer=conv mixer.num_heads=4", r"mixer.num_heads has no effect in a model of conv layers, which have no heads"),
    (
        "mixer=softmax mixer.softmax.qk_norm=false +mixer.softmax.norm_eps=1e-4",
        r"norm_eps has no effect without mixer.softmax.qk_norm=true",
    ),
    ("model.num_heads=4 mixer.num_heads=2", r"model.num_heads has no effect beside mixer.num_heads"),
    ("model.learning_rate=1e-3 optimizer.lr=1e-4", r"model.learning_rate has no effect beside optimizer.lr"),
    ("mixer.learning_rate.tiny=1e-4", r"mixer.learning_rate.tiny has no effect beside model.learning_rate"),
    (
        "~model.learning_rate optimizer.lr=1e-3 mixer.learning_rate.tiny=1e-4",
        r"mixer.learning_rate.tiny has no effect beside optimizer.lr",
    ),
    (
        "~model.learning_rate model.name=tiny mixer.learning_rate.small=1e-4",
        r"mixer.learning_rate.small has no effect for a model of another name, model.name",
    ),
    (
        "hydra.run.dir={run} resume=true model.learning_rate=1e-4",
        r"holds a run with other settings \(optimizer.lr: 0.004 is recorded, 0.0001 is given\)",
    ),
    ("model.init.head_std=0", r"model.init.head_std has no effect beside model.tie_embeddings=true"),
    ("optimizer.lr_scale.head=2", r"optimizer.lr_scale.head has no effect beside model.tie_embeddings=true"),
    ("mixer=softmax mixer.softmax.conv_std=0.1", r"mixer.softmax.conv_std has no effect beside .*softmax.conv_width=0"),
    (
        "mixer.kda.conv_width=0 mixer.kda.conv_std=0.1",
        r"mixer.kda.conv_std has no effect beside mixer.kda.conv_width=0",
    ),
    ("trainer.max_tokens=1000 trainer.max_steps=5", r"trainer.max_steps has no effect beside trainer.max_tokens"),
    ("data=palindrome sample.prompt=a", r"sample.prompt has no effect for data whose tokens are not text"),
    ("data=mqar_kimi sample={{prompt:a}}", r"sample.prompt has no effect for data whose tokens are not text"),
    ("data=needle sample.top_p=0.5", r"sample.top_p has no effect for data whose tokens are not text"),
    ("sample.max_new_tokens=0 sample.temperature=1", r"sample.temperature has no effect beside sample.max_new_to"),
    ("sample.temperature=0 sample.top_p=0.5", r"sample.top_p has no effect beside sample.temperature=0"),
    ("hydra.sweep.dir={tmp}/sweep", r"hydra.sweep.dir has no effect in a single run, which uses hydra.run.dir"),
    (
        "data=hub data.name={tmp}/set data.revision=main",
        r"data.revision is for data sets on the hub, but .* is a",
    ),
    ("data=hub data.name={tmp}/set data.val_split=train", r"data.val_split=train is also data.split"),
    ("data=sotu +data.val_fraction=0.1", r"data.val_fraction has no effect with data=sotu and data=prose"),
    ("data=prose data.directory={tmp} data.cache_dir={tmp}", r"data.cache_dir has no effect beside data.directory"),
    ("data=prose +data.vocab_size=300", r"data.vocab_size has no effect with data=prose, which has its own tokenizer"),
    ("data.pin_memory=true", r"data.pin_memory has no effect where there is no GPU"),
    # the logger
    ("+logger.wandb.project=mine", r"logger.wandb is not a logger.*: choose logger=wandb"),
    ("logger=wandb logger.wandb.tags=[1]", r"logger.wandb.tags must be a list, each entry text or null, got \[1\]"),
    ("logger=wandb logger.wandb._target_=lkda.nothing", r"logger.wandb._target_=lkda.nothing cannot be imported"),
    (
        "logger=wandb +logger.wandb.colour=red",
        r"logger.wandb.colour is not an option of wandb_logger, which takes .*tags",
    ),
    ("+logger.wandb=0", r"logger.wandb is not a logger"),
    (
        "logger.wandb.project=mine",
        r"Could not override 'logger.wandb.project'. It is a setting of logger=wandb: choose",
    ),
    (
        "data.val_fraction=0.1",
        r"'data.val_fraction'. It is a setting of data=completions, data=files, .*: choose one of these. The chosen",
    ),
    ("mixer.mla.qk_norm=true", r"It is a setting of mixer=kda_mla_3to1, mixer=mla: choose one of these."),
    (
        "data=mqar",
        r"data=mqar has 8192 tokens, but the model has only 2048 rows: choose model=recall, or set model.voc",
    ),
    # the sample at the end
    ("sample.temperature=-1", r"sample.temperature must be 0 or more, got -1"),
    ("sample.prompt=${{x}}", r"sample.prompt: Interpolation key 'x' not found. .*; in a text, write \\\$\{...\}"),
    ("sample.prompt=null", r"sample.prompt must be text, got None"),
    # directories
    ("hydra.run.dir={tmp}/short.txt", r"cannot create the output directory .*short.txt: .*short.txt is a file, and a"),
    ("hydra.run.dir={tmp}/short.txt/run", r"directory .*short.txt/run: .*short.txt is a file, and a directory is exp"),
    ("hydra.run.dir=/proc/lkda", r"cannot create the output directory /proc/lkda: No such file or directory"),
    (
        "hydra.run.dir={tmp}/foreign",
        r"foreign/config.yaml is not a configuration of lkda: choose another hydra.run.dir",
    ),
    (
        "hydra.run.dir={run} resume=true mixer=softmax",
        r"other settings \(mixer.name: kda is recorded, softmax is given\), so it cannot be resumed. Give the recorded",
    ),
    (
        "hydra.run.dir={run} resume=true data=sotu",
        r"other settings \(data.source: files is recorded, sotu is given\), so it cannot be resumed",
    ),
    ("hydra.run.dir={run}", r"already holds a run. Continue it with resume=true"),
    (
        "hydra.run.dir={run} resume=true model.d_model=16",
        r"holds a run with other settings \(model.d_model: 32 is recorded",
    ),
]


def _started(*_: object) -> None:
    raise AssertionError("the run has begun")


@pytest.mark.sample(8)
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
    chooses_data = any(word.startswith("data=") for word in given)
    base = ["debug=fast", "trainer=cpu"] if chooses_data else small_run(corpus)
    monkeypatch.setattr("lkda.commands.run.console.RunConsole.print_start", _started)
    printed = error_line("train.py", [*base, *given], monkeypatch, capsys)
    assert re.search(expected, printed), printed
    assert not (tmp_path / "run").exists()
    assert {path: path.read_bytes() for path in places.run.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("words", [(), ("hydra.run.dir=runs/${now:%H}",)])
def test_a_run_is_resumed_in_a_given_directory(
    words: tuple[str, ...],
    corpus: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Without one, a new run would begin in a new directory. Job scripts always give resume=true, and a directory that
    need not exist yet."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("lkda.commands.train.train", lambda config, directory: {"val/loss": directory})
    printed = error_line("train.py", [*small_run(corpus, "resume=true"), *words], monkeypatch, capsys)
    assert "resume=true needs the directory of the run to continue: give hydra.run.dir=DIRECTORY" in printed
    assert not [path for path in tmp_path.rglob("*") if path.name not in ("outputs", "runs")]


def test_resume_may_also_start_a_run(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[str] = []
    monkeypatch.setattr("lkda.commands.train.train", lambda config, directory: started.append(directory) or {})
    words = small_run(corpus, "resume=true", f"hydra.run.dir={tmp_path}/new")
    monkeypatch.setattr(sys, "argv", ["train.py", *words])
    runpy.run_path(str(ROOT / "scripts" / "train.py"), run_name="__main__")
    assert started == [f"{tmp_path}/new"]
