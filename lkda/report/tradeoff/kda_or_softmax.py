"""Where lkda's KDA and softmax attention overtake each other, in sentences."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence

from lkda.report.draw.units import length
from lkda.report.tradeoff.crossings import Pair, pairs, rounded
from lkda.report.tradeoff.measurements import OF_MODELS, Measurement

_STAGES = {"kernel": "kernels", "layer": "layers", "training step": "training steps"}


def said_of_crossings(found: Sequence[Measurement]) -> str:
    """A sentence for what each of both overtakes in as the context grows, and one for where it is always faster."""
    measured = {one.where: one for one in found if one.tokens_per_s}
    usual = max(devices := [one.device for one in measured.values()], key=devices.count) if measured else ""
    between = [pair for pair in pairs(found) if pair.own and set(pair.mixers) == {"kda", "softmax"}]
    parts = {pair.where: _parts(pair, measured[pair.where], usual) for pair in between}
    said = []
    for mixer, other in (("kda", "softmax"), ("softmax", "kda")):
        faster = [pair for pair in between if pair.mixers[0] == mixer]
        overtakes = [pair for pair in faster if pair.context is not None and pair.shortest < pair.longest]
        always = [pair for pair in faster if pair not in overtakes]
        if overtakes:
            said.append(f"As the context grows, {mixer} overtakes {other}{_places(overtakes, parts)}.")
        if always:
            said.append(f"At every compared context, {mixer} is faster than {other}{_places(always, parts)}.")
    return " ".join(said)


def _parts(pair: Pair, measured: Measurement, usual: str) -> list[str]:
    """The setting in parts, without the device that most are measured on. Of an operator only the mode is named."""
    parts = measured.setting.split(", ")
    parts = [f"model {parts[0]}", *parts[1:]] if pair.stage in OF_MODELS else parts[:1]
    return parts if measured.device == usual else [*parts, measured.device]


def _places(found: Sequence[Pair], parts: Mapping[str, Sequence[str]]) -> str:
    """As " (model small, bf16) in prefill (batch 1, 1K to 256K) and in decode (batch 1 at 1K; batch 2 at 2K)": first
    the model and the precision, if all share them, and for each stage what its settings share."""
    models = all(pair.stage in OF_MODELS for pair in found)
    shared = [part for part in _common([parts[pair.where] for pair in found])[:2] if models]
    stages: dict[str, list[Pair]] = defaultdict(list)
    for pair in found:
        stages[pair.stage].append(pair)
    said = []
    for stage, same in stages.items():
        rests = [[part for part in parts[pair.where] if part not in shared] for pair in same]
        said.append(f"in {_STAGES.get(stage, stage)} ({_settings(rests, [_context(pair) for pair in same])})")
    first = f" ({', '.join(shared)})" if shared else ""
    return f"{first} {_joined(said)}"


def _context(pair: Pair) -> str:
    """From where to where one is faster, or about where it overtakes."""
    if pair.shortest == pair.longest:
        return length(pair.longest)
    if pair.context is None:
        return f"{length(pair.shortest)} to {length(pair.longest)}"
    return f"about {rounded(pair.context)}"


def _settings(rests: Sequence[Sequence[str]], contexts: Sequence[str]) -> str:
    """The settings of a stage: what all share, then those of each context together."""
    common = _common(rests)
    by_context: dict[str, list[str]] = defaultdict(list)
    for rest, context in zip(rests, contexts, strict=True):
        by_context[context].append(", ".join(part for part in rest if part not in common))
    if len(rests) == 1:
        return ", ".join([*common, f"at {contexts[0]}" if contexts[0].startswith("about") else contexts[0]])
    each = "; ".join(f"{_batches(settings)} at {context}" for context, settings in by_context.items())
    return f"{', '.join(common)}: {each}" if common else each


def _common(found: Sequence[Sequence[str]]) -> list[str]:
    return [part for part in found[0] if all(part in other for other in found)]


def _batches(settings: Sequence[str]) -> str:
    """Several sizes of batches as "batches of 16 and 256", the smaller first."""
    sizes = [re.fullmatch(r"batch ([\d,]+)", one) for one in settings]
    numbers = sorted(int(size[1].replace(",", "")) for size in sizes if size)
    if len(sizes) == len(numbers) > 1:
        return f"batches of {_joined([f'{number:,}' for number in numbers])}"
    return _joined(settings)


def _joined(words: Sequence[str]) -> str:
    return " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)
