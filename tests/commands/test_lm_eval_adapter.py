"""Tasks of lm-eval on a checkpoint and on an exported directory."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import lkda
from lkda.commands.evaluate import evaluate
from lkda.commands.lm_eval_adapter import _language_model
from lkda.commands.run.checkpoint_loading import load_trained
from lkda.commands.train import train
from lkda.models.generate import generate
from tests.commands.small import composed, small_run

pytest.importorskip("lm_eval", reason="needs lm-eval: pip install 'lkda[eval]'")


@pytest.fixture(scope="module")
def run(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("runs") / "one"
    train(composed("train", *small_run(corpus, "trainer.max_steps=3")), directory)
    return directory


@pytest.mark.long
def test_the_projects_own_task_on_a_run_and_on_what_it_exports(run: Path, tmp_path: Path) -> None:
    words = ("tasks=[sotu_word_order]", "limit=6", "accelerator=cpu")
    found = evaluate(composed("evaluate", f"ckpt={run}", *words, f"out={tmp_path}/scores.json"))
    record = json.loads((tmp_path / "scores.json").read_text())
    assert record["result"] == found
    assert (record["tasks"], record["limit"], record["step"]) == (["sotu_word_order"], 6, 3)
    (accuracy,) = found.values()
    assert set(found) == {"sotu_word_order/acc"}
    assert accuracy * 6 == pytest.approx(round(accuracy * 6))
    trained = load_trained(run)
    lkda.export(trained.model, trained.tokenizer, tmp_path / "out")
    assert evaluate(composed("evaluate", f"ckpt={tmp_path / 'out'}", *words)) == found


def test_likelihoods_are_those_of_the_model(run: Path) -> None:
    trained = load_trained(run)
    language_model = _language_model(trained, torch.device("cpu"))
    before, after = trained.tokenizer.encode("the people").ids, trained.tokenizer.encode(" of the").ids
    ((found, greedy),) = language_model._loglikelihood_tokens([(("", ""), before, after)])
    text, want, likeliest = list(before), 0.0, True
    for token in after:
        logits = trained.model(torch.tensor([text]))[0, -1].float()
        want += float(logits.log_softmax(-1)[token].detach())
        likeliest &= int(logits.argmax()) == token
        text.append(token)
    assert found == pytest.approx(want, rel=1e-4)
    assert greedy is likeliest
    assert math.isfinite(found)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["tasks=[sotu]"], r"there is no task sotu in .*; the tasks there are sotu_word_order"),
        (
            ["tasks=[sotu]", "tasks_path=/nowhere"],
            r"tasks_path must be a directory of lm-eval task files, but /nowhere is not",
        ),
    ],
)
def test_an_unknown_task_is_refused(run: Path, words: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        evaluate(composed("evaluate", f"ckpt={run}", *words))


def test_generated_text_ends_with_its_document(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At the token that ends it, whatever strings the task would stop at."""
    trained = load_trained(run)
    torch.manual_seed(0)
    with torch.no_grad():
        for weight in trained.model.parameters():  # as it is, it says one token again and again
            weight.add_(torch.randn_like(weight))
    language_model = _language_model(trained, torch.device("cpu"))
    prompt = torch.tensor([trained.tokenizer.encode("the people").ids])
    drawn = list(generate(trained.model, prompt, max_new_tokens=8, temperature=0))
    end = next(n for n in range(1, 8) if drawn[n] not in drawn[:n])
    request = SimpleNamespace(args=("the people", {"until": ["nowhere in it"], "max_gen_toks": 8}))
    assert language_model.generate_until([request]) == [trained.tokenizer.decode(drawn)]
    monkeypatch.setattr("lkda.commands.lm_eval_adapter.document_ends", lambda tokenizer: (drawn[end],))
    assert language_model.generate_until([request]) == [trained.tokenizer.decode(drawn[:end])]
