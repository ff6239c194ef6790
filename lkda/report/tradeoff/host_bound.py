"""Prefill that takes as long as Python needs to start the kernels, so that it says nothing about the mixers."""

from __future__ import annotations

from collections.abc import Sequence

from lkda.report.draw.units import length
from lkda.report.tradeoff.measurements import Measurement

LONGEST = 16 * 1024  # tokens; the GPU needs more time for longer prompts than the host
SHARE = 0.5  # of the tokens/s of a forward pass of a large batch
MARK = "host-bound"
MEANING = (
    f"Rows marked as {MARK} are of prompts of at most {length(LONGEST)} tokens, and reach less than half the tokens/s "
    "of the same model's forward pass of 8 x 2,048 tokens: the GPU waits for the host."
)


def is_host_bound(one: Measurement) -> bool:
    """Whether a prompt is read so much slower than a large batch that the GPU must have waited for the host."""
    if one.stage != "prefill" or one.context > LONGEST or not one.tokens_per_s or not one.forward_tokens_per_s:
        return False
    return one.tokens_per_s < SHARE * one.forward_tokens_per_s


def comparable(found: Sequence[Measurement]) -> list[Measurement]:
    """Those from which something can be concluded: without the contexts at which one is bound by the host."""
    bound = {(one.where, one.context) for one in found if is_host_bound(one)}
    return [one for one in found if one.stage != "prefill" or (one.where, one.context) not in bound]


def note(found: Sequence[Measurement]) -> str:
    """A sentence that says what was left out and why; empty where nothing was."""
    bound = [one for one in found if is_host_bound(one)]
    if not bound:
        return ""
    contexts = sorted({one.context for one in bound})
    prompt = f"{length(contexts[-1])} tokens" + (" or fewer" if len(contexts) > 1 else "")
    times = sorted(1000 * one.context / float(one.tokens_per_s or 1) for one in bound)
    took = " to ".join(dict.fromkeys(_two_digits(time) for time in (times[0], times[-1])))
    mixers = {one.series for one in bound}
    all_mixers = {one.series for one in found if one.stage == "prefill" and one.tokens_per_s}
    which = "every mixer" if mixers == all_mixers else ", ".join(sorted(mixers))
    return (
        f"Reading a prompt of {prompt} takes {took} ms with {which}, which is "
        "the time that Python needs to start the kernels, so nothing is concluded from it."
    )


def _two_digits(x: float) -> str:
    return f"{float(f'{x:.2g}'):,g}"
