"""Numbers as text for tables and plots."""

from __future__ import annotations

import re

_FACTORS = {"": 1, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "%": 0.01}
_FACTORS |= {"B": 1, "K": 2**10, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}
_QUANTITY = re.compile(r"([\d,]*\.?\d+(?:e[+-]\d+)?) ?(k|M|G|T|%|B|K|KiB|MiB|GiB|)(?: \(noisy\))?")


def three(x: float) -> str:
    """Three significant digits without an exponent: 0.0612, 12.3, 1,042."""
    return f"{x:.3g}" if 1e-4 <= x < 999.5 else f"{x:,.0f}"


def count(x: float) -> str:
    """1234567 -> 1.23M"""
    for size, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if x >= 0.9995 * size:  # 999,999 is 1M, not 1e+03k
            return f"{x / size:.3g}{unit}"
    return f"{x:.3g}"


def memory(x: float) -> str:
    """131072 -> 128 KiB"""
    for size, unit in ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if x >= size:
            shown = x / size
            return f"{shown:.3g} {unit}" if shown < 999.5 else f"{shown:.0f} {unit}"
    return f"{x:.0f} B"


def length(x: float) -> str:
    """A sequence length: 65536 -> 64K"""
    return f"{x / 2**20:.3g}M" if x >= 2**20 else f"{x / 1024:.3g}K" if x >= 1024 else f"{x:g}"


def quantity(text: str) -> float | None:
    """The number that one of these functions wrote: 8.06 MiB -> 8451522.56; None for other text."""
    found = _QUANTITY.fullmatch(text)
    return float(found[1].replace(",", "")) * _FACTORS[found[2]] if found else None
