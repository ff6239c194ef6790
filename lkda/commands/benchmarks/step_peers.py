"""Language models of other packages, trained in a bare loop as their users would: the whole model with its own loss."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lkda.checks import InputError
from lkda.commands.benchmarks.peers import check_available

Loss = Callable[[Tensor], Tensor]  # tokens [B, T] -> the mean loss of next-token prediction


@dataclass(frozen=True)
class Variant:
    """A way in which a peer is measured.

    Attributes:
        peer: its name in `lkda.commands.benchmarks.peers.PEERS`.
        title: in tables and plots.
        mode: of torch.compile; None: not compiled.
        build: makes the model from the dict of `build_model`.
    """

    peer: str
    title: str
    mode: str | None
    build: Callable[[Mapping[str, Any]], nn.Module]

    def loss(self, model: nn.Module) -> Loss:
        """The model's own loss, compiled together with the model where the variant says so."""

        def own_loss(tokens: Tensor) -> Tensor:
            found: Tensor = model(input_ids=tokens, labels=tokens, use_cache=False).loss
            return found

        return own_loss if self.mode is None else torch.compile(own_loss, mode=self.mode, dynamic=False)


def llama(config: Mapping[str, Any]) -> nn.Module:
    """LlamaForCausalLM of transformers with the sizes of lkda's model, heads as in model.num_heads."""
    transformers = importlib.import_module("transformers")
    settings = transformers.LlamaConfig(
        **_sizes(config),
        num_attention_heads=config["mixer"]["num_heads"],
        num_key_value_heads=config["mixer"]["num_heads"],
        tie_word_embeddings=config["tie_embeddings"],
        rms_norm_eps=config["norm_eps"],
        attn_implementation="sdpa",
    )
    made: nn.Module = transformers.LlamaForCausalLM(settings)
    return made


def fla_kda(config: Mapping[str, Any]) -> nn.Module:
    """KDAForCausalLM of flash-linear-attention with the sizes of lkda's model."""
    models = importlib.import_module("fla.models")
    heads = config["mixer"]["num_heads"]
    settings = models.KDAConfig(
        **_sizes(config),
        num_heads=heads,
        head_dim=config["d_model"] // heads,
        expand_v=1.0,
        tie_word_embeddings=config["tie_embeddings"],
        norm_eps=config["norm_eps"],
    )
    made: nn.Module = models.KDAForCausalLM(settings)
    return made


def _sizes(config: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "vocab_size": config["vocab_size"],
        "hidden_size": config["d_model"],
        "intermediate_size": config["mlp_hidden"],
        "num_hidden_layers": config["num_layers"],
        "max_position_embeddings": config["context"],
    }


# The implementations of lkda's own models: scripts/train.py's own loop, and a loop without Lightning.
TRAIN, BARE = "train", "bare"
# What peers=[NAME] measures.
VARIANTS: dict[str, dict[str, Variant]] = {
    "llama": {
        "llama": Variant("llama", "HF Llama", None, llama),
        "llama_compiled": Variant("llama", "HF Llama, compiled", "default", llama),
        "llama_graphs": Variant("llama", "HF Llama, compiled, CUDA graphs", "reduce-overhead", llama),
    },
    "fla_kda": {"fla_kda": Variant("fla_kda", "FLA KDA", None, fla_kda)},
}


def variant(name: str) -> Variant:
    """The variant with that name."""
    return next(found[name] for found in VARIANTS.values() if name in found)


def check_peer(name: str, device: torch.device) -> None:
    """Raise InputError if the variant `name` cannot run: its package is missing, or it needs a GPU."""
    found = variant(name)
    check_available(found.peer, device)
    if found.mode == "reduce-overhead" and device.type != "cuda":
        raise InputError(f"{found.title} needs a GPU.")
