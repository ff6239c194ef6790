"""A batch of sequences that are decoded together: their state in fixed buffers, and one step for all of them.

The step function (embedding, layers, head and sampling) works on the buffers alone. On a GPU it is captured in a CUDA
graph, one for each size of the growing caches, and replayed. On a CPU the calls of C++ that it consists of, but for the
sampling, are recorded and repeated. A step that cannot be captured or recorded is called.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from lkda.checks import InputError, check_count
from lkda.models.decoding import prepare_decoding
from lkda.models.linear import has_hooks
from lkda.models.lm import LanguageModel
from lkda.models.mixer import State
from lkda.ops.runtime.recording import Recording, recorded
from lkda.ops.sampling.op import check_sampling, sample_tokens

# The smallest number of tokens of a growing cache to which a step attends. The sizes are its multiples by powers of 2.
SMALLEST_BUCKET = 256
# Prompts are packed into rows of at most so many tokens; a longer prompt is read in pieces of as many.
PREFILL_TOKENS = 2**16
# Steps that run before a graph is captured. They compile kernels and allocate workspaces.
WARMUP_STEPS = 2


@dataclass(frozen=True)
class Sampling:
    """How tokens are sampled; see `lkda.ops.sampling.op.sample_tokens`.

    Raises: ValueError for a value out of its range.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float = 1.0
    min_p: float = 0.0

    def __post_init__(self) -> None:
        check_sampling(temperature=self.temperature, top_k=self.top_k, top_p=self.top_p, min_p=self.min_p)


class Decoder:
    """Decodes up to `batch_size` sequences, each in a row of the batch.

    Args:
        model: it is prepared for decoding, unless it is so already.
        batch_size: the number of rows.
        max_tokens: the most tokens of a sequence, prompt included, for which growing caches are made.
        sampling: how tokens are sampled.
        graphs: whether to capture or record steps.

    Attributes:
        lengths: the tokens of each row that its state has read.
        logits: [B, vocab], those that the last step sampled from, which the next step overwrites; None before it.
        not_captured: why the steps are not captured on a GPU; None where they are, or on a CPU.
        not_recorded: the operation because of which the steps are not recorded on a CPU, or that a module has a hook;
            None where they are, or on a GPU.
    """

    @torch.inference_mode()
    def __init__(
        self, model: LanguageModel, batch_size: int, max_tokens: int, sampling: Sampling, *, graphs: bool = True
    ) -> None:
        check_count("batch_size", batch_size, least=1)
        self.model, self.max_tokens, self.sampling = prepare_decoding(model), max_tokens, sampling
        self.device = model.embed_tokens.weight.device
        self.constant = model.has_constant_state
        self.state = self.model.init_state(batch_size, max_tokens=max_tokens)
        self.tokens, self.keys, self.positions = torch.zeros(3, batch_size, dtype=torch.int64, device=self.device)
        self.lengths = [0] * batch_size
        self.not_captured: str | None = None if graphs else "graphs=False"
        self.not_recorded: str | None = None if graphs else "graphs=False"
        self._read_tokens = torch.zeros_like(self.tokens)
        self._recording: Recording | None = None
        self._kept: tuple[tuple[int, ...], Tensor, list[State]] | None = None  # a prompt, and what was read of it
        self.logits: Tensor | None = None
        self._uses: dict[int, int] = {}
        self._graphs: dict[int, tuple[torch.cuda.CUDAGraph, Tensor]] = {}  # with its buffer of logits
        self._pool: Any = None

    @torch.inference_mode()
    def admit(
        self,
        rows: Sequence[int],
        prompts: Sequence[Sequence[int]],
        which: Sequence[int],
        keys: Sequence[int],
        *,
        keep: bool = False,
    ) -> None:
        """Begin a sequence in each of `rows` and sample its first token into `tokens`.

        Args:
            prompts: the different prompts, none of which is empty.
            which: for each row the number of its prompt.
            keys: for each row the key of its random numbers.
            keep: whether to keep the state after a single prompt, because the next call begins with the same one.
        """
        at, found = torch.tensor(rows, device=self.device), []
        for first, end in self._groups([len(prompt) for prompt in prompts]):
            logits, state = self._read(prompts[first:end])
            if keep and len(prompts) == 1:
                self._kept = tuple(prompts[0]), logits, state
            mine = [i for i, prompt in enumerate(which) if first <= prompt < end]
            chosen = torch.tensor([which[i] - first for i in mine], device=self.device)
            self._put(at[mine], state, chosen, max(map(len, prompts[first:end])))
            found.append((at[mine], logits[chosen]))
        for row, prompt in zip(rows, which, strict=True):
            self.lengths[row] = len(prompts[prompt])
        self.keys[at] = torch.tensor(keys, device=self.device)
        for some, logits in found:
            self.positions[some] = 0
            self.tokens[some] = self.sample(logits, some)
            self.positions[some] = 1

    @torch.inference_mode()
    def read(self, tokens: Sequence[int]) -> Tensor:
        """Read more tokens of the sequence in row 0 of a batch of one. Returns the logits [1, vocab] after them."""
        whole = torch.tensor([list(tokens)], device=self.device)
        for piece in whole.split(PREFILL_TOKENS, 1):
            logits, after = self.model.prefill(piece, self.state)
            _write(self.state, after)
        self.lengths[0] += len(tokens)
        return logits

    @torch.inference_mode()
    def step(self) -> Tensor:
        """Read `tokens` [B] and sample the next ones into `tokens`, which is returned: a buffer that the next step
        overwrites."""
        for row, length in enumerate(self.lengths):
            if length == self.max_tokens and not self.constant:  # a row without a sequence
                self.release(row)
        if self.device.type == "cpu" and self.not_recorded is None:
            self._advance_by_recording()
        elif self.device.type == "cuda" and self.not_captured is None:
            self.logits = self._advance_by_graph(self._bucket(max(self.lengths) + 1))
        else:
            self.logits = self._advance(self._bucket(max(self.lengths) + 1))
        self.lengths = [length + 1 for length in self.lengths]
        return self.tokens

    @torch.inference_mode()
    def release(self, row: int) -> None:
        """Mark a row as unused, so that its growing caches do not fill up."""
        self.lengths[row] = 0
        if not self.constant:
            for layer in self.state:
                for part in layer:
                    part[row].zero_()

    def _advance(self, bucket: int) -> Tensor:
        """The step function. Returns the logits."""
        state = self.state if self.constant else self.model.cut_state(self.state, bucket)
        logits, after = self.model.step(self.tokens.clamp(min=0), state)
        _write(state, after)
        self.tokens.copy_(self.sample(logits))
        self.positions.add_(1)
        return logits

    def _advance_by_recording(self) -> None:
        """As `_advance`, with the calls of C++ recorded in the second step and repeated from the third one on.

        The first step compiles, and computes what is kept.
        """
        torch.clamp(self.tokens, min=0, out=self._read_tokens)
        if self._recording is not None:
            self._recording.repeat()
        elif self.logits is None:
            self.logits = self._logits_after_step()
        else:
            with recorded() as recording:
                self.logits = self._logits_after_step()
            hooked = [name for name, module in self.model.named_modules() if has_hooks(module)]
            self.not_recorded = f"a hook of {hooked[0] or 'the model'}" if hooked else recording.refused
            self._recording = recording
        assert self.logits is not None
        self.tokens.copy_(self.sample(self.logits))
        self.positions.add_(1)

    def _logits_after_step(self) -> Tensor:
        logits, after = self.model.step(self._read_tokens, self.state)
        _write(self.state, after)
        return logits

    def _advance_by_graph(self, bucket: int) -> Tensor:
        uses = self._uses[bucket] = self._uses.get(bucket, 0) + 1
        if uses <= WARMUP_STEPS:
            # torch.cuda.graph requires that the warm-up runs on a side stream, as the capture does.
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                logits = self._advance(bucket)
            torch.cuda.current_stream().wait_stream(stream)
            return logits
        if bucket not in self._graphs:
            graph = torch.cuda.CUDAGraph()
            try:
                with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
                    logits = self._advance(bucket)
            except (RuntimeError, NotImplementedError) as error:
                self.not_captured = " ".join(str(error).split())[:300]
                logging.getLogger(__name__).warning("decoding without CUDA graphs: %s", self.not_captured)
                return self._advance(bucket)
            self._pool = self._pool or graph.pool()
            self._graphs[bucket] = graph, logits
        graph, logits = self._graphs[bucket]
        graph.replay()
        return logits

    def sample(self, logits: Tensor, rows: Tensor | None = None) -> Tensor:
        """The tokens [N] sampled from logits [N, vocab] for `rows` [N]; None: for all rows."""
        chosen = self.sampling
        return sample_tokens(
            logits,
            keys=self.keys if rows is None else self.keys[rows],
            positions=self.positions if rows is None else self.positions[rows],
            temperature=chosen.temperature,
            top_k=chosen.top_k,
            top_p=chosen.top_p,
            min_p=chosen.min_p,
        )

    def _bucket(self, tokens: int) -> int:
        bucket = SMALLEST_BUCKET
        while bucket < tokens and not self.constant:
            bucket *= 2
        return min(bucket, self.max_tokens) if not self.constant else 0

    def _groups(self, lengths: Sequence[int]) -> list[tuple[int, int]]:
        """Prompts from first to end that are read together: on a CPU each alone, so that its bits do not depend on the
        others."""
        bounds, filled = [0], 0
        for i, length in enumerate(lengths):
            if i > bounds[-1] and (self.device.type == "cpu" or filled + length > PREFILL_TOKENS):
                bounds.append(i)
                filled = 0
            filled += length
        return list(pairwise([*bounds, len(lengths)]))

    def _read(self, prompts: Sequence[Sequence[int]]) -> tuple[Tensor, list[State]]:
        """The logits [N, vocab] after N prompts, and the state after them."""
        kept, self._kept = self._kept, None
        if kept is not None and len(prompts) == 1 and kept[0] == tuple(prompts[0]):
            return kept[1:]
        lengths = [len(prompt) for prompt in prompts]
        state = self.model.init_state(len(prompts), max_tokens=max(lengths))
        packed = torch.tensor([[token for prompt in prompts for token in prompt]], device=self.device)
        if len(prompts) > 1:
            bounds = torch.tensor([0, *lengths]).cumsum(0).to(self.device, torch.int32)
            return self.model.prefill_packed(packed, state, cu_seqlens=bounds)
        for piece in packed.split(PREFILL_TOKENS, 1):
            logits, state = self.model.prefill(piece, state)
        return logits, state

    def _put(self, rows: Tensor, state: list[State], which: Tensor, longest: int) -> None:
        """Copy rows `which` of a state of sequences of up to `longest` tokens into `rows` of the batch."""
        into = self.state if self.constant else self.model.cut_state(self.state, longest)
        for own, new in zip(into, state, strict=True):
            for part, given in zip(own, new, strict=True):
                _check_kept_shape(part, given)
                part[rows] = given[which].to(part.dtype)


def _write(state: list[State], after: list[State]) -> None:
    """Copy `after` into `state`, except what was written in place."""
    for layer, new_layer in zip(state, after, strict=True):
        for part, new in zip(layer, new_layer, strict=True):
            if part is not new:
                _check_kept_shape(part, new)
                part.copy_(new)


def _check_kept_shape(part: Tensor, new: Tensor) -> None:
    """Raises InputError if a state that was made with `max_tokens` has grown."""
    if part.shape[1:] != new.shape[1:]:
        raise InputError(
            f"a mixer's state of {list(part.shape[1:])} per sequence, of init_state(max_tokens=...), has become "
            f"{list(new.shape[1:])}: the mixer must allocate it for max_tokens tokens and write into it."
        )
