"""A session: what a model has read, kept between calls, to be continued, copied and saved."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor

from lkda.checks import InputError, refusing_damage
from lkda.data.text.tokenizer import document_start, encode_text
from lkda.generation.generate import Generated
from lkda.generation.text import GrowingText, check_model, check_stop, check_tokenizer, check_unicode
from lkda.io import check_output_file, replacing
from lkda.models.cached_attention import CachedAttention
from lkda.models.decoder import Decoder, Sampling
from lkda.models.decoding import prepare_decoding
from lkda.models.generate import END, LENGTH, STOP, check_prompt, check_sampling, check_seed, check_states_fit
from lkda.models.lm import LanguageModel
from lkda.models.mixers import find_mixer
from lkda.ops.sampling.reference import draw_key
from lkda.special_tokens import document_ends

FORMAT = 2
SMALLEST_CACHE = 1024


class Session:
    """Reads a text once and continues it many times.

        session = lkda.Session(model, tokenizer)
        session.read(document)
        answer = session.clone()
        answer.read("Question: ...")
        print(answer.generate(max_new_tokens=50).text)

    The state has a constant size if `constant` is true (KDA, simplified). Otherwise it grows linearly with the tokens.

    Attributes:
        num_tokens: the tokens that were read or generated so far.
        constant: whether the size of the state does not depend on the number of tokens.
    """

    def __init__(self, model: LanguageModel, tokenizer: Tokenizer) -> None:
        check_tokenizer(tokenizer)
        check_model(model)
        self.num_tokens = 0
        self._model, self._tokenizer = prepare_decoding(model), tokenizer
        self._name_of_model = fingerprint(model)
        self.constant = model.has_constant_state
        self._decoder = Decoder(self._model, 1, SMALLEST_CACHE, Sampling())
        self._logits: Tensor | None = None
        self._unread: list[int] = []  # a generated token that the state has not read

    @property
    def state_bytes(self) -> int:
        """Bytes of the state after the tokens so far."""
        return self._model.state_bytes(self._decoder.lengths[0])

    def __repr__(self) -> str:
        growth = "constant" if self.constant else "grows with the tokens"
        return f"Session({self.num_tokens:,} tokens, state of {self.state_bytes:,} bytes, {growth})"

    def read(self, text: str) -> None:
        """Read a text, after what was read and generated. The first one begins a document.

        Raises: ValueError if `text` is not text, UTF-8 cannot encode it, or the model lacks one of its tokens.
        """
        if not isinstance(text, str):
            raise InputError(f"Session.read: text must be text, got {text!r}.")
        check_unicode("Session.read: the text", text)
        start = document_start(self._tokenizer) if not self.num_tokens else None
        tokens = [*([] if start is None else [start]), *encode_text(self._tokenizer, text)]
        if tokens:
            check_prompt(tokens, self._model.embed_tokens.num_embeddings)
            self._read(tokens)

    def stream(
        self,
        *,
        max_new_tokens: int = 200,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float = 1.0,
        min_p: float = 0.0,
        stop: str | Sequence[str] = (),
        seed: int = 0,
    ) -> Iterator[str]:
        """As `generate`, but yields the text in pieces. Arguments are checked at once.

        Until the stream has ended or is closed, nothing else may be read or generated; a `clone` may.
        """
        pieces = self._pieces(max_new_tokens, Sampling(temperature, top_k, top_p, min_p), check_stop(stop), seed)
        return (piece for piece, _ in pieces if piece)

    def generate(
        self,
        *,
        max_new_tokens: int = 200,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float = 1.0,
        min_p: float = 0.0,
        stop: str | Sequence[str] = (),
        seed: int = 0,
    ) -> Generated:
        """Continue the text. Arguments as in `lkda.generate`; a draw depends on the seed and the number of tokens.

        The session then continues after the tokens that were generated, those of a stop string included, without the
        token that ends a document.

        Raises: ValueError for a value out of its range, or if nothing was read.
        """
        sampling, strings = Sampling(temperature, top_k, top_p, min_p), check_stop(stop)
        *_, (_, result) = self._pieces(max_new_tokens, sampling, strings, seed)
        assert result is not None
        return result

    @torch.inference_mode()
    def clone(self) -> Session:
        """A session that continues from here by itself."""
        other = object.__new__(Session)
        other.__dict__.update(self.__dict__)
        other._unread = list(self._unread)
        other._decoder = self._decoder_of(self._decoder.max_tokens)
        return other

    def save(self, path: str | Path) -> None:
        """Write the session to a file, atomically. Missing folders are made.

        The file holds the state and the logits of the next token, but neither weights nor text, so that its size is
        constant where that of the state is.

        Raises: ValueError if no file can be written there.
        """
        path = Path(path)
        check_output_file(path, option="path")
        path.parent.mkdir(parents=True, exist_ok=True)
        length = self._decoder.lengths[0]
        state = self._decoder.state if self.constant else self._model.cut_state(self._decoder.state, max(1, length))
        content = {
            "lkda_session": FORMAT,
            "model": self._name_of_model,
            "num_tokens": self.num_tokens,
            "unread": self._unread,
            "length": length,
            "logits": None if self._logits is None else self._logits.cpu(),
            "state": [[part.cpu().clone() for part in layer] for layer in state],
        }
        with replacing(path) as file:
            torch.save(content, file)

    @classmethod
    def load(cls, path: str | Path, model: LanguageModel, tokenizer: Tokenizer) -> Session:
        """The session that `save` wrote.

        Raises: ValueError if there is no such file, it is no session, or it is one of another model.
        """
        content = _read_file(Path(path))
        session = cls(model, tokenizer)
        with refusing_damage(path):
            _check_same_model(path, content["model"], session._name_of_model)
            session._restore(content)
        return session

    def _restore(self, content: dict[str, Any]) -> None:
        """Take over what `save` wrote. Raises what Python raises for a value of a wrong kind, if it is damaged."""
        count, unread, length, logits = (content[name] for name in ("num_tokens", "unread", "length", "logits"))
        vocabulary = self._model.embed_tokens.num_embeddings
        if not isinstance(unread, list) or not all(type(token) is int and 0 <= token < vocabulary for token in unread):
            raise ValueError(f"the tokens are no list of numbers from 0 to {vocabulary - 1}")
        if any(type(number) is not int for number in (count, length)) or not 0 <= count - len(unread) == length:
            raise ValueError(f"{count} tokens, {len(unread)} unread and {length} read do not fit together")
        if (logits is None) != (not count) or (count and logits.shape != (1, vocabulary)):
            raise ValueError("the logits do not fit the vocabulary")
        if count and (not logits.is_floating_point() or logits.layout != torch.strided):
            raise ValueError(f"the logits are {logits.dtype}, {logits.layout}")
        for mixer, layer in zip(self._model.mixers(), content["state"], strict=True):
            # The length says how much memory is made, and the step in C++ writes where the length of the state says.
            if isinstance(mixer, CachedAttention) and (layer[2].tolist(), layer[0].shape[-2]) != (
                [[length]],
                max(1, length),
            ):
                raise ValueError(f"a cache of {layer[2].tolist()} tokens does not fit {length} tokens")
        self.num_tokens, self._unread = count, unread
        self._logits = None if logits is None else logits.detach().to(self._decoder.device)
        self._decoder = Decoder(self._model, 1, _room(length), Sampling())
        self._fill(self._decoder, content["state"], length)

    def _pieces(
        self, max_new_tokens: int, sampling: Sampling, stop: Sequence[str], seed: int
    ) -> Iterator[tuple[str, Generated | None]]:
        """Pieces of the text; the last one comes with the whole. Arguments are checked at once."""
        check_sampling(max_new_tokens=max_new_tokens, temperature=1.0, top_p=1.0)
        check_seed("Session.generate", seed)
        if not self.num_tokens:
            raise InputError("Session.generate: the session is empty; read a text first.")
        if max_new_tokens:
            check_states_fit(self._model, rows=1, tokens=self.num_tokens + max_new_tokens)
        return self._continued(max_new_tokens, sampling, stop, seed)

    def _continued(
        self, max_new_tokens: int, sampling: Sampling, stop: Sequence[str], seed: int
    ) -> Iterator[tuple[str, Generated | None]]:
        if max_new_tokens:
            self._read([])
        begins = (
            document_start(self._tokenizer) is not None and self.num_tokens == 1
        )  # no more than the mark of a document
        text = GrowingText(self._tokenizer, stop, continues=not begins)
        ends, reason = document_ends(self._tokenizer), LENGTH
        for token in self._sampled(max_new_tokens, sampling, seed):
            if token in ends:
                reason = END
                if text.tokens:  # the state has read them, and the next token follows them
                    assert self._decoder.logits is not None
                    self._logits = self._decoder.logits.clone()
                break
            self.num_tokens += 1
            self._unread = [token]
            yield text.add(token), None
            if text.stopped:
                reason = STOP
                break
        rest = text.finish()
        reason = STOP if text.stopped else reason
        yield rest, Generated("", 0, 0, text.text, tuple(text.tokens), reason)

    def _sampled(self, count: int, sampling: Sampling, seed: int) -> Iterator[int]:
        """Sampled tokens; each is read when the next one is asked for."""
        if not count:
            return
        self._reserve(self._decoder.lengths[0] + count)
        decoder = self._decoder
        if decoder.sampling != sampling:
            decoder = self._decoder = self._decoder_of(decoder.max_tokens, sampling)
        assert self._logits is not None
        key, position = draw_key(seed, 0, 0), self.num_tokens
        with torch.inference_mode():
            decoder.keys.fill_(key)
            decoder.positions.fill_(position)
            decoder.tokens.copy_(decoder.sample(self._logits))
            decoder.positions.add_(1)
        for left in range(count, 0, -1):
            token = int(decoder.tokens[0])
            if token < 0:
                raise InputError("Session.generate: the model's logits are not finite numbers.")
            yield token
            if self.num_tokens != position + count - left + 1 or self._unread != [token]:
                raise InputError(
                    "Session.stream: the session has read or generated something else since the last piece."
                )
            self._unread = self._unread if left == 1 else []
            if left > 1:
                decoder.step()

    def _read(self, tokens: Sequence[int]) -> None:
        unread = [*self._unread, *tokens]
        if unread:
            self._reserve(self._decoder.lengths[0] + len(unread))
            self.num_tokens += len(tokens)
            self._logits, self._unread = self._decoder.read(unread), []

    def _reserve(self, tokens: int) -> None:
        """Make room for `tokens` tokens in growing caches."""
        if not self.constant and tokens > self._decoder.max_tokens:
            check_states_fit(self._model, rows=1, tokens=tokens)
            self._decoder = self._decoder_of(_room(tokens))

    def _decoder_of(self, max_tokens: int, sampling: Sampling | None = None) -> Decoder:
        """A decoder with a copy of the state."""
        old = self._decoder
        decoder = Decoder(self._model, 1, max_tokens, sampling or old.sampling)
        length = old.lengths[0]
        state = old.state if self.constant else self._model.cut_state(old.state, max(1, length))
        self._fill(decoder, state, length)
        return decoder

    @torch.inference_mode()
    def _fill(self, decoder: Decoder, state: Sequence[Sequence[Tensor]], length: int) -> None:
        into = decoder.state if self.constant else self._model.cut_state(decoder.state, max(1, length))
        for own, given in zip(into, state, strict=True):
            for part, new in zip(own, given, strict=True):
                if part.shape != new.shape or part.dtype != new.dtype:
                    raise ValueError(f"a state of {list(new.shape)} stands for one of {list(part.shape)}")
                part.copy_(new)
        decoder.lengths[0] = length


def _room(tokens: int) -> int:
    room = SMALLEST_CACHE
    while room < tokens:
        room *= 2
    return room


def fingerprint(model: LanguageModel) -> dict[str, Any]:
    """What tells models apart: their kind, in words, their options, and a hash of their weights."""
    digest = hashlib.sha256()
    for name, weight in model.state_dict().items():
        digest.update(name.encode())
        digest.update(weight.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    pattern, config = model.config["mixer"]["pattern"], model.config
    kind = f"{'-'.join(pattern)}, {config['num_layers']} layers of {config['d_model']} channels"
    dtypes = {str(getattr(mixer, "state_dtype", "")) for mixer in model.mixers()} - {""}
    states = f", states in {', '.join(sorted(dtypes))}" if dtypes else ""
    dtype = str(model.embed_tokens.weight.dtype).removeprefix("torch.")
    return {
        "kind": f"{kind}, weights in {dtype}{states}",
        "options": _options(config),
        "weights": digest.hexdigest(),
    }


def _options(config: dict[str, Any]) -> dict[str, Any]:
    """The options on which the logits depend, beside the weights, with the defaults of those that are not given."""
    options = {name: config[name] for name in ("norm_eps", "embed_scale")}
    options["num_heads"] = config["mixer"]["num_heads"]
    for mixer in dict.fromkeys(config["mixer"]["pattern"]):
        given = config["mixer"].get(mixer) or {}
        for name, parameter in inspect.signature(find_mixer(mixer)).parameters.items():
            if parameter.default is not parameter.empty and name not in ("backend", "state_dtype", "conv_std"):
                options[f"{mixer}.{name}"] = given.get(name, parameter.default)
    return options


def _check_same_model(path: str | Path, saved: dict[str, Any], given: dict[str, Any]) -> None:
    if saved != given:
        changed = [name for name, value in given["options"].items() if saved.get("options", {}).get(name) != value]
        other = f"it has another {', '.join(changed)}" if changed else "its weights are others"
        if saved["kind"] != given["kind"]:
            other = f"it is {given['kind']}"
        raise InputError(
            f"{path} is a session of another model ({saved['kind']}, weights {saved['weights'][:12]}): {other} "
            f"({given['weights'][:12]}). Load that model, or begin a new session."
        )


def _read_file(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise InputError(f"there is no session at {path}.")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises many kinds for a file that is not its own
        raise InputError(f"{path} is not a session, or is incomplete ({type(error).__name__}).") from error
    if not isinstance(content, dict) or content.get("lkda_session") != FORMAT:
        raise InputError(f"{path} is not a session of format {FORMAT}.")
    return content
