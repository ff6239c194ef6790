"""KDA models of transformers and of flash-linear-attention (FLA) with their own kernels and with lkda's.

    python -m lkda.bench.foreign_models --out out/foreign                        every implementation, a process each
    python -m lkda.bench.foreign_models --only kimi_lkda,kimi_torch --out out/foreign
    python -m lkda.bench.foreign_models --only fla,fla_lkda --steps 300 --seeds 0,1,2 --out out/losses

The models are dense, and random weights are trained on a random chain of tokens, which can be learned. A row has the
seconds to the end of the first step, tokens/s of a training step (float32 weights, bf16 autocast, AdamW), peak memory,
the loss of every step, and tokens/s of reading a prompt with a cache (bf16 weights). Every row is written to
OUT/foreign_models.json as soon as it is measured, and a later call measures only the rows that are missing there.
lkda.report.redraw makes a table and a plot of it.
"""

from __future__ import annotations

import argparse
import importlib
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lkda.bench.files import write_json
from lkda.bench.measure import header, versions
from lkda.bench.timing import synchronize
from lkda.checks import InputError
from lkda.device import resolve_device

PREFILLS = 10  # prompts that are timed, where as many steps are
FILE = "foreign_models.json"
PACKAGES = ("transformers", "flash-linear-attention")
BRANCHES = 4  # tokens that can follow a token of the chain


@dataclass(frozen=True)
class Sizes:
    """Of the models and of a batch, [rows, context]; and whether each layer is computed again in the backward pass."""

    layers: int = 12
    width: int = 1024
    head_dim: int = 128
    vocab_size: int = 32000
    rows: int = 4
    context: int = 4096
    checkpointing: bool = False


def kimi(sizes: Sizes) -> nn.Module:
    """KimiLinearForCausalLM with three KDA layers for each MLA layer, dense."""
    transformers = importlib.import_module("transformers")
    heads = sizes.width // sizes.head_dim
    # transformers' cache needs at least one layer of attention.
    attention = {sizes.layers - 1, *range(3, sizes.layers, 4)}
    kinds = ["full_attention" if i in attention else "linear_attention" for i in range(sizes.layers)]
    config = transformers.KimiLinearConfig(
        vocab_size=sizes.vocab_size,
        hidden_size=sizes.width,
        intermediate_size=4 * sizes.width,
        num_hidden_layers=sizes.layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        kv_lora_rank=sizes.width // 2,
        qk_nope_head_dim=sizes.head_dim,
        qk_rope_head_dim=sizes.head_dim // 2,
        v_head_dim=sizes.head_dim,
        layer_types=kinds,
        mlp_layer_types=["dense"] * sizes.layers,
        linear_head_dim=sizes.head_dim,
        linear_num_heads=heads,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    made: nn.Module = transformers.KimiLinearForCausalLM(config)
    return made


def kimi_torch(sizes: Sizes) -> nn.Module:
    """With transformers' PyTorch code, also where FLA is installed: transformers chooses when it is imported."""
    if "transformers" in sys.modules:
        raise InputError("kimi_torch must be measured in a process that has not imported transformers.")
    for package in ("fla", "causal_conv1d"):
        sys.modules[package] = None  # type: ignore[assignment]
    return kimi(sizes)


def kimi_fla(sizes: Sizes) -> nn.Module:
    """With FLA's kernels for KDA, which transformers uses where FLA can be imported."""
    _require_fla()
    return kimi(sizes)


def kimi_lkda(sizes: Sizes) -> nn.Module:
    """With lkda's kernels."""
    from lkda.integrations.transformers import use_lkda_kernels

    model = kimi(sizes)
    use_lkda_kernels(model)
    return model


def fla(sizes: Sizes) -> nn.Module:
    """FLA's KDAForCausalLM with its own kernels."""
    _require_fla()
    models = importlib.import_module("fla.models")
    config = models.KDAConfig(
        vocab_size=sizes.vocab_size,
        hidden_size=sizes.width,
        intermediate_size=4 * sizes.width,
        num_hidden_layers=sizes.layers,
        num_heads=sizes.width // sizes.head_dim,
        head_dim=sizes.head_dim,
        expand_v=1.0,
        max_position_embeddings=sizes.context,
    )
    made: nn.Module = models.KDAForCausalLM(config)
    return made


def fla_core(sizes: Sizes) -> nn.Module:
    """FLA's model with lkda's `chunk_kda` alone."""
    return _fla_with(("kda",), sizes)


def fla_lkda(sizes: Sizes) -> nn.Module:
    """FLA's model with lkda's KDA, convolutions and gated norm, and SwiGLU in PyTorch."""
    from lkda.integrations.fla import PARTS

    return _fla_with(PARTS, sizes)


def _fla_with(parts: tuple[str, ...], sizes: Sizes) -> nn.Module:
    from lkda.integrations.fla import register

    register(parts)
    return fla(sizes)


def _require_fla() -> None:
    try:
        importlib.import_module("fla.ops.kda")
    except ImportError as error:
        raise InputError(f"this row needs flash-linear-attention, which could not be imported: {error}.") from error


IMPLEMENTATIONS: dict[str, Callable[[Sizes], nn.Module]] = {
    build.__name__: build for build in (kimi_torch, kimi_fla, kimi_lkda, fla, fla_core, fla_lkda)
}


class Chain:
    """Batches of random chains: BRANCHES tokens, equally likely, can follow each token."""

    def __init__(self, sizes: Sizes, device: torch.device, seed: int) -> None:
        self.sizes, self.device = sizes, device
        self.generator = torch.Generator().manual_seed(seed)
        table = torch.Generator().manual_seed(0)  # the chain is the same for all seeds
        self.table = torch.randint(3, sizes.vocab_size, (sizes.vocab_size, BRANCHES), generator=table)

    def batch(self) -> Tensor:
        rows, context = self.sizes.rows, self.sizes.context
        choices = torch.randint(0, BRANCHES, (context, rows), generator=self.generator)
        tokens = [torch.randint(3, self.sizes.vocab_size, (rows,), generator=self.generator)]
        for choice in choices[1:]:
            tokens.append(self.table[tokens[-1], choice])
        return torch.stack(tokens, 1).to(self.device)


def measure(
    name: str, sizes: Sizes, device: torch.device, *, steps: int, seed: int, warmup: int = 10
) -> dict[str, Any]:
    """A row: training steps, of which the first `warmup` are not timed, then prefill.

    Raises: InputError if a package is missing, or steps is not above warmup.
    """
    if steps <= warmup:
        raise InputError(f"steps must be above {warmup}, which are not timed, got {steps}.")
    torch.set_float32_matmul_precision("high")
    torch.manual_seed(seed)
    model: Any = IMPLEMENTATIONS[name](sizes).to(device, torch.float32).train()
    if sizes.checkpointing:
        model.gradient_checkpointing_enable()
    row = _case(name, seed, sizes, steps) | {"warmup": warmup} | _train(model, sizes, device, steps, warmup, seed)
    return row | {"prefill_tokens_per_s": _prefill(model, sizes, device, min(PREFILLS, steps - warmup), seed)}


def _case(name: str, seed: int, sizes: Sizes, steps: int) -> dict[str, Any]:
    """What a row measures."""
    return {"implementation": name, "seed": seed, "steps": steps, **asdict(sizes)}


def _train(model: nn.Module, sizes: Sizes, device: torch.device, steps: int, warmup: int, seed: int) -> dict[str, Any]:
    chain = Chain(sizes, device, seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    losses, seconds = [], []
    for _ in range(steps):
        tokens = chain.batch()
        synchronize(device)
        begin = time.perf_counter()
        optimizer.zero_grad()
        with torch.autocast(device.type, torch.bfloat16):
            loss = model(input_ids=tokens, labels=tokens, use_cache=False).loss
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        synchronize(device)
        seconds.append(time.perf_counter() - begin)
        losses.append(loss.detach())
    peak = {"peak_bytes": torch.cuda.max_memory_allocated(device)} if device.type == "cuda" else {}
    median = statistics.median(seconds[warmup:])
    speed = {"first_step_s": seconds[0], "step_ms": 1000 * median, "tokens_per_s": sizes.rows * sizes.context / median}
    return speed | peak | {"losses": [round(float(loss), 5) for loss in losses]}


@torch.no_grad()
def _prefill(model: nn.Module, sizes: Sizes, device: torch.device, prompts: int, seed: int) -> float:
    model = model.to(torch.bfloat16).eval()
    tokens, seconds = Chain(sizes, device, seed).batch(), []
    for _ in range(2 + prompts):  # two that are not timed
        synchronize(device)
        begin = time.perf_counter()
        model(input_ids=tokens, use_cache=True, logits_to_keep=1)
        synchronize(device)
        seconds.append(time.perf_counter() - begin)
    return tokens.numel() / statistics.median(seconds[2:])


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help=f"a directory, for {FILE}")
    parser.add_argument("--only", default=",".join(IMPLEMENTATIONS), help="implementations, separated by commas")
    parser.add_argument("--steps", type=int, default=40, help="training steps")
    parser.add_argument("--warmup", type=int, default=10, help="training steps at the beginning that are not timed")
    parser.add_argument("--seeds", default="0", help="seeds, separated by commas")
    parser.add_argument("--seconds", type=float, default=1200, help="time limit of a row in seconds")
    for name, value in asdict(Sizes()).items():
        kind: dict[str, Any] = {"action": "store_true"} if isinstance(value, bool) else {"type": int, "default": value}
        parser.add_argument(f"--{name.replace('_', '-')}", help="default: %(default)s", **kind)
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--row", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if unknown := [name for name in options.only.split(",") if name not in IMPLEMENTATIONS]:
        parser.error(f"--only takes names of {', '.join(IMPLEMENTATIONS)}; got {', '.join(unknown)}")
    if not all(seed.isdigit() for seed in options.seeds.split(",")):
        parser.error(f"--seeds takes whole numbers, separated by commas; got {options.seeds!r}")
    if not 0 <= options.warmup < options.steps:
        parser.error(f"--warmup must be below --steps; got {options.warmup} and {options.steps}")
    return options


def main() -> None:
    options = _options()
    try:
        device = resolve_device(options.device, option="--device", gpu="cuda", instead="--device=cpu")
    except InputError as error:
        raise SystemExit(f"error: {error}") from None
    sizes = Sizes(**{name: getattr(options, name) for name in asdict(Sizes())})
    if options.row:
        counts = {"steps": options.steps, "warmup": options.warmup, "seed": int(options.seeds)}
        print(json.dumps(measure(options.only, sizes, device, **counts)))
        return
    path, machine = options.out / FILE, header(device)
    machine["versions"] |= versions(PACKAGES)
    try:
        rows = _measured(path, machine)
    except InputError as error:
        raise SystemExit(f"error: {error}") from None
    for name in options.only.split(","):
        for seed in map(int, options.seeds.split(",")):
            case = _case(name, seed, sizes, options.steps)
            if any(case.items() <= row.items() for row in rows):
                continue
            rows.append(_row_of_process(case, options.seconds, sys.argv[1:]))
            _say(rows[-1])
            write_json(path, {"kind": "foreign_models", "header": machine, "rows": rows})


def _measured(path: Path, machine: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows of an earlier call that have a result. Raises InputError where the file is not of the same machine."""
    if not path.exists():
        return []
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        there = {name: found["header"][name] for name in ("device", "versions")}
        rows = [row for row in found["rows"] if "reason" not in row]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path} is not of lkda.bench.foreign_models ({error!r}); choose another --out.") from error
    if there != {name: machine[name] for name in there}:
        raise InputError(f"{path} was measured on {there}, which differs from this machine; choose another --out.")
    return rows


def _row_of_process(case: dict[str, Any], seconds: float, arguments: list[str]) -> dict[str, Any]:
    """The row that a process of its own measures; the reason where it fails or takes longer."""
    name, seed = case["implementation"], str(case["seed"])
    command = [sys.executable, "-m", "lkda.bench.foreign_models", *arguments, "--row", "--only", name, "--seeds", seed]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=seconds)
    except subprocess.TimeoutExpired:
        return case | {"reason": f"not done after {seconds:g} s"}
    if done.returncode:
        said = done.stderr.strip().splitlines() or [f"it ended with the status {done.returncode}"]
        return case | {"reason": said[-1]}
    row: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return row


def _say(row: dict[str, Any]) -> None:
    if "reason" in row:
        print(f"{row['implementation']}: {row['reason']}", flush=True)
        return
    print(
        f"{row['implementation']}, seed {row['seed']}: {row['tokens_per_s']:,.0f} tokens/s in training, "
        f"{row['prefill_tokens_per_s']:,.0f} in prefill, first step {row['first_step_s']:.1f} s, "
        f"loss {row['losses'][0]:.3f} -> {row['losses'][-1]:.3f}",
        flush=True,
    )


if __name__ == "__main__":
    main()
