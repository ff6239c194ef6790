"""The format `gguf`: one file for llama.cpp, with the tokenizer inside.

Models of KDA and MLA layers have its architecture `kimi-linear`. Models of softmax layers have `llama`, or `qwen3` with
a QK-norm.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokenizers import Tokenizer
from torch import Tensor

from lkda.checks import InputError
from lkda.formats.common import kimi, llama
from lkda.formats.common.embedding import folded
from lkda.formats.common.gguf_tokenizer import add_tokenizer, check_tokenizer
from lkda.formats.common.layers import layer_names, options_of
from lkda.formats.common.writing import weights_of
from lkda.models.lm import LanguageModel

if TYPE_CHECKING:
    from gguf import GGUFWriter

__all__ = ["DTYPES", "MODEL_TYPES", "save", "unsupported_feature", "usage"]

DTYPES = ("f32", "f16", "q8_0")
MODEL_TYPES = ()  # it cannot be read
# {name in lkda, within a layer or outside of the layers: name in the file}
_NAMES = {
    "embed_tokens.weight": "token_embd.weight",
    "norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
    "mixer_norm.weight": "attn_norm.weight",
    "mlp_norm.weight": "ffn_norm.weight",
    "mlp.gate_proj.weight": "ffn_gate.weight",
    "mlp.up_proj.weight": "ffn_up.weight",
    "mlp.down_proj.weight": "ffn_down.weight",
    "mixer.q_proj.weight": "attn_q.weight",
    "mixer.k_proj.weight": "attn_k.weight",
    "mixer.v_proj.weight": "attn_v.weight",
    "mixer.o_proj.weight": "attn_output.weight",
    "mixer.q_norm.weight": "attn_q_norm.weight",
    "mixer.k_norm.weight": "attn_k_norm.weight",
    "mixer.q_conv1d.weight": "ssm_conv1d_q.weight",
    "mixer.k_conv1d.weight": "ssm_conv1d_k.weight",
    "mixer.v_conv1d.weight": "ssm_conv1d_v.weight",
    "mixer.f_a_proj.weight": "ssm_f_a.weight",
    "mixer.f_b_proj.weight": "ssm_f_b.weight",
    "mixer.g_a_proj.weight": "ssm_g_a.weight",
    "mixer.g_b_proj.weight": "ssm_g_b.weight",
    "mixer.b_proj.weight": "ssm_beta.weight",
    "mixer.A_log": "ssm_a",
    "mixer.dt_bias": "ssm_dt.bias",
    "mixer.o_norm.weight": "ssm_norm.weight",
    "mixer.kv_a_proj_with_mqa.weight": "attn_kv_a_mqa.weight",
    "mixer.kv_a_layernorm.weight": "attn_kv_a_norm.weight",
    "mixer.kv_b_proj.weight": "attn_kv_b.weight",
}


def unsupported_feature(config: Mapping[str, Any]) -> str | None:
    """A feature of the model that its architecture in llama.cpp lacks; None where it has all."""
    return llama.unsupported_feature(config) if llama.is_llama(config) else kimi.unsupported_feature(config)


def save(directory: Path, model: LanguageModel, tokenizer: Tokenizer, *, dtype: str) -> None:
    """Writes model-<dtype>.gguf.

    Raises: ValueError where the package gguf is missing, or for a kind of tokenizer that llama.cpp lacks.
    """
    try:
        from gguf import GGUFWriter
    except ImportError as error:
        raise InputError("format gguf needs the package gguf: pip install 'lkda[export]'.") from error
    check_tokenizer(tokenizer)
    model = folded(model)
    softmax = llama.is_llama(model.config)
    architecture = "kimi-linear"
    if softmax:
        architecture = "qwen3" if llama.has_qk_norm(model.config) else "llama"
    else:
        model = kimi.both_kinds(model)
    writer = GGUFWriter(directory / f"model-{dtype}.gguf", architecture)
    _add_sizes(writer, model.config, dtype)
    if softmax:
        weights = _llama(writer, model)
    else:
        weights = _kimi_linear(writer, model)
    add_tokenizer(writer, tokenizer, rows=model.config["vocab_size"])
    for name, tensor in weights.items():
        _add_tensor(writer, name, tensor, dtype)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def usage(directory: str, *, dtype: str) -> str:
    """Python code that loads the model, whose weights were written in `dtype`."""
    return (
        "from llama_cpp import Llama\n\n"
        f"model = Llama({f'{directory}/model-{dtype}.gguf'!r})\n"
        'print(model("The people of the United States", max_tokens=50)["choices"][0]["text"])'
    )


def _add_sizes(writer: GGUFWriter, config: Mapping[str, Any], dtype: str) -> None:
    from gguf import LlamaFileType

    file_types = {"f32": LlamaFileType.ALL_F32, "f16": LlamaFileType.MOSTLY_F16, "q8_0": LlamaFileType.MOSTLY_Q8_0}
    writer.add_file_type(file_types[dtype])
    writer.add_context_length(config["context"] or 2048)
    writer.add_embedding_length(config["d_model"])
    writer.add_block_count(config["num_layers"])
    writer.add_feed_forward_length(config["mlp_hidden"])
    writer.add_head_count(config["mixer"]["num_heads"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_layer_norm_rms_eps(config["norm_eps"])


def _llama(writer: GGUFWriter, model: LanguageModel) -> dict[str, Tensor]:
    """Adds the metadata and returns the weights by their names in the file.

    Rotary positions pair neighbouring channels in `llama`, and channels half a head apart in lkda and in `qwen3`.
    """
    heads = model.config["mixer"]["num_heads"]
    head_dim = model.config["d_model"] // heads
    half_a_head_apart = llama.has_qk_norm(model.config)
    writer.add_head_count_kv(heads)
    writer.add_rope_dimension_count(head_dim)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_rope_freq_base(options_of(model.config, "softmax")["rope_base"])
    named = {}
    for name, tensor in weights_of(model).items():
        if name.endswith(("mixer.q_proj.weight", "mixer.k_proj.weight")) and not half_a_head_apart:
            tensor = tensor.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2).contiguous()
        named[_stored_as(name)] = tensor
    return named


def _kimi_linear(writer: GGUFWriter, model: LanguageModel) -> dict[str, Tensor]:
    """Adds the metadata and returns the weights by their names in the file."""
    from gguf import ExpertGatingFuncType

    config = model.config
    kda, mla = kimi.kinds(model)
    # Layers with 0 key-value heads are recurrent. MLA has one latent for all heads.
    writer.add_head_count_kv([0 if name == "kda" else 1 for name in layer_names(config)])
    writer.add_ssm_conv_kernel(options_of(config, "kda")["conv_width"])
    writer.add_kda_head_dim(kda.head_dim)
    writer.add_kv_lora_rank(mla.rank)
    writer.add_rope_dimension_count(mla.rope)
    writer.add_key_length(mla.rank + mla.rope)
    writer.add_value_length(mla.rank)
    writer.add_key_length_mla(mla.nope + mla.rope)
    writer.add_value_length_mla(mla.v_dim)
    # Required, but not used where every layer is dense.
    writer.add_leading_dense_block_count(config["num_layers"])
    writer.add_expert_feed_forward_length(config["mlp_hidden"])
    writer.add_expert_shared_count(0)
    writer.add_expert_gating_func(ExpertGatingFuncType.SIGMOID)
    named = {}
    # llama.cpp uses the same eps for all norms.
    factor = math.sqrt(config["norm_eps"] / kimi.latent_eps(config))
    for name, tensor in kimi.with_scaled_latent(weights_of(model), model, factor).items():
        stored = _stored_as(name)
        if name.endswith("A_log"):
            tensor = -tensor.exp()
        if "conv1d" in name:
            tensor = tensor.unsqueeze(0)  # [1, HD, 1, width]
        if name.endswith("kv_b_proj.weight"):
            k, v = tensor.unflatten(0, (mla.num_heads, -1)).split([mla.nope, mla.v_dim], 1)
            named[stored.replace("kv_b", "k_b")] = k.transpose(1, 2).contiguous()
            named[stored.replace("kv_b", "v_b")] = v.contiguous()
        else:
            named[stored] = tensor
    return named


def _stored_as(name: str) -> str:
    """The name in the file of a parameter of lkda."""
    if not name.startswith("blocks."):
        return _NAMES[name]
    _, layer, rest = name.split(".", 2)
    return f"blk.{layer}.{_NAMES[rest]}"


def _add_tensor(writer: GGUFWriter, name: str, tensor: Tensor, dtype: str) -> None:
    """Adds a matrix as `dtype`, and anything else as f32.

    Convolutions and decays count as anything else, and so does a matrix whose rows are not multiples of q8_0's 32.
    """
    from gguf import GGMLQuantizationType
    from gguf.quants import quantize

    matrix = tensor.dim() >= 2 and "conv1d" not in name and not name.endswith("ssm_a")
    data = tensor.numpy()
    if dtype == "f16" and matrix:
        data = data.astype("float16")
    if dtype == "q8_0" and matrix and tensor.shape[-1] % 32 == 0:
        writer.add_tensor(name, quantize(data, GGMLQuantizationType.Q8_0), raw_dtype=GGMLQuantizationType.Q8_0)
    else:
        writer.add_tensor(name, data)
