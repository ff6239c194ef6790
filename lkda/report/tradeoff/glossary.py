"""The words of a page that a reader may not know. Mixers and models are described by their files in configs/."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

import yaml

from lkda.report.draw.page import Section
from lkda.shipped import CONFIGS

WORDS = {
    "mixer": "The layer through which a token of a sequence sees the tokens before it.",
    "state": "What a mixer keeps of the tokens it has read, to generate the next one.",
    "prefill": "Reading a prompt.",
    "decode": "Generating tokens after a prompt.",
    "bits per byte": "The loss per byte of text; lower is better.",
    "K": "1,024, as in a context of 8K tokens.",
    "slow decay": "Inputs of an operator with which its state fades over many tokens; with fast decay, over a few.",
    "fwd": "The forward pass; fwd+bwd is the forward and the backward pass.",
    "SDPA": "torch.nn.functional.scaled_dot_product_attention, the softmax attention of PyTorch.",
    "HF Llama": "LlamaForCausalLM of the package transformers.",
    "the notes": "Notes that the project began with. They claim times and ratios, which are measured here.",
}


def glossary(sections: Sequence[Section], *, mixers: Iterable[str], models: Iterable[str]) -> dict[str, str]:
    """{word: meaning} of the words that occur in the sections, of the mixers and of the models."""
    text = " ".join(text for section in sections for text in _texts(section))
    found = {word: meaning for word, meaning in WORDS.items() if _occurs(word, text)}
    found |= {name: said for name in dict.fromkeys(mixers) if (said := _of_mixer(name))}
    return found | {name: said for name in dict.fromkeys(models) if (said := _of_model(name))}


def _texts(section: Section) -> Iterable[str]:
    yield from (section.heading, section.lead, *section.hints, *section.notes, *section.head)
    yield from (cell for line in section.body for cell in line)
    yield from (f"{chart.title} {chart.caption}" for chart in section.charts)


def _occurs(word: str, text: str) -> bool:
    """As a word of its own; K behind a number."""
    return re.search(rf"(?<!\w){word}(?!\w)" if word != "K" else r"\dK\b", text, re.IGNORECASE) is not None


def _of_mixer(name: str) -> str:
    """The sentences with which the file of the mixer begins."""
    path = CONFIGS / "mixer" / f"{name}.yaml"
    if not path.is_file():
        return ""
    lines = path.read_text(encoding="utf-8").splitlines()
    end = next((n for n, line in enumerate(lines) if not line.startswith("#") or "docs/" in line), len(lines))
    return " ".join(line.lstrip("# ") for line in lines[:end])


def _of_model(name: str) -> str:
    path = CONFIGS / "model" / f"{name}.yaml"
    if not path.is_file():
        return ""
    model = yaml.safe_load(path.read_text(encoding="utf-8"))
    return f"A model of {model['num_layers']} layers of width {model['d_model']}."
