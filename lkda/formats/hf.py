"""The format `hf`: a directory of transformers.

Models of KDA and MLA layers become Kimi Linear. Models of softmax layers become Llama, or Qwen3 where they have a
QK-norm. vLLM, SGLang and mlx-lm read the same names.
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
from lkda.formats.common.writing import DTYPES, renamed, weights_of, write_json, write_weights
from lkda.models.lm import LanguageModel

__all__ = ["DTYPES", "MODEL_TYPES", "load", "save", "unsupported_feature", "usage"]

MODEL_TYPES = ("kimi_linear", "llama", "qwen3")
# The norm of MLA's latent has eps 1e-6 in transformers, and rms_norm_eps = 1e-5 in mlx-lm, vLLM and SGLang. Multiplying
# the latent by 4, which is exact in floating point, divides the effective eps by 16: to 6e-8 and 6e-7. Both are within
# 1e-6 of the 1e-6 that lkda uses.
LATENT_EPS = 1e-6
LATENT_SCALE = 4.0
_NAMES = (
    ("blocks.", "layers."),
    ("mixer_norm", "input_layernorm"),
    ("mlp_norm", "post_attention_layernorm"),
    (".mixer.", ".self_attn."),
)


def unsupported_feature(config: Mapping[str, Any]) -> str | None:
    """A feature of the model that its architecture in transformers lacks; None where it has all."""
    if llama.is_llama(config):
        return llama.unsupported_feature(config)
    if "mla" in layer_names(config) and kimi.latent_eps(config) != LATENT_EPS:
        return f"MLA whose norm_eps is not {LATENT_EPS}"
    return kimi.unsupported_feature(config)


def save(directory: Path, model: LanguageModel, tokenizer: Tokenizer, *, dtype: str) -> None:
    """Writes model.safetensors, config.json, generation_config.json and the tokenizer."""
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
    """Reads a directory of these architectures, whether lkda wrote it or not.

    A last layer that adds nothing is dropped, and a head that equals the embedding is tied to it. So a model that lkda
    wrote is read back as it was, except for an embedding that was folded into its table.

    Raises: ValueError for features that the mixers of lkda lack, and where the weights do not fit the config.
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
        pattern = made["mixer"]["pattern"][:last]
        made["mixer"] = {**made["mixer"], "pattern": pattern, "name": "_".join(dict.fromkeys(pattern))}
    if "kda" in layer_names(made) and made["norm_eps"] != kimi.NORM_EPS:
        raise InputError(
            f"config.json of {directory}: KDA here has rms_norm_eps {kimi.NORM_EPS}, not {made['norm_eps']}."
        )
    model = build_with_weights(made, weights, source=directory, backend=backend, stored_as=stored_as)
    scale = config.get("lkda_latent_scale", 1.0)
    if not isinstance(scale, float) or not scale > 0:
        raise InputError(f"config.json of {directory}: lkda_latent_scale must be a number above 0, got {scale!r}.")
    model.load_state_dict(kimi.with_scaled_latent(model.state_dict(), model, 1 / scale))
    return model, read_tokenizer(directory)


def stored_as(name: str) -> str:
    """The name in the file of a parameter of lkda."""
    return renamed(name, _NAMES)


def usage(directory: str, *, dtype: str) -> str:
    """Python code that loads the model, whose weights were written in `dtype`."""
    return (
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        f'model = AutoModelForCausalLM.from_pretrained({directory!r}, dtype="auto")\n'
        f"tokenizer = AutoTokenizer.from_pretrained({directory!r})\n"
        'tokens = tokenizer("The people of the United States", return_tensors="pt")\n'
        "print(tokenizer.decode(model.generate(**tokens, max_new_tokens=50)[0]))\n\n"
        "import lkda\n\n"
        f"model, tokenizer = lkda.load({directory!r})  # to fine-tune or evaluate it with lkda"
    )
