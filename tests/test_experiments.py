"""Every configuration that is written down composes and runs, if only for a few steps."""

import shlex
from itertools import product
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig

from lkda.commands.run.prepared_run import model_config
from lkda.commands.run.run_setup import model_options
from lkda.commands.settings.config import resolve
from lkda.commands.train import train
from lkda.models.build import build_model

CONFIGS = Path(__file__).parents[1] / "configs"
# A few steps of the real thing, on little text. The model, mixer and optimiser stay the experiment's own, but narrow.
BRIEF = (
    "data.batch_size=2",
    "model.d_model=32",
    "model.num_heads=2",
    "trainer.max_steps=2",
    "trainer.limit_val_batches=1",
    "sample.max_new_tokens=0",
    "callbacks=none",
)
OF_TEXT = (*BRIEF, "data.context=32", "model.mlp_hidden=48", "model.vocab_size=300")
# A task draws its own examples; only its many long ones are cut.
OF_TASKS = {
    "mqar": (
        "data.train=[{length: 32, pairs: 2, examples: 4}]",
        "data.validation=[{length: 32, pairs: 2, examples: 4}]",
    ),
    "palindrome": ("data.context=32", "data.val_examples=4"),
    "mqar_kimi": ("data.context=32", "data.val_examples=4"),
    "mqar_answered": ("data.context=32", "data.val_examples=4"),
    "stack": ("data.context=32", "data.val_examples=4"),
}


def names(group: str) -> list[str]:
    return sorted(path.stem for path in (CONFIGS / group).glob("*.yaml"))


def composed(*overrides: str, with_hydra: bool = False) -> DictConfig:
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        return compose("train", overrides=list(overrides), return_hydra_config=with_hydra)


def run(config: DictConfig, directory: Path) -> None:
    summary = train(config, directory)
    assert summary["status"] == "finished"
    assert summary["val/loss"] < 20


# Those of one job or two are fast, and in each of the slow ones something else is swept. The long ones are larger forms
# of these, or sweep settings that have tests of their own.
MARKS = dict.fromkeys(names("experiment"), pytest.mark.long)
MARKS |= dict.fromkeys(("mqar_by_state_size", "long_context"), pytest.mark.slow)
MARKS |= dict.fromkeys(("learning_rates", "mqar_learnt"), ())
EXPERIMENTS = [pytest.param(name, marks=MARKS[name]) for name in names("experiment")]


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_every_experiment_runs(experiment: str, corpus: Path, tmp_path: Path) -> None:
    """Each job of the sweep, where it is one; of those that differ in numbers alone, which are cut, the first."""
    config = composed(f"experiment={experiment}", with_hydra=True)
    params = [f"{name}={values}" for name, values in (config.hydra.sweeper.params or {}).items()]
    jobs = [job for line in config.get("sweeps", [""]) for job in _jobs([*params, *shlex.split(line)])]
    for number, swept in enumerate(jobs):
        data = swept.get("data", config.hydra.runtime.choices.data)
        mixed = ["~data.weights"] if config.data.get("weights") else []  # the corpus is one source
        text = ("data=files", f"data.paths=[{corpus}]", *mixed, *OF_TEXT)
        cut = (*BRIEF, *OF_TASKS[data]) if data in OF_TASKS else text
        words = [f"{name}={value}" for name, value in swept.items()]
        fresh = ["rope_base=null"] if config.rope_base else []  # the model is no exported one here
        run(composed(f"experiment={experiment}", *words, *cut, *fresh), tmp_path / str(number))


def _jobs(sweep: list[str]) -> list[dict[str, str]]:
    """The swept settings of each job; a setting that comes twice has its last values."""
    choices: dict[str, list[str]] = {}
    for one in OverridesParser.create().parse_overrides(sweep):
        values = [*one.sweep_string_iterator()] if one.is_sweep_override() else [one.get_value_element_as_str()]
        choices[one.get_key_element()] = values if all(map(_is_a_word, values)) else values[:1]
    return [dict(zip(choices, values)) for values in product(*choices.values())]


def _is_a_word(value: str) -> bool:
    return not value.strip()[0].isdigit()


@pytest.mark.long
def test_mixers_compared_in_language_have_the_same_parameters() -> None:
    mixers = composed("experiment=lm_by_mixer", with_hydra=True).hydra.sweeper.params.mixer.split(",")
    sizes = []
    for mixer in mixers:
        config = composed("experiment=lm_by_mixer", f"mixer={mixer}")
        with torch.device("meta"):
            sizes.append(
                build_model(
                    model_config(model_options(resolve(config)), vocab_size=16384, context=1024)
                ).num_parameters()
            )
    assert len(sizes) == 6
    assert max(sizes) < 1.01 * min(sizes)


@pytest.mark.sample(3)
@pytest.mark.parametrize("task", OF_TASKS)
def test_every_task_runs(task: str, tmp_path: Path) -> None:
    run(composed(f"data={task}", "model=recall", *BRIEF, *OF_TASKS[task]), tmp_path / "run")


@pytest.mark.parametrize(
    "debug", [pytest.param(name, marks=() if name == "fast" else pytest.mark.slow) for name in names("debug")]
)
def test_every_debug_configuration_runs(debug: str, corpus: Path, tmp_path: Path) -> None:
    run(composed(f"debug={debug}", "data=files", f"data.paths=[{corpus}]", *OF_TEXT), tmp_path / "run")


@pytest.mark.sample(4)
@pytest.mark.parametrize(
    ("model", "mixer"),
    [*(("small", mixer) for mixer in names("mixer")), ("base", "simplified"), ("base", "kda_mla_3to1")],
)
def test_every_mixer_fits_every_model(model: str, mixer: str) -> None:
    """Built without memory: the sizes of the larger models are those that are promised."""
    config = composed(f"model={model}", f"mixer={mixer}")
    with torch.device("meta"):
        built = build_model(model_config(model_options(resolve(config)), vocab_size=1, context=1024))
    layers, width, head = {"small": (8, 512, 64), "base": (24, 1024, 128)}[model]
    assert len(built.mixers()) == layers
    assert tuple(built.embed_tokens.weight.shape) == (32000, width)
    assert {mixer.head_dim for mixer in built.mixers()} == {head}


@pytest.mark.slow
@pytest.mark.parametrize("group", ["optimizer", "scheduler", "trainer", "callbacks", "logger"])
def test_every_choice_composes(group: str) -> None:
    choices = names(group)
    assert choices
    for choice in choices:
        assert composed(f"{group}={choice}")[group] is not None
