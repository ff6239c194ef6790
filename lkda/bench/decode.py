"""Measures decoding: tokens/s and bytes of state of whole models, by mixer, batch and context, and prefill beside it.

    python -m lkda.bench.decode --model small --mixer kda softmax --batch 1 256 --context 1024 262144 --out decode.json
    python -m lkda.bench.decode --mixer kda --batch 256 --context 1024 --top-p 0.95 --state-dtype int8 --dtype bfloat16
    python -m lkda.bench.decode --mixer kda+kda+kda+mla --peers transformers --out decode.json

Models have random weights. A state of `context` tokens is not computed: its caches are zeros of that length, which take
as long to read. Rows that do not fit into the memory have `bytes_needed` and no speed; rows that fail have `error`.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
import yaml
from tokenizers import Tokenizer, models

from lkda.bench.files import write_json
from lkda.bench.measure import header
from lkda.device import resolve_device
from lkda.models import build_model
from lkda.models.decoder import Decoder, Sampling
from lkda.models.decoding import prepare_decoding
from lkda.models.generate import STEPS_PER_READ
from lkda.models.lm import LanguageModel
from lkda.models.stepwise import set_state_dtype

CONFIGS = Path(__file__).parents[2] / "configs"
# Seconds that a row is measured for; the best of this many intervals counts.
SECONDS, INTERVALS = 0.5, 3
WARMUP_STEPS = 2 * STEPS_PER_READ
# The share of the free memory that states may take; the rest is for activations and graphs.
MEMORY_SHARE = 0.85
FORWARD = (8, 2048)  # the batch whose forward without head prefill is compared with

Row = dict[str, Any]


def build(size: str, mixer: str, *, dtype: torch.dtype, device: torch.device, state_dtype: str | None) -> LanguageModel:
    """A model of configs/model/SIZE.yaml with random weights and mixers NAME+NAME+... with their default options."""
    plain = yaml.safe_load((CONFIGS / "model" / f"{size}.yaml").read_text())
    mixers = {"pattern": mixer.split("+"), "num_heads": plain["num_heads"]}
    plain = {name: value for name, value in plain.items() if name not in ("name", "num_heads", "learning_rate")}
    torch.manual_seed(0)
    model = build_model({**plain, "mixer": mixers}).to(device, dtype).eval()
    if state_dtype is not None:
        set_state_dtype(model, state_dtype)
    return model


def decode_row(model: LanguageModel, batch: int, context: int, sampling: Sampling) -> Row:
    """tokens/s of all sequences, with the host reading the tokens after every STEPS_PER_READ steps."""
    device = model.embed_tokens.weight.device
    needed = batch * model.state_bytes(context)
    row: Row = {"batch": batch, "context": context, "bytes_per_sequence": model.state_bytes(context)}
    if device.type == "cuda" and needed > MEMORY_SHARE * torch.cuda.mem_get_info(device)[0]:
        return row | {"bytes_needed": needed}
    # The steps that are measured stay in the bucket of `context` tokens.
    decoder = Decoder(model, batch, max(context, 1024), sampling)
    start = max(0, context - 256)

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
        while time.perf_counter() - begin < SECONDS * INTERVALS:
            rewind()
            at = time.perf_counter()
            steps(128)
            best = max(best, 128 * batch / (time.perf_counter() - at))
    return (
        row
        | {"tokens_per_s": best, "graphs": device.type == "cuda" and not decoder.not_captured}
        | ({"not_captured": decoder.not_captured} if decoder.not_captured else {})
    )


def prefill_row(model: LanguageModel, context: int) -> Row:
    """tokens/s of reading a prompt of `context` tokens, and of the forward without head of FORWARD tokens."""
    device = model.embed_tokens.weight.device
    decoder = Decoder(model, 1, context + 1, Sampling())
    prompt = torch.randint(0, model.embed_tokens.num_embeddings, (context,)).tolist()
    batch = torch.randint(0, model.embed_tokens.num_embeddings, FORWARD, device=device)

    def read() -> None:
        decoder.release(0)
        decoder.read(prompt)

    with torch.inference_mode():
        own, forward = _seconds(read, device), _seconds(lambda: model.hidden(batch), device)
    return {"context": context, "prefill_tokens_per_s": context / own, "forward_tokens_per_s": batch.numel() / forward}


def peer_row(model: LanguageModel, peer: str, batch: int, context: int) -> Row:
    """tokens/s of `generate` of the exported model, greedy and with its cache, after a prompt of `context` tokens."""
    from transformers import AutoModelForCausalLM

    import lkda

    if peer == "fla":
        import fla  # noqa: F401
    vocab_size = model.embed_tokens.num_embeddings
    words = {f"w{i}": i for i in range(vocab_size)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w0"))
    weight = model.embed_tokens.weight
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "exported"
        lkda.export(model, tokenizer, out, format="hf" if peer == "transformers" else peer)
        theirs: Any = AutoModelForCausalLM.from_pretrained(out)
        theirs = theirs.to(weight.device, weight.dtype).eval()
    prompt = torch.randint(3, vocab_size, (batch, context), device=weight.device)

    def generate(count: int) -> None:
        theirs.generate(prompt, max_new_tokens=count, min_new_tokens=count, do_sample=False, use_cache=True)

    with torch.inference_mode():
        generate(8)
        short, long = (_seconds(partial(generate, count), weight.device) for count in (16, 80))
    return {"peer": peer, "batch": batch, "context": context, "tokens_per_s": 64 * batch / (long - short)}


def _seconds(call: Callable[[], object], device: torch.device) -> float:
    call()
    best = float("inf")
    for _ in range(INTERVALS):
        _wait(device)
        begin = time.perf_counter()
        call()
        _wait(device)
        best = min(best, time.perf_counter() - begin)
    return best


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def rows(options: argparse.Namespace, device: torch.device) -> Iterator[Row]:
    """Every row that is asked for."""
    sampling = Sampling(0.0) if options.top_p is None else Sampling(1.0, top_p=options.top_p)
    for mixer in options.mixer:
        state_dtype = options.state_dtype
        dtype = getattr(torch, options.dtype)
        model = build(options.model, mixer, dtype=dtype, device=device, state_dtype=state_dtype)
        common = {"model": options.model, "mixer": mixer, "dtype": options.dtype, "state_dtype": state_dtype}
        weights = sum(p.numel() * p.element_size() for p in model.parameters())
        common |= {"sampling": "greedy" if options.top_p is None else f"top_p {options.top_p}", "weight_bytes": weights}
        prepared = prepare_decoding(model)
        for context in options.context:
            for batch in options.batch:
                yield common | _guarded(partial(decode_row, prepared, batch, context, sampling), batch, context)
            if options.prefill:
                yield common | _guarded(partial(prefill_row, model, context), 1, context)
        for peer in options.peers:
            for batch in options.batch:
                yield (
                    common
                    | _guarded(partial(peer_row, model, peer, batch, options.peer_context), batch, options.peer_context)
                    | {"peer": peer}
                )


def _guarded(measure: Callable[[], Row], batch: int, context: int) -> Row:
    """The row, or one that says why there is none: a peer or a size that fails must not lose the others."""
    try:
        return measure()
    except Exception as error:
        return {
            "batch": batch,
            "context": context,
            "error": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}",
        }
    finally:
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def _shown(value: object) -> str:
    return f"{value:,.1f}" if isinstance(value, float) else str(value)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="small", help="of configs/model")
    parser.add_argument("--mixer", nargs="+", default=["kda"], help="a pattern, as kda+kda+softmax")
    parser.add_argument("--batch", nargs="+", type=int, default=[1])
    parser.add_argument("--context", nargs="+", type=int, default=[1024])
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help="of the weights")
    parser.add_argument("--state-dtype", choices=["float32", "bfloat16", "int8"], help="of the states of KDA")
    parser.add_argument("--top-p", type=float, help="sample; without it, greedy")
    parser.add_argument("--prefill", action="store_true", help="measure prefill at each context too")
    parser.add_argument("--peers", nargs="*", choices=["transformers", "fla"], default=[])
    parser.add_argument("--peer-context", type=int, default=1024, help="tokens of the peers' prompts")
    parser.add_argument("--device", default="auto", help="auto | cpu | gpu")
    parser.add_argument("--out", type=Path, help="the JSON")
    options = parser.parse_args(arguments)
    device, found = resolve_device(options.device), []
    for row in rows(options, device):
        found.append(row)
        print(" ".join(f"{name}={_shown(value)}" for name, value in row.items()), flush=True)
        if options.out is not None:
            write_json(options.out, {"kind": "decode", **header(device), "rows": found})


if __name__ == "__main__":
    main()
