"""A digest of what a picture shows, kept in its PNG file: a test can tell whether it shows the numbers of today.

The bytes of a PNG depend on fonts and on the version of what draws it, and the numbers do not.
"""

from __future__ import annotations

import hashlib
import json
import struct
import zlib
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

KEYWORD = "Shown"
_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_DIGITS = 6  # significant digits; further ones may depend on the machine


def digest(shown: Any) -> str:
    """The digest of nested lists and dictionaries of texts and numbers."""
    text = json.dumps(_rounded(shown), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _rounded(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [_rounded(one) for one in value]
    return value if value is None or isinstance(value, (str, bool)) else f"{value:.{_DIGITS}g}"


def contents(figure: Figure) -> list[Any]:
    """The curves, bars, marks and texts of a figure of Matplotlib."""
    found: list[Any] = []
    for axes in figure.axes:
        found += [axes.get_title(), axes.get_xlabel(), axes.get_ylabel(), *(text.get_text() for text in axes.texts)]
        found += [[str(line.get_label()), np.asarray(line.get_xydata()).tolist()] for line in axes.lines]
        found += [
            [*bar.get_xy(), bar.get_width(), bar.get_height()] for bar in axes.patches if isinstance(bar, Rectangle)
        ]
        found += [np.asarray(marks.get_offsets()).tolist() for marks in axes.collections]
    return found


def with_digest(png: bytes, found: str) -> bytes:
    """The PNG file with the digest in a text chunk behind its header."""
    chunk = b"tEXt" + KEYWORD.encode() + b"\0" + found.encode()
    end = len(_SIGNATURE) + 25  # of the header
    return png[:end] + struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk)) + png[end:]
