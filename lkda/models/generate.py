"""Generating tokens: many prompts in a batch, or the continuation of one."""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lkda.checks import InputError, check_count
from lkda.device import physical_memory
from lkda.models.decoder import Decoder, Sampling
from lkda.models.lm import LanguageModel
from lkda.ops.sampling.op import check_sampling as check_sampling_values
from lkda.ops.sampling.reference import draw_key

# Steps on a GPU between two reads of the sampled tokens by the host. The work after the end of a text is wasted.
STEPS_PER_READ = 8
MOST_ROWS = 256
# The share of the free memory of a GPU that the states of a batch may take.
STATE_SHARE = 0.6

END, LENGTH, STOP = "end of document", "max_new_tokens", "stop"


@dataclass
class Request:
    """A text to generate.

    Attributes:
        prompt: its tokens.
        prompt_index, sample_index: numbers of which the random numbers depend, beside the seed and the position.
        count: the number of generated tokens.
        reason: why the text ended; None before. Whoever consumes the tokens may set it (STOP) to end the text.
    """

    prompt: Sequence[int]
    prompt_index: int = 0
    sample_index: int = 0
    count: int = field(default=0, init=False)
    reason: str | None = field(default=None, init=False)


class BatchGenerator:
    """Yields (request, token) for every token of every request, and (request, None) when its text has ended.

    The tokens of a request depend on its prompt, its numbers and the seed. A matrix product rounds differently for
    another number of rows, so in a batch the logits depend on the other requests by rounding. On a CPU each request is
    therefore decoded alone, unless `batch_size` says otherwise.

    Args:
        requests: they are decoded in this order, `batch_size` at a time. A finished one makes place for the next one.
        max_new_tokens: the largest number of tokens of a request.
        end_tokens: tokens that end a text, and are not yielded.
        seed: of the sampling.
        batch_size: None: 1 on a CPU; on a GPU up to MOST_ROWS, as many as its memory holds.

    Attributes:
        decoder: it has the batch; None before the first token.

    Raises: ValueError for values out of range.
    """

    def __init__(
        self,
        model: LanguageModel,
        requests: Sequence[Request],
        *,
        max_new_tokens: int,
        sampling: Sampling,
        seed: int = 0,
        end_tokens: Collection[int] = (),
        batch_size: int | None = None,
    ) -> None:
        check_count("generate: max_new_tokens", max_new_tokens, least=0)
        check_seed("generate", seed)
        for request in requests:
            check_prompt(request.prompt, model.embed_tokens.num_embeddings)
        if batch_size is not None:
            check_count("generate: batch_size", batch_size, least=1)
        self.model, self.requests, self.sampling, self.seed = model, requests, sampling, seed
        self.max_new_tokens, self.end_tokens, self.batch_size = max_new_tokens, frozenset(end_tokens), batch_size
        self.decoder: Decoder | None = None
        self._max_tokens = max((len(request.prompt) for request in requests), default=0) + max_new_tokens
        self._rows = self._number_of_rows() if requests else 0
        check_states_fit(model, rows=self._rows, tokens=self._max_tokens)

    def __iter__(self) -> Iterator[tuple[Request, int | None]]:
        waiting = deque(self.requests)
        if not self.max_new_tokens:
            for request in waiting:
                request.reason = LENGTH
                yield request, None
            return
        if not waiting:
            return
        rows: list[Request | None] = [None] * self._rows
        device = self.model.embed_tokens.weight.device
        strides = STEPS_PER_READ if device.type == "cuda" else 1
        self.decoder = decoder = Decoder(self.model, len(rows), self._max_tokens, self.sampling)
        history = torch.zeros(strides, len(rows), dtype=torch.int64, device=device)
        while True:
            fresh = self._admit(rows, waiting, decoder)
            if fresh:
                first = decoder.tokens.tolist()
                for row in fresh:
                    yield from self._found(rows, row, first[row])
            alive = [row for row, request in enumerate(rows) if request is not None]
            if not alive and not waiting:
                return
            if not alive:
                continue
            for i in range(strides):
                history[i].copy_(decoder.step())
            for found in history.tolist():
                for row in alive:
                    yield from self._found(rows, row, found[row])
            for row in alive:
                if rows[row] is None:
                    decoder.release(row)

    def _number_of_rows(self) -> int:
        weight = self.model.embed_tokens.weight
        rows = self.batch_size or (MOST_ROWS if weight.is_cuda else 1)
        if weight.is_cuda and self.batch_size is None:
            free, _ = torch.cuda.mem_get_info(weight.device)
            rows = min(rows, max(1, int(STATE_SHARE * free / max(1, self.model.state_bytes(self._max_tokens)))))
        return min(rows, len(self.requests))

    def _admit(self, rows: list[Request | None], waiting: deque[Request], decoder: Decoder) -> list[int]:
        """Put waiting requests into free rows. Returns these rows."""
        free = [row for row, request in enumerate(rows) if request is None][: len(waiting)]
        if not free:
            return []
        chosen = [waiting.popleft() for _ in free]
        prompts = list(dict.fromkeys(tuple(request.prompt) for request in chosen))
        numbers = {prompt: i for i, prompt in enumerate(prompts)}
        decoder.admit(
            free,
            prompts,
            [numbers[tuple(request.prompt)] for request in chosen],
            [draw_key(self.seed, request.prompt_index, request.sample_index) for request in chosen],
            keep=bool(waiting) and tuple(waiting[0].prompt) == prompts[0],
        )
        for row, request in zip(free, chosen, strict=True):
            rows[row] = request
        return free

    def _found(self, rows: list[Request | None], row: int, token: int) -> Iterator[tuple[Request, int | None]]:
        """Yield a token, and free the row if its text ends."""
        request = rows[row]
        if request is None:
            return
        if token < 0:
            raise InputError("generate: the model's logits are not finite numbers, so that nothing can be sampled.")
        if token in self.end_tokens:
            request.reason = END
        else:
            request.count += 1
            if request.count == self.max_new_tokens:
                request.reason = LENGTH
            yield request, token
        if request.reason is not None:
            rows[row] = None
            yield request, None


def generate(
    model: LanguageModel,
    tokens: Tensor,
    *,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float = 1.0,
    min_p: float = 0.0,
    seed: int = 0,
    end_tokens: Collection[int] = (),
) -> Iterator[int]:
    """Yields the tokens that follow a prompt, one by one.

    It ends after `max_new_tokens`, or when the model samples one of `end_tokens`, which is not yielded.

    Args:
        tokens: [1, T], the prompt, T >= 1.
        max_new_tokens: the largest number of tokens to sample.
        temperature, top_k, top_p, min_p: see `lkda.ops.sampling.op.sample_tokens`.
        seed: of the sampling.
        end_tokens: tokens that end a document; without any, only `max_new_tokens` ends the text.
    Raises: ValueError for a prompt or a value out of range.
    """
    if tokens.dim() != 2 or tokens.shape[0] != 1 or tokens.shape[1] == 0:
        raise InputError(f"generate: tokens must be [1, T] with T >= 1, got {list(tokens.shape)}.")
    found = BatchGenerator(
        model,
        [Request(tokens[0].tolist())],
        max_new_tokens=max_new_tokens,
        sampling=Sampling(temperature, top_k, top_p, min_p),
        seed=seed,
        end_tokens=end_tokens,
    )
    return (token for _, token in found if token is not None)


def check_sampling(
    *, max_new_tokens: int, temperature: float, top_p: float, top_k: int | None = None, min_p: float = 0.0
) -> None:
    """Raises ValueError for values that `generate` cannot sample with."""
    check_count("generate: max_new_tokens", max_new_tokens, least=0)
    check_sampling_values(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)


def check_states_fit(model: LanguageModel, *, rows: int, tokens: int) -> None:
    """Raises InputError if the states of `rows` texts of up to `tokens` tokens need more memory than the device has.
    Growing caches are allocated for all tokens when a text begins."""
    device = model.embed_tokens.weight.device
    has = torch.cuda.mem_get_info(device)[1] if device.type == "cuda" else physical_memory()
    needed = rows * model.state_bytes(tokens)
    if needed > has:
        raise InputError(
            f"generate: a batch of {rows:,} with up to {tokens:,} tokens per text (prompt and max_new_tokens) needs "
            f"{needed:,} bytes of state, and the {device.type} has {has:,} of memory: give a smaller max_new_tokens or "
            "batch_size."
        )


def check_seed(fn: str, seed: object) -> None:
    """Raises ValueError unless it is a whole number. `fn` is the function that was called, for the message."""
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise InputError(f"{fn}: seed must be a whole number, got {seed!r}.")


def check_prompt(prompt: Sequence[int], vocab_size: int) -> None:
    """Raises InputError for a prompt without tokens, or with tokens that the model does not have."""
    if not prompt:
        raise InputError("generate: the prompt is empty; it must have at least one token.")
    if min(prompt) < 0 or max(prompt) >= vocab_size:
        raise InputError(
            f"generate: the prompt holds token ids from {min(prompt)} to {max(prompt)} and the model knows "
            f"0 to {vocab_size - 1}; encode the prompt with the tokenizer that the model was trained with."
        )
