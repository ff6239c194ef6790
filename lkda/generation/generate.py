"""Texts that continue prompts, whole or in pieces while they are sampled."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import overload

from tokenizers import Tokenizer

from lkda.checks import InputError, check_count
from lkda.generation.text import GrowingText, check_model, check_stop, check_tokenizer, encode_prompt
from lkda.models.decoder import Sampling
from lkda.models.generate import STOP, BatchGenerator, Request
from lkda.models.lm import LanguageModel
from lkda.special_tokens import document_ends

# A larger number of samples is taken for a typing mistake. A list of all texts, about 0.3 KB each, is made before the
# first one.
MOST_SAMPLES, MOST_TEXTS = 10**6, 10**7


@dataclass(frozen=True)
class Generated:
    """One text.

    Attributes:
        prompt: the text that it continues.
        prompt_index, sample_index: the number of the prompt, and of the text among those of the prompt.
        text: the continuation, without the stop string.
        tokens: those sampled, with the ones of the stop string, without the one that ends a document.
        reason: why it ended: "end of document", "stop" (a stop string) or "max_new_tokens".
    """

    prompt: str
    prompt_index: int
    sample_index: int
    text: str
    tokens: tuple[int, ...]
    reason: str


@dataclass(frozen=True)
class Generations(Sequence[Generated]):
    """All texts, prompt by prompt, and for each prompt sample by sample."""

    samples: tuple[Generated, ...]

    def __len__(self) -> int:
        return len(self.samples)

    @overload
    def __getitem__(self, index: int) -> Generated: ...

    @overload
    def __getitem__(self, index: slice) -> tuple[Generated, ...]: ...

    def __getitem__(self, index: int | slice) -> Generated | tuple[Generated, ...]:
        return self.samples[index]

    @property
    def texts(self) -> list[str]:
        return [sample.text for sample in self.samples]

    @property
    def tokens(self) -> list[tuple[int, ...]]:
        return [sample.tokens for sample in self.samples]

    @property
    def reasons(self) -> list[str]:
        return [sample.reason for sample in self.samples]


@dataclass(frozen=True)
class Piece:
    """A part of a text.

    Attributes:
        text: it may be empty, if a token completes no character.
        result: the whole, with its last piece; None before.
    """

    prompt_index: int
    sample_index: int
    text: str
    result: Generated | None = None


def generate(
    model: LanguageModel,
    tokenizer: Tokenizer,
    prompts: str | Sequence[str],
    *,
    max_new_tokens: int = 200,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float = 1.0,
    min_p: float = 0.0,
    num_samples: int = 1,
    stop: str | Sequence[str] = (),
    seed: int = 0,
    ignore_eos: bool = False,
    batch_size: int | None = None,
) -> Generations:
    """Continue one or many prompts.

    A draw depends on the seed, the number of the prompt, the number of the sample and the position alone. On a CPU,
    where texts are generated one after the other, a text is the same whatever other prompts there are. In a batch, as
    on a GPU, the logits depend on the other texts by rounding.

    Args:
        prompts: a text or several. An empty one begins a document.
        max_new_tokens: the largest number of tokens of a text.
        temperature: the logits are divided by it; 0 takes the likeliest token.
        top_k: sample from the top_k likeliest tokens; None: from all.
        top_p: in (0, 1]; sample from the smallest set of likeliest tokens that has this share of the probability.
        min_p: in [0, 1]; sample from the tokens at least min_p times as likely as the likeliest.
        num_samples: texts per prompt, at most 1,000,000, and 10,000,000 in all.
        stop: a text, or several, that ends a text and is not part of it.
        seed: of the sampling.
        ignore_eos: whether to continue past the end of a document.
        batch_size: texts that are generated at a time. None: one on a CPU; on a GPU as many as its memory holds, up to
            256.
    Raises: ValueError for a value out of its range, or a prompt that cannot be encoded.
    """
    pieces = stream(
        model,
        tokenizer,
        prompts,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        num_samples=num_samples,
        stop=stop,
        seed=seed,
        ignore_eos=ignore_eos,
        batch_size=batch_size,
    )
    found = (piece.result for piece in pieces if piece.result is not None)
    return Generations(tuple(sorted(found, key=lambda sample: (sample.prompt_index, sample.sample_index))))


def stream(
    model: LanguageModel,
    tokenizer: Tokenizer,
    prompts: str | Sequence[str],
    *,
    max_new_tokens: int = 200,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float = 1.0,
    min_p: float = 0.0,
    num_samples: int = 1,
    stop: str | Sequence[str] = (),
    seed: int = 0,
    ignore_eos: bool = False,
    batch_size: int | None = None,
) -> Iterator[Piece]:
    """As `generate`, but yields the pieces of the texts as soon as they are sampled. Arguments are checked at once."""
    check_tokenizer(tokenizer)
    check_model(model)
    texts = check_prompts(prompts)
    check_number_of_texts(len(texts), num_samples)
    strings = check_stop(stop)
    if not isinstance(ignore_eos, bool):
        raise InputError(f"ignore_eos must be true or false, got {ignore_eos!r}.")
    encoded = [encode_prompt(tokenizer, text, name=_name_of(i, texts))[0].tolist() for i, text in enumerate(texts)]
    batch = BatchGenerator(
        model,
        [Request(tokens, i, j) for i, tokens in enumerate(encoded) for j in range(num_samples)],
        max_new_tokens=max_new_tokens,
        sampling=Sampling(temperature, top_k, top_p, min_p),
        seed=seed,
        end_tokens=() if ignore_eos else document_ends(tokenizer),
        batch_size=batch_size,
    )
    return pieces_of(batch, tokenizer, texts, strings)


def pieces_of(
    batch: BatchGenerator, tokenizer: Tokenizer, texts: Sequence[str], stop: Sequence[str]
) -> Iterator[Piece]:
    """The pieces of the texts of a batch.

    Args:
        texts: the prompts, by the `prompt_index` of their requests.
        stop: the strings that end a text.
    """
    growing: dict[tuple[int, int], GrowingText] = {}
    for request, token in batch:
        key = (request.prompt_index, request.sample_index)
        if key not in growing:
            growing[key] = GrowingText(tokenizer, stop, continues=bool(texts[key[0]]))
        if token is not None:
            yield Piece(*key, growing[key].add(token))
            if growing[key].stopped:
                request.reason = STOP
            continue
        rest, text = growing[key].finish(), growing.pop(key)
        reason = STOP if text.stopped else str(request.reason)
        yield Piece(*key, rest, Generated(texts[key[0]], *key, text.text, tuple(text.tokens), reason))


def check_number_of_texts(prompts: int, num_samples: object) -> None:
    """Raises ValueError for a number of samples per prompt that is out of range, or too many texts in all."""
    check_count("num_samples", num_samples, least=1, most=MOST_SAMPLES)
    assert isinstance(num_samples, int)
    if prompts * num_samples > MOST_TEXTS:
        raise InputError(
            f"{prompts:,} prompts with num_samples={num_samples:,} are {prompts * num_samples:,} texts, and at most "
            f"{MOST_TEXTS:,} are generated at a time: give fewer prompts or samples."
        )


def check_prompts(prompts: str | Sequence[str]) -> list[str]:
    """The prompts as a list. Raises ValueError for anything but a text or a list of texts."""
    texts = [prompts] if isinstance(prompts, str) else prompts
    if not isinstance(texts, Sequence) or not all(isinstance(text, str) for text in texts):
        raise InputError(f"prompts must be a text or a list of texts, got {prompts!r}.")
    return list(texts)


def _name_of(number: int, texts: Sequence[str]) -> str:
    return "the prompt" if len(texts) == 1 else f"prompts[{number}]"
