"""Converts between the dict of `build_model` and config.json of transformers' Kimi Linear, Llama and Qwen3."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lkda.checks import InputError
from lkda.formats.common.kimi import kinds
from lkda.formats.common.layers import layer_names, options_of
from lkda.formats.common.llama import has_qk_norm
from lkda.formats.common.reading import number
from lkda.models.lm import LanguageModel

# Used where the training context is not known.
_CONTEXT = 2048


def kimi_config(model: LanguageModel) -> dict[str, Any]:
    """config.json for a model with KDA and MLA layers. All layers are dense, so the fields of experts are not used."""
    config, names = model.config, layer_names(model.config)
    kda, mla = kinds(model)
    context = config["context"] or _CONTEXT
    return {
        "architectures": ["KimiLinearForCausalLM"],
        "model_type": "kimi_linear",
        **_common(config),
        "num_key_value_heads": mla.num_heads,
        "head_dim": mla.head_dim,
        "model_max_length": context,
        "linear_attn_config": {
            "kda_layers": [i for i, name in enumerate(names, 1) if name == "kda"],
            "full_attn_layers": [i for i, name in enumerate(names, 1) if name == "mla"],
            "head_dim": kda.head_dim,
            "num_heads": kda.num_heads,
            "short_conv_kernel_size": options_of(config, "kda")["conv_width"],
        },
        "q_lora_rank": None,
        "kv_lora_rank": mla.rank,
        "qk_nope_head_dim": mla.nope,
        "qk_rope_head_dim": mla.rope,
        "v_head_dim": mla.v_dim,
        "mla_use_nope": True,
        "rope_theta": 10000.0,  # required, but not used
        "first_k_dense_replace": config["num_layers"],
        "moe_layer_freq": 1,
        "moe_intermediate_size": config["mlp_hidden"],
        "moe_renormalize": True,
        "moe_router_activation_func": "sigmoid",
        "num_experts": 0,
        "num_experts_per_token": 1,
        "num_shared_experts": 0,
        "num_expert_group": 1,
        "topk_group": 1,
        "use_grouped_topk": True,
        "routed_scaling_factor": 1.0,
    }


def llama_config(model: LanguageModel) -> dict[str, Any]:
    """config.json for a model of softmax layers: a Qwen3 where it has a QK-norm, else a Llama."""
    config = model.config
    base = options_of(config, "softmax")["rope_base"]
    kind = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "mlp_bias": False}
    if has_qk_norm(config):
        kind = {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "use_sliding_window": False}
    return {
        **kind,
        **_common(config),
        "num_key_value_heads": config["mixer"]["num_heads"],
        "head_dim": config["d_model"] // config["mixer"]["num_heads"],
        "max_position_embeddings": config["context"] or _CONTEXT,
        # transformers 5 reads rope_parameters, other tools rope_theta.
        "rope_theta": base,
        "rope_parameters": {"rope_type": "default", "rope_theta": base},
        "attention_bias": False,
    }


def read_kimi(config: Mapping[str, Any], source: object) -> dict[str, Any]:
    """The dict of `build_model` for a Kimi Linear config.json.

    Raises: ValueError for mixture-of-experts layers and other features that lkda lacks.
    """
    made = _read_common(config, source)
    names = _kinds_of_layers(config, made["num_layers"], source)
    _refuse_experts(config, made["num_layers"], source)
    for key, wanted in (("q_lora_rank", None), ("mla_use_nope", True)):
        _require(config, key, wanted, source)
    heads = made["mixer"]["num_heads"]
    nested = config.get("linear_attn_config") or {}
    linear = {
        "linear_attn_config.num_heads": nested.get("num_heads", config.get("linear_num_heads")),
        "linear_attn_config.head_dim": nested.get("head_dim", config.get("linear_head_dim")),
        "short_conv_kernel_size": nested.get("short_conv_kernel_size", config.get("linear_conv_kernel_dim", 4)),
    }
    if "kda" in names:
        for key, wanted in (("num_heads", heads), ("head_dim", made["d_model"] // heads)):
            _require(linear, f"linear_attn_config.{key}", wanted, source)
        made["mixer"]["kda"] = {"conv_width": number(linear, "short_conv_kernel_size", least=1, source=source)}
    if "mla" in names:
        sizes = ("kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
        made["mixer"]["mla"] = {key: number(config, key, least=1, source=source) for key in sizes}
    made["mixer"] |= {"name": "_".join(dict.fromkeys(names)), "pattern": names}
    return made


def read_llama(config: Mapping[str, Any], source: object) -> dict[str, Any]:
    """The dict of `build_model` for a Llama or Qwen3 config.json. Raises ValueError for features that lkda lacks."""
    made = _read_common(config, source)
    heads = made["mixer"]["num_heads"]
    for key, wanted in (
        ("num_key_value_heads", heads),
        ("head_dim", made["d_model"] // heads),
        ("attention_bias", False),
        ("mlp_bias", False),
        ("use_sliding_window", False),
        ("rope_scaling", None),
    ):
        _require(config, key, wanted, source)
    rope = config.get("rope_parameters") or {}
    _require(rope, "rope_type", "default", source)
    made["mixer"] |= {
        "name": "softmax",
        "pattern": ["softmax"],
        "softmax": {"rope_base": float(rope.get("rope_theta", config.get("rope_theta", 10000.0)))},
    }
    if config["model_type"] == "qwen3":
        made["mixer"]["softmax"] |= {"qk_norm": True, "norm_eps": made["norm_eps"]}
    return made


def _common(config: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "vocab_size": config["vocab_size"],
        "hidden_size": config["d_model"],
        "intermediate_size": config["mlp_hidden"],
        "num_hidden_layers": config["num_layers"],
        "num_attention_heads": config["mixer"]["num_heads"],
        "hidden_act": "silu",
        "rms_norm_eps": config["norm_eps"],
        "initializer_range": 0.02,
        "tie_word_embeddings": False,  # the head is always written
        "use_cache": True,
    }


def _read_common(config: Mapping[str, Any], source: object) -> dict[str, Any]:
    _require(config, "hidden_act", "silu", source)
    eps = config.get("rms_norm_eps", 1e-5 if config["model_type"] == "kimi_linear" else 1e-6)
    if not isinstance(eps, float) or not 0 < eps < 1:
        raise InputError(f"config.json of {source}: rms_norm_eps must be a small number above 0, got {eps!r}.")
    lengths = (config.get(key) for key in ("model_max_length", "max_position_embeddings"))
    return {
        "vocab_size": number(config, "vocab_size", least=1, source=source),
        "d_model": number(config, "hidden_size", least=1, source=source),
        "num_layers": number(config, "num_hidden_layers", least=1, source=source),
        "mlp_hidden": number(config, "intermediate_size", least=1, source=source),
        "norm_eps": eps,
        "context": next((length for length in lengths if isinstance(length, int)), 0),
        "mixer": {"num_heads": number(config, "num_attention_heads", least=1, source=source)},
    }


def _kinds_of_layers(config: Mapping[str, Any], num_layers: int, source: object) -> list[str]:
    """ "kda" or "mla" for each layer, from `linear_attn_config` (which counts layers from 1) or `layer_types`."""
    words = {"linear_attention": "kda", "full_attention": "mla"}
    if config.get("layer_types"):
        names = [words.get(word, "") for word in config["layer_types"]]
    else:
        nested = config.get("linear_attn_config") or {}
        listed = dict.fromkeys(nested.get("kda_layers", ()), "kda")
        listed |= dict.fromkeys(nested.get("full_attn_layers", ()), "mla")
        names = [listed.get(i, "") for i in range(1, len(listed) + 1)]
    if len(names) != num_layers or "" in names:
        raise InputError(
            f"config.json of {source}: linear_attn_config (kda_layers and full_attn_layers, from 1) or layer_types "
            f"must say for each of the {num_layers} layers what it is."
        )
    return names


def _refuse_experts(config: Mapping[str, Any], num_layers: int, source: object) -> None:
    experts = config.get("num_experts", config.get("num_local_experts"))
    types = config.get("mlp_layer_types")
    dense = config.get("first_k_dense_replace", 1) >= num_layers if types is None else set(types) == {"dense"}
    if experts and not dense:
        raise InputError(
            f"{source} has mixture-of-experts layers ({experts} experts), which lkda lacks: "
            "it reads Kimi Linear models whose layers are all dense."
        )


def _require(config: Mapping[str, Any], key: str, wanted: Any, source: object) -> None:
    """Raises ValueError where a key is present and is not `wanted`."""
    value = config.get(key)
    if value is not None and value != wanted:
        raise InputError(f"config.json of {source}: {key} is {value!r}; a model of lkda has {wanted!r} here.")
