"""The format `hf`: a directory of transformers. KDA and MLA layers become Kimi Linear; softmax layers Llama, or Qwen3
where they have a QK-norm.

vLLM, SGLang and mlx-lm read the same names. All of them call a layer's parts alike, so one renaming serves them.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer

from lkda.checks import InputError
from lkda.formats.common import kimi, llama
from lkda.formats.common.building import build_with_weights
from lkda.formats.common.embedding import FOLDED, folded, needs_folding
from lkda.formats.common.hf_config import kimi_config, llama_config, read_kimi, read_llama
from lkda.formats.common.layers import layer_names
from lkda.formats.common.reading import read_tokenizer, read_weights
from lkda.formats.common.tokenizer import special_ids, write_tokenizer
from lkda.formats.common.writing import DTYPES, weights_of, write_json, write_weights
from lkda.models.lm import LanguageModel

__all__ = ["DTYPES", "MODEL_TYPES", "load", "obstacle", "save", "usage"]

MODEL_TYPES = ("kimi_linear", "llama", "qwen3")
# The norm of MLA's latent has eps 1e-6 in transformers, and rms_norm_eps = 1e-5 in mlx-lm, vLLM and SGLang. Four times
# the latent (exact in floating point) is as an eps 16 times smaller: 6e-8 and 6e-7, each within 1e-6 of our own 1e-6.
LATENT_EPS = 1e-6
LATENT_SCALE = 4.0
_NAMES = (
    ("blocks.", "layers."),
    ("mixer_norm", "input_layernorm"),
    ("mlp_norm", "post_attention_layernorm"),
    (".mixer.", ".self_attn."),
)


def obstacle(config: Mapping[str, Any]) -> str | None:
    """What of a model's config neither architecture has; None where one has everything."""
    if llama.is_llama(config):
        return llama.obstacle(config)
    if "mla" in layer_names(config) and kimi.latent_eps(config) != LATENT_EPS:
        return f"MLA whose norm_eps is not {LATENT_EPS}"
    return kimi.obstacle(config)


def save(directory: Path, model: LanguageModel, tokenizer: Tokenizer, *, dtype: str) -> None:
    """Write model.safetensors, config.json, generation_config.json and the tokenizer."""
    changed = needs_folding(model.config)
    model = folded(model)
    if llama.is_llama(model.config):
        config = llama_config(model)
    else:
        model = kimi.both_kinds(model)
        config = {**kimi_config(model), "lkda_latent_scale": LATENT_SCALE}
    if changed:
        config[FOLDED] = True
    weights = kimi.with_scaled_latent(weights_of(model), model, LATENT_SCALE)
    write_weights(directory, {stored_as(name): tensor for name, tensor in weights.items()}, dtype=dtype)
    write_json(directory / "config.json", {**config, "dtype": dtype, **special_ids(tokenizer)})
    write_tokenizer(directory, tokenizer, context=model.config["context"] or None)


def load(config: Mapping[str, Any], directory: Path, *, backend: str) -> tuple[LanguageModel, Tokenizer]:
    """Read a directory of either architecture, made here or elsewhere.

    A last layer that adds nothing is left out, and a head that equals the embedding is tied to it: so a model of ours
    comes back as it went, but for an embedding that was folded into its table.

    Raises: ValueError for what our mixers do not have, and where the weights do not fit the config.
    """
    read = read_kimi if config["model_type"] == "kimi_linear" else read_llama
    made = read(config, directory)
    weights = read_weights(directory)
    head, embedding = weights.get("lm_head.weight"), weights.get("model.embed_tokens.weight")
    if head is None and embedding is not None and config.get("tie_word_embeddings"):
        weights["lm_head.weight"] = head = embedding
    made["tie_embeddings"] = head is not None and embedding is not None and torch.equal(head, embedding)
    last = made["num_layers"] - 1
    if last and kimi.adds_nothing(weights, last, stored_as):
        prefix = stored_as(f"blocks.{last}.")
        weights = {name: tensor for name, tensor in weights.items() if not name.startswith(prefix)}
        made["num_layers"] = last
        made["mixer"] = {**made["mixer"], "pattern": made["mixer"]["pattern"][:last]}
    model = build_with_weights(made, weights, source=directory, backend=backend, stored_as=stored_as)
    scale = config.get("lkda_latent_scale", 1.0)
    if not isinstance(scale, float) or not scale > 0:
        raise InputError(f"config.json of {directory}: lkda_latent_scale must be a number above 0, got {scale!r}.")
    model.load_state_dict(kimi.with_scaled_latent(model.state_dict(), model, 1 / scale))
    return model, read_tokenizer(directory)


def stored_as(name: str) -> str:
    """Our name of a parameter -> its name in the file."""
    for ours, theirs in _NAMES:
        name = name.replace(ours, theirs)
    return name if name.startswith("lm_head") else f"model.{name}"


def usage(directory: str) -> str:
    """How to load it, in Python."""
    return (
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        f'model = AutoModelForCausalLM.from_pretrained({directory!r}, dtype="auto")\n'
        f"tokenizer = AutoTokenizer.from_pretrained({directory!r})\n"
        'tokens = tokenizer("The people of the United States", return_tensors="pt")\n'
        "print(tokenizer.decode(model.generate(**tokens, max_new_tokens=50)[0]))\n\n"
        "import lkda\n\n"
        f"model, tokenizer = lkda.load({directory!r})  # the way back, to fine-tune or evaluate"
    )
