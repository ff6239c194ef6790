"""What a run prints: its settings at the start; its results, a sample of text and the next commands at the end."""

from __future__ import annotations

import glob
from typing import Any

from rich.console import Console
from rich.panel import Panel
from rich.table import Table
from rich.text import Text
from tokenizers import Tokenizer

from lkda.commands.command_line.invocation import command, given_overrides, short, typed_overrides
from lkda.commands.command_line.overrides import override
from lkda.commands.command_line.text import encode_prompt, text_pieces
from lkda.commands.run.prepared_run import PreparedRun
from lkda.commands.run.run_directory import RunDirectory
from lkda.commands.run.run_setup import RunPlan
from lkda.formats import has_folded_embedding
from lkda.models.generate import generate
from lkda.models.lm import LanguageModel
from lkda.perplexity import TOO_LARGE
from lkda.special_tokens import document_ends
from lkda.training.callbacks import InterruptedRunError
from lkda.training.options import SampleOptions


def draw_sample(model: LanguageModel, tokenizer: Tokenizer, sample: SampleOptions, *, seed: int) -> str:
    """The prompt of `sample`, followed by the model's continuation."""
    model.eval()
    tokens = encode_prompt(tokenizer, sample.prompt).to(next(model.parameters()).device)
    sampled = generate(
        model,
        tokens,
        max_new_tokens=sample.max_new_tokens,
        temperature=sample.temperature,
        top_p=sample.top_p,
        seed=seed,
        end_tokens=document_ends(tokenizer),
    )
    return sample.prompt + "".join(text_pieces(tokenizer, sampled, continues=bool(sample.prompt)))


class RunConsole:
    """Prints the messages of the run in a run directory."""

    def __init__(self, run: RunDirectory) -> None:
        self.run = run
        self.console = Console(highlight=False, markup=False, emoji=False)

    def _line(self, text: str) -> None:
        """`text` as it is: Rich would expand a tab in a path."""
        print(text, file=self.console.file)

    def print_nothing_to_do(self, prepared: PreparedRun) -> None:
        """Print that the run is finished, why if an accuracy ended it, and how to train on."""
        steps, stop = prepared.first_step, prepared.plan.stop_accuracy
        accuracy = prepared.learnt_accuracy(self.run.read_summary())
        why, advice = "", []
        if steps >= prepared.total_steps and prepared.plan.trainer.max_tokens is None:
            advice.append(f"set trainer.max_steps to more than {steps}")
        elif steps >= prepared.total_steps:
            advice.append(f"set trainer.max_tokens to more than {steps * prepared.metadata['tokens_per_step']}")
        if accuracy is not None and stop is not None:
            why = f". Its accuracy of {accuracy} has reached {stop[0]}={stop[1]}, which ends a run of any length"
            higher = f"set {stop[0]} to more than {accuracy}, or " if accuracy < 1 else ""
            advice.append(f"{higher}leave this callback out")
        self._line(
            f"{self.run.path} holds a finished run of {steps} steps{why}: nothing to do. "
            f"To train on, {', and '.join(advice)}."
        )

    def print_lost_rows(self, step: int) -> None:
        self._line(
            f"warning: {self.run.metrics} has no row up to step {step}, from which the run continues. Its rows begin "
            "after that step. If you have the file, stop the run and put it back."
        )

    def print_start(self, prepared: PreparedRun) -> None:
        """Print the model, the data, the device, and the weights that the run starts from."""
        plan, metadata = prepared.plan, prepared.metadata
        backends = " ".join(f"{op}={word}" for op, word in plan.backends.items())
        self._line(
            f"{metadata['mixer']} · {metadata['model']} · {metadata['data']} on {plan.device}, "
            f"{plan.trainer.precision}{f', backend {backends}' if backends else ''}; "
            f"{prepared.total_steps:,} steps of {metadata['tokens_per_step']:,} tokens, "
            f"peak learning rate {plan.optimizer['lr']:g}\nrun directory {self.run.path}"
        )
        if plan.init_from is not None:
            self._line(f"weights, model and tokenizer from {plan.init_from}")
            if has_folded_embedding(plan.init_from):
                self._line(
                    "the export folded the norm or scale of the embedding into the embedding table: this model has "
                    "neither, and its head is not tied to the embedding"
                )
        if plan.resume:
            fresh = prepared.checkpoint is None
            self._line(
                "no checkpoint is saved here yet: starting from step 0"
                if fresh
                else f"resuming from step {prepared.first_step}"
            )
        if plan.trainer.strategy != "single":
            self._print_devices(plan)
        if plan.compile == "auto" and plan.device.type == "cuda":
            self._print_what_is_not_compiled(prepared)
        if prepared.data.left_out is not None:
            self._line(f"not trained on: {prepared.data.left_out}")
        if prepared.data.no_test is not None:
            self._line(f"no test split: {prepared.data.no_test}")

    def _print_devices(self, plan: RunPlan) -> None:
        trainer = plan.trainer
        sequences = plan.data["batch_size"] // trainer.data_parallel
        parts = f", each {trainer.context_parallel} of them sharing a sequence" if trainer.context_parallel > 1 else ""
        devices = f"{trainer.world_size} device{'s' * (trainer.world_size != 1)} with {trainer.strategy}{parts}"
        self._line(f"{devices}; {sequences} sequence{'s' * (sequences != 1)} at a time on each")

    def _print_what_is_not_compiled(self, prepared: PreparedRun) -> None:
        for what, reason in (("torch.compile", prepared.without_compiler), ("CUDA graphs", prepared.without_graphs)):
            if reason is not None:
                self._line(f"compile=auto: without {what}, which {reason} does not allow")

    def print_interruption(self, ending: InterruptedRunError) -> None:
        """Print how to continue the run."""
        self._line(f"{ending}. Continue with\n  {resume_command(self.run)}")

    def print_result(self, prepared: PreparedRun, summary: dict[str, Any], sample: str | None) -> None:
        """Print the table of results, the sample (if the tokens are text) and the next commands."""
        table = Table(title=f"{summary['mixer']} · {summary['model']} · {summary['data']}", show_header=False)
        table.add_column(style="bold")
        table.add_column(justify="right")
        for name, value in (
            ("validation loss", f"{summary['val/loss']:.4f} nats per token"),
            *([("test loss", f"{summary['test/loss']:.4f} nats per token")] if "test/loss" in summary else []),
            *(_of_text(summary) if sample is not None else _of_subsets(summary)),
            ("parameters", f"{summary['params']:,} ({summary['params_non_embedding']:,} without embeddings)"),
            ("state of one sequence", f"{summary['state_bytes']:,} bytes at {summary['context']} tokens"),
            ("tokens trained on", f"{summary['tokens']:,} in {summary['seconds']:.0f} s"),
            ("tokens/s", f"{summary['tokens_per_s']:,.0f}"),
            *([("steps skipped", f"{summary['skipped_steps']:,}")] if summary["skipped_steps"] else []),
        ):
            table.add_row(name, value)
        self.console.print(table)
        if sample is not None:
            self.console.print(Panel(Text(sample), title="a sample"))
        self._line(f"run directory {short(self.run.path)}\nnext:")
        for line in _next_commands(self.run, prepared.plan, summary, of_text=sample is not None):
            self._line(f"  {line}")


def resume_command(run: RunDirectory) -> str:
    """The command that continues the run in that directory, with the options of this command line."""
    given = given_overrides(without=("resume=",))
    return command("train", *given, override("hydra.run.dir", str(run.path)), "resume=true")


def _next_commands(run: RunDirectory, plan: RunPlan, summary: dict[str, Any], *, of_text: bool) -> list[str]:
    checkpoints = f"{short(run.path)}/checkpoints"
    beside = f"{glob.escape(short(run.path.parent))}/*"
    sample = command("generate", override("ckpt", f"{checkpoints}/last.ckpt"), "prompt=The people")
    evaluate = command("evaluate", override("ckpt", f"{checkpoints}/best.ckpt"))
    return [
        *([sample] if of_text else []),
        *([evaluate] if of_text or "val_subsets" in summary else []),  # not of random tokens
        # The model of init_from has its mixer.
        *([_with_other_mixer(run, summary, of_text=of_text)] if plan.init_from is None else []),
        command("compare", override("runs", beside), "out=comparison"),
    ]


def _with_other_mixer(run: RunDirectory, summary: dict[str, Any], *, of_text: bool) -> str:
    """The command that trains the same model with another mixer, without what belongs to this one."""
    other = "softmax" if summary["mixer"] != "softmax" else "kda"
    if any(word.startswith("mixer=conv_") for word in typed_overrides()):
        other = f"conv_{other}"  # it has a convolution as its first layer, too
    given = given_overrides(without=("backend=", "resume="))
    same = [word for word in given if not word.lstrip("+~").startswith("mixer") or word.startswith("mixer.num_heads=")]
    if not same and not of_text:
        same = [f"data={summary['data']}", f"model={summary['model']}"]
    # A directory of its own beside this one, if this one was named: so `compare` finds both runs.
    named = any(word.startswith("hydra.run.dir=") for word in typed_overrides(of_hydra=True))
    name = other if run.path.name == summary["mixer"] else f"{run.path.name}_{other}"
    other_run = [override("hydra.run.dir", short(run.path.with_name(name)))] if named else []
    return command("train", *same, f"mixer={other}", *other_run)


def _of_text(summary: dict[str, Any]) -> list[tuple[str, str]]:
    """Rows of the table for text: of the test split if there is one, else of the validation."""
    tested = "test/loss" in summary
    split, of = ("test", " of the test split") if tested else ("val", "")
    entropy = summary["test_unigram_entropy" if tested else "unigram_entropy"]
    gain, perplexity = entropy - summary[f"{split}/loss"], summary[f"{split}/perplexity"]
    compared = f"{abs(gain):.2f} {'lower' if gain > 0 else 'higher'}"
    return [
        (f"unigram entropy{of or ' of the text'}", f"{entropy:.4f} (the loss is {compared})"),
        (f"perplexity{of}", TOO_LARGE if perplexity is None else f"{perplexity:.2f}"),
        (f"bits per byte{of}", f"{summary[f'{split}/bits_per_byte']:.4f}"),
    ]


def _of_subsets(summary: dict[str, Any]) -> list[tuple[str, str]]:
    rows = []
    for record in summary.get("val_subsets", []):  # none of random tokens
        words = ", ".join(f"{name} {value}" for name, value in record["subset"].items())
        if "accuracy" in record:
            rows.append(
                (f"accuracy, {words}", f"{record['accuracy']:.2%} of tokens, {record['sequence_accuracy']:.2%} whole")
            )
    return rows
