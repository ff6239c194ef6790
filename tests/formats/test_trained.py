"""Models that were trained on text generate the same in the programs that read them: 200 greedy tokens in float32."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer
from torch import nn

import lkda
from lkda.data.text.tokenizer import train_tokenizer
from lkda.generation.text import encode_prompt
from lkda.models.lm import LanguageModel
from lkda.training.losses import next_token_loss
from tests.formats.models import HYBRID, model

SOFTMAX = ("softmax", "softmax")
PATTERNS = [("kda", "kda"), HYBRID, SOFTMAX]
STEPS, ROWS, CONTEXT = 150, 8, 64
SOFTMAX_STEPS = 600  # it learns more slowly, and its steps are faster
PROMPTS = ["The model", "These commands continue", "To continue many prompts", "`temperature=0` chooses"]
COUNT = 200
NEAR = 1e-2  # texts may part where the two likeliest logits differ by less

pytestmark = pytest.mark.long


@cache
def text() -> str:
    """So short that a small model learns much of it by heart, and its greedy texts do not soon repeat themselves."""
    return (Path(__file__).parents[2] / "docs/guides/generating.md").read_text(encoding="utf-8")[:4000]


@cache
def tokenizer() -> Tokenizer:
    return train_tokenizer([text()], 310)


@cache
def trained(pattern: tuple[str, ...]) -> LanguageModel:
    """A model that has learned the text. Its loss is far below that of the tokens' frequencies."""
    made = model(pattern, head_dim=32).train()
    given = torch.tensor(tokenizer().encode(text()).ids)
    optimizer = torch.optim.AdamW(made.parameters(), lr=4e-3, weight_decay=0.1)
    generator = torch.Generator().manual_seed(0)
    for step in range(SOFTMAX_STEPS if pattern == SOFTMAX else STEPS):
        starts = torch.randint(len(given) - CONTEXT - 1, (ROWS,), generator=generator)
        rows = torch.stack([given[start : start + CONTEXT + 1] for start in starts.tolist()])
        optimizer.param_groups[0]["lr"] = 4e-3 * min(1, (step + 1) / 20)
        loss = next_token_loss(made(rows[:, :-1]), rows[:, 1:])
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(made.parameters(), 1.0)
        optimizer.step()
    shares = given.bincount().float() / len(given)
    assert loss.item() < 0.5 * torch.special.entr(shares).sum().item()
    return made.eval()


def compare(ours: LanguageModel, prompt: str, theirs: list[int]) -> None:
    """Their tokens are ours, or part from ours where our two likeliest logits nearly tie."""
    options = {"max_new_tokens": COUNT, "temperature": 0, "ignore_eos": True}
    own = list(lkda.generate(ours, tokenizer(), prompt, **options)[0].tokens)
    assert len(own) == len(theirs) == COUNT
    parted = next((t for t in range(COUNT) if own[t] != theirs[t]), None)
    print(f"{prompt!r}: {'the same' if parted is None else f'they part at token {parted}'}; {len(set(own))} tokens")
    if parted is not None:
        before = torch.cat([encode_prompt(tokenizer(), prompt), torch.tensor([own[:parted]], dtype=torch.int64)], 1)
        with torch.inference_mode():
            logits = ours(before)[0, -1]
        assert theirs[parted] == int(logits.topk(2).indices[1])
        assert logits.topk(2).values.diff().abs() < NEAR


@pytest.mark.parametrize("pattern", PATTERNS, ids="_".join)
def test_transformers(pattern: tuple[str, ...], tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers", minversion="5.17")
    ours = trained(pattern)
    lkda.export(ours, tokenizer(), tmp_path / "out", format="hf")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    theirs.generation_config.eos_token_id = None
    read = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    for prompt in PROMPTS:
        given = read(prompt, return_tensors="pt")
        assert given.input_ids.tolist() == encode_prompt(tokenizer(), prompt).tolist()
        options = {"max_new_tokens": COUNT, "do_sample": False, "use_cache": True}
        found = theirs.generate(given.input_ids, attention_mask=given.attention_mask, **options)
        compare(ours, prompt, found[0, given.input_ids.shape[1] :].tolist())


@pytest.mark.readers
@pytest.mark.parametrize("pattern", PATTERNS, ids="_".join)
def test_llama_cpp(pattern: tuple[str, ...], tmp_path: Path) -> None:
    llama_cpp = pytest.importorskip("llama_cpp", reason="needs llama-cpp-python: pip install llama-cpp-python")
    ours = trained(pattern)
    lkda.export(ours, tokenizer(), tmp_path / "out", format="gguf")
    # Keys and values in float32 (type 0): its default of float16 rounds them.
    options = {"n_ctx": 512, "logits_all": True, "verbose": False, "n_threads": 1, "type_k": 0, "type_v": 0}
    theirs = llama_cpp.Llama(str(tmp_path / "out/model-f32.gguf"), **options)
    for prompt in PROMPTS:
        theirs.reset()
        theirs.eval(encode_prompt(tokenizer(), prompt)[0].tolist())
        found: list[int] = []
        for _ in range(COUNT):
            found.append(int(np.argmax(theirs.scores[theirs.n_tokens - 1])))
            theirs.eval(found[-1:])
        compare(ours, prompt, found)
    theirs.close()
