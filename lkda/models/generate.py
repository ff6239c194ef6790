"""The decoding loop: the prompt in one forward pass, then one token at a time."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator

import torch
from torch import Tensor

from lkda.checks import InputError
from lkda.models.lm import LanguageModel


@torch.inference_mode()
def generate(
    model: LanguageModel,
    tokens: Tensor,
    *,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_p: float = 1.0,
    seed: int = 0,
    end_tokens: Collection[int] = (),
) -> Iterator[int]:
    """Yields the tokens that follow a prompt, one by one.

    It ends after `max_new_tokens`, or when the model samples one of `end_tokens`, which is not yielded.

    Args:
        tokens: [1, T], the prompt, T >= 1.
        max_new_tokens: the largest number of tokens to sample.
        temperature: the logits are divided by it; 0 takes the most likely token.
        top_p: in (0, 1]; sample from the smallest set of tokens whose probabilities sum to it.
        seed: of the sampling.
        end_tokens: tokens that end a document; without any, only `max_new_tokens` ends the text.
    Raises: ValueError for a prompt, temperature or top_p out of range.
    """
    if tokens.dim() != 2 or tokens.shape[0] != 1 or tokens.shape[1] == 0:
        raise InputError(f"generate: tokens must be [1, T] with T >= 1, got {list(tokens.shape)}.")
    vocab_size = model.embed_tokens.num_embeddings
    if int(tokens.min()) < 0 or int(tokens.max()) >= vocab_size:
        raise InputError(
            f"generate: the prompt holds token ids from {int(tokens.min())} to {int(tokens.max())} and the model knows "
            f"0 to {vocab_size - 1}; encode the prompt with the tokenizer that the model was trained with."
        )
    check_sampling(max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p)
    generator = torch.Generator().manual_seed(seed)
    logits, state = model.prefill(tokens, model.init_state(1))
    for sampled in range(max_new_tokens):
        token = _sample(logits[0].float().cpu(), temperature, top_p, generator)
        if token in end_tokens:
            return
        yield token
        if sampled + 1 < max_new_tokens:
            logits, state = model.step(tokens.new_tensor([token]), state)


def check_sampling(*, max_new_tokens: int, temperature: float, top_p: float) -> None:
    """Raises ValueError for values that `generate` cannot sample with."""
    if isinstance(max_new_tokens, bool) or not isinstance(max_new_tokens, int) or max_new_tokens < 0:
        raise InputError(f"generate: max_new_tokens must be a whole number >= 0, got {max_new_tokens!r}.")
    given = (temperature, top_p)
    numbers = all(isinstance(value, int | float) and math.isfinite(value) for value in given)
    numbers = numbers and not any(isinstance(value, bool) for value in given)
    if not numbers or temperature < 0 or not 0 < top_p <= 1:
        raise InputError(f"generate: temperature must be >= 0 and top_p in (0, 1], got {temperature!r} and {top_p!r}.")


def _sample(logits: Tensor, temperature: float, top_p: float, generator: torch.Generator) -> int:
    # A logit over a temperature of nearly 0 is no finite number: only the likeliest token has a probability then.
    if logits.abs().max() > torch.finfo(logits.dtype).max * temperature or temperature == 0:
        return int(logits.argmax())
    probabilities, order = torch.softmax(logits / temperature, -1).sort(descending=True, stable=True)
    # Keep each token whose predecessors sum to less than top_p. The first one is always kept.
    kept = torch.where(probabilities.cumsum(-1) - probabilities < top_p, probabilities, 0)
    return int(order[torch.multinomial(kept, 1, generator=generator)])
