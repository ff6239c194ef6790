"""Models of other packages that compute the same as lkda's, with the same weights: Llama and Qwen3 of transformers, and
KDA of flash-linear-attention.

lkda's own code computes the token embedding with its norm and scale, and the head. Everything between them, the layers
and the last norm, is the peer's code.
"""

from __future__ import annotations

import copy
import importlib
import importlib.metadata
import importlib.util
import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor, nn

from lkda import formats
from lkda.checks import InputError
from lkda.integrations.autoload import VARIABLE
from lkda.models.lm import LanguageModel
from lkda.ops.sequences import positions
from lkda.training.parameters import parameters_by_kind


class SoftmaxLayers(nn.Module):
    """The layers and the last norm of a Transformer, called as a `Block` is.

    Args:
        body: a model of transformers without a head, such as LlamaModel.
        context: tokens per row. Packed rows attend only to themselves.
    """

    def __init__(self, body: nn.Module, context: int) -> None:
        super().__init__()
        self.body, self.context = body, context

    def forward(self, x: Tensor, *, cu_seqlens: Tensor) -> tuple[Tensor, None]:
        """x [1, N, d_model] -> [1, N, d_model]. N is a multiple of the context, and a sequence begins at each row."""
        position, sequence = (y.view(-1, self.context) for y in positions(cu_seqlens, x.shape[1]))
        mask = (sequence.unsqueeze(2) == sequence.unsqueeze(1)).tril().unsqueeze(1)  # [rows, 1, context, context]
        rows = x.view(*position.shape, -1)
        y = self.body(inputs_embeds=rows, attention_mask=mask, position_ids=position, use_cache=False)
        return y.last_hidden_state.view_as(x), None


class KDALayers(nn.Module):
    """The layers and the last norm of flash-linear-attention's KDAModel, called as a `Block` is.

    The bias of its output gate stays zero, because lkda's layer has none.
    """

    def __init__(self, body: nn.Module, context: int) -> None:
        super().__init__()
        self.body = body
        for name, parameter in body.named_parameters():
            if name.endswith("g_proj.1.bias"):
                parameter.requires_grad_(False)

    def forward(self, x: Tensor, *, cu_seqlens: Tensor) -> tuple[Tensor, None]:
        """x [1, N, d_model] -> [1, N, d_model]."""
        bounds = torch.unique_consecutive(cu_seqlens).long()  # without the empty sequences at the end
        return self.body(inputs_embeds=x, cu_seqlens=bounds, use_cache=False).last_hidden_state, None


@dataclass(frozen=True)
class Peer:
    """A model of another package.

    Attributes:
        package: the name to import.
        distribution: the name to install.
        overrides: overrides of configs/train.yaml with which lkda's model is the same as the peer.
        format: the format of `lkda.formats` that the peer loads.
        layers: builds the peer's layers as a `Block`, from its body and the context.
        needs_gpu: whether its kernels run only on a GPU.
    """

    package: str
    distribution: str
    overrides: tuple[str, ...]
    format: str
    layers: Callable[[nn.Module, int], nn.Module]
    needs_gpu: bool = False

    def version(self) -> str:
        """The name and version of the installed package."""
        return f"{self.distribution} {importlib.metadata.version(self.distribution)}"


PEERS = {
    "llama": Peer(
        "transformers", "transformers", ("mixer=softmax", "mixer.softmax.qk_norm=false"), "hf", SoftmaxLayers
    ),
    "qwen3": Peer("transformers", "transformers", ("mixer=softmax", "mixer.softmax.qk_norm=true"), "hf", SoftmaxLayers),
    "fla_kda": Peer("fla", "flash-linear-attention", ("mixer=kda",), "fla", KDALayers, needs_gpu=True),
}


def check_available(name: str, device: torch.device) -> None:
    """Raise InputError if the peer's package is not installed, does not run on `device`, or would run lkda's code."""
    peer = PEERS[name]
    for package, distribution in ((peer.package, peer.distribution), ("transformers", "transformers")):
        if importlib.util.find_spec(package) is None:
            raise InputError(f"peer {name} needs the package {package}: pip install {distribution}.")
    if peer.package == "fla" and os.environ.get(VARIABLE, "0") not in ("", "0"):
        raise InputError(f"{VARIABLE} makes flash-linear-attention run lkda's kernels: unset it for peer {name}.")
    if peer.needs_gpu and device.type != "cuda":
        raise InputError(f"peer {name} needs a GPU, but this run is on {device.type}: leave the peer out.")


def peer_model(name: str, ours: LanguageModel, tokenizer: Tokenizer) -> LanguageModel:
    """A copy of `ours` whose layers and last norm are the peer's, with the same weights.

    The weights are passed through an exported directory, as a user of the peer would load them.

    Raises: InputError if the format cannot express the model, or if the peer has other numbers of trained parameters.
    """
    peer = PEERS[name]
    model = copy.deepcopy(ours)
    model.blocks = nn.ModuleList([peer.layers(_load_body(peer, ours, tokenizer), ours.config["context"])])
    model.norm = nn.Identity()  # type: ignore[assignment]
    expected, found = (_sizes(each) for each in (ours, model))
    if expected != found:
        raise InputError(
            f"peer {name} must train the same numbers of parameters as lkda: expected {expected}, got {found}."
        )
    return model.train()


def _load_body(peer: Peer, ours: LanguageModel, tokenizer: Tokenizer) -> nn.Module:
    """The peer's model without its embedding and head, in float32 on the CPU."""
    import transformers

    transformers.utils.logging.disable_progress_bar()
    importlib.import_module(peer.package)  # flash-linear-attention registers its models with transformers
    with tempfile.TemporaryDirectory() as folder:
        directory = Path(folder) / "exported"
        formats.save(directory, ours, tokenizer, format=peer.format, dtype="float32")
        # Its annotations do not say that it returns a pair with output_loading_info=True.
        given: Any = transformers.AutoModelForCausalLM.from_pretrained(
            directory, dtype=torch.float32, output_loading_info=True
        )
    loaded, report = given
    wrong = {word: sorted(map(str, names)) for word, names in report.items() if word.endswith("_keys") and names}
    if wrong:
        raise InputError(f"{type(loaded).__name__} did not load the exported weights unchanged: {wrong}.")
    body: nn.Module = loaded.model
    loaded.set_input_embeddings(nn.Identity())
    return body


def _sizes(model: nn.Module) -> dict[str, int]:
    """The number of trained parameters, by kind."""
    return {kind: sum(p.numel() for p in parameters) for kind, parameters in parameters_by_kind(model).items()}
