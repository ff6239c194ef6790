"""Measures decoding and prefill of a whole model, and the `generate` of other packages beside it.

A state of `context` tokens is not computed: its caches are zeros of that length, which take as long to read.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models

from lkda.bench.timing import copy_gb_per_s, synchronize
from lkda.checks import InputError
from lkda.device import physical_memory
from lkda.models.decoder import Decoder, Sampling
from lkda.models.decoding import prepare_decoding
from lkda.models.generate import STEPS_PER_READ
from lkda.models.lm import LanguageModel

# Seconds that a row is measured for; the best of this many intervals counts.
SECONDS, INTERVALS = 0.5, 3
WARMUP_STEPS = 2 * STEPS_PER_READ
# The steps of an interval. They end before the sequences have LEAST_CONTEXT more tokens than at its beginning.
STEPS, LEAST_CONTEXT = 128, 256
# The share of the free memory that states may take; the rest is for activations and graphs.
MEMORY_SHARE = 0.85
FORWARD = (8, 2048)  # the batch whose forward without head prefill is compared with
PEER_TOKENS = (16, 80)  # a peer's time per token is from the difference of two lengths

Row = dict[str, Any]


def decode_row(model: LanguageModel, batch: int, context: int, sampling: Sampling) -> Row:
    """tokens/s of all sequences, with the host reading the tokens after every STEPS_PER_READ steps.

    Returns: also bytes_per_sequence, and bytes_per_step, which a step must read and write: the weights, the states, and
        what a step writes of them. copy_share is the time in which a copy moves as many bytes, divided by the time of a
        step. If the states do not fit into the memory, the row has bytes_needed and the reason instead.
    """
    device = model.embed_tokens.weight.device
    row: Row = {"bytes_per_sequence": model.state_bytes(context), "weight_bytes": weight_bytes(model)}
    needed, free = batch * model.state_bytes(context), _free_bytes(device)
    if needed > MEMORY_SHARE * free:
        return row | _does_not_fit(needed, free)
    copied = copy_gb_per_s(device)
    if device.type == "cuda":  # give the memory of the copy back, and do not count it
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    try:
        speed, decoder = _decode(prepare_decoding(model), batch, context, sampling)
    except torch.OutOfMemoryError:
        return row | _does_not_fit(needed, free)
    # A constant state is written whole; of a growing cache, the entries so far are read and one is written.
    tokens = context - LEAST_CONTEXT + STEPS // 2
    moved = row["weight_bytes"] + batch * (model.state_bytes(tokens) + model.state_bytes(1))
    row |= {"tokens_per_s": speed, "bytes_per_step": moved, "copy_gb_per_s": copied}
    row |= {"copy_share": moved / (copied * 1e9) / (batch / speed)}
    if device.type == "cuda":
        row |= {"graphs": decoder.not_captured is None, "peak_bytes": torch.cuda.max_memory_allocated(device)}
    return row | ({"not_captured": decoder.not_captured} if decoder.not_captured else {})


def weight_bytes(model: LanguageModel) -> int:
    """Bytes of the weights that a step reads: all of them, without the table of an embedding that is not tied."""
    table = model.embed_tokens.weight
    tied = model.lm_head.weight is table
    return sum(p.numel() * p.element_size() for p in model.parameters() if tied or p is not table)


def _decode(model: LanguageModel, batch: int, context: int, sampling: Sampling) -> tuple[float, Decoder]:
    # The steps that are measured stay in the bucket of `context` tokens.
    decoder = Decoder(model, batch, context, sampling)
    start = context - LEAST_CONTEXT

    def rewind() -> None:
        decoder.lengths = [start] * batch
        for layer in decoder.state:
            for part in layer:
                if part.dtype == torch.int64:  # the lengths of growing caches
                    part.fill_(start)

    def steps(count: int) -> None:
        for _ in range(count // STEPS_PER_READ):
            for _ in range(STEPS_PER_READ):
                decoder.step()
            decoder.tokens.tolist()

    with torch.inference_mode():
        rewind()
        steps(WARMUP_STEPS)
        best, begin = 0.0, time.perf_counter()
        while not best or time.perf_counter() - begin < SECONDS * INTERVALS:
            rewind()
            at = time.perf_counter()
            steps(STEPS)
            best = max(best, STEPS * batch / (time.perf_counter() - at))
    return best, decoder


def prefill_row(model: LanguageModel, context: int) -> Row:
    """tokens/s of reading a prompt of `context` tokens, and of the forward without head of FORWARD tokens.

    If the states do not fit into the memory, the row has bytes_needed and the reason instead.
    """
    device, vocab_size = model.embed_tokens.weight.device, model.embed_tokens.num_embeddings
    needed, free = model.state_bytes(context + 1), _free_bytes(device)
    if needed > MEMORY_SHARE * free:
        return {"bytes_per_sequence": model.state_bytes(context)} | _does_not_fit(needed, free)
    decoder = Decoder(model, 1, context + 1, Sampling())
    prompt = torch.randint(0, vocab_size, (context,)).tolist()
    batch = torch.randint(0, vocab_size, FORWARD, device=device)

    def read() -> None:
        decoder.release(0)
        decoder.read(prompt)

    with torch.inference_mode():
        own, forward = _seconds(read, device), _seconds(lambda: model.hidden(batch), device)
    speeds = {"tokens_per_s": context / own, "forward_tokens_per_s": batch.numel() / forward}
    peak = {"peak_bytes": torch.cuda.max_memory_allocated(device)} if device.type == "cuda" else {}
    return {"bytes_per_sequence": model.state_bytes(context), **speeds, **peak}


def peer_row(model: LanguageModel, peer: str, batch: int, context: int) -> Row:
    """tokens/s of `generate` of the exported model, greedy and with its cache, after a prompt of `context` tokens.

    Args:
        peer: transformers (eager), transformers_compiled (a static cache and torch.compile) or fla.
    Returns: beside tokens_per_s, lkda_tokens_per_s: lkda's own in the same process, on the same state.
    Raises: InputError for a model that the peer does not have or does not compile.
    """
    from transformers import AutoModelForCausalLM

    import lkda

    if peer == "fla":
        import fla.models  # noqa: F401
    weight, vocab_size = model.embed_tokens.weight, model.embed_tokens.num_embeddings
    words = {f"w{i}": i for i in range(vocab_size)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w0"))
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "exported"
        lkda.export(model, tokenizer, out, format="fla" if peer == "fla" else "hf")
        theirs: Any = AutoModelForCausalLM.from_pretrained(out)
    theirs = theirs.to(weight.device, weight.dtype).eval()
    static: Row = {}
    if peer == "transformers_compiled":
        if weight.device.type != "cuda":
            raise InputError("transformers' generate compiles on a GPU only.")
        if not getattr(theirs, "_can_compile_fullgraph", False):
            raise InputError(f"transformers' generate does not compile {type(theirs).__name__}.")
        static = {"cache_implementation": "static"}
    # The first tokens may be special ones, which end a text.
    prompt = torch.randint(min(3, vocab_size - 1), vocab_size, (batch, context), device=weight.device)
    mask = torch.ones_like(prompt)

    def generate(count: int) -> None:
        lengths = {"max_new_tokens": count, "min_new_tokens": count}
        theirs.generate(prompt, attention_mask=mask, do_sample=False, use_cache=True, **lengths, **static)

    with torch.no_grad():  # what is compiled need not support inference mode
        # The longer one first: a static cache keeps its size, and a new size would be compiled again.
        long, short = (_seconds(partial(generate, count), weight.device, times=1) for count in reversed(PEER_TOKENS))
    own = decode_row(model, batch, max(context, LEAST_CONTEXT), Sampling(0.0))
    if long <= short:
        raise InputError(f"{PEER_TOKENS[1]} tokens took no longer than {PEER_TOKENS[0]}: the times are too noisy.")
    speed = (PEER_TOKENS[1] - PEER_TOKENS[0]) * batch / (long - short)
    shared = {"lkda_tokens_per_s": own["tokens_per_s"]} if "tokens_per_s" in own else {}
    return {"tokens_per_s": speed, **shared}


def _free_bytes(device: torch.device) -> int:
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else physical_memory()


def _does_not_fit(needed: int, free: int) -> Row:
    reason = f"does not fit: the states take {needed / 2**30:,.1f} GiB, and {free / 2**30:,.1f} GiB are free"
    return {"bytes_needed": needed, "reason": reason}


def _seconds(call: Callable[[], object], device: torch.device, times: int | None = None) -> float:
    """The shortest time of `times` calls. By default of as many as begin within SECONDS * INTERVALS, and at least
    INTERVALS: the time of a short call varies with what else the host does."""
    call()
    found: list[float] = []
    start = time.perf_counter()
    while len(found) < (times or INTERVALS) or (times is None and time.perf_counter() - start < SECONDS * INTERVALS):
        synchronize(device)
        begin = time.perf_counter()
        call()
        synchronize(device)
        found.append(time.perf_counter() - begin)
    return min(found)
