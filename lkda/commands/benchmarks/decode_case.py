"""A row of `scripts/benchmark.py task=decode` before it is measured."""

from __future__ import annotations

from dataclasses import dataclass

import torch

LKDA, PREFILL = "lkda", "prefill"  # implementations; others are the variants of PEERS
# The variants of each peer, with their titles.
PEERS = {
    "transformers": {
        "transformers": "transformers' generate",
        "transformers_compiled": "transformers' generate, static cache, compiled",
    },
    "fla": {"fla": "FLA's generate"},
}


@dataclass(frozen=True)
class DecodeCase:
    """A row of the benchmark before it is measured. A recorded row has all of these.

    Attributes:
        implementation: lkda (decoding), prefill, or a variant of a peer.
        model, mixer: choices of configs/model and configs/mixer.
        dtype: of the weights, as bf16.
        state_dtype: of the states of KDA; None for a model without them.
        batch: the number of sequences.
        context: the tokens of each sequence: those in its state, or of the prompt.
        top_p: tokens are sampled with it; None: the likeliest are taken.
        overrides: further settings of configs/train.yaml.
    """

    implementation: str
    model: str
    mixer: str
    dtype: str
    state_dtype: str | None
    batch: int
    context: int
    top_p: float | None
    vocab_size: int
    overrides: list[str]

    @property
    def name(self) -> str:
        """For messages and for the name of the log, as "small_kda_bf16_int8_256x1024_lkda"."""
        state = "" if self.state_dtype is None else f"_{self.state_dtype}"
        return f"{self.model}_{self.mixer}_{self.dtype}{state}_{self.batch}x{self.context}_{self.implementation}"

    @property
    def title(self) -> str:
        """For tables and plots: the mixer with the dtype of its state, and the peer."""
        state = "" if self.state_dtype in (None, "float32") else f", {self.state_dtype} state"
        titles = {PREFILL: "prefill"} | {name: title for found in PEERS.values() for name, title in found.items()}
        what = f", {titles[self.implementation]}" if self.implementation in titles else ""
        return f"{self.mixer}{state}{what}"

    def train_overrides(self, device: torch.device) -> list[str]:
        """The overrides of configs/train.yaml with which the model is made."""
        return [
            f"model={self.model}",
            f"mixer={self.mixer}",
            f"model.vocab_size={self.vocab_size}",
            "data=random",
            "data.batch_size=1",
            "data.context=64",
            f"trainer.accelerator={'gpu' if device.type == 'cuda' else 'cpu'}",
            "trainer.max_steps=1",
            "trainer.val_check_interval=1",
            "trainer.limit_val_batches=1",
            "callbacks=none",
            "optimizer.lr=1e-4",  # nothing is trained
            "compile=false",
            *self.overrides,
        ]
