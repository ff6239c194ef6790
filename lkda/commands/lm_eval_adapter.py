"""Runs tasks of lm-eval (the extra `lkda[eval]`) on a model of lkda, with its own tokenizer and without a network."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lkda.checks import InputError
from lkda.commands.run.checkpoint_loading import TrainedModel
from lkda.data.text.tokenizer import decode_tokens, document_start, encode_text
from lkda.models.decoding import prepare_decoding
from lkda.models.generate import generate
from lkda.shipped import TASKS
from lkda.special_tokens import document_ends


def run_tasks(
    trained: TrainedModel, names: list[str], *, folder: str | Path | None, limit: int | None, device: torch.device
) -> dict[str, dict[str, float]]:
    """Run lm-eval tasks.

    Args:
        names: of the tasks.
        folder: holds the task files. None means those that come with lkda.
        limit: number of questions of each task. None means all.
    Returns: {task: {metric: value}}.
    Raises: InputError if lm-eval is not installed, or if a task is not in the folder. The message names the tasks that
        are.
    """
    try:
        import lm_eval
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise InputError(f"tasks=[...] needs lm-eval: pip install 'lkda[eval]' ({error}).") from error
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    folder = Path(folder or TASKS)
    if not folder.is_dir():
        raise InputError(f"tasks_path must be a directory of lm-eval task files, but {folder} is not a directory.")
    manager = TaskManager(include_path=str(folder), include_defaults=False)
    unknown = [name for name in names if name not in manager.all_tasks]
    if unknown:
        known = ", ".join(sorted(manager.all_tasks)) or "none"
        raise InputError(f"there is no task {', '.join(unknown)} in {folder}; the tasks there are {known}.")
    found = lm_eval.simple_evaluate(
        model=_language_model(trained, device),
        tasks=names,
        task_manager=manager,
        limit=limit,
        bootstrap_iters=0,
        log_samples=False,
    )
    return {name: _numbers(values) for name, values in found["results"].items()}


def _numbers(values: dict[str, Any]) -> dict[str, float]:
    """The metrics without the name of their filter, and without those that have no numeric value."""
    return {
        name.partition(",")[0]: float(value)
        for name, value in values.items()
        if isinstance(value, int | float) and "stderr" not in name and name != "sample_len"
    }


def _language_model(trained: TrainedModel, device: torch.device) -> Any:
    from lm_eval.api.model import TemplateLM

    model, tokenizer = trained.model.to(device).eval(), trained.tokenizer
    decoding = prepare_decoding(model)

    def ids(text: str) -> list[int]:
        return encode_text(tokenizer, text)

    def scores(before: list[int], after: list[int]) -> tuple[Tensor, Tensor]:
        """The log-probability of each token of `after`, and whether it is the most likely token at its position."""
        tokens = torch.tensor([before + after], device=device)
        with torch.inference_mode():
            logits = model(tokens[:, :-1])[0, len(before) - 1 :].float().log_softmax(-1)
        targets = tokens[0, len(before) :, None]
        return logits.gather(1, targets)[:, 0], logits.argmax(-1) == targets[:, 0]

    class LKDALanguageModel(TemplateLM):
        @property
        def eot_token_id(self) -> int:
            return _between_documents(trained)

        def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
            return ids(string)

        def _loglikelihood_tokens(self, requests: Any, **_: Any) -> list[tuple[float, bool]]:
            results = []
            for _text, before, after in requests:
                found, likeliest = scores(before, after)
                results.append((float(found.sum()), bool(likeliest.all())))
            return results

        def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> list[float]:
            return [float(scores([self.eot_token_id], ids(request.args[0]))[0].sum()) for request in requests]

        def generate_until(self, requests: Any, disable_tqdm: bool = False) -> list[str]:
            return [_until(request.args[0], request.args[1]) for request in requests]

    def _until(text: str, options: dict[str, Any]) -> str:
        stops = options.get("until") or []
        stops = [stops] if isinstance(stops, str) else stops
        prompt = torch.tensor([ids(text) or [_between_documents(trained)]], device=device)
        sampled: list[int] = []
        written = ""
        longest, ends = int(options.get("max_gen_toks", 128)), document_ends(tokenizer)
        for token in generate(decoding, prompt, max_new_tokens=longest, temperature=0, end_tokens=ends):
            sampled.append(token)
            written = decode_tokens(tokenizer, sampled)
            cuts = [written.index(stop) for stop in stops if stop in written]
            if cuts:
                return written[: min(cuts)]
        return written

    return LKDALanguageModel()


def _between_documents(trained: TrainedModel) -> int:
    """The id of the token that begins documents, for a question without a context. 0 if the tokenizer has none."""
    return document_start(trained.tokenizer) or 0
