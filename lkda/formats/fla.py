"""The format `fla`: KDAForCausalLM of flash-linear-attention, whose kernels need a GPU."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer

from lkda.formats.common.embedding import folded
from lkda.formats.common.kimi import NORM_EPS
from lkda.formats.common.layers import layer_names, options_of
from lkda.formats.common.tokenizer import special_ids, write_tokenizer
from lkda.formats.common.writing import DTYPES, renamed, weights_of, write_json, write_weights
from lkda.models.lm import LanguageModel

__all__ = ["DTYPES", "MODEL_TYPES", "save", "unsupported_feature", "usage"]

MODEL_TYPES = ()  # it cannot be read
_NAMES = (
    ("embed_tokens", "embeddings"),
    ("blocks.", "layers."),
    ("mixer_norm", "attn_norm"),
    (".mixer.", ".attn."),
    ("f_a_proj", "f_proj.0"),
    ("f_b_proj", "f_proj.1"),
    ("g_a_proj", "g_proj.0"),
    ("g_b_proj", "g_proj.1"),
)


def unsupported_feature(config: Mapping[str, Any]) -> str | None:
    """A feature of the model that KDAForCausalLM lacks; None where it has all."""
    names = set(layer_names(config))
    if names != {"kda"}:
        return f"a pattern with {', '.join(sorted(names - {'kda'}))}"
    options = options_of(config, "kda")
    if not config["mlp_hidden"]:
        return "layers without an MLP"
    if config["norm_eps"] != NORM_EPS:
        return f"KDA with a norm_eps other than {NORM_EPS}"
    if options["conv_width"] == 0:
        return "KDA without convolutions"
    if options["gate"] == "none":
        return "KDA without a gate"
    return None if options["output_gate"] else "KDA without an output gate"


def save(directory: Path, model: LanguageModel, tokenizer: Tokenizer, *, dtype: str) -> None:
    """Writes model.safetensors, config.json, generation_config.json and the tokenizer."""
    model = folded(model)
    config, options = model.config, options_of(model.config, "kda")
    heads = config["mixer"]["num_heads"]
    head_dim = config["d_model"] // heads
    weights = {}
    for name, tensor in weights_of(model).items():
        if name.endswith("A_log"):
            tensor = tensor.flatten()
        if options["gate"] == "head" and name.endswith(("f_b_proj.weight", "dt_bias")):
            tensor = tensor.repeat_interleave(head_dim, 0)  # one gate per channel, equal within a head
        weights[stored_as(name)] = tensor
        if name.endswith("g_b_proj.weight"):
            weights[stored_as(name.replace("weight", "bias"))] = torch.zeros(len(tensor))
    write_weights(directory, weights, dtype=dtype)
    bounded = options["gate_form"] == "bounded"
    written = {
        "architectures": ["KDAForCausalLM"],
        "model_type": "kda",
        "dtype": dtype,
        "vocab_size": config["vocab_size"],
        "hidden_size": config["d_model"],
        "intermediate_size": config["mlp_hidden"],
        "num_hidden_layers": config["num_layers"],
        "num_heads": heads,
        "head_dim": head_dim,
        "expand_v": 1.0,
        "use_short_conv": True,
        "conv_size": options["conv_width"],
        "allow_neg_eigval": options["negative_eigenvalues"],
        "safe_gate": bounded,
        "lower_bound": options["lower_bound"] if bounded else None,
        "hidden_act": "swish",
        "norm_eps": config["norm_eps"],
        "max_position_embeddings": config["context"] or 2048,
        "tie_word_embeddings": False,
        **special_ids(tokenizer),
    }
    write_json(directory / "config.json", written)
    write_tokenizer(directory, tokenizer, context=config["context"] or None)


def stored_as(name: str) -> str:
    """The name in the file of a parameter of lkda."""
    return renamed(name, _NAMES)


def usage(directory: str, *, dtype: str) -> str:
    """Python code that loads the model, whose weights were written in `dtype`."""
    return (
        "import fla  # flash-linear-attention; a CUDA GPU\n"
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        f'model = AutoModelForCausalLM.from_pretrained({directory!r}, dtype="auto").cuda()\n'
        f"tokenizer = AutoTokenizer.from_pretrained({directory!r})"
    )
